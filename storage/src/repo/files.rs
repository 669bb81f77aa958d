//! Weights as files: cut into shards, encoded on a thread that may block, streamed to the store.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use serde_json::json;
use tokio::sync::mpsc::{self, Receiver, Sender};
use towline_core::pipeline::Limits;
use towline_core::safetensors::{Header, layout};
use towline_core::{
    Codec, ContentDigest, DIGEST_BLOCK, Error, FileEntry, Framing, ObjectKey, ObjectWriter, Result,
    SnapshotKind, TensorDigest, TensorEntry, TensorMeta, TensorSource, block_digest,
};

use super::ops::Ops;
use crate::io::{blocking, write};
use crate::shard::{ShardSummary, Tally, write_shard};

/// The file that says which file holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The only file of an adapter's weights, as PEFT calls it.
pub(super) const ADAPTER: &str = "adapter_model.safetensors";
/// What an adapter is put beside, and how: without it nobody can use one.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Pieces of a file that wait for the store.
const QUEUE: usize = 8;
/// The most bytes of a piece: whole blocks, so that a wake-up of the writing thread is worth it.
const PIECE: usize = 2 * DIGEST_BLOCK;
/// The most bytes of a plain tensor that are read at once. Larger ones would gain nothing, and allocators keep
/// what is freed in such sizes.
const PART: usize = 8 * DIGEST_BLOCK;

/// What to write, and how.
pub(super) struct Work {
    pub(super) weights: Arc<dyn TensorSource>,
    pub(super) parent: Option<Arc<dyn TensorSource>>,
    pub(super) codec: Option<Arc<dyn Codec>>,
    pub(super) limits: Limits,
    /// Each file's path, and which tensors it holds, by index.
    pub(super) shards: Vec<(String, Range<usize>)>,
}

/// What was written.
pub(super) struct Written {
    pub(super) files: Vec<FileEntry>,
    pub(super) tensors: Vec<TensorEntry>,
    /// Where each tensor lies, in the order of `tensors`; empty unless the files are plain.
    pub(super) places: Vec<Place>,
    pub(super) raw_bytes: u64,
    pub(super) changed: (u64, u64),
    pub(super) parent: Option<ContentDigest>,
}

/// Where a plain tensor lies.
#[derive(Debug)]
pub(super) struct Place {
    /// The first byte in its file.
    pub(super) start: u64,
    /// The digests of its blocks of 1 MiB.
    pub(super) blocks: Vec<u128>,
}

/// Cuts `tensors` into runs of at most `limit` plain bytes, at least one tensor each, at least one run.
pub(super) fn cut(tensors: &[TensorMeta], limit: u64) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut size = 0;
    for (index, meta) in tensors.iter().enumerate() {
        let length = meta.byte_len() as u64;
        match runs.last_mut() {
            Some(run) if size + length <= limit => run.end = index + 1,
            _ => {
                runs.push(index..index + 1);
                size = 0;
            }
        }
        size += length;
    }
    if runs.is_empty() { vec![Range::default()] } else { runs }
}

/// Cuts as the parent was cut, so that its files and the delta's hold the same tensors; `None` if its files do not
/// hold runs of tensors.
pub(super) fn cut_like(parent: &[TensorEntry]) -> Option<Vec<Range<usize>>> {
    let mut runs: Vec<(usize, Range<usize>)> = Vec::new();
    for (index, entry) in parent.iter().enumerate() {
        match runs.iter_mut().rfind(|(file, _)| *file == entry.file) {
            Some((_, run)) if run.end == index => run.end = index + 1,
            Some(_) => return None,
            None => runs.push((entry.file, index..index + 1)),
        }
    }
    (!runs.is_empty()).then(|| runs.into_iter().map(|(_, run)| run).collect())
}

/// Gives the runs the names that model files have.
pub(super) fn model_names(runs: Vec<Range<usize>>, codec: Option<&dyn Codec>) -> Vec<(String, Range<usize>)> {
    let suffix = match codec.map(Codec::framing) {
        None | Some(Framing::Safetensors) => "safetensors",
        Some(_) => "towline",
    };
    let count = runs.len();
    let name = |number| format!("model-{number:05}-of-{count:05}.{suffix}");
    runs.into_iter().enumerate().map(|(index, run)| (name(index + 1), run)).collect()
}

/// The plain files of weights: an adapter is one file, whatever its size.
pub(super) fn plain_files(
    kind: SnapshotKind,
    tensors: &[TensorMeta],
    limit: u64,
) -> Vec<(String, Range<usize>)> {
    if kind == SnapshotKind::Adapter {
        return vec![(ADAPTER.to_owned(), 0..tensors.len())];
    }
    model_names(cut(tensors, limit), None)
}

/// The content of [`INDEX`].
pub(super) fn index_json<'a>(
    total: u64,
    places: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<Bytes> {
    let map: BTreeMap<_, _> = places.into_iter().collect();
    let json = json!({"metadata": {"total_size": total}, "weight_map": map});
    serde_json::to_vec_pretty(&json).map(Bytes::from).map_err(|error| {
        Error::internal("the index of the model's files could not be written").with_source(error)
    })
}

