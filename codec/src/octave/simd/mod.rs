//! The loops that depend on the processor: with `x86`, the only code of this crate that is `unsafe`.
//!
//! A [`Kernel`] is written once, for any [`Isa`]. [`Instructions::run`] compiles it for each set of instructions and picks
//! one at run time. Three things make that sound, and each `unsafe` block names the one it rests on:
//!
//! - **token**: an [`Avx2`] or [`Avx512`] is made only in [`Instructions::run`], behind the check that the processor has
//!   all the features that its methods use;
//! - **bounds**: a read or write through a pointer stays within a slice or an array of a known length;
//! - **baseline**: every processor of the architecture has the instruction.

#![expect(unsafe_code, reason = "instructions beyond the baseline, behind tokens of what the processor has")]

#[cfg(target_arch = "x86_64")]
mod x86;

use super::classes::{Classes, MAX};
use super::elem::Elem;
use super::rans::{EncodeTable, LANES};
use crate::tally::Tally;
use crate::xor::xor_into;
use crate::xxh3::{BLOCK, Lanes, STRIPE};

/// The elements that are ranked at once.
pub(super) const TILE: usize = 4096;
/// The words of a mask of a tile.
pub(super) const WORDS: usize = TILE / 64;

/// Where the mask of a word is kept: words lie in eight columns of eight, one below the other, so that running counts go
/// down all columns at once.
#[inline(always)]
pub(super) fn slot(word: usize) -> usize {
    word % 8 * 8 + word / 8
}

/// How many bits of the masks of a tile's words are set.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Before each column.
    pub(super) columns: [u16; 8],
    /// Before each word in its column, column by column.
    pub(super) words: [[u16; 8]; 8],
}

/// How many elements of each class stand before each word of a tile, in this tile and those before it.
#[derive(Debug, Clone)]
#[repr(align(64))]
pub(super) struct ClassCounts {
    /// Before each word, by class.
    words: [[u32; MAX]; WORDS],
    /// Before the next tile.
    all: [u32; MAX],
}

impl Default for ClassCounts {
    fn default() -> Self {
        Self { words: [[0; MAX]; WORDS], all: [0; MAX] }
    }
}

impl ClassCounts {
    /// Before a word.
    #[inline(always)]
    pub(super) fn before(&self, word: usize) -> &[u32; MAX] {
        &self.words[word % WORDS]
    }

    /// Forgets the tiles before.
    pub(super) fn begin(&mut self) {
        self.all = [0; MAX];
    }
}

/// Which instructions a codec may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[non_exhaustive]
pub enum Instructions {
    /// Those that every processor of the target has.
    Scalar,
    /// AVX2 with BMI1, BMI2, LZCNT and POPCNT (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, DQ, VL, VBMI, VBMI2 and VPOPCNTDQ, and GFNI, as well (Ice Lake, Zen 4 and later).
    #[default]
    Avx512,
}

impl Instructions {
    /// Every level, the simplest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The best level that this processor has, at most this one.
    #[must_use]
    pub fn available(self) -> Self {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            let v3 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt");
            let v4 = v3
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vbmi2")
                && is_x86_feature_detected!("avx512vpopcntdq")
                && is_x86_feature_detected!("gfni");
            let best = match (v3, v4) {
                (_, true) => Self::Avx512,
                (true, false) => Self::Avx2,
                (false, false) => Self::Scalar,
            };
            self.min(best)
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        Self::Scalar
    }

