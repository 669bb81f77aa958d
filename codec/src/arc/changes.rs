//! The changed elements of a tensor: found in one scan, kept in 4 bytes and an element's bytes for each.

use super::layout::{Layout, load, narrowest};

/// How many changes are kept in one piece. Full pieces stay where they are, so memory grows by what is kept.
const PIECE: usize = 16 << 10;
/// The bytes that are compared at a time.
const CHUNK: usize = 64;
/// The highest bit of each byte.
const TOPS: u64 = 0x8080_8080_8080_8080;
/// Narrower rows have no room for gaps that are smaller than flat ones.
const MIN_ROW: u32 = 8;

/// The changed elements of `N` bytes, in ascending order.
pub(super) struct Changes<const N: usize> {
    pieces: Vec<Piece<N>>,
    pub(super) facts: Facts,
    /// The bytes of a column in each row that changed. Empty where rows are not worth it.
    row_widths: Vec<u8>,
    width: u32,
}

/// Some changes: their positions, and what became of their mantissas.
#[derive(Default)]
struct Piece<const N: usize> {
    positions: Vec<u32>,
    values: Vec<[u8; N]>,
}

/// What decides how wide numbers are and which form is smaller.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) count: u64,
    pub(super) max_gap: u32,
    /// The largest zigzag value of a mantissa.
    pub(super) max_value: u32,
    /// How many changed in sign or exponent.
    pub(super) exceptions: u64,
    pub(super) max_exception_gap: u64,
    pub(super) max_row_count: u32,
    /// The bytes of the columns of all rows, with the byte for each row that tells their width. `None` where rows
    /// are not worth it.
    pub(super) row_bytes: Option<u64>,
}

/// The value that stands for an exception. No zigzag value has as many bits.
const fn exception<const N: usize>() -> u32 {
    u32::MAX >> (32 - 8 * N)
}

fn is_exception<const N: usize>(value: [u8; N]) -> bool {
    load(value) == exception::<N>()
}

/// A row of the tensor, and the changes in it so far.
#[derive(Default)]
struct Row {
    start: u64,
    end: u64,
    last: u32,
    count: u32,
    max_gap: u32,
}

impl Row {
    /// The gap before `position`, if it is in this row.
    #[inline]
    fn gap(&mut self, position: u32) -> Option<u32> {
        if u64::from(position) >= self.end {
            return None;
        }
        let gap = position - self.last;
        self.last = position;
        self.count += 1;
        self.max_gap = self.max_gap.max(gap);
        Some(gap)
    }

    /// The row of `position`, which is the first change in it.
    fn begin(position: u32, width: u32) -> (Self, u32) {
        let (start, gap) = (position - position % width, position % width);
        let end = u64::from(start) + u64::from(width);
        (Self { start: start.into(), end, last: position, count: 1, max_gap: gap }, gap)
    }
}

impl<const N: usize> Changes<N> {
    /// Compares two versions of a tensor with `rows` rows of `width` elements.
    pub(super) fn find(layout: Layout, rows: usize, width: usize, parent: &[u8], current: &[u8]) -> Self {
        // A width is at most the number of elements, which fits.
        let width = u32::try_from(width).unwrap_or(u32::MAX);
        let mut found = Self { pieces: Vec::new(), facts: Facts::default(), row_widths: Vec::new(), width };
        let mut last = Last::default();
        let mut piece = Piece::default();
        let (old, old_rest) = parent.as_chunks::<CHUNK>();
        let (new, new_rest) = current.as_chunks::<CHUNK>();
        let mut start = 0;
        for (old, new) in old.iter().zip(new) {
            let changed = differing(old, new);
            if changed != 0 {
                piece.take(layout, start, elements::<N>(changed), old.as_chunks().0, new.as_chunks().0);
                if piece.positions.len() > PIECE - CHUNK {
                    found.facts.measure(&piece, &mut last);
                    found.pieces.push(std::mem::replace(&mut piece, Piece::full()));
                }
            }
            start += CHUNK / N;
        }
        let (old, new) = (old_rest.as_chunks::<N>().0, new_rest.as_chunks::<N>().0);
        let rest = (0..).zip(old.iter().zip(new)).filter(|(_, (old, new))| old != new);
        let changed = rest.fold(0, |bits, (index, _)| bits | 1 << (N * index));
        piece.take(layout, start, changed, old, new);
        found.facts.measure(&piece, &mut last);
        found.pieces.push(piece);
        // Where gaps take one byte, no columns can take less.
        if rows > 1 && width >= MIN_ROW && narrowest(found.facts.max_gap.into()) > 1 {
            found.measure_rows();
        }
        found
    }

