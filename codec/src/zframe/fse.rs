//! Finite state entropy: distributions, their headers, and the tables to encode with (RFC 8878, section 4.1).

use super::bits::BitWriter;
use super::read_bits::ForwardBits;

/// Costs are counted in 256ths of a bit.
pub(super) const BIT: u64 = 256;
/// More symbols than any alphabet here.
const MAX_SYMBOLS: usize = 53;
const MAX_LOG: u32 = 9;
/// From so many symbols on their table is half as fine.
const MANY: u32 = 1024;

/// How likely each symbol is, in parts of `1 << log`. −1 is less than one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Distribution {
    parts: [i16; MAX_SYMBOLS],
    log: u32,
}

impl Distribution {
    /// One that is written down; its parts make 64.
    pub(super) fn fixed(parts: &[i16]) -> Self {
        let mut all = [0; MAX_SYMBOLS];
        all.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
        Self { parts: all, log: 6 }
    }

    /// The one nearest to `counts`, whose sum is `total`, in at most `1 << max_log` parts. `None` for fewer than
    /// two symbols.
    pub(super) fn of(counts: &[u32], total: u32, max_log: u32) -> Option<Self> {
        let present = counts.iter().filter(|&&count| count > 0).count();
        if present < 2 {
            return None;
        }
        // A finer table than the number of symbols warrants costs more to write than it saves. Of many symbols it saves
        // so little (0.2 % of a delta) that the time to build it counts more.
        let finest = total.ilog2().saturating_sub(if total < MANY { 2 } else { 3 });
        let log = finest.max(present.ilog2() + 1).clamp(5, max_log);
        let size = 1i64 << log;
        let mut parts = [0i16; MAX_SYMBOLS];
        let mut left = size;
        for (part, &count) in parts.iter_mut().zip(counts).filter(|(_, count)| **count > 0) {
            let share = (2 * i64::from(count) * size / i64::from(total) + 1) / 2;
            *part = i16::try_from(share.clamp(1, size)).unwrap_or(i16::MAX);
            left -= i64::from(*part);
        }
        // What rounding left over or took too much goes to the most frequent symbols.
        while left != 0 {
            let largest = parts.iter_mut().max_by_key(|part| **part)?;
            let step = if left > 0 { left } else { left.max(-(i64::from(*largest) / 2)) };
            *largest += i16::try_from(step).ok()?;
            left -= step;
        }
        Some(Self { parts, log })
    }

    /// What `counts` cost in 256ths of a bit; `None` if a symbol is not in the distribution.
    pub(super) fn cost(&self, counts: &[u32]) -> Option<u64> {
        let mut cost = 0;
        for (&count, &part) in counts.iter().zip(&self.parts).filter(|(count, _)| **count > 0) {
            let part = match part {
                0 => return None,
                -1 => 1,
                part => u32::from(part.unsigned_abs()),
            };
            cost += u64::from(count) * (u64::from(self.log) * BIT - log2(part));
        }
        Some(cost)
    }

    /// Writes the header that tells it to a decoder. The number of bytes, or `None` if they do not fit.
    pub(super) fn write(&self, buffer: &mut [u8]) -> Option<usize> {
        let mut out = BitWriter::new(buffer);
        out.add(u64::from(self.log - 5), 4);
        let mut remaining = (1u32 << self.log) + 1;
        let mut threshold = 1u32 << self.log;
        let mut width = self.log + 1;
        let mut parts = self.parts.iter().peekable();
        while remaining > 1 {
            let part = *parts.next()?;
            let taken = if part < 0 { 1 } else { u32::from(part.unsigned_abs()) };
            let small = 2 * threshold - 1 - remaining;
            remaining = remaining.checked_sub(taken)?;
            let mut value = u32::try_from(part + 1).ok()?;
            if value >= threshold {
                value += small;
            }
            let bits = width - u32::from(value < small);
            out.add(u64::from(value), bits);
            while remaining < threshold {
                width -= 1;
                threshold >>= 1;
            }
            if part == 0 {
                let mut zeros = 0;
                while parts.next_if(|part| **part == 0).is_some() {
                    zeros += 1;
                }
                while zeros >= 3 {
                    out.add(3, 2);
                    zeros -= 3;
                    out.flush();
                }
                out.add(zeros, 2);
            }
            out.flush();
        }
        out.end()
    }
}

