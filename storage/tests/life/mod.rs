//! The life of a process that saves and prunes, its death at an operation on the store, and how another one goes on.
//!
//! Whatever happens: every acknowledged snapshot that was not given up is listed and restores bit for bit; nothing
//! else is visible but a snapshot whose commit landed, and that one restores as well; what something live needs is
//! there; numbers ascend; a new process goes on where the dead one stopped, in the middle of pruning too; and the dead
//! one, should it wake up again, commits nothing.
#![allow(unreachable_pub, reason = "a module of a test has no crate to be seen from")]
#![allow(dead_code, reason = "each test takes what it needs")]

pub mod place;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use towline_core::pipeline::Limits;
use towline_core::testing::XorCodec;
use towline_core::{
    Codec, ErrorKind, ObjectInfo, ObjectKey, Result, SnapshotId, SnapshotKind, SnapshotStore, TensorMeta,
    Weights,
};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan, Rule};
use towline_storage::{
    Prune, Pruned, Publish, RankPart, Retention, SaveTrainState, SnapshotInfo, SnapshotRepo, Wanted, Writer,
};

use crate::common::{self, key, name, session, shared, weights};
use place::Pace;

/// Where the process prunes.
pub const PRUNE: &str = "prune";
/// What the process does, in this order: a base, a delta on it, a train state, a delta on the delta, a train state of
/// two ranks, a base, a delta on it; then it prunes, and publishes another delta.
pub const STEPS: [&str; 9] = ["a", "b", "s", "c", "r", "d", "e", PRUNE, "f"];
/// What pruning gives up: all but the newest train state, the newest snapshot, and the base that this one needs.
const GOES: [&str; 4] = ["a", "b", "s", "c"];
/// What is there in the end.
const STAYS: [&str; 4] = ["r", "d", "e", "f"];
/// How often the process tries each step when the store has faults.
pub const ATTEMPTS: u32 = 4;
/// The rows of `embed` that each rank has.
const ROWS: usize = 35;

pub type Totals = BTreeMap<&'static str, u64>;

/// Tensors one after the other, so that the same seed meets the same operations in the same order. Two files for
/// each snapshot: all of their blocks have room in the queue before the store. An encoder that waited there would
/// hold the paused clock, for which the store may wait.
pub fn repo(store: Arc<dyn SnapshotStore>) -> SnapshotRepo {
    common::repo(store).with_shard_bytes(12_000).with_limits(Limits::default().with_window(1))
}

/// Publishes or saves what is called `text`.
pub async fn step(writer: &Writer, text: &str, attempts: u32) -> Result<SnapshotId> {
    let delta = async |parent: &str, codec: Arc<dyn Codec>| {
        let info = writer.repo().find(parent, Wanted::Sampler).await?;
        let publish = Publish::new(name(text), SnapshotKind::Delta, shared(text));
        writer.publish(publish.with_parent(info, shared(parent)).with_codec(codec)).await
    };
    match text {
        "s" => return Ok(writer.save_state(SaveTrainState::new(name(text), shared(text))).await?.id),
        "r" => return ranked(writer, text, attempts).await,
        "b" => delta("a", Arc::new(XorCodec)).await,
        "c" => delta("b", Arc::new(common::MaskCodec)).await,
        "e" => delta("d", Arc::new(common::MaskCodec)).await,
        "f" => delta("e", Arc::new(XorCodec)).await,
        _ => {
            let publish = Publish::new(name(text), SnapshotKind::Base, shared(text));
            let files = vec![("config.json".to_owned(), Bytes::from_static(b"{}"))];
            writer.publish(publish.with_files(files)).await
        }
    }
    .map(|reference| reference.id)
}

/// A state of two ranks. One that fails writes again.
async fn ranked(writer: &Writer, text: &str, attempts: u32) -> Result<SnapshotId> {
    let two = NonZeroU32::MIN.saturating_add(1);
    let save = writer.begin_state(SaveTrainState::ranked(name(text)), two).await?;
    let mut receipts = Vec::new();
    for rank in 0..two.get() {
        let part = part(text, rank as usize);
        let mut left = attempts;
        receipts.push(loop {
            left -= 1;
            match writer.repo().write_rank(save.ticket(), rank, &part).await {
                Err(_) if left > 0 => {}
                receipt => break receipt?,
            }
        });
    }
    Ok(save.commit(&receipts, Duration::ZERO).await?.id)
}

