//! Takes a block apart into literals and runs.

use std::ops::Range;

use crate::octave::{MOST_LISTED, list_changes};

/// Shorter runs are literals: their sequence would take more bits than they do.
const MIN_RUN: u32 = 6;
/// Literals are written 8 at a time.
const SLACK: usize = 8;
/// So many changes among 64 bytes leave no runs worth looking for.
const DENSE: u32 = MOST_LISTED;
/// How many times 64 bytes are looked through at a time.
const STRETCH: usize = 128;
/// A byte times this is the byte in each place of a word.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The highest bit of each byte.
const TOPS: u64 = 0x8080_8080_8080_8080;

/// Bytes of a block, in chunks of 64.
pub(crate) trait Content {
    fn len(&self) -> usize;
    fn chunk(&self, index: usize) -> Chunk;
    /// As [`list_changes`], for the chunks of a range.
    fn list_changes(&self, chunks: Range<usize>, before: u8, list: &mut [u32]) -> (usize, usize);
    /// The last `len() % 64` bytes.
    fn rest(&self) -> impl Iterator<Item = u8>;
    /// Copies all bytes to the start of `to`.
    fn copy(&self, to: &mut [u8]);
}

/// 64 bytes as words. A byte of a word is the lower, the earlier it stands.
type Chunk = [u64; 8];

/// Bytes as they are.
pub(crate) struct Plain<'a>(pub(crate) &'a [u8]);

/// The XOR of two strings of one length.
pub(crate) struct Xor<'a>(pub(crate) &'a [u8], pub(crate) &'a [u8]);

/// A block taken apart.
pub(crate) struct Parts {
    /// The first `count` are the block's.
    pub(crate) literals: Vec<u8>,
    pub(crate) count: u32,
    /// The first `runs` are the block's.
    sequences: Vec<Sequence>,
    runs: usize,
    /// Where a byte differs from that before it: the place above its value in the lowest 8 bits. There is room for all
    /// that a stretch can list.
    changes: Vec<u32>,
}

/// Some literals, and a run of the last of them.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sequence {
    pub(crate) literals: u32,
    pub(crate) run: u32,
}

impl Parts {
    /// Room for blocks of at most `block` bytes.
    pub(crate) fn new(block: usize) -> Self {
        Self {
            literals: vec![0; block + SLACK],
            count: 0,
            // A run has one literal before it at least; one place is written to and not counted.
            sequences: vec![Sequence::default(); block / (MIN_RUN as usize + 1) + 1],
            runs: 0,
            changes: vec![0; STRETCH * DENSE as usize + 64],
        }
    }

    pub(crate) fn sequences(&self) -> &[Sequence] {
        self.sequences.get(..self.runs).unwrap_or_default()
    }

    /// Takes a block apart. Its first byte is a literal whatever it is, and every run has literals before it.
    pub(crate) fn take(&mut self, content: &impl Content) {
        (self.runs, self.count) = (0, 0);
        let chunks = content.len() / 64;
        let first =
            if chunks > 0 { Some(content.chunk(0)[0].to_le_bytes()[0]) } else { content.rest().next() };
        let Some(first) = first else { return };
        self.literals[0] = first;
        self.count = 1;
        let mut cut = Cut { parts: self, covered: 1, sequenced: 0, last: first };
        let mut last = first;
        for start in (0..chunks).step_by(STRETCH) {
            let end = chunks.min(start + STRETCH);
            let mut done = start;
            while done < end {
                let mut list = std::mem::take(&mut cut.parts.changes);
                let (quiet, found) = content.list_changes(done..end, last, &mut list);
                cut.changes(list.get(..found).unwrap_or_default());
                cut.parts.changes = list;
                done += quiet;
                if quiet > 0 {
                    last = content.chunk(done - 1)[7].to_le_bytes()[7];
                }
                while done < end {
                    let words = content.chunk(done);
                    if changes(&words, last).count_ones() < DENSE {
                        break;
                    }
                    cut.literals(place_of(done * 64), words);
                    last = words[7].to_le_bytes()[7];
                    done += 1;
                }
            }
        }
        for (at, byte) in (chunks * 64..).zip(content.rest()) {
            if byte != cut.last {
                cut.changes(&[change(place_of(at), byte)]);
            }
        }
        cut.end(place_of(content.len()));
    }
}

