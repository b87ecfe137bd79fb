//! Images into volumes and volumes into images.
//!
//! | module | what |
//! |---|---|
//! | [`convert`] | an image that was validated, into a file: sparse, hashed, step by step |
//! | [`journal`] | how far an import came, so that it goes on after an interruption |
//! | [`reading`] | a volume from its start, read ahead |
//! | [`verbs`] | `serio-volumed import` and `export` |
//! | `pipe` | standard input, which can be left while it is silent |
//! | [`bar`] | progress on a terminal, and the wish to stop |
//!
//! Owns: the order validate → write → sync → make it a volume. Never: what a format's bytes mean (`serio-formats`).

pub mod bar;
pub mod convert;
pub mod journal;
mod pipe;
pub mod reading;
pub mod verbs;
