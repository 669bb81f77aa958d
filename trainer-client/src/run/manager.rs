//! When a loop's checkpoints are saved, and which of them stay.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use towline_core::{Error, ErrorKind, ModelId, PromotedModel, Result, SnapshotName};

use super::{Open, Position, Resumed, Run, Save, SaveKind, Saved};

/// A week, as the public cookbook keeps periodic checkpoints.
const PERIODIC_TTL: Duration = Duration::from_secs(604_800);
/// Two hours, as the public cookbook keeps rolling checkpoints.
const ROLLING_TTL: Duration = Duration::from_secs(7200);
/// What the names of rolling checkpoints begin with.
const ROLLING: &str = "rolling-";
/// How many names are tried for one checkpoint, where branches of the run have taken them.
const NAMES: u32 = 1000;

/// How often something is saved: whichever comes first. 0 is never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(clippy::exhaustive_structs, reason = "the public cookbook triggers by these three")]
pub struct Every {
    /// At steps that are multiples of this, counted since step 0 of the run, not of the process.
    pub steps: u64,
    /// Whenever so many more tokens of [`Position::tokens`] are through, counted since token 0 of the run.
    pub tokens: u64,
    /// So long after the save before.
    pub time: Duration,
}

impl Every {
    /// Every so many steps.
    #[must_use]
    pub fn steps(steps: u64) -> Self {
        Self { steps, ..Self::default() }
    }

    /// Every so many tokens.
    #[must_use]
    pub fn tokens(tokens: u64) -> Self {
        Self { tokens, ..Self::default() }
    }

    /// Every so long.
    #[must_use]
    pub fn time(time: Duration) -> Self {
        Self { time, ..Self::default() }
    }

    fn is_due(&self, before: &Position, now: &Position, last: Instant) -> bool {
        let crossed = |every: u64, before: u64, now: u64| every > 0 && now / every > before / every;
        crossed(self.steps, before.step, now.step)
            || crossed(self.tokens, before.tokens.unwrap_or(0), now.tokens.unwrap_or(0))
            || !self.time.is_zero() && last.elapsed() >= self.time
    }
}

/// Which checkpoints a loop saves.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointSettings {
    /// Whether a state is saved before the first step. Default: yes.
    pub first: bool,
    /// How often a checkpoint is saved that stays until its time to live is over. Default: never.
    pub periodic: Every,
    /// What it holds. Default: a state.
    pub periodic_kind: SaveKind,
    /// How long it lives; `None` for ever. Default: a week.
    pub periodic_ttl: Option<Duration>,
    /// How often a state is saved that takes the place of the one before, which is deleted once the new one is safe.
    /// Not where a periodic one is due. Default: never.
    pub rolling: Every,
    /// How long it lives if nothing takes its place. Default: two hours. The newest state of a job always stays.
    pub rolling_ttl: Option<Duration>,
    /// The model that the last sampler weights are promoted to.
    pub output_model_id: Option<ModelId>,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self {
            first: true,
            periodic: Every::default(),
            periodic_kind: SaveKind::State,
            periodic_ttl: Some(PERIODIC_TTL),
            rolling: Every::default(),
            rolling_ttl: Some(ROLLING_TTL),
            output_model_id: None,
        }
    }
}

impl CheckpointSettings {
    /// Sets whether a state is saved before the first step.
    #[must_use]
    pub fn with_first(mut self, first: bool) -> Self {
        self.first = first;
        self
    }

    /// Sets how often checkpoints are saved that stay, what they hold, and how long they live.
    #[must_use]
    pub fn with_periodic(mut self, every: Every, kind: SaveKind, ttl: Option<Duration>) -> Self {
        (self.periodic, self.periodic_kind, self.periodic_ttl) = (every, kind, ttl);
        self
    }

    /// Sets how often states are saved that take each other's place, and how long the last of them lives.
    #[must_use]
    pub fn with_rolling(mut self, every: Every, ttl: Option<Duration>) -> Self {
        (self.rolling, self.rolling_ttl) = (every, ttl);
        self
    }

