//! LZ4 blocks: pure Rust, fast, and a ratio of at most 1 : 255.

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use towline_core::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};

use crate::block::{self, BLOCK, Mask};
use crate::xor::xor_into;

/// LZ4 of the bytes, or of their XOR with the parent's, by blocks of 256 KiB.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lz4;

impl Codec for Lz4 {
    fn id(&self) -> CodecId {
        CodecId::of("lz4")
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
        block::encode(unit, parent, current, out, pack)
    }

    fn decode(&self, _: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        block::decode(mode, encoded, target, unpack, unpack_xor)
    }

    fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode(unit, Mode::Delta, encoded, target)
    }

    fn compose(&self, unit: &UnitMeta<'_>, first: &[u8], second: &[u8], out: &mut Vec<u8>) -> Result<()> {
        block::compose(unit, [first, second], out, unpack_xor, pack)
    }
}

fn pack(mask: Mask<'_>, out: &mut Vec<u8>) -> Result<()> {
    let mut buffer = Vec::new();
    let mask = mask.bytes(&mut buffer);
    let mut packed = vec![0; get_maximum_output_size(mask.len())];
    let length = compress_into(mask, &mut packed)
        .map_err(|error| Error::internal("lz4 could not compress").with_source(error))?;
    out.extend_from_slice(packed.get(..length).unwrap_or_default());
    Ok(())
}

fn unpack(packed: &[u8], target: &mut [u8]) -> Result<()> {
    let wanted = target.len();
    // The decoder ends where the input ends, so a full target means that all was read.
    let found = decompress_into(packed, target).map_err(|error| {
        Error::corrupt("lz4 frame: it cannot be read").with_source(error).with_help("copy the file again")
    })?;
    if found == wanted {
        return Ok(());
    }
    Err(Error::corrupt(format!("lz4 frame: wanted {wanted} bytes, found {found}"))
        .with_help("copy the file again"))
}

fn unpack_xor(packed: &[u8], target: &mut [u8]) -> Result<()> {
    let mut mask = vec![0; target.len()];
    unpack(packed, &mut mask)?;
    xor_into(target, &mask);
    Ok(())
}
