//! Train states that many ranks write at once, each its own files, with one commit. This file alone knows the form of a
//! rank's index.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use towline_core::{
    DType, Error, ErrorKind, FileEntry, JobId, ObjectKey, Result, SnapshotName, TensorDigest, TensorEntry,
    TensorMeta, TensorSource, WriteId, block_digest,
};

use super::SnapshotRepo;
use super::boxes::{Region, check_tiling};
use super::files::{Place, Work, Written, cut, write_files};
use super::info::SnapshotInfo;
use super::ops::Ops;
use super::share::{Shared, SharedBox, Sorted};
use crate::random::random;

/// The version of the stored form.
const VERSION: u32 = 1;
/// The largest index of a rank that is read, in bytes: some TiB of tensors.
const MAX_INDEX: u64 = 256 << 20;
/// How often an index that is not there yet is asked for.
const POLL: Duration = Duration::from_millis(250);

/// What every rank is told to write its part of a state. It can be sent as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StateTicket {
    /// Whose state it is.
    pub job: JobId,
    /// What it will be called.
    pub name: SnapshotName,
    /// Its folder, below the job's.
    pub dir: ObjectKey,
    /// Its number.
    pub seq: u64,
    /// How many ranks write.
    pub ranks: NonZeroU32,
    /// The earlier state whose tensors are referred to where they are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SnapshotInfo>,
}

impl StateTicket {
    pub(super) fn new(job: JobId, name: SnapshotName, dir: ObjectKey, seq: u64, ranks: NonZeroU32) -> Self {
        Self { job, name, dir, seq, ranks, shared: None }
    }

    pub(super) fn with_shared(mut self, shared: Option<SnapshotInfo>) -> Self {
        self.shared = shared;
        self
    }

    fn folder(&self) -> Result<ObjectKey> {
        ObjectKey::new(format!("{}/{}", self.job, self.dir))
    }

    fn index_key(&self, rank: u32) -> Result<ObjectKey> {
        self.folder()?.join(&index_path(rank))
    }
}

/// What a rank has written. It can be sent as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RankReceipt {
    /// Whose part it is.
    pub rank: u32,
    /// The digest of its index, which has the digests of its tensors.
    pub digest: TensorDigest,
    /// Bytes of its files.
    pub bytes: u64,
}

/// The tensors of one rank: each of its source is a whole tensor, or a box of one.
pub struct RankPart {
    source: Arc<dyn TensorSource>,
    boxes: BTreeMap<String, BoxPlace>,
}

/// Which box of which tensor.
#[derive(Debug, Clone)]
struct BoxPlace {
    name: String,
    /// The shape of the whole tensor.
    global: Vec<usize>,
    offset: Vec<usize>,
}

impl RankPart {
    /// The tensors of `source`, each whole.
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        Self { source, boxes: BTreeMap::new() }
    }

    /// Says that tensor `key` of the source is the box from `offset` (in elements along each dimension) of tensor `name`,
    /// whose shape is `global`.
    #[must_use]
    pub fn with_box(
        mut self,
        key: impl Into<String>,
        name: impl Into<String>,
        global: impl Into<Vec<usize>>,
        offset: impl Into<Vec<usize>>,
    ) -> Self {
        let place = BoxPlace { name: name.into(), global: global.into(), offset: offset.into() };
        self.boxes.insert(key.into(), place);
        self
    }
}

impl fmt::Debug for RankPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensors = self.source.tensors().len();
        f.debug_struct("RankPart").field("tensors", &tensors).field("boxes", &self.boxes).finish()
    }
}

/// What a rank says of its part.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RankIndex {
    version: u32,
    rank: u32,
    ranks: NonZeroU32,
    pub(super) files: Vec<FileEntry>,
    pub(super) boxes: Vec<StoredBox>,
}

/// A box in a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredBox {
    pub(super) name: String,
    pub(super) dtype: DType,
    /// The shape of the whole tensor.
    pub(super) global: Vec<usize>,
    pub(super) offset: Vec<usize>,
    pub(super) shape: Vec<usize>,
    /// Its file, as an index into the files of the rank.
    pub(super) file: usize,
    /// Its first byte there.
    pub(super) start: u64,
    pub(super) digest: TensorDigest,
    /// The digests of its blocks of 1 MiB in hexadecimal, 32 digits each; nothing if there is one block at most.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    blocks: String,
}

impl StoredBox {
    fn new(entry: &TensorEntry, place: BoxPlace, stored: &Place) -> Self {
        let BoxPlace { name, global, offset } = place;
        let blocks = match stored.blocks.as_slice() {
            [] | [_] => String::new(),
            many => many.iter().map(|block| format!("{block:032x}")).collect(),
        };
        let (dtype, shape, digest) = (entry.dtype, entry.shape.clone(), entry.digest);
        Self { name, dtype, global, offset, shape, file: entry.file, start: stored.start, digest, blocks }
    }

