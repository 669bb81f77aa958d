//! The run log: torn at every byte, written by many, read by both public cookbooks, and fed with noise.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use towline_core::{Error, ErrorKind};
use towline_trainer_client::{CheckpointLine, CheckpointLog, Dataloader, MergedLines, merge_lines};

/// Tells a test that it is the second process of itself.
const CHILD: &str = "TOWLINE_LOG_CHILD";

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn holding(bytes: impl AsRef<[u8]>) -> Self {
        let folder = Self::new();
        fs::write(folder.log().path(), bytes).unwrap();
        folder
    }

    fn log(&self) -> CheckpointLog {
        CheckpointLog::new(self.0.path()).with_lock_wait(Duration::from_secs(30))
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.log().path()).unwrap()
    }

    fn text(&self) -> String {
        String::from_utf8(self.bytes()).unwrap()
    }

    /// What was set aside, nothing if there is no such file.
    fn aside(&self) -> Vec<u8> {
        fs::read(self.log().torn_path()).unwrap_or_default()
    }
}

fn state(step: u64) -> CheckpointLine {
    CheckpointLine::new(format!("step-{step}"))
        .with_step(step)
        .with_data_consumed(step * 32)
        .with_source_job("run")
        .with_state_path(format!("cross_job://run/step-{step}"))
}

fn sampler(step: u64) -> CheckpointLine {
    CheckpointLine::new(format!("step-{step}"))
        .with_step(step)
        .with_sampler_path(format!("step-{step}-00ab12cd"))
}

fn fixture(path: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)).unwrap()
}

fn names(lines: &[CheckpointLine]) -> Vec<&str> {
    lines.iter().map(|line| line.name.as_str()).collect()
}

fn refused(result: Result<impl std::fmt::Debug, Error>, kind: ErrorKind, part: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(part), "`{error}` does not say `{part}`");
}

/// Line by line as another parser sees it.
fn values(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn torn_at_every_byte() {
    let whole = Folder::new();
    let lines = [
        state(10).with_extra("note", "Grüße \u{2028} \"😀\" }{").unwrap(),
        sampler(11),
        state(20).with_sampler_path("step-20-00ab12cd").with_extra("nested", [[1], [2]]).unwrap(),
    ];
    for line in &lines {
        assert_eq!(whole.log().append(line).unwrap().set_aside, None);
    }
    let bytes = whole.bytes();
    // The file's pieces, the repetition of step-10 among them, with the byte behind each.
    let pieces: Vec<(usize, usize)> = bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'\n')
        .scan(0, |start, (end, _)| Some((std::mem::replace(start, end + 1), end)))
        .collect();
    assert_eq!(pieces.len(), 4);
    let piece_names = ["step-10", "step-11", "step-10", "step-20"];

    let mut torn_cuts = 0;
    for cut in 0..=bytes.len() {
        let folder = Folder::holding(&bytes[..cut]);
        let whole_pieces = pieces.iter().filter(|(_, end)| *end <= cut).count();
        let start = pieces.iter().find(|(start, end)| *start < cut && cut < *end).map(|(start, _)| *start);
        let mut wanted: Vec<&str> = Vec::new();
        for name in &piece_names[..whole_pieces] {
            if !wanted.contains(name) {
                wanted.push(name);
            }
        }

        let read = folder.log().read().unwrap();
        assert_eq!(names(&read.lines), wanted, "cut at {cut}");
        assert_eq!(read.lines, lines[..wanted.len()], "cut at {cut}");
        assert_eq!(
            read.torn.as_ref().map(|torn| torn.offset),
            start.map(|start| start as u64),
            "cut at {cut}"
        );
        assert_eq!(folder.bytes(), bytes[..cut], "reading changes nothing");

        let next = if cut % 2 == 0 { state(30) } else { sampler(30) };
        let set_aside = folder.log().append(&next).unwrap().set_aside;
        assert_eq!(set_aside, read.torn, "cut at {cut}");
        wanted.push("step-30");
        let again = folder.log().read().unwrap();
        assert_eq!((names(&again.lines), again.torn), (wanted, None), "cut at {cut}");
        assert_eq!(again.lines.last(), Some(&next));
        if let Some(start) = start {
            torn_cuts += 1;
            assert_eq!(folder.aside(), [&bytes[start..cut], b"\n"].concat(), "cut at {cut}");
        } else {
            assert!(!folder.log().torn_path().exists(), "cut at {cut}");
        }
        // Both public readers parse every line of the file.
        values(&folder.text());
    }
    // All cuts but those at a line's start, before its newline, and at the end.
    assert_eq!(torn_cuts, bytes.len() + 1 - 2 * pieces.len() - 1);
}

#[test]
fn a_torn_file_that_is_torn_again_loses_nothing() {
    let folder = Folder::new();
    let mut aside = Vec::new();
    for step in 1..20 {
        folder.log().append(&state(step)).unwrap();
        let torn = &state(step).to_json().into_bytes()[..usize::try_from(step).unwrap() * 2];
        fs::write(folder.log().path(), [folder.bytes().as_slice(), torn].concat()).unwrap();
        aside.extend([torn, b"\n"].concat());
    }
    folder.log().append(&state(20)).unwrap();
    assert_eq!(folder.log().read().unwrap().lines.len(), 20);
    assert_eq!(folder.aside(), aside);
}

