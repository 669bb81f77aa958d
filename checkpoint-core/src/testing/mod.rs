//! Conformance kits, weight-shaped strategies and fakes. For tests only; outside semver.
//!
//! ```text
//! towline_core::codec_conformance!(mine, MyCodec::default());
//! towline_core::store_conformance!(mine, async { MyStore::fresh().await });
//! towline_core::deployment_conformance!(mine, async { MyHarness::start().await });
//! ```
//! Each law is a function in [`laws`] that returns what broke; each macro makes one `#[test]` of each law.
//!
//! # Test a codec of your own
//! The macro checks what every codec keeps, on tensors of every kind. What *your* codec is for, tell it: the knobs of
//! [`strategies::TensorPairs`] make tensors like yours, any law takes them, and proptest shrinks what breaks to a
//! few elements.
//! ```
//! use towline_core::testing::laws::codec::{check_with, round_trip};
//! use towline_core::testing::strategies::{Drift, Parent, TensorPairs};
//! use towline_core::testing::proptest::prelude::*;
//! use towline_core::testing::proptest::test_runner::{Config, TestRunner};
//! use towline_core::testing::XorCodec as MyCodec;
//! use towline_core::{Codec, DType, UnitMeta};
//!
//! // Made for bf16 weights of which few change, and by little.
//! let pairs = || {
//!     TensorPairs::new()
//!         .dtypes([DType::BF16])
//!         .elements(1..1500)
//!         .parents([Parent::Trained, Parent::Special])
//!         .drifts([Drift::Ulps { per_mille: 20, most: 1 }])
//!         .strategy()
//! };
//! check_with(&MyCodec, round_trip, pairs(), 50)?;
//!
//! // A property of your own: a frame is never much longer than the tensor.
//! TestRunner::new(Config::with_cases(50)).run(&pairs(), |(meta, parent, current)| {
//!     let mut frame = Vec::new();
//!     let unit = UnitMeta::new(&meta, 0..meta.byte_len());
//!     MyCodec.encode(&unit, Some(&parent), &current, &mut frame).unwrap();
//!     prop_assert!(frame.len() <= current.len() + 16, "{} bytes for {meta:?}", frame.len());
//!     Ok(())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod alloc;
mod fakes;
pub mod laws;
mod macros;
mod mix;
pub mod strategies;

pub use alloc::CountingAllocator;
pub use fakes::{FakeDeployment, FakeExporter, FakeSnapshots, FakeStore, Fault, SnapshotSource, XorCodec};
pub use laws::deployment::{DeploymentHarness, tiny_weights};
pub use proptest;

/// Runs a future on a fresh multi-threaded runtime, with all of its drivers.
///
/// # Panics
/// If the runtime cannot be built.
#[expect(clippy::expect_used, reason = "a test without a runtime cannot go on")]
pub fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future)
}
