//! The frames that the laws look at, and noise made of them.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::CodecCase;
use crate::testing::mix::Mix;
use crate::{
    Codec, DIGEST_BLOCK, DType, ErrorKind, Mode, Result as CoreResult, TensorMeta, UnitMeta, block_digest,
};

pub(super) struct CaseUnit<'a> {
    pub(super) meta: UnitMeta<'a>,
    pub(super) parent: &'a [u8],
    pub(super) current: &'a [u8],
}

pub(super) struct Frame<'a> {
    pub(super) unit: CaseUnit<'a>,
    pub(super) mode: Mode,
    pub(super) bytes: Vec<u8>,
}

impl Frame<'_> {
    /// What the target holds before a good decode: the parent's bytes, or something.
    pub(super) fn start(&self) -> Vec<u8> {
        match self.mode {
            Mode::Delta => self.unit.parent.to_vec(),
            Mode::Base => vec![0xa5; self.unit.current.len()],
        }
    }

    pub(super) fn encode(&self, codec: &dyn Codec, out: &mut Vec<u8>) -> Result<(), String> {
        let parent = (self.mode == Mode::Delta).then_some(self.unit.parent);
        guarded(|| codec.encode(&self.unit.meta, parent, self.unit.current, out))?
            .map_err(|error| format!("encode of what it took before: {error:?}"))
    }

    pub(super) fn encode_reading(
        &self,
        codec: &dyn Codec,
        out: &mut Vec<u8>,
        read: &mut dyn FnMut(usize, Option<u128>),
    ) -> Result<(), String> {
        let parent = (self.mode == Mode::Delta).then_some(self.unit.parent);
        guarded(|| codec.encode_reading(&self.unit.meta, parent, self.unit.current, out, read))?
            .map_err(|error| format!("encode_reading of what encode took: {error:?}"))
    }

    pub(super) fn decode(&self, codec: &dyn Codec, bytes: &[u8], target: &mut [u8]) -> CoreResult<()> {
        codec.decode(&self.unit.meta, self.mode, bytes, target)
    }

    pub(super) fn decodes(
        &self,
        codec: &dyn Codec,
        bytes: &[u8],
        start: &[u8],
        wanted: &[u8],
    ) -> Result<(), String> {
        let mut target = start.to_vec();
        guarded(|| self.decode(codec, bytes, &mut target))?
            .map_err(|error| format!("decode of a good {:?} frame: {error:?}", self.mode))?;
        match target.iter().zip(wanted).position(|(found, wanted)| found != wanted) {
            Some(at) => Err(format!("decode of a {:?} frame gave another byte at {at}", self.mode)),
            None => Ok(()),
        }
    }

    /// `decode_writing` gives what `decode` gives, and hands on nothing else and no other digest.
    pub(super) fn decodes_writing(&self, codec: &dyn Codec) -> Result<(), String> {
        let (mut target, mut handed, mut digests) = (self.start(), Vec::new(), Vec::new());
        let mut written = |bytes: &[u8], digest: Option<u128>| {
            let start = handed.len();
            handed.extend_from_slice(bytes);
            digests.extend(digest.map(|digest| (start..handed.len(), digest)));
        };
        guarded(|| codec.decode_writing(&self.unit.meta, self.mode, &self.bytes, &mut target, &mut written))?
            .map_err(|error| format!("decode_writing of what decode took: {error:?}"))?;
        if target != self.unit.current {
            return Err(format!("decode_writing of a {:?} frame gave other bytes than decode", self.mode));
        }
        if !target.starts_with(&handed) {
            return Err(format!(
                "decode_writing of a {:?} frame handed on other bytes than it wrote",
                self.mode
            ));
        }
        digests.into_iter().try_for_each(|(bytes, digest)| {
            self.has_digest(bytes, digest)
                .map_err(|error| format!("decode_writing of a {:?} frame gave {error}", self.mode))
        })
    }

    /// Whether some of the new bytes are a block and have this digest.
    pub(super) fn has_digest(&self, Range { start, end }: Range<usize>, digest: u128) -> Result<(), String> {
        let whole = end - start == DIGEST_BLOCK || end == self.unit.current.len();
        if !(start.is_multiple_of(DIGEST_BLOCK) && end - start <= DIGEST_BLOCK && whole) {
            return Err(format!("a digest of bytes {start}..{end}, which are not a block"));
        }
        let wanted = block_digest(&self.unit.current[start..end]);
        if digest != wanted {
            return Err(format!("{digest:032x} as digest of {start}..{end}, which is {wanted:032x}"));
        }
        Ok(())
    }
}

