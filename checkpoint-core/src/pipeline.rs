//! Drives a codec over a set of tensors: cuts them into units, runs the units on scoped threads, digests the
//! results, and keeps a bounded number of bytes in memory.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use crate::digest::{DIGEST_BLOCK, block_digest};
use crate::id::shown;
use crate::shard::EncodedTensor;
use crate::tensor::same_tensors;
use crate::{Codec, Error, Mode, Result, TensorDigest, TensorMeta, TensorSource, Unit, UnitMeta};

/// How many threads and how much memory a run may use.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Limits {
    /// Threads that encode or decode. Default 1: the caller knows the machine.
    pub threads: NonZeroUsize,
    /// Plain bytes in work at once. One unit of the codec is always in work, however large. Default 32 MiB.
    pub window: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { threads: NonZeroUsize::MIN, window: 32 << 20 }
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

/// Encoded units of one tensor, one after the other, ready to be written.
#[derive(Debug)]
#[non_exhaustive]
pub struct Encoded {
    /// The frame of each unit.
    pub frames: Vec<Vec<u8>>,
    /// The check of each unit's new bytes, where the tensor has more units than one.
    pub checks: Vec<u32>,
    /// What is known of the tensor as a whole, with its last units. Tensors larger than the window come in parts.
    pub whole: Option<Summary>,
}

/// What is known of a tensor when all of it was encoded.
#[derive(Debug)]
#[non_exhaustive]
pub struct Summary {
    /// The digest of the new tensor.
    pub digest: TensorDigest,
    /// The digest of the parent's tensor, for a delta.
    pub parent_digest: Option<TensorDigest>,
    /// The codec's own checksum of the new tensor, for a codec of whole tensors.
    pub checksum: Option<u32>,
    /// Elements that differ from the parent's; for a base, all. Sub-byte elements are counted by bytes.
    pub changed: u64,
}

/// Encodes the tensors of `current` in order, whole or against `parent`, and hands their units to `emit` in order.
///
/// Output does not depend on the number of threads. A tensor above the window is read, encoded and handed on in
/// parts, unless the codec takes tensors whole. Memory: the window's bytes, their parents and their frames.
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
    let unit = codec.unit();
    let mut spans = current
        .tensors()
        .iter()
        .enumerate()
        .flat_map(|(index, meta)| spans(unit, meta.byte_len()).map(move |range| (index, meta, range)))
        .peekable();
    let mut whole: Option<(usize, Pair)> = None;
    let mut open = Open::default();
    while spans.peek().is_some() {
        let (mut batch, mut size) = (Vec::new(), 0usize);
        while let Some((index, meta, range)) =
            spans.next_if(|span| batch.is_empty() || size.saturating_add(span.2.len()) <= limits.window)
        {
            size = size.saturating_add(range.len());
            let read = match &whole {
                // Larger ones are read span by span, on the thread that works on the span.
                _ if meta.byte_len() > limits.window && unit != Unit::Whole => None,
                Some((at, pair)) if *at == index => Some(pair.clone()),
                _ => {
                    let pair = Pair::read(current, parent, index, None)?;
                    whole = Some((index, pair.clone()));
                    Some(pair)
                }
            };
            batch.push(Job { index, meta, range, read, done: Mutex::default() });
        }
        run(batch.len(), limits.threads, |at| {
            batch.get(at).map_or(Ok(()), |job| job.run(codec, current, parent))
        })?;
        for job in &batch {
            open.add(job, std::mem::take(&mut *job.done.lock().map_err(poisoned)?), emit)?;
        }
        open.flush(emit)?;
    }
    Ok(())
}

/// The bytes of a tensor and of its parent.
#[derive(Clone)]
struct Pair {
    current: Bytes,
    parent: Option<Bytes>,
}

impl Pair {
    fn read(
        current: &dyn TensorSource,
        parent: Option<&dyn TensorSource>,
        index: usize,
        range: Option<&Range<usize>>,
    ) -> Result<Self> {
        let read = |source: &dyn TensorSource| match range {
            Some(range) => source.read_range(index, range.clone()),
            None => source.read(index),
        };
        Ok(Self { current: read(current)?, parent: parent.map(read).transpose()? })
    }

    fn slice(&self, range: &Range<usize>) -> Self {
        let slice = |bytes: &Bytes| bytes.slice(range.clone());
        Self { current: slice(&self.current), parent: self.parent.as_ref().map(slice) }
    }
}

/// One span of a tensor: what one thread encodes and digests while it is in the cache.
struct Job<'a> {
    index: usize,
    meta: &'a TensorMeta,
    range: Range<usize>,
    /// The whole tensor, if it was read.
    read: Option<Pair>,
    done: Mutex<Done>,
}

/// What came of a span.
#[derive(Default)]
struct Done {
    frames: Vec<Vec<u8>>,
    checks: Vec<u32>,
    blocks: Vec<u128>,
    parent_blocks: Option<Vec<u128>>,
    checksum: Option<u32>,
    changed: u64,
}

