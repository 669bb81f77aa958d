//! `store`: a train state saved, loaded and staged by our store and by others, in turns on the same bytes; and the memory
//! that a save and a load of ours take.

mod others;
mod peak;
mod s3;
mod state;
mod ways;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use towline_core::{Error, Result, TensorSource as _};

use self::others::Others;
use self::state::State;
use self::ways::Ways;
use crate::args::Args;

pub(crate) use self::peak::{load as peak_load, save as peak_save};
pub(crate) use self::s3::{command as s3, serve_memory};

/// What is compared, each with the names of the ways it is done here and in Python.
const GROUPS: [Group; 3] = [
    Group {
        name: "save",
        here: &["raw", "safetensors", "ours-1", "ours-2"],
        python: &["torch", "safetensors", "dcp"],
    },
    Group {
        name: "load",
        here: &["memcpy", "raw", "safetensors", "ours"],
        python: &["torch", "torch-mmap", "safetensors", "dcp"],
    },
    Group { name: "stall", here: &["memcpy", "ours"], python: &["dcp", "dcp-cached"] },
];

struct Group {
    name: &'static str,
    here: &'static [&'static str],
    python: &'static [&'static str],
}

pub(crate) fn command(mut args: Args) -> Result<Value> {
    let (mib, runs) = (args.number("--mib", 1024usize)?, args.number("--runs", 5usize)?);
    let peak_gib = args.number("--peak-gib", 0usize)?;
    let scratch = args.path("--scratch")?.unwrap_or_else(std::env::temp_dir);
    let (python, script) = (args.path("--python")?, args.path("--script")?);
    args.finish()?;
    let parent = scratch;
    let scratch = Scratch::new(&parent)?;
    let mut rows = Vec::new();
    let mut versions = Value::Null;
    let bytes = {
        let state = State::new(mib)?;
        let mut others = match python.zip(script) {
            Some((python, script)) => {
                // It makes tensors of the same shapes.
                let shapes: Vec<Value> =
                    state.tensors().iter().map(|meta| json!([meta.name(), meta.shape()])).collect();
                let order = json!({"dir": scratch.0.join("python"), "tensors": shapes});
                let others = Others::start(&python, &script, &order)?;
                versions = others.versions().clone();
                Some(others)
            }
            None => None,
        };
        let bytes = state.bytes();
        let mut ways = Ways::new(scratch.0.clone(), state)?;
        for group in &GROUPS {
            rows.extend(measure(group, runs, &mut ways, others.as_mut())?);
        }
        bytes
    };
    // What the ways have left makes room.
    drop(scratch);
    let peak = if peak_gib > 0 { peak::measure(&Scratch::new(&parent)?.0, peak_gib)? } else { Vec::new() };
    Ok(json!({"bytes": bytes, "tensors": state::TENSORS, "runs": runs, "rows": rows, "peak": peak,
              "versions": versions}))
}

/// One round that does not count, then `runs` that do; who begins changes from round to round.
fn measure(
    group: &Group,
    runs: usize,
    ways: &mut Ways,
    mut others: Option<&mut Others>,
) -> Result<Vec<Value>> {
    let here = group.here.iter().map(|name| ("rust", *name));
    let python = group.python.iter().map(|name| ("python", *name)).filter(|_| others.is_some());
    let all: Vec<_> = here.chain(python).collect();
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); all.len()];
    for round in 0..=runs {
        for turn in 0..all.len() {
            let place = (turn + round) % all.len();
            let Some(&(by, name)) = all.get(place) else { continue };
            let taken = match (by, others.as_deref_mut()) {
                ("python", Some(others)) => others.run(group.name, name)?,
                _ => ways.run(group.name, name)?,
            };
            if let (true, Some(kept)) = (round > 0, seconds.get_mut(place)) {
                kept.push(taken);
            }
        }
    }
    let row = |((by, name), seconds): ((&str, &str), Vec<f64>)| json!({"group": group.name, "by": by, "way": name, "seconds": seconds});
    Ok(all.into_iter().zip(seconds).map(row).collect())
}

/// A folder that goes with the run.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!("towline-peers-store-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|error| failed("make the scratch folder", error))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left behind lies in a folder for such things.
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn failed(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::unavailable(format!("could not {what}")).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_run_and_loads_what_was_saved() {
        let dir = Scratch::new(&std::env::temp_dir().join("towline-peers-test")).unwrap();
        let mut ways = Ways::new(dir.0.clone(), State::new(4).unwrap()).unwrap();
        for group in &GROUPS {
            let rows = measure(group, 2, &mut ways, None).unwrap();
            assert_eq!(rows.len(), group.here.len());
            for row in rows {
                let seconds: Vec<f64> =
                    row["seconds"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
                assert_eq!(seconds.len(), 2);
                assert!(seconds.iter().all(|seconds| *seconds > 0.0), "{row}");
            }
        }
        assert!(ways.run("load", "nothing").is_err());
    }
}
