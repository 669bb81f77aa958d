//! What every codec keeps. Each law takes a codec and a case, and returns what broke.
//!
//! A codec may answer `Unsupported` for an element type; such a case proves nothing and breaks nothing, but
//! [`modes_are_honest`] wants one element type at least to be taken in each mode.

mod frames;
mod units;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

use self::frames::{Frame, cut, each_frame, guarded, noises, takes_something, units};
pub use self::units::{check_large, several_units};
use super::{ensure, skipped};
use crate::testing::alloc::CountingAllocator;
use crate::testing::mix::Mix;
use crate::testing::strategies::tensor_pair;
use crate::{Codec, ErrorKind, Framing, Mode, Modes, Result as CoreResult, TensorMeta, Unit};

/// What a decoder may hold besides its output, whatever it is given: this many bytes …
pub const ALLOCATION_CONSTANT: usize = 16 << 20;
/// … and this many for each byte of the frame and of the target.
pub const ALLOCATION_FACTOR: usize = 8;

/// What a law looks at: a tensor and its two states, and a seed for everything that is to be random.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct CodecCase {
    /// Name, element type and shape.
    pub meta: TensorMeta,
    /// The parent's bytes.
    pub parent: Vec<u8>,
    /// The new bytes.
    pub current: Vec<u8>,
    /// Decides dirt, noise and cuts.
    pub seed: u64,
}

impl CodecCase {
    /// All fields.
    #[must_use]
    pub fn new(meta: TensorMeta, parent: Vec<u8>, current: Vec<u8>, seed: u64) -> Self {
        Self { meta, parent, current, seed }
    }
}

impl fmt::Debug for CodecCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { meta, parent, current, seed } = self;
        let cut = |bytes: &[u8]| format!("{} bytes {:02x?}", bytes.len(), &bytes[..bytes.len().min(64)]);
        write!(f, "{meta:?}, parent {}, current {}, seed {seed}", cut(parent), cut(current))
    }
}

/// A law of codecs.
pub type Law = fn(&dyn Codec, &CodecCase) -> Result<(), String>;

/// Every law with its name.
pub const ALL: &[(&str, Law)] = &[
    ("stable_id", stable_id),
    ("units_tile", units_tile),
    ("modes_are_honest", modes_are_honest),
    ("round_trip", round_trip),
    ("append_only", append_only),
    ("deterministic", deterministic),
    ("dirty_target", dirty_target),
    ("truncation_is_an_error", truncation_is_an_error),
    ("noise_never_panics", noise_never_panics),
    ("bounded_allocation", bounded_allocation),
    ("checksum_fits_the_framing", checksum_fits_the_framing),
    ("revert_is_right", revert_is_right),
    ("compose_is_right", compose_is_right),
    ("several_units", several_units),
];

/// Checks `law` against weight-shaped cases, 48 of them or what `PROPTEST_CASES` says, always the same ones unless
/// `PROPTEST_RNG_SEED` says otherwise. Returns what broke, with the smallest case that broke it.
///
/// # Errors
/// What broke.
pub fn check(codec: &dyn Codec, law: Law) -> Result<(), String> {
    check_with(codec, law, tensor_pair(), 48)
}

/// Checks `law` against tensors of a strategy of one's own, such as [`TensorPairs`], as [`check`] does; `cases` of
/// them unless `PROPTEST_CASES` says otherwise.
///
/// [`TensorPairs`]: crate::testing::strategies::TensorPairs
///
/// # Errors
/// What broke.
pub fn check_with(
    codec: &dyn Codec,
    law: Law,
    tensors: impl Strategy<Value = (TensorMeta, Vec<u8>, Vec<u8>)>,
    cases: u32,
) -> Result<(), String> {
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if config.cases == 256 {
        config.cases = cases;
    }
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(0x7043_1e5e);
    }
    let cases = (tensors, any::<u64>()).prop_map(|((meta, parent, current), seed)| CodecCase {
        meta,
        parent,
        current,
        seed,
    });
    TestRunner::new(config)
        .run(&cases, |case| law(codec, &case).map_err(TestCaseError::fail))
        .map_err(|error| error.to_string())
}