/// Half of `embed`, and every other tensor whole.
fn part(text: &str, rank: usize) -> RankPart {
    let mut tensors = Vec::new();
    for (number, (meta, data)) in weights(text).iter().enumerate() {
        if meta.name() == "embed" {
            let half = data.len() / 2;
            let rows = TensorMeta::new("embed", meta.dtype(), [ROWS, 32]).unwrap();
            tensors.push((rows, data.slice(rank * half..(rank + 1) * half)));
        } else if number % 2 == rank {
            tensors.push((meta.clone(), data.clone()));
        }
    }
    let source = Arc::new(Weights::new(tensors).unwrap());
    RankPart::new(source).with_box("embed", "embed", [2 * ROWS, 32], [rank * ROWS, 0])
}

/// Keeps one train state and one snapshot, and waits for nobody.
pub async fn prune(repo: &SnapshotRepo) -> Result<Pruned> {
    let retention = Retention::new().with_last_states(1)?.with_last_snapshots(1)?;
    let pruned = repo.prune(&Prune::new(retention).with_grace(Duration::ZERO)).await?;
    for info in pruned.given_up.iter().chain(&pruned.deleted) {
        assert!(GOES.contains(&info.name.as_str()), "{} was given up", info.id);
    }
    Ok(pruned)
}

/// What came of a process.
#[derive(Debug, Default)]
pub struct Life {
    pub writer: Option<Writer>,
    /// What it was told is there, or has seen to be there, in order: name, and all that identifies it.
    pub acknowledged: Vec<(String, String)>,
    /// Whether it has begun to prune.
    pub pruning: bool,
    /// Whether it has pruned.
    pub pruned: bool,
}

/// A snapshot with its weights.
pub fn told(id: &SnapshotId) -> String {
    format!("{} {}", id.identity, id.digest)
}

/// Opens the job and goes through the steps until it is done, dead or out of attempts.
pub async fn live(process: &FaultStore, attempts: u32, pace: &Pace) -> Life {
    let repo = repo(Arc::new(process.clone())).with_deadline(pace.deadline);
    let mut life = Life::default();
    for _ in 0..attempts {
        life.writer = repo.writer(session(1)).await.ok();
        if life.writer.is_some() {
            break;
        }
    }
    let Some(writer) = &life.writer else { return life };
    for text in STEPS {
        life.pruning |= text == PRUNE;
        let mut done = false;
        for _ in 0..attempts {
            if text == PRUNE {
                life.pruned = prune(&repo).await.is_ok();
                done = life.pruned;
            } else {
                let id = match step(writer, text, attempts).await {
                    Ok(id) => Some(id),
                    // As a trainer does: an error may have come behind the commit, so that it looks first.
                    Err(_) => repo.find(text, Wanted::Any).await.ok().map(|info| info.id),
                };
                done = id.is_some();
                life.acknowledged.extend(id.map(|id| (text.to_owned(), told(&id))));
            }
            if done {
                break;
            }
        }
        if !done {
            break;
        }
    }
    life
}

/// The weights of a snapshot or train state.
pub async fn read(repo: &SnapshotRepo, info: &SnapshotInfo) -> Result<Weights> {
    match info.kind {
        SnapshotKind::State => Ok(repo.load_state(info).await?.tensors),
        _ => repo.restore(info).await,
    }
}

async fn objects(store: &Arc<dyn SnapshotStore>) -> Vec<ObjectInfo> {
    store.list(Some(&key("job"))).try_collect().await.unwrap()
}

fn folder(info: &SnapshotInfo) -> ObjectKey {
    key("job").join(info.dir.as_str()).unwrap()
}

