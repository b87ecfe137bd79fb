//! AES-256-XTS (IEEE 1619-2018, NIST SP 800-38E) over units of 512 bytes, in place.
//!
//! ```text
//! tweak of unit n: T0 = AES(key 2, n as 16 bytes, little-endian), Ti+1 = Ti · x in GF(2^128)
//! block i of it:   C = AES(key 1, P ⊕ Ti) ⊕ Ti
//! ```
//!
//! The block cipher is the `aes` crate's, which uses what the processor has (VAES, AES-NI, or constant-time software).
//! Only the mode is written here, because it must hand many blocks at a time to the cipher: one after the other they
//! cost three to ten times as much. A unit is 32 whole blocks, so there is no ciphertext stealing.
//!
//! One thing is ours: **a unit of 512 zero bytes decrypts to zeros**, because that is what a hole in a file is. A hole that was
//! punched is seen after a crash although the map did not hear of it any more; read as ciphertext it would be noise that nobody wrote.
//! No plaintext is lost by it: which one encrypts to zeros is known to nobody without the key, and one of 2^4096.

use aes::{
    Aes256, Aes256Enc, Block,
    cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, consts::U16},
};

use super::UNIT_BYTES;

const UNIT: usize = UNIT_BYTES as usize;
const BLOCK: usize = 16;
/// Units that are handed to the cipher together: 256 blocks, which fill the widest registers many times over.
const UNITS: usize = 8;

/// The tweaks of one unit's blocks.
type Mask = [[u8; BLOCK]; UNIT / BLOCK];

/// The cipher of one layer.
pub(crate) struct SectorCipher {
    data: Aes256,
    tweak: Aes256Enc,
}

impl std::fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SectorCipher")
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

impl SectorCipher {
    /// From a data key: the key of the data, then that of the tweaks.
    pub(crate) fn new(key: &[u8; 64]) -> SectorCipher {
        let (data, tweak) = key.split_at(32);
        let both = "half of 64 bytes are 32";
        SectorCipher {
            data: Aes256::new_from_slice(data).expect(both),
            tweak: Aes256Enc::new_from_slice(tweak).expect(both),
        }
    }

    /// Encrypts what lies at `offset` of the volume; both it and the length are multiples of [`UNIT_BYTES`].
    pub(crate) fn encrypt(&self, offset: u64, bytes: &mut [u8]) {
        self.run(offset, bytes, Direction::Encrypt);
    }

    /// The reverse of [`SectorCipher::encrypt`].
    pub(crate) fn decrypt(&self, offset: u64, bytes: &mut [u8]) {
        self.run(offset, bytes, Direction::Decrypt);
    }

    fn run(&self, offset: u64, bytes: &mut [u8], direction: Direction) {
        assert!(offset.is_multiple_of(UNIT_BYTES) && bytes.len().is_multiple_of(UNIT), "whole units");
        let mut masks: [Mask; UNITS] = [[[0; BLOCK]; UNIT / BLOCK]; UNITS];
        let mut unit = offset / UNIT_BYTES;
        for group in bytes.chunks_mut(UNITS * UNIT) {
            let masks = &mut masks[..group.len() / UNIT];
            self.fill_masks(unit, masks);
            unit += masks.len() as u64;
            let masks = masks.as_flattened().as_flattened();
            let holes = match direction {
                Direction::Encrypt => 0,
                Direction::Decrypt => holes_in(group),
            };
            xor(group, masks);
            let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(group);
            match direction {
                Direction::Encrypt => self.data.encrypt_blocks(blocks),
                Direction::Decrypt => self.data.decrypt_blocks(blocks),
            }
            xor(group, masks);
            for (i, unit) in group.chunks_exact_mut(UNIT).enumerate() {
                if holes & (1 << i) != 0 {
                    unit.fill(0);
                }
            }
        }
    }

    fn fill_masks(&self, first_unit: u64, masks: &mut [Mask]) {
        let mut tweaks = [Block::default(); UNITS];
        let tweaks = &mut tweaks[..masks.len()];
        for (unit, tweak) in (first_unit..).zip(tweaks.iter_mut()) {
            tweak[..8].copy_from_slice(&unit.to_le_bytes());
        }
        self.tweak.encrypt_blocks(tweaks);
        for (mask, tweak) in masks.iter_mut().zip(tweaks) {
            let tweak = u128::from_le_bytes((*tweak).into());
            let (mut low, mut high) = (tweak as u64, (tweak >> 64) as u64);
            for block in mask {
                block[..8].copy_from_slice(&low.to_le_bytes());
                block[8..].copy_from_slice(&high.to_le_bytes());
                // What is shifted out at the top comes back as x^7 + x^2 + x + 1; no branch on a secret.
                let carry = (high.cast_signed() >> 63).cast_unsigned() & 0x87;
                high = (high << 1) | (low >> 63);
                low = (low << 1) ^ carry;
            }
        }
    }
}

