//! arc_v3: the changed elements of a tensor as positions and mantissas, or an arc_v2 frame where that is smaller.

use std::collections::BTreeMap;

use towline_core::safetensors::Header;
use towline_core::{Codec, CodecId, DType, Error, Framing, Mode, Modes, Result, TensorMeta, Unit, UnitMeta};

use super::layout::Layout;
use super::{ArcV2, adler, adler_of_more, envelope, parent_of, writer};
use crate::{ARC_V3_TAG, fallback_header};

/// The tensor of a fallback, and the key of its checksum.
const TENSOR: &str = "tensor";
/// The key of the format of a fallback.
const FALLBACK: &str = "fallback_name";
/// Positions and mantissas of the changed elements; an `arc_v2` frame for element types that are not divided into
/// sign, exponent and mantissa, and where that came out smaller. Equal input gives equal bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct ArcV3;

impl Codec for ArcV3 {
    fn id(&self) -> CodecId {
        CodecId::of("arc_v3")
    }

    fn unit(&self) -> Unit {
        Unit::Whole
    }

    fn modes(&self) -> Modes {
        Modes::Delta
    }

    fn framing(&self) -> Framing {
        Framing::Safetensors
    }

    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let parent = parent_of(unit, parent, current)?;
        let Some(layout) = whole_layout(unit, current.len()) else {
            out.extend_from_slice(&fallback(unit, parent, current)?);
            return Ok(());
        };
        if !writer::envelope(unit, layout, parent, current, out)? {
            out.extend_from_slice(&fallback(unit, parent, current)?);
        }
        Ok(())
    }

    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        unit.check_mode(mode, self.modes())?;
        match encoded.strip_prefix(ARC_V3_TAG) {
            Some(pickle) => envelope::decode(unit, pickle, target),
            None => decode_fallback(unit, mode, encoded, target),
        }
    }

    fn checksum(&self, before: Option<u32>, more: &[u8]) -> Option<u32> {
        Some(adler_of_more(before, more))
    }
}

/// The layout of the unit's elements, if the unit is a whole tensor of such elements, and not too large to write.
fn whole_layout(unit: &UnitMeta<'_>, length: usize) -> Option<Layout> {
    let elements =
        unit.shape.iter().try_fold(1usize, |product, &dimension| product.checked_mul(dimension))?;
    Layout::of(unit.dtype)
        .filter(|layout| elements.checked_mul(layout.bytes) == Some(length))
        .filter(|_| elements <= writer::MAX_ELEMENTS)
}

/// A safetensors file of one arc_v2 frame.
fn fallback(unit: &UnitMeta<'_>, parent: &[u8], current: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    ArcV2.encode(unit, Some(parent), current, &mut frame)?;
    let meta = TensorMeta::new(TENSOR, DType::U8, [frame.len()])?;
    let metadata = BTreeMap::from([
        (TENSOR.to_owned(), adler(current).to_string()),
        (FALLBACK.to_owned(), "arc_v2".to_owned()),
    ]);
    let mut file = Header::encode(&[meta], &metadata)?;
    file.extend_from_slice(&frame);
    Ok(file)
}

fn decode_fallback(unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
    let bad = |why: String| Error::corrupt(format!("arc_v3 payload: {why}"));
    let json = fallback_header(encoded).and_then(|length| encoded.get(8..8 + length));
    let json = json.ok_or_else(|| {
        bad("neither an envelope nor a safetensors file with an arc_v2 frame".into())
            .with_help("check that the file is an arc_v3 delta, then copy it again")
    })?;
    let header = Header::parse(json, encoded.len() as u64)?;
    let [entry] = header.entries.as_slice() else {
        return Err(bad(format!("wanted one tensor in the fallback, found {}", header.entries.len())));
    };
    if entry.meta.name() != TENSOR || entry.meta.dtype() != DType::U8 || entry.meta.shape().len() != 1 {
        return Err(bad(format!("wanted `{TENSOR}` of U8 with one dimension in the fallback")));
    }
    // A fallback without a name is arc_v2: the reference reads it so.
    let format = header.metadata.get(FALLBACK).map_or("arc_v2", String::as_str);
    if format != "arc_v2" {
        return Err(Error::unsupported(format!(
            "arc_v3 payload: fallback `{}` is unknown",
            format.escape_debug()
        ))
        .with_help("upgrade Towline"));
    }
    let checksum = header
        .metadata
        .get(TENSOR)
        .ok_or_else(|| bad(format!("`{TENSOR}` has no checksum in the fallback's metadata")))?;
    // The header was checked against the length: the frame is all that stands behind it.
    let frame = encoded.get(8 + json.len()..).unwrap_or_default();
    ArcV2.decode(unit, mode, frame, target)?;
    let found = adler(target).to_string();
    if *checksum != found {
        return Err(bad(format!("wanted checksum {}, found {found}", checksum.escape_debug()))
            .with_help("check that the delta's parent is the right one, then copy the file again"));
    }
    Ok(())
}
