//! What must not be loaded is refused, and the old weights keep serving.

use std::sync::Arc;

use super::{DeploymentHarness, commit, loaded, order, published, published_delta, refused, serves};
use crate::testing::laws::{Told, fails, skipped};
use crate::{CodecId, ErrorKind, SnapshotKind};

/// A delta whose parent is not what is served is refused; the old weights keep serving, and a right delta is
/// applied afterwards.
///
/// # Errors
/// What broke.
pub async fn a_wrong_parent_is_refused(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    const LAW: &str = "a_wrong_parent_is_refused";
    let first = loaded(&harness, "op-1", 1).await?;
    let Some(wrong) = published_delta(&harness, LAW, &first, 2).await? else { return Ok(()) };
    let second = loaded(&harness, "op-2", 3).await?;
    match refused(&harness, &order("op-3", &wrong)?, "a delta on a snapshot that is not served").await? {
        None | Some(ErrorKind::ChainMismatch) => {}
        Some(kind) => return Err(format!("a delta on another parent: wanted chain_mismatch, found {kind}")),
    }
    serves(&harness, &second).await?;
    let Some(right) = published_delta(&harness, LAW, &second, 4).await? else { return Ok(()) };
    commit(&harness, &order("op-4", &right)?).await
}

/// A snapshot that is not stored is refused; the old weights keep serving.
///
/// # Errors
/// What broke.
pub async fn an_unknown_snapshot_is_refused(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let served = loaded(&harness, "op-1", 1).await?;
    let mut unknown = published(&harness, 2).await?;
    unknown.id.identity =
        crate::SnapshotIdentity::new("never-published-00000000").told("an identity of the kit")?;
    unknown.path = "never-published-00000000".into();
    refused(&harness, &order("op-2", &unknown)?, "a snapshot that was never published").await?;
    serves(&harness, &served).await?;
    loaded(&harness, "op-3", 3).await.map_err(|broken| format!("after a refusal: {broken}"))?;
    Ok(())
}

/// A snapshot whose bytes are damaged is refused; the old weights keep serving, and the next good one is loaded.
///
/// # Errors
/// What broke.
pub async fn a_corrupt_snapshot_is_refused(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let served = loaded(&harness, "op-1", 1).await?;
    let bad = published(&harness, 2).await?;
    if !harness.corrupt(&bad).await.told("damage a snapshot")? {
        skipped("a_corrupt_snapshot_is_refused", "the harness cannot damage a snapshot");
        return Ok(());
    }
    refused(&harness, &order("op-2", &bad)?, "a damaged snapshot").await?;
    serves(&harness, &served).await?;
    loaded(&harness, "op-3", 3).await.map_err(|broken| format!("after a refusal: {broken}"))?;
    Ok(())
}

/// What [`crate::Capabilities`] deny is `Unsupported` at once: a delta in a codec that is not listed, an adapter
/// where none are loaded.
///
/// # Errors
/// What broke.
pub async fn denied_is_unsupported(harness: Arc<dyn DeploymentHarness>) -> Result<(), String> {
    let deployment = harness.deployment();
    let served = loaded(&harness, "op-1", 1).await?;
    let capabilities = deployment.capabilities();
    let mut delta = published(&harness, 2).await?;
    delta.kind = SnapshotKind::Delta;
    delta.parent = Some(served.id.clone());
    delta.codec = Some(CodecId::new("kit-unlisted").told("a codec id of the kit")?);
    let outcome = deployment.hot_load(&order("op-2", &delta)?).await;
    fails(outcome, ErrorKind::Unsupported, "a delta in a codec that is not listed")?;
    serves(&harness, &served).await?;
    if !capabilities.adapters {
        let mut adapter = published(&harness, 3).await?;
        adapter.kind = SnapshotKind::Adapter;
        let outcome = deployment.hot_load(&order("op-3", &adapter)?).await;
        fails(outcome, ErrorKind::Unsupported, "an adapter where none are loaded")?;
        serves(&harness, &served).await?;
    }
    if deployment.capabilities() != capabilities {
        return Err("the capabilities changed while the deployment lived".into());
    }
    Ok(())
}