    /// Runs a kernel with the best instructions of this level that the processor has.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.available() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` checked the features.
            Self::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` checked the features.
            Self::Avx2 => unsafe { run_avx2(kernel) },
            _ => kernel.run(Scalar),
        }
    }
}

/// Has `bytes`, which are worked on soon, come into the nearest cache while other work is done.
#[inline(always)]
pub(crate) fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    x86::prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(bytes);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// As [`prefetch`], but into the second cache: the few loads that the nearest one can wait for are left to the work.
#[inline(always)]
pub(super) fn prefetch_second(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    x86::prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(bytes);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Lists where bytes of `left ^ right` differ from the byte before, which for the first one is `before`: the place,
/// counted from `first`, above the byte in the lowest 8 bits. Ends before the first 64 bytes with [`MOST_LISTED`] or more,
/// or where `list` has no room for as many. Returns how many times 64 bytes that are, and how many places; nothing if
/// this processor has no instructions for it.
pub(crate) fn list_changes(
    left: &[[u8; 64]],
    right: &[[u8; 64]],
    before: u8,
    first: usize,
    list: &mut [u32],
) -> Option<(usize, usize)> {
    #[cfg(target_arch = "x86_64")]
    if Instructions::Avx512.available() == Instructions::Avx512 {
        // SAFETY: `available` checked the features.
        return Some(unsafe { x86::list_changes(left, right, before, first, list) });
    }
    let _ = (left, right, before, first, list);
    None
}

/// What [`list_changes`] does not list among 64 bytes.
pub(crate) const MOST_LISTED: u32 = 32;

/// As [`xor_into`] for strings of one length, of which `mask` becomes zero.
pub(crate) fn xor_and_clear(target: &mut [u8], mask: &mut [u8]) {
    Instructions::default().run(XorAndClear { target, mask });
}

struct XorAndClear<'a> {
    target: &'a mut [u8],
    mask: &'a mut [u8],
}

impl Kernel for XorAndClear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let (targets, target) = self.target.as_chunks_mut::<64>();
        let (masks, mask) = self.mask.as_chunks_mut::<64>();
        for (target, mask) in targets.iter_mut().zip(masks) {
            for index in 0..64 {
                target[index] ^= mask[index];
            }
            *mask = [0; 64];
        }
        xor_into(target, mask);
        mask.fill(0);
    }
}

/// A loop that is compiled for each instruction set. `run` must be `#[inline(always)]`.
pub(super) trait Kernel {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(x86::Avx2(()))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(
    enable = "avx2,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vpopcntdq,gfni"
)]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(x86::Avx512(()))
}

/// What differs from one instruction set to the next. The results are the same for all.
pub(super) trait Isa: Copy {
    /// Whether the `rans` methods do anything.
    const HAS_RANS: bool = false;
    /// Whether `digest` does anything: elsewhere digests are as fast on their own.
    const DIGESTS: bool = false;

    /// Bit `i` is set where byte `i` is not zero.
    fn nonzero(self, bytes: &[u8; 64]) -> u64;

    /// Bit `i` is set where element `i` differs. Sets the keys of the old ones.
    #[inline(always)]
    fn differing<E: Elem>(self, old: &[E::Raw; 64], new: &[E::Raw; 64], keys: &mut [u8; 64]) -> u64 {
        let mut differs = [0; 64];
        for index in 0..64 {
            let old = E::load(old[index]);
            differs[index] = u8::from(old != E::load(new[index]));
            keys[index] = old.key();
        }
        self.nonzero(&differs)
    }

    /// Sets the keys of a tile's elements, of which there may be fewer. Has `ahead`, at most half a tile, come into the cache
    /// meanwhile, and takes blocks into lanes.
    #[inline(always)]
    fn keys<E: Elem>(
        self,
        tile: &[E::Raw],
        keys: &mut [u8; TILE],
        ahead: &[E::Raw],
        (blocks, lanes): (&[[u8; BLOCK]], &mut Lanes),
    ) {
        keys_each::<E, Self>(self, tile, keys, ahead, (blocks, lanes));
    }

    /// Digests stripes that are the `first` one of an input and those behind it.
    #[inline(always)]
    fn digest(self, _lanes: &mut Lanes, _first: usize, _stripes: &[[u8; STRIPE]]) {}

    /// Writes the places of the set bits, counted from `first`, and anything behind them. Returns how many there are.
    #[inline(always)]
    fn places(self, mut mask: u64, first: u16, places: &mut [u16; 64]) -> usize {
        let count = mask.count_ones() as usize;
        for place in &mut places[..count] {
            *place = first + mask.trailing_zeros() as u16;
            mask &= mask.wrapping_sub(1);
        }
        count
    }

    /// Finds the elements of a tile that differ: sets the keys of the old ones, and the places of those that differ and
    /// anything behind them; digests the new ones, which are whole blocks then, if it is given lanes. Returns how many
    /// differ, or nothing without room for the places of 64 elements more than the tile has.
    #[inline(always)]
    fn compare<E: Elem>(
        self,
        tile: (&[E::Raw], &[E::Raw]),
        keys: &mut [u8],
        places: &mut [u16],
        lanes: Option<&mut Lanes>,
    ) -> Option<usize> {
        compare_each::<E, Self>(self, tile, keys, places, lanes)
    }

