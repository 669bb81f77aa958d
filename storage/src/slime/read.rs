//! One directory, checked before anything of it is used.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use towline_core::safetensors::{ByteSource, Header, SafetensorsFiles};
use towline_core::{DType, Error, Result};

use super::checksum::Checksum;
use super::{
    BASE_VERSION, CHECKSUM_FORMAT, COMPRESSION_FORMAT, DELTA_ENCODING, Encoding, INDEX, VERSION, ZSTD,
    digits, directory_version, number, payload,
};
use crate::io::{FileSource, io_error};

/// The largest index that is read, in bytes.
const MAX_INDEX: u64 = 100 << 20;
const AGAIN: &str = "copy the directory again: it is not whole or damaged";

/// What a directory holds.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "a directory is whole or a difference")]
pub enum Directory {
    /// A full checkpoint, of slime or of anybody else.
    Full(SafetensorsFiles<FileSource>),
    /// A delta.
    Delta(Delta),
}

/// A delta directory whose index and headers were read and agree.
#[derive(Debug)]
pub struct Delta {
    dir: PathBuf,
    version: u64,
    base_version: u64,
    encoding: Encoding,
    checksum: Checksum,
    /// Opened when they are read, so that a long chain does not keep all its files open.
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    range: Range<u64>,
    checksum: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: Map<String, Value>,
    weight_map: BTreeMap<String, String>,
}

impl Directory {
    /// Opens a directory: its index and the headers of its files, which must agree. Of the tensors nothing is read.
    ///
    /// # Errors
    /// `NotFound` if it is not there; `Corrupt` if a file is missing, cut short or not told of, or the index is not of
    /// this format; `Unsupported` for an encoding, compression or checksum that is not known.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::read(dir).map_err(|error| error.context(format_args!("`{}`", dir.display())))
    }

    fn read(dir: &Path) -> Result<Self> {
        let names = shard_names(dir)?;
        let index = read_index(&dir.join(INDEX))?;
        let files: Vec<PathBuf> = names.iter().map(|name| dir.join(name)).collect();
        let headers = files
            .iter()
            .map(|file| {
                let header = FileSource::open(file).and_then(|source| Header::read(&source));
                header.map_err(|error| error.context(file.file_name().unwrap_or_default().display()))
            })
            .collect::<Result<Vec<_>>>()?;
        match &index {
            Some(index) => same_places(&index.weight_map, &names, &headers)?,
            None if names.len() > 1 => {
                return Err(Error::corrupt(format!("{} files and no {INDEX}", names.len())).with_help(AGAIN));
            }
            None => {}
        }
        let metadata = index.map(|index| index.metadata).unwrap_or_default();
        let keys = [VERSION, BASE_VERSION, DELTA_ENCODING, COMPRESSION_FORMAT, CHECKSUM_FORMAT];
        if keys.iter().any(|key| metadata.contains_key(*key)) {
            return Delta::new(dir, &metadata, files, headers).map(Self::Delta);
        }
        // A delta without its index, or with a damaged one, must not pass for weights.
        let checksums = |header: &Header| {
            header.entries.iter().any(|entry| header.metadata.contains_key(entry.meta.name()))
        };
        if headers.iter().any(checksums) {
            return Err(Error::corrupt(format!(
                "the files hold the checksums of a delta, and {INDEX} names none: wanted both or neither"
            ))
            .with_help("wait until it is published whole, or copy it again"));
        }
        if files.is_empty() {
            return Err(Error::corrupt("no .safetensors file and no delta").with_help(AGAIN));
        }
        let sources = files.iter().map(|file| FileSource::open(file)).collect::<Result<_>>()?;
        SafetensorsFiles::open(sources).map(Self::Full)
    }
}

