//! Encodes a set of tensors, span by span.

use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;

use super::{Limits, poisoned, run, spans};
use crate::digest::BlockHasher;
use crate::id::shown;
use crate::tensor::same_tensors;
use crate::{Codec, Error, Result, TensorDigest, TensorMeta, TensorSource, Unit, UnitMeta};

/// Encoded units of one tensor, one after the other, ready to be written.
#[derive(Debug)]
#[non_exhaustive]
pub struct Encoded {
    /// The frame of each unit.
    pub frames: Vec<Vec<u8>>,
    /// The check of each unit's new bytes.
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
        // A span of one unit has its check from the digests of its blocks.
        let several = codec.unit().ranges(self.range.len()).len() > 1;
        let (mut hasher, mut parent_hasher) = (BlockHasher::default(), BlockHasher::default());
        for range in codec.unit().ranges(self.range.len()) {
            let unit = UnitMeta::new(self.meta, self.range.start + range.start..self.range.start + range.end);
            let mut hashed = range.start;
            let current = &pair.current[range.clone()];
            let parent = pair.parent.as_ref().map(|parent| &parent[range.clone()]);
            let mut frame = Vec::new();
            let mut hash_to = |end: usize| {
                let more = hashed..(range.start + end).clamp(hashed, range.end);
                hashed = more.end;
                hasher.update(&pair.current[more.clone()]);
                if let Some(parent) = &pair.parent {
                    parent_hasher.update(&parent[more]);
                }
            };
            codec.encode_reading(&unit, parent, current, &mut frame, &mut hash_to).map_err(|error| {
                error.context(format_args!("tensor `{}`, byte {}", unit.name, unit.offset))
            })?;
            hash_to(range.len());
            done.changed += match parent.and_then(|_| codec.changed(&unit, &frame)) {
                Some(changed) => changed,
                None => changed(self.meta, parent, current),
            };
            // The buffer grew by doubling; many frames wait to be written.
            frame.shrink_to_fit();
            done.frames.push(frame);
            if several {
                done.checks.push(TensorDigest::of(current).check());
            }
        }
        done.blocks = hasher.finish();
        if done.frames.len() == 1 {
            done.checks.push(TensorDigest::of_blocks(done.blocks.iter().copied()).check());
        }
        done.parent_blocks = pair.parent.as_ref().map(|_| parent_hasher.finish());
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
