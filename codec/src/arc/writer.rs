//! Writes arc_v3 envelopes: always the same bytes for the same input.
//!
//! One scan finds the changed elements and keeps 4 bytes for each. The streams of numbers are made from that list
//! and go straight into the compressor, so the payload never stands in memory.

use std::io::{self, BufWriter, Write};

use towline_core::{Error, Result, UnitMeta};
use zstd::stream::write::Encoder;

use super::apply::load;
use super::layout::{Layout, narrowest, rows, uint_name};
use super::pickler::{END, Pickle, Piece};
use super::{CHUNK, adler, cannot_write};
use crate::ARC_V3_TAG;

/// The level of the payload's frame, as the reference writes it. Higher ones gain nothing on these streams.
const LEVEL: i32 = 1;

/// The elements of the largest tensor that is written as an envelope: their positions are kept in 4 bytes.
pub(super) const MAX_ELEMENTS: usize = u32::MAX as usize;

/// Appends the envelope that takes `parent` to `current`, and returns how many elements it changes.
pub(super) fn envelope(
    unit: &UnitMeta<'_>,
    layout: Layout,
    parent: &[u8],
    current: &[u8],
    out: &mut Vec<u8>,
) -> Result<usize> {
    match layout.bytes {
        1 => Change::<1>::new(unit, layout, parent, current).envelope(out),
        2 => Change::<2>::new(unit, layout, parent, current).envelope(out),
        _ => Change::<4>::new(unit, layout, parent, current).envelope(out),
    }
}

/// A tensor of `N`-byte elements, its parent, and where they differ.
struct Change<'a, const N: usize> {
    shape: &'a [usize],
    layout: Layout,
    rows: usize,
    width: usize,
    parent: &'a [[u8; N]],
    current: &'a [[u8; N]],
    /// Ascending.
    positions: Vec<u32>,
    checksum: u32,
}

/// What decides how wide numbers are and which form is smaller.
#[derive(Debug, Default)]
struct Facts {
    exceptions: u64,
    max_gap: u32,
    max_row_count: u64,
    row_bytes: u64,
    max_exception_gap: u64,
    max_xor: u32,
    max_zigzag: u32,
}

/// One stream of numbers in the payload.
#[derive(Debug, Clone, Copy)]
enum Stream {
    Mantissas { bytes: usize, zigzag: bool },
    ExceptionPositions { bytes: usize },
    ExceptionValues,
    Flat { bytes: usize },
    Row { count_bytes: usize },
}

impl<'a, const N: usize> Change<'a, N> {
    fn new(unit: &UnitMeta<'a>, layout: Layout, parent: &'a [u8], current: &'a [u8]) -> Self {
        let (rows, width) = rows(unit);
        Self {
            shape: unit.shape,
            layout,
            rows,
            width,
            parent: parent.as_chunks().0,
            current: current.as_chunks().0,
            positions: changed::<N>(parent, current),
            checksum: adler(current),
        }
    }

    fn envelope(&self, out: &mut Vec<u8>) -> Result<usize> {
        let (pieces, length) = self.payload();
        let mut head = Pickle::<Stream>::new();
        head.entry_text("codec", "zstd");
        head.text("data");
        out.extend_from_slice(ARC_V3_TAG);
        out.extend_from_slice(head.bytes());
        // BINBYTES8, with the length set when it is known.
        out.push(0x8e);
        let length_at = out.len();
        out.extend_from_slice(&[0; 8]);
        let data_at = out.len();
        self.compress(&pieces, length, out).map_err(cannot_write)?;
        let data_len = (out.len() - data_at) as u64;
        out.get_mut(length_at..data_at)
            .ok_or_else(|| Error::internal("an envelope lost its head"))?
            .copy_from_slice(&data_len.to_le_bytes());
        out.extend_from_slice(END);
        Ok(self.positions.len())
    }

    fn compress(&self, pieces: &[Piece<Stream>], length: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let mut encoder = Encoder::new(out, LEVEL)?;
        encoder.set_pledged_src_size(Some(length))?;
        let mut buffered = BufWriter::with_capacity(CHUNK, encoder);
        for piece in pieces {
            match piece {
                Piece::Bytes(bytes) => buffered.write_all(bytes)?,
                Piece::Stream(stream) => self.stream(*stream, &mut buffered)?,
            }
        }
        // The encoder fails here if the streams did not have the length that was pledged.
        buffered.into_inner().map_err(io::IntoInnerError::into_error)?.finish()?;
        Ok(())
    }

