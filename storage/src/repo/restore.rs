//! Stored weights back in memory.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use towline_core::{
    ContentDigest, Error, Manifest, Result, SnapshotKind, TensorDigest, TensorMeta, Weights, same_tensors,
};

use super::SnapshotRepo;
use super::chain::Link;
use super::info::SnapshotInfo;
use crate::io::blocking;

/// Tensors in work at once, within the window of bytes.
const AT_ONCE: usize = 8;
/// The most bytes of plain tensors that are read together: less than this costs a request no less.
const READ: usize = 8 << 20;

/// A train state, checked.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainState {
    /// What it is; its sections are in there.
    pub manifest: Manifest,
    /// Weights, moments, whatever was saved.
    pub tensors: Weights,
}

impl SnapshotRepo {
    /// The whole weights of a snapshot: a base, or a base and the deltas on it, every tensor checked.
    ///
    /// # Errors
    /// `NotFound` if it or what it rests on is gone; `Corrupt` for damage; `Unsupported` for a codec that the repo
    /// was not given.
    pub async fn restore(&self, info: &SnapshotInfo) -> Result<Weights> {
        Ok(self.restore_link(info).await?.1)
    }

    /// As [`SnapshotRepo::restore`], but tensor by tensor in the order of their names, within the window of bytes
    /// (or one tensor), its frames, and nothing more. An error of `sink` ends it.
    ///
    /// # Errors
    /// As [`SnapshotRepo::restore`]; what `sink` answers.
    pub async fn restore_each(
        &self,
        info: &SnapshotInfo,
        sink: &mut (dyn FnMut(TensorMeta, Bytes) -> Result<()> + Send),
    ) -> Result<()> {
        let chain = self.open_chain(info).await?;
        for batch in self.batches(&chain) {
            for (meta, data) in self.restore_batch(&chain, batch).await? {
                sink(meta, data)?;
            }
        }
        Ok(())
    }

    /// Applies one delta to its parent's weights in memory. Tensors that it does not change share `parent`'s bytes
    /// and are not read.
    ///
    /// # Errors
    /// `Invalid` if `info` is no delta; `ChainMismatch` if `parent` is not what the delta was made from; `Corrupt`
    /// for damage; `Unsupported` for a codec that the repo was not given.
    pub async fn apply(&self, info: &SnapshotInfo, parent: &Weights) -> Result<Weights> {
        let (SnapshotKind::Delta, Some(wanted)) = (info.kind, &info.parent) else {
            return Err(Error::invalid(format!("{} is a {}: wanted a delta", info.id, info.kind))
                .with_help("restore it instead"));
        };
        let (found, digests) = digests_of(parent).await?;
        let mismatch = |why: String| {
            Error::chain_mismatch(format!("{} is a delta on {}: {why}", info.id, wanted.identity))
                .with_help("apply it to the weights that it was made from, or publish a base")
        };
        if found != wanted.digest {
            return Err(mismatch(format!("wanted content digest {}, found {found}", wanted.digest)));
        }
        let link = self.open_link(info).await?;
        same_tensors(&link.metas, parent.tensors()).map_err(|error| mismatch(error.message().to_owned()))?;
        if link.manifest.parent.as_ref().map(|parent| &parent.id) != Some(wanted) {
            return Err(Error::corrupt(format!("{}: head and manifest name different parents", info.id)));
        }
        let same = |number: usize| {
            link.manifest.tensors.get(number).map(|entry| &entry.digest) == digests.get(number)
        };
        let mut tensors = Vec::with_capacity(link.metas.len());
        let mut changed = Vec::new();
        for (number, (meta, data)) in parent.iter().enumerate() {
            if same(number) {
                tensors.push((meta.clone(), data.clone()));
            } else {
                changed.push((number, data));
            }
        }
        for batch in changed.chunks(AT_ONCE) {
            let steps = batch.iter().map(|(number, data)| {
                link.step(&self.ops, *number, BytesMut::from(data.as_ref()), self.limits.threads)
            });
            let done = try_join_all(steps).await?;
            for ((number, _), data) in batch.iter().zip(done) {
                tensors.extend(link.metas.get(*number).map(|meta| (meta.clone(), data.freeze())));
            }
        }
        Weights::new(tensors)
    }

