//! Boxes of a train state's tensors, read by whoever needs them, however many ranks have written it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _};
use towline_core::{
    DIGEST_BLOCK, Error, Manifest, ObjectKey, Result, TensorDigest, TensorMeta, Weights, block_digest,
};

use super::boxes::Region;
use super::info::SnapshotInfo;
use super::ranks::StoredBox;
use super::{SnapshotRepo, lost};
use crate::io::blocking;

/// The longest read, in blocks.
const READ_BLOCKS: usize = 16;
/// Reads on their way at once. Memory beside the caller's: these, where a box is not in one piece.
const READS_AT_ONCE: usize = 4;
/// Tensors in work at once when all are read.
const TENSORS_AT_ONCE: usize = 8;

/// A train state, opened to read boxes of its tensors. Every byte that leaves it was checked.
#[derive(Debug)]
pub struct StateReader {
    repo: SnapshotRepo,
    info: SnapshotInfo,
    manifest: Manifest,
    tensors: BTreeMap<String, Parts>,
}

/// The boxes that a tensor was saved in.
#[derive(Debug)]
struct Parts {
    meta: TensorMeta,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    region: Region,
    key: ObjectKey,
    stored: StoredBox,
    length: usize,
    blocks: Option<Arc<[u128]>>,
}

impl SnapshotRepo {
    /// Opens a train state to read boxes of its tensors: the manifest, and the index of each rank.
    ///
    /// # Errors
    /// `Invalid` if `info` is a snapshot for samplers; `NotFound` if something of it is gone; `Corrupt` for damage.
    pub async fn open_state(&self, info: &SnapshotInfo) -> Result<StateReader> {
        let manifest = self.manifest(info).await?;
        let mut tensors: BTreeMap<String, Parts> = BTreeMap::new();
        for index in self.rank_indexes(info, &manifest).await? {
            for stored in index.boxes {
                let file = index.files.get(stored.file);
                let file = file.ok_or_else(|| Error::internal("a box in a file that is not listed"))?;
                let meta = TensorMeta::new(&stored.name, stored.dtype, stored.global.clone())?;
                let part = Part {
                    region: stored.region(),
                    key: self.file_key(info, file)?,
                    length: stored.byte_len()?,
                    blocks: stored.blocks()?.map(Arc::from),
                    stored,
                };
                let parts =
                    tensors.entry(meta.name().to_owned()).or_insert(Parts { meta, parts: Vec::new() });
                parts.parts.push(part);
            }
        }
        Ok(StateReader { repo: self.clone(), info: info.clone(), manifest, tensors })
    }
}

