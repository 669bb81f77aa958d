//! The number streams of an arc_v3 payload, read one number at a time from the bytes that hold them.

use towline_core::{Error, Result};

use super::layout::uint_bytes;
use super::pickle::Dict;

/// Unsigned little-endian numbers of one width.
#[derive(Debug)]
pub(super) struct Numbers<'a> {
    width: usize,
    rest: &'a [u8],
}

impl<'a> Numbers<'a> {
    /// The numbers in `data`, of the type called `dtype`.
    pub(super) fn new(dtype: &str, data: &'a [u8]) -> Result<Self> {
        let width = uint_bytes(dtype)
            .ok_or_else(|| bad(format!("`{}` is no unsigned integer", dtype.escape_debug())))?;
        Self::of_width(width, data)
    }

    fn of_width(width: usize, data: &'a [u8]) -> Result<Self> {
        if !data.len().is_multiple_of(width) {
            return Err(bad(format!("{} bytes are no whole numbers of {width}", data.len())));
        }
        Ok(Self { width, rest: data })
    }

    /// How many are left.
    pub(super) fn len(&self) -> usize {
        self.rest.len() / self.width
    }

    /// The next one.
    pub(super) fn next(&mut self) -> Option<u64> {
        let (number, rest) = match self.width {
            1 => self.rest.split_first().map(|(byte, rest)| (u64::from(*byte), rest)),
            2 => self.rest.split_first_chunk().map(|(n, rest)| (u64::from(u16::from_le_bytes(*n)), rest)),
            4 => self.rest.split_first_chunk().map(|(n, rest)| (u64::from(u32::from_le_bytes(*n)), rest)),
            _ => self.rest.split_first_chunk().map(|(n, rest)| (u64::from_le_bytes(*n), rest)),
        }?;
        self.rest = rest;
        Some(number)
    }

    /// The next ones, as many as there are and have room.
    fn fill<'b>(&mut self, buffer: &'b mut [u64]) -> &'b mut [u64] {
        fn widen<const W: usize>(bytes: &[u8], numbers: &mut [u64]) {
            for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks::<W>().0) {
                let mut wide = [0; 8];
                wide.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
                *number = u64::from_le_bytes(wide);
            }
        }
        let count = self.len().min(buffer.len());
        let (now, later) = self.rest.split_at(count * self.width);
        let numbers = buffer.split_at_mut(count).0;
        match self.width {
            1 => widen::<1>(now, numbers),
            2 => widen::<2>(now, numbers),
            4 => widen::<4>(now, numbers),
            _ => widen::<8>(now, numbers),
        }
        self.rest = later;
        numbers
    }
}

/// Positions stored as the first one and the differences of the others, strictly ascending.
#[derive(Debug)]
pub(super) struct Deltas<'a> {
    numbers: Numbers<'a>,
    last: Option<u64>,
    limit: u64,
}

impl<'a> Deltas<'a> {
    /// The delta index list in `dict`, of positions below `limit`.
    pub(super) fn of(dict: &Dict<'_, 'a>, limit: usize) -> Result<Self> {
        let (count, numbers) = (dict.size("count")?, Numbers::new(dict.text("dtype")?, dict.bytes("data")?)?);
        if count != numbers.len() {
            return Err(bad(format!("an index list of {count} has {}", numbers.len())));
        }
        Ok(Self { numbers, last: None, limit: limit as u64 })
    }

    /// How many are left.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The next one.
    pub(super) fn next(&mut self) -> Result<Option<u64>> {
        let Some(delta) = self.numbers.next() else { return Ok(None) };
        let position = match self.last {
            None => Some(delta),
            Some(_) if delta == 0 => None,
            Some(last) => last.checked_add(delta),
        };
        match position.filter(|&position| position < self.limit) {
            None => Err(self.disorder()),
            position => {
                self.last = position;
                Ok(position)
            }
        }
    }
}

