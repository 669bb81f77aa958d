//! The checkpoints of a run: saved so that a retry finds its own, and resumed from without guessing.

mod manager;
mod position;
mod repair;
mod resume;

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};
use towline_core::{
    CheckpointCatalog, CheckpointClass, CheckpointInfo, CheckpointRef, CheckpointType, Error, ErrorKind,
    JobId, Pending, PendingStatus, Result, SaveState, SaveWeights, SavedWeights, SnapshotId,
    SnapshotIdentity, SnapshotName, StateRef, TrainingClient,
};

pub use manager::{CheckpointManager, CheckpointSettings, Every, Finished};

pub use position::Position;
pub use repair::repair_log;
pub use resume::{DataChanged, Init, Resume, Resumed};

use crate::log::{CheckpointLine, CheckpointLog};
use crate::wait::PendingExt as _;

/// How long one save or load may take, as in the public cookbook.
const DEADLINE: Duration = Duration::from_secs(2700);

/// A run: who trains, where its checkpoints are looked up, and its log.
///
/// Saves and resumes are one place, because a resume is right only if it finds what the saves have left. Every failure to
/// look something up is an error: nothing here takes "I could not see" for "there is nothing".
pub struct Run {
    client: Arc<dyn TrainingClient>,
    catalog: Arc<dyn CheckpointCatalog>,
    job: JobId,
    log: Option<CheckpointLog>,
    base_model: Option<String>,
    data: Option<String>,
    deadline: Duration,
    /// Tells the states that this process has saved from those of another one.
    attempt: String,
    /// The state that this process goes on from.
    continued: Mutex<Option<SnapshotId>>,
    /// What saves have begun or done, by name: called again, they do nothing twice.
    open: Mutex<HashMap<SnapshotName, Arc<Mutex<Open>>>>,
}

/// Which checkpoints a save makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "the public cookbooks have these three")]
pub enum SaveKind {
    /// A train state, to resume from.
    State,
    /// Full sampler weights, to promote.
    Sampler,
    /// Both.
    Both,
}

/// What [`Run::save_checkpoint`] has saved.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Saved {
    /// The train state, if one was wanted.
    pub state: Option<StateRef>,
    /// The sampler weights, if they were wanted.
    pub sampler: Option<SavedWeights>,
}

/// A save as it was asked for.
#[derive(Debug, Clone)]
struct Save {
    name: SnapshotName,
    kind: SaveKind,
    position: Position,
    ttl: Option<Duration>,
    rolling: bool,
}

/// How far a save has come.
#[derive(Debug, Default)]
struct Open {
    /// Of what is not wanted any more.
    position: Position,
    state: Part<StateRef>,
    sampler: Part<SavedWeights>,
}

/// One of its operations.
#[derive(Debug, Default)]
enum Part<T> {
    #[default]
    Wanted,
    /// Submitted: asked again when the save is, not submitted twice.
    Submitted(Pending<T>),
    Done(T),
}

impl<T: Clone + Send> Part<T> {
    /// The result of what was submitted.
    async fn get(&mut self, deadline: Duration) -> Result<T> {
        match std::mem::take(self) {
            Self::Wanted => Err(Error::internal("a save was waited for and not submitted")),
            Self::Done(found) => {
                *self = Self::Done(found.clone());
                Ok(found)
            }
            Self::Submitted(mut pending) => match (&mut pending).wait(deadline).await {
                Ok(found) => {
                    *self = Self::Done(found.clone());
                    Ok(found)
                }
                Err(error) => {
                    if pending.status() != PendingStatus::Done {
                        *self = Self::Submitted(pending);
                    }
                    Err(error)
                }
            },
        }
    }
}

impl Run {
    /// The run of `job`, trained by `client`, its checkpoints found in `catalog`. Without a log.
    pub fn new(client: Arc<dyn TrainingClient>, catalog: Arc<dyn CheckpointCatalog>, job: JobId) -> Self {
        Self {
            client,
            catalog,
            job,
            log: None,
            base_model: None,
            data: None,
            deadline: DEADLINE,
            attempt: format!("{:016x}", RandomState::new().hash_one(std::process::id())),
            continued: Mutex::default(),
            open: Mutex::default(),
        }
    }

    /// Writes a line to `log` for each save.
    #[must_use]
    pub fn with_log(mut self, log: CheckpointLog) -> Self {
        self.log = Some(log);
        self
    }

    /// Names the model that is trained. States of another one are refused.
    #[must_use]
    pub fn with_base_model(mut self, base_model: impl Into<String>) -> Self {
        self.base_model = Some(base_model.into());
        self
    }

    /// Sets the fingerprint of the data set, any text that changes with the data. Going on from a state of other data
    /// needs [`Resume::with_data_changed`].
    #[must_use]
    pub fn with_data(mut self, fingerprint: impl Into<String>) -> Self {
        self.data = Some(fingerprint.into());
        self
    }

