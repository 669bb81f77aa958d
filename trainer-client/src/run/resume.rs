//! What a run begins with.

use towline_core::{AdapterSource, CheckpointClass, CheckpointInfo, CheckpointRef, Error, ErrorKind, Result};

use super::Run;
use super::position::{Position, Stored};
use crate::wait::PendingExt as _;

/// What to resume from. By default: the newest state of the run, or fresh if it has none.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Resume {
    /// The state to go on from, whatever else there is.
    pub from: Option<CheckpointRef>,
    /// What a run without a state of its own begins with. A run that was killed and started again with the same
    /// arguments goes on from its own state.
    pub init: Option<Init>,
    /// The adapter that a LoRA run without a state of its own begins with, in the place of [`Resume::init`].
    pub warm_start: Option<AdapterSource>,
    /// Whether an older state will do where the newest is damaged or has expired. Default: no, it is an error.
    pub fall_back: bool,
    /// What to do where the data set is another one. Default: it is an error.
    pub data_changed: Option<DataChanged>,
}

/// A state of any job that a new run begins with.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Init {
    /// The state.
    pub reference: CheckpointRef,
    /// Whether its optimizer is restored too. Default: its weights alone.
    pub optimizer: bool,
    /// Whether the loop goes on at its position. Default: at step 0 and row 0.
    pub keep_position: bool,
}

impl Init {
    /// The weights of this state alone, from step 0 and row 0.
    #[must_use]
    pub fn weights(reference: CheckpointRef) -> Self {
        Self { reference, optimizer: false, keep_position: false }
    }

    /// Restores the optimizer too.
    #[must_use]
    pub fn with_optimizer(mut self) -> Self {
        self.optimizer = true;
        self
    }

    /// Goes on at its position.
    #[must_use]
    pub fn with_position(mut self) -> Self {
        self.keep_position = true;
        self
    }
}

/// Where the loop goes on in another data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "the cursor is kept or it is not")]
pub enum DataChanged {
    /// At the row that the state says.
    Keep,
    /// At row 0.
    ResetCursor,
}

/// What [`Run::resolve_resume`] has loaded.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "a loop must know what to do with each")]
pub enum Resumed {
    /// Nothing: the run is new.
    Fresh,
    /// The run goes on: weights, optimizer and position are those of the state.
    Continued {
        /// What was loaded.
        state: CheckpointInfo,
        /// Where the loop goes on.
        position: Position,
        /// Newer states that could not be loaded, and why.
        skipped: Vec<(CheckpointInfo, String)>,
    },
    /// The run is new, and begins with a state.
    Initialised {
        /// What was loaded.
        state: CheckpointInfo,
        /// Where the loop begins.
        position: Position,
    },
    /// The run is new, and begins with an adapter, at step 0 and row 0.
    WarmStarted {
        /// What was loaded.
        adapter: AdapterSource,
    },
}

impl Resumed {
    /// Where the loop begins or goes on.
    #[must_use]
    pub fn position(&self) -> Position {
        match self {
            Self::Fresh | Self::WarmStarted { .. } => Position::default(),
            Self::Continued { position, .. } | Self::Initialised { position, .. } => position.clone(),
        }
    }
}

impl Resume {
    /// Goes on from `reference`, whatever else there is.
    #[must_use]
    pub fn with_from(mut self, reference: CheckpointRef) -> Self {
        self.from = Some(reference);
        self
    }

    /// Sets what a run without a state of its own begins with.
    #[must_use]
    pub fn with_init(mut self, init: Init) -> Self {
        self.init = Some(init);
        self
    }

    /// Sets the adapter that a LoRA run without a state of its own begins with.
    #[must_use]
    pub fn with_warm_start(mut self, adapter: AdapterSource) -> Self {
        self.warm_start = Some(adapter);
        self
    }

    /// Takes an older state where the newest is damaged or has expired.
    #[must_use]
    pub fn with_fall_back(mut self) -> Self {
        self.fall_back = true;
        self
    }

    /// Sets what to do where the data set is another one.
    #[must_use]
    pub fn with_data_changed(mut self, what: DataChanged) -> Self {
        self.data_changed = Some(what);
        self
    }
}

