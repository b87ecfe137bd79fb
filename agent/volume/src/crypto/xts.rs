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
//! The mode runs *inside* the cipher's backend ([`BlockCipherEncClosure`]), where the compiler may use the wide registers that
//! the cipher has found there: the masks and the additions are written so that it does, four blocks a step. All that is
//! called in there is `#[inline(always)]` for that reason.
//!
//! One thing is ours: **a unit of 512 zero bytes decrypts to zeros**, because that is what a hole in a file is. A hole that was
//! punched is seen after a crash although the map did not hear of it any more; read as ciphertext it would be noise that nobody wrote.
//! No plaintext is lost by it: which one encrypts to zeros is known to nobody without the key, and one of 2^4096.

use aes::{
    Aes256, Aes256Enc, Block,
    cipher::{
        Array, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt, BlockCipherEncBackend,
        BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16,
    },
};

use super::UNIT_BYTES;

const UNIT: usize = UNIT_BYTES as usize;
const BLOCK: usize = 16;
/// Units whose tweaks are made together: as many blocks as the widest cipher takes at once.
const TWEAKS: usize = 64;
/// Units that go through the cipher together: as many blocks as the widest takes at once.
const UNITS: usize = 2;

/// Four tweaks of blocks one after the other, low and high half in turn: a register.
type Four = [u64; 8];
/// The tweaks of one unit's blocks.
type Mask = [Four; UNIT / BLOCK / 4];

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
        self.each(offset, bytes, |tweaks, bytes| self.data.encrypt_with_backend(Stretch { tweaks, bytes }));
    }

    /// The reverse of [`SectorCipher::encrypt`].
    pub(crate) fn decrypt(&self, offset: u64, bytes: &mut [u8]) {
        self.each(offset, bytes, |tweaks, bytes| self.data.decrypt_with_backend(Stretch { tweaks, bytes }));
    }

    /// Stretches of up to [`TWEAKS`] units, each with its units' first tweaks.
    fn each(&self, offset: u64, bytes: &mut [u8], work: impl Fn(&[Block], &mut [u8])) {
        assert!(offset.is_multiple_of(UNIT_BYTES) && bytes.len().is_multiple_of(UNIT), "whole units");
        let mut unit = offset / UNIT_BYTES;
        for stretch in bytes.chunks_mut(TWEAKS * UNIT) {
            let mut tweaks = [Block::default(); TWEAKS];
            let tweaks = &mut tweaks[..stretch.len() / UNIT];
            for tweak in tweaks.iter_mut() {
                tweak[..8].copy_from_slice(&unit.to_le_bytes());
                unit += 1;
            }
            self.tweak.encrypt_blocks(tweaks);
            work(tweaks, stretch);
        }
    }
}

/// Whole units, and for each the tweak of its first block.
struct Stretch<'a> {
    tweaks: &'a [Block],
    bytes: &'a mut [u8],
}

impl BlockSizeUser for Stretch<'_> {
    type BlockSize = U16;
}

impl BlockCipherEncClosure for Stretch<'_> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        self.groups(false, |blocks| {
            let (wide, rest) = Array::slice_as_chunks_mut(blocks);
            wide.iter_mut().for_each(|blocks| backend.encrypt_par_blocks_inplace(blocks));
            backend.encrypt_tail_blocks_inplace(rest);
        });
    }
}

impl BlockCipherDecClosure for Stretch<'_> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        self.groups(true, |blocks| {
            let (wide, rest) = Array::slice_as_chunks_mut(blocks);
            wide.iter_mut().for_each(|blocks| backend.decrypt_par_blocks_inplace(blocks));
            backend.decrypt_tail_blocks_inplace(rest);
        });
    }
}

impl Stretch<'_> {
    /// The mode around `cipher`. `holes`: units of zeros stay zeros.
    #[inline(always)]
    fn groups(self, holes: bool, cipher: impl Fn(&mut [Block])) {
        for (group, tweaks) in self.bytes.chunks_mut(UNITS * UNIT).zip(self.tweaks.chunks(UNITS)) {
            let mut masks: [Mask; UNITS] = [[[0; 8]; UNIT / BLOCK / 4]; UNITS];
            for (mask, tweak) in masks.iter_mut().zip(tweaks) {
                fill(mask, tweak);
            }
            let holes = if holes { holes_in(group) } else { [false; UNITS] };
            add(group, &masks);
            let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(group);
            cipher(blocks);
            add(group, &masks);
            for (unit, is_hole) in group.chunks_exact_mut(UNIT).zip(holes) {
                if is_hole {
                    unit.fill(0);
                }
            }
        }
    }
}

/// The masks of a unit from its first tweak.
#[inline(always)]
fn fill(mask: &mut Mask, tweak: &Block) {
    let tweak = u128::from_le_bytes((*tweak).into());
    let (mut low, mut high) = (tweak as u64, (tweak >> 64) as u64);
    let mut four = [0; 8];
    for block in four.as_chunks_mut::<2>().0 {
        *block = [low, high];
        // What is shifted out at the top comes back as x^7 + x^2 + x + 1; no branch on a secret.
        let carry = (high.cast_signed() >> 63).cast_unsigned() & 0x87;
        high = (high << 1) | (low >> 63);
        low = (low << 1) ^ carry;
    }
    for place in mask {
        *place = four;
        four = times_x4(four);
    }
}

/// Each of the four times x^4.
#[inline(always)]
fn times_x4(four: Four) -> Four {
    let out = four.map(|half| half >> 60);
    std::array::from_fn(|i| {
        let over = out[i ^ 1];
        // Four bits go from the low half to the high one, and from the high one as x^7 + x^2 + x + 1 to the low one.
        let fold = if i % 2 == 0 { (over << 1) ^ (over << 2) ^ (over << 7) } else { 0 };
        (four[i] << 4) ^ over ^ fold
    })
}

/// Which units of a group are zeros.
#[inline(always)]
fn holes_in(group: &[u8]) -> [bool; UNITS] {
    let mut holes = [false; UNITS];
    for (hole, unit) in holes.iter_mut().zip(group.chunks_exact(UNIT)) {
        // The first block mostly tells.
        *hole = unit.iter().take(BLOCK).all(|byte| *byte == 0) && unit.iter().all(|byte| *byte == 0);
    }
    holes
}

#[inline(always)]
fn add(group: &mut [u8], masks: &[Mask; UNITS]) {
    let (registers, _) = group.as_chunks_mut::<{ 4 * BLOCK }>();
    for (bytes, mask) in registers.iter_mut().zip(masks.as_flattened()) {
        for (half, mask) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(mask) {
            *half = (u64::from_le_bytes(*half) ^ mask).to_le_bytes();
        }
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

    fn xor(bytes: &mut [u8], mask: &[u8]) {
        bytes.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
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
            key: [u8; 32], other: [u8; 32], first in 0u64..1 << 37, units in 1usize..140, fill: u8,
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
