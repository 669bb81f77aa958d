//! Drives a codec over a set of tensors: cuts them into units, runs the units on scoped threads, digests the
//! results, and keeps a bounded number of bytes in memory.

mod decode;
mod encode;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::digest::DIGEST_BLOCK;
use crate::{Error, Result, TensorMeta, Unit};

pub use decode::{Decode, decode, decode_all, verify};
pub use encode::{Encoded, Summary, encode};

/// How many threads and how much memory a run may use.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Limits {
    /// Threads that encode or decode. Default 1: the caller knows the machine.
    pub threads: NonZeroUsize,
    /// Plain bytes in work at once, besides those that are handed on next: a unit of the codec, however large. Default
    /// 32 MiB.
    pub window: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { threads: NonZeroUsize::MIN, window: 32 << 20 }
    }
}

impl Limits {
    /// The default window with this many threads (0 counts as 1).
    #[must_use]
    pub fn threads(threads: usize) -> Self {
        Self { threads: NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN), ..Self::default() }
    }

    /// Sets the window in bytes.
    #[must_use]
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = window;
        self
    }
}

/// The parts of a tensor that one thread works on: whole units and whole blocks of a digest. A unit that neither
/// divides such a block nor is divided by it makes the tensor one part. An empty tensor is one empty part.
fn spans(unit: Unit, byte_len: usize) -> impl ExactSizeIterator<Item = Range<usize>> + Clone {
    let size = match unit {
        Unit::Block(size) if DIGEST_BLOCK.is_multiple_of(size.get()) => DIGEST_BLOCK,
        Unit::Block(size) if size.get().is_multiple_of(DIGEST_BLOCK) => size.get(),
        Unit::Block(_) | Unit::Whole => byte_len.max(1),
    };
    (0..byte_len.div_ceil(size).max(1))
        .map(move |at| at * size..((at + 1).saturating_mul(size)).min(byte_len))
}

/// How many units a tensor has.
fn units(unit: Unit, meta: &TensorMeta) -> usize {
    unit.ranges(meta.byte_len()).len()
}

