//! `towline snapshot prune|pin|unpin|ttl|doctor|repair`: what stays, for how long, and whether all is well.

use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use towline_core::{Error, Result};
use towline_storage::{Best, Depth, Prune, Retention, SnapshotInfo};

use super::output::{Output, table};
use super::snapshot::{One, Place, describe, find, repos};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Give up what has expired or no rule keeps, and delete what was given up before the grace.
    #[command(
        after_help = "Example:\n  towline snapshot prune --store ./store --keep-last-states 3 --dry-run"
    )]
    Prune(Rules),
    /// Keep a snapshot, whatever the rules say.
    #[command(after_help = "Example:\n  towline snapshot pin --store ./store step-00040 --id best")]
    Pin(Pin),
    /// Take a pin away.
    #[command(after_help = "Example:\n  towline snapshot unpin --store ./store --id best")]
    Unpin(Unpin),
    /// Set how long a snapshot lives, or let it live for ever.
    #[command(after_help = "Example:\n  towline snapshot ttl --store ./store step-00040 --seconds 604800")]
    Ttl(Ttl),
    /// Look whether the store keeps its word and nothing is missing.
    #[command(after_help = "Example:\n  towline snapshot doctor --store s3://bucket/prefix --job train")]
    Doctor(Place),
    /// Put what is damaged into quarantine, where nothing finds it and nothing deletes it, and take back what is whole.
    #[command(after_help = "Example:\n  towline snapshot repair --store ./store --job train --dry-run")]
    Repair(Repair),
}

#[derive(Debug, Args)]
pub(crate) struct Repair {
    #[command(flatten)]
    place: Place,
    /// Only look whether every file is there and as long as it should be; without it every byte is read.
    #[arg(long)]
    quick: bool,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Rules {
    #[command(flatten)]
    place: Place,
    /// How many of the newest train states stay; all by default.
    #[arg(long, value_name = "N")]
    keep_last_states: Option<usize>,
    /// How many of the newest snapshots for samplers stay; all by default.
    #[arg(long, value_name = "N")]
    keep_last_snapshots: Option<usize>,
    /// Keep what was saved at a step that is a multiple of this.
    #[arg(long, value_name = "STEPS")]
    keep_every: Option<u64>,
    /// Keep the best by a metric: name, `max` or `min`, and how many.
    #[arg(long, value_name = "METRIC:max|min:N")]
    keep_best: Option<ByMetric>,
    /// Hours that files stay after their snapshot was given up.
    #[arg(long, default_value_t = 24)]
    grace_hours: u64,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Clone)]
struct ByMetric(Best);

