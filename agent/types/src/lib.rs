//! Names, sizes, ids and validated specs, shared by every process.
//!
//! Owns: values that are valid by their type; the parsing of what users type ([`ByteSize`], [`Name`]).
//! Never: I/O, clocks, protobuf, storage.
#![forbid(unsafe_code)]

pub mod name;
pub mod size;

pub use name::{Name, NameError, VdcName};
pub use size::{ByteSize, SizeError};
