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
//! the cipher has found there. All that is called in there is `#[inline(always)]` for that reason, and written so that the compiler
//! sees straight what it may do at once:
//! - masks are made eight units at a time, the low halves of their blocks in one array and the high ones in another: a step is the same
//!   few operations in every lane, and only what leaves it is interleaved;
//! - loops over the registers of a unit have constant bounds;
//! - bytes come from a [`Place`] register by register, are worked on in 1 KiB of the stack, and go back the same way. So there is one
//!   pass over foreign memory, wherever it is from and to.
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
/// Units whose first tweaks are made together: as many blocks as the widest cipher takes at once.
const TWEAKS: usize = 64;
/// Units that go through the cipher together: as many blocks as the widest takes at once.
const UNITS: usize = 2;
/// Bytes that are carried at once: what the widest register holds.
pub(crate) const REGISTER: usize = 64;
/// Registers of a unit.
const REGISTERS: usize = UNIT / REGISTER;
/// Units whose masks are made together, and blocks of each that are made in one step.
const MASKED: usize = 8;
const STEP: usize = 8;
/// Lanes of a step: all its units' blocks.
const LANES: usize = MASKED * STEP;

/// Four blocks, low and high half in turn: a register.
pub(crate) type Four = [u64; REGISTER / 8];
/// The masks of [`MASKED`] units, step by step: in each the blocks of the first unit, of the second, and so on.
type Masks = [[u64; 2 * LANES]; UNIT / BLOCK / STEP];

/// Where whole units come from and go to, [`REGISTER`] bytes at a time: a slice, or memory that is no Rust reference.
///
/// Each register is loaded once, and stored once and later. Implementations are `#[inline(always)]`.
pub(crate) trait Place {
    /// A register of a unit.
    fn load(&self, unit: usize, register: usize) -> Four;
    /// Puts it there when it is done.
    fn store(&mut self, unit: usize, register: usize, four: Four);
}

impl Place for &mut [u8] {
    #[inline(always)]
    fn load(&self, unit: usize, register: usize) -> Four {
        get(&self.as_chunks().0[unit], register)
    }

    #[inline(always)]
    fn store(&mut self, unit: usize, register: usize, four: Four) {
        put(&mut self.as_chunks_mut().0[unit], register, four);
    }
}

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
    pub(crate) fn encrypt(&self, offset: u64, mut bytes: &mut [u8]) {
        let len = bytes.len();
        self.encrypt_at(offset, len, &mut bytes);
    }

    /// The reverse of [`SectorCipher::encrypt`].
    pub(crate) fn decrypt(&self, offset: u64, mut bytes: &mut [u8]) {
        let len = bytes.len();
        self.decrypt_at(offset, len, &mut bytes);
    }

    /// Like [`SectorCipher::encrypt`], of the `len` bytes that `place` knows.
    pub(crate) fn encrypt_at<P: Place>(&self, offset: u64, len: usize, place: &mut P) {
        each(&self.tweak, offset, len, |tweaks, first| {
            self.data.encrypt_with_backend(Stretch { tweaks, first, place });
        });
    }

    /// The reverse of [`SectorCipher::encrypt_at`].
    pub(crate) fn decrypt_at<P: Place>(&self, offset: u64, len: usize, place: &mut P) {
        each(&self.tweak, offset, len, |tweaks, first| {
            self.data.decrypt_with_backend(Stretch { tweaks, first, place });
        });
    }
}

/// Stretches of up to [`TWEAKS`] units, each with its units' first tweaks and its first unit.
fn each(cipher: &Aes256Enc, offset: u64, len: usize, mut work: impl FnMut(&[Block], usize)) {
    assert!(offset.is_multiple_of(UNIT_BYTES) && len.is_multiple_of(UNIT), "whole units");
    for first in (0..len / UNIT).step_by(TWEAKS) {
        let mut tweaks = [Block::default(); TWEAKS];
        let tweaks = &mut tweaks[..TWEAKS.min(len / UNIT - first)];
        for (unit, tweak) in (offset / UNIT_BYTES + first as u64..).zip(tweaks.iter_mut()) {
            tweak[..8].copy_from_slice(&unit.to_le_bytes());
        }
        cipher.encrypt_blocks(tweaks);
        work(tweaks, first);
    }
}

/// Whole units, `first` of them before, and for each the tweak of its first block.
struct Stretch<'a, P> {
    tweaks: &'a [Block],
    first: usize,
    place: &'a mut P,
}

impl<P> BlockSizeUser for Stretch<'_, P> {
    type BlockSize = U16;
}

impl<P: Place> BlockCipherEncClosure for Stretch<'_, P> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        self.groups(false, |blocks| {
            let (wide, rest) = Array::slice_as_chunks_mut(blocks);
            wide.iter_mut().for_each(|blocks| backend.encrypt_par_blocks_inplace(blocks));
            backend.encrypt_tail_blocks_inplace(rest);
        });
    }
}

