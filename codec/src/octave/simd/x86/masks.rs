//! The classes of keys, and which elements each class has.

use std::arch::x86_64::*;

use super::super::{ClassCounts, TILE, WORDS};
use super::tables::{EIGHTS_OF_BITS, EVEN_BITS, LAST_FIRST, ODD_BITS, PLANES, TURNED, UNIT_VECTORS};
use super::{Avx512, Classes, MAX};
use crate::tally::Tally;

/// Bytes that are less than this above the first one are counted many at once.
const NEAR: u8 = 64;

/// A table that is looked up by keys, 64 at a time.
pub(super) trait LookUp: Copy {
    /// The entries, each below 64, looked up in `table`.
    fn then(self, isa: Avx512, table: &[u8; 64]) -> Self;

    /// Of 64 keys.
    fn entries(&self, isa: Avx512, keys: &[u8; 64]) -> __m512i;
}

/// 64 entries of `table`.
#[inline(always)]
fn looked_up(_: Avx512, table: &[u8; 64], places: &[u8; 64]) -> [u8; 64] {
    let mut entries = [0; 64];
    // SAFETY: token; bounds: 64 bytes each.
    unsafe {
        let places = _mm512_loadu_si512(places.as_ptr().cast());
        let found = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(table.as_ptr().cast()));
        _mm512_storeu_si512(entries.as_mut_ptr().cast(), found);
    }
    entries
}

/// The classes of keys if all bounds lie within 63 keys, as they do but for wild values: one look-up in place of four.
#[derive(Clone, Copy)]
pub(super) struct Narrow {
    first: u8,
    classes: [u8; 64],
}

impl Narrow {
    #[inline(always)]
    pub(super) fn of(classes: &Classes, table: &[u8; 256]) -> Option<Self> {
        let first = classes.bounds().first()?.saturating_sub(1);
        let all = table[usize::from(first)..].first_chunk()?;
        (all[63] == table[255]).then_some(Self { first, classes: *all })
    }
}

impl LookUp for Narrow {
    #[inline(always)]
    fn then(self, isa: Avx512, table: &[u8; 64]) -> Self {
        Self { classes: looked_up(isa, table, &self.classes), ..self }
    }

    #[inline(always)]
    fn entries(&self, _: Avx512, keys: &[u8; 64]) -> __m512i {
        // SAFETY: token; bounds: 64 keys and classes.
        unsafe {
            let keys = _mm512_loadu_si512(keys.as_ptr().cast());
            let from_first = _mm512_subs_epu8(keys, _mm512_set1_epi8(self.first.cast_signed()));
            let place = _mm512_min_epu8(from_first, _mm512_set1_epi8(63));
            _mm512_permutexvar_epi8(place, _mm512_loadu_si512(self.classes.as_ptr().cast()))
        }
    }
}

/// Any table.
#[derive(Clone, Copy)]
pub(super) struct Wide([[u8; 64]; 4]);

impl Wide {
    #[inline(always)]
    pub(super) fn of(table: &[u8; 256]) -> Self {
        Self(table.as_chunks().0.as_array().copied().unwrap_or([[0; 64]; 4]))
    }
}

impl LookUp for Wide {
    #[inline(always)]
    fn then(self, isa: Avx512, table: &[u8; 64]) -> Self {
        Self(self.0.map(|part| looked_up(isa, table, &part)))
    }

    #[inline(always)]
    fn entries(&self, _: Avx512, keys: &[u8; 64]) -> __m512i {
        // SAFETY: token; bounds: 64 keys, quarters of the table.
        unsafe {
            let [a, b, c, d] = &self.0;
            let keys = _mm512_loadu_si512(keys.as_ptr().cast());
            let (a, b) = (_mm512_loadu_si512(a.as_ptr().cast()), _mm512_loadu_si512(b.as_ptr().cast()));
            let (c, d) = (_mm512_loadu_si512(c.as_ptr().cast()), _mm512_loadu_si512(d.as_ptr().cast()));
            let low = _mm512_permutex2var_epi8(a, keys, b);
            let high = _mm512_permutex2var_epi8(c, keys, d);
            _mm512_mask_blend_epi8(_mm512_movepi8_mask(keys), low, high)
        }
    }
}

