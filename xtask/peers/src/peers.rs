//! The codecs of others, each the way that its documents or its users apply it to weights.
//!
//! What is counted for a peer is its payload alone: no names, no digests, no lengths of its parts. That favours it,
//! since what is counted for Towline is a whole file.

mod general;
mod pcodec;
mod sparse;

use std::any::Any;
use std::fmt::Debug;

use bytes::Bytes;
use towline_core::{DType, Error, Mode, Result, TensorMeta};
use zstd::bulk::{Compressor, Decompressor};

use crate::files::Pair;
use crate::work;

/// A codec that is compared with ours. It sees one part of a tensor at a time.
pub(crate) trait Peer: Debug + Sync {
    /// What the tables call it.
    fn id(&self) -> &'static str;

    /// Whether it has this mode.
    fn has(&self, _mode: Mode) -> bool {
        true
    }

    /// Ways in which it can be applied. The one that makes a pair smallest is measured.
    fn variants(&self, _mode: Mode, _dtype: DType) -> usize {
        1
    }

    /// The largest part that it gets, in bytes; `usize::MAX` for whole tensors.
    fn cut(&self, _width: usize) -> usize {
        usize::MAX
    }

    /// Appends the encoded part to `out`.
    fn encode(&self, part: &Part<'_>, scratch: &mut Scratch, out: &mut Vec<u8>) -> Result<()>;

    /// Decodes into `target`, which holds the parent's bytes in the delta mode and anything of its length else.
    fn decode(&self, kind: Kind, encoded: &[u8], scratch: &mut Scratch, target: &mut [u8]) -> Result<()>;
}

/// How a part is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) dtype: DType,
    pub(crate) mode: Mode,
    /// The variant in use.
    pub(crate) variant: usize,
}

impl Kind {
    pub(crate) fn width(self) -> usize {
        width(self.dtype)
    }
}

/// One part of a tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) kind: Kind,
    /// Empty in the base mode.
    pub(crate) parent: &'a [u8],
    pub(crate) current: &'a [u8],
}

/// What a thread keeps between parts, so that no peer pays for allocations at each.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) plain: Vec<u8>,
    pub(crate) packed: Vec<u8>,
    pub(crate) more: Vec<u8>,
    pub(crate) numbers: Option<Box<dyn Any>>,
    pub(crate) compressor: Option<Compressor<'static>>,
    pub(crate) decompressor: Option<Decompressor<'static>>,
    pub(crate) table: Option<lz4_flex::block::CompressTable>,
}

impl Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

/// Bytes of an element; 1 for elements below a byte.
pub(crate) fn width(dtype: DType) -> usize {
    (dtype.bits() as usize / 8).max(1)
}

/// Every peer, in the order of the tables.
pub(crate) static ALL: &[&dyn Peer] = &[
    &pcodec::Pcodec,
    &general::Zstd { id: "zstd-1", level: 1, cut: usize::MAX },
    &general::Zstd { id: "zstd-3", level: 3, cut: usize::MAX },
    &general::Zstd { id: "zstd-1/256K", level: 1, cut: 256 << 10 },
    &general::Zstd { id: "zstd-3/256K", level: 3, cut: 256 << 10 },
    &general::Planes,
    &general::Lz4,
    &sparse::Sparse { id: "sparse", packed: false },
    &sparse::Sparse { id: "sparse+zstd-1", packed: true },
];

/// The peer called `id`.
pub(crate) fn by_id(id: &str) -> Option<&'static dyn Peer> {
    ALL.iter().copied().find(|peer| peer.id() == id)
}

/// A pair as a peer encoded it: one frame for each job, in their order.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) variant: usize,
    pub(crate) frames: Vec<Vec<u8>>,
}

