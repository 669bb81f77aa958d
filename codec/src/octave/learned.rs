//! Blocks of which very few elements change: gaps as in a sparse delta, and steps whose chances are learned from the
//! steps before, by the octave of the old value and, for directions, by the column. There is no table to write, which
//! with a hundred changes a class would be longer than what it saves.

use towline_core::{DType, Error, Result, UnitMeta};

use super::bits::{BitReader, BitWriter};
use super::classes::{Census, Classes, MAX};
use super::decisions::{Chance, Decide, Decoder, Encoder, near};
use super::digests::Written;
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
        const THREE: [DType; 3] = [DType::F16, DType::F8E5M2, DType::F8E5M2FNUZ];
        const FOUR: [DType; 2] = [DType::F8E4M3, DType::F8E4M3FNUZ];
        let shift = match unit.dtype {
            dtype if THREE.contains(&dtype) => 3,
            dtype if FOUR.contains(&dtype) => 4,
            _ => 0,
        };
        let columns = match unit.shape {
            [_, .., columns] if unit.dtype.bits() == E::BITS => *columns,
            _ => 0,
        };
        let first = (unit.offset / size_of::<E>()).checked_rem(columns).unwrap_or(0);
        Self { shift, columns, first }
    }

    fn columns(self) -> Columns {
        let columns = self.columns.max(1) as u64;
        Columns { columns, inverse: (1u64 << 42).div_ceil(columns), first: self.first as u64 }
    }

    fn write(self, bits: &mut BitWriter<'_>) {
        bits.put(u64::from(self.shift), 3);
        bits.put(u64::from(self.columns > 0), 1);
        if self.columns > 0 {
            bits.exp_golomb(self.columns as u64, COLUMN_ORDER);
            bits.exp_golomb(self.first as u64, COLUMN_ORDER);
        }
    }

    fn read(bits: &mut BitReader<'_>) -> Result<Self> {
        let shift = bits.take(3) as u32;
        if bits.take(1) == 0 {
            return Ok(Self { shift, columns: 0, first: 0 });
        }
        let [columns, first] = [bits.exp_golomb(COLUMN_ORDER)?, bits.exp_golomb(COLUMN_ORDER)?];
        if columns > MOST_COLUMNS as u64 || first >= columns {
            return Err(Error::corrupt(format!("column {first} of {columns}, at most {MOST_COLUMNS}")));
        }
        Ok(Self { shift, columns: columns as usize, first: first as usize })
    }
}

/// Finds columns without a division.
#[derive(Debug, Clone, Copy)]
struct Columns {
    columns: u64,
    /// 2^42 divided by it, rounded up. Quotients are exact: elements and columns multiply to less than 2^42.
    inverse: u64,
    first: u64,
}

