//! What a sync did and what it cost.

use std::fmt;

use serde::{Deserialize, Serialize};
use towline_core::{SnapshotKind, SnapshotRef};

/// What a sync did and what it cost. Times are in seconds; those that did not happen are 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Receipt {
    /// What was saved.
    pub snapshot: SnapshotRef,
    /// Its kind.
    pub kind: SnapshotKind,
    /// Why it has this kind.
    pub reason: String,
    /// Whether every replica serves it; false without a deployment, where it was only saved.
    pub synced: bool,
    /// Bytes in the store.
    pub stored_bytes: u64,
    /// Bytes of the weights when they are plain.
    pub full_bytes: u64,
    /// `stored_bytes / full_bytes`, as codecs are measured: 0.01 is a hundredth of a full copy. 1 if there are no weights.
    pub ratio: f64,
    /// The share of elements that differ from the parent, 0 to 1; `None` for a base or if unknown.
    pub changed_share: Option<f64>,
    /// The save, until it was durable. 0 for a hot-load of something saved before.
    pub save_s: f64,
    /// From the order until every replica was ready, as seen from here.
    pub load_s: f64,
    /// How much of the load was checking, on the slowest replica; 0 if the deployment does not tell.
    pub verify_s: f64,
    /// The warm-up request, with all its attempts.
    pub warm_up_s: f64,
    /// Why the warm-up failed. The sync holds all the same.
    pub warm_up_error: Option<String>,
    /// From the start of the save until every replica was ready; without a deployment, until the save was durable.
    pub time_to_fresh_s: f64,
    /// How long requests had to wait for the swap, on the slowest replica; `None` if the deployment does not tell.
    pub pause_s: Option<f64>,
    /// Whether the deployment was told to drop its cached prompts.
    pub reset_prompt_cache: bool,
    /// How many replicas serve it.
    pub replicas: usize,
}

impl Receipt {
    /// A receipt of a snapshot that has been saved and not synced.
    pub(crate) fn saved(snapshot: SnapshotRef, reason: String, save_s: f64) -> Self {
        Self {
            kind: snapshot.kind,
            reason,
            synced: false,
            stored_bytes: snapshot.stored_bytes,
            full_bytes: snapshot.full_bytes,
            ratio: ratio(snapshot.stored_bytes, snapshot.full_bytes),
            changed_share: snapshot.changed_share,
            save_s,
            load_s: 0.0,
            verify_s: 0.0,
            warm_up_s: 0.0,
            warm_up_error: None,
            time_to_fresh_s: save_s,
            pause_s: None,
            reset_prompt_cache: false,
            replicas: 0,
            snapshot,
        }
    }
}

/// One line for a log.
impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({}): {} bytes, ", self.kind, self.snapshot.id, self.reason, self.stored_bytes)?;
        if !self.synced {
            return write!(f, "saved in {:.3} s, not synced", self.save_s);
        }
        write!(f, "{:.2} % of a full copy, fresh on {} replicas ", 100.0 * self.ratio, self.replicas)?;
        write!(f, "after {:.3} s", self.time_to_fresh_s)?;
        match &self.warm_up_error {
            Some(error) => write!(f, ", warm-up failed: {error}"),
            None => Ok(()),
        }
    }
}

fn ratio(stored: u64, full: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a ratio for humans")]
    if full == 0 { 1.0 } else { stored as f64 / full as f64 }
}
