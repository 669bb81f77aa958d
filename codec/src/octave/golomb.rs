//! Golomb codes whose divisor is a power of two or one and a half of it: numbers that fall off geometrically.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter, low, too_large};

/// The longest unary part of a code. What is above goes into an Exp-Golomb code behind it.
const MAX_UNARY: u32 = 24;
/// The order of that Exp-Golomb code.
const TAIL_ORDER: u32 = 4;
/// The most low bits that stand as they are, so that a code without tail fits one read.
pub(super) const MAX_SHIFT: u32 = 31;
/// The order of the largest divisor, 3 × 2^30.
const MAX_ORDER: u32 = 2 * MAX_SHIFT;
/// The bits of a remainder's third, in the order in which they are read, and how many they are.
const THIRDS: [(u64, u32); 3] = [(0b0, 1), (0b01, 2), (0b11, 2)];

/// A divisor: 1, 2, 3, 4, 6, 8, 12, 16 … A number's quotient is written in unary, then the remainder.
///
/// Next to Rice codes, whose divisors are powers of two, the ones between save about 0.3 % of a sparse delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Golomb {
    shift: u32,
    /// Whether the divisor is 3 × 2^shift, otherwise 2^shift.
    thirds: bool,
}

impl Golomb {
    /// The divisor at place `order` of the list above.
    pub(super) fn new(order: u64) -> Result<Self> {
        match u32::try_from(order) {
            Ok(order) if order <= MAX_ORDER => {
                let thirds = order > 0 && order % 2 == 0;
                Ok(Self { shift: if thirds { order / 2 - 1 } else { order.div_ceil(2) }, thirds })
            }
            _ => {
                Err(Error::corrupt(format!("a divisor has order {}, above {MAX_ORDER}", order.cast_signed())))
            }
        }
    }

    pub(super) fn order(self) -> u32 {
        if self.thirds { 2 * self.shift + 2 } else { (2 * self.shift).saturating_sub(1) }
    }

    /// This divisor, if it is three times a power of two.
    #[inline(always)]
    pub(super) fn thirds(self) -> Option<Self> {
        self.thirds.then_some(Self { thirds: true, ..self })
    }

    /// This divisor, which is a power of two.
    #[inline(always)]
    pub(super) fn whole(self) -> Self {
        Self { thirds: false, ..self }
    }

    /// The best divisor for `count` numbers, of which zeros may be left out, and about the bits that they take.
    #[inline(always)]
    pub(super) fn best(count: usize, numbers: &(impl Iterator<Item = u64> + Clone)) -> (Self, u64) {
        Self::best_of_sum(count, numbers.clone().map(Self::bounded).sum(), numbers)
    }

    /// What a number adds to the sum that chooses a divisor: a few wild ones go into tails and must not decide.
    #[inline(always)]
    pub(super) fn bounded(number: u64) -> u64 {
        number.min(1 << 32)
    }

    /// As `best`, for numbers whose `sum` is known.
    #[inline(always)]
    pub(super) fn best_of_sum(
        count: usize,
        sum: u64,
        numbers: &(impl Iterator<Item = u64> + Clone),
    ) -> (Self, u64) {
        let count = count as u64;
        // Of numbers that fall off geometrically the best is about ln 2 times the mean: one of its two neighbours.
        let ideal = (sum / count.max(1) * 709 + 709 / 2) >> 10;
        let power = ideal.max(1).ilog2().min(MAX_SHIFT - 1);
        let above_thirds = power > 0 && ideal >= 3 << (power - 1);
        let whole = Self { shift: power + u32::from(above_thirds || power == 0), thirds: false };
        let other = match power {
            0 => Self { shift: 0, thirds: false },
            _ => Self { shift: power - 1, thirds: true },
        };
        let (mut heads, mut heads_other) = (0, 0);
        for number in numbers.clone() {
            heads += (number >> whole.shift).min(64);
            heads_other += other.head(number.min(u64::from(u32::MAX))).min(64);
        }
        let cost = count * u64::from(1 + whole.shift) + heads;
        let cost_other = count * u64::from(1 + other.shift + u32::from(other.thirds)) + heads_other;
        if cost_other <= cost { (other, cost_other) } else { (whole, cost) }
    }

