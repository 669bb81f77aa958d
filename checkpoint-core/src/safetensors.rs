//! safetensors files, read tensor by tensor from any bytes that can be read at an offset.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use safetensors::tensor::Metadata;
use serde::Serialize;
use serde::ser::SerializeMap;

use crate::id::shown;
use crate::{DType, Error, Result, TensorMeta, TensorSource};

/// The largest header that is read, in bytes: the limit of the format's own library.
pub const MAX_HEADER: u64 = 100_000_000;

/// Bytes of known length that can be read at an offset: a file, a buffer, a mapped region.
pub trait ByteSource: Send + Sync {
    /// The length in bytes.
    fn len(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// `Corrupt` if it ends before the buffer is full; else what the medium answers.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads `range` into a new buffer, after checking it against the length, so that a false length
    /// allocates nothing.
    ///
    /// # Errors
    /// `Corrupt` if the range does not lie within the bytes; else as [`ByteSource::read_at`].
    fn read_range(&self, range: Range<u64>) -> Result<Bytes> {
        if range.start > range.end || range.end > self.len() {
            return Err(Error::corrupt(format!("wanted bytes {range:?}, found {} in all", self.len())));
        }
        let length = usize::try_from(range.end - range.start).map_err(|_| {
            Error::unsupported(format!("bytes {range:?} do not fit in this machine's memory"))
        })?;
        let mut buffer = vec![0; length];
        self.read_at(range.start, &mut buffer)?;
        Ok(buffer.into())
    }
}

impl ByteSource for Bytes {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let found = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .ok_or_else(|| {
                Error::corrupt(format!("wanted {} bytes at {offset}, found the end", buffer.len()))
            })?;
        buffer.copy_from_slice(found);
        Ok(())
    }
}

/// One tensor's place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// Name, element type and shape.
    pub meta: TensorMeta,
    /// The first byte and the one after the last, counted from the start of the file.
    pub range: Range<u64>,
}

/// The header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// The tensors, sorted by name.
    pub entries: Vec<Entry>,
    /// The text map `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Parses the header of a file of `file_len` bytes from its JSON (without the 8 length bytes).
    ///
    /// # Errors
    /// `Corrupt` if the JSON is not a header, tensors overlap or leave gaps, a length disagrees with its shape, or
    /// the file is longer or shorter than the header says.
    pub fn parse(json: &[u8], file_len: u64) -> Result<Self> {
        let bad = |why: String| Error::corrupt(format!("no safetensors header: {why}"));
        let parsed: Metadata = serde_json::from_slice(json).map_err(|error| {
            bad("the JSON does not describe contiguous tensors".into()).with_source(error)
        })?;
        let data_start = 8 + json.len() as u64;
        let expected = data_start + parsed.data_len() as u64;
        if expected != file_len {
            return Err(bad(format!("it describes a file of {expected} bytes, found {file_len}"))
                .with_help("copy the file again: it is cut short or has bytes behind its end"));
        }
        let mut entries = Vec::new();
        for (name, info) in parsed.tensors() {
            let dtype: DType = serde_json::to_value(info.dtype)
                .ok()
                .and_then(|value| value.as_str().and_then(|text| text.parse().ok()))
                .ok_or_else(|| bad(format!("{} has an unknown dtype", shown(&name))))?;
            let meta = TensorMeta::new(name, dtype, info.shape.clone())
                .map_err(|error| bad(error.message().to_owned()))?;
            let (start, end) = info.data_offsets;
            entries.push(Entry { meta, range: data_start + start as u64..data_start + end as u64 });
        }
        entries.sort_by(|left, right| left.meta.name().cmp(right.meta.name()));
        let metadata = parsed.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { entries, metadata })
    }

    /// Reads the header of `source`.
    ///
    /// # Errors
    /// As [`Header::parse`]; a header above [`MAX_HEADER`] or above the file is `Corrupt` before anything is
    /// allocated.
    pub fn read(source: &dyn ByteSource) -> Result<Self> {
        let length = header_len(source)?;
        let json = source.read_range(8..8 + length)?;
        Self::parse(&json, source.len())
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Entry> {
        let index = self.entries.binary_search_by(|entry| entry.meta.name().cmp(name)).ok()?;
        self.entries.get(index)
    }

    /// The bytes that stand before the data of `tensors` stored in the given order: the length, the JSON, and
    /// spaces up to a multiple of 8. Equal input gives equal bytes.
    ///
    /// # Errors
    /// `Invalid` if the header is larger than [`MAX_HEADER`].
    pub fn encode(tensors: &[TensorMeta], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(&HeaderJson { tensors, metadata }).map_err(|error| {
            Error::internal("a safetensors header could not be written").with_source(error)
        })?;
        let padded = json.len().next_multiple_of(8);
        if padded as u64 > MAX_HEADER {
            return Err(Error::invalid(format!(
                "a safetensors header of {padded} bytes is above {MAX_HEADER}"
            ))
            .with_help("write more shards"));
        }
        let mut bytes = Vec::with_capacity(8 + padded);
        bytes.extend_from_slice(&(padded as u64).to_le_bytes());
        bytes.extend_from_slice(&json);
        bytes.resize(8 + padded, b' ');
        Ok(bytes)
    }
}