impl StateReader {
    /// What the state is; its sections are in there.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Every tensor, whole, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorMeta> {
        self.tensors.values().map(|parts| &parts.meta)
    }

    /// The box of `shape` from `offset`, in elements along each dimension, of tensor `name`.
    ///
    /// # Errors
    /// `NotFound` for another name; `Invalid` for a box that does not fit; `Corrupt` for damage; what the store
    /// answers.
    pub async fn read(&self, name: &str, offset: &[usize], shape: &[usize]) -> Result<BytesMut> {
        let length = self.wanted(name, offset, shape)?.2;
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(length).map_err(|error| {
            Error::unsupported(format!("tensor `{name}`: no memory for {length} bytes")).with_source(error)
        })?;
        buffer.resize(length, 0);
        self.read_into(name, offset, shape, BytesMut::from(Bytes::from(buffer))).await
    }

    /// As [`StateReader::read`], into memory of the caller, which gets it back. What lies in one piece in the file and in
    /// the box is read to where it belongs, without a copy.
    ///
    /// # Errors
    /// As [`StateReader::read`]; `Invalid` if `buffer` is not as long as the box. The buffer is then gone.
    pub async fn read_into(
        &self,
        name: &str,
        offset: &[usize],
        shape: &[usize],
        mut buffer: BytesMut,
    ) -> Result<BytesMut> {
        let (tensor, wanted, length) = self.wanted(name, offset, shape)?;
        if buffer.len() != length {
            return Err(Error::invalid(format!(
                "tensor `{name}`: wanted a buffer of {length} bytes, found {}",
                buffer.len()
            )));
        }
        let width = tensor.meta.dtype().bits() as usize;
        let mut jobs = Vec::new();
        let mut covered = 0;
        for part in &tensor.parts {
            let Some(both) = part.region.overlap(&wanted) else { continue };
            covered += both.volume().unwrap_or(0);
            let mut pieces: Vec<Piece> = Vec::new();
            for (from, to, count) in part.region.runs(&wanted, &both) {
                let (from, to) = (bytes_of(from, width)?, bytes_of(to, width)?);
                let length = bytes_of(count, width)?;
                match pieces.last_mut() {
                    Some(last) if last.from.end == from && last.to + last.from.len() == to => {
                        last.from.end = from + length;
                    }
                    _ => pieces.push(Piece { from: from..from + length, to }),
                }
            }
            plan(part, &pieces, &mut jobs);
        }
        if covered != wanted.volume().unwrap_or(usize::MAX) {
            return Err(Error::corrupt(format!("tensor `{name}`: parts of the box were never saved"))
                .with_help("load another state"));
        }
        let (direct, gather): (Vec<Job<'_>>, Vec<Job<'_>>) =
            jobs.into_iter().partition(|job| job.direct().is_some());
        let context = |error: Error| lost(error.context(format_args!("tensor `{name}`")), &self.info);
        buffer = self.run_direct(direct, buffer).await.map_err(context)?;
        // Futures are made before they are streamed: a closure that makes them would not be general enough for callers
        // that send theirs to other threads.
        let gather: Vec<_> = gather.into_iter().map(|job| self.fetch(job)).collect();
        let mut gathered = futures_util::stream::iter(gather).buffered(READS_AT_ONCE);
        while let Some((bytes, job)) = gathered.try_next().await.map_err(context)? {
            for piece in &job.pieces {
                let start = piece.from.start - job.blocks.start * DIGEST_BLOCK;
                let source = bytes.get(start..start + piece.from.len());
                let target = buffer.get_mut(piece.to..piece.to + piece.from.len());
                if let (Some(source), Some(target)) = (source, target) {
                    target.copy_from_slice(source);
                }
            }
        }
        Ok(buffer)
    }

    /// As [`StateReader::read_into`] for many boxes, several at once; the buffers come back in the order of the boxes.
    ///
    /// # Errors
    /// As [`StateReader::read_into`]. All the buffers are then gone.
    pub async fn read_boxes(&self, boxes: Vec<BoxRead>) -> Result<Vec<BytesMut>> {
        let reads = boxes.into_iter().map(async |wanted| {
            let BoxRead { name, offset, shape, buffer } = wanted;
            self.read_into(&name, &offset, &shape, buffer).await
        });
        several(reads.collect()).await
    }

    /// Every tensor, whole.
    pub(super) async fn read_all(&self) -> Result<Weights> {
        let read = self.tensors.values().map(async |tensor| {
            let meta = tensor.meta.clone();
            let data = self.read(meta.name(), &vec![0; meta.shape().len()], meta.shape()).await?;
            Ok((meta, data.freeze()))
        });
        Weights::new(several(read.collect()).await?)
    }

    fn wanted(&self, name: &str, offset: &[usize], shape: &[usize]) -> Result<(&Parts, Region, usize)> {
        let tensor = self.tensors.get(name).ok_or_else(|| {
            Error::not_found(format!("{} has no tensor `{}`", self.info.id, name.escape_debug()))
                .with_help("see `tensors` for the names")
        })?;
        let region = Region { offset: offset.to_vec(), shape: shape.to_vec() };
        if !region.fits(tensor.meta.shape()) {
            return Err(Error::invalid(format!(
                "tensor `{name}` of shape {:?}: the box {shape:?} from {offset:?} lies outside",
                tensor.meta.shape()
            ))
            .with_help("give offset and shape in elements, one for each dimension"));
        }
        let length = TensorMeta::new(name, tensor.meta.dtype(), shape.to_vec())?.byte_len();
        Ok((tensor, region, length))
    }

    /// Reads the jobs whose bytes are wanted as they lie, each to its place.
    async fn run_direct(&self, mut jobs: Vec<Job<'_>>, mut buffer: BytesMut) -> Result<BytesMut> {
        jobs.sort_by_key(|job| job.direct());
        // The buffer is taken apart, so that the reads can go on at once, and put together again without a copy.
        let mut segments = Vec::with_capacity(jobs.len());
        for job in jobs.into_iter().rev() {
            let Some(at) = job.direct() else { continue };
            let behind = buffer.split_off((at + job.bytes().len()).min(buffer.len()));
            let here = buffer.split_off(at.min(buffer.len()));
            segments.push((job, here, behind));
        }
        let reads: Vec<_> =
            segments.into_iter().rev().map(|(job, here, behind)| self.fill(job, here, behind)).collect();
        let mut done = futures_util::stream::iter(reads).buffered(READS_AT_ONCE);
        while let Some((here, behind)) = done.try_next().await? {
            buffer.unsplit(here);
            buffer.unsplit(behind);
        }
        Ok(buffer)
    }

    async fn fill(&self, job: Job<'_>, here: BytesMut, behind: BytesMut) -> Result<(BytesMut, BytesMut)> {
        let read = self.repo.ops.read_digested(&job.part.key, job.file_start(), here).await?;
        match read.blocks {
            Some(found) => job.check_blocks(found).map(|()| (read.buffer, behind)),
            None => Ok((job.check(read.buffer).await?, behind)),
        }
    }

    async fn fetch<'a>(&self, job: Job<'a>) -> Result<(Bytes, Job<'a>)> {
        let range = job.file_start()..job.file_start() + job.bytes().len() as u64;
        let bytes = self.repo.ops.get(&job.part.key, Some(range.clone())).await?;
        if bytes.len() != job.bytes().len() {
            return Err(Error::corrupt(format!("wanted bytes {range:?}, found {} of them", bytes.len())));
        }
        Ok((job.check(bytes).await?, job))
    }
}

