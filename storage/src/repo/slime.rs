//! Snapshots to and from the delta directories of slime.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::runtime::Handle;
use towline_core::{
    Codec, Error, Result, SnapshotKind, SnapshotName, SnapshotRef, TensorDigest, TensorMeta, TensorSource,
};

use super::chain::Link;
use super::files::INDEX;
use super::{Publish, SnapshotInfo, SnapshotRepo, Writer};
use crate::io::{blocking, io_error};
use crate::slime::{Applied, Directory, Options, Written, directory_version, write_delta};

/// Under which note of a snapshot its version stands.
const NOTE: &str = "slime.version";

impl SnapshotRepo {
    /// Writes the weights of a snapshot to the new directory `weight_v…` below `folder`, which is there whole or not
    /// at all: the delta from `parent`, which readers know as the version before and which may be any snapshot with
    /// the same tensors, or without one a full checkpoint as [`SnapshotRepo::export`] writes it. Of a delta, only
    /// tensors whose digests differ are restored, as many at once as the options have threads.
    ///
    /// # Errors
    /// `AlreadyExists` if the directory is there; `Invalid` for a train state or an adapter; as [`write_delta`] and
    /// [`SnapshotRepo::restore`].
    pub async fn export_slime(
        &self,
        info: &SnapshotInfo,
        parent: Option<&SnapshotInfo>,
        folder: &Path,
        options: &Options,
    ) -> Result<Written> {
        for info in parent.into_iter().chain([info]) {
            if matches!(info.kind, SnapshotKind::State | SnapshotKind::Adapter) {
                return Err(Error::invalid(format!(
                    "{} is of kind {}: wanted a model's weights",
                    info.id, info.kind
                ))
                .with_help("name a base, a delta or a merged base"));
            }
        }
        let target = options.target(folder)?;
        let Some(parent) = parent else {
            self.clone().with_shard_bytes(options.shard_bytes()).export(info, &target).await?;
            let tensors = self.manifest(info).await?.tensors.len();
            return Ok(Written::full(target, options.version(), tensors, info.full_bytes));
        };
        let parent = Restored::open(self, parent).await?;
        let current = Restored::open(self, info).await?;
        let (folder, options) = (folder.to_owned(), options.clone());
        blocking(move || write_delta(&folder, &options, &parent, &current)).await
    }
}

/// A request to publish a directory of slime as a snapshot.
#[derive(Debug)]
pub struct Import {
    dir: PathBuf,
    name: Option<SnapshotName>,
    parent: Option<SnapshotInfo>,
    parent_version: Option<u64>,
    codec: Option<Arc<dyn Codec>>,
    step: Option<u64>,
}

impl Import {
    /// Publishes `dir` as `weight-v000007` or whatever its number is, a full checkpoint plain. A directory that is not
    /// called `weight_v…` is version 0, what the trainer began with.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), name: None, parent: None, parent_version: None, codec: None, step: None }
    }

    /// Sets the snapshot's name.
    #[must_use]
    pub fn with_name(mut self, name: SnapshotName) -> Self {
        self.name = Some(name);
        self
    }

    /// Sets the snapshot that a delta is applied to.
    #[must_use]
    pub fn with_parent(mut self, parent: SnapshotInfo) -> Self {
        self.parent = Some(parent);
        self
    }

    /// Says which version the parent is, where it was not imported.
    #[must_use]
    pub fn with_parent_version(mut self, version: u64) -> Self {
        self.parent_version = Some(version);
        self
    }

    /// Sets the codec. A delta needs one; without one a full checkpoint is plain.
    #[must_use]
    pub fn with_codec(mut self, codec: Arc<dyn Codec>) -> Self {
        self.codec = Some(codec);
        self
    }

    /// Sets the optimizer steps done.
    #[must_use]
    pub fn with_step(mut self, step: u64) -> Self {
        self.step = Some(step);
        self
    }
}

