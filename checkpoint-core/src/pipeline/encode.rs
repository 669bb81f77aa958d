//! Encodes a set of tensors, span by span.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;

use super::{Limits, spans};
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
/// parts, unless the codec takes tensors whole. Memory: the bytes of the window and of one span, their parents and
/// their frames.
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
    let tensors = current.tensors().iter().enumerate();
    let spans: Vec<Span<'_>> = tensors
        .flat_map(|(index, meta)| spans(unit, meta.byte_len()).map(move |range| Span { index, meta, range }))
        .collect();
    // Looked up once: what another thread finds out meanwhile must not end a digest half-way.
    let known = parent.iter().flat_map(|parent| {
        (0..parent.tensors().len()).map(|index| parent.digest(index).and_then(OnceLock::get).copied())
    });
    let work = Work { codec, current, parent, known: known.collect(), window: limits.window, spans };
    let shared = Shared::default();
    let mut open = Open::default();
    std::thread::scope(|scope| {
        for _ in 1..limits.threads.get().min(work.spans.len()) {
            scope.spawn(|| {
                while let Some(job) = shared.claim(&work, true) {
                    shared.run(&work, job);
                }
            });
        }
        // However this ends, by a panic of `emit` too, the other threads must end.
        let _stop = Stop { shared: &shared, always: true };
        // The caller's thread works too, and hands on what is done, in order, before it takes more.
        loop {
            for (span, done) in shared.take_done(&work)? {
                open.add(&work, span, done, emit)?;
            }
            match shared.claim(&work, false) {
                Some(job) => shared.run(&work, job),
                None if shared.wait(&work) => {}
                None => return Ok(()),
            }
        }
    })
}

/// One span of a tensor: what one thread encodes and digests while it is in the cache.
struct Span<'a> {
    index: usize,
    meta: &'a TensorMeta,
    range: Range<usize>,
}

/// What there is to do.
struct Work<'a> {
    codec: &'a dyn Codec,
    current: &'a dyn TensorSource,
    parent: Option<&'a dyn TensorSource>,
    /// What is known of the digests of the parent's tensors.
    known: Vec<Option<TensorDigest>>,
    window: usize,
    spans: Vec<Span<'a>>,
}

/// A span that a thread has claimed: its place in the list, and its tensor if that was read whole.
type Claimed = (usize, Option<Pair>);

/// What the threads know of each other's work.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The next span that is not claimed.
    next: usize,
    /// The next span that is not handed on.
    first: usize,
    /// What became of the spans from `first` on.
    done: VecDeque<Option<Done>>,
    /// The bytes of the spans between both.
    claimed: usize,
    /// The tensor that was read last.
    whole: Option<(usize, Pair)>,
    failed: Option<Error>,
    stopped: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next span, if there is one and the window has room for it. Or waits for room.
    fn claim(&self, work: &Work<'_>, wait: bool) -> Option<Claimed> {
        let mut state = self.lock();
        loop {
            let span = work.spans.get(state.next).filter(|_| !state.stopped)?;
            let size = state.claimed.saturating_add(span.range.len());
            // What everything waits for does not count: a large tensor would leave the other threads without work.
            let first = work.spans.get(state.first).map_or(0, |first| first.range.len());
            if state.first == state.next || size.saturating_sub(first) <= work.window {
                let read = state.read(work, span).map_err(|error| state.fail(error)).ok();
                let Some(read) = read else {
                    self.changed.notify_all();
                    return None;
                };
                state.claimed = size;
                state.next += 1;
                state.done.push_back(None);
                return Some((state.next - 1, read));
            }
            if !wait {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self, work: &Work<'_>, (at, read): Claimed) {
        // A codec that panics must not leave the other threads waiting; the panic goes on when they have ended.
        let stop = Stop { shared: self, always: false };
        let done = match work.spans.get(at) {
            Some(span) => span.run(work, read),
            None => Err(Error::internal("a span that is not in the list")),
        };
        drop(stop);
        let mut state = self.lock();
        match done {
            Ok(done) => {
                let place = at - state.first;
                if let Some(place) = state.done.get_mut(place) {
                    *place = Some(done);
                }
            }
            Err(error) => state.fail(error),
        }
        self.changed.notify_all();
    }

    /// The spans that are done, as far as all before them are.
    fn take_done<'a>(&self, work: &'a Work<'_>) -> Result<Vec<(&'a Span<'a>, Done)>> {
        let mut state = self.lock();
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        let mut taken = Vec::new();
        while let Some(Some(done)) = state.done.front_mut().map(Option::take) {
            state.done.pop_front();
            let Some(span) = work.spans.get(state.first) else { break };
            state.first += 1;
            state.claimed -= span.range.len();
            taken.push((span, done));
        }
        if !taken.is_empty() {
            self.changed.notify_all();
        }
        Ok(taken)
    }

    /// Waits until the first span is done or something failed; `false` if nothing is left to wait for.
    fn wait(&self, work: &Work<'_>) -> bool {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() || matches!(state.done.front(), Some(Some(_))) {
                return true;
            }
            if state.stopped || state.first == work.spans.len() {
                return false;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Stops all threads when it is dropped: in a panic, or always.
struct Stop<'a> {
    shared: &'a Shared,
    always: bool,
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        if self.always || std::thread::panicking() {
            self.shared.lock().stopped = true;
            self.shared.changed.notify_all();
        }
    }
}

