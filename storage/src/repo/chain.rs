//! A snapshot and what it rests on, opened for reading tensor by tensor.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use towline_core::safetensors::{Header, MAX_HEADER};
use towline_core::shard::{EncodedTensor, FOOTER_LEN, MAGIC, ShardIndex, index_range};
use towline_core::{
    Codec, ContentDigest, Error, FileEntry, Manifest, Mode, ObjectKey, Result, SnapshotKind, TensorDigest,
    TensorEntry, TensorMeta,
};

use super::info::SnapshotInfo;
use super::ops::Ops;
use super::{SnapshotRepo, lost};
use crate::io::blocking;
use crate::shard::{check_meta, decode_checked};

/// Deltas that may lie on one base.
pub(super) const MAX_DEPTH: u32 = 1024;

/// One snapshot of a chain.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) info: SnapshotInfo,
    pub(super) manifest: Manifest,
    pub(super) metas: Vec<TensorMeta>,
    codec: Option<Arc<dyn Codec>>,
    /// The index of every file of the manifest that holds tensors.
    files: Vec<Option<(ObjectKey, FileIndex)>>,
}

#[derive(Debug)]
enum FileIndex {
    Plain(Header),
    Encoded(ShardIndex),
}

impl SnapshotRepo {
    /// Opens `info` and everything that it rests on, the base first.
    pub(super) async fn open_chain(&self, info: &SnapshotInfo) -> Result<Vec<Link>> {
        let mut links = vec![self.open_link(info).await?];
        let mut head = None;
        while let Some(link) = links.last()
            && let Some(parent) = &link.manifest.parent
        {
            if links.len() > MAX_DEPTH as usize {
                return Err(Error::corrupt(format!("{} rests on more than {MAX_DEPTH} deltas", info.id)));
            }
            let head = match &head {
                Some(head) => head,
                None => head.insert(self.head().await?),
            };
            // Who has found a delta before it was given up finds its parent too. Numbers fall along the chain, so that it
            // ends.
            let found = head.stored(parent.seq, &parent.id).filter(|found| found.seq < link.info.seq);
            let found = found.ok_or_else(|| {
                Error::not_found(format!(
                    "{} is a delta on {} with number {}, which job {} does not have",
                    link.info.id, parent.id, parent.seq, self.job
                ))
                .with_help("restore another snapshot: this one needs its parent")
            })?;
            let next = self.open_link(found).await?;
            if next.metas != link.metas {
                return Err(Error::corrupt(format!(
                    "{} and its parent {} do not have the same tensors",
                    link.info.id, next.info.id
                )));
            }
            links.push(next);
        }
        links.reverse();
        Ok(links)
    }

    /// Opens one snapshot: its manifest, and the indexes of its files, which must agree.
    pub(super) async fn open_link(&self, info: &SnapshotInfo) -> Result<Link> {
        let manifest = self.manifest(info).await?;
        let codec = manifest.codec.as_ref().map(|id| self.codec(id)).transpose()?;
        let mut files = Vec::with_capacity(manifest.files.len());
        let mut found = 0;
        for entry in &manifest.files {
            if !entry.weights {
                files.push(None);
                continue;
            }
            let key = self.file_key(info, entry)?;
            let index = match &codec {
                None => read_header(&self.ops, &key, entry).await.map(FileIndex::Plain),
                Some(_) => read_index(&self.ops, &key, entry).await.map(FileIndex::Encoded),
            };
            let index = index.map_err(|error| lost(error.context(&entry.path), info))?;
            found += match &index {
                FileIndex::Plain(header) => header.entries.len(),
                FileIndex::Encoded(index) => index.tensors.len(),
            };
            files.push(Some((key, index)));
        }
        let metas = manifest.tensor_metas()?;
        let link = Link { info: info.clone(), manifest, metas, codec, files };
        if found != link.metas.len() {
            return Err(Error::corrupt(format!(
                "{}: the manifest lists {} tensors, the files hold {found}",
                info.id,
                link.metas.len()
            )));
        }
        link.check()?;
        Ok(link)
    }
}

/// Tensors that follow one another in a file.
#[derive(Debug)]
pub(super) struct Run {
    file: usize,
    range: Range<u64>,
    tensors: Vec<usize>,
}