    /// The parts of the payload's pickle, and their length together.
    fn payload(&self) -> (Vec<Piece<Stream>>, u64) {
        let mut pickle = Pickle::new();
        pickle.entry_int("version", 1);
        pickle.entry_text("strategy", if self.positions.is_empty() { "none" } else { "mantissa_xor" });
        pickle.text("shape");
        pickle.tuple(self.shape);
        pickle.entry_text("dtype", self.layout.names.first().copied().unwrap_or_default());
        pickle.entry_text("checksum", &self.checksum.to_string());
        if !self.positions.is_empty() {
            self.update(&mut pickle);
        }
        pickle.finish()
    }

    fn update(&self, pickle: &mut Pickle<Stream>) {
        let (facts, changed) = (self.measure(), self.positions.len() as u64);
        let (xor, zigzag) = (narrowest(facts.max_xor.into()), narrowest(facts.max_zigzag.into()));
        let (bytes, zigzag) = (xor.min(zigzag), zigzag <= xor);
        pickle.entry_int("mantissa_bits", u64::from(self.layout.mantissa_bits));
        pickle.entry_int("total_bits", u64::from(self.layout.total_bits()));
        pickle.entry_text("transform", if zigzag { "zigzag" } else { "xor" });
        pickle.entry_text("mantissa_dtype", uint_name(bytes));
        pickle.text("mantissa_stream");
        pickle.dict(|pickle| {
            pickle.entry_text("kind", "raw");
            pickle.entry_text("dtype", uint_name(bytes));
            pickle.stream("data", Stream::Mantissas { bytes, zigzag }, changed * bytes as u64);
        });
        let gap = narrowest(facts.max_exception_gap);
        pickle.text("exception_positions");
        pickle.dict(|pickle| {
            pickle.entry_int("count", facts.exceptions);
            pickle.entry_text("dtype", uint_name(gap));
            pickle.stream("data", Stream::ExceptionPositions { bytes: gap }, facts.exceptions * gap as u64);
        });
        pickle.entry_text("exception_dtype", self.layout.uint());
        pickle.stream("exception_values", Stream::ExceptionValues, facts.exceptions * N as u64);
        pickle.entry_text("uint_dtype", self.layout.uint());
        pickle.text("indices");
        let (flat, count) = (narrowest(facts.max_gap.into()), narrowest(facts.max_row_count));
        let flat_bytes = changed * flat as u64;
        let row_bytes = self.rows as u64 * count as u64 + facts.row_bytes;
        pickle.dict(|pickle| {
            if flat_bytes <= row_bytes {
                pickle.entry_int("count", changed);
                pickle.entry_text("dtype", uint_name(flat));
                pickle.stream("data", Stream::Flat { bytes: flat }, flat_bytes);
                pickle.entry_text("kind", "flat");
            } else {
                pickle.entry_text("kind", "row");
                pickle.text("shape");
                pickle.tuple(self.shape);
                pickle.entry_int("n_rows", self.rows as u64);
                pickle.entry_int("row_width", self.width as u64);
                pickle.entry_text("count_dtype", uint_name(count));
                pickle.stream("data", Stream::Row { count_bytes: count }, row_bytes);
            }
        });
    }

    fn measure(&self) -> Facts {
        let mut facts = Facts { max_gap: gaps(&self.positions, 0).max().unwrap_or(0), ..Facts::default() };
        let mut last_exception = 0;
        for (index, (old, new)) in (0..).zip(self.bits()) {
            if self.is_exception(old, new) {
                facts.max_exception_gap = facts.max_exception_gap.max(index - last_exception);
                last_exception = index;
                facts.exceptions += 1;
            } else {
                facts.max_xor = facts.max_xor.max(self.xor(old, new));
                facts.max_zigzag = facts.max_zigzag.max(self.zigzag(old, new));
            }
        }
        for (start, row) in self.changed_rows() {
            let count = row.len() as u64;
            facts.max_row_count = facts.max_row_count.max(count);
            facts.row_bytes += 1 + count * column_bytes(row, start) as u64;
        }
        facts
    }

