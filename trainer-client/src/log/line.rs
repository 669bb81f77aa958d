//! One line of the run log, in both public dialects at once.

use std::collections::BTreeSet;

use serde::Serialize;
use serde::de::DeserializeOwned;
use towline_core::{Error, Result};

use super::form::{KNOWN, ascii, parse, shown, write};

/// The key that marks a line which [`super::CheckpointLog`] has repeated for readers of the last line.
const REPEATED: &str = "towline_repeat";
/// A checkpoint as one line of `checkpoints.jsonl`: what the Fireworks cookbook (March and April 2026) writes, what the
/// tinker-cookbook writes, and every other key as it was found.
///
/// | field | Fireworks | tinker-cookbook |
/// |---|---|---|
/// | `name`, `state_path`, `sampler_path` | yes | yes |
/// | `step`, `data_consumed`, `raw_rows_consumed`, `source_job_id`, `base_model`, `training_shape` | yes | kept as extra |
/// | `batch`, `epoch`, `final`, `rolling` | not read | yes |
///
/// [`CheckpointLine::with_step`] sets `step` and `batch`, so that a loop of either cookbook goes on from there. What is
/// `None` is not written; `null` is read as `None`. Written lines are ASCII without spaces between their parts: the
/// Fireworks reader cuts lines at every Unicode line end, also inside a text, and the other one decodes with the locale.
/// A known key with a value of another type makes the line a bad one, as do a key that comes twice and a missing or
/// empty `name`. Unknown keys keep their order and the text of their values (numbers that no `f64` holds, Python's
/// `NaN`); only signs beyond ASCII are escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointLine {
    /// The checkpoint's name as the store has it, such as `step-40`. Not empty.
    pub name: String,
    /// Optimizer steps done.
    pub step: Option<u64>,
    /// Rows of the data set consumed.
    pub data_consumed: Option<u64>,
    /// Raw rows consumed, where rows are dropped on the way; a reader takes `data_consumed` in its place.
    pub raw_rows_consumed: Option<u64>,
    /// Batches done, of the epoch where there is one.
    pub batch: Option<u64>,
    /// Epochs done.
    pub epoch: Option<u64>,
    /// `final`: whether this is the save at the end of the run.
    pub is_final: Option<bool>,
    /// Whether the checkpoint is deleted after the next one of its kind. The line stays then.
    pub rolling: Option<bool>,
    /// The job that saved it.
    pub source_job_id: Option<String>,
    /// Where the train state is, such as `cross_job://job/step-40`. Present exactly when it can be resumed from.
    pub state_path: Option<String>,
    /// The snapshot's name, or where it is.
    pub sampler_path: Option<String>,
    /// The base model, so that a promotion need not be told.
    pub base_model: Option<String>,
    /// The training shape of a hosted trainer.
    pub training_shape: Option<String>,
    /// Keys of others in their order, and values as JSON text in ASCII.
    pub(super) extra: Vec<(String, String)>,
}