impl Delta {
    fn new(
        dir: &Path,
        metadata: &Map<String, Value>,
        files: Vec<PathBuf>,
        headers: Vec<Header>,
    ) -> Result<Self> {
        let text = |key: &str| {
            let value = metadata.get(key).ok_or_else(|| {
                Error::corrupt(format!("the index of a delta has no `{key}`")).with_help(AGAIN)
            })?;
            value.as_str().ok_or_else(|| {
                Error::corrupt(format!("`{key}` in the index: wanted a text, found {value}")).with_help(AGAIN)
            })
        };
        let version = |key: &str| {
            let found = text(key)?;
            number(found).ok_or_else(|| {
                let found = found.escape_debug();
                Error::corrupt(format!("`{key}` in the index: wanted six digits or more, found `{found}`"))
                    .with_help(AGAIN)
            })
        };
        let compression = text(COMPRESSION_FORMAT)?;
        if compression != ZSTD {
            let found = compression.escape_debug();
            return Err(Error::unsupported(format!("compression `{found}`: wanted {ZSTD}"))
                .with_help("write the folder with zstd"));
        }
        let (encoding, checksum): (Encoding, Checksum) =
            (text(DELTA_ENCODING)?.parse()?, text(CHECKSUM_FORMAT)?.parse()?);
        let (version, base_version) = (version(VERSION)?, version(BASE_VERSION)?);
        if directory_version(dir).is_some_and(|named| named != version) {
            return Err(Error::corrupt(format!(
                "the index says version {}, the name of the directory another",
                digits(version)
            ))
            .with_help("give it the name that it was published under"));
        }
        let mut tensors = BTreeMap::new();
        for (file, header) in headers.into_iter().enumerate() {
            let mut checksums = header.metadata;
            for entry in header.entries {
                let name = entry.meta.name();
                if entry.meta.dtype() != DType::U8 || entry.meta.shape().len() != 1 {
                    return Err(Error::corrupt(format!(
                        "tensor `{}` of a delta is {} {:?}: wanted U8 of one dimension",
                        name.escape_debug(),
                        entry.meta.dtype(),
                        entry.meta.shape()
                    ))
                    .with_help(AGAIN));
                }
                let found =
                    checksums.remove(name).filter(|found| checksum.takes(found)).ok_or_else(|| {
                        Error::corrupt(format!("tensor `{}` has no {checksum} checksum", name.escape_debug()))
                            .with_help(AGAIN)
                    })?;
                tensors.insert(name.to_owned(), Place { file, range: entry.range, checksum: found });
            }
        }
        Ok(Self { dir: dir.to_owned(), version, base_version, encoding, checksum, files, tensors })
    }

    /// The number of the weights that it makes.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The number of the weights that it is applied to.
    #[must_use]
    pub fn base_version(&self) -> u64 {
        self.base_version
    }

    /// How its tensors are encoded.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// How their new bytes are digested.
    #[must_use]
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// Where it lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensors that it changes, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether it changes the tensor called `name`.
    #[must_use]
    pub fn changes(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Turns the old bytes of the tensor called `name` into the new ones and checks them; those of a tensor that it
    /// does not change stay. After an error `target` is undefined: keep the old bytes elsewhere.
    ///
    /// # Errors
    /// `Corrupt` if the frame or the result is wrong, which may be the old bytes' fault; `Unavailable` if the file
    /// cannot be read.
    pub fn apply(&self, name: &str, target: &mut [u8]) -> Result<()> {
        let Some(place) = self.tensors.get(name) else { return Ok(()) };
        let file =
            self.files.get(place.file).ok_or_else(|| Error::internal("a tensor in no file of its delta"))?;
        let context = |error: Error| {
            error.context(format_args!("`{}`: tensor `{}`", file.display(), name.escape_debug()))
        };
        let frame = FileSource::open(file)?.read_range(place.range.clone()).map_err(context)?;
        let found = payload::apply(self.encoding, self.checksum, &frame, target).map_err(context)?;
        if found == place.checksum {
            return Ok(());
        }
        Err(context(
            Error::corrupt(format!(
                "wanted {} {} of the new bytes, found {found}",
                self.checksum, place.checksum
            ))
            .with_help(format!(
                "apply it to version {} and nothing else; if it was, copy the directory again",
                digits(self.base_version)
            )),
        ))
    }
}

/// The names of the shards, sorted.
fn shard_names(dir: &Path) -> Result<Vec<String>> {
    let failed = |error| io_error(error, "the directory could not be read");
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string()
            && name.ends_with(".safetensors")
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The index, if there is one.
fn read_index(path: &Path) -> Result<Option<Index>> {
    let source = match FileSource::open(path) {
        Err(error) if error.kind() == towline_core::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if source.len() > MAX_INDEX {
        return Err(Error::corrupt(format!("{INDEX}: {} bytes, at most {MAX_INDEX} are read", source.len())));
    }
    let json = source.read_range(0..source.len())?;
    serde_json::from_slice(&json).map(Some).map_err(|error| {
        Error::corrupt(format!("{INDEX} is not the index of a model")).with_source(error).with_help(AGAIN)
    })
}

/// Whether the index names just the files that are there, and each tensor's file is the one that holds it.
fn same_places(map: &BTreeMap<String, String>, names: &[String], headers: &[Header]) -> Result<()> {
    if let Some((tensor, missing)) = map.iter().find(|(_, file)| names.binary_search(file).is_err()) {
        return Err(Error::corrupt(format!(
            "tensor `{}` is in `{}`, which is not there",
            tensor.escape_debug(),
            missing.escape_debug()
        ))
        .with_help(AGAIN));
    }
    let mut found = 0;
    for (name, header) in names.iter().zip(headers) {
        for entry in &header.entries {
            let tensor = entry.meta.name();
            found += 1;
            if map.get(tensor) != Some(name) {
                return Err(Error::corrupt(format!(
                    "tensor `{}` is in `{name}`, the index says {:?}",
                    tensor.escape_debug(),
                    map.get(tensor)
                ))
                .with_help(AGAIN));
            }
        }
    }
    if found == map.len() {
        return Ok(());
    }
    Err(Error::corrupt(format!("the index names {} tensors, the files hold {found}", map.len()))
        .with_help(AGAIN))
}