/// A box of a tensor that is wanted, and the memory that it goes to.
#[derive(Debug)]
pub struct BoxRead {
    name: String,
    offset: Vec<usize>,
    shape: Vec<usize>,
    buffer: BytesMut,
}

impl BoxRead {
    /// The box of `shape` from `offset`, in elements along each dimension, of tensor `name`, into `buffer`, which must be
    /// as long as the box.
    pub fn new(
        name: impl Into<String>,
        offset: impl Into<Vec<usize>>,
        shape: impl Into<Vec<usize>>,
        buffer: BytesMut,
    ) -> Self {
        Self { name: name.into(), offset: offset.into(), shape: shape.into(), buffer }
    }

    /// All of `tensor`, into `buffer`.
    #[must_use]
    pub fn whole(tensor: &TensorMeta, buffer: BytesMut) -> Self {
        Self::new(tensor.name(), vec![0; tensor.shape().len()], tensor.shape(), buffer)
    }
}

/// What the reads of tensors give, in their order. One that ends makes room for the next even while an earlier one
/// goes on: a large tensor does not hold up small ones.
async fn several<T, F: Future<Output = Result<T>>>(reads: Vec<F>) -> Result<Vec<T>> {
    let reads: Vec<_> =
        reads.into_iter().enumerate().map(async |(at, read)| Ok::<_, Error>((at, read.await?))).collect();
    let mut done: Vec<(usize, T)> =
        futures_util::stream::iter(reads).buffer_unordered(TENSORS_AT_ONCE).try_collect().await?;
    done.sort_by_key(|(at, _)| *at);
    Ok(done.into_iter().map(|(_, read)| read).collect())
}

/// Bytes of a box that are wanted, and where.
#[derive(Debug)]
struct Piece {
    /// In the box.
    from: Range<usize>,
    /// In the buffer.
    to: usize,
}

/// One read: whole blocks of a box, so that they can be checked.
#[derive(Debug)]
struct Job<'a> {
    part: &'a Part,
    blocks: Range<usize>,
    pieces: Vec<Piece>,
}

