//! The trainer process: supervised training with interval sync, then on-policy reinforcement learning.

use std::io::Write;
use std::time::Duration;

use serde_json::json;
use towline_core::{
    AdamParams, Batch, CheckpointType, Error, JobId, Loss, Result, SaveState, SnapshotId, SnapshotKind,
    SnapshotName, StateRef, TrainingClient,
};
use towline_deploy::WeightSyncer;
use towline_storage::SnapshotRepo;
use towline_trainer_client::PendingExt;

use super::{Event, Phase, TrainerOptions};
use crate::client::{Completions, SampleRequest};
use crate::embedded::loop_state;
use crate::engine::task::{Problem, group_advantages, supervised_batch};
use crate::engine::{Model, ModelConfig, Rng, Schedule, score};
use crate::recipes::{self, DEADLINE, Trainer};

const SEED: u64 = 7;
const SUPERVISED_STEPS: u64 = 200;
const SUPERVISED_BATCH: usize = 64;
const SYNC_EVERY: u64 = 50;
const STATE_EVERY: u64 = 20;
const PROMPTS: usize = 16;
const SAMPLES: usize = 8;
/// How far a sampled log-prob may be from the one that a full forward pass gives: two orders of the same sums.
const LOGPROB_GAP: f64 = 1e-4;

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
    served: Option<(SnapshotId, Model)>,
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
        let request = SampleRequest {
            prompts: problems.iter().map(Problem::prompt_tokens).collect(),
            n: SAMPLES,
            max_tokens: crate::engine::task::DIGITS,
            seed: progress.rng.next_u64() >> 11,
        };
        let answer = self.completions.sample(&request).await?;
        let (policy, served) =
            session.served.as_ref().ok_or_else(|| Error::internal("nothing was synced before sampling"))?;
        let (mut data, mut rewards, mut exact, mut gap) = (Vec::new(), Vec::new(), 0, 0f64);
        for (problem, samples) in problems.iter().zip(&answer) {
            let group: Vec<f64> = samples.iter().map(|sample| problem.reward(&sample.tokens)).collect();
            exact += samples.iter().filter(|sample| problem.is_exact(&sample.tokens)).count();
            for (sample, advantage) in samples.iter().zip(group_advantages(&group)) {
                data.push(problem.policy(&sample.tokens, &sample.logprobs, advantage));
            }
            if let Some(sample) = samples.first() {
                if sample.snapshot != policy.identity.as_str() {
                    return Err(Error::internal(format!(
                        "wanted samples of {policy}, {} answered",
                        sample.snapshot
                    )));
                }
                gap = gap.max(logprob_gap(served, &problem.prompt_tokens(), sample)?);
            }
            rewards.extend(group);
        }
        if gap > LOGPROB_GAP {
            return Err(Error::internal(format!(
                "sampled log-probs are off by {gap:e}, at most {LOGPROB_GAP:e} is allowed"
            )));
        }
        let count = (PROMPTS * SAMPLES) as f32;
        for datum in &mut data {
            datum.advantages.iter_mut().for_each(|advantage| *advantage /= count);
        }
        let forward = session.trainer.client.forward_backward(Batch::new(data, Loss::ImportanceSampling));
        let step = session.trainer.client.optim_step(AdamParams::new(schedule.at(progress.step)));
        forward.wait(DEADLINE).await?;
        step.wait(DEADLINE).await?;
        progress.step += 1;
        progress.rewards.push(rewards.iter().sum::<f64>() / rewards.len().max(1) as f64);
        progress.exact.push(exact as f64 / f64::from(count));
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
        for prompt in ["3141>1134", "9876>6789", "0000>0000"] {
            let tokens = crate::engine::ByteTokenizer.encode(prompt);
            let ours = score(&model, &tokens)?;
            let theirs = self.completions.score(&tokens, &receipt.snapshot.id).await?;
            let bits = |scores: &[f32]| scores.iter().map(|score| score.to_bits()).collect::<Vec<_>>();
            if bits(&ours) != bits(&theirs) {
                return Err(Error::internal(format!(
                    "{}: the server's log-probs of `{prompt}` are {theirs:?}, the trainer's {ours:?}",
                    receipt.snapshot.id
                )));
            }
        }
        session.served = Some((receipt.snapshot.id.clone(), model));
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

fn logprob_gap(model: &Model, prompt: &[u32], sample: &crate::client::Sampled) -> Result<f64> {
    let tokens = [prompt, &sample.tokens].concat();
    let scores = score(model, &tokens)?;
    let gaps = scores.iter().skip(prompt.len()).zip(&sample.logprobs);
    Ok(gaps.map(|(ours, theirs)| f64::from((ours - theirs).abs())).fold(0.0, f64::max))
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