impl Distribution {
    /// Reads the header of one of at most `symbols` symbols in at most `1 << max_log` parts. Also returns its length.
    pub(super) fn read(bytes: &[u8], symbols: usize, max_log: u32) -> Option<(Self, usize)> {
        let mut bits = ForwardBits::new(bytes);
        let log = bits.peek(4) + 5;
        bits.skip(4);
        if log > max_log {
            return None;
        }
        let mut parts = [0i16; MAX_SYMBOLS];
        let mut remaining = (1u32 << log) + 1;
        let mut threshold = 1u32 << log;
        let mut width = log + 1;
        let mut places = parts.iter_mut().take(symbols);
        while remaining > 1 {
            let small = 2 * threshold - 1 - remaining;
            let short = bits.peek(width - 1);
            let value = if short < small {
                bits.skip(width - 1);
                short
            } else {
                let long = bits.peek(width);
                bits.skip(width);
                if long >= threshold { long - small } else { long }
            };
            let part = i16::try_from(value).ok()? - 1;
            *places.next()? = part;
            remaining = remaining.checked_sub(u32::from(part.unsigned_abs()))?;
            if part == 0 {
                loop {
                    let zeros = bits.peek(2);
                    bits.skip(2);
                    for _ in 0..zeros {
                        places.next()?;
                    }
                    if zeros < 3 {
                        break;
                    }
                }
            }
            while remaining < threshold && threshold > 1 {
                width -= 1;
                threshold >>= 1;
            }
        }
        let length = bits.length()?;
        (remaining == 1).then_some((Self { parts, log }, length))
    }

    pub(super) fn log(&self) -> u32 {
        self.log
    }

    /// The parts of each symbol, less than one counted as one.
    pub(super) fn sizes(&self) -> [u32; MAX_SYMBOLS] {
        self.parts.map(|part| part.unsigned_abs().into())
    }

    /// The symbol of each state.
    pub(super) fn spread(&self) -> [u8; 1 << MAX_LOG] {
        let size = 1usize << self.log;
        let mut spread = [0u8; 1 << MAX_LOG];
        // Symbols of less than one part stand at the end.
        let mut high = size;
        for (symbol, _) in (0u8..).zip(self.parts).filter(|(_, part)| *part == -1) {
            high -= 1;
            spread[high] = symbol;
        }
        let (step, mask, mut at) = ((size >> 1) + (size >> 3) + 3, size - 1, 0);
        for (symbol, part) in (0u8..).zip(self.parts) {
            for _ in 0..part.max(0) {
                spread[at] = symbol;
                at = (at + step) & mask;
                while at >= high {
                    at = (at + step) & mask;
                }
            }
        }
        spread
    }
}

/// What a distribution means for an encoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Encoder {
    next: [u16; 1 << MAX_LOG],
    symbols: [Step; MAX_SYMBOLS],
    log: u32,
}

/// How a symbol moves a state on.
#[derive(Debug, Clone, Copy, Default)]
struct Step {
    /// Such that `(state + bits) >> 16` is the number of bits to write.
    bits: u32,
    /// Where the next states of the symbol begin, less the first state that leads there.
    find: i32,
}

impl Encoder {
    pub(super) fn new(distribution: &Distribution) -> Self {
        let Distribution { parts, log } = distribution;
        let (spread, size) = (distribution.spread(), 1usize << log);
        let mut symbols = [Step::default(); MAX_SYMBOLS];
        let mut starts = [0usize; MAX_SYMBOLS];
        let mut total = 0;
        for ((step, start), &part) in symbols.iter_mut().zip(&mut starts).zip(parts) {
            let part = u32::from(part.unsigned_abs());
            *start = total;
            let Some(below) = part.checked_sub(1) else { continue };
            let most = if below == 0 { *log } else { log - below.ilog2() };
            let first = part << most;
            let before = i32::try_from(total).unwrap_or(i32::MAX);
            *step = Step { bits: (most << 16).wrapping_sub(first), find: before.wrapping_sub_unsigned(part) };
            total += part as usize;
        }
        let mut next = [0; 1 << MAX_LOG];
        for (state, &symbol) in (size..2 * size).zip(&spread) {
            if let Some(start) = starts.get_mut(usize::from(symbol)) {
                next[*start] = u16::try_from(state).unwrap_or(u16::MAX);
                *start += 1;
            }
        }
        Self { next, symbols, log: *log }
    }

