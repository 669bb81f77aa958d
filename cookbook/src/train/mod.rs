//! `towline train`: a training loop that any number of kills cannot confuse.
//!
//! The same command on the same store goes on from the newest state of the job. What a step does is a function of the
//! weights, the position and the options alone, so that it goes on bit for bit.

mod data;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::json;
use towline_core::{
    AdamParams, AdapterSource, Batch, CheckpointRef, CheckpointType, Error, JobId, Loss, ModelId, Result,
    SnapshotName, TrainingClient as _,
};
use towline_deploy::WeightSyncer;
use towline_storage::SnapshotRepo;
use towline_trainer_client::{
    CheckpointLog, CheckpointManager, CheckpointSettings, DataChanged, Every, Init, PendingExt as _,
    Position, Resume, Resumed, Run, SaveKind,
};

use crate::cli::Output;
use crate::client::Completions;
use crate::engine::{LoraConfig, ModelConfig, Rng};
use crate::recipes::{self, DEADLINE, Trainer};
use crate::rollout::{self, Policy};
use data::DataSet;

/// What the weights of a new run are drawn from.
const SEED: u64 = 7;
/// Answers to each row in reinforcement learning.
const SAMPLES: usize = 8;
/// The key of the loop's own random numbers in a position.
const RNG: &str = "rng";

/// What `towline train` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The store: a directory, or an s3://, gs:// or az:// URL.
    #[arg(long)]
    store: String,
    /// The job: its newest state is gone on from.
    #[arg(long)]
    job: JobId,
    /// How to learn.
    #[arg(long, value_enum, default_value = "sft")]
    phase: Phase,
    /// The inference server that reinforcement learning samples from; it gets new weights at each step.
    #[arg(long, required_if_eq("phase", "rl"))]
    server: Option<String>,
    /// Optimizer steps, those before a resume included.
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// The learning rate.
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Rows of a batch.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Rows of the data set.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rows: u32,
    /// What the data set is drawn from: another seed is another data set.
    #[arg(long, default_value_t = 1)]
    data_seed: u64,
    /// The folder of `checkpoints.jsonl`; none is written without it.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Go on from this state, whatever else there is: a name, `<job>:<name>`, or `cross_job://job/name`.
    #[arg(long, value_name = "REFERENCE")]
    from: Option<CheckpointRef>,
    /// What a run without a state of its own begins with: the weights of this state.
    #[arg(long, value_name = "REFERENCE")]
    init: Option<CheckpointRef>,
    /// With the optimizer of that state.
    #[arg(long, requires = "init")]
    init_optimizer: bool,
    /// At the position of that state.
    #[arg(long, requires = "init")]
    init_position: bool,
    /// Train a LoRA adapter of this rank; 0 trains all parameters.
    #[arg(long, default_value_t = 0)]
    lora_rank: u16,
    /// The adapter that a LoRA run without a state of its own begins with: a folder in PEFT's form.
    #[arg(long, value_name = "FOLDER", requires = "lora_rank", conflicts_with = "init")]
    warm_start: Option<PathBuf>,
    /// Go on from an older state if the newest is damaged or has expired.
    #[arg(long)]
    fall_back: bool,
    /// Go on although the data set is another one: at the same row, or at row 0.
    #[arg(long, value_enum)]
    data_changed: Option<OtherData>,
    /// Save a state at steps that are multiples of this; 0 for never.
    #[arg(long, default_value_t = 20)]
    save_every: u64,
    /// Save a state that takes the place of the one before at steps that are multiples of this; 0 for never.
    #[arg(long, default_value_t = 0)]
    rolling_every: u64,
    /// How long the states live, in seconds; for ever by default.
    #[arg(long, value_name = "SECONDS")]
    ttl: Option<u64>,
    /// Promote the last weights to this model.
    #[arg(long, value_name = "MODEL_ID")]
    output_model_id: Option<ModelId>,
}

/// How to learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Phase {
    /// Supervised: right answers, and as many in the wrong order.
    Sft,
    /// On-policy reinforcement learning: only the right order is rewarded.
    Rl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OtherData {
    Keep,
    ResetCursor,
}

/// What the loop tells, a line each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// Where the loop begins: fresh, or with a state.
    Started { resumed: Option<String>, initialised: Option<String>, step: u64, row: u64 },
    /// One step on these rows. `exact` is the share of right answers, of the policy before the step.
    Step { step: u64, first_row: u64, rows: u64, loss: f64, reward: Option<f64>, exact: Option<f64> },
    /// The end.
    Finished { step: u64, state: String, sampler: String, digest: String, model: Option<String>, syncs: u64 },
}

