//! Files of encoded tensors: Towline's own container, and the safetensors form of the arc formats.
//!
//! ```text
//! container:  "TOWLINE\x03" | frames, tensor by tensor | index | footer (32 bytes)
//! footer:     index start u64 | index length u64 | XXH3-64 of the index u64 | "TOWLIDX\x01"     (little-endian)
//! index:      codec id | mode | content digest | content digest of the parent (delta) | unit bytes (0 = whole)
//!             | tensor count | tensors sorted by name
//! tensor:     shared prefix | 0, suffix length, suffix, dtype, rank, dimensions
//!                           or k: the suffix, dtype and dimensions of the k-th tensor before
//!             | length of each frame | check of each unit (4 bytes)
//! ```
//! Numbers in the index are LEB128. Layers repeat, so that most tensors of a model look k tensors back for what they
//! are. A check is the beginning of the unit's own digest: enough for accidents in one unit, while the content digest
//! covers all tensors in full. The index stands behind the frames, so a file is written in one pass.

use std::num::NonZeroUsize;
use std::ops::Range;

use twox_hash::XxHash3_64;

use crate::id::shown;
use crate::safetensors::{ByteSource, Header};
use crate::{CodecId, ContentDigest, DType, Error, Mode, Result, TensorDigest, TensorMeta, Unit};

/// The first bytes of a container.
pub const MAGIC: &[u8; 8] = b"TOWLINE\x03";
/// The length of a container's footer.
pub const FOOTER_LEN: usize = 32;
const FOOTER_MAGIC: &[u8; 8] = b"TOWLIDX\x01";
/// The largest index that is read, in bytes, as for a safetensors header.
const MAX_INDEX: u64 = 100_000_000;
const MAX_RANK: u64 = 64;
/// How many times longer than the index all names together may be. Names that share a prefix cost at least 24 bytes
/// each, so real ones stay below 8; without a limit a small index could ask for hundreds of times its size.
const MAX_NAMES: usize = 32;
/// How far back a tensor looks for one like it: a layer of a large mixture of experts.
const MAX_BACK: usize = 4096;

/// One encoded tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EncodedTensor {
    /// The tensor's name.
    pub name: String,
    /// Element type and shape; `None` in the arc formats, where the parent tells them.
    pub meta: Option<TensorMeta>,
    /// How the tensor was cut.
    pub unit: Unit,
    /// Each unit's frame, as a range of the file.
    pub frames: Vec<Range<u64>>,
    /// The checksum of the decoded tensor in the arc formats.
    pub checksum: Option<u32>,
    /// The check of each decoded unit ([`TensorDigest::check`]); empty in the arc formats.
    pub checks: Vec<u32>,
}

/// What a file of encoded tensors says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardIndex {
    /// The codec; `None` in the safetensors form, where the first payload tells it.
    pub codec: Option<CodecId>,
    /// Base or delta.
    pub mode: Mode,
    /// The content digest of the decoded tensors; `None` in the safetensors form.
    pub content: Option<ContentDigest>,
    /// For a delta in a container: the content digest of the parent's tensors of the same names.
    pub parent: Option<ContentDigest>,
    /// The tensors, sorted by name.
    pub tensors: Vec<EncodedTensor>,
}

