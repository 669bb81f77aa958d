//! Blocks of which most elements change, and blocks without a parent: for each element a token for the high bits of
//! what is left to say, entropy-coded by the class of the old value, and its low bits as they are.
//!
//! What is left to say is the step from the old to the new bits, the sign last; without a parent, the new bits
//! themselves, the sign last. A class's shift says how many low bits carry no information worth a token.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter, low};
use super::classes::{Census, Classes, MAX};
use super::elem::Elem;
use super::rans::{self, Chances, DecodeTable, EncodeTable, Words};
use super::simd::{Instructions, Isa, Kernel};
use super::tokens::Tokens;

/// About the bits of a class in the header, its table included.
const CLASS_BITS: f64 = 260.0;
/// Changes are counted for the classes in about so many elements.
const COUNTED: usize = 1 << 14;
/// A delta's values from here on share a token by the number of their bits.
const DELTA_DIRECT: u64 = 40;
/// The same for the top bits of a base, counted from the window's start.
const BASE_DIRECT: u64 = 192;
/// The order of the Exp-Golomb codes for counts in the header.
const COUNT_ORDER: u32 = 12;

/// Kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    tokens: Vec<u8>,
    classes: Vec<u8>,
    low: Vec<u8>,
    encode: EncodeTable,
    decode: DecodeTable,
    words: Words,
}

/// Where a base's top bits begin for elements of `bits`, and how its values are counted.
fn base_form<E: Elem>() -> (u32, Tokens) {
    match E::BITS {
        // Every value is a token.
        8 => (0, Tokens { direct: 256 }),
        // The exponent and the highest bit behind it: values near the end of an octave are rarer.
        16 => (7, Tokens { direct: BASE_DIRECT }),
        bits => (bits - 10, Tokens { direct: BASE_DIRECT }),
    }
}

/// Appends the body of a base's block.
#[inline(never)]
pub(super) fn encode_base<E: Elem>(
    level: Instructions,
    new: &[E::Raw],
    buffers: &mut Buffers,
    out: &mut Vec<u8>,
) {
    let (shift, tokens) = base_form::<E>();
    let start = window::<E>(new, shift, tokens);
    let origin = E::narrow(start.checked_shl(shift).unwrap_or(0));
    let high = |raw: &E::Raw| E::load(*raw).sign_last().minus(origin).wide() >> shift;
    buffers.tokens.resize(new.len(), 0);
    level.run(High::<E> { new, origin, shift, tokens: &mut buffers.tokens });
    let mut counts = [0; 256];
    count(&buffers.tokens, &mut counts);
    let direct = tokens.direct.min(256) as usize;
    let far = counts[direct..].iter().any(|&count| count > 0);
    if far {
        counts[direct..].fill(0);
        for_far(&mut buffers.tokens, direct as u8, |at, token| {
            *token = tokens.of(high(&new[at]));
            counts[usize::from(*token)] += 1;
        });
    }
    buffers.classes.clear();
    buffers.classes.resize(new.len(), 0);
    let chances = [Chances::of(&counts)];
    buffers.encode.fill(chances.iter());
    let stream = rans::encode(level, &buffers.encode, &buffers.classes, &buffers.tokens, &mut buffers.words);
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
        for_far(&mut buffers.tokens, direct as u8, |at, token| {
            let extra = tokens.extra_bits(*token);
            bits.put_wide(tokens.extra(high(&new[at]), extra), extra);
        });
        bits.finish();
    }
}

/// Calls `visit` with the position of each token that is at least `direct`. There are few.
fn for_far(tokens: &mut [u8], direct: u8, mut visit: impl FnMut(usize, &mut u8)) {
    for (chunk, tokens) in tokens.chunks_mut(256).enumerate() {
        if tokens.iter().fold(0, |most, &token| token.max(most)) < direct {
            continue;
        }
        for (at, token) in tokens.iter_mut().enumerate().filter(|(_, token)| **token >= direct) {
            visit(chunk * 256 + at, token);
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
    let step = if new.len() < 1 << 15 { 1 } else { 16 };
    new.iter().step_by(step).for_each(|&raw| keys[usize::from(E::load(raw).key())] += 1);
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

/// Counts tokens in four tables, because equal ones come in a row and one count would wait for the other.
#[inline(never)]
fn count(tokens: &[u8], counts: &mut [u32; 256]) {
    let mut tables = [[0u32; 256]; 4];
    let (fours, rest) = tokens.as_chunks::<4>();
    for four in fours {
        for (table, &token) in tables.iter_mut().zip(four) {
            table[usize::from(token)] += 1;
        }
    }
    rest.iter().for_each(|&token| counts[usize::from(token)] += 1);
    for table in &tables {
        counts.iter_mut().zip(table).for_each(|(sum, count)| *sum += count);
    }
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

/// [`pack`] as a kernel.
struct Pack<'a, E: Elem> {
    new: &'a [E::Raw],
    shift: u32,
    out: &'a mut Vec<u8>,
}

impl<E: Elem> Kernel for Pack<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        pack::<E>(self.new, self.shift, self.out);
    }
}

/// [`unpack`] as a kernel.
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
    fn run<I: Isa>(self, _: I) {
        unpack::<E>(self.tokens, self.origin, self.shift, self.packed, self.target);
    }
}

