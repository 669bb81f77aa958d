//! Range asymmetric numeral systems: tokens of at most 8 bits, a table for each class, 32 interleaved states.
//!
//! A state lies in 2^15 .. 2^31; 16-bit words move bits in and out; chances have 12 bits. Element `i` belongs to
//! state `i` modulo the number of states. The encoder goes backwards, so that the decoder reads words forwards.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter};
use super::classes::log2;
use super::simd::{Instructions, Isa, Kernel};

/// The bits of a chance.
pub(super) const CHANCE_BITS: u32 = 12;
/// Every chance of a table together.
pub(super) const TOTAL: u32 = 1 << CHANCE_BITS;
/// The smallest state; also the first one of the encoder and the last one of the decoder.
pub(super) const LOWEST: u32 = 1 << 15;
/// The states of a long stream.
pub(super) const LANES: usize = 32;
/// Streams below this many tokens have one state.
const SHORT: usize = 512;
/// The states of those below this many, and how many that is.
const MIDDLE_LANES: usize = 4;
const LONG: usize = 4096;
/// The order of the Exp-Golomb codes for chances.
const CHANCE_ORDER: u32 = 5;

/// The number of states of a stream of `tokens`, a power of two.
fn lanes(tokens: usize) -> usize {
    match tokens {
        0..SHORT => 1,
        SHORT..LONG => MIDDLE_LANES,
        LONG.. => LANES,
    }
}

/// The chances of the tokens of one class. They add up to [`TOTAL`], or to 0 if the class is empty.
#[derive(Debug, Clone)]
pub(super) struct Chances(Vec<u32>);

impl Chances {
    /// The chances that suit `counts`, at most 256 of them.
    #[inline(never)]
    pub(super) fn of(counts: &[u32]) -> Self {
        let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let used = counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1);
        let scale = |&count: &u32| match count {
            0 => 0,
            // At most 4096.
            _ => ((u64::from(count) * u64::from(TOTAL) + total / 2) / total).max(1) as u32,
        };
        let mut chances: Vec<u32> = counts[..used].iter().map(scale).collect();
        let mut sum: u32 = chances.iter().sum();
        while sum != TOTAL && sum != 0 {
            let Some(largest) = chances.iter_mut().rev().max_by_key(|chance| **chance) else { break };
            let moved = if sum < TOTAL { TOTAL - sum } else { (sum - TOTAL).min(*largest / 2) };
            if sum < TOTAL {
                *largest += moved;
                sum += moved;
            } else {
                *largest -= moved;
                sum -= moved;
            }
        }
        Self(chances)
    }

    /// About the bits that `counts` take, the table included.
    pub(super) fn cost(&self, counts: &[u32]) -> f64 {
        let tokens = self.0.iter().zip(counts).filter(|(_, count)| **count > 0);
        let bits: f64 = tokens
            .map(|(&chance, &count)| {
                f64::from(count) * (f64::from(CHANCE_BITS) - log2(f64::from(chance.max(1))))
            })
            .sum();
        // A chance takes about twice its bits above the code's order.
        let table: u32 =
            self.0.iter().map(|&chance| 1 + CHANCE_ORDER + 2 * (chance >> CHANCE_ORDER | 1).ilog2()).sum();
        bits + f64::from(table)
    }

    pub(super) fn write(&self, bits: &mut BitWriter<'_>) {
        bits.exp_golomb(self.0.len() as u64, 4);
        self.0.iter().for_each(|&chance| bits.exp_golomb(u64::from(chance), CHANCE_ORDER));
    }

    #[inline(never)]
    pub(super) fn read(bits: &mut BitReader<'_>) -> Result<Self> {
        let count = bits.exp_golomb(4)?;
        if count > 256 {
            return Err(Error::corrupt(format!("a table has {count} tokens of at most 256")));
        }
        let mut chances = Vec::with_capacity(count as usize);
        let mut sum = 0;
        for _ in 0..count {
            let chance = bits.exp_golomb(CHANCE_ORDER)?.min(u64::from(TOTAL) + 1) as u32;
            sum += chance;
            chances.push(chance);
        }
        if sum != TOTAL && !chances.is_empty() {
            return Err(Error::corrupt(format!("the chances of a table add up to {sum}, not {TOTAL}")));
        }
        Ok(Self(chances))
    }

    /// Whether a token at or above `first` can come up.
    pub(super) fn reaches(&self, first: usize) -> bool {
        self.0.iter().skip(first).any(|&chance| chance > 0)
    }
}

/// What the encoder needs to know of a token, at `class * 256 + token`.
#[derive(Debug, Default)]
pub(super) struct EncodeTable {
    /// From the lowest bit: the chance in 13 bits, the sum of those before it in 12, the shift behind the multiplication
    /// in 7; the reciprocal of the chance, 2^(31 + shift) / chance rounded up, in 32: exact for states below 2^31.
    pub(super) entries: Vec<u64>,
}

