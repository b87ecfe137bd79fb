//! The key of a vdc as it lies on the disk: wrapped under the key encryption key. Pure: values in, values out.
//!
//! A file of one JSON object; all bytes as hexadecimal digits. `wrapped` is a nonce of 12 bytes, 32 bytes of ciphertext and a
//! tag of 16, by AES-256-GCM-SIV (RFC 8452); the vdc and the key's id are bound to it, so that files that were swapped do not open.

use aes_gcm_siv::{
    Aes256GcmSiv, KeyInit, Nonce,
    aead::{Aead, Payload},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::source::Kek;

/// Says what is wrapped here, so that no other use of the same key gives the same bytes.
const DOMAIN: &[u8] = b"serio vdc key 1";
/// As `DOMAIN`, for the name of a key encryption key.
const KEK_DOMAIN: &str = "serio 2026 name of a key encryption key";
const NONCE_BYTES: usize = 12;
const VERSION: u32 = 1;

/// The key of a vdc.
#[derive(Clone)]
pub(super) struct Secret {
    /// Which; it is written into the layers that it opens.
    pub(super) id: [u8; 16],
    pub(super) key: Zeroizing<[u8; 32]>,
}

/// A file of `STATE/keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WrappedFile {
    /// 1.
    version: u32,
    /// Whose key it is.
    vdc: String,
    /// Which key; the layers say the same.
    pub(super) key_id: String,
    /// Which key encryption key wraps it: a one-way name.
    pub(super) kek: String,
    wrapped: String,
}

/// A one-way name of a key encryption key: says which, and nothing about it.
pub(super) fn kek_name(kek: &Kek) -> String {
    let hash = blake3::Hasher::new_derive_key(KEK_DOMAIN).update(kek.as_slice()).finalize();
    hex(hash.as_bytes().get(..8).unwrap_or_default())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
    let (pairs, rest) = digits.as_deref()?.as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| u8::try_from(high << 4 | low).ok());
    if rest.is_empty() { bytes.collect() } else { None }
}

fn bound(vdc: Uuid, id: &[u8]) -> Vec<u8> {
    [DOMAIN, vdc.as_bytes(), id].concat()
}

fn aead(kek: &Kek) -> Aes256GcmSiv {
    Aes256GcmSiv::new_from_slice(kek.as_slice()).expect("a key of 32 bytes")
}

impl WrappedFile {
    /// Wraps a key. `nonce` is random.
    pub(super) fn wrap(vdc: Uuid, secret: &Secret, kek: &Kek, nonce: [u8; NONCE_BYTES]) -> Self {
        let payload = Payload { msg: secret.key.as_slice(), aad: &bound(vdc, &secret.id) };
        let sealed = aead(kek)
            .encrypt(&Nonce::from(nonce), payload)
            .expect("32 bytes are less than the mode's limit of 2^36");
        Self {
            version: VERSION,
            vdc: vdc.to_string(),
            key_id: hex(&secret.id),
            kek: kek_name(kek),
            wrapped: hex(&[nonce.as_slice(), &sealed].concat()),
        }
    }

    /// `None` when the key encryption key is another one, or the file was changed.
    pub(super) fn unwrap(&self, vdc: Uuid, kek: &Kek) -> Option<Secret> {
        let id: [u8; 16] = unhex(&self.key_id)?.try_into().ok()?;
        let wrapped = unhex(&self.wrapped)?;
        let (nonce, sealed) = wrapped.split_first_chunk::<NONCE_BYTES>()?;
        let payload = Payload { msg: sealed, aad: &bound(vdc, &id) };
        let opened = Zeroizing::new(aead(kek).decrypt(&Nonce::from(*nonce), payload).ok()?);
        let mut key = Zeroizing::new([0; 32]);
        key.copy_from_slice(<&[u8; 32]>::try_from(opened.as_slice()).ok()?);
        Some(Secret { id, key })
    }

    /// Reads a file; `None` if it is none, or of a newer format.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().filter(|file: &Self| file.version == VERSION)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("numbers and strings");
        bytes.push(b'\n');
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secret() -> Secret {
        Secret { id: [5; 16], key: Zeroizing::new([9; 32]) }
    }

    #[test]
    fn a_key_opens_for_its_vdc_under_its_kek_only() {
        let (vdc, kek) = (Uuid::from_u128(7), Kek::new([1; 32]));
        let file = WrappedFile::wrap(vdc, &secret(), &kek, [3; 12]);
        let read = WrappedFile::parse(&file.to_bytes()).unwrap();
        assert_eq!(read, file);
        assert!(!String::from_utf8(file.to_bytes()).unwrap().contains(&hex(&[9; 32])));
        let opened = read.unwrap(vdc, &kek).unwrap();
        assert_eq!((opened.id, &opened.key[..]), ([5; 16], &[9; 32][..]));
        assert!(read.unwrap(Uuid::from_u128(8), &kek).is_none());
        assert!(read.unwrap(vdc, &Kek::new([2; 32])).is_none());
        let other_id = WrappedFile { key_id: hex(&[6; 16]), ..file.clone() };
        assert!(other_id.unwrap(vdc, &kek).is_none());
        assert_ne!(kek_name(&kek), kek_name(&Kek::new([2; 32])));
    }

    proptest! {
        #[test]
        fn any_file_is_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200), id: String, wrapped: String) {
            let _ = WrappedFile::parse(&bytes);
            let file = WrappedFile { version: 1, vdc: String::new(), key_id: id, kek: String::new(), wrapped };
            prop_assert!(file.unwrap(Uuid::nil(), &Kek::new([0; 32])).is_none());
        }
    }
}
