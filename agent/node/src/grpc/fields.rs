//! The fields of requests: what is wrong with them is collected, so that a caller reads all of it at once; and the id of a
//! request with the digest of the rest.

use std::fmt::Display;

use prost::Message;
use uuid::Uuid;

use crate::{
    error::{Error, FieldError, chain},
    state::command::Request,
};

/// Collects wrong fields, so that a caller reads them all.
#[derive(Debug, Default)]
pub struct Fields(Vec<FieldError>);

impl Fields {
    /// Takes a value, or notes what is wrong with the field.
    pub fn take<T, E: std::error::Error>(&mut self, field: impl Display, value: Result<T, E>) -> Option<T> {
        value.map_err(|e| self.wrong(field, chain(&e))).ok()
    }

    /// Notes what is wrong with a field.
    pub fn wrong(&mut self, field: impl Display, problem: impl Into<String>) {
        self.0.push(FieldError::new(field.to_string(), problem));
    }

    /// The value if nothing was wrong.
    ///
    /// # Errors
    /// All that was noted.
    pub fn done<T>(self, value: Option<T>) -> Result<T, Error> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(Error::Invalid(self.0)),
        }
    }
}

/// One field.
///
/// # Errors
/// What is wrong with it.
pub fn field<T, E: std::error::Error>(name: &str, value: Result<T, E>) -> Result<T, Error> {
    value.map_err(|e| Error::invalid(name, chain(&e)))
}

/// The request's id, if the client gave one. `clear` empties it in the message, so that the digest is of the rest.
///
/// # Errors
/// It is not a UUID.
pub(super) fn request<M: Message + Clone>(
    method: &'static str,
    message: &M,
    clear: impl FnOnce(&mut M) -> String,
) -> Result<Option<Request>, Error> {
    let mut rest = message.clone();
    let id = clear(&mut rest);
    if id.is_empty() {
        return Ok(None);
    }
    let id = Uuid::parse_str(&id).map_err(|_| {
        Error::invalid(
            "request_id",
            format!("`{id}` is not a UUID: use a new one for each request, or leave it empty"),
        )
    })?;
    let digest = blake3::hash(&rest.encode_to_vec()).to_hex().to_string();
    Ok(Some(Request { id, method, digest }))
}

/// `[T]` of a message: its request id, taken out.
macro_rules! request_of {
    ($method:literal, $message:expr) => {
        crate::grpc::fields::request($method, $message, |m| std::mem::take(&mut m.request_id))
    };
}
pub(super) use request_of;
