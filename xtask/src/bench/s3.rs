//! `bench store --s3`: a model sent to a whole S3 server on this machine and brought back, by our store and by others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::store::{ratios, spread};
use super::{Program, load, machine, section};
use crate::args::Args;
use crate::python::Python;
use crate::real_stores::SeaweedFs;
use crate::stop::{Result, Stop};
use crate::table::Table;
use crate::workspace::Context;

/// How many times as fast as others a download must be.
const DOWN: f64 = 3.0;
/// Where the server's data lie unless the caller says otherwise: in memory, where there is such a folder.
const IN_MEMORY: &str = "/dev/shm";
/// MiB of one file.
const SHARD_MIB: u64 = 256;

pub(super) fn command(context: &Context, mut args: Args) -> Result<()> {
    let (mib, runs) = (args.number("--mib")?.unwrap_or(1024), args.number("--runs")?.unwrap_or(5));
    let shard = args.number("--shard-mib")?.unwrap_or(SHARD_MIB);
    let (python, check) = (args.flag("--python"), args.flag("--check"));
    let (out, data) = (args.value("--out")?.map(PathBuf::from), args.value("--data")?.map(PathBuf::from));
    args.finish()?;
    if runs == 0 || shard == 0 {
        return Err(Stop::Usage("`--runs` and `--shard-mib` want numbers from 1".to_owned()));
    }
    let python = if python { Some(Python::of_s3(context)?) } else { None };
    let program = Program::build(context)?;
    let parent = match data {
        Some(data) => data,
        None if Path::new(IN_MEMORY).is_dir() => PathBuf::from(IN_MEMORY),
        None => program.scratch.clone(),
    };
    let load = load();
    let folder = Folder(parent.join(format!("towline-bench-s3-{}", std::process::id())));
    let mut all = Measured::default();
    for round in 0..runs {
        context.say(format!("{mib} MiB up and down, round {} of {runs}", round + 1));
        // A new server each time: what the rounds before have left would fill the folder.
        let server = SeaweedFs::start(context, &folder.0)?;
        let mut job = server.client(context.job(&program.path)).args(&["s3", "--url", &SeaweedFs::url()]);
        for (option, number) in [("--mib", mib), ("--shard-mib", shard), ("--round", round)] {
            job = job.args(&[option, &number.to_string()]);
        }
        job = job.args(&["--scratch"]).args(&[&folder.0]);
        if let Some(python) = &python {
            job = job.args(&["--python"]).args(&[python.interpreter()]);
            job = job.args(&["--script"]).args(&[python.path("bench_s3.py")]);
        }
        let printed = job.deadline(super::DEADLINE).output().map_err(|stop| stop.context(&server.said()))?;
        let printed: Value = serde_json::from_str(&printed)
            .map_err(|error| Stop::failed(format!("the measuring program printed no JSON: {error}")))?;
        all.add(&printed)?;
    }
    drop(folder);

    let verdict = all.verdict();
    let flags = if python.is_some() { " --python" } else { "" };
    let shards = if shard == SHARD_MIB { String::new() } else { format!(" --shard-mib {shard}") };
    let text = format!(
        "Measured by `cargo xtask bench store --s3 --mib {mib} --runs {runs}{shards}{flags}` on {}{load}. {} files.{} {}\n\n{}{}",
        machine(),
        all.files,
        all.packages(),
        about(&parent),
        verdict.iter().map(|(_, line)| format!("- {line}\n")).collect::<String>(),
        all.tables(),
    );
    let pass = verdict.iter().all(|(pass, _)| *pass);
    let lines: Vec<&str> = verdict.iter().map(|(_, line)| line.as_str()).collect();
    context.say(format!("\n{text}"));
    context.emit(&json!({"machine": machine(), "measured": all.json, "pass": pass, "verdict": lines}));
    if let Some(path) = out {
        section::write(&path, "bench-store-s3", &text)?;
    }
    if check && !pass { Err(Stop::failed("the verdict is FAIL")) } else { Ok(()) }
}

/// The server's data, which go with the run.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left behind lies in a folder for such things.
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn about(data: &Path) -> String {
    let lie = if data == Path::new(IN_MEMORY) { "in memory (tmpfs)" } else { "on disk" };
    format!(
        "The server is {} with keys, by plain HTTP on the loopback; it shares the cores with its clients, and its data lie \
         {lie}. Each round has a new server, and every way goes once with a small model before anything counts; then all \
         take turns, and who begins changes. Seconds are medians, ratios are medians of the ratios within a round (least \
         to most). Files go one after the other; whatever a client does at once it does within a file. No client's way \
         counts its start. Bare sends one signed request for each file by a socket and keeps nothing: what the server \
         allows. Processor is what the client alone takes, which the server does not change; memory is the peak beyond \
         what the process held before, with what comes down where the way makes that itself. Everything that comes down \
         is compared, outside of the time. Ours, plain: parts and ranges of 8 MiB, payloads not signed (as for every \
         server), no checksum (only Amazon's own servers get CRC64NVME). Ours, snapshot: a base published with digests, \
         and restored with every byte checked. boto3: as it comes, so that over plain HTTP it signs the payload's SHA-256 \
         and adds a CRC32; tuned: neither, 4 threads, parts of 32 MiB. s3torchconnectorclient is what S3Checkpoint of \
         s3torchconnector writes and reads with: one object put or got as a stream, with its own checksums. What comes down \
         comes a second time from a server of the benchmark that has the same objects in memory and takes little of the \
         cores, so that clients show their own speed.",
        SeaweedFs::package()
    )
}

