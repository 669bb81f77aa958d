//! Deltas as a list of the bytes that changed: `count`, then `position, byte` for each.

use std::num::NonZeroUsize;

use towline_core::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};

/// For weights of which next to nothing changes.
#[derive(Debug, Default)]
pub struct Changes;

const BLOCK: NonZeroUsize = NonZeroUsize::new(24 << 10).unwrap();
const HEAD: usize = 4;
const CHANGE: usize = 5;

impl Codec for Changes {
    fn id(&self) -> CodecId {
        CodecId::of("changes")
    }

    fn unit(&self) -> Unit {
        Unit::Block(BLOCK)
    }

    fn modes(&self) -> Modes {
        Modes::Delta
    }

    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let parent = unit.parent(parent)?;
        let head = out.len();
        out.extend([0; HEAD]);
        let mut count = 0u32;
        for (position, (new, old)) in (0u32..).zip(current.iter().zip(parent)) {
            if new != old {
                out.extend(position.to_le_bytes());
                out.push(*new);
                count += 1;
            }
        }
        out[head..head + HEAD].copy_from_slice(&count.to_le_bytes());
        Ok(())
    }

    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        unit.check_mode(mode, self.modes())?;
        let bad = || Error::corrupt(format!("tensor `{}`: no list of changes", unit.name));
        let (count, changes) = encoded.split_first_chunk::<HEAD>().ok_or_else(bad)?;
        let count = u32::from_le_bytes(*count) as usize;
        let (changes, rest) = changes.as_chunks::<CHANGE>();
        if changes.len() != count || !rest.is_empty() {
            return Err(bad());
        }
        for &[a, b, c, d, new] in changes {
            let position = u32::from_le_bytes([a, b, c, d]) as usize;
            *target.get_mut(position).ok_or_else(bad)? = new;
        }
        Ok(())
    }
}