    /// Fills `masks[class][slot(word)]` for the keys of a tile.
    fn class_masks(
        self,
        keys: &[u8; TILE],
        classes: &Classes,
        table: &[u8; 256],
        masks: &mut [[u64; WORDS]; MAX],
    );

    /// Counts the bytes of `parts`.
    #[inline(always)]
    fn tally<'a>(self, parts: impl Iterator<Item = &'a [u8]> + Clone, tally: &mut Tally) {
        parts.for_each(|part| tally.add(part));
    }

    /// Counts the keys of the next tile by class.
    #[inline(always)]
    fn class_counts(
        self,
        keys: &[u8; TILE],
        _classes: &Classes,
        table: &[u8; 256],
        counts: &mut ClassCounts,
    ) {
        for (keys, before) in keys.as_chunks::<64>().0.iter().zip(&mut counts.words) {
            *before = counts.all;
            for &key in keys {
                counts.all[usize::from(table[usize::from(key)]) % MAX] += 1;
            }
        }
    }

    /// How many of the keys before the one at `end` are `first` or at most `more` above it.
    #[inline(always)]
    fn count_within(self, keys: &[u8; 64], end: u16, (first, more): (u8, u8)) -> u32 {
        let keys = &keys[..usize::from(end % 64)];
        keys.iter().map(|key| u32::from(key.wrapping_sub(first) <= more)).sum()
    }

    /// Counts the set bits before each word, and returns how many there are in all.
    #[inline(always)]
    fn running_counts(self, masks: &[u64; WORDS], counts: &mut Counts) -> u32 {
        let mut all = 0;
        for (column, (first, words)) in counts.columns.iter_mut().zip(&mut counts.words).enumerate() {
            *first = all;
            let mut sum = 0;
            for (row, before) in words.iter_mut().enumerate() {
                *before = sum;
                sum += masks[row * 8 + column].count_ones() as u16;
            }
            all += sum;
        }
        all.into()
    }

    /// The entry of each key.
    #[inline(always)]
    fn look_up(self, table: &[u8; 256], keys: &[u8; 64]) -> [u8; 64] {
        keys.map(|key| table[usize::from(key)])
    }

    /// The low 7 bits of each byte, together.
    #[inline(always)]
    fn seven_of_eight(self, bytes: u64) -> u64 {
        let pairs = bytes & 0x007f_007f_007f_007f | (bytes & 0x7f00_7f00_7f00_7f00) >> 1;
        let fours = pairs & 0x0000_3fff_0000_3fff | (pairs & 0x3fff_0000_3fff_0000) >> 2;
        fours & 0x0fff_ffff | (fours & 0x0fff_ffff_0000_0000) >> 4
    }

    /// The reverse: 7 bits in each byte.
    #[inline(always)]
    fn eight_of_seven(self, bits: u64) -> u64 {
        let fours = bits & 0x0fff_ffff | bits << 4 & 0x0fff_ffff_0000_0000;
        let pairs = fours & 0x0000_3fff_0000_3fff | fours << 2 & 0x3fff_0000_3fff_0000;
        pairs & 0x007f_007f_007f_007f | pairs << 1 & 0x7f00_7f00_7f00_7f00
    }

    /// The position of the set bit of `word` that has `rank` set bits below it. There is one.
    fn select(self, word: u64, rank: u32) -> u32;

    /// The last of `counts` that is at most `rank`. They are sorted, and the first is.
    #[inline(always)]
    fn last_at_most(self, counts: &[u16; 8], rank: u16) -> usize {
        // Without branches: they would be mispredicted.
        let mut last = 0;
        for step in [4, 2, 1] {
            last |= usize::from(counts[(last | step) % 8] <= rank) * step;
        }
        last
    }

    /// Decodes whole rounds of [`LANES`] tokens; returns how many tokens and words that were.
    fn rans_decode(
        self,
        _table: &[u32],
        _classes: &[u8],
        _tokens: &mut [u8],
        _words: &[[u8; 2]],
        _states: &mut [u32; LANES],
    ) -> (usize, usize) {
        (0, 0)
    }

    /// Encodes tokens, a multiple of [`LANES`], from their end; words go below `start`, whose new place is returned.
    fn rans_encode(
        self,
        _table: &EncodeTable,
        _classes: &[u8],
        _tokens: &[u8],
        _buffer: &mut [u16],
        start: usize,
        _states: &mut [u32; LANES],
    ) -> usize {
        start
    }
}

