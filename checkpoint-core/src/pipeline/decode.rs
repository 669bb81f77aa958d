//! Decodes tensors in place and checks them.

use std::num::NonZeroUsize;
use std::sync::Mutex;

use bytes::Bytes;

use super::{poisoned, run, spans, units};
use crate::digest::BlockHasher;
use crate::shard::EncodedTensor;
use crate::{Codec, Error, Mode, Result, TensorDigest, TensorMeta, Unit, UnitMeta};

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

/// Decodes tensors in place, and checks each unit while it is in the cache. Answers the digest of each tensor as it was
/// decoded, for the caller to compare with a manifest or [`ShardIndex::check_content`](crate::shard::ShardIndex); `None`
/// where the file has the codec's checksum instead, which is checked here.
///
/// # Errors
/// `Corrupt`, naming the tensor and the byte where the unit begins, if a frame is bad or the result is not what the
/// file says. All targets are then undefined.
pub fn decode_all(
    codec: &dyn Codec,
    mode: Mode,
    tensors: Vec<Decode<'_>>,
    threads: NonZeroUsize,
) -> Result<Vec<Option<TensorDigest>>> {
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
        let mut hasher = BlockHasher::default();
        let mut checksum = None;
        for ((number, range), frame) in encoded.unit.ranges(part.len()).enumerate().zip(frames.iter()) {
            let unit = UnitMeta::new(meta, span.start + range.start..span.start + range.end);
            let context =
                |error: Error| error.context(format_args!("tensor `{}`, byte {}", unit.name, unit.offset));
            let length = part.len();
            let target = part.get_mut(range.clone()).unwrap_or_default();
            let mut check = |end: usize, bytes: &[u8], digest: Option<u128>| {
                if encoded.checksum.is_some() {
                    checksum = codec.checksum(checksum, bytes);
                } else {
                    hasher.update_known(bytes, digest, end == length);
                }
            };
            let mut checked = 0;
            let mut written = |bytes: &[u8], digest: Option<u128>| {
                checked += bytes.len();
                check(range.start + checked, bytes, digest);
            };
            codec.decode_writing(&unit, mode, frame, target, &mut written).map_err(context)?;
            check(range.end, target.get(checked..).unwrap_or_default(), None);
            // A span of one unit is checked by the digests of its blocks, below.
            if frames.len() > 1
                && let Some(&check) = encoded.checks.get(*first + number)
                && TensorDigest::of(target).check() != check
            {
                return Err(context(mismatch("check")));
            }
        }
        let digests = hasher.finish();
        if frames.len() == 1
            && let Some(&check) = encoded.checks.get(*first)
            && TensorDigest::of_blocks(digests.iter().copied()).check() != check
        {
            let place = format_args!("tensor `{}`, byte {}", meta.name(), span.start);
            return Err(mismatch("check").context(place));
        }
        *slot.lock().map_err(poisoned)? = (digests, checksum);
        Ok(())
    })?;
    let mut blocks = blocks.into_iter();
    let mut done = 0;
    let mut answer = Vec::with_capacity(ends.len());
    for (meta, encoded, end) in ends {
        let (mut digests, mut checksum) = (Vec::new(), None);
        for slot in blocks.by_ref().take(end - done) {
            let (more, sum) = slot.into_inner().map_err(poisoned)?;
            digests.extend(more);
            checksum = sum;
        }
        done = end;
        if encoded.checksum.is_some_and(|wanted| checksum != Some(wanted)) {
            return Err(mismatch("checksum").context(format_args!("tensor `{}`", meta.name())));
        }
        answer.push(encoded.checksum.is_none().then(|| TensorDigest::of_blocks(digests)));
    }
    Ok(answer)
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
        && codec.checksum(None, data) != Some(checksum)
    {
        return Err(wrong("checksum"));
    }
    match digest {
        Some(digest) if TensorDigest::of(data) != *digest => Err(wrong("digest")),
        Some(_) | None => Ok(()),
    }
}
