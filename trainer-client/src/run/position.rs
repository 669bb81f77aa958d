//! Where a training loop is.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use towline_core::{Error, Result};

use crate::log::CheckpointLine;

/// Where a training loop is: saved with each state, and what it goes on from.
#[derive(Debug, Clone, PartialEq, Default)]
#[expect(clippy::exhaustive_structs, reason = "loops make it from their own counters")]
pub struct Position {
    /// Optimizer steps done.
    pub step: u64,
    /// Rows of the data set consumed.
    pub data_consumed: u64,
    /// Raw rows consumed, where rows are dropped on the way.
    pub raw_rows_consumed: Option<u64>,
    /// Tokens trained on, where saves go by them.
    pub tokens: Option<u64>,
    /// What else the loop wants to find again: its RNG, rewards.
    pub entries: Map<String, Value>,
}

/// The key of [`Stored::attempt`].
pub(super) const ATTEMPT: &str = "attempt";

/// As a state keeps it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stored {
    step: u64,
    data_consumed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    raw_rows_consumed: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokens: Option<u64>,
    /// Which process has saved it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attempt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) base_model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) data: Option<String>,
    #[serde(default)]
    entries: Map<String, Value>,
}

impl Position {
    /// At `step`, with so many rows consumed.
    #[must_use]
    pub fn new(step: u64, data_consumed: u64) -> Self {
        Self { step, data_consumed, ..Self::default() }
    }

    /// Sets the tokens trained on.
    #[must_use]
    pub fn with_tokens(mut self, tokens: u64) -> Self {
        self.tokens = Some(tokens);
        self
    }

    /// Adds an entry of the loop's own.
    #[must_use]
    pub fn with_entry(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.entries.insert(key.into(), value.into());
        self
    }

    /// What a state keeps.
    pub(super) fn entries(
        &self,
        base_model: Option<&str>,
        data: Option<&str>,
        attempt: &str,
    ) -> Result<Map<String, Value>> {
        let stored = Stored {
            step: self.step,
            data_consumed: self.data_consumed,
            raw_rows_consumed: self.raw_rows_consumed,
            tokens: self.tokens,
            attempt: Some(attempt.to_owned()),
            base_model: base_model.map(str::to_owned),
            data: data.map(str::to_owned),
            entries: self.entries.clone(),
        };
        match serde_json::to_value(stored) {
            Ok(Value::Object(entries)) => Ok(entries),
            _ => Err(Error::internal("the position of the loop is no JSON object")),
        }
    }

    /// What the log tells of it.
    pub(super) fn describe(&self, line: CheckpointLine) -> CheckpointLine {
        let line = line.with_step(self.step).with_data_consumed(self.data_consumed);
        match self.raw_rows_consumed {
            Some(rows) => line.with_raw_rows_consumed(rows),
            None => line,
        }
    }
}

impl Stored {
    pub(super) fn parse(entries: Map<String, Value>) -> Result<Self> {
        serde_json::from_value(Value::Object(entries)).map_err(|error| {
            Error::corrupt("its loop state is none that `save_checkpoint` writes")
                .with_source(error)
                .with_help("initialise from it instead, with the position of a new run")
        })
    }

    pub(super) fn position(self) -> Position {
        let Self { step, data_consumed, raw_rows_consumed, tokens, entries, .. } = self;
        Position { step, data_consumed, raw_rows_consumed, tokens, entries }
    }
}