#[test]
fn what_a_power_cut_leaves() {
    // Blocks that were never written read as zeros; a character is cut in two.
    for tail in [&[0; 4096][..], b"{\"name\":\"\xc3", b"\0", b"null", b"{}{"] {
        let folder = Folder::holding([state(1).to_json().as_bytes(), b"\n", tail].concat());
        let read = folder.log().read().unwrap();
        assert_eq!(names(&read.lines), ["step-1"]);
        let torn = read.torn.unwrap();
        assert_eq!((torn.line, torn.bytes.as_slice()), (2, tail));
        assert!(torn.to_string().starts_with("line 2 is torn: "), "{torn}");
        folder.log().append(&state(2)).unwrap();
        assert_eq!(names(&folder.log().read().unwrap().lines), ["step-1", "step-2"]);
        assert_eq!(folder.aside(), [tail, b"\n"].concat());
    }
}

#[test]
fn many_writers_lose_no_line() {
    const LINES: u64 = 200;
    let test = "many_writers_lose_no_line";
    let write = |log: &CheckpointLog, writer: &str| {
        for step in 0..LINES {
            let line = if step % 5 == 4 { sampler(step) } else { state(step) };
            log.append(&line.with_extra("writer", writer).unwrap()).unwrap();
        }
    };
    if let Some(folder) = std::env::var_os(CHILD) {
        write(&CheckpointLog::new(folder), "process");
        return;
    }
    let folder = Folder::new();
    let mut child = child(test, folder.0.path());
    std::thread::scope(|scope| {
        for writer in ["one", "two"] {
            scope.spawn(|| write(&folder.log(), writer));
        }
        // A reader sees whole lines at any time.
        scope.spawn(|| {
            for _ in 0..100 {
                assert_eq!(folder.log().read().unwrap().torn, None);
            }
        });
    });
    assert!(child.wait().unwrap().success());
    let read = folder.log().read().unwrap();
    let mut found: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for line in &read.lines {
        found.entry(line.extra("writer").unwrap().unwrap()).or_default().push(line.step.unwrap());
    }
    // None lost, none twice, and each writer's in order.
    let all: Vec<u64> = (0..LINES).collect();
    let wanted = ["one", "process", "two"].map(|writer| (writer.to_owned(), all.clone()));
    assert_eq!(found, BTreeMap::from(wanted));
    assert!(values(&folder.text()).last().unwrap().get("state_path").is_some());
}

#[test]
fn a_killed_writer_leaves_every_line_that_was_acknowledged() {
    if let Some(folder) = std::env::var_os(CHILD) {
        let log = CheckpointLog::new(&folder);
        for step in 0.. {
            let line = if step % 3 == 2 { sampler(step) } else { state(step) };
            log.append(&line).unwrap();
            fs::write(Path::new(&folder).join("acknowledged"), step.to_string()).unwrap();
        }
        return;
    }
    for round in 0..8 {
        let folder = Folder::new();
        let mut child = child("a_killed_writer_leaves_every_line_that_was_acknowledged", folder.0.path());
        let acknowledged = folder.0.path().join("acknowledged");
        for _ in 0..3000 {
            if acknowledged.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(3 + round * 7));
        child.kill().unwrap();
        child.wait().unwrap();
        // Overwriting the note is not one step: an empty one says nothing.
        let last = fs::read_to_string(&acknowledged).unwrap().parse().unwrap_or(0);
        folder.log().append(&state(1_000_000)).unwrap();
        let steps: Vec<u64> =
            folder.log().read().unwrap().lines.iter().map(|line| line.step.unwrap()).collect();
        let kept = steps.len() as u64 - 1;
        assert!(kept > last, "{kept} lines, but {last} was acknowledged");
        assert_eq!(steps[..steps.len() - 1], (0..kept).collect::<Vec<_>>());
    }
}

