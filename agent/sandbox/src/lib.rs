//! How a process gives up what it does not need.
