//! A process that publishes dies at every operation on its store, simulated within this process: before the
//! operation, and after it with the answer unseen. Then the same with faults of all kinds on top, by seed.
//!
//! Whatever happens: every acknowledged snapshot is listed and restores bit for bit; nothing else is visible but a
//! snapshot whose commit landed, and that one restores as well; numbers ascend; a new process goes on where the dead
//! one stopped; and the dead one, should it wake up again, commits nothing.
//!
//! `TOWLINE_SEEDS` (default 50) says how many seeds, `TOWLINE_FIRST_SEED` (default 0) which one is the first, and
//! `TOWLINE_POINTS` (default 1, at most all) at how many operations each of them dies. A failure names its seed.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{MaskCodec, key, name, session, shared, weights};
use futures_util::TryStreamExt as _;
use towline_core::pipeline::Limits;
use towline_core::testing::XorCodec;
use towline_core::{Codec, ErrorKind, Result, SnapshotId, SnapshotKind, SnapshotStore};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan, Rule};
use towline_storage::{Memory, Publish, SaveTrainState, SnapshotInfo, SnapshotRepo, Wanted, Writer};

/// What the process publishes, in this order: a base, a delta on it, a train state, a delta on the delta.
const STEPS: [&str; 4] = ["a", "b", "s", "c"];
/// How often the process tries each step when the store has faults.
const ATTEMPTS: u32 = 4;
/// Longer than anything that is late or waits. The clock is paused: it costs nothing.
const LONG: Duration = Duration::from_secs(300);

type Totals = BTreeMap<&'static str, u64>;

/// Tensors one after the other, so that the same seed meets the same operations in the same order. Two files for
/// each snapshot: all of their blocks have room in the queue before the store. An encoder that waited there would
/// hold the paused clock, for which the store may wait.
fn repo(store: Arc<dyn SnapshotStore>) -> SnapshotRepo {
    common::repo(store).with_shard_bytes(12_000).with_limits(Limits::default().with_window(1))
}

async fn step(writer: &Writer, text: &str) -> Result<SnapshotId> {
    let delta = async |parent: &str, codec: Arc<dyn Codec>| {
        let info = writer.repo().find(parent, Wanted::Sampler).await?;
        let publish = Publish::new(name(text), SnapshotKind::Delta, shared(text));
        writer.publish(publish.with_parent(info, shared(parent)).with_codec(codec)).await
    };
    match text {
        "s" => return Ok(writer.save_state(SaveTrainState::new(name(text), shared(text))).await?.id),
        "b" => delta("a", Arc::new(XorCodec)).await,
        "c" => delta("b", Arc::new(MaskCodec)).await,
        _ => {
            let publish = Publish::new(name(text), SnapshotKind::Base, shared(text));
            let files = vec![("config.json".to_owned(), Bytes::from_static(b"{}"))];
            writer.publish(publish.with_files(files)).await
        }
    }
    .map(|reference| reference.id)
}

/// What came of a process.
struct Life {
    writer: Option<Writer>,
    /// What it was told is there, or has seen to be there, in order.
    acknowledged: Vec<SnapshotId>,
}

/// Opens the job and publishes until it is done, dead or out of attempts.
async fn live(process: &FaultStore, attempts: u32) -> Life {
    let repo = repo(Arc::new(process.clone()));
    let mut life = Life { writer: None, acknowledged: Vec::new() };
    for _ in 0..attempts {
        life.writer = repo.writer(session(1)).await.ok();
        if life.writer.is_some() {
            break;
        }
    }
    let Some(writer) = &life.writer else { return life };
    for text in STEPS {
        let mut done = None;
        for _ in 0..attempts {
            done = match step(writer, text).await {
                Ok(id) => Some(id),
                // As a trainer does: an error may have come behind the commit, so that it looks first.
                Err(_) => repo.find(text, Wanted::Any).await.ok().map(|info| info.id),
            };
            if done.is_some() {
                break;
            }
        }
        let Some(id) = done else { break };
        life.acknowledged.push(id);
    }
    life
}

