//! The command line as a user calls it: files, directories, JSON alone on standard output, errors with a next step.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::Value;
use towline_core::safetensors::serialize;
use towline_core::{DType, JobId, SessionId, SnapshotKind, SnapshotName, TensorMeta, Weights};
use towline_storage::{Publish, SaveTrainState, SnapshotRepo, Wanted};

const CODECS: [&str; 6] = ["raw", "zstd", "lz4", "arc_v1", "arc_v2", "arc_v3"];

fn towline(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_towline")).args(arguments).output().unwrap()
}

/// Runs it with `--json` and parses all of standard output.
fn json(arguments: &[&str]) -> Value {
    let output = towline(&[arguments, &["--json"]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{arguments:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap()
}

/// Runs it, and returns what it says when it fails.
fn refused(arguments: &[&str]) -> String {
    let output = towline(arguments);
    assert!(!output.status.success(), "{arguments:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

fn weights(names: &[&str], step: u16) -> Weights {
    Weights::new(names.iter().map(|name| {
        let data: Vec<u8> = (0..5000u16)
            .flat_map(|at| if at % 50 == 7 { (at ^ step).to_le_bytes() } else { at.to_le_bytes() })
            .collect();
        (TensorMeta::new(*name, DType::BF16, [50, 100]).unwrap(), data.into())
    }))
    .unwrap()
}

fn write(path: &Path, weights: &Weights) {
    std::fs::write(path, serialize(weights, &std::collections::BTreeMap::new()).unwrap()).unwrap();
}

fn same(left: &Path, right: &Path) -> bool {
    let read = |path: &Path| -> Weights {
        let bytes = bytes::Bytes::from(std::fs::read(path).unwrap());
        Weights::read_all(&towline_core::safetensors::SafetensorsFiles::open(vec![bytes]).unwrap()).unwrap()
    };
    read(left) == read(right)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn deltas_of_files_round_trip_in_every_codec() {
    let dir = tempfile::tempdir().unwrap();
    let [old, new, delta, out] =
        ["old.safetensors", "new.safetensors", "delta", "out.safetensors"].map(|name| dir.path().join(name));
    write(&old, &weights(&["a", "b"], 1));
    write(&new, &weights(&["a", "b"], 2));
    for codec in CODECS {
        let arguments =
            ["--parent", text(&old), "--current", text(&new), "--codec", codec, "-o", text(&delta)];
        let encoded = json(&[&["delta", "encode"], &arguments[..]].concat());
        assert_eq!(encoded["raw_bytes"], 20_000);
        assert_eq!(encoded["changed"], 200);
        let shown = json(&["delta", "inspect", text(&delta)]);
        assert_eq!(shown["files"][0]["codec"], codec);
        assert_eq!(shown["files"][0]["tensors"].as_array().unwrap().len(), 2);
        // The output of the codec before is replaced whole.
        json(&["delta", "apply", "--parent", text(&old), "--delta", text(&delta), "-o", text(&out)]);
        assert!(same(&out, &new), "{codec}");
        // A wrong parent is refused, and what was there stays.
        if codec != "raw" {
            let why = refused(&[
                "delta",
                "apply",
                "--parent",
                text(&new),
                "--delta",
                text(&delta),
                "-o",
                text(&out),
            ]);
            assert!(why.contains("help:"), "{codec}: {why}");
            assert!(same(&out, &new), "{codec}");
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4, "nothing is left behind");
}

#[test]
fn deltas_of_directories_keep_the_shards() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (step, name) in [(1, "old"), (2, "new")] {
        std::fs::create_dir(path(name)).unwrap();
        write(&path(name).join("model-00001-of-00002.safetensors"), &weights(&["a", "c"], step));
        write(&path(name).join("model-00002-of-00002.safetensors"), &weights(&["b"], step));
    }
    let (old, new, delta, out) = (path("old"), path("new"), path("delta"), path("out"));
    for codec in ["zstd", "arc_v2"] {
        let arguments =
            ["--parent", text(&old), "--current", text(&new), "--codec", codec, "-o", text(&delta)];
        json(&[&["delta", "encode"], &arguments[..]].concat());
        json(&["delta", "apply", "--parent", text(&old), "--delta", text(&delta), "-o", text(&out)]);
        for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            assert!(same(&out.join(shard), &new.join(shard)), "{codec} {shard}");
        }
    }
    // Half of the delta is refused.
    let first = std::fs::read_dir(&delta).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_file(first).unwrap();
    let why = refused(&["delta", "apply", "--parent", text(&old), "--delta", text(&delta), "-o", text(&out)]);
    assert!(why.contains("tensors"), "{why}");
}

#[test]
fn wrong_calls_say_what_was_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("w.safetensors");
    write(&file, &weights(&["a"], 1));
    let other = dir.path().join("other.safetensors");
    write(&other, &weights(&["b"], 1));
    let junk = dir.path().join("junk");
    std::fs::write(&junk, b"not a checkpoint at all").unwrap();
    let out = dir.path().join("out");
    let encode = |parent: &Path, current: &Path, codec: &str| {
        refused(&[
            "delta",
            "encode",
            "--parent",
            text(parent),
            "--current",
            text(current),
            "--codec",
            codec,
            "-o",
            text(&out),
        ])
    };
    assert!(encode(&file, &file, "gzip").contains("arc_v2"), "the known codecs are listed");
    assert!(encode(&file, &other, "zstd").contains("`a` is missing"));
    assert!(encode(&junk, &file, "zstd").contains("junk"));
    assert!(encode(&dir.path().join("absent"), &file, "zstd").contains("cannot be read"));
    assert!(refused(&["delta", "inspect", text(&file)]).contains("U8"));
    assert!(!out.exists());
    let output = towline(&["snapshot", "show", "--store", text(&dir.path().join("store")), "x", "--json"]);
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["error"]["code"], "not_found");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(towline(&["delta"]).status.code(), Some(2));
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in [
        &["quickstart"][..],
        &["serve", "engine"],
        &["deployment", "state"],
        &["deployment", "wait"],
        &["deployment", "hot-load"],
        &["delta", "encode"],
        &["delta", "apply"],
        &["delta", "inspect"],
        &["bench", "codec"],
        &["snapshot", "list"],
        &["snapshot", "show"],
        &["snapshot", "verify"],
        &["snapshot", "export"],
        &["snapshot", "import"],
    ] {
        let output = towline(&[command, &["--help"]].concat());
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && help.contains("Example:"), "{command:?}: {help}");
        assert!(help.contains("--json"), "{command:?}");
    }
}

#[test]
fn bench_measures_what_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old.safetensors"), dir.path().join("new.safetensors"));
    write(&old, &weights(&["a"], 1));
    write(&new, &weights(&["a"], 2));
    let arguments =
        ["--parent", text(&old), "--current", text(&new), "--codecs", "zstd,arc_v2", "--runs", "1"];
    let report = json(&[&["bench", "codec"], &arguments[..]].concat());
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!(row["raw_bytes"], 10_000);
        assert!(row["encode_gbps"].as_f64().unwrap() > 0.0 && row["encoded_bytes"].as_u64().unwrap() > 0);
    }
}

