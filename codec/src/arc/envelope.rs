//! The envelope of arc_v3: a pickle that holds the compressed pickle of the payload.

use bzip2::{Decompress, Status};
use towline_core::{Error, Result, UnitMeta};

use super::apply::apply;
use super::layout::Layout;
use super::pickle::Document;
use super::{CHUNK, moved};
use crate::zframe::Frame;

/// Applies the envelope `pickle` (without its tag) to `target`, which holds the parent's bytes.
pub(super) fn decode(unit: &UnitMeta<'_>, pickle: &[u8], target: &mut [u8]) -> Result<()> {
    let layout = Layout::of(unit.dtype).filter(|layout| target.len().is_multiple_of(layout.bytes));
    let layout = layout.ok_or_else(|| {
        Error::corrupt(format!("arc_v3 envelope: {} has no float layout in this format", unit.dtype))
            .with_help("check that the delta's parent is the right one")
    })?;
    let document = Document::parse(pickle).map_err(|error| error.context("envelope"))?;
    let (codec, data) = (document.root().text("codec")?, document.root().bytes("data")?);
    let limit = payload_limit(layout, target.len() / layout.bytes);
    let payload = match codec {
        "zstd" => unzstd(data, limit)?,
        "bz2" => unbzip2(data, limit)?,
        other => {
            return Err(Error::corrupt(format!(
                "arc_v3 envelope: codec `{}` is unknown",
                other.escape_debug()
            )));
        }
    };
    apply(unit, layout, &payload, target).map_err(|error| error.context("payload"))
}

/// The most bytes of a payload for a tensor of `elements`.
///
/// With every element changed there are, for each: its position, its row's count and width byte, its mantissa as a
/// codebook exception (position, value, and at most a byte for the code), and its whole value as an exception
/// (position, value). Positions and counts take 4 bytes below 2³² elements. The rest is keys and single numbers.
fn payload_limit(layout: Layout, elements: usize) -> usize {
    let position = if u32::try_from(elements).is_ok() { 4 } else { 8 };
    elements.saturating_mul(4 * position + 3 + layout.bytes).saturating_add(64 << 10)
}

/// Appends `piece`, growing by doubling, but never above `limit` bytes.
fn append(payload: &mut Vec<u8>, piece: &[u8], limit: usize) {
    if payload.capacity() - payload.len() < piece.len() {
        let room = limit.saturating_sub(payload.len());
        payload.reserve_exact(piece.len().max(payload.len()).min(room.max(piece.len())));
    }
    payload.extend_from_slice(piece);
}

fn unzstd(data: &[u8], limit: usize) -> Result<Vec<u8>> {
    let frame = Frame::open(data)?;
    if frame.content() > limit {
        return Err(too_large(limit));
    }
    frame.read_to_vec()
}

fn unbzip2(data: &[u8], limit: usize) -> Result<Vec<u8>> {
    let bad = |why: &str| Error::corrupt(format!("bz2 stream: {why}")).with_help("copy the delta file again");
    let mut decoder = Decompress::new(false);
    let mut buffer = vec![0; CHUNK];
    let mut payload = Vec::new();
    let mut read = 0;
    loop {
        let (read_before, out_before) = (decoder.total_in(), decoder.total_out());
        let status = decoder
            .decompress(data.get(read..).unwrap_or_default(), &mut buffer)
            .map_err(|error| bad("it cannot be read").with_source(error))?;
        let consumed = moved(read_before, decoder.total_in());
        let produced = moved(out_before, decoder.total_out());
        let piece = buffer.get(..produced).unwrap_or_default();
        if payload.len() + piece.len() > limit {
            return Err(too_large(limit));
        }
        append(&mut payload, piece, limit);
        read += consumed;
        match status {
            Status::StreamEnd if read == data.len() => return Ok(payload),
            Status::StreamEnd => return Err(bad(&format!("{} bytes behind its end", data.len() - read))),
            Status::MemNeeded => return Err(Error::unavailable("bz2 found no memory for a decoder")),
            Status::Ok | Status::FlushOk | Status::RunOk | Status::FinishOk => {}
        }
        if consumed == 0 && produced == 0 {
            return Err(bad("it is cut short"));
        }
    }
}

fn too_large(limit: usize) -> Error {
    Error::corrupt(format!(
        "arc_v3 envelope: its payload has more than the {limit} bytes that its tensor can need"
    ))
}
