//! The key of a vdc, and the data keys of layers that it wraps.
//!
//! A layer's data key is wrapped by AES-256-GCM-SIV (RFC 8452) under the vdc's key, with a random nonce; the layer's
//! number, the cipher and the key's id are bound to it, so a wrapped key that was moved to another layer is refused.

use aes_gcm_siv::{
    Aes256GcmSiv, KeyInit, Nonce,
    aead::{Aead, Payload},
};
use zeroize::Zeroizing;

/// Says what is wrapped here, so that no other use of the same key gives the same bytes.
const DOMAIN: &[u8] = b"serio layer key 1";
const NONCE_BYTES: usize = 12;
const DATA_KEY_BYTES: usize = 64;
/// The only cipher so far: AES-256-XTS in units of 512 bytes.
pub(crate) const CIPHER_XTS: u32 = 1;
/// More than any wrapping needs; what the header has room for.
pub(crate) const WRAPPED_BYTES_MAX: usize = 256;

/// The secret of a vdc. Whoever has it reads the vdc's volumes.
#[derive(Clone)]
pub struct VdcSecret {
    id: [u8; 16],
    key: Zeroizing<[u8; 32]>,
}

impl std::fmt::Debug for VdcSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VdcSecret({})", Hex(&self.id))
    }
}

/// A layer's data key, wrapped: nothing in here is secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    /// Which vdc key opens it.
    pub vdc_key: [u8; 16],
    /// Nonce, ciphertext, tag.
    pub wrapped: Vec<u8>,
}

/// Why a layer's data key is not to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The volume is encrypted, and it was opened without a key.
    #[error("it is encrypted under the vdc key {} and no key was given", Hex(id))]
    Missing {
        /// Which key is needed.
        id: [u8; 16],
    },
    /// Another vdc's key was given.
    #[error("it is encrypted under the vdc key {}, not {}", Hex(needed), Hex(given))]
    Other {
        /// Which key is needed.
        needed: [u8; 16],
        /// Which was given.
        given: [u8; 16],
    },
    /// The id fits and the key does not, or the header was tampered with.
    #[error("the vdc key {} does not open its data key: the key or the header is damaged", Hex(id))]
    Refused {
        /// Which key was tried.
        id: [u8; 16],
    },
    /// The system gave no random bytes for a new key.
    #[error("the system gave no random bytes for a new data key (errno {0})")]
    Random(i32),
}

/// Bytes as text.
struct Hex<'a>(&'a [u8]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl VdcSecret {
    /// A key and its id, which is no secret.
    pub fn new(id: [u8; 16], key: [u8; 32]) -> VdcSecret {
        VdcSecret { id, key: Zeroizing::new(key) }
    }

    /// A new key from the system's random bytes.
    pub fn generate() -> Result<VdcSecret, KeyError> {
        let mut secret = VdcSecret { id: [0; 16], key: Zeroizing::new([0; 32]) };
        random(&mut secret.id)?;
        random(secret.key.as_mut_slice())?;
        Ok(secret)
    }

    /// Which key this is.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// A new data key for a layer, wrapped and in the clear.
    pub(crate) fn new_data_key(
        &self,
        layer: u64,
    ) -> Result<(WrappedKey, Zeroizing<[u8; DATA_KEY_BYTES]>), KeyError> {
        let mut nonce = [0; NONCE_BYTES];
        random(&mut nonce)?;
        let mut key = Zeroizing::new([0; DATA_KEY_BYTES]);
        random(&mut *key)?;
        Ok((self.wrap(&key, nonce, layer), key))
    }

    fn wrap(&self, key: &[u8; DATA_KEY_BYTES], nonce: [u8; NONCE_BYTES], layer: u64) -> WrappedKey {
        let payload = Payload { msg: key, aad: &self.bound(layer) };
        let sealed = self
            .aead()
            .encrypt(&Nonce::from(nonce), payload)
            .expect("64 bytes are less than the mode's limit of 2^36");
        WrappedKey { vdc_key: self.id, wrapped: [nonce.as_slice(), &sealed].concat() }
    }

