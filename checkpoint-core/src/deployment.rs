//! The deployment trait: replicas that serve one model and take new weights while they run.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    CodecId, ContentDigest, Error, OpId, Result, SnapshotId, SnapshotIdentity, SnapshotKind, SnapshotRef,
};

/// A set of replicas that serve one model.
///
/// * A replica serves one snapshot at a time; a request keeps the one that it began with.
/// * A snapshot that cannot be loaded (missing, damaged, of another shape, on another parent) is refused, and the
///   old weights keep serving.
/// * [`Deployment::hot_load`] is idempotent by operation id, and a compare-and-swap: a delta is applied only if
///   what is served is its parent.
/// * All methods may run at once. Dropping a future cancels the wait, not what the deployment has accepted.
///
/// # Implement it like this
/// `testing::FakeDeployment` (feature `testing`) is a complete one in memory.
#[async_trait]
pub trait Deployment: Debug + Send + Sync + 'static {
    /// What this deployment can do. It does not change while it lives.
    fn capabilities(&self) -> Capabilities;

    /// Every replica as it is now.
    ///
    /// # Errors
    /// `Unavailable` if the deployment cannot be asked; never a made-up state.
    async fn status(&self) -> Result<DeploymentStatus>;

    /// Orders `order.snapshot` to be loaded, and returns once the order is accepted. The result shows in
    /// [`Deployment::status`]. The same operation again changes nothing and is `Ok`.
    ///
    /// # Errors
    /// `ChainMismatch` if `order.previous` is not what is served, `NotFound` or `Corrupt` for a snapshot that is
    /// refused at once, `Unsupported` for what [`Deployment::capabilities`] deny, `Conflict` while another
    /// operation is running. After `Unavailable` or `TimedOut` the outcome is unknown.
    async fn hot_load(&self, order: &HotLoad) -> Result<()>;

    /// Runs one small request through the model, so that the first real one does not pay for it.
    ///
    /// # Errors
    /// `Unavailable` while the deployment is not ready to answer.
    async fn warm_up(&self) -> Result<()>;
}

macro_rules! forward {
    ($($pointer:ident)*) => {$(
        #[async_trait]
        #[deny(clippy::missing_trait_methods)]
        impl<T: Deployment + ?Sized> Deployment for $pointer<T> {
            fn capabilities(&self) -> Capabilities { (**self).capabilities() }
            async fn status(&self) -> Result<DeploymentStatus> { (**self).status().await }
            async fn hot_load(&self, order: &HotLoad) -> Result<()> { (**self).hot_load(order).await }
            async fn warm_up(&self) -> Result<()> { (**self).warm_up().await }
        }
    )*};
}
forward!(Arc Box);

/// What a deployment can do. Ask, don't try.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The codecs whose deltas it applies itself, best first. Empty: it takes bases only.
    pub delta_codecs: Vec<CodecId>,
    /// Whether it has a prompt cache that a hot-load can reset.
    pub resets_prompt_cache: bool,
    /// Whether it loads LoRA adapters.
    pub adapters: bool,
}

impl Capabilities {
    /// Bases, and deltas of these codecs, best first. No prompt cache, no adapters.
    #[must_use]
    pub fn new(delta_codecs: Vec<CodecId>) -> Self {
        Self { delta_codecs, resets_prompt_cache: false, adapters: false }
    }

    /// Sets whether a hot-load can reset the prompt cache.
    #[must_use]
    pub fn with_prompt_cache(mut self, resets: bool) -> Self {
        self.resets_prompt_cache = resets;
        self
    }

    /// Sets whether LoRA adapters are loaded.
    #[must_use]
    pub fn with_adapters(mut self, adapters: bool) -> Self {
        self.adapters = adapters;
        self
    }

