//! `interop`: the public Python package reads what we write and we read what it writes, byte for byte.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::args::Args;
use crate::python::{PACKAGE, Python};
use crate::stop::{Result, Stop, file_error};
use crate::table::Table;
use crate::tensors;
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Exchanges arc_v1, arc_v2 and arc_v3 deltas with the public Python package fireworks-delta-compression 0.1.0, both
ways, and compares every byte. It makes a virtual environment of its own (.venv-interop). Exits with 3, and says
what is missing, where Python, pip or the network is not there.

Usage: cargo xtask interop [--light] [--fixtures DIR] [--towline PATH] [--json]

  --light         run the unmodified package on a small stand-in for torch (10 s and 110 MB, not 2 minutes and 5 GB)
  --fixtures DIR  base, next and next2.safetensors; codec/tests/golden by default
  --towline PATH  a built `towline`; it is built here by default

Example: cargo xtask interop --light";

const FORMATS: [&str; 3] = ["arc_v1", "arc_v2", "arc_v3"];
const STEPS: [(&str, &str); 2] = [("base", "next"), ("next", "next2")];

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let light = args.flag("--light");
    let fixtures = args.value("--fixtures")?;
    let towline = args.value("--towline")?;
    args.finish()?;
    let fixtures = fixtures.map_or_else(|| context.root.join("codec/tests/golden"), PathBuf::from);
    run(context, light, &fixtures, towline.map(PathBuf::from)).map(|_| ())
}

/// Runs all exchanges; returns what to say beside "ok".
pub(crate) fn run(
    context: &Context,
    light: bool,
    fixtures: &Path,
    towline: Option<PathBuf>,
) -> Result<String> {
    for name in ["base", "next", "next2"] {
        let path = fixtures.join(name).with_extension("safetensors");
        if !path.is_file() {
            return Err(Stop::failed(format!("the fixture `{}` is missing", path.display())));
        }
    }
    let python = Python::prepare(context, light)?;
    let towline = towline.map_or_else(|| context.towline(false), Ok)?;
    let scratch = context.target()?.join("interop");
    if scratch.exists() {
        std::fs::remove_dir_all(&scratch).map_err(file_error("clear", &scratch))?;
    }
    std::fs::create_dir_all(&scratch).map_err(file_error("create", &scratch))?;
    let exchanges: Vec<Exchange> = FORMATS
        .into_iter()
        .flat_map(|format| STEPS.map(|(from, to)| Exchange::new(format, from, to, fixtures, &scratch)))
        .collect();

    let written = jobs(context, &python, exchanges.iter().map(Exchange::they_write))?;
    let ours: Vec<Verdict> =
        exchanges.iter().zip(written).map(|(one, wrote)| one.we_work(context, &towline, wrote)).collect();
    let read = jobs(context, &python, exchanges.iter().flat_map(Exchange::they_read))?;
    report(context, &python, &exchanges, ours, &read)
}

/// One step in one format, and its files.
#[derive(Debug)]
struct Exchange {
    format: &'static str,
    step: String,
    parent: PathBuf,
    current: PathBuf,
    our_delta: PathBuf,
    their_delta: PathBuf,
    restored: PathBuf,
    patched: PathBuf,
}

/// What our side came to: whether we wrote a delta, and whether we read theirs.
#[derive(Debug)]
struct Verdict {
    wrote: Option<String>,
    read: Option<String>,
}

impl Exchange {
    fn new(format: &'static str, from: &str, to: &str, fixtures: &Path, scratch: &Path) -> Self {
        let file = |what: &str| scratch.join(format!("{what}-{format}-{to}.safetensors"));
        Self {
            format,
            step: format!("{from} → {to}"),
            parent: fixtures.join(from).with_extension("safetensors"),
            current: fixtures.join(to).with_extension("safetensors"),
            our_delta: file("ours"),
            their_delta: file("theirs"),
            restored: file("restored"),
            patched: file("patched"),
        }
    }

