//! NBD: codec, session, server.
#![forbid(unsafe_code)]
