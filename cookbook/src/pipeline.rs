//! `towline pipeline`: from the first step to a served model, with a crash on the way, in processes of its own.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use towline_core::{CheckpointCatalog as _, Error, JobId, ModelId, Result, SnapshotIdentity};
use towline_storage::SnapshotRepo;
use towline_trainer_client::CheckpointLog;

use crate::cli::Output;
use crate::client::Completions;
use crate::engine::{Rng, task};
use crate::process::Process;
use crate::quickstart::{Check, run_tag};
use crate::rollout::{self, Policy};
use crate::train::Event;
use crate::{bridge, engine};

/// Supervised steps.
const SUPERVISED: u64 = 200;
/// Steps of reinforcement learning.
const REINFORCED: u64 = 60;
/// The step of reinforcement learning after which the trainer is killed: between two states.
const KILLED: u64 = 27;
/// How often a state is saved.
const SAVE_EVERY: u64 = 10;

/// What `towline pipeline` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where the run's files go.
    #[arg(long, default_value = "towline-pipeline")]
    dir: PathBuf,
    /// The store; a directory below DIR by default.
    #[arg(long)]
    store: Option<String>,
}

/// One trainer process, as its events told it.
#[derive(Debug, Default)]
struct Told {
    resumed: Option<String>,
    initialised: Option<String>,
    began_at: u64,
    exact: Vec<f64>,
    killed: bool,
    end: Option<End>,
}

#[derive(Debug)]
struct End {
    state: String,
    sampler: String,
    digest: String,
    model: Option<String>,
    syncs: u64,
}

/// Runs the pipeline and its checks.
pub(crate) async fn run(options: Options, output: &Output) -> Result<()> {
    let started = Instant::now();
    std::fs::create_dir_all(&options.dir).map_err(|error| crate::cli::unwritable(&options.dir, error))?;
    let store = options.store.clone().unwrap_or_else(|| options.dir.join("store").display().to_string());
    // Jobs of their own each time: nothing of an earlier run on the same store is touched.
    let tag = run_tag();
    let (sft, rl, model) = (format!("sft-{tag}"), format!("rl-{tag}"), format!("sorter-{tag}"));
    output.note(format_args!("store {store}, jobs {sft} and {rl}, model {model}"));

    output.note("supervised training");
    let steps = SUPERVISED.to_string();
    let arguments = ["--steps", &steps, "--learning-rate", "3e-3"];
    let supervised = train(&options, &store, &sft, &arguments, None, output).await?.ended()?;

    let serve = ["--json", "serve", "engine", "--store", &store, "--port", "0"];
    let (server, url) = Process::serve(&serve).await?;
    let (init, steps, every) = (format!("{sft}:final"), REINFORCED.to_string(), SAVE_EVERY.to_string());
    let reinforce = async |rate: &str, kill_after: Option<u64>| {
        let arguments = [
            "--phase",
            "rl",
            "--server",
            &url,
            "--init",
            &init,
            "--steps",
            &steps,
            "--save-every",
            &every,
            "--learning-rate",
            rate,
            "--batch",
            "16",
            "--output-model-id",
            &model,
        ];
        train(&options, &store, &rl, &arguments, kill_after, output).await
    };
    output.note("reinforcement learning from its state, in another job");
    let killed = reinforce("2e-4", Some(KILLED)).await?;
    output
        .note(format_args!("killed after step {KILLED}; the same command again, at half the learning rate"));
    let resumed = reinforce("1e-4", None).await?;
    server.kill().await?;
    let (initialised, resumed_from) = (killed.initialised.clone(), resumed.resumed.clone());
    let (began_at, exact) = (resumed.began_at, [killed.exact.as_slice(), &resumed.exact].concat());
    let was_killed = killed.killed;
    let end = resumed.ended()?;

    output.note("a server of the promoted model");
    let promoted = [&serve[..], &["--promoted", &model]].concat();
    let (server, url) = Process::serve(&promoted).await?;
    let repo =
        SnapshotRepo::new(crate::store::open_store(&store)?, JobId::new(rl.as_str())?, towline_codec::all());
    let (served, share) = check_model(&repo, &url, &model, &end).await?;
    server.kill().await?;

    let last_state = KILLED / SAVE_EVERY * SAVE_EVERY;
    let log = CheckpointLog::new(options.dir.join(&rl)).read()?;
    let logged = log.last_resumable().map(|line| line.name.clone());
    let checks = [
        check(
            "cross-job",
            initialised.as_deref() == Some(init.as_str()),
            format!("job {rl} began with {}, the weights of {supervised}", shown(&initialised)),
        ),
        check(
            "crash",
            was_killed
                && began_at == last_state
                && resumed_from.as_deref() == Some(&format!("step-{last_state:06}")),
            format!("killed after step {KILLED}, went on from {} at step {began_at}", shown(&resumed_from)),
        ),
        learned(&exact),
        check(
            "log",
            logged.as_deref() == Some(end.state.as_str()),
            format!("{} checkpoints in its log, the last is {}", log.lines.len(), shown(&logged)),
        ),
        served,
        check(
            "served model",
            share >= 0.5,
            format!("{:.0} % of 64 new problems answered exactly (50 % wanted)", 100.0 * share),
        ),
    ];
    let seconds = started.elapsed().as_secs_f64();
    let list: Vec<String> = checks.iter().map(ToString::to_string).collect();
    let value = json!({
        "store": store, "jobs": [sft, rl], "model": end.model, "digest": end.digest, "syncs": end.syncs,
        "seconds": seconds, "checks": checks,
    });
    output.result(
        format_args!(
            "Checks\n{}\n\nTry next\n  towline checkpoint list --store {store} --job {rl}\n  \
             towline serve engine --store {store} --promoted {model}\n\ndone in {seconds:.1} s",
            list.join("\n")
        ),
        &value,
    );
    match checks.iter().filter(|check| check.has_failed()).count() {
        0 => Ok(()),
        failed => Err(Error::internal(format!("{failed} of {} checks failed", checks.len()))
            .with_help("see the list of checks above")),
    }
}

