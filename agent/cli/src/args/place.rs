//! Arguments of `place`, `capacity` and `node fence`: what is asked of a scheduler.

use clap::{Args, Subcommand};
use serio_types::{ByteSize, Name};

use super::vdc_name;

/// `place`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(
    after_help = "A placement is reserved on its node until its ttl runs out; commit it, then create the VM there with
its token (the field `token`), or release it. What is asked again under the same --request-id is the same placement.

Examples:
  serio --host https://scheduler:7450 place ardesio --vcpus 2 --memory 4GiB --storage 20GiB
  serio --host https://scheduler:7450 place ardesio --vcpus 2 --memory 4GiB --site milano --group web --image tiny
  serio --host https://scheduler:7450 place commit 0d3c…
  serio --host https://scheduler:7450 place list --vdc ardesio"
)]
pub struct PlaceArgs {
    /// What to do with placements that are there.
    #[command(subcommand)]
    pub verb: Option<PlaceVerb>,
    /// For which virtual data center
    #[arg(value_parser = vdc_name, required = true)]
    pub vdc: Option<Name>,
    /// Virtual processors
    #[arg(long, value_name = "N", required = true)]
    pub vcpus: Option<u32>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", required = true)]
    pub memory: Option<ByteSize>,
    /// New volumes
    #[arg(long, value_name = "SIZE")]
    pub storage: Option<ByteSize>,
    /// The VM's name in the vdc, the placement's if left out; a VM is placed once only
    #[arg(long, value_name = "NAME")]
    pub vm: Option<Name>,
    /// Hold it for a recovery
    #[arg(long)]
    pub dr_held: bool,
    /// Not on a node that has another of this group
    #[arg(long, value_name = "GROUP", default_value = "", hide_default_value = true)]
    pub group: String,
    /// Only at that site
    #[arg(long, value_name = "SITE", default_value = "", hide_default_value = true)]
    pub site: String,
    /// At least that processor level: x86-64-v2, x86-64-v3
    #[arg(long, value_name = "LEVEL", default_value = "", hide_default_value = true)]
    pub baseline: String,
    /// Only on a node that has that image
    #[arg(long, value_name = "IMAGE", default_value = "", hide_default_value = true)]
    pub image: String,
    /// Keep it at once, instead of for a minute
    #[arg(long)]
    pub commit: bool,
    /// Choose the placement's name: a repetition is then the same
    #[arg(long, value_name = "NAME")]
    pub request_id: Option<Name>,
}

/// The verbs of `place`.
#[derive(Debug, Subcommand)]
pub enum PlaceVerb {
    /// List the placements
    #[command(after_help = "Examples:\n  serio --host https://scheduler:7450 place list --vdc ardesio")]
    List {
        /// Only those of that vdc
        #[arg(long, value_parser = vdc_name)]
        vdc: Option<Name>,
    },
    /// Show one
    #[command(after_help = "Examples:\n  serio --host https://scheduler:7450 place show 0d3c… -o json")]
    Show {
        /// Its name
        placement: Name,
    },
    /// Keep one until it is released or a VM takes it
    #[command(after_help = "Examples:\n  serio --host https://scheduler:7450 place commit 0d3c…")]
    Commit {
        /// Its name
        placement: Name,
    },
    /// Give one back
    #[command(after_help = "Examples:\n  serio --host https://scheduler:7450 place release 0d3c…")]
    Release {
        /// Its name
        placement: Name,
    },
}

/// `capacity`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  serio capacity
  serio capacity -o json
  serio --host https://scheduler:7450 capacity what-if --without milano")]
pub struct CapacityArgs {
    /// Other questions.
    #[command(subcommand)]
    pub verb: Option<CapacityVerb>,
}

/// The verbs of `capacity`.
#[derive(Debug, Subcommand)]
pub enum CapacityVerb {
    /// What would still fit if a site were gone; --host is a scheduler
    #[command(after_help = "What the other sites hold for recoveries is room for this.

Examples:\n  serio --host https://scheduler:7450 capacity what-if --without milano")]
    WhatIf {
        /// The site that is gone
        #[arg(long, value_name = "SITE")]
        without: String,
    },
}
