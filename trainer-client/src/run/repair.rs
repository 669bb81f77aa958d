//! The log rebuilt from what exists.

use towline_core::{CheckpointCatalog, ErrorKind, JobId, Result};

use super::position::Stored;
use super::{blocking, line, state_path};
use crate::log::{CheckpointLine, CheckpointLog, Repaired};

/// Rebuilds the log of `job` from the catalog: what only the log knew of a checkpoint that exists stays, and lines of what
/// is gone are set aside. No trainer is needed.
///
/// # Errors
/// What catalog and disk answer; `Corrupt` for a damaged state; `Conflict` if somebody wrote to the log meanwhile.
pub async fn repair_log(
    catalog: &dyn CheckpointCatalog,
    job: &JobId,
    log: &CheckpointLog,
) -> Result<Repaired> {
    let reader = log.clone();
    let before = blocking(move || reader.salvage()).await?;
    let mut lines: Vec<CheckpointLine> = Vec::new();
    for info in catalog.list_checkpoints(job).await?.into_iter().rev() {
        // A save of both is one line.
        let known = lines.iter().rposition(|line| line.name == info.name.as_str() && line.step == info.step);
        let mut line = match known {
            Some(at) => lines.remove(at),
            None => line(job, None, &info.name, info.step.unwrap_or(0)),
        };
        if !info.resumable {
            lines.push(line.with_sampler_path(info.id.identity.as_str()));
            continue;
        }
        let stored = match catalog.loop_state(&info).await {
            Ok(entries) => Stored::parse(entries).ok(),
            // A state that something else has saved has no position.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => None,
            Err(error) => return Err(error),
        };
        if let Some(stored) = stored {
            if let Some(model) = &stored.base_model {
                line = line.with_base_model(model.as_str());
            }
            line = stored.position().describe(line);
        }
        lines.push(line.with_state_path(state_path(job, &info.name)));
    }
    let log = log.clone();
    blocking(move || log.repair(&before, lines)).await
}