/// Appends the low `shift` bits of each element, the sign last.
#[inline(always)]
fn pack<E: Elem>(new: &[E::Raw], shift: u32, out: &mut Vec<u8>) {
    let bits = |raw: &E::Raw| E::load(*raw).sign_last().wide() & low(shift);
    let (eights, rest) = new.as_chunks::<8>();
    if shift == 7 {
        let start = out.len();
        // Each write takes one byte more than it needs.
        out.resize(start + eights.len() * 7 + 1, 0);
        for (at, eight) in eights.iter().enumerate() {
            let bytes = eight.each_ref().map(|raw| bits(raw) as u8);
            if let Some(place) = out.get_mut(start + at * 7..).and_then(|rest| rest.first_chunk_mut()) {
                *place = seven_of_eight(u64::from_le_bytes(bytes)).to_le_bytes();
            }
        }
        out.truncate(start + eights.len() * 7);
    }
    let mut writer = BitWriter::new(out);
    let rest = if shift == 7 { rest } else { new };
    rest.iter().for_each(|raw| writer.put_wide(bits(raw), shift));
    writer.finish();
}

/// The low 7 bits of each byte, together.
fn seven_of_eight(bytes: u64) -> u64 {
    let pairs = bytes & 0x007f_007f_007f_007f | (bytes & 0x7f00_7f00_7f00_7f00) >> 1;
    let fours = pairs & 0x0000_3fff_0000_3fff | (pairs & 0x3fff_0000_3fff_0000) >> 2;
    fours & 0x0fff_ffff | (fours & 0x0fff_ffff_0000_0000) >> 4
}

/// The reverse of [`seven_of_eight`].
fn eight_of_seven(bits: u64) -> u64 {
    let fours = bits & 0x0fff_ffff | bits << 4 & 0x0fff_ffff_0000_0000;
    let pairs = fours & 0x0000_3fff_0000_3fff | fours << 2 & 0x3fff_0000_3fff_0000;
    pairs & 0x007f_007f_007f_007f | pairs << 1 & 0x7f00_7f00_7f00_7f00
}

/// Sets each element to its token's value above its low bits from `packed`.
#[inline(always)]
fn unpack<E: Elem>(tokens: &[u8], origin: E, shift: u32, packed: &[u8], target: &mut [E::Raw]) {
    let join = |token: u8, bits: u64| {
        E::narrow(u64::from(token)).lifted(shift).plus(E::narrow(bits)).plus(origin).sign_first().store()
    };
    let mut done = 0;
    if shift == 7 {
        // Each read takes one byte more than it needs.
        let sevens = packed.len().saturating_sub(1) / 7;
        let places = target.as_chunks_mut::<8>().0.iter_mut().zip(tokens.as_chunks::<8>().0);
        for (at, (eight, tokens)) in places.take(sevens).enumerate() {
            let Some(bits) = packed.get(at * 7..).and_then(|rest| rest.first_chunk()) else { break };
            let low = eight_of_seven(u64::from_le_bytes(*bits)).to_le_bytes();
            for ((raw, &token), low) in eight.iter_mut().zip(tokens).zip(low) {
                *raw = join(token, u64::from(low));
            }
            done += 8;
        }
    }
    let mut reader = BitReader::new(packed.get(done / 8 * 7..).unwrap_or_default());
    for (raw, &token) in target.iter_mut().zip(tokens).skip(done) {
        *raw = join(token, reader.take_wide(shift));
    }
}

