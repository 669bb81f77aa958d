//! The public formats arc_v1, arc_v2 and arc_v3, as the package `fireworks-delta-compression` reads and writes
//! them.

mod apply;
mod changes;
mod deflate;
mod envelope;
mod layout;
mod opcodes;
mod pickle;
mod pickler;
mod streams;
mod v1;
mod v2;
mod v3;
mod writer;

pub use v1::ArcV1;
pub use v2::ArcV2;
pub use v3::ArcV3;

use simd_adler32::Adler32;
use towline_core::{Codec, Mode, Result, UnitMeta};

/// The bytes that are decompressed at a time.
const CHUNK: usize = 64 << 10;

/// The checksum of the arc formats, of a new tensor's bytes.
fn adler(data: &[u8]) -> u32 {
    adler_of_more(None, data)
}

/// The checksum of what has the checksum `before`, and `more`.
fn adler_of_more(before: Option<u32>, more: &[u8]) -> u32 {
    let mut hash = before.map_or_else(Adler32::new, Adler32::from_checksum);
    hash.write(more);
    hash.finish()
}

/// The parent's bytes, checked: the arc formats encode deltas only.
fn parent_of<'a>(unit: &UnitMeta<'_>, parent: Option<&'a [u8]>, current: &[u8]) -> Result<&'a [u8]> {
    let parent = unit.parent(parent)?;
    crate::block::check_parent(unit, parent, current)?;
    Ok(parent)
}

/// The mask that does what the masks in two frames of `codec` do, one after the other.
fn joined_mask(codec: &dyn Codec, unit: &UnitMeta<'_>, first: &[u8], second: &[u8]) -> Result<Vec<u8>> {
    // A mask is what it makes of zeros.
    let mut mask = vec![0; unit.len];
    for frame in [first, second] {
        codec.decode(unit, Mode::Delta, frame, &mut mask)?;
    }
    Ok(mask)
}

/// How far a counter of bytes of a decoder moved. Each call moves within a slice, so it fits.
fn moved(before: u64, after: u64) -> usize {
    usize::try_from(after - before).unwrap_or(usize::MAX)
}
