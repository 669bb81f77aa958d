//! What the head knows of a snapshot.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use towline_core::{
    CodecId, Error, ManifestDigest, ObjectKey, Result, SnapshotId, SnapshotKind, SnapshotName,
};

/// A stored snapshot or train state, as the job's head lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// Its number within the job, never used twice.
    pub seq: u64,
    /// What it is.
    pub kind: SnapshotKind,
    /// The caller's name.
    pub name: SnapshotName,
    /// Identity and content digest.
    pub id: SnapshotId,
    /// For a delta: what it must be applied to.
    pub parent: Option<SnapshotId>,
    /// Its folder, below the job's.
    pub dir: ObjectKey,
    /// The digest of its manifest.
    pub manifest: ManifestDigest,
    /// Milliseconds since 1970 when it was written, by the writer's clock.
    pub created_ms: u64,
    /// Milliseconds since 1970 when it expires, by the store's clock; `None` for never.
    pub expires_ms: Option<u64>,
    /// Optimizer steps done.
    pub step: Option<u64>,
    /// Bytes of its files, without the manifest.
    pub stored_bytes: u64,
    /// Bytes of its tensors when they are plain.
    pub full_bytes: u64,
    /// How its tensors are encoded; `None` for plain safetensors.
    pub codec: Option<CodecId>,
    /// What it was measured by, for [`Retention::best`](crate::Retention).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, Metric>,
    /// The folders of other train states in which some of its files lie. They stay as long as it does.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub shares: BTreeSet<ObjectKey>,
}

impl SnapshotInfo {
    /// Whether its time was over at `now_ms`, milliseconds since 1970. It may still be there: because it is needed,
    /// or because nothing has swept yet.
    #[must_use]
    pub fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_ms.is_some_and(|expires| expires <= now_ms)
    }

    /// Whether it cannot be read without `other`, its parent or a state that it shares tensors with.
    pub(super) fn needs(&self, other: &Self) -> bool {
        other.seq < self.seq && (self.parent.as_ref() == Some(&other.id) || self.shares.contains(&other.dir))
    }
}

/// A measurement: a finite number.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Metric(f64);

// It is never a NaN.
impl Eq for Metric {}

impl Metric {
    /// A measurement.
    ///
    /// # Errors
    /// `Invalid` for an infinity and for what is no number.
    pub fn new(value: f64) -> Result<Self> {
        if value.is_finite() {
            return Ok(Self(value));
        }
        Err(Error::invalid(format!("a metric is {value}: wanted a finite number"))
            .with_help("leave it out, or find out why training gave it"))
    }

    /// The number.
    #[must_use]
    pub fn value(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Metric {
    type Error = Error;
    fn try_from(value: f64) -> Result<Self> {
        Self::new(value)
    }
}

impl From<Metric> for f64 {
    fn from(metric: Metric) -> Self {
        metric.0
    }
}

/// Which of a job's snapshots are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a snapshot is for samplers or for trainers")]
pub enum Wanted {
    /// Weights for samplers: everything but train states.
    Sampler,
    /// Train states.
    State,
    /// Both.
    Any,
}

impl Wanted {
    /// Whether snapshots of `kind` are among them.
    #[must_use]
    pub fn takes(self, kind: SnapshotKind) -> bool {
        match self {
            Self::Any => true,
            Self::State => kind == SnapshotKind::State,
            Self::Sampler => kind != SnapshotKind::State,
        }
    }

    /// The class that `kind` belongs to.
    pub(super) fn class(kind: SnapshotKind) -> Self {
        if kind == SnapshotKind::State { Self::State } else { Self::Sampler }
    }

    /// The folder of the class below the job's.
    pub(super) fn folder(self) -> &'static str {
        if self == Self::State { "states" } else { "snapshots" }
    }

    /// What to call one of them.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Self::Sampler => "snapshot",
            Self::State => "train state",
            Self::Any => "snapshot or train state",
        }
    }
}
