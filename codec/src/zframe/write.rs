//! Writes zstd frames for what deltas are made of: runs of one byte, mostly zero, between bytes that only their
//! frequency can pack.
//!
//! A general compressor looks for repeats and finds false ones: four bytes that occurred before cost more as a far
//! match than as literals, and finding them costs most of its time. Here a run is a match at distance one, the rest
//! are literals, and both go through zstd's entropy coders (RFC 8878). Any zstd decoder reads it.

use towline_core::{Error, Result};

use super::pack::Tables;
use super::parts::{Content, Parts, Plain, Xor};
use crate::spare::Spare;

/// The longest block that the format allows.
pub(crate) const BLOCK: usize = 128 << 10;
/// The shortest block that pays for tables of its own.
const MIN_CUT: usize = 2 << 10;

/// The buffers of writers that are done: most frames are so small that making buffers would show.
static SPARE: Spare<Buffers> = Spare::new();

/// Appends one frame to `out`. Holds at most 0.9 MiB besides.
pub(crate) struct Writer<'a> {
    out: &'a mut Vec<u8>,
    content: usize,
    written: usize,
    tables: Tables,
    buffers: Box<Buffers>,
}

/// What a writer needs besides its output.
struct Buffers {
    pending: Vec<u8>,
    parts: Parts,
    scratch: Vec<u8>,
}

impl Default for Buffers {
    fn default() -> Self {
        // Streams of literals have room for the longest codes.
        Self { pending: Vec::new(), parts: Parts::new(BLOCK), scratch: vec![0; 2 * BLOCK] }
    }
}

impl<'a> Writer<'a> {
    /// Begins a frame that will hold `content` bytes.
    pub(crate) fn new(out: &'a mut Vec<u8>, content: usize) -> Self {
        out.extend_from_slice(&super::MAGIC);
        let length = (content as u64).to_le_bytes();
        // A single segment, whose window is the content; or a window of 128 KiB, the smallest that allows the
        // longest blocks: it is all that a decoder must hold. The content size takes 1, 2, 4 or 8 bytes.
        match content {
            0..=0xff => out.extend_from_slice(&[0x20, length[0]]),
            0x100..=0x1_00ff => {
                let [low, high, ..] = ((content - 0x100) as u64).to_le_bytes();
                out.extend_from_slice(&[0x60, low, high]);
            }
            0x1_0100..=BLOCK => {
                out.push(0xa0);
                out.extend_from_slice(&length[..4]);
            }
            _ => {
                out.extend_from_slice(&[0xc0, (17 - 10) << 3]);
                out.extend_from_slice(&length);
            }
        }
        let buffers = SPARE.take();
        Self { out, content, written: 0, tables: Tables::default(), buffers }
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.buffers.pending.len() == BLOCK {
                self.pending_block(false);
            }
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.buffers.pending.len()));
            self.buffers.pending.extend_from_slice(now);
            bytes = later;
        }
    }

    /// What was written before has other statistics than what follows: it gets a block of its own if it is long
    /// enough to be worth one.
    pub(crate) fn cut(&mut self) {
        if self.buffers.pending.len() >= MIN_CUT {
            self.pending_block(false);
        }
    }

    /// Ends the frame behind what was written.
    ///
    /// # Errors
    /// `Internal` if it does not hold the bytes that its header says.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.pending_block(true);
        self.check()
    }

    /// Ends the frame with `left ^ right`, which are of one length. Nothing was written before. Calls `read` with the end
    /// of each block that it is done with.
    ///
    /// # Errors
    /// `Internal` if that does not have the length that the frame's header says.
    pub(crate) fn finish_with_xor(
        mut self,
        left: &[u8],
        right: &[u8],
        read: &mut dyn FnMut(usize, Option<u128>),
    ) -> Result<()> {
        let blocks = left.len().min(right.len()).div_ceil(BLOCK);
        for (index, (left, right)) in left.chunks(BLOCK).zip(right.chunks(BLOCK)).enumerate() {
            self.block(&Xor(left, right), index + 1 == blocks);
            // Not sooner: the processor fetches what comes next as long as nothing comes between.
            read(index * BLOCK + left.len(), None);
        }
        if blocks == 0 {
            self.block(&Plain(&[]), true);
        }
        self.check()
    }

    fn check(mut self) -> Result<()> {
        self.buffers.pending.clear();
        SPARE.put(self.buffers);
        if self.written == self.content {
            return Ok(());
        }
        let (wanted, found) = (self.content, self.written);
        Err(Error::internal(format!("a zstd frame of {wanted} bytes was given {found}")))
    }

    fn pending_block(&mut self, last: bool) {
        let mut pending = std::mem::take(&mut self.buffers.pending);
        self.block(&Plain(&pending), last);
        pending.clear();
        self.buffers.pending = pending;
    }

    fn block(&mut self, content: &impl Content, last: bool) {
        const STORED: u32 = 0;
        const RUN: u32 = 1;
        const PACKED: u32 = 2;
        let Buffers { parts, scratch, .. } = &mut *self.buffers;
        parts.take(content);
        let mut tables = Tables::default();
        let (kind, size, length) = if parts.count == 1 && self.written > 0 {
            // Some old decoders refuse a run as the first block, so that is packed.
            scratch[0] = parts.literals[0];
            (RUN, content.len(), 1)
        } else if let Some(packed) = parts.pack(&self.tables, &mut tables, scratch)
            && packed < content.len()
        {
            self.tables.keep(tables);
            (PACKED, packed, packed)
        } else {
            content.copy(scratch);
            (STORED, content.len(), content.len())
        };
        // Blocks have at most 2^17 bytes.
        let head = u32::from(last) | kind << 1 | u32::try_from(size).unwrap_or(u32::MAX) << 3;
        self.out.extend_from_slice(&head.to_le_bytes()[..3]);
        self.out.extend_from_slice(&scratch[..length]);
        self.written += content.len();
    }
}
