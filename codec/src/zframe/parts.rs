//! Takes a block apart into literals and runs.

use super::codes::{Length, MIN_MATCH, lengths, literal_code, match_code};

/// Shorter runs are literals: their sequence would take more bits than they do.
const MIN_RUN: usize = 6;
/// Literals are written 8 at a time.
const SLACK: usize = 8;
/// So many changes among 64 bytes leave no runs worth looking for.
const DENSE: u32 = 32;
/// How many changes are collected at a time.
const FEW: usize = 2048;
/// A byte times this is the byte in each place of a word.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The highest bit of each byte.
const TOPS: u64 = 0x8080_8080_8080_8080;

/// Bytes of a block, 64 at a time.
pub(crate) trait Content {
    fn len(&self) -> usize;
    fn chunks(&self) -> impl Iterator<Item = impl Chunk>;
    /// The last `len() % 64` bytes.
    fn rest(&self) -> impl Iterator<Item = u8>;
    /// Copies all bytes to the start of `to`.
    fn copy(&self, to: &mut [u8]);
}

/// 64 bytes as words. A byte of a word is the lower, the earlier it stands.
pub(crate) trait Chunk: Copy {
    /// Whether every word is this one.
    fn is(self, word: u64) -> bool;
    fn words(self) -> [u64; 8];
}

/// Bytes as they are.
pub(crate) struct Plain<'a>(pub(crate) &'a [u8]);

/// The XOR of two strings of one length.
pub(crate) struct Xor<'a>(pub(crate) &'a [u8], pub(crate) &'a [u8]);

/// A block taken apart.
pub(crate) struct Parts {
    /// The first `count` are the block's.
    pub(crate) literals: Vec<u8>,
    pub(crate) count: usize,
    pub(crate) sequences: Vec<Sequence>,
    /// Where a byte differs from that before it: the place above its value in the lowest 8 bits.
    changes: Vec<u32>,
}

/// Some literals, and a run of the last of them.
#[derive(Clone, Copy)]
pub(crate) struct Sequence {
    pub(crate) literals: Length,
    pub(crate) run: Length,
    /// The lowest bits of both lengths, those of the literals lower.
    pub(crate) extra: u32,
}

impl Sequence {
    /// The number of literals, and the length of the run.
    pub(crate) fn lengths(self) -> (usize, usize) {
        static LITERALS: [(u32, u32); 36] = lengths(0);
        static RUNS: [(u32, u32); 53] = lengths(MIN_MATCH);
        let (literals, bits) = LITERALS[usize::from(self.literals.code)];
        let run = RUNS[usize::from(self.run.code)].0 + (self.extra >> bits);
        ((literals + (self.extra & ((1 << bits) - 1))) as usize, run as usize)
    }
}

impl Parts {
    /// Room for blocks of at most `block` bytes.
    pub(crate) fn new(block: usize) -> Self {
        Self {
            literals: vec![0; block + SLACK],
            count: 0,
            sequences: Vec::new(),
            changes: vec![0; FEW.min(block) + 64],
        }
    }

    /// Takes a block apart. Its first byte is a literal whatever it is, and every run has literals before it.
    pub(crate) fn take(&mut self, content: &impl Content) {
        self.sequences.clear();
        self.count = 0;
        let first = content.chunks().next().map(|chunk| chunk.words()[0].to_le_bytes()[0]);
        let Some(first) = first.or_else(|| content.rest().next()) else { return };
        self.literals[0] = first;
        self.count = 1;
        let mut cut = Cut { parts: self, covered: 1, sequenced: 0, last: first };
        let (mut at, mut found) = (0, 0);
        // The byte before a chunk, and eight of it.
        let (mut last, mut equal) = (first, u64::from(first) * ONES);
        for chunk in content.chunks() {
            if !chunk.is(equal) {
                let words = chunk.words();
                let changes = changes(&words, last);
                let bytes = words.map(u64::to_le_bytes);
                let bytes = bytes.as_flattened();
                if changes.count_ones() >= DENSE {
                    cut.changes(std::mem::take(&mut found));
                    cut.literals(at, bytes);
                } else {
                    found += list(changes, at, bytes, &mut cut.parts.changes[found..]);
                    if found >= FEW {
                        cut.changes(std::mem::take(&mut found));
                    }
                }
                last = bytes[63];
                equal = u64::from(last) * ONES;
            }
            at += 64;
        }
        cut.changes(found);
        for byte in content.rest() {
            if byte != cut.last {
                cut.change(at, byte);
            }
            at += 1;
        }
        cut.end(at);
    }
}

/// One bit for each byte that differs from that before it.
#[inline]
fn changes(words: &[u64; 8], before: u8) -> u64 {
    let (mut changes, mut before) = (0, u64::from(before));
    for (index, word) in words.iter().enumerate() {
        let differing = word ^ (word << 8 | before);
        before = word >> 56;
        let tops = (((differing & !TOPS) + !TOPS) | differing) & TOPS;
        changes |= ((tops >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * index);
    }
    changes
}

/// Lists the bytes at `at` that have a bit in `changes`. Returns their number.
#[inline]
fn list(mut changes: u64, at: usize, bytes: &[u8], list: &mut [u32]) -> usize {
    let number = changes.count_ones() as usize;
    // Four at a time, also where there are fewer: the processor need not guess how many.
    for places in list.as_chunks_mut::<4>().0.iter_mut().take(number.div_ceil(4)) {
        for place in places {
            let index = changes.trailing_zeros() as usize % 64;
            *place = u32::try_from((at + index) << 8).unwrap_or(u32::MAX) | u32::from(bytes[index]);
            changes &= changes.wrapping_sub(1);
        }
    }
    number
}

/// A block while it is taken apart.
struct Cut<'a> {
    parts: &'a mut Parts,
    /// How many bytes are parts.
    covered: usize,
    /// How many literals belong to sequences.
    sequenced: usize,
    /// The byte before.
    last: u8,
}

