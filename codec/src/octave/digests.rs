//! The digests of a unit's blocks, taken while their bytes are in the nearest cache.

use std::ops::Range;

use towline_core::DIGEST_BLOCK;

use super::simd::Isa;
use crate::xxh3::{BLOCK, Lanes, STRIPE};

/// Goes from block to block of a unit.
pub(super) struct Digests {
    /// The bytes of the unit.
    length: usize,
    /// Of the block that is open.
    pub(super) lanes: Lanes,
    /// Where that begins.
    start: usize,
    /// The end of what is in the lanes.
    taken: usize,
}

impl Digests {
    /// Of a unit of `length` bytes.
    pub(super) fn new(length: usize) -> Self {
        Self { length, lanes: Lanes::default(), start: 0, taken: 0 }
    }

    /// Where the open block ends.
    fn end(&self) -> usize {
        self.length.min(self.start + DIGEST_BLOCK)
    }

    /// Whether a tile goes into the lanes as a whole: a stripe has to be left behind it. Then it counts as taken.
    #[inline(always)]
    pub(super) fn takes(&mut self, tile: Range<usize>) -> bool {
        let takes = self.taken == tile.start && tile.end + STRIPE <= self.end();
        if takes {
            self.taken = tile.end;
        }
        takes
    }

    /// The next whole blocks of the lanes in `before`, the start of the unit, and the lanes, which the caller takes them
    /// into.
    #[inline(always)]
    fn next<'b>(&mut self, before: &'b [u8]) -> (&'b [[u8; BLOCK]], &mut Lanes) {
        // A stripe has to be left behind them.
        let most = self.end().saturating_sub(STRIPE).min(before.len());
        let (blocks, _) = before.get(self.taken..most).unwrap_or_default().as_chunks();
        self.taken += size_of_val(blocks);
        (blocks, &mut self.lanes)
    }

    /// The open block and its digest, if it ends at `done`, in which case the next one is opened. A tile never ends
    /// behind it.
    #[inline(always)]
    pub(super) fn ended_by<I: Isa>(
        &mut self,
        isa: I,
        unit: &[u8],
        done: usize,
    ) -> Option<(Range<usize>, Option<u128>)> {
        let (start, end) = (self.start, self.end());
        if done < end {
            return None;
        }
        let (blocks, lanes) = self.next(&unit[..end]);
        isa.digest(lanes, 0, blocks.as_flattened().as_chunks().0);
        let digest = self.lanes.finish(end - start, &unit[self.taken..end]);
        *self = Self { length: self.length, lanes: Lanes::default(), start: end, taken: end };
        Some((start..end, digest))
    }
}

/// Hands on what a decoder has written.
pub(super) struct Written<'a> {
    digests: Digests,
    /// The end of what was handed on.
    told: usize,
    tell: &'a mut dyn FnMut(&[u8], Option<u128>),
}

impl<'a> Written<'a> {
    /// Of a unit of `length` bytes, as [`towline_core::Codec::decode_writing`] says.
    pub(super) fn new(length: usize, tell: &'a mut dyn FnMut(&[u8], Option<u128>)) -> Self {
        Self { digests: Digests::new(length), told: 0, tell }
    }

    /// The next whole blocks of the lanes in `before`, the part of the unit that is as it stays, and the lanes, which the
    /// caller takes them into.
    #[inline(always)]
    pub(super) fn next<'b, I: Isa>(&mut self, _: I, before: &'b [u8]) -> (&'b [[u8; BLOCK]], &mut Lanes) {
        self.digests.next(if I::DIGESTS { before } else { &[] })
    }

    /// Up to `done`, where a tile ends, the unit is as it stays.
    #[inline(always)]
    pub(super) fn up_to<I: Isa>(&mut self, isa: I, unit: &[u8], done: usize) {
        if !I::DIGESTS {
            (self.tell)(&unit[std::mem::replace(&mut self.told, done)..done], None);
        } else if let Some((block, digest)) = self.digests.ended_by(isa, unit, done) {
            (self.tell)(&unit[block], digest);
        }
    }
}