/// Fills `target` from the body of a base's block.
#[inline(never)]
pub(super) fn decode_base<E: Elem>(
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
    buffers.classes.clear();
    buffers.classes.resize(target.len(), 0);
    buffers.tokens.resize(target.len(), 0);
    buffers.decode.fill(&chances);
    rans::decode(level, &buffers.decode, &buffers.classes, &mut buffers.tokens, stream)?;
    let origin = E::narrow(start.checked_shl(shift).unwrap_or(0));
    level.run(Unpack::<E> { tokens: &buffers.tokens, origin, shift, packed, target });
    let mut extra = BitReader::new(far);
    if chances[0].reaches(tokens.direct as usize) {
        for_far(&mut buffers.tokens, tokens.direct as u8, |at, token| {
            let bits = tokens.extra_bits(*token).min(64);
            let value = tokens.value(bits, extra.take_wide(bits));
            // What the token was taken for is replaced by what it stands for.
            let wrong = E::narrow(u64::from(*token) << shift);
            let right = E::narrow(value.checked_shl(shift).unwrap_or(0));
            if let Some(raw) = target.get_mut(at) {
                *raw = E::load(*raw).sign_last().minus(wrong).plus(right).sign_first().store();
            }
        });
    }
    extra.finish()
}

fn split(bytes: &[u8], at: Option<usize>) -> Result<(&[u8], &[u8])> {
    at.and_then(|at| bytes.split_at_checked(at)).ok_or_else(|| Error::corrupt("it is cut short"))
}

/// Appends the body of a delta's block.
#[inline(never)]
pub(super) fn encode_delta<E: Elem>(
    level: Instructions,
    old: &[E::Raw],
    new: &[E::Raw],
    buffers: &mut Buffers,
    out: &mut Vec<u8>,
) {
    buffers.classes.clear();
    buffers.classes.extend(old.iter().map(|&raw| E::load(raw).key()));
    let mut census = Census::default();
    census.count(&buffers.classes);
    let weight = (old.len() / COUNTED).max(1);
    for (old, new) in old.chunks(64).zip(new.chunks(64)).step_by(weight) {
        for (old, new) in old.iter().zip(new).map(|(old, new)| (E::load(*old), E::load(*new))) {
            if old != new {
                census.change(old.key(), new.minus(old).magnitude().wide(), weight as u64);
            }
        }
    }
    let classes = census.classes(CLASS_BITS);
    let shifts = shifts(&census, &classes);
    let table = classes.table();
    let mut counts = [[0u32; 256]; MAX];
    buffers.tokens.resize(old.len(), 0);
    buffers.low.clear();
    level.run(Split::<E> { old, new, table: &table, shifts: &shifts, buffers, counts: &mut counts });
    let same: usize = counts.iter().map(|counts| counts[0] as usize).sum();
    let chances: Vec<_> = counts[..classes.count()].iter().map(|counts| Chances::of(counts)).collect();
    buffers.encode.fill(chances.iter());
    let stream = rans::encode(level, &buffers.encode, &buffers.classes, &buffers.tokens, &mut buffers.words);
    out.reserve(4096 + 2 * stream.words() + buffers.low.len());
    let mut bits = BitWriter::new(out);
    bits.exp_golomb((old.len() - same) as u64, COUNT_ORDER);
    classes.write(&mut bits);
    for (chances, &shift) in chances.iter().zip(&shifts) {
        bits.put(u64::from(shift), 6);
        chances.write(&mut bits);
    }
    bits.exp_golomb(stream.words() as u64, COUNT_ORDER);
    bits.finish();
    stream.write(out);
    out.extend_from_slice(&buffers.low);
}

const DELTA_TOKENS: Tokens = Tokens { direct: DELTA_DIRECT };

/// Fills the tokens, the classes and the low bits of a delta, and counts the tokens.
struct Split<'a, E: Elem> {
    old: &'a [E::Raw],
    new: &'a [E::Raw],
    table: &'a [u8; 256],
    shifts: &'a [u32; MAX],
    buffers: &'a mut Buffers,
    counts: &'a mut [[u32; 256]; MAX],
}

impl<E: Elem> Kernel for Split<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Buffers { tokens, classes, low: low_bits, .. } = self.buffers;
        let mut low_bits = BitWriter::new(low_bits);
        let places = tokens.iter_mut().zip(classes.iter_mut());
        for ((place, class_place), (old, new)) in places.zip(self.old.iter().zip(self.new)) {
            let (old, new) = (E::load(*old), E::load(*new));
            let class = usize::from(self.table[usize::from(old.key())]) % MAX;
            let mut token = 0;
            if let Some(value) = new.minus(old).zigzag().wide().checked_sub(1) {
                let shift = self.shifts[class];
                let bare = DELTA_TOKENS.of(value >> shift);
                token = bare + 1;
                if u64::from(bare) < DELTA_DIRECT {
                    low_bits.put_wide(value & low(shift), shift);
                } else {
                    let extra = DELTA_TOKENS.extra_bits(bare);
                    low_bits.put_wide(value & low(shift), shift);
                    low_bits.put_wide(DELTA_TOKENS.extra(value >> shift, extra), extra);
                }
            }
            self.counts[class][usize::from(token)] += 1;
            *place = token;
            *class_place = class as u8;
        }
        low_bits.finish();
    }
}