impl Writer {
    /// Publishes a directory of slime: a full checkpoint as a base, with its other files passed through, a delta as a
    /// delta on the parent that the request names. Every tensor that the delta changes is checked before anything is
    /// committed; the version is noted in the manifest.
    ///
    /// # Errors
    /// `Invalid` for a delta without a parent, or a full checkpoint with one; `ChainMismatch` if the delta builds on
    /// another version than the parent is; as [`Directory::open`] and [`Writer::publish`].
    pub async fn import_slime(&self, import: Import) -> Result<SnapshotRef> {
        let Import { dir, name, parent, parent_version, codec, step } = import;
        let path = dir.clone();
        let directory = blocking(move || Directory::open(&path)).await?;
        let (version, publish) = match (directory, parent) {
            (Directory::Full(full), None) => {
                let version = directory_version(&dir).unwrap_or_default();
                let files = blocking(move || other_files(&dir)).await?;
                let kind = SnapshotKind::Base;
                (version, Publish::new(named(name, version)?, kind, Arc::new(full)).with_files(files))
            }
            (Directory::Delta(delta), Some(parent)) => {
                let noted = self.repo().manifest(&parent).await?.metadata.get(NOTE).cloned();
                let noted = noted.and_then(|note| note.parse().ok());
                let found = noted.or(parent_version).ok_or_else(|| {
                    Error::chain_mismatch(format!(
                        "`{}` builds on version {}, and {} was not imported",
                        dir.display(),
                        delta.base_version(),
                        parent.id
                    ))
                    .with_help("say which version the parent is")
                })?;
                let both = [Some(delta.base_version()), parent_version];
                if both.into_iter().flatten().any(|wanted| wanted != found) {
                    return Err(Error::chain_mismatch(format!(
                        "`{}` builds on version {}: {} is version {found}{}",
                        dir.display(),
                        delta.base_version(),
                        parent.id,
                        parent_version.map_or_else(String::new, |said| format!(", version {said} was said")),
                    ))
                    .with_help(format!(
                        "name the snapshot that is version {} as the parent, or import a full checkpoint",
                        delta.base_version()
                    )));
                }
                let old = Arc::new(Restored::open(self.repo(), &parent).await?);
                let version = delta.version();
                let new = Applied::new(Arc::clone(&old), found).then(delta)?;
                let name = named(name, version)?;
                let publish = Publish::new(name, SnapshotKind::Delta, Arc::new(new));
                (version, publish.with_parent(parent, old))
            }
            (Directory::Full(_), Some(parent)) => {
                return Err(Error::invalid(format!(
                    "`{}` is a full checkpoint: it has no parent, {} was named",
                    dir.display(),
                    parent.id
                ))
                .with_help("leave the parent out"));
            }
            (Directory::Delta(delta), None) => {
                return Err(Error::invalid(format!(
                    "`{}` is a delta on version {}: wanted the snapshot of that version",
                    dir.display(),
                    delta.base_version()
                ))
                .with_help("name its parent, or import a full checkpoint first"));
            }
        };
        let publish = publish.with_metadata(BTreeMap::from([(NOTE.to_owned(), version.to_string())]));
        let publish = step.into_iter().fold(publish, Publish::with_step);
        Box::pin(self.publish(codec.into_iter().fold(publish, Publish::with_codec))).await
    }
}

fn named(name: Option<SnapshotName>, version: u64) -> Result<SnapshotName> {
    name.map_or_else(|| SnapshotName::new(format!("weight-v{version:06}")), Ok)
}

/// The files of a full checkpoint that hold no tensors.
fn other_files(dir: &Path) -> Result<Vec<(String, Bytes)>> {
    let failed = |error| io_error(error, format_args!("`{}` could not be read", dir.display()));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let ours = name == INDEX || name.ends_with(".safetensors") || name.ends_with(".tmp");
        if !ours && !name.starts_with('.') && path.is_file() {
            files.push((name.to_owned(), Bytes::from(std::fs::read(&path).map_err(failed)?)));
        }
    }
    files.sort();
    Ok(files)
}

/// The weights of a snapshot, restored tensor by tensor when they are read, on threads that may block.
struct Restored {
    repo: SnapshotRepo,
    chain: Vec<Link>,
    metas: Vec<TensorMeta>,
    /// Those of the manifest, which every tensor is checked against before it is handed out.
    digests: Vec<OnceLock<TensorDigest>>,
    runtime: Handle,
}

impl Restored {
    async fn open(repo: &SnapshotRepo, info: &SnapshotInfo) -> Result<Self> {
        let chain = repo.open_chain(info).await?;
        let last = chain.last().ok_or_else(|| Error::internal("a chain of nothing"))?;
        let (metas, entries) = (last.metas.clone(), &last.manifest.tensors);
        let digests = entries.iter().map(|entry| OnceLock::from(entry.digest)).collect();
        Ok(Self { repo: repo.clone(), chain, metas, digests, runtime: Handle::current() })
    }
}

impl TensorSource for Restored {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        let restored = self.repo.restore_tensor(&self.chain, index);
        Ok(self.runtime.block_on(restored)?.1)
    }

    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        self.digests.get(index)
    }
}
