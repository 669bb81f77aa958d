//! A full checkpoint with deltas on it.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use bytes::{Bytes, BytesMut};
use towline_core::safetensors::SafetensorsFiles;
use towline_core::{Error, Result, TensorDigest, TensorMeta, TensorSource, position};

use super::read::{Delta, Directory};
use super::{digits, directory_name, directory_version};
use crate::io::{FileSource, io_error};

/// Deltas that may lie on one full checkpoint.
const MAX_DELTAS: usize = 1024;

/// Weights with deltas on them, made tensor by tensor when they are read. A tensor is handed out only when every
/// delta that changes it has found its new bytes right; `base` is never written to.
///
/// Of a tensor that no delta changes, nothing is known to check it by: there `base` is believed.
#[derive(Debug)]
pub struct Applied<S> {
    base: S,
    version: u64,
    base_version: u64,
    deltas: Vec<Delta>,
}

impl<S: TensorSource> Applied<S> {
    /// The weights called `version`, as they are.
    pub fn new(base: S, version: u64) -> Self {
        Self { base, version, base_version: version, deltas: Vec::new() }
    }

    /// Puts a delta on top.
    ///
    /// # Errors
    /// `ChainMismatch` if it builds on another version, or changes a tensor that is not there.
    pub fn then(mut self, delta: Delta) -> Result<Self> {
        if delta.base_version() != self.version {
            return Err(Error::chain_mismatch(format!(
                "`{}` builds on version {}, found version {}",
                delta.dir().display(),
                digits(delta.base_version()),
                digits(self.version)
            ))
            .with_help(format!("apply the deltas from version {} on, in order", digits(self.version))));
        }
        if let Some(name) = delta.tensors().find(|name| position(self.base.tensors(), name).is_none()) {
            return Err(Error::chain_mismatch(format!(
                "`{}` changes tensor `{}`, which version {} does not have",
                delta.dir().display(),
                name.escape_debug(),
                digits(self.version)
            ))
            .with_help("give the checkpoint that the trainer began with"));
        }
        self.version = delta.version();
        self.deltas.push(delta);
        Ok(self)
    }

    /// The number of these weights.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The number of the weights below all deltas.
    #[must_use]
    pub fn base_version(&self) -> u64 {
        self.base_version
    }

    /// The deltas, the first one first.
    #[must_use]
    pub fn deltas(&self) -> &[Delta] {
        &self.deltas
    }

    /// Reads and checks every tensor, one at a time.
    ///
    /// # Errors
    /// As [`TensorSource::read`].
    pub fn verify(&self) -> Result<()> {
        (0..self.tensors().len()).try_for_each(|index| self.read(index).map(drop))
    }

    fn meta(&self, index: usize) -> Result<&TensorMeta> {
        let tensors = self.base.tensors();
        tensors
            .get(index)
            .ok_or_else(|| Error::invalid(format!("tensor {index} of {} was asked for", tensors.len())))
    }

    fn is_changed(&self, name: &str) -> bool {
        self.deltas.iter().any(|delta| delta.changes(name))
    }
}

impl<S: TensorSource> TensorSource for Applied<S> {
    fn tensors(&self) -> &[TensorMeta] {
        self.base.tensors()
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        let meta = self.meta(index)?;
        let old = self.base.read(index)?;
        if old.len() != meta.byte_len() {
            return Err(Error::invalid(format!(
                "tensor `{}`: wanted {} bytes, its source gave {}",
                meta.name(),
                meta.byte_len(),
                old.len()
            )));
        }
        if !self.is_changed(meta.name()) {
            return Ok(old);
        }
        let mut data = old.try_into_mut().unwrap_or_else(|shared| BytesMut::from(shared.as_ref()));
        for delta in &self.deltas {
            delta.apply(meta.name(), &mut data)?;
        }
        Ok(data.freeze())
    }

    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        let meta = self.meta(index)?;
        if !self.is_changed(meta.name()) {
            return self.base.read_range(index, range);
        }
        if range.start > range.end || range.end > meta.byte_len() {
            return Err(Error::invalid(format!(
                "bytes {range:?} of a tensor of {} were asked for",
                meta.byte_len()
            )));
        }
        // Only the whole of it can be checked.
        Ok(self.read(index)?.slice(range))
    }

    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        let meta = self.meta(index).ok()?;
        if self.is_changed(meta.name()) { None } else { self.base.digest(index) }
    }
}

/// The newest version below `folder`; `None` if there is none, or no folder.
///
/// # Errors
/// What the disk answers.
pub fn newest(folder: &Path) -> Result<Option<u64>> {
    let failed = |error| io_error(error, format_args!("`{}` could not be read", folder.display()));
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let mut newest = None;
    for entry in entries {
        newest = newest.max(directory_version(&entry.map_err(failed)?.path()));
    }
    Ok(newest)
}

/// The weights of `version` below `folder`, by default of the newest: the full checkpoint that its chain of
/// `base_version`s leads to, with the deltas on it. A chain that leads to version 0 needs `base`, the checkpoint that
/// the trainer began with, unless `folder` has it as `weight_v000000`.
///
/// # Errors
/// `NotFound` if a version of the chain is missing; `ChainMismatch` if one does not build on the number before it, as
/// the original demands; as [`Directory::open`].
pub fn open(
    folder: &Path,
    version: Option<u64>,
    base: Option<&Path>,
) -> Result<Applied<SafetensorsFiles<FileSource>>> {
    let wanted = match version {
        Some(version) => version,
        None => newest(folder)?.ok_or_else(|| {
            Error::not_found(format!("`{}` holds no directory weight_v…", folder.display()))
                .with_help("name the folder that the trainer publishes to")
        })?,
    };
    let (mut deltas, mut version) = (Vec::new(), wanted);
    let full = loop {
        let dir = folder.join(directory_name(version));
        let opened = match base {
            Some(base) if version == 0 => Directory::open(base),
            _ => Directory::open(&dir),
        };
        let delta = match opened {
            Ok(Directory::Full(full)) => break full,
            Ok(Directory::Delta(delta)) if version > 0 => delta,
            Ok(Directory::Delta(delta)) => {
                return Err(Error::chain_mismatch(format!(
                    "`{}` is a delta: wanted the full checkpoint that the chain of version {} begins with",
                    delta.dir().display(),
                    digits(wanted)
                ))
                .with_help("give the checkpoint that the trainer began with"));
            }
            Err(error) if !(dir.exists() || version == 0 && base.is_some()) => {
                let help = match version {
                    0 => "give the checkpoint that the trainer began with",
                    _ => "copy it back, or publish a full checkpoint",
                };
                return Err(Error::not_found(format!(
                    "version {} rests on version {}, and `{}` is not there",
                    digits(wanted),
                    digits(version),
                    dir.display()
                ))
                .with_source(error)
                .with_help(help));
            }
            Err(error) => return Err(error),
        };
        let below = delta.base_version();
        if below.checked_add(1) != Some(version) {
            let why = if below >= version { "chains fall" } else { "versions follow one another" };
            return Err(Error::chain_mismatch(format!(
                "`{}` builds on version {}, wanted {}: {why}",
                dir.display(),
                digits(below),
                digits(version - 1)
            ))
            .with_help("publish a full checkpoint"));
        }
        if deltas.len() >= MAX_DELTAS {
            return Err(Error::unsupported(format!(
                "version {} rests on more than {MAX_DELTAS} deltas",
                digits(wanted)
            ))
            .with_help("publish a full checkpoint"));
        }
        deltas.push(delta);
        version = below;
    };
    deltas.into_iter().rev().try_fold(Applied::new(full, version), Applied::then)
}
