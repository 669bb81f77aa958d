//! Decodes the two entropy codes of zstd. `None` stands for whatever is not quite as an encoder writes it: the
//! library then decides what it is.

use super::fse::Distribution;
use super::read_bits::{BackwardBits, low};

/// The longest code of a literal.
const MAX_BITS: u32 = 11;

/// What each state of a finite state decoder means.
pub(super) struct States {
    steps: [Step; 1 << 9],
    values: [Value; 1 << 9],
    log: u32,
}

/// The way from a state to the next one. Of eight bytes, which the processor finds without a multiplication.
#[derive(Clone, Copy, Default)]
pub(super) struct Step {
    /// How many bits are of the value.
    pub(super) extra: u8,
    /// How many bits are of the value or lead to the next state.
    pub(super) all: u8,
    /// Those that lead to the next state.
    mask: u32,
    /// The lowest next state.
    next: u16,
}

/// What a state stands for.
#[derive(Clone, Copy, Default)]
pub(super) struct Value {
    /// The lowest value.
    lowest: u32,
    /// The bits that are added to it.
    mask: u32,
}

impl Default for States {
    fn default() -> Self {
        Self { steps: [Step::default(); 1 << 9], values: [Value::default(); 1 << 9], log: 0 }
    }
}

impl States {
    /// Makes them those of symbols of which each stands for a value and some more bits, and that all have a meaning.
    pub(super) fn set(&mut self, distribution: &Distribution, meanings: &[(u32, u32)]) {
        let spread = distribution.spread();
        let mut next = distribution.sizes();
        self.log = distribution.log();
        let size = 1u32 << self.log;
        let states = self.steps.iter_mut().zip(&mut self.values).zip(&spread);
        for ((step, value), &symbol) in states.take(size as usize) {
            let Some(next) = next.get_mut(usize::from(symbol)) else { continue };
            let bits = self.log - next.ilog2();
            let meaning = meanings.get(usize::from(symbol)).copied().unwrap_or_default();
            (*step, *value) = state(meaning, bits, (*next << bits) - size);
            *next += 1;
        }
    }

    /// Makes them those of one symbol, for ever.
    pub(super) fn set_one(&mut self, symbol: u8, meanings: &[(u32, u32)]) -> Option<()> {
        self.log = 0;
        (self.steps[0], self.values[0]) = state(*meanings.get(usize::from(symbol))?, 0, 0);
        Some(())
    }

    pub(super) fn log(&self) -> u32 {
        self.log
    }

    fn begin(&self, bits: &mut BackwardBits<'_>) -> usize {
        bits.take(self.log) as usize
    }

    #[inline]
    pub(super) fn step(&self, state: usize) -> Option<&Step> {
        self.steps.get(state)
    }

    #[inline]
    pub(super) fn value(&self, state: usize) -> Option<&Value> {
        self.values.get(state)
    }
}

/// A state of a value and `extra` more bits, from which `bits` lead to `next` or above.
fn state((lowest, extra): (u32, u32), bits: u32, next: u32) -> (Step, Value) {
    let [extra_bits, ..] = extra.to_le_bytes();
    let [all, ..] = (extra + bits).to_le_bytes();
    let [low, high, ..] = next.to_le_bytes();
    let step = Step { extra: extra_bits, all, mask: (1 << bits) - 1, next: u16::from_le_bytes([low, high]) };
    (step, Value { lowest, mask: (1 << extra) - 1 })
}

impl Step {
    /// The next state by the lowest of `bits`.
    #[inline]
    pub(super) fn of(self, bits: u64) -> usize {
        usize::from(self.next) + (low(bits) & self.mask) as usize
    }
}

impl Value {
    /// The value by the lowest of `bits`.
    #[inline]
    pub(super) fn of(self, bits: u64) -> u32 {
        self.lowest + (low(bits) & self.mask)
    }
}

/// A table that turns the next bits into a literal.
#[derive(Clone)]
pub(super) struct Literals {
    /// Literal above the number of bits that it takes, by the next [`MAX_BITS`] bits.
    table: [u16; 1 << MAX_BITS],
}

