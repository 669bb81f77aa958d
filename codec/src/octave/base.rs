//! Blocks without a parent: for each element a token for its high bits, the sign last, entropy-coded, and its low bits
//! as they are.

use towline_core::Result;

use super::bits::{BitReader, BitWriter, low};
use super::classes::{SAMPLE, STRETCH, tally};
use super::dense::{Buffers, COUNT_ORDER, split};
use super::elem::Elem;
use super::rans::{self, Chances};
use super::simd::{Instructions, Isa, Kernel};
use super::tokens::Tokens;

/// The top bits of a base, counted from the window's start, share a token by the number of their bits from here on.
const DIRECT: u64 = 192;
/// Of the tokens of a large block, one in so many is counted.
const COUNTED: usize = 4;
/// The low bits of elements of 16 bits, which have a fast path.
const SEVEN: u32 = 7;
/// The same of 32 bits.
const TWENTY_TWO: u32 = 22;

/// Where a base's top bits begin for elements of `bits`, and how its values are counted.
fn base_form<E: Elem>() -> (u32, Tokens) {
    match E::BITS {
        // Every value is a token.
        8 => (0, Tokens { direct: 256 }),
        // The exponent and the highest bit behind it: values near the end of an octave are rarer.
        16 => (SEVEN, Tokens { direct: DIRECT }),
        bits => (bits - 10, Tokens { direct: DIRECT }),
    }
}

/// Appends the body of a base's block.
#[inline(never)]
pub(super) fn encode<E: Elem>(level: Instructions, new: &[E::Raw], buffers: &mut Buffers, out: &mut Vec<u8>) {
    let (shift, tokens) = base_form::<E>();
    let start = window::<E>(new, shift, tokens);
    let origin = E::narrow(start.checked_shl(shift).unwrap_or(0));
    let high = |raw: &E::Raw| E::load(*raw).sign_last().minus(origin).wide() >> shift;
    buffers.tokens.resize(new.len(), 0);
    level.run(High::<E> { new, origin, shift, tokens: &mut buffers.tokens });
    let mut counts = count(level, &buffers.tokens);
    let direct = tokens.direct.min(256) as usize;
    let far = counts[direct..].iter().any(|&count| count > 0);
    if far {
        counts[direct..].fill(0);
        level.run(ListFar { tokens: &buffers.tokens, direct: direct as u8, list: &mut buffers.far });
        for &at in &buffers.far {
            let token = tokens.of(high(&new[at]));
            buffers.tokens[at] = token;
            counts[usize::from(token)] += 1;
        }
    }
    let one_class = buffers.zeros.take(new.len());
    let chances = [Chances::of(&counts)];
    buffers.encode.fill(chances.iter());
    let stream = rans::encode(level, &buffers.encode, one_class, &buffers.tokens, &mut buffers.words);
    out.reserve(4096 + 2 * stream.words() + new.len() * shift as usize / 8);
    let mut bits = BitWriter::new(out);
    bits.put(start, 16);
    chances[0].write(&mut bits);
    bits.exp_golomb(stream.words() as u64, COUNT_ORDER);
    bits.finish();
    stream.write(out);
    level.run(Pack::<E> { new, shift, out });
    if far {
        let mut bits = BitWriter::new(out);
        for &at in &buffers.far {
            let extra = tokens.extra_bits(buffers.tokens[at]);
            bits.put_wide(tokens.extra(high(&new[at]), extra), extra);
        }
        bits.finish();
    }
}

/// How often each token comes up: about, from a part of them, but none that comes up is missing.
#[inline(never)]
fn count(level: Instructions, tokens: &[u8]) -> [u32; 256] {
    let every = if tokens.len() < SAMPLE { 1 } else { COUNTED };
    let mut counts = tally(level, tokens.chunks(STRETCH).step_by(every));
    if every > 1 {
        let seen = counts.map(|count| u8::from(count > 0));
        counts.iter_mut().for_each(|count| *count *= every as u32);
        level.run(CountUnseen { tokens, seen: &seen, counts: &mut counts });
    }
    counts
}

/// Counts the tokens that were not seen in a part.
struct CountUnseen<'a> {
    tokens: &'a [u8],
    seen: &'a [u8; 256],
    counts: &'a mut [u32; 256],
}

impl Kernel for CountUnseen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (chunks, rest) = self.tokens.as_chunks::<64>();
        for tokens in chunks {
            let mut unseen = !isa.nonzero(&isa.look_up(self.seen, tokens));
            while unseen != 0 {
                self.counts[usize::from(tokens[unseen.trailing_zeros() as usize % 64])] += 1;
                unseen &= unseen - 1;
            }
        }
        for &token in rest.iter().filter(|&&token| self.seen[usize::from(token)] == 0) {
            self.counts[usize::from(token)] += 1;
        }
    }
}

