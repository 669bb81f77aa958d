//! Decisions, each coded with a chance that is learned from those before it: a binary arithmetic coder.

use towline_core::{Error, Result};

/// How often a chance has been learned when it stops to change faster.
const MOST_SEEN: usize = 128;
/// What part of the way, in 65536ths, a chance goes to what came up, by how often it has been learned.
const RATES: [u32; MOST_SEEN + 1] = {
    let mut rates = [0; MOST_SEEN + 1];
    let mut seen = 0;
    while seen < rates.len() {
        rates[seen] = (2 << 16) / (2 * seen as u32 + 3);
        seen += 1;
    }
    rates
};
/// A chance stays so far from 0 and 1, in 65536ths.
const LEAST: u32 = 32;
/// A chance of one half.
const HALF: u16 = 1 << 15;
/// What `seen` is until a chance is learned for the first time.
const NEVER: u16 = u16::MAX;

/// The chance that a decision is yes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chance {
    /// In 65536ths.
    yes: u16,
    seen: u16,
}

impl Chance {
    /// One that begins with `yes` in 65536, unless [`near`] finds something better.
    pub(super) const fn new(yes: u16) -> Self {
        Self { yes, seen: NEVER }
    }

    /// A half that has been learned `seen` times, so that it does not run after the first decision.
    pub(super) const fn half(seen: u16) -> Self {
        Self { yes: HALF, seen }
    }

    #[inline(always)]
    fn learn(&mut self, yes: bool) {
        let seen = if self.seen == NEVER { 0 } else { usize::from(self.seen).min(MOST_SEEN) };
        let old = u32::from(self.yes);
        // At most 2^16 × 43691: no overflow.
        let part = |of: u32| (of * RATES[seen]) >> 16;
        let new = if yes { old + part((1 << 16) - old) } else { old - part(old) };
        self.yes = new.clamp(LEAST, (1 << 16) - LEAST) as u16;
        self.seen = (seen + 1).min(MOST_SEEN) as u16;
    }
}

/// The chance at `at`, or the last one. Before it is learned for the first time it becomes that of a neighbour that was: of the one before
/// it or else of the one behind, as if that had been learned once.
#[inline(always)]
pub(super) fn near<const N: usize>(chances: &mut [Chance; N], at: usize) -> &mut Chance {
    let at = at.min(N - 1);
    if chances[at].seen == NEVER {
        let neighbours = [at.checked_sub(1), Some(at + 1)].into_iter().flatten();
        let learned = neighbours.filter_map(|at| chances.get(at)).find(|chance| chance.seen != NEVER);
        if let Some(&Chance { yes, seen }) = learned {
            chances[at] = Chance { yes, seen: seen.min(1) };
        }
    }
    &mut chances[at]
}

/// What decides: an encoder knows the decisions, a decoder reads them. So a model is written once for both.
pub(super) trait Decide {
    /// Takes a decision that is yes with a chance of `chance` in 65536. A decoder does not look at `known`.
    fn with(&mut self, chance: u32, known: bool) -> bool;

    /// As `with`, and the chance learns from it.
    #[inline(always)]
    fn decide(&mut self, chance: &mut Chance, known: bool) -> bool {
        let yes = self.with(u32::from(chance.yes), known);
        chance.learn(yes);
        yes
    }

    /// Takes a decision that is as often yes as no.
    #[inline(always)]
    fn toss(&mut self, known: bool) -> bool {
        self.with(HALF.into(), known)
    }
}

/// Appends decisions to bytes.
pub(super) struct Encoder {
    out: Vec<u8>,
    low: u64,
    range: u64,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { out: Vec::new(), low: 0, range: u64::MAX }
    }
}

