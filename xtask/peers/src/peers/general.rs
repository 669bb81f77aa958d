//! General compressors behind an XOR with the parent, or on the plain bytes of a base.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use towline_core::{Mode, Result};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

use super::{Kind, Part, Peer, Scratch, broken};

/// zstd at one level, on parts of one size.
#[derive(Debug)]
pub(super) struct Zstd {
    pub(super) id: &'static str,
    pub(super) level: i32,
    pub(super) cut: usize,
}

impl Peer for Zstd {
    fn id(&self) -> &'static str {
        self.id
    }

    fn cut(&self, _: usize) -> usize {
        self.cut
    }

    fn encode(&self, part: &Part<'_>, scratch: &mut Scratch, out: &mut Vec<u8>) -> Result<()> {
        let mut plain = std::mem::take(&mut scratch.plain);
        let done = pack(difference(part, &mut plain), self.level, scratch, out);
        scratch.plain = plain;
        done.map(|_| ())
    }

    fn decode(&self, kind: Kind, encoded: &[u8], scratch: &mut Scratch, target: &mut [u8]) -> Result<()> {
        if kind.mode == Mode::Base {
            return unpack(encoded, scratch, target);
        }
        let mut plain = std::mem::take(&mut scratch.plain);
        plain.resize(target.len(), 0);
        let done = unpack(encoded, scratch, &mut plain);
        apply(target, &plain);
        scratch.plain = plain;
        done
    }
}

/// The first bytes of all elements, then the second, and so on, each plane with zstd-1.
#[derive(Debug)]
pub(super) struct Planes;

/// Parts large enough that their borders cost nothing, small enough for two threads to share one tensor.
const PLANES: usize = 4 << 20;

impl Peer for Planes {
    fn id(&self) -> &'static str {
        "byteplane+zstd-1"
    }

    fn cut(&self, _: usize) -> usize {
        PLANES
    }

    fn encode(&self, part: &Part<'_>, scratch: &mut Scratch, out: &mut Vec<u8>) -> Result<()> {
        let (mut plain, mut planes) = (std::mem::take(&mut scratch.plain), std::mem::take(&mut scratch.more));
        let bytes = difference(part, &mut plain);
        planes.resize(bytes.len(), 0);
        match part.kind.width() {
            1 => planes.copy_from_slice(bytes),
            2 => split::<2>(bytes, &mut planes),
            4 => split::<4>(bytes, &mut planes),
            _ => split::<8>(bytes, &mut planes),
        }
        let mut done = Ok(());
        for plane in planes.chunks((bytes.len() / part.kind.width()).max(1)) {
            let start = out.len();
            out.extend_from_slice(&[0; 4]);
            done = done.and(pack(plane, 1, scratch, out).map(|length| put_length(out, start, length)));
        }
        (scratch.plain, scratch.more) = (plain, planes);
        done
    }

    fn decode(&self, kind: Kind, encoded: &[u8], scratch: &mut Scratch, target: &mut [u8]) -> Result<()> {
        let (mut plain, mut planes) = (std::mem::take(&mut scratch.plain), std::mem::take(&mut scratch.more));
        planes.resize(target.len(), 0);
        plain.resize(target.len(), 0);
        let mut rest = encoded;
        for plane in planes.chunks_mut((target.len() / kind.width()).max(1)) {
            let frame = take_frame(&mut rest)?;
            unpack(frame, scratch, plane)?;
        }
        let bytes = if kind.mode == Mode::Base { &mut *target } else { plain.as_mut_slice() };
        match kind.width() {
            1 => bytes.copy_from_slice(&planes),
            2 => join::<2>(&planes, bytes),
            4 => join::<4>(&planes, bytes),
            _ => join::<8>(&planes, bytes),
        }
        if kind.mode == Mode::Delta {
            apply(target, &plain);
        }
        (scratch.plain, scratch.more) = (plain, planes);
        Ok(())
    }
}

/// LZ4 in blocks of 256 KiB; its window is smaller than that.
#[derive(Debug)]
pub(super) struct Lz4;

