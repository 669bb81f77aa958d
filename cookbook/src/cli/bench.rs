//! `towline bench codec`: ratio, speed and memory of codecs on a real pair of checkpoints.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use bytes::Bytes;
use clap::{Args, Subcommand};
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
    let parent = Weights::read_all(&open_weights(&options.parent)?)?;
    let current = Weights::read_all(&open_weights(&options.current)?)?;
    let raw = current.byte_len();
    let limits = Limits::threads(options.threads);
    let mut rows = Vec::new();
    for codec in codecs {
        output.note(format_args!("{} …", codec.id()));
        rows.push(measure(codec.as_ref(), &parent, &current, limits, options.runs)?);
    }
    let memory = |row: &Row| row.extra_mib.map_or("–".into(), |mib| format!("{mib:.0}"));
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            vec![
                row.codec.clone(),
                format!("{:.3}", 100.0 * row.bytes as f64 / raw.max(1) as f64),
                format!("{:.2}", row.encode_gbps),
                format!("{:.2}", row.decode_gbps),
                memory(row),
            ]
        })
        .collect();
    let heading = ["codec", "ratio %", "encode GB/s", "decode GB/s", "extra MiB"];
    let values: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "codec": row.codec, "ratio": row.bytes as f64 / raw.max(1) as f64, "encoded_bytes": row.bytes,
                "raw_bytes": raw, "encode_gbps": row.encode_gbps, "decode_gbps": row.decode_gbps,
                "extra_mib": row.extra_mib,
            })
        })
        .collect();
    output.result(
        table(&heading, &cells),
        &json!({"rows": values, "threads": options.threads, "runs": options.runs}),
    );
    Ok(())
}

struct Row {
    codec: String,
    bytes: u64,
    encode_gbps: f64,
    decode_gbps: f64,
    extra_mib: Option<f64>,
}

fn measure(
    codec: &dyn Codec,
    parent: &Weights,
    current: &Weights,
    limits: Limits,
    runs: usize,
) -> Result<Row> {
    let mut file = Vec::new();
    let bytes = write_shard(&mut file, codec, current, Some(parent), limits)?.bytes;
    drop(file);
    let mut encoded: Vec<(TensorMeta, Vec<Bytes>, pipeline::Encoded)> = Vec::new();
    let memory = Memory::start();
    let mut encode = Vec::new();
    for _ in 0..runs {
        encoded.clear();
        let started = Instant::now();
        pipeline::encode(codec, current, Some(parent), limits, &mut |meta, mut out| {
            let frames = std::mem::take(&mut out.frames).into_iter().map(Bytes::from).collect();
            encoded.push((meta.clone(), frames, out));
            Ok(())
        })?;
        encode.push(started.elapsed().as_secs_f64());
    }
    let extra_mib = memory.peak_mib().map(|peak| (peak - bytes as f64 / f64::from(1 << 20)).max(0.0));
    let mut decode = Vec::new();
    for _ in 0..runs {
        let mut targets: Vec<Vec<u8>> = parent.iter().map(|(_, data)| data.to_vec()).collect();
        let started = Instant::now();
        for ((meta, frames, out), target) in encoded.iter().zip(&mut targets) {
            pipeline::decode(codec, meta, Mode::Delta, frames, codec.unit(), target, limits.threads)?;
            pipeline::verify(codec, meta, target, Some(&out.digest), out.checksum)?;
        }
        decode.push(started.elapsed().as_secs_f64());
    }
    let speed = |seconds: Vec<f64>| current.byte_len() as f64 / 1e9 / median(seconds);
    Ok(Row {
        codec: codec.id().to_string(),
        bytes,
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
