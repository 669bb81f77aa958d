//! Delta directories as slime and miles publish them, written and read.
//!
//! The facts are those of the public sources of slime (`THUDM/slime`: the trainer's
//! `update_weight_from_disk_delta.py` and `utils/disk_delta.py`, the engine's `weight_sync/local_checkpoint.py`) in
//! August 2026; `radixark/miles` has the same format.
//!
//! ```text
//! <folder>/weight_v000007/model-00000-of-00002.safetensors     a U8 tensor of one dimension for each tensor that
//!                         model-00001-of-00002.safetensors     changed; `__metadata__`: its name → checksum
//!                         model.safetensors.index.json         `metadata` below; `weight_map`: tensor → file
//! ```
//!
//! | `metadata` | |
//! |---|---|
//! | `version` | the folder's number, six digits or more: `000007` |
//! | `base_version` | what it builds on: the number before |
//! | `delta_encoding` | `xor`, or `overwrite`: how many bytes change, their positions in rising order (all `u32`, little-endian), their new values |
//! | `compression_format` | `zstd`: each tensor is one frame of all that the encoding gives |
//! | `checksum_format` | `xxh3-128`, `blake3` or `adler32`, of the tensor's new bytes, in hexadecimal digits |
//!
//! Bytes are bytes: no element type and no shape is told, so that a delta can neither add a tensor nor change one's
//! shape. Files are counted from 0. A step in which nothing changed has an index and no other file. A folder whose index has none
//! of these keys is a full checkpoint, where a chain begins; number 0 is the checkpoint that the engine itself was
//! started from, which has no folder of this name.
//!
//! # What is different here
//! * The original patches its checkpoint in place and compares the checksums afterwards: after a bad delta or a crash
//!   it holds a mixture. Here [`Applied`] makes each tensor in memory of its own and hands it out when its checksum
//!   is right; whatever it was made from stays as it is.
//! * The original takes a folder without an index for a full checkpoint, as which a delta passes whose index is not
//!   written yet. Here folders appear whole, and shards with a delta's checksums are a delta or an error.
//! * The original reads every `*.safetensors` of the folder, whatever the index says. Here both must agree.
//!
//! [`SnapshotRepo::export_slime`](crate::SnapshotRepo::export_slime) and
//! [`Writer::import_slime`](crate::Writer::import_slime) exchange such directories with a repo.

mod chain;
mod checksum;
mod payload;
mod read;
mod write;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use towline_core::{Error, Result};

pub use chain::{Applied, newest, open};
pub use checksum::Checksum;
pub use read::{Delta, Directory};
pub use write::{Options, Written, write_delta};

pub use crate::repo::Import;

/// The file that says which file holds which tensor.
const INDEX: &str = "model.safetensors.index.json";
/// The keys of a delta in the index.
const VERSION: &str = "version";
const BASE_VERSION: &str = "base_version";
const DELTA_ENCODING: &str = "delta_encoding";
const COMPRESSION_FORMAT: &str = "compression_format";
const CHECKSUM_FORMAT: &str = "checksum_format";
/// The only compression there is.
const ZSTD: &str = "zstd";

/// How the difference of two tensors is written: `delta_encoding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[expect(clippy::exhaustive_enums, reason = "the format has these two")]
pub enum Encoding {
    /// New XOR old: the smaller one. Applied twice it is taken back.
    #[default]
    Xor,
    /// Positions and new values of the bytes that change. Applied twice it does what it does once. For tensors below
    /// 4 GiB.
    Overwrite,
}

impl Encoding {
    /// The name in an index.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Xor => "xor",
            Self::Overwrite => "overwrite",
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Encoding {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Xor, Self::Overwrite].into_iter().find(|encoding| encoding.as_str() == text).ok_or_else(|| {
            Error::unsupported(format!("delta encoding `{}`: wanted xor or overwrite", text.escape_debug()))
                .with_help("write the folder with one of these")
        })
    }
}

/// The name of the directory of a version: `weight_v000007`.
#[must_use]
pub fn directory_name(version: u64) -> String {
    format!("weight_v{}", digits(version))
}

/// The version of a directory, from its name alone; `None` for another name.
#[must_use]
pub fn directory_version(dir: &Path) -> Option<u64> {
    number(dir.file_name()?.to_str()?.strip_prefix("weight_v")?)
}

/// A version as the format writes it.
fn digits(version: u64) -> String {
    format!("{version:06}")
}

/// A version that is written just as [`digits`] writes it.
fn number(text: &str) -> Option<u64> {
    let number = text.parse().ok()?;
    (digits(number) == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for version in [0, 7, 999_999, 1_000_000, u64::MAX] {
            assert_eq!(directory_version(Path::new(&directory_name(version))), Some(version));
        }
        for other in
            ["weight_v7", "weight_v0000007", "weight_v+00007", "weight_v", "weight_v00000x", "000007"]
        {
            assert_eq!(directory_version(Path::new(other)), None, "{other}");
        }
        assert_eq!("overwrite".parse::<Encoding>().unwrap(), Encoding::Overwrite);
        assert!("XOR".parse::<Encoding>().is_err());
    }
}
