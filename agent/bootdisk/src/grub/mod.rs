//! grub.cfg: a script that builds a menu. It is run far enough to know which entry GRUB would boot by itself, and what
//! that entry loads.
//!
//! ```text
//!   text ──lexer──▶ words ──parse──▶ statements ──eval──▶ variables, menu ──▶ the default entry's kernel and initrds
//! ```
//!
//! Known: `set`, `unset`, `if`, `for`, functions, `test`, `load_env`, `search`, `source`, `configfile`, `menuentry`,
//! `submenu`, `linux`, `initrd` and their variants. Everything else (modules, fonts, terminals, keys) has no effect here
//! and succeeds; loops by condition do not run. Bounds: bytes, words, nesting, steps, the length of values.
//! `save_env` writes nothing, so an entry for one boot only (`next_entry`) is not taken: it would be booted for ever.

mod conditions;
mod env;
mod eval;
mod lexer;
mod parse;

pub(crate) use env::{environment, expand};
pub(crate) use eval::{Chosen, Grub, Host, Place, Search};

/// Longest script.
pub(crate) const SCRIPT_BYTES_MAX: u64 = 1 << 20;
/// The size of grubenv is fixed; larger is none.
pub(crate) const ENVIRONMENT_BYTES_MAX: u64 = 64 * 1024;

/// Why a script could not be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GrubError {
    /// Its form.
    #[error("line {line}: {what}")]
    Syntax {
        /// Counted from 1.
        line: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// A bound was reached.
    #[error("it {0}")]
    Bound(&'static str),
    /// It builds no menu.
    #[error("it has no menu entry that loads a kernel")]
    Nothing,
}