impl<P: Place> BlockCipherDecClosure for Stretch<'_, P> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        self.groups(true, |blocks| {
            let (wide, rest) = Array::slice_as_chunks_mut(blocks);
            wide.iter_mut().for_each(|blocks| backend.decrypt_par_blocks_inplace(blocks));
            backend.decrypt_tail_blocks_inplace(rest);
        });
    }
}

impl<P: Place> Stretch<'_, P> {
    /// The mode around `cipher`. `holes`: units of zeros stay zeros.
    #[inline(always)]
    fn groups(self, holes: bool, cipher: impl Fn(&mut [Block])) {
        let mut masks: Masks = [[0; 2 * LANES]; UNIT / BLOCK / STEP];
        let mut group = [[0; UNIT]; UNITS];
        for (eighth, tweaks) in self.tweaks.chunks(MASKED).enumerate() {
            fill(&mut masks, tweaks);
            for first in (0..tweaks.len()).step_by(UNITS) {
                let before = self.first + eighth * MASKED + first;
                let mut hole = [false; UNITS];
                for (i, unit) in group.iter_mut().enumerate().take(tweaks.len() - first) {
                    for register in 0..REGISTERS {
                        let four = self.place.load(before + i, register);
                        put(unit, register, add(four, mask(&masks, first + i, register)));
                    }
                    hole[i] = holes && is_hole(unit, &masks, first + i);
                }
                let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(group.as_flattened_mut());
                cipher(blocks);
                for (i, unit) in group.iter().enumerate().take(tweaks.len() - first) {
                    for register in 0..REGISTERS {
                        let four = add(get(unit, register), mask(&masks, first + i, register));
                        self.place.store(before + i, register, if hole[i] { [0; 8] } else { four });
                    }
                }
            }
        }
    }
}

/// The masks of up to [`MASKED`] units from their first tweaks.
#[inline(always)]
fn fill(masks: &mut Masks, tweaks: &[Block]) {
    let (mut low, mut high) = ([0; LANES], [0; LANES]);
    // The first blocks one after the other: shifts that differ from lane to lane are dear where registers are narrow.
    let units = low.as_chunks_mut::<STEP>().0.iter_mut().zip(high.as_chunks_mut::<STEP>().0);
    for (tweak, (low, high)) in tweaks.iter().zip(units) {
        let tweak = u128::from_le_bytes((*tweak).into());
        let (mut l, mut h) = (tweak as u64, (tweak >> 64) as u64);
        for (low, high) in low.iter_mut().zip(high) {
            (*low, *high) = (l, h);
            // What is shifted out at the top comes back as x^7 + x^2 + x + 1; no branch on a secret.
            let over = (h.cast_signed() >> 63).cast_unsigned() & 0x87;
            (l, h) = ((l << 1) ^ over, (h << 1) | (l >> 63));
        }
    }
    for step in masks {
        for lane in 0..LANES {
            let (l, h) = (low[lane], high[lane]);
            step[2 * lane] = l;
            step[2 * lane + 1] = h;
            low[lane] = (l << STEP) ^ folded(h >> (64 - STEP));
            high[lane] = (h << STEP) | (l >> (64 - STEP));
        }
    }
}

/// What eight places shift out at the top, as it comes back.
#[inline(always)]
fn folded(over: u64) -> u64 {
    over ^ (over << 1) ^ (over << 2) ^ (over << 7)
}

/// The mask of a unit's register: two are a step.
#[inline(always)]
fn mask(masks: &Masks, unit: usize, register: usize) -> Four {
    let [even, odd] = masks[register / 2].as_chunks::<{ 2 * STEP }>().0[unit].as_chunks().0 else {
        unreachable!("sixteen halves are two registers")
    };
    if register.is_multiple_of(2) { *even } else { *odd }
}

#[inline(always)]
fn add(four: Four, mask: Four) -> Four {
    let mut sum = [0; 8];
    for i in 0..8 {
        sum[i] = four[i] ^ mask[i];
    }
    sum
}

#[inline(always)]
fn get(unit: &[u8; UNIT], register: usize) -> Four {
    let mut four = [0; 8];
    for (half, bytes) in four.iter_mut().zip(unit.as_chunks::<REGISTER>().0[register].as_chunks::<8>().0) {
        *half = u64::from_le_bytes(*bytes);
    }
    four
}

#[inline(always)]
fn put(unit: &mut [u8; UNIT], register: usize, four: Four) {
    let to = unit.as_chunks_mut::<REGISTER>().0[register].as_chunks_mut::<8>().0;
    for (to, half) in to.iter_mut().zip(four) {
        *to = half.to_le_bytes();
    }
}

/// Whether a unit was zeros, after its masks were added.
#[inline(always)]
fn is_hole(unit: &[u8; UNIT], masks: &Masks, place: usize) -> bool {
    // The first register mostly tells.
    (0..REGISTERS).all(|register| get(unit, register) == mask(masks, place, register))
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
