//! The checksums of new tensors.

use std::fmt;
use std::str::FromStr;

use simd_adler32::Adler32;
use towline_core::{Error, Result};
use twox_hash::XxHash3_128;

/// How the new bytes of a tensor are digested: `checksum_format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Checksum {
    /// XXH3-128 in big-endian hexadecimal digits. It finds accidents, not attackers.
    #[default]
    Xxh3,
    /// BLAKE3, for folders that others can write to.
    Blake3,
    /// Adler-32, for systems that expect it. It misses more accidents than the others.
    Adler32,
}

impl Checksum {
    /// Every checksum.
    pub const ALL: [Self; 3] = [Self::Xxh3, Self::Blake3, Self::Adler32];

    /// The name in an index.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Xxh3 => "xxh3-128",
            Self::Blake3 => "blake3",
            Self::Adler32 => "adler32",
        }
    }

    /// The checksum of `bytes` as a shard has it: lower-case hexadecimal digits.
    #[must_use]
    pub fn of(self, bytes: &[u8]) -> String {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The digits of one.
    fn digits(self) -> usize {
        match self {
            Self::Xxh3 => 32,
            Self::Blake3 => 64,
            Self::Adler32 => 8,
        }
    }

    /// Whether `text` could be one.
    pub(super) fn takes(self, text: &str) -> bool {
        text.len() == self.digits() && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }

    pub(super) fn hasher(self) -> Hasher {
        match self {
            Self::Xxh3 => Hasher::Xxh3(Box::default()),
            Self::Blake3 => Hasher::Blake3(Box::default()),
            Self::Adler32 => Hasher::Adler32(Adler32::new()),
        }
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Checksum {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|checksum| checksum.as_str() == text).ok_or_else(|| {
            Error::unsupported(format!(
                "checksum `{}`: wanted xxh3-128, blake3 or adler32",
                text.escape_debug()
            ))
            .with_help("write the folder with one of these")
        })
    }
}

/// A checksum that grows.
pub(super) enum Hasher {
    Xxh3(Box<XxHash3_128>),
    Blake3(Box<blake3::Hasher>),
    Adler32(Adler32),
}

impl Hasher {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Xxh3(hasher) => hasher.write(bytes),
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
            Self::Adler32(hasher) => hasher.write(bytes),
        }
    }

    pub(super) fn finish(self) -> String {
        match self {
            Self::Xxh3(hasher) => format!("{:032x}", hasher.finish_128()),
            Self::Blake3(hasher) => hasher.finalize().to_hex().to_string(),
            Self::Adler32(hasher) => format!("{:08x}", hasher.finish()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_the_python_packages() {
        // xxhash.xxh3_128(b"").hexdigest(), blake3.blake3(b"").hexdigest(), zlib.adler32(b"").
        assert_eq!(Checksum::Xxh3.of(b""), "99aa06d3014798d86001c324468d497f");
        assert_eq!(
            Checksum::Blake3.of(b""),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
        assert_eq!(Checksum::Adler32.of(b""), "00000001");
        for checksum in Checksum::ALL {
            assert_eq!(checksum.as_str().parse::<Checksum>().unwrap(), checksum);
            assert!(checksum.takes(&checksum.of(b"x")) && !checksum.takes("0") && !checksum.takes(""));
            assert!(!checksum.takes(&checksum.of(b"x").to_uppercase().replace('0', "A")));
        }
        assert!("alder32".parse::<Checksum>().is_err());
    }
}
