//! `codec`: every codec on one pair, each in processes of its own, and what the pair itself is.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use towline_core::{Codec, Framing, Mode, Result, TensorSource};

use crate::args::Args;
use crate::measure::Subject;
use crate::system::{again, median_and_least};
use crate::{files, floor, peers};

/// What every process is told.
struct Order {
    parent: Option<PathBuf>,
    current: PathBuf,
    threads: String,
    runs: usize,
    scratch: PathBuf,
}

impl Order {
    fn arguments(&self, command: &str, codec: &str) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec![command.into()];
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        if let Some(parent) = &self.parent {
            option("--parent", parent.into());
        }
        option("--current", (&self.current).into());
        option("--codec", codec.into());
        option("--threads", (&self.threads).into());
        option("--runs", self.runs.to_string().into());
        option("--encoded", self.encoded().into());
        arguments
    }

    fn encoded(&self) -> PathBuf {
        self.scratch.join(format!("towline-peers-{}.encoded", std::process::id()))
    }

    fn mode(&self) -> Mode {
        if self.parent.is_some() { Mode::Delta } else { Mode::Base }
    }
}

/// `list`: what can be measured.
pub(crate) fn list() -> Value {
    let ours: Vec<_> = towline_codec::all().iter().map(|codec| codec.id().to_string()).collect();
    json!({"ours": ours, "peers": peers::ALL.iter().map(|peer| peer.id()).collect::<Vec<_>>()})
}

pub(crate) fn command(mut args: Args) -> Result<Value> {
    let (parent, base) = (args.path("--parent")?, args.path("--base")?);
    let current = match (args.path("--current")?, base, &parent) {
        (Some(current), None, Some(_)) => current,
        (None, Some(base), None) => base,
        _ => {
            return Err(towline_core::Error::invalid("wanted `--parent` and `--current`, or `--base` alone"));
        }
    };
    let threads = args.threads()?;
    let threads = threads.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let (runs, codecs) = (args.number("--runs", 5usize)?, args.list("--codecs")?);
    let scratch = args.path("--scratch")?.unwrap_or_else(std::env::temp_dir);
    args.finish()?;

    let order = Order { parent, current, threads, runs, scratch };
    let mut pair = describe(order.parent.as_deref(), &order.current)?;
    let mut rows = Vec::new();
    for id in chosen(&codecs, order.mode())? {
        note(&id);
        let measured = measure(&order, &id);
        // Where a process failed there may be no file.
        let _gone = std::fs::remove_file(order.encoded());
        let (codec, by) = match id.strip_prefix("ours:") {
            Some(codec) => (codec, "towline"),
            None => (id.as_str(), "peer"),
        };
        match measured {
            Ok((encoded, decoded)) => {
                if !encoded["manifest_bytes"].is_null() {
                    pair["manifest_bytes"] = encoded["manifest_bytes"].clone();
                }
                rows.extend(merged(codec, by, &encoded, &decoded));
            }
            Err(error) => rows.push(json!({"codec": codec, "by": by, "error": error.to_string()})),
        }
    }
    rows.extend(machine(&rows));
    Ok(json!({"pair": pair, "rows": rows}))
}

#[expect(clippy::print_stderr, reason = "progress of a command-line tool")]
fn note(id: &str) {
    eprintln!("  {id}");
}

fn measure(order: &Order, id: &str) -> Result<(Value, Value)> {
    let encoded = again(&order.arguments("encode-one", id))?;
    let decoded = again(&order.arguments("decode-one", id))?;
    Ok((encoded, decoded))
}

/// The codecs to measure in this mode: those that were asked for, or all but `raw`.
fn chosen(asked: &[String], mode: Mode) -> Result<Vec<String>> {
    let ours = towline_codec::all();
    let has = |codec: &dyn Codec| {
        codec.modes().contains(mode) && !(mode == Mode::Base && codec.framing() == Framing::Safetensors)
    };
    let mut all: Vec<String> =
        ours.iter().filter(|codec| has(codec.as_ref())).map(|codec| format!("ours:{}", codec.id())).collect();
    all.extend(peers::ALL.iter().filter(|peer| peer.has(mode)).map(|peer| peer.id().to_owned()));
    if asked.is_empty() {
        all.retain(|id| id != "ours:raw");
        return Ok(all);
    }
    for id in asked {
        if Subject::by_id(id).is_err() {
            Subject::by_id(&format!("ours:{id}"))?;
        }
    }
    all.retain(|id| asked.iter().any(|asked| id == asked || id.strip_prefix("ours:") == Some(asked)));
    Ok(all)
}