    /// The bits of the code of a number below 2^32 above the least that a code has.
    #[inline(always)]
    fn head(self, number: u64) -> u64 {
        let top = number >> self.shift;
        if self.thirds {
            // Division by 3, exact below 2^32.
            let head = (top * 0xaaaa_aaab) >> 33;
            head + u64::from(top != 3 * head)
        } else {
            top
        }
    }

    /// As [`Golomb::split`] of a number below 2^32; of others anything.
    #[inline(always)]
    fn split_short(self, number: u64) -> (u64, u64, u64) {
        let (top, bottom) = (number >> self.shift, number & low(self.shift));
        if self.thirds {
            // Division by 3, exact below 2^32.
            let head = top.wrapping_mul(0xaaaa_aaab) >> 33;
            let third = top.wrapping_sub(3 * head);
            let length = 1 + third.min(1);
            (head, bottom << length | third.wrapping_add(third >> 1), length + u64::from(self.shift))
        } else {
            (top, bottom, self.shift.into())
        }
    }

    /// The quotient, the bits of the remainder, and how many they are.
    #[inline(always)]
    fn split(self, number: u64) -> (u64, u64, u32) {
        let (top, bottom) = (number >> self.shift, number & low(self.shift));
        if self.thirds {
            let (bits, length) = THIRDS[(top % 3) as usize];
            (top / 3, bottom << length | bits, length + self.shift)
        } else {
            (top, bottom, self.shift)
        }
    }
}

impl BitWriter<'_> {
    #[inline]
    pub(super) fn golomb(&mut self, number: u64, divisor: Golomb) {
        let (head, rest, length) = divisor.split(number);
        if head < u64::from(MAX_UNARY) {
            // At most 24 + 1 + 33 bits.
            self.put_wide((1 | rest << 1) << head, head as u32 + 1 + length);
        } else {
            self.put(1 << MAX_UNARY, MAX_UNARY + 1);
            self.exp_golomb(head - u64::from(MAX_UNARY), TAIL_ORDER);
            self.put_wide(rest, length);
        }
    }

    /// A code for each number. Faster than one by one.
    #[inline(always)]
    pub(super) fn golomb_each(&mut self, numbers: impl Iterator<Item = u64>, divisor: Golomb) {
        // The compiler makes a loop of each.
        match divisor.thirds() {
            Some(divisor) => self.golomb_loop(numbers, divisor),
            None => self.golomb_loop(numbers, divisor.whole()),
        }
    }

    #[inline(always)]
    fn golomb_loop(&mut self, mut numbers: impl Iterator<Item = u64>, divisor: Golomb) {
        const AT_ONCE: usize = 64;
        // Codes have at most 24 + 31 bits, so that they fit behind 7 bits, and are written 8 bytes at a time.
        let mut room = [0; 7 * AT_ONCE + 8];
        let (mut pending, mut fill) = self.take_bytes();
        loop {
            let mut some = [0; AT_ONCE];
            let mut count = 0;
            for (place, number) in some.iter_mut().zip(numbers.by_ref()) {
                *place = number;
                count += 1;
            }
            if count == 0 {
                break;
            }
            // Without branches the compiler does eight at once.
            let (mut codes, mut lengths, mut all, mut longest) = ([0; AT_ONCE], [0; AT_ONCE], 0, 0);
            for ((&number, code), length) in some.iter().zip(&mut codes).zip(&mut lengths) {
                let (head, rest, bits) = divisor.split_short(number);
                *code = (1 | rest << 1) << (head & 63);
                *length = head.wrapping_add(1 + bits);
                all |= number;
                longest = head.max(longest);
            }
            if longest >= u64::from(MAX_UNARY) || all >> 32 != 0 || divisor.shift > MAX_SHIFT - 2 {
                self.set_pending(pending, fill);
                some[..count].iter().for_each(|&number| self.golomb(number, divisor));
                (pending, fill) = self.take_bytes();
                continue;
            }
            let mut used = 0;
            for (code, length) in codes.into_iter().zip(lengths).take(count) {
                pending |= code << fill;
                fill += length as u32;
                if let Some(place) = room[used..].first_chunk_mut() {
                    *place = pending.to_le_bytes();
                }
                used += (fill >> 3) as usize;
                pending >>= fill & 56;
                fill &= 7;
            }
            self.append(&room[..used]);
        }
        self.set_pending(pending, fill);
    }
}