impl Cut<'_> {
    /// The first `found` changes.
    fn changes(&mut self, found: usize) {
        let changes = std::mem::take(&mut self.parts.changes);
        for change in changes.iter().take(found) {
            let (at, byte) = ((change >> 8) as usize, change.to_le_bytes()[0]);
            self.change(at, byte);
        }
        self.parts.changes = changes;
    }

    /// The byte at `at` differs from that before it; those between `covered` and `at` did not.
    #[inline]
    fn change(&mut self, at: usize, byte: u8) {
        // The very first byte of a block is a literal already.
        if at < self.covered {
            return;
        }
        if at - self.covered >= MIN_RUN {
            self.sequence(at);
        }
        // Fewer equal bytes than a run has, then the new one.
        let (count, equal) = (self.parts.count, at - self.covered);
        if let Some(place) = self.parts.literals.get_mut(count..count + SLACK) {
            place.copy_from_slice(&(u64::from(self.last) * ONES).to_le_bytes());
            place[equal % SLACK] = byte;
        }
        self.parts.count += equal + 1;
        self.covered = at + 1;
        self.last = byte;
    }

    /// The bytes at `at` become literals, whatever is equal among them.
    fn literals(&mut self, at: usize, bytes: &[u8]) {
        self.end(at);
        let fresh = bytes.get(self.covered - at..).unwrap_or_default();
        let count = self.parts.count;
        if let Some(place) = self.parts.literals.get_mut(count..count + fresh.len()) {
            place.copy_from_slice(fresh);
        }
        self.parts.count += fresh.len();
        self.covered = at + bytes.len();
        self.last = bytes.last().copied().unwrap_or(self.last);
    }

    /// The bytes from `covered` to `end` equal that before them, and what follows has nothing to do with them.
    fn end(&mut self, end: usize) {
        if end >= self.covered + MIN_RUN {
            self.sequence(end);
        } else if end > self.covered {
            self.change(end - 1, self.last);
        }
    }

    #[inline]
    fn sequence(&mut self, end: usize) {
        // Lengths within a block fit.
        let literals = u32::try_from(self.parts.count - self.sequenced).unwrap_or(u32::MAX);
        let run = u32::try_from(end - self.covered).unwrap_or(u32::MAX) - MIN_MATCH;
        let codes = (literal_code(literals), match_code(run));
        let extra = |length: u32, code: Length| length & ((1 << code.extra) - 1);
        self.parts.sequences.push(Sequence {
            literals: codes.0,
            run: codes.1,
            extra: extra(literals, codes.0) | extra(run, codes.1) << codes.0.extra,
        });
        self.sequenced = self.parts.count;
        self.covered = end;
    }
}

impl Chunk for &[u8; 64] {
    #[inline]
    fn is(self, word: u64) -> bool {
        self.as_chunks().0.iter().fold(0, |all, bytes| all | (u64::from_le_bytes(*bytes) ^ word)) == 0
    }

    #[inline]
    fn words(self) -> [u64; 8] {
        let mut words = [0; 8];
        words.iter_mut().zip(self.as_chunks().0).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
        words
    }
}

impl Chunk for (&[u8; 64], &[u8; 64]) {
    #[inline]
    fn is(self, word: u64) -> bool {
        let pairs = self.0.as_chunks().0.iter().zip(self.1.as_chunks().0);
        let other =
            |left: &[u8; 8], right: &[u8; 8]| u64::from_le_bytes(*left) ^ u64::from_le_bytes(*right) ^ word;
        pairs.fold(0, |all, (left, right)| all | other(left, right)) == 0
    }

    #[inline]
    fn words(self) -> [u64; 8] {
        let mut words = self.0.words();
        words.iter_mut().zip(self.1.words()).for_each(|(left, right)| *left ^= right);
        words
    }
}

impl Content for Plain<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn chunks(&self) -> impl Iterator<Item = impl Chunk> {
        self.0.as_chunks::<64>().0.iter()
    }

    fn rest(&self) -> impl Iterator<Item = u8> {
        self.0.as_chunks::<64>().1.iter().copied()
    }

    fn copy(&self, to: &mut [u8]) {
        to[..self.0.len()].copy_from_slice(self.0);
    }
}

impl Content for Xor<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn chunks(&self) -> impl Iterator<Item = impl Chunk> {
        self.0.as_chunks::<64>().0.iter().zip(self.1.as_chunks::<64>().0)
    }

    fn rest(&self) -> impl Iterator<Item = u8> {
        let (left, right) = (self.0.as_chunks::<64>().1, self.1.as_chunks::<64>().1);
        left.iter().zip(right).map(|(left, right)| left ^ right)
    }

    fn copy(&self, to: &mut [u8]) {
        to.iter_mut().zip(self.0.iter().zip(self.1)).for_each(|(to, (left, right))| *to = left ^ right);
    }
}