    /// A train state, every tensor checked.
    ///
    /// # Errors
    /// `Invalid` if `info` is a snapshot for samplers; else as [`SnapshotRepo::restore`].
    pub async fn load_state(&self, info: &SnapshotInfo) -> Result<TrainState> {
        if !info.kind.is_resumable() {
            return Err(Error::invalid(format!("{} is a {}: wanted a train state", info.id, info.kind))
                .with_help("name a train state: training cannot resume from weights for samplers"));
        }
        let state = self.manifest(info).await?;
        if state.ranks > 0 {
            let tensors = self.open_state(info).await?.read_all().await?;
            return Ok(TrainState { manifest: state, tensors });
        }
        let (manifest, tensors) = self.restore_link(info).await?;
        Ok(TrainState { manifest, tensors })
    }

    async fn restore_link(&self, info: &SnapshotInfo) -> Result<(Manifest, Weights)> {
        let chain = self.open_chain(info).await?;
        let weights = Weights::new(self.restore_all(&chain).await?)?;
        let last = chain.into_iter().next_back();
        let manifest = last.map(|link| link.manifest).ok_or_else(|| Error::internal("a chain of nothing"))?;
        Ok((manifest, weights))
    }

    /// Every tensor. Those of a plain base that follow one another in a file are read together.
    async fn restore_all(&self, chain: &[Link]) -> Result<Vec<(TensorMeta, Bytes)>> {
        let plain = match chain {
            [base] => base.plain_runs(READ),
            _ => None,
        };
        let (Some(runs), [base]) = (plain, chain) else {
            let mut tensors = Vec::new();
            for batch in self.batches(chain) {
                tensors.extend(self.restore_batch(chain, batch).await?);
            }
            return Ok(tensors);
        };
        // Collected first: a stream of closures that borrow could not be sent to another thread.
        let reads: Vec<_> = runs.into_iter().map(|run| base.read_run(&self.ops, run)).collect();
        let read: Vec<_> = stream::iter(reads).buffer_unordered(AT_ONCE).try_collect().await?;
        let mut tensors: Vec<_> = read.into_iter().flatten().collect();
        tensors.sort_by_key(|(number, _)| *number);
        Ok(base.metas.iter().cloned().zip(tensors.into_iter().map(|(_, data)| data)).collect())
    }

    /// Runs of tensors that fit in the window together, at least one tensor each.
    pub(super) fn batches(&self, chain: &[Link]) -> Vec<Range<usize>> {
        let metas = chain.last().map(|link| link.metas.as_slice()).unwrap_or_default();
        let mut batches: Vec<Range<usize>> = Vec::new();
        let mut size = 0usize;
        for (number, meta) in metas.iter().enumerate() {
            size = size.saturating_add(meta.byte_len());
            match batches.last_mut() {
                Some(batch) if size <= self.limits.window && batch.len() < AT_ONCE => batch.end = number + 1,
                _ => {
                    batches.push(number..number + 1);
                    size = meta.byte_len();
                }
            }
        }
        batches
    }

    /// The tensors of one run, through the whole chain.
    pub(super) async fn restore_batch(
        &self,
        chain: &[Link],
        batch: Range<usize>,
    ) -> Result<Vec<(TensorMeta, Bytes)>> {
        try_join_all(batch.map(|number| self.restore_tensor(chain, number))).await
    }

    /// One tensor, through the whole chain.
    pub(super) async fn restore_tensor(&self, chain: &[Link], number: usize) -> Result<(TensorMeta, Bytes)> {
        let mut data = BytesMut::new();
        for link in chain {
            data = link.step(&self.ops, number, data, self.limits.threads).await?;
        }
        let meta = chain.last().and_then(|link| link.metas.get(number)).cloned();
        let meta = meta.ok_or_else(|| Error::internal(format!("tensor {number} was asked for")))?;
        Ok((meta, data.freeze()))
    }
}

/// The content digest of `weights`, and each tensor's.
async fn digests_of(weights: &Weights) -> Result<(ContentDigest, Vec<TensorDigest>)> {
    let weights = weights.clone();
    blocking(move || {
        let digests: Vec<_> = weights.iter().map(|(_, data)| TensorDigest::of(data)).collect();
        let tensors = weights
            .tensors()
            .iter()
            .zip(&digests)
            .map(|(meta, digest)| (meta.name(), meta.dtype(), meta.shape(), digest));
        Ok((ContentDigest::of_tensors(tensors), digests))
    })
    .await
}
