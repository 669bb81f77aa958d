//! Huffman codes of at most 11 bits (RFC 8878, section 4.2).

use super::bits::BitWriter;
use super::fse::{Distribution, Encoder};
use crate::tally::{Counts, Tally};

/// The longest code that literals may have.
const MAX_BITS: u32 = 11;

/// Counts the bytes.
pub(crate) fn count(bytes: &[u8]) -> Counts {
    let mut tally = Tally::default();
    tally.add(bytes);
    tally.counts()
}

/// A code for bytes.
#[derive(Debug, Clone)]
pub(super) struct Code {
    /// The length of each byte's code; 0 for none.
    lengths: [u8; 256],
    /// Each byte's code in the highest bits, its length in the lowest.
    codes: [u64; 256],
}

impl Code {
    /// The code for `counts`. `None` for fewer than two symbols.
    pub(super) fn of(counts: &Counts) -> Option<Self> {
        let lengths = code_lengths(counts, MAX_BITS)?;
        let mut numbers = [0u64; MAX_BITS as usize + 1];
        for &length in lengths.iter().filter(|length| **length > 0) {
            numbers[usize::from(length)] += 1;
        }
        // Codes ascend with the byte among those of one length, and begin after the longer ones.
        let mut next = 0;
        for number in numbers.iter_mut().skip(1).rev() {
            let count = std::mem::replace(number, next);
            next = (next + count) >> 1;
        }
        let mut codes = [0; 256];
        for (code, &length) in codes.iter_mut().zip(&lengths).filter(|(_, length)| **length > 0) {
            let next = &mut numbers[usize::from(length)];
            *code = *next << (64 - u32::from(length)) | u64::from(length);
            *next += 1;
        }
        Some(Self { lengths, codes })
    }

    /// The bits that `counts` take; `None` if a byte has no code.
    pub(super) fn cost(&self, counts: &Counts) -> Option<u64> {
        let mut cost = 0;
        for (&count, &length) in counts.iter().zip(&self.lengths).filter(|(count, _)| **count > 0) {
            if length == 0 {
                return None;
            }
            cost += u64::from(count) * u64::from(length);
        }
        Some(cost)
    }

    /// Writes the description of the code. The number of bytes, or `None` if they do not fit or there is none.
    pub(super) fn write(&self, buffer: &mut [u8]) -> Option<usize> {
        let longest = self.lengths.iter().max()?;
        let last = self.lengths.iter().rposition(|&length| length > 0)?;
        let weight = |&length: &u8| if length == 0 { 0 } else { longest + 1 - length };
        // The last weight follows from the others.
        let weights: Vec<u8> = self.lengths.iter().take(last).map(weight).collect();
        let (head, body) = buffer.split_first_mut()?;
        let packed = pack_weights(&weights, body).filter(|&length| length < 128);
        let plain = weights.len().div_ceil(2);
        if let Some(length) = packed
            && (length < plain || weights.len() > 128)
        {
            *head = u8::try_from(length).ok()?;
            return Some(1 + length);
        }
        *head = u8::try_from(127 + weights.len()).ok()?;
        for (byte, pair) in body.get_mut(..plain)?.iter_mut().zip(weights.chunks(2)) {
            *byte = pair.first()? << 4 | pair.get(1).unwrap_or(&0);
        }
        Some(1 + plain)
    }

    /// Encodes `literals`, which all have codes, as one stream. The number of bytes, or `None` if they do not fit.
    pub(super) fn encode(&self, literals: &[u8], buffer: &mut [u8]) -> Option<usize> {
        let (head, groups) = literals.as_rchunks();
        let mut stream = Stream::new(self, buffer);
        groups.iter().rev().try_for_each(|group| stream.put(group))?;
        stream.end(head)
    }