    /// Sets the model that the last sampler weights are promoted to.
    #[must_use]
    pub fn with_output_model_id(mut self, model: ModelId) -> Self {
        self.output_model_id = Some(model);
        self
    }
}

/// What a finished run leaves.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Finished {
    /// The last state and sampler weights, which live for ever.
    pub saved: Saved,
    /// The model, if one was asked for.
    pub model: Option<PromotedModel>,
}

/// Saves a loop's checkpoints when they are due, behind its back.
///
/// A save takes its place in the order of the trainer's operations when the call returns, and is waited for by a task:
/// what goes wrong is the error of the next call. At most one runs at once. Intervals count the absolute step, so that a
/// run that was killed saves at the same steps as one that was not.
pub struct CheckpointManager {
    run: Arc<Run>,
    settings: CheckpointSettings,
    before: Position,
    last: Instant,
    running: Option<JoinHandle<Done>>,
    /// Rolling states that something newer takes the place of, or will.
    rolling: Vec<SnapshotName>,
}

/// What a save in the background has done.
struct Done {
    outcome: Result<()>,
    /// Its own state, and those before that are still to be deleted.
    rolling: Vec<SnapshotName>,
}

impl CheckpointManager {
    /// The checkpoints of `run`, from where `resumed` has left the loop. A run that does not go on from a state of its
    /// own saves its first one now.
    ///
    /// # Errors
    /// `Invalid` if saves go by tokens and the position tells none; as [`Run::save_checkpoint`].
    pub async fn start(run: Arc<Run>, settings: CheckpointSettings, resumed: &Resumed) -> Result<Self> {
        let before = resumed.position();
        let by_tokens = settings.periodic.tokens > 0 || settings.rolling.tokens > 0;
        if by_tokens && before.tokens.is_none() && before.step > 0 {
            return Err(Error::invalid(format!("step {} says nothing of its tokens", before.step))
                .with_help("save by steps, or set the tokens of each position"));
        }
        let mut rolling = Vec::new();
        if settings.rolling != Every::default() && !matches!(resumed, Resumed::Fresh) {
            rolling = run.states_named(ROLLING).await?;
        }
        let first = settings.first && !matches!(resumed, Resumed::Continued { .. });
        let mut manager = Self { run, settings, before, last: Instant::now(), running: None, rolling };
        if first {
            let position = manager.before.clone();
            manager.begin(&position, SaveKind::State, manager.settings.periodic_ttl, false).await?;
        }
        Ok(manager)
    }

    /// Tells that the loop is at `position`, a step further, and saves what is due.
    ///
    /// # Errors
    /// What the save before has met; `Invalid` if tokens are saved by and `position` has none; as
    /// [`Run::save_checkpoint`].
    pub async fn step(&mut self, position: &Position) -> Result<()> {
        if self.running.as_ref().is_some_and(JoinHandle::is_finished) {
            self.wait().await?;
        }
        let settings = &self.settings;
        if position.tokens.is_none() && (settings.periodic.tokens > 0 || settings.rolling.tokens > 0) {
            return Err(Error::invalid(format!("step {} says nothing of its tokens", position.step))
                .with_help("set `Position::tokens`, or save by steps"));
        }
        let before = std::mem::replace(&mut self.before, position.clone());
        if settings.periodic.is_due(&before, position, self.last) {
            self.begin(position, settings.periodic_kind, settings.periodic_ttl, false).await
        } else if settings.rolling.is_due(&before, position, self.last) {
            self.begin(position, SaveKind::State, settings.rolling_ttl, true).await
        } else {
            Ok(())
        }
    }