    fn measure_rows(&mut self) {
        let Self { pieces, facts, row_widths, width } = self;
        let mut total = 0;
        let mut end = |row: &Row| {
            if row.count > 0 {
                let bytes = narrowest(row.max_gap.into());
                row_widths.push(bytes.to_le_bytes()[0]);
                total += 1 + u64::from(row.count) * bytes as u64;
                facts.max_row_count = facts.max_row_count.max(row.count);
            }
        };
        let mut row = Row::default();
        for &position in pieces.iter().flat_map(|piece| &piece.positions) {
            if row.gap(position).is_none() {
                end(&row);
                row = Row::begin(position, *width).0;
            }
        }
        end(&row);
        facts.row_bytes = Some(total);
    }

    /// The values in order, in slices: zigzag, and zero for exceptions.
    pub(super) fn values(&self) -> impl Iterator<Item = impl ExactSizeIterator<Item = u32>> {
        let value = |value: &[u8; N]| if is_exception(*value) { 0 } else { load(*value) };
        self.pieces.iter().map(move |piece| piece.values.iter().map(value))
    }

    /// The gaps between the positions, in slices, each behind its first one.
    pub(super) fn gaps(&self) -> impl Iterator<Item = (u32, impl ExactSizeIterator<Item = u32>)> {
        let mut last = 0;
        self.pieces.iter().filter_map(move |piece| {
            let first = piece.positions.first()? - last;
            last = *piece.positions.last()?;
            Some((first, piece.positions.array_windows().map(|[before, after]| after - before)))
        })
    }

    /// Hands the index among the changes and the position of each exception to `sink`.
    pub(super) fn exceptions(&self, mut sink: impl FnMut(u64, u32)) {
        let mut start = 0;
        for piece in &self.pieces {
            for (values, positions) in piece.values.chunks(64).zip(piece.positions.chunks(64)) {
                // They are rare: most stretches have none, which is soon seen.
                if values.iter().fold(false, |any, value| any | is_exception(*value)) {
                    for ((index, value), &position) in (start..).zip(values).zip(positions) {
                        if is_exception(*value) {
                            sink(index, position);
                        }
                    }
                }
                start += values.len() as u64;
            }
        }
    }

    /// Hands the number of the row, and how many changes it has, to `sink` for each row that changed.
    pub(super) fn row_counts(&self, mut sink: impl FnMut(u64, u32)) {
        let mut row = Row::default();
        for &position in self.pieces.iter().flat_map(|piece| &piece.positions) {
            if row.gap(position).is_none() {
                let done = std::mem::replace(&mut row, Row::begin(position, self.width).0);
                if done.count > 0 {
                    sink(done.start / u64::from(self.width), done.count);
                }
            }
        }
        if row.count > 0 {
            sink(row.start / u64::from(self.width), row.count);
        }
    }

    /// Hands each row's columns to `sink`: their width in bytes and the gap before each, the first one with `true`.
    pub(super) fn columns(&self, mut sink: impl FnMut(u8, u32, bool)) {
        let (mut row, mut widths, mut bytes) = (Row::default(), self.row_widths.iter(), 1);
        for &position in self.pieces.iter().flat_map(|piece| &piece.positions) {
            match row.gap(position) {
                Some(gap) => sink(bytes, gap, false),
                None => {
                    let gap;
                    (row, gap) = Row::begin(position, self.width);
                    bytes = widths.next().copied().unwrap_or(4);
                    sink(bytes, gap, true);
                }
            }
        }
    }
}

