//! `bench`: size, speed and memory of the codecs beside those of others, memory on a model of several GiB, and
//! the store beside other ways to keep a train state.

mod memory;
mod pairs;
mod report;
mod s3;
pub(crate) mod section;
mod store;
mod tables;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::args::Args;
use crate::python::{PACKAGE, Python};
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

use pairs::Pair;
use report::{Codec, Report};

pub(crate) const HELP: &str = "\
Builds xtask/peers in release and measures every codec beside those of others on pairs of real checkpoints: all on the
same buffers in the same run, each in processes of its own, beside a bare scan and a copy. Prints Markdown tables, and
PASS or FAIL: whether our best codec is smaller than every other in every row.

Usage: cargo xtask bench [codec] [--quick] [--pairs A,B] [--codecs A,B] [--threads 1,2] [--runs N] [--python]
                         [--fixtures DIR] [--corpus DIR] [--out FILE] [--check] [--json]
       cargo xtask bench memory [--codec ID] [--threads 1,2] [--gib N] [--out FILE] [--check] [--json]
       cargo xtask bench store [--mib N] [--runs N] [--peak-gib N] [--python] [--out FILE] [--check] [--json]
       cargo xtask bench store --s3 [--mib N] [--shard-mib N] [--runs N] [--python] [--data DIR] [--out FILE] [--check]
                         [--json]

  --quick         3 runs, of our best codec, pcodec and zstd alone
  --pairs A,B     the pairs whose names contain one of these; all by default
  --codecs A,B    ours and others by name (`towline-peers list`); all but raw by default
  --threads 1,2   1 and 2 by default
  --runs N        runs of each; the median counts; 5 by default
  --python        the public Python packages too (makes .venv-interop, which brings torch)
  --fixtures DIR  small weights; ../shared/fixtures/weights by default, where it is there
  --corpus DIR    what `cargo xtask corpus` made; target/corpus by default, where it is there
  --out FILE      write the tables into a file: between its marks, or behind what it holds
  --check         exit with 1 on FAIL
  --gib N         how large the made-up model of `bench memory` is; 4 by default, which takes 9 GiB of memory
  --mib N         how large the train state of `bench store` is; 1024 by default, which takes 8 GiB of memory and disk
  --peak-gib N    measures the memory of a save and a load of so many GiB too, which take as much disk; 0 by default
  --s3            measures a model up to an S3 server on this machine (SeaweedFS, into .venv-stores) and down again
                  instead; --python brings boto3 and s3torchconnectorclient into .venv-s3. Takes 14 times --mib of memory
  --shard-mib N   how large the model's files are there; 256 by default
  --data DIR      where that server keeps its data; /dev/shm by default, where it is there

Example: cargo xtask bench codec --python --out docs/benchmarks.md";

const MANIFEST: &str = "xtask/peers/Cargo.toml";
/// The codecs of which the first that is there must beat the others.
const BEST: [&str; 2] = ["octave", "zstd"];
/// For one pair. Some peers take a minute a run.
const DEADLINE: Duration = Duration::from_secs(2 * 60 * 60);

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    match args.positional().as_deref() {
        None | Some("codec") => codec(context, args),
        Some("memory") => memory::command(context, args),
        Some("store") => store::command(context, args),
        Some(other) => {
            Err(Stop::Usage(format!("no benchmark `{other}`: there are `codec`, `memory` and `store`")))
        }
    }
}

/// The measuring program and where its files go.
struct Program {
    path: PathBuf,
    scratch: PathBuf,
}

impl Program {
    /// Builds it. Its target folder lies inside ours, so that it stays out of git and goes with `cargo clean`.
    fn build(context: &Context) -> Result<Self> {
        if !context.root.join(MANIFEST).is_file() {
            return Err(Stop::failed(format!("`{MANIFEST}` is missing: there is nothing to measure with")));
        }
        let target = context.target()?;
        let home = target.join("peers");
        context.say("building xtask/peers");
        context
            .cargo(&["build", "--release", "--manifest-path", MANIFEST, "--target-dir"])
            .args(&[&home])
            .run()?;
        let scratch = target.join("bench");
        std::fs::create_dir_all(&scratch).map_err(file_error("create", &scratch))?;
        Ok(Self {
            path: home.join("release").join(format!("towline-peers{}", std::env::consts::EXE_SUFFIX)),
            scratch,
        })
    }

