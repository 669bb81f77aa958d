//! No encoding at all: the yardstick, and the codec that cannot fail.

use towline_core::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};

use crate::block::BLOCK;

/// Stores the current bytes; a delta is as long as a base and needs nothing of its parent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Raw;

impl Codec for Raw {
    fn id(&self) -> CodecId {
        CodecId::of("raw")
    }

    fn unit(&self) -> Unit {
        Unit::Block(BLOCK)
    }

    fn modes(&self) -> Modes {
        Modes::Both
    }

    fn encode(&self, _: &UnitMeta<'_>, _: Option<&[u8]>, current: &[u8], out: &mut Vec<u8>) -> Result<()> {
        out.extend_from_slice(current);
        Ok(())
    }

    fn decode(&self, _: &UnitMeta<'_>, _: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        if encoded.len() != target.len() {
            let (wanted, found) = (target.len(), encoded.len());
            return Err(Error::corrupt(format!("raw frame: wanted {wanted} bytes, found {found}"))
                .with_help("copy the file again"));
        }
        target.copy_from_slice(encoded);
        Ok(())
    }
}