/// A peer at work on one set of tensors.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    peer: &'a dyn Peer,
    mode: Mode,
    metas: &'a [TensorMeta],
    jobs: Vec<work::Job>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(peer: &'a dyn Peer, mode: Mode, metas: &'a [TensorMeta]) -> Self {
        let jobs = work::jobs(metas, |meta| peer.cut(width(meta.dtype())));
        Self { peer, mode, metas, jobs }
    }

    fn kind(&self, job: &work::Job, variant: usize) -> Result<Kind> {
        let meta = self.metas.get(job.tensor).ok_or_else(|| Error::internal("a job without a tensor"))?;
        let variants = self.peer.variants(self.mode, meta.dtype());
        Ok(Kind { dtype: meta.dtype(), mode: self.mode, variant: variant.min(variants - 1) })
    }

    /// Encodes all parts and hands each frame to `keep` with the number of its job.
    fn encode(
        &self,
        data: &[(Option<Bytes>, Bytes)],
        variant: usize,
        threads: usize,
        keep: impl Fn(usize, &mut Vec<u8>) -> Result<()> + Sync,
    ) -> Result<()> {
        work::run(threads, self.jobs.len(), <(Scratch, Vec<u8>)>::default, |(scratch, out), index| {
            let lost = || Error::internal("a job without a tensor");
            let job = self.jobs.get(index).ok_or_else(lost)?;
            let (old, new) = data.get(job.tensor).ok_or_else(lost)?;
            let parent = old.as_ref().and_then(|old| old.get(job.range.clone())).unwrap_or_default();
            let current = new.get(job.range.clone()).ok_or_else(lost)?;
            out.clear();
            self.peer.encode(&Part { kind: self.kind(job, variant)?, parent, current }, scratch, out)?;
            keep(index, out)
        })
    }

    /// Encodes and forgets; the bytes in all.
    pub(crate) fn size(
        &self,
        data: &[(Option<Bytes>, Bytes)],
        variant: usize,
        threads: usize,
    ) -> Result<u64> {
        let bytes = std::sync::atomic::AtomicU64::new(0);
        self.encode(data, variant, threads, |_, out| {
            bytes.fetch_add(out.len() as u64, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        })?;
        Ok(bytes.into_inner())
    }

    /// The variant that makes these tensors smallest.
    pub(crate) fn best_variant(&self, data: &[(Option<Bytes>, Bytes)], threads: usize) -> Result<usize> {
        let count =
            self.metas.iter().map(|meta| self.peer.variants(self.mode, meta.dtype())).max().unwrap_or(1);
        let mut best = (u64::MAX, 0);
        for variant in 0..if count > 1 { count } else { 0 } {
            best = best.min((self.size(data, variant, threads)?, variant));
        }
        Ok(best.1)
    }

    /// Encodes and keeps the frames.
    pub(crate) fn frames(
        &self,
        data: &[(Option<Bytes>, Bytes)],
        variant: usize,
        threads: usize,
    ) -> Result<Encoded> {
        let slots: Vec<std::sync::Mutex<Vec<u8>>> = self.jobs.iter().map(|_| Default::default()).collect();
        self.encode(data, variant, threads, |index, out| {
            if let Some(slot) = slots.get(index) {
                *slot.lock().map_err(work::poisoned)? = out.as_slice().to_vec();
            }
            Ok(())
        })?;
        let frames = slots.into_iter().map(|slot| slot.into_inner().map_err(work::poisoned));
        Ok(Encoded { variant, frames: frames.collect::<Result<_>>()? })
    }

    /// Decodes all parts in place.
    pub(crate) fn decode(&self, encoded: &Encoded, targets: &mut [Vec<u8>], threads: usize) -> Result<()> {
        let parts = work::parts(targets, &self.jobs);
        work::run(threads, self.jobs.len(), Scratch::default, |scratch, index| {
            let (Some(job), Some(part), Some(frame)) =
                (self.jobs.get(index), parts.get(index), encoded.frames.get(index))
            else {
                return Err(Error::internal("a job without a frame"));
            };
            let mut target = part.lock().map_err(work::poisoned)?;
            self.peer.decode(self.kind(job, encoded.variant)?, frame, scratch, &mut target)
        })
    }

    /// The size of `encoded` and, where there is a choice, what was chosen.
    pub(crate) fn bytes(encoded: &Encoded) -> u64 {
        encoded.frames.iter().map(|frame| frame.len() as u64).sum()
    }
}

/// What a pair is as a peer's run sees it.
pub(crate) fn run<'a>(peer: &'a dyn Peer, pair: &'a Pair) -> Run<'a> {
    Run::new(peer, pair.mode(), pair.metas())
}

/// An encoded part that cannot be read: the measuring program wrote it itself, so this is a fault of it or the peer.
pub(crate) fn broken(peer: &str, why: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("{peer}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{base, pair};

    /// Every peer, mode, type and variant comes back exactly, on one thread and on two.
    #[test]
    fn peers_round_trip() {
        for dtype in
            [DType::BF16, DType::F16, DType::F32, DType::F64, DType::F8E4M3, DType::I8, DType::I64, DType::F4]
        {
            for subject in [pair(dtype, 0.02), pair(dtype, 1.0), pair(dtype, 0.0), base(dtype)] {
                let data = subject.all().unwrap();
                for peer in ALL.iter().filter(|peer| peer.has(subject.mode())) {
                    let run = run(*peer, &subject);
                    for variant in 0..peer.variants(subject.mode(), dtype) {
                        let encoded = run.frames(&data, variant, 2).unwrap();
                        assert_eq!(Run::bytes(&encoded), run.size(&data, variant, 1).unwrap());
                        for threads in [1, 2] {
                            let mut targets: Vec<Vec<u8>> = data
                                .iter()
                                .map(|(old, new)| old.as_ref().map_or(vec![7; new.len()], |old| old.to_vec()))
                                .collect();
                            run.decode(&encoded, &mut targets, threads).unwrap();
                            let same = targets.iter().zip(&data).all(|(target, (_, new))| target == new);
                            assert!(same, "{} variant {variant} on {dtype}", peer.id());
                        }
                    }
                    assert!(run.best_variant(&data, 2).unwrap() < peer.variants(subject.mode(), dtype));
                }
            }
        }
    }

    #[test]
    fn ids_are_unique() {
        let ids: std::collections::BTreeSet<_> = ALL.iter().map(|peer| peer.id()).collect();
        assert_eq!(ids.len(), ALL.len());
        assert!(by_id("pcodec").is_some() && by_id("none").is_none());
    }
}