/// How a way is called in a table.
const NAMES: [(&str, &str, &str, &str); 21] = [
    ("up", "rust", "bare", "bare, 1 connection"),
    ("up", "rust", "plain", "ours, plain: the store's writer"),
    ("up", "rust", "snapshot", "ours, snapshot: `publish`"),
    ("up", "python", "boto3", "boto3 upload_file"),
    ("up", "python", "boto3-tuned", "boto3 upload_file, tuned"),
    ("up", "python", "s3torch", "s3torchconnectorclient put"),
    ("down", "rust", "loopback", "the loopback alone, no server"),
    ("down", "rust", "bare", "bare, 1 connection"),
    ("down", "rust", "bare-4", "bare, 4 files at once"),
    ("down", "rust", "plain", "ours, plain: `read_into` kept memory"),
    ("down", "rust", "snapshot", "ours, snapshot: `restore`, verified"),
    ("down", "python", "boto3", "boto3 download_fileobj to BytesIO"),
    ("down", "python", "boto3-tuned", "boto3 download_fileobj, tuned"),
    ("down", "python", "boto3-file", "boto3 download_file to tmpfs or disk"),
    ("down", "python", "s3torch", "s3torchconnectorclient get into kept memory"),
    ("memory", "rust", "bare", "bare, 1 connection"),
    ("memory", "rust", "plain", "ours, plain: `read_into` kept memory"),
    ("memory", "rust", "snapshot", "ours, snapshot: `restore`, verified"),
    ("memory", "python", "boto3", "boto3 download_fileobj to BytesIO"),
    ("memory", "python", "boto3-tuned", "boto3 download_fileobj, tuned"),
    ("memory", "python", "s3torch", "s3torchconnectorclient get into kept memory"),
];

/// One way of one group, round by round.
#[derive(Debug, Default)]
struct Row {
    seconds: Vec<f64>,
    cpu: Vec<f64>,
    peak: Vec<f64>,
}

/// What all rounds have told.
#[derive(Debug, Default)]
struct Measured {
    bytes: f64,
    files: u64,
    versions: Value,
    rows: BTreeMap<(String, String, String), Row>,
    json: Vec<Value>,
}

impl Measured {
    fn add(&mut self, round: &Value) -> Result<()> {
        self.bytes = round["bytes"].as_f64().ok_or_else(|| Stop::failed("the model's size is not told"))?;
        self.files = round["files"].as_u64().unwrap_or(0);
        self.versions = round["versions"].clone();
        for told in round["rows"].as_array().into_iter().flatten() {
            let text = |key: &str| told[key].as_str().unwrap_or_default().to_owned();
            let row = self.rows.entry((text("group"), text("by"), text("way"))).or_default();
            let seconds = told["seconds"].as_f64().filter(|seconds| *seconds > 0.0);
            row.seconds.push(seconds.ok_or_else(|| Stop::failed(format!("a way was not timed: {told}")))?);
            row.cpu.extend(told["cpu"].as_f64());
            row.peak.extend(told["peak_mib"].as_f64());
        }
        self.json.push(round.clone());
        Ok(())
    }

    fn packages(&self) -> String {
        let version = |name: &str| Some(format!("{name} {}", self.versions[name].as_str()?));
        let told: Vec<_> = ["boto3", "s3torchconnectorclient"].into_iter().filter_map(version).collect();
        if told.is_empty() { String::new() } else { format!(" Python: {}.", told.join(", ")) }
    }

    fn row(&self, group: &str, by: &str, way: &str) -> Option<&Row> {
        self.rows.get(&(group.to_owned(), by.to_owned(), way.to_owned()))
    }

    /// Whether ours takes at most `most` times as long as another; nothing if the other was not measured.
    fn bar(&self, group: &str, ours: &str, way: &str, most: f64) -> Option<(bool, String)> {
        let ratio =
            ratios(&self.row(group, "rust", ours)?.seconds, &self.row(group, "python", way)?.seconds)[1];
        let word = if ratio <= most { "PASS" } else { "FAIL" };
        let place = if group == "memory" { "down from memory" } else { group };
        let (ours, other) = (name(group, "rust", ours), name(group, "python", way));
        Some((
            ratio <= most,
            format!(
                "{word}: {place}: {ours} takes {ratio:.2} × {other}, {:.1} times as fast (at most {most:.2})",
                1.0 / ratio
            ),
        ))
    }

