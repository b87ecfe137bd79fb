//! Volumes without a VM: exports, imports, copies.
#![forbid(unsafe_code)]
