//! Why a disk cannot be booted, for the one who has to put it right.

use crate::fs::FsError;

/// Why nothing on the disk can be booted.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Both copies of the GPT are damaged.
    #[error(
        "the disk's partition table (GPT) is damaged, and so is its copy: repair it with gdisk or sfdisk"
    )]
    Table,
    /// Neither entries nor a grub.cfg.
    #[error(
        "no boot configuration was found on the disk, neither loader/entries/*.conf nor grub.cfg ({looked}): put /boot on \
         ext4, or import the image with a kernel of its own"
    )]
    Nothing {
        /// What was seen, by partition.
        looked: String,
    },
    /// Only a firmware could boot it.
    #[error(
        "the disk is UEFI-only: it boots by {what}, and there is no UEFI firmware here; install a kernel with a boot \
         loader entry or a grub.cfg, or import the image with a kernel of its own"
    )]
    UefiOnly {
        /// The program, and where.
        what: String,
    },
    /// The configuration could not be read.
    #[error("cannot follow {file} on {partition}: {why}")]
    Config {
        /// Which.
        file: String,
        /// Where.
        partition: String,
        /// What is wrong with it.
        why: String,
    },
    /// What the configuration names is not there.
    #[error("{entry} names {path}, which is not there")]
    Missing {
        /// Which entry, and of which file.
        entry: String,
        /// The file.
        path: String,
    },
    /// What the configuration names as a kernel is none.
    #[error("{path} on {partition} is no kernel: neither a bzImage nor a 64-bit x86 ELF")]
    NotAKernel {
        /// The file.
        path: String,
        /// Where.
        partition: String,
    },
    /// A command line that no kernel takes.
    #[error("the command line of {entry} {what}")]
    Cmdline {
        /// Which entry.
        entry: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A file system's structures.
    #[error("cannot read {partition}")]
    Read {
        /// Where.
        partition: String,
        /// Why.
        #[source]
        source: FsError,
    },
}
