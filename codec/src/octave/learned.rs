//! Blocks of which very few elements change: gaps as in a sparse delta, and steps whose chances are learned from the
//! steps before, by the octave of the old value and, for directions, by the column. There is no table to write, which
//! with a hundred changes a class would be longer than what it saves.

use towline_core::{DType, Error, Result, UnitMeta};

use super::bits::{BitReader, BitWriter};
use super::classes::{Census, Classes, MAX};
use super::decisions::{Chance, Decide, Decoder, Encoder, near};
use super::elem::Elem;
use super::numbers::Numbers;
use super::ranks::{GapForms, Search, behind_the_last, read_ranks};
use super::simd::{Instructions, Isa, Kernel, TILE};
use super::sparse;
use super::tiles::Survey;

/// About the bits of a class in the header.
const CLASS_BITS: f64 = 10.0;
/// The order of the Exp-Golomb code for the bytes of the steps.
const LENGTH_ORDER: u32 = 7;
/// The order of the Exp-Golomb codes for the columns and the first one.
const COLUMN_ORDER: u32 = 8;
/// Directions are learned by column if there are so many changes for each.
const LEAST_A_COLUMN: usize = 4;
/// Of directions that are tossed the squared sum of a column is on average the number of its changes. They are learned
/// if it is so many times that.
const LEAST_SKEW: u64 = 3;
/// More columns than this would not stay in the cache.
const MOST_COLUMNS: usize = 1 << 14;

/// How a block's elements lie in their tensor, as far as it tells their steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// The low bits of a key that are not the exponent's.
    shift: u32,
    /// The elements of a row, 0 if it is not known.
    columns: usize,
    /// The column of the first element.
    first: usize,
}

impl Layout {
    pub(super) fn of<E: Elem>(unit: &UnitMeta<'_>) -> Self {
        let shift = match unit.dtype {
            DType::F16 | DType::F8E5M2 | DType::F8E5M2FNUZ => 3,
            DType::F8E4M3 | DType::F8E4M3FNUZ => 4,
            _ => 0,
        };
        let columns = match unit.shape {
            [_, .., columns] if unit.dtype.bits() == E::BITS => *columns,
            _ => 0,
        };
        let first = (unit.offset / size_of::<E>()).checked_rem(columns).unwrap_or(0);
        Self { shift, columns, first }
    }

    /// The column of each element of a tile that begins with element `start`.
    #[inline(always)]
    fn column(self, element: usize) -> usize {
        (self.first + element).checked_rem(self.columns).unwrap_or(0)
    }

    fn write(self, bits: &mut BitWriter<'_>) {
        bits.put(u64::from(self.shift), 3);
        bits.put(u64::from(self.columns > 0), 1);
        if self.columns > 0 {
            bits.exp_golomb(self.columns as u64, COLUMN_ORDER);
            bits.exp_golomb(self.first as u64, COLUMN_ORDER);
        }
    }

    fn read(bits: &mut BitReader<'_>, elements: usize) -> Result<Self> {
        let shift = bits.take(3) as u32;
        if bits.take(1) == 0 {
            return Ok(Self { shift, columns: 0, first: 0 });
        }
        let [columns, first] = [bits.exp_golomb(COLUMN_ORDER)?, bits.exp_golomb(COLUMN_ORDER)?];
        if columns == 0 || columns > elements as u64 || first >= columns {
            return Err(Error::corrupt(format!("column {first} of {columns} in {elements} elements")));
        }
        Ok(Self { shift, columns: columns as usize, first: first as usize })
    }
}

/// The octaves of an element: of its old value, or of a bit of its step, which is so many places higher.
const OCTAVES: usize = 256 + 64;

/// The chances of all decisions on steps.
#[derive(Debug)]
struct Model {
    /// Whether a step is more than 1, by the octave of the old value.
    more: [Chance; 256],
    /// Whether a step crosses zero.
    far: Chance,
    /// Whether a step has a higher bit than the one asked for, by its octave.
    higher: [Chance; OCTAVES],
    /// The bit behind the highest one, by the octave of that.
    second: [Chance; OCTAVES],
    /// The bit behind these two, by the octave of the highest one and by the second.
    third: [[Chance; 2]; OCTAVES],
    /// Whether an element moves up, by column.
    up: Vec<Chance>,
}

