//! `bench codec`: ratio, speed and memory of every codec on real training steps.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::args::Args;
use crate::python::{PACKAGE, Python};
use crate::stop::{Result, Stop, file_error};
use crate::table::Table;
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Builds `towline` in release and measures every codec on pairs of real checkpoints. Prints a Markdown table.

Usage: cargo xtask bench [codec] [--fixtures DIR] [--codecs A,B] [--threads N] [--python] [--out FILE] [--json]

  --fixtures DIR  the weights; ../shared/fixtures/weights by default
  --codecs A,B    raw,zstd,lz4,arc_v1,arc_v2,arc_v3 by default
  --threads N     all cores by default
  --python        measure the public Python package beside ours (makes .venv-interop, which brings torch)
  --out FILE      write the table to a file too
  --towline PATH  a built `towline`; it is built here by default

Example: cargo xtask bench codec --python --out target/bench/codec.md";

/// What a pair is called, its parent and the delta that makes its next checkpoint.
const PAIRS: [(&str, &str, &str); 5] = [
    ("bf16, RL at 1e-6", "minilm-bf16-prev", "minilm-bf16-rl-lr1e-06"),
    ("bf16, RL at 1e-5", "minilm-bf16-prev", "minilm-bf16-rl-lr1e-05"),
    ("bf16 slice, SFT at 2e-5", "minilm-sft-slice-prev", "minilm-sft-slice"),
    ("f16 slice, RL", "minilm-f16-slice-prev", "minilm-f16-slice"),
    ("f32 slice, RL", "minilm-f32-slice-prev", "minilm-f32-slice"),
];
const CODECS: &str = "raw,zstd,lz4,arc_v1,arc_v2,arc_v3";
const DEADLINE: Duration = Duration::from_secs(15 * 60);

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let fixtures = args.value("--fixtures")?;
    let codecs = args.value("--codecs")?.unwrap_or_else(|| CODECS.to_owned());
    let threads = args.number("--threads")?;
    let python = args.flag("--python");
    let out = args.value("--out")?.map(PathBuf::from);
    let towline = args.value("--towline")?.map(PathBuf::from);
    match args.positional().as_deref() {
        None | Some("codec") => {}
        Some(other) => return Err(Stop::Usage(format!("no benchmark `{other}`: there is `codec`"))),
    }
    args.finish()?;

    let fixtures = fixtures.map_or_else(|| context.root.join("../shared/fixtures/weights"), PathBuf::from);
    if !fixtures.is_dir() {
        return Err(Stop::failed(format!(
            "the fixtures `{}` are not there (help: name a folder that holds them with --fixtures)",
            fixtures.display()
        )));
    }
    let threads = match threads {
        Some(threads) => threads.to_string(),
        None => std::thread::available_parallelism().map_or(1, usize::from).to_string(),
    };
    let python = if python { Some(Python::prepare(context, false)?) } else { None };
    let towline = towline.map_or_else(|| context.towline(true), Ok)?;
    let bench = Bench { context, towline, python, codecs, threads };
    bench.run(&fixtures, out.as_deref())
}

/// What a run of the benchmark needs.
struct Bench<'a> {
    context: &'a Context,
    towline: PathBuf,
    python: Option<Python>,
    codecs: String,
    threads: String,
}

