//! Drives a codec over a set of tensors: cuts them into units, runs the units on scoped threads, digests the
//! results, and keeps a bounded number of bytes in memory.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use crate::digest::{DIGEST_BLOCK, block_digest};
use crate::tensor::same_tensors;
use crate::{Codec, Error, Mode, Result, TensorDigest, TensorMeta, TensorSource, UnitMeta};

/// How many threads and how much memory a run may use.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Limits {
    /// Threads that encode or decode. Default 1: the caller knows the machine.
    pub threads: NonZeroUsize,
    /// Plain bytes of tensors in work at once. One tensor is always in work, however large. Default 64 MiB.
    pub window: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { threads: NonZeroUsize::MIN, window: 64 << 20 }
    }
}

impl Limits {
    /// The default window with this many threads (0 counts as 1).
    #[must_use]
    pub fn threads(threads: usize) -> Self {
        Self { threads: NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN), ..Self::default() }
    }

    /// Sets the window in bytes.
    #[must_use]
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = window;
        self
    }
}

/// One encoded tensor, ready to be written.
#[derive(Debug)]
#[non_exhaustive]
pub struct Encoded {
    /// The frame of each unit.
    pub frames: Vec<Vec<u8>>,
    /// The digest of the new tensor.
    pub digest: TensorDigest,
    /// The digest of the parent's tensor, for a delta.
    pub parent_digest: Option<TensorDigest>,
    /// The codec's own checksum of the new tensor.
    pub checksum: Option<u32>,
    /// Elements that differ from the parent's; for a base, all. Sub-byte elements are counted by bytes.
    pub changed: u64,
}

/// Encodes the tensors of `current` in order, whole or against `parent`, and hands each to `emit`.
///
/// Output does not depend on the number of threads. Memory: the window's tensors, their parents and their frames.
///
/// # Errors
/// `Invalid` if the sets differ in a name, dtype or shape; what the sources, the codec or `emit` answer.
pub fn encode(
    codec: &dyn Codec,
    current: &dyn TensorSource,
    parent: Option<&dyn TensorSource>,
    limits: Limits,
    emit: &mut dyn FnMut(&TensorMeta, Encoded) -> Result<()>,
) -> Result<()> {
    if let Some(parent) = parent {
        same_tensors(parent.tensors(), current.tensors())
            .map_err(|error| error.context("the weights do not fit their parent").with_help("save a base"))?;
    }
    let metas = current.tensors();
    let mut next = 0;
    while next < metas.len() {
        let mut batch = Vec::new();
        let mut size = 0usize;
        while let Some(meta) = metas.get(next)
            && (batch.is_empty() || size.saturating_add(meta.byte_len()) <= limits.window)
        {
            size = size.saturating_add(meta.byte_len());
            let old = parent.map(|parent| parent.read(next)).transpose()?;
            batch.push((meta, current.read(next)?, old));
            next += 1;
        }
        for (tensor, encoded) in batch.iter().zip(encode_batch(codec, &batch, limits.threads)?) {
            emit(tensor.0, encoded)?;
        }
    }
    Ok(())
}

/// Decodes one tensor's frames into `target`, which holds the parent's bytes for a delta, and checks them.
///
/// # Errors
/// `Corrupt` if a frame is bad or the result differs from `digest` or `checksum`; `target` is then undefined.
pub fn decode(
    codec: &dyn Codec,
    meta: &TensorMeta,
    mode: Mode,
    frames: &[Bytes],
    unit: crate::Unit,
    target: &mut [u8],
    threads: NonZeroUsize,
) -> Result<()> {
    let ranges = unit.ranges(meta.byte_len());
    if ranges.len() != frames.len() || target.len() != meta.byte_len() {
        return Err(Error::corrupt(format!(
            "tensor `{}`: wanted {} frames for {} bytes, found {} for {}",
            meta.name(),
            ranges.len(),
            meta.byte_len(),
            frames.len(),
            target.len()
        )));
    }
    let mut units = Vec::with_capacity(frames.len());
    let mut rest = target;
    for (range, frame) in ranges.zip(frames) {
        let (unit, behind) = rest.split_at_mut(range.len());
        units.push(Mutex::new((UnitMeta::new(meta, range), frame, unit)));
        rest = behind;
    }
    run(units.len(), threads, |index| match units.get(index) {
        Some(unit) => {
            let mut unit = unit.lock().map_err(poisoned)?;
            let (unit, frame, target) = &mut *unit;
            codec
                .decode(unit, mode, frame, target)
                .map_err(|error| error.context(format_args!("tensor `{}`, byte {}", unit.name, unit.offset)))
        }
        None => Ok(()),
    })
}