impl Literals {
    /// Reads the description of a code. Also returns its length in bytes.
    pub(super) fn read(bytes: &[u8]) -> Option<(Box<Self>, usize)> {
        let (&head, body) = bytes.split_first()?;
        let mut weights = [0u8; 256];
        let (count, length) = match usize::from(head) {
            packed @ ..128 => (unpack_weights(body.get(..packed)?, &mut weights)?, packed),
            plain => {
                let count = plain - 127;
                let body = body.get(..count.div_ceil(2))?;
                for (pair, byte) in weights.chunks_mut(2).zip(body) {
                    pair.iter_mut().zip([byte >> 4, byte & 15]).for_each(|(to, from)| *to = from);
                }
                weights.get_mut(count..).unwrap_or_default().fill(0);
                (count, body.len())
            }
        };
        let size = |weight: u8| if weight == 0 { 0 } else { 1u32 << (weight - 1) };
        if weights.iter().any(|&weight| u32::from(weight) > MAX_BITS) {
            return None;
        }
        let used: u32 = weights.iter().map(|&weight| size(weight)).sum();
        // The last weight fills up to a power of two.
        let bits = used.checked_ilog2()? + 1;
        let left = (1u32 << bits) - used;
        if bits > MAX_BITS || !left.is_power_of_two() {
            return None;
        }
        *weights.get_mut(count)? = (left.ilog2() + 1).to_le_bytes()[0];
        let scale = MAX_BITS - bits;
        // Light ones come first, those of one weight in their order.
        let mut starts = [0; MAX_BITS as usize + 2];
        for &weight in &weights {
            *starts.get_mut(usize::from(weight) + 1)? += size(weight) as usize;
        }
        (1..starts.len()).for_each(|weight| starts[weight] += starts[weight - 1]);
        let mut table = [0; 1 << MAX_BITS];
        for (literal, &weight) in (0u16..=255).zip(&weights).filter(|(_, weight)| **weight > 0) {
            let start = starts.get_mut(usize::from(weight))?;
            let end = *start + size(weight) as usize;
            let length = u16::from(bits.to_le_bytes()[0] + 1 - weight);
            table.get_mut(*start << scale..end << scale)?.fill(literal << 8 | length);
            *start = end;
        }
        Some((Box::new(Self { table }), 1 + length))
    }

    /// Decodes one stream that holds just `literals.len()` literals.
    pub(super) fn decode(&self, stream: &[u8], literals: &mut [u8]) -> Option<()> {
        self.finish(BackwardBits::new(stream)?, literals)
    }

    /// Decodes four streams behind their jump table, which begins at `start`.
    pub(super) fn decode_four(&self, bytes: &[u8], start: usize, literals: &mut [u8]) -> Option<()> {
        let [a, b, c, d, e, f] = bytes.get(start..)?.first_chunk()?.map(usize::from);
        let first = start + 6;
        let second = first + (a | b << 8);
        let third = second + (c | d << 8);
        let fourth = third + (e | f << 8);
        let starts = [first, second, third, fourth];
        let mut streams = [
            Stream::new(bytes, second)?,
            Stream::new(bytes, third)?,
            Stream::new(bytes, fourth)?,
            Stream::new(bytes, bytes.len())?,
        ];
        let quarter = literals.len().div_ceil(4);
        let (first, rest) = literals.split_at_mut_checked(quarter)?;
        let (second, rest) = rest.split_at_mut_checked(quarter)?;
        let (third, fourth) = rest.split_at_mut_checked(quarter)?;
        // Side by side, because no stream has to wait for another one.
        let together = fourth.len() / 5;
        let (firsts, first) = first.split_at_mut(5 * together);
        let (seconds, second) = second.split_at_mut(5 * together);
        let (thirds, third) = third.split_at_mut(5 * together);
        let (fourths, fourth) = fourth.split_at_mut(5 * together);
        let groups = firsts.as_chunks_mut::<5>().0.iter_mut().zip(seconds.as_chunks_mut::<5>().0);
        let groups = groups.zip(thirds.as_chunks_mut::<5>().0).zip(fourths.as_chunks_mut::<5>().0);
        for (((first, second), third), fourth) in groups {
            for place in 0..5 {
                first[place] = self.literal(&mut streams[0]);
                second[place] = self.literal(&mut streams[1]);
                third[place] = self.literal(&mut streams[2]);
                fourth[place] = self.literal(&mut streams[3]);
            }
            for stream in &mut streams {
                stream.refill(bytes)?;
            }
        }
        for ((start, stream), tail) in starts.into_iter().zip(streams).zip([first, second, third, fourth]) {
            self.finish(stream.rest(bytes, start)?, tail)?;
        }
        Some(())
    }