    /// Checks that `snapshot` is of a kind and codec that can be loaded. The first line of a
    /// [`Deployment::hot_load`].
    ///
    /// # Errors
    /// `Unsupported` for a delta in a codec that is not listed and for an adapter where none are loaded; `Invalid`
    /// for a train state.
    pub fn check(&self, snapshot: &SnapshotRef) -> Result<()> {
        match (snapshot.kind, &snapshot.codec) {
            (SnapshotKind::Delta, Some(codec)) if self.delta_codecs.contains(codec) => Ok(()),
            (SnapshotKind::Delta, codec) => {
                let codec = codec.as_ref().map_or("no codec", CodecId::as_str);
                Err(Error::unsupported(format!(
                    "{} is a delta in {codec}, which is not applied here",
                    snapshot.id
                ))
                .with_help("save a base, or choose a codec that the capabilities list"))
            }
            (SnapshotKind::Adapter, _) if !self.adapters => {
                Err(Error::unsupported(format!("{} is an adapter, and none are loaded here", snapshot.id))
                    .with_help("save a merged base"))
            }
            (SnapshotKind::State, _) => {
                Err(Error::invalid(format!("{} is a train state, which cannot be served", snapshot.id))
                    .with_help("save a sampler checkpoint"))
            }
            (SnapshotKind::Base | SnapshotKind::MergedBase | SnapshotKind::Adapter, _) => Ok(()),
        }
    }
}

/// One order to load a snapshot.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct HotLoad {
    /// Chosen by the caller; the same operation is the same order.
    pub op: OpId,
    /// What to load, where it lies, and how to know it.
    pub snapshot: SnapshotRef,
    /// What must be served now. Always the parent for a delta; `None` for a base means whatever is served.
    pub previous: Option<SnapshotId>,
    /// Whether cached prompts are dropped with the old weights. Default true.
    pub reset_prompt_cache: bool,
}

impl HotLoad {
    /// An order; a delta's parent becomes `previous`.
    ///
    /// # Errors
    /// `Invalid` for a train state, which cannot be served, and for a delta without a parent.
    pub fn new(op: OpId, snapshot: SnapshotRef) -> Result<Self> {
        use crate::SnapshotKind::{Adapter, Base, Delta, MergedBase, State};
        match (snapshot.kind, &snapshot.parent) {
            (State, _) => {
                Err(Error::invalid(format!("{} is a train state, which cannot be served", snapshot.id))
                    .with_help("save a sampler checkpoint"))
            }
            (Delta, None) => Err(Error::invalid(format!("the delta {} names no parent", snapshot.id))),
            (Delta, parent) => Ok(Self { op, previous: parent.clone(), snapshot, reset_prompt_cache: true }),
            (Base | MergedBase | Adapter, _) => {
                Ok(Self { op, snapshot, previous: None, reset_prompt_cache: true })
            }
        }
    }

    /// Sets whether cached prompts are dropped.
    #[must_use]
    pub fn with_reset_prompt_cache(mut self, reset: bool) -> Self {
        self.reset_prompt_cache = reset;
        self
    }
}

/// Where a replica is with a hot-load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Stage {
    /// Nothing is being loaded.
    Idle,
    /// Bytes are being fetched, decoded and checked.
    Load,
    /// The weights are being swapped.
    Swap,
    /// The last load failed; the old weights keep serving.
    Error,
}

/// One replica as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplicaStatus {
    /// Its name within the deployment.
    pub name: String,
    /// The snapshot that it serves; `None` before the first load.
    pub identity: Option<SnapshotIdentity>,
    /// The content digest of what it serves, if it can tell.
    pub digest: Option<ContentDigest>,
    /// Whether it answers requests and takes hot-loads.
    pub ready: bool,
    /// Where it is with a hot-load.
    pub stage: Stage,
    /// The snapshot that `stage` is about.
    pub target: Option<SnapshotIdentity>,
    /// Why the last load failed.
    pub error: Option<String>,
    /// How long the last load took to fetch, decode and check, if it tells.
    pub load: Option<Duration>,
    /// How much of that was checking, if it tells.
    pub verify: Option<Duration>,
    /// How long requests had to wait for the last swap, if it tells.
    pub pause: Option<Duration>,
}

impl ReplicaStatus {
    /// A replica that serves nothing and is not ready.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            identity: None,
            digest: None,
            ready: false,
            stage: Stage::Idle,
            target: None,
            error: None,
            load: None,
            verify: None,
            pause: None,
        }
    }
}

/// Every replica of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DeploymentStatus {
    /// The replicas.
    pub replicas: Vec<ReplicaStatus>,
    /// The model that they serve, if they tell.
    pub model: Option<String>,
}

/// What has become of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "an operation goes on, is done, or has failed")]
pub enum Outcome {
    /// Not every replica is there yet.
    Running,
    /// Every replica serves the snapshot and is ready.
    Committed,
    /// A replica refused it, and why.
    Failed(String),
}

