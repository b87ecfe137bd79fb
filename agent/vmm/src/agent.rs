//! stub
use std::process::ExitCode;
/// stub
pub fn main(_args: &crate::cli::AgentArgs) -> ExitCode {
    ExitCode::FAILURE
}