/// Every snapshot is whole, and numbers ascend.
async fn check(repo: &SnapshotRepo, inner: &Arc<dyn SnapshotStore>, listed: &[SnapshotInfo]) {
    assert!(listed.iter().map(|info| info.seq).is_sorted_by(|left, right| left < right), "{listed:?}");
    let objects: Vec<_> = inner.list(Some(&key("job"))).try_collect().await.unwrap();
    for info in listed {
        assert_eq!(repo.restore(info).await.unwrap(), weights(info.name.as_str()), "{}", info.id);
        repo.verify(info).await.unwrap();
        let manifest = repo.manifest(info).await.unwrap();
        let folder = key("job").join(info.dir.as_str()).unwrap();
        let found: BTreeSet<_> =
            objects.iter().map(|object| &object.key).filter(|key| key.is_under(&folder)).collect();
        let wanted = manifest.files.iter().map(|file| file.path.as_str()).chain(["manifest.json"]);
        let wanted: Vec<_> = wanted.map(|path| folder.join(path).unwrap()).collect();
        assert_eq!(found, wanted.iter().collect(), "{}", info.id);
    }
}

/// Another process goes on after `life`. Returns how many snapshots were visible that were not acknowledged.
async fn recover(process: &FaultStore, life: &Life) -> u64 {
    let inner = process.inner();
    let repo = repo(Arc::clone(&inner));
    let writer = repo.writer(session(1)).await.unwrap();
    let listed = repo.list().await.unwrap();
    check(&repo, &inner, &listed).await;
    let ids: Vec<_> = listed.iter().map(|info| info.id.clone()).collect();
    assert!(ids.starts_with(&life.acknowledged), "acknowledged {:?}, listed {ids:?}", life.acknowledged);
    let names: Vec<_> = listed.iter().map(|info| info.name.as_str()).collect();
    assert!(STEPS.starts_with(&names), "{names:?}");

    // It was only thought dead. Its own name for a snapshot is free: nothing but the fence keeps it off.
    process.revive();
    if let Some(old) = &life.writer {
        let publish = Publish::new(name("zombie"), SnapshotKind::Base, shared("zombie"));
        let error = old.publish(publish).await.unwrap_err();
        let faults = process.injected().iter().any(|line| !line.contains(": dead "));
        assert!(faults || error.kind() == ErrorKind::Fenced, "{error:?}");
    }

    for text in STEPS {
        match step(&writer, text).await {
            Ok(_) => assert!(!names.contains(&text), "{text} was published twice"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error:?}");
                assert!(names.contains(&text), "{text} is not there: {error:?}");
            }
        }
    }
    // Whatever was late has landed by now.
    tokio::time::sleep(LONG).await;
    let all = repo.list().await.unwrap();
    assert!(all.starts_with(&listed));
    assert_eq!(all.iter().map(|info| info.name.as_str()).collect::<Vec<_>>(), STEPS);
    check(&repo, &inner, all.get(listed.len()..).unwrap()).await;
    (listed.len() - life.acknowledged.len()) as u64
}

/// Runs `case` for each number below `count` on a few threads, each with a paused clock, and adds up what they count.
fn on_threads<F>(count: u64, case: impl Fn(u64) -> F + Sync) -> Totals
where
    F: Future<Output = Totals>,
{
    let next = AtomicU64::new(0);
    let totals = Mutex::new(Totals::new());
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(4));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut builder = tokio::runtime::Builder::new_current_thread();
                let runtime = builder.enable_time().start_paused(true).build().unwrap();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    let counted = runtime.block_on(case(number));
                    let mut totals = totals.lock().unwrap();
                    counted.into_iter().for_each(|(what, times)| *totals.entry(what).or_default() += times);
                }
            });
        }
    });
    totals.into_inner().unwrap()
}

/// Says which case it was if it fails.
struct Told<T: Display>(T);

impl<T: Display> Drop for Told<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in {}", self.0);
        }
    }
}

