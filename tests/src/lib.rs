//! The harness of the end-to-end cases.
#![forbid(unsafe_code)]
