//! What is ordered is served.

use std::sync::Arc;

use super::{DeploymentHarness, commit, loaded, order, published, published_delta, serves, settled};
use crate::Outcome;
use crate::testing::laws::{Told, ensure};

/// A base that was ordered is committed on all replicas, and is what they serve.
///
/// # Errors
/// What broke.
pub async fn serves_after_the_order(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    loaded(&harness, "op-1", 1).await?;
    Ok(())
}

/// Any base may follow any other, an older one too.
///
/// # Errors
/// What broke.
pub async fn bases_follow_each_other(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let first = loaded(&harness, "op-1", 1).await?;
    loaded(&harness, "op-2", 2).await?;
    commit(&harness, &order("op-3", &first)?).await
}

/// The same operation again is `Ok` and changes nothing: not right behind itself, and not when other weights have
/// been loaded since.
///
/// # Errors
/// What broke.
pub async fn the_same_operation_is_one_swap(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let first = published(&harness, 1).await?;
    let op = order("op-1", &first)?;
    commit(&harness, &op).await?;
    harness.deployment().hot_load(&op).await.told("the same operation again")?;
    ensure!(settled(&harness, &op).await? == Outcome::Committed, "the same operation again undid itself");
    serves(&harness, &first).await?;
    let second = loaded(&harness, "op-2", 2).await?;
    harness.deployment().hot_load(&op).await.told("the same operation after another one")?;
    // Time for a swap that must not come.
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        serves(&harness, &second).await.map_err(|broken| format!("an old operation came again: {broken}"))?;
    }
    Ok(())
}

/// Deltas on what is served are applied, one after the other.
///
/// # Errors
/// What broke.
pub async fn deltas_apply(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let mut parent = loaded(&harness, "op-0", 0).await?;
    for seed in 1..4 {
        let Some(delta) = published_delta(&harness, "deltas_apply", &parent, seed).await? else {
            return Ok(());
        };
        commit(&harness, &order(&format!("op-{seed}"), &delta)?).await?;
        parent = delta;
    }
    // The same weights again, so a delta of nothing.
    let Some(delta) = published_delta(&harness, "deltas_apply", &parent, 3).await? else { return Ok(()) };
    commit(&harness, &order("op-4", &delta)?).await
}

/// After a load every replica says that it is ready, serves that identity, and tells the digest or none.
///
/// # Errors
/// What broke.
pub async fn status_is_truthful(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let before = harness.deployment().status().await.told("status before a load")?;
    ensure!(!before.replicas.is_empty(), "the status tells no replicas");
    for seed in 1..4 {
        let snapshot = loaded(&harness, &format!("op-{seed}"), seed).await?;
        let status = harness.deployment().status().await.told("status")?;
        for replica in &status.replicas {
            ensure!(
                replica.ready,
                "replica {} serves {} and says it is not ready",
                replica.name,
                snapshot.id
            );
            ensure!(
                replica.identity.as_ref() == Some(&snapshot.id.identity),
                "replica {} should say {}, says {:?}",
                replica.name,
                snapshot.id,
                replica.identity
            );
            ensure!(
                replica.digest.is_none_or(|digest| digest == snapshot.id.digest),
                "replica {} tells another digest than that of {}",
                replica.name,
                snapshot.id
            );
        }
        ensure!(
            status.replicas.len() == before.replicas.len(),
            "{} replicas became {}",
            before.replicas.len(),
            status.replicas.len()
        );
    }
    Ok(())
}

/// Warming up works once something is served, again too, and changes nothing.
///
/// # Errors
/// What broke.
pub async fn warms_up(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let snapshot = loaded(&harness, "op-1", 1).await?;
    for time in ["first", "second"] {
        harness.deployment().warm_up().await.told(format_args!("the {time} warm-up"))?;
    }
    serves(&harness, &snapshot).await
}