    fn finish(&self, mut bits: BackwardBits<'_>, literals: &mut [u8]) -> Option<()> {
        for group in literals.chunks_mut(5) {
            bits.refill()?;
            for literal in group {
                let entry = self.table[bits.peek(MAX_BITS) as usize % (1 << MAX_BITS)];
                bits.skip((entry & 0xff).into());
                *literal = (entry >> 8) as u8;
            }
        }
        bits.is_done().then_some(())
    }

    #[inline]
    fn literal(&self, stream: &mut Stream) -> u8 {
        let entry = self.table[(stream.word >> (64 - MAX_BITS)) as usize];
        stream.word <<= entry & 63;
        (entry >> 8).to_le_bytes()[0]
    }
}

/// One of four streams while most of it is ahead.
#[derive(Clone, Copy)]
struct Stream {
    /// The next bits, the highest first. The lowest that is set is none of the stream: it shows how many were taken.
    word: u64,
    /// Where the bytes of `word` begin.
    at: usize,
}

impl Stream {
    /// A stream that ends at `end`. The headers before the first one are longer than a word.
    fn new(bytes: &[u8], end: usize) -> Option<Self> {
        let mut stream = Self { word: 0, at: end.checked_sub(8)? };
        stream.load(bytes)?;
        let zeros = (stream.word | 1).leading_zeros();
        // The first bit that is set marks the beginning, in the last byte.
        (zeros < 8).then(|| stream.word = (stream.word | 1) << zeros << 1)?;
        Some(stream)
    }

    /// Makes the next 56 bits ready. Fails at the start of `bytes`.
    #[inline]
    fn refill(&mut self, bytes: &[u8]) -> Option<()> {
        let taken = self.word.trailing_zeros();
        self.at = self.at.checked_sub((taken / 8) as usize)?;
        self.load(bytes)?;
        self.word = (self.word | 1) << (taken % 8);
        Some(())
    }

    #[inline]
    fn load(&mut self, bytes: &[u8]) -> Option<()> {
        self.word = u64::from_le_bytes(*bytes.get(self.at..)?.first_chunk()?);
        Some(())
    }

    /// What is left of the stream that begins at `start`.
    fn rest<'a>(&self, bytes: &'a [u8], start: usize) -> Option<BackwardBits<'a>> {
        let left = (self.at * 8 + 64).checked_sub(self.word.trailing_zeros() as usize + start * 8)?;
        Some(BackwardBits::with(bytes.get(start..)?, left))
    }
}

/// Weights behind the header of their distribution, two states taking turns until the bits end.
fn unpack_weights(bytes: &[u8], weights: &mut [u8; 256]) -> Option<usize> {
    let (distribution, head) = Distribution::read(bytes, 12, 6)?;
    let plain = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11].map(|weight| (weight, 0));
    let mut states = States::default();
    states.set(&distribution, &plain);
    let mut bits = BackwardBits::new(bytes.get(head..)?)?;
    let mut now = states.begin(&mut bits);
    let mut later = states.begin(&mut bits);
    let weight = |state: usize| states.value(state).map_or(0, |value| value.of(0).to_le_bytes()[0]);
    // One place stays free for the last weight.
    for count in 0..254 {
        *weights.get_mut(count)? = weight(now);
        bits.refill()?;
        let step = states.step(now)?;
        let next = step.of(bits.take(step.all.into()).into());
        if bits.refill().is_none() {
            *weights.get_mut(count + 1)? = weight(later);
            return Some(count + 2);
        }
        now = std::mem::replace(&mut later, next);
    }
    None
}
