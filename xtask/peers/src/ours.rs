//! Towline's codecs as users run them: a whole file with names, index and digests, and tensors decoded in place and
//! checked.

use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::Range;

use bytes::Bytes;
use towline_core::pipeline::{self, Decode, Limits};
use towline_core::shard::ShardIndex;
use towline_core::{
    Codec, Error, FileEntry, JobId, Manifest, ManifestHead, Mode, ParentRef, Result, SessionId, SnapshotKind,
    SnapshotName, TensorDigest, TensorEntry, TensorMeta, TensorSource, WriteId,
};
use towline_storage::{ShardSummary, write_shard};

use crate::files::Pair;

/// Encodes a whole checkpoint into one file.
pub(crate) fn encode_all(
    out: &mut impl Write,
    codec: &dyn Codec,
    current: &dyn TensorSource,
    parent: Option<&dyn TensorSource>,
    threads: usize,
) -> Result<ShardSummary> {
    write_shard(out, codec, current, parent, Limits::threads(threads))
}

/// Encodes a pair into one file.
pub(crate) fn encode_pair(
    out: &mut impl Write,
    codec: &dyn Codec,
    pair: &Pair,
    threads: usize,
) -> Result<ShardSummary> {
    encode_all(
        out,
        codec,
        &pair.current,
        pair.parent.as_ref().map(|parent| parent as &dyn TensorSource),
        threads,
    )
}

/// Decodes a whole file over `targets`, which hold the parent's tensors for a delta, and checks every digest. Reading the
/// file's index is part of it.
pub(crate) fn decode_all(
    file: &Bytes,
    codec: &dyn Codec,
    metas: &[TensorMeta],
    targets: &mut [Vec<u8>],
    threads: usize,
) -> Result<()> {
    let index = ShardIndex::read(file)?;
    let mut found = Vec::with_capacity(metas.len());
    for meta in metas {
        let lost = || Error::not_found(format!("tensor `{}` is not in the file", meta.name()));
        let tensor = index.get(meta.name()).ok_or_else(lost)?;
        let frames = tensor.frames.iter().map(|range| slice(file, range)).collect::<Option<Vec<_>>>();
        found.push((tensor, frames.ok_or_else(lost)?));
    }
    let tensors = metas.iter().zip(&found).zip(targets);
    let tensors = tensors.map(|((meta, (tensor, frames)), target)| Decode::new(meta, tensor, frames, target));
    let threads = NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN);
    let digests = pipeline::decode_all(codec, index.mode, tensors.collect(), threads)?;
    index.check_content(&digests.into_iter().flatten().collect::<Vec<_>>())
}

fn slice(file: &Bytes, range: &Range<u64>) -> Option<Bytes> {
    let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
    (start <= end && end <= file.len()).then(|| file.slice(start..end))
}

/// The length of the manifest that a repository would store beside the file.
pub(crate) fn manifest_bytes(
    codec: &dyn Codec,
    metas: &[TensorMeta],
    summary: &ShardSummary,
    mode: Mode,
) -> Result<u64> {
    let head = ManifestHead {
        kind: if mode == Mode::Base { SnapshotKind::Base } else { SnapshotKind::Delta },
        name: SnapshotName::new("step-00002")?,
        job: JobId::new("bench")?,
        session: SessionId::new("00000000")?,
        seq: 2,
        epoch: 1,
        write_id: WriteId::new("0000000000000000")?,
        created_ms: 1_700_000_000_000,
    };
    let files =
        vec![FileEntry::new("weights-00001-of-00001.towline", summary.bytes, TensorDigest::of(&[]), true)];
    let tensors = metas.iter().zip(&summary.digests).map(|(meta, digest)| TensorEntry::new(meta, *digest, 0));
    let mut manifest = Manifest::new(head, files, tensors.collect());
    manifest.codec = Some(codec.id());
    manifest.changed = Some((summary.changed, summary.elements));
    if mode == Mode::Delta {
        manifest.parent = Some(ParentRef::new(1, manifest.id()));
    }
    Ok(manifest.to_bytes()?.0.len() as u64)
}

#[cfg(test)]
mod tests {
    use towline_core::DType;

    use super::*;
    use crate::testing::{base, pair};

    #[test]
    fn files_of_every_codec_come_back_in_place() {
        for subject in [pair(DType::BF16, 0.05), base(DType::F32)] {
            for codec in towline_codec::all() {
                let mut file = Vec::new();
                if encode_pair(&mut file, codec.as_ref(), &subject, 2).is_err() {
                    // A codec of deltas alone, asked for a base.
                    assert!(subject.parent.is_none(), "{}", codec.id());
                    continue;
                }
                let file = Bytes::from(file);
                for threads in [1, 2] {
                    let mut targets: Vec<Vec<u8>> = subject
                        .all()
                        .unwrap()
                        .into_iter()
                        .map(|(old, new)| old.map_or(vec![3; new.len()], |old| old.to_vec()))
                        .collect();
                    decode_all(&file, codec.as_ref(), subject.metas(), &mut targets, threads).unwrap();
                    let same =
                        targets.iter().zip(subject.current.iter()).all(|(target, (_, new))| target == new);
                    assert!(same, "{}", codec.id());
                }
            }
        }
    }

    #[test]
    fn a_manifest_has_a_length() {
        let subject = pair(DType::BF16, 0.05);
        let codec = towline_codec::by_id("zstd").unwrap();
        let summary = encode_pair(&mut std::io::sink(), codec.as_ref(), &subject, 1).unwrap();
        let bytes = manifest_bytes(codec.as_ref(), subject.metas(), &summary, Mode::Delta).unwrap();
        assert!((1_000..4_000).contains(&bytes), "{bytes}");
    }
}
