//! One file per noun; here they are told apart.

mod audit;
mod capacity;
mod check;
mod completion;
mod console;
mod doctor;
mod events;
mod image;
mod keys;
mod layers;
mod machine;
mod man;
mod node;
mod operation;
mod pki;
mod place;
mod source;
mod transfer;
mod upload;
mod usage;
mod vdc;
mod vm;
mod vm_archive;
mod vm_plug;
mod vm_snapshot;
mod volume;
mod what_if;

use clap::ArgMatches;
use uuid::Uuid;

use crate::{
    args::{CapacityArgs, CapacityVerb, Cli, Noun},
    client::Client,
    error::Failure,
    output::Output,
};

/// Does what was typed. `matches` is what the arguments were parsed from: the order of flags stands only there.
pub async fn run(cli: Cli, matches: &ArgMatches) -> Result<(), Failure> {
    let Cli { global, noun } = cli;
    let output = Output::new(global.output);
    match noun {
        Noun::Doctor(args) => return doctor::run(&global, args, output).await,
        Noun::Pki(verb) => return pki::run(verb, matches, output),
        Noun::Completion { shell } => return completion::run(&shell),
        Noun::Man { dir } => return man::run(&dir),
        Noun::Vm(crate::args::VmVerb::Console(args)) => return console::run(&global, args, matches).await,
        _ => {}
    }
    if let Noun::Audit(crate::args::AuditArgs { verb: Some(crate::args::AuditVerb::Verify(args)), .. }) =
        &noun
        && !args.paths.is_empty()
    {
        return audit::verify_files(args, output);
    }
    let client = Client::connect(&global).await?;
    match noun {
        Noun::Node(verb) => node::run(&client, verb, output).await,
        Noun::Vdc(verb) => vdc::run(&client, verb, output).await,
        Noun::Image(verb) => image::run(&client, &global, verb, output).await,
        Noun::Volume(verb) => volume::run(&client, &global, verb, output).await,
        Noun::Vm(verb) => vm::run(&client, &global, verb, output).await,
        Noun::Operation(verb) => operation::run(&client, verb, output).await,
        Noun::Place(args) => place::run(&client, *args, output).await,
        Noun::Capacity(CapacityArgs { verb: None }) => capacity::run(&client, output).await,
        Noun::Capacity(CapacityArgs { verb: Some(CapacityVerb::WhatIf { without }) }) => {
            what_if::run(&client, without, output).await
        }
        Noun::Events(args) => events::run(&client, args, output).await,
        Noun::Audit(args) => audit::run(&client, args, output).await,
        Noun::Doctor(_) | Noun::Pki(_) | Noun::Completion { .. } | Noun::Man { .. } => Ok(()),
    }
}

/// A fresh one for each command; the same for its retry.
fn request_id() -> String {
    Uuid::new_v4().to_string()
}