impl ShardIndex {
    /// Reads the index of `source`, whichever of the two forms it has.
    ///
    /// # Errors
    /// `Corrupt` if it is neither, is cut short, or its lengths do not tile the file.
    pub fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut magic = [0; 8];
        if source.len() >= 8 {
            source.read_at(0, &mut magic)?;
        }
        if &magic != MAGIC {
            return Self::from_safetensors(Header::read(source).map_err(|error| {
                error.with_help(
                    "give a file that `towline delta encode` or a trainer of the arc formats wrote",
                )
            })?);
        }
        let range =
            index_range(&source.read_range(source.len().saturating_sub(32)..source.len())?, source.len())?;
        let footer = source.read_range(range.end..source.len())?;
        Self::parse_container(&source.read_range(range.clone())?, &footer, source.len())
    }

    /// Parses the index of a container of `file_len` bytes from the index's bytes and the footer.
    ///
    /// # Errors
    /// `Corrupt` as [`ShardIndex::read`].
    pub fn parse_container(index: &[u8], footer: &[u8], file_len: u64) -> Result<Self> {
        let range = index_range(footer, file_len)?;
        let bad = |why: &str| Error::corrupt(format!("container index: {why}"));
        let (_, checksum) = footer.split_at(16);
        if checksum.get(..8) != Some(&XxHash3_64::oneshot(index).to_le_bytes()[..]) {
            return Err(bad("its checksum does not match").with_help("copy the file again"));
        }
        let mut reader = Reader { bytes: index };
        let codec_len = usize::from(reader.byte()?);
        let codec =
            std::str::from_utf8(reader.take(codec_len)?).map_err(|_| bad("the codec id is no text"))?;
        let codec = CodecId::new(codec).map_err(|error| bad(error.message()))?;
        let mode = match reader.byte()? {
            0 => Mode::Base,
            1 => Mode::Delta,
            other => return Err(bad(&format!("mode {other} is unknown"))),
        };
        let content = Some(ContentDigest::from_bytes(reader.array()?));
        let parent = match mode {
            Mode::Base => None,
            Mode::Delta => Some(ContentDigest::from_bytes(reader.array()?)),
        };
        let unit = NonZeroUsize::new(reader.size()?).map_or(Unit::Whole, Unit::Block);
        let count = reader.number()?;
        let mut tensors: Vec<EncodedTensor> = Vec::new();
        let mut shared = Vec::new();
        let mut position = MAGIC.len() as u64;
        let mut name_bytes = 0;
        for _ in 0..count {
            let tensor = reader.tensor(&tensors, &mut shared, unit, &mut position)?;
            if tensors.last().is_some_and(|last| last.name >= tensor.name) {
                return Err(bad("the names are not sorted"));
            }
            name_bytes += tensor.name.len();
            if name_bytes > MAX_NAMES * index.len() {
                return Err(bad("shared prefixes blow the names up"));
            }
            tensors.push(tensor);
        }
        if !reader.bytes.is_empty() || position != range.start {
            return Err(bad("the frames do not tile the file"));
        }
        Ok(Self { codec: Some(codec), mode, content, parent, tensors })
    }

    /// The index of a delta in the safetensors form.
    ///
    /// # Errors
    /// `Corrupt` if a tensor is not `U8` with one dimension or has no checksum.
    pub fn from_safetensors(header: Header) -> Result<Self> {
        let mut tensors = Vec::new();
        for entry in header.entries {
            let name = entry.meta.name();
            let bad = |why: &str| {
                Error::corrupt(format!("no arc delta: tensor {} {why}", shown(name)))
                    .with_help("give the delta file, not a file of plain weights")
            };
            if entry.meta.dtype() != DType::U8 || entry.meta.shape().len() != 1 {
                return Err(bad("is not U8 with one dimension"));
            }
            let checksum =
                header.metadata.get(name).ok_or_else(|| bad("has no checksum in `__metadata__`"))?;
            let checksum = checksum.parse().map_err(|_| bad("has a checksum that is no 32-bit number"))?;
            tensors.push(EncodedTensor {
                name: name.to_owned(),
                meta: None,
                unit: Unit::Whole,
                frames: vec![entry.range.clone()],
                checksum: Some(checksum),
                checks: Vec::new(),
            });
        }
        Ok(Self { codec: None, mode: Mode::Delta, content: None, parent: None, tensors })
    }

    /// Checks the digests of all decoded tensors, in order, against the file's content digest, if it has one.
    ///
    /// # Errors
    /// `Corrupt` if they are not those that were encoded.
    pub fn check_content(&self, digests: &[TensorDigest]) -> Result<()> {
        let Some(wanted) = self.content else { return Ok(()) };
        let tensors = self.tensors.iter().zip(digests);
        let tensors = tensors.filter_map(|(tensor, digest)| Some((tensor.meta.as_ref()?, digest)));
        let found = ContentDigest::of_tensors(
            tensors.map(|(meta, digest)| (meta.name(), meta.dtype(), meta.shape(), digest)),
        );
        if found == wanted {
            return Ok(());
        }
        Err(Error::corrupt(format!("the file holds weights {wanted}, found {found}"))
            .with_help("check that the delta's parent is the right one, then copy the file again"))
    }

    /// The bytes of all frames.
    #[must_use]
    pub fn payload_len(&self) -> u64 {
        self.tensors.iter().flat_map(|tensor| &tensor.frames).map(|range| range.end - range.start).sum()
    }

    /// The encoded tensor called `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&EncodedTensor> {
        let index = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(index)
    }
}

