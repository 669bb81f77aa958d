//! `towline snapshot`: what a store holds.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use towline_core::{Error, JobId, Result};
use towline_storage::{Depth, SnapshotInfo, SnapshotRepo, Wanted};

use super::output::{Output, table};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List snapshots and states.
    #[command(after_help = "Example:\n  towline snapshot list --store ./store")]
    List(Place),
    /// Show one manifest.
    #[command(after_help = "Example:\n  towline snapshot show --store ./store step-00040")]
    Show(One),
    /// Read and check every byte of one snapshot, or of all.
    #[command(after_help = "Example:\n  towline snapshot verify --store ./store")]
    Verify(Verify),
    /// Write a snapshot as a plain Hugging Face directory, or as a directory of slime.
    #[command(after_help = "Example:\n  towline snapshot export --store ./store step-00040 -o model\n  \
        towline snapshot export --store ./store step-00041 --format slime --parent step-00040 -o deltas")]
    Export(Export),
    /// Publish a directory of slime, a full checkpoint or a delta.
    #[command(
        after_help = "Example:\n  towline snapshot import deltas/weight_v000004 --store ./store --job train"
    )]
    Import(super::slime::Source),
    #[command(flatten)]
    Keep(super::keep::Command),
}

#[derive(Debug, Args)]
pub(crate) struct Place {
    /// The store: a directory, or an s3://, gs:// or az:// URL.
    #[arg(long)]
    pub(super) store: String,
    /// The job; all jobs by default.
    #[arg(long)]
    pub(super) job: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct One {
    #[command(flatten)]
    place: Place,
    /// A name or identity.
    name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    place: Place,
    /// A name or identity; all by default.
    name: Option<String>,
    /// Only look whether every file is there and as long as it should be.
    #[arg(long, conflicts_with = "sample")]
    quick: bool,
    /// Only restore this share of the tensors, from 0 to 1, drawn anew each time.
    #[arg(long, value_name = "SHARE")]
    sample: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    #[command(flatten)]
    one: One,
    /// The directory to write, for slime the folder that gets a new directory weight_v…. One that exists is not
    /// touched.
    #[arg(short, long)]
    output: PathBuf,
    /// hf: a plain directory. slime: a directory for engines that pull weights from a folder of versions.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    slime: super::slime::Target,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Hf,
    Slime,
}

pub(crate) async fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::List(place) => list(&place, output).await,
        Command::Show(one) => show(&one, output).await,
        Command::Verify(options) => verify(&options, output).await,
        Command::Export(options) => export(&options, output).await,
        Command::Import(source) => super::slime::import(&source, output).await,
        Command::Keep(command) => super::keep::run(command, output).await,
    }
}

pub(super) async fn repos(place: &Place) -> Result<Vec<SnapshotRepo>> {
    let store = crate::store::open_store(&place.store)?;
    let jobs = match &place.job {
        Some(job) => vec![JobId::new(job.as_str())?],
        None => towline_storage::jobs(store.as_ref()).await?,
    };
    Ok(jobs.into_iter().map(|job| SnapshotRepo::new(Arc::clone(&store), job, towline_codec::all())).collect())
}

pub(super) async fn find(one: &One) -> Result<(SnapshotRepo, SnapshotInfo)> {
    let mut missing = Error::not_found(format!("the store `{}` holds no job", one.place.store));
    for repo in repos(&one.place).await? {
        match repo.find(&one.name, Wanted::Any).await {
            Ok(info) => return Ok((repo, info)),
            Err(error) if error.kind() == towline_core::ErrorKind::NotFound => missing = error,
            Err(error) => return Err(error),
        }
    }
    Err(missing)
}

