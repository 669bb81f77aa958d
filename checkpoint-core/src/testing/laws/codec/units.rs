//! Tensors of several units.

use super::frames::{Frame, each_frame, guarded};
use super::{CodecCase, Law, check_with};
use crate::testing::laws::{ensure, skipped};
use crate::testing::strategies::TensorPairs;
use crate::{Codec, Mode, Unit};

/// The tensors of [`check_large`].
const CASES: u32 = 4;
/// The bytes of tensors for a codec that takes them whole.
const WHOLE: usize = 1 << 20;
/// Larger blocks would take a test too long.
const MAX_BLOCK: usize = 8 << 20;

/// As [`check`](super::check), on few tensors that are larger than one unit of the codec, by up to another one; up to
/// 1 MiB for a codec that takes tensors whole. Blocks above 8 MiB are skipped, which is said.
///
/// # Errors
/// What broke.
pub fn check_large(codec: &dyn Codec, law: Law) -> Result<(), String> {
    let bytes = match codec.unit() {
        Unit::Whole => 1..WHOLE,
        Unit::Block(size) if size.get() <= MAX_BLOCK => size.get() + 8..2 * size.get() + 4096,
        Unit::Block(size) => {
            skipped("several_units", &format!("blocks of {size} bytes are above {MAX_BLOCK}"));
            return Ok(());
        }
    };
    check_with(codec, law, TensorPairs::new().bytes(bytes).strategy(), CASES)
}

/// Each unit of a tensor stands alone: decoded last to first, they give the tensor, and a unit encoded again after
/// the others has the same frame.
///
/// # Errors
/// What broke.
pub fn several_units(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    for mode in [Mode::Base, Mode::Delta] {
        let mut frames = Vec::new();
        each_frame(codec, case, |frame| {
            if frame.mode == mode {
                frames.push((frame.unit.meta.offset, frame.bytes.clone()));
            }
            Ok(())
        })?;
        let mut left = frames.len();
        let mut target = case.parent.clone();
        for unit in super::units(codec, case).into_iter().rev() {
            // Types that the codec does not take have no frames.
            let Some((offset, bytes)) = left.checked_sub(1).and_then(|last| frames.get(last)) else { break };
            left -= 1;
            ensure!(*offset == unit.meta.offset, "the unit at byte {offset} has no frame");
            let range = unit.meta.offset..unit.meta.offset + unit.meta.len;
            let frame = Frame { unit, mode, bytes: bytes.clone() };
            let mut again = Vec::new();
            frame.encode(codec, &mut again)?;
            ensure!(again == *bytes, "the {mode:?} frame of byte {offset} depends on the units before");
            let part = target.get_mut(range).unwrap_or_default();
            guarded(|| frame.decode(codec, bytes, part))?
                .map_err(|error| format!("decode of the {mode:?} unit at byte {offset} first: {error:?}"))?;
        }
        if !frames.is_empty() {
            let wrong = target.iter().zip(&case.current).position(|(found, wanted)| found != wanted);
            ensure!(wrong.is_none(), "the {mode:?} units, last to first, gave another byte at {wrong:?}");
        }
    }
    Ok(())
}