    pub(super) fn region(&self) -> Region {
        Region { offset: self.offset.clone(), shape: self.shape.clone() }
    }

    /// Its bytes.
    pub(super) fn byte_len(&self) -> Result<usize> {
        Ok(TensorMeta::new(&self.name, self.dtype, self.shape.clone())?.byte_len())
    }

    /// The digest of each block, checked against that of the box; `None` if there is one block at most.
    pub(super) fn blocks(&self) -> Result<Option<Vec<u128>>> {
        if self.blocks.is_empty() {
            return Ok(None);
        }
        let damaged = || Error::corrupt(format!("tensor `{}`: its block digests are damaged", self.name));
        let digits = self.blocks.as_bytes().chunks(32);
        let parse = |digits: &[u8]| u128::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
        let blocks = digits.map(parse).collect::<Option<Vec<_>>>().ok_or_else(damaged)?;
        if TensorDigest::of_blocks(blocks.iter().copied()) != self.digest {
            return Err(damaged());
        }
        Ok(Some(blocks))
    }
}

impl RankIndex {
    /// The files that its rank has written.
    fn written(&self) -> impl Iterator<Item = &FileEntry> {
        self.files.iter().filter(|file| file.dir.is_none())
    }

    fn bytes(&self) -> u64 {
        self.written().map(|file| file.bytes).sum()
    }

    /// Its stored form, and that one's digest.
    pub(super) fn encode(&self) -> Result<(Bytes, TensorDigest)> {
        let body = serde_json::to_vec(self)
            .map_err(|error| Error::internal("a rank's index could not be written").with_source(error))?;
        let digest = TensorDigest::of(&body);
        Ok((body.into(), digest))
    }

    /// Whether both have the same tensors, wherever they lie.
    fn same_boxes(&self, other: &Self) -> bool {
        let key = |stored: &StoredBox| {
            let StoredBox { name, dtype, global, offset, shape, digest, .. } = stored.clone();
            (name, dtype, global, offset, shape, digest)
        };
        self.boxes.len() == other.boxes.len()
            && self.boxes.iter().zip(&other.boxes).all(|(left, right)| key(left) == key(right))
    }

    /// Reads the index of `rank` below `folder`. `expected` is its digest where that is known.
    pub(super) async fn read(
        ops: &Ops,
        key: &ObjectKey,
        rank: u32,
        ranks: NonZeroU32,
        expected: Option<&TensorDigest>,
    ) -> Result<(Self, TensorDigest, u64)> {
        let size = ops.head(key).await?.size;
        if size > MAX_INDEX {
            return Err(Error::corrupt(format!("`{key}`: {size} bytes, at most {MAX_INDEX} are read")));
        }
        let bytes = ops.get(key, None).await?;
        let digest = TensorDigest::of(&bytes);
        if expected.is_some_and(|expected| *expected != digest) {
            return Err(Error::corrupt(format!("`{key}` does not match its digest"))
                .with_help("save the state again"));
        }
        let index: Self = serde_json::from_slice(&bytes)
            .map_err(|error| Error::corrupt(format!("`{key}` is not of this form")).with_source(error))?;
        let (version, found) = (index.version, (index.rank, index.ranks));
        if version != VERSION {
            return Err(Error::unsupported(format!("`{key}`: version {version}, known is {VERSION}"))
                .with_help("upgrade Towline"));
        }
        if found != (rank, ranks) {
            return Err(Error::corrupt(format!(
                "`{key}` is of rank {} of {}, wanted {rank} of {ranks}",
                found.0, found.1
            )));
        }
        for stored in &index.boxes {
            let end =
                u64::try_from(stored.byte_len()?).ok().and_then(|bytes| stored.start.checked_add(bytes));
            let file = index.files.get(stored.file);
            if file.zip(end).is_none_or(|(file, end)| end > file.bytes)
                || !stored.region().fits(&stored.global)
            {
                return Err(Error::corrupt(format!("`{key}`: tensor `{}` lies outside", stored.name)));
            }
        }
        Ok((index, digest, size))
    }
}

pub(super) fn index_path(rank: u32) -> String {
    format!("rank-{rank}.json")
}

