//! The trainer process: supervised training with interval sync, then on-policy reinforcement learning.

use std::io::Write;
use std::time::Duration;

use serde_json::json;
use towline_core::{
    AdamParams, Batch, CheckpointType, Error, JobId, Loss, Result, SaveState, SnapshotKind, SnapshotName,
    StateRef, TrainingClient,
};
use towline_deploy::WeightSyncer;
use towline_storage::SnapshotRepo;
use towline_trainer_client::PendingExt;

use super::{Event, Phase, TrainerOptions};
use crate::client::Completions;
use crate::embedded::loop_state;
use crate::engine::task::{Problem, supervised_batch};
use crate::engine::{ModelConfig, Rng, Schedule};
use crate::recipes::{self, DEADLINE, Trainer};
use crate::rollout::{self, Policy, Rollout};

const SEED: u64 = 7;
const SUPERVISED_STEPS: u64 = 200;
const SUPERVISED_BATCH: usize = 64;
const SYNC_EVERY: u64 = 50;
const STATE_EVERY: u64 = 20;
const PROMPTS: usize = 16;
const SAMPLES: usize = 8;

/// Trains the job to its end, from its newest state if it has one.
pub(crate) async fn train(options: TrainerOptions) -> Result<()> {
    let store = crate::store::open_store(&options.store)?;
    let job = JobId::new(options.job.as_str())?;
    let repo = SnapshotRepo::new(store, job, towline_codec::all());
    let run =
        Run { completions: Completions::new(&options.server)?, config: ModelConfig::tiny(), repo, options };
    let states = run.repo.list().await?.into_iter().filter(|info| info.kind == SnapshotKind::State);
    let newest = states.max_by_key(|info| info.seq);
    match newest {
        Some(info) => {
            let path = format!("{}/{}", run.repo.job(), info.dir);
            let state = StateRef::new(info.name, path, info.step.unwrap_or(0));
            let saved = Progress::load(&run.repo, &state).await?;
            emit(&Event::Started { resumed_from: Some(state.name.to_string()), step: saved.step })?;
            run.reinforce(&state, Some(saved)).await
        }
        None => {
            emit(&Event::Started { resumed_from: None, step: 0 })?;
            let state = run.supervise().await?;
            run.reinforce(&state, None).await
        }
    }
}

struct Run {
    completions: Completions,
    config: ModelConfig,
    repo: SnapshotRepo,
    options: TrainerOptions,
}

/// One client session: a trainer, the syncer to the server, and the model that is served.
struct Session {
    trainer: Trainer,
    syncer: WeightSyncer,
    served: Option<Policy>,
}

impl Run {
    /// A fresh client. Its writer takes the job over from whoever had it before.
    async fn session(&self, seed: u64) -> Result<Session> {
        let trainer = Trainer::start(&self.repo, &self.config, seed).await?;
        let syncer = recipes::syncer(&trainer, &self.options.server)?
            .with_compression_format(self.options.codec.as_str());
        syncer.wait_for_hotload_ready_for(DEADLINE, Duration::from_millis(50)).await?;
        Ok(Session { trainer, syncer, served: None })
    }

    /// Supervised training on a 50/50 mix of ascending and descending answers; a sync every 50 steps.
    async fn supervise(&self) -> Result<StateRef> {
        let mut session = self.session(SEED).await?;
        let mut rng = Rng::named(SEED, "supervised");
        let schedule = Schedule::new(3e-3, 10, SUPERVISED_STEPS, 3e-3);
        for step in 0..SUPERVISED_STEPS {
            if step % SYNC_EVERY == 0 {
                self.sync(&mut session, Phase::Supervised, step, &format!("sft-{step:05}"), None).await?;
            }
            let batch = Batch::new(supervised_batch(&mut rng, SUPERVISED_BATCH), Loss::CrossEntropy);
            let forward = session.trainer.client.forward_backward(batch);
            let step_done = session.trainer.client.optim_step(AdamParams::new(schedule.at(step)));
            let output = forward.wait(DEADLINE).await?;
            step_done.wait(DEADLINE).await?;
            if (step + 1) % SYNC_EVERY == 0 {
                emit(&Event::Supervised { step: step + 1, loss: output.loss })?;
            }
        }
        let state = SaveState::new(SnapshotName::new("sft-final")?);
        let saved = session
            .trainer
            .client
            .save_state(with_progress(state, &Progress::start()))
            .wait(DEADLINE)
            .await?;
        emit(&Event::State { name: saved.name.to_string(), step: 0 })?;
        session.trainer.client.close().await?;
        Ok(saved)
    }