impl Link {
    /// Whether every tensor of the manifest is where it should be.
    fn check(&self) -> Result<()> {
        let mode = if self.info.kind == SnapshotKind::Delta { Mode::Delta } else { Mode::Base };
        let damaged = |error: Error| Error::corrupt(format!("{}: {}", self.info.id, error.message()));
        for (number, file) in self.files.iter().enumerate() {
            let Some((_, FileIndex::Encoded(index))) = file else { continue };
            if index.mode != mode || index.codec.is_some() && index.codec != self.manifest.codec {
                return Err(Error::corrupt(format!(
                    "{}: the manifest says {mode:?} in {:?}, a file says {:?} in {:?}",
                    self.info.id, self.manifest.codec, index.mode, index.codec
                )));
            }
            let tensors = self.manifest.tensors.iter().filter(|entry| entry.file == number);
            let content = ContentDigest::of_tensors(
                tensors
                    .map(|entry| (entry.name.as_str(), entry.dtype, entry.shape.as_slice(), &entry.digest)),
            );
            if index.content.is_some_and(|found| found != content) {
                return Err(Error::corrupt(format!(
                    "{}: file {number} holds other weights than the manifest says",
                    self.info.id
                ))
                .with_help("restore another snapshot"));
            }
        }
        for (entry, meta) in self.manifest.tensors.iter().zip(&self.metas) {
            match self.file(entry)? {
                (_, FileIndex::Plain(header)) => {
                    if header.get(&entry.name).is_none_or(|found| found.meta != *meta) {
                        return Err(self.misplaced(entry));
                    }
                }
                (_, FileIndex::Encoded(index)) => {
                    let tensor = index.get(&entry.name).ok_or_else(|| self.misplaced(entry))?;
                    check_meta(tensor, meta).map_err(damaged)?;
                }
            }
        }
        Ok(())
    }

    /// Makes tensor `number` of this snapshot from `parent`'s bytes, which a base ignores, and checks the result.
    pub(super) async fn step(
        &self,
        ops: &Ops,
        number: usize,
        parent: BytesMut,
        threads: NonZeroUsize,
    ) -> Result<BytesMut> {
        let (Some(entry), Some(meta)) = (self.manifest.tensors.get(number), self.metas.get(number)) else {
            return Err(Error::internal(format!("tensor {number} of {} was asked for", self.metas.len())));
        };
        let context = |error: Error| lost(error, &self.info);
        match self.file(entry)? {
            (key, FileIndex::Plain(header)) => {
                let place = header.get(&entry.name).ok_or_else(|| self.misplaced(entry))?;
                // The header tiles a file whose length was checked, so that this is no more than is stored.
                let target = BytesMut::zeroed(meta.byte_len());
                let data = ops.read_into(key, place.range.start, target).await.map_err(context)?;
                checked(data, entry.digest, meta).await.map_err(context)
            }
            (key, FileIndex::Encoded(index)) => {
                let tensor = index.get(&entry.name).ok_or_else(|| self.misplaced(entry))?;
                let target = match index.mode {
                    Mode::Delta => parent,
                    Mode::Base => zeroed(meta)?,
                };
                let frames = read_frames(ops, key, tensor).await.map_err(context)?;
                let Some(codec) = self.codec.clone() else {
                    return Err(Error::internal("an encoded file was opened without a codec"));
                };
                let (meta, tensor, mode, digest) = (meta.clone(), tensor.clone(), index.mode, entry.digest);
                let decoded = blocking(move || {
                    let mut target = target;
                    let found = decode_checked(&codec, &meta, mode, &tensor, &frames, &mut target, threads)?;
                    same(found.unwrap_or_else(|| TensorDigest::of(&target)), digest, &meta)?;
                    Ok(target)
                });
                decoded.await.map_err(context)
            }
        }
    }

    /// Runs of tensors that follow one another in a plain file, of at most `limit` bytes or one tensor; `None` if some
    /// file is not plain.
    pub(super) fn plain_runs(&self, limit: usize) -> Option<Vec<Run>> {
        let mut places = Vec::with_capacity(self.metas.len());
        for (number, entry) in self.manifest.tensors.iter().enumerate() {
            let Ok((_, FileIndex::Plain(header))) = self.file(entry) else { return None };
            places.push((entry.file, header.get(&entry.name)?.range.clone(), number));
        }
        places.sort_by_key(|(file, range, number)| (*file, range.start, *number));
        let mut runs: Vec<Run> = Vec::new();
        for (file, range, number) in places {
            match runs.last_mut() {
                Some(run)
                    if run.file == file
                        && run.range.end == range.start
                        && range.end - run.range.start <= limit as u64 =>
                {
                    run.range.end = range.end;
                    run.tensors.push(number);
                }
                _ => runs.push(Run { file, range, tensors: vec![number] }),
            }
        }
        Some(runs)
    }

    /// The tensors of a run, checked, each with its number.
    pub(super) async fn read_run(&self, ops: &Ops, run: Run) -> Result<Vec<(usize, Bytes)>> {
        let context = |error: Error| lost(error, &self.info);
        let Run { file, range, tensors } = run;
        let Some(Some((key, _))) = self.files.get(file) else {
            return Err(Error::internal(format!("file {file} was asked for")));
        };
        let mut wanted = Vec::with_capacity(tensors.len());
        for number in tensors {
            let (Some(entry), Some(meta)) = (self.manifest.tensors.get(number), self.metas.get(number))
            else {
                return Err(Error::internal(format!(
                    "tensor {number} of {} was asked for",
                    self.metas.len()
                )));
            };
            wanted.push((number, entry.digest, meta.clone()));
        }
        // The header tiles a file whose length was checked, so that this is no more than is stored.
        let length = wanted.iter().map(|(.., meta)| meta.byte_len()).sum();
        let data = ops.read_into(key, range.start, BytesMut::zeroed(length)).await.map_err(context)?;
        let mut data = data.freeze();
        let check = move || {
            wanted
                .into_iter()
                .map(|(number, digest, meta)| {
                    let data = data.split_to(meta.byte_len());
                    same(TensorDigest::of(&data), digest, &meta).map(|()| (number, data))
                })
                .collect()
        };
        // A thread costs more than the digest of a small run.
        if length <= towline_core::DIGEST_BLOCK { check() } else { blocking(check).await }.map_err(context)
    }