impl Encoder {
    #[cold]
    fn carry(&mut self) {
        for byte in self.out.iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                break;
            }
        }
    }

    /// The bytes. Zeros at the end are left out: a decoder reads them anyway.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let low = u128::from(self.low);
        let last = low + u128::from(self.range - 1);
        // The fewest bytes that begin a number between the two.
        let shortest = (0..64).step_by(8).rev().map(|zeros| last >> zeros << zeros).find(|&end| end >= low);
        let end = shortest.unwrap_or(last);
        if end >> 64 != 0 {
            self.carry();
        }
        self.out.extend_from_slice(&(end as u64).to_be_bytes());
        let used = self.out.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        self.out.truncate(used);
        self.out
    }
}

impl Decide for Encoder {
    #[inline(always)]
    fn with(&mut self, chance: u32, known: bool) -> bool {
        let bound = (self.range >> 16) * u64::from(chance);
        if known {
            self.range = bound;
        } else {
            let (low, carry) = self.low.overflowing_add(bound);
            self.low = low;
            self.range -= bound;
            if carry {
                self.carry();
            }
        }
        if self.range >> 32 == 0 {
            self.out.extend_from_slice(&self.low.to_be_bytes()[..4]);
            self.low <<= 32;
            self.range <<= 32;
        }
        known
    }
}

/// Reads decisions.
pub(super) struct Decoder<'a> {
    rest: &'a [u8],
    code: u64,
    range: u64,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self { rest: bytes, code: 0, range: u64::MAX };
        decoder.code = u64::from(decoder.four()) << 32;
        decoder.code |= u64::from(decoder.four());
        decoder
    }

    /// The next 4 bytes, and zeros behind the end.
    fn four(&mut self) -> u32 {
        if let Some((four, rest)) = self.rest.split_first_chunk() {
            self.rest = rest;
            return u32::from_be_bytes(*four);
        }
        let mut four = [0; 4];
        four.iter_mut().zip(std::mem::take(&mut self.rest)).for_each(|(to, from)| *to = *from);
        u32::from_be_bytes(four)
    }

    /// # Errors
    /// `Corrupt` if bytes are left.
    pub(super) fn finish(self) -> Result<()> {
        match self.rest {
            [] => Ok(()),
            rest => Err(Error::corrupt(format!("{} bytes behind its end", rest.len()))),
        }
    }
}

impl Decide for Decoder<'_> {
    #[inline(always)]
    fn with(&mut self, chance: u32, _: bool) -> bool {
        let bound = (self.range >> 16) * u64::from(chance);
        let yes = self.code < bound;
        if yes {
            self.range = bound;
        } else {
            self.code -= bound;
            self.range -= bound;
        }
        if self.range >> 32 == 0 {
            // The code is at most the range, so that nothing is lost.
            self.code = self.code << 32 | u64::from(self.four());
            self.range <<= 32;
        }
        yes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_come_back() {
        for (seed, one_in) in [(1u64, 2), (2, 3), (3, 50), (4, 5000), (5, u64::MAX), (6, 1)] {
            for length in [0, 1, 2, 9, 100, 20_000] {
                let mut state = seed;
                let mut next = move || {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    state >> 33
                };
                let decisions: Vec<bool> = (0..length).map(|_| next() % one_in == 0).collect();
                let mut encoder = Encoder::default();
                let mut chance = Chance::new(20_000);
                for (at, &yes) in decisions.iter().enumerate() {
                    if at % 5 == 0 {
                        encoder.toss(yes);
                    } else {
                        encoder.decide(&mut chance, yes);
                    }
                }
                let bytes = encoder.finish();
                let mut decoder = Decoder::new(&bytes);
                let mut chance = Chance::new(20_000);
                for (at, &yes) in decisions.iter().enumerate() {
                    // A decoder must not look.
                    let read =
                        if at % 5 == 0 { decoder.toss(!yes) } else { decoder.decide(&mut chance, !yes) };
                    assert_eq!(read, yes, "{seed} {length} {at}");
                }
                decoder.finish().unwrap();
                let tosses = length / 5;
                if one_in == u64::MAX {
                    assert!(bytes.len() <= tosses / 8 + 1 + length / 100, "{length}: {} bytes", bytes.len());
                }
            }
        }
    }
}
