//! Blocks of which many elements change: for each element a token for the high bits of the step from the old to the new
//! bits, the sign last, entropy-coded by the class of the old value, and its low bits as they are. A class's shift says
//! how many low bits carry no information worth a token.

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
/// The order of the Exp-Golomb codes for counts in the header.
pub(super) const COUNT_ORDER: u32 = 12;

/// Kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) tokens: Vec<u8>,
    pub(super) classes: Vec<u8>,
    low: Vec<u8>,
    pub(super) encode: EncodeTable,
    pub(super) decode: DecodeTable,
    pub(super) words: Words,
}

impl Buffers {
    /// All elements are of class 0.
    pub(super) fn one_class(&mut self, elements: usize) {
        self.classes.clear();
        self.classes.resize(elements, 0);
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
pub(super) fn decode<E: Elem>(
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
