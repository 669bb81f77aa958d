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
use towline_core::{Error, Mode, Result, UnitMeta};

#[cfg(any(feature = "lz4", feature = "zstd"))]
use crate::xor::{xor_into, xor_to};

/// The bytes of a unit: a multiple of 24 just below 256 KiB. On sparse deltas of real training this packs tighter
/// than 512 KiB, 1 MiB and 2 MiB, and faster: a block, its mask and its frame stay in the cache.
pub(crate) const BLOCK: NonZeroUsize = NonZeroUsize::new(24 * 10_922).unwrap();

#[cfg(any(feature = "lz4", feature = "zstd"))]
const ZERO: u8 = 0;
#[cfg(any(feature = "lz4", feature = "zstd"))]
const STORED: u8 = 1;
#[cfg(any(feature = "lz4", feature = "zstd"))]
const PACKED: u8 = 2;

/// Appends the frame of one unit. `pack` returns the compressed form of what it is given.
#[cfg(any(feature = "lz4", feature = "zstd"))]
pub(crate) fn encode(
    unit: &UnitMeta<'_>,
    parent: Option<&[u8]>,
    current: &[u8],
    out: &mut Vec<u8>,
    pack: impl FnOnce(&[u8]) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut buffer = Vec::new();
    let mask = match parent {
        None => current,
        Some(parent) => {
            check_parent(unit, parent, current)?;
            if parent == current {
                out.push(ZERO);
                return Ok(());
            }
            xor_to(&mut buffer, current, parent);
            &buffer
        }
    };
    if mask.iter().all(|&byte| byte == 0) {
        out.push(ZERO);
        return Ok(());
    }
    let packed = pack(mask)?;
    let (tag, body) = if packed.len() < mask.len() { (PACKED, &packed[..]) } else { (STORED, mask) };
    out.reserve_exact(1 + body.len());
    out.push(tag);
    out.extend_from_slice(body);
    Ok(())
}

/// Reads a frame. `unpack` fills its target wholly from the whole of a compressed body, or fails.
#[cfg(any(feature = "lz4", feature = "zstd"))]
pub(crate) fn decode(
    mode: Mode,
    encoded: &[u8],
    target: &mut [u8],
    unpack: impl FnOnce(&[u8], &mut [u8]) -> Result<()>,
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
        (Some((&PACKED, body)), Mode::Delta) => {
            let mut mask = vec![0; target.len()];
            unpack(body, &mut mask)?;
            xor_into(target, &mask);
            Ok(())
        }
        (Some((tag, _)), _) => bad(format!("tag {tag} is unknown")),
    }
}

/// A parent must be as long as the current bytes.
#[cfg(any(feature = "lz4", feature = "zstd"))]
pub(crate) fn check_parent(unit: &UnitMeta<'_>, parent: &[u8], current: &[u8]) -> Result<()> {
    if parent.len() == current.len() {
        return Ok(());
    }
    let (name, wanted, found) = (unit.name, current.len(), parent.len());
    Err(Error::invalid(format!("tensor `{name}`: wanted a parent of {wanted} bytes, found {found}"))
        .with_help("give the parent of the same shape, or save a base"))
}
