//! The frame that the block codecs share.
//!
//! ```text
//! frame:  tag u8 | body
//! tag 0:  the mask is zero; no body
//! tag 1:  the mask as it is, because it does not shrink
//! tag 2:  the mask, compressed
//! ```
//! The mask is `current` for a base and `current XOR parent` for a delta. An empty frame is no frame, so that none
//! can be cut short unseen.

use std::num::NonZeroUsize;

#[cfg(any(feature = "lz4", feature = "zstd"))]
use towline_core::Mode;
use towline_core::{Error, Result, UnitMeta};

#[cfg(any(feature = "lz4", feature = "zstd"))]
use crate::xor::{xor_into, xor_to};

/// The bytes of a unit. A block, its mask and its frame stay in the cache.
pub(crate) const BLOCK: NonZeroUsize = NonZeroUsize::new(256 << 10).unwrap();

#[cfg(any(feature = "lz4", feature = "zstd"))]
const ZERO: u8 = 0;
#[cfg(any(feature = "lz4", feature = "zstd"))]
const STORED: u8 = 1;
#[cfg(any(feature = "lz4", feature = "zstd"))]
const PACKED: u8 = 2;

/// What a frame packs.
#[cfg(any(feature = "lz4", feature = "zstd"))]
#[derive(Clone, Copy)]
pub(crate) enum Mask<'a> {
    /// Bytes as they are.
    Plain(&'a [u8]),
    /// The XOR of two strings of one length.
    Xor(&'a [u8], &'a [u8]),
}

#[cfg(any(feature = "lz4", feature = "zstd"))]
impl<'a> Mask<'a> {
    fn len(self) -> usize {
        match self {
            Self::Plain(bytes) | Self::Xor(bytes, _) => bytes.len(),
        }
    }

    fn is_zero(self) -> bool {
        match self {
            Self::Plain(bytes) => bytes.iter().fold(0, |all, byte| all | byte) == 0,
            Self::Xor(left, right) => left == right,
        }
    }

    /// The bytes, in `buffer` if they are not there yet.
    pub(crate) fn bytes<'b>(self, buffer: &'b mut Vec<u8>) -> &'b [u8]
    where
        'a: 'b,
    {
        match self {
            Self::Plain(bytes) => bytes,
            Self::Xor(left, right) => {
                xor_to(buffer, left, right);
                buffer
            }
        }
    }
}

/// Appends the frame of one unit. `pack` appends the compressed form of what it is given.
#[cfg(any(feature = "lz4", feature = "zstd"))]
pub(crate) fn encode(
    unit: &UnitMeta<'_>,
    parent: Option<&[u8]>,
    current: &[u8],
    out: &mut Vec<u8>,
    pack: impl FnOnce(Mask<'_>, &mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    let mask = match parent {
        None => Mask::Plain(current),
        Some(parent) => {
            check_parent(unit, parent, current)?;
            Mask::Xor(current, parent)
        }
    };
    encode_mask(mask, out, pack)
}

#[cfg(any(feature = "lz4", feature = "zstd"))]
fn encode_mask(
    mask: Mask<'_>,
    out: &mut Vec<u8>,
    pack: impl FnOnce(Mask<'_>, &mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    if mask.is_zero() {
        out.push(ZERO);
        return Ok(());
    }
    let start = out.len();
    out.push(PACKED);
    pack(mask, out)?;
    if out.len() - start > mask.len() {
        out.truncate(start);
        out.push(STORED);
        out.extend_from_slice(mask.bytes(&mut Vec::new()));
    }
    Ok(())
}

/// Appends the frame of the delta that does what the frames `first` and `second` do: the masks cancel where they
/// meet. `unpack_xor` is as for [`decode`], `pack` as for [`encode`].
#[cfg(any(feature = "lz4", feature = "zstd"))]
pub(crate) fn compose(
    unit: &UnitMeta<'_>,
    [first, second]: [&[u8]; 2],
    out: &mut Vec<u8>,
    unpack_xor: impl Fn(&[u8], &mut [u8]) -> Result<()>,
    pack: impl FnOnce(Mask<'_>, &mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    // A mask is what it makes of zeros.
    let mut mask = vec![0; unit.len];
    for frame in [first, second] {
        decode(Mode::Delta, frame, &mut mask, &unpack_xor, &unpack_xor)?;
    }
    encode_mask(Mask::Plain(&mask), out, pack)
}

/// Reads a frame. `unpack` fills its target wholly from the whole of a compressed body, `unpack_xor` XORs it into its
/// target; or they fail.
#[cfg(any(feature = "lz4", feature = "zstd"))]
pub(crate) fn decode(
    mode: Mode,
    encoded: &[u8],
    target: &mut [u8],
    unpack: impl FnOnce(&[u8], &mut [u8]) -> Result<()>,
    unpack_xor: impl FnOnce(&[u8], &mut [u8]) -> Result<()>,
) -> Result<()> {
    let bad = |why: String| Err(Error::corrupt(format!("frame: {why}")).with_help("copy the file again"));
    match (encoded.split_first(), mode) {
        (None, _) => bad("it is empty".into()),
        (Some((&ZERO, [])), Mode::Base) => {
            target.fill(0);
            Ok(())
        }
        (Some((&ZERO, [])), Mode::Delta) => Ok(()),
        (Some((&ZERO, body)), _) => bad(format!("{} bytes behind its end", body.len())),
        (Some((&STORED, body)), _) if body.len() != target.len() => {
            bad(format!("wanted {} stored bytes, found {}", target.len(), body.len()))
        }
        (Some((&STORED, body)), Mode::Base) => {
            target.copy_from_slice(body);
            Ok(())
        }
        (Some((&STORED, body)), Mode::Delta) => {
            xor_into(target, body);
            Ok(())
        }
        (Some((&PACKED, body)), Mode::Base) => unpack(body, target),
        (Some((&PACKED, body)), Mode::Delta) => unpack_xor(body, target),
        (Some((tag, _)), _) => bad(format!("tag {tag} is unknown")),
    }
}

/// A parent must be as long as the current bytes.
pub(crate) fn check_parent(unit: &UnitMeta<'_>, parent: &[u8], current: &[u8]) -> Result<()> {
    if parent.len() == current.len() {
        return Ok(());
    }
    let (name, wanted, found) = (unit.name, current.len(), parent.len());
    Err(Error::invalid(format!("tensor `{name}`: wanted a parent of {wanted} bytes, found {found}"))
        .with_help("give the parent of the same shape, or save a base"))
}
