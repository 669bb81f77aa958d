//! A trainer in memory that only exports.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::FakeSnapshots;
use crate::{
    ContentDigest, DeltaParents, Error, ErrorKind, ExportRequest, Result, SessionId, SnapshotExporter,
    SnapshotId, SnapshotIdentity, SnapshotKind, SnapshotRef, Weights,
};

/// A complete [`SnapshotExporter`] in memory. Clones share the trainer.
///
/// It holds whatever it exported, and can diff against any of it or against its last export alone, as it is told.
#[derive(Debug, Clone)]
pub struct FakeExporter {
    snapshots: FakeSnapshots,
    parents: DeltaParents,
    restored: Option<ContentDigest>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    weights: Weights,
    session: SessionId,
    held: BTreeMap<ContentDigest, Weights>,
    last: Option<(SnapshotId, Weights)>,
    requests: Vec<ExportRequest>,
    fail: Option<ErrorKind>,
}

impl FakeExporter {
    /// A trainer of session `00000001` that has these weights, publishes into `snapshots`, and diffs against
    /// anything that it exported.
    #[must_use]
    pub fn new(snapshots: FakeSnapshots, weights: Weights) -> Self {
        let state = State {
            weights,
            session: SessionId::from_random([0, 0, 0, 1]),
            held: BTreeMap::new(),
            last: None,
            requests: Vec::new(),
            fail: None,
        };
        Self { snapshots, parents: DeltaParents::Any, restored: None, state: Arc::new(Mutex::new(state)) }
    }

    /// Sets what it diffs against.
    #[must_use]
    pub fn with_parents(mut self, parents: DeltaParents) -> Self {
        self.parents = parents;
        self
    }

    /// Sets the session, which is the suffix of its snapshots' names.
    #[must_use]
    pub fn with_session(self, session: SessionId) -> Self {
        self.lock().session = session;
        self
    }

    /// Says that it was restored from `weights`, which it then holds.
    #[must_use]
    pub fn with_restored(mut self, weights: &Weights) -> Self {
        let digest = weights.content_digest();
        self.restored = Some(digest);
        self.hold(weights);
        self
    }

    /// Training happened: these are the weights now.
    pub fn set_weights(&self, weights: Weights) {
        self.lock().weights = weights;
    }

    /// The weights now.
    #[must_use]
    pub fn weights(&self) -> Weights {
        self.lock().weights.clone()
    }

    /// Lets it diff against `weights`, as if they were in its store.
    pub fn hold(&self, weights: &Weights) {
        self.lock().held.insert(weights.content_digest(), weights.clone());
    }

    /// Lets the next export fail with this kind.
    pub fn fail_next(&self, kind: ErrorKind) {
        self.lock().fail = Some(kind);
    }

    /// Every request, failed ones included.
    #[must_use]
    pub fn requests(&self) -> Vec<ExportRequest> {
        self.lock().requests.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights of the delta's parent.
    fn parent(&self, state: &State, request: &ExportRequest) -> Result<(SnapshotId, Weights)> {
        let wanted = request.parent.as_ref();
        let wanted =
            wanted.ok_or_else(|| Error::invalid(format!("the delta {} names no parent", request.name)))?;
        let found = match self.parents {
            DeltaParents::Any => {
                state.held.get(&wanted.digest).map(|weights| (wanted.clone(), weights.clone()))
            }
            DeltaParents::LastExported => state.last.clone().filter(|(last, _)| last == wanted),
        };
        found.ok_or_else(|| {
            Error::chain_mismatch(format!(
                "{} is a delta on {wanted}, which cannot be diffed against",
                request.name
            ))
            .with_help("save a base")
        })
    }
}

#[async_trait]
impl SnapshotExporter for FakeExporter {
    fn delta_parents(&self) -> DeltaParents {
        self.parents
    }

    async fn export(&self, request: ExportRequest) -> Result<SnapshotRef> {
        let mut state = self.lock();
        state.requests.push(request.clone());
        if let Some(kind) = state.fail.take() {
            return Err(Error::new(kind, "a fault of the test"));
        }
        let weights = state.weights.clone();
        let identity = SnapshotIdentity::of(&request.name, &state.session);
        let id = SnapshotId { identity, digest: weights.content_digest() };
        let path = format!("snapshots/{}", id.identity);
        let full = weights.byte_len();
        let (payload, snapshot) = match request.kind {
            SnapshotKind::Delta => {
                let (parent, old) = self.parent(&state, &request)?;
                let payload = FakeSnapshots::delta(&old, &weights)?;
                let changed: usize =
                    payload.iter().map(|(_, mask)| mask.iter().filter(|byte| **byte != 0).count()).sum();
                let share = if full == 0 { 0.0 } else { changed as f64 / full as f64 };
                let snapshot = SnapshotRef::new(id, request.kind, path)
                    .with_parent(Some(parent))
                    .with_codec(Some(request.codec))
                    .with_sizes(changed as u64, full, Some(share));
                (payload, snapshot)
            }
            SnapshotKind::Base | SnapshotKind::MergedBase | SnapshotKind::Adapter => {
                (weights.clone(), SnapshotRef::new(id, request.kind, path).with_sizes(full, full, None))
            }
            SnapshotKind::State => return Err(Error::unsupported("this exporter saves no train states")),
        };
        self.snapshots.publish(&snapshot, payload)?;
        state.held.insert(snapshot.id.digest, weights.clone());
        state.last = Some((snapshot.id.clone(), weights));
        Ok(snapshot)
    }

    async fn holds(&self, digest: &ContentDigest) -> Result<bool> {
        Ok(self.lock().held.contains_key(digest))
    }

    fn restored(&self) -> Option<ContentDigest> {
        self.restored
    }
}