/// A store with base `one` and the delta `two` on it, of job `job`.
fn filled(dir: &Path) -> PathBuf {
    let store = dir.join("store");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let writer = repo(&store).writer(SessionId::new("0000cccc").unwrap()).await.unwrap();
        let (old, new) = (Arc::new(weights(&["a"], 1)), Arc::new(weights(&["a"], 2)));
        let name = |name: &str| SnapshotName::new(name).unwrap();
        writer.publish(Publish::new(name("one"), SnapshotKind::Base, Arc::clone(&old) as _)).await.unwrap();
        let parent = writer.repo().find("one", Wanted::Sampler).await.unwrap();
        let delta = Publish::new(name("two"), SnapshotKind::Delta, new as _).with_parent(parent, old);
        writer.publish(delta.with_codec(towline_codec::by_id("arc_v3").unwrap())).await.unwrap();
    });
    store
}

fn repo(store: &Path) -> SnapshotRepo {
    let store = towline_storage::open(text(store), &towline_storage::StoreOptions::new()).unwrap();
    SnapshotRepo::new(store, JobId::new("job").unwrap(), towline_codec::all())
}

#[test]
fn a_store_is_listed_verified_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path());
    let list = json(&["snapshot", "list", "--store", text(&store)]);
    assert_eq!(list["snapshots"][1]["kind"], "delta");
    assert_eq!(json(&["snapshot", "show", "--store", text(&store), "two"])["codec"], "arc_v3");
    json(&["snapshot", "verify", "--store", text(&store)]);
    let out = dir.path().join("model");
    json(&["snapshot", "export", "--store", text(&store), "two", "-o", text(&out)]);
    let expected = dir.path().join("expected.safetensors");
    write(&expected, &weights(&["a"], 2));
    assert!(same(&out.join("model-00001-of-00001.safetensors"), &expected));
    let keep = |words: &[&str]| {
        let mut all = vec!["snapshot"];
        all.extend(words);
        all.extend(["--store", text(&store)]);
        all.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let kept = |words: &[&str]| json(&keep(words).iter().map(String::as_str).collect::<Vec<_>>());
    let not = |words: &[&str]| refused(&keep(words).iter().map(String::as_str).collect::<Vec<_>>());
    kept(&["verify", "--quick"]);
    kept(&["verify", "--sample", "0.5"]);
    assert!(not(&["verify", "--sample", "2"]).contains("wanted 0 to 1"));
    assert_eq!(kept(&["doctor"])["findings"][0]["good"], true);
    assert!(kept(&["ttl", "one", "--seconds", "3600"])["expires_ms"].is_u64());
    assert!(kept(&["ttl", "one", "--clear"])["expires_ms"].is_null());
    assert!(not(&["ttl", "one", "--seconds", "3599"]).contains("3600 to 315360000"));
    kept(&["pin", "two", "--id", "best", "--reason", "serves"]);
    let pruned = kept(&["prune", "--keep-last-snapshots", "1", "--dry-run"]);
    assert_eq!(pruned["jobs"][0]["kept"][1]["why"], "pinned as `best`");
    assert_eq!(pruned["jobs"][0]["kept"][0]["why"], "number 2 needs it");
    kept(&["unpin", "--id", "best"]);
    assert!(not(&["prune", "--keep-last-states", "0"]).contains("keep at least 1"));
    assert!(not(&["prune", "--keep-best", "loss"]).contains("reward:max:3"));
    kept(&["prune", "--keep-best", "loss:min:2", "--keep-last-snapshots", "1", "--grace-hours", "1"]);
    assert_eq!(kept(&["list"])["snapshots"].as_array().unwrap().len(), 2, "the delta needs its base");
    // One flipped byte is found, and named.
    let file =
        walk(&store).into_iter().find(|path| path.ends_with("model-00001-of-00001.safetensors")).unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert!(refused(&["snapshot", "verify", "--store", text(&store)]).contains("damaged"));
}

