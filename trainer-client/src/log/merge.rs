//! What the store has, and what only the log knew about it.

use std::collections::{BTreeMap, BTreeSet};

use super::line::CheckpointLine;

/// The outcome of [`merge_lines`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergedLines {
    /// The lines of the store, in its order, with what only the log knew.
    pub lines: Vec<CheckpointLine>,
    /// Lines of the log that no line of the store stands for: the checkpoint is gone, or was never in this store.
    pub gone: Vec<CheckpointLine>,
}

/// Rebuilds the lines of a log from those that its store gives, oldest first.
///
/// Two lines are about the same checkpoint if they have the same name and share a kind: both a `state_path`, or both a
/// `sampler_path`. The store's line then takes from the newest old one what it does not say itself: unknown keys, and
/// known ones such as `data_consumed`. Paths come from the store alone. A line of the log for which the store has
/// another path of the same name and kind is not gone: the store's word counts.
#[must_use]
pub fn merge_lines(old: &[CheckpointLine], stored: Vec<CheckpointLine>) -> MergedLines {
    let mut by_name: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, line) in old.iter().enumerate() {
        by_name.entry(&line.name).or_default().push(index);
    }
    let mut known = BTreeSet::new();
    let lines = stored
        .into_iter()
        .map(|mut line| {
            for index in by_name.get(line.name.as_str()).into_iter().flatten().rev() {
                let Some(older) = old.get(*index) else { continue };
                if share_a_kind(&line, older) {
                    line.fill(older);
                    known.insert(*index);
                }
            }
            line
        })
        .collect();
    let gone = old
        .iter()
        .enumerate()
        .filter(|(index, _)| !known.contains(index))
        .map(|(_, line)| line.clone())
        .collect();
    MergedLines { lines, gone }
}

fn share_a_kind(one: &CheckpointLine, other: &CheckpointLine) -> bool {
    (one.state_path.is_some() && other.state_path.is_some())
        || (one.sampler_path.is_some() && other.sampler_path.is_some())
}
