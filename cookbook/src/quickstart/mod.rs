//! The quickstart: real training, real syncs, a real crash, in three processes that check themselves.

mod checks;
mod supervisor;
mod trainer;

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use towline_deploy::Receipt;

pub(crate) use checks::Check;
pub(crate) use supervisor::{run, run_tag};
pub(crate) use trainer::train;

/// What `towline quickstart` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where the run's files go.
    #[arg(long, default_value = "towline-quickstart")]
    dir: PathBuf,
    /// The store; a directory below DIR by default.
    #[arg(long)]
    store: Option<String>,
    /// The codec of the deltas, or `auto` for the best that the server takes.
    #[arg(long, default_value = "auto")]
    codec: String,
    /// Steps of reinforcement learning. The check that the reward rises wants at least 100.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(20..=10_000))]
    steps: u64,
}

/// What the trainer process takes. The supervisor fills it in.
#[derive(Debug, Args)]
pub(crate) struct TrainerOptions {
    /// The store.
    #[arg(long)]
    store: String,
    /// The job to train, or to resume if it has a state.
    #[arg(long)]
    job: String,
    /// The inference server.
    #[arg(long)]
    server: String,
    /// The codec of the deltas.
    #[arg(long)]
    codec: String,
    /// Steps of reinforcement learning.
    #[arg(long)]
    steps: u64,
}

/// What the trainer process tells its supervisor, a JSON line each.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    /// The trainer took up the job, from this state if there was one.
    Started { resumed_from: Option<String>, step: u64 },
    /// Supervised training has come this far.
    Supervised { step: u64, loss: f64 },
    /// Weights were saved and are served; both log-prob checks held.
    Synced { phase: Phase, step: u64, receipt: Box<Receipt> },
    /// One step of reinforcement learning.
    Step { step: u64, reward: f64, exact: f64, logprob_gap: f64 },
    /// A train state is durable.
    State { name: String, step: u64 },
    /// The run is at its end, and this is its last state.
    Done { state: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Phase {
    Supervised,
    Reinforcement,
}