impl Columns {
    /// The column of an element of a block.
    #[inline(always)]
    fn of(self, element: usize) -> usize {
        let at = self.first + element as u64;
        (at - ((at * self.inverse) >> 42) * self.columns) as usize
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

/// Appends the body of a block of elements of `bits` bits with the changes that `survey` found and `census` counted.
#[inline(never)]
pub(super) fn encode(
    level: Instructions,
    bits: u32,
    layout: Layout,
    survey: &Survey,
    census: Census,
    scratch: &mut sparse::Scratch,
    out: &mut Vec<u8>,
) {
    let sparse::Scratch { lists, .. } = scratch;
    let classes = lists.fill(level, survey, census, CLASS_BITS);
    let lists = lists.of(&classes);
    let layout = skewed(layout, survey, lists.iter().map(|list| list.gaps.len()).sum());
    let steps = encode_steps(bits, layout, survey);
    let mut head = BitWriter::new(out);
    classes.write(&mut head);
    layout.write(&mut head);
    head.exp_golomb(steps.len() as u64, LENGTH_ORDER);
    let mut forms = GapForms::new();
    let lists: Vec<_> = lists.into_iter().map(|list| (list, list.best_gaps())).collect();
    for (list, gaps) in &lists {
        forms.write(list.gaps.len(), *gaps, &mut head);
    }
    for (list, gaps) in lists {
        list.write_gaps(gaps, &mut head);
    }
    head.finish();
    out.extend_from_slice(&steps);
}

/// Whether an element that was negative or not moves up, if its bits go down or not.
#[inline(always)]
fn moves_up(negative: bool, down: bool) -> bool {
    negative == down
}

/// The layout with columns if directions depend on them, otherwise without.
fn skewed(layout: Layout, survey: &Survey, count: usize) -> Layout {
    let without = Layout { columns: 0, first: 0, ..layout };
    if !(2..=MOST_COLUMNS).contains(&layout.columns) || count < LEAST_A_COLUMN * layout.columns {
        return without;
    }
    let columns = layout.columns();
    let mut sums = vec![0i64; layout.columns];
    for (at, old, step) in survey.changes() {
        let up = moves_up(old >> 8 == 1, step & 1 == 1);
        if let Some(sum) = sums.get_mut(columns.of(at)) {
            *sum += if up { 1 } else { -1 };
        }
    }
    let squares: u64 = sums.iter().map(|sum| sum.unsigned_abs().pow(2)).sum();
    if squares < LEAST_SKEW * count as u64 { without } else { layout }
}

fn encode_steps(bits: u32, layout: Layout, survey: &Survey) -> Vec<u8> {
    let (mut model, columns) = (Model::new(layout.columns), layout.columns());
    let mut coder = Encoder::default();
    for (at, old, step) in survey.changes() {
        let octave = usize::from(old & 0xff) >> layout.shift;
        let known = ((step >> 1).wrapping_add(1), moves_up(old >> 8 == 1, step & 1 == 1));
        model.step(&mut coder, octave, columns.of(at), bits, known);
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
        let layout = Layout::read(bits)?;
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
    written: &mut dyn FnMut(&[u8], Option<u128>),
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
    let written = Written::new(size_of_val(target), written);
    level.run(Patch::<E> { target, search, layout, steps: Decoder::new(steps), written })
}

/// Reads the steps and adds them to the elements of their ranks.
struct Patch<'a, E: Elem> {
    target: &'a mut [E::Raw],
    search: Search<'a>,
    layout: Layout,
    steps: Decoder<'a>,
    written: Written<'a>,
}

impl<E: Elem> Kernel for Patch<'_, E> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Result<()> {
        let Self { target, search, layout, mut steps, written } = self;
        let (mut model, columns) = (Model::new(layout.columns), layout.columns());
        search.each_tile::<E, I>(isa, target, written, |target, tile, places| {
            // The steps stand in the order of the elements, not of the classes.
            let mut changes = [0u64; TILE / 64];
            for &(place, _) in places {
                changes[usize::from(place) / 64 % (TILE / 64)] |= 1 << (place % 64);
            }
            for (word, mut changes) in (tile.start..).step_by(64).zip(changes) {
                while changes != 0 {
                    let place = word + changes.trailing_zeros() as usize;
                    changes &= changes - 1;
                    // Behind the end of a block's last tile there is nothing to change.
                    let Some(raw) = target.get_mut(place) else { return Err(behind_the_last()) };
                    let old = E::load(*raw);
                    let octave = usize::from(old.key() >> layout.shift);
                    let column = columns.of(place);
                    let (magnitude, up) = model.step(&mut steps, octave, column, E::BITS, (1, false));
                    let step = E::narrow(magnitude);
                    *raw = if moves_up(old.is_negative(), false) == up {
                        old.plus(step)
                    } else {
                        old.minus(step)
                    }
                    .store();
                }
            }
            Ok(())
        })?;
        steps.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body of one class in which nothing changes, with what `layout` writes and so many bytes of steps.
    fn body(layout: impl FnOnce(&mut BitWriter<'_>), length: u64, steps: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut bits = BitWriter::new(&mut out);
        bits.put(0, 4);
        layout(&mut bits);
        bits.exp_golomb(length, LENGTH_ORDER);
        bits.exp_golomb(0, 6);
        bits.finish();
        [out, steps.to_vec()].concat()
    }

    fn columns(columns: u64, first: u64) -> impl FnOnce(&mut BitWriter<'_>) {
        move |bits| {
            bits.put(0b1000, 4);
            bits.exp_golomb(columns, COLUMN_ORDER);
            bits.exp_golomb(first, COLUMN_ORDER);
        }
    }

    #[test]
    fn headers_out_of_bounds_are_refused() {
        let apply = |body: &[u8]| {
            let mut target = [[1, 2]; 300];
            let scratch = &mut sparse::Scratch::default();
            let applied = decode::<u16>(Instructions::default(), body, &mut target, scratch, &mut |_, _| {});
            assert_eq!(target, [[1, 2]; 300]);
            applied.map_err(|error| error.message().to_owned())
        };
        let most = MOST_COLUMNS as u64;
        assert_eq!(apply(&body(columns(most, most - 1), 0, &[])), Ok(()));
        for (columns_, first) in [(0, 0), (most + 1, 0), (u64::MAX, 3), (7, 7), (7, u64::MAX)] {
            let error = apply(&body(columns(columns_, first), 0, &[])).unwrap_err();
            assert_eq!(error, format!("column {first} of {columns_}, at most {MOST_COLUMNS}"));
        }
        // Nothing is decided, and still the first 8 bytes are read.
        assert_eq!(apply(&body(|bits| bits.put(0, 4), 8, &[9; 8])), Ok(()));
        assert_eq!(apply(&body(|bits| bits.put(0, 4), 9, &[9; 9])), Err("1 bytes behind its end".to_owned()));
        for (length, found) in [(0, 1), (2, 1), (u64::MAX, 4)] {
            let error = apply(&body(|bits| bits.put(0, 4), length, &vec![9; found])).unwrap_err();
            assert_eq!(error, format!("wanted {length} bytes of steps, found {found}"));
        }
    }

    #[test]
    fn columns_are_found_without_division() {
        for columns in [1, 2, 3, 7, 576, 1 << 13, MOST_COLUMNS - 1, MOST_COLUMNS] {
            for first in [0, columns / 2, columns - 1] {
                let of = Layout { shift: 0, columns, first }.columns();
                for element in (0..1 << 21).step_by(997).chain([(1 << 21) - 1]) {
                    assert_eq!(of.of(element), (first + element) % columns, "{columns} {first} {element}");
                }
            }
        }
    }
}