    fn stream(&self, stream: Stream, out: &mut impl Write) -> io::Result<()> {
        match stream {
            Stream::Mantissas { bytes, zigzag } => self.bits().try_for_each(|(old, new)| {
                let value = match (self.is_exception(old, new), zigzag) {
                    (true, _) => 0,
                    (false, true) => self.zigzag(old, new),
                    (false, false) => self.xor(old, new),
                };
                put(out, bytes, value.into())
            }),
            Stream::ExceptionPositions { bytes } => {
                let mut last = 0;
                (0..).zip(self.bits()).filter(|(_, (old, new))| self.is_exception(*old, *new)).try_for_each(
                    |(index, _)| {
                        let gap = index - last;
                        last = index;
                        put(out, bytes, gap)
                    },
                )
            }
            Stream::ExceptionValues => self
                .bits()
                .filter(|(old, new)| self.is_exception(*old, *new))
                .try_for_each(|(_, new)| put(out, N, new.into())),
            Stream::Flat { bytes } => {
                gaps(&self.positions, 0).try_for_each(|gap| put(out, bytes, gap.into()))
            }
            Stream::Row { count_bytes } => {
                let mut rows = self.changed_rows().peekable();
                for row in 0..self.rows {
                    let here = rows.next_if(|(start, _)| *start as usize == row * self.width);
                    put(out, count_bytes, here.map_or(0, |(_, row)| row.len() as u64))?;
                }
                self.changed_rows().try_for_each(|(start, row)| {
                    let bytes = column_bytes(row, start);
                    put(out, 1, bytes as u64)?;
                    gaps(row, start).try_for_each(|gap| put(out, bytes, gap.into()))
                })
            }
        }
    }

    /// The old and the new bits of each changed element.
    fn bits(&self) -> impl Iterator<Item = (u32, u32)> {
        self.positions.iter().filter_map(|&position| {
            let position = position as usize;
            Some((load(*self.parent.get(position)?), load(*self.current.get(position)?)))
        })
    }

    /// The first position and the changed positions of each row that changed.
    fn changed_rows(&self) -> impl Iterator<Item = (u32, &[u32])> {
        // The width is at most the number of elements, which fits.
        let width = u32::try_from(self.width).unwrap_or(u32::MAX);
        let rows = self.positions.chunk_by(move |left, right| left / width == right / width);
        rows.filter_map(move |row| row.first().map(|first| (first - first % width, row)))
    }

    fn is_exception(&self, old: u32, new: u32) -> bool {
        (old ^ new) & !self.layout.mask() != 0
    }

    fn xor(&self, old: u32, new: u32) -> u32 {
        (old ^ new) & self.layout.mask()
    }

    /// The difference 0, −1, 1, −2 … as 0, 1, 2, 3 ….
    fn zigzag(&self, old: u32, new: u32) -> u32 {
        let (old, new) = (old & self.layout.mask(), new & self.layout.mask());
        if new >= old { (new - old) << 1 } else { ((old - new) << 1) - 1 }
    }
}

/// The positions of the elements that differ.
fn changed<const N: usize>(parent: &[u8], current: &[u8]) -> Vec<u32> {
    // Equal stretches are left behind by 64 bytes, then by 16.
    let mut positions = Vec::new();
    for (coarse, (old, new)) in parent.chunks(64).zip(current.chunks(64)).enumerate() {
        if old == new {
            continue;
        }
        for (fine, (old, new)) in old.chunks(16).zip(new.chunks(16)).enumerate() {
            if old == new {
                continue;
            }
            let start = (coarse * 64 + fine * 16) / N;
            let pairs = old.as_chunks::<N>().0.iter().zip(new.as_chunks::<N>().0).enumerate();
            let differing = pairs.filter(|(_, (old, new))| old != new);
            positions.extend(differing.filter_map(|(at, _)| u32::try_from(start + at).ok()));
        }
    }
    positions
}

/// The first of `positions` counted from `start`, and the differences of the others.
fn gaps(positions: &[u32], start: u32) -> impl Iterator<Item = u32> {
    let before = std::iter::once(start).chain(positions.iter().copied());
    positions.iter().zip(before).map(|(position, before)| position - before)
}

/// The bytes of a column in the row that begins at `start`.
fn column_bytes(row: &[u32], start: u32) -> usize {
    narrowest(gaps(row, start).max().unwrap_or(0).into())
}

fn put(out: &mut impl Write, bytes: usize, number: u64) -> io::Result<()> {
    let number = number.to_le_bytes();
    match bytes {
        1 => out.write_all(&number[..1]),
        2 => out.write_all(&number[..2]),
        4 => out.write_all(&number[..4]),
        _ => out.write_all(&number),
    }
}