    /// On-policy reinforcement learning: sample over HTTP, learn, save a delta, hot-load it, and again.
    async fn reinforce(&self, state: &StateRef, saved: Option<Progress>) -> Result<()> {
        let resumed = saved.as_ref().is_some_and(|saved| saved.step > 0);
        let mut session = self.session(SEED + 1).await?;
        let mut progress = saved.unwrap_or_else(Progress::start);
        if progress.step == 0 {
            // A new optimizer on the supervised weights.
            session.trainer.client.load_state(state).wait(DEADLINE).await?;
        } else {
            session.trainer.client.load_state_with_optimizer(state).wait(DEADLINE).await?;
        }
        let name = format!("{}-{:05}", if resumed { "resume" } else { "step" }, progress.step);
        // The server may run something else: what is sampled must come from exactly these weights.
        let base = Some(CheckpointType::Base);
        self.sync(&mut session, Phase::Reinforcement, progress.step, &name, base).await?;
        let schedule = Schedule::new(2e-4, 10, self.options.steps, 1e-4);
        while progress.step < self.options.steps {
            if progress.step.is_multiple_of(STATE_EVERY)
                && !(resumed && state.name.as_str() == state_name(progress.step))
            {
                self.save_state(&session, &state_name(progress.step), &progress).await?;
            }
            let gap = self.step(&session, &mut progress, &schedule).await?;
            let name = format!("step-{:05}", progress.step);
            self.sync(&mut session, Phase::Reinforcement, progress.step, &name, None).await?;
            let (reward, exact) = (last(&progress.rewards), last(&progress.exact));
            emit(&Event::Step { step: progress.step, reward, exact, logprob_gap: gap })?;
        }
        self.save_state(&session, "rl-final", &progress).await?;
        session.trainer.client.close().await?;
        emit(&Event::Done { state: "rl-final".into() })
    }

    async fn step(&self, session: &Session, progress: &mut Progress, schedule: &Schedule) -> Result<f64> {
        let problems: Vec<Problem> = (0..PROMPTS).map(|_| Problem::random(&mut progress.rng)).collect();
        let policy =
            session.served.as_ref().ok_or_else(|| Error::internal("nothing was synced before sampling"))?;
        let seed = progress.rng.next_u64() >> 11;
        let Rollout { data, reward, exact, gap } =
            rollout::collect(&self.completions, policy, &problems, SAMPLES, seed).await?;
        let forward = session.trainer.client.forward_backward(Batch::new(data, Loss::ImportanceSampling));
        let step = session.trainer.client.optim_step(AdamParams::new(schedule.at(progress.step)));
        forward.wait(DEADLINE).await?;
        step.wait(DEADLINE).await?;
        progress.step += 1;
        progress.rewards.push(reward);
        progress.exact.push(exact);
        Ok(gap)
    }

    /// Saves, hot-loads, and checks that the server's log-probs are the trainer's, bit for bit.
    async fn sync(
        &self,
        session: &mut Session,
        phase: Phase,
        step: u64,
        name: &str,
        kind: Option<CheckpointType>,
    ) -> Result<()> {
        let receipt = session.syncer.save_and_hotload(SnapshotName::new(name)?, kind).await?;
        let model = session.trainer.weights.published_model().await?;
        let policy = Policy { id: receipt.snapshot.id.clone(), model };
        rollout::check_served(&self.completions, &policy).await?;
        session.served = Some(policy);
        emit(&Event::Synced { phase, step, receipt: Box::new(receipt) })
    }

    async fn save_state(&self, session: &Session, name: &str, progress: &Progress) -> Result<()> {
        let request = with_progress(SaveState::new(SnapshotName::new(name)?), progress);
        let saved = session.trainer.client.save_state(request).wait(DEADLINE).await?;
        emit(&Event::State { name: saved.name.to_string(), step: progress.step })
    }
}

/// What the loop must find again after a crash.
struct Progress {
    step: u64,
    rng: Rng,
    rewards: Vec<f64>,
    exact: Vec<f64>,
}

impl Progress {
    fn start() -> Self {
        Self { step: 0, rng: Rng::named(SEED, "reinforcement"), rewards: Vec::new(), exact: Vec::new() }
    }

    async fn load(repo: &SnapshotRepo, state: &StateRef) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Saved {
            cursor: u64,
            rng: [u64; 4],
            rewards: Vec<f64>,
            exact: Vec<f64>,
        }
        let entries = loop_state(repo, state).await?;
        let saved: Saved = serde_json::from_value(serde_json::Value::Object(entries)).map_err(|error| {
            Error::corrupt(format!("state {state} is not of this loop")).with_source(error)
        })?;
        let Saved { cursor, rng, rewards, exact } = saved;
        Ok(Self { step: cursor, rng: Rng::from_state(rng)?, rewards, exact })
    }
}

fn with_progress(request: SaveState, progress: &Progress) -> SaveState {
    request
        .with_entry("cursor", progress.step)
        .with_entry("rng", json!(progress.rng.state()))
        .with_entry("rewards", json!(progress.rewards))
        .with_entry("exact", json!(progress.exact))
}

fn state_name(step: u64) -> String {
    format!("rl-{step:05}")
}

fn last(values: &[f64]) -> f64 {
    values.last().copied().unwrap_or(0.0)
}

fn emit(event: &Event) -> Result<()> {
    let line = serde_json::to_string(event)
        .map_err(|error| Error::internal("an event is no JSON").with_source(error))?;
    writeln!(std::io::stdout().lock(), "{line}")
        .map_err(|error| Error::unavailable("the supervisor does not listen any more").with_source(error))
}