    fn they_write(&self) -> Value {
        json!({"do": "encode", "base": self.parent, "current": self.current, "format": self.format,
               "out": self.their_delta})
    }

    /// Their two ways to apply a delta: tensor by tensor, and in place on a copy of the file, as their servers do.
    fn they_read(&self) -> [Value; 2] {
        let job = |what: &str| {
            json!({"do": what, "base": self.parent, "delta": self.our_delta, "format": self.format,
                   "expect": self.current, "scratch": self.patched})
        };
        [job("decode"), job("patch")]
    }

    fn we_work(&self, context: &Context, towline: &Path, they_wrote: Option<String>) -> Verdict {
        let job = |words: &[&str], files: [(&str, &Path); 3]| {
            let mut job = context.job(towline).args(words);
            for (option, file) in files {
                job = job.args(&[option]).args(&[file]);
            }
            job.deadline(Duration::from_secs(120)).output().err().map(|stop| stop.to_string())
        };
        let wrote = job(
            &["delta", "encode", "--json", "--codec", self.format],
            [("--parent", &self.parent), ("--current", &self.current), ("-o", &self.our_delta)],
        );
        let read = they_wrote.or_else(|| {
            job(
                &["delta", "apply", "--json"],
                [("--parent", &self.parent), ("--delta", &self.their_delta), ("-o", &self.restored)],
            )
        });
        let read = read.or_else(|| {
            tensors::difference(&self.restored, &self.current).unwrap_or_else(|stop| Some(stop.to_string()))
        });
        Verdict { wrote, read }
    }
}

/// Runs jobs in one Python process; for each, what went wrong.
fn jobs(
    context: &Context,
    python: &Python,
    list: impl Iterator<Item = Value>,
) -> Result<Vec<Option<String>>> {
    let list: Vec<Value> = list.collect();
    let text = python
        .script(context, "interop_arc.py")
        .input(Value::Array(list.clone()).to_string())
        .deadline(Duration::from_secs(600))
        .output()?;
    let results: Vec<Option<String>> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|line| line.get("error").map(|error| error.as_str().map(str::to_owned)))
        .collect();
    if results.len() == list.len() {
        Ok(results)
    } else {
        Err(Stop::failed(format!("Python answered {} of {} jobs", results.len(), list.len())))
    }
}

fn report(
    context: &Context,
    python: &Python,
    exchanges: &[Exchange],
    ours: Vec<Verdict>,
    read: &[Option<String>],
) -> Result<String> {
    let mut table = Table::new(&[
        "format",
        "step",
        "ours, read there",
        "ours, applied in place there",
        "theirs, read here",
    ]);
    let mut rows = Vec::new();
    let mut failed = 0;
    for ((exchange, verdict), there) in exchanges.iter().zip(ours).zip(read.chunks(2)) {
        let theirs = |index: usize| {
            verdict
                .wrote
                .clone()
                .or_else(|| there.get(index).cloned().unwrap_or(Some("no answer".to_owned())))
        };
        let cells = [theirs(0), theirs(1), verdict.read.clone()];
        failed += cells.iter().flatten().count();
        let shown = |cell: &Option<String>| {
            cell.as_ref()
                .map_or_else(|| "equal".to_owned(), |error| format!("FAILED: {}", error.replace('\n', " ")))
        };
        rows.push(json!({"format": exchange.format, "step": exchange.step, "read_there": cells[0],
                         "in_place_there": cells[1], "read_here": cells[2]}));
        let mut row = vec![exchange.format.to_owned(), exchange.step.clone()];
        row.extend(cells.iter().map(shown));
        table.row(row);
    }
    context.say(format!("\n{PACKAGE} on {}\n\n{}", python.flavour(), table.markdown()));
    context.emit(&json!({"package": PACKAGE, "on": python.flavour(), "rows": rows, "failed": failed}));
    if failed == 0 {
        Ok(format!("{} exchanges equal, on {}", exchanges.len() * 3, python.flavour()))
    } else {
        Err(Stop::failed(format!("{failed} of {} exchanges differ", exchanges.len() * 3)))
    }
}
