//! Conformance kits, weight-shaped strategies and fakes. For tests only; outside semver.
//!
//! ```text
//! towline_core::codec_conformance!(mine, MyCodec::default());
//! towline_core::store_conformance!(mine, async { MyStore::fresh().await });
//! towline_core::deployment_conformance!(mine, async { MyHarness::start().await });
//! ```
//! Each law is a function in [`laws`] that returns what broke; each macro makes one `#[test]` of each law.

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
