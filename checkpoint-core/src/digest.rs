//! Digests: XXH3-128 for blocks and tensors (accidents), BLAKE3 for identities.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::{DType, Error, Result};

/// The bytes that one block digest covers.
pub const DIGEST_BLOCK: usize = 1 << 20;

/// XXH3-128 over the big-endian XXH3-128 digests of a tensor's 1 MiB blocks.
///
/// It finds accidents, not attackers. Blocks can be verified and computed in parallel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TensorDigest([u8; 16]);

impl TensorDigest {
    /// The digest of a tensor's bytes.
    #[must_use]
    pub fn of(data: &[u8]) -> Self {
        Self::of_blocks(data.chunks(DIGEST_BLOCK).map(block_digest))
    }

    /// The digest of a tensor from the digests of its blocks, in order.
    pub fn of_blocks(blocks: impl IntoIterator<Item = u128>) -> Self {
        let blocks: Vec<u8> = blocks.into_iter().flat_map(u128::to_be_bytes).collect();
        Self(XxHash3_128::oneshot(&blocks).to_be_bytes())
    }

    /// What a container keeps for each of a tensor's units: the first 4 bytes, big-endian.
    #[must_use]
    pub fn check(&self) -> u32 {
        let [a, b, c, d, ..] = self.0;
        u32::from_be_bytes([a, b, c, d])
    }

    /// A digest read from a file.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The digest as it is written to a file, big-endian.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// XXH3-128 of at most [`DIGEST_BLOCK`] bytes.
#[must_use]
pub fn block_digest(block: &[u8]) -> u128 {
    XxHash3_128::oneshot(block)
}

/// Takes the [`block_digest`] of each block of bytes that come in pieces, of any lengths.
#[derive(Default)]
pub struct BlockHasher {
    done: Vec<u128>,
    open: XxHash3_128,
    /// Bytes in `open`, at most [`DIGEST_BLOCK`].
    filled: usize,
}

impl fmt::Debug for BlockHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockHasher").field("blocks", &self.done.len()).finish_non_exhaustive()
    }
}

impl BlockHasher {
    /// Goes on with `bytes`.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.filled == DIGEST_BLOCK {
                self.close();
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(DIGEST_BLOCK - self.filled));
            self.open.write(piece);
            self.filled += piece.len();
            bytes = rest;
        }
    }

    /// Goes on with `bytes`, whose digest was taken elsewhere perhaps. It counts if they are a block: a whole one, or the
    /// `last` one.
    pub(crate) fn update_known(&mut self, bytes: &[u8], digest: Option<u128>, last: bool) {
        let starts = self.filled.is_multiple_of(DIGEST_BLOCK);
        let ends = bytes.len() == DIGEST_BLOCK || last && (1..DIGEST_BLOCK).contains(&bytes.len());
        let Some(digest) = digest.filter(|_| starts && ends) else { return self.update(bytes) };
        debug_assert_eq!(digest, block_digest(bytes), "a digest that a codec took");
        if self.filled > 0 {
            self.close();
        }
        self.done.push(digest);
    }

    fn close(&mut self) {
        self.done.push(std::mem::take(&mut self.open).finish_128());
        self.filled = 0;
    }

    /// The digest of each block, in order.
    #[must_use]
    pub fn finish(mut self) -> Vec<u128> {
        if self.filled > 0 {
            self.close();
        }
        self.done
    }
}

/// The identity of a set of weights however it is stored: BLAKE3 over the sorted
/// (name, dtype, shape, tensor digest), each field with its length before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContentDigest([u8; 32]);

impl ContentDigest {
    /// The digest of tensors given **sorted by name**, which [`crate::Weights`] and manifests guarantee.
    pub fn of_tensors<'a>(
        tensors: impl IntoIterator<Item = (&'a str, DType, &'a [usize], &'a TensorDigest)>,
    ) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"towline content digest 1\0");
        for (name, dtype, shape, digest) in tensors {
            for field in [name, dtype.as_str()] {
                hasher.update(&(field.len() as u64).to_le_bytes());
                hasher.update(field.as_bytes());
            }
            hasher.update(&(shape.len() as u64).to_le_bytes());
            for &dimension in shape {
                hasher.update(&(dimension as u64).to_le_bytes());
            }
            hasher.update(digest.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// A digest read from a file.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

/// BLAKE3 of a manifest's bytes as they are stored: pins one stored form of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ManifestDigest([u8; 32]);

impl ManifestDigest {
    /// The digest of a manifest's stored bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

macro_rules! hex_text {
    ($name:ident, $length:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                parse_hex(text).map(Self).ok_or_else(|| {
                    let wanted = 2 * $length;
                    Error::invalid(format!(
                        "{} is no digest: wanted {wanted} lower-case hexadecimal digits",
                        crate::id::shown(text)
                    ))
                })
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(digest: $name) -> Self {
                digest.to_string()
            }
        }
    };
}

hex_text!(TensorDigest, 16);
hex_text!(ContentDigest, 32);
hex_text!(ManifestDigest, 32);

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_digested_by_blocks() {
        let data = vec![7; DIGEST_BLOCK + 5];
        let blocks = [block_digest(&data[..DIGEST_BLOCK]), block_digest(&data[DIGEST_BLOCK..])];
        assert_eq!(TensorDigest::of(&data), TensorDigest::of_blocks(blocks));
        for size in [1000, DIGEST_BLOCK, DIGEST_BLOCK + 5] {
            let mut hasher = BlockHasher::default();
            data.chunks(size).for_each(|piece| hasher.update(piece));
            assert_eq!(hasher.finish(), blocks);
        }
        assert_eq!(BlockHasher::default().finish(), []);
        assert_ne!(TensorDigest::of(&data), TensorDigest::of(&data[..DIGEST_BLOCK]));
    }

    #[test]
    fn content_depends_on_every_field() {
        let digest = TensorDigest::of(b"x");
        let base = ContentDigest::of_tensors([("a", DType::F32, &[1usize, 2][..], &digest)]);
        for other in [
            ContentDigest::of_tensors([("b", DType::F32, &[1usize, 2][..], &digest)]),
            ContentDigest::of_tensors([("a", DType::I32, &[1usize, 2][..], &digest)]),
            ContentDigest::of_tensors([("a", DType::F32, &[2usize, 1][..], &digest)]),
            ContentDigest::of_tensors([("a", DType::F32, &[1usize, 2][..], &TensorDigest::of(b"y"))]),
            ContentDigest::of_tensors([]),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn text_round_trips() {
        let digest = TensorDigest::of(b"x");
        assert_eq!(digest.to_string().parse::<TensorDigest>().unwrap(), digest);
        assert!("0".repeat(31).parse::<TensorDigest>().is_err());
        assert!("G".repeat(32).parse::<TensorDigest>().is_err());
    }
}