impl Bench<'_> {
    fn run(&self, fixtures: &Path, out: Option<&Path>) -> Result<()> {
        let scratch = self.context.target()?.join("bench");
        std::fs::create_dir_all(&scratch).map_err(file_error("create", &scratch))?;
        let mut table =
            Table::new(&["pair", "codec", "ratio %", "encode GB/s", "decode GB/s", "extra memory MiB"]);
        let mut rows = Vec::new();
        for (pair, parent, delta) in PAIRS {
            self.context.say(format!("bench {pair}"));
            let parent = fixtures.join(format!("{parent}.safetensors"));
            let current = scratch.join(format!("{delta}-next.safetensors"));
            let delta = fixtures.join(format!("{delta}.arc_v2.safetensors"));
            self.make_next(&parent, &delta, &current)?;
            for (row, by) in self.measure(&parent, &current)? {
                table.row(cells(pair, &row, by)?);
                rows.push(json!({"pair": pair, "by": by, "figures": row}));
            }
        }
        let text = format!("{}\n\n{}", self.caption(), table.markdown());
        self.context.say(format!("\n{text}"));
        self.context.emit(&json!({"rows": rows, "threads": self.threads, "machine": machine()}));
        if let Some(path) = out {
            std::fs::write(path, text).map_err(file_error("write", path))?;
        }
        Ok(())
    }

    fn make_next(&self, parent: &Path, delta: &Path, current: &Path) -> Result<()> {
        let mut job = self.context.job(&self.towline).args(&["delta", "apply", "--json"]);
        for (option, file) in [("--parent", parent), ("--delta", delta), ("-o", current)] {
            job = job.args(&[option]).args(&[file]);
        }
        job.deadline(DEADLINE).output().map(|_| ())
    }

    /// The rows of one pair and whose they are: ours, then those of the Python package.
    fn measure(&self, parent: &Path, current: &Path) -> Result<Vec<(Value, &'static str)>> {
        let arguments: [&std::ffi::OsStr; 8] = [
            "--parent".as_ref(),
            parent.as_ref(),
            "--current".as_ref(),
            current.as_ref(),
            "--threads".as_ref(),
            self.threads.as_ref(),
            "--codecs".as_ref(),
            self.codecs.as_ref(),
        ];
        let ours = self
            .context
            .job(&self.towline)
            .args(&["bench", "codec", "--json"])
            .args(&arguments)
            .deadline(DEADLINE)
            .output()?;
        let mut rows: Vec<_> = rows_of(&ours)?.into_iter().map(|row| (row, "towline")).collect();
        if let Some(python) = &self.python {
            // Without `--codecs`: the package has its three formats alone.
            let theirs = python
                .script(self.context, "bench_arc.py")
                .args(&arguments[..6])
                .deadline(DEADLINE)
                .output()?;
            rows.extend(rows_of(&theirs)?.into_iter().map(|row| (row, "python")));
        }
        Ok(rows)
    }

    fn caption(&self) -> String {
        let python = if self.python.is_some() { " --python" } else { "" };
        let package = if self.python.is_some() { format!(" Python: {PACKAGE}.") } else { String::new() };
        format!(
            "Measured by `cargo xtask bench codec{python}` with {} threads on {}. Ratio: encoded bytes of raw bytes.{package}",
            self.threads,
            machine()
        )
    }
}

fn rows_of(text: &str) -> Result<Vec<Value>> {
    serde_json::from_str::<Value>(text)
        .ok()
        .and_then(|value| value.get("rows")?.as_array().cloned())
        .filter(|rows| !rows.is_empty())
        .ok_or_else(|| Stop::failed("the benchmark printed no rows"))
}

fn cells(pair: &str, row: &Value, by: &str) -> Result<Vec<String>> {
    let number = |key: &str| {
        row[key].as_f64().ok_or_else(|| Stop::failed(format!("a row of the benchmark has no number `{key}`")))
    };
    let codec = row["codec"].as_str().unwrap_or("?");
    let codec = if by == "python" { format!("{codec}, Python") } else { codec.to_owned() };
    Ok(vec![
        pair.to_owned(),
        codec,
        format!("{:.3}", 100.0 * number("encoded_bytes")? / number("raw_bytes")?),
        format!("{:.2}", number("encode_gbps")?),
        format!("{:.2}", number("decode_gbps")?),
        row["extra_mib"].as_f64().map_or_else(|| "not measured".to_owned(), |mib| format!("{mib:.0}")),
    ])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_shown_and_a_broken_one_refused() {
        let row = json!({"codec": "arc_v2", "encode_gbps": 1.234, "decode_gbps": 2.0, "extra_mib": null,
                         "encoded_bytes": 5, "raw_bytes": 1000});
        let shown = cells("p", &row, "python").unwrap();
        assert_eq!(shown, ["p", "arc_v2, Python", "0.500", "1.23", "2.00", "not measured"]);
        assert!(cells("p", &json!({"codec": "raw"}), "towline").is_err());
        assert!(rows_of(r#"{"rows":[]}"#).is_err());
        assert!(rows_of("noise").is_err());
    }
}
