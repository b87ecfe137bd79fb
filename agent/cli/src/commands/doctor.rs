//! `doctor`.

use crate::{
    args::{DoctorArgs, Global},
    error::Failure,
    output::Output,
};

pub(super) async fn run(_global: &Global, _args: DoctorArgs, _output: Output) -> Result<(), Failure> {
    Err(Failure::plain("doctor"))
}
