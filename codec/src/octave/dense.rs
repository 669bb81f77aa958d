//! Blocks of which many elements change: for each element a token for the high bits of the step from the old to the new
//! bits, the sign last, entropy-coded by the class of the old value, and its low bits as they are. A class's shift says
//! how many low bits carry no information worth a token.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter, MOST_TAKEN, low};
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
/// The steps of 64 elements are read at once if so many have low bits.
const MANY: u32 = 24;
/// The order of the Exp-Golomb codes for counts in the header.
pub(super) const COUNT_ORDER: u32 = 12;

/// Kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) tokens: Vec<u8>,
    classes: Vec<u8>,
    pub(super) zeros: Zeros,
    low: Vec<u8>,
    pub(super) encode: EncodeTable,
    pub(super) decode: DecodeTable,
    pub(super) words: Words,
    /// Where a base's tokens stand for more than one value.
    pub(super) far: Vec<usize>,
}

/// Zeros: the classes of elements that are all of one class.
#[derive(Debug, Default)]
pub(super) struct Zeros(Vec<u8>);

impl Zeros {
    pub(super) fn take(&mut self, count: usize) -> &[u8] {
        if self.0.len() < count {
            self.0.resize(count, 0);
        }
        &self.0[..count]
    }
}

pub(super) fn split(bytes: &[u8], at: Option<usize>) -> Result<(&[u8], &[u8])> {
    at.and_then(|at| bytes.split_at_checked(at)).ok_or_else(|| Error::corrupt("it is cut short"))
}

/// Appends the body of a delta's block.
#[inline(never)]
pub(super) fn encode<E: Elem>(
    level: Instructions,
    old: &[E::Raw],
    new: &[E::Raw],
    buffers: &mut Buffers,
    out: &mut Vec<u8>,
) {
    let mut census = Census::default();
    buffers.classes.resize(old.len().next_multiple_of(64), 0);
    level.run(Sort::<E> { old, table: &std::array::from_fn(|key| key as u8), classes: &mut buffers.classes });
    census.count(level, &buffers.classes[..old.len()]);
    let weight = (old.len() / COUNTED).max(1);
    for (old, new) in old.chunks(64).zip(new.chunks(64)).step_by(weight) {
        for (old, new) in old.iter().zip(new).map(|(old, new)| (E::load(*old), E::load(*new))) {
            if old != new {
                census.change(old.key(), new.minus(old).magnitude().wide(), weight as u64);
            }
        }
    }
    let classes = census.classes(CLASS_BITS);
    let shifts = shifts::<E>(&census, &classes);
    let table = classes.table();
    let mut counts = [[0; TOKENS]; MAX];
    let counts = &mut counts[..classes.count()];
    buffers.tokens.resize(old.len().next_multiple_of(64), 0);
    buffers.low.clear();
    level.run(Split::<E> { old, new, table: &table, shifts: &shifts, buffers, counts });
    let same: usize = counts.iter().map(|counts| counts[0] as usize).sum();
    let chances: Vec<_> = counts.iter().map(|counts| Chances::of(counts)).collect();
    buffers.encode.fill(chances.iter());
    let stream = rans::encode(
        level,
        &buffers.encode,
        &buffers.classes[..old.len()],
        &buffers.tokens[..old.len()],
        &mut buffers.words,
    );
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
/// The last token that is a value, of a step or of its high bits, plus 1.
const LAST_DIRECT: u8 = DELTA_DIRECT as u8;
/// Tokens are below this: direct ones, those by a number of bits of at most 64, and the one for no change.
const TOKENS: usize = 128;

/// Fills the tokens, the classes and the low bits of a delta, and counts the tokens.
struct Split<'a, E: Elem> {
    old: &'a [E::Raw],
    new: &'a [E::Raw],
    table: &'a [u8; 256],
    shifts: &'a [u8; 256],
    buffers: &'a mut Buffers,
    /// How often each token comes up, for each class.
    counts: &'a mut [[u32; TOKENS]],
}