/// Makes `list` the places of tokens that are at least `direct`. There are few.
struct ListFar<'a> {
    tokens: &'a [u8],
    direct: u8,
    list: &'a mut Vec<usize>,
}

impl Kernel for ListFar<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        self.list.clear();
        let (chunks, rest) = self.tokens.as_chunks::<64>();
        for (index, tokens) in chunks.iter().enumerate() {
            let mut far = [0; 64];
            for (far, &token) in far.iter_mut().zip(tokens) {
                *far = u8::from(token >= self.direct);
            }
            let mut far = isa.nonzero(&far);
            while far != 0 {
                self.list.push(index * 64 + far.trailing_zeros() as usize);
                far &= far - 1;
            }
        }
        for (at, &token) in (chunks.len() * 64..).zip(rest) {
            if token >= self.direct {
                self.list.push(at);
            }
        }
    }
}

/// The start of the run of values that holds the most of a sample.
#[inline(never)]
fn window<E: Elem>(new: &[E::Raw], shift: u32, tokens: Tokens) -> u64 {
    if E::BITS == 8 {
        return 0;
    }
    // By the key, which is the values' upper part.
    let below = E::BITS - 8 - shift;
    let length = (tokens.direct >> below) as usize;
    let mut keys = [0u32; 256];
    let stretches = new.chunks(STRETCH).step_by((new.len() / SAMPLE).max(1));
    stretches.flatten().for_each(|&raw| keys[usize::from(E::load(raw).key())] += 1);
    let mut inside: u32 = keys[..length].iter().sum();
    let (mut best, mut most) = (0, inside);
    for start in 1..=256 - length {
        inside = inside + keys[start + length - 1] - keys[start - 1];
        if inside > most {
            (best, most) = (start, inside);
        }
    }
    // Only what has a token needs one: begin at the first key that is there.
    let first = keys[best..best + length].iter().position(|&count| count > 0).unwrap_or(0);
    ((best + first) as u64) << below
}

/// Sets each token to the element's high bits, the sign last, at most 255.
struct High<'a, E: Elem> {
    new: &'a [E::Raw],
    origin: E,
    shift: u32,
    tokens: &'a mut [u8],
}

impl<E: Elem> Kernel for High<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        for (token, &raw) in self.tokens.iter_mut().zip(self.new) {
            *token = E::load(raw).sign_last().minus(self.origin).shifted(self.shift).at_most_255();
        }
    }
}

/// Appends the low `shift` bits of each element, the sign last.
struct Pack<'a, E: Elem> {
    new: &'a [E::Raw],
    shift: u32,
    out: &'a mut Vec<u8>,
}

impl<E: Elem> Kernel for Pack<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { new, shift, out } = self;
        let mut rest = new;
        if shift == SEVEN {
            let (chunks, behind) = new.as_chunks::<512>();
            for chunk in chunks {
                let mut bytes = [0; 512];
                for (byte, &raw) in bytes.iter_mut().zip(chunk) {
                    *byte = E::load(raw).sign_last().wide() as u8;
                }
                // Each write takes one byte more than it needs.
                let mut packed = [0; 449];
                for (at, eight) in bytes.as_chunks::<8>().0.iter().enumerate() {
                    if let Some(place) = packed[at * 7..].first_chunk_mut() {
                        *place = isa.seven_of_eight(u64::from_le_bytes(*eight)).to_le_bytes();
                    }
                }
                out.extend_from_slice(&packed[..448]);
            }
            rest = behind;
        }
        let mut writer = BitWriter::new(out);
        rest.iter().for_each(|&raw| writer.put_wide(E::load(raw).sign_last().wide() & low(shift), shift));
        writer.finish();
    }
}

/// Sets each element to its token's value above its low bits from `packed`.
struct Unpack<'a, E: Elem> {
    tokens: &'a [u8],
    origin: E,
    shift: u32,
    packed: &'a [u8],
    target: &'a mut [E::Raw],
}

