//! `towline checkpoint`, `towline promote` and `towline model`: what a job has to resume from and to deploy.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use towline_core::{
    CheckpointCatalog, CheckpointClass, CheckpointInfo, CheckpointRef, Error, JobId, ModelId, Result,
};
use towline_storage::{Promote, SnapshotRepo};
use towline_trainer_client::{CheckpointLog, repair_log};

use super::output::{Output, table};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List a job's checkpoints, the newest first: what can be resumed from, and what can be promoted.
    #[command(after_help = "Example:\n  towline checkpoint list --store ./store --job train")]
    List(List),
    /// Find what a reference names. No trainer needs to be alive.
    #[command(
        after_help = "Example:\n  towline checkpoint resolve cross_job://train/step-00040 --store ./store"
    )]
    Resolve(Resolve),
    /// Rebuild `checkpoints.jsonl` from the store: lines of what is gone, and what is no line, are set aside.
    #[command(
        after_help = "Example:\n  towline checkpoint repair-log --store ./store --job train --log ./train"
    )]
    RepairLog(RepairLog),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// List the models that were promoted.
    #[command(after_help = "Example:\n  towline model list --store ./store")]
    List(Store),
}

#[derive(Debug, Args)]
pub(crate) struct Store {
    /// The store: a directory, or an s3://, gs:// or az:// URL.
    #[arg(long)]
    store: String,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    store: Store,
    /// The job.
    #[arg(long)]
    job: JobId,
    /// How many at most.
    #[arg(long, default_value_t = 50)]
    limit: usize,
    /// Where the page before ended.
    #[arg(long)]
    cursor: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RepairLog {
    #[command(flatten)]
    store: Store,
    /// The job.
    #[arg(long)]
    job: JobId,
    /// The folder of `checkpoints.jsonl`.
    #[arg(long)]
    log: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    #[command(flatten)]
    store: Store,
    /// `<name>`, `<job>:<name>`, `cross_job://<job>/<name>` or `tinker://<run>/<kind>/<name>`.
    reference: CheckpointRef,
    /// The job that a name without one belongs to.
    #[arg(long)]
    job: Option<JobId>,
}

#[derive(Debug, Args)]
pub(crate) struct Resolve {
    #[command(flatten)]
    named: Named,
    /// What is wanted: a train state to resume from, or weights for samplers.
    #[arg(long, value_enum, default_value_t)]
    want: Want,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Want {
    #[default]
    State,
    Sampler,
}

/// Options of `towline promote`.
#[derive(Debug, Args)]
pub(crate) struct Promotion {
    #[command(flatten)]
    named: Named,
    /// The model's name: 1 to 63 of a-z, 0-9 and hyphen, with no hyphen at an end.
    #[arg(long)]
    output_model_id: ModelId,
    /// The account that the model's name begins with.
    #[arg(long, default_value = "local")]
    account: JobId,
    /// Write and promote the full weights of a delta.
    #[arg(long)]
    materialise: bool,
}

pub(crate) async fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::List(options) => list(&options, output).await,
        Command::Resolve(options) => resolve(&options, output).await,
        Command::RepairLog(options) => rebuild_log(&options, output).await,
    }
}

async fn rebuild_log(options: &RepairLog, output: &Output) -> Result<()> {
    let repo = repo(&options.store, options.job.clone())?;
    let log = CheckpointLog::new(&options.log);
    let repaired = repair_log(&repo, &options.job, &log).await?;
    let lines = repaired.lines.len();
    output.result(
        format_args!(
            "`{}`: {lines} checkpoints; {} lines of what is gone and {} that were no lines set aside",
            log.path().display(),
            repaired.gone.len(),
            repaired.set_aside,
        ),
        &json!({"lines": lines, "gone": repaired.gone.len(), "set_aside": repaired.set_aside}),
    );
    Ok(())
}

pub(crate) async fn models(command: ModelCommand, output: &Output) -> Result<()> {
    let ModelCommand::List(place) = command;
    // Models belong to the store: any job's view of it finds them.
    let models = repo(&place, JobId::new("any")?)?.models().await?;
    let rows: Vec<_> = models
        .iter()
        .map(|model| {
            let source = &model.source;
            let step = source.step.map_or("–".to_owned(), |step| step.to_string());
            vec![model.name.clone(), source.job.to_string(), source.id.to_string(), step, model.path.clone()]
        })
        .collect();
    output.result(table(&["model", "job", "checkpoint", "step", "path"], &rows), &json!({"models": models}));
    Ok(())
}