/// This test program once more, running one test as the second process.
fn child(test: &str, folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// A shell's limit on the size of files stands for a full disk: part of a line can be written, the rest not.
#[cfg(target_os = "linux")]
#[test]
fn a_line_that_does_not_fit_is_taken_back() {
    let test = "a_line_that_does_not_fit_is_taken_back";
    if let Some(folder) = std::env::var_os(CHILD) {
        let log = CheckpointLog::new(&folder);
        let failed = (0..).find_map(|step| log.append(&state(step)).err().map(|error| (step, error)));
        let (step, error) = failed.unwrap();
        fs::write(Path::new(&folder).join("outcome"), format!("{step} {}", error.report())).unwrap();
        return;
    }
    let folder = Folder::new();
    let child = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" --exact \"$1\" --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(CHILD, folder.0.path())
        .stdout(Stdio::null())
        .status();
    assert!(child.unwrap().success());
    let outcome = fs::read_to_string(folder.0.path().join("outcome")).unwrap();
    let (lines, error) = outcome.split_once(' ').unwrap();
    let lines: usize = lines.parse().unwrap();
    assert!(
        lines > 10 && error.starts_with("unavailable: ") && error.contains("could not be written"),
        "{outcome}"
    );
    // Nothing of the last line is left, and none before it is missing.
    let read = folder.log().read().unwrap();
    assert_eq!((read.lines.len(), read.torn), (lines, None));
    assert!(folder.bytes().ends_with(b"\n"));
    folder.log().append(&state(0)).unwrap();
    assert!(!folder.log().torn_path().exists());
}

#[test]
fn the_lock_has_a_deadline() {
    let folder = Folder::holding(format!("{}\n", state(1).to_json()));
    let lock = File::create(folder.0.path().join("checkpoints.jsonl.lock")).unwrap();
    let log = folder.log().with_lock_wait(Duration::from_millis(30));
    lock.lock().unwrap();
    refused(log.append(&state(2)), ErrorKind::Unavailable, "was locked by others for 0.03 s");
    refused(log.read(), ErrorKind::Unavailable, "was locked by others");
    refused(log.rewrite(&[]), ErrorKind::Unavailable, "was locked by others");
    lock.unlock().unwrap();
    lock.lock_shared().unwrap();
    assert_eq!(log.read().unwrap().lines, [state(1)], "readers do not wait for each other");
    refused(log.append(&state(2)), ErrorKind::Unavailable, "was locked by others");
    lock.unlock().unwrap();
    log.append(&state(2)).unwrap();
    assert_eq!(log.read().unwrap().lines, [state(1), state(2)]);
}

#[test]
fn reads_what_the_tinker_cookbook_wrote() {
    let folder = Folder::holding(fixture("tinker/checkpoints.jsonl"));
    let read = folder.log().read().unwrap();
    assert_eq!(names(&read.lines), ["000002", "000004", "000006", "probe", "final"]);
    let wanted = [
        CheckpointLine::new("000002")
            .with_batch(2)
            .with_epoch(0)
            .with_rolling(true)
            .with_state_path("tinker://run-1/weights/000002"),
        CheckpointLine::new("000004")
            .with_batch(4)
            .with_epoch(0)
            .with_state_path("tinker://run-1/weights/000004")
            .with_sampler_path("tinker://run-1/sampler_weights/000004"),
    ];
    assert_eq!(read.lines[..2], wanted);
    let last = read.last_resumable().unwrap();
    assert_eq!((last.name.as_str(), last.is_final, last.batch), ("final", Some(true), Some(0)));

    let probe = read.find("probe").unwrap();
    assert_eq!((probe.step, probe.is_resumable()), (Some(7), false));
    assert_eq!(probe.extra_keys().collect::<Vec<_>>(), ["note", "loss", "lr"]);
    assert_eq!(probe.extra::<String>("note").unwrap().unwrap(), "Grüße \u{2028} 😀");
    assert_eq!(probe.extra_json("loss"), Some("NaN"));
    refused(probe.extra::<f64>("loss"), ErrorKind::Corrupt, "of another type than wanted");
    assert_eq!(probe.extra_json("lr"), Some(r#"{"now": 1e-05, "was": [0.5, null]}"#));

    folder.log().rewrite(&read.lines).unwrap();
    assert_eq!(folder.log().read().unwrap(), read);
    assert!(folder.text().is_ascii() && folder.text().contains(r#""loss":NaN,"lr":{"now": 1e-05, "#));
}

#[test]
fn reads_what_the_fireworks_cookbook_wrote() {
    let folder = Folder::holding(fixture("fireworks/checkpoints.jsonl"));
    let read = folder.log().read().unwrap();
    assert_eq!(names(&read.lines), ["step-10", "step-20", "step-25", "step-30"]);
    let line = |step: u64| {
        let line = CheckpointLine::new(format!("step-{step}")).with_data_consumed(step * 32);
        let mut line = line.with_source_job("job-7f3a").with_base_model("accounts/fireworks/models/qwen3-8b");
        line.step = Some(step);
        line.with_training_shape("accounts/fireworks/trainingShapes/ts-8b")
    };
    let wanted = [
        line(10).with_raw_rows_consumed(341).with_state_path("cross_job://job-7f3a/step-10"),
        line(20).with_state_path("cross_job://job-7f3a/step-20"),
        line(25).with_sampler_path("step-25-00ab12cd"),
        line(30)
            .with_raw_rows_consumed(1022)
            .with_state_path("cross_job://job-7f3a/step-30")
            .with_sampler_path("step-30-00ab12cd"),
    ];
    assert_eq!(read.lines, wanted);
    // Every key is known, and comes in our order too: rewritten it is theirs but for the order of keys.
    folder.log().rewrite(&read.lines).unwrap();
    assert_eq!(
        values(&folder.text()),
        values(str::from_utf8(&fixture("fireworks/checkpoints.jsonl")).unwrap())
    );
}

#[test]
fn writes_the_frozen_form() {
    let folder = Folder::new();
    let model = |line: CheckpointLine| line.with_source_job("run").with_base_model("tiny");
    let first = model(CheckpointLine::new("step-00000").with_step(0).with_data_consumed(0))
        .with_state_path("cross_job://run/step-00000")
        .with_rolling(true);
    let second = model(CheckpointLine::new("step-00040").with_step(40).with_batch(8).with_epoch(2))
        .with_data_consumed(1280)
        .with_raw_rows_consumed(1301)
        .with_state_path("cross_job://run/step-00040")
        .with_sampler_path("step-00040-00ab12cd")
        .with_extra("data", serde_json::json!({"fingerprint": "9f", "note": "Grüße \u{2028}"}))
        .unwrap();
    let third =
        model(CheckpointLine::new("step-00050").with_step(50)).with_sampler_path("step-00050-00ab12cd");
    for line in [&first, &second, &third] {
        folder.log().append(line).unwrap();
    }
    assert_eq!(folder.text(), str::from_utf8(&fixture("towline/checkpoints.jsonl")).unwrap());
    let read = folder.log().read().unwrap();
    assert_eq!(read.last_resumable(), Some(&second));
    assert_eq!(read.lines, [first, second, third]);
}

#[test]
fn the_last_line_can_be_resumed_from() {
    let folder = Folder::new();
    folder.log().append(&sampler(1)).unwrap();
    assert_eq!(folder.text().lines().count(), 1, "nothing to repeat before the first state");
    assert_eq!(folder.log().read().unwrap().last_resumable(), None);

    let both = state(2).with_sampler_path("step-2-00ab12cd");
    folder.log().append(&both).unwrap();
    folder.log().append(&sampler(3)).unwrap();
    folder.log().append(&sampler(4)).unwrap();
    let found = values(&folder.text());
    let last = found.last().unwrap();
    assert_eq!((last["name"].as_str(), last["step"].as_u64()), (Some("step-2"), Some(2)));
    assert_eq!((last["towline_repeat"].as_bool(), last.get("sampler_path")), (Some(true), None));
    // The newest sampler is still the last line with one.
    let newest = found.iter().rfind(|line| line.get("sampler_path").is_some()).unwrap();
    assert_eq!(newest["name"], "step-4");
    let read = folder.log().read().unwrap();
    assert_eq!(read.lines, [sampler(1), both.clone(), sampler(3), sampler(4)]);

    // A repetition whose line is gone is the line.
    let kept: Vec<_> =
        folder.text().lines().filter(|line| !line.contains("step-2-00ab12cd")).map(str::to_owned).collect();
    let folder = Folder::holding(kept.join("\n") + "\n");
    assert_eq!(folder.log().read().unwrap().last_resumable(), Some(&state(2)));

    folder.log().rewrite(&[both, sampler(9)]).unwrap();
    assert_eq!(names(&folder.log().read().unwrap().lines), ["step-2", "step-9"]);
    assert_eq!(values(&folder.text()).last().unwrap()["state_path"], "cross_job://run/step-2");
}

#[test]
fn a_bad_line_is_named() {
    let good = state(1).to_json();
    for (bad, problem) in [
        (
            "{\"name\":\"step-2\",\"st{\"name\":\"step-3\"}",
            "wanted `:` at byte 22, found `name\\\":\\\"step-3\\\"}`",
        ),
        ("hello", "wanted an object at byte 0, found `hello`"),
        ("[]", "wanted an object at byte 0, found `[]`"),
        ("{\"name\":\"a\"", "wanted `,` or `}` at byte 11, found the end"),
        ("{\"step\":1}", "wanted a `name`, found none"),
        ("{\"name\":null}", "wanted a `name`, found none"),
        ("{\"name\":\"\"}", "wanted a text as `name`, found an empty one"),
        ("{\"name\":7}", "wanted a text as `name`, found `7`"),
        ("{\"name\":\"a\",\"step\":\"4\"}", "wanted a whole number from 0 as `step`, found `\\\"4\\\"`"),
        (
            "{\"name\":\"a\",\"data_consumed\":-1}",
            "wanted a whole number from 0 as `data_consumed`, found `-1`",
        ),
        ("{\"name\":\"a\",\"batch\":1.5}", "wanted a whole number from 0 as `batch`, found `1.5`"),
        ("{\"name\":\"a\",\"final\":1}", "wanted `true` or `false` as `final`, found `1`"),
        ("{\"name\":\"a\",\"state_path\":\"\"}", "wanted a text as `state_path`, found an empty one"),
        ("{\"name\":\"a\",\"state_path\":[\"x\"]}", "wanted a text as `state_path`, found `[\\\"x\\\"]`"),
        ("{\"name\":\"a\",\"name\":\"b\"}", "the key `name` comes twice: which one counts is unknown"),
        ("{\"name\":\"a\",\"x\":1,\"x\":1}", "the key `x` comes twice: which one counts is unknown"),
        ("\0\0\0", "wanted an object at byte 0, found `\\0\\0\\0`"),
    ] {
        for (place, bytes) in [(2, format!("{good}\n{bad}\n{good}\n")), (1, format!("{bad}\n{good}\n"))] {
            let folder = Folder::holding(bytes);
            let error = folder.log().read().unwrap_err();
            let path = folder.log().path();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert_eq!(error.message(), format!("line {place} of `{}`: {problem}", path.display()));
            assert!(error.help().unwrap().starts_with("repair the log"), "{error}");
            // It stops no save.
            folder.log().append(&state(5)).unwrap();
            assert_eq!(folder.log().salvage().unwrap().lines.last(), Some(&state(5)));
        }
        // With its newline the last line is no torn one either.
        refused(Folder::holding(format!("{bad}\n")).log().read(), ErrorKind::Corrupt, "line 1 of ");
    }
    let folder = Folder::holding([good.as_bytes(), b"\n{\"name\":\"\xff\"}\nx\n"].concat());
    refused(folder.log().read(), ErrorKind::Corrupt, "line 2 of ");
    refused(folder.log().read(), ErrorKind::Corrupt, "wanted UTF-8, found other bytes from byte 9 on");
    refused(folder.log().read(), ErrorKind::Corrupt, "(and 1 bad lines more)");
    // A byte order mark elsewhere than in front makes a bad line, also for who looks for the last state.
    let folder = Folder::holding(format!("\n\u{feff}{good}\n"));
    refused(folder.log().read(), ErrorKind::Corrupt, "line 2 of ");
    folder.log().append(&sampler(5)).unwrap();
    assert_eq!(folder.log().salvage().unwrap().lines, [sampler(5)]);
    // A whole object without its newline is a line, good or bad.
    refused(Folder::holding("{\"step\":1}").log().read(), ErrorKind::Corrupt, "wanted a `name`");
}

#[test]
fn what_is_no_fault() {
    let (one, two) = (state(1).to_json(), state(2).to_json());
    for bytes in [
        format!("{one}\n{two}\n"),
        format!("{one}\n{two}"),
        format!("{one}\r\n{two}\r\n"),
        format!("{one}\r\n{two}\r"),
        format!("\u{feff}{one}\n{two}\n"),
        format!("\n\n{one}\n  \t\n{two}\n\n"),
        format!("{one}\n{two}\n   "),
        format!(" {one} \n\t{two}  "),
        format!(
            "{}\n{two}",
            one.replace(',', " , ").replace(':', ": ").replace("cross_job: //", "cross_job://")
        ),
    ] {
        let folder = Folder::holding(&bytes);
        let read = folder.log().read().unwrap();
        assert_eq!((read.lines, read.torn), (vec![state(1), state(2)], None), "{bytes:?}");
        assert_eq!(folder.log().append(&state(3)).unwrap().set_aside, None, "{bytes:?}");
        let read = folder.log().read().unwrap();
        assert_eq!(read.lines, [state(1), state(2), state(3)], "{bytes:?}");
        assert!(folder.bytes().ends_with(format!("\n{}\n", state(3).to_json()).as_bytes()), "{bytes:?}");
        let blank = |text: &str| text.split('\n').filter(|line| line.trim().is_empty()).count();
        assert!(blank(&folder.text()) <= blank(&bytes).max(1), "no blank line comes in: {bytes:?}");
        folder.log().rewrite(&read.lines).unwrap();
        assert_eq!(folder.text(), format!("{one}\n{two}\n{}\n", state(3).to_json()));
    }
    for nothing in ["", "\n", " \r\n\n", "\u{feff}"] {
        let folder = Folder::holding(nothing);
        assert_eq!(folder.log().read().unwrap(), Default::default(), "{nothing:?}");
        folder.log().append(&sampler(1)).unwrap();
        assert_eq!(folder.log().read().unwrap().lines, [sampler(1)], "{nothing:?}");
    }
    let folder = Folder::new();
    let log = CheckpointLog::new(folder.0.path().join("not/there/yet"));
    assert_eq!(log.read().unwrap(), Default::default());
    assert!(!folder.0.path().join("not").exists(), "reading makes nothing");
    log.append(&state(1)).unwrap();
    assert_eq!(log.read().unwrap().lines, [state(1)]);
}

#[test]
fn limits_are_typed() {
    let folder = Folder::new();
    let log = folder.log().with_max_line(120).with_max_file(300);
    let long = |length| CheckpointLine::new("n").with_state_path("x".repeat(length));
    let overhead = long(0).to_json().len();
    log.append(&long(120 - overhead)).unwrap();
    refused(
        log.append(&long(121 - overhead)),
        ErrorKind::Invalid,
        "the line of `n` has 121 bytes, at most 120 fit",
    );
    log.append(&long(120 - overhead)).unwrap();
    let before = folder.bytes();
    assert_eq!(before.len(), 242);
    refused(log.append(&long(58 - overhead)), ErrorKind::Invalid, "has more than 300 bytes, the limit");
    assert_eq!(folder.bytes(), before);
    log.append(&long(57 - overhead)).unwrap();
    assert_eq!((folder.bytes().len(), log.read().unwrap().lines.len()), (300, 3));

    refused(
        folder.log().with_max_line(119).read(),
        ErrorKind::Corrupt,
        "120 bytes in a line, at most 119 are read",
    );
    refused(folder.log().with_max_file(299).read(), ErrorKind::Invalid, "has more than 299 bytes, the limit");
    refused(
        folder.log().with_max_file(299).salvage(),
        ErrorKind::Invalid,
        "has more than 299 bytes, the limit",
    );
    refused(log.rewrite(&vec![long(1); 20]), ErrorKind::Invalid, "has more than 300 bytes, the limit");
    assert_eq!(folder.bytes().len(), 300, "a refused rewrite changes nothing");
    let most = Folder::holding("x\n".repeat(10_000));
    assert_eq!(most.log().salvage().unwrap().bad.len(), 10_000);
    let more = Folder::holding("x\n".repeat(10_001));
    refused(more.log().salvage(), ErrorKind::Corrupt, "has more than 10000 bad lines: it is no run log");
}

#[test]
fn lines_that_say_nothing_are_refused() {
    let folder = Folder::new();
    let log = folder.log();
    refused(log.append(&CheckpointLine::new("a")), ErrorKind::Invalid, "neither a state nor a sampler path");
    refused(
        log.append(&CheckpointLine::new("").with_state_path("x")),
        ErrorKind::Invalid,
        "found an empty one",
    );
    refused(log.append(&CheckpointLine::new("a").with_state_path("")), ErrorKind::Invalid, "as `state_path`");
    refused(log.rewrite(&[CheckpointLine::new("")]), ErrorKind::Invalid, "found an empty one");
    for key in ["name", "step", "final", "state_path", "towline_repeat"] {
        refused(
            CheckpointLine::new("a").with_extra(key, 1),
            ErrorKind::Invalid,
            "is a key of the run log itself",
        );
    }
    let map = BTreeMap::from([((1, 2), 3)]);
    refused(CheckpointLine::new("a").with_extra("x", map), ErrorKind::Invalid, "nothing that JSON holds");
    assert!(!log.path().exists());
    fs::create_dir(log.path()).unwrap();
    refused(log.read(), ErrorKind::Invalid, "is no file");
    refused(log.append(&state(1)), ErrorKind::Invalid, "could not be written");
    refused(
        CheckpointLog::new(folder.0.path().join("checkpoints.jsonl.lock/x")).append(&state(1)),
        ErrorKind::Invalid,
        "could not be made",
    );
}

#[test]
fn merging_keeps_what_only_the_log_knew() {
    let old = [
        state(10).with_epoch(1).with_extra("loss", 0.5).unwrap().with_extra("seed", 1).unwrap(),
        sampler(10).with_extra("eval", "good").unwrap(),
        state(20).with_base_model("tiny"),
        sampler(30),
        state(10).with_extra("seed", 2).unwrap().with_raw_rows_consumed(400),
    ];
    let bare =
        |step: u64| CheckpointLine::new(format!("step-{step}")).with_state_path(format!("elsewhere/{step}"));
    let stored = vec![
        bare(10).with_extra("loss", 0.25).unwrap(),
        CheckpointLine::new("step-10").with_sampler_path("new"),
        bare(30).with_step(31),
        bare(40),
    ];
    let MergedLines { lines, gone, .. } = merge_lines(&old, stored);
    // The store's word first, then the newest line's, then the older one's.
    let first = bare(10)
        .with_step(10)
        .with_data_consumed(320)
        .with_raw_rows_consumed(400)
        .with_epoch(1)
        .with_source_job("run")
        .with_extra("loss", 0.25)
        .unwrap()
        .with_extra("seed", 2)
        .unwrap();
    let second =
        CheckpointLine::new("step-10").with_step(10).with_sampler_path("new").with_extra("eval", "good");
    assert_eq!(lines, [first, second.unwrap(), bare(30).with_step(31), bare(40)]);
    assert_eq!(gone, [state(20).with_base_model("tiny"), sampler(30)]);
}

#[test]
fn repair_rebuilds_the_log_and_keeps_the_rest_aside() {
    let note = "{\"loss\": 0.1250, \"é\": 18446744073709551616}";
    let annotated = format!("{},\"note\":{note}}}", state(10).to_json().trim_end_matches('}'));
    let folder = Folder::holding(format!(
        "{annotated}\nbad\n{}\n{}\n{{\"na",
        state(20).to_json(),
        sampler(30).to_json()
    ));
    let log = folder.log();
    refused(log.read(), ErrorKind::Corrupt, "line 2 of ");
    let before = log.salvage().unwrap();
    assert_eq!(names(&before.lines), ["step-10", "step-20", "step-30"]);
    assert_eq!((before.bad[0].line, before.bad[0].bytes.as_slice()), (2, &b"bad"[..]));
    assert!(before.torn.is_some());

    // A line that comes while the store is listed is not lost.
    log.append(&state(40)).unwrap();
    let stored =
        || [10, 40].map(|step| CheckpointLine::new(format!("step-{step}")).with_state_path("there")).to_vec();
    refused(
        log.repair(&before, stored()),
        ErrorKind::Conflict,
        "has changed since it was read for the repair",
    );
    assert_eq!(log.salvage().unwrap().lines.len(), 4);

    let before = log.salvage().unwrap();
    let repaired = log.repair(&before, stored()).unwrap();
    assert_eq!(names(&repaired.lines), ["step-10", "step-40"]);
    assert_eq!((repaired.gone, repaired.set_aside), (vec![state(20), sampler(30)], 1));
    let read = log.read().unwrap();
    assert_eq!((&read.lines, &read.torn), (&repaired.lines, &None));
    assert_eq!(read.lines[0].data_consumed, Some(320));
    assert_eq!(read.lines[0].extra_json("note").unwrap(), note.replace('é', "\\u00e9"));
    let aside = String::from_utf8(folder.aside()).unwrap();
    assert_eq!(aside, format!("{{\"na\nbad\n{}\n{}\n", state(20).to_json(), sampler(30).to_json()));

    // Done twice it changes nothing.
    let text = folder.text();
    log.repair(&log.salvage().unwrap(), stored()).unwrap();
    assert_eq!((folder.text(), folder.aside().len()), (text, aside.len()));
    // And it makes a log where there was none.
    let folder = Folder::new();
    let before = folder.log().salvage().unwrap();
    folder.log().repair(&before, stored()).unwrap();
    assert_eq!(names(&folder.log().read().unwrap().lines), ["step-10", "step-40"]);
}

#[test]
fn a_rewrite_is_one_step() {
    let folder = Folder::holding(format!("{}\nhalf", state(1).to_json()));
    let open = File::open(folder.log().path()).unwrap();
    // What a rewrite that was killed left.
    fs::write(
        folder.0.path().join("checkpoints.jsonl.tmp"),
        "garbage that is longer than the new contents".repeat(20),
    )
    .unwrap();
    folder.log().rewrite(&[state(2)]).unwrap();
    assert_eq!(folder.text(), format!("{}\n", state(2).to_json()));
    assert_eq!(folder.aside(), b"half\n");
    // Whoever had the old file open still reads the old contents.
    assert_eq!(std::io::read_to_string(open).unwrap(), format!("{}\nhalf", state(1).to_json()));
    let files: BTreeSet<PathBuf> =
        fs::read_dir(folder.0.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let wanted = ["", ".lock", ".torn"].map(|end| folder.0.path().join(format!("checkpoints.jsonl{end}")));
    assert_eq!(files, BTreeSet::from(wanted));
    folder.log().rewrite(&[]).unwrap();
    assert_eq!(folder.log().read().unwrap(), Default::default());
}

#[test]
fn dataloader_json() {
    let folder = Folder::new();
    assert_eq!(Dataloader::read(folder.0.path()).unwrap(), None);
    let path = folder.0.path().join("dataloader.json");
    fs::write(&path, fixture("fireworks/dataloader.json")).unwrap();
    let found = Dataloader::read(folder.0.path()).unwrap().unwrap();
    assert_eq!(found.iter().collect::<Vec<_>>(), [("step-10", 320), ("step-20", 640), ("step-30", 960)]);
    assert_eq!((found.rows("step-20"), found.rows("step-21")), (Some(640), None));
    for (bytes, wanted) in [
        (&b""[..], "wanted an object at byte 0, found the end"),
        (b"{\"step-10\":320,", "wanted a key in quotes at byte 15, found the end"),
        (b"[]", "wanted an object"),
        (b"{\"step-10\":-1}", "wanted a whole number from 0 as `step-10`, found `-1`"),
        (b"{\"step-10\":1.0}", "wanted a whole number"),
        (b"{\"step-10\":null}", "wanted a whole number"),
        (b"{\"step-10\":18446744073709551616}", "wanted a whole number"),
        (
            b"{\"step-10\":{\"data_consumed\":4}}",
            "wanted a whole number from 0 as `step-10`, found `{\\\"data_consumed\\\":4}`",
        ),
        (b"{\"step-10\":1,\"step-10\":2}", "the checkpoint `step-10` comes twice"),
        (b"{\"\xff\":1}", "not UTF-8 from byte 2 on"),
        (b"{}{}", "wanted the end of the line at byte 2"),
    ] {
        fs::write(&path, bytes).unwrap();
        refused(Dataloader::read(folder.0.path()), ErrorKind::Corrupt, wanted);
    }
    fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
    refused(Dataloader::read(folder.0.path()), ErrorKind::Invalid, "has more than 1048576 bytes");
    fs::write(&path, "{}\n").unwrap();
    assert_eq!(Dataloader::read(folder.0.path()).unwrap(), Some(Dataloader::default()));
}

fn any_line() -> impl Strategy<Value = CheckpointLine> {
    let texts = prop::option::of("[ -~é\u{85}\u{2028}😀\\n\\\\]{1,12}");
    let counts = prop::option::of(any::<u64>());
    let extra = prop::collection::btree_map("x[a-zé\u{0}\"]{0,4}", any::<(f64, bool)>(), 0..4);
    (
        "[a-z0-9-é\\n]{1,8}",
        prop::array::uniform5(counts),
        prop::array::uniform5(texts),
        prop::option::of(any::<bool>()),
        extra,
    )
        .prop_map(|(name, counts, texts, flag, extra)| {
            let mut line = CheckpointLine::new(name);
            [line.step, line.data_consumed, line.raw_rows_consumed, line.batch, line.epoch] = counts;
            [line.source_job_id, line.state_path, line.sampler_path, line.base_model, line.training_shape] =
                texts;
            (line.is_final, line.rolling) = (flag, flag.map(|flag| !flag));
            extra.into_iter().fold(line, |line, (key, value)| line.with_extra(&key, value).unwrap())
        })
}

/// Bytes that look somewhat like a log.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => any_line().prop_map(|line| line.to_json().into_bytes()),
        2 => prop::collection::vec(any::<u8>(), 0..20),
        2 => prop::sample::select(vec!["\n", "{", "}", "\"name\"", ":", ",", "[", "\\", "null", "\u{feff}", "-", "\r\n", "1e9"])
            .prop_map(|text| text.as_bytes().to_vec()),
        4 => Just(b"\n".to_vec()),
        1 => Just(b"[".repeat(3000)),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lines_survive(line in any_line()) {
        let text = line.to_json();
        prop_assert!(text.is_ascii() && !text.contains(|sign: char| sign.is_ascii_control()));
        prop_assert_eq!(&CheckpointLine::parse(&text).unwrap(), &line);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(value["name"].as_str(), Some(line.name.as_str()));
        prop_assert_eq!(value.get("state_path").and_then(|path| path.as_str()), line.state_path.as_deref());
        prop_assert_eq!(value.get("batch").and_then(|batch| batch.as_u64()), line.batch);
    }

    #[test]
    fn noise_is_an_answer(bytes in noise()) {
        let folder = Folder::holding(&bytes);
        let log = folder.log();
        let before = log.salvage().unwrap();
        prop_assert_eq!(log.read().is_ok(), before.bad.is_empty());
        let _ = Dataloader::parse(&bytes);
        let _ = CheckpointLine::parse(&String::from_utf8_lossy(&bytes));
        // An append keeps every good line, and what is torn.
        log.append(&sampler(7)).unwrap();
        let after = log.salvage().unwrap();
        let mut wanted = before.lines.clone();
        wanted.push(sampler(7));
        prop_assert_eq!(&after.lines, &wanted);
        prop_assert_eq!(&after.bad, &before.bad);
        prop_assert_eq!(after.torn, None);
        let aside = before.torn.map(|torn| [torn.bytes.as_slice(), b"\n"].concat()).unwrap_or_default();
        prop_assert_eq!(folder.aside(), aside);
        // A repair with what there was makes it whole.
        log.repair(&log.salvage().unwrap(), after.lines.clone()).unwrap();
        let names: Vec<_> = after.lines.iter().map(|line| (&line.name, &line.state_path)).collect();
        let read = log.read().unwrap();
        let found: Vec<_> = read.lines.iter().map(|line| (&line.name, &line.state_path)).collect();
        prop_assert_eq!(found, names);
    }

    #[test]
    fn the_last_line_has_a_state_once_there_is_one(kinds in prop::collection::vec(0..4_u8, 1..12)) {
        let folder = Folder::new();
        let mut wanted = Vec::new();
        for (step, kind) in (0..).zip(kinds) {
            let line = match kind {
                0 => state(step),
                1 => state(step).with_sampler_path("s"),
                _ => sampler(step),
            };
            if kind == 3 {
                folder.log().rewrite(&wanted).unwrap();
            }
            folder.log().append(&line).unwrap();
            wanted.push(line);
            let found = values(&folder.text());
            let last = wanted.iter().rfind(|line| line.is_resumable());
            // The Fireworks reader: the last line.
            prop_assert_eq!(
                found.last().and_then(|line| line.get("state_path")).and_then(|path| path.as_str()),
                last.and_then(|line| line.state_path.as_deref())
            );
            // The tinker-cookbook's: the last line with the key, for both keys.
            for (key, index) in [("state_path", 0), ("sampler_path", 1)] {
                let theirs = found.iter().rfind(|line| line.get(key).is_some()).map(|line| line["batch"].clone());
                let has = |line: &&CheckpointLine| [&line.state_path, &line.sampler_path][index].is_some();
                let ours = wanted.iter().rfind(has).map(|line| serde_json::json!(line.batch));
                prop_assert_eq!(theirs, ours);
            }
            let read = folder.log().read().unwrap();
            prop_assert_eq!(read.last_resumable(), last);
            prop_assert_eq!(&read.lines, &wanted);
        }
    }
}
