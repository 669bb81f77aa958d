//! The supervisor: starts server and trainer, kills the trainer in mid-run, and checks what came of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde_json::json;
use towline_core::{Error, JobId, Result};
use towline_deploy::Receipt;
use towline_storage::SnapshotRepo;

use super::checks::{Check, learning, same_end};
use super::{Event, Options, Phase};
use crate::cli::{Output, table};
use crate::process::Process;

/// One trained job, as its events told it. Steps that a crash undid are overwritten by their repetition.
#[derive(Debug, Default)]
pub(super) struct Story {
    syncs: Vec<(Phase, u64, Receipt)>,
    pub(super) steps: BTreeMap<u64, (f64, f64)>,
    gap: f64,
    resumed_from: Option<(String, u64)>,
    killed_at: Option<u64>,
    end: Option<String>,
}

/// Runs the quickstart.
pub(crate) async fn run(options: Options, output: &Output) -> Result<()> {
    let started = Instant::now();
    std::fs::create_dir_all(&options.dir).map_err(|error| crate::cli::unwritable(&options.dir, error))?;
    let store = match &options.store {
        Some(store) => store.clone(),
        None => options.dir.join("store").display().to_string(),
    };
    // A run of its own each time: nothing of an earlier quickstart on the same store is touched.
    let tag = run_tag();
    let (job, reference) = (format!("quickstart-{tag}"), format!("reference-{tag}"));
    output.note(format_args!("store {store}, job {job}"));
    // Inside the schedule, between two states: the last state must be enough.
    let kill_at = options.steps * 11 / 20 + 1;
    let story = drive(&options, &store, &job, Some(kill_at), output).await?;
    output.note("the same run, never killed, to compare with");
    let undisturbed = drive(&options, &store, &reference, None, output).await?;

    let open = |job: &str| -> Result<SnapshotRepo> {
        Ok(SnapshotRepo::new(crate::store::open_store(&store)?, JobId::new(job)?, towline_codec::all()))
    };
    let (ours, theirs) = (open(&job)?, open(&reference)?);
    let mut checks = vec![
        Check::passed(
            "served = trained",
            format!(
                "log-probs bit-equal after each of {} syncs",
                story.syncs.len() + undisturbed.syncs.len()
            ),
        ),
        Check::passed(
            "sampled log-probs",
            format!("within {:.1e} of a full forward pass (1e-4 allowed)", story.gap),
        ),
    ];
    checks.push(match (&story.killed_at, &story.resumed_from) {
        (Some(killed), Some((state, step))) => Check::passed(
            "crash",
            format!("killed in step {}, resumed from {state} (step {step})", killed + 1),
        ),
        _ => Check::failed("crash", "the trainer was not killed and resumed".into()),
    });
    checks.push(same_end(&ours, story.end.as_deref(), &theirs, undisturbed.end.as_deref()).await?);
    checks.push(learning(&story, options.steps));

    report(&options, &store, &job, &story, &checks, started, output)?;
    match checks.iter().filter(|check| check.has_failed()).count() {
        0 => Ok(()),
        failed => Err(Error::internal(format!("{failed} of {} checks failed", checks.len()))
            .with_help("see the list of checks above")),
    }
}

/// Trains one job to its end against a server of its own, killed once in `kill_at` if asked.
async fn drive(
    options: &Options,
    store: &str,
    job: &str,
    kill_at: Option<u64>,
    output: &Output,
) -> Result<Story> {
    // Health is green before hot-loads are taken, as with real servers: the trainer has to wait for it.
    let server = ["--json", "serve", "engine", "--store", store, "--port", "0", "--ready-after-ms", "300"];
    let (server, url) = Process::serve(&server).await?;
    let steps = options.steps.to_string();
    let arguments = [
        "quickstart-trainer",
        "--store",
        store,
        "--job",
        job,
        "--server",
        &url,
        "--codec",
        &options.codec,
        "--steps",
        &steps,
    ];
    let mut story = Story::default();
    let mut trainer = Process::start("trainer", &arguments)?;
    while story.end.is_none() {
        let Some(event) = trainer.next::<Event>().await? else {
            trainer.finish().await?;
            return Err(Error::internal("the trainer ended before its run was done"));
        };
        let at = if let Event::Step { step, .. } = &event { Some(*step) } else { None };
        story.tell(event, output);
        if at.is_some() && at == kill_at && story.killed_at.is_none() {
            trainer.kill().await?;
            output.note(format_args!("killed the trainer after step {}", at.unwrap_or(0)));
            story.killed_at = at;
            trainer = Process::start("trainer", &arguments)?;
        }
    }
    trainer.finish().await?;
    server.kill().await?;
    Ok(story)
}

