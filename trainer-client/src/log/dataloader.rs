//! `dataloader.json` of the Fireworks cookbook since April 2026.

use std::collections::BTreeMap;
use std::path::Path;

use towline_core::{Error, Result};

use super::file::read_bounded;
use super::form::{count, shown};
use super::json::members;

const FILE: &str = "dataloader.json";
/// The cookbook keeps 20 entries.
const MAX_BYTES: u64 = 1 << 20;

/// How many rows of the data set each checkpoint had consumed: `{"step-40":1280}`, keyed by the name that the server
/// stored. The cookbook keeps the newest 20.
///
/// The cookbook takes a damaged file for an empty one and a missing name for 0 rows, and then trains on data again that
/// it has seen. Here damage is an error, and a missing name is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dataloader {
    rows: BTreeMap<String, u64>,
}

impl Dataloader {
    /// Reads `<folder>/dataloader.json`; `None` if there is none. At most 1 MiB. Blocks.
    ///
    /// # Errors
    /// `Corrupt` for anything but one object of whole numbers, an empty file too; `Invalid` above the limit; `Denied`,
    /// `Unavailable`.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        let Some(bytes) = read_bounded(&path, MAX_BYTES)? else { return Ok(None) };
        Self::parse(&bytes).map(Some).map_err(|error| error.context(format_args!("`{}`", path.display())))
    }

    /// Reads the file's contents.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let rows = parse(bytes).map_err(|found| {
            Error::corrupt(found).with_help(
                "restore the file, or take it away and say where the data go on: the rows that a checkpoint had consumed \
                 are nowhere else",
            )
        })?;
        Ok(Self { rows })
    }

    /// The rows that the checkpoint had consumed, if the file knows it.
    #[must_use]
    pub fn rows(&self, name: &str) -> Option<u64> {
        self.rows.get(name).copied()
    }

    /// All checkpoints by name, with their rows.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.rows.iter().map(|(name, rows)| (name.as_str(), *rows))
    }
}

fn parse(bytes: &[u8]) -> Result<BTreeMap<String, u64>, String> {
    let text =
        str::from_utf8(bytes).map_err(|error| format!("not UTF-8 from byte {} on", error.valid_up_to()))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let found = members(text).map_err(|fault| {
        let rest = text.get(fault.at..).filter(|rest| !rest.is_empty());
        format!(
            "wanted {} at byte {}, found {}",
            fault.wanted,
            fault.at,
            rest.map_or_else(|| "the end".to_owned(), shown)
        )
    })?;
    let mut rows = BTreeMap::new();
    for (name, value) in found {
        let consumed = count(&name, value)?;
        if rows.insert(name.clone(), consumed).is_some() {
            return Err(format!("the checkpoint {} comes twice: which one counts is unknown", shown(&name)));
        }
    }
    Ok(rows)
}