/// `towline promote`.
pub(crate) async fn promote(options: Promotion, output: &Output) -> Result<()> {
    let (repo, job) = options.named.open()?;
    let found = repo.resolve_checkpoint(&options.named.reference, &job, CheckpointClass::Sampler).await?;
    let progress = std::sync::Arc::new(std::sync::Mutex::new((output.progress("promote", found.bytes), 0)));
    let promotion = Promote::new(options.output_model_id)
        .with_account(options.account)
        .with_materialise(options.materialise)
        .with_progress(move |done, _| {
            if let Ok(mut progress) = progress.lock() {
                progress.0.add(done.saturating_sub(progress.1));
                progress.1 = done;
            }
        });
    let model = repo.of_job(found.job.clone()).promote(found.id.identity.as_str(), &promotion).await?;
    output.result(
        format_args!("{}: {} of job {}, at {}", model.name, model.source.id, model.source.job, model.path),
        &json!({"model": model}),
    );
    Ok(())
}

async fn list(options: &List, output: &Output) -> Result<()> {
    let repo = repo(&options.store, options.job.clone())?;
    let page = repo.list_page(&options.job, options.cursor.as_deref(), options.limit).await?;
    let rows: Vec<_> = page.checkpoints.iter().map(row).collect();
    let heading = ["identity", "kind", "step", "bytes", "saved", "expires", "use", "parent"];
    let mut text = table(&heading, &rows);
    if let Some(next) = &page.next {
        text.push_str(&format!("\nmore with --cursor {next}"));
    }
    output.result(text, &json!({"checkpoints": page.checkpoints, "next": page.next}));
    Ok(())
}

async fn resolve(options: &Resolve, output: &Output) -> Result<()> {
    let (repo, job) = options.named.open()?;
    let class = match options.want {
        Want::State => CheckpointClass::State,
        Want::Sampler => CheckpointClass::Sampler,
    };
    let found = repo.resolve_checkpoint(&options.named.reference, &job, class).await?;
    output.result(format_args!("{}: {} ({})", found.reference(), found.path, found.kind), &json!(found));
    Ok(())
}

impl Named {
    /// The repo, and the job that a name without one belongs to.
    fn open(&self) -> Result<(SnapshotRepo, JobId)> {
        let job = match (&self.job, &self.reference) {
            (Some(job), _) => job.clone(),
            (None, CheckpointRef::CrossJob { job, .. }) => job.clone(),
            (None, CheckpointRef::Local(name)) => {
                return Err(Error::invalid(format!(
                    "`{name}` is a name of some job: which one was not said"
                ))
                .with_help(format!("add --job, or write `<job>:{name}`")));
            }
            (None, _) => JobId::new("any")?,
        };
        Ok((repo(&self.store, job.clone())?, job))
    }
}

fn repo(place: &Store, job: JobId) -> Result<SnapshotRepo> {
    let store = crate::store::open_store(&place.store)?;
    Ok(SnapshotRepo::new(store, job, towline_codec::all()))
}

fn row(info: &CheckpointInfo) -> Vec<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let dash = || "–".to_owned();
    let expires = match (info.expires_ms, info.expired) {
        (None, _) => "never".to_owned(),
        (Some(_), true) => "expired, kept".to_owned(),
        (Some(at), false) => format!("in {}", span((at / 1000).saturating_sub(now))),
    };
    let usable = match (info.resumable, info.promotable) {
        (true, _) => "resume",
        (_, true) => "promote",
        _ => "serve",
    };
    vec![
        info.id.to_string(),
        info.kind.to_string(),
        info.step.map_or_else(dash, |step| step.to_string()),
        info.bytes.to_string(),
        format!("{} ago", span(now.saturating_sub(info.created_ms / 1000))),
        expires,
        usable.to_owned(),
        info.parent.as_ref().map_or_else(dash, ToString::to_string),
    ]
}

/// A time in its largest unit.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}
