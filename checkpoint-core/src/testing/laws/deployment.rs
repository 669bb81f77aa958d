//! What every deployment keeps. Each law takes a harness around one that was just started, and returns what broke.

mod loads;
mod refusals;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

pub use loads::{
    bases_follow_each_other, deltas_apply, serves_after_the_order, status_is_truthful,
    the_same_operation_is_one_swap, warms_up,
};
pub use refusals::{
    a_corrupt_snapshot_is_refused, a_wrong_parent_is_refused, an_unknown_snapshot_is_refused,
    denied_is_unsupported,
};

use super::{Checked, Told, ensure, skipped};
use crate::testing::mix::Mix;
use crate::{
    ContentDigest, DType, Deployment, Error, HotLoad, OpId, Outcome, Result as CoreResult, SnapshotRef,
    TensorMeta, Weights,
};

/// What the laws need around a deployment: something to load, and a look at what is really served.
#[async_trait]
pub trait DeploymentHarness: Send + Sync + 'static {
    /// The deployment, always the same one.
    fn deployment(&self) -> Arc<dyn Deployment>;

    /// Stores `weights` as a base where the deployment finds them, under a new name each time.
    ///
    /// # Errors
    /// As the store answers; the law then fails.
    async fn publish(&self, weights: &Weights) -> CoreResult<SnapshotRef>;

    /// Stores `weights` as a delta on `parent`, which was published here and is served now, in a codec that the
    /// deployment lists.
    ///
    /// # Errors
    /// As the store answers. `Unsupported`, the default, skips the laws about deltas.
    async fn publish_delta(&self, parent: &SnapshotRef, _weights: &Weights) -> CoreResult<SnapshotRef> {
        Err(Error::unsupported(format!("this harness publishes no delta on {}", parent.id)))
    }

    /// The content digest of what is served, taken from the replicas themselves and not from
    /// [`Deployment::status`]; `None` if nothing is.
    ///
    /// # Errors
    /// If replicas differ or cannot be looked into; the law then fails.
    async fn served(&self) -> CoreResult<Option<ContentDigest>>;

    /// Weights that the deployment can serve: other ones for each seed, all with the same tensors. By default a
    /// tiny set of [`tiny_weights`]; an engine overrides it with its own shapes.
    fn weights(&self, seed: u64) -> Weights {
        tiny_weights(seed)
    }

    /// Damages the stored bytes of a published snapshot. `false`, the default, says that it cannot: the law is
    /// then skipped.
    ///
    /// # Errors
    /// As the store answers; the law then fails.
    async fn corrupt(&self, _snapshot: &SnapshotRef) -> CoreResult<bool> {
        Ok(false)
    }

    /// How long one hot-load may take. Default 30 s.
    fn deadline(&self) -> Duration {
        Duration::from_secs(30)
    }
}

/// Three small tensors whose bytes depend on `seed`.
///
/// # Panics
/// Never: names and shapes are well formed.
#[expect(clippy::expect_used, reason = "names and shapes are well formed by construction")]
#[must_use]
pub fn tiny_weights(seed: u64) -> Weights {
    let mut mix = Mix::new(seed);
    let tensors = [
        ("embed.weight", DType::BF16, vec![8, 4]),
        ("head.bias", DType::F32, vec![5]),
        ("step", DType::I64, vec![]),
    ];
    Weights::new(tensors.map(|(name, dtype, shape)| {
        let meta = TensorMeta::new(name, dtype, shape).expect("a well-formed tensor");
        let data = Bytes::from(mix.bytes(meta.byte_len()));
        (meta, data)
    }))
    .expect("unique names and fitting lengths")
}

/// A law of deployments, boxed so that all have one type.
pub type Law = fn(Arc<dyn DeploymentHarness>) -> Checked;

/// Every law with its name.
pub const ALL: &[(&str, Law)] = &[
    ("serves_after_the_order", |harness| Box::pin(serves_after_the_order(harness))),
    ("bases_follow_each_other", |harness| Box::pin(bases_follow_each_other(harness))),
    ("the_same_operation_is_one_swap", |harness| Box::pin(the_same_operation_is_one_swap(harness))),
    ("deltas_apply", |harness| Box::pin(deltas_apply(harness))),
    ("a_wrong_parent_is_refused", |harness| Box::pin(a_wrong_parent_is_refused(harness))),
    ("an_unknown_snapshot_is_refused", |harness| Box::pin(an_unknown_snapshot_is_refused(harness))),
    ("a_corrupt_snapshot_is_refused", |harness| Box::pin(a_corrupt_snapshot_is_refused(harness))),
    ("denied_is_unsupported", |harness| Box::pin(denied_is_unsupported(harness))),
    ("status_is_truthful", |harness| Box::pin(status_is_truthful(harness))),
    ("warms_up", |harness| Box::pin(warms_up(harness))),
];

