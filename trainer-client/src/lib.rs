//! Training clients: whoever trains, behind [`towline_core::TrainingClient`] and
//! [`towline_core::SnapshotExporter`].
//!
//! * [`EmbeddedClient`] runs a trainer that lives in this process, a [`Backend`].
//! * [`PendingExt::wait`] waits for a submitted operation until a deadline.
//! * [`CheckpointLog`] is the run log `checkpoints.jsonl`, which the public cookbooks read and write too, and
//!   [`Dataloader`] reads the `dataloader.json` of one of them.
//! * [`Run`] saves a loop's checkpoints and finds what it goes on from; [`CheckpointManager`] decides when.
//!
//! Operations are submitted when they are called, not when their handle is polled, and run in that order. Dropping
//! a handle cancels nothing.

mod embedded;
mod ledger;
mod log;
mod run;
mod wait;

pub use embedded::{Backend, EmbeddedClient};
pub use log::{
    Appended, BadLine, CheckpointLine, CheckpointLog, Dataloader, LogRead, MergedLines, Repaired,
    SalvagedLog, TornLine, merge_lines,
};
pub use run::{
    CheckpointManager, CheckpointSettings, DataChanged, Every, Finished, Init, Position, Resume, Resumed,
    Run, SaveKind, Saved, repair_log,
};
pub use wait::PendingExt;
