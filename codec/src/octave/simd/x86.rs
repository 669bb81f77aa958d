//! What processors of this architecture do faster.

use std::arch::x86_64::*;

use super::super::classes::Classes;
use super::super::rans::{CHANCE_BITS, EncodeTable, LOWEST, TOTAL};
use super::{Isa, LANES, MAX, TILE, WORDS};

/// The processor has AVX2, BMI1, BMI2, LZCNT and POPCNT.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(pub(super) ());

/// The processor has what [`Avx2`] says, and AVX-512 F, BW, DQ, VL, VBMI, VBMI2 and VPOPCNTDQ.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512(pub(super) ());

const BYTE_NUMBERS: [u8; 64] = {
    let mut numbers = [0; 64];
    let mut byte = 0;
    while byte < 64 {
        numbers[byte] = byte as u8;
        byte += 1;
    }
    numbers
};

const LANE_NUMBERS: [u16; 32] = {
    let mut numbers = [0; 32];
    let mut lane = 0;
    while lane < 32 {
        numbers[lane] = lane as u16;
        lane += 1;
    }
    numbers
};

/// Fills masks from `at_least(keys of a word, bound)`.
#[inline(always)]
fn masks_from(
    keys: &[u8; TILE],
    classes: &Classes,
    masks: &mut [[u64; WORDS]; MAX],
    at_least: impl Fn(&[u8; 64], u8) -> u64,
) {
    for (word, keys) in keys.as_chunks::<64>().0.iter().enumerate() {
        let mut above = u64::MAX;
        for (class, &bound) in classes.bounds().iter().enumerate() {
            let from_here = at_least(keys, bound);
            masks[class % MAX][word] = above & !from_here;
            above = from_here;
        }
        masks[classes.bounds().len() % MAX][word] = above;
    }
}

/// As [`Isa::seven_of_eight`].
#[inline(always)]
fn seven_bmi2(bytes: u64) -> u64 {
    // SAFETY: token; both callers hold one that covers BMI2.
    unsafe { _pext_u64(bytes, 0x7f7f_7f7f_7f7f_7f7f) }
}

/// As [`Isa::eight_of_seven`].
#[inline(always)]
fn eight_bmi2(bits: u64) -> u64 {
    // SAFETY: token; both callers hold one that covers BMI2.
    unsafe { _pdep_u64(bits, 0x7f7f_7f7f_7f7f_7f7f) }
}

/// As [`Isa::select`].
#[inline(always)]
fn select_bmi2(word: u64, rank: u32) -> u32 {
    // SAFETY: token; both callers hold one that covers BMI2.
    unsafe { _pdep_u64(1 << rank, word) }.trailing_zeros()
}

impl Isa for Avx2 {
    #[inline(always)]
    fn nonzero(self, bytes: &[u8; 64]) -> u64 {
        self.at_least(bytes, 1)
    }

    #[inline(always)]
    fn class_masks(
        self,
        keys: &[u8; TILE],
        classes: &Classes,
        _: &[u8; 256],
        masks: &mut [[u64; WORDS]; MAX],
    ) {
        masks_from(keys, classes, masks, |keys, bound| self.at_least(keys, bound));
    }

    #[inline(always)]
    fn select(self, word: u64, rank: u32) -> u32 {
        select_bmi2(word, rank)
    }

    #[inline(always)]
    fn seven_of_eight(self, bytes: u64) -> u64 {
        seven_bmi2(bytes)
    }

    #[inline(always)]
    fn eight_of_seven(self, bits: u64) -> u64 {
        eight_bmi2(bits)
    }

    #[inline(always)]
    fn find(self, sums: &[u16; WORDS], rank: u16) -> usize {
        super::Scalar.find(sums, rank)
    }
}

impl Avx2 {
    /// Bit `i` is set where byte `i` is at least `bound`.
    #[inline(always)]
    fn at_least(self, bytes: &[u8; 64], bound: u8) -> u64 {
        // SAFETY: token; bounds: both halves of 64 bytes.
        unsafe {
            let bound = _mm256_set1_epi8(bound.cast_signed());
            let half = |at: usize| {
                let half = _mm256_loadu_si256(bytes.as_ptr().add(at).cast());
                let same = _mm256_cmpeq_epi8(_mm256_max_epu8(half, bound), half);
                u64::from(_mm256_movemask_epi8(same).cast_unsigned())
            };
            half(0) | half(32) << 32
        }
    }
}

impl Isa for Avx512 {
    const HAS_RANS: bool = true;

