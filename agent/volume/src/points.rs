//! What the maps of a volume say, for who needs no bytes: which ranges have changed between two points, and which of them are
//! zeros. Encrypted volumes are asked without their key; layers below a snapshot while a VM writes above it.

use crate::{
    changes::{ChangedExtent, ChangesError},
    error::OpenError,
    stack::Extent,
    volume::{Volume, VolumeFiles},
};

/// The maps of a volume, up to a point.
#[derive(Debug)]
pub struct Maps {
    // Never given away: it would read ciphertext.
    volume: Volume,
}

impl VolumeFiles {
    /// The maps up to the snapshot `point`, or of the whole of a volume that nobody writes.
    pub fn maps(self, point: Option<&str>) -> Result<Maps, OpenError> {
        Ok(Maps { volume: Volume::open_unread(self, point)? })
    }
}

impl Maps {
    /// Size of the volume at this point, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    /// As [`Volume::changed_extents`].
    pub fn changed_extents(
        &self,
        since: &str,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<ChangedExtent>, ChangesError> {
        self.volume.changed_extents(since, offset, len, extents_max)
    }

    /// As [`Volume::extents`].
    pub fn extents(&self, offset: u64, len: u64, each: impl FnMut(Extent) -> bool) {
        self.volume.extents(offset, len, each);
    }
}