/// As [`list_changes`], on any processor.
#[inline]
fn list_of(
    chunks: impl Iterator<Item = Chunk>,
    mut before: u8,
    first: usize,
    list: &mut [u32],
) -> (usize, usize) {
    let (mut done, mut found) = (0, 0);
    for words in chunks {
        let equal = u64::from(before) * ONES;
        if words.iter().fold(0, |all, word| all | (word ^ equal)) != 0 {
            let changes = changes(&words, before);
            if changes.count_ones() >= DENSE {
                break;
            }
            let bytes = words.map(u64::to_le_bytes);
            let bytes = bytes.as_flattened();
            found += list_some(changes, first + done * 64, bytes, &mut list[found..]);
            before = bytes[63];
        }
        done += 1;
    }
    (done, found)
}

/// One bit for each byte that differs from that before it.
#[inline]
fn changes(words: &Chunk, before: u8) -> u64 {
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
fn list_some(mut changes: u64, at: usize, bytes: &[u8], list: &mut [u32]) -> usize {
    let number = changes.count_ones() as usize;
    // Four at a time, also where there are fewer: the processor need not guess how many.
    for places in list.as_chunks_mut::<4>().0.iter_mut().take(number.div_ceil(4)) {
        for place in places {
            let index = changes.trailing_zeros() as usize % 64;
            *place = change(place_of(at + index), bytes[index]);
            changes &= changes.wrapping_sub(1);
        }
    }
    number
}

/// Where something stands in a block, which is short.
fn place_of(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// A byte and where it stands in a block.
fn change(at: u32, byte: u8) -> u32 {
    at << 8 | u32::from(byte)
}

/// A block while it is taken apart.
struct Cut<'a> {
    parts: &'a mut Parts,
    /// How many bytes are parts.
    covered: u32,
    /// How many literals belong to sequences.
    sequenced: u32,
    /// The byte before.
    last: u8,
}

impl Cut<'_> {
    /// Bytes that differ from those before them; the others since `covered` did not. Without branches: whether a run
    /// stands before a byte cannot be guessed.
    // By itself, its loop has enough registers.
    #[inline(never)]
    fn changes(&mut self, changes: &[u32]) {
        let (mut count, mut runs) = (self.parts.count, self.parts.runs);
        let (literals, sequences) = (&mut *self.parts.literals, &mut *self.parts.sequences);
        let (mut covered, mut sequenced, mut last) = (self.covered, self.sequenced, self.last);
        for change in changes {
            let (at, byte) = (change >> 8, change.to_le_bytes()[0]);
            let equal = at - covered;
            let run = equal >= MIN_RUN;
            if let Some(place) = sequences.get_mut(runs) {
                *place = Sequence { literals: count - sequenced, run: equal };
            }
            runs += usize::from(run);
            sequenced = if run { count } else { sequenced };
            // Fewer equal bytes than a run has, then the new one.
            let equal = if run { 0 } else { equal };
            if let Some(place) = literals.get_mut(count as usize..).and_then(<[_]>::first_chunk_mut::<SLACK>)
            {
                *place = (u64::from(last) * ONES).to_le_bytes();
                place[equal as usize % SLACK] = byte;
            }
            count += equal + 1;
            covered = at + 1;
            last = byte;
        }
        (self.covered, self.sequenced, self.last) = (covered, sequenced, last);
        (self.parts.count, self.parts.runs) = (count, runs);
    }

    /// The 64 bytes at `at` become literals, whatever is equal among them.
    fn literals(&mut self, at: u32, words: Chunk) {
        self.end(at);
        let bytes = words.map(u64::to_le_bytes);
        let bytes = bytes.as_flattened();
        let fresh = bytes.get((self.covered - at) as usize..).unwrap_or_default();
        let count = self.parts.count as usize;
        if let Some(place) = self.parts.literals.get_mut(count..count + fresh.len()) {
            place.copy_from_slice(fresh);
        }
        self.parts.count += at + 64 - self.covered;
        self.covered = at + 64;
        self.last = bytes[63];
    }

    /// The bytes from `covered` to `end` equal that before them, and what follows has nothing to do with them.
    fn end(&mut self, end: u32) {
        let equal = end.saturating_sub(self.covered);
        if equal >= MIN_RUN {
            if let Some(place) = self.parts.sequences.get_mut(self.parts.runs) {
                *place = Sequence { literals: self.parts.count - self.sequenced, run: equal };
            }
            self.parts.runs += 1;
            self.sequenced = self.parts.count;
            self.covered = end;
        } else if equal > 0 {
            self.changes(&[change(end - 1, self.last)]);
        }
    }
}

