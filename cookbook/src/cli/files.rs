//! Plain and encoded weights in files and directories.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bytes::Bytes;
use towline_core::safetensors::SafetensorsFiles;
use towline_core::{Error, Result, TensorDigest, TensorMeta, TensorSource, position};
use towline_storage::FileSource;

use super::output::Progress;

/// The weights files behind `path`: itself, or those of the directory, by name.
///
/// # Errors
/// `NotFound` if there are none.
pub(crate) fn shards(path: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let unreadable = |error: std::io::Error| {
        let kind = kind_of(&error);
        Error::new(kind, format!("`{}` cannot be read", path.display())).with_source(error)
    };
    if !std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| extensions.contains(&extension)) {
            found.push(file);
        }
    }
    if found.is_empty() {
        return Err(Error::not_found(format!(
            "`{}` holds no .{} file",
            path.display(),
            extensions.join(" or .")
        )));
    }
    found.sort();
    Ok(found)
}

/// Plain weights: a safetensors file or a directory of shards.
///
/// # Errors
/// As the files answer.
pub(crate) fn open_weights(path: &Path) -> Result<SafetensorsFiles<FileSource>> {
    let sources =
        shards(path, &["safetensors"])?.iter().map(|file| FileSource::open(file)).collect::<Result<_>>()?;
    SafetensorsFiles::open(sources).map_err(|error| error.context(format_args!("`{}`", path.display())))
}

/// Some tensors of a source.
#[derive(Debug)]
pub(crate) struct Subset<'a, S> {
    source: &'a S,
    tensors: Vec<TensorMeta>,
    places: Vec<usize>,
}

impl<'a, S: TensorSource> Subset<'a, S> {
    /// The tensors of `wanted`, which must be sorted by name, from `source`.
    pub(crate) fn new(source: &'a S, wanted: &[TensorMeta]) -> Result<Self> {
        let mut subset = Self { source, tensors: Vec::new(), places: Vec::new() };
        for meta in wanted {
            let place = position(source.tensors(), meta.name());
            let (place, found) =
                place.and_then(|place| Some((place, source.tensors().get(place)?))).ok_or_else(|| {
                    Error::chain_mismatch(format!("the parent has no tensor `{}`", meta.name()))
                })?;
            subset.tensors.push(found.clone());
            subset.places.push(place);
        }
        Ok(subset)
    }
}

impl<S: TensorSource> TensorSource for Subset<'_, S> {
    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        match self.places.get(index) {
            Some(&place) => self.source.read(place),
            None => Err(Error::invalid(format!("tensor {index} of {} was asked for", self.places.len()))),
        }
    }

    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        match self.places.get(index) {
            Some(&place) => self.source.read_range(place, range),
            None => Err(Error::invalid(format!("tensor {index} of {} was asked for", self.places.len()))),
        }
    }

    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        self.source.digest(*self.places.get(index)?)
    }
}

/// A source whose reads move a progress bar.
#[derive(Debug)]
pub(crate) struct Counted<'a, S>(pub(crate) &'a S, pub(crate) &'a Progress);

impl<S: TensorSource> TensorSource for Counted<'_, S> {
    fn tensors(&self) -> &[TensorMeta] {
        self.0.tensors()
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        let bytes = self.0.read(index)?;
        self.1.add(bytes.len() as u64);
        Ok(bytes)
    }

    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        let bytes = self.0.read_range(index, range)?;
        self.1.add(bytes.len() as u64);
        Ok(bytes)
    }

    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        self.0.digest(index)
    }
}

/// The plain bytes of a set of tensors.
pub(crate) fn byte_len(source: &dyn TensorSource) -> u64 {
    source.tensors().iter().map(|meta| meta.byte_len() as u64).sum()
}

/// A new file or directory that takes its place in one step, or leaves nothing.
#[derive(Debug)]
pub(crate) struct Replacement {
    target: PathBuf,
    staged: tempfile::TempDir,
}

impl Replacement {
    /// Prepares to write `target`, beside it, so that it can be renamed into place.
    pub(crate) fn new(target: &Path) -> Result<Self> {
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) | None => Path::new("."),
        };
        let staged = tempfile::Builder::new()
            .prefix(".towline-")
            .tempdir_in(parent)
            .map_err(|error| unwritable(target, error))?;
        Ok(Self { target: target.to_path_buf(), staged })
    }

    /// Where to write: the file or directory that will become the target.
    pub(crate) fn path(&self) -> PathBuf {
        self.staged.path().join("new")
    }

    /// Puts it in the target's place; what was there goes whole.
    pub(crate) fn commit(self) -> Result<()> {
        let failed = |error| unwritable(&self.target, error);
        let new = self.path();
        sync(&new).map_err(failed)?;
        if new.is_dir() && self.target.exists() {
            // A directory cannot be renamed over a full one: the old one steps aside and goes with the staging.
            std::fs::rename(&self.target, self.staged.path().join("old")).map_err(failed)?;
        }
        std::fs::rename(&new, &self.target).map_err(failed)
    }
}

/// An error about a path that cannot be written.
pub(crate) fn unwritable(path: &Path, error: std::io::Error) -> Error {
    let kind = kind_of(&error);
    Error::new(kind, format!("`{}` cannot be written", path.display())).with_source(error)
}

fn kind_of(error: &std::io::Error) -> towline_core::ErrorKind {
    if error.kind() == std::io::ErrorKind::NotFound {
        towline_core::ErrorKind::NotFound
    } else if error.kind() == std::io::ErrorKind::PermissionDenied {
        towline_core::ErrorKind::Denied
    } else {
        towline_core::ErrorKind::Unavailable
    }
}

fn sync(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            sync(&entry?.path())?;
        }
    }
    std::fs::File::open(path)?.sync_all()
}
