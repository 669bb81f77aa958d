//! Weight sync: what a trainer has learnt goes onto running inference servers while they answer requests.
//!
//! * [`WeightSyncer`] saves a snapshot, hot-loads it, waits until **every** replica serves it, and says in a
//!   [`Receipt`] what that cost. It keeps the delta chain: a delta goes out only against what the deployment has
//!   confirmed.
//! * [`DeploymentManager`] (feature `http`, on by default) is a [`towline_core::Deployment`] behind the public
//!   hot-load API; [`wire`] has that API's JSON, for clients and servers alike.
//!
//! # Where the public Python client answers `None` or `False`
//!
//! | Python | there | here |
//! |---|---|---|
//! | `save_only` | `None` if the save failed | `Err`, with the trainer's or store's kind |
//! | `save_and_hotload` | raises | `Err`; if the snapshot was saved, the message says so |
//! | `hotload` | `False` if the load failed | `Err`: `ChainMismatch`, `TimedOut`, … |
//! | `hotload` without a deployment | `False` | `Err` of kind `Invalid` |
//! | `hotload_and_wait`, `wait_for_hotload` | `False` on an error or a timeout | `Err`: `Corrupt`, `TimedOut` |
//! | `check_deployment_state` | `None` for no deployment, no replicas, a failed request, and nothing loaded | `Err` `Invalid`, `Err` `Unavailable`, `Err` of the request, and `Ok(None)` |
//! | `check_deployment_state`, replicas differ | the first replica's | `Err` of kind `Conflict` |
//! | `warmup` | `False` | `Err`; after a sync, text in the receipt |
//! | `wait_for_hotload_ready` without a deployment | returns at once | `Err` of kind `Invalid` |

mod load;
#[cfg(feature = "http")]
mod manager;
#[cfg(feature = "http")]
mod net;
mod random;
mod receipt;
mod settings;
mod sync;
pub mod wire;

#[cfg(feature = "http")]
pub use manager::DeploymentManager;
#[cfg(feature = "http")]
pub use net::http_client;
pub use receipt::Receipt;
pub use settings::SyncSettings;
pub use sync::WeightSyncer;