impl Deltas<'_> {
    /// The next ones, as many as there are and have room.
    fn fill<'b>(&mut self, buffer: &'b mut [u64]) -> Result<&'b mut [u64]> {
        let numbers = self.numbers.fill(buffer);
        let mut numbers_left = numbers.iter_mut();
        let (mut last, mut wrong) = match (self.last, numbers_left.as_slice().first()) {
            (_, None) => return Ok(numbers),
            (Some(last), Some(_)) => (last, false),
            (None, Some(&first)) => {
                numbers_left.next();
                (first, first >= self.limit)
            }
        };
        for number in numbers_left {
            // No limit is as high as the highest number.
            let position = last.saturating_add(*number);
            wrong |= position == last || position >= self.limit;
            *number = position;
            last = position;
        }
        if wrong {
            return Err(self.disorder());
        }
        self.last = Some(last);
        Ok(numbers)
    }

    fn disorder(&self) -> Error {
        bad(format!("an index does not lie behind the one before and below {}", self.limit))
    }
}

/// The positions of the changed elements.
#[derive(Debug)]
pub(super) enum Positions<'a> {
    Flat(Deltas<'a>),
    Row(Rows<'a>),
}

impl<'a> Positions<'a> {
    /// The positions in `dict`, of a tensor with `rows` rows of `width` elements.
    pub(super) fn of(dict: &Dict<'_, 'a>, rows: usize, width: usize) -> Result<Self> {
        let kind = if dict.has("kind") { dict.text("kind")? } else { "flat" };
        match kind {
            "flat" => Ok(Self::Flat(Deltas::of(dict, rows.saturating_mul(width))?)),
            "row" => Ok(Self::Row(Rows::of(dict, rows, width)?)),
            other => Err(bad(format!("index kind `{}` is unknown", other.escape_debug()))),
        }
    }

    /// The next ones, as many as there are and have room. None only at the end.
    pub(super) fn fill<'b>(&mut self, buffer: &'b mut [u64]) -> Result<&'b [u64]> {
        match self {
            Self::Flat(deltas) => deltas.fill(buffer).map(|positions| &*positions),
            Self::Row(rows) => rows.fill(buffer),
        }
    }
}

/// Positions by row: how many each row has, then each row's columns.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    counts: Numbers<'a>,
    body: &'a [u8],
    width: usize,
    start: u64,
    columns: Deltas<'a>,
}

impl<'a> Rows<'a> {
    fn of(dict: &Dict<'_, 'a>, rows: usize, width: usize) -> Result<Self> {
        let (found_rows, found_width) = (dict.size("n_rows")?, dict.size("row_width")?);
        if (found_rows, found_width) != (rows, width) {
            return Err(bad(format!("wanted {rows} rows of {width}, found {found_rows} of {found_width}")));
        }
        let dtype = dict.text("count_dtype")?;
        let count_bytes = uint_bytes(dtype).and_then(|bytes| bytes.checked_mul(rows));
        let (counts, body) = count_bytes
            .and_then(|bytes| dict.bytes("data").ok()?.split_at_checked(bytes))
            .ok_or_else(|| bad(format!("the counts of {rows} rows are cut short")))?;
        let columns = Deltas { numbers: Numbers { width: 1, rest: &[] }, last: None, limit: width as u64 };
        Ok(Self { counts: Numbers::new(dtype, counts)?, body, width, start: 0, columns })
    }

    fn fill<'b>(&mut self, buffer: &'b mut [u64]) -> Result<&'b [u64]> {
        let mut filled = 0;
        while let Some(room @ [_, ..]) = buffer.get_mut(filled..) {
            let columns = self.columns.fill(room)?;
            if !columns.is_empty() {
                // `start` is one row ahead while a row is read.
                let start = self.start - self.width as u64;
                columns.iter_mut().for_each(|column| *column += start);
                filled += columns.len();
                continue;
            }
            let Some(count) = self.counts.next() else {
                if self.body.is_empty() {
                    break;
                }
                return Err(bad(format!("{} bytes behind the last row", self.body.len())));
            };
            // The rows of a tensor hold no more elements than fit in memory.
            self.start += self.width as u64;
            if count > 0 {
                self.columns = self.row(count)?;
            }
        }
        Ok(buffer.get(..filled).unwrap_or_default())
    }

    fn row(&mut self, count: u64) -> Result<Deltas<'a>> {
        let short = || bad("a row is cut short");
        let (&size, body) = self.body.split_first().ok_or_else(short)?;
        let width = usize::from(size);
        if !matches!(width, 1 | 2 | 4 | 8) {
            return Err(bad(format!("columns of {width} bytes")));
        }
        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(width));
        let (data, body) = bytes.and_then(|bytes| body.split_at_checked(bytes)).ok_or_else(short)?;
        self.body = body;
        Ok(Deltas { numbers: Numbers::of_width(width, data)?, last: None, limit: self.width as u64 })
    }
}

