//! What processors of this architecture do faster.

mod find;
mod masks;
mod tables;

use std::arch::x86_64::*;

use super::super::classes::Classes;
use super::super::elem::Elem;
use super::super::rans::{CHANCE_BITS, EncodeTable, LOWEST, TOTAL};
use super::{ClassCounts, Counts, Isa, LANES, MAX, MOST_LISTED, TILE, WORDS, compare_each, keys_each, slot};
use crate::tally::Tally;
use crate::xxh3::{BLOCK, Lanes, STRIPE};
use masks::{LookUp, Narrow, Wide};
use tables::{BYTE_NUMBERS, EVEN_BYTES};

/// The processor has AVX2, BMI1, BMI2, LZCNT and POPCNT.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(pub(super) ());

/// The processor has what [`Avx2`] says, AVX-512 F, BW, DQ, VL, VBMI, VBMI2 and VPOPCNTDQ, and GFNI.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512(pub(super) ());

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
            masks[class % MAX][slot(word)] = above & !from_here;
            above = from_here;
        }
        masks[classes.bounds().len() % MAX][slot(word)] = above;
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

/// As [`super::prefetch`], into the cache that `HINT` says.
#[inline(always)]
pub(super) fn prefetch<const HINT: i32>(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        // SAFETY: baseline; nothing is read.
        unsafe { _mm_prefetch::<HINT>(line.as_ptr().cast()) };
    }
}

/// How many bytes before their comparison old and new ones are fetched. The processor's own guess reaches too short while
/// so much is done with each: on Zen 5 this makes encoding at 1 % a third faster; on Zen 4 such fetches gained nothing.
const AHEAD: usize = 4 << 10;

