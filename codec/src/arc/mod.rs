//! The public formats arc_v1, arc_v2 and arc_v3, as the package `fireworks-delta-compression` reads and writes
//! them.

mod apply;
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

use std::io;

use simd_adler32::Adler32;
use towline_core::{Error, Result, UnitMeta};

use crate::xor::xor_to;

/// The bytes that are XORed, compressed or decompressed at a time.
const CHUNK: usize = 64 << 10;

/// The checksum of the arc formats, of a new tensor's bytes.
fn adler(data: &[u8]) -> u32 {
    let mut hash = Adler32::new();
    hash.write(data);
    hash.finish()
}

/// Hands `current XOR parent` to `sink`, a chunk at a time.
fn xor_chunks(parent: &[u8], current: &[u8], sink: &mut dyn io::Write) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(CHUNK.min(current.len()));
    for (new, old) in current.chunks(CHUNK).zip(parent.chunks(CHUNK)) {
        xor_to(&mut buffer, new, old);
        sink.write_all(&buffer)?;
    }
    Ok(())
}

/// The parent's bytes, checked: the arc formats encode deltas only.
fn parent_of<'a>(unit: &UnitMeta<'_>, parent: Option<&'a [u8]>, current: &[u8]) -> Result<&'a [u8]> {
    let parent = unit.parent(parent)?;
    crate::block::check_parent(unit, parent, current)?;
    Ok(parent)
}

/// How far a counter of bytes of a decoder moved. Each call moves within a slice, so it fits.
fn moved(before: u64, after: u64) -> usize {
    usize::try_from(after - before).unwrap_or(usize::MAX)
}

fn cannot_write(error: io::Error) -> Error {
    Error::internal("a frame could not be compressed").with_source(error)
}