/// The mantissa value of each changed element.
#[derive(Debug)]
pub(super) enum Mantissas<'a> {
    Raw(Numbers<'a>),
    Codebook(Codebook<'a>),
}

impl<'a> Mantissas<'a> {
    /// The stream in `dict`, whose values are of the type called `dtype`.
    pub(super) fn of(dict: &Dict<'_, 'a>, dtype: &str) -> Result<Self> {
        match dict.text("kind")? {
            "raw" => {
                let found = dict.text("dtype")?;
                if found != dtype {
                    return Err(bad(format!("mantissas of {dtype} are stored as {}", found.escape_debug())));
                }
                Ok(Self::Raw(Numbers::new(found, dict.bytes("data")?)?))
            }
            "codebook3" if dtype == "uint8" => Ok(Self::Codebook(Codebook::of(dict)?)),
            "codebook3" => Err(bad(format!("a codebook holds uint8, not {}", dtype.escape_debug()))),
            other => Err(bad(format!("mantissa stream `{}` is unknown", other.escape_debug()))),
        }
    }

    /// How many are left.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Raw(numbers) => numbers.len(),
            Self::Codebook(codebook) => codebook.count - codebook.done,
        }
    }

    /// The next `count`, or as many as there are. At most what `buffer` has room for.
    pub(super) fn fill<'b>(&mut self, buffer: &'b mut [u64], count: usize) -> Result<&'b [u64]> {
        let buffer = buffer.get_mut(..count).unwrap_or_default();
        match self {
            Self::Raw(numbers) => Ok(numbers.fill(buffer)),
            Self::Codebook(codebook) => {
                let mut filled = 0;
                for number in buffer.iter_mut() {
                    let Some(value) = codebook.next()? else { break };
                    *number = value;
                    filled += 1;
                }
                Ok(buffer.get(..filled).unwrap_or_default())
            }
        }
    }
}

/// Three bits a value: one of seven frequent values, or 7 for the next exception.
#[derive(Debug)]
pub(super) struct Codebook<'a> {
    codes: &'a [u8],
    book: &'a [u8],
    count: usize,
    done: usize,
    positions: Deltas<'a>,
    position: Option<u64>,
    values: Numbers<'a>,
}

impl<'a> Codebook<'a> {
    fn of(dict: &Dict<'_, 'a>) -> Result<Self> {
        let (count, codes, book) = (dict.size("count")?, dict.bytes("codes")?, dict.bytes("codebook")?);
        if book.len() != 7 {
            return Err(bad(format!("a codebook has 7 values, found {}", book.len())));
        }
        if count.checked_mul(3).map(|bits| bits.div_ceil(8)) != Some(codes.len()) {
            return Err(bad(format!("{} bytes are not {count} codes of 3 bits", codes.len())));
        }
        let mut positions = Deltas::of(&dict.dict("exception_positions")?, count)?;
        let values = Numbers::of_width(1, dict.bytes("exception_values")?)?;
        if positions.len() != values.len() {
            return Err(bad(format!("{} codebook exceptions have {}", positions.len(), values.len())));
        }
        let position = positions.next()?;
        Ok(Self { codes, book, count, done: 0, positions, position, values })
    }

    fn next(&mut self) -> Result<Option<u64>> {
        if self.done == self.count {
            // Every exception lies below `count` and was met, or its code was not 7.
            return Ok(None);
        }
        let bit = self.done * 3;
        let byte = |at: usize| u16::from(self.codes.get(at).copied().unwrap_or_default());
        let code = ((byte(bit / 8) | byte(bit / 8 + 1) << 8) >> (bit % 8)) & 7;
        let here = self.position == Some(self.done as u64);
        self.done += 1;
        match (self.book.get(usize::from(code)), here) {
            (Some(&value), false) => Ok(Some(u64::from(value))),
            (None, true) => {
                self.position = self.positions.next()?;
                Ok(self.values.next())
            }
            (Some(_), true) | (None, false) => Err(bad("codes and codebook exceptions disagree")),
        }
    }
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("arc_v3 payload: {why}"))
}
