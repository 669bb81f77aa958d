//! Training clients: whoever trains, behind [`towline_core::TrainingClient`] and
//! [`towline_core::SnapshotExporter`].
//!
//! * [`EmbeddedClient`] runs a trainer that lives in this process, a [`Backend`].
//! * [`PendingExt::wait`] waits for a submitted operation until a deadline.
//!
//! Operations are submitted when they are called, not when their handle is polled, and run in that order. Dropping
//! a handle cancels nothing.

mod embedded;
mod ledger;
mod wait;

pub use embedded::{Backend, EmbeddedClient};
pub use wait::PendingExt;