impl<E: Elem> Kernel for Unpack<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { tokens, origin, shift, packed, target } = self;
        let join = |token: u8, bits: u64| {
            let high = E::narrow(u64::from(token)).lifted(shift);
            high.plus(E::narrow(bits)).plus(origin).sign_first().store()
        };
        let mut done = 0;
        if shift == SEVEN {
            let chunks = target.as_chunks_mut::<64>().0.iter_mut().zip(tokens.as_chunks::<64>().0);
            for (target, tokens) in chunks {
                // The last of eight reads takes one byte more than it needs.
                let Some(packed) = packed.get(done / 8 * 7..).and_then(|rest| rest.first_chunk::<57>())
                else {
                    break;
                };
                let mut bytes = [0; 64];
                for (at, eight) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    if let Some(bits) = packed[at * 7..].first_chunk() {
                        *eight = isa.eight_of_seven(u64::from_le_bytes(*bits)).to_le_bytes();
                    }
                }
                for ((raw, &token), byte) in target.iter_mut().zip(tokens).zip(bytes) {
                    *raw = join(token, u64::from(byte));
                }
                done += 64;
            }
        }
        if shift == TWENTY_TWO {
            // Eight elements fill so many bytes, and the bits of each lie in four that are read at once.
            const BYTES: usize = TWENTY_TWO as usize;
            let eights = target.as_chunks_mut::<8>().0.iter_mut().zip(tokens.as_chunks::<8>().0);
            for (target, tokens) in eights {
                let Some(packed) =
                    packed.get(done * BYTES / 8..).and_then(|rest| rest.first_chunk::<BYTES>())
                else {
                    break;
                };
                for at in 0..8 {
                    let bit = (at * BYTES).min((BYTES - 4) * 8);
                    let four = packed[bit / 8..].first_chunk().map_or(0, |four| u32::from_le_bytes(*four));
                    let bits = four >> (at * BYTES - bit / 8 * 8) & low(TWENTY_TWO) as u32;
                    target[at] = join(tokens[at], u64::from(bits));
                }
                done += 8;
            }
        }
        let mut reader = BitReader::new(packed.get(done / 8 * shift as usize..).unwrap_or_default());
        for (raw, &token) in target.iter_mut().zip(tokens).skip(done) {
            *raw = join(token, reader.take_wide(shift));
        }
    }
}

/// Fills `target` from the body of a base's block.
#[inline(never)]
pub(super) fn decode<E: Elem>(
    level: Instructions,
    body: &[u8],
    target: &mut [E::Raw],
    buffers: &mut Buffers,
) -> Result<()> {
    let (shift, tokens) = base_form::<E>();
    let mut bits = BitReader::new(body);
    let start = bits.take(16);
    let chances = [Chances::read(&mut bits)?];
    let words = bits.exp_golomb(COUNT_ORDER)?;
    let (stream, rest) = split(bits.rest()?, rans::stream_len(target.len(), words))?;
    let packed = (target.len() as u64 * u64::from(shift)).div_ceil(8);
    let (packed, far) = split(rest, usize::try_from(packed).ok())?;
    let one_class = buffers.zeros.take(target.len());
    buffers.tokens.resize(target.len(), 0);
    buffers.decode.fill(&chances);
    rans::decode(level, &buffers.decode, one_class, &mut buffers.tokens, stream)?;
    let origin = E::narrow(start.checked_shl(shift).unwrap_or(0));
    level.run(Unpack::<E> { tokens: &buffers.tokens, origin, shift, packed, target });
    let mut extra = BitReader::new(far);
    if chances[0].reaches(tokens.direct as usize) {
        let list = &mut buffers.far;
        level.run(ListFar { tokens: &buffers.tokens, direct: tokens.direct as u8, list });
        for &at in &buffers.far {
            let token = buffers.tokens[at];
            let bits = tokens.extra_bits(token).min(64);
            let value = tokens.value(bits, extra.take_wide(bits));
            // What the token was taken for is replaced by what it stands for.
            let wrong = E::narrow(u64::from(token) << shift);
            let right = E::narrow(value.checked_shl(shift).unwrap_or(0));
            let raw = &mut target[at];
            *raw = E::load(*raw).sign_last().minus(wrong).plus(right).sign_first().store();
        }
    }
    extra.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rare_tokens_are_counted_wherever_they_stand() {
        let mut tokens: Vec<u8> = (0..2 * SAMPLE + STRETCH + 13).map(|at| (at % 7) as u8).collect();
        let (behind_the_part, last) = (STRETCH + 5, tokens.len() - 1);
        (tokens[behind_the_part], tokens[last]) = (200, 255);
        for level in Instructions::ALL {
            let counts = count(level, &tokens);
            assert_eq!((counts[200], counts[255], counts[9]), (1, 1, 0), "{level:?}");
            assert!(counts[3].abs_diff(tokens.len() as u32 / 7) < 300, "{}", counts[3]);
        }
    }
}