impl<E: Elem> Kernel for Split<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { old, new, table, shifts, buffers, counts } = self;
        let Buffers { tokens, classes, low: low_bits, .. } = buffers;
        let mut low_bits = BitWriter::new(low_bits);
        let pairs = old.chunks(64).zip(new.chunks(64));
        let places = tokens.as_chunks_mut::<64>().0.iter_mut().zip(classes.as_chunks_mut::<64>().0);
        for ((old, new), (tokens, classes)) in pairs.zip(places) {
            let there = low(old.len() as u32);
            let (mut old_room, mut new_room) = ([E::default().store(); 64], [E::default().store(); 64]);
            let (old, new) = (whole::<E>(old, &mut old_room), whole::<E>(new, &mut new_room));
            *classes = isa.look_up(table, &keys::<E>(old));
            let shift = isa.look_up(shifts, classes);
            for at in 0..64 {
                let step = E::load(new[at]).minus(E::load(old[at])).zigzag();
                let some = E::narrow(u64::from(step != E::default()));
                let high = step.minus(some).shifted(u32::from(shift[at]) % E::BITS).at_most_255();
                tokens[at] = high.min(254) + some.at_most_255();
            }
            // Those that say not all there is to say.
            let mut rest = isa.nonzero(&with_low_bits(tokens, &shift));
            while rest != 0 {
                let at = rest.trailing_zeros() as usize % 64;
                rest &= rest - 1;
                let value = E::load(new[at]).minus(E::load(old[at])).zigzag().wide() - 1;
                let shift = u32::from(shift[at]);
                low_bits.put_wide(value & low(shift), shift);
                if tokens[at] > LAST_DIRECT {
                    let bare = DELTA_TOKENS.of(value >> shift);
                    let extra = DELTA_TOKENS.extra_bits(bare);
                    low_bits.put_wide(DELTA_TOKENS.extra(value >> shift, extra), extra);
                    tokens[at] = bare + 1;
                }
            }
            let mut changed = isa.nonzero(tokens);
            for (class, counts) in counts.iter_mut().enumerate() {
                let mut same = [0; 64];
                for at in 0..64 {
                    same[at] = u8::from(classes[at] == class as u8);
                }
                counts[0] += (isa.nonzero(&same) & !changed & there).count_ones();
            }
            while changed != 0 {
                let at = changed.trailing_zeros() as usize % 64;
                changed &= changed - 1;
                if let Some(counts) = counts.get_mut(usize::from(classes[at])) {
                    counts[usize::from(tokens[at]) % TOKENS] += 1;
                }
            }
        }
        low_bits.finish();
    }
}

/// All of a chunk, in `room` if it has fewer than 64.
#[inline(always)]
fn whole<'a, E: Elem>(chunk: &'a [E::Raw], room: &'a mut [E::Raw; 64]) -> &'a [E::Raw; 64] {
    match chunk.as_array() {
        Some(all) => all,
        None => {
            room[..chunk.len()].copy_from_slice(chunk);
            room
        }
    }
}

#[inline(always)]
fn keys<E: Elem>(old: &[E::Raw; 64]) -> [u8; 64] {
    let mut keys = [0; 64];
    for at in 0..64 {
        keys[at] = E::load(old[at]).key();
    }
    keys
}

/// The class of each element of a parent.
struct Sort<'a, E: Elem> {
    old: &'a [E::Raw],
    table: &'a [u8; 256],
    classes: &'a mut [u8],
}

impl<E: Elem> Kernel for Sort<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (old, classes) in self.old.chunks(64).zip(self.classes.as_chunks_mut::<64>().0) {
            let mut room = [E::default().store(); 64];
            *classes = isa.look_up(self.table, &keys::<E>(whole::<E>(old, &mut room)));
        }
    }
}

/// Adds the steps of a delta; returns how many there were and the reader behind the low bits.
struct Join<'a, 'b, E: Elem> {
    target: &'a mut [E::Raw],
    tokens: &'a [u8],
    classes: &'a [u8],
    shifts: &'a [u8; 256],
    low_bits: BitReader<'b>,
}

impl<'b, E: Elem> Kernel for Join<'_, 'b, E> {
    type Output = (u64, BitReader<'b>);

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Self::Output {
        let Self { target, tokens, classes, shifts, mut low_bits } = self;
        let mut changed = 0;
        let places = tokens.as_chunks::<64>().0.iter().zip(classes.as_chunks::<64>().0);
        for (target, (tokens, classes)) in target.chunks_mut(64).zip(places) {
            changed += u64::from((isa.nonzero(tokens) & low(target.len() as u32)).count_ones());
            let shift = isa.look_up(shifts, classes);
            let with_low_bits = with_low_bits(tokens, &shift);
            let mut rest = isa.nonzero(&with_low_bits);
            if rest.count_ones() >= MANY
                && let Some(target) = target.as_mut_array::<64>()
                && let Some(steps) = steps_at_once::<E>(tokens, &shift, &mut low_bits)
            {
                for at in 0..64 {
                    target[at] = E::load(target[at]).plus(steps[at]).store();
                }
                continue;
            }
            let mut direct = [0; 64];
            for at in 0..64 {
                direct[at] = if with_low_bits[at] == 0 { tokens[at] } else { 0 };
            }
            let join = |raw: &mut E::Raw, token: u8| {
                *raw = E::load(*raw).plus(E::narrow(u64::from(token)).unzigzag()).store();
            };
            match target.as_mut_array::<64>() {
                Some(target) => target.iter_mut().zip(direct).for_each(|(raw, token)| join(raw, token)),
                None => target.iter_mut().zip(direct).for_each(|(raw, token)| join(raw, token)),
            }
            while rest != 0 {
                let at = rest.trailing_zeros() as usize % 64;
                rest &= rest - 1;
                let Some(raw) = target.get_mut(at) else { break };
                let (bare, shift) = (tokens[at] - 1, u32::from(shift[at]));
                let bottom = low_bits.take_wide(shift);
                let extra = low_bits.take_wide(DELTA_TOKENS.extra_bits(bare).min(64));
                let value = DELTA_TOKENS.any_value(bare, extra).checked_shl(shift).unwrap_or(0) | bottom;
                let step = E::narrow(value.wrapping_add(1)).unzigzag();
                *raw = E::load(*raw).plus(step).store();
            }
        }
        (changed, low_bits)
    }
}

