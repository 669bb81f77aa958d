//! One encoded file, written and read where it lies on a disk: what command lines need.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;

use bytes::Bytes;
use towline_core::pipeline::{self, Decode, Limits, Summary};
use towline_core::safetensors::{ByteSource, Header};
use towline_core::shard::{ContainerWriter, EncodedTensor, MAGIC, ShardIndex};
use towline_core::{
    Codec, ContentDigest, DType, Error, Framing, Mode, Result, TensorDigest, TensorMeta, TensorSource,
};

use crate::io::write;
use crate::spool::Spool;

/// How much of a payload shows which format it has.
const PAYLOAD_HEAD: u64 = 64;

/// What was written into one encoded file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardSummary {
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes of the tensors when they are plain.
    pub raw_bytes: u64,
    /// Elements that differ from the parent's; without a parent, all.
    pub changed: u64,
    /// Elements in all, counted as `changed` is: sub-byte elements by bytes.
    pub elements: u64,
    /// The digest of each tensor, in the order of the source.
    pub digests: Vec<TensorDigest>,
    /// The digest of each of the parent's tensors; empty without a parent.
    pub parent_digests: Vec<TensorDigest>,
    /// The identity of the parent's tensors; `None` without a parent.
    pub parent_digest: Option<ContentDigest>,
    /// The identity of the tensors.
    pub digest: ContentDigest,
}

/// Encodes `current`, whole or against `parent`, into one file: Towline's container, or the safetensors form for a
/// codec that asks for it. That form is collected in memory up to 32 MiB and in an unlinked temporary file above,
/// because its header comes first.
///
/// # Errors
/// `Unsupported` for a mode that the codec or the form does not have; as [`pipeline::encode`]; what `out` answers.
pub fn write_shard<W: Write>(
    out: &mut W,
    codec: &dyn Codec,
    current: &dyn TensorSource,
    parent: Option<&dyn TensorSource>,
    limits: Limits,
) -> Result<ShardSummary> {
    let mode = if parent.is_some() { Mode::Delta } else { Mode::Base };
    check_mode(codec, mode)?;
    let mut out = Counted { out, bytes: 0 };
    let mut encoded = match codec.framing() {
        Framing::Safetensors => write_safetensors(&mut out, codec, current, parent, limits)?,
        Framing::Container | _ => write_container(&mut out, codec, current, parent, limits)?,
    };
    encoded.bytes = out.bytes;
    Ok(encoded)
}

/// Whether `codec` can write files of `mode`.
pub(crate) fn check_mode(codec: &dyn Codec, mode: Mode) -> Result<()> {
    let (what, help) = match mode {
        Mode::Base => ("a base", "store the base plain, or with a codec that encodes bases"),
        Mode::Delta => ("a delta", "choose a codec that encodes deltas"),
    };
    // The safetensors form has no word for the element types, so that it cannot stand alone.
    if codec.modes().contains(mode) && !(mode == Mode::Base && codec.framing() == Framing::Safetensors) {
        return Ok(());
    }
    Err(Error::unsupported(format!("codec {} cannot write {what}", codec.id())).with_help(help))
}

/// An encoded file, read tensor by tensor.
#[derive(Debug)]
pub struct ShardReader<S: ByteSource> {
    source: S,
    index: ShardIndex,
}

impl<S: ByteSource> ShardReader<S> {
    /// Reads the index of `source`, a container or a file in the safetensors form.
    ///
    /// # Errors
    /// `Corrupt` as [`ShardIndex::read`].
    pub fn open(source: S) -> Result<Self> {
        let index = ShardIndex::read(&source)?;
        Ok(Self { source, index })
    }

    /// What the file says of itself.
    #[must_use]
    pub fn index(&self) -> &ShardIndex {
        &self.index
    }