    /// The state after the last symbol of a stream, which is encoded first and costs nothing here.
    pub(super) fn begin(&self, symbol: u8) -> State {
        let step = self.step(symbol);
        let bits = step.bits.wrapping_add(1 << 15) >> 16;
        State(self.follow((bits << 16).wrapping_sub(step.bits) >> bits, step))
    }

    /// Encodes the symbol before: the bits to write, and their number.
    #[inline]
    pub(super) fn encode(&self, state: &mut State, symbol: u8) -> (u64, u32) {
        let step = self.step(symbol);
        let bits = state.0.wrapping_add(step.bits) >> 16;
        let value = u64::from(state.0 & ((1 << bits) - 1));
        state.0 = self.follow(state.0 >> bits, step);
        (value, bits)
    }

    /// Writes the state that the decoder begins with.
    pub(super) fn end(&self, state: State, out: &mut BitWriter<'_>) {
        out.add(u64::from(state.0 & ((1 << self.log) - 1)), self.log);
    }

    fn step(&self, symbol: u8) -> Step {
        self.symbols.get(usize::from(symbol)).copied().unwrap_or_default()
    }

    #[inline]
    fn follow(&self, state: u32, step: Step) -> u32 {
        let at = state.wrapping_add_signed(step.find) as usize;
        u32::from(self.next.get(at).copied().unwrap_or_default())
    }
}

/// Where an encoder stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct State(u32);

/// The logarithm of `1..=512` to the base 2, in 256ths. Integers only: every machine decides alike.
fn log2(value: u32) -> u64 {
    static TABLE: [u16; 513] = table();
    u64::from(TABLE.get(value as usize).copied().unwrap_or_default())
}

const fn table() -> [u16; 513] {
    let mut table = [0u16; 513];
    let mut value = 1;
    while value < table.len() {
        // The fraction bit by bit: squaring a number in 1..2 doubles its logarithm.
        let whole = value.ilog2();
        let mut number = ((value as u64) << 31) >> whole;
        let (mut log, mut bit) = (whole, 0);
        while bit < 8 {
            number = (number * number) >> 31;
            log <<= 1;
            if number >> 32 != 0 {
                number >>= 1;
                log |= 1;
            }
            bit += 1;
        }
        let [low, high, ..] = log.to_le_bytes();
        table[value] = u16::from_le_bytes([low, high]);
        value += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_right_to_a_256th() {
        for value in 1..=512u32 {
            let wanted = f64::from(value).log2() * 256.0;
            let found = log2(value) as f64;
            assert!(found <= wanted + 1e-6 && wanted - found < 1.0, "{value}: {found} {wanted}");
        }
    }

    #[test]
    fn parts_make_the_whole_and_every_symbol_has_one() {
        for counts in
            [vec![1, 1], vec![1, 1_000_000, 3], vec![5; 53], (1..54).map(|n| n * n * n).collect(), {
                let mut steep = vec![1; 53];
                steep[7] = 100_000;
                steep
            }]
        {
            let total = counts.iter().sum();
            for log in [6, 9] {
                let found = Distribution::of(&counts, total, log).unwrap();
                assert_eq!(found.parts.iter().map(|&part| i32::from(part)).sum::<i32>(), 1 << found.log);
                assert!(found.parts.iter().zip(&counts).all(|(part, count)| (*part > 0) == (*count > 0)));
                assert!(found.cost(&counts).is_some());
            }
        }
        assert_eq!(Distribution::of(&[0, 9, 0], 9, 9), None);
    }
}