/// As [`Isa::keys`], 64 elements after the other.
#[inline(always)]
fn keys_each<E: Elem, I: Isa>(
    isa: I,
    tile: &[E::Raw],
    keys: &mut [u8; TILE],
    ahead: &[E::Raw],
    (blocks, lanes): (&[[u8; BLOCK]], &mut Lanes),
) {
    let mut ahead = ahead.chunks(TILE / 2 / WORDS);
    for (keys, raws) in keys.chunks_mut(64).zip(tile.chunks(64)) {
        if let Some(ahead) = ahead.next() {
            prefetch_second(E::bytes(ahead));
        }
        keys.iter_mut().zip(raws).for_each(|(key, &raw)| *key = E::load(raw).key());
    }
    isa.digest(lanes, 0, blocks.as_flattened().as_chunks().0);
}

/// As [`Isa::compare`], 64 elements after the other.
#[inline(always)]
fn compare_each<E: Elem, I: Isa>(
    isa: I,
    (old, new): (&[E::Raw], &[E::Raw]),
    keys: &mut [u8],
    places: &mut [u16],
    mut lanes: Option<&mut Lanes>,
) -> Option<usize> {
    let ((olds, old_rest), (news, new_rest)) = (old.as_chunks(), new.as_chunks());
    let (keys, _) = keys.as_chunks_mut();
    let (mut first, mut found) = (0, 0);
    for ((old, new), keys) in olds.iter().zip(news).zip(keys.iter_mut()) {
        if let Some(lanes) = &mut lanes {
            let (stripes, _) = E::bytes(new).as_chunks();
            isa.digest(lanes, usize::from(first) / 64 * stripes.len(), stripes);
        }
        let mask = isa.differing::<E>(old, new, keys);
        found += isa.places(mask, first, places.get_mut(found..)?.first_chunk_mut()?);
        first += 64;
    }
    if let (false, Some(keys)) = (old_rest.is_empty(), keys.get_mut(olds.len())) {
        // What fills the last word is the same on both sides.
        let mut pair = [[E::default().store(); 64]; 2];
        pair[0][..old_rest.len()].copy_from_slice(old_rest);
        pair[1][..new_rest.len()].copy_from_slice(new_rest);
        let mask = isa.differing::<E>(&pair[0], &pair[1], keys);
        found += isa.places(mask, first, places.get_mut(found..)?.first_chunk_mut()?);
    }
    Some(found)
}

/// The baseline.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar;

impl Isa for Scalar {
    #[inline(always)]
    fn nonzero(self, bytes: &[u8; 64]) -> u64 {
        (0..).zip(bytes).fold(0, |mask, (bit, &byte)| mask | u64::from(byte != 0) << bit)
    }

    #[inline(always)]
    fn class_masks(
        self,
        keys: &[u8; TILE],
        classes: &Classes,
        table: &[u8; 256],
        masks: &mut [[u64; WORDS]; MAX],
    ) {
        masks.iter_mut().take(classes.count()).for_each(|mask| mask.fill(0));
        for (word, keys) in keys.as_chunks::<64>().0.iter().enumerate() {
            for (bit, &key) in keys.iter().enumerate() {
                masks[usize::from(table[usize::from(key)]) % MAX][slot(word)] |= 1 << bit;
            }
        }
    }

    #[inline(always)]
    fn select(self, mut word: u64, rank: u32) -> u32 {
        for _ in 0..rank {
            word &= word.wrapping_sub(1);
        }
        word.trailing_zeros()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seven_bits_come_back() {
        for bytes in [0, 0x7f7f_7f7f_7f7f_7f7f, 0x0102_0304_0506_0708, 0x7f00_7f00_0055_2a01] {
            assert!(Scalar.seven_of_eight(bytes) < 1 << 56);
            assert_eq!(Scalar.eight_of_seven(Scalar.seven_of_eight(bytes)), bytes);
        }
    }
}
