//! A delta directory of two sets of weights.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::json;
use towline_core::safetensors::Header;
use towline_core::{DType, Error, Result, TensorMeta, TensorSource, same_tensors};

use super::checksum::Checksum;
use super::{
    BASE_VERSION, CHECKSUM_FORMAT, COMPRESSION_FORMAT, DELTA_ENCODING, Encoding, INDEX, VERSION, ZSTD,
    digits, directory_name, payload,
};
use crate::folder::{NewFolder, unwritten};
use crate::spool::Spool;

/// How a directory is written.
#[derive(Debug, Clone)]
pub struct Options {
    version: u64,
    encoding: Encoding,
    checksum: Checksum,
    level: i32,
    shard_bytes: u64,
    threads: usize,
}

impl Options {
    /// Writes `version`, as slime does by default: xor, level 1 of zstd, XXH3-128; files of at most 512 MiB, one thread.
    #[must_use]
    pub fn new(version: u64) -> Self {
        Self {
            version,
            encoding: Encoding::Xor,
            checksum: Checksum::Xxh3,
            level: 1,
            shard_bytes: 512 << 20,
            threads: 1,
        }
    }

    /// Sets how the difference is written.
    #[must_use]
    pub fn with_encoding(mut self, encoding: Encoding) -> Self {
        self.encoding = encoding;
        self
    }

    /// Sets how the new bytes are digested.
    #[must_use]
    pub fn with_checksum(mut self, checksum: Checksum) -> Self {
        self.checksum = checksum;
        self
    }

    /// Sets the level of zstd. One outside of what the library has counts as the nearest that it has.
    #[must_use]
    pub fn with_level(mut self, level: i32) -> Self {
        self.level = level;
        self
    }

    /// Sets the encoded bytes that one file holds at most, or the plain ones of a full checkpoint; one tensor is never
    /// cut.
    #[must_use]
    pub fn with_shard_bytes(mut self, bytes: u64) -> Self {
        self.shard_bytes = bytes;
        self
    }