impl EncodeTable {
    pub(super) fn fill<'a>(&mut self, tables: impl ExactSizeIterator<Item = &'a Chances>) {
        self.entries.clear();
        self.entries.resize(tables.len() * 256, 1);
        for (class, chances) in tables.enumerate() {
            let mut before = 0;
            for (token, &chance) in chances.0.iter().enumerate().filter(|(_, chance)| **chance > 0) {
                let shift = chance.next_power_of_two().ilog2();
                // Below 2^32, since the chance is above half of 2^shift.
                let reciprocal = (1u64 << (31 + shift)).div_ceil(u64::from(chance));
                self.entries[class * 256 + token] =
                    reciprocal << 32 | u64::from(chance | before << 13 | shift << 25);
                before += chance;
            }
        }
    }

    #[inline(always)]
    fn step(&self, at: usize, state: &mut u32, mut emit: impl FnMut(u16)) {
        let (packed, reciprocal) = (self.entries[at] as u32, self.entries[at] >> 32);
        let (chance, before, shift) = (packed & 0x1fff, packed >> 13 & 0xfff, packed >> 25);
        if *state >= chance << 19 {
            emit(*state as u16);
            *state >>= 16;
        }
        let quotient = ((u64::from(*state) * reciprocal) >> (31 + shift)) as u32;
        *state += before + quotient * (TOTAL - chance);
    }
}

/// What the decoder needs to know of a slot, at `class * TOTAL + slot`: the token in 8 bits, its chance less 1 in
/// 12, the slot less the sum of the chances before it in 12.
#[derive(Debug, Default)]
pub(super) struct DecodeTable {
    slots: Vec<u32>,
    /// The classes without tokens.
    empty: Vec<u8>,
}

impl DecodeTable {
    pub(super) fn fill(&mut self, tables: &[Chances]) {
        self.slots.clear();
        self.empty.clear();
        for (class, chances) in (0..).zip(tables) {
            let start = self.slots.len();
            if chances.0.is_empty() {
                self.empty.push(class);
            }
            for (token, &chance) in (0..).zip(&chances.0) {
                self.slots.extend((0..chance).map(|slot| token | (chance - 1) << 8 | slot << 20));
            }
            self.slots.resize(start + TOTAL as usize, 0);
        }
    }
}

/// The streams of a coder, kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Words {
    /// Filled from the end.
    buffer: Vec<u16>,
}

/// An encoded stream.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    states: [u32; LANES],
    lanes: usize,
    words: &'a [u16],
}

impl Stream<'_> {
    pub(super) fn words(&self) -> usize {
        self.words.len()
    }

    /// Appends the states, 4 bytes each, and the words.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        self.states[..self.lanes].iter().for_each(|state| out.extend_from_slice(&state.to_le_bytes()));
        out.extend(self.words.iter().flat_map(|word| word.to_le_bytes()));
    }
}

/// The bytes of a stream of `words` for `tokens`.
pub(super) fn stream_len(tokens: usize, words: u64) -> Option<usize> {
    usize::try_from(words).ok()?.checked_mul(2)?.checked_add(4 * lanes(tokens))
}

/// Encodes `tokens`, whose tables `classes` choose.
pub(super) fn encode<'a>(
    level: Instructions,
    table: &EncodeTable,
    classes: &[u8],
    tokens: &[u8],
    words: &'a mut Words,
) -> Stream<'a> {
    words.buffer.resize(tokens.len().max(words.buffer.len()), 0);
    let mut states = [LOWEST; LANES];
    let buffer = &mut words.buffer[..tokens.len()];
    let start = level.run(Encode { table, classes, tokens, buffer, states: &mut states });
    Stream { states, lanes: lanes(tokens.len()), words: &words.buffer[start..tokens.len()] }
}

/// Writes words from the end of the buffer and returns where they begin. Every token has at most one.
struct Encode<'a> {
    table: &'a EncodeTable,
    classes: &'a [u8],
    tokens: &'a [u8],
    buffer: &'a mut [u16],
    states: &'a mut [u32; LANES],
}

impl Kernel for Encode<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        let Self { table, classes, tokens, buffer, states } = self;
        let (mut start, mut left) = (buffer.len(), tokens.len());
        let lanes = lanes(left);
        let groups = if lanes == LANES { left - left % LANES } else { 0 };
        encode_each(table, classes, tokens, groups..left, lanes, buffer, &mut start, states);
        left = groups;
        if left > 0 && I::HAS_RANS {
            return isa.rans_encode(table, &classes[..left], &tokens[..left], buffer, start, states);
        }
        encode_each(table, classes, tokens, 0..left, lanes, buffer, &mut start, states);
        start
    }
}

