//! Conformance kits, weight-shaped strategies and fakes. For tests only; outside semver.

mod fakes;

pub use fakes::XorCodec;

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