/// Which units of a group are zeros: one bit each.
fn holes_in(group: &[u8]) -> u32 {
    let is_hole = |unit: &[u8]| unit.iter().all(|byte| *byte == 0);
    let units = group.chunks_exact(UNIT).enumerate();
    units.filter(|(_, unit)| is_hole(unit)).fold(0, |holes, (i, _)| holes | (1 << i))
}

/// Plain bytes on both sides, so that the compiler uses the widest instruction.
fn xor(bytes: &mut [u8], mask: &[u8]) {
    for (byte, mask) in bytes.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// IEEE 1619-2007, annex B, vectors 10 to 14: XTS-AES-256 with units of 512 bytes. The unit, the first block of the
    /// ciphertext, and the CRC-32C of all of it.
    const VECTORS: [(u64, u128, u32); 5] = [
        (0xff, 0x1c3b3a102f770386e4836c99e370cf9b, 0x34f3be6d),
        (0xffff, 0x77a31251618a15e6b92d1d66dffe7b50, 0x90eac485),
        (0xff_ffff, 0xe387aaa58ba483afa7e8eb469778317e, 0x27c5be50),
        (0xffff_ffff, 0xbf53d2dade78e822a4d949a9bc6766b0, 0x2b40af03),
        (0xff_ffff_ffff, 0x64497e5a831e4a932c09be3e5393376d, 0x741a73fd),
    ];

    fn vector_key() -> [u8; 64] {
        let digits: [u128; 4] = [
            0x27182818284590452353602874713526,
            0x62497757247093699959574966967627,
            0x31415926535897932384626433832795,
            0x02884197169399375105820974944592,
        ];
        digits.map(u128::to_be_bytes).as_flattened().try_into().expect("64 bytes")
    }

    #[test]
    fn known_answers_of_ieee_1619() {
        let cipher = SectorCipher::new(&vector_key());
        let plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
        for (unit, first, crc) in VECTORS {
            let mut bytes = plain.clone();
            cipher.encrypt(unit * UNIT_BYTES, &mut bytes);
            assert_eq!(bytes[..16], first.to_be_bytes(), "unit {unit:#x}");
            assert_eq!(crc32c::crc32c(&bytes), crc, "unit {unit:#x}");
            cipher.decrypt(unit * UNIT_BYTES, &mut bytes);
            assert_eq!(bytes, plain);
        }
    }

    #[test]
    fn holes_are_zeros() {
        let cipher = SectorCipher::new(&vector_key());
        let mut bytes = vec![7; 20 * UNIT];
        cipher.encrypt(0, &mut bytes);
        bytes[UNIT..3 * UNIT].fill(0);
        bytes[19 * UNIT..].fill(0);
        bytes[9 * UNIT..10 * UNIT - 1].fill(0);
        cipher.decrypt(0, &mut bytes);
        for (i, unit) in bytes.chunks(UNIT).enumerate() {
            match i {
                1 | 2 | 19 => assert_eq!(unit, [0; UNIT]),
                9 => assert!(unit.iter().any(|byte| *byte != 0), "one byte is enough"),
                _ => assert_eq!(unit, [7; UNIT]),
            }
        }
    }

    /// The mode again, block by block as the standard writes it.
    fn naive(cipher: &SectorCipher, unit: u64, bytes: &mut [u8]) {
        let mut tweak = Block::default();
        tweak[..8].copy_from_slice(&unit.to_le_bytes());
        cipher.tweak.encrypt_block(&mut tweak);
        let mut tweak: [u8; 16] = tweak.into();
        for block in bytes.chunks_mut(16) {
            xor(block, &tweak);
            let mut one = Block::try_from(&*block).expect("16 bytes");
            cipher.data.encrypt_block(&mut one);
            block.copy_from_slice(&one);
            xor(block, &tweak);
            let top = tweak[15] >> 7;
            for i in (1..16).rev() {
                tweak[i] = (tweak[i] << 1) | (tweak[i - 1] >> 7);
            }
            tweak[0] = (tweak[0] << 1) ^ (top * 0x87);
        }
    }

    proptest! {
        #[test]
        fn many_units_at_once_are_the_same_as_one_by_one(
            key: [u8; 32], other: [u8; 32], first in 0u64..1 << 37, units in 1usize..20, fill: u8,
        ) {
            let key: [u8; 64] = [key, other].as_flattened().try_into().expect("64 bytes");
            let cipher = SectorCipher::new(&key);
            let plain: Vec<u8> = (0..units * UNIT).map(|i| (i as u8) ^ fill).collect();
            let mut together = plain.clone();
            cipher.encrypt(first * UNIT_BYTES, &mut together);
            let mut alone = plain.clone();
            for (i, unit) in alone.chunks_mut(UNIT).enumerate() {
                naive(&cipher, first + i as u64, unit);
            }
            prop_assert_eq!(&together, &alone);
            cipher.decrypt(first * UNIT_BYTES, &mut together);
            prop_assert_eq!(together, plain);
        }
    }
}