    /// Decodes the tensor called `name` on at most `threads` threads and checks the result against the file's checks
    /// or checksum. For a delta, `target` holds the parent's bytes; for a base, anything. Answers the result's digest,
    /// if the file has checks: those of all tensors are for [`ShardIndex::check_content`].
    ///
    /// # Errors
    /// `NotFound` for another name; `ChainMismatch` if `target` or `meta` is not as the file says; `Corrupt` if a
    /// frame or the result is wrong. `target` is then undefined.
    pub fn decode_tensor(
        &self,
        codec: &dyn Codec,
        name: &str,
        meta: &TensorMeta,
        target: &mut Vec<u8>,
        threads: NonZeroUsize,
    ) -> Result<Option<TensorDigest>> {
        let tensor = self.index.get(name).ok_or_else(|| {
            Error::not_found(format!("tensor `{name}` is not in the file"))
                .with_help("give the file that was made for these weights")
        })?;
        if self.index.mode == Mode::Base {
            let more = meta.byte_len().saturating_sub(target.len());
            target.try_reserve_exact(more).map_err(|error| {
                Error::unsupported(format!("tensor `{name}`: no memory for {} bytes", meta.byte_len()))
                    .with_source(error)
            })?;
            target.resize(meta.byte_len(), 0);
        }
        check_meta(tensor, meta)?;
        if target.len() != meta.byte_len() {
            return Err(Error::chain_mismatch(format!(
                "tensor `{name}`: wanted {} bytes of the parent, found {}",
                meta.byte_len(),
                target.len()
            ))
            .with_help("give the parent that the delta was made from"));
        }
        let frames = tensor
            .frames
            .iter()
            .map(|range| self.source.read_range(range.clone()))
            .collect::<Result<Vec<_>>>()?;
        decode_checked(codec, meta, self.index.mode, tensor, &frames, target, threads)
    }
}

/// The first bytes, at most 64, of the first payload of a file in the safetensors form, by which the arc formats
/// are told apart; empty for a file without tensors.
///
/// # Errors
/// What the source answers.
pub fn first_payload<S: ByteSource>(reader: &ShardReader<S>) -> Result<Bytes> {
    match reader.index.tensors.iter().flat_map(|tensor| &tensor.frames).next() {
        Some(range) => {
            reader.source.read_range(range.start..range.end.min(range.start.saturating_add(PAYLOAD_HEAD)))
        }
        None => Ok(Bytes::new()),
    }
}

/// Whether a file's word on a tensor fits what the caller knows of it.
pub(crate) fn check_meta(tensor: &EncodedTensor, meta: &TensorMeta) -> Result<()> {
    match &tensor.meta {
        Some(found) if found != meta => Err(Error::chain_mismatch(format!(
            "tensor `{}`: wanted {} {:?}, the file has {} {:?}",
            meta.name(),
            meta.dtype(),
            meta.shape(),
            found.dtype(),
            found.shape()
        ))
        .with_help("give the parent that the delta was made from")),
        Some(_) | None => Ok(()),
    }
}

/// Decodes one tensor and checks it against what its file says. Answers its digest, if that was made.
pub(crate) fn decode_checked(
    codec: &dyn Codec,
    meta: &TensorMeta,
    mode: Mode,
    tensor: &EncodedTensor,
    frames: &[Bytes],
    target: &mut [u8],
    threads: NonZeroUsize,
) -> Result<Option<TensorDigest>> {
    let digests =
        pipeline::decode_all(codec, mode, vec![Decode::new(meta, tensor, frames, target)], threads)?;
    Ok(digests.into_iter().next().flatten())
}

/// Collects what all forms of a file tell of their tensors.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    raw_bytes: u64,
    changed: u64,
    elements: u64,
    digests: Vec<TensorDigest>,
    parent_digests: Vec<TensorDigest>,
}