/// Every snapshot is whole, and numbers ascend.
async fn check(repo: &SnapshotRepo, store: &Arc<dyn SnapshotStore>, listed: &[SnapshotInfo]) {
    assert!(listed.iter().map(|info| info.seq).is_sorted_by(|left, right| left < right), "{listed:?}");
    let objects = objects(store).await;
    for info in listed {
        assert_eq!(read(repo, info).await.unwrap(), weights(info.name.as_str()), "{}", info.id);
        repo.verify(info).await.unwrap();
        let manifest = repo.manifest(info).await.unwrap();
        let folder = folder(info);
        let found: BTreeSet<_> =
            objects.iter().map(|object| &object.key).filter(|key| key.is_under(&folder)).collect();
        let wanted = manifest.files.iter().map(|file| file.path.as_str()).chain(["manifest.json"]);
        let wanted: Vec<_> = wanted.map(|path| folder.join(path).unwrap()).collect();
        let wanted: BTreeSet<_> = wanted.iter().collect();
        assert!(found.is_superset(&wanted), "{}: {wanted:?} of {found:?}", info.id);
        // A rank that wrote twice may have died before it took its first attempt away.
        let again = |key: &&ObjectKey| info.name.as_str() == "r" && key.as_str().contains("/rank-");
        assert!(found.difference(&wanted).all(again), "{}: {wanted:?} in {found:?}", info.id);
    }
}

/// What another process has found.
#[derive(Debug, Default, Clone, Copy)]
pub struct Found {
    /// Visible and not acknowledged.
    pub extra: u64,
    /// Given up by the dead process, and deleted by this one.
    pub swept: u64,
    /// Folders that were never committed, deleted by this one.
    pub orphans: u64,
}

/// Another process goes on after `life`, of which `process` was the store, if it lives on.
pub async fn recover(
    store: &Arc<dyn SnapshotStore>,
    life: &Life,
    process: Option<&FaultStore>,
    pace: &Pace,
) -> Found {
    let repo = repo(Arc::clone(store)).with_deadline(Duration::from_secs(60));
    let writer = repo.writer(session(1)).await.unwrap();
    let listed = repo.list().await.unwrap();
    check(&repo, store, &listed).await;
    let names: Vec<_> = listed.iter().map(|info| info.name.as_str()).collect();
    // Giving up is one step: all of it has happened, or nothing.
    let pruned = life.pruned || life.pruning && !names.contains(&"a");
    let published = STEPS.map(|text| if text == PRUNE { "" } else { text });
    let possible = if pruned { &STAYS[..] } else { &published[..7] };
    assert!(possible.starts_with(&names), "{names:?}, pruning: {}, pruned: {}", life.pruning, life.pruned);
    let mut wanted: Vec<_> = life.acknowledged.iter().collect();
    wanted.retain(|(text, _)| !pruned || STAYS.contains(&text.as_str()));
    let found: Vec<_> = listed.iter().map(|info| (info.name.to_string(), told(&info.id))).collect();
    assert!(
        found.iter().collect::<Vec<_>>().starts_with(&wanted),
        "acknowledged {wanted:?}, listed {found:?}"
    );

    if let (Some(process), Some(old)) = (process, &life.writer) {
        zombie(process, old, pace).await;
    }

    let mut finished = Found { extra: (listed.len() - wanted.len()) as u64, ..Found::default() };
    for text in STEPS {
        if text == PRUNE {
            let second = prune(&repo).await.unwrap();
            assert_eq!(second.given_up.len(), if pruned { 0 } else { GOES.len() }, "{second:?}");
            assert!(second.waiting.is_empty(), "{second:?}");
            finished.swept = if pruned { second.deleted.len() as u64 } else { 0 };
            finished.orphans = second.orphans.len() as u64;
            continue;
        }
        if pruned && GOES.contains(&text) {
            continue;
        }
        match step(&writer, text, 1).await {
            Ok(_) => assert!(!names.contains(&text), "{text} was published twice"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error:?}");
                assert!(names.contains(&text), "{text} is not there: {error:?}");
            }
        }
    }
    // Whatever was late has landed by now.
    tokio::time::sleep(pace.settle).await;
    let last = prune(&repo).await.unwrap();
    assert!(last.given_up.is_empty() && last.deleted.is_empty() && last.waiting.is_empty(), "{last:?}");
    finished.orphans += last.orphans.len() as u64;
    let all = repo.list().await.unwrap();
    assert_eq!(all.iter().map(|info| info.name.as_str()).collect::<Vec<_>>(), STAYS);
    assert!(listed.iter().all(|info| GOES.contains(&info.name.as_str()) || all.contains(info)));
    check(&repo, store, &all).await;
    // Pruning went to its end: nothing is left but what is live.
    let live: Vec<_> = all.iter().map(folder).chain([key("job/head.json"), key("job/clock")]).collect();
    for object in objects(store).await {
        let known = live.iter().any(|key| object.key == *key || object.key.is_under(key));
        assert!(known, "`{}` is nobody's", object.key);
    }
    finished
}