impl FromStr for ByMetric {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut parts = text.rsplitn(3, ':');
        let count = parts.next().and_then(|count| count.parse().ok());
        let highest = match parts.next() {
            Some("max") => Some(true),
            Some("min") => Some(false),
            _ => None,
        };
        match (parts.next(), highest, count) {
            (Some(metric), Some(highest), Some(count)) if !metric.is_empty() => {
                Ok(Self(Best::new(metric, count, highest)))
            }
            _ => Err("wanted something like `reward:max:3`".into()),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Pin {
    #[command(flatten)]
    one: One,
    /// The name of the pin, by which it is taken away.
    #[arg(long)]
    id: String,
    /// Why, for humans.
    #[arg(long, default_value = "")]
    reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct Unpin {
    #[command(flatten)]
    place: Place,
    /// The name of the pin.
    #[arg(long)]
    id: String,
}

#[derive(Debug, Args)]
pub(crate) struct Ttl {
    #[command(flatten)]
    one: One,
    /// Seconds from now, 3600 to 315360000.
    #[arg(long, required_unless_present = "clear")]
    seconds: Option<u64>,
    /// Let it live for ever.
    #[arg(long, conflicts_with = "seconds")]
    clear: bool,
}

pub(crate) async fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::Prune(rules) => prune(&rules, output).await,
        Command::Pin(pin) => {
            let (repo, info) = find(&pin.one).await?;
            repo.pin(&info, &pin.id, &pin.reason).await?;
            output.result(format!("{} is pinned as `{}`", info.id, pin.id), &describe(&repo, &info));
            Ok(())
        }
        Command::Unpin(unpin) => {
            for repo in repos(&unpin.place).await? {
                repo.unpin(&unpin.id).await?;
            }
            output.result(format!("nothing is pinned as `{}`", unpin.id), &json!({"unpinned": unpin.id}));
            Ok(())
        }
        Command::Ttl(ttl) => {
            let (repo, info) = find(&ttl.one).await?;
            let info = repo.set_ttl(&info, ttl.seconds.map(Duration::from_secs)).await?;
            let text = match ttl.seconds {
                Some(seconds) => format!("{} expires in {seconds} s", info.id),
                None => format!("{} does not expire", info.id),
            };
            output.result(text, &describe(&repo, &info));
            Ok(())
        }
        Command::Doctor(place) => doctor(&place, output).await,
        Command::Repair(options) => repair(&options, output).await,
    }
}

async fn prune(rules: &Rules, output: &Output) -> Result<()> {
    let mut retention = Retention::new();
    if let Some(count) = rules.keep_last_states {
        retention = retention.with_last_states(count)?;
    }
    if let Some(count) = rules.keep_last_snapshots {
        retention = retention.with_last_snapshots(count)?;
    }
    if let Some(steps) = rules.keep_every {
        retention = retention.with_every_steps(steps)?;
    }
    if let Some(ByMetric(best)) = &rules.keep_best {
        retention = retention.with_best(best.clone());
    }
    let grace = Duration::from_secs(rules.grace_hours.saturating_mul(3600));
    let prune = Prune::new(retention).with_grace(grace).with_dry_run(rules.dry_run);
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for repo in repos(&rules.place).await? {
        let pruned = repo.prune(&prune).await?;
        let mut row = |what: &str, info: &SnapshotInfo, why: String| {
            rows.push(vec![
                repo.job().to_string(),
                info.seq.to_string(),
                info.id.to_string(),
                what.into(),
                why,
            ]);
        };
        for (info, why) in &pruned.kept {
            let expired = if info.is_expired(pruned.now_ms) { "expired, kept" } else { "kept" };
            row(expired, info, why.to_string());
        }
        pruned.given_up.iter().for_each(|info| row("given up", info, String::new()));
        pruned.deleted.iter().for_each(|info| row("deleted", info, format!("{} bytes", info.stored_bytes)));
        for orphan in &pruned.orphans {
            let size = format!("{} files, {} bytes", orphan.files, orphan.bytes);
            rows.push(vec![
                repo.job().to_string(),
                String::new(),
                orphan.dir.clone(),
                "deleted: of no snapshot".into(),
                size,
            ]);
        }
        let all = |infos: &[SnapshotInfo]| infos.iter().map(|info| describe(&repo, info)).collect::<Vec<_>>();
        let kept = pruned.kept.iter().map(|(info, why)| {
            json!({"snapshot": describe(&repo, info), "why": why.to_string(),
                   "expired": info.is_expired(pruned.now_ms)})
        });
        let orphans = pruned.orphans.iter();
        let orphans =
            orphans.map(|orphan| json!({"dir": orphan.dir, "files": orphan.files, "bytes": orphan.bytes}));
        values.push(json!({
            "job": repo.job(), "now_ms": pruned.now_ms, "kept": kept.collect::<Vec<_>>(),
            "given_up": all(&pruned.given_up), "waiting": all(&pruned.waiting), "deleted": all(&pruned.deleted),
            "orphans": orphans.collect::<Vec<_>>(),
        }));
    }
    let text = table(&["job", "seq", "snapshot", "what", "why"], &rows);
    output.result(text, &json!({"dry_run": rules.dry_run, "jobs": values}));
    Ok(())
}

async fn repair(options: &Repair, output: &Output) -> Result<()> {
    let depth = if options.quick { Depth::Quick } else { Depth::Full };
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for repo in repos(&options.place).await? {
        let repaired = repo.repair(depth, options.dry_run).await?;
        let whole = |infos: &[SnapshotInfo]| infos.iter().map(|info| (info.clone(), String::new())).collect();
        let groups: [(&str, Vec<(SnapshotInfo, String)>); 4] = [
            ("good", whole(&repaired.good)),
            ("returned", whole(&repaired.returned)),
            ("quarantined", repaired.quarantined),
            ("remaining", repaired.remaining),
        ];
        let mut value = json!({"job": repo.job()});
        for (what, infos) in &groups {
            rows.extend(infos.iter().map(|(info, why)| {
                vec![
                    repo.job().to_string(),
                    info.seq.to_string(),
                    info.id.to_string(),
                    (*what).into(),
                    why.clone(),
                ]
            }));
            let each = infos.iter().map(|(info, why)| json!({"snapshot": describe(&repo, info), "why": why}));
            value[*what] = each.collect();
        }
        values.push(value);
    }
    let text = table(&["job", "seq", "snapshot", "what", "why"], &rows);
    output.result(text, &json!({"dry_run": options.dry_run, "jobs": values}));
    Ok(())
}

async fn doctor(place: &Place, output: &Output) -> Result<()> {
    let (mut rows, mut values, mut bad) = (Vec::new(), Vec::new(), 0);
    for repo in repos(place).await? {
        for finding in repo.doctor().await {
            bad += usize::from(!finding.good);
            let verdict = if finding.good { "ok" } else { "BAD" };
            let help = finding.help.clone().unwrap_or_default();
            rows.push(vec![
                repo.job().to_string(),
                finding.what.into(),
                verdict.into(),
                finding.found.clone(),
                help,
            ]);
            values.push(json!({
                "job": repo.job(), "what": finding.what, "good": finding.good, "found": finding.found,
                "help": finding.help,
            }));
        }
    }
    let text = table(&["job", "what", "verdict", "found", "what to do"], &rows);
    if bad > 0 {
        output.note(text);
        return Err(Error::corrupt(format!("{bad} findings are bad")).with_help("do what stands beside them"));
    }
    output.result(text, &json!({"findings": values}));
    Ok(())
}