/// Id, units, modes and framing are the same whenever they are asked for.
///
/// # Errors
/// What broke.
pub fn stable_id(codec: &dyn Codec, _: &CodecCase) -> Result<(), String> {
    let ask = || (codec.id(), codec.unit(), codec.modes(), codec.framing());
    let first = catch_unwind(AssertUnwindSafe(ask)).map_err(|_| "asking for the id panicked".to_owned())?;
    let again = ask();
    ensure!(first == again, "the codec called itself {first:?} and then {again:?}");
    Ok(())
}

/// The units cover a tensor without gap or overlap and split no element; the safetensors framing knows whole
/// tensors and deltas only.
///
/// # Errors
/// What broke.
pub fn units_tile(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    if let Unit::Block(size) = codec.unit() {
        ensure!(size.get() % 8 == 0, "blocks of {size} bytes split elements: wanted a multiple of 8");
    }
    if codec.framing() == Framing::Safetensors {
        ensure!(codec.unit() == Unit::Whole, "the safetensors framing wants whole tensors, not blocks");
        ensure!(codec.modes() == Modes::Delta, "the safetensors framing holds deltas only");
    }
    let mut end = 0;
    for range in codec.unit().ranges(case.meta.byte_len()) {
        ensure!(range.start == end && range.end >= end, "unit {range:?} does not follow byte {end}");
        end = range.end;
    }
    ensure!(end == case.meta.byte_len(), "the units end at {end} of {}", case.meta.byte_len());
    Ok(())
}

/// What [`Codec::modes`] denies is `Unsupported` both ways; what it claims takes at least one element type.
///
/// # Errors
/// What broke.
pub fn modes_are_honest(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    for mode in [Mode::Base, Mode::Delta] {
        if codec.modes().contains(mode) {
            takes_something(codec, mode)?;
            continue;
        }
        for unit in units(codec, case) {
            let refused = |what: &str, outcome: CoreResult<()>| match outcome {
                Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
                Err(error) => Err(format!("{what} of the denied mode {mode:?} is {error:?}")),
                Ok(()) => Err(format!("{what} of the denied mode {mode:?} succeeded")),
            };
            let parent = (mode == Mode::Delta).then_some(unit.parent);
            refused("encode", codec.encode(&unit.meta, parent, unit.current, &mut Vec::new()))?;
            refused("decode", codec.decode(&unit.meta, mode, &[], &mut unit.parent.to_vec()))?;
        }
    }
    Ok(())
}

/// Decoding gives the encoded bytes back, in each mode.
///
/// # Errors
/// What broke.
pub fn round_trip(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    each_frame(codec, case, |frame| {
        frame.decodes(codec, &frame.bytes, &frame.start(), frame.unit.current)?;
        frame.decodes_writing(codec)
    })
}

/// Encoding appends: what was in the output stays, and does not change what is appended.
///
/// # Errors
/// What broke.
pub fn append_only(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    let prefix = Mix::new(case.seed).bytes(1 + case.parent.len() % 50);
    each_frame(codec, case, |frame| {
        let mut out = prefix.clone();
        frame.encode(codec, &mut out)?;
        ensure!(out.starts_with(&prefix), "encode changed what was in the output before");
        ensure!(out.get(prefix.len()..) == Some(&frame.bytes[..]), "the frame depends on what is before it");
        Ok(())
    })
}

/// Equal input gives equal frames: again, from two threads at once, and while the codec says how far it has read,
/// which goes forwards and stays within the unit. A digest that it hands over is that of the bytes in between.
///
/// # Errors
/// What broke.
pub fn deterministic(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    each_frame(codec, case, |frame| {
        let encode = || {
            let mut out = Vec::new();
            frame.encode(codec, &mut out).map(|()| out)
        };
        let threads = std::thread::scope(|scope| {
            let threads = [scope.spawn(encode), scope.spawn(encode)];
            threads.map(|thread| thread.join().unwrap_or_else(|_| Err("encode panicked on a thread".into())))
        });
        for again in [encode()].into_iter().chain(threads) {
            ensure!(again? == frame.bytes, "the same input gave another frame");
        }
        let (mut ends, mut digests, mut reading) = (vec![0], Vec::new(), Vec::new());
        frame.encode_reading(codec, &mut reading, &mut |end, digest| {
            digests.extend(digest.zip(ends.last().map(|start| (*start, end))));
            ends.push(end);
        })?;
        ensure!(reading == frame.bytes, "encode_reading gave another frame than encode");
        let forwards = ends.is_sorted() && ends.last().is_none_or(|&end| end <= frame.unit.current.len());
        ensure!(forwards, "encode_reading read up to {ends:?} of {} bytes", frame.unit.current.len());
        for (digest, (start, end)) in digests {
            frame.has_digest(start..end, digest).map_err(|error| format!("encode_reading gave {error}"))?;
        }
        Ok(())
    })
}