impl Tally {
    pub(crate) fn add(
        &mut self,
        meta: &TensorMeta,
        digest: TensorDigest,
        parent: Option<TensorDigest>,
        changed: u64,
    ) {
        self.raw_bytes += meta.byte_len() as u64;
        self.changed += changed;
        self.elements += elements(meta);
        self.digests.push(digest);
        self.parent_digests.extend(parent);
    }

    /// A tensor without a parent: all of it is new.
    pub(crate) fn add_whole(&mut self, meta: &TensorMeta, digest: TensorDigest) {
        self.add(meta, digest, None, elements(meta));
    }

    /// The tensors of one more file.
    pub(crate) fn absorb(&mut self, file: ShardSummary) {
        self.raw_bytes += file.raw_bytes;
        self.changed += file.changed;
        self.elements += file.elements;
        self.digests.extend(file.digests);
        self.parent_digests.extend(file.parent_digests);
    }

    /// The summary of a file that holds `tensors`; the bytes are still to be set.
    pub(crate) fn summary(self, tensors: &[TensorMeta]) -> ShardSummary {
        let identity = |digests: &[TensorDigest]| {
            ContentDigest::of_tensors(
                tensors
                    .iter()
                    .zip(digests)
                    .map(|(meta, digest)| (meta.name(), meta.dtype(), meta.shape(), digest)),
            )
        };
        let has_parent = !self.parent_digests.is_empty();
        ShardSummary {
            bytes: 0,
            raw_bytes: self.raw_bytes,
            changed: self.changed,
            elements: self.elements,
            digest: identity(&self.digests),
            parent_digest: has_parent.then(|| identity(&self.parent_digests)),
            digests: self.digests,
            parent_digests: self.parent_digests,
        }
    }
}

/// Elements as [`Encoded::changed`] counts them.
fn elements(meta: &TensorMeta) -> u64 {
    let width = u64::from(meta.dtype().bits() / 8).max(1);
    meta.byte_len() as u64 / width
}

fn write_container<W: Write>(
    out: &mut W,
    codec: &dyn Codec,
    current: &dyn TensorSource,
    parent: Option<&dyn TensorSource>,
    limits: Limits,
) -> Result<ShardSummary> {
    write(out, MAGIC)?;
    let mut tally = Tally::default();
    // The lengths of the frames and the checks of the units of each tensor.
    let mut units: Vec<(Vec<usize>, Vec<u32>)> = Vec::new();
    let mut open = (Vec::new(), Vec::new());
    pipeline::encode(codec, current, parent, limits, &mut |meta, encoded| {
        encoded.frames.iter().try_for_each(|frame| write(out, frame))?;
        open.0.extend(encoded.frames.iter().map(Vec::len));
        open.1.extend(encoded.checks);
        if let Some(whole) = &encoded.whole {
            units.push(std::mem::take(&mut open));
            add(&mut tally, meta, whole);
        }
        Ok(())
    })?;
    let mut summary = tally.summary(current.tensors());
    if parent.is_some() {
        // A file without tensors has a parent without tensors.
        summary.parent_digest.get_or_insert_with(|| ContentDigest::of_tensors([]));
    }
    // The index names the parent, whose digest is known only now.
    let mut index = ContainerWriter::new(&codec.id(), codec.unit(), summary.parent_digest.as_ref());
    for ((meta, digest), (frames, checks)) in current.tensors().iter().zip(&summary.digests).zip(units) {
        index.tensor(meta, digest, &frames, &checks)?;
    }
    write(out, &index.finish())?;
    Ok(summary)
}