impl SnapshotRepo {
    /// Writes the part of one rank. Any process may, at the same time as the others; nothing is visible before the
    /// commit. A rank that failed may write its part again.
    ///
    /// # Errors
    /// `Invalid` for a rank that the ticket does not have, a ticket of another job, and boxes that do not fit their
    /// tensors; what the source and the store answer.
    pub async fn write_rank(&self, ticket: &StateTicket, rank: u32, part: &RankPart) -> Result<RankReceipt> {
        if rank >= ticket.ranks.get() || ticket.job != self.job {
            return Err(Error::invalid(format!(
                "rank {rank} of job {} cannot write a state of job {} with {} ranks",
                self.job, ticket.job, ticket.ranks
            ))
            .with_help("count ranks from 0, and open the job that the ticket names"));
        }
        let known: BTreeSet<&str> = part.source.tensors().iter().map(TensorMeta::name).collect();
        if let Some(key) = part.boxes.keys().find(|key| !known.contains(key.as_str())) {
            return Err(Error::invalid(format!(
                "rank {rank}: a box is given for `{key}`, which it does not have"
            ))
            .with_help("give boxes for tensors of the source"));
        }
        // Its own name for each attempt: who reads an earlier one is not disturbed.
        let attempt = WriteId::from_random(random().to_be_bytes());
        let name = |number| format!("rank-{rank}-{number}-{attempt}.safetensors");
        let shared = self.shared(ticket.shared.as_ref()).await?;
        let index = self.write_part(&ticket.folder()?, part, shared, (rank, ticket.ranks), name).await?;
        let (body, digest) = index.encode()?;
        let key = ticket.index_key(rank)?;
        match self.ops.create(&key, &body).await {
            Ok(()) => Ok(RankReceipt { rank, digest, bytes: index.bytes() }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // An earlier attempt got as far. It may be committed already, so that it is left as it is.
                let (earlier, digest, _) = RankIndex::read(&self.ops, &key, rank, ticket.ranks, None).await?;
                if !earlier.same_boxes(&index) {
                    return Err(error
                        .context(format_args!("rank {rank} has written other tensors for `{}`", ticket.name))
                        .with_help("begin a new state"));
                }
                // If what is there was misread a moment ago, it is this attempt's own index.
                let kept: BTreeSet<&str> = earlier.written().map(|file| file.path.as_str()).collect();
                for file in index.written().filter(|file| !kept.contains(file.path.as_str())) {
                    self.ops.delete(&ticket.folder()?.join(&file.path)?).await?;
                }
                Ok(RankReceipt { rank, digest, bytes: earlier.bytes() })
            }
            Err(error) => Err(error),
        }
    }

    /// Writes the tensors of a part that `shared` does not have into files called by `name`. Its index is still to be
    /// written.
    pub(super) async fn write_part(
        &self,
        folder: &ObjectKey,
        part: &RankPart,
        shared: Shared,
        (rank, ranks): (u32, NonZeroU32),
        name: impl Fn(usize) -> String,
    ) -> Result<RankIndex> {
        let places = part.places()?;
        let wanted = part.source.tensors().iter().zip(&places).map(|(meta, place)| {
            let region = Region { offset: place.offset.clone(), shape: meta.shape().to_vec() };
            (place.name.clone(), place.global.clone(), region)
        });
        let Sorted { there, new } = shared.sort(&part.source, wanted.collect()).await?;
        let runs = cut(new.tensors(), self.shard_bytes);
        let work = Work {
            weights: new,
            parent: None,
            codec: None,
            limits: self.limits,
            shards: runs.into_iter().enumerate().map(|(number, run)| (name(number), run)).collect(),
        };
        let Written { mut files, tensors, places: stored, .. } = write_files(&self.ops, folder, work).await?;
        let mut written = tensors.iter().zip(&stored);
        let mut boxes = Vec::with_capacity(places.len());
        for (number, place) in places.into_iter().enumerate() {
            if let Some(SharedBox { stored, file }) = there.get(&number) {
                let known = files.iter().position(|known| known == file);
                boxes.push(StoredBox { file: known.unwrap_or(files.len()), ..stored.clone() });
                if known.is_none() {
                    files.push(file.clone());
                }
            } else if let Some((entry, stored)) = written.next() {
                boxes.push(StoredBox::new(entry, place, stored));
            } else {
                return Err(Error::internal(format!("tensor `{}` was not written", place.name)));
            }
        }
        Ok(RankIndex { version: VERSION, rank, ranks, files, boxes })
    }