async fn list(place: &Place, output: &Output) -> Result<()> {
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for repo in repos(place).await? {
        for info in repo.list().await? {
            rows.push(vec![
                repo.job().to_string(),
                info.seq.to_string(),
                info.id.identity.to_string(),
                info.kind.to_string(),
                info.codec.as_ref().map_or("–".into(), ToString::to_string),
                info.step.map_or("–".into(), |step| step.to_string()),
                info.stored_bytes.to_string(),
                info.parent.as_ref().map_or("–".into(), ToString::to_string),
            ]);
            values.push(describe(&repo, &info));
        }
    }
    let heading = ["job", "seq", "identity", "kind", "codec", "step", "bytes", "parent"];
    output.result(table(&heading, &rows), &json!({"snapshots": values}));
    Ok(())
}

pub(super) fn describe(repo: &SnapshotRepo, info: &SnapshotInfo) -> serde_json::Value {
    json!({
        "job": repo.job(), "seq": info.seq, "identity": info.id.identity, "digest": info.id.digest, "kind": info.kind,
        "codec": info.codec, "step": info.step, "stored_bytes": info.stored_bytes, "full_bytes": info.full_bytes,
        "parent": info.parent, "created_ms": info.created_ms, "expires_ms": info.expires_ms,
        "promotable": info.kind.is_promotable(), "resumable": info.kind.is_resumable(),
    })
}

async fn show(one: &One, output: &Output) -> Result<()> {
    let (repo, info) = find(one).await?;
    let manifest = repo.manifest(&info).await?;
    let value = serde_json::to_value(&manifest)
        .map_err(|error| Error::internal("the manifest is no JSON").with_source(error))?;
    let text = serde_json::to_string_pretty(&value)
        .map_err(|error| Error::internal("the manifest is no JSON").with_source(error))?;
    output.result(text, &value);
    Ok(())
}

async fn verify(options: &Verify, output: &Output) -> Result<()> {
    let chosen: Vec<(SnapshotRepo, SnapshotInfo)> = match &options.name {
        Some(name) => {
            let place = Place { store: options.place.store.clone(), job: options.place.job.clone() };
            vec![find(&One { place, name: name.clone() }).await?]
        }
        None => {
            let mut all = Vec::new();
            for repo in repos(&options.place).await? {
                all.extend(repo.list().await?.into_iter().map(|info| (repo.clone(), info)));
            }
            all
        }
    };
    let depth = match (options.quick, options.sample) {
        (true, _) => Depth::Quick,
        (false, Some(share)) => Depth::Sample(share),
        (false, None) => Depth::Full,
    };
    let total = chosen.iter().map(|(_, info)| info.stored_bytes).sum();
    let progress = output.progress("verify", total);
    let (mut lines, mut values, mut failed) = (Vec::new(), Vec::new(), 0);
    for (repo, info) in &chosen {
        let outcome = repo.verify_to(info, depth).await;
        progress.add(info.stored_bytes);
        let verdict = match &outcome {
            Ok(checked) => format!("ok ({} tensors, {} bytes)", checked.tensors, checked.bytes),
            Err(error) => {
                failed += 1;
                error.report()
            }
        };
        lines.push(format!("{}/{}: {verdict}", repo.job(), info.id));
        values.push(json!({
            "job": repo.job(), "identity": info.id.identity, "ok": outcome.is_ok(),
            "error": outcome.err().map(|error| error.report()),
        }));
    }
    drop(progress);
    if failed > 0 {
        output.note(lines.join("\n"));
        return Err(Error::corrupt(format!("{failed} of {} snapshots are damaged", chosen.len()))
            .with_help("restore from the newest snapshot that is whole"));
    }
    output.result(lines.join("\n"), &json!({"verified": values}));
    Ok(())
}

async fn export(options: &Export, output: &Output) -> Result<()> {
    if options.format == Format::Hf && options.slime.is_used() {
        return Err(Error::invalid("--parent and --number are for directories of slime")
            .with_help("add --format slime"));
    }
    let (repo, info) = find(&options.one).await?;
    if options.format == Format::Slime {
        return super::slime::export(&repo, &info, &options.output, &options.slime, output).await;
    }
    repo.export(&info, &options.output).await?;
    output.result(
        format_args!("{}: {} ({})", options.output.display(), info.id, info.kind),
        &json!({"output": options.output, "snapshot": describe(&repo, &info)}),
    );
    Ok(())
}
