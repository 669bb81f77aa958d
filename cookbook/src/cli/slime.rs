//! `towline snapshot export --format slime` and `towline snapshot import`: the directories of slime and miles.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use towline_core::{Error, JobId, Result, SessionId, SnapshotName};
use towline_storage::slime::{Checksum, Directory, Encoding, Import, Options, newest};
use towline_storage::{SnapshotInfo, SnapshotRepo, StoreOptions, Wanted};

use super::output::Output;
use super::snapshot::describe;

/// What a directory of slime needs to know besides.
#[derive(Debug, Args)]
#[command(next_help_heading = "With --format slime")]
pub(crate) struct Target {
    /// Write the delta from this snapshot, a name or identity; a full checkpoint by default.
    #[arg(long)]
    parent: Option<String>,
    /// The number of the directory; by default the one after the newest, from 1. Readers know the parent as the number before.
    #[arg(long)]
    number: Option<u64>,
    /// xor or overwrite.
    #[arg(long, default_value_t)]
    encoding: Encoding,
    /// xxh3-128, blake3 or adler32.
    #[arg(long, default_value_t)]
    checksum: Checksum,
    /// The level of zstd.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    level: i32,
}

impl Target {
    /// Whether a plain directory was asked for with words that are not for it.
    pub(crate) fn is_used(&self) -> bool {
        self.parent.is_some() || self.number.is_some()
    }
}

#[derive(Debug, Args)]
pub(crate) struct Source {
    /// A directory that slime published, such as deltas/weight_v000004, or the checkpoint that its trainer began with.
    dir: PathBuf,
    /// The store: a directory, or an s3://, gs:// or az:// URL.
    #[arg(long)]
    store: String,
    /// The job; it is made if it is not there. Whoever writes to it now is fenced: its next save fails.
    #[arg(long)]
    job: String,
    /// The snapshot's name; by default weight-v000004 or whatever its number is.
    #[arg(long)]
    name: Option<String>,
    /// For a delta: the snapshot that it is applied to; by default the newest.
    #[arg(long)]
    parent: Option<String>,
    /// Which number the parent is, if it was not imported.
    #[arg(long)]
    parent_number: Option<u64>,
    /// The codec of the delta's snapshot.
    #[arg(long, default_value = "zstd")]
    codec: String,
    /// Optimizer steps done.
    #[arg(long)]
    step: Option<u64>,
}

pub(crate) async fn export(
    repo: &SnapshotRepo,
    info: &SnapshotInfo,
    folder: &Path,
    target: &Target,
    output: &Output,
) -> Result<()> {
    let parent = match &target.parent {
        Some(name) => Some(repo.find(name, Wanted::Sampler).await?),
        None => None,
    };
    let number = match target.number {
        Some(number) => number,
        None => newest(folder)?.map_or(1, |newest| newest.saturating_add(1)),
    };
    let options = Options::new(number)
        .with_encoding(target.encoding)
        .with_checksum(target.checksum)
        .with_level(target.level)
        .with_threads(super::delta::limits(0).threads.get());
    let written = repo.export_slime(info, parent.as_ref(), folder, &options).await?;
    let what = match &parent {
        Some(parent) => format!("{} as a delta on {}", info.id, parent.id),
        None => format!("{}, whole", info.id),
    };
    output.result(
        format_args!(
            "{}: {what} ({} tensors, {} bytes)",
            written.dir.display(),
            written.tensors,
            written.bytes
        ),
        &json!({
            "output": written.dir, "version": written.version, "base_version": written.base_version,
            "tensors": written.tensors, "bytes": written.bytes, "snapshot": describe(repo, info),
        }),
    );
    Ok(())
}

pub(crate) async fn import(source: &Source, output: &Output) -> Result<()> {
    let store = towline_storage::open(&source.store, &StoreOptions::from_env()?)?;
    let repo = SnapshotRepo::new(store, JobId::new(source.job.as_str())?, towline_codec::all())
        .with_limits(super::delta::limits(0));
    let mut import = Import::new(&source.dir);
    if let Some(name) = &source.name {
        import = import.with_name(SnapshotName::new(name.as_str())?);
    }
    if let Some(step) = source.step {
        import = import.with_step(step);
    }
    // What is wrong with the directory is said before a trainer is fenced for it.
    if let Directory::Delta(delta) = Directory::open(&source.dir)? {
        let parent = match &source.parent {
            Some(name) => Some(repo.find(name, Wanted::Sampler).await?),
            None => repo.newest(Wanted::Sampler).await?,
        };
        let parent = parent.ok_or_else(|| {
            Error::not_found(format!(
                "`{}` is a delta on version {}, and job {} has no snapshot",
                source.dir.display(),
                delta.base_version(),
                repo.job()
            ))
            .with_help("import the full checkpoint that it builds on first")
        })?;
        import = import.with_parent(parent).with_codec(towline_codec::by_id(&source.codec)?);
        if let Some(number) = source.parent_number {
            import = import.with_parent_version(number);
        }
    } else if source.parent.is_some() || source.parent_number.is_some() {
        return Err(Error::invalid(format!(
            "`{}` is a full checkpoint: it has no parent",
            source.dir.display()
        ))
        .with_help("leave --parent and --parent-number out"));
    }
    let writer = repo.writer(SessionId::from_random(crate::recipes::random())).await?;
    let published = Box::pin(writer.import_slime(import)).await?;
    let info = repo.find(published.id.identity.as_str(), Wanted::Sampler).await?;
    output.result(
        format_args!("{}/{}: {} of {}", repo.job(), info.id, info.kind, source.dir.display()),
        &json!({"input": source.dir, "snapshot": describe(&repo, &info)}),
    );
    Ok(())
}
