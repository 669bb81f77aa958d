//! What callers ask a writer to save.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use towline_core::{Codec, SnapshotKind, SnapshotName, TensorSource, Weights};

use super::info::{Metric, SnapshotInfo};

/// A request to publish weights for samplers.
pub struct Publish {
    pub(super) name: SnapshotName,
    pub(super) kind: SnapshotKind,
    pub(super) weights: Arc<dyn TensorSource>,
    pub(super) parent: Option<(SnapshotInfo, Arc<dyn TensorSource>)>,
    pub(super) codec: Option<Arc<dyn Codec>>,
    pub(super) files: Vec<(String, Bytes)>,
    pub(super) step: Option<u64>,
    pub(super) ttl: Option<Duration>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) metrics: BTreeMap<String, Metric>,
}

impl Publish {
    /// Publishes `weights` as a `kind` called `name`: plain safetensors, for ever, with nothing else.
    pub fn new(name: SnapshotName, kind: SnapshotKind, weights: Arc<dyn TensorSource>) -> Self {
        Self {
            name,
            kind,
            weights,
            parent: None,
            codec: None,
            files: Vec::new(),
            step: None,
            ttl: None,
            metadata: BTreeMap::new(),
            metrics: BTreeMap::new(),
        }
    }

    /// Sets the parent of a delta and its weights, which are checked against its content digest.
    #[must_use]
    pub fn with_parent(mut self, parent: SnapshotInfo, weights: Arc<dyn TensorSource>) -> Self {
        self.parent = Some((parent, weights));
        self
    }

    /// Sets the codec. A delta needs one; without one a base is plain.
    #[must_use]
    pub fn with_codec(mut self, codec: Arc<dyn Codec>) -> Self {
        self.codec = Some(codec);
        self
    }

    /// Sets the files that are passed through, by path: `config.json`, tokenizer files.
    #[must_use]
    pub fn with_files(mut self, files: Vec<(String, Bytes)>) -> Self {
        self.files = files;
        self
    }

    /// Sets the optimizer steps done.
    #[must_use]
    pub fn with_step(mut self, step: u64) -> Self {
        self.step = Some(step);
        self
    }

    /// Sets how long it is kept; `None` for ever.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Option<Duration>) -> Self {
        self.ttl = ttl;
        self
    }

    /// Sets a measurement, by which the best can be kept.
    #[must_use]
    pub fn with_metric(mut self, name: impl Into<String>, value: Metric) -> Self {
        self.metrics.insert(name.into(), value);
        self
    }

    /// Sets the caller's notes.
    #[must_use]
    pub fn with_metadata(mut self, metadata: BTreeMap<String, String>) -> Self {
        self.metadata = metadata;
        self
    }
}

impl fmt::Debug for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publish")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("parent", &self.parent.as_ref().map(|(info, _)| &info.id))
            .field("codec", &self.codec)
            .finish_non_exhaustive()
    }
}

/// A request to save a train state.
pub struct SaveTrainState {
    pub(super) name: SnapshotName,
    pub(super) tensors: Arc<dyn TensorSource>,
    pub(super) step: Option<u64>,
    pub(super) ttl: Option<Duration>,
    pub(super) sections: serde_json::Map<String, serde_json::Value>,
    pub(super) metrics: BTreeMap<String, Metric>,
    pub(super) shared: Option<SnapshotInfo>,
}

impl SaveTrainState {
    /// Saves `tensors` (weights, moments, whatever training resumes from) as `name`, for ever, without sections.
    pub fn new(name: SnapshotName, tensors: Arc<dyn TensorSource>) -> Self {
        Self {
            name,
            tensors,
            step: None,
            ttl: None,
            sections: serde_json::Map::new(),
            metrics: BTreeMap::new(),
            shared: None,
        }
    }

    /// Saves what ranks write as `name`: for [`Writer::begin_state`](crate::Writer::begin_state).
    #[must_use]
    pub fn ranked(name: SnapshotName) -> Self {
        Self::new(name, Arc::new(Weights::default()))
    }

    /// Sets the optimizer steps done.
    #[must_use]
    pub fn with_step(mut self, step: u64) -> Self {
        self.step = Some(step);
        self
    }

    /// Sets how long it is kept; `None` for ever.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Option<Duration>) -> Self {
        self.ttl = ttl;
        self
    }

    /// Refers to the tensors of the train state `earlier` whose bytes are the same, such as those of a frozen vision
    /// tower, and does not write them again. The whole of `earlier` then stays as long as this state does, so that it
    /// is best one that is kept anyway.
    #[must_use]
    pub fn with_shared(mut self, earlier: SnapshotInfo) -> Self {
        self.shared = Some(earlier);
        self
    }

    /// Sets a measurement, by which the best can be kept.
    #[must_use]
    pub fn with_metric(mut self, name: impl Into<String>, value: Metric) -> Self {
        self.metrics.insert(name.into(), value);
        self
    }

    /// Sets the named sections: schedule, RNG, cursor, and the caller's own.
    #[must_use]
    pub fn with_sections(mut self, sections: serde_json::Map<String, serde_json::Value>) -> Self {
        self.sections = sections;
        self
    }
}

impl fmt::Debug for SaveTrainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaveTrainState")
            .field("name", &self.name)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}