fn process(plan: Plan) -> FaultStore {
    FaultStore::new(Arc::new(Memory::new()), plan)
}

/// Crash point `index`: operation 1 before, 1 after, 2 before, …
fn crash(process: &FaultStore, index: u64) -> String {
    let number = index / 2 + 1;
    if index.is_multiple_of(2) {
        process.crash_before(number);
        format!("a crash before operation {number}")
    } else {
        process.crash_after(number);
        format!("a crash after operation {number}")
    }
}

/// How many operations the undisturbed life takes.
fn count_operations() -> u64 {
    let totals = on_threads(1, async |_| {
        let process = process(Plan::default());
        assert_eq!(live(&process, 1).await.acknowledged.len(), STEPS.len());
        Totals::from([("operations", process.operations())])
    });
    totals["operations"]
}

#[test]
fn a_crash_at_every_operation() {
    let started = Instant::now();
    let operations = count_operations();
    assert!(operations > 50, "{operations} operations are fewer than a base, two deltas and a state take");
    let totals = on_threads(2 * operations, async |index| {
        let process = process(Plan::default());
        let _told = Told(crash(&process, index));
        let life = live(&process, 1).await;
        assert!(process.dead());
        let last = process.injected().pop().unwrap();
        // The head's first write opens the job.
        let commit = last.ends_with("put job/head.json: dead after it") && life.writer.is_some();
        let extra = recover(&process, &life).await;
        assert_eq!(extra, u64::from(commit), "{last}");
        Totals::from([
            ("crash points", 1),
            ("acknowledged", life.acknowledged.len() as u64),
            ("committed, not acknowledged", extra),
        ])
    });
    println!("{operations} operations: {totals:?} in {:.1} s", started.elapsed().as_secs_f32());
    assert_eq!(totals["crash points"], 2 * operations);
    // Four snapshots, each with one crash right behind its commit.
    assert_eq!(totals["committed, not acknowledged"], 4);
}

/// Everything that can go wrong, more of it for some seeds than for others.
fn faults(seed: u64) -> Plan {
    let often = [1, 3, 8, 20][(seed / 2 % 4) as usize];
    let ms = Duration::from_millis;
    let puts = [Operation::Put];
    let writes = [Operation::Put, Operation::Finish];
    let mut plan = Plan::new(seed);
    for kind in [ErrorKind::Unavailable, ErrorKind::TimedOut] {
        plan = plan.with(Rule::new(Fault::Refuse(kind), often)).with(Rule::new(Fault::Lose(kind), often));
        plan = plan.with(Rule::new(Fault::Lose(kind), 5 * often).on(&writes));
    }
    for kind in [ErrorKind::Conflict, ErrorKind::AlreadyExists] {
        plan = plan.with(Rule::new(Fault::Refuse(kind), 5 * often).on(&puts));
        plan = plan.with(Rule::new(Fault::Lose(kind), 5 * often).on(&puts));
    }
    // Some beyond the deadline of 20 s.
    for time in [ms(1), ms(40), ms(30_000)] {
        plan = plan.with(Rule::new(Fault::Late(time), 5 * often));
        plan = plan.with(Rule::new(Fault::Delay(time), often));
    }
    plan.with(Rule::new(Fault::Burst(5), often)).with(Rule::new(Fault::Hang, often))
}