    /// Runs it; what it prints is JSON.
    fn run<S: AsRef<std::ffi::OsStr>>(&self, context: &Context, arguments: &[S]) -> Result<Value> {
        let text = context.job(&self.path).args(arguments).deadline(DEADLINE).output()?;
        serde_json::from_str(&text)
            .map_err(|error| Stop::failed(format!("the measuring program printed no JSON: {error}")))
    }
}

fn codec(context: &Context, mut args: Args) -> Result<()> {
    let (quick, python, check) = (args.flag("--quick"), args.flag("--python"), args.flag("--check"));
    let (names, codecs) = (args.list("--pairs")?, args.list("--codecs")?);
    let threads = threads(&mut args)?;
    let runs = args.number("--runs")?.unwrap_or(if quick { 3 } else { 5 });
    let (fixtures, corpus) =
        (args.value("--fixtures")?.map(PathBuf::from), args.value("--corpus")?.map(PathBuf::from));
    let out = args.value("--out")?.map(PathBuf::from);
    args.finish()?;

    let found = pairs::find(context, fixtures.as_deref(), corpus.as_deref(), &names)?;
    let python = if python { Some(Python::prepare(context, false)?) } else { None };
    let program = Program::build(context)?;
    let best = best(&program.run(context, &["list"])?)?;
    let codecs = match (codecs.is_empty(), quick) {
        (true, true) => vec![best.clone(), "pcodec".to_owned(), "zstd-1".to_owned()],
        (true, false) | (false, _) => codecs,
    };
    let asked = if quick { String::new() } else { codecs.join(",") };
    let mut flags = String::new();
    for (flag, value) in [("--pairs", names.join(",")), ("--codecs", asked)] {
        if !value.is_empty() {
            flags.push_str(&format!(" {flag} {value}"));
        }
    }
    for (flag, set) in [(" --quick", quick), (" --python", python.is_some())] {
        flags.push_str(if set { flag } else { "" });
    }
    let load = load();
    let bench = Bench { context, program, python, codecs, threads, runs };
    let mut reports = Vec::new();
    for pair in &found {
        context.say(format!("bench {} ({}/{})", pair.name, reports.len() + 1, found.len()));
        let report = bench.pair(pair)?;
        context.say(format!("  {}", tables::line(&report)));
        reports.push(report);
    }

    let caption = format!(
        "Measured by `cargo xtask bench codec{flags}` on {}{load}. Medians of {runs} runs on {} threads.",
        machine(),
        bench.threads.replace(',', " and ")
    );
    let verdict = report::verdict(&best, &reports);
    let text = tables::all(&caption, &best, &reports, &verdict);
    context.say(format!("\n{text}"));
    let rows: Vec<&Value> = reports.iter().map(|report| &report.json).collect();
    context.emit(
        &json!({"machine": machine(), "best": best, "runs": runs, "threads": bench.threads, "pairs": rows,
                         "pass": verdict.pass, "verdict": verdict.lines}),
    );
    if let Some(path) = out {
        section::write(&path, "bench-codec", &text)?;
    }
    let failed: usize = reports.iter().map(|report| report.failed.len()).sum();
    match (failed, check && !verdict.pass) {
        (0, false) => Ok(()),
        (0, true) => Err(Stop::failed("the verdict is FAIL")),
        (failed, _) => Err(Stop::failed(format!("{failed} codecs could not be measured"))),
    }
}

/// What a run needs.
struct Bench<'a> {
    context: &'a Context,
    program: Program,
    python: Option<Python>,
    codecs: Vec<String>,
    threads: String,
    runs: u64,
}