/// Elements that have a pair of bits: neither, the first, the second, both.
type Halves = [__m512i; 4];

impl Avx512 {
    /// The bits of the classes of a row of words, lowest first, each of eight columns.
    #[inline(always)]
    fn planes(self, words: &[[u8; 64]; WORDS], row: usize, classes: &impl LookUp) -> [__m512i; 4] {
        // SAFETY: token; bounds: 64 bytes of numbers each.
        unsafe {
            let mut pairs = [_mm512_setzero_si512(); 4];
            for (pair, bits) in pairs.iter_mut().enumerate() {
                let word = (pair * 16 + row) % WORDS;
                let first = classes.entries(self, &words[word]);
                let second = classes.entries(self, &words[(word + 8) % WORDS]);
                // A matrix of 8 by 8 bits times each of its unit vectors is its transpose, the last row first.
                let both = _mm512_or_si512(first, _mm512_slli_epi16::<4>(second));
                let both = _mm512_shuffle_epi8(both, _mm512_loadu_si512(LAST_FIRST.as_ptr().cast()));
                *bits = _mm512_gf2p8affine_epi64_epi8::<0>(_mm512_set1_epi64(UNIT_VECTORS), both);
            }
            let [a, b, c, d] = pairs;
            let low = _mm512_loadu_si512(PLANES.as_ptr().cast());
            let high = _mm512_add_epi8(low, _mm512_set1_epi8(2));
            let (ab, cd) = (_mm512_permutex2var_epi8(a, low, b), _mm512_permutex2var_epi8(c, low, d));
            let (zero, one) = (_mm512_shuffle_i64x2::<0x44>(ab, cd), _mm512_shuffle_i64x2::<0xee>(ab, cd));
            let (ab, cd) = (_mm512_permutex2var_epi8(a, high, b), _mm512_permutex2var_epi8(c, high, d));
            let (two, three) = (_mm512_shuffle_i64x2::<0x44>(ab, cd), _mm512_shuffle_i64x2::<0xee>(ab, cd));
            [zero, one, two, three]
        }
    }

    #[inline(always)]
    fn halves(self, zero: __m512i, one: __m512i) -> Halves {
        // SAFETY: token.
        unsafe {
            let neither = _mm512_andnot_si512(_mm512_or_si512(zero, one), _mm512_set1_epi64(-1));
            let (first, second) = (_mm512_andnot_si512(one, zero), _mm512_andnot_si512(zero, one));
            [neither, first, second, _mm512_and_si512(zero, one)]
        }
    }

    /// As [`Isa::class_masks`].
    #[inline(always)]
    pub(super) fn masks_of(
        self,
        keys: &[u8; TILE],
        count: usize,
        masks: &mut [[u64; WORDS]; MAX],
        classes: &impl LookUp,
    ) {
        let Some(words) = keys.as_chunks::<64>().0.as_array() else { return };
        // The words of eight columns that stand in a row.
        for row in 0..8 {
            let [zero, one, two, three] = self.planes(words, row, classes);
            let low = self.halves(zero, one);
            let (groups, _) = masks.as_chunks_mut::<4>();
            for (masks, high) in groups.iter_mut().zip(self.halves(two, three)).take(count.div_ceil(4)) {
                for (mask, low) in masks.iter_mut().zip(low) {
                    // SAFETY: token; bounds: 8 words of 64 of each mask.
                    unsafe {
                        let mask = mask.as_mut_ptr().add(row * 8);
                        _mm512_storeu_si512(mask.cast(), _mm512_and_si512(high, low));
                    }
                }
            }
        }
    }

