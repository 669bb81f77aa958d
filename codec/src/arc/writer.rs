//! Writes arc_v3 envelopes: always the same bytes for the same input.
//!
//! One scan finds the changed elements, keeps them, and measures what decides the layout. The streams of numbers are
//! made from that list and go straight into the compressor, so the payload never stands in memory.

use towline_core::{Error, Result, UnitMeta};

use super::adler;
use super::changes::{Changes, Facts};
use super::layout::{Layout, narrowest, rows, uint_name};
use super::pickler::{END, Pickle, Piece};
use crate::ARC_V3_TAG;
use crate::zframe::Writer;

/// The elements of the largest tensor that is written as an envelope: their positions are kept in 4 bytes.
pub(super) const MAX_ELEMENTS: usize = u32::MAX as usize;
/// Fewer changes do not make up for the keys.
const MIN_CHANGES: u64 = 1500;
/// The numbers that go into the compressor at a time, in bytes.
const BATCH: usize = 8 << 10;

/// Appends the envelope that takes `parent` to `current`, and says whether it did: where an XOR is smaller, it does
/// not.
pub(super) fn envelope(
    unit: &UnitMeta<'_>,
    layout: Layout,
    parent: &[u8],
    current: &[u8],
    out: &mut Vec<u8>,
) -> Result<bool> {
    match layout.bytes {
        1 => Envelope::<1>::new(unit, layout, parent, current).write(out),
        2 => Envelope::<2>::new(unit, layout, parent, current).write(out),
        _ => Envelope::<4>::new(unit, layout, parent, current).write(out),
    }
}

/// A tensor of `N`-byte elements and what changed in it.
struct Envelope<'a, const N: usize> {
    shape: &'a [usize],
    layout: Layout,
    rows: usize,
    width: usize,
    current: &'a [u8],
    changes: Changes<N>,
}

/// One stream of numbers in the payload. The numbers have this many bytes.
#[derive(Debug, Clone, Copy)]
enum Stream {
    Mantissas(usize),
    ExceptionPositions(usize),
    ExceptionValues,
    Flat(usize),
    /// The counts have; each row tells of its columns.
    Row(usize),
}