impl Bench<'_> {
    fn pair(&self, pair: &Pair) -> Result<Report> {
        let (parent, current) = self.files(pair)?;
        let mut arguments: Vec<std::ffi::OsString> = vec!["codec".into()];
        let mut option = |name: &str, value: std::ffi::OsString| arguments.extend([name.into(), value]);
        match &parent {
            Some(parent) => {
                option("--parent", parent.into());
                option("--current", (&current).into());
            }
            None => option("--base", (&current).into()),
        }
        option("--threads", (&self.threads).into());
        option("--runs", self.runs.to_string().into());
        option("--scratch", (&self.program.scratch).into());
        if !self.codecs.is_empty() {
            option("--codecs", self.codecs.join(",").into());
        }
        let mut measured = self.program.run(self.context, &arguments)?;
        let others = self.others(parent.as_deref(), &current)?;
        if let Some(rows) = measured["rows"].as_array_mut() {
            rows.extend(others);
        }
        Report::parse(pair, measured)
    }

    /// The pair's files; the next checkpoint is made where a pair is a checkpoint and a delta.
    fn files(&self, pair: &Pair) -> Result<(Option<PathBuf>, PathBuf)> {
        let Some(delta) = &pair.delta else { return Ok((pair.parent.clone(), pair.current.clone())) };
        let parent = pair.parent.as_ref().ok_or_else(|| Stop::failed("a delta without a parent"))?;
        let name = format!(
            "{}-next.safetensors",
            delta.file_name().map_or_else(String::new, |name| {
                name.to_string_lossy().split('.').next().unwrap_or_default().to_owned()
            })
        );
        let current = self.program.scratch.join(name);
        let options: [(&str, &Path); 3] = [("--parent", parent), ("--delta", delta), ("--out", &current)];
        let mut arguments: Vec<&std::ffi::OsStr> = vec!["next".as_ref()];
        for (option, file) in options {
            arguments.extend([option.as_ref(), file.as_os_str()]);
        }
        self.program.run(self.context, &arguments)?;
        Ok((Some(parent.clone()), current))
    }

    /// The rows of the Python packages: the one of the arc formats for deltas, ZipNN for both.
    fn others(&self, parent: Option<&Path>, current: &Path) -> Result<Vec<Value>> {
        let Some(python) = &self.python else { return Ok(Vec::new()) };
        let mut rows = Vec::new();
        let mut packages: Vec<&str> = if parent.is_some() { vec!["bench_arc.py"] } else { Vec::new() };
        let zipnn = python.script(self.context, "bench_zipnn.py").args(&["--install"]);
        match zipnn.deadline(Duration::from_secs(15 * 60)).output() {
            Ok(_) => packages.push("bench_zipnn.py"),
            Err(stop) => self.context.say(format!("without ZipNN, which could not be installed: {stop}")),
        }
        for script in packages {
            for threads in self.threads.split(',') {
                self.context.say(format!("  {script}, {threads} threads"));
                let mut job = python.script(self.context, script).args(&["--threads", threads, "--current"]);
                job = job.args(&[current]);
                if let Some(parent) = parent {
                    job = job.args(&["--parent"]).args(&[parent]);
                }
                let text = job.deadline(DEADLINE).output()?;
                let printed: Value = serde_json::from_str(&text)
                    .map_err(|error| Stop::failed(format!("{script} printed no JSON: {error}")))?;
                for row in printed["rows"].as_array().into_iter().flatten() {
                    let mut row = row.clone();
                    row["by"] = json!("python");
                    rows.push(row);
                }
            }
        }
        Ok(rows)
    }
}

/// Thread counts joined by commas; 1 and 2 by default.
fn threads(args: &mut Args) -> Result<String> {
    let threads = args.value("--threads")?.unwrap_or_else(|| "1,2".to_owned());
    if threads.split(',').all(|text| text.parse::<u16>().is_ok_and(|count| count > 0)) {
        return Ok(threads);
    }
    Err(Stop::Usage(format!("`--threads` wants numbers joined by commas, not `{threads}`")))
}

/// The codec of ours that must beat the others.
fn best(list: &Value) -> Result<String> {
    let ours: Vec<&str> = crate::workspace::strings(&list["ours"]).collect();
    BEST.iter()
        .find(|id| ours.contains(id))
        .map(|id| (*id).to_owned())
        .ok_or_else(|| Stop::failed("the measuring program knows none of our codecs"))
}

/// The processor's name and the number of cores.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let name = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    format!("{cores} cores of {name}")
}

/// How busy the machine was with other things, where it tells.
fn load() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| Some(format!(" (load {} at the start)", text.split_whitespace().next()?)))
        .unwrap_or_default()
}

/// How a package of Python is called in a caption.
fn packages(reports: &[Report]) -> String {
    let has = |codec: Codec| reports.iter().any(|report| report.codecs().contains(&codec));
    if has(Codec::python("arc_v2")) { format!(" Python: {PACKAGE}, ZipNN.") } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_and_the_best_codec() {
        let args = |text: &str| Args::new(text.split_whitespace().map(str::to_owned));
        assert_eq!(threads(&mut args("")).unwrap(), "1,2");
        assert_eq!(threads(&mut args("--threads 4")).unwrap(), "4");
        assert!(threads(&mut args("--threads 1,0")).is_err());
        assert_eq!(best(&json!({"ours": ["raw", "zstd", "octave"]})).unwrap(), "octave");
        assert_eq!(best(&json!({"ours": ["raw", "zstd"]})).unwrap(), "zstd");
        assert!(best(&json!({"ours": []})).is_err());
    }
}