/// Where the index of a container of `file_len` bytes lies, from its footer.
///
/// # Errors
/// `Corrupt` if the footer is not one, or the range is not within the file.
pub fn index_range(footer: &[u8], file_len: u64) -> Result<Range<u64>> {
    let bad =
        |why: String| Error::corrupt(format!("container footer: {why}")).with_help("copy the file again");
    if footer.len() != FOOTER_LEN || !footer.ends_with(FOOTER_MAGIC) {
        return Err(bad("the file does not end as a container does".into()));
    }
    let number = |at: usize| {
        footer
            .get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_le_bytes)
            .unwrap_or_default()
    };
    let (start, length) = (number(0), number(8));
    let end = start.checked_add(length).filter(|&end| {
        start >= MAGIC.len() as u64
            && length <= MAX_INDEX
            && end.checked_add(FOOTER_LEN as u64) == Some(file_len)
    });
    end.map(|end| start..end)
        .ok_or_else(|| bad(format!("an index of {length} bytes at {start} in {file_len}")))
}

/// Writes the index of a container whose frames were written in order behind [`MAGIC`].
#[derive(Debug)]
pub struct ContainerWriter {
    codec: CodecId,
    unit: Unit,
    parent: Option<ContentDigest>,
    body: Vec<u8>,
    /// The tensors so far.
    tensors: Vec<Written>,
    position: u64,
}

/// A tensor whose frames are written.
#[derive(Debug)]
struct Written {
    meta: TensorMeta,
    digest: TensorDigest,
    /// The length of the prefix that its name shares with that of the tensor before.
    shared: usize,
}

impl ContainerWriter {
    /// A container of `codec`, which cuts tensors into `unit`s; `parent` is `Some` for a delta. The caller writes
    /// [`MAGIC`] first.
    #[must_use]
    pub fn new(codec: &CodecId, unit: Unit, parent: Option<&ContentDigest>) -> Self {
        Self {
            codec: codec.clone(),
            unit,
            parent: parent.copied(),
            body: Vec::new(),
            tensors: Vec::new(),
            position: MAGIC.len() as u64,
        }
    }

    /// Records one tensor, whose frames of the given lengths the caller has written; `checks` are those of its units.
    /// Tensors come sorted by name.
    ///
    /// # Errors
    /// `Invalid` if the name does not sort behind the one before; `Internal` if there are not as many frames or
    /// checks as units.
    pub fn tensor(
        &mut self,
        meta: &TensorMeta,
        digest: &TensorDigest,
        frames: &[usize],
        checks: &[u32],
    ) -> Result<()> {
        let last = self.tensors.last().map_or("", |last| last.meta.name());
        if !self.tensors.is_empty() && meta.name() <= last {
            return Err(Error::invalid(format!("tensor {} is out of order", shown(meta.name()))));
        }
        let units = self.unit.ranges(meta.byte_len()).len();
        if frames.len() != units || checks.len() != units {
            return Err(Error::internal(format!(
                "tensor {} has {units} units, {} frames and {} checks",
                shown(meta.name()),
                frames.len(),
                checks.len()
            )));
        }
        let shared = last.bytes().zip(meta.name().bytes()).take_while(|(left, right)| left == right).count();
        let same = |other: &Written| {
            other.meta.dtype() == meta.dtype()
                && other.meta.shape() == meta.shape()
                && other.meta.name().as_bytes().get(other.shared..) == meta.name().as_bytes().get(shared..)
        };
        put(&mut self.body, shared as u64);
        let back = self.tensors.iter().rev().take(MAX_BACK).position(same).map_or(0, |back| back + 1);
        put(&mut self.body, back as u64);
        if back == 0 {
            let suffix = &meta.name().as_bytes()[shared..];
            put(&mut self.body, suffix.len() as u64);
            self.body.extend_from_slice(suffix);
            self.body.push(dtype_code(meta.dtype()));
            put(&mut self.body, meta.shape().len() as u64);
            for &dimension in meta.shape() {
                put(&mut self.body, dimension as u64);
            }
        }
        for &length in frames {
            put(&mut self.body, length as u64);
            self.position += length as u64;
        }
        self.body.extend(checks.iter().flat_map(|check| check.to_be_bytes()));
        self.tensors.push(Written { meta: meta.clone(), digest: *digest, shared });
        Ok(())
    }