/// Checks `law` on `harness`, within eight times its deadline.
///
/// # Errors
/// What broke.
pub async fn check<F>(
    harness: impl DeploymentHarness,
    law: impl FnOnce(Arc<dyn DeploymentHarness>) -> F,
) -> Result<(), String>
where
    F: Future<Output = Result<(), String>>,
{
    let deadline = harness.deadline() * 8;
    tokio::time::timeout(deadline, law(Arc::new(harness)))
        .await
        .unwrap_or_else(|_| Err(format!("not done after {} s", deadline.as_secs())))
}

type Harness = Arc<dyn DeploymentHarness>;

fn order(op: &str, snapshot: &SnapshotRef) -> Result<HotLoad, String> {
    HotLoad::new(OpId::new(op).told("an operation id of the kit")?, snapshot.clone()).told("an order")
}

/// Publishes the weights of `seed` as a base.
async fn published(harness: &Harness, seed: u64) -> Result<SnapshotRef, String> {
    let weights = harness.weights(seed);
    let snapshot = harness.publish(&weights).await.told("publish")?;
    ensure!(
        snapshot.id.digest == weights.content_digest(),
        "the harness published other weights than it was given, under {}",
        snapshot.id
    );
    Ok(snapshot)
}

/// Publishes the weights of `seed` as a delta, or says why not.
async fn published_delta(
    harness: &Harness,
    law: &str,
    parent: &SnapshotRef,
    seed: u64,
) -> Result<Option<SnapshotRef>, String> {
    if harness.deployment().capabilities().delta_codecs.is_empty() {
        skipped(law, "the deployment lists no delta codec");
        return Ok(None);
    }
    match harness.publish_delta(parent, &harness.weights(seed)).await {
        Ok(snapshot) => Ok(Some(snapshot)),
        Err(error) if error.kind() == crate::ErrorKind::Unsupported => {
            skipped(law, "the harness publishes no deltas");
            Ok(None)
        }
        Err(error) => Err(format!("publish a delta: {error:?}")),
    }
}

/// Publishes the weights of `seed` as a base and has them served.
async fn loaded(harness: &Harness, op: &str, seed: u64) -> Result<SnapshotRef, String> {
    let snapshot = published(harness, seed).await?;
    commit(harness, &order(op, &snapshot)?).await?;
    Ok(snapshot)
}

/// Orders, and waits until it is committed and really served.
async fn commit(harness: &Harness, order: &HotLoad) -> Result<(), String> {
    let id = &order.snapshot.id;
    harness.deployment().hot_load(order).await.told(format_args!("hot-load of {id}"))?;
    match settled(harness, order).await? {
        Outcome::Committed => serves(harness, &order.snapshot).await,
        Outcome::Failed(why) => Err(format!("the hot-load of {id} failed: {why}")),
        Outcome::Running => Err(format!("the hot-load of {id} is not done after {:?}", harness.deadline())),
    }
}

/// Orders what must be refused, at once or later; the kind of the refusal if it came at once.
async fn refused(harness: &Harness, order: &HotLoad, what: &str) -> Result<Option<crate::ErrorKind>, String> {
    match harness.deployment().hot_load(order).await {
        Err(error) if matches!(error.kind(), crate::ErrorKind::Internal) => Err(format!("{what}: {error:?}")),
        Err(error) => Ok(Some(error.kind())),
        Ok(()) => match settled(harness, order).await? {
            Outcome::Failed(_) => Ok(None),
            Outcome::Committed => Err(format!("{what} was loaded")),
            Outcome::Running => {
                Err(format!("{what} was neither loaded nor refused in {:?}", harness.deadline()))
            }
        },
    }
}

async fn settled(harness: &Harness, order: &HotLoad) -> Result<Outcome, String> {
    const PAUSE: Duration = Duration::from_millis(5);
    let deployment = harness.deployment();
    let mut left = harness.deadline();
    loop {
        let outcome = deployment.status().await.told("status")?.outcome(&order.snapshot.id);
        if outcome != Outcome::Running || left.is_zero() {
            return Ok(outcome);
        }
        tokio::time::sleep(PAUSE).await;
        left = left.saturating_sub(PAUSE);
    }
}

/// What is served is `snapshot`, by the replicas themselves and by the status.
async fn serves(harness: &Harness, snapshot: &SnapshotRef) -> Result<(), String> {
    let found = harness.served().await.told("look at what is served")?;
    ensure!(
        found == Some(snapshot.id.digest),
        "{} with {:?} should be served, but {found:?} is",
        snapshot.id,
        snapshot.id.digest
    );
    let status = harness.deployment().status().await.told("status")?;
    let told = status.served().told("served by the status")?;
    let same = told.as_ref().is_some_and(|(identity, digest)| {
        *identity == snapshot.id.identity && digest.is_none_or(|digest| digest == snapshot.id.digest)
    });
    ensure!(same, "{} is served, but the status says {told:?}", snapshot.id);
    Ok(())
}