impl Job<'_> {
    fn run(
        &self,
        codec: &dyn Codec,
        current: &dyn TensorSource,
        parent: Option<&dyn TensorSource>,
    ) -> Result<()> {
        let pair = match &self.read {
            Some(pair) => pair.slice(&self.range),
            None => Pair::read(current, parent, self.index, Some(&self.range))?,
        };
        if pair.current.len() != self.range.len()
            || pair.parent.iter().any(|old| old.len() != self.range.len())
        {
            return Err(Error::invalid(format!(
                "tensor {}: its source gave other than {} bytes",
                shown(self.meta.name()),
                self.range.len()
            )));
        }
        let mut done = Done::default();
        let checked = units(codec.unit(), self.meta) > 1;
        for range in codec.unit().ranges(self.range.len()) {
            let unit = UnitMeta::new(self.meta, self.range.start + range.start..self.range.start + range.end);
            let current = &pair.current[range.clone()];
            let parent = pair.parent.as_ref().map(|parent| &parent[range]);
            let mut frame = Vec::new();
            codec.encode(&unit, parent, current, &mut frame).map_err(|error| {
                error.context(format_args!("tensor `{}`, byte {}", unit.name, unit.offset))
            })?;
            done.changed += match parent.and_then(|_| codec.changed(&unit, &frame)) {
                Some(changed) => changed,
                None => changed(self.meta, parent, current),
            };
            // The buffer grew by doubling; many frames wait to be written.
            frame.shrink_to_fit();
            done.frames.push(frame);
            done.checks.extend(checked.then(|| TensorDigest::of(current).check()));
        }
        done.blocks = block_digests(&pair.current);
        done.parent_blocks = pair.parent.as_deref().map(block_digests);
        if codec.unit() == Unit::Whole {
            done.checksum = codec.checksum(&pair.current);
        }
        *self.done.lock().map_err(poisoned)? = done;
        Ok(())
    }
}

/// The tensor that is being put together from its spans.
#[derive(Default)]
struct Open {
    meta: Option<TensorMeta>,
    frames: Vec<Vec<u8>>,
    checks: Vec<u32>,
    blocks: Vec<u128>,
    parent_blocks: Option<Vec<u128>>,
    changed: u64,
}

impl Open {
    fn add(
        &mut self,
        job: &Job<'_>,
        done: Done,
        emit: &mut dyn FnMut(&TensorMeta, Encoded) -> Result<()>,
    ) -> Result<()> {
        self.meta.get_or_insert_with(|| job.meta.clone());
        self.frames.extend(done.frames);
        self.checks.extend(done.checks);
        self.blocks.extend(done.blocks);
        if let Some(blocks) = done.parent_blocks {
            self.parent_blocks.get_or_insert_default().extend(blocks);
        }
        self.changed += done.changed;
        if job.range.end < job.meta.byte_len() {
            return Ok(());
        }
        let end = std::mem::take(self);
        let whole = Summary {
            digest: TensorDigest::of_blocks(end.blocks),
            parent_digest: end.parent_blocks.map(TensorDigest::of_blocks),
            checksum: done.checksum,
            changed: end.changed,
        };
        emit(job.meta, Encoded { frames: end.frames, checks: end.checks, whole: Some(whole) })
    }

    /// Hands on what there is of a tensor that goes on in the next batch.
    fn flush(&mut self, emit: &mut dyn FnMut(&TensorMeta, Encoded) -> Result<()>) -> Result<()> {
        let (frames, checks) = (std::mem::take(&mut self.frames), std::mem::take(&mut self.checks));
        match &self.meta {
            Some(meta) if !frames.is_empty() => emit(meta, Encoded { frames, checks, whole: None }),
            Some(_) | None => Ok(()),
        }
    }
}

/// The parts of a tensor that one thread works on: whole units and whole blocks of a digest. A unit that neither
/// divides such a block nor is divided by it makes the tensor one part. An empty tensor is one empty part.
fn spans(unit: Unit, byte_len: usize) -> impl ExactSizeIterator<Item = Range<usize>> + Clone {
    let size = match unit {
        Unit::Block(size) if DIGEST_BLOCK.is_multiple_of(size.get()) => DIGEST_BLOCK,
        Unit::Block(size) if size.get().is_multiple_of(DIGEST_BLOCK) => size.get(),
        Unit::Block(_) | Unit::Whole => byte_len.max(1),
    };
    (0..byte_len.div_ceil(size).max(1))
        .map(move |at| at * size..((at + 1).saturating_mul(size)).min(byte_len))
}

/// How many units a tensor has.
fn units(unit: Unit, meta: &TensorMeta) -> usize {
    unit.ranges(meta.byte_len()).len()
}

fn block_digests(data: &[u8]) -> Vec<u128> {
    data.chunks(DIGEST_BLOCK).map(block_digest).collect()
}

/// One tensor to be decoded and checked.
#[derive(Debug)]
#[non_exhaustive]
pub struct Decode<'a> {
    /// Its name, type and shape.
    pub meta: &'a TensorMeta,
    /// What its file says of it.
    pub encoded: &'a EncodedTensor,
    /// The frame of each unit.
    pub frames: &'a [Bytes],
    /// The parent's bytes for a delta, anything for a base.
    pub target: &'a mut [u8],
}