impl Story {
    fn tell(&mut self, event: Event, output: &Output) {
        match event {
            Event::Started { resumed_from: Some(state), step } => {
                output.note(format_args!("resumed from {state} at step {step}"));
                self.resumed_from = Some((state, step));
            }
            Event::Started { resumed_from: None, .. } => output.note("supervised training"),
            Event::Supervised { step, loss } => {
                output.note(format_args!("supervised step {step}: loss {loss:.3}"))
            }
            Event::Synced { phase, step, receipt } => self.syncs.push((phase, step, *receipt)),
            Event::Step { step, reward, exact, logprob_gap } => {
                self.gap = self.gap.max(logprob_gap);
                self.steps.insert(step, (reward, exact));
                if step.is_multiple_of(20) {
                    output.note(format_args!("step {step}: reward {reward:.3}, exact {exact:.3}"));
                }
            }
            Event::State { name, .. } => output.note(format_args!("state {name} saved")),
            Event::Done { state } => self.end = Some(state),
        }
    }
}

fn report(
    options: &Options,
    store: &str,
    job: &str,
    story: &Story,
    checks: &[Check],
    started: Instant,
    output: &Output,
) -> Result<()> {
    let rows: Vec<_> =
        story.syncs.iter().map(|(phase, step, receipt)| row(story, *phase, *step, receipt)).collect();
    let seconds = started.elapsed().as_secs_f64();
    let receipts: Vec<_> = story
        .syncs
        .iter()
        .map(|(phase, step, receipt)| {
            let (reward, exact) = story.steps.get(step).copied().unzip();
            json!({"phase": phase, "step": step, "receipt": receipt, "reward": reward, "exact": exact})
        })
        .collect();
    let value = json!({
        "job": job, "store": store, "seconds": seconds, "checks": checks, "syncs": receipts,
        "killed_at": story.killed_at, "resumed_from": story.resumed_from,
    });
    let log = options.dir.join("quickstart.json");
    let text = serde_json::to_vec_pretty(&value)
        .map_err(|error| Error::internal("the report is no JSON").with_source(error))?;
    std::fs::write(&log, text).map_err(|error| crate::cli::unwritable(&log, error))?;
    let heading =
        ["step", "kind", "bytes", "ratio %", "changed %", "fresh ms", "pause µs", "reward", "exact"];
    let list: Vec<String> = checks.iter().map(ToString::to_string).collect();
    output.result(
        format_args!(
            "{}\n\nChecks\n{}\n\nFiles\n  {}  every receipt and check\n  {}  snapshots and states of job {job}\n\n\
             Try next\n  towline snapshot list --store {store} --job {job}\n  \
             towline snapshot export --store {store} --job {job} step-{:05} -o {}\n  \
             towline serve engine --store {store} --port 8000\n\ndone in {seconds:.1} s",
            table(&heading, &rows),
            list.join("\n"),
            log.display(),
            store,
            options.steps,
            display(&options.dir.join("model")),
        ),
        &value,
    );
    Ok(())
}

fn row(story: &Story, phase: Phase, step: u64, receipt: &Receipt) -> Vec<String> {
    let (reward, exact) = match (phase, story.steps.get(&step)) {
        (Phase::Reinforcement, Some((reward, exact))) => (format!("{reward:.3}"), format!("{exact:.3}")),
        _ => ("–".into(), "–".into()),
    };
    vec![
        match phase {
            Phase::Supervised => format!("sft {step}"),
            Phase::Reinforcement => format!("rl {step}"),
        },
        receipt.snapshot.kind.to_string(),
        receipt.stored_bytes.to_string(),
        format!("{:.2}", 100.0 * receipt.ratio),
        receipt.changed_share.map_or("–".into(), |share| format!("{:.2}", 100.0 * share)),
        format!("{:.0}", 1e3 * receipt.time_to_fresh_s),
        receipt.pause_s.map_or("–".into(), |pause| format!("{:.1}", 1e6 * pause)),
        reward,
        exact,
    ]
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

pub(crate) fn run_tag() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:08x}", RandomState::new().hash_one(std::process::id()) >> 32)
}