/// Trains one job in a process of its own, killed after step `kill_after` if asked.
async fn train(
    options: &Options,
    store: &str,
    job: &str,
    more: &[&str],
    kill_after: Option<u64>,
    output: &Output,
) -> Result<Told> {
    let log = options.dir.join(job).display().to_string();
    let arguments = [&["--json", "train", "--store", store, "--job", job, "--log", &log], more].concat();
    let mut trainer = Process::start("trainer", &arguments)?;
    let mut told = Told::default();
    while let Some(event) = trainer.next::<Event>().await? {
        match event {
            Event::Started { resumed, initialised, step, .. } => {
                (told.resumed, told.initialised, told.began_at) = (resumed, initialised, step);
            }
            Event::Step { step, loss, exact, .. } => {
                told.exact.extend(exact);
                if step.is_multiple_of(20) {
                    let exact = exact.map_or_else(String::new, |exact| format!(", exact {exact:.3}"));
                    output.note(format_args!("step {step}: loss {loss:.4}{exact}"));
                }
                if Some(step) == kill_after {
                    trainer.kill().await?;
                    told.killed = true;
                    return Ok(told);
                }
            }
            Event::Finished { state, sampler, digest, model, syncs, .. } => {
                told.end = Some(End { state, sampler, digest, model, syncs });
            }
        }
    }
    trainer.finish().await?;
    Ok(told)
}

impl Told {
    fn ended(self) -> Result<End> {
        self.end.ok_or_else(|| Error::internal("the trainer ended before its run was done"))
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.sampler, self.digest)
    }
}

/// The registry's model is what was trained, the server's log-probs are its own, and how many problems it solves.
async fn check_model(repo: &SnapshotRepo, url: &str, model: &str, end: &End) -> Result<(Check, f64)> {
    let loaded = repo.load_model(&ModelId::new(model)?).await?;
    let identity = SnapshotIdentity::new(end.sampler.as_str())?;
    let source = &loaded.model.source;
    let again = repo.promote_checkpoint(repo.job(), &identity, &ModelId::new(model)?).await?;
    let same = source.id.identity == identity
        && loaded.weights.content_digest().to_string() == end.digest
        && Some(&loaded.model.name) == end.model.as_ref()
        && again == loaded.model;
    let config = loaded.files.iter().find(|(path, _)| path == "config.json");
    let (_, config) = config.ok_or_else(|| Error::internal("the model has no config.json"))?;
    let config = engine::ModelConfig::from_json(&String::from_utf8_lossy(config))?;
    let policy = Policy { id: source.id.clone(), model: bridge::model(&config, &loaded.weights)? };
    let completions = Completions::new(url)?;
    rollout::check_served(&completions, &policy).await?;
    let mut rng = Rng::named(1, "pipeline");
    let problems: Vec<_> = (0..64).map(|_| task::Problem::random(&mut rng)).collect();
    let rollout = rollout::collect(&completions, &policy, &problems, 1, 1).await?;
    let found =
        format!("{} holds the last weights, and the server's log-probs are theirs bit for bit", again.name);
    Ok((check("promotion", same, found), rollout.exact))
}

/// Rewards have made right answers more frequent.
fn learned(exact: &[f64]) -> Check {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let first = mean(exact.get(..10).unwrap_or_default());
    let last = mean(exact.get(exact.len().saturating_sub(10)..).unwrap_or_default());
    let found =
        format!("exact answers {first:.3} in the first 10 steps, {last:.3} in the last 10 (+0.15 wanted)");
    check("learning", exact.len() >= 20 && last >= first + 0.15, found)
}

fn check(name: &'static str, holds: bool, found: String) -> Check {
    if holds { Check::passed(name, found) } else { Check::failed(name, found) }
}

fn shown(text: &Option<String>) -> &str {
    text.as_deref().unwrap_or("nothing")
}