/// Checks a decoded tensor against what its file or manifest says.
///
/// # Errors
/// `Corrupt` if it differs.
pub fn verify(
    codec: &dyn Codec,
    meta: &TensorMeta,
    data: &[u8],
    digest: Option<&TensorDigest>,
    checksum: Option<u32>,
) -> Result<()> {
    let wrong = |what: &str| {
        Error::corrupt(format!("tensor `{}`: the decoded bytes do not match their {what}", meta.name()))
            .with_help("check that the delta's parent is the right one, then copy the file again")
    };
    if let Some(checksum) = checksum
        && codec.checksum(data) != Some(checksum)
    {
        return Err(wrong("checksum"));
    }
    match digest {
        Some(digest) if TensorDigest::of(data) != *digest => Err(wrong("digest")),
        Some(_) | None => Ok(()),
    }
}

type Work<'a> = (&'a TensorMeta, Bytes, Option<Bytes>);

fn encode_batch(codec: &dyn Codec, batch: &[Work<'_>], threads: NonZeroUsize) -> Result<Vec<Encoded>> {
    let unit = codec.unit();
    let jobs: Vec<_> = batch
        .iter()
        .enumerate()
        .flat_map(|(tensor, (meta, ..))| unit.ranges(meta.byte_len()).map(move |range| (tensor, range)))
        .collect();
    let frames: Vec<Mutex<(Vec<u8>, u64)>> = jobs.iter().map(|_| Mutex::default()).collect();
    run(jobs.len(), threads, |index| {
        let (Some((tensor, range)), Some(slot)) = (jobs.get(index), frames.get(index)) else { return Ok(()) };
        let Some((meta, current, parent)) = batch.get(*tensor) else { return Ok(()) };
        let current = &current[range.clone()];
        let parent = parent.as_ref().map(|parent| &parent[range.clone()]);
        let mut frame = Vec::new();
        codec
            .encode(&UnitMeta::new(meta, range.clone()), parent, current, &mut frame)
            .map_err(|error| error.context(format_args!("tensor `{}`, byte {}", meta.name(), range.start)))?;
        *slot.lock().map_err(poisoned)? = (frame, changed(meta, parent, current));
        Ok(())
    })?;
    let mut frames = frames.into_iter();
    batch
        .iter()
        .map(|(meta, current, parent)| {
            let units = frames.by_ref().take(unit.ranges(meta.byte_len()).len());
            let units: Vec<_> =
                units.map(|slot| slot.into_inner().map_err(poisoned)).collect::<Result<_>>()?;
            let changed = units.iter().map(|(_, changed)| changed).sum();
            Ok(Encoded {
                frames: units.into_iter().map(|(frame, _)| frame).collect(),
                digest: tensor_digest(current, threads),
                parent_digest: parent.as_ref().map(|parent| tensor_digest(parent, threads)),
                checksum: codec.checksum(current),
                changed,
            })
        })
        .collect()
}

fn tensor_digest(data: &[u8], threads: NonZeroUsize) -> TensorDigest {
    if threads.get() == 1 || data.len() <= 4 * DIGEST_BLOCK {
        return TensorDigest::of(data);
    }
    let blocks: Vec<_> = data.chunks(DIGEST_BLOCK).collect();
    let digests: Vec<Mutex<u128>> = blocks.iter().map(|_| Mutex::default()).collect();
    let outcome = run(blocks.len(), threads, |index| {
        if let (Some(block), Some(slot)) = (blocks.get(index), digests.get(index)) {
            *slot.lock().map_err(poisoned)? = block_digest(block);
        }
        Ok(())
    });
    match outcome {
        Ok(()) => TensorDigest::of_blocks(digests.into_iter().filter_map(|slot| slot.into_inner().ok())),
        Err(_) => TensorDigest::of(data),
    }
}

fn changed(meta: &TensorMeta, parent: Option<&[u8]>, current: &[u8]) -> u64 {
    let width = (meta.dtype().bits() as usize / 8).max(1);
    let count = match parent {
        None => current.len() / width,
        Some(parent) if parent == current => 0,
        Some(parent) => match width {
            2 => differing::<2>(parent, current),
            4 => differing::<4>(parent, current),
            8 => differing::<8>(parent, current),
            _ => differing::<1>(parent, current),
        },
    };
    count as u64
}

fn differing<const N: usize>(parent: &[u8], current: &[u8]) -> usize {
    let (left, right) = (parent.as_chunks::<N>().0, current.as_chunks::<N>().0);
    left.iter().zip(right).filter(|(left, right)| left != right).count()
}

/// Runs `job(0..count)` on at most `threads` scoped threads and returns the first error.
fn run(count: usize, threads: NonZeroUsize, job: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            if let Err(error) = job(index) {
                next.store(count, Ordering::Relaxed);
                if let Ok(mut failed) = failed.lock() {
                    failed.get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(count) {
            scope.spawn(work);
        }
        work();
    });
    match failed.into_inner().map_err(poisoned)? {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn poisoned<T>(_: std::sync::PoisonError<T>) -> Error {
    Error::internal("a codec panicked on another thread").with_help("run the codec conformance kit on it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::XorCodec;
    use crate::{DType, Unit, Weights};

    fn weights(seed: u8) -> Weights {
        Weights::new((0..20u8).map(|index| {
            let length = usize::from(index) * 1000;
            let data: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_mul(3) ^ seed ^ index).collect();
            (TensorMeta::new(format!("t{index:02}"), DType::U16, [length / 2]).unwrap(), data.into())
        }))
        .unwrap()
    }

    fn encode_all(threads: usize, window: usize) -> Vec<(TensorMeta, Encoded)> {
        let mut all = Vec::new();
        let limits = Limits::threads(threads).with_window(window);
        encode(&XorCodec, &weights(1), Some(&weights(9)), limits, &mut |meta, encoded| {
            all.push((meta.clone(), encoded));
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn the_output_does_not_depend_on_threads_or_window() {
        let one = encode_all(1, usize::MAX);
        for (threads, window) in [(2, 1), (7, 10_000)] {
            let other = encode_all(threads, window);
            for ((meta, left), (_, right)) in one.iter().zip(&other) {
                assert_eq!(left.frames, right.frames, "{}", meta.name());
                assert_eq!(left.digest, right.digest);
                assert_eq!(left.changed, right.changed);
            }
        }
    }

    #[test]
    fn decode_brings_the_new_weights_back_and_verify_finds_a_wrong_parent() {
        for (meta, encoded) in encode_all(2, usize::MAX) {
            let frames: Vec<Bytes> = encoded.frames.into_iter().map(Bytes::from).collect();
            let mut target = weights(9).get(meta.name()).unwrap().1.to_vec();
            let threads = NonZeroUsize::new(3).unwrap();
            decode(&XorCodec, &meta, Mode::Delta, &frames, XorCodec.unit(), &mut target, threads).unwrap();
            verify(&XorCodec, &meta, &target, Some(&encoded.digest), None).unwrap();
            assert_eq!(weights(1).get(meta.name()).unwrap().1, &target);
            if let Some(byte) = target.first_mut() {
                *byte ^= 1;
                assert!(verify(&XorCodec, &meta, &target, Some(&encoded.digest), None).is_err());
            }
            if frames.len() > 1 {
                assert!(
                    decode(&XorCodec, &meta, Mode::Delta, &frames, Unit::Whole, &mut target, threads)
                        .is_err()
                );
            }
        }
    }

    #[test]
    fn a_parent_with_other_tensors_is_refused() {
        let error =
            encode(&XorCodec, &weights(1), Some(&Weights::default()), Limits::default(), &mut |_, _| Ok(()))
                .unwrap_err();
        assert!(error.message().contains("t00"), "{error}");
    }
}
