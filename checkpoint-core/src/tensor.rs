//! Tensors as named, typed, shaped bytes; sets of them; and where they are read from.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::id::shown;
use crate::{ContentDigest, DType, Error, Result, TensorDigest};

/// The longest tensor name in bytes.
const MAX_TENSOR_NAME: usize = 4096;

/// A tensor's name, element type and shape, with a length in bytes that is known to be whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorMeta {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    byte_len: usize,
}

impl TensorMeta {
    /// Checks the name and the length.
    ///
    /// # Errors
    /// `Invalid` if the name is empty, longer than 4096 bytes, or `__metadata__` (which safetensors reserves), or
    /// if the length overflows or is not a whole number of bytes.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Result<Self> {
        let (name, shape) = (name.into(), shape.into());
        if name.is_empty() || name.len() > MAX_TENSOR_NAME || name == "__metadata__" {
            return Err(Error::invalid(format!(
                "{} is no tensor name: wanted 1 to {MAX_TENSOR_NAME} bytes, and not `__metadata__`",
                shown(&name)
            )));
        }
        let byte_len = dtype.byte_len(&shape).map_err(|error| error.context(shown(&name)))?;
        Ok(Self { name, dtype, shape, byte_len })
    }

    /// The tensor's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The dimensions; empty for a scalar.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The length in bytes.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.byte_len
    }

    /// The number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A set of tensors, read one at a time, so that it may be larger than memory.
pub trait TensorSource: Send + Sync {
    /// Every tensor, sorted by name, each name once.
    fn tensors(&self) -> &[TensorMeta];

    /// The bytes of tensor `index` of [`TensorSource::tensors`], little-endian and contiguous.
    ///
    /// # Errors
    /// `Invalid` for an index out of range, `Corrupt` or `Unavailable` as the place it is read from answers.
    fn read(&self, index: usize) -> Result<Bytes>;

    /// A part of tensor `index`, for tensors that are larger than memory. By default the whole is read; a source
    /// whose reads are not free does better.
    ///
    /// # Errors
    /// As [`TensorSource::read`]; `Invalid` for a range that is not within the tensor.
    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        let whole = self.read(index)?;
        if range.start > range.end || range.end > whole.len() {
            return Err(Error::invalid(format!(
                "bytes {range:?} of a tensor of {} were asked for",
                whole.len()
            )));
        }
        Ok(whole.slice(range))
    }

    /// Where the digest of tensor `index` is kept once it is known, for bytes that never change. It is then taken once,
    /// though the weights of one step are the parent of the next. Default: nowhere.
    fn digest(&self, _index: usize) -> Option<&OnceLock<TensorDigest>> {
        None
    }
}

impl<T: TensorSource + ?Sized> TensorSource for &T {
    fn tensors(&self) -> &[TensorMeta] {
        (**self).tensors()
    }
    fn read(&self, index: usize) -> Result<Bytes> {
        (**self).read(index)
    }
    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        (**self).read_range(index, range)
    }
    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        (**self).digest(index)
    }
}

impl<T: TensorSource + ?Sized> TensorSource for Arc<T> {
    fn tensors(&self) -> &[TensorMeta] {
        (**self).tensors()
    }
    fn read(&self, index: usize) -> Result<Bytes> {
        (**self).read(index)
    }
    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        (**self).read_range(index, range)
    }
    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        (**self).digest(index)
    }
}

/// The position of `name` in tensors sorted by name.
#[must_use]
pub fn position(tensors: &[TensorMeta], name: &str) -> Option<usize> {
    tensors.binary_search_by(|meta| meta.name().cmp(name)).ok()
}

/// Compares two tensor sets by name, dtype and shape.
///
/// # Errors
/// `Invalid`, naming the first missing, unexpected or differing tensor.
pub fn same_tensors(wanted: &[TensorMeta], found: &[TensorMeta]) -> Result<()> {
    for meta in wanted {
        match position(found, meta.name()).and_then(|index| found.get(index)) {
            None => return Err(Error::invalid(format!("tensor {} is missing", shown(meta.name())))),
            Some(other) if other != meta => {
                return Err(Error::invalid(format!(
                    "tensor {}: wanted {} {:?}, found {} {:?}",
                    shown(meta.name()),
                    meta.dtype(),
                    meta.shape(),
                    other.dtype(),
                    other.shape()
                )));
            }
            Some(_) => {}
        }
    }
    match found.iter().find(|meta| position(wanted, meta.name()).is_none()) {
        Some(extra) => Err(Error::invalid(format!("tensor {} is not expected", shown(extra.name())))),
        None => Ok(()),
    }
}

