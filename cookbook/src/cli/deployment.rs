//! `towline deployment`: ask or order a running deployment through the hot-load API.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use towline_core::{Error, HotLoad, JobId, OpId, Result, Secret, WriteId};
use towline_deploy::DeploymentManager;
use towline_storage::{SnapshotRepo, Wanted};

use super::output::{Output, table};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what every replica serves.
    #[command(after_help = "Example:\n  towline deployment state --url http://127.0.0.1:8000")]
    State(Target),
    /// Wait until every replica takes hot-loads.
    #[command(after_help = "Example:\n  towline deployment wait --url http://127.0.0.1:8000 --timeout 300")]
    Wait(Wait),
    /// Load a stored snapshot onto every replica.
    #[command(
        after_help = "Example:\n  towline deployment hot-load --url http://127.0.0.1:8000 --store ./store --job my-run \
        --snapshot step-00040"
    )]
    HotLoad(Load),
}

#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Where the hot-load API is.
    #[arg(long)]
    url: String,
    /// The key for `Authorization: Bearer`.
    #[arg(long, env = "TOWLINE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Wait {
    #[command(flatten)]
    target: Target,
    /// Seconds to wait at most.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Load {
    #[command(flatten)]
    target: Target,
    /// The store that holds the snapshot, which the servers read too.
    #[arg(long)]
    store: String,
    /// The job that saved it.
    #[arg(long)]
    job: String,
    /// Its name or identity.
    #[arg(long)]
    snapshot: String,
    /// Keep cached prompts.
    #[arg(long)]
    keep_prompt_cache: bool,
    /// Seconds to wait at most.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

pub(crate) async fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::State(target) => state(&target, output).await,
        Command::Wait(options) => wait(&options, output).await,
        Command::HotLoad(options) => hot_load(&options, output).await,
    }
}

fn manager(target: &Target) -> Result<DeploymentManager> {
    let manager = DeploymentManager::new(&target.url)?;
    Ok(match &target.api_key {
        Some(key) => manager.with_api_key(Secret::new(key.clone())),
        None => manager,
    })
}

async fn state(target: &Target, output: &Output) -> Result<()> {
    let status = manager(target)?.status().await?;
    let text = |value: Option<String>| value.unwrap_or_else(|| "–".into());
    let rows: Vec<_> = status
        .replicas
        .iter()
        .map(|replica| {
            vec![
                replica.name.clone(),
                text(replica.identity.as_ref().map(ToString::to_string)),
                if replica.ready { "ready" } else { "not ready" }.into(),
                format!("{:?}", replica.stage).to_lowercase(),
                text(replica.error.clone()),
            ]
        })
        .collect();
    let values: Vec<_> = status
        .replicas
        .iter()
        .map(|replica| {
            json!({
                "name": replica.name, "identity": replica.identity, "digest": replica.digest, "ready": replica.ready,
                "stage": replica.stage, "target": replica.target, "error": replica.error,
            })
        })
        .collect();
    output.result(
        table(&["replica", "serves", "state", "stage", "error"], &rows),
        &json!({"replicas": values}),
    );
    Ok(())
}

async fn wait(options: &Wait, output: &Output) -> Result<()> {
    let manager = manager(&options.target)?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(options.timeout);
    loop {
        let last = match manager.status().await {
            Ok(status)
                if !status.replicas.is_empty() && status.replicas.iter().all(|replica| replica.ready) =>
            {
                output.result("ready", &json!({"ready": true, "replicas": status.replicas.len()}));
                return Ok(());
            }
            Ok(_) => "not every replica is ready".to_owned(),
            Err(error) if error.is_retryable() => error.to_string(),
            Err(error) => return Err(error),
        };
        if tokio::time::Instant::now() >= deadline {
            return Err(Error::timed_out(format!("not ready within {} s: {last}", options.timeout))
                .with_help("look at the servers' logs, or wait longer with --timeout"));
        }
        output.note(&last);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn hot_load(options: &Load, output: &Output) -> Result<()> {
    let store = crate::store::open_store(&options.store)?;
    let repo = SnapshotRepo::new(store, JobId::new(options.job.as_str())?, towline_codec::all());
    let info = repo.find(&options.snapshot, Wanted::Sampler).await?;
    let manifest = repo.manifest(&info).await?;
    let op = OpId::new(format!("cli-{}", WriteId::from_random(random())))?;
    let order = HotLoad::new(op, repo.reference(&info, &manifest))?
        .with_reset_prompt_cache(!options.keep_prompt_cache);
    let status = manager(&options.target)?
        .hotload_and_wait(&order, Duration::from_secs(options.timeout), Duration::from_millis(200))
        .await?;
    output.result(
        format_args!("{} is served by {} replica(s)", info.id, status.replicas.len()),
        &json!({"snapshot": info.id, "replicas": status.replicas.len()}),
    );
    Ok(())
}

fn random() -> [u8; 8] {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()).to_le_bytes()
}