impl Job<'_> {
    /// Its bytes within the box.
    fn bytes(&self) -> Range<usize> {
        self.blocks.start * DIGEST_BLOCK..self.part.length.min(self.blocks.end * DIGEST_BLOCK)
    }

    fn file_start(&self) -> u64 {
        self.part.stored.start + (self.blocks.start * DIGEST_BLOCK) as u64
    }

    /// Where in the buffer all of its bytes belong, if they do in one piece.
    fn direct(&self) -> Option<usize> {
        match self.pieces.as_slice() {
            [piece] if piece.from == self.bytes() => Some(piece.to),
            _ => None,
        }
    }

    /// Whether what is at `from` in the box and goes to `to` goes on where its last piece ends.
    fn continues(&self, from: usize, to: usize) -> bool {
        self.pieces.last().is_some_and(|last| last.from.end == from && last.to + last.from.len() == to)
    }

    /// Checks the digests of its blocks.
    fn check_blocks(&self, found: Vec<u128>) -> Result<()> {
        let Part { blocks, stored, .. } = self.part;
        let wanted = blocks.as_ref().and_then(|blocks| blocks.get(self.blocks.clone()));
        matches(wanted, stored.digest, found.into_iter())
    }

    /// Checks what was read.
    async fn check<B: AsRef<[u8]> + Send + 'static>(&self, bytes: B) -> Result<B> {
        let (blocks, range, digest) =
            (self.part.blocks.clone(), self.blocks.clone(), self.part.stored.digest);
        let check = move || {
            let found = bytes.as_ref().chunks(DIGEST_BLOCK).map(block_digest);
            let wanted = blocks.as_ref().and_then(|blocks| blocks.get(range));
            matches(wanted, digest, found).map(|()| bytes)
        };
        if self.bytes().len() <= DIGEST_BLOCK { check() } else { blocking(check).await }
    }
}

/// Whether blocks have the digests `wanted`, or without any, as one block at most, the `digest` of the box.
fn matches(
    wanted: Option<&[u128]>,
    digest: TensorDigest,
    found: impl ExactSizeIterator<Item = u128>,
) -> Result<()> {
    let good = match wanted {
        Some(wanted) => found.eq(wanted.iter().copied()),
        None => found.len() <= 1 && TensorDigest::of_blocks(found) == digest,
    };
    if good {
        return Ok(());
    }
    Err(Error::corrupt("a block does not match its digest").with_help("load another state"))
}

/// Cuts what is wanted of a box into reads of whole blocks: neighbours together, none too long.
fn plan<'a>(part: &'a Part, pieces: &[Piece], jobs: &mut Vec<Job<'a>>) {
    let mut open: Option<Job<'a>> = None;
    for piece in pieces {
        let mut start = piece.from.start;
        while start < piece.from.end {
            let block = start / DIGEST_BLOCK;
            let end = piece.from.end.min((block + 1) * DIGEST_BLOCK);
            let to = piece.to + (start - piece.from.start);
            let whole = end - start == DIGEST_BLOCK || start % DIGEST_BLOCK == 0 && end == part.length;
            let fits = open.as_ref().is_some_and(|job| {
                // Where a run of whole blocks begins or ends, so does a read: it goes straight to its place.
                let apart = job.continues(start, to) && whole != job.direct().is_some();
                block + 1 == job.blocks.end
                    || block == job.blocks.end && job.blocks.len() < READ_BLOCKS && !apart
            });
            if !fits {
                jobs.extend(open.take());
            }
            let job = open.get_or_insert_with(|| Job { part, blocks: block..block + 1, pieces: Vec::new() });
            job.blocks.end = block + 1;
            match job.pieces.last_mut() {
                Some(last) if last.from.end == start && last.to + last.from.len() == to => {
                    last.from.end = end
                }
                _ => job.pieces.push(Piece { from: start..end, to }),
            }
            start = end;
        }
    }
    jobs.extend(open);
}

/// Elements as bytes; boxes of packed types begin and end at whole bytes.
fn bytes_of(elements: usize, bits: usize) -> Result<usize> {
    let bits = elements.checked_mul(bits).filter(|bits| bits % 8 == 0);
    bits.map(|bits| bits / 8).ok_or_else(|| {
        Error::unsupported("a box of a packed type does not begin or end at a whole byte")
            .with_help("read the tensor whole, or a box of whole bytes")
    })
}