pub(super) fn units<'a>(codec: &dyn Codec, case: &'a CodecCase) -> Vec<CaseUnit<'a>> {
    codec
        .unit()
        .ranges(case.meta.byte_len())
        .filter_map(|range| {
            Some(CaseUnit {
                parent: case.parent.get(range.clone())?,
                current: case.current.get(range.clone())?,
                meta: UnitMeta::new(&case.meta, range),
            })
        })
        .collect()
}

/// Encodes every unit in every mode that the codec claims and hands the frames to `law`.
pub(super) fn each_frame(
    codec: &dyn Codec,
    case: &CodecCase,
    mut law: impl FnMut(&Frame<'_>) -> Result<(), String>,
) -> Result<(), String> {
    for mode in [Mode::Base, Mode::Delta].into_iter().filter(|mode| codec.modes().contains(*mode)) {
        for unit in units(codec, case) {
            let mut bytes = Vec::new();
            let parent = (mode == Mode::Delta).then_some(unit.parent);
            match guarded(|| codec.encode(&unit.meta, parent, unit.current, &mut bytes))? {
                Ok(()) => law(&Frame { unit, mode, bytes })?,
                Err(error) if error.kind() == ErrorKind::Unsupported => break,
                Err(error) => return Err(format!("encode of a {mode:?} unit: {error:?}")),
            }
        }
    }
    Ok(())
}

pub(super) fn takes_something(codec: &dyn Codec, mode: Mode) -> Result<(), String> {
    for &dtype in DType::ALL {
        let Ok(meta) = TensorMeta::new("t", dtype, [32]) else { continue };
        let bytes = vec![1; meta.byte_len()];
        let case = CodecCase::new(meta, bytes.clone(), bytes, 0);
        let takes = units(codec, &case).into_iter().all(|unit| {
            let parent = (mode == Mode::Delta).then_some(unit.parent);
            codec.encode(&unit.meta, parent, unit.current, &mut Vec::new()).is_ok()
        });
        if takes {
            return Ok(());
        }
    }
    Err(format!("the codec claims the mode {mode:?} and takes no element type in it"))
}

/// Pure noise, and the frame with flipped bits, overwritten stretches, a false start, and more behind it.
pub(super) fn noises(frame: &[u8], seed: u64) -> Vec<Vec<u8>> {
    let mut mix = Mix::new(seed);
    let mut all = vec![vec![], vec![0; 40], vec![0xff; 40], [frame, frame].concat()];
    for _ in 0..8 {
        let length = mix.below(96);
        all.push(mix.bytes(length));
    }
    for _ in 0..16 {
        let mut damaged = frame.to_vec();
        let at = mix.below(damaged.len());
        if let Some(byte) = damaged.get_mut(at) {
            *byte ^= 1 << mix.below(8);
        }
        all.push(damaged);
    }
    for fill in [0x00, 0x7f, 0xff] {
        for _ in 0..4 {
            let mut damaged = frame.to_vec();
            // Lengths and windows stand near the start of most formats.
            let at = mix.below(damaged.len().min(32));
            let width = 1 + mix.below(9);
            damaged.iter_mut().skip(at).take(width).for_each(|byte| *byte = fill);
            all.push(damaged);
        }
    }
    all
}

pub(super) fn guarded<R>(work: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        format!("the codec panicked: {}", text.unwrap_or("no message"))
    })
}

pub(super) fn cut(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(48)]
}