    /// Sets how many tensors of a delta are in work at once, at least one. Each takes its old, new and encoded bytes.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads.max(1);
        self
    }

    /// Where it goes below `folder`, if nothing is there yet.
    pub(crate) fn target(&self, folder: &Path) -> Result<PathBuf> {
        let target = folder.join(directory_name(self.version));
        if target.symlink_metadata().is_err() {
            return Ok(target);
        }
        Err(Error::already_exists(format!("`{}` exists", target.display()))
            .with_help("choose the next version: a published one is never written again"))
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn shard_bytes(&self) -> u64 {
        self.shard_bytes
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Written {
    /// The new directory.
    pub dir: PathBuf,
    /// Its number.
    pub version: u64,
    /// For a delta: what it builds on.
    pub base_version: Option<u64>,
    /// Tensors in its files: of a delta, those that changed.
    pub tensors: usize,
    /// Bytes of its files of tensors.
    pub bytes: u64,
}

impl Written {
    pub(crate) fn full(dir: PathBuf, version: u64, tensors: usize, bytes: u64) -> Self {
        Self { dir, version, base_version: None, tensors, bytes }
    }
}

/// Writes the delta from `parent`, which readers know as the version before, to `current`: a new directory below
/// `folder` that is there whole or not at all. Tensors whose digests are known on both sides are compared by them.
///
/// # Errors
/// `AlreadyExists` if the directory is there; `Invalid` if the two do not have the same tensors, which the format
/// cannot tell, or for version 0; `Unsupported` for `overwrite` of a tensor of 4 GiB; what the sources and the disk
/// answer.
pub fn write_delta(
    folder: &Path,
    options: &Options,
    parent: &dyn TensorSource,
    current: &dyn TensorSource,
) -> Result<Written> {
    let base_version = options.version.checked_sub(1).ok_or_else(|| {
        Error::invalid("version 0 is the full checkpoint that a chain begins with")
            .with_help("number deltas from 1")
    })?;
    same_tensors(parent.tensors(), current.tensors()).map_err(|error| {
        error
            .context("a delta of this format keeps every tensor's name and shape")
            .with_help("write a full checkpoint")
    })?;
    let target = options.target(folder)?;
    let new = NewFolder::beside(target.clone())?;
    let mut shards = Shards { folder: &new.path, limit: options.shard_bytes, done: Vec::new(), bytes: 0 };
    let mut open = Shard::new();
    let numbers: Vec<usize> = (0..current.tensors().len()).filter(|&n| !equal(parent, current, n)).collect();
    for group in numbers.chunks(options.threads) {
        for (number, encoded) in group.iter().zip(encode_group(options, parent, current, group)?) {
            let (Some((frame, checksum)), Some(meta)) = (encoded, current.tensors().get(*number)) else {
                continue;
            };
            if !open.metas.is_empty() && open.bytes + frame.len() as u64 > shards.limit {
                shards.close(std::mem::replace(&mut open, Shard::new()))?;
            }
            open.push(meta.name(), frame, checksum)?;
        }
    }
    shards.close(open)?;
    let (map, bytes) = shards.name()?;
    let tensors = map.len();
    let index = json!({
        "metadata": {
            VERSION: digits(options.version),
            BASE_VERSION: digits(base_version),
            DELTA_ENCODING: options.encoding.as_str(),
            COMPRESSION_FORMAT: ZSTD,
            CHECKSUM_FORMAT: options.checksum.as_str(),
        },
        "weight_map": map,
    });
    let index = serde_json::to_vec_pretty(&index)
        .map_err(|error| Error::internal("the index could not be written").with_source(error))?;
    new.write(INDEX, &index)?;
    new.keep()?;
    Ok(Written { dir: target, version: options.version, base_version: Some(base_version), tensors, bytes })
}

/// Whether tensor `number` is known to be the same without being read.
fn equal(parent: &dyn TensorSource, current: &dyn TensorSource, number: usize) -> bool {
    let digest = |source: &dyn TensorSource| source.digest(number).and_then(|known| known.get().copied());
    digest(parent).is_some_and(|old| digest(current) == Some(old))
}

/// A frame and the checksum of what it makes; `None` if nothing changed.
type Encoded = Option<(Vec<u8>, String)>;

fn encode_group(
    options: &Options,
    parent: &dyn TensorSource,
    current: &dyn TensorSource,
    group: &[usize],
) -> Result<Vec<Encoded>> {
    let encode = |number: usize| -> Result<Encoded> {
        let (old, new) = (parent.read(number)?, current.read(number)?);
        if old.len() != new.len() {
            return Err(Error::invalid(format!(
                "tensor {number}: its sources gave {} and {} bytes",
                old.len(),
                new.len()
            )));
        }
        if old == new {
            return Ok(None);
        }
        let frame = payload::encode(options.encoding, options.level, &old, &new)?;
        Ok(Some((frame, options.checksum.of(&new))))
    };
    if let [number] = group {
        return Ok(vec![encode(*number)?]);
    }
    thread::scope(|scope| {
        let workers: Vec<_> = group.iter().map(|&number| scope.spawn(move || encode(number))).collect();
        let joined = workers.into_iter().map(|worker| match worker.join() {
            Ok(encoded) => encoded,
            Err(_) => Err(Error::internal("a thread that encoded did not come to its end")),
        });
        joined.collect()
    })
}

/// The frames of one file, whose header comes first and is known last.
struct Shard {
    frames: Spool,
    metas: Vec<TensorMeta>,
    checksums: BTreeMap<String, String>,
    bytes: u64,
}

impl Shard {
    fn new() -> Self {
        Self { frames: Spool::default(), metas: Vec::new(), checksums: BTreeMap::new(), bytes: 0 }
    }

    fn push(&mut self, name: &str, frame: Vec<u8>, checksum: String) -> Result<()> {
        self.metas.push(TensorMeta::new(name, DType::U8, [frame.len()])?);
        self.checksums.insert(name.to_owned(), checksum);
        self.bytes += frame.len() as u64;
        self.frames.push(frame)
    }
}

/// The files of a directory. They get their names when it is known how many they are.
struct Shards<'a> {
    folder: &'a Path,
    limit: u64,
    done: Vec<Vec<TensorMeta>>,
    bytes: u64,
}

impl Shards<'_> {
    fn unnamed(&self, number: usize) -> PathBuf {
        self.folder.join(format!("{number}.new"))
    }

    fn close(&mut self, shard: Shard) -> Result<()> {
        if shard.metas.is_empty() {
            return Ok(());
        }
        let header = Header::encode(&shard.metas, &shard.checksums)?;
        let path = self.unnamed(self.done.len());
        let failed = |error| unwritten(error, &path);
        let mut file = File::create_new(&path).map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        let frames = shard.frames.write_to(&mut file);
        frames.map_err(|error| error.context(format_args!("`{}`", path.display())))?;
        file.sync_all().map_err(failed)?;
        self.bytes += header.len() as u64 + shard.bytes;
        self.done.push(shard.metas);
        Ok(())
    }

    /// Gives the files their names. Answers which file holds which tensor, and the bytes of all.
    fn name(self) -> Result<(BTreeMap<String, String>, u64)> {
        let count = self.done.len();
        let mut map = BTreeMap::new();
        for (number, metas) in self.done.iter().enumerate() {
            let name = format!("model-{number:05}-of-{count:05}.safetensors");
            let path = self.folder.join(&name);
            fs::rename(self.unnamed(number), &path).map_err(|error| unwritten(error, &path))?;
            map.extend(metas.iter().map(|meta| (meta.name().to_owned(), name.clone())));
        }
        Ok((map, self.bytes))
    }
}