impl Model {
    fn new(columns: usize) -> Self {
        Self {
            more: [Chance::new(1 << 13); 256],
            far: Chance::new(1 << 11),
            higher: [Chance::new(1 << 15); OCTAVES],
            second: [Chance::half(1); OCTAVES],
            third: [[Chance::half(1); 2]; OCTAVES],
            up: vec![Chance::half(1); columns],
        }
    }

    /// Codes how an element of `bits` bits changes: by a magnitude of at least 1 and at most `2^(bits - 1)`, and whether it
    /// moves up. Takes what is known, and returns what was coded.
    #[inline(always)]
    fn step<C: Decide>(
        &mut self,
        coder: &mut C,
        octave: usize,
        column: usize,
        bits: u32,
        (magnitude, up): (u64, bool),
    ) -> (u64, bool) {
        let up = match self.up.get_mut(column) {
            Some(chance) => coder.decide(chance, up),
            None => coder.toss(up),
        };
        if !coder.decide(near(&mut self.more, octave), magnitude > 1) {
            return (1, up);
        }
        // An element that crosses zero moves by nearly half of all numbers: what is left to it is said.
        let half = 1 << (bits - 2);
        let far = coder.decide(&mut self.far, magnitude > half);
        let said = if far { 2 * half + 1 - magnitude } else { magnitude };
        let highest = said.ilog2();
        let mut length = u32::from(!far);
        let of = |length: u32| octave + length as usize;
        while length < bits - 2 && coder.decide(near(&mut self.higher, of(length)), highest > length) {
            length += 1;
        }
        let mut number = 1;
        for place in (0..length).rev() {
            let known = said >> place & 1 == 1;
            let bit = match length - place {
                1 => coder.decide(&mut self.second[of(length)], known),
                2 => coder.decide(&mut self.third[of(length)][(number & 1) as usize], known),
                _ => coder.toss(known),
            };
            number = number << 1 | u64::from(bit);
        }
        (if far { 2 * half + 1 - number } else { number }, up)
    }
}

/// Appends the body of a block with the changes that `survey` found and `census` counted.
#[inline(never)]
pub(super) fn encode<E: Elem>(
    level: Instructions,
    layout: Layout,
    old: &[E::Raw],
    survey: &Survey,
    census: Census,
    scratch: &mut sparse::Scratch,
    out: &mut Vec<u8>,
) {
    let sparse::Scratch { lists, tile, .. } = scratch;
    let classes = lists.fill(level, survey, census, CLASS_BITS, tile);
    let layout = skewed::<E>(layout, old, survey);
    let steps = encode_steps::<E>(layout, old, survey);
    let mut bits = BitWriter::new(out);
    classes.write(&mut bits);
    layout.write(&mut bits);
    bits.exp_golomb(steps.len() as u64, LENGTH_ORDER);
    let mut forms = GapForms::new();
    let lists: Vec<_> = lists.of(&classes).into_iter().map(|list| (list, list.best_gaps())).collect();
    for (list, gaps) in &lists {
        forms.write(list.gaps.len(), *gaps, &mut bits);
    }
    for (list, gaps) in lists {
        list.write_gaps(gaps, &mut bits);
    }
    bits.finish();
    out.extend_from_slice(&steps);
}

/// Each element that changes, in order: its place in the block, and its step as a survey has it.
fn changes<'a>(survey: &'a Survey) -> impl Iterator<Item = (usize, u64)> + use<'a> {
    let tiles = (0..).step_by(TILE).zip(survey.tiles());
    tiles.flat_map(|(start, (places, steps))| {
        places.iter().zip(steps).map(move |(&place, &step)| (start + usize::from(place), step))
    })
}

/// Whether an element that was `old` moves up, if its bits go down or not.
fn moves_up<E: Elem>(old: E, down: bool) -> bool {
    old.is_negative() == down
}

/// The layout with columns if directions depend on them, otherwise without.
fn skewed<E: Elem>(layout: Layout, old: &[E::Raw], survey: &Survey) -> Layout {
    let without = Layout { columns: 0, first: 0, ..layout };
    let count = changes(survey).count();
    if layout.columns < 2
        || layout.columns > MOST_COLUMNS.min(old.len())
        || count < LEAST_A_COLUMN * layout.columns
    {
        return without;
    }
    let mut sums = vec![0i64; layout.columns];
    for (at, step) in changes(survey) {
        let up = old.get(at).is_some_and(|&raw| moves_up(E::load(raw), step & 1 == 1));
        sums[layout.column(at)] += if up { 1 } else { -1 };
    }
    let squares: u64 = sums.iter().map(|sum| sum.unsigned_abs().pow(2)).sum();
    if squares < LEAST_SKEW * count as u64 { without } else { layout }
}

