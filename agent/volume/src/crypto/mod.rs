//! Encryption at rest: the cipher of one layer, and the keys that lead to it. `agent/volume/README.md` has the bytes.
//!
//! ```text
//! key of the vdc (32 bytes, by message from seriod)      VdcSecret    key.rs
//!        │ AES-256-GCM-SIV
//! data key of a layer (64 bytes, wrapped in its header)  WrappedKey   key.rs, header.rs
//!        │ AES-256-XTS, units of 512 bytes
//! bytes of the layer's data file                         SectorCipher xts.rs
//! ```
//!
//! Never: keeps a key in the clear on disk, prints one, or reads random bytes from anything but the system. Keys are
//! wiped when they are dropped. No I/O here, no threads.

mod create;
mod key;
mod xts;

use std::sync::Arc;

pub use create::create_encrypted;
#[cfg(test)]
pub(crate) use create::create_encrypted_media;
pub(crate) use key::{CIPHER_XTS, WRAPPED_BYTES_MAX};
pub use key::{KeyError, VdcSecret, WrappedKey};
pub(crate) use xts::{Four, Place, REGISTER, SectorCipher};

use crate::{error::OpenError, header::Header};

/// Bytes that are encrypted as one: what a disk keeps whole. A torn write leaves each unit old or new, so the
/// crash promise of plain layers ("each sector is old or new") holds for encrypted ones too.
pub(crate) const UNIT_BYTES: u64 = 512;

/// What encrypted volumes of tests have.
#[cfg(test)]
pub(crate) fn test_secret() -> VdcSecret {
    VdcSecret::new(*b"the test's key 1", *b"of the test, so it is no secret.")
}

/// The wrapped key and the cipher of a new layer above `below`: none when that one is plain.
pub(crate) fn new_layer(
    below: &Header,
    secret: Option<&VdcSecret>,
    layer: u64,
) -> Result<(Option<WrappedKey>, Option<Arc<SectorCipher>>), KeyError> {
    let Some(wrapped) = &below.key else { return Ok((None, None)) };
    let secret = secret.ok_or(KeyError::Missing { id: wrapped.vdc_key })?;
    let (wrapped, data_key) = secret.new_data_key(layer)?;
    Ok((Some(wrapped), Some(Arc::new(SectorCipher::new(&data_key)))))
}

/// The ciphers of the layers that these headers describe, in the same order; `None` for plain ones.
pub(crate) fn ciphers<'a>(
    headers: impl Iterator<Item = &'a Header>,
    secret: Option<&VdcSecret>,
) -> Result<Vec<Option<Arc<SectorCipher>>>, OpenError> {
    headers
        .map(|header| {
            let Some(wrapped) = &header.key else { return Ok(None) };
            let layer = header.layer;
            let key = |source| OpenError::Key { layer, source };
            let secret = secret.ok_or(KeyError::Missing { id: wrapped.vdc_key }).map_err(key)?;
            secret
                .unwrap_key(wrapped, layer)
                .map(|data_key| Some(Arc::new(SectorCipher::new(&data_key))))
                .map_err(key)
        })
        .collect()
}
