//! The classes of keys, and which elements each class has.

use std::arch::x86_64::*;

use super::super::{TILE, WORDS};
use super::tables::{BYTES_OF_EIGHTS, LAST_FIRST, UNIT_VECTORS};
use super::{Avx512, Classes, MAX};

/// A table that is looked up by keys, 64 at a time.
pub(super) trait LookUp {
    fn entries(&self, isa: Avx512, keys: &[u8; 64]) -> __m512i;
}

/// The classes of keys if all bounds lie within 63 keys, as they do but for wild values: one look-up in place of four.
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
pub(super) struct Wide<'a>(&'a [[u8; 64]; 4]);

impl<'a> Wide<'a> {
    #[inline(always)]
    pub(super) fn of(table: &'a [u8; 256]) -> Self {
        Self(table.as_chunks().0.as_array().unwrap_or(&[[0; 64]; 4]))
    }
}

impl LookUp for Wide<'_> {
    #[inline(always)]
    fn entries(&self, _: Avx512, keys: &[u8; 64]) -> __m512i {
        // SAFETY: token; bounds: 64 keys, quarters of the table.
        unsafe {
            let [a, b, c, d] = self.0;
            let keys = _mm512_loadu_si512(keys.as_ptr().cast());
            let (a, b) = (_mm512_loadu_si512(a.as_ptr().cast()), _mm512_loadu_si512(b.as_ptr().cast()));
            let (c, d) = (_mm512_loadu_si512(c.as_ptr().cast()), _mm512_loadu_si512(d.as_ptr().cast()));
            let low = _mm512_permutex2var_epi8(a, keys, b);
            let high = _mm512_permutex2var_epi8(c, keys, d);
            _mm512_mask_blend_epi8(_mm512_movepi8_mask(keys), low, high)
        }
    }
}

impl Avx512 {
    /// The four bits of the classes of twice 64 keys: of the first in the lower four words, of the second above.
    #[inline(always)]
    fn planes(self, first: __m512i, second: __m512i) -> __m512i {
        // SAFETY: token; bounds: 64 bytes of numbers each.
        unsafe {
            let both = _mm512_or_si512(first, _mm512_slli_epi16::<4>(second));
            // A matrix of 8 by 8 bits times each of its unit vectors is its transpose, the last row first.
            let turned = _mm512_shuffle_epi8(both, _mm512_loadu_si512(LAST_FIRST.as_ptr().cast()));
            let bits = _mm512_gf2p8affine_epi64_epi8::<0>(_mm512_set1_epi64(UNIT_VECTORS), turned);
            _mm512_permutexvar_epi8(_mm512_loadu_si512(BYTES_OF_EIGHTS.as_ptr().cast()), bits)
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
        let words = keys.as_chunks::<64>().0;
        // The words of eight columns that stand in a row.
        for row in 0..8 {
            // SAFETY: token; bounds: 8 words of 64 of each mask.
            unsafe {
                let mut pairs = [_mm512_setzero_si512(); 4];
                for (pair, planes) in pairs.iter_mut().enumerate() {
                    let word = (pair * 16 + row) % WORDS;
                    let first = classes.entries(self, &words[word]);
                    *planes = self.planes(first, classes.entries(self, &words[(word + 8) % WORDS]));
                }
                // Plane by plane: 0 and 1, then 2 and 3, of four columns each; then of all eight.
                let low = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13);
                let high = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
                let [a, b, c, d] = pairs;
                let (ab, cd) = (_mm512_permutex2var_epi64(a, low, b), _mm512_permutex2var_epi64(c, low, d));
                let (zero, one) =
                    (_mm512_shuffle_i64x2::<0x44>(ab, cd), _mm512_shuffle_i64x2::<0xee>(ab, cd));
                let (ab, cd) = (_mm512_permutex2var_epi64(a, high, b), _mm512_permutex2var_epi64(c, high, d));
                let (two, three) =
                    (_mm512_shuffle_i64x2::<0x44>(ab, cd), _mm512_shuffle_i64x2::<0xee>(ab, cd));
                // The elements that have both bits of a half of the class.
                let halves = |zero, one| {
                    let neither = _mm512_andnot_si512(_mm512_or_si512(zero, one), _mm512_set1_epi64(-1));
                    let (first, second) = (_mm512_andnot_si512(one, zero), _mm512_andnot_si512(zero, one));
                    [neither, first, second, _mm512_and_si512(zero, one)]
                };
                let low = halves(zero, one);
                let (groups, _) = masks.as_chunks_mut::<4>();
                for (masks, high) in groups.iter_mut().zip(halves(two, three)).take(count.div_ceil(4)) {
                    for (mask, low) in masks.iter_mut().zip(low) {
                        let mask = mask.as_mut_ptr().add(row * 8);
                        _mm512_storeu_si512(mask.cast(), _mm512_and_si512(high, low));
                    }
                }
            }
        }
    }
}