    /// Encodes `literals` as four streams behind their jump table.
    pub(super) fn encode_four(&self, literals: &[u8], buffer: &mut [u8]) -> Option<usize> {
        let (jumps, body) = buffer.split_first_chunk_mut::<6>()?;
        let quarter = literals.len().div_ceil(4).max(1);
        // Each has room for the longest codes until it is known how long it becomes.
        let room = quarter * MAX_BITS as usize / 8 + 16;
        let (mut at, mut from) = (0, 0);
        for (index, half) in literals.chunks(2 * quarter).enumerate() {
            let (first, second) = half.split_at(quarter.min(half.len()));
            let (here, there) = body.get_mut(from..from + 2 * room)?.split_at_mut(room);
            let lengths = self.encode_two([first, second], [here, there])?;
            for (stream, length) in lengths.into_iter().enumerate() {
                if let Some(jump) = jumps.as_chunks_mut::<2>().0.get_mut(2 * index + stream) {
                    *jump = u16::try_from(length).ok()?.to_le_bytes();
                }
                body.copy_within(from..from + length, at);
                at += length;
                from += room;
            }
        }
        Some(6 + at)
    }

    /// Encodes two streams side by side, because none has to wait for the other. Returns their lengths.
    fn encode_two(&self, literals: [&[u8]; 2], buffers: [&mut [u8]; 2]) -> Option<[usize; 2]> {
        let [(first_head, firsts), (second_head, seconds)] = literals.map(<[u8]>::as_rchunks);
        let [mut first, mut second] = buffers.map(|buffer| Stream::new(self, buffer));
        // The second may be shorter.
        let (more, firsts) = firsts.split_at(firsts.len().saturating_sub(seconds.len()));
        for (one, other) in firsts.iter().rev().zip(seconds.iter().rev()) {
            first.put(one)?;
            second.put(other)?;
        }
        more.iter().rev().try_for_each(|group| first.put(group))?;
        Some([first.end(first_head)?, second.end(second_head)?])
    }
}

/// A stream that is being written, its last literal first.
struct Stream<'a> {
    codes: &'a [u64; 256],
    buffer: &'a mut [u8],
    /// New bits enter at the top. The lengths in the lowest bits of the codes are never written: at most 52 bits are held.
    held: u64,
    /// How many of them are not written; only the lowest byte counts.
    bits: u64,
    /// How many bytes are written.
    at: usize,
}

impl<'a> Stream<'a> {
    fn new(code: &'a Code, buffer: &'a mut [u8]) -> Self {
        Self { codes: &code.codes, buffer, held: 0, bits: 0, at: 0 }
    }

    #[inline(always)]
    fn add(&mut self, literal: u8) {
        let code = self.codes[usize::from(literal)];
        self.held = self.held >> (code & 63) | code;
        self.bits = self.bits.wrapping_add(code);
    }

    /// Writes the bytes that are whole. `None` without room for 8.
    #[inline(always)]
    fn flush(&mut self) -> Option<()> {
        self.bits &= 0xff;
        let word = self.held >> ((64 - self.bits) & 63);
        *self.buffer.get_mut(self.at..)?.first_chunk_mut()? = word.to_le_bytes();
        self.at += (self.bits / 8) as usize;
        self.bits &= 7;
        Some(())
    }

    #[inline(always)]
    fn put(&mut self, group: &[u8; 4]) -> Option<()> {
        group.iter().rev().for_each(|&literal| self.add(literal));
        self.flush()
    }

    /// Ends with up to 3 literals and the bit that marks where the stream begins, which is read from its end. Returns its
    /// length.
    fn end(mut self, head: &[u8]) -> Option<usize> {
        head.iter().rev().for_each(|&literal| self.add(literal));
        self.held = self.held >> 1 | 1 << 63;
        self.bits = self.bits.wrapping_add(1);
        self.flush()?;
        Some(self.at + usize::from(self.bits > 0))
    }
}

/// How long the code of each symbol is, at most `longest` bits, which allows for all of them; 0 for one that does not
/// occur. `None` for fewer than two.
pub(crate) fn code_lengths<const N: usize>(counts: &[u32; N], longest: u32) -> Option<[u8; N]> {
    let mut symbols: Vec<(u32, usize)> =
        counts.iter().copied().zip(0..).filter(|(count, _)| *count > 0).collect();
    if symbols.len() < 2 {
        return None;
    }
    symbols.sort_unstable();
    let mut sorted = depths(&symbols);
    limit(&mut sorted, longest);
    let mut lengths = [0; N];
    for (&(_, symbol), length) in symbols.iter().zip(sorted) {
        *lengths.get_mut(symbol)? = length.to_le_bytes()[0];
    }
    Some(lengths)
}