    /// The data key of `layer`.
    pub(crate) fn unwrap_key(
        &self,
        wrapped: &WrappedKey,
        layer: u64,
    ) -> Result<Zeroizing<[u8; DATA_KEY_BYTES]>, KeyError> {
        if wrapped.vdc_key != self.id {
            return Err(KeyError::Other { needed: wrapped.vdc_key, given: self.id });
        }
        let refused = KeyError::Refused { id: self.id };
        let Some((nonce, sealed)) = wrapped.wrapped.split_first_chunk::<NONCE_BYTES>() else {
            return Err(refused);
        };
        let payload = Payload { msg: sealed, aad: &self.bound(layer) };
        let opened = self.aead().decrypt(&Nonce::from(*nonce), payload).map(Zeroizing::new);
        let opened = opened.map_err(|_| refused.clone())?;
        let key: &[u8; DATA_KEY_BYTES] = opened.as_slice().try_into().map_err(|_| refused)?;
        Ok(Zeroizing::new(*key))
    }

    fn aead(&self) -> Aes256GcmSiv {
        Aes256GcmSiv::new_from_slice(self.key.as_slice()).expect("a key of 32 bytes")
    }

    /// What is bound to the wrapped key without being in it.
    fn bound(&self, layer: u64) -> Vec<u8> {
        [DOMAIN, &CIPHER_XTS.to_le_bytes(), &self.id, &layer.to_le_bytes()].concat()
    }
}

fn random(bytes: &mut [u8]) -> Result<(), KeyError> {
    getrandom::fill(bytes).map_err(|e| KeyError::Random(e.raw_os_error().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> VdcSecret {
        VdcSecret::new(std::array::from_fn(|i| 0xa0 + i as u8), std::array::from_fn(|i| i as u8))
    }

    #[test]
    fn wrapping_is_what_another_implementation_gives() {
        // Made with the AES-256-GCM-SIV of OpenSSL 3: key 00..1f, nonce 00..0b, plaintext 00..3f, layer 5.
        const SEALED: &str = "04c6f74060f8359f02dca68f35b85577e813c02ef61d338a1e9ff6bee9a39d4d41c418ca92678e09870c1b4f\
             004cc09c4e2586bec56d7d1f7f089a59484fcf9fba5d6d33ac15bdf2f85747a7d169dc53";
        let key: [u8; 64] = std::array::from_fn(|i| i as u8);
        let wrapped = secret().wrap(&key, std::array::from_fn(|i| i as u8), 5);
        assert_eq!(Hex(&wrapped.wrapped[..12]).to_string(), "000102030405060708090a0b");
        assert_eq!(Hex(&wrapped.wrapped[12..]).to_string(), SEALED);
        assert_eq!(secret().unwrap_key(&wrapped, 5).as_deref(), Ok(&key));
    }

    #[test]
    fn a_wrapped_key_opens_with_its_key_at_its_layer_only() {
        let secret = VdcSecret::generate().expect("random");
        let (wrapped, key) = secret.new_data_key(7).expect("random");
        assert_eq!(secret.unwrap_key(&wrapped, 7), Ok(key));
        let refused = Err(KeyError::Refused { id: secret.id() });
        assert_eq!(secret.unwrap_key(&wrapped, 8), refused);
        for at in [0, 12, wrapped.wrapped.len() - 1] {
            let mut damaged = wrapped.clone();
            damaged.wrapped[at] ^= 1;
            assert_eq!(secret.unwrap_key(&damaged, 7), refused);
        }
        for len in [0, 11, 12, 40, wrapped.wrapped.len() - 1] {
            let mut cut = wrapped.clone();
            cut.wrapped.truncate(len);
            assert_eq!(secret.unwrap_key(&cut, 7), refused);
        }
        let same_id = VdcSecret::new(secret.id(), [9; 32]);
        assert_eq!(same_id.unwrap_key(&wrapped, 7), refused);
        let other = VdcSecret::generate().expect("random");
        assert_eq!(
            other.unwrap_key(&wrapped, 7),
            Err(KeyError::Other { needed: secret.id(), given: other.id() })
        );
    }

    #[test]
    fn no_key_is_printed() {
        let text = format!("{:?}", secret());
        assert_eq!(text, "VdcSecret(a0a1a2a3a4a5a6a7a8a9aaabacadaeaf)");
    }
}