/// Has the line [`AHEAD`] bytes behind a place come into the nearest cache, if there is one.
#[inline(always)]
fn fetch_ahead(place: *const u8) {
    // SAFETY: baseline; nothing is read.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(AHEAD).cast()) };
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
    fn class_counts(self, keys: &[u8; TILE], classes: &Classes, _: &[u8; 256], counts: &mut ClassCounts) {
        // Of a known number, as most blocks have them: without a loop.
        let most = classes.bounds().as_array::<{ MAX - 1 }>();
        let mut all = counts.all;
        for (keys, before) in keys.as_chunks::<64>().0.iter().zip(&mut counts.words) {
            *before = all;
            // Those that are in each class or above it.
            let mut above = [0; MAX + 1];
            above[0] = 64;
            if let Some(bounds) = most {
                for (above, &bound) in above[1..].iter_mut().zip(bounds) {
                    *above = self.at_least(keys, bound).count_ones();
                }
            } else {
                for (above, &bound) in above[1..].iter_mut().zip(classes.bounds()) {
                    *above = self.at_least(keys, bound).count_ones();
                }
            }
            for (class, all) in all.iter_mut().enumerate() {
                *all += above[class] - above[class + 1];
            }
        }
        counts.all = all;
    }

    #[inline(always)]
    fn count_within(self, keys: &[u8; 64], end: u16, (first, more): (u8, u8)) -> u32 {
        // SAFETY: token; bounds: both halves of 64 keys.
        let mask = unsafe {
            let (first, more) = (_mm256_set1_epi8(first.cast_signed()), _mm256_set1_epi8(more.cast_signed()));
            let half = |at: usize| {
                let from_first = _mm256_sub_epi8(_mm256_loadu_si256(keys.as_ptr().add(at).cast()), first);
                let within = _mm256_cmpeq_epi8(_mm256_min_epu8(from_first, more), from_first);
                u64::from(_mm256_movemask_epi8(within).cast_unsigned())
            };
            half(0) | half(32) << 32
        };
        (mask & ((1 << (end % 64)) - 1)).count_ones()
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

/// The keys of 64 elements of 16 bits.
#[inline(always)]
fn keys_of_halves(low: __m512i, high: __m512i) -> __m512i {
    // SAFETY: token; all callers hold one.
    unsafe {
        let even = _mm512_loadu_si512(EVEN_BYTES.as_ptr().cast());
        _mm512_permutex2var_epi8(_mm512_srli_epi16::<7>(low), even, _mm512_srli_epi16::<7>(high))
    }
}

impl Isa for Avx512 {
    const HAS_RANS: bool = true;
    const DIGESTS: bool = true;

    #[inline(always)]
    fn nonzero(self, bytes: &[u8; 64]) -> u64 {
        // SAFETY: token; bounds: 64 bytes.
        unsafe {
            let bytes = _mm512_loadu_si512(bytes.as_ptr().cast());
            _mm512_test_epi8_mask(bytes, bytes)
        }
    }

    #[inline(always)]
    fn differing<E: Elem>(self, old: &[E::Raw; 64], new: &[E::Raw; 64], keys: &mut [u8; 64]) -> u64 {
        let mut differs = 0;
        // SAFETY: token; bounds: a quarter, half or all of the elements that fill 64 bytes, and as many keys.
        unsafe {
            if E::BITS == 16 {
                let (old, new) = (old.as_ptr().cast::<__m512i>(), new.as_ptr().cast::<__m512i>());
                let (old, old_high) = (_mm512_loadu_si512(old), _mm512_loadu_si512(old.add(1)));
                let (new, new_high) = (_mm512_loadu_si512(new), _mm512_loadu_si512(new.add(1)));
                _mm512_storeu_si512(keys.as_mut_ptr().cast(), keys_of_halves(old, old_high));
                return u64::from(_mm512_cmpneq_epi16_mask(old, new))
                    | u64::from(_mm512_cmpneq_epi16_mask(old_high, new_high)) << 32;
            }
            for at in (0..64).step_by(512 / E::BITS as usize) {
                let old = _mm512_loadu_si512(old.as_ptr().add(at).cast());
                let new = _mm512_loadu_si512(new.as_ptr().add(at).cast());
                let place = keys.as_mut_ptr().add(at);
                differs |= match E::BITS {
                    8 => {
                        _mm512_storeu_si512(place.cast(), _mm512_add_epi8(old, old));
                        _mm512_cmpneq_epi8_mask(old, new)
                    }
                    32 => {
                        let key = _mm512_cvtepi32_epi8(_mm512_srli_epi32::<23>(old));
                        _mm_storeu_si128(place.cast(), key);
                        u64::from(_mm512_cmpneq_epi32_mask(old, new))
                    }
                    _ => {
                        let key = _mm512_cvtepi64_epi8(_mm512_srli_epi64::<55>(old));
                        _mm_storel_epi64(place.cast(), key);
                        u64::from(_mm512_cmpneq_epi64_mask(old, new))
                    }
                } << at;
            }
        }
        differs
    }

    #[inline(always)]
    fn keys<E: Elem>(
        self,
        tile: &[E::Raw],
        keys: &mut [u8; TILE],
        ahead: &[E::Raw],
        (blocks, lanes): (&[[u8; BLOCK]], &mut Lanes),
    ) {
        match E::bytes(tile).as_chunks() {
            (tile, []) if E::BITS == 16 => {
                find::keys(self, tile, keys.as_chunks_mut().0, E::bytes(ahead), (blocks, lanes));
            }
            _ => keys_each::<E, _>(self, tile, keys, ahead, (blocks, lanes)),
        }
    }

    #[inline(always)]
    fn digest(self, lanes: &mut Lanes, first: usize, stripes: &[[u8; STRIPE]]) {
        find::digest(self, lanes, first, stripes);
    }

    #[inline(always)]
    fn compare<E: Elem>(
        self,
        tile: (&[E::Raw], &[E::Raw]),
        keys: &mut [u8],
        places: &mut [u16],
        lanes: Option<&mut Lanes>,
    ) -> Option<usize> {
        let ((old, old_rest), (new, _)) = (E::bytes(tile.0).as_chunks(), E::bytes(tile.1).as_chunks());
        if E::BITS != 16 || !old_rest.is_empty() {
            return compare_each::<E, _>(self, tile, keys, places, lanes);
        }
        let (keys, _) = keys.as_chunks_mut();
        match lanes {
            Some(lanes) => find::compare::<true>(self, (old, new), keys, places, lanes),
            None => find::compare::<false>(self, (old, new), keys, places, &mut Lanes::default()),
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
        match Narrow::of(classes, table) {
            Some(narrow) => self.masks_of(keys, classes.count(), masks, &narrow),
            None => self.masks_of(keys, classes.count(), masks, &Wide::of(table)),
        }
    }

    #[inline(always)]
    fn tally<'a>(self, parts: impl Iterator<Item = &'a [u8]> + Clone, tally: &mut Tally) {
        self.tally_of(parts, tally);
    }

    #[inline(always)]
    fn class_counts(self, keys: &[u8; TILE], classes: &Classes, table: &[u8; 256], counts: &mut ClassCounts) {
        match Narrow::of(classes, table) {
            Some(narrow) => self.counts_of(keys, counts, narrow),
            None => self.counts_of(keys, counts, Wide::of(table)),
        }
    }

    #[inline(always)]
    fn count_within(self, keys: &[u8; 64], end: u16, (first, more): (u8, u8)) -> u32 {
        // SAFETY: token; bounds: 64 keys.
        let mask = unsafe {
            let keys = _mm512_loadu_si512(keys.as_ptr().cast());
            let from_first = _mm512_sub_epi8(keys, _mm512_set1_epi8(first.cast_signed()));
            _mm512_cmple_epu8_mask(from_first, _mm512_set1_epi8(more.cast_signed()))
        };
        (mask & ((1 << (end % 64)) - 1)).count_ones()
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 256], keys: &[u8; 64]) -> [u8; 64] {
        let mut entries = [0; 64];
        // SAFETY: token; bounds: 64 bytes.
        unsafe { _mm512_storeu_si512(entries.as_mut_ptr().cast(), Wide::of(table).entries(self, keys)) };
        entries
    }

    #[inline(always)]
    fn running_counts(self, masks: &[u64; WORDS], counts: &mut Counts) -> u32 {
        // SAFETY: token; bounds: 8 of 64 words, halves of 64 counts, 8 columns.
        unsafe {
            let mut sum = _mm512_setzero_si512();
            let mut rows = [sum; 8];
            for (row, before) in rows.iter_mut().enumerate() {
                *before = sum;
                let masks = _mm512_loadu_si512(masks.as_ptr().add(8 * row).cast());
                sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(masks));
            }
            let [a, b, c, d, e, f, g, h] = rows;
            let (low, high) = (self.quarters([a, b, c, d]), self.quarters([e, f, g, h]));
            let columns = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
            let first = _mm512_permutex2var_epi64(low, columns, high);
            let columns = _mm512_add_epi64(columns, _mm512_set1_epi64(4));
            let last = _mm512_permutex2var_epi64(low, columns, high);
            _mm512_storeu_si512(counts.words.as_mut_ptr().cast(), first);
            _mm512_storeu_si512(counts.words.as_mut_ptr().add(4).cast(), last);
            let (columns, all) = self.columns(sum);
            _mm_storeu_si128(counts.columns.as_mut_ptr().cast(), columns);
            all
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
    fn last_at_most(self, counts: &[u16; 8], rank: u16) -> usize {
        // SAFETY: token; bounds: 8 counts.
        let at_most = unsafe {
            let counts = _mm_loadu_si128(counts.as_ptr().cast());
            _mm_cmple_epu16_mask(counts, _mm_set1_epi16(rank.cast_signed()))
        };
        (at_most.count_ones() as usize).wrapping_sub(1) % 8
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
        let slots = table.entries.len() / 256;
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
            let evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odds = _mm512_or_si512(evens, _mm512_set1_epi32(1));
            for round in (0..rounds).rev() {
                for half in [1, 0] {
                    let x = &mut state[half];
                    let at = round * LANES + half * 16;
                    let class = _mm512_cvtepu8_epi32(_mm_loadu_si128(classes.as_ptr().add(at).cast()));
                    let class = _mm512_min_epu32(class, highest);
                    let token = _mm512_cvtepu8_epi32(_mm_loadu_si128(tokens.as_ptr().add(at).cast()));
                    let index = _mm512_or_si512(_mm512_slli_epi32::<8>(class), token);
                    // Two gathers of 64 bits take half the loads of two of 32.
                    let (low, high) = (_mm512_castsi512_si256(index), _mm512_extracti64x4_epi64::<1>(index));
                    let low = _mm512_i32gather_epi64::<8>(low, table.entries.as_ptr().cast());
                    let high = _mm512_i32gather_epi64::<8>(high, table.entries.as_ptr().cast());
                    let packed = _mm512_permutex2var_epi32(low, evens, high);
                    let reciprocal = _mm512_permutex2var_epi32(low, odds, high);
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

/// As [`super::list_changes`].
#[target_feature(enable = "popcnt,avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
pub(super) fn list_changes(
    left: &[[u8; 64]],
    right: &[[u8; 64]],
    before: u8,
    first: usize,
    list: &mut [u32],
) -> (usize, usize) {
    // SAFETY: the features are this function's; bounds: 64 bytes of each; twice 16 places, for which there is room.
    unsafe {
        let numbers = _mm512_loadu_si512(BYTE_NUMBERS.as_ptr().cast());
        // The last byte of the 64 before, then all but the last.
        let shifted = _mm512_add_epi8(numbers, _mm512_set1_epi8(63));
        let mut last = _mm512_set1_epi8(before.cast_signed());
        let (mut at, mut found) = (_mm512_set1_epi32((first << 8) as i32), 0);
        for (done, (left, right)) in left.iter().zip(right).enumerate() {
            fetch_ahead(left.as_ptr());
            fetch_ahead(right.as_ptr());
            let left = _mm512_loadu_si512(left.as_ptr().cast());
            let bytes = _mm512_xor_si512(left, _mm512_loadu_si512(right.as_ptr().cast()));
            let differ = _mm512_cmpneq_epi8_mask(bytes, _mm512_permutex2var_epi8(last, shifted, bytes));
            let count = differ.count_ones();
            let Some(room) = list.get_mut(found..found + MOST_LISTED as usize) else { return (done, found) };
            if count >= MOST_LISTED {
                return (done, found);
            }
            last = bytes;
            let places = _mm512_castsi512_si256(_mm512_maskz_compress_epi8(differ, numbers));
            let values = _mm512_castsi512_si256(_mm512_maskz_compress_epi8(differ, bytes));
            let joined = |places: __m128i, values: __m128i| {
                let places = _mm512_slli_epi32::<8>(_mm512_cvtepu8_epi32(places));
                _mm512_add_epi32(at, _mm512_or_si512(places, _mm512_cvtepu8_epi32(values)))
            };
            let few = joined(_mm256_castsi256_si128(places), _mm256_castsi256_si128(values));
            _mm512_storeu_si512(room.as_mut_ptr().cast(), few);
            if count > 16 {
                let more =
                    joined(_mm256_extracti128_si256::<1>(places), _mm256_extracti128_si256::<1>(values));
                _mm512_storeu_si512(room.as_mut_ptr().add(16).cast(), more);
            }
            found += count as usize;
            at = _mm512_add_epi32(at, _mm512_set1_epi32(64 << 8));
        }
        (left.len().min(right.len()), found)
    }
}

impl Avx512 {
    /// Numbers below 2^16 in the quarters of each lane.
    #[inline(always)]
    fn quarters(self, [a, b, c, d]: [__m512i; 4]) -> __m512i {
        // SAFETY: token.
        unsafe {
            let low = _mm512_or_si512(a, _mm512_slli_epi64::<16>(b));
            let high = _mm512_or_si512(_mm512_slli_epi64::<32>(c), _mm512_slli_epi64::<48>(d));
            _mm512_or_si512(low, high)
        }
    }
}