impl BitReader<'_> {
    #[inline]
    pub(super) fn golomb(&mut self, divisor: Golomb) -> Result<u64> {
        let word = self.peek();
        let mut head = u64::from(word.trailing_zeros());
        if head >= u64::from(MAX_UNARY) {
            return self.golomb_tail(head, divisor);
        }
        let rest = word >> (head + 1);
        let (mut taken, mut shifted) = (head as u32 + 1 + divisor.shift, rest);
        if divisor.thirds {
            let (first, second) = (rest & 1, rest >> 1 & rest & 1);
            head = head * 3 + first + second;
            taken += 1 + first as u32;
            shifted = rest >> (1 + first);
        }
        self.skip(taken);
        Ok(head << divisor.shift | shifted & low(divisor.shift))
    }

    #[cold]
    fn golomb_tail(&mut self, head: u64, divisor: Golomb) -> Result<u64> {
        if head != u64::from(MAX_UNARY) {
            return Err(Error::corrupt("a code has no end"));
        }
        self.skip(MAX_UNARY + 1);
        let mut head = u128::from(self.exp_golomb(TAIL_ORDER)?) + u128::from(MAX_UNARY);
        if divisor.thirds {
            head *= 3;
            if self.take(1) == 1 {
                head += 1 + u128::from(self.take(1));
            }
        }
        let number = head << divisor.shift | u128::from(self.take_wide(divisor.shift));
        u64::try_from(number).map_err(|_| too_large())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divisors() {
        let divisor = |order| {
            let Golomb { shift, thirds } = Golomb::new(order).unwrap();
            if thirds { 3u64 << shift } else { 1 << shift }
        };
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(divisor), [1, 2, 3, 4, 6, 8, 12, 16]);
        assert_eq!(divisor(u64::from(MAX_ORDER)), 3 << 30);
        for order in 0..=MAX_ORDER {
            assert_eq!(Golomb::new(u64::from(order)).unwrap().order(), order);
        }
        assert!(Golomb::new(u64::from(MAX_ORDER) + 1).is_err());
    }

    #[test]
    fn numbers_come_back() {
        let mut numbers: Vec<u64> =
            (0..70).chain([255, 256, 1 << 20, u64::MAX >> 1, u64::MAX - 1, u64::MAX]).collect();
        numbers.extend((0..64).map(|shift| 1 << shift));
        for order in 0..=u64::from(MAX_ORDER) {
            let divisor = Golomb::new(order).unwrap();
            let mut out = vec![9];
            let mut writer = BitWriter::new(&mut out);
            writer.golomb_each(numbers.iter().copied(), divisor);
            numbers.iter().for_each(|&number| writer.golomb(number, divisor));
            writer.finish();
            let mut reader = BitReader::new(&out[1..]);
            for &number in numbers.iter().chain(&numbers) {
                assert_eq!(reader.golomb(divisor).unwrap(), number, "order {order}");
            }
            reader.finish().unwrap();
            for length in 1..out.len() {
                let mut reader = BitReader::new(&out[1..length]);
                let all = (0..2 * numbers.len()).try_for_each(|_| reader.golomb(divisor).map(drop));
                assert!(all.and_then(|()| reader.finish()).is_err(), "{length}");
            }
        }
    }

    #[test]
    fn the_best_divisor_is_the_best_of_all() {
        for mean in [0.2, 0.7, 1.0, 2.0, 3.5, 5.0, 8.0, 11.0, 16.0, 24.0, 100.0, 1e6] {
            let numbers = (0..1000).map(|at| (-f64::ln((f64::from(at) + 0.5) / 1000.0) * mean) as u64);
            let bits = |divisor| {
                let mut out = Vec::new();
                let mut writer = BitWriter::new(&mut out);
                writer.golomb_each(numbers.clone(), divisor);
                writer.finish();
                out.len() as u64 * 8
            };
            let (best, cost) = Golomb::best(1000, &numbers);
            assert!(bits(best).abs_diff(cost) < 8, "{mean}: {best:?} {cost}");
            let all = (0..=u64::from(MAX_ORDER)).map(|order| bits(Golomb::new(order).unwrap()));
            assert_eq!(bits(best), all.min().unwrap(), "{mean}: {best:?}");
        }
    }
}
