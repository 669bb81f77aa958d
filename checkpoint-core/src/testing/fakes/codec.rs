//! Small complete implementations, to test the framing around them and to read as examples.

use std::num::NonZeroUsize;

use crate::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};

/// XORs with the parent (or nothing) and adds the length: a correct codec in a few lines.
#[derive(Debug, Clone, Copy, Default)]
pub struct XorCodec;

impl Codec for XorCodec {
    fn id(&self) -> CodecId {
        CodecId::of("test-xor")
    }

    fn unit(&self) -> Unit {
        Unit::Block(NonZeroUsize::MIN.saturating_add(3071))
    }

    fn modes(&self) -> Modes {
        Modes::Both
    }

    fn encode(
        &self,
        _: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        match parent {
            Some(parent) => out.extend(current.iter().zip(parent).map(|(new, old)| new ^ old)),
            None => out.extend_from_slice(current),
        }
        Ok(())
    }

    fn decode(&self, _: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        if encoded.len() != target.len() {
            return Err(Error::corrupt(format!("wanted {} bytes, found {}", target.len(), encoded.len())));
        }
        match mode {
            Mode::Base => target.copy_from_slice(encoded),
            Mode::Delta => target.iter_mut().zip(encoded).for_each(|(byte, mask)| *byte ^= mask),
        }
        Ok(())
    }
}
