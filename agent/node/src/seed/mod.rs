//! The NoCloud seed: a small read-only disk that tells cloud-init who it is (cloud-init, data source "NoCloud").
//!
//! ```text
//!  FAT12, 1 MiB, label CIDATA
//!    meta-data        instance-id, local-hostname, public-keys
//!    user-data        as given, or made from host name and keys
//!    network-config   version 2, cards matched by MAC; absent without cards
//! ```
//!
//! Owns: the content and the image, pure: the same spec gives the same bytes. Never: files, the VM's other disks.
//! What is made here is written as JSON, which is YAML too: no text of a user can break out of its value.

use std::io::{Cursor, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde_json::{Value, json};

#[cfg(test)]
mod seed_test;

/// The image's size, bytes.
pub const SEED_BYTES: usize = 1 << 20;
/// The most that user data may have, bytes: what fits beside the rest.
pub const USER_DATA_BYTES_MAX: usize = 512 * 1024;
/// The most for what is made of keys and cards.
const MADE_BYTES_MAX: usize = 128 * 1024;
/// As cloud-init looks for it, padded to FAT's 11 bytes.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// What the seed says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SeedSpec {
    /// The VM's id, as text: a new one makes cloud-init run anew.
    pub instance_id: String,
    /// The guest's host name.
    pub hostname: String,
    /// Lines of authorized_keys.
    pub ssh_keys: Vec<String>,
    /// User data as cloud-init takes it; made from the above when empty.
    pub user_data: String,
    /// The cards, in order.
    pub nics: Vec<SeedNic>,
}

/// A card in the seed's network-config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedNic {
    /// Its address: the card is found by it.
    pub mac: [u8; 6],
    /// "192.168.7.10/24"; DHCP when `None`.
    pub address: Option<String>,
    /// "192.168.7.1".
    pub gateway: Option<String>,
}

/// Why a seed was not built.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A file does not fit.
    #[error("the seed's {what} has {bytes} bytes, at most {max} fit: shorten it")]
    TooLong {
        /// Which file.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The image could not be made.
    #[error("the seed's file system could not be made")]
    Image(#[from] std::io::Error),
}

/// Builds the seed.
///
/// # Errors
/// [`SeedError`].
pub fn build(spec: &SeedSpec) -> Result<Vec<u8>, SeedError> {
    let mut image = Cursor::new(vec![0; SEED_BYTES]);
    fatfs::format_volume(
        &mut image,
        FormatVolumeOptions::new().volume_label(LABEL).volume_id(volume_id(spec)),
    )?;
    {
        let volume = FileSystem::new(&mut image, FsOptions::new().update_accessed_date(false))?;
        let root = volume.root_dir();
        for (name, text, max) in files(spec) {
            if text.len() > max {
                return Err(SeedError::TooLong { what: name, bytes: text.len(), max });
            }
            root.create_file(name)?.write_all(text.as_bytes())?;
        }
    }
    Ok(image.into_inner())
}

fn files(spec: &SeedSpec) -> Vec<(&'static str, String, usize)> {
    let user_data = match spec.user_data.as_str() {
        "" => format!("#cloud-config\n{}\n", user_data(spec)),
        given => given.to_owned(),
    };
    let mut files = vec![
        ("meta-data", format!("{:#}\n", meta_data(spec)), MADE_BYTES_MAX),
        ("user-data", user_data, USER_DATA_BYTES_MAX),
    ];
    if !spec.nics.is_empty() {
        files.push(("network-config", format!("{:#}\n", network_config(&spec.nics)), MADE_BYTES_MAX));
    }
    files
}

fn meta_data(spec: &SeedSpec) -> Value {
    json!({
        "instance-id": spec.instance_id,
        "local-hostname": spec.hostname,
        // Here too, so that user data of the user's own does not have to repeat them.
        "public-keys": spec.ssh_keys,
    })
}

fn user_data(spec: &SeedSpec) -> Value {
    json!({
        "hostname": spec.hostname,
        "ssh_authorized_keys": spec.ssh_keys,
        "ssh_pwauth": false,
    })
}

fn network_config(nics: &[SeedNic]) -> Value {
    let cards = nics.iter().enumerate().map(|(index, nic)| (format!("nic{index}"), card(nic)));
    json!({ "version": 2, "ethernets": cards.collect::<serde_json::Map<_, _>>() })
}

fn card(nic: &SeedNic) -> Value {
    let mac: Vec<String> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut card = json!({ "match": { "macaddress": mac.join(":") } });
    match &nic.address {
        None => card["dhcp4"] = true.into(),
        Some(address) => {
            card["dhcp4"] = false.into();
            card["addresses"] = json!([address]);
            if let Some(gateway) = &nic.gateway {
                // Not "default": renderers older than the word are still in use.
                let all = if gateway.contains(':') { "::/0" } else { "0.0.0.0/0" };
                card["routes"] = json!([{ "to": all, "via": gateway }]);
            }
        }
    }
    card
}

/// The FAT's serial number, from the VM's id.
fn volume_id(spec: &SeedSpec) -> u32 {
    let hash = blake3::hash(spec.instance_id.as_bytes());
    u32::from_le_bytes(hash.as_bytes().first_chunk().copied().unwrap_or_default())
}