impl<'a, const N: usize> Envelope<'a, N> {
    fn new(unit: &UnitMeta<'a>, layout: Layout, parent: &[u8], current: &'a [u8]) -> Self {
        let (rows, width) = rows(unit);
        let changes = Changes::find(layout, rows, width, parent, current);
        Self { shape: unit.shape, layout, rows, width, current, changes }
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<bool> {
        if !self.is_smaller() {
            return Ok(false);
        }
        let (pieces, length) = self.payload();
        let length = usize::try_from(length).map_err(|_| Error::internal("a payload is too long"))?;
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
        let mut numbers = Numbers { writer: Writer::new(out, length), batch: Vec::new() };
        for piece in &pieces {
            match piece {
                Piece::Bytes(bytes) => numbers.writer.write(bytes),
                Piece::Stream(stream) => self.stream(*stream, &mut numbers),
            }
        }
        // It fails if the streams do not have the lengths that they were said to have.
        numbers.writer.finish()?;
        let data_len = (out.len() - data_at) as u64;
        out.get_mut(length_at..data_at)
            .ok_or_else(|| Error::internal("an envelope lost its head"))?
            .copy_from_slice(&data_len.to_le_bytes());
        out.extend_from_slice(END);
        Ok(true)
    }

    /// Whether the envelope is smaller than the fallback, by what was measured on training steps.
    fn is_smaller(&self) -> bool {
        let Facts { count, exceptions, .. } = self.changes.facts;
        // Its keys take 220 bytes more, and it saves some bits of each change; an exception costs its whole value and
        // its position on top.
        count == 0 || count >= MIN_CHANGES && exceptions * 3 <= count
    }

    /// The parts of the payload's pickle, and their length together.
    fn payload(&self) -> (Vec<Piece<Stream>>, u64) {
        let changed = self.changes.facts.count > 0;
        let mut pickle = Pickle::new();
        pickle.entry_int("version", 1);
        pickle.entry_text("strategy", if changed { "mantissa_xor" } else { "none" });
        pickle.text("shape");
        pickle.tuple(self.shape);
        pickle.entry_text("dtype", self.layout.names.first().copied().unwrap_or_default());
        pickle.entry_text("checksum", &adler(self.current).to_string());
        if changed {
            self.update(&mut pickle);
        }
        pickle.finish()
    }

    fn update(&self, pickle: &mut Pickle<Stream>) {
        let facts = &self.changes.facts;
        // A zigzag value is hardly ever wider than an XOR, and mostly narrower.
        let bytes = narrowest(facts.max_value.into());
        pickle.entry_int("mantissa_bits", u64::from(self.layout.mantissa_bits));
        pickle.entry_int("total_bits", u64::from(self.layout.total_bits()));
        pickle.entry_text("transform", "zigzag");
        pickle.entry_text("mantissa_dtype", uint_name(bytes));
        pickle.text("mantissa_stream");
        pickle.dict(|pickle| {
            pickle.entry_text("kind", "raw");
            pickle.entry_text("dtype", uint_name(bytes));
            pickle.stream("data", Stream::Mantissas(bytes), facts.count * bytes as u64);
        });
        let gap = narrowest(facts.max_exception_gap);
        pickle.text("exception_positions");
        pickle.dict(|pickle| {
            pickle.entry_int("count", facts.exceptions);
            pickle.entry_text("dtype", uint_name(gap));
            pickle.stream("data", Stream::ExceptionPositions(gap), facts.exceptions * gap as u64);
        });
        pickle.entry_text("exception_dtype", self.layout.uint());
        pickle.stream("exception_values", Stream::ExceptionValues, facts.exceptions * N as u64);
        pickle.entry_text("uint_dtype", self.layout.uint());
        pickle.text("indices");
        let (flat, count) = (narrowest(facts.max_gap.into()), narrowest(facts.max_row_count.into()));
        let flat_bytes = facts.count * flat as u64;
        let row_bytes = facts.row_bytes.map(|bytes| self.rows as u64 * count as u64 + bytes);
        pickle.dict(|pickle| match row_bytes.filter(|&bytes| bytes < flat_bytes) {
            None => {
                pickle.entry_int("count", facts.count);
                pickle.entry_text("dtype", uint_name(flat));
                pickle.stream("data", Stream::Flat(flat), flat_bytes);
                pickle.entry_text("kind", "flat");
            }
            Some(row_bytes) => {
                pickle.entry_text("kind", "row");
                pickle.text("shape");
                pickle.tuple(self.shape);
                pickle.entry_int("n_rows", self.rows as u64);
                pickle.entry_int("row_width", self.width as u64);
                pickle.entry_text("count_dtype", uint_name(count));
                pickle.stream("data", Stream::Row(count), row_bytes);
            }
        });
    }

    fn stream(&self, stream: Stream, out: &mut Numbers<'_>) {
        match stream {
            Stream::Mantissas(bytes) => self.changes.values().for_each(|values| out.put_all(bytes, values)),
            Stream::ExceptionPositions(bytes) => {
                let mut last = 0;
                self.changes.exceptions(|index, _| {
                    // Larger tensors are not written as envelopes.
                    out.put(bytes, u32::try_from(index - last).unwrap_or(u32::MAX));
                    last = index;
                });
            }
            Stream::ExceptionValues => {
                let elements = self.current.as_chunks::<N>().0;
                self.changes.exceptions(|_, position| {
                    out.put_bytes(elements.get(position as usize).map_or(&[], |element| element));
                });
            }
            Stream::Flat(bytes) => self.changes.gaps().for_each(|(first, gaps)| {
                out.put(bytes, first);
                out.put_all(bytes, gaps);
            }),
            Stream::Row(bytes) => {
                let mut next = 0;
                self.changes.row_counts(|row, count| {
                    (next..row).for_each(|_| out.put(bytes, 0));
                    out.put(bytes, count);
                    next = row + 1;
                });
                (next..self.rows as u64).for_each(|_| out.put(bytes, 0));
                self.changes.columns(|bytes, gap, first| {
                    if first {
                        out.put(1, bytes.into());
                    }
                    out.put(bytes.into(), gap);
                });
            }
        }
        out.end();
    }
}

/// Little-endian numbers on their way into the compressor.
struct Numbers<'a> {
    writer: Writer<'a>,
    batch: Vec<u8>,
}

impl Numbers<'_> {
    /// Appends numbers of this many bytes.
    fn put_all(&mut self, bytes: usize, numbers: impl ExactSizeIterator<Item = u32>) {
        match bytes {
            1 => self.extend::<1>(numbers),
            2 => self.extend::<2>(numbers),
            _ => self.extend::<4>(numbers),
        }
    }

    fn extend<const W: usize>(&mut self, numbers: impl ExactSizeIterator<Item = u32>) {
        let start = self.batch.len();
        self.batch.resize(start + W * numbers.len(), 0);
        let places = self.batch.get_mut(start..).unwrap_or_default().as_chunks_mut::<W>().0;
        for (place, number) in places.iter_mut().zip(numbers) {
            place.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
        self.flush();
    }

    /// Appends one number.
    #[inline]
    fn put(&mut self, bytes: usize, number: u32) {
        let number = number.to_le_bytes();
        match bytes {
            1 => self.put_bytes(&number[..1]),
            2 => self.put_bytes(&number[..2]),
            _ => self.put_bytes(&number),
        }
    }

    #[inline]
    fn put_bytes(&mut self, bytes: &[u8]) {
        self.batch.extend_from_slice(bytes);
        if self.batch.len() >= BATCH {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.writer.write(&self.batch);
        self.batch.clear();
    }

    /// Ends a stream. The next one has other statistics.
    fn end(&mut self) {
        self.flush();
        self.writer.cut();
    }
}