impl Event {
    fn tell(&self, output: &Output) {
        let value = json!(self);
        match self {
            Self::Started { resumed: Some(state), step, row, .. } => {
                output.result(format_args!("going on from {state}: step {step}, row {row}"), &value);
            }
            Self::Started { initialised: Some(state), step, row, .. } => {
                output.result(format_args!("beginning with {state}: step {step}, row {row}"), &value);
            }
            Self::Started { .. } => output.result("beginning afresh", &value),
            Self::Step { step, loss, reward, .. } => match reward {
                Some(reward) => output.result(format_args!("step {step}: reward {reward:.3}"), &value),
                None => output.result(format_args!("step {step}: loss {loss:.4}"), &value),
            },
            Self::Finished { state, sampler, digest, model, .. } => {
                let model = model.as_ref().map_or_else(String::new, |model| format!(", model {model}"));
                output
                    .result(format_args!("done: state {state}, weights {sampler} ({digest}){model}"), &value);
            }
        }
    }
}

/// Trains the job to its end.
pub(crate) async fn run(options: Options, output: &Output) -> Result<()> {
    let repo = SnapshotRepo::new(
        crate::store::open_store(&options.store)?,
        options.job.clone(),
        towline_codec::all(),
    );
    let config = ModelConfig::tiny();
    let data = DataSet::new(options.data_seed, options.rows as usize);
    let trainer = match options.lora_rank {
        0 => Trainer::start(&repo, &config, SEED).await?,
        rank => Trainer::start_lora(&repo, &config, SEED, &LoraConfig::new(rank.into())).await?,
    };
    let mut run = Run::new(Arc::clone(&trainer.client) as _, Arc::new(repo.clone()), options.job.clone())
        .with_base_model(model_name(&config))
        .with_data(data.fingerprint.clone());
    if let Some(folder) = &options.log {
        run = run.with_log(CheckpointLog::new(folder));
    }
    let run = Arc::new(run);
    let resumed = run.resolve_resume(&options.resume()).await?;
    let mut position = resumed.position();
    let mut rng = rng(&position)?;
    position.entries.insert(RNG.into(), json!(rng.state()));
    position.tokens.get_or_insert(0);
    started(&resumed, &position).tell(output);
    let mut manager = CheckpointManager::start(Arc::clone(&run), options.settings(), &resumed).await?;
    let mut policy = match &options.server {
        Some(url) if options.phase == Phase::Rl => Some(Sampling::start(&trainer, url).await?),
        _ => None,
    };
    let batch = usize::from(options.batch);
    while position.step < options.steps {
        let problems = data.batch(position.data_consumed, batch);
        let first_row = position.data_consumed;
        let (mut reward, mut exact) = (None, None);
        let learn = match &mut policy {
            None => {
                let weight = 1.0 / (batch * crate::engine::task::DIGITS) as f32;
                let answer = |problem: &crate::engine::task::Problem| {
                    let up = rng.below(2) == 0;
                    problem.supervised(&if up { problem.ascending() } else { problem.descending() }, weight)
                };
                Batch::new(problems.iter().map(answer).collect(), Loss::CrossEntropy)
            }
            Some(sampling) => {
                sampling.sync(&trainer, position.step).await?;
                let seed = rng.next_u64() >> 11;
                let rollout =
                    rollout::collect(&sampling.completions, sampling.served()?, &problems, SAMPLES, seed)
                        .await?;
                (reward, exact) = (Some(rollout.reward), Some(rollout.exact));
                Batch::new(rollout.data, Loss::ImportanceSampling)
            }
        };
        let tokens: u64 = learn.data.iter().map(|datum| datum.tokens.len() as u64).sum();
        let forward = trainer.client.forward_backward(learn);
        let step = trainer.client.optim_step(AdamParams::new(options.learning_rate));
        let loss = forward.wait(DEADLINE).await?.loss;
        step.wait(DEADLINE).await?;
        position.step += 1;
        position.data_consumed += batch as u64;
        position.tokens = position.tokens.map(|before| before + tokens);
        position.entries.insert(RNG.into(), json!(rng.state()));
        let rows = batch as u64;
        Event::Step { step: position.step, first_row, rows, loss, reward, exact }.tell(output);
        manager.step(&position).await?;
    }
    let mut syncs = 0;
    if let Some(sampling) = &mut policy {
        sampling.sync(&trainer, position.step).await?;
        syncs = sampling.syncs;
    }
    let finished = manager.finish(&position).await?;
    let missing = || Error::internal("the last save has no state or no sampler weights");
    let state = finished.saved.state.ok_or_else(missing)?;
    let sampler = finished.saved.sampler.ok_or_else(missing)?;
    Event::Finished {
        step: position.step,
        state: state.name.to_string(),
        sampler: sampler.snapshot_name.to_string(),
        digest: trainer.weights.published_weights().await?.content_digest().to_string(),
        model: finished.model.map(|model| model.name),
        syncs,
    }
    .tell(output);
    trainer.client.close().await
}