impl Run {
    /// Loads what the run goes on from into its trainer, and says where the loop is: the state that is named; else the
    /// newest of this run; else what a new run is told to begin with, a state or an adapter; else nothing. What was looked for and could not be
    /// seen, or seen and not loaded, is an error, never a fresh start.
    ///
    /// # Errors
    /// `NotFound` for a reference that names nothing; `Gone` if the newest state has expired and `Corrupt` if it is damaged,
    /// unless it was named or an older one will do; `Invalid` for sampler weights, another model, and other
    /// data; what catalog and trainer answer.
    pub async fn resolve_resume(&self, resume: &Resume) -> Result<Resumed> {
        if let (Some(init), Some(adapter)) = (&resume.init, &resume.warm_start) {
            let both =
                format!("a run begins with one thing: the state {} or the adapter {adapter}", init.reference);
            return Err(Error::invalid(both).with_help("leave one of them out"));
        }
        if let Some(reference) = &resume.from {
            let state = self.resolve(reference).await?;
            let position = self.go_on(&state, resume).await?;
            return Ok(Resumed::Continued { state, position, skipped: Vec::new() });
        }
        let mut states = self.catalog.list_checkpoints(&self.job).await?;
        states.retain(|info| info.resumable);
        let newest = states.first().cloned();
        let mut skipped: Vec<(CheckpointInfo, String)> = Vec::new();
        let mut last = None;
        for state in states.into_iter() {
            if state.expired {
                let gone = format!("state {} of job {} has expired", state.name, self.job);
                let error = Error::new(ErrorKind::Gone, gone);
                if resume.fall_back {
                    skipped.push((state, "it has expired".to_owned()));
                    // Damage that was found says more.
                    last.get_or_insert(error);
                    continue;
                }
                return Err(error.with_help(
                    "it is the newest: name it, to go on from it all the same, or allow an older state",
                ));
            }
            match self.go_on(&state, resume).await {
                Ok(position) => return Ok(Resumed::Continued { state, position, skipped }),
                Err(error) if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                    return Err(error);
                }
                Err(error) if resume.fall_back => {
                    skipped.push((state, error.report()));
                    last = Some(error);
                }
                Err(error) => {
                    return Err(error
                        .context(format_args!("the newest state {} of job {}", state.name, self.job))
                        .with_help("allow an older state, name one, or repair the store"));
                }
            }
        }
        if let Some(error) = last {
            let newest = newest.map_or_else(String::new, |info| info.name.to_string());
            return Err(
                error.context(format_args!("no state of job {} can be loaded, from {newest} down", self.job))
            );
        }
        if let Some(adapter) = &resume.warm_start {
            self.client.load_adapter(adapter).wait(self.deadline).await?;
            return Ok(Resumed::WarmStarted { adapter: adapter.clone() });
        }
        let Some(init) = &resume.init else { return Ok(Resumed::Fresh) };
        let state = self.resolve(&init.reference).await?;
        let mut position = Position::default();
        let stored = self.stored(&state).await;
        match stored {
            Ok(stored) => {
                self.same_model(&state, &stored)?;
                if init.keep_position {
                    self.same_data(&state, &stored, resume)?;
                    position = self.cursor(stored, resume);
                }
            }
            // Only a loop's position is missing.
            Err(error)
                if !init.keep_position
                    && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => {}
            Err(error) => return Err(error),
        }
        self.load(&state, init.optimizer).await?;
        Ok(Resumed::Initialised { state, position })
    }

    async fn resolve(&self, reference: &CheckpointRef) -> Result<CheckpointInfo> {
        self.catalog.resolve_checkpoint(reference, &self.job, CheckpointClass::State).await
    }

    async fn stored(&self, state: &CheckpointInfo) -> Result<Stored> {
        let entries = self.catalog.loop_state(state).await?;
        Stored::parse(entries).map_err(|error| error.context(&state.id))
    }

    async fn go_on(&self, state: &CheckpointInfo, resume: &Resume) -> Result<Position> {
        let stored = self.stored(state).await?;
        self.same_model(state, &stored)?;
        self.same_data(state, &stored, resume)?;
        self.load(state, true).await?;
        *self.continued.lock().await = Some(state.id.clone());
        Ok(self.cursor(stored, resume))
    }

    async fn load(&self, state: &CheckpointInfo, optimizer: bool) -> Result<()> {
        let reference = state.state()?;
        let pending = match optimizer {
            true => self.client.load_state_with_optimizer(&reference),
            false => self.client.load_state(&reference),
        };
        pending.wait(self.deadline).await.map_err(|error| error.context(&state.id))
    }

    fn same_model(&self, state: &CheckpointInfo, stored: &Stored) -> Result<()> {
        match (&stored.base_model, &self.base_model) {
            (Some(found), Some(wanted)) if found != wanted => Err(Error::invalid(format!(
                "{} of job {} was trained from {found}: this run trains {wanted}",
                state.id, state.job
            ))
            .with_help("name a state of the same model, or train that one")),
            _ => Ok(()),
        }
    }

    fn same_data(&self, state: &CheckpointInfo, stored: &Stored, resume: &Resume) -> Result<()> {
        if resume.data_changed.is_some() || !self.other_data(stored) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{} of job {} was trained on other data: its fingerprint is {}, this run's is {}",
            state.id,
            state.job,
            stored.data.as_deref().unwrap_or("none"),
            self.data.as_deref().unwrap_or("none")
        ))
        .with_help("give `--data-changed keep` to go on at the same row, or `--data-changed reset-cursor`"))
    }

    fn other_data(&self, stored: &Stored) -> bool {
        self.data.is_some() && stored.data != self.data
    }

    fn cursor(&self, stored: Stored, resume: &Resume) -> Position {
        let reset = self.other_data(&stored) && resume.data_changed == Some(DataChanged::ResetCursor);
        let mut position = stored.position();
        if reset {
            position.data_consumed = 0;
            position.raw_rows_consumed = position.raw_rows_consumed.map(|_| 0);
        }
        position
    }
}