impl DeploymentStatus {
    /// These replicas.
    #[must_use]
    pub fn new(replicas: Vec<ReplicaStatus>) -> Self {
        Self { replicas, model: None }
    }

    /// Sets the model that they serve.
    #[must_use]
    pub fn with_model(mut self, model: Option<String>) -> Self {
        self.model = model;
        self
    }

    /// What has become of loading `target`: committed only if **every** replica serves it and is ready. An error
    /// about another snapshot is stale and counts for nothing.
    #[must_use]
    pub fn outcome(&self, target: &SnapshotId) -> Outcome {
        for replica in &self.replicas {
            if replica.stage == Stage::Error && replica.target.as_ref() == Some(&target.identity) {
                let why = replica.error.as_deref().unwrap_or("no reason given");
                return Outcome::Failed(format!("replica {}: {why}", replica.name));
            }
            // The same name over other weights: somebody loaded something else under it.
            if replica.identity.as_ref() == Some(&target.identity)
                && replica.digest.is_some_and(|digest| digest != target.digest)
            {
                return Outcome::Failed(format!(
                    "replica {} serves other weights under the name {}",
                    replica.name, target.identity
                ));
            }
        }
        let there =
            |replica: &ReplicaStatus| replica.ready && replica.identity.as_ref() == Some(&target.identity);
        if !self.replicas.is_empty() && self.replicas.iter().all(there) {
            Outcome::Committed
        } else {
            Outcome::Running
        }
    }

    /// The one identity that all replicas serve, with its digest if all tell it; `None` if none serves anything.
    ///
    /// # Errors
    /// `Conflict` if replicas differ, `Unavailable` if there are no replicas.
    pub fn served(&self) -> Result<Option<(SnapshotIdentity, Option<ContentDigest>)>> {
        let Some((first, rest)) = self.replicas.split_first() else {
            return Err(Error::unavailable("the deployment reports no replicas")
                .with_help("wait until it has started, or start one"));
        };
        if let Some(other) =
            rest.iter().find(|replica| (&replica.identity, replica.digest) != (&first.identity, first.digest))
        {
            let name = |replica: &ReplicaStatus| match &replica.identity {
                Some(identity) => format!("{} serves {identity}", replica.name),
                None => format!("{} serves nothing", replica.name),
            };
            return Err(Error::conflict(format!("the replicas differ: {}, {}", name(first), name(other)))
                .with_help("hot-load a base"));
        }
        Ok(first.identity.clone().map(|identity| (identity, first.digest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SnapshotId {
        SnapshotId {
            identity: SnapshotIdentity::new(name).unwrap(),
            digest: ContentDigest::from_bytes([1; 32]),
        }
    }

    fn replica(name: &str, serves: &str, ready: bool) -> ReplicaStatus {
        let mut replica = ReplicaStatus::new(name);
        replica.identity = Some(SnapshotIdentity::new(serves).unwrap());
        replica.ready = ready;
        replica
    }

    #[test]
    fn one_lagging_replica_is_not_a_success() {
        let status = DeploymentStatus::new(vec![replica("0", "new", true), replica("1", "old", true)]);
        assert_eq!(status.outcome(&id("new")), Outcome::Running);
        assert_eq!(status.served().unwrap_err().kind(), crate::ErrorKind::Conflict);
        assert_eq!(DeploymentStatus::default().outcome(&id("new")), Outcome::Running);
    }

    #[test]
    fn a_stale_error_about_another_snapshot_counts_for_nothing() {
        let mut failed = replica("0", "old", true);
        failed.stage = Stage::Error;
        failed.target = Some(SnapshotIdentity::new("other").unwrap());
        let mut status = DeploymentStatus::new(vec![failed]);
        assert_eq!(status.outcome(&id("new")), Outcome::Running);
        status.replicas[0].target = Some(SnapshotIdentity::new("new").unwrap());
        assert!(matches!(status.outcome(&id("new")), Outcome::Failed(_)));
    }

    #[test]
    fn the_same_name_over_other_weights_is_a_failure() {
        let mut status = DeploymentStatus::new(vec![replica("0", "new", true)]);
        assert_eq!(status.outcome(&id("new")), Outcome::Committed);
        status.replicas[0].digest = Some(ContentDigest::from_bytes([2; 32]));
        assert!(matches!(status.outcome(&id("new")), Outcome::Failed(_)));
    }
}