    /// Waits for the save that is running.
    ///
    /// # Errors
    /// What it has met.
    pub async fn wait(&mut self) -> Result<()> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let done = running
            .await
            .map_err(|error| Error::internal("a save in the background panicked").with_source(error))?;
        self.rolling = done.rolling;
        done.outcome
    }

    /// Saves state and sampler weights for ever, as `final`, and promotes them if a model was asked for. Called again
    /// after an error it goes on where it was.
    ///
    /// # Errors
    /// As [`Run::save_checkpoint`] and [`towline_core::CheckpointCatalog::promote_checkpoint`].
    pub async fn finish(&mut self, position: &Position) -> Result<Finished> {
        self.wait().await?;
        let (save, saved) = self.save(position, SaveKind::Both, None, "final").await?;
        let saved = self.run.finish(&save, saved).await?;
        self.rolling = self.run.delete_states(std::mem::take(&mut self.rolling), &save.name).await;
        let model = match (&self.settings.output_model_id, &saved.sampler) {
            (Some(model), Some(sampler)) => {
                let catalog = &self.run.catalog;
                Some(catalog.promote_checkpoint(&self.run.job, &sampler.snapshot_name, model).await?)
            }
            _ => None,
        };
        Ok(Finished { saved, model })
    }

    /// Submits a save, and leaves it to a task.
    async fn begin(
        &mut self,
        position: &Position,
        kind: SaveKind,
        ttl: Option<Duration>,
        rolling: bool,
    ) -> Result<()> {
        self.wait().await?;
        let stem = format!("{}{:06}", if rolling { ROLLING } else { "step-" }, position.step);
        let (mut save, open) = self.save(position, kind, ttl, &stem).await?;
        save.rolling = rolling;
        self.last = Instant::now();
        let (run, old) = (Arc::clone(&self.run), std::mem::take(&mut self.rolling));
        self.running = Some(tokio::spawn(async move {
            let outcome = run.finish(&save, open).await.map(drop);
            // Sampler weights are nothing to resume from.
            let safe = outcome.is_ok() && kind != SaveKind::Sampler;
            let mut rolling_states = if safe { run.delete_states(old, &save.name).await } else { old };
            rolling_states.extend((rolling && safe).then_some(save.name));
            Done { outcome, rolling: rolling_states }
        }));
        Ok(())
    }

    /// Submits a save under `stem`, or the first name behind it that no other branch of the run has taken.
    async fn save(
        &self,
        position: &Position,
        kind: SaveKind,
        ttl: Option<Duration>,
        stem: &str,
    ) -> Result<(Save, OwnedMutexGuard<Open>)> {
        let mut number = 1;
        loop {
            let name = if number == 1 { stem.to_owned() } else { format!("{stem}-{number}") };
            let name = SnapshotName::new(name)?;
            let save = Save { name, kind, position: position.clone(), ttl, rolling: false };
            match self.run.submit(&save).await {
                Ok(open) => return Ok((save, open)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && number < NAMES => number += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

impl Run {
    /// The job's states whose names begin with `prefix`.
    async fn states_named(&self, prefix: &str) -> Result<Vec<SnapshotName>> {
        let all = self.catalog.list_checkpoints(&self.job).await?;
        let rolling = all.into_iter().filter(|info| info.resumable && info.name.as_str().starts_with(prefix));
        Ok(rolling.map(|info| info.name).collect())
    }

    /// Deletes states that `newer` has taken the place of. Returns those that are to be tried again: what is too much is
    /// no reason to stop a run, and goes by its time to live.
    async fn delete_states(&self, states: Vec<SnapshotName>, newer: &SnapshotName) -> Vec<SnapshotName> {
        let mut left = Vec::new();
        for name in states {
            if name == *newer {
                continue;
            }
            match self.delete_state(&name).await {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                Err(_) => left.push(name),
            }
        }
        left
    }

    async fn delete_state(&self, name: &SnapshotName) -> Result<()> {
        match self.find_state(name).await? {
            Some(found) => self.catalog.delete_checkpoint(&found).await,
            None => Ok(()),
        }
    }
}

impl fmt::Debug for CheckpointManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointManager")
            .field("run", &self.run)
            .field("settings", &self.settings)
            .field("before", &self.before)
            .finish_non_exhaustive()
    }
}