    #[inline(always)]
    fn nonzero(self, bytes: &[u8; 64]) -> u64 {
        // SAFETY: token; bounds: 64 bytes.
        unsafe {
            let bytes = _mm512_loadu_si512(bytes.as_ptr().cast());
            _mm512_test_epi8_mask(bytes, bytes)
        }
    }

    #[inline(always)]
    fn places(self, mask: u64, first: u16, places: &mut [u16; 64]) -> usize {
        // SAFETY: token; bounds: 64 bytes of numbers, two halves of 64 places.
        unsafe {
            let bytes = _mm512_loadu_si512(BYTE_NUMBERS.as_ptr().cast());
            let bytes = _mm512_maskz_compress_epi8(mask, bytes);
            let first = _mm512_set1_epi16(first.cast_signed());
            let low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes));
            _mm512_storeu_si512(places.as_mut_ptr().cast(), _mm512_add_epi16(low, first));
            let count = mask.count_ones() as usize;
            if count > 32 {
                let high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64::<1>(bytes));
                _mm512_storeu_si512(places.as_mut_ptr().add(32).cast(), _mm512_add_epi16(high, first));
            }
            count
        }
    }

    #[inline(always)]
    fn class_masks(
        self,
        keys: &[u8; TILE],
        classes: &Classes,
        table: &[u8; 256],
        masks: &mut [[u64; WORDS]; MAX],
    ) {
        // The four bits of each element's class, then for each class the elements that have all of its bits.
        let mut planes = [[0u64; WORDS]; 4];
        // SAFETY: token; bounds: 8 words of 64 of each plane and mask.
        unsafe {
            let table = self.quarters(table);
            let [plane0, plane1, plane2, plane3] = &mut planes;
            for (word, keys) in keys.as_chunks::<64>().0.iter().enumerate() {
                let class = self.entries(table, keys);
                plane0[word] = _mm512_test_epi8_mask(class, _mm512_set1_epi8(1));
                plane1[word] = _mm512_test_epi8_mask(class, _mm512_set1_epi8(2));
                plane2[word] = _mm512_test_epi8_mask(class, _mm512_set1_epi8(4));
                plane3[word] = _mm512_test_epi8_mask(class, _mm512_set1_epi8(8));
            }
            let count = classes.count().min(MAX);
            for at in (0..WORDS).step_by(8) {
                let plane = |plane: &[u64; WORDS]| _mm512_loadu_si512(plane.as_ptr().add(at).cast());
                let planes = [plane(plane0), plane(plane1), plane(plane2), plane(plane3)];
                for (class, mask) in masks.iter_mut().enumerate().take(count) {
                    // A bit that the class does not have is wanted as 0.
                    let wanted = |bit: usize| {
                        let inverse = (class as i64 >> bit & 1) - 1;
                        _mm512_xor_si512(planes[bit], _mm512_set1_epi64(inverse))
                    };
                    let both = _mm512_ternarylogic_epi64::<0x80>(wanted(0), wanted(1), wanted(2));
                    let all = _mm512_and_si512(both, wanted(3));
                    _mm512_storeu_si512(mask.as_mut_ptr().add(at).cast(), all);
                }
            }
        }
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 256], keys: &[u8; 64]) -> [u8; 64] {
        let mut entries = [0; 64];
        // SAFETY: token; bounds: 64 bytes.
        unsafe {
            _mm512_storeu_si512(entries.as_mut_ptr().cast(), self.entries(self.quarters(table), keys));
        }
        entries
    }

    #[inline(always)]
    fn running_counts(self, masks: &[u64; WORDS], sums: &mut [u16; WORDS]) -> u32 {
        let mut counts = [0u8; WORDS];
        // SAFETY: token; bounds: 8 of 64 words and counts at a time, two halves of 32 counts and sums.
        unsafe {
            for at in (0..WORDS).step_by(8) {
                let words = _mm512_loadu_si512(masks.as_ptr().add(at).cast());
                let eight = _mm512_cvtepi64_epi8(_mm512_popcnt_epi64(words));
                _mm_storel_epi64(counts.as_mut_ptr().add(at).cast(), eight);
            }
            let lanes = _mm512_loadu_si512(LANE_NUMBERS.as_ptr().cast());
            let mut before = _mm512_setzero_si512();
            for at in [0, 32] {
                let counts = _mm256_loadu_si256(counts.as_ptr().add(at).cast());
                let counts = _mm512_cvtepu8_epi16(counts);
                let mut sum = counts;
                for (step, from) in [
                    (1, u32::MAX << 1),
                    (2, u32::MAX << 2),
                    (4, u32::MAX << 4),
                    (8, u32::MAX << 8),
                    (16, u32::MAX << 16),
                ] {
                    let moved = _mm512_sub_epi16(lanes, _mm512_set1_epi16(step));
                    sum = _mm512_add_epi16(sum, _mm512_maskz_permutexvar_epi16(from, moved, sum));
                }
                sum = _mm512_add_epi16(sum, before);
                before = _mm512_permutexvar_epi16(_mm512_set1_epi16(31), sum);
                let sum = _mm512_sub_epi16(sum, counts);
                _mm512_storeu_si512(sums.as_mut_ptr().add(at).cast(), sum);
            }
            u32::from(_mm_cvtsi128_si32(_mm512_castsi512_si128(before)) as u16)
        }
    }

    #[inline(always)]
    fn select(self, word: u64, rank: u32) -> u32 {
        select_bmi2(word, rank)
    }

    #[inline(always)]
    fn seven_of_eight(self, bytes: u64) -> u64 {
        seven_bmi2(bytes)
    }

    #[inline(always)]
    fn eight_of_seven(self, bits: u64) -> u64 {
        eight_bmi2(bits)
    }

    #[inline(always)]
    fn find(self, sums: &[u16; WORDS], rank: u16) -> usize {
        // SAFETY: token; bounds: two halves of 64 words of 2 bytes.
        let at_most = unsafe {
            let rank = _mm512_set1_epi16(rank.cast_signed());
            let low = _mm512_cmple_epu16_mask(_mm512_loadu_si512(sums.as_ptr().cast()), rank);
            let high = _mm512_cmple_epu16_mask(_mm512_loadu_si512(sums.as_ptr().add(32).cast()), rank);
            u64::from(low) | u64::from(high) << 32
        };
        // The first sum is 0.
        at_most.count_ones() as usize - 1
    }

    #[inline(always)]
    fn rans_decode(
        self,
        table: &[u32],
        classes: &[u8],
        tokens: &mut [u8],
        words: &[[u8; 2]],
        states: &mut [u32; LANES],
    ) -> (usize, usize) {
        let slots = table.len() >> CHANCE_BITS;
        let rounds = tokens.len().min(classes.len()) / LANES;
        if slots == 0 || slots > MAX {
            return (0, 0);
        }
        let (mut done, mut read) = (0, 0);
        // SAFETY: token; bounds: `states` has two halves of 16; a round starts only if 32 tokens, 32 classes and
        // 32 words are left, and reads at most 16 words behind at most 16 that the first half took; an index
        // into the table is below slots * 4096 because the class is clamped and the slot has 12 bits. A round
        // takes at most 32 words, so that `read` never passes their end.
        unsafe {
            let mut state = [
                _mm512_loadu_si512(states.as_ptr().cast()),
                _mm512_loadu_si512(states.as_ptr().add(16).cast()),
            ];
            let highest = _mm512_set1_epi32((slots - 1) as i32);
            let one = _mm512_set1_epi32(1);
            for _ in 0..rounds {
                if words.len() - read < LANES {
                    break;
                }
                for (half, x) in state.iter_mut().enumerate() {
                    let at = done + half * 16;
                    let class = _mm512_cvtepu8_epi32(_mm_loadu_si128(classes.as_ptr().add(at).cast()));
                    let class = _mm512_min_epu32(class, highest);
                    let slot = _mm512_and_si512(*x, _mm512_set1_epi32((TOTAL - 1) as i32));
                    let index = _mm512_or_si512(_mm512_slli_epi32::<CHANCE_BITS>(class), slot);
                    let entry = _mm512_i32gather_epi32::<4>(index, table.as_ptr().cast());
                    let chance = _mm512_and_si512(_mm512_srli_epi32::<8>(entry), _mm512_set1_epi32(0xfff));
                    let chance = _mm512_add_epi32(chance, one);
                    let next = _mm512_mullo_epi32(chance, _mm512_srli_epi32::<CHANCE_BITS>(*x));
                    let next = _mm512_add_epi32(next, _mm512_srli_epi32::<20>(entry));
                    let short = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(LOWEST as i32));
                    let more = _mm512_cvtepu16_epi32(_mm256_loadu_si256(words.as_ptr().add(read).cast()));
                    let more = _mm512_maskz_expand_epi32(short, more);
                    *x = _mm512_mask_or_epi32(next, short, _mm512_slli_epi32::<16>(next), more);
                    read += short.count_ones() as usize;
                    _mm_storeu_si128(tokens.as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(entry));
                }
                done += LANES;
            }
            _mm512_storeu_si512(states.as_mut_ptr().cast(), state[0]);
            _mm512_storeu_si512(states.as_mut_ptr().add(16).cast(), state[1]);
        }
        (done, read)
    }

    #[inline(always)]
    fn rans_encode(
        self,
        table: &EncodeTable,
        classes: &[u8],
        tokens: &[u8],
        buffer: &mut [u16],
        mut start: usize,
        states: &mut [u32; LANES],
    ) -> usize {
        let slots = table.packed.len().min(table.reciprocal.len()) / 256;
        let rounds = tokens.len().min(classes.len()) / LANES;
        assert!(
            slots > 0 && start <= buffer.len() && rounds * LANES <= start,
            "a token takes at most one word"
        );
        // SAFETY: token; bounds: `states` has two halves of 16; rounds are whole; an index into the tables is
        // below slots * 256 because the class is clamped and a token has 8 bits; each token writes at most one
        // word, and the assertion above says that there are enough words below `start`.
        unsafe {
            let mut state = [
                _mm512_loadu_si512(states.as_ptr().cast()),
                _mm512_loadu_si512(states.as_ptr().add(16).cast()),
            ];
            let highest = _mm512_set1_epi32((slots - 1) as i32);
            for round in (0..rounds).rev() {
                for half in [1, 0] {
                    let x = &mut state[half];
                    let at = round * LANES + half * 16;
                    let class = _mm512_cvtepu8_epi32(_mm_loadu_si128(classes.as_ptr().add(at).cast()));
                    let class = _mm512_min_epu32(class, highest);
                    let token = _mm512_cvtepu8_epi32(_mm_loadu_si128(tokens.as_ptr().add(at).cast()));
                    let index = _mm512_or_si512(_mm512_slli_epi32::<8>(class), token);
                    let packed = _mm512_i32gather_epi32::<4>(index, table.packed.as_ptr().cast());
                    let reciprocal = _mm512_i32gather_epi32::<4>(index, table.reciprocal.as_ptr().cast());
                    let chance = _mm512_and_si512(packed, _mm512_set1_epi32(0x1fff));
                    let before = _mm512_and_si512(_mm512_srli_epi32::<13>(packed), _mm512_set1_epi32(0xfff));
                    let shift = _mm512_add_epi32(_mm512_srli_epi32::<25>(packed), _mm512_set1_epi32(31));
                    let full = _mm512_cmpge_epu32_mask(*x, _mm512_slli_epi32::<19>(chance));
                    let count = full.count_ones() as usize;
                    let words = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, *x));
                    start -= count;
                    _mm256_mask_storeu_epi16(
                        buffer.as_mut_ptr().add(start).cast(),
                        ((1u32 << count) - 1) as __mmask16,
                        words,
                    );
                    let y = _mm512_mask_srli_epi32::<16>(*x, full, *x);
                    // The products of the even and of the odd states, 64 bits each.
                    let even = _mm512_srlv_epi64(
                        _mm512_mul_epu32(y, reciprocal),
                        _mm512_and_si512(shift, _mm512_set1_epi64(0xffff_ffff)),
                    );
                    let odd = _mm512_srlv_epi64(
                        _mm512_mul_epu32(_mm512_srli_epi64::<32>(y), _mm512_srli_epi64::<32>(reciprocal)),
                        _mm512_srli_epi64::<32>(shift),
                    );
                    let quotient = _mm512_or_si512(even, _mm512_slli_epi64::<32>(odd));
                    let rest = _mm512_sub_epi32(_mm512_set1_epi32(TOTAL as i32), chance);
                    let grown = _mm512_mullo_epi32(quotient, rest);
                    *x = _mm512_add_epi32(_mm512_add_epi32(y, before), grown);
                }
            }
            _mm512_storeu_si512(states.as_mut_ptr().cast(), state[0]);
            _mm512_storeu_si512(states.as_mut_ptr().add(16).cast(), state[1]);
        }
        start
    }
}

impl Avx512 {
    #[inline(always)]
    fn quarters(self, table: &[u8; 256]) -> [__m512i; 4] {
        // SAFETY: token; bounds: quarters of the table.
        [0, 64, 128, 192].map(|at| unsafe { _mm512_loadu_si512(table.as_ptr().add(at).cast()) })
    }

    /// The entry of each key in a table of four quarters.
    #[inline(always)]
    fn entries(self, table: [__m512i; 4], keys: &[u8; 64]) -> __m512i {
        // SAFETY: token; bounds: 64 keys.
        unsafe {
            let keys = _mm512_loadu_si512(keys.as_ptr().cast());
            let low = _mm512_permutex2var_epi8(table[0], keys, table[1]);
            let high = _mm512_permutex2var_epi8(table[2], keys, table[3]);
            _mm512_mask_blend_epi8(_mm512_movepi8_mask(keys), low, high)
        }
    }
}
