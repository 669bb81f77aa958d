//! Decodes the two entropy codes of zstd. `None` stands for whatever is not quite as an encoder writes it: the
//! library then decides what it is.

use super::fse::Distribution;
use super::read_bits::BackwardBits;

/// The longest code of a literal.
const MAX_BITS: u32 = 11;

/// What each state of a finite state decoder means.
#[derive(Clone)]
pub(super) struct States {
    /// Symbol, bits to the next state, lowest next state.
    states: [(u8, u8, u16); 1 << 9],
    log: u32,
}

impl States {
    pub(super) fn of(distribution: &Distribution) -> Self {
        let (spread, log) = (distribution.spread(), distribution.log());
        let size = 1u32 << log;
        let mut next = distribution.sizes();
        let mut states = [(0, 0, 0); 1 << 9];
        for (state, &symbol) in states.iter_mut().zip(&spread).take(size as usize) {
            let Some(next) = next.get_mut(usize::from(symbol)) else { continue };
            let bits = log - next.ilog2();
            let base = (*next << bits) - size;
            *state = (symbol, bits.to_le_bytes()[0], u16::try_from(base).unwrap_or_default());
            *next += 1;
        }
        Self { states, log }
    }

    /// One symbol for ever.
    pub(super) fn one(symbol: u8) -> Self {
        let mut states = [(0, 0, 0); 1 << 9];
        states[0] = (symbol, 0, 0);
        Self { states, log: 0 }
    }

    pub(super) fn begin(&self, bits: &mut BackwardBits<'_>) -> usize {
        bits.take(self.log) as usize
    }

    #[inline]
    pub(super) fn symbol(&self, state: usize) -> u8 {
        self.states[state % (1 << 9)].0
    }

    #[inline]
    pub(super) fn next(&self, state: usize, bits: &mut BackwardBits<'_>) -> usize {
        let (_, count, base) = self.states[state % (1 << 9)];
        usize::from(base) + bits.take(count.into()) as usize
    }
}

/// A table that turns the next bits into a literal.
#[derive(Clone)]
pub(super) struct Literals {
    /// Literal, and the bits that it takes.
    table: [(u8, u8); 1 << MAX_BITS],
    bits: u32,
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
        let mut table = [(0, 0); 1 << MAX_BITS];
        let mut at = 0;
        for weight in 1..=MAX_BITS.to_le_bytes()[0] {
            for (literal, _) in (0u8..=255).zip(&weights).filter(|(_, other)| **other == weight) {
                let end = at + size(weight) as usize;
                let length = bits.to_le_bytes()[0] + 1 - weight;
                table.get_mut(at..end)?.fill((literal, length));
                at = end;
            }
        }
        Some((Box::new(Self { table, bits }), 1 + length))
    }

    /// Decodes one stream that holds just `literals.len()` literals.
    pub(super) fn decode(&self, stream: &[u8], literals: &mut [u8]) -> Option<()> {
        self.finish(BackwardBits::new(stream)?, literals)
    }

    /// Decodes four streams behind their jump table.
    pub(super) fn decode_four(&self, streams: &[u8], literals: &mut [u8]) -> Option<()> {
        let (jumps, mut rest) = streams.split_first_chunk::<6>()?;
        let mut take = |length: usize| {
            let (now, later) = rest.split_at_checked(length)?;
            rest = later;
            BackwardBits::new(now)
        };
        let [a, b, c, d, e, f] = jumps.map(usize::from);
        let mut bits = [take(a | b << 8)?, take(c | d << 8)?, take(e | f << 8)?, BackwardBits::new(rest)?];
        let quarter = literals.len().div_ceil(4);
        let (first, rest) = literals.split_at_mut_checked(quarter)?;
        let (second, rest) = rest.split_at_mut_checked(quarter)?;
        let (third, fourth) = rest.split_at_mut_checked(quarter)?;
        // Side by side, because no stream has to wait for another one.
        let mut groups = [first, second, third, fourth].map(|literals| literals.as_chunks_mut::<5>());
        let together = groups.iter().map(|(groups, _)| groups.len()).min()?;
        for group in 0..together {
            for ((groups, _), bits) in groups.iter_mut().zip(&mut bits) {
                bits.refill()?;
                for literal in groups.get_mut(group)? {
                    *literal = self.literal(bits);
                }
            }
        }
        for ((groups, tail), mut bits) in groups.into_iter().zip(bits) {
            for group in groups.get_mut(together..)? {
                bits.refill()?;
                for literal in group {
                    *literal = self.literal(&mut bits);
                }
            }
            bits.refill()?;
            self.finish(bits, tail)?;
        }
        Some(())
    }

    fn finish(&self, mut bits: BackwardBits<'_>, literals: &mut [u8]) -> Option<()> {
        for group in literals.chunks_mut(5) {
            bits.refill()?;
            for literal in group {
                *literal = self.literal(&mut bits);
            }
        }
        bits.is_done().then_some(())
    }

    #[inline]
    fn literal(&self, bits: &mut BackwardBits<'_>) -> u8 {
        let (literal, count) = self.table[bits.peek(self.bits) as usize % (1 << MAX_BITS)];
        bits.skip(count.into());
        literal
    }
}

/// Weights behind the header of their distribution, two states taking turns until the bits end.
fn unpack_weights(bytes: &[u8], weights: &mut [u8; 256]) -> Option<usize> {
    let (distribution, head) = Distribution::read(bytes, 12, 6)?;
    let states = States::of(&distribution);
    let mut bits = BackwardBits::new(bytes.get(head..)?)?;
    let mut now = states.begin(&mut bits);
    let mut later = states.begin(&mut bits);
    // One place stays free for the last weight.
    for count in 0..254 {
        *weights.get_mut(count)? = states.symbol(now);
        bits.refill()?;
        let next = states.next(now, &mut bits);
        if bits.refill().is_none() {
            *weights.get_mut(count + 1)? = states.symbol(later);
            return Some(count + 2);
        }
        now = std::mem::replace(&mut later, next);
    }
    None
}
