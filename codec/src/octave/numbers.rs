//! The gaps and the magnitudes of a class: numbers of which most are small.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter, low};
use super::golomb::{Golomb, MAX_SHIFT};
use super::tokens::Tokens;

/// The order of the Exp-Golomb code for the numbers listed.
const LISTED_ORDER: u32 = 3;
/// About the bits by which the header of a list is longer than that of other forms.
const LISTED_BITS: u64 = 10;
/// Magnitudes less 1 from here on share a token by the number of their bits.
pub(super) const MAGNITUDE_TOKENS: Tokens = Tokens { direct: 24 };

/// How the gaps or the magnitudes (less 1) of a class are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Numbers {
    /// All are 0.
    #[default]
    Zero,
    /// A Golomb code for each.
    Each(Golomb),
    /// Those above 0 are listed: their count, the divisors of the numbers of zeros before them and of their values.
    Listed { count: usize, zeros: Golomb, value: Golomb },
    /// As many bits for each.
    Fixed { bits: u32 },
    /// A token for each, entropy-coded apart, and its low bits.
    Coded { shift: u32 },
}

/// The best form without a table for `count` numbers, and about the bits that it takes. `numbers` may leave out zeros;
/// `above` gives those that are not 0 with their index.
#[inline(always)]
pub(super) fn best(
    count: usize,
    numbers: &(impl Iterator<Item = u64> + Clone),
    above: impl Iterator<Item = (u32, u64)> + Clone,
) -> (Numbers, u64) {
    let (mut some, mut sum, mut all) = (0, 0, 0);
    for number in numbers.clone() {
        some += usize::from(number > 0);
        sum += Golomb::bounded(number);
        all |= number;
    }
    if some == 0 {
        return (Numbers::Zero, 0);
    }
    let (divisor, each) = Golomb::best_of_sum(count, sum, numbers);
    let mut best = (Numbers::Each(divisor), each);
    if some * 2 < count {
        let (zeros, places) = Golomb::best(some, &runs(above.clone()).map(|(run, _)| run));
        let (value, values) = Golomb::best(some, &above.map(|(_, number)| number - 1));
        if places + values + LISTED_BITS < best.1 {
            best = (Numbers::Listed { count: some, zeros, value }, places + values + LISTED_BITS);
        }
    } else {
        let bits = 64 - all.leading_zeros();
        let fixed = u64::from(bits) * count as u64;
        if bits <= MAX_SHIFT && fixed < best.1 {
            best = (Numbers::Fixed { bits }, fixed);
        }
    }
    best
}

/// The zeros before each number.
#[inline(always)]
fn runs(above: impl Iterator<Item = (u32, u64)> + Clone) -> impl Iterator<Item = (u64, u64)> + Clone {
    let mut next = 0;
    above.map(move |(index, number)| {
        let run = index - next;
        next = index + 1;
        (u64::from(run), number)
    })
}

impl Numbers {
    /// What a reader has to know. Gaps are never coded.
    pub(super) fn write(self, bits: &mut BitWriter<'_>, coded: bool) {
        match self {
            Self::Zero => bits.put(0, 1),
            Self::Listed { count, zeros, value } => {
                bits.put(1, 2);
                bits.exp_golomb(count as u64, LISTED_ORDER);
                bits.exp_golomb(u64::from(zeros.order()), 2);
                bits.exp_golomb(u64::from(value.order()), 1);
            }
            Self::Each(divisor) => {
                bits.put(0b0011, 3 + u32::from(coded));
                bits.exp_golomb(u64::from(divisor.order()), 2);
            }
            Self::Fixed { bits: count } => {
                bits.put(0b0111, 3 + u32::from(coded));
                bits.exp_golomb(u64::from(count), 1);
            }
            Self::Coded { shift } => {
                bits.put(0b1011, 4);
                bits.exp_golomb(u64::from(shift), 1);
            }
        }
    }

