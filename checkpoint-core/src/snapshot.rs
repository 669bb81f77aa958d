//! What snapshots are, and the small references that flow back from the calls that make them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{CodecId, ContentDigest, Error, ManifestDigest, Result, SnapshotIdentity};

/// What the caller asks a sampler save for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::exhaustive_enums, reason = "the mission's three types")]
pub enum CheckpointType {
    /// Full weights.
    Base,
    /// The difference from what the deployment confirmed.
    Delta,
    /// LoRA only: the adapter folded into the base model's weights.
    MergedBase,
}

impl CheckpointType {
    /// The name on the wire and on command lines.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Delta => "delta",
            Self::MergedBase => "merged_base",
        }
    }
}

impl fmt::Display for CheckpointType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CheckpointType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "base" => Ok(Self::Base),
            "delta" => Ok(Self::Delta),
            "merged_base" => Ok(Self::MergedBase),
            other => Err(Error::invalid(format!(
                "{} is no checkpoint type: wanted base, delta or merged_base",
                crate::id::shown(other)
            ))),
        }
    }
}

/// What a stored snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SnapshotKind {
    /// Full weights of a full-parameter model.
    Base,
    /// The difference from a parent.
    Delta,
    /// A LoRA model with its adapter folded in: full weights.
    MergedBase,
    /// A whole LoRA adapter.
    Adapter,
    /// A train state: weights, optimizer, schedule, step, RNG, sections. Resumable, never promotable.
    State,
}

impl SnapshotKind {
    /// Whether it can be promoted to a deployable model.
    #[must_use]
    pub fn is_promotable(self) -> bool {
        match self {
            Self::Base | Self::MergedBase | Self::Adapter => true,
            Self::Delta | Self::State => false,
        }
    }

    /// Whether training can resume from it.
    #[must_use]
    pub fn is_resumable(self) -> bool {
        self == Self::State
    }

    /// The name in manifests and listings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Delta => "delta",
            Self::MergedBase => "merged_base",
            Self::Adapter => "adapter",
            Self::State => "state",
        }
    }
}

impl fmt::Display for SnapshotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A snapshot by both its names: what humans call it and what its weights are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "complete by nature: a name and a content")]
pub struct SnapshotId {
    /// `<name>-<session>`.
    pub identity: SnapshotIdentity,
    /// The content digest of the weights that it stands for (of a delta: of the result).
    pub digest: ContentDigest,
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.identity)
    }
}

/// A stored snapshot, as its export returned it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SnapshotRef {
    /// Identity and content digest.
    pub id: SnapshotId,
    /// What it is.
    pub kind: SnapshotKind,
    /// For a delta: what it must be applied to.
    pub parent: Option<SnapshotId>,
    /// How its tensors are encoded; `None` for plain safetensors.
    pub codec: Option<CodecId>,
    /// Where it lies: a path below the store's root, or a service's own path.
    pub path: String,
    /// The digest of its manifest; `None` if a service keeps it.
    pub manifest: Option<ManifestDigest>,
    /// Bytes in the store.
    pub stored_bytes: u64,
    /// Bytes of the weights when they are plain.
    pub full_bytes: u64,
    /// The share of elements that differ from the parent, 0 to 1; `None` for a base or if unknown.
    pub changed_share: Option<f64>,
}

impl SnapshotRef {
    /// A reference with what every export knows; sizes are 0 until they are set.
    pub fn new(id: SnapshotId, kind: SnapshotKind, path: impl Into<String>) -> Self {
        Self {
            id,
            kind,
            parent: None,
            codec: None,
            path: path.into(),
            manifest: None,
            stored_bytes: 0,
            full_bytes: 0,
            changed_share: None,
        }
    }

    /// Sets the parent of a delta.
    #[must_use]
    pub fn with_parent(mut self, parent: Option<SnapshotId>) -> Self {
        self.parent = parent;
        self
    }

    /// Sets the codec.
    #[must_use]
    pub fn with_codec(mut self, codec: Option<CodecId>) -> Self {
        self.codec = codec;
        self
    }

    /// Sets the manifest's digest.
    #[must_use]
    pub fn with_manifest(mut self, manifest: ManifestDigest) -> Self {
        self.manifest = Some(manifest);
        self
    }

    /// Sets the sizes in bytes, and the changed share.
    #[must_use]
    pub fn with_sizes(mut self, stored_bytes: u64, full_bytes: u64, changed_share: Option<f64>) -> Self {
        self.stored_bytes = stored_bytes;
        self.full_bytes = full_bytes;
        self.changed_share = changed_share;
        self
    }
}