    /// Sets how long one save or load may take. Default 2700 s.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> &JobId {
        &self.job
    }

    /// Saves the state, then the sampler weights (always a base), then the line of the log: what is recorded is what the
    /// store answered. Both are submitted before anything is waited for, so that they hold the weights of this moment. A
    /// save that failed halfway, or ran into the deadline, is called again with the same arguments: what it had done is
    /// not done twice. A state of this name and position that this process has saved, or goes on from, is this save's own.
    ///
    /// # Errors
    /// `AlreadyExists` at once if the name is taken by another state; `TimedOut` while an operation goes on; what the
    /// trainer, the store and the log answer. Nothing is recorded then.
    pub async fn save_checkpoint(
        &self,
        name: &SnapshotName,
        kind: SaveKind,
        position: &Position,
        ttl: Option<Duration>,
    ) -> Result<Saved> {
        let save = Save { name: name.clone(), kind, position: position.clone(), ttl, rolling: false };
        let open = self.submit(&save).await?;
        self.finish(&save, open).await
    }

    /// Gives the operations of a save their place in the order of the trainer's.
    async fn submit(&self, save: &Save) -> Result<OwnedMutexGuard<Open>> {
        let open = Arc::clone(self.open.lock().await.entry(save.name.clone()).or_default());
        let mut open = open.lock_owned().await;
        if open.position != save.position {
            let (state, sampler) = (&open.state, &open.sampler);
            if !matches!((state, sampler), (Part::Wanted, Part::Wanted)) {
                let what = if matches!(state, Part::Wanted) { "sampler weights" } else { "a state" };
                return Err(self.taken(&save.name, what, "of another position"));
            }
            open.position = save.position.clone();
        }
        if save.kind != SaveKind::Sampler && matches!(open.state, Part::Wanted) {
            let mut request = SaveState::new(save.name.clone());
            request.ttl = save.ttl;
            request.loop_state =
                save.position.entries(self.base_model.as_deref(), self.data.as_deref(), &self.attempt)?;
            open.state = match self.find_state(&save.name).await? {
                Some(found) => Part::Done(self.own_state(&found, &request).await?),
                None => Part::Submitted(self.client.save_state(request)),
            };
        }
        if save.kind != SaveKind::State && matches!(open.sampler, Part::Wanted) {
            let mut request = SaveWeights::new(save.name.clone()).with_type(CheckpointType::Base);
            request.ttl = save.ttl;
            open.sampler = Part::Submitted(self.client.save_weights_for_sampler_ext(request));
        }
        Ok(open)
    }

    /// Waits for what was submitted, and records it.
    async fn finish(&self, save: &Save, mut open: OwnedMutexGuard<Open>) -> Result<Saved> {
        let mut saved = Saved { state: None, sampler: None };
        if save.kind != SaveKind::Sampler {
            saved.state = Some(open.state.get(self.deadline).await?);
        }
        if save.kind != SaveKind::State {
            saved.sampler = Some(open.sampler.get(self.deadline).await?);
        }
        self.record(save, &saved).await?;
        Ok(saved)
    }

    fn taken(&self, name: &SnapshotName, what: &str, why: &str) -> Error {
        Error::already_exists(format!("job {} has {what} {name} {why}", self.job))
            .with_help("choose another name, such as one with the step")
    }

    /// `found` as what `request` would save, if it is that.
    async fn own_state(&self, found: &CheckpointInfo, request: &SaveState) -> Result<StateRef> {
        let taken = |why: &str| self.taken(&request.name, "a state", why);
        let mut stored = match self.catalog.loop_state(found).await {
            Ok(stored) => stored,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => {
                return Err(taken("that says nothing of its position"));
            }
            Err(error) => return Err(error),
        };
        let mut wanted = request.loop_state.clone();
        if self.continued.lock().await.as_ref() == Some(&found.id) {
            stored.remove(position::ATTEMPT);
            wanted.remove(position::ATTEMPT);
        }
        if stored == wanted {
            return found.state();
        }
        stored.remove(position::ATTEMPT);
        wanted.remove(position::ATTEMPT);
        Err(taken(if stored == wanted { "that another process has saved" } else { "of another position" }))
    }

    /// The job's state of this name, if there is one.
    async fn find_state(&self, name: &SnapshotName) -> Result<Option<CheckpointInfo>> {
        let reference = CheckpointRef::Local(SnapshotIdentity::new(name.as_str())?);
        match self.catalog.resolve_checkpoint(&reference, &self.job, CheckpointClass::State).await {
            Ok(found) => Ok(Some(found)),
            // `Invalid`: the name is that of sampler weights, which have names of their own.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Invalid) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn record(&self, save: &Save, saved: &Saved) -> Result<()> {
        let Some(log) = self.log.clone() else { return Ok(()) };
        let name = saved.state.as_ref().map_or(&save.name, |state| &state.name);
        let mut line =
            save.position.describe(line(&self.job, self.base_model.as_deref(), name, save.position.step));
        if save.rolling {
            line = line.with_rolling(true);
        }
        if let Some(state) = &saved.state {
            line = line.with_state_path(state_path(&self.job, &state.name));
        }
        if let Some(sampler) = &saved.sampler {
            line = line.with_sampler_path(sampler.snapshot_name.as_str());
        }
        blocking(move || log.append(&line)).await.map(drop)
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("job", &self.job).field("log", &self.log).finish_non_exhaustive()
    }
}

/// Work on the disk, off the runtime's own threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(Error::internal("work on the run's log panicked").with_source(error)),
    }
}

/// The line of a checkpoint of `job`.
fn line(job: &JobId, base_model: Option<&str>, name: &SnapshotName, step: u64) -> CheckpointLine {
    let line = CheckpointLine::new(name.as_str()).with_step(step).with_source_job(job.as_str());
    match base_model {
        Some(model) => line.with_base_model(model),
        None => line,
    }
}

fn state_path(job: &JobId, name: &SnapshotName) -> String {
    format!("cross_job://{job}/{name}")
}
