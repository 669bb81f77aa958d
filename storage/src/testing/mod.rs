//! Stores and connections that fail on purpose. For tests only; outside semver.
//!
//! * [`FaultStore`] injects faults into any store by a seeded [`Plan`], and dies at any operation: a crash that is
//!   simulated within the process.
//! * [`LyingStore`] breaks one promise of the store trait at a time: what checks stores must catch it.
//! * [`Proxy`] stands between a client and a server and cuts, slows or swallows what passes.
//!
//! ```
//! use std::sync::Arc;
//! use towline_core::{ErrorKind, ObjectKey, SnapshotStore};
//! use towline_storage::Memory;
//! use towline_storage::testing::{Fault, FaultStore, Operation, Plan, Rule};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> towline_core::Result<()> {
//! let plan = Plan::new(7).with(Rule::new(Fault::Refuse(ErrorKind::Unavailable), 1000).on(&[Operation::Head]));
//! let store = FaultStore::new(Arc::new(Memory::new()), plan);
//! let error = store.head(&ObjectKey::new("a")?).await.unwrap_err();
//! assert_eq!(error.kind(), ErrorKind::Unavailable);
//! assert_eq!(store.injected(), ["1 head a: refused with unavailable"]);
//! # Ok(())
//! # }
//! ```

mod faults;
mod lying;
mod plan;
mod proxy;

pub use faults::FaultStore;
pub use lying::{Lie, LyingStore};
pub use plan::{Fault, Operation, Plan, Rule};
pub use proxy::{Direction, Proxy};