/// Reads that lie about the bytes of snapshots. They spare the head, which has no digest of its own: a flipped bit
/// there may be believed.
fn damage(plan: Plan, per_mille: u64) -> Plan {
    [Fault::FlipBit, Fault::Truncate]
        .into_iter()
        .fold(plan, |plan, fault| plan.with(Rule::new(fault, per_mille).except("head.json")))
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

#[test]
fn crashes_among_faults_of_all_kinds() {
    let started = Instant::now();
    let operations = count_operations();
    let (seeds, first) = (setting("TOWLINE_SEEDS", 50), setting("TOWLINE_FIRST_SEED", 0));
    let each = setting("TOWLINE_POINTS", 1).clamp(1, 2 * operations);
    let points = Mutex::new(BTreeSet::new());
    let totals = on_threads(seeds * each, async |index| {
        let seed = first + index / each;
        let process = process(damage(faults(seed), 10));
        // One seed's points follow one another; the next seed's begin elsewhere, so that few seeds see much.
        let point = (seed * 37 + index % each) % (2 * operations);
        let _told = Told(format!("seed {seed}: {}", crash(&process, point)));
        let life = live(&process, ATTEMPTS).await;
        let died = process.dead();
        if died {
            points.lock().unwrap().insert(point);
        }
        let injected = process.injected().len() as u64 - u64::from(died);
        let extra = recover(&process, &life).await;
        let mut totals = damaged_reads(&process, seed).await;
        totals.extend([
            ("lives", 1),
            ("died", u64::from(died)),
            ("faults", injected),
            ("acknowledged", life.acknowledged.len() as u64),
            ("committed, not acknowledged", extra),
        ]);
        totals
    });
    println!(
        "{seeds} seeds, {} of {} crash points: {totals:?} in {:.1} s",
        points.lock().unwrap().len(),
        2 * operations,
        started.elapsed().as_secs_f32()
    );
    assert_eq!(totals["lives"], seeds * each);
    if seeds >= 50 {
        for what in ["died", "faults", "acknowledged", "corrupt"] {
            assert!(totals[what] > seeds / 4, "{what}: {totals:?}");
        }
        assert!(totals["right in spite of damage"] > 0, "{totals:?}");
    }
}

/// Reads everything with damage alone: the right bytes, or `Corrupt`.
async fn damaged_reads(process: &FaultStore, seed: u64) -> Totals {
    let store = FaultStore::new(process.inner(), damage(Plan::new(!seed), 20));
    let repo = repo(Arc::new(store.clone()));
    let mut totals = Totals::new();
    for info in repo.list().await.unwrap() {
        let before = store.injected().len();
        let outcome = repo.restore(&info).await;
        let hit = store.injected().len() > before;
        let what = match outcome {
            Ok(found) => {
                assert_eq!(found, weights(info.name.as_str()), "{:?}", store.injected());
                if hit { "right in spite of damage" } else { "right" }
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?} by {:?}", store.injected());
                assert!(hit, "{error:?}");
                "corrupt"
            }
        };
        *totals.entry(what).or_default() += 1;
    }
    totals
}

/// A log without the random part of folders.
fn without_write_ids(log: Vec<String>) -> Vec<String> {
    let folder = |part: &str| match part.rsplit_once('-') {
        Some((start, id)) if part.as_bytes().iter().take(8).all(u8::is_ascii_digit) && id.len() == 16 => {
            start.to_owned()
        }
        _ => part.to_owned(),
    };
    log.iter().map(|line| line.split('/').map(folder).collect::<Vec<_>>().join("/")).collect()
}

#[test]
fn the_same_seed_lives_the_same_life() {
    // What is late races with pauses of random length: the one thing that no seed decides.
    let plan = |seed| {
        let kinds = [ErrorKind::Unavailable, ErrorKind::TimedOut, ErrorKind::Conflict];
        let faults = kinds.into_iter().flat_map(|kind| [Fault::Refuse(kind), Fault::Lose(kind)]);
        let faults = faults.chain([Fault::Burst(4), Fault::Hang, Fault::Delay(Duration::from_secs(30))]);
        damage(faults.fold(Plan::new(seed), |plan, fault| plan.with(Rule::new(fault, 8))), 8)
    };
    let totals = on_threads(20, async |seed| {
        let trace = async || {
            let process = process(plan(seed));
            let life = live(&process, ATTEMPTS).await;
            (without_write_ids(process.injected()), process.operations(), life.acknowledged)
        };
        let first = trace().await;
        assert_eq!(first, trace().await, "seed {seed}");
        Totals::from([("faults", first.0.len() as u64)])
    });
    assert!(totals["faults"] > 20, "{totals:?}");
}
