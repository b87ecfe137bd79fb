//! The binary `serio`: see the library.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    serio_cli::run()
}