impl CheckpointLine {
    /// A line with nothing but a name. [`super::CheckpointLog::append`] wants a path too.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            step: None,
            data_consumed: None,
            raw_rows_consumed: None,
            batch: None,
            epoch: None,
            is_final: None,
            rolling: None,
            source_job_id: None,
            state_path: None,
            sampler_path: None,
            base_model: None,
            training_shape: None,
            extra: Vec::new(),
        }
    }

    /// Sets the steps done as `step` and as `batch`: each cookbook goes on from its own. Loops over epochs set the
    /// second one apart, with [`CheckpointLine::with_batch`].
    #[must_use]
    pub fn with_step(mut self, step: u64) -> Self {
        (self.step, self.batch) = (Some(step), Some(step));
        self
    }

    /// Sets the batches done, of the epoch where there is one.
    #[must_use]
    pub fn with_batch(mut self, batch: u64) -> Self {
        self.batch = Some(batch);
        self
    }

    /// Sets the epochs done.
    #[must_use]
    pub fn with_epoch(mut self, epoch: u64) -> Self {
        self.epoch = Some(epoch);
        self
    }

    /// Sets the rows consumed.
    #[must_use]
    pub fn with_data_consumed(mut self, rows: u64) -> Self {
        self.data_consumed = Some(rows);
        self
    }

    /// Sets the raw rows consumed.
    #[must_use]
    pub fn with_raw_rows_consumed(mut self, rows: u64) -> Self {
        self.raw_rows_consumed = Some(rows);
        self
    }

    /// Marks the save at the end of the run.
    #[must_use]
    pub fn with_final(mut self, is_final: bool) -> Self {
        self.is_final = Some(is_final);
        self
    }

    /// Marks a checkpoint that is deleted after the next one of its kind.
    #[must_use]
    pub fn with_rolling(mut self, rolling: bool) -> Self {
        self.rolling = Some(rolling);
        self
    }

    /// Sets the job that saved it.
    #[must_use]
    pub fn with_source_job(mut self, job: impl Into<String>) -> Self {
        self.source_job_id = Some(job.into());
        self
    }

    /// Sets where the train state is.
    #[must_use]
    pub fn with_state_path(mut self, path: impl Into<String>) -> Self {
        self.state_path = Some(path.into());
        self
    }

    /// Sets the snapshot's name, or where it is.
    #[must_use]
    pub fn with_sampler_path(mut self, path: impl Into<String>) -> Self {
        self.sampler_path = Some(path.into());
        self
    }

    /// Sets the base model.
    #[must_use]
    pub fn with_base_model(mut self, model: impl Into<String>) -> Self {
        self.base_model = Some(model.into());
        self
    }

    /// Sets the training shape.
    #[must_use]
    pub fn with_training_shape(mut self, shape: impl Into<String>) -> Self {
        self.training_shape = Some(shape.into());
        self
    }

    /// Sets a key of the caller's own, in place of the value it had.
    ///
    /// # Errors
    /// `Invalid` for a key that has a field, for the log's own key `towline_repeat`, and for a value that JSON cannot hold.
    pub fn with_extra(mut self, key: &str, value: impl Serialize) -> Result<Self> {
        if KNOWN.contains(&key) || key == REPEATED {
            let message = format!("`{key}` is a key of the run log itself, wanted one of the caller's own");
            return Err(
                Error::invalid(message).with_help("set the field of that name, or choose another key")
            );
        }
        let text = serde_json::to_string(&value).map_err(|error| {
            Error::invalid(format!("the value of `{key}` is nothing that JSON holds")).with_source(error)
        })?;
        self.extra.retain(|(found, _)| found != key);
        self.extra.push((key.to_owned(), ascii(&text)));
        Ok(self)
    }

    /// The value of a key that has no field, or `None` if it is not there.
    ///
    /// # Errors
    /// `Corrupt` if it is of another type, or a word that only Python reads (`NaN`).
    pub fn extra<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.extra_json(key) else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|error| {
            let message = format!(
                "`{key}` of the checkpoint `{}` is {}, of another type than wanted",
                self.name,
                shown(text)
            );
            Error::corrupt(message).with_source(error)
        })
    }

    /// The text of the value of a key that has no field, in ASCII.
    #[must_use]
    pub fn extra_json(&self, key: &str) -> Option<&str> {
        self.extra.iter().find(|(found, _)| found == key).map(|(_, text)| text.as_str())
    }

    /// The keys that have no field, in their order.
    pub fn extra_keys(&self) -> impl Iterator<Item = &str> {
        self.extra.iter().map(|(key, _)| key.as_str())
    }

    /// Whether a run can be resumed from it.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        self.state_path.is_some()
    }

    /// Reads a line, without or with white space around it.
    ///
    /// # Errors
    /// `Corrupt` with what was wanted and what was found.
    pub fn parse(text: &str) -> Result<Self> {
        parse(text).map_err(Error::corrupt)
    }

    /// The line as it is written, without its newline.
    #[must_use]
    pub fn to_json(&self) -> String {
        write(self)
    }

    /// Takes over what `older`, a line of the same checkpoint, says and this one does not. Paths are never taken over.
    pub(super) fn fill(&mut self, older: &Self) {
        let Self {
            name: _,
            step,
            data_consumed,
            raw_rows_consumed,
            batch,
            epoch,
            is_final,
            rolling,
            source_job_id,
            state_path: _,
            sampler_path: _,
            base_model,
            training_shape,
            extra,
        } = older;
        self.step = self.step.or(*step);
        self.data_consumed = self.data_consumed.or(*data_consumed);
        self.raw_rows_consumed = self.raw_rows_consumed.or(*raw_rows_consumed);
        self.batch = self.batch.or(*batch);
        self.epoch = self.epoch.or(*epoch);
        self.is_final = self.is_final.or(*is_final);
        self.rolling = self.rolling.or(*rolling);
        for (mine, theirs) in [
            (&mut self.source_job_id, source_job_id),
            (&mut self.base_model, base_model),
            (&mut self.training_shape, training_shape),
        ] {
            *mine = mine.take().or_else(|| theirs.clone());
        }
        let have: BTreeSet<String> = self.extra.iter().map(|(key, _)| key.clone()).collect();
        self.extra.extend(extra.iter().filter(|(key, _)| !have.contains(key)).cloned());
    }

    /// The line once more, for readers who take the last line of the file: the state alone, marked.
    pub(super) fn repeated(&self) -> Self {
        let mut again = self.clone();
        again.sampler_path = None;
        again.extra.retain(|(key, _)| key != REPEATED);
        again.extra.push((REPEATED.to_owned(), "true".to_owned()));
        again
    }

    pub(super) fn is_repeated(&self) -> bool {
        self.extra_json(REPEATED) == Some("true")
    }

    /// The line without its mark: the one that it repeats is gone.
    pub(super) fn unmarked(mut self) -> Self {
        self.extra.retain(|(key, _)| key != REPEATED);
        self
    }
}