/// Encodes a range of tokens one by one, from its end.
#[expect(clippy::too_many_arguments, reason = "the state of a loop that runs in two places")]
#[inline(always)]
fn encode_each(
    table: &EncodeTable,
    classes: &[u8],
    tokens: &[u8],
    range: std::ops::Range<usize>,
    lanes: usize,
    buffer: &mut [u16],
    start: &mut usize,
    states: &mut [u32; LANES],
) {
    for at in range.rev() {
        let entry = usize::from(classes[at]) * 256 + usize::from(tokens[at]);
        table.step(entry, &mut states[at & (lanes - 1)], |word| {
            *start -= 1;
            buffer[*start] = word;
        });
    }
}

/// Fills `tokens` from the states and the words in `bytes`; `classes` are below the number of the tables.
pub(super) fn decode(
    level: Instructions,
    table: &DecodeTable,
    classes: &[u8],
    tokens: &mut [u8],
    bytes: &[u8],
) -> Result<()> {
    if let Some(class) = table.empty.iter().find(|class| classes.contains(class)) {
        return Err(Error::corrupt(format!("class {class} has elements but no tokens")));
    }
    let lanes = lanes(tokens.len());
    let wrong = || Error::corrupt("the entropy-coded stream does not end where it should");
    let (head, words) = bytes.split_at_checked(4 * lanes).ok_or_else(wrong)?;
    let mut states = [LOWEST; LANES];
    for (state, bytes) in states.iter_mut().zip(head.as_chunks::<4>().0) {
        *state = u32::from_le_bytes(*bytes);
        if !(LOWEST..1 << 31).contains(state) {
            return Err(Error::corrupt(format!("the entropy coder cannot be in state {state}")));
        }
    }
    let (words, odd) = words.as_chunks::<2>();
    let read = level.run(Decode { table: &table.slots, classes, tokens, words, states: &mut states });
    // The encoder began in the lowest state: whatever was changed on the way shows here.
    if read == words.len() && odd.is_empty() && states.iter().all(|&state| state == LOWEST) {
        Ok(())
    } else {
        Err(wrong())
    }
}

/// Returns how many words it read; behind the last one it reads zeros.
struct Decode<'a> {
    table: &'a [u32],
    classes: &'a [u8],
    tokens: &'a mut [u8],
    words: &'a [[u8; 2]],
    states: &'a mut [u32; LANES],
}

impl Kernel for Decode<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        let Self { table, classes, tokens, words, states } = self;
        let lanes = lanes(tokens.len());
        let (mut done, mut read) = (0, 0);
        if lanes == LANES && I::HAS_RANS {
            (done, read) = isa.rans_decode(table, classes, tokens, words, states);
        }
        for (at, (token, &class)) in tokens.iter_mut().zip(classes).enumerate().skip(done) {
            let state = &mut states[at & (lanes - 1)];
            let slot = *state & (TOTAL - 1);
            let entry = table[usize::from(class) << CHANCE_BITS | slot as usize];
            *token = entry as u8;
            *state = ((entry >> 8 & 0xfff) + 1) * (*state >> CHANCE_BITS) + (entry >> 20);
            if *state < LOWEST {
                let word = words.get(read).copied().unwrap_or_default();
                *state = *state << 16 | u32::from(u16::from_le_bytes(word));
                read += 1;
            }
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_add_up() {
        for counts in [vec![1], vec![1; 256], vec![0, 0, 7], vec![1_000_000, 1, 1], (1..200).collect()] {
            let chances = Chances::of(&counts);
            assert_eq!(chances.0.iter().sum::<u32>(), TOTAL, "{counts:?}");
            assert!(counts.iter().zip(&chances.0).all(|(count, chance)| (*count == 0) == (*chance == 0)));
        }
        assert!(Chances::of(&[0, 0]).0.is_empty());
    }

    #[test]
    fn the_reciprocal_is_exact() {
        for chance in 1..=TOTAL {
            let mut table = EncodeTable::default();
            table.fill([Chances(vec![chance])].iter());
            let (packed, reciprocal) = (table.entries[0] as u32, table.entries[0] >> 32);
            for state in [chance, LOWEST, 123_456_789, (1 << 31) - 1, ((1u32 << 31) - 1) / chance * chance] {
                for state in [state.saturating_sub(1), state, (state + 1).min((1 << 31) - 1)] {
                    let quotient = (u64::from(state) * reciprocal) >> (31 + (packed >> 25));
                    assert_eq!(quotient, u64::from(state / chance), "{state} / {chance}");
                }
            }
        }
    }
}