/// The text map of every plain file, which the ecosystem's readers ask for.
pub(super) fn plain_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

/// Encodes `work` and writes its files below `folder`. At most some pieces of 2 MiB lie between the two.
pub(super) async fn write_files(ops: &Ops, folder: &ObjectKey, work: Work) -> Result<Written> {
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    let encode = tokio::spawn(blocking(move || encode_all(&work, &sender)));
    let written = receive_all(ops, folder, &mut receiver).await;
    // The encoder stops at its next block if the store has failed.
    drop(receiver);
    let encoded = match encode.await {
        Ok(encoded) => encoded,
        Err(error) => Err(Error::internal("the encoder ended early").with_source(error)),
    };
    // If the store failed, the encoder only knows that nobody listens any more.
    let files = written?;
    let (tensors, tally, places) = encoded?;
    Ok(Written {
        files,
        places,
        raw_bytes: tally.raw_bytes,
        changed: (tally.changed, tally.elements),
        parent: tally.parent_digest,
        tensors,
    })
}

enum Event {
    Begin(String),
    /// Whole blocks of the file, at most [`PIECE`]; the last one of a file may be shorter.
    Blocks(Bytes),
    End,
}

async fn receive_all(ops: &Ops, folder: &ObjectKey, events: &mut Receiver<Event>) -> Result<Vec<FileEntry>> {
    let mut files = Vec::new();
    while let Some(event) = events.recv().await {
        let Event::Begin(path) = event else { return Err(out_of_order()) };
        let key = folder.join(&path)?;
        let mut writer = ops.writer(&key).await?;
        // The file's digest is taken here, beside the thread that encodes.
        let (mut bytes, mut digests) = (0, Vec::new());
        loop {
            match events.recv().await {
                Some(Event::Blocks(piece)) => {
                    bytes += piece.len() as u64;
                    digests.extend(piece.chunks(DIGEST_BLOCK).map(block_digest));
                    ops.within(&key, writer.write(piece)).await?;
                }
                Some(Event::End) => {
                    finish_file(ops, &key, writer, bytes).await?;
                    files.push(FileEntry::new(path, bytes, TensorDigest::of_blocks(digests), true));
                    break;
                }
                Some(Event::Begin(_)) => return Err(out_of_order()),
                // The encoder has failed and says why when it is asked.
                None => {
                    ops.within(&key, writer.abort()).await?;
                    return Ok(files);
                }
            }
        }
    }
    Ok(files)
}

/// Makes a written file visible, which nobody else writes under this name.
pub(super) async fn finish_file(
    ops: &Ops,
    key: &ObjectKey,
    writer: Box<dyn ObjectWriter>,
    bytes: u64,
) -> Result<()> {
    let Err(error) = ops.within(key, writer.finish()).await else { return Ok(()) };
    // The answer alone may be lost: what is there is whole.
    match ops.head(key).await.is_ok_and(|found| found.size == bytes) {
        true => Ok(()),
        false => Err(error),
    }
}

type Encoded = (Vec<TensorEntry>, ShardSummary, Vec<Place>);

fn encode_all(work: &Work, events: &Sender<Event>) -> Result<Encoded> {
    let metas = work.weights.tensors();
    let mut places = Vec::new();
    let mut tensors = Vec::with_capacity(metas.len());
    let mut all = Tally::default();
    for (file, (path, run)) in work.shards.iter().enumerate() {
        let current = Part::new(&work.weights, run)?;
        let parent = work.parent.as_ref().map(|parent| Part::new(parent, run)).transpose()?;
        send(events, Event::Begin(path.clone()))?;
        let mut out = Blocks::new(events);
        let summary = match &work.codec {
            Some(codec) => {
                let parent = parent.as_ref().map(|parent| parent as &dyn TensorSource);
                write_shard(&mut out, codec, &current, parent, work.limits)?
            }
            None => write_plain(&mut out, &current, work.limits.window, &mut places)?,
        };
        out.end()?;
        for (meta, digest) in current.tensors().iter().zip(&summary.digests) {
            tensors.push(TensorEntry::new(meta, *digest, file));
        }
        all.absorb(summary);
    }
    let mut summary = all.summary(metas);
    if work.parent.is_some() {
        // A model without tensors has a parent without tensors.
        summary.parent_digest.get_or_insert_with(|| ContentDigest::of_tensors([]));
    }
    Ok((tensors, summary, places))
}

