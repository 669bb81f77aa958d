//! `towline train` and `towline pipeline` as a user calls them: resumed, initialised, refused, and beside each other.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

fn towline(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_towline"));
    command.args(arguments);
    command
}

/// The arguments of a short run.
fn short<'a>(store: &'a str, job: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let begin = ["train", "--json", "--store", store, "--job", job, "--batch", "4", "--save-every", "2"];
    [&begin[..], more].concat()
}

/// The events of a run that ends well.
fn train(store: &str, job: &str, more: &[&str]) -> Vec<Value> {
    let output = towline(&short(store, job, more)).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    events(&output)
}

fn events(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat()
}

/// The error of a run that is refused: its code, message and help.
fn refused(store: &str, job: &str, more: &[&str]) -> (String, String, String) {
    let output = towline(&short(store, job, more)).output().unwrap();
    assert!(!output.status.success(), "{}", said(&output));
    let error = events(&output).pop().unwrap()["error"].take();
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    (text("code"), text("message"), text("help"))
}

fn path(dir: &Path) -> &str {
    dir.to_str().unwrap()
}

#[test]
fn a_run_goes_on_is_begun_anew_and_is_refused_as_it_was_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = path(dir.path());
    let whole = train(store, "whole", &["--steps", "6"]);
    assert_eq!(
        whole[0],
        json!({"event": "started", "resumed": null, "initialised": null, "step": 0, "row": 0})
    );
    // In two parts, by the same command with more steps: not another bit.
    train(store, "parts", &["--steps", "4"]);
    let rest = train(store, "parts", &["--steps", "6"]);
    assert_eq!((&rest[0]["resumed"], &rest[0]["row"]), (&json!("final"), &json!(16)));
    assert_eq!(rest[1..3], whole[5..7]);
    assert_eq!(rest[3]["digest"], whole[7]["digest"]);
    // It is done: nothing is trained, the last save is found.
    let again = train(store, "parts", &["--steps", "6"]);
    assert_eq!(
        (again.len(), &again[1]["state"], &again[1]["digest"]),
        (2, &rest[3]["state"], &rest[3]["digest"])
    );

    // Back to a named state, whatever came later.
    let back = train(store, "parts", &["--steps", "6", "--from", "step-000002"]);
    assert_eq!((&back[0]["resumed"], back[1..5] == whole[3..7]), (&json!("step-000002"), true));
    // Another job begins with its weights, from row 0; or with all that it has.
    let new = train(store, "new", &["--steps", "1", "--init", "whole:final"]);
    assert_eq!((&new[0]["initialised"], &new[0]["row"]), (&json!("whole:final"), &json!(0)));
    let all = ["--steps", "6", "--init", "whole:step-000004", "--init-optimizer", "--init-position"];
    let all = train(store, "all", &all);
    assert_eq!((&all[0]["row"], all[1..3] == whole[5..7]), (&json!(16), true));

    // Other data.
    let other = ["--steps", "7", "--data-seed", "2"];
    let (code, message, help) = refused(store, "whole", &other);
    assert_eq!(code, "invalid");
    assert!(
        message.contains("of job whole was trained on other data: its fingerprint is sorting:4096:"),
        "{message}"
    );
    assert_eq!(help, "give `--data-changed keep` to go on at the same row, or `--data-changed reset-cursor`");
    let kept = train(store, "parts", &[&other[..], &["--data-changed", "keep"]].concat());
    assert_eq!(kept[0]["row"], 24);
    let reset = train(store, "whole", &[&other[..], &["--data-changed", "reset-cursor"]].concat());
    assert_eq!((&reset[0]["row"], &reset[1]["first_row"]), (&json!(0), &json!(0)));

    // The log of one, torn and rebuilt.
    let log = dir.path().join("log");
    train(store, "logged", &["--steps", "3", "--log", path(&log)]);
    let file = log.join("checkpoints.jsonl");
    let written = std::fs::read_to_string(&file).unwrap();
    assert_eq!(written.lines().count(), 3, "{written}");
    std::fs::write(&file, &written[..written.len() - 9]).unwrap();
    let repair =
        ["checkpoint", "repair-log", "--json", "--store", store, "--job", "logged", "--log", path(&log)];
    let repaired = towline(&repair).output().unwrap();
    assert_eq!(events(&repaired), [json!({"lines": 3, "gone": 0, "set_aside": 1})], "{}", said(&repaired));

    // References that name nothing, the wrong thing, or are none.
    let (_, message, _) = refused(store, "whole", &["--from", "gone"]);
    assert_eq!(message, "job whole has no train state called `gone`");
    let sampler = "tinker://whole/sampler_weights/final";
    let (code, message, help) = refused(store, "whole", &["--from", sampler]);
    assert_eq!(code, "invalid");
    assert_eq!(message, format!("{sampler} names another class of checkpoint: wanted a train state"));
    assert_eq!(help, "name what `save_state` has saved: weights for samplers have no optimizer");
    for wrong in ["", "https://x/y", "a/b/c", "Whole:final", "cross_job://whole"] {
        let output = towline(&short(store, "whole", &["--from", wrong])).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "`{wrong}`: {}", said(&output));
        assert!(said(&output).contains("--from <REFERENCE>"), "`{wrong}`: {}", said(&output));
    }
}