/// A set of tensors in memory, sorted by name. Cloning shares the bytes, and what is known of their digests.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: Vec<TensorMeta>,
    data: Vec<Bytes>,
    digests: Arc<[OnceLock<TensorDigest>]>,
}

impl PartialEq for Weights {
    fn eq(&self, other: &Self) -> bool {
        self.tensors == other.tensors && self.data == other.data
    }
}

impl Eq for Weights {}

impl Weights {
    /// A set from tensors in any order.
    ///
    /// # Errors
    /// `Invalid` for a name that stands twice or data of another length than the shape says.
    pub fn new(tensors: impl IntoIterator<Item = (TensorMeta, Bytes)>) -> Result<Self> {
        let mut tensors: Vec<_> = tensors.into_iter().collect();
        tensors.sort_by(|(left, _), (right, _)| left.name().cmp(right.name()));
        for pair in tensors.windows(2) {
            if let [(left, _), (right, _)] = pair
                && left.name() == right.name()
            {
                return Err(Error::invalid(format!("tensor {} stands twice", shown(left.name()))));
            }
        }
        for (meta, data) in &tensors {
            if meta.byte_len() != data.len() {
                return Err(Error::invalid(format!(
                    "tensor {}: {} {:?} has {} bytes, found {}",
                    shown(meta.name()),
                    meta.dtype(),
                    meta.shape(),
                    meta.byte_len(),
                    data.len()
                )));
            }
        }
        let digests = tensors.iter().map(|_| OnceLock::new()).collect();
        let (tensors, data) = tensors.into_iter().unzip();
        Ok(Self { tensors, data, digests })
    }

    /// Reads every tensor of `source`.
    ///
    /// # Errors
    /// What the source answers.
    pub fn read_all(source: &dyn TensorSource) -> Result<Self> {
        let data = (0..source.tensors().len()).map(|index| source.read(index)).collect::<Result<Vec<_>>>()?;
        Self::new(source.tensors().iter().cloned().zip(data))
    }

    /// Every tensor, sorted by name.
    #[must_use]
    pub fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    /// Tensors with their bytes, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorMeta, &Bytes)> {
        self.tensors.iter().zip(&self.data)
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(&TensorMeta, &Bytes)> {
        let index = position(&self.tensors, name)?;
        Some((self.tensors.get(index)?, self.data.get(index)?))
    }

    /// The bytes of all tensors together.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.tensors.iter().map(|meta| meta.byte_len() as u64).sum()
    }

    /// The identity of this set of weights. Reads every byte whose digest is not known.
    #[must_use]
    pub fn content_digest(&self) -> ContentDigest {
        let digests = self.digests.iter().zip(&self.data);
        let digests = digests.map(|(digest, data)| digest.get_or_init(|| TensorDigest::of(data)));
        ContentDigest::of_tensors(
            self.tensors
                .iter()
                .zip(digests)
                .map(|(meta, digest)| (meta.name(), meta.dtype(), meta.shape(), digest)),
        )
    }
}

impl TensorSource for Weights {
    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        self.data
            .get(index)
            .cloned()
            .ok_or_else(|| Error::invalid(format!("tensor {index} of {} was asked for", self.data.len())))
    }

    fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
        self.digests.get(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, bytes: &'static [u8]) -> (TensorMeta, Bytes) {
        (TensorMeta::new(name, DType::U8, [bytes.len()]).unwrap(), Bytes::from_static(bytes))
    }

    #[test]
    fn order_does_not_matter_and_names_are_unique() {
        let one = Weights::new([tensor("b", b"2"), tensor("a", b"1")]).unwrap();
        let two = Weights::new([tensor("a", b"1"), tensor("b", b"2")]).unwrap();
        assert_eq!(one.content_digest(), two.content_digest());
        assert_eq!(one.get("b").unwrap().1.as_ref(), b"2");
        assert!(Weights::new([tensor("a", b"1"), tensor("a", b"2")]).is_err());
        let short = TensorMeta::new("a", DType::F32, [2]).unwrap();
        assert!(Weights::new([(short, Bytes::from_static(b"123"))]).is_err());
    }

    #[test]
    fn differences_between_sets_are_named() {
        let wanted = [TensorMeta::new("a", DType::F32, [2]).unwrap()];
        let other = [TensorMeta::new("a", DType::F32, [3]).unwrap()];
        assert!(same_tensors(&wanted, &wanted).is_ok());
        assert!(same_tensors(&wanted, &[]).unwrap_err().message().contains("missing"));
        assert!(same_tensors(&[], &wanted).unwrap_err().message().contains("not expected"));
        assert!(same_tensors(&wanted, &other).unwrap_err().message().contains("[3]"));
    }
}
