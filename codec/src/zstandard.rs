//! zstd blocks.

use towline_core::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};
use zstd::zstd_safe::{self, CCtx, CParameter, compress_bound};

use crate::block::{self, BLOCK};
use crate::zframe::{Frame, failed};

/// zstd of the bytes, or of their XOR with the parent's, by blocks of 256 KiB.
#[derive(Debug, Clone, Copy)]
pub struct Zstd {
    level: i32,
}

impl Default for Zstd {
    fn default() -> Self {
        Self { level: 1 }
    }
}

impl Zstd {
    /// Sets the level. Default 1; more is slower and smaller. Levels outside of what the library has count as the
    /// nearest that it has. Readers need not know it.
    #[must_use]
    pub fn with_level(mut self, level: i32) -> Self {
        self.level = level.clamp(zstd_safe::min_c_level(), zstd_safe::max_c_level());
        self
    }
}

impl Codec for Zstd {
    fn id(&self) -> CodecId {
        CodecId::of("zstd")
    }

    fn unit(&self) -> Unit {
        Unit::Block(BLOCK)
    }

    fn modes(&self) -> Modes {
        Modes::Both
    }

    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        block::encode(unit, parent, current, out, |mask| {
            let mut context = CCtx::try_create()
                .ok_or_else(|| Error::unavailable("zstd found no memory for an encoder"))?;
            context.set_parameter(CParameter::CompressionLevel(self.level)).map_err(failed)?;
            let mut packed = Vec::with_capacity(compress_bound(mask.len()));
            context.compress2(&mut packed, mask).map_err(failed)?;
            Ok(packed)
        })
    }

    fn decode(&self, _: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        block::decode(mode, encoded, target, |packed, target| Frame::open(packed)?.read_into(target))
    }

    fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode(unit, Mode::Delta, encoded, target)
    }
}
