//! The command line `towline`.

mod bench;
mod checkpoint;
mod delta;
mod deployment;
mod files;
mod keep;
mod output;
mod serve;
mod slime;
mod snapshot;

use clap::{Parser, Subcommand};
use towline_core::Result;

pub(crate) use files::unwritable;
pub(crate) use output::{Output, table};

/// Moves model weights from a trainer to the servers that run them, and keeps training resumable.
#[derive(Debug, Parser)]
#[command(name = "towline", version, propagate_version = true)]
struct Cli {
    /// Print JSON alone on standard output; progress goes to standard error.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train, sync and serve a small model in three processes, with a crash in the middle, and check it all.
    #[command(after_help = "Example:\n  towline quickstart --dir quickstart --steps 120")]
    Quickstart(crate::quickstart::Options),
    /// Train a small model; the same command again goes on where a killed one was.
    #[command(after_help = "Example:\n  towline train --store ./store --job sft --steps 200 --log ./sft")]
    Train(crate::train::Options),
    /// The whole way in processes of their own: supervised training, reinforcement learning from its state, a crash, a
    /// resume at another learning rate, promotion, and a server of the model. Checks itself.
    #[command(after_help = "Example:\n  towline pipeline --dir pipeline")]
    Pipeline(crate::pipeline::Options),
    /// Serve something.
    #[command(subcommand)]
    Serve(serve::Command),
    /// Ask or order a running deployment.
    #[command(subcommand)]
    Deployment(deployment::Command),
    /// Encode, apply and inspect weight deltas in files.
    #[command(subcommand)]
    Delta(delta::Command),
    /// Measure codecs on a pair of checkpoints.
    #[command(subcommand)]
    Bench(bench::Command),
    /// List, show, verify, export and import snapshots.
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// List and find checkpoints: what can be resumed from, and what can be promoted.
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    /// Copy weights for samplers to the model registry, as a plain Hugging Face or PEFT directory.
    #[command(
        after_help = "Example:\n  towline promote train:final --store ./store --output-model-id my-model"
    )]
    Promote(checkpoint::Promotion),
    /// The model registry.
    #[command(subcommand)]
    Model(checkpoint::ModelCommand),
    /// The trainer process of the quickstart.
    #[command(hide = true)]
    QuickstartTrainer(crate::quickstart::TrainerOptions),
}

/// Parses the command line, runs it, and returns the exit code: 0 for success, 1 for an error, 2 for a wrong call.
#[must_use]
pub fn main() -> std::process::ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            // A closed pipe is the reader's choice, not an error to report.
            let _ = error.print();
            return code.into();
        }
    };
    let output = Output::new(cli.json);
    match run(cli.command, &output) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::Delta(command) => delta::run(command, output),
        Command::Bench(command) => bench::run(command, output),
        Command::Quickstart(options) => block_on(crate::quickstart::run(options, output)),
        Command::QuickstartTrainer(options) => block_on(crate::quickstart::train(options)),
        Command::Train(options) => block_on(crate::train::run(options, output)),
        Command::Pipeline(options) => block_on(crate::pipeline::run(options, output)),
        Command::Serve(command) => block_on(serve::run(command, output)),
        Command::Deployment(command) => block_on(deployment::run(command, output)),
        Command::Checkpoint(command) => block_on(checkpoint::run(command, output)),
        Command::Promote(options) => block_on(checkpoint::promote(options, output)),
        Command::Model(command) => block_on(checkpoint::models(command, output)),
        Command::Snapshot(command) => block_on(snapshot::run(command, output)),
    }
}

fn block_on<F: Future<Output = Result<()>>>(future: F) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| towline_core::Error::internal("no runtime could be started").with_source(error))?
        .block_on(future)
}