impl Peer for Lz4 {
    fn id(&self) -> &'static str {
        "lz4_flex"
    }

    fn cut(&self, _: usize) -> usize {
        256 << 10
    }

    fn encode(&self, part: &Part<'_>, scratch: &mut Scratch, out: &mut Vec<u8>) -> Result<()> {
        let bytes = difference(part, &mut scratch.plain);
        // Not cleared: what is left of the part before is overwritten.
        let bound = get_maximum_output_size(bytes.len());
        scratch.packed.resize(scratch.packed.len().max(bound), 0);
        let table = scratch.table.get_or_insert_with(CompressTable::large);
        let length = compress_into_with_table(bytes, &mut scratch.packed, table)
            .map_err(|error| broken("lz4_flex", error))?;
        out.extend_from_slice(scratch.packed.get(..length).unwrap_or_default());
        Ok(())
    }

    fn decode(&self, kind: Kind, encoded: &[u8], scratch: &mut Scratch, target: &mut [u8]) -> Result<()> {
        let into = |bytes: &mut [u8]| match decompress_into(encoded, bytes) {
            Ok(length) if length == bytes.len() => Ok(()),
            Ok(length) => Err(broken("lz4_flex", format!("wanted {} bytes, found {length}", bytes.len()))),
            Err(error) => Err(broken("lz4_flex", error)),
        };
        if kind.mode == Mode::Base {
            return into(target);
        }
        scratch.plain.resize(target.len(), 0);
        into(&mut scratch.plain)?;
        apply(target, &scratch.plain);
        Ok(())
    }
}

/// What is compressed: the XOR of both, or the plain bytes of a base.
fn difference<'a>(part: &Part<'a>, plain: &'a mut Vec<u8>) -> &'a [u8] {
    if part.kind.mode == Mode::Base {
        return part.current;
    }
    plain.clear();
    plain.extend(part.current.iter().zip(part.parent).map(|(new, old)| new ^ old));
    plain
}

fn apply(target: &mut [u8], mask: &[u8]) {
    target.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
}

/// Appends a zstd frame of `bytes` and returns its length.
pub(super) fn pack(bytes: &[u8], level: i32, scratch: &mut Scratch, out: &mut Vec<u8>) -> Result<usize> {
    let compressor = match &mut scratch.compressor {
        Some(compressor) => compressor,
        none => none.insert(Compressor::new(level).map_err(|error| broken("zstd", error))?),
    };
    scratch.packed.clear();
    scratch.packed.reserve(compress_bound(bytes.len()));
    let length =
        compressor.compress_to_buffer(bytes, &mut scratch.packed).map_err(|error| broken("zstd", error))?;
    out.extend_from_slice(&scratch.packed);
    Ok(length)
}

/// Decodes a zstd frame that fills `bytes`.
pub(super) fn unpack(frame: &[u8], scratch: &mut Scratch, bytes: &mut [u8]) -> Result<()> {
    let decompressor = match &mut scratch.decompressor {
        Some(decompressor) => decompressor,
        none => none.insert(Decompressor::new().map_err(|error| broken("zstd", error))?),
    };
    let wanted = bytes.len();
    match decompressor.decompress_to_buffer(frame, bytes) {
        Ok(length) if length == wanted => Ok(()),
        Ok(length) => Err(broken("zstd", format!("wanted {wanted} bytes, found {length}"))),
        Err(error) => Err(broken("zstd", error)),
    }
}

/// Writes the length of a frame into the four bytes before it.
pub(super) fn put_length(out: &mut [u8], start: usize, length: usize) {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(start..start + 4) {
        place.copy_from_slice(&length.to_le_bytes());
    }
}

/// Takes a frame and the length before it.
pub(super) fn take_frame<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let short = || broken("zstd", "a frame is cut short");
    let (length, behind) = rest.split_first_chunk().ok_or_else(short)?;
    let (frame, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(short)?;
    *rest = behind;
    Ok(frame)
}

fn split<const N: usize>(bytes: &[u8], planes: &mut [u8]) {
    let elements = bytes.as_chunks::<N>().0;
    for (index, plane) in planes.chunks_exact_mut(elements.len().max(1)).enumerate().take(N) {
        plane.iter_mut().zip(elements).for_each(|(byte, element)| *byte = element[index]);
    }
}

fn join<const N: usize>(planes: &[u8], bytes: &mut [u8]) {
    let elements = bytes.as_chunks_mut::<N>().0;
    for (index, plane) in planes.chunks_exact(elements.len().max(1)).enumerate().take(N) {
        plane.iter().zip(&mut *elements).for_each(|(byte, element)| element[index] = *byte);
    }
}