/// The order in which tensors stand in a file: widest elements first, then by name, so that every tensor is
/// aligned to its element size, as the format's own library does it.
#[must_use]
pub fn layout(tensors: &[TensorMeta]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| {
        tensors.get(index).map(|meta| (std::cmp::Reverse(meta.dtype().bits()), meta.name().to_owned()))
    });
    order
}

/// A whole file in memory, for small sets of tensors.
///
/// # Errors
/// As [`Header::encode`] and [`TensorSource::read`].
pub fn serialize(source: &dyn TensorSource, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let order = layout(source.tensors());
    let metas: Vec<_> = order.iter().filter_map(|&index| source.tensors().get(index).cloned()).collect();
    let mut bytes = Header::encode(&metas, metadata)?;
    for index in order {
        bytes.extend_from_slice(&source.read(index)?);
    }
    Ok(bytes)
}

/// One or more safetensors files as one set of tensors, read one at a time.
#[derive(Debug)]
pub struct SafetensorsFiles<S> {
    sources: Vec<S>,
    tensors: Vec<TensorMeta>,
    places: Vec<(usize, Range<u64>)>,
    metadata: Vec<BTreeMap<String, String>>,
}

impl<S: ByteSource> SafetensorsFiles<S> {
    /// Reads the headers of `sources`.
    ///
    /// # Errors
    /// As [`Header::read`]; `Corrupt` if a tensor stands in two files.
    pub fn open(sources: Vec<S>) -> Result<Self> {
        let mut found = Vec::new();
        let mut metadata = Vec::new();
        for (number, source) in sources.iter().enumerate() {
            let header = Header::read(source)?;
            found.extend(header.entries.into_iter().map(|entry| (entry.meta, (number, entry.range))));
            metadata.push(header.metadata);
        }
        found.sort_by(|(left, _), (right, _)| left.name().cmp(right.name()));
        for pair in found.windows(2) {
            if let [(left, _), (right, _)] = pair
                && left.name() == right.name()
            {
                return Err(Error::corrupt(format!("tensor {} stands in two files", shown(left.name()))));
            }
        }
        let (tensors, places) = found.into_iter().unzip();
        Ok(Self { sources, tensors, places, metadata })
    }

    /// The text maps `__metadata__` of the files, in the order of the sources.
    #[must_use]
    pub fn metadata(&self) -> &[BTreeMap<String, String>] {
        &self.metadata
    }
}