    /// The index and the footer.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A codec id has at most 32 bytes.
        bytes.push(u8::try_from(self.codec.as_str().len()).unwrap_or(u8::MAX));
        bytes.extend_from_slice(self.codec.as_str().as_bytes());
        bytes.push(u8::from(self.parent.is_some()));
        let tensors = self.tensors.iter().map(|Written { meta, digest, .. }| (meta, digest));
        let content = ContentDigest::of_tensors(
            tensors.map(|(meta, digest)| (meta.name(), meta.dtype(), meta.shape(), digest)),
        );
        bytes.extend_from_slice(content.as_bytes());
        bytes.extend(self.parent.iter().flat_map(ContentDigest::as_bytes));
        let size = match self.unit {
            Unit::Whole => 0,
            Unit::Block(size) => size.get() as u64,
        };
        put(&mut bytes, size);
        put(&mut bytes, self.tensors.len() as u64);
        bytes.extend_from_slice(&self.body);
        let (length, checksum) = (bytes.len() as u64, XxHash3_64::oneshot(&bytes));
        for number in [self.position, length, checksum] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(FOOTER_MAGIC);
        bytes
    }
}

/// The checks of a tensor of these bytes cut into units.
#[must_use]
pub fn unit_checks(unit: Unit, data: &[u8]) -> Vec<u32> {
    let parts = unit.ranges(data.len()).filter_map(|range| data.get(range));
    parts.map(|part| TensorDigest::of(part).check()).collect()
}