fn write_safetensors<W: Write>(
    out: &mut W,
    codec: &dyn Codec,
    current: &dyn TensorSource,
    parent: Option<&dyn TensorSource>,
    limits: Limits,
) -> Result<ShardSummary> {
    let mut spool = Spool::default();
    let mut tally = Tally::default();
    let mut payloads = Vec::new();
    let mut checksums = BTreeMap::new();
    pipeline::encode(codec, current, parent, limits, &mut |meta, mut encoded| {
        let ([payload], Some(whole)) = (encoded.frames.as_mut_slice(), &encoded.whole) else {
            return Err(Error::internal(format!(
                "codec {} made {} frames of tensor `{}`: its form takes one",
                codec.id(),
                encoded.frames.len(),
                meta.name()
            )));
        };
        let checksum = whole.checksum.ok_or_else(|| {
            Error::internal(format!("codec {} gave no checksum, which its form needs", codec.id()))
        })?;
        payloads.push(TensorMeta::new(meta.name(), DType::U8, [payload.len()])?);
        spool.push(std::mem::take(payload))?;
        checksums.insert(meta.name().to_owned(), checksum.to_string());
        add(&mut tally, meta, whole);
        Ok(())
    })?;
    write(out, &Header::encode(&payloads, &checksums)?)?;
    spool.write_to(out)?;
    Ok(tally.summary(current.tensors()))
}

fn add(tally: &mut Tally, meta: &TensorMeta, whole: &Summary) {
    tally.add(meta, whole.digest, whole.parent_digest, whole.changed);
}

struct Counted<'a, W> {
    out: &'a mut W,
    bytes: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_core::testing::XorCodec;
    use towline_core::{ErrorKind, Weights};

    fn weights(seed: u8) -> Weights {
        Weights::new(["a", "b", "c"].into_iter().enumerate().map(|(index, name)| {
            let length = index * 5000;
            let data: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_mul(7) ^ seed).collect();
            (TensorMeta::new(name, DType::BF16, [length / 2]).unwrap(), data.into())
        }))
        .unwrap()
    }

    #[test]
    fn a_container_goes_round() {
        let (old, new) = (weights(3), weights(4));
        for parent in [None, Some(&old as &dyn TensorSource)] {
            let mut file = Vec::new();
            let summary = write_shard(&mut file, &XorCodec, &new, parent, Limits::default()).unwrap();
            assert_eq!(summary.bytes, file.len() as u64);
            assert_eq!(summary.digest, new.content_digest());
            assert_eq!(summary.parent_digest, parent.map(|_| old.content_digest()));
            assert_eq!((summary.raw_bytes, summary.elements, summary.changed), (15000, 7500, 7500));
            let reader = ShardReader::open(Bytes::from(file)).unwrap();
            assert_eq!(first_payload(&reader).unwrap().len(), 64);
            for (meta, data) in new.iter() {
                let mut target = parent.map(|_| old.get(meta.name()).unwrap().1.to_vec()).unwrap_or_default();
                reader.decode_tensor(&XorCodec, meta.name(), meta, &mut target, NonZeroUsize::MIN).unwrap();
                assert_eq!(data, &target);
            }
        }
    }

    #[test]
    fn a_wrong_parent_is_found() {
        let mut file = Vec::new();
        let (old, new) = (weights(3), weights(4));
        write_shard(&mut file, &XorCodec, &new, Some(&old), Limits::default()).unwrap();
        let reader = ShardReader::open(Bytes::from(file)).unwrap();
        let (meta, data) = new.get("b").unwrap();
        let decode = |mut target: Vec<u8>, meta: &TensorMeta| {
            let outcome = reader.decode_tensor(&XorCodec, meta.name(), meta, &mut target, NonZeroUsize::MIN);
            outcome.unwrap_err().kind()
        };
        assert_eq!(decode(data.to_vec(), meta), ErrorKind::Corrupt);
        assert_eq!(decode(data[1..].to_vec(), meta), ErrorKind::ChainMismatch);
        let other = TensorMeta::new("b", DType::F16, meta.shape()).unwrap();
        assert_eq!(decode(data.to_vec(), &other), ErrorKind::ChainMismatch);
        let other = TensorMeta::new("d", DType::F16, meta.shape()).unwrap();
        assert_eq!(decode(data.to_vec(), &other), ErrorKind::NotFound);
    }
}
