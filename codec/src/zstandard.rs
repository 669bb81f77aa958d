//! zstd blocks.

use towline_core::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};
use zstd::zstd_safe::{self, CCtx, CParameter, compress_bound};

use crate::block::{self, BLOCK, Mask};
use crate::zframe::{Frame, Writer, failed};

/// The level of a base where none is set.
const BASE_LEVEL: i32 = 1;

/// zstd of the bytes, or of their XOR with the parent's, by blocks of 256 KiB.
///
/// A XOR is packed by an encoder of our own: runs and frequencies, no search for repeats. On training steps it is
/// smaller than every level of the library, and faster than the first.
#[derive(Debug, Clone, Copy, Default)]
pub struct Zstd {
    level: Option<i32>,
}

impl Zstd {
    /// Sets a level of the library, for bases and deltas. By default bases have level 1 and deltas none. More is
    /// slower and smaller. Levels outside of what the library has count as the nearest that it has. Readers need not
    /// know it.
    #[must_use]
    pub fn with_level(mut self, level: i32) -> Self {
        self.level = Some(level.clamp(zstd_safe::min_c_level(), zstd_safe::max_c_level()));
        self
    }

    fn pack(self, mask: Mask<'_>, out: &mut Vec<u8>) -> Result<()> {
        match (mask, self.level) {
            (Mask::Xor(left, right), None) => {
                Writer::new(out, left.len()).finish_with_xor(left, right, &mut |_, _| {})
            }
            (Mask::Plain(bytes), level) => pack(bytes, level.unwrap_or(BASE_LEVEL), out),
            (mask @ Mask::Xor(..), Some(level)) => pack(mask.bytes(&mut Vec::new()), level, out),
        }
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
        block::encode(unit, parent, current, out, |mask, out| self.pack(mask, out))
    }

    fn decode(&self, _: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        block::decode(mode, encoded, target, unpack, unpack_xor)
    }

    fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode(unit, Mode::Delta, encoded, target)
    }

    fn compose(&self, unit: &UnitMeta<'_>, first: &[u8], second: &[u8], out: &mut Vec<u8>) -> Result<()> {
        block::compose(unit, [first, second], out, unpack_xor, |mask, out| match (mask, self.level) {
            (Mask::Plain(mask), None) => {
                let mut writer = Writer::new(out, mask.len());
                writer.write(mask);
                writer.finish()
            }
            (mask, _) => self.pack(mask, out),
        })
    }
}

/// Appends a frame of one level of the library.
fn pack(bytes: &[u8], level: i32, out: &mut Vec<u8>) -> Result<()> {
    let mut context =
        CCtx::try_create().ok_or_else(|| Error::unavailable("zstd found no memory for an encoder"))?;
    context.set_parameter(CParameter::CompressionLevel(level)).map_err(failed)?;
    let mut packed = Vec::with_capacity(compress_bound(bytes.len()));
    context.compress2(&mut packed, bytes).map_err(failed)?;
    out.extend_from_slice(&packed);
    Ok(())
}

fn unpack(packed: &[u8], target: &mut [u8]) -> Result<()> {
    Frame::open(packed)?.read_into(target)
}

fn unpack_xor(packed: &[u8], target: &mut [u8]) -> Result<()> {
    Frame::open(packed)?.xor_into(target, &mut |_| {})
}
