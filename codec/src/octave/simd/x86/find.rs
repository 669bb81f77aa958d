//! Loops over elements that wait for memory, which digest meanwhile: which elements differ, and their keys.

use std::arch::x86_64::*;

use super::super::{TILE, prefetch_second};
use super::tables::BYTE_NUMBERS;
use super::{Avx512, fetch_ahead, keys_of_halves};
use crate::xxh3::{BLOCK, Lanes, SCRAMBLE, SCRAMBLE_BY, SECRET, STRIPE};

const STRIPES: usize = BLOCK / STRIPE;

/// As [`super::Isa::digest`].
#[inline(always)]
pub(super) fn digest(_: Avx512, lanes: &mut Lanes, first: usize, stripes: &[[u8; STRIPE]]) {
    // SAFETY: token; bounds: 8 lanes and 64 bytes of a stripe.
    unsafe {
        let mut sums = _mm512_loadu_si512(lanes.0.as_ptr().cast());
        for (at, stripe) in (first..).zip(stripes) {
            sums = with_stripe(sums, at % STRIPES, _mm512_loadu_si512(stripe.as_ptr().cast()));
            if at % STRIPES == STRIPES - 1 {
                sums = scrambled(sums);
            }
        }
        _mm512_storeu_si512(lanes.0.as_mut_ptr().cast(), sums);
    }
}

/// The lanes with the stripe `at` of a block.
#[inline(always)]
fn with_stripe(sums: __m512i, at: usize, words: __m512i) -> __m512i {
    // SAFETY: token, which all callers hold; bounds: 64 bytes of the secret from at most its 120th.
    unsafe {
        let secret = _mm512_loadu_si512(SECRET.as_ptr().add(at % STRIPES * 8).cast());
        let mixed = _mm512_xor_si512(words, secret);
        let product = _mm512_mul_epu32(mixed, _mm512_srli_epi64::<32>(mixed));
        // Each word goes to the lane beside the one of its product.
        let sums = _mm512_add_epi64(sums, _mm512_shuffle_epi32::<0x4e>(words));
        _mm512_add_epi64(sums, product)
    }
}

/// The lanes at the end of a block.
#[inline(always)]
fn scrambled(sums: __m512i) -> __m512i {
    // SAFETY: token, which all callers hold; bounds: the last 64 bytes of the secret.
    unsafe {
        let secret = _mm512_loadu_si512(SECRET.as_ptr().add(SCRAMBLE).cast());
        let mixed = _mm512_xor_si512(_mm512_xor_si512(sums, _mm512_srli_epi64::<47>(sums)), secret);
        _mm512_mullo_epi64(mixed, _mm512_set1_epi64(SCRAMBLE_BY.cast_signed()))
    }
}

/// As [`super::Isa::keys`], of elements of 16 bits that are whole blocks of a digest.
#[inline(always)]
pub(super) fn keys(
    isa: Avx512,
    tile: &[[u8; BLOCK]],
    keys: &mut [[u8; BLOCK / 2]],
    ahead: &[u8],
    (blocks, lanes): (&[[u8; BLOCK]], &mut Lanes),
) {
    // SAFETY: token; bounds: a block has 16 times 64 bytes and half as many keys; 8 lanes.
    unsafe {
        let mut sums = _mm512_loadu_si512(lanes.0.as_ptr().cast());
        let (mut ahead, mut digested) = (ahead.chunks(64), blocks.iter());
        for (raws, keys) in tile.iter().zip(keys) {
            let block = digested.next();
            for at in 0..STRIPES / 2 {
                if let Some(ahead) = ahead.next() {
                    prefetch_second(ahead);
                }
                let raws = raws.as_ptr().add(at * 128);
                let (low, high) = (_mm512_loadu_si512(raws.cast()), _mm512_loadu_si512(raws.add(64).cast()));
                _mm512_storeu_si512(keys.as_mut_ptr().add(at * 64).cast(), keys_of_halves(low, high));
                if let Some(block) = block {
                    let words = block.as_ptr().add(at * 128);
                    sums = with_stripe(sums, at * 2, _mm512_loadu_si512(words.cast()));
                    sums = with_stripe(sums, at * 2 + 1, _mm512_loadu_si512(words.add(64).cast()));
                }
            }
            if block.is_some() {
                sums = scrambled(sums);
            }
        }
        _mm512_storeu_si512(lanes.0.as_mut_ptr().cast(), sums);
        digest(isa, lanes, 0, digested.as_slice().as_flattened().as_chunks().0);
    }
}

/// As [`super::Isa::compare`], of elements of 16 bits that are whole blocks of a digest; it is taken if `DIGEST`.
#[inline(always)]
pub(super) fn compare<const DIGEST: bool>(
    _: Avx512,
    (old, new): (&[[u8; BLOCK]], &[[u8; BLOCK]]),
    keys: &mut [[u8; BLOCK / 2]],
    places: &mut [u16],
    lanes: &mut Lanes,
) -> Option<usize> {
    let blocks = old.len().min(new.len()).min(keys.len()).min(TILE / (BLOCK / 2));
    if places.len() < blocks * (BLOCK / 2) + 64 {
        return None;
    }
    // SAFETY: token; bounds: a block has 16 times 64 bytes and half as many keys; before any 64 elements at most as many
    // places were found as elements were passed, so that the check above leaves room for 64 more; 8 lanes.
    unsafe {
        let mut sums = _mm512_loadu_si512(lanes.0.as_ptr().cast());
        let numbers = _mm512_loadu_si512(BYTE_NUMBERS.as_ptr().cast());
        let mut first = _mm512_setzero_si512();
        let start = places.as_mut_ptr();
        let mut place = start;
        for ((old, new), keys) in old.iter().zip(new).zip(keys).take(blocks) {
            for at in 0..STRIPES / 2 {
                let (old, new) = (old.as_ptr().add(at * 128), new.as_ptr().add(at * 128));
                for line in [old, old.wrapping_add(64), new, new.wrapping_add(64)] {
                    fetch_ahead(line);
                }
                let (old, old_high) =
                    (_mm512_loadu_si512(old.cast()), _mm512_loadu_si512(old.add(64).cast()));
                let (new, new_high) =
                    (_mm512_loadu_si512(new.cast()), _mm512_loadu_si512(new.add(64).cast()));
                _mm512_storeu_si512(keys.as_mut_ptr().add(at * 64).cast(), keys_of_halves(old, old_high));
                let mask = u64::from(_mm512_cmpneq_epi16_mask(old, new))
                    | u64::from(_mm512_cmpneq_epi16_mask(old_high, new_high)) << 32;
                if DIGEST {
                    sums = with_stripe(sums, at * 2, new);
                    sums = with_stripe(sums, at * 2 + 1, new_high);
                }
                let bytes = _mm512_maskz_compress_epi8(mask, numbers);
                let low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes));
                _mm512_storeu_si512(place.cast(), _mm512_add_epi16(low, first));
                let count = mask.count_ones() as usize;
                if count > 32 {
                    let high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64::<1>(bytes));
                    _mm512_storeu_si512(place.add(32).cast(), _mm512_add_epi16(high, first));
                }
                place = place.add(count);
                first = _mm512_add_epi16(first, _mm512_set1_epi16(64));
            }
            if DIGEST {
                sums = scrambled(sums);
            }
        }
        _mm512_storeu_si512(lanes.0.as_mut_ptr().cast(), sums);
        Some(place.offset_from_unsigned(start))
    }
}
