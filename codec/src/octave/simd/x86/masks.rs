//! The classes of keys, and which elements each class has.

use std::arch::x86_64::*;

use super::super::{ClassCounts, TILE, WORDS};
use super::tables::{LAST_FIRST, PLANES, UNIT_VECTORS};
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

/// Elements that have a pair of bits: neither, the first, the second, both.
type Halves = [__m512i; 4];

impl Avx512 {
    /// The bits of the classes of a row of words, lowest first, each of eight columns. Unless they are `ORDERED`, each
    /// byte has its bits the last first.
    #[inline(always)]
    fn planes<const ORDERED: bool>(
        self,
        words: &[[u8; 64]; WORDS],
        row: usize,
        classes: &impl LookUp,
    ) -> [__m512i; 4] {
        // SAFETY: token; bounds: 64 bytes of numbers each.
        unsafe {
            let mut pairs = [_mm512_setzero_si512(); 4];
            for (pair, bits) in pairs.iter_mut().enumerate() {
                let word = (pair * 16 + row) % WORDS;
                let first = classes.entries(self, &words[word]);
                let second = classes.entries(self, &words[(word + 8) % WORDS]);
                let mut both = _mm512_or_si512(first, _mm512_slli_epi16::<4>(second));
                // A matrix of 8 by 8 bits times each of its unit vectors is its transpose, the last row first.
                if ORDERED {
                    both = _mm512_shuffle_epi8(both, _mm512_loadu_si512(LAST_FIRST.as_ptr().cast()));
                }
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
            let [zero, one, two, three] = self.planes::<true>(words, row, classes);
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
    pub(super) fn counts_of(
        self,
        keys: &[u8; TILE],
        count: usize,
        counts: &mut [ClassCounts; MAX],
        classes: &impl LookUp,
    ) {
        let Some(words) = keys.as_chunks::<64>().0.as_array() else { return };
        // SAFETY: token.
        let mut rows = [[unsafe { _mm512_setzero_si512() }; 4]; 8];
        for (row, planes) in rows.iter_mut().enumerate() {
            *planes = self.planes::<false>(words, row, classes);
        }
        let [first, second, third, fourth] = counts.as_chunks_mut().0 else { return };
        self.counts_of_four::<0>(&rows, first);
        if count > 4 {
            self.counts_of_four::<1>(&rows, second);
        }
        if count > 8 {
            self.counts_of_four::<2>(&rows, third);
        }
        if count > 12 {
            self.counts_of_four::<3>(&rows, fourth);
        }
    }

    /// Counts the classes whose upper bits are `HIGH`.
    #[inline(always)]
    fn counts_of_four<const HIGH: usize>(self, rows: &[[__m512i; 4]; 8], counts: &mut [ClassCounts; 4]) {
        // SAFETY: token; bounds: 8 words of 64, 8 columns.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); 4];
            for (row, &[zero, one, two, three]) in rows.iter().enumerate() {
                let high = self.halves(two, three)[HIGH];
                for ((counts, sum), low) in counts.iter_mut().zip(&mut sums).zip(self.halves(zero, one)) {
                    _mm512_storeu_si512(counts.words.as_mut_ptr().add(row * 8).cast(), *sum);
                    *sum = _mm512_add_epi64(*sum, _mm512_popcnt_epi64(_mm512_and_si512(high, low)));
                }
            }
            for (counts, sum) in counts.iter_mut().zip(sums) {
                let (columns, all) = self.columns(sum);
                let before = _mm256_set1_epi32(counts.all.cast_signed());
                let columns = _mm256_add_epi32(before, _mm256_cvtepu16_epi32(columns));
                _mm256_storeu_si256(counts.columns.as_mut_ptr().cast(), columns);
                counts.all += all;
            }
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