#[test]
fn checkpoints_are_listed_found_and_promoted() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let writer = repo(&store).writer(SessionId::new("0000dddd").unwrap()).await.unwrap();
        let state = SaveTrainState::new(SnapshotName::new("one").unwrap(), Arc::new(weights(&["a"], 3)));
        writer.save_state(state.with_step(7)).await.unwrap();
    });
    let here = |words: &[&str]| -> Vec<String> {
        words.iter().chain(&["--store", text(&store)]).map(|word| (*word).to_owned()).collect()
    };
    let ask = |words: &[&str]| json(&here(words).iter().map(String::as_str).collect::<Vec<_>>());
    let not = |words: &[&str]| refused(&here(words).iter().map(String::as_str).collect::<Vec<_>>());

    let page = ask(&["checkpoint", "list", "--job", "job", "--limit", "2"]);
    assert_eq!((&page["checkpoints"][0]["resumable"], &page["next"]), (&Value::Bool(true), &"2".into()));
    let rest = ask(&["checkpoint", "list", "--job", "job", "--cursor", "2"]);
    assert_eq!((&rest["checkpoints"][0]["promotable"], &rest["next"]), (&Value::Bool(true), &Value::Null));
    assert!(not(&["checkpoint", "list", "--job", "jib"]).contains("job jib does not exist"));
    let shown = towline(&["checkpoint", "list", "--job", "job", "--store", text(&store)]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(["resume", "promote", "serve"].iter().all(|word| shown.contains(word)), "{shown}");

    // A state and a sampler checkpoint of one name: what is wanted decides.
    for reference in ["job:one", "cross_job://job/one", "tinker://job/weights/one"] {
        assert_eq!(ask(&["checkpoint", "resolve", reference])["kind"], "state");
    }
    assert_eq!(ask(&["checkpoint", "resolve", "one", "--job", "job", "--want", "sampler"])["kind"], "base");
    for (reference, says) in [
        ("one", "add --job, or write `<job>:one`"),
        ("job:two", "wanted a train state"),
        ("job:three", "no train state called `three`"),
        ("gs://bucket/one", "neither cross_job nor tinker"),
        ("job:One", "no DNS label"),
        ("/job/one", "absolute paths"),
        ("", "it is empty"),
    ] {
        let told = not(&["checkpoint", "resolve", reference]);
        assert!(told.contains(says), "{reference}: {told}");
    }

    for (id, says) in [
        ("", "it is empty"),
        ("My-Model", "'M' is not allowed"),
        ("my_model", "'_' is not allowed"),
        ("-m", "hyphen at an end"),
        ("m-", "hyphen at an end"),
        (&"m".repeat(64), "at most 63"),
    ] {
        let told = not(&["promote", "job:one", &format!("--output-model-id={id}")]);
        assert!(told.contains(says), "{id}: {told}");
    }
    let told = not(&["promote", "job:two", "--output-model-id", "m"]);
    assert!(told.contains("promote its base one-0000cccc") && told.contains("--materialise"), "{told}");
    assert_eq!(ask(&["model", "list"])["models"].as_array().unwrap().len(), 0);
    let model = ask(&["promote", "job:two", "--output-model-id", "m", "--materialise"]);
    assert_eq!(model["model"]["name"], "accounts/local/models/m");
    assert_eq!(model["model"]["source"]["codec"], "arc_v3");
    assert_eq!(ask(&["promote", "job:two", "--output-model-id", "m", "--materialise"]), model);
    assert!(
        not(&["promote", "job:one", "--output-model-id", "m"])
            .contains("is there already, from two-0000cccc")
    );
    assert_eq!(ask(&["model", "list"])["models"][0], model["model"]);
    let expected = dir.path().join("expected.safetensors");
    write(&expected, &weights(&["a"], 2));
    assert!(same(&store.join("models/m/model-00001-of-00001.safetensors"), &expected));
}