impl State {
    /// The tensor of a span, if it is to be read whole: larger ones are read span by span, each on the thread that
    /// works on it.
    fn read(&mut self, work: &Work<'_>, span: &Span<'_>) -> Result<Option<Pair>> {
        if span.meta.byte_len() > work.window && work.codec.unit() != Unit::Whole {
            return Ok(None);
        }
        if self.whole.as_ref().is_none_or(|(index, _)| *index != span.index) {
            self.whole = None;
            self.whole = Some((span.index, Pair::read(work.current, work.parent, span.index, None)?));
        }
        Ok(self.whole.as_ref().map(|(_, pair)| pair.clone()))
    }

    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
        self.stopped = true;
    }
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

impl Span<'_> {
    /// Encodes the span; `whole` is the tensor, if it was read.
    fn run(&self, work: &Work<'_>, whole: Option<Pair>) -> Result<Done> {
        let Work { codec, current, parent, .. } = *work;
        let pair = match whole {
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
        let known = work.known.get(self.index).is_some_and(Option::is_some);
        let (mut hasher, mut parent_hasher) = (BlockHasher::default(), BlockHasher::default());
        for range in codec.unit().ranges(self.range.len()) {
            let unit = UnitMeta::new(self.meta, self.range.start + range.start..self.range.start + range.end);
            let mut hashed = range.start;
            let current = &pair.current[range.clone()];
            let parent = pair.parent.as_ref().map(|parent| &parent[range.clone()]);
            let mut frame = Vec::new();
            let mut counted = 0;
            let mut hash_to = |end: usize, digest: Option<u128>| {
                // Elements stay whole.
                let end = if end < range.len() { end & !7 } else { end };
                let more = hashed..(range.start + end).clamp(hashed, range.end);
                hashed = more.end;
                let (current, parent) =
                    (&pair.current[more.clone()], pair.parent.as_ref().map(|parent| &parent[more.clone()]));
                hasher.update_known(current, digest, more.end == self.range.len());
                if let (Some(parent), false) = (parent, known) {
                    parent_hasher.update(parent);
                }
                // Codecs of whole tensors do not count, and the tensor may be too large to count it from the cache later.
                if codec.unit() == Unit::Whole {
                    counted += changed(self.meta, parent, current);
                    done.checksum = codec.checksum(done.checksum, current);
                }
            };
            codec.encode_reading(&unit, parent, current, &mut frame, &mut hash_to).map_err(|error| {
                error.context(format_args!("tensor `{}`, byte {}", unit.name, unit.offset))
            })?;
            hash_to(range.len(), None);
            done.changed += match parent.and_then(|_| codec.changed(&unit, &frame)) {
                Some(changed) => changed,
                None if codec.unit() == Unit::Whole => counted,
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
        Ok(done)
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
        work: &Work<'_>,
        span: &Span<'_>,
        done: Done,
        emit: &mut dyn FnMut(&TensorMeta, Encoded) -> Result<()>,
    ) -> Result<()> {
        self.meta.get_or_insert_with(|| span.meta.clone());
        self.frames.extend(done.frames);
        self.checks.extend(done.checks);
        self.blocks.extend(done.blocks);
        if let Some(blocks) = done.parent_blocks {
            self.parent_blocks.get_or_insert_default().extend(blocks);
        }
        self.changed += done.changed;
        if span.range.end < span.meta.byte_len() {
            // Tensors above the window are handed on as they come.
            return if span.meta.byte_len() > work.window { self.flush(emit) } else { Ok(()) };
        }
        let end = std::mem::take(self);
        let digest = TensorDigest::of_blocks(end.blocks);
        keep(work.current, span, digest)?;
        let known = work.known.get(span.index).copied().flatten();
        let parent_digest = known.or_else(|| end.parent_blocks.map(TensorDigest::of_blocks));
        if let (Some(parent), Some(digest)) = (work.parent, parent_digest) {
            keep(parent, span, digest)?;
        }
        let whole = Summary { digest, parent_digest, checksum: done.checksum, changed: end.changed };
        emit(span.meta, Encoded { frames: end.frames, checks: end.checks, whole: Some(whole) })
    }

    /// Hands on what there is of a tensor that goes on.
    fn flush(&mut self, emit: &mut dyn FnMut(&TensorMeta, Encoded) -> Result<()>) -> Result<()> {
        let (frames, checks) = (std::mem::take(&mut self.frames), std::mem::take(&mut self.checks));
        match &self.meta {
            Some(meta) if !frames.is_empty() => emit(meta, Encoded { frames, checks, whole: None }),
            Some(_) | None => Ok(()),
        }
    }
}

/// Keeps a digest with its tensor.
fn keep(source: &dyn TensorSource, span: &Span<'_>, digest: TensorDigest) -> Result<()> {
    match source.digest(span.index).map(|kept| *kept.get_or_init(|| digest)) {
        Some(kept) if kept != digest => {
            Err(Error::invalid(format!("the bytes of tensor {} changed", shown(span.meta.name())))
                .with_help("hand over weights that stay as they are, and new ones for each step"))
        }
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
    // Sums of 16 bits: the compiler then compares 16 bytes at once.
    let parts = left.chunks(1024).zip(right.chunks(1024));
    parts
        .map(|(left, right)| {
            let differ = left.iter().zip(right).map(|(left, right)| u16::from(left != right));
            usize::from(differ.sum::<u16>())
        })
        .sum()
}
