//! Decodes the two entropy codes of zstd. `None` stands for whatever is not quite as an encoder writes it: the
//! library then decides what it is.

use super::fse::Distribution;
use super::read_bits::BackwardBits;

/// The longest code of a literal.
const MAX_BITS: u32 = 11;

/// What each state of a finite state decoder means.
#[derive(Clone)]
pub(super) struct States {
    states: [Step; 1 << 9],
    log: u32,
}

/// One state: a value, whose lowest bits follow, and the way to the next state.
#[derive(Clone, Copy, Default)]
pub(super) struct Step {
    /// The lowest value.
    pub(super) value: u32,
    /// How many bits are added to it.
    pub(super) extra: u8,
    /// How many bits lead to the next state.
    bits: u8,
    /// The lowest next state.
    next: u16,
}

impl States {
    /// The states of symbols of which each stands for a value and some more bits, and that all have a meaning.
    pub(super) fn of(distribution: &Distribution, meanings: &[(u32, u32)]) -> Self {
        let (spread, log) = (distribution.spread(), distribution.log());
        let size = 1u32 << log;
        let mut next = distribution.sizes();
        let mut states = [Step::default(); 1 << 9];
        for (state, &symbol) in states.iter_mut().zip(&spread).take(size as usize) {
            let Some(next) = next.get_mut(usize::from(symbol)) else { continue };
            let bits = log - next.ilog2();
            let base = (*next << bits) - size;
            *state = Step::of(meanings.get(usize::from(symbol)).copied().unwrap_or_default());
            state.bits = bits.to_le_bytes()[0];
            state.next = u16::try_from(base).unwrap_or_default();
            *next += 1;
        }
        Self { states, log }
    }

    /// One symbol for ever.
    pub(super) fn one(symbol: u8, meanings: &[(u32, u32)]) -> Option<Self> {
        let mut states = [Step::default(); 1 << 9];
        states[0] = Step::of(*meanings.get(usize::from(symbol))?);
        Some(Self { states, log: 0 })
    }

    pub(super) fn begin(&self, bits: &mut BackwardBits<'_>) -> usize {
        bits.take(self.log) as usize
    }

    #[inline]
    pub(super) fn step(&self, state: usize) -> Step {
        self.states[state % (1 << 9)]
    }
}

impl Step {
    fn of((value, extra): (u32, u32)) -> Self {
        Self { value, extra: extra.to_le_bytes()[0], ..Self::default() }
    }

    #[inline]
    pub(super) fn value(self, bits: &mut BackwardBits<'_>) -> usize {
        (self.value + bits.take(self.extra.into())) as usize
    }

    #[inline]
    pub(super) fn next(self, bits: &mut BackwardBits<'_>) -> usize {
        usize::from(self.next) + bits.take(self.bits.into()) as usize
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
    let states = States::of(&distribution, &plain);
    let mut bits = BackwardBits::new(bytes.get(head..)?)?;
    let mut now = states.begin(&mut bits);
    let mut later = states.begin(&mut bits);
    let weight = |state: usize| states.step(state).value.to_le_bytes()[0];
    // One place stays free for the last weight.
    for count in 0..254 {
        *weights.get_mut(count)? = weight(now);
        bits.refill()?;
        let next = states.step(now).next(&mut bits);
        if bits.refill().is_none() {
            *weights.get_mut(count + 1)? = weight(later);
            return Some(count + 2);
        }
        now = std::mem::replace(&mut later, next);
    }
    None
}