    fn file(&self, entry: &TensorEntry) -> Result<(&ObjectKey, &FileIndex)> {
        match self.files.get(entry.file) {
            Some(Some((key, index))) => Ok((key, index)),
            _ => Err(self.misplaced(entry)),
        }
    }

    fn misplaced(&self, entry: &TensorEntry) -> Error {
        Error::corrupt(format!(
            "{}: tensor `{}` is not in its file as the manifest says",
            self.info.id, entry.name
        ))
        .with_help("restore another snapshot")
    }
}

/// The size in the store must be the manifest's before any length within the file is believed.
async fn check_size(ops: &Ops, key: &ObjectKey, entry: &FileEntry) -> Result<()> {
    let size = ops.head(key).await?.size;
    if size == entry.bytes {
        return Ok(());
    }
    Err(Error::corrupt(format!("wanted {} bytes, found {size}", entry.bytes)))
}

async fn read_header(ops: &Ops, key: &ObjectKey, entry: &FileEntry) -> Result<Header> {
    check_size(ops, key, entry).await?;
    let start = exact(ops, key, 0..8.min(entry.bytes)).await?;
    let length = start.as_ref().try_into().map(u64::from_le_bytes);
    let length =
        length.ok().filter(|&length| length <= MAX_HEADER && length <= entry.bytes.saturating_sub(8));
    let length = length.ok_or_else(|| Error::corrupt("it does not begin as a safetensors file does"))?;
    Header::parse(&exact(ops, key, 8..8 + length).await?, entry.bytes)
}

async fn read_index(ops: &Ops, key: &ObjectKey, entry: &FileEntry) -> Result<ShardIndex> {
    let start = ops.get(key, Some(0..8)).await?;
    if start.as_ref() != MAGIC {
        return ShardIndex::from_safetensors(read_header(ops, key, entry).await?);
    }
    check_size(ops, key, entry).await?;
    let footer = exact(ops, key, entry.bytes.saturating_sub(FOOTER_LEN as u64)..entry.bytes).await?;
    let range = index_range(&footer, entry.bytes)?;
    let index = exact(ops, key, range).await?;
    ShardIndex::parse_container(&index, &footer, entry.bytes)
}

/// The frames of a tensor: they follow one another, so that one read brings them all.
async fn read_frames(ops: &Ops, key: &ObjectKey, tensor: &EncodedTensor) -> Result<Vec<Bytes>> {
    let (Some(first), Some(last)) = (tensor.frames.first(), tensor.frames.last()) else {
        return Ok(Vec::new());
    };
    let bytes = exact(ops, key, first.start..last.end).await?;
    let cut = |range: &Range<u64>| {
        let start = usize::try_from(range.start.checked_sub(first.start)?).ok()?;
        let end = usize::try_from(range.end.checked_sub(first.start)?).ok()?;
        (start <= end && end <= bytes.len()).then(|| bytes.slice(start..end))
    };
    tensor.frames.iter().map(cut).collect::<Option<_>>().ok_or_else(|| {
        Error::corrupt(format!("the frames of tensor `{}` do not follow one another", tensor.name))
    })
}

/// A range that must be there whole.
async fn exact(ops: &Ops, key: &ObjectKey, range: Range<u64>) -> Result<Bytes> {
    let wanted = range.end.saturating_sub(range.start);
    let bytes = ops.get(key, Some(range.clone())).await?;
    if bytes.len() as u64 == wanted {
        return Ok(bytes);
    }
    Err(Error::corrupt(format!("wanted bytes {range:?}, found {} of them", bytes.len())))
}

async fn checked(data: BytesMut, digest: TensorDigest, meta: &TensorMeta) -> Result<BytesMut> {
    // A thread costs more than the digest of a small tensor.
    if data.len() <= towline_core::DIGEST_BLOCK {
        return same(TensorDigest::of(&data), digest, meta).map(|()| data);
    }
    let meta = meta.clone();
    blocking(move || same(TensorDigest::of(&data), digest, &meta).map(|()| data)).await
}

fn same(found: TensorDigest, wanted: TensorDigest, meta: &TensorMeta) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::corrupt(format!("tensor `{}` does not match its digest", meta.name()))
        .with_help("restore another snapshot, or copy the file again"))
}

/// Room for a decoded tensor. Its length is the manifest's word alone, so that failing to get it is no crash.
fn zeroed(meta: &TensorMeta) -> Result<BytesMut> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(meta.byte_len()).map_err(|error| {
        Error::unsupported(format!("tensor `{}`: no memory for {} bytes", meta.name(), meta.byte_len()))
            .with_source(error)
    })?;
    buffer.resize(meta.byte_len(), 0);
    Ok(BytesMut::from(Bytes::from(buffer)))
}
