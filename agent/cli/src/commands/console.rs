//! `vm console`.

use clap::ArgMatches;

use crate::{
    args::{ConsoleArgs, Global},
    error::Failure,
};

pub(super) async fn run(_global: &Global, _args: ConsoleArgs, _matches: &ArgMatches) -> Result<(), Failure> {
    Err(Failure::plain("console"))
}