/// The steps of 64 elements, unless one takes more than [`MOST_TAKEN`] low bits: three loops with nothing in them that one
/// element could make another wait for.
#[inline(always)]
fn steps_at_once<E: Elem>(
    tokens: &[u8; 64],
    shifts: &[u8; 64],
    low_bits: &mut BitReader<'_>,
) -> Option<[E; 64]> {
    let (mut extras, mut lengths) = ([0u8; 64], [0u8; 64]);
    let mut longest = 0;
    for at in 0..64 {
        extras[at] = tokens[at].saturating_sub(LAST_DIRECT + 1);
        lengths[at] = if tokens[at] == 0 { 0 } else { shifts[at].saturating_add(extras[at]) };
        longest = longest.max(lengths[at]);
    }
    if u32::from(longest) > MOST_TAKEN {
        return None;
    }
    let mut words = [0u64; 64];
    if u32::from(longest) <= MOST_TAKEN / 4 {
        for (words, lengths) in words.as_chunks_mut::<4>().0.iter_mut().zip(lengths.as_chunks::<4>().0) {
            let mut word = low_bits.peek();
            let mut taken = 0;
            for at in 0..4 {
                words[at] = word;
                word >>= lengths[at] & 63;
                taken += u32::from(lengths[at]);
            }
            low_bits.skip(taken);
        }
    } else {
        for at in 0..64 {
            words[at] = low_bits.peek();
            low_bits.skip(u32::from(lengths[at]));
        }
    }
    let mut steps = [E::default(); 64];
    for at in 0..64 {
        let (shift, extra) = (u64::from(shifts[at]) & 63, u64::from(extras[at]) & 63);
        let bottom = words[at] & ((1 << shift) - 1);
        let top = (words[at] >> shift) & ((1 << extra) - 1);
        // The value of a token above the direct ones; of the others it is the token, where both powers are 1.
        let value = u64::from(tokens[at]) - u64::from(tokens[at] > 0) + (1 << extra) - 1 + top - extra;
        let step = E::narrow(((value << shift) | bottom).wrapping_add(1)).unzigzag();
        steps[at] = if tokens[at] == 0 { E::default() } else { step };
    }
    Some(steps)
}

/// Not 0 for elements that change and have low bits or a token that stands for several values.
#[inline(always)]
fn with_low_bits(tokens: &[u8; 64], shifts: &[u8; 64]) -> [u8; 64] {
    let mut rest = [0; 64];
    for ((rest, &token), &shift) in rest.iter_mut().zip(tokens).zip(shifts) {
        *rest = u8::from(token > LAST_DIRECT) | u8::from(token != 0) & u8::from(shift != 0);
    }
    rest
}

/// By class, the low bits that are as good as random: a token counts 8 to 16 of its mean.
fn shifts<E: Elem>(census: &Census, classes: &Classes) -> [u8; 256] {
    let mut shifts = [0; 256];
    for (stats, shift) in census.by_class(classes).zip(&mut shifts) {
        // The zigzag of a magnitude is twice as large.
        let mean = 2 * stats.magnitude / stats.changed.max(1);
        *shift = mean.max(1).ilog2().saturating_sub(3).min(E::BITS - 1) as u8;
    }
    shifts
}

/// How many elements the body of a delta's block changes.
pub(super) fn changed(body: &[u8]) -> Result<u64> {
    BitReader::new(body).exp_golomb(COUNT_ORDER)
}

/// Applies the body of a delta's block to `target`.
#[inline(never)]
pub(super) fn decode<E: Elem>(
    level: Instructions,
    body: &[u8],
    target: &mut [E::Raw],
    buffers: &mut Buffers,
) -> Result<()> {
    let mut bits = BitReader::new(body);
    let changed = bits.exp_golomb(COUNT_ORDER)?;
    let classes = Classes::read(&mut bits)?;
    let (mut shifts, mut chances) = ([0; 256], Vec::with_capacity(MAX));
    for shift in shifts.iter_mut().take(classes.count()) {
        *shift = bits.take(6) as u8;
        chances.push(Chances::read(&mut bits)?);
    }
    let words = bits.exp_golomb(COUNT_ORDER)?;
    let (stream, packed) = split(bits.rest()?, rans::stream_len(target.len(), words))?;
    let room = target.len().next_multiple_of(64);
    buffers.classes.resize(room, 0);
    level.run(Sort::<E> { old: target, table: &classes.table(), classes: &mut buffers.classes });
    buffers.tokens.resize(room, 0);
    buffers.decode.fill(&chances);
    let (classes, tokens) = (&buffers.classes[..target.len()], &mut buffers.tokens[..target.len()]);
    rans::decode(level, &buffers.decode, classes, tokens, stream)?;
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
