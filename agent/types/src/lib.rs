//! Names, sizes, ids and validated specs; no I/O.
#![forbid(unsafe_code)]