impl<const N: usize> Piece<N> {
    fn full() -> Self {
        Self { positions: Vec::with_capacity(PIECE), values: Vec::with_capacity(PIECE) }
    }

    /// The elements at `start` that have a bit in `changed`.
    #[inline]
    fn take(&mut self, layout: Layout, start: usize, mut changed: u64, old: &[[u8; N]], new: &[[u8; N]]) {
        // Larger tensors are not written as envelopes.
        let position = |index: usize| u32::try_from(start + index).unwrap_or(u32::MAX);
        if changed.count_ones() as usize == CHUNK / N {
            self.positions.extend((0..CHUNK / N).map(position));
            self.values.extend(old.iter().zip(new).map(|(old, new)| value(layout, *old, *new)));
            return;
        }
        while changed != 0 {
            let index = changed.trailing_zeros() as usize / N;
            changed &= changed - 1;
            if let (Some(old), Some(new)) = (old.get(index), new.get(index)) {
                self.positions.push(position(index));
                self.values.push(value(layout, *old, *new));
            }
        }
    }
}

/// What became of a mantissa: the difference 0, −1, 1, −2 … as 0, 1, 2, 3 …, or an exception.
#[inline]
fn value<const N: usize>(layout: Layout, old: [u8; N], new: [u8; N]) -> [u8; N] {
    let (old, new) = (load(old), load(new));
    // Mantissas have at most 23 bits.
    let difference = new.wrapping_sub(old).cast_signed();
    let zigzag = (difference << 1 ^ difference >> 31).cast_unsigned();
    let value = if (old ^ new) & !layout.mask() == 0 { zigzag } else { exception::<N>() };
    let mut bytes = [0; N];
    bytes.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    bytes
}

/// Where the pieces before ended.
#[derive(Default)]
struct Last {
    position: u32,
    exception: u64,
}

impl Facts {
    fn measure<const N: usize>(&mut self, piece: &Piece<N>, last: &mut Last) {
        let (Some(&first), Some(&end)) = (piece.positions.first(), piece.positions.last()) else { return };
        let gaps = piece.positions.array_windows().map(|[before, after]| after - before);
        self.max_gap = gaps.fold(self.max_gap.max(first - last.position), u32::max);
        last.position = end;
        let mut exceptions = 0u32;
        for &value in &piece.values {
            let regular = !is_exception(value);
            exceptions += u32::from(!regular);
            self.max_value = self.max_value.max(if regular { load(value) } else { 0 });
        }
        if exceptions > 0 {
            self.exceptions += u64::from(exceptions);
            for (index, _) in (self.count..).zip(&piece.values).filter(|(_, value)| is_exception(**value)) {
                self.max_exception_gap = self.max_exception_gap.max(index - last.exception);
                last.exception = index;
            }
        }
        self.count += piece.positions.len() as u64;
    }
}

/// One bit for each byte in which `old` and `new` differ.
#[inline]
fn differing(old: &[u8; CHUNK], new: &[u8; CHUNK]) -> u64 {
    let words = || old.as_chunks().0.iter().zip(new.as_chunks().0);
    let xor = |(old, new): (&[u8; 8], &[u8; 8])| u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new);
    // Most are equal, which is soon seen.
    if words().fold(0, |all, pair| all | xor(pair)) == 0 {
        return 0;
    }
    let mut bits = 0;
    for (index, word) in words().map(xor).enumerate() {
        let tops = (((word & !TOPS) + !TOPS) | word) & TOPS;
        bits |= ((tops >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * index);
    }
    bits
}

/// The bit of an element's first byte for those of its bytes.
#[inline]
fn elements<const N: usize>(bytes: u64) -> u64 {
    match N {
        1 => bytes,
        2 => (bytes | bytes >> 1) & 0x5555_5555_5555_5555,
        _ => {
            let pairs = bytes | bytes >> 1;
            (pairs | pairs >> 2) & 0x1111_1111_1111_1111
        }
    }
}