/// The old process was only thought dead. Its own name for a snapshot is free: nothing but the fence keeps it off.
async fn zombie(process: &FaultStore, old: &Writer, pace: &Pace) {
    process.revive();
    let publish = Publish::new(name("zombie"), SnapshotKind::Base, shared("zombie"));
    let error = old.publish(publish).await.unwrap_err();
    // A real store may be slow beyond the deadline by itself.
    let faults = process.injected().iter().any(|line| !line.contains(": dead "));
    let excused = faults || !pace.paused && error.is_retryable();
    assert!(excused || error.kind() == ErrorKind::Fenced, "{error:?}");
}

/// Crash point `index`: operation 1 before, 1 after, 2 before, …
pub fn crash(process: &FaultStore, index: u64) -> String {
    let number = index / 2 + 1;
    if index.is_multiple_of(2) {
        process.crash_before(number);
        format!("a crash before operation {number}")
    } else {
        process.crash_after(number);
        format!("a crash after operation {number}")
    }
}

/// Everything that can go wrong, more of it for some seeds than for others.
pub fn faults(seed: u64, pace: &Pace) -> Plan {
    let often = [1, 3, 8, 20][(seed / 2 % 4) as usize];
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
    for time in [Duration::from_millis(1), Duration::from_millis(40), pace.slow] {
        plan = plan.with(Rule::new(Fault::Late(time), 5 * often));
        plan = plan.with(Rule::new(Fault::Delay(time), often));
    }
    plan.with(Rule::new(Fault::Burst(5), often)).with(Rule::new(Fault::Hang, often))
}

/// Reads that lie about bytes, those of the head as well.
pub fn damage(plan: Plan, per_mille: u64) -> Plan {
    let lies = [Fault::FlipBit, Fault::Truncate];
    lies.into_iter().fold(plan, |plan, fault| plan.with(Rule::new(fault, per_mille)))
}

/// Reads everything with damage alone: the right bytes, or `Corrupt`.
async fn damaged_reads(inner: Arc<dyn SnapshotStore>, seed: u64) -> Totals {
    let store = FaultStore::new(inner, damage(Plan::new(!seed), 20));
    let repo = repo(Arc::new(store.clone()));
    let mut totals = Totals::new();
    let listed = match repo.list().await {
        Ok(listed) => listed,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?} by {:?}", store.injected());
            totals.insert("corrupt heads", 1);
            Vec::new()
        }
    };
    for info in listed {
        let before = store.injected().len();
        let outcome = read(&repo, &info).await;
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

/// One whole case: a life among the faults of `seed` that ends at crash point `point`, and what follows it.
pub async fn among_faults(store: Arc<dyn SnapshotStore>, seed: u64, point: u64, pace: &Pace) -> Totals {
    let process = FaultStore::new(Arc::clone(&store), damage(faults(seed, pace), 10));
    let _told = Told(format!("seed {seed}: {}", crash(&process, point)));
    let life = live(&process, ATTEMPTS, pace).await;
    let died = process.dead();
    let injected = process.injected().len() as u64 - u64::from(died);
    let found = recover(&store, &life, Some(&process), pace).await;
    let mut totals = damaged_reads(store, seed).await;
    totals.extend([
        ("lives", 1),
        ("died", u64::from(died)),
        ("died pruning", u64::from(died && life.pruning && !life.pruned)),
        ("faults", injected),
        ("acknowledged", life.acknowledged.len() as u64),
        ("committed, not acknowledged", found.extra),
        ("given up before, deleted after", found.swept),
        ("orphans", found.orphans),
    ]);
    totals
}

/// Says which case it was if it fails.
pub struct Told<T: Display>(pub T);

impl<T: Display> Drop for Told<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in {}", self.0);
        }
    }
}