/// Runs `job(0..count)` on at most `threads` scoped threads and returns the first error.
fn run(count: usize, threads: NonZeroUsize, job: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            if let Err(error) = job(index) {
                next.store(count, Ordering::Relaxed);
                if let Ok(mut failed) = failed.lock() {
                    failed.get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(count) {
            scope.spawn(work);
        }
        work();
    });
    match failed.into_inner().map_err(poisoned)? {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn poisoned<T>(_: std::sync::PoisonError<T>) -> Error {
    Error::internal("a codec panicked on another thread").with_help("run the codec conformance kit on it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::XorCodec;
    use crate::{Codec, CodecId, DType, Mode, Modes, TensorDigest, TensorSource, UnitMeta, Weights};
    use bytes::Bytes;
    use std::sync::OnceLock;

    fn weights(seed: u8) -> Weights {
        Weights::new((0..20u8).map(|index| {
            let length = usize::from(index) * 1000;
            let data: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_mul(3) ^ seed ^ index).collect();
            (TensorMeta::new(format!("t{index:02}"), DType::U16, [length / 2]).unwrap(), data.into())
        }))
        .unwrap()
    }

    fn encode_all(threads: usize, window: usize) -> Vec<(TensorMeta, Encoded)> {
        let mut all = Vec::new();
        let limits = Limits::threads(threads).with_window(window);
        encode(&XorCodec, &weights(1), Some(&weights(9)), limits, &mut |meta, encoded| {
            all.push((meta.clone(), encoded));
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn the_output_does_not_depend_on_threads_or_window() {
        let one = encode_all(1, usize::MAX);
        for (threads, window) in [(2, 1), (7, 10_000)] {
            let other = encode_all(threads, window);
            for ((meta, left), (_, right)) in one.iter().zip(&other) {
                assert_eq!(left.frames, right.frames, "{}", meta.name());
                let (left, right) = (left.whole.as_ref().unwrap(), right.whole.as_ref().unwrap());
                assert_eq!(left.digest, right.digest);
                assert_eq!(left.changed, right.changed);
            }
        }
    }

    /// Says other bytes' digests are its own.
    struct Stale(Weights, Weights);

    impl TensorSource for Stale {
        fn tensors(&self) -> &[TensorMeta] {
            self.0.tensors()
        }
        fn read(&self, index: usize) -> Result<Bytes> {
            self.0.read(index)
        }
        fn digest(&self, index: usize) -> Option<&OnceLock<TensorDigest>> {
            self.1.digest(index)
        }
    }

    #[test]
    fn digests_are_kept_for_the_next_step() {
        let (first, second, third) = (weights(1), weights(2), weights(3));
        let parents = |current: &dyn TensorSource, parent: &dyn TensorSource| {
            let mut parents = Vec::new();
            encode(&XorCodec, current, Some(parent), Limits::default(), &mut |_, encoded| {
                parents.extend(encoded.whole.and_then(|whole| whole.parent_digest));
                Ok(())
            })
            .map(|()| parents)
        };
        let taken = parents(&second, &first).unwrap();
        assert_eq!(taken, first.iter().map(|(_, data)| TensorDigest::of(data)).collect::<Vec<_>>());
        assert!((0..20).all(|index| second.digest(index).unwrap().get().is_some()));
        let kept = parents(&third, &second.clone()).unwrap();
        assert_eq!(kept, second.iter().map(|(_, data)| TensorDigest::of(data)).collect::<Vec<_>>());
        assert_eq!(second.content_digest(), weights(2).content_digest());
        // What is known is not taken again, and what was encoded before must still be the same.
        assert_eq!(parents(&third, &Stale(first, second.clone())).unwrap(), kept);
        let error = parents(&Stale(third, second), &weights(1)).unwrap_err();
        assert!(error.to_string().contains("the bytes of tensor `t01` changed"), "{error}");
    }

    /// As `XorCodec`, but fails or panics on tensor `t10`.
    #[derive(Debug)]
    struct Faulty {
        panics: bool,
    }

    impl Codec for Faulty {
        fn id(&self) -> CodecId {
            XorCodec.id()
        }

        fn unit(&self) -> Unit {
            XorCodec.unit()
        }

        fn modes(&self) -> Modes {
            XorCodec.modes()
        }

        fn encode(
            &self,
            unit: &UnitMeta<'_>,
            parent: Option<&[u8]>,
            current: &[u8],
            out: &mut Vec<u8>,
        ) -> Result<()> {
            assert!(!self.panics || unit.name != "t10", "as the test wants");
            if unit.name == "t10" {
                return Err(Error::invalid("no"));
            }
            XorCodec.encode(unit, parent, current, out)
        }

        fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
            XorCodec.decode(unit, mode, encoded, target)
        }
    }

    #[test]
    fn an_error_or_a_panic_ends_all_threads() {
        for (threads, window) in [(1, 1), (2, 1), (3, 20_000), (8, usize::MAX)] {
            let limits = Limits::threads(threads).with_window(window);
            let run = |codec: &dyn Codec, emit: &mut dyn FnMut(&TensorMeta, Encoded) -> Result<()>| {
                encode(codec, &weights(1), None, limits, emit)
            };
            let mut seen = Vec::new();
            let error = run(&Faulty { panics: false }, &mut |meta, _| {
                seen.push(meta.name().to_owned());
                Ok(())
            });
            assert!(error.unwrap_err().message().contains("t10"));
            assert!(seen.iter().all(|name| name.as_str() < "t10"), "{seen:?}");
            let error = run(&XorCodec, &mut |meta, _| match meta.name() {
                "t05" => Err(Error::invalid("full")),
                _ => Ok(()),
            });
            assert_eq!(error.unwrap_err().message(), "full");
            let panics = |codec: &dyn Codec, emit: &mut dyn FnMut(&TensorMeta, Encoded) -> Result<()>| {
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(codec, emit))).is_err()
            };
            assert!(panics(&Faulty { panics: true }, &mut |_, _| Ok(())));
            assert!(panics(&XorCodec, &mut |_, _| panic!("as the test wants")));
        }
    }

    #[test]
    fn decode_brings_the_new_weights_back_and_verify_finds_a_wrong_parent() {
        for (meta, encoded) in encode_all(2, usize::MAX) {
            let frames: Vec<Bytes> = encoded.frames.into_iter().map(Bytes::from).collect();
            let mut target = weights(9).get(meta.name()).unwrap().1.to_vec();
            let threads = NonZeroUsize::new(3).unwrap();
            decode(&XorCodec, &meta, Mode::Delta, &frames, XorCodec.unit(), &mut target, threads).unwrap();
            let digest = encoded.whole.unwrap().digest;
            verify(&XorCodec, &meta, &target, Some(&digest), None).unwrap();
            assert_eq!(weights(1).get(meta.name()).unwrap().1, &target);
            if let Some(byte) = target.first_mut() {
                *byte ^= 1;
                assert!(verify(&XorCodec, &meta, &target, Some(&digest), None).is_err());
            }
            if frames.len() > 1 {
                assert!(
                    decode(&XorCodec, &meta, Mode::Delta, &frames, Unit::Whole, &mut target, threads)
                        .is_err()
                );
            }
        }
    }

    #[test]
    fn a_parent_with_other_tensors_is_refused() {
        let error =
            encode(&XorCodec, &weights(1), Some(&Weights::default()), Limits::default(), &mut |_, _| Ok(()))
                .unwrap_err();
        assert!(error.message().contains("t00"), "{error}");
    }
}