#[test]
fn directories_of_slime_go_out_and_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (store, other, deltas, base) = (path("store"), path("other"), path("deltas"), path("base"));
    std::fs::create_dir(&base).unwrap();
    write(&base.join("model.safetensors"), &weights(&["a", "b"], 1));
    std::fs::write(base.join("config.json"), "{}").unwrap();
    let import = |from: &Path, store: &Path| {
        ["snapshot", "import", text(from), "--store", text(store), "--job", "train"].map(str::to_owned)
    };
    let words = |first: &[String], more: &[&str]| -> Vec<String> {
        first.iter().cloned().chain(more.iter().map(|word| (*word).to_owned())).collect()
    };
    let run = |words: &[String]| json(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let not = |words: &[String]| refused(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let begun = run(&words(&import(&base, &store), &["--name", "one"]));
    assert_eq!((&begun["snapshot"]["kind"], &begun["snapshot"]["job"]), (&"base".into(), &"train".into()));
    // The next step, as a base of its own and then as a delta for slime.
    std::fs::remove_file(base.join("model.safetensors")).unwrap();
    write(&base.join("model.safetensors"), &weights(&["a", "b"], 2));
    run(&words(&import(&base, &store), &["--name", "two"]));
    let export = |name: &str, more: &[&str]| {
        let place = ["snapshot", "export", name, "--store", text(&store), "-o", text(&deltas)];
        words(&place.map(str::to_owned), more)
    };
    let full = run(&export("one", &["--format", "slime"]));
    assert_eq!((&full["version"], &full["base_version"]), (&1.into(), &Value::Null));
    let two = ["--format", "slime", "--parent", "one", "--encoding", "overwrite", "--checksum", "blake3"];
    let written = run(&export("two", &two));
    assert_eq!(
        (&written["version"], &written["base_version"], &written["tensors"]),
        (&2.into(), &1.into(), &2.into())
    );
    assert!(written["bytes"].as_u64().unwrap() < 10_000);
    assert!(not(&export("two", &["--parent", "one"])).contains("--format slime"));
    let taken = not(&export("two", &[&two[..], &["--number", "2"]].concat()));
    assert!(taken.contains("weight_v000002` exists"), "{taken}");
    assert!(not(&export("two", &["--format", "slime", "--checksum", "md5"])).contains("xxh3-128"));
    // Into a store that has seen none of it.
    let second = deltas.join("weight_v000002");
    assert!(not(&import(&second, &other)).contains("full checkpoint"));
    run(&import(&deltas.join("weight_v000001"), &other));
    assert!(
        not(&words(&import(&deltas.join("weight_v000001"), &other), &["--parent", "x"]))
            .contains("no parent")
    );
    let delta = run(&words(&import(&second, &other), &["--step", "7"]));
    assert_eq!((&delta["snapshot"]["kind"], &delta["snapshot"]["step"]), (&"delta".into(), &7.into()));
    assert!(not(&words(&import(&second, &other), &["--name", "again"])).contains("is version 2"));
    let out = path("model");
    json(&["snapshot", "export", "--store", text(&other), "weight-v000002", "-o", text(&out)]);
    assert!(same(&out.join("model-00001-of-00001.safetensors"), &base.join("model.safetensors")));
    assert!(out.join("config.json").is_file());
    json(&["snapshot", "verify", "--store", text(&other)]);
}

fn walk(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(path) }
    }
    found
}
