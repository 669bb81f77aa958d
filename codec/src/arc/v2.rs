//! arc_v2: one zstd frame of the XOR, with the content size in its header.

use towline_core::{Codec, CodecId, Framing, Mode, Modes, Result, Unit, UnitMeta};
use zstd::stream::write::Encoder;

use super::{adler, cannot_write, parent_of, xor_chunks};
use crate::xor::xor_into;
use crate::zframe::Frame;

/// zstd (level 3) of the XOR with the parent; also called `xor_one_to_one_zstd`.
#[derive(Debug, Clone, Copy, Default)]
pub struct ArcV2;

impl Codec for ArcV2 {
    fn id(&self) -> CodecId {
        CodecId::of("arc_v2")
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
        let mut encoder = Encoder::new(out, 3).map_err(cannot_write)?;
        encoder.set_pledged_src_size(Some(current.len() as u64)).map_err(cannot_write)?;
        xor_chunks(parent, current, &mut encoder).map_err(cannot_write)?;
        encoder.finish().map_err(cannot_write)?;
        Ok(())
    }

    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        unit.check_mode(mode, self.modes())?;
        let mut rest = target;
        Frame::open(encoded)?.holds(rest.len())?.read_pieces(|piece| {
            let (place, behind) = std::mem::take(&mut rest).split_at_mut(piece.len());
            xor_into(place, piece);
            rest = behind;
        })
    }

    fn checksum(&self, current: &[u8]) -> Option<u32> {
        Some(adler(current))
    }

    fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode(unit, Mode::Delta, encoded, target)
    }
}