    /// The indexes of all ranks, in order, each waited for until `deadline`; with receipts, the ones that they name.
    pub(super) async fn collect_ranks(
        &self,
        ticket: &StateTicket,
        receipts: &[RankReceipt],
        deadline: Duration,
    ) -> Result<Vec<(RankIndex, FileEntry)>> {
        let until = Instant::now() + deadline;
        let mut indexes = Vec::new();
        for rank in 0..ticket.ranks.get() {
            let receipt = receipts.iter().find(|receipt| receipt.rank == rank);
            if receipt.is_none() && !receipts.is_empty() {
                return Err(Error::invalid(format!(
                    "there is no receipt of rank {rank} of {}",
                    ticket.ranks
                ))
                .with_help("give the receipts of all ranks, or none to wait for them"));
            }
            let key = ticket.index_key(rank)?;
            let expected = receipt.map(|receipt| &receipt.digest);
            let (index, digest, size) = loop {
                // Asked for by its name, never by a listing, which would be one for each rank of a large job.
                match RankIndex::read(&self.ops, &key, rank, ticket.ranks, expected).await {
                    // What a receipt names has been written: somewhere else.
                    Err(error) if error.kind() == ErrorKind::NotFound && receipt.is_some() => {
                        return Err(error.with_help("give the receipts of this state, not of another one"));
                    }
                    Err(error) if error.kind() == ErrorKind::NotFound && Instant::now() < until => {
                        tokio::time::sleep(POLL).await;
                    }
                    Err(error) if error.kind() == ErrorKind::NotFound => {
                        return Err(Error::timed_out(format!(
                            "`{}`: rank {rank} of {} has not written its part within {} s",
                            ticket.name,
                            ticket.ranks,
                            deadline.as_secs_f32()
                        ))
                        .with_help("look at that rank; nothing was committed"));
                    }
                    read => break read?,
                }
            };
            indexes.push((index, FileEntry::new(index_path(rank), size, digest, false)));
        }
        Ok(indexes)
    }
}

impl RankPart {
    /// The box that each tensor of the source is.
    fn places(&self) -> Result<Vec<BoxPlace>> {
        let place = |meta: &TensorMeta| {
            let place = self.boxes.get(meta.name()).cloned().unwrap_or_else(|| BoxPlace::whole(meta));
            let region = Region { offset: place.offset.clone(), shape: meta.shape().to_vec() };
            if region.fits(&place.global) {
                return Ok(place);
            }
            Err(Error::invalid(format!(
                "tensor `{}`: the box {:?} from {:?} is not within {:?}",
                place.name,
                meta.shape(),
                place.offset,
                place.global
            ))
            .with_help("give offset and shape in elements, one for each dimension"))
        };
        self.source.tensors().iter().map(place).collect()
    }
}

impl BoxPlace {
    fn whole(meta: &TensorMeta) -> Self {
        let shape = meta.shape();
        Self { name: meta.name().to_owned(), global: shape.to_vec(), offset: vec![0; shape.len()] }
    }
}

/// The tensors of all ranks: files, and one entry for each tensor, whose boxes tile it.
///
/// # Errors
/// `Invalid` for a hole, an overlap, or ranks that do not agree on a tensor.
pub(super) fn assemble(indexes: &[(RankIndex, FileEntry)]) -> Result<(Vec<FileEntry>, Vec<TensorEntry>)> {
    let mut files = Vec::new();
    let mut boxes: BTreeMap<&str, Vec<(&StoredBox, usize)>> = BTreeMap::new();
    for (index, own) in indexes {
        for stored in &index.boxes {
            boxes.entry(&stored.name).or_default().push((stored, files.len() + stored.file));
        }
        files.extend(index.files.iter().cloned());
        files.push(own.clone());
    }
    let mut tensors = Vec::with_capacity(boxes.len());
    for (name, mut parts) in boxes {
        let Some(&(first, file)) = parts.first() else { continue };
        if let Some((other, _)) =
            parts.iter().find(|(part, _)| (part.dtype, &part.global) != (first.dtype, &first.global))
        {
            return Err(Error::invalid(format!(
                "tensor `{name}` is {} {:?} on one rank and {} {:?} on another",
                first.dtype, first.global, other.dtype, other.global
            ))
            .with_help("give the same type and shape on all ranks"));
        }
        let mut regions: Vec<_> = parts.iter().map(|(part, _)| part.region()).collect();
        check_tiling(name, &first.global, &mut regions)?;
        let meta = TensorMeta::new(name, first.dtype, first.global.clone())?;
        let digest = match parts.as_slice() {
            [(whole, _)] => whole.digest,
            _ => {
                parts.sort_by(|(left, _), (right, _)| left.offset.cmp(&right.offset));
                let each = parts.iter().map(|(part, _)| {
                    block_digest(format!("{:?} {:?} {}", part.offset, part.shape, part.digest).as_bytes())
                });
                TensorDigest::of_blocks(each)
            }
        };
        tensors.push(TensorEntry::new(&meta, digest, file));
    }
    Ok((files, tensors))
}
