//! The daemon seriod: gRPC, reconciliation, supervision, capacity.
#![forbid(unsafe_code)]