/// A trainer whose events are read one by one.
struct Running {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Running {
    fn start(store: &str, job: &str, more: &[&str]) -> Self {
        let mut child = towline(&short(store, job, more)).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn next(&mut self) -> Option<Value> {
        self.lines.next().map(|line| serde_json::from_str(&line.unwrap()).unwrap())
    }
}

#[test]
fn of_two_processes_on_one_run_the_older_is_fenced_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = path(dir.path());
    let mut older = Running::start(store, "train", &["--steps", "1000000"]);
    let mut events = std::iter::from_fn(|| older.next());
    assert!(events.any(|event| event["step"] == 3));
    // It goes on from the older one's state; from then on that one cannot save.
    let newer = train(store, "train", &["--steps", "6"]);
    assert!(newer[0]["resumed"].is_string(), "{}", newer[0]);
    let last = events.last().unwrap();
    assert_eq!(last["error"]["code"], "fenced", "{last}");
    assert!(last["error"]["message"].as_str().unwrap().contains("train"), "{last}");
    assert!(!older.child.wait().unwrap().success());
    // What the newer one has saved is the newest.
    let again = train(store, "train", &["--steps", "6"]);
    assert_eq!((again.len(), &again[1]["digest"]), (2, &newer.last().unwrap()["digest"]));
}

#[test]
fn two_runs_at_once_on_one_store_do_not_meet() {
    let (alone, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let runs = [("a", ["--steps", "8", "--data-seed", "3"]), ("b", ["--steps", "8", "--data-seed", "4"])];
    let wanted = runs.map(|(job, more)| train(path(alone.path()), job, &more));
    let mut both = runs.map(|(job, more)| Running::start(path(shared.path()), job, &more));
    let mut found = [Vec::new(), Vec::new()];
    while found.iter().any(|events| !events.last().is_some_and(|event: &Value| event["event"] == "finished"))
    {
        for (running, events) in both.iter_mut().zip(&mut found) {
            events.extend(running.next());
        }
    }
    for (wanted, found) in wanted.iter().zip(&found) {
        let bare = |events: &[Value]| -> Vec<Value> {
            // The session in a sampler's name is the only thing that may differ.
            events
                .iter()
                .cloned()
                .map(|mut event| {
                    event["sampler"] = Value::Null;
                    event
                })
                .collect()
        };
        assert_eq!(bare(wanted), bare(found));
    }
    assert!(both.iter_mut().all(|running| running.child.wait().unwrap().success()));
}

#[test]
fn an_adapter_is_trained_promoted_and_begins_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let store = path(dir.path());
    let lora = ["--steps", "4", "--lora-rank", "4"];
    let events = train(store, "lora", &[&lora[..], &["--output-model-id", "addon"]].concat());
    assert_eq!(events[5]["model"], "accounts/local/models/addon");
    let folder = dir.path().join("models/addon");
    let again = ["--steps", "1", "--lora-rank", "4", "--warm-start", path(&folder)];
    let warm = train(store, "warm", &again);
    assert_eq!(warm[0]["initialised"], format!("`{}`", folder.display()));
    // The same command again: its own state counts, of 1 step.
    assert_eq!(train(store, "warm", &again)[0]["resumed"], "final");

    let (code, message, _) = refused(store, "lora", &["--steps", "5"]);
    assert_eq!(code, "invalid", "a state of an adapter is none of all parameters: {message}");
    let (_, message, _) = refused(store, "other", &["--lora-rank", "8", "--warm-start", path(&folder)]);
    assert!(message.contains("rank"), "{message}");
    let (code, message, _) = refused(store, "full", &["--lora-rank", "0", "--warm-start", path(&folder)]);
    assert_eq!(code, "unsupported", "{message}");
}

#[test]
fn the_pipeline_checks_itself() {
    let dir = tempfile::tempdir().unwrap();
    let output = towline(&["pipeline", "--json", "--dir", path(dir.path())]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let report = events(&output).pop().unwrap();
    let checks = report["checks"].as_array().unwrap();
    assert_eq!(checks.len(), 6);
    assert!(checks.iter().all(|check| check["result"] == "passed"), "{report}");
    assert!(report["model"].as_str().unwrap().starts_with("accounts/local/models/sorter-"), "{report}");
}