impl<S: ByteSource> TensorSource for SafetensorsFiles<S> {
    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        let place =
            self.places.get(index).and_then(|(number, range)| Some((self.sources.get(*number)?, range)));
        let (source, range) = place.ok_or_else(|| {
            Error::invalid(format!("tensor {index} of {} was asked for", self.places.len()))
        })?;
        source.read_range(range.clone())
    }

    fn read_range(&self, index: usize, part: Range<usize>) -> Result<Bytes> {
        let place =
            self.places.get(index).and_then(|(number, range)| Some((self.sources.get(*number)?, range)));
        let (source, range) = place.ok_or_else(|| {
            Error::invalid(format!("tensor {index} of {} was asked for", self.places.len()))
        })?;
        let (start, end) = (range.start + part.start as u64, range.start + part.end as u64);
        if start > end || end > range.end {
            return Err(Error::invalid(format!("bytes {part:?} of a tensor in {range:?} were asked for")));
        }
        source.read_range(start..end)
    }
}

fn header_len(source: &dyn ByteSource) -> Result<u64> {
    if source.len() < 8 {
        return Err(Error::corrupt(format!(
            "no safetensors file: wanted 8 length bytes, found {} in all",
            source.len()
        )));
    }
    let mut bytes = [0; 8];
    source.read_at(0, &mut bytes)?;
    let length = u64::from_le_bytes(bytes);
    if length > MAX_HEADER || length > source.len() - 8 {
        return Err(Error::corrupt(format!(
            "no safetensors file: a header of {length} bytes in a file of {} (at most {MAX_HEADER} are read)",
            source.len()
        )));
    }
    Ok(length)
}

struct HeaderJson<'a> {
    tensors: &'a [TensorMeta],
    metadata: &'a BTreeMap<String, String>,
}

impl Serialize for HeaderJson<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Info<'a> {
            dtype: DType,
            shape: &'a [usize],
            data_offsets: (u64, u64),
        }
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", self.metadata)?;
        }
        let mut start = 0;
        for meta in self.tensors {
            let end = start + meta.byte_len() as u64;
            let info = Info { dtype: meta.dtype(), shape: meta.shape(), data_offsets: (start, end) };
            map.serialize_entry(meta.name(), &info)?;
            start = end;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Weights;

    fn example() -> Weights {
        let tensor = |name: &str, dtype: DType, shape: &[usize]| {
            let meta = TensorMeta::new(name, dtype, shape).unwrap();
            let data: Vec<u8> = (0..meta.byte_len()).map(|byte| byte as u8).collect();
            (meta, Bytes::from(data))
        };
        Weights::new([
            tensor("z", DType::F32, &[2, 3]),
            tensor("a", DType::BF16, &[3]),
            tensor("m", DType::F4, &[4]),
            tensor("e", DType::U8, &[0]),
            tensor("scalar", DType::F64, &[]),
        ])
        .unwrap()
    }

    #[test]
    fn round_trips_and_the_safetensors_crate_reads_it() {
        let weights = example();
        let metadata = BTreeMap::from([("k".to_owned(), "v".to_owned())]);
        let bytes = Bytes::from(serialize(&weights, &metadata).unwrap());
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("z").unwrap().data(), weights.get("z").unwrap().1.as_ref());
        let ours = SafetensorsFiles::open(vec![bytes]).unwrap();
        assert_eq!(Weights::read_all(&ours).unwrap(), weights);
        assert_eq!(ours.metadata()[0], metadata);
    }

    #[test]
    fn every_truncation_and_a_longer_file_are_refused() {
        let bytes = serialize(&example(), &BTreeMap::new()).unwrap();
        for length in 0..bytes.len() {
            assert!(
                SafetensorsFiles::open(vec![Bytes::copy_from_slice(&bytes[..length])]).is_err(),
                "{length}"
            );
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(SafetensorsFiles::open(vec![Bytes::from(longer)]).is_err());
    }

    #[test]
    fn false_lengths_allocate_nothing() {
        for length in [u64::MAX, MAX_HEADER + 1, 1 << 40, 9] {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend_from_slice(b"{}");
            let error = Header::read(&Bytes::from(bytes)).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Corrupt);
        }
    }

    #[test]
    fn a_tensor_in_two_files_is_refused() {
        let bytes = Bytes::from(serialize(&example(), &BTreeMap::new()).unwrap());
        let error = SafetensorsFiles::open(vec![bytes.clone(), bytes]).unwrap_err();
        assert!(error.message().contains("two files"));
    }
}