impl<'a> Decode<'a> {
    /// All fields.
    #[must_use]
    pub fn new(
        meta: &'a TensorMeta,
        encoded: &'a EncodedTensor,
        frames: &'a [Bytes],
        target: &'a mut [u8],
    ) -> Self {
        Self { meta, encoded, frames, target }
    }
}

/// Decodes tensors in place, and checks each unit and each tensor while it is in the cache.
///
/// # Errors
/// `Corrupt`, naming the tensor and the byte where the unit begins, if a frame is bad or the result is not what the
/// file says. All targets are then undefined.
pub fn decode_all(
    codec: &dyn Codec,
    mode: Mode,
    tensors: Vec<Decode<'_>>,
    threads: NonZeroUsize,
) -> Result<()> {
    let mut jobs = Vec::new();
    let mut blocks = Vec::new();
    let mut ends = Vec::new();
    for tensor in tensors {
        let Decode { meta, encoded, frames, target } = tensor;
        check_counts(meta, encoded.unit, frames, target)?;
        let mut rest = target;
        let mut first = 0;
        for span in spans(encoded.unit, meta.byte_len()) {
            let (part, behind) = rest.split_at_mut(span.len());
            rest = behind;
            let count = encoded.unit.ranges(span.len()).len();
            jobs.push(Mutex::new((
                meta,
                encoded,
                frames.get(first..first + count).unwrap_or_default(),
                first,
                span,
                part,
            )));
            first += count;
            blocks.push(Mutex::new((Vec::new(), None)));
        }
        ends.push((meta, encoded, jobs.len()));
    }
    run(jobs.len(), threads, |at| {
        let (Some(job), Some(slot)) = (jobs.get(at), blocks.get(at)) else { return Ok(()) };
        let mut job = job.lock().map_err(poisoned)?;
        let (meta, encoded, frames, first, span, part) = &mut *job;
        for ((number, range), frame) in encoded.unit.ranges(part.len()).enumerate().zip(frames.iter()) {
            let unit = UnitMeta::new(meta, span.start + range.start..span.start + range.end);
            let context =
                |error: Error| error.context(format_args!("tensor `{}`, byte {}", unit.name, unit.offset));
            let target = part.get_mut(range).unwrap_or_default();
            codec.decode(&unit, mode, frame, target).map_err(context)?;
            if let Some(&check) = encoded.checks.get(*first + number)
                && TensorDigest::of(target).check() != check
            {
                return Err(context(mismatch("check")));
            }
        }
        let checksum = encoded.checksum.and_then(|_| codec.checksum(part));
        let digests = if encoded.digest.is_some() { block_digests(part) } else { Vec::new() };
        *slot.lock().map_err(poisoned)? = (digests, checksum);
        Ok(())
    })?;
    let mut blocks = blocks.into_iter();
    let mut done = 0;
    for (meta, encoded, end) in ends {
        let (mut digests, mut checksum) = (Vec::new(), None);
        for slot in blocks.by_ref().take(end - done) {
            let (more, sum) = slot.into_inner().map_err(poisoned)?;
            digests.extend(more);
            checksum = sum;
        }
        done = end;
        let wrong = |what: &str| Err(mismatch(what).context(format_args!("tensor `{}`", meta.name())));
        if encoded.checksum.is_some_and(|wanted| checksum != Some(wanted)) {
            return wrong("checksum");
        }
        if encoded.digest.is_some_and(|wanted| TensorDigest::of_blocks(digests) != wanted) {
            return wrong("digest");
        }
    }
    Ok(())
}

fn mismatch(what: &str) -> Error {
    Error::corrupt(format!("the decoded bytes do not match their {what}"))
        .with_help("check that the delta's parent is the right one, then copy the file again")
}

fn check_counts(meta: &TensorMeta, unit: Unit, frames: &[Bytes], target: &[u8]) -> Result<()> {
    let wanted = units(unit, meta);
    if wanted == frames.len() && target.len() == meta.byte_len() {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "tensor `{}`: wanted {wanted} frames for {} bytes, found {} for {}",
        meta.name(),
        meta.byte_len(),
        frames.len(),
        target.len()
    )))
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
    unit: Unit,
    target: &mut [u8],
    threads: NonZeroUsize,
) -> Result<()> {
    check_counts(meta, unit, frames, target)?;
    let ranges = unit.ranges(meta.byte_len());
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
    let wrong = |what: &str| mismatch(what).context(format_args!("tensor `{}`", meta.name()));
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
    use crate::{DType, Weights};

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
                let (left, right) = (left.whole.as_ref().unwrap(), right.whole.as_ref().unwrap());
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
            let digest = encoded.whole.unwrap().digest;
            verify(&XorCodec, &meta, &target, Some(&digest), None).unwrap();
            assert_eq!(weights(1).get(meta.name()).unwrap().1, &target);
            if let Some(byte) = target.first_mut() {
                *byte ^= 1;
                assert!(verify(&XorCodec, &meta, &target, Some(&digest), None).is_err());
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