fn encode_steps<E: Elem>(layout: Layout, old: &[E::Raw], survey: &Survey) -> Vec<u8> {
    let mut model = Model::new(layout.columns);
    let mut coder = Encoder::new(Vec::new());
    for (at, step) in changes(survey) {
        let Some(&raw) = old.get(at) else { continue };
        let old = E::load(raw);
        let octave = usize::from(old.key() >> layout.shift);
        let known = ((step >> 1).wrapping_add(1), moves_up(old, step & 1 == 1));
        model.step(&mut coder, octave, layout.column(at), E::BITS, known);
    }
    coder.finish()
}

/// The header of a body.
struct Header {
    classes: Classes,
    layout: Layout,
    /// The bytes of the steps.
    length: u64,
    /// The changes of each class, and the form of their gaps.
    gaps: Vec<(usize, Numbers)>,
}

impl Header {
    fn read(bits: &mut BitReader<'_>, elements: usize) -> Result<Self> {
        let classes = Classes::read(bits)?;
        let layout = Layout::read(bits, elements)?;
        let length = bits.exp_golomb(LENGTH_ORDER)?;
        let (mut forms, mut left) = (GapForms::new(), elements);
        let gaps = (0..classes.count()).map(|_| forms.read(bits, &mut left)).collect::<Result<_>>()?;
        Ok(Self { classes, layout, length, gaps })
    }
}

/// How many of `elements` a body changes.
pub(super) fn changed(body: &[u8], elements: usize) -> Result<usize> {
    let header = Header::read(&mut BitReader::new(body), elements)?;
    Ok(header.gaps.iter().map(|gaps| gaps.0).sum())
}

/// Applies a body to `target`.
#[inline(never)]
pub(super) fn decode<E: Elem>(
    level: Instructions,
    body: &[u8],
    target: &mut [E::Raw],
    scratch: &mut sparse::Scratch,
    written: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    let sparse::Scratch { changes: sparse::Changes { ranks, .. }, tile, .. } = scratch;
    let mut bits = BitReader::new(body);
    let Header { classes, layout, length, gaps } = Header::read(&mut bits, target.len())?;
    ranks.clear();
    let mut ends = [0; MAX];
    for (&(count, form), end) in gaps.iter().zip(&mut ends) {
        read_ranks(form, &mut bits, count, target.len(), ranks)?;
        *end = ranks.len();
    }
    let steps = bits.rest()?;
    if steps.len() as u64 != length {
        return Err(Error::corrupt(format!("wanted {length} bytes of steps, found {}", steps.len())));
    }
    let search = Search { classes: &classes, ranks, ends, tile };
    level.run(Patch::<E> { target, search, layout, steps: Decoder::new(steps), written })
}

/// Reads the steps and adds them to the elements of their ranks.
struct Patch<'a, E: Elem> {
    target: &'a mut [E::Raw],
    search: Search<'a>,
    layout: Layout,
    steps: Decoder<'a>,
    /// Takes each tile when it is done.
    written: &'a mut dyn FnMut(&[u8]),
}

impl<E: Elem> Kernel for Patch<'_, E> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Result<()> {
        let Self { target, search, layout, mut steps, written } = self;
        let mut model = Model::new(layout.columns);
        let mut start = 0;
        search.each_tile::<E, I>(isa, target, |target, places| {
            // The steps stand in the order of the elements, not of the classes.
            let mut changes = [0u64; TILE / 64];
            for &(place, _) in places {
                changes[usize::from(place) / 64 % (TILE / 64)] |= 1 << (place % 64);
            }
            for (word, mut changes) in (0..).step_by(64).zip(changes) {
                while changes != 0 {
                    let place = word + changes.trailing_zeros() as usize;
                    changes &= changes - 1;
                    // Behind the end of a block's last tile there is nothing to change.
                    let Some(raw) = target.get_mut(place) else { return Err(behind_the_last()) };
                    let old = E::load(*raw);
                    let octave = usize::from(old.key() >> layout.shift);
                    let column = layout.column(start + place);
                    let (magnitude, up) = model.step(&mut steps, octave, column, E::BITS, (1, false));
                    let step = E::narrow(magnitude);
                    *raw = if moves_up(old, false) == up { old.plus(step) } else { old.minus(step) }.store();
                }
            }
            start += TILE;
            written(E::bytes(target));
            Ok(())
        })?;
        steps.finish()
    }
}