fn words(bytes: &[u8; 64]) -> Chunk {
    let mut words = [0; 8];
    words.iter_mut().zip(bytes.as_chunks().0).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
    words
}

fn words_of_xor(left: &[u8; 64], right: &[u8; 64]) -> Chunk {
    let mut words = words(left);
    words.iter_mut().zip(self::words(right)).for_each(|(left, right)| *left ^= right);
    words
}

impl Content for Plain<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline]
    fn chunk(&self, index: usize) -> Chunk {
        words(&self.0.as_chunks().0[index])
    }

    fn list_changes(&self, chunks: Range<usize>, before: u8, list: &mut [u32]) -> (usize, usize) {
        let first = chunks.start * 64;
        list_of(self.0.as_chunks().0[chunks].iter().map(words), before, first, list)
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

    #[inline]
    fn chunk(&self, index: usize) -> Chunk {
        words_of_xor(&self.0.as_chunks().0[index], &self.1.as_chunks().0[index])
    }

    fn list_changes(&self, chunks: Range<usize>, before: u8, list: &mut [u32]) -> (usize, usize) {
        let first = chunks.start * 64;
        let (left, right) = (&self.0.as_chunks().0[chunks.clone()], &self.1.as_chunks().0[chunks]);
        list_changes(left, right, before, first, list).unwrap_or_else(|| {
            let chunks = left.iter().zip(right).map(|(left, right)| words_of_xor(left, right));
            list_of(chunks, before, first, list)
        })
    }

    fn rest(&self) -> impl Iterator<Item = u8> {
        let (left, right) = (self.0.as_chunks::<64>().1, self.1.as_chunks::<64>().1);
        left.iter().zip(right).map(|(left, right)| left ^ right)
    }

    fn copy(&self, to: &mut [u8]) {
        to.iter_mut().zip(self.0.iter().zip(self.1)).for_each(|(to, (left, right))| *to = left ^ right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instructions_of_the_processor_list_the_same_changes() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            state >> 33
        };
        for rarity in [1, 2, 3, 8, 40, 1000] {
            let left: Vec<u8> = (0..STRETCH * 64).map(|_| random() as u8).collect();
            let right: Vec<u8> = left
                .iter()
                .map(|byte| byte ^ if random() % rarity == 0 { random() as u8 % 4 } else { 0 })
                .collect();
            let content = Xor(&left, &right);
            for start in 0..STRETCH {
                for before in [0, 3] {
                    let (mut one, mut other) = (vec![0; 8192], vec![0; 8192]);
                    let found = content.list_changes(start..STRETCH, before, &mut one);
                    let chunks = (start..STRETCH).map(|index| content.chunk(index));
                    assert_eq!(found, list_of(chunks, before, start * 64, &mut other));
                    assert_eq!(one[..found.1], other[..found.1], "{rarity} {start}");
                }
            }
        }
    }
}