/// One plain safetensors file. Large tensors are read in parts: one is on its way to the store while the next is read,
/// and two are at most as large as `window`.
fn write_plain(
    out: &mut Blocks<'_>,
    source: &dyn TensorSource,
    window: usize,
    places: &mut Vec<Place>,
) -> Result<ShardSummary> {
    let tensors = source.tensors();
    let order = layout(tensors);
    let metas: Vec<_> = order.iter().filter_map(|&index| tensors.get(index).cloned()).collect();
    let header = Header::encode(&metas, &plain_metadata())?;
    write(out, &header)?;
    let part = ((window / 2).min(PART) / DIGEST_BLOCK).max(1) * DIGEST_BLOCK;
    let mut start = header.len() as u64;
    let mut found: Vec<_> = tensors.iter().map(|_| Place { start: 0, blocks: Vec::new() }).collect();
    for (index, meta) in order.into_iter().zip(&metas) {
        let mut blocks = Vec::new();
        for first in (0..meta.byte_len()).step_by(part) {
            let range = first..meta.byte_len().min(first + part);
            let data = if range.len() == meta.byte_len() {
                source.read(index)?
            } else {
                source.read_range(index, range.clone())?
            };
            if data.len() != range.len() {
                return Err(Error::invalid(format!(
                    "tensor `{}`: wanted {} bytes, its source gave {}",
                    meta.name(),
                    range.len(),
                    data.len()
                )));
            }
            blocks.extend(data.chunks(DIGEST_BLOCK).map(block_digest));
            out.push(data)?;
        }
        if let Some(place) = found.get_mut(index) {
            *place = Place { start, blocks };
        }
        start += meta.byte_len() as u64;
    }
    let mut tally = Tally::default();
    for (meta, place) in tensors.iter().zip(&found) {
        tally.add_whole(meta, TensorDigest::of_blocks(place.blocks.iter().copied()));
    }
    places.extend(found);
    Ok(tally.summary(tensors))
}

/// A run of a source's tensors.
struct Part<'a> {
    source: &'a dyn TensorSource,
    tensors: &'a [TensorMeta],
    start: usize,
}

impl<'a> Part<'a> {
    fn new(source: &'a Arc<dyn TensorSource>, run: &Range<usize>) -> Result<Self> {
        let tensors = source.tensors().get(run.clone()).ok_or_else(|| {
            Error::internal(format!("tensors {run:?} of {} were asked for", source.tensors().len()))
        })?;
        Ok(Self { source: &**source, tensors, start: run.start })
    }
}

impl TensorSource for Part<'_> {
    fn tensors(&self) -> &[TensorMeta] {
        self.tensors
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        self.source.read(self.start + index)
    }

    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        self.source.read_range(self.start + index, range)
    }

    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        self.source.digest(self.start + index)
    }
}

/// Cuts what is written into blocks, and sends them on.
struct Blocks<'a> {
    events: &'a Sender<Event>,
    buffer: BytesMut,
}

impl<'a> Blocks<'a> {
    fn new(events: &'a Sender<Event>) -> Self {
        Self { events, buffer: BytesMut::new() }
    }

    /// As `write_all`, but whole blocks are sent on without a copy.
    fn push(&mut self, mut data: Bytes) -> Result<()> {
        if !self.buffer.is_empty() {
            let space = DIGEST_BLOCK - self.buffer.len();
            write(self, &data.split_to(space.min(data.len())))?;
        }
        while data.len() >= DIGEST_BLOCK {
            let whole = data.len().min(PIECE) / DIGEST_BLOCK * DIGEST_BLOCK;
            send(self.events, Event::Blocks(data.split_to(whole)))?;
        }
        write(self, &data)
    }

    fn flush_block(&mut self) -> Result<()> {
        let block = std::mem::replace(&mut self.buffer, BytesMut::with_capacity(DIGEST_BLOCK)).freeze();
        send(self.events, Event::Blocks(block))
    }

    fn end(mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.flush_block()?;
        }
        send(self.events, Event::End)
    }
}

impl io::Write for Blocks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let space = DIGEST_BLOCK - self.buffer.len();
        let (taken, _) = bytes.split_at(bytes.len().min(space));
        self.buffer.extend_from_slice(taken);
        if self.buffer.len() == DIGEST_BLOCK {
            self.flush_block().map_err(io::Error::other)?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn send(events: &Sender<Event>, event: Event) -> Result<()> {
    events.blocking_send(event).map_err(|_| Error::unavailable("the store takes no more of this file"))
}

fn out_of_order() -> Error {
    Error::internal("the encoder's files came out of order")
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_core::DType;

    fn metas(lengths: &[usize]) -> Vec<TensorMeta> {
        let meta = |(index, &length)| TensorMeta::new(format!("t{index}"), DType::U8, [length]).unwrap();
        lengths.iter().enumerate().map(meta).collect()
    }

    #[test]
    fn tensors_are_cut_into_runs() {
        assert_eq!(cut(&metas(&[3, 3, 3, 9, 1]), 6), [0..2, 2..3, 3..4, 4..5]);
        assert!(matches!(cut(&[], 6)[..], [Range { start: 0, end: 0 }]));
        let entry = |meta: TensorMeta, file| TensorEntry::new(&meta, TensorDigest::of(b""), file);
        let entries = |files: [usize; 3]| {
            metas(&[1, 1, 1]).into_iter().zip(files).map(|(meta, file)| entry(meta, file)).collect::<Vec<_>>()
        };
        assert_eq!(cut_like(&entries([0, 0, 1])), Some(vec![0..2, 2..3]));
        assert_eq!(cut_like(&entries([0, 1, 0])), None);
        assert_eq!(cut_like(&[]), None);
    }
}
