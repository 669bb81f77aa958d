//! The bytes of a run log as lines: good ones, bad ones, and a torn one at the end.

use std::collections::BTreeSet;
use std::fmt;

use towline_core::{Error, Result};

use super::form::{parse, shown};
use super::json::members;
use super::line::CheckpointLine;

const BOM: &[u8] = b"\xef\xbb\xbf";
/// A file with more bad lines is no run log; each takes far more memory than its bytes.
pub(super) const MAX_BAD: usize = 10_000;

/// The end of a log that a crash has cut off: no newline, and no whole object.
///
/// [`super::CheckpointLog::append`] and [`super::CheckpointLog::repair`] move it into `checkpoints.jsonl.torn`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TornLine {
    /// Its number in the file, from 1.
    pub line: usize,
    /// The byte at which it starts.
    pub offset: u64,
    /// What there is of it. Need not be UTF-8.
    pub bytes: Vec<u8>,
}

impl fmt::Display for TornLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, offset, bytes } = self;
        let start = shown(&String::from_utf8_lossy(bytes.get(..256).unwrap_or(bytes)));
        write!(f, "line {line} is torn: {} bytes from byte {offset} on, without an end: {start}", bytes.len())
    }
}

/// A line that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BadLine {
    /// Its number in the file, from 1.
    pub line: usize,
    /// What was wanted and what was found.
    pub problem: String,
    /// The line without its newline.
    pub bytes: Vec<u8>,
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) lines: Vec<CheckpointLine>,
    pub(super) bad: Vec<BadLine>,
    pub(super) torn: Option<TornLine>,
}

/// What stands behind the last newline.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// Nothing but white space, from this byte on.
    Nothing(usize),
    /// A whole object whose newline is missing.
    Whole,
    /// The start of a line.
    Torn(TornLine),
}

/// Reads the lines of a file, no further than one bad line above the limit. White space, blank lines, carriage returns and a byte order mark in front are no fault.
pub(super) fn scan(bytes: &[u8], max_line: usize) -> Scan {
    let mut scan = Scan::default();
    let end = match tail(bytes) {
        Tail::Torn(torn) => {
            let offset = bytes.len() - torn.bytes.len();
            scan.torn = Some(torn);
            offset
        }
        Tail::Nothing(_) | Tail::Whole => bytes.len(),
    };
    let whole = bytes.get(..end).unwrap_or_default();
    for (index, piece) in whole.split(|byte| *byte == b'\n').enumerate() {
        let piece = if index == 0 { piece.strip_prefix(BOM).unwrap_or(piece) } else { piece };
        let piece = piece.trim_ascii();
        if piece.is_empty() {
            continue;
        }
        if scan.bad.len() > MAX_BAD {
            break;
        }
        match line(piece, max_line) {
            Ok(line) => scan.lines.push(line),
            Err(problem) => scan.bad.push(BadLine { line: index + 1, problem, bytes: piece.to_vec() }),
        }
    }
    scan.lines = without_repeats(scan.lines);
    scan
}

/// Looks at what a file ends with.
pub(super) fn tail(bytes: &[u8]) -> Tail {
    let start = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let piece = bytes.get(start..).unwrap_or_default();
    let (start, piece) = match piece.strip_prefix(BOM) {
        Some(rest) if start == 0 => (BOM.len(), rest),
        Some(_) | None => (start, piece),
    };
    if piece.trim_ascii().is_empty() {
        return Tail::Nothing(start);
    }
    // An object that has its closing brace is whole: no proper start of it would be an object.
    if str::from_utf8(piece).is_ok_and(|text| members(text).is_ok()) {
        return Tail::Whole;
    }
    let line = bytes.iter().filter(|byte| **byte == b'\n').count() + 1;
    Tail::Torn(TornLine { line, offset: start as u64, bytes: piece.to_vec() })
}

/// The last line that a run can be resumed from. Lines that cannot be read are passed over.
pub(super) fn last_resumable(bytes: &[u8], max_line: usize) -> Option<CheckpointLine> {
    let bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
    let mut pieces = bytes.rsplit(|byte| *byte == b'\n');
    pieces.find_map(|piece| line(piece.trim_ascii(), max_line).ok().filter(CheckpointLine::is_resumable))
}

/// The first bad line as an error.
pub(super) fn refuse_bad(bad: &[BadLine], path: &impl fmt::Display) -> Result<()> {
    let Some(first) = bad.first() else { return Ok(()) };
    let others = match bad.len() - 1 {
        0 => String::new(),
        others => format!(" (and {others} bad lines more)"),
    };
    let message = format!("line {} of `{path}`: {}{others}", first.line, first.problem);
    Err(Error::corrupt(message).with_help(
        "repair the log: that rebuilds it from the store and keeps what cannot be read in `checkpoints.jsonl.torn`",
    ))
}

fn line(piece: &[u8], max_line: usize) -> Result<CheckpointLine, String> {
    if piece.len() > max_line {
        return Err(format!("{} bytes in a line, at most {max_line} are read", piece.len()));
    }
    let text = str::from_utf8(piece).map_err(|error| {
        let found = shown(&String::from_utf8_lossy(piece.get(..256).unwrap_or(piece)));
        format!("wanted UTF-8, found other bytes from byte {} on: {found}", error.valid_up_to())
    })?;
    parse(text)
}

/// Leaves out the lines that only repeat an earlier one. If that one is gone, its repetition takes its place.
fn without_repeats(lines: Vec<CheckpointLine>) -> Vec<CheckpointLine> {
    if !lines.iter().any(CheckpointLine::is_repeated) {
        return lines;
    }
    let mut seen: BTreeSet<(String, Option<String>)> = BTreeSet::new();
    let mut kept = Vec::with_capacity(lines.len());
    for line in lines {
        let new = seen.insert((line.name.clone(), line.state_path.clone()));
        if !line.is_repeated() {
            kept.push(line);
        } else if new {
            kept.push(line.unmarked());
        }
    }
    kept
}