/// One row for each number of threads.
fn merged(codec: &str, by: &str, encoded: &Value, decoded: &Value) -> Vec<Value> {
    let rows = |value: &Value| value["rows"].as_array().cloned().unwrap_or_default();
    let mib = |row: &Value| row["extra_mib"].as_f64();
    rows(encoded)
        .iter()
        .zip(rows(decoded))
        .map(|(encode, decode)| {
            json!({
                "codec": codec,
                "by": by,
                "threads": encode["threads"],
                "encoded_bytes": encoded["encoded_bytes"],
                "raw_bytes": encoded["raw_bytes"],
                "variant": encoded["variant"],
                "encode_gbps": encode["gbps"],
                "encode_best_gbps": encode["best_gbps"],
                "encode_checked_gbps": encode["checked_gbps"],
                "encode_runs": encode["runs"],
                "scan_gbps": encode["physics_gbps"],
                "clock_ghz": encode["clock_ghz"],
                "encode_extra_mib": mib(encode),
                "decode_gbps": decode["gbps"],
                "decode_best_gbps": decode["best_gbps"],
                "decode_checked_gbps": decode["checked_gbps"],
                "decode_runs": decode["runs"],
                "memcpy_gbps": decode["physics_gbps"],
                "decode_extra_mib": mib(&decode),
                "extra_mib": mib(encode).zip(mib(&decode)).map(|(encode, decode)| encode.max(decode)),
            })
        })
        .collect()
}

/// The rows of the machine itself: the middle of what stood beside all codecs.
fn machine(rows: &[Value]) -> Vec<Value> {
    let mut speeds: BTreeMap<u64, [Vec<f64>; 3]> = BTreeMap::new();
    for row in rows {
        let speed = |name: &str| row[name].as_f64();
        let (Some(threads), Some(scan), Some(copy), Some(clock)) =
            (row["threads"].as_u64(), speed("scan_gbps"), speed("memcpy_gbps"), speed("clock_ghz"))
        else {
            continue;
        };
        let of_threads = speeds.entry(threads).or_default();
        of_threads.iter_mut().zip([scan, copy, clock]).for_each(|(all, speed)| all.push(speed));
    }
    speeds
        .into_iter()
        .map(|(threads, [scans, copies, clocks])| {
            json!({
                "codec": "machine",
                "by": "machine",
                "threads": threads,
                "scan_gbps": median_and_least(scans).0,
                "memcpy_gbps": median_and_least(copies).0,
                "clock_ghz": median_and_least(clocks).0,
            })
        })
        .collect()
}

/// What the pair is: its size, its types, how much of it changed, and the floor of a delta.
fn describe(parent: Option<&Path>, current: &Path) -> Result<Value> {
    let current = files::open(current)?;
    let mut bytes_of: BTreeMap<&str, u64> = BTreeMap::new();
    for meta in current.tensors() {
        *bytes_of.entry(meta.dtype().as_str()).or_default() += meta.byte_len() as u64;
    }
    let main = bytes_of.iter().max_by_key(|(_, bytes)| **bytes).map(|(dtype, _)| *dtype);
    let mut pair = json!({
        "mode": if parent.is_some() { "delta" } else { "base" },
        "dtype": main,
        "tensors": current.tensors().len(),
        "raw_bytes": bytes_of.values().sum::<u64>(),
    });
    if let Some(parent) = parent {
        let floor = floor::of_pair(&files::open(parent)?, &current)?;
        pair["changed"] = json!(floor.changed);
        pair["elements"] = json!(floor.elements);
        pair["floor_bytes"] = json!(floor.bytes());
    }
    Ok(pair)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codecs_are_chosen_by_mode_and_name() {
        let all = chosen(&[], Mode::Delta).unwrap();
        assert!(all.iter().any(|id| id == "ours:arc_v3") && all.iter().any(|id| id == "sparse"));
        assert!(all.iter().all(|id| id != "ours:raw"));
        let base = chosen(&[], Mode::Base).unwrap();
        assert!(
            base.iter().all(|id| id != "ours:arc_v3" && id != "sparse") && base.contains(&"pcodec".into())
        );
        let named = chosen(&["pcodec".into(), "lz4".into(), "raw".into()], Mode::Delta).unwrap();
        assert_eq!(named, ["ours:raw", "ours:lz4", "pcodec"]);
        let ids: Vec<_> = towline_codec::all().iter().map(|codec| codec.id().to_string()).collect();
        assert!(peers::ALL.iter().all(|peer| ids.iter().all(|id| id != peer.id())), "a name means one codec");
        assert!(chosen(&["gzip".into()], Mode::Delta).is_err());
    }

    #[test]
    fn rows_are_merged_and_the_machine_is_the_middle() {
        let half = |gbps: f64, physics: f64, mib: f64| {
            let row = |threads| {
                json!({"threads": threads, "gbps": gbps * f64::from(threads), "best_gbps": 9.0, "runs": 2,
                       "physics_gbps": physics, "clock_ghz": physics / 10.0, "extra_mib": mib})
            };
            json!({"encoded_bytes": 5, "raw_bytes": 50, "rows": [row(1), row(2)]})
        };
        let mut rows = merged("a", "peer", &half(1.0, 10.0, 3.0), &half(2.0, 5.0, 4.0));
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1]["encode_gbps"], json!(2.0));
        assert_eq!(rows[1]["extra_mib"], json!(4.0));
        rows.extend(merged("b", "peer", &half(1.0, 30.0, 3.0), &half(2.0, 5.0, 4.0)));
        rows.extend(merged("c", "peer", &half(1.0, 20.0, 3.0), &half(2.0, 6.0, 4.0)));
        rows.push(json!({"codec": "d", "error": "no"}));
        let machine = machine(&rows);
        assert_eq!(machine[0]["scan_gbps"], json!(20.0));
        assert_eq!(machine[0]["clock_ghz"], json!(2.0));
        assert_eq!(machine[1]["memcpy_gbps"], json!(5.0));
    }
}