/// Decoding a base does not depend on what is in the target.
///
/// # Errors
/// What broke.
pub fn dirty_target(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    let mut mix = Mix::new(case.seed);
    each_frame(codec, case, |frame| {
        if frame.mode == Mode::Delta {
            return Ok(());
        }
        for dirt in [vec![0xff; frame.unit.current.len()], mix.bytes(frame.unit.current.len())] {
            frame
                .decodes(codec, &frame.bytes, &dirt, frame.unit.current)
                .map_err(|broken| format!("with a dirty target: {broken}"))?;
        }
        Ok(())
    })
}

/// A frame that is cut short is `Corrupt`: every cut of a small frame, some hundred of a large one.
///
/// # Errors
/// What broke.
pub fn truncation_is_an_error(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    let mut mix = Mix::new(case.seed);
    each_frame(codec, case, |frame| {
        let whole = frame.bytes.len();
        let cuts: Vec<usize> = if whole <= 512 {
            (0..whole).collect()
        } else {
            (0..64).chain((0..64).map(|_| mix.below(whole))).chain(whole - 64..whole).collect()
        };
        for cut in cuts {
            let mut target = frame.start();
            let outcome = guarded(|| frame.decode(codec, &frame.bytes[..cut], &mut target))
                .map_err(|broken| format!("cut to {cut} of {whole} bytes: {broken}"))?;
            match outcome {
                Err(error) if error.kind() == ErrorKind::Corrupt => {}
                Err(error) => {
                    return Err(format!("cut to {cut} of {whole} bytes: wanted corrupt, found {error:?}"));
                }
                Ok(()) => {
                    return Err(format!(
                        "a {:?} frame cut to {cut} of {whole} bytes was decoded",
                        frame.mode
                    ));
                }
            }
        }
        Ok(())
    })
}

/// Noise and damaged frames fail or give some bytes; they never panic.
///
/// # Errors
/// What broke.
pub fn noise_never_panics(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    each_frame(codec, case, |frame| {
        for noise in noises(&frame.bytes, case.seed) {
            let mut target = frame.start();
            // Any outcome but a panic is right: noise may happen to be a frame.
            let _outcome = guarded(|| frame.decode(codec, &noise, &mut target))
                .map_err(|broken| format!("{broken} on {} bytes {:02x?}", noise.len(), cut(&noise)))?;
        }
        Ok(())
    })
}

/// Decoding, of noise too, holds at most [`ALLOCATION_CONSTANT`] bytes and [`ALLOCATION_FACTOR`] for each byte of
/// frame and target. Skipped, and said so, where [`CountingAllocator`] is not installed.
///
/// # Errors
/// What broke.
pub fn bounded_allocation(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    if CountingAllocator::measure(|| ()).1.is_none() {
        static SAID: std::sync::Once = std::sync::Once::new();
        SAID.call_once(|| {
            skipped(
                "bounded_allocation",
                "install `towline_core::testing::CountingAllocator` as the global allocator",
            );
        });
        return Ok(());
    }
    each_frame(codec, case, |frame| {
        for noise in noises(&frame.bytes, case.seed ^ 1).into_iter().chain([frame.bytes.clone()]) {
            let mut target = frame.start();
            let allowed = ALLOCATION_CONSTANT + ALLOCATION_FACTOR * (noise.len() + target.len());
            let (_outcome, peak) =
                CountingAllocator::measure(|| guarded(|| frame.decode(codec, &noise, &mut target)));
            let peak = peak.unwrap_or(0);
            ensure!(
                peak <= allowed,
                "decoding {} bytes {:02x?} into {} held {peak} bytes, {allowed} are allowed",
                noise.len(),
                cut(&noise),
                target.len()
            );
        }
        Ok(())
    })
}

