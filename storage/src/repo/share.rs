//! Tensors that an earlier train state holds already: they are referred to, not written again.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use towline_core::{
    DIGEST_BLOCK, Error, FileEntry, Manifest, Result, TensorDigest, TensorMeta, TensorSource, block_digest,
};

use super::boxes::Region;
use super::info::SnapshotInfo;
use super::ranks::{RankIndex, StoredBox, index_path};
use super::{SnapshotRepo, lost};
use crate::io::blocking;

/// Bytes that are compared at once: the first difference ends it.
const STEP: usize = 4 * DIGEST_BLOCK;

/// A box that lies in the folder of another state.
#[derive(Debug, Clone)]
pub(super) struct SharedBox {
    pub(super) stored: StoredBox,
    /// Its file, with the folder.
    pub(super) file: FileEntry,
}

/// What may be referred to, by the name of the tensor.
#[derive(Debug, Default)]
pub(super) struct Shared(BTreeMap<String, Vec<SharedBox>>);

/// The tensors of a rank: which are there already, and which must be written.
pub(super) struct Sorted {
    /// By the number in the source.
    pub(super) there: BTreeMap<usize, SharedBox>,
    /// The rest.
    pub(super) new: Arc<dyn TensorSource>,
}

impl SnapshotRepo {
    /// The indexes of all ranks of a train state.
    pub(super) async fn rank_indexes(
        &self,
        info: &SnapshotInfo,
        manifest: &Manifest,
    ) -> Result<Vec<RankIndex>> {
        let ranks = NonZeroU32::new(manifest.ranks).ok_or_else(|| {
            Error::invalid(format!("{} is a {}: wanted a train state with ranks", info.id, info.kind))
                .with_help("name a train state")
        })?;
        let mut indexes = Vec::new();
        for rank in 0..ranks.get() {
            let path = index_path(rank);
            let entry = manifest.files.iter().find(|file| file.path == path).ok_or_else(|| {
                Error::corrupt(format!("{}: the index of rank {rank} is not among its files", info.id))
            })?;
            let key = self.key(info, &path)?;
            let read = RankIndex::read(&self.ops, &key, rank, ranks, Some(&entry.digest)).await;
            indexes.push(read.map_err(|error| lost(error, info))?.0);
        }
        Ok(indexes)
    }

    /// What a new state may refer to in `earlier`.
    pub(super) async fn shared(&self, earlier: Option<&SnapshotInfo>) -> Result<Shared> {
        let mut shared = Shared::default();
        let Some(earlier) = earlier else { return Ok(shared) };
        let manifest = self.manifest(earlier).await?;
        for index in self.rank_indexes(earlier, &manifest).await? {
            for stored in index.boxes {
                let Some(file) = index.files.get(stored.file) else { continue };
                // What it refers to itself is referred to where it lies, so that nothing is two steps away.
                let dir = file.dir.as_ref().unwrap_or(&earlier.dir);
                let file = file.clone().with_dir(dir.clone());
                shared.0.entry(stored.name.clone()).or_default().push(SharedBox { stored, file });
            }
        }
        Ok(shared)
    }
}

impl Shared {
    /// Sorts the tensors of `source`, each of which is the box of the same number: a tensor is there if the same box
    /// of the same tensor is, with the same bytes.
    pub(super) async fn sort(
        self,
        source: &Arc<dyn TensorSource>,
        boxes: Vec<(String, Vec<usize>, Region)>,
    ) -> Result<Sorted> {
        if self.0.is_empty() {
            return Ok(Sorted { there: BTreeMap::new(), new: Arc::clone(source) });
        }
        let source = Arc::clone(source);
        blocking(move || {
            let mut there = BTreeMap::new();
            for (number, (meta, (name, global, region))) in source.tensors().iter().zip(boxes).enumerate() {
                let same_place = |shared: &&SharedBox| {
                    let SharedBox { stored, .. } = shared;
                    (stored.dtype, &stored.global) == (meta.dtype(), &global) && stored.region() == region
                };
                let found = self.0.get(&name).into_iter().flatten().find(same_place);
                if let Some(found) = found
                    && holds(&*source, number, meta, &found.stored)?
                {
                    there.insert(number, found.clone());
                }
            }
            let picks: Vec<_> =
                (0..source.tensors().len()).filter(|number| !there.contains_key(number)).collect();
            let tensors = picks.iter().filter_map(|&number| source.tensors().get(number).cloned()).collect();
            Ok(Sorted { there, new: Arc::new(Picked { source, picks, tensors }) })
        })
        .await
    }
}

/// Whether tensor `number` of `source` has the bytes that `stored` has.
fn holds(source: &dyn TensorSource, number: usize, meta: &TensorMeta, stored: &StoredBox) -> Result<bool> {
    if let Some(digest) = source.digest(number).and_then(OnceLock::get) {
        return Ok(*digest == stored.digest);
    }
    let Some(blocks) = stored.blocks()? else {
        return Ok(TensorDigest::of(&source.read(number)?) == stored.digest);
    };
    let length = meta.byte_len();
    for (start, wanted) in (0..length).step_by(STEP).zip(blocks.chunks(STEP / DIGEST_BLOCK)) {
        let data = source.read_range(number, start..length.min(start + STEP))?;
        if !data.chunks(DIGEST_BLOCK).map(block_digest).eq(wanted.iter().copied()) {
            return Ok(false);
        }
    }
    Ok(blocks.len() == length.div_ceil(DIGEST_BLOCK))
}

/// Some tensors of a source.
struct Picked {
    source: Arc<dyn TensorSource>,
    picks: Vec<usize>,
    tensors: Vec<TensorMeta>,
}

impl Picked {
    fn at(&self, index: usize) -> Result<usize> {
        let number = self.picks.get(index).copied();
        number.ok_or_else(|| Error::internal(format!("tensor {index} of {} was asked for", self.picks.len())))
    }
}

impl TensorSource for Picked {
    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        self.source.read(self.at(index)?)
    }

    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        self.source.read_range(self.at(index)?, range)
    }

    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        self.source.digest(self.at(index).ok()?)
    }
}
