//! Small complete implementations, to test the code around them and to read as examples.

mod codec;
mod deployment;
mod exporter;
mod snapshots;
mod store;

pub use codec::XorCodec;
pub use deployment::{FakeDeployment, Fault};
pub use exporter::FakeExporter;
pub use snapshots::{FakeSnapshots, SnapshotSource};
pub use store::FakeStore;