/// A codec of the safetensors framing has a checksum that depends on the bytes alone, however they are cut, and sees a
/// changed byte; one of the container, which holds better digests, has none.
///
/// # Errors
/// What broke.
pub fn checksum_fits_the_framing(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    let sum = codec.checksum(None, &case.current);
    ensure!(sum == codec.checksum(None, &case.current), "the same bytes gave another checksum");
    let mut rest = case.current.as_slice();
    let mut in_pieces = None;
    let mut mix = Mix::new(case.seed);
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(1 + mix.below(rest.len()));
        in_pieces = codec.checksum(in_pieces, piece);
        rest = behind;
    }
    ensure!(case.current.is_empty() || in_pieces == sum, "the same bytes in pieces gave another checksum");
    match codec.framing() {
        Framing::Container => {
            ensure!(sum.is_none(), "the container stores no checksum, but the codec computes one");
        }
        Framing::Safetensors => {
            ensure!(sum.is_some(), "the safetensors framing wants a checksum");
            let mut changed = case.current.clone();
            let at = Mix::new(case.seed).below(changed.len());
            if let Some(byte) = changed.get_mut(at) {
                *byte ^= 1;
                ensure!(
                    codec.checksum(None, &changed) != sum,
                    "the checksum does not see that byte {at} changed"
                );
            }
        }
    }
    Ok(())
}

/// Taking a delta back is `Unsupported` or gives the parent's bytes.
///
/// # Errors
/// What broke.
pub fn revert_is_right(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    each_frame(codec, case, |frame| {
        if frame.mode == Mode::Base {
            return Ok(());
        }
        let mut target = frame.unit.current.to_vec();
        match guarded(|| codec.revert(&frame.unit.meta, &frame.bytes, &mut target))? {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            Err(error) => Err(format!("revert of a good delta: {error:?}")),
            Ok(()) => {
                ensure!(target == frame.unit.parent, "revert did not give the parent's bytes back");
                Ok(())
            }
        }
    })
}

/// Joining two deltas is `Unsupported` or gives one that does what both do.
///
/// # Errors
/// What broke.
pub fn compose_is_right(codec: &dyn Codec, case: &CodecCase) -> Result<(), String> {
    let mut mix = Mix::new(case.seed);
    each_frame(codec, case, |frame| {
        if frame.mode == Mode::Base {
            return Ok(());
        }
        let mut third = frame.unit.current.to_vec();
        third.iter_mut().filter(|_| mix.below(4) == 0).for_each(|byte| *byte = byte.wrapping_add(1));
        let mut second = Vec::new();
        codec
            .encode(&frame.unit.meta, Some(frame.unit.current), &third, &mut second)
            .map_err(|error| format!("encode of a second delta: {error:?}"))?;
        let mut joined = Vec::new();
        match guarded(|| codec.compose(&frame.unit.meta, &frame.bytes, &second, &mut joined))? {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            Err(error) => Err(format!("compose of two good deltas: {error:?}")),
            Ok(()) => frame
                .decodes(codec, &joined, frame.unit.parent, &third)
                .map_err(|broken| format!("the joined delta: {broken}")),
        }
    })
}

/// A frame that was stored once decodes to `case.current` for ever. For golden vectors: not among [`ALL`], since
/// each codec brings its own. `frames` has one frame for each unit.
///
/// # Errors
/// What broke.
pub fn golden(codec: &dyn Codec, case: &CodecCase, mode: Mode, frames: &[&[u8]]) -> Result<(), String> {
    let units = units(codec, case);
    ensure!(units.len() == frames.len(), "{} frames are stored for {} units", frames.len(), units.len());
    for (unit, stored) in units.into_iter().zip(frames) {
        let frame = Frame { unit, mode, bytes: stored.to_vec() };
        frame.decodes(codec, stored, &frame.start(), frame.unit.current)?;
    }
    Ok(())
}
