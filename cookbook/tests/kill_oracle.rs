//! The kill oracle: a training process is killed at random instants, saves in flight included, and started again with
//! the same command. Every life goes on from a state that was acknowledged, or whose commit had landed, and repeats
//! exactly what the undisturbed run did: the same rows, the same losses, and at the end the same weights, bit for bit.
//!
//! `TOWLINE_KILLS` is how many kills, 20 by default (`cargo xtask kill-oracle` takes 200). The training loop saves at
//! every step, so that hardly any kill meets no save.
#![cfg(unix)]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use towline_cookbook::engine::Rng;
use towline_trainer_client::CheckpointLog;

/// Steps of a run.
const STEPS: u64 = 24;
/// Kills of one run before it may come to its end.
const KILLS_A_RUN: usize = 4;
/// No life takes longer, whatever happens.
const LIFE: Duration = Duration::from_secs(120);

/// What one process told, and when.
#[derive(Debug, Default)]
struct Life {
    started: Option<Value>,
    steps: Vec<Value>,
    finished: Option<Value>,
    killed: bool,
}

/// One process of the training loop, killed after `instant` if it lives so long.
fn live(store: &Path, job: &str, log: &Path, instant: Option<Duration>) -> Life {
    let (steps, store) = (STEPS.to_string(), store.display().to_string());
    let mut child = Command::new(env!("CARGO_BIN_EXE_towline"))
        .args(["--json", "train", "--store", &store, "--job", job, "--steps", &steps, "--batch", "8"])
        .args([
            "--rows",
            "100",
            "--save-every",
            "7",
            "--rolling-every",
            "1",
            "--log",
            &log.display().to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let reader = BufReader::new(child.stdout.take().unwrap());
    let lines = std::thread::spawn(move || {
        reader
            .lines()
            .map_while(Result::ok)
            .filter_map(|line| serde_json::from_str(&line).ok())
            .collect::<Vec<Value>>()
    });
    let killed = wait(&mut child, instant);
    let mut life = Life { killed, ..Life::default() };
    for event in lines.join().unwrap() {
        match event["event"].as_str() {
            Some("started") => life.started = Some(event),
            Some("step") => life.steps.push(event),
            Some("finished") => life.finished = Some(event),
            _ => panic!("the trainer of {job} said {event}"),
        }
    }
    life
}

/// Waits for the end of `child`, or kills it at `instant`. Returns whether it was killed.
fn wait(child: &mut Child, instant: Option<Duration>) -> bool {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "the trainer failed: {status}");
            return false;
        }
        let due = instant.is_some_and(|instant| started.elapsed() >= instant);
        if due || started.elapsed() > LIFE {
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(due, "the trainer lived longer than {LIFE:?}");
            return true;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// The step of the newest state that the log knows: its save was acknowledged.
fn acknowledged(log: &Path) -> Option<u64> {
    let read = CheckpointLog::new(log).read().unwrap();
    read.last_resumable().and_then(|line| line.step)
}

#[test]
fn a_killed_run_goes_on_bit_for_bit_from_what_was_acknowledged() {
    let kills = std::env::var("TOWLINE_KILLS").map_or(20, |text| text.parse::<usize>().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let begun = Instant::now();
    let wanted = live(&store, "undisturbed", &dir.path().join("undisturbed"), None);
    let whole = begun.elapsed();
    assert_eq!(wanted.steps.len() as u64, STEPS);

    let mut rng = Rng::named(kills as u64, "instants");
    let (mut killed, mut runs, mut unacknowledged, mut early) = (0, 0, 0, 0);
    while killed < kills {
        runs += 1;
        let (job, log) = (format!("killed-{runs}"), dir.path().join(format!("killed-{runs}")));
        // The newest step that any life of this run has told.
        let mut told = 0;
        for number in 0.. {
            let known = acknowledged(&log);
            // So many kills, then a life to the end.
            let instant = (number < KILLS_A_RUN && killed < kills)
                .then(|| whole.mul_f64(rng.below(1_000_000) as f64 / 1_000_000.0));
            let life = live(&store, &job, &log, instant);
            killed += usize::from(life.killed);
            let Some(started) = &life.started else {
                assert!(life.killed && life.steps.is_empty());
                early += 1;
                continue;
            };
            let step = started["step"].as_u64().unwrap();
            match known {
                // Nothing acknowledged is lost, and what is gone on from is something that was saved.
                Some(known) => assert!(
                    (known..=told).contains(&step) && started["resumed"].is_string(),
                    "{job}: step {known} was acknowledged and {told} told, and {started} followed"
                ),
                None => assert!(step <= told, "{job}: {started}"),
            }
            unacknowledged += usize::from(known.is_some_and(|known| step > known));
            assert_eq!(started["row"], json!(8 * step), "{job}");
            let repeated = wanted.steps.iter().skip(step as usize).take(life.steps.len());
            assert!(
                repeated.eq(life.steps.iter()),
                "{job}: life {number} does not repeat the undisturbed run"
            );
            told = told.max(step + life.steps.len() as u64);
            if let Some(end) = &life.finished {
                let undisturbed = wanted.finished.as_ref().unwrap();
                assert_eq!((told, &end["digest"]), (STEPS, &undisturbed["digest"]), "{job}");
                assert_eq!(end["state"], undisturbed["state"]);
                break;
            }
            assert!(life.killed, "{job}: a life without an end");
        }
    }
    println!(
        "{killed} kills of {runs} runs in {:.1} s: {early} before the loop began, {unacknowledged} lives went on from a \
         state whose acknowledgement nobody had seen",
        begun.elapsed().as_secs_f64()
    );
    assert!(killed > early, "no kill met a training loop");
}
