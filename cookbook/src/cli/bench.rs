//! `towline bench codec`: ratio, speed and memory of codecs on a real pair of checkpoints.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use bytes::Bytes;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::json;
use towline_core::pipeline::{self, Limits};
use towline_core::{Codec, Error, Mode, Result, TensorMeta, Weights};
use towline_storage::write_shard;

use super::files::open_weights;
use super::output::{Output, table};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Encode and decode a delta with each codec, in memory, checksums included.
    #[command(
        after_help = "Example:\n  towline bench codec --parent step-1.safetensors --current step-2.safetensors \
        --codecs zstd,arc_v2 --threads 2"
    )]
    Codec(Options),
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The older checkpoint.
    #[arg(long)]
    parent: PathBuf,
    /// The newer checkpoint.
    #[arg(long)]
    current: PathBuf,
    /// The codecs to measure, joined by commas; all by default.
    #[arg(long, value_delimiter = ',')]
    codecs: Vec<String>,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Runs of each; the median counts.
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

pub(crate) fn run(command: Command, output: &Output) -> Result<()> {
    let Command::Codec(options) = command;
    if options.runs == 0 || options.threads == 0 {
        return Err(Error::invalid("--runs and --threads want at least 1"));
    }
    let codecs = match options.codecs.as_slice() {
        [] => towline_codec::all(),
        ids => ids.iter().map(|id| towline_codec::by_id(id)).collect::<Result<_>>()?,
    };
    let rows = match codecs.as_slice() {
        [codec] => vec![measure(codec.as_ref(), &options)?],
        // A process for each, so that memory that one has freed does not hide what the next one takes.
        codecs => {
            codecs.iter().map(|codec| apart(codec.id().as_str(), &options, output)).collect::<Result<_>>()?
        }
    };
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            let memory = row.extra_mib.map_or("–".into(), |mib| format!("{mib:.0}"));
            let ratio = format!("{:.3}", 100.0 * row.ratio);
            vec![
                row.codec.clone(),
                ratio,
                format!("{:.2}", row.encode_gbps),
                format!("{:.2}", row.decode_gbps),
                memory,
            ]
        })
        .collect();
    let heading = ["codec", "ratio %", "encode GB/s", "decode GB/s", "extra MiB"];
    let value = json!(Report { rows, threads: options.threads, runs: options.runs });
    output.result(table(&heading, &cells), &value);
    Ok(())
}

#[derive(Debug, Serialize, Deserialize)]
struct Report {
    rows: Vec<Row>,
    threads: usize,
    runs: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Row {
    codec: String,
    ratio: f64,
    encoded_bytes: u64,
    raw_bytes: u64,
    encode_gbps: f64,
    decode_gbps: f64,
    /// Memory of a whole encode beyond the two checkpoints; `None` where the system does not tell.
    extra_mib: Option<f64>,
}

/// Measures one codec in a process of its own.
fn apart(codec: &str, options: &Options, output: &Output) -> Result<Row> {
    output.note(format_args!("{codec} …"));
    let failed =
        |error: std::io::Error| Error::internal("the measuring process did not run").with_source(error);
    let child = std::process::Command::new(std::env::current_exe().map_err(failed)?)
        .args(["--json", "bench", "codec", "--codecs", codec, "--parent"])
        .arg(&options.parent)
        .arg("--current")
        .arg(&options.current)
        .args(["--threads", &options.threads.to_string(), "--runs", &options.runs.to_string()])
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(failed)?;
    let text = String::from_utf8_lossy(&child.stdout);
    let report: Option<Report> = serde_json::from_str(&text).ok();
    report
        .and_then(|report| report.rows.into_iter().next())
        .ok_or_else(|| Error::internal(format!("measuring {codec} failed: {}", text.trim())))
}

fn measure(codec: &dyn Codec, options: &Options) -> Result<Row> {
    let parent = Weights::read_all(&open_weights(&options.parent)?)?;
    let current = Weights::read_all(&open_weights(&options.current)?)?;
    let limits = Limits::threads(options.threads);
    let memory = Memory::start();
    let encoded_bytes = write_shard(&mut std::io::sink(), codec, &current, Some(&parent), limits)?.bytes;
    let extra_mib = memory.peak_mib();
    let mut encoded: Vec<(TensorMeta, Vec<Bytes>, pipeline::Encoded)> = Vec::new();
    let mut encode = Vec::new();
    for _ in 0..options.runs {
        encoded.clear();
        let started = Instant::now();
        pipeline::encode(codec, &current, Some(&parent), limits, &mut |meta, mut out| {
            let frames = std::mem::take(&mut out.frames).into_iter().map(Bytes::from).collect();
            encoded.push((meta.clone(), frames, out));
            Ok(())
        })?;
        encode.push(started.elapsed().as_secs_f64());
    }
    let mut decode = Vec::new();
    for _ in 0..options.runs {
        let mut targets: Vec<Vec<u8>> = parent.iter().map(|(_, data)| data.to_vec()).collect();
        let started = Instant::now();
        for ((meta, frames, out), target) in encoded.iter().zip(&mut targets) {
            pipeline::decode(codec, meta, Mode::Delta, frames, codec.unit(), target, limits.threads)?;
            let whole = out.whole.as_ref();
            pipeline::verify(
                codec,
                meta,
                target,
                whole.map(|whole| &whole.digest),
                whole.and_then(|whole| whole.checksum),
            )?;
        }
        decode.push(started.elapsed().as_secs_f64());
    }
    let raw_bytes = current.byte_len();
    let speed = |seconds: Vec<f64>| raw_bytes as f64 / 1e9 / median(seconds);
    Ok(Row {
        codec: codec.id().to_string(),
        ratio: encoded_bytes as f64 / raw_bytes.max(1) as f64,
        encoded_bytes,
        raw_bytes,
        encode_gbps: speed(encode),
        decode_gbps: speed(decode),
        extra_mib,
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Resident memory above a starting point, where the system tells it (Linux).
struct Memory {
    before: Option<NonZeroUsize>,
}

impl Memory {
    fn start() -> Self {
        // "5" resets the high-water mark of resident memory.
        let reset = std::fs::write("/proc/self/clear_refs", "5");
        Self { before: reset.ok().and_then(|()| resident("VmRSS:")) }
    }

    fn peak_mib(&self) -> Option<f64> {
        let (before, peak) = (self.before?.get(), resident("VmHWM:")?.get());
        Some(peak.saturating_sub(before) as f64 / 1024.0)
    }
}

fn resident(field: &str) -> Option<NonZeroUsize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    NonZeroUsize::new(line.split_whitespace().next()?.parse().ok()?)
}
