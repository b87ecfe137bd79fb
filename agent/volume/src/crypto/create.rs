//! A new encrypted volume: an empty bottom that is plain and sealed for ever, and an encrypted head above it.
//!
//! So what no encrypted layer has is zeros by the maps, and zeros never need to be decrypted; and the bottom, which
//! keeps no map, never has to say which of its blocks are ciphertext.

use super::VdcSecret;
use crate::{
    error::CreateError,
    header::{Header, HeaderState},
    layer,
    media::Media,
    volume::{LayerFiles, now_s},
};

/// Makes the files of layers 0 and 1 an empty encrypted volume and syncs them. What they held is lost. The bottom's
/// header is written last, so that a crash leaves no half volume behind.
pub fn create_encrypted(
    bottom: &LayerFiles,
    head: &LayerFiles,
    size_bytes: u64,
    volume: [u8; 16],
    key: &VdcSecret,
) -> Result<(), CreateError> {
    let media = |files: &LayerFiles| {
        let clone = |file: &std::fs::File| file.try_clone().map(Media::new);
        let io = |source| CreateError::Io { what: "duplicate a descriptor", source };
        Ok::<_, CreateError>((clone(&files.data).map_err(io)?, clone(&files.map).map_err(io)?))
    };
    create_encrypted_media(&media(bottom)?, &media(head)?, size_bytes, volume, key)
}

pub(crate) fn create_encrypted_media(
    bottom: &(Media, Media),
    head: &(Media, Media),
    size_bytes: u64,
    volume: [u8; 16],
    key: &VdcSecret,
) -> Result<(), CreateError> {
    let plain = Header {
        volume,
        layer: 0,
        size_bytes,
        parent: None,
        state: HeaderState::Sealed { successor: 1 },
        snapshot: String::new(),
        time_s: now_s(),
        generation: 0,
        sequence: 0,
        key: None,
    };
    let (wrapped, _) = key.new_data_key(1)?;
    let encrypted =
        Header { layer: 1, parent: Some(0), state: HeaderState::Head, key: Some(wrapped), ..plain.clone() };
    layer::initialize(&head.0, &head.1, &encrypted, false)?;
    layer::initialize(&bottom.0, &bottom.1, &plain, false)
}
