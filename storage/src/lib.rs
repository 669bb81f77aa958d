//! The transactional snapshot store of Towline.
//!
//! Two layers. A [`towline_core::SnapshotStore`] keeps objects: [`Memory`], [`Local`], or any back end of the
//! `object_store` crate through [`ObjectAdapter`]; [`open`] picks one by URL. A [`SnapshotRepo`] keeps the snapshots
//! and train states of one job on such a store: data come first, then the manifest, and the compare-and-swap of
//! `head.json` is the commit. A snapshot exists exactly when the head says so.
//!
//! ```text
//! <job>/head.json                                the only object that is ever replaced
//! <job>/snapshots/<seq>-<name>-<write id>/       immutable: model-00001-of-000NN.safetensors | .towline, …
//! <job>/states/<seq>-<name>-<write id>/          immutable: rank-0-0.safetensors, …, rank-0.json
//!     manifest.json                              written last, if absent
//! <job>/leases/<seq>-<seconds>-<id>              readers that must not be disturbed
//! <job>/clock                                    written to learn the store's time
//! ```
//!
//! With the feature `slime`, snapshots go to and come from the `weight_v…` directories of slime and miles.
//!
//! Opening a [`Writer`] fences the one before it: two trainers can never both commit.
//!
//! Futures need a tokio runtime with its timer.

#[cfg(any(feature = "s3", feature = "gcs", feature = "azure"))]
mod cloud;
mod folder;
mod io;
#[cfg(feature = "local")]
mod local;
mod memory;
mod object;
mod open;
mod options;
mod random;
mod repo;
mod shard;
#[cfg(feature = "slime")]
pub mod slime;
mod spool;
#[cfg(feature = "testing")]
pub mod testing;

pub use io::FileSource;
#[cfg(feature = "local")]
pub use local::Local;
pub use memory::Memory;
pub use object::ObjectAdapter;
pub use open::open;
pub use options::StoreOptions;
pub use repo::{
    BackgroundSaver, Best, BoxRead, Depth, Finding, Kept, Lease, LoadedModel, MAX_HEAD, Metric, Orphan, Pin,
    Promote, Prune, Pruned, Publish, RankPart, RankReceipt, RankedSave, Repaired, Retention, SaveTrainState,
    SnapshotInfo, SnapshotRepo, StateReader, StateTicket, TrainState, Verified, Wanted, WhenBusy, Writer,
    jobs,
};
pub use shard::{ShardReader, ShardSummary, first_payload, write_shard};