    /// As [`Isa::class_counts`].
    #[inline(always)]
    pub(super) fn counts_of(self, keys: &[u8; TILE], counts: &mut ClassCounts, classes: impl LookUp) {
        let (evens, odds) = (classes.then(self, &EVEN_BITS), classes.then(self, &ODD_BITS));
        // SAFETY: token; bounds: 16 counts.
        unsafe {
            let mut all = _mm512_loadu_si512(counts.all.as_ptr().cast());
            for (keys, before) in keys.as_chunks::<64>().0.iter().zip(&mut counts.words) {
                _mm512_storeu_si512(before.as_mut_ptr().cast(), all);
                let even = self.counts_of_bits(evens.entries(self, keys));
                let odd = self.counts_of_bits(odds.entries(self, keys));
                all = _mm512_add_epi32(all, _mm512_or_si512(even, _mm512_slli_epi64::<32>(odd)));
            }
            _mm512_storeu_si512(counts.all.as_mut_ptr().cast(), all);
        }
    }

    /// As [`Isa::tally`].
    #[inline(always)]
    pub(super) fn tally_of<'a>(self, parts: impl Iterator<Item = &'a [u8]> + Clone, tally: &mut Tally) {
        // The keys of weights lie close together.
        let largest = parts.clone().next().and_then(|part| part.iter().max()).copied().unwrap_or_default();
        // What is before the first one is not near it then: it wraps around.
        let first = largest.saturating_sub(NEAR - 8).min(u8::MAX - NEAR + 1);
        // SAFETY: token; bounds: 64 bytes of a part and of bits.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); NEAR as usize / 8];
            for part in parts {
                let Some(bytes) = part.as_array::<64>() else {
                    tally.add(part);
                    continue;
                };
                let bytes = _mm512_loadu_si512(bytes.as_ptr().cast());
                let from_first = _mm512_sub_epi8(bytes, _mm512_set1_epi8(first.cast_signed()));
                let near = _mm512_cmplt_epu8_mask(from_first, _mm512_set1_epi8(NEAR.cast_signed()));
                if near.count_zeros() > 8 {
                    tally.add(part);
                    continue;
                }
                let mut far = !near;
                while far != 0 {
                    tally.add(&part[far.trailing_zeros() as usize..][..1]);
                    far &= far - 1;
                }
                for (sum, bits) in sums.iter_mut().zip(&EIGHTS_OF_BITS) {
                    let bits = _mm512_loadu_si512(bits.as_ptr().cast());
                    let bits = _mm512_maskz_permutexvar_epi8(near, from_first, bits);
                    *sum = _mm512_add_epi64(*sum, self.counts_of_bits(bits));
                }
            }
            let mut near = [0u64; NEAR as usize];
            for (eight, sum) in near.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
                _mm512_storeu_si512(eight.as_mut_ptr().cast(), sum);
            }
            tally.add_counts(first, near.map(|sum| sum as u32));
        }
    }

    /// How many of 64 bytes have each bit.
    #[inline(always)]
    fn counts_of_bits(self, bytes: __m512i) -> __m512i {
        // SAFETY: token; bounds: 64 bytes of numbers.
        unsafe {
            let eights = _mm512_gf2p8affine_epi64_epi8::<0>(_mm512_set1_epi64(UNIT_VECTORS), bytes);
            let together = _mm512_permutexvar_epi8(_mm512_loadu_si512(TURNED.as_ptr().cast()), eights);
            _mm512_popcnt_epi64(together)
        }
    }

    /// The sums before each of eight columns, and that of all.
    #[inline(always)]
    pub(super) fn columns(self, sums: __m512i) -> (__m128i, u32) {
        // SAFETY: token.
        unsafe {
            let columns = _mm512_cvtepi64_epi16(sums);
            let mut sum = _mm_add_epi16(columns, _mm_slli_si128::<2>(columns));
            sum = _mm_add_epi16(sum, _mm_slli_si128::<4>(sum));
            sum = _mm_add_epi16(sum, _mm_slli_si128::<8>(sum));
            (_mm_sub_epi16(sum, columns), _mm_extract_epi16::<7>(sum) as u32)
        }
    }
}