    fn verdict(&self) -> Vec<(bool, String)> {
        let mut lines = Vec::new();
        for (group, most) in [("down", 1.0 / DOWN), ("memory", 1.0 / DOWN), ("up", 1.0)] {
            for ours in ["plain", "snapshot"] {
                for other in ["boto3", "boto3-tuned", "s3torch"] {
                    lines.extend(self.bar(group, ours, other, most));
                }
            }
        }
        lines
    }

    fn tables(&self) -> String {
        let mut text = String::new();
        for (group, title) in [
            ("up", "Up"),
            ("down", "Down"),
            ("memory", "Down from memory, by a server that asks for no keys and costs its clients little"),
        ] {
            let header = [
                "way",
                "s",
                "least s",
                "GB/s",
                "× bare, 1 connection",
                "× ours, snapshot",
                "processor s/GB",
                "MiB",
            ];
            let mut table = Table::new(&header);
            let against = |way: &str| self.row(group, "rust", way);
            for (_, by, way, name) in NAMES.iter().filter(|(of, ..)| *of == group) {
                let Some(row) = self.row(group, by, way) else { continue };
                let [least, middle, _] = spread(&row.seconds);
                let shown = |other: Option<&Row>| match other {
                    Some(other) if !std::ptr::eq(other, row) => {
                        let [least, middle, most] = ratios(&row.seconds, &other.seconds);
                        format!("{middle:.2} ({least:.2}–{most:.2})")
                    }
                    Some(_) => "1".to_owned(),
                    None => "–".to_owned(),
                };
                let told = |values: &[f64], shown: &dyn Fn(f64) -> String| {
                    if values.is_empty() { "–".to_owned() } else { shown(spread(values)[1]) }
                };
                table.row(vec![
                    (*name).to_owned(),
                    format!("{middle:.3}"),
                    format!("{least:.3}"),
                    format!("{:.2}", self.bytes / 1e9 / middle),
                    shown(against("bare")),
                    shown(against("snapshot")),
                    told(&row.cpu, &|seconds| format!("{:.2}", seconds * 1e9 / self.bytes.max(1.0))),
                    told(&row.peak, &|mib| format!("{mib:.0}")),
                ]);
            }
            text.push_str(&format!("\n{title}:\n\n{}", table.markdown()));
        }
        text
    }
}

fn name(group: &str, by: &str, way: &str) -> &'static str {
    let found = NAMES.iter().find(|(of, who, what, _)| (*of, *who, *what) == (group, by, way));
    found.map_or("another way", |(.., name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(ours: &[f64], python: bool) -> Measured {
        let mut all = Measured::default();
        for ours in ours {
            let row = |group: &str, by: &str, way: &str, seconds: f64| json!({"group": group, "by": by, "way": way, "seconds": seconds, "cpu": 0.5, "peak_mib": null});
            let mut rows = vec![
                row("down", "rust", "bare", 0.1),
                row("down", "rust", "plain", *ours),
                row("up", "rust", "snapshot", *ours),
            ];
            if python {
                rows.extend([row("down", "python", "boto3", 3.0), row("up", "python", "s3torch", 1.0)]);
            }
            all.add(&json!({"bytes": 2e9, "files": 4, "rows": rows, "versions": {"boto3": "1"}})).unwrap();
        }
        all
    }

    #[test]
    fn downloads_must_be_three_times_as_fast_and_uploads_as_fast() {
        let all = measured(&[0.9, 1.1, 1.0], true);
        let verdict = all.verdict();
        assert_eq!(verdict.iter().map(|(pass, _)| *pass).collect::<Vec<_>>(), [true, true]);
        assert!(verdict[0].1.contains("3.0 times as fast (at most 0.33)"), "{verdict:?}");
        assert!(measured(&[1.01], true).verdict().iter().all(|(pass, _)| !pass));
        assert!(measured(&[0.1], false).verdict().is_empty(), "nothing is said of what was not measured");
        let text = all.tables();
        assert!(text.contains("| bare, 1 connection ") && text.contains("| 0.25 "), "{text}");
        assert!(text.contains("10.00 (9.00–11.00)") && text.contains("30.00"), "{text}");
        assert_eq!(all.packages(), " Python: boto3 1.");
    }

    #[test]
    fn what_was_not_timed_is_no_result() {
        let row = json!({"group": "up", "by": "rust", "way": "plain", "seconds": 0.0});
        assert!(Measured::default().add(&json!({"bytes": 1, "rows": [row]})).is_err());
        assert!(Measured::default().add(&json!({"rows": []})).is_err());
    }
}
