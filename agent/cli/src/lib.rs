//! The command line: talks only gRPC.
#![forbid(unsafe_code)]
