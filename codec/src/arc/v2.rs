//! arc_v2: one zstd frame of the XOR, with the content size in its header.

use towline_core::{Codec, CodecId, Framing, Mode, Modes, Result, Unit, UnitMeta};

use super::{adler_of_more, joined_mask, parent_of};
use crate::zframe::{Frame, Writer};

/// zstd of the XOR with the parent; also called `xor_one_to_one_zstd`. Our frames have runs and frequencies only,
/// which on training steps makes them smaller than those of any level.
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
        self.encode_reading(unit, parent, current, out, &mut |_, _| {})
    }

    fn encode_reading(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
        read: &mut dyn FnMut(usize, Option<u128>),
    ) -> Result<()> {
        let parent = parent_of(unit, parent, current)?;
        Writer::new(out, current.len()).finish_with_xor(parent, current, read)
    }

    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode_writing(unit, mode, encoded, target, &mut |_, _| {})
    }

    fn decode_writing(
        &self,
        unit: &UnitMeta<'_>,
        mode: Mode,
        encoded: &[u8],
        target: &mut [u8],
        written: &mut dyn FnMut(&[u8], Option<u128>),
    ) -> Result<()> {
        unit.check_mode(mode, self.modes())?;
        Frame::open(encoded)?.xor_into(target, &mut |bytes| written(bytes, None))
    }

    fn checksum(&self, before: Option<u32>, more: &[u8]) -> Option<u32> {
        Some(adler_of_more(before, more))
    }

    fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode(unit, Mode::Delta, encoded, target)
    }

    fn compose(&self, unit: &UnitMeta<'_>, first: &[u8], second: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let mask = joined_mask(self, unit, first, second)?;
        let mut writer = Writer::new(out, mask.len());
        writer.write(&mask);
        writer.finish()
    }
}