fn dtype_code(dtype: DType) -> u8 {
    // The position in the list is part of the format: new types are added at its end.
    DType::ALL
        .iter()
        .position(|&known| known == dtype)
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push((number & 0x7f) as u8);
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(length)
            .ok_or_else(|| Error::corrupt(format!("container index: wanted {length} bytes more")))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| Error::internal("a slice of N bytes is an array of N"))
    }

    fn number(&mut self) -> Result<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Error::corrupt("container index: a number has more than 64 bits"))
    }

    fn size(&mut self) -> Result<usize> {
        usize::try_from(self.number()?)
            .map_err(|_| Error::corrupt("container index: a size does not fit this machine"))
    }

    /// The next tensor; `shared` holds the lengths of the prefixes of those before.
    fn tensor(
        &mut self,
        before: &[EncodedTensor],
        shared: &mut Vec<usize>,
        unit: Unit,
        position: &mut u64,
    ) -> Result<EncodedTensor> {
        let bad = |why: &str| Error::corrupt(format!("container index: {why}"));
        let last = before.last().map_or("", |last| &last.name);
        let length = self.size()?;
        let prefix = last.as_bytes().get(..length).ok_or_else(|| bad("a shared prefix is too long"))?;
        shared.push(length);
        let text = |name: Vec<u8>| String::from_utf8(name).map_err(|_| bad("a name is no text"));
        let meta = match self.size()? {
            0 => {
                let suffix = self.size()?;
                let name = text([prefix, self.take(suffix)?].concat())?;
                let code = usize::from(self.byte()?);
                let dtype = *DType::ALL.get(code).ok_or_else(|| bad(&format!("dtype {code} is unknown")))?;
                let rank = self.number()?;
                if rank > MAX_RANK {
                    return Err(bad(&format!("{} has {rank} dimensions", shown(&name))));
                }
                let shape = (0..rank).map(|_| self.size()).collect::<Result<Vec<_>>>()?;
                TensorMeta::new(name, dtype, shape)
            }
            back => {
                let like = before.len().checked_sub(back).filter(|_| back <= MAX_BACK);
                let like = like.and_then(|at| Some((before.get(at)?, *shared.get(at)?)));
                let like = like.and_then(|(like, prefix)| Some((like.meta.as_ref()?, prefix)));
                let (like, start) = like.ok_or_else(|| bad("a tensor is like one that is not there"))?;
                let suffix = like.name().as_bytes().get(start..).unwrap_or_default();
                TensorMeta::new(text([prefix, suffix].concat())?, like.dtype(), like.shape())
            }
        };
        let meta = meta.map_err(|error| bad(error.message()))?;
        let count = unit.ranges(meta.byte_len()).len();
        // Each frame's length takes at least one byte of the index.
        if count > self.bytes.len() {
            return Err(bad(&format!("{} wants {count} frames", shown(meta.name()))));
        }
        let mut frames = Vec::with_capacity(count);
        for _ in 0..count {
            let end =
                position.checked_add(self.number()?).ok_or_else(|| bad("a frame's length overflows"))?;
            frames.push(*position..end);
            *position = end;
        }
        let checks = (0..count).map(|_| Ok(u32::from_be_bytes(self.array()?))).collect::<Result<_>>()?;
        let name = meta.name().to_owned();
        Ok(EncodedTensor { name, meta: Some(meta), unit, frames, checksum: None, checks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn example() -> Vec<u8> {
        let parent = ContentDigest::of_tensors([]);
        let unit = Unit::Block(NonZeroUsize::new(128).unwrap());
        let mut writer = ContainerWriter::new(&CodecId::of("raw"), unit, Some(&parent));
        let mut file = MAGIC.to_vec();
        for (name, length) in [("layer.0.a", 3), ("layer.0.b", 0), ("layer.1", 300)] {
            let meta = TensorMeta::new(name, DType::U8, [length]).unwrap();
            let data = vec![7; length];
            let frames: Vec<usize> = unit.ranges(length).map(|range| range.len()).collect();
            let checks = vec![5; frames.len()];
            writer.tensor(&meta, &TensorDigest::of(&data), &frames, &checks).unwrap();
            file.extend_from_slice(&data);
        }
        file.extend(writer.finish());
        file
    }

    #[test]
    fn round_trips() {
        let index = ShardIndex::read(&Bytes::from(example())).unwrap();
        assert_eq!(index.codec, Some(CodecId::of("raw")));
        assert_eq!(index.mode, Mode::Delta);
        assert_eq!(index.payload_len(), 303);
        assert_eq!(index.get("layer.1").unwrap().frames.len(), 3);
        assert_eq!(index.get("layer.1").unwrap().checks, [5; 3]);
        assert_eq!(index.get("layer.0.b").unwrap().frames.len(), 0);
    }

    #[test]
    fn every_truncation_and_every_flipped_index_byte_is_refused() {
        let file = example();
        for length in 0..file.len() {
            assert!(ShardIndex::read(&Bytes::copy_from_slice(&file[..length])).is_err(), "{length}");
        }
        for at in (0..8).chain(8 + 303..file.len()) {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(ShardIndex::read(&Bytes::from(bad)).is_err(), "{at}");
        }
    }

    #[test]
    fn shared_prefixes_cannot_blow_the_names_up() {
        let mut writer = ContainerWriter::new(&CodecId::of("raw"), Unit::Whole, None);
        let prefix = "p".repeat(4000);
        for number in 0..1000 {
            let meta = TensorMeta::new(format!("{prefix}{number:04}"), DType::U8, [0]).unwrap();
            writer.tensor(&meta, &TensorDigest::of(b""), &[0], &[5]).unwrap();
        }
        let file = Bytes::from([MAGIC.to_vec(), writer.finish()].concat());
        assert!(ShardIndex::read(&file).unwrap_err().message().contains("blow"));
    }

    #[test]
    fn names_come_sorted() {
        let mut writer = ContainerWriter::new(&CodecId::of("raw"), Unit::Whole, None);
        let meta = |name| TensorMeta::new(name, DType::U8, [0]).unwrap();
        writer.tensor(&meta("b"), &TensorDigest::of(b""), &[0], &[5]).unwrap();
        assert!(writer.tensor(&meta("a"), &TensorDigest::of(b""), &[0], &[5]).is_err());
    }
}