/// The depth of each symbol in the Huffman tree. Symbols ascend by count; there are two at least.
fn depths(symbols: &[(u32, usize)]) -> Vec<u32> {
    let leaves = symbols.len();
    // Leaves, then inner nodes in the order in which they are made, which is that of their counts.
    let mut counts: Vec<u64> = symbols.iter().map(|(count, _)| u64::from(*count)).collect();
    let mut parents = vec![0; 2 * leaves - 1];
    let (mut leaf, mut inner) = (0, leaves);
    for node in leaves..2 * leaves - 1 {
        let mut sum = 0;
        for _ in 0..2 {
            let take_leaf = leaf < leaves && (inner >= node || counts[leaf] <= counts[inner]);
            let child = if take_leaf { &mut leaf } else { &mut inner };
            sum += counts[*child];
            parents[*child] = node;
            *child += 1;
        }
        counts.push(sum);
    }
    let mut depths = vec![0; 2 * leaves - 1];
    for node in (0..2 * leaves - 2).rev() {
        depths[node] = depths[parents[node]] + 1;
    }
    depths.truncate(leaves);
    depths
}

/// Makes no length longer than `longest`, and the code complete again. Rare symbols come first, so that lengths descend.
fn limit(lengths: &mut [u32], longest: u32) {
    let whole = 1u64 << longest;
    let room = |length: u32| 1u64 << (longest - length);
    lengths.iter_mut().for_each(|length| *length = (*length).min(longest));
    let mut used: u64 = lengths.iter().map(|&length| room(length)).sum();
    for length in lengths.iter_mut() {
        while used > whole && *length < longest {
            used -= room(*length) / 2;
            *length += 1;
        }
    }
    for length in lengths.iter_mut().rev() {
        while *length > 1 && used + room(*length) <= whole {
            used += room(*length);
            *length -= 1;
        }
    }
}

/// Two interleaved states over the weights.
fn pack_weights(weights: &[u8], buffer: &mut [u8]) -> Option<usize> {
    let mut counts = [0; 12];
    for &weight in weights {
        *counts.get_mut(usize::from(weight))? += 1;
    }
    let distribution = Distribution::of(&counts, u32::try_from(weights.len()).ok()?, 6)?;
    let head = distribution.write(buffer)?;
    let encoder = Encoder::new(&distribution);
    let mut out = BitWriter::new(buffer.get_mut(head..)?);
    let mut states = [None, None];
    for (index, &weight) in weights.iter().enumerate().rev() {
        match &mut states[index % 2] {
            Some(state) => {
                let (value, bits) = encoder.encode(state, weight);
                out.add(value, bits);
            }
            state => *state = Some(encoder.begin(weight)),
        }
        out.flush();
    }
    let [even, odd] = states;
    encoder.end(odd?, &mut out);
    encoder.end(even?, &mut out);
    Some(head + out.end_marked()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_complete_and_short_whatever_the_counts() {
        let fibonacci = |n: usize| {
            let mut counts = [0; 256];
            let (mut a, mut b) = (1u32, 1u32);
            for count in counts.iter_mut().take(n) {
                *count = a;
                (a, b) = (b, a.saturating_add(b).min(1 << 24));
            }
            counts
        };
        let mut steep = [1; 256];
        steep[3] = 1 << 30;
        for counts in [fibonacci(2), fibonacci(12), fibonacci(30), fibonacci(256), [1; 256], steep] {
            let code = Code::of(&counts).unwrap();
            let lengths = code.lengths.map(u32::from);
            assert!(lengths.iter().all(|&length| length <= MAX_BITS));
            assert!(lengths.iter().zip(&counts).all(|(length, count)| (*length > 0) == (*count > 0)));
            let used: u32 =
                lengths.iter().filter(|length| **length > 0).map(|length| 1 << (11 - length)).sum();
            assert_eq!(used, 1 << 11);
        }
        assert!(Code::of(&[0; 256]).is_none());
    }
}