    pub(super) fn read(bits: &mut BitReader<'_>, coded: bool, numbers: u64) -> Result<Self> {
        if bits.take(1) == 0 {
            return Ok(Self::Zero);
        }
        if bits.take(1) == 0 {
            let count = bits.exp_golomb(LISTED_ORDER)?;
            if count > numbers {
                return Err(Error::corrupt(format!("{count} of {numbers} numbers are listed")));
            }
            return Ok(Self::Listed {
                count: count as usize,
                zeros: Golomb::new(bits.exp_golomb(2)?)?,
                value: Golomb::new(bits.exp_golomb(1)?)?,
            });
        }
        let form = bits.take(1 + u32::from(coded));
        if form == 0 {
            return Ok(Self::Each(Golomb::new(bits.exp_golomb(2)?)?));
        }
        let length = bits.exp_golomb(1)?;
        let length = u32::try_from(length).ok().filter(|&length| length <= MAX_SHIFT).ok_or_else(|| {
            Error::corrupt(format!("numbers of {} bits, above {MAX_SHIFT}", length.cast_signed()))
        })?;
        match form {
            1 => Ok(Self::Fixed { bits: length }),
            2 => Ok(Self::Coded { shift: length }),
            _ => Err(Error::corrupt("a form of numbers is unknown")),
        }
    }
}

/// Writes numbers; `above` gives those that are not 0 with their index.
#[inline(always)]
pub(super) fn write_numbers(
    form: Numbers,
    numbers: impl Iterator<Item = u64>,
    above: impl Iterator<Item = (u32, u64)> + Clone,
    bits: &mut BitWriter<'_>,
) {
    match form {
        Numbers::Zero => {}
        Numbers::Each(divisor) => bits.golomb_each(numbers, divisor),
        Numbers::Fixed { bits: count } => numbers.for_each(|number| bits.put(number, count)),
        Numbers::Listed { zeros, value, .. } => runs(above).for_each(|(run, number)| {
            bits.golomb(run, zeros);
            bits.golomb(number - 1, value);
        }),
        // Only a few have bits behind their tokens.
        Numbers::Coded { shift: 0 } => {
            let far = above.filter(|(_, number)| *number >= MAGNITUDE_TOKENS.direct);
            far.for_each(|(_, number)| {
                let extra = MAGNITUDE_TOKENS.extra_bits(MAGNITUDE_TOKENS.of(number));
                bits.put_wide(MAGNITUDE_TOKENS.extra(number, extra), extra);
            });
        }
        Numbers::Coded { shift } => numbers.for_each(|number| {
            let extra = MAGNITUDE_TOKENS.extra_bits(MAGNITUDE_TOKENS.of(number >> shift));
            bits.put_wide(number & low(shift), shift);
            bits.put_wide(MAGNITUDE_TOKENS.extra(number >> shift, extra), extra);
        }),
    }
}

/// Reads `count` numbers and gives each with its index to `take`.
#[inline(always)]
pub(super) fn read_numbers(
    form: Numbers,
    bits: &mut BitReader<'_>,
    count: usize,
    tokens: &mut std::slice::Iter<'_, u8>,
    mut take: impl FnMut(usize, u64) -> Result<()>,
) -> Result<()> {
    match form {
        Numbers::Zero => (0..count).try_for_each(|index| take(index, 0)),
        Numbers::Each(divisor) => {
            // The compiler makes a loop of each.
            if let Some(divisor) = divisor.thirds() {
                (0..count).try_for_each(|index| take(index, bits.golomb(divisor)?))
            } else {
                (0..count).try_for_each(|index| take(index, bits.golomb(divisor.whole())?))
            }
        }
        Numbers::Fixed { bits: length } => (0..count).try_for_each(|index| take(index, bits.take(length))),
        Numbers::Listed { count: listed, zeros, value } => {
            let mut done = 0;
            for _ in 0..listed {
                let run = bits.golomb(zeros)?;
                if run >= (count - done) as u64 {
                    return Err(Error::corrupt("a number is listed behind the last one"));
                }
                let index = done + run as usize;
                (done..index).try_for_each(|index| take(index, 0))?;
                take(index, bits.golomb(value)?.saturating_add(1))?;
                done = index + 1;
            }
            (done..count).try_for_each(|index| take(index, 0))
        }
        Numbers::Coded { shift } => (0..count).zip(tokens.by_ref()).try_for_each(|(index, &token)| {
            if shift == 0 && u64::from(token) < MAGNITUDE_TOKENS.direct {
                return take(index, token.into());
            }
            let bottom = bits.take(shift);
            let extra = bits.take_wide(MAGNITUDE_TOKENS.extra_bits(token).min(64));
            let top = MAGNITUDE_TOKENS.any_value(token, extra).checked_shl(shift).unwrap_or(0);
            take(index, top | bottom)
        }),
    }
}