/// Adds the steps of a delta; returns how many there were and the reader behind the low bits.
struct Join<'a, 'b, E: Elem> {
    target: &'a mut [E::Raw],
    tokens: &'a [u8],
    classes: &'a [u8],
    shifts: &'a [u32; MAX],
    low_bits: BitReader<'b>,
}

impl<'b, E: Elem> Kernel for Join<'_, 'b, E> {
    type Output = (u64, BitReader<'b>);

    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Self::Output {
        let mut low_bits = self.low_bits;
        let mut changed = 0;
        for ((raw, &token), &class) in self.target.iter_mut().zip(self.tokens).zip(self.classes) {
            let Some(bare) = token.checked_sub(1) else { continue };
            changed += 1;
            let shift = self.shifts[usize::from(class) % MAX];
            let bottom = low_bits.take_wide(shift);
            let high = if u64::from(bare) < DELTA_DIRECT {
                u64::from(bare)
            } else {
                let extra = DELTA_TOKENS.extra_bits(bare).min(64);
                DELTA_TOKENS.value(extra, low_bits.take_wide(extra))
            };
            let step = E::narrow((high.checked_shl(shift).unwrap_or(0) | bottom).wrapping_add(1)).unzigzag();
            *raw = E::load(*raw).plus(step).store();
        }
        (changed, low_bits)
    }
}

/// The low bits of each class that are as good as random: a token counts 8 to 16 of its mean.
fn shifts(census: &Census, classes: &Classes) -> [u32; MAX] {
    let mut shifts = [0; MAX];
    for (stats, shift) in census.by_class(classes).zip(&mut shifts) {
        // The zigzag of a magnitude is twice as large.
        let mean = 2 * stats.magnitude / stats.changed.max(1);
        *shift = mean.max(1).ilog2().saturating_sub(3);
    }
    shifts
}

/// How many elements the body of a delta's block changes.
pub(super) fn changed(body: &[u8]) -> Result<u64> {
    BitReader::new(body).exp_golomb(COUNT_ORDER)
}

/// Applies the body of a delta's block to `target`.
#[inline(never)]
pub(super) fn decode_delta<E: Elem>(
    level: Instructions,
    body: &[u8],
    target: &mut [E::Raw],
    buffers: &mut Buffers,
) -> Result<()> {
    let mut bits = BitReader::new(body);
    let changed = bits.exp_golomb(COUNT_ORDER)?;
    let classes = Classes::read(&mut bits)?;
    let (mut shifts, mut chances) = ([0; MAX], Vec::with_capacity(MAX));
    for shift in shifts.iter_mut().take(classes.count()) {
        *shift = bits.take(6) as u32;
        chances.push(Chances::read(&mut bits)?);
    }
    let words = bits.exp_golomb(COUNT_ORDER)?;
    let (stream, packed) = split(bits.rest()?, rans::stream_len(target.len(), words))?;
    let table = classes.table();
    buffers.classes.clear();
    buffers.classes.extend(target.iter().map(|&raw| table[usize::from(E::load(raw).key())]));
    buffers.tokens.resize(target.len(), 0);
    buffers.decode.fill(&chances);
    rans::decode(level, &buffers.decode, &buffers.classes, &mut buffers.tokens, stream)?;
    let join = Join::<E> {
        target,
        tokens: &buffers.tokens,
        classes: &buffers.classes,
        shifts: &shifts,
        low_bits: BitReader::new(packed),
    };
    let (found, low_bits) = level.run(join);
    low_bits.finish()?;
    if found == changed {
        return Ok(());
    }
    Err(Error::corrupt("the number of changes is not what the header says"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seven_bits_come_back() {
        for bytes in [0, 0x7f7f_7f7f_7f7f_7f7f, 0x0102_0304_0506_0708, 0x7f00_7f00_0055_2a01] {
            assert!(seven_of_eight(bytes) < 1 << 56);
            assert_eq!(eight_of_seven(seven_of_eight(bytes)), bytes);
        }
    }
}
