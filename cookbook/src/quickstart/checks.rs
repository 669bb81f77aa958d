//! What the quickstart checks of itself.

use std::fmt;

use serde::Serialize;
use towline_core::{Error, LOOP, Result};
use towline_storage::{SnapshotRepo, Wanted};

use super::supervisor::Story;

/// One check and what it found.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    name: &'static str,
    result: Verdict,
    found: String,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

impl Check {
    pub(crate) fn passed(name: &'static str, found: String) -> Self {
        Self { name, result: Verdict::Passed, found }
    }

    pub(crate) fn failed(name: &'static str, found: String) -> Self {
        Self { name, result: Verdict::Failed, found }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.result == Verdict::Failed
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let result = match self.result {
            Verdict::Passed => "passed ",
            Verdict::Failed => "FAILED ",
            Verdict::Skipped => "skipped",
        };
        write!(f, "  {result}  {}: {}", self.name, self.found)
    }
}

/// The killed run ended as the undisturbed one: weights, moments, RNG, cursor and rewards, bit for bit.
pub(crate) async fn same_end(
    ours: &SnapshotRepo,
    our_end: Option<&str>,
    theirs: &SnapshotRepo,
    their_end: Option<&str>,
) -> Result<Check> {
    let name = "resumed = never killed";
    let (Some(our_end), Some(their_end)) = (our_end, their_end) else {
        return Err(Error::internal("a run has no last state"));
    };
    let ours = ours.load_state(&ours.find(our_end, Wanted::State).await?).await?;
    let theirs = theirs.load_state(&theirs.find(their_end, Wanted::State).await?).await?;
    let differing = ours
        .tensors
        .iter()
        .filter(|(meta, data)| theirs.tensors.get(meta.name()).is_none_or(|(_, other)| other != *data));
    let differing: Vec<_> = differing.map(|(meta, _)| meta.name().to_owned()).collect();
    if !differing.is_empty() {
        return Ok(Check::failed(
            name,
            format!("{} tensors differ, the first is {}", differing.len(), differing[0]),
        ));
    }
    if ours.manifest.sections.get(LOOP) != theirs.manifest.sections.get(LOOP)
        || ours.manifest.step != theirs.manifest.step
    {
        return Ok(Check::failed(name, "cursor, RNG or rewards differ".into()));
    }
    Ok(Check::passed(
        name,
        format!(
            "{} tensors (weights and moments), cursor, RNG and rewards bit-identical",
            ours.tensors.tensors().len()
        ),
    ))
}

/// The reward rises: mean exact match of the last 10 steps against the first 10.
pub(crate) fn learning(story: &Story, steps: u64) -> Check {
    let name = "learning";
    if steps < 100 {
        let found = format!("{steps} steps are too few to judge by; the default is 120");
        return Check { name, result: Verdict::Skipped, found };
    }
    let exact: Vec<f64> = story.steps.values().map(|(_, exact)| *exact).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (first, last) = (mean(&exact[..exact.len().min(10)]), mean(&exact[exact.len().saturating_sub(10)..]));
    let found =
        format!("exact match {first:.3} in the first 10 steps, {last:.3} in the last 10 (+0.25 wanted)");
    if last >= first + 0.25 { Check::passed(name, found) } else { Check::failed(name, found) }
}