impl Options {
    fn resume(&self) -> Resume {
        let mut resume = Resume::default();
        resume.from.clone_from(&self.from);
        resume.warm_start = self.warm_start.clone().map(AdapterSource::Folder);
        resume.fall_back = self.fall_back;
        resume.data_changed = self.data_changed.map(|what| match what {
            OtherData::Keep => DataChanged::Keep,
            OtherData::ResetCursor => DataChanged::ResetCursor,
        });
        resume.init = self.init.clone().map(|reference| {
            let mut init = Init::weights(reference);
            (init.optimizer, init.keep_position) = (self.init_optimizer, self.init_position);
            init
        });
        resume
    }

    fn settings(&self) -> CheckpointSettings {
        let ttl = self.ttl.map(Duration::from_secs);
        let mut settings = CheckpointSettings::default()
            .with_periodic(Every::steps(self.save_every), SaveKind::State, ttl)
            .with_rolling(Every::steps(self.rolling_every), ttl);
        settings.output_model_id.clone_from(&self.output_model_id);
        settings
    }
}

fn started(resumed: &Resumed, position: &Position) -> Event {
    let (mut going, mut initialised) = (None, None);
    match resumed {
        Resumed::Fresh => {}
        Resumed::Continued { state, .. } => going = Some(state.name.to_string()),
        Resumed::WarmStarted { adapter } => initialised = Some(adapter.to_string()),
        Resumed::Initialised { state, .. } => initialised = Some(format!("{}:{}", state.job, state.name)),
    }
    Event::Started { resumed: going, initialised, step: position.step, row: position.data_consumed }
}

/// The random numbers that a position has come to.
fn rng(position: &Position) -> Result<Rng> {
    let Some(state) = position.entries.get(RNG) else {
        return Ok(Rng::named(SEED, "train"));
    };
    let words: [u64; 4] = serde_json::from_value(state.clone()).map_err(|error| {
        Error::corrupt(format!("entry `{RNG}` of the state is not that of this loop"))
            .with_source(error)
            .with_help("initialise from the state with `--init` instead")
    })?;
    Ok(Rng::from_state(words)?)
}

/// A name that changes with the model's shape.
fn model_name(config: &ModelConfig) -> String {
    format!("towline-tiny-{}x{}", config.hidden_size, config.num_hidden_layers)
}

/// A server that gets new weights, and answers from them.
struct Sampling {
    syncer: WeightSyncer,
    completions: Completions,
    policy: Option<Policy>,
    syncs: u64,
}

impl Sampling {
    async fn start(trainer: &Trainer, url: &str) -> Result<Self> {
        let syncer = recipes::syncer(trainer, url)?;
        syncer.wait_for_hotload_ready_for(DEADLINE, Duration::from_millis(50)).await?;
        Ok(Self { syncer, completions: Completions::new(url)?, policy: None, syncs: 0 })
    }

    /// Puts the trainer's weights on the server, and checks that they answer there.
    async fn sync(&mut self, trainer: &Trainer, step: u64) -> Result<()> {
        let name = SnapshotName::new(format!("sync-{step:06}"))?;
        // Whatever the server runs now: what this process has trained begins with a base of its own.
        let kind = self.policy.is_none().then_some(CheckpointType::Base);
        let receipt = self.syncer.save_and_hotload(name, kind).await?;
        let model = trainer.weights.published_model().await?;
        let policy = Policy { id: receipt.snapshot.id, model };
        rollout::check_served(&self.completions, &policy).await?;
        self.policy = Some(policy);
        self.syncs += 1;
        Ok(())
    }

    fn served(&self) -> Result<&Policy> {
        self.policy.as_ref().ok_or_else(|| Error::internal("nothing was synced before sampling"))
    }
}
