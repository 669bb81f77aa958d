//! A job under several writers, readers, pruning and jumps of the store's clock: operations drawn at random run against
//! a real repo and against a model of it, and after each of them both agree.
//!
//! `TOWLINE_MODEL_CASES` (default 64) says how many runs of 30 to 60 operations.

#[path = "../common/mod.rs"]
mod common;
mod rules;

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::clocked::Clocked;
use common::{key, name, noise, session};
use futures_util::TryStreamExt as _;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rules::{Deleted, Entry, HOUR, MINUTE, Model, Policy};
use towline_core::testing::XorCodec;
use towline_core::{
    DType, ErrorKind, ObjectInfo, ObjectKey, Result, SnapshotKind, SnapshotStore, TensorMeta, Version,
    Weights,
};
use towline_storage::{
    Best, Lease, Memory, Metric, Prune, Publish, RankPart, RankReceipt, RankedSave, Retention,
    SaveTrainState, SnapshotInfo, SnapshotRepo, Wanted, Writer,
};

const OPERATIONS: RangeInclusive<usize> = 30..=60;
const NAMES: u8 = 12;

/// Numbers that choose among what there is: `u8` of a list, modulo its length.
#[derive(Debug, Clone)]
enum Op {
    /// What the others shrink to.
    Nothing,
    /// A new writer fences the others.
    Open(u8),
    Base(Save),
    /// On a snapshot that is live, or on one that was.
    Delta(Save, u8, bool),
    /// With what it shares tensors with, and whether that is gone.
    State(Save, Option<(u8, bool)>),
    Begin(Save),
    /// One rank writes, or both.
    Rank(u8, Option<bool>),
    /// With receipts or without, of all ranks or of those that have written.
    Commit(u8, bool, bool),
    Ttl(u8, Option<u8>),
    Pin(u8, u8),
    Unpin(u8),
    Delete(u8),
    /// For so many times ten minutes.
    Lease(u8, u8),
    Renew(u8),
    Release(u8),
    /// With a grace of so many hours.
    Prune(Policy, i64),
    /// By so many times ten minutes.
    Clock(i16),
    /// Anything that ever was there.
    Read(u8),
    /// A call of a writer that was fenced.
    Zombie(u8, u8),
}

#[derive(Debug, Clone)]
struct Save {
    name: u8,
    hours: Option<u8>,
    step: Option<u64>,
    metric: Option<i8>,
}

fn save() -> impl Strategy<Value = Save> {
    let rarely = prop::option::weighted(0.3, 1u8..30);
    let (step, metric) = (prop::option::of(0u64..9), prop::option::of(-2i8..3));
    (0..NAMES, rarely, step, metric).prop_map(|(name, hours, step, metric)| Save {
        name,
        hours,
        step,
        metric,
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    let count = || prop::option::of(1usize..4);
    let best = prop::option::weighted(0.3, (1usize..3, any::<bool>()));
    (count(), count(), prop::option::weighted(0.3, 2u64..5), best).prop_map(
        |(last_states, last_snapshots, every, best)| Policy { last_states, last_snapshots, every, best },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let pick = any::<u8>;
    prop_oneof![
        1 => Just(Op::Nothing),
        1 => (1u8..3).prop_map(Op::Open),
        8 => save().prop_map(Op::Base),
        12 => (save(), pick(), prop::bool::weighted(0.1)).prop_map(|(save, at, dead)| Op::Delta(save, at, dead)),
        6 => (save(), prop::option::of((pick(), prop::bool::weighted(0.1)))).prop_map(|(save, with)| Op::State(save, with)),
        6 => save().prop_map(Op::Begin),
        8 => (pick(), prop::option::of(any::<bool>())).prop_map(|(at, rank)| Op::Rank(at, rank)),
        4 => (pick(), any::<bool>(), any::<bool>()).prop_map(|(at, receipts, all)| Op::Commit(at, receipts, all)),
        3 => (pick(), prop::option::of(1u8..30)).prop_map(|(at, hours)| Op::Ttl(at, hours)),
        2 => (pick(), 0u8..3).prop_map(|(at, pin)| Op::Pin(at, pin)),
        2 => (0u8..3).prop_map(Op::Unpin),
        4 => pick().prop_map(Op::Delete),
        4 => (pick(), prop_oneof![1u8..12, 1u8..200]).prop_map(|(at, time)| Op::Lease(at, time)),
        4 => pick().prop_map(Op::Renew),
        2 => pick().prop_map(Op::Release),
        8 => (policy(), prop::sample::select(vec![0i64, 1, 12, 24])).prop_map(|(policy, grace)| Op::Prune(policy, grace)),
        9 => prop_oneof![2 => -6i16..12, 1 => -40i16..160].prop_map(Op::Clock),
        6 => pick().prop_map(Op::Read),
        3 => (pick(), 0u8..4).prop_map(|(at, what)| Op::Zombie(at, what)),
    ]
}

#[test]
fn the_repo_and_its_model_agree() {
    let cases = std::env::var("TOWLINE_MODEL_CASES").map_or(64, |cases| cases.parse().unwrap());
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let started = Instant::now();
    let counts = std::cell::RefCell::new(BTreeMap::<&str, u64>::new());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let outcome = TestRunner::new(config).run(&prop::collection::vec(op(), OPERATIONS), |ops| {
        for (what, count) in runtime.block_on(run(&ops)) {
            *counts.borrow_mut().entry(what).or_default() += count;
        }
        Ok(())
    });
    let counts = counts.into_inner();
    let seconds = started.elapsed().as_secs_f64();
    let figures = serde_json::json!({"cases": cases, "totals": counts, "seconds": seconds});
    println!("{figures}");
    outcome.unwrap();
    println!("crash-matrix: {figures}");
    if cases >= 64 {
        for what in [
            "given up",
            "deleted",
            "fenced",
            "orphans",
            "committed by ranks",
            "read when given up",
            "states that share",
            "refused to delete",
            "expired instead",
            "deleted by name",
        ] {
            assert!(counts.get(what) > Some(&5), "{what}: {counts:?}");
        }
    }
}

fn weights(text: &str) -> Arc<Weights> {
    let tensor = |part: &str, seed: &str, rows: usize| {
        (TensorMeta::new(part, DType::F32, [rows, 8]).unwrap(), noise(&format!("{part} {seed}"), rows * 32))
    };
    let (a, b) = (tensor("a", text, 5), tensor("b", "same", 3));
    Arc::new(Weights::new([a, b, tensor("c", text, 2), tensor("d", "same", 1)]).unwrap())
}

/// Its half of the rows of each tensor; of `d` the second one has all.
fn part(text: &str, second: bool) -> RankPart {
    let weights = weights(text);
    let mut boxes = Vec::new();
    let tensors: Vec<_> = weights
        .iter()
        .map(|(meta, data)| {
            let half = meta.shape()[0] / 2;
            let rows = if second { half..meta.shape()[0] } else { 0..half };
            boxes.push((meta.clone(), rows.start));
            let meta = TensorMeta::new(meta.name(), meta.dtype(), [rows.len(), 8]).unwrap();
            (meta, data.slice(rows.start * 32..rows.end * 32))
        })
        .collect();
    let part = RankPart::new(Arc::new(Weights::new(tensors).unwrap()));
    boxes
        .into_iter()
        .fold(part, |part, (meta, start)| part.with_box(meta.name(), meta.name(), meta.shape(), [start, 0]))
}

fn ms(time: i64) -> Duration {
    Duration::from_millis(time.unsigned_abs())
}

fn hours(count: Option<u8>) -> Option<Duration> {
    count.map(|count| ms(i64::from(count) * HOUR))
}

fn at<T>(list: &[T], pick: u8) -> Option<usize> {
    usize::from(pick).checked_rem(list.len())
}

/// The boxes that are the same in all states that one process has written, and in all of two ranks.
const ALONE: [&str; 2] = ["b", "d"];
const RANKED: [&str; 3] = ["first half of b", "second half of b", "d"];

/// A snapshot that was published at some time.
struct Record {
    info: SnapshotInfo,
    /// What its weights are made from.
    text: String,
    files: Vec<(ObjectKey, Version)>,
    /// For a train state: whose folder has which of the boxes that are the same in all of them.
    origins: BTreeMap<&'static str, u64>,
}

/// A state that was begun.
struct Begun<'a> {
    /// `None` once it was committed, or tried to.
    save: Option<RankedSave<'a>>,
    what: Save,
    writer: usize,
    seq: u64,
    dir: String,
    text: String,
    receipts: BTreeMap<u32, RankReceipt>,
    /// Somebody pruned when it was not to be committed any more: its files may be gone.
    doomed: bool,
}

struct Run<'a> {
    store: Arc<Clocked>,
    repo: SnapshotRepo,
    model: Model,
    writers: &'a [OnceCell<Writer>],
    /// The sessions of the writers, the last of which may write.
    sessions: Vec<u8>,
    records: BTreeMap<u64, Record>,
    begun: Vec<Begun<'a>>,
    leases: Vec<(usize, i64, Option<Lease>)>,
    texts: u64,
    last_seq: u64,
    counts: BTreeMap<&'static str, u64>,
}

async fn run(ops: &[Op]) -> BTreeMap<&'static str, u64> {
    let writers: Vec<_> = (0..=ops.len()).map(|_| OnceCell::new()).collect();
    let store = Clocked::new(Arc::new(Memory::new()));
    let mut run = Run {
        repo: common::repo(Arc::<Clocked>::clone(&store)).with_shard_bytes(200),
        store,
        model: Model::default(),
        writers: &writers,
        sessions: Vec::new(),
        records: BTreeMap::new(),
        begun: Vec::new(),
        leases: Vec::new(),
        texts: 0,
        last_seq: 0,
        counts: BTreeMap::new(),
    };
    run.open(1).await;
    for op in ops {
        run.step(op).await;
        run.check().await;
    }
    for seq in run.model.live.keys() {
        run.read(*seq).await.unwrap();
    }
    run.counts
}

impl<'a> Run<'a> {
    fn count(&mut self, what: &'static str, times: usize) {
        *self.counts.entry(what).or_default() += times as u64;
    }

    async fn step(&mut self, op: &Op) {
        match op {
            Op::Nothing => {}
            Op::Open(session) => self.open(*session).await,
            Op::Base(save) => self.publish(save, None).await,
            Op::Delta(save, pick, dead) => {
                if let Some(parent) = self.pick(*pick, false, *dead) {
                    self.publish(save, Some(parent)).await;
                }
            }
            Op::State(save, with) => {
                let shared = with.and_then(|(pick, dead)| self.pick(pick, true, dead));
                self.save_state(save, shared).await;
            }
            Op::Begin(save) => self.begin(save).await,
            Op::Rank(pick, second) => self.rank(*pick, *second).await,
            Op::Commit(pick, receipts, all) => self.commit(*pick, *receipts, *all).await,
            Op::Ttl(pick, time) => {
                if let Some(seq) = self.ever(*pick) {
                    self.ttl(seq, *time).await;
                }
            }
            Op::Pin(pick, pin) => {
                if let Some(seq) = self.ever(*pick) {
                    let pin = format!("pin-{pin}");
                    let pinned = self.repo.pin(&self.records[&seq].info, &pin, "").await;
                    if self.expect_live(seq, pinned).is_some() {
                        self.model.pins.insert(pin, seq);
                    }
                }
            }
            Op::Unpin(pin) => {
                let pin = format!("pin-{pin}");
                self.repo.unpin(&pin).await.unwrap();
                self.model.pins.remove(&pin);
            }
            Op::Delete(pick) => {
                if let Some(seq) = self.ever(*pick) {
                    self.delete(seq).await;
                }
            }
            Op::Lease(pick, tens) => {
                if let Some(seq) = self.ever(*pick) {
                    let time = i64::from(*tens) * 10 * MINUTE;
                    let lease = self.repo.lease(&self.records[&seq].info, ms(time)).await;
                    if let Some(lease) = self.expect_live(seq, lease) {
                        let number = self.leases.len();
                        self.leases.push((number, time, Some(lease)));
                        self.model.lease(number, seq, time);
                    }
                }
            }
            Op::Renew(pick) => {
                if let Some(place) = at(&self.leases, *pick)
                    && let (number, time, Some(lease)) = &self.leases[place]
                {
                    let seq = lease.info().seq;
                    // Whoever has found it before may hold it longer, and is told that it was given up.
                    self.model.lease(*number, seq, *time);
                    let renewed = lease.renew().await;
                    self.expect_live(seq, renewed);
                }
            }
            Op::Release(pick) => {
                if let Some(place) = at(&self.leases, *pick)
                    && let Some(lease) = self.leases[place].2.take()
                {
                    lease.release().await.unwrap();
                    self.model.leases.remove(&place);
                }
            }
            Op::Prune(policy, grace) => self.prune(policy, grace * HOUR).await,
            Op::Clock(tens) => {
                let time = i64::from(*tens) * 10 * MINUTE;
                self.model.now += time;
                if time < 0 { self.store.earlier(ms(time)) } else { self.store.later(ms(time)) }
            }
            Op::Read(pick) => {
                if let Some(seq) = self.ever(*pick) {
                    self.reader(seq).await;
                }
            }
            Op::Zombie(pick, what) => self.zombie(*pick, *what).await,
        }
    }

    /// The number of something that is or was there.
    fn ever(&self, pick: u8) -> Option<u64> {
        let all: Vec<_> = self.records.keys().copied().collect();
        at(&all, pick).map(|place| all[place])
    }

    /// A train state or a snapshot for samplers, live or given up.
    fn pick(&self, pick: u8, state: bool, dead: bool) -> Option<u64> {
        let is_it = |record: &&Record| {
            (record.info.kind == SnapshotKind::State) == state
                && self.model.live.contains_key(&record.info.seq) != dead
        };
        let all: Vec<_> = self.records.values().filter(is_it).map(|record| record.info.seq).collect();
        at(&all, pick).map(|place| all[place])
    }

    /// `Ok` for what is live, and `NotFound` for the rest.
    fn expect_live<T>(&self, seq: u64, outcome: Result<T>) -> Option<T> {
        match outcome {
            Ok(value) => {
                assert!(self.model.live.contains_key(&seq), "number {seq} was given up");
                Some(value)
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
                assert!(!self.model.live.contains_key(&seq), "number {seq} is live: {error:?}");
                None
            }
        }
    }

    async fn open(&mut self, number: u8) {
        let writer = self.repo.writer(session(number)).await.unwrap();
        self.writers[self.sessions.len()].set(writer).unwrap();
        self.sessions.push(number);
        self.model.pending.clear();
    }

    fn writer(&self) -> (&'a Writer, u8) {
        (self.writers[self.sessions.len() - 1].get().unwrap(), *self.sessions.last().unwrap())
    }

    /// Weights that nothing had before.
    fn text(&mut self) -> String {
        self.texts += 1;
        format!("weights {}", self.texts)
    }

    fn publishing(&self, save: &Save, parent: Option<u64>, text: &str) -> Publish {
        let kind = if parent.is_some() { SnapshotKind::Delta } else { SnapshotKind::Base };
        let mut publish =
            Publish::new(name(&format!("n{}", save.name)), kind, weights(text)).with_ttl(hours(save.hours));
        if let Some(parent) = parent {
            let record = &self.records[&parent];
            publish = publish.with_parent(record.info.clone(), weights(&record.text));
            publish = publish.with_codec(Arc::new(XorCodec));
        }
        if let Some(step) = save.step {
            publish = publish.with_step(step);
        }
        match save.metric {
            Some(metric) => publish.with_metric("m", Metric::new(f64::from(metric)).unwrap()),
            None => publish,
        }
    }

    fn saving(&self, save: &Save, tensors: Arc<Weights>) -> SaveTrainState {
        let mut state =
            SaveTrainState::new(name(&format!("n{}", save.name)), tensors).with_ttl(hours(save.hours));
        if let Some(step) = save.step {
            state = state.with_step(step);
        }
        match save.metric {
            Some(metric) => state.with_metric("m", Metric::new(f64::from(metric)).unwrap()),
            None => state,
        }
    }

    async fn publish(&mut self, save: &Save, parent: Option<u64>) {
        let (writer, session) = self.writer();
        let text = self.text();
        let published = writer.publish(self.publishing(save, parent, &text)).await;
        let taken = self.model.taken(false, &format!("n{}", save.name), session);
        let parentless = parent.is_some_and(|parent| !self.model.live.contains_key(&parent));
        match published {
            Ok(reference) => {
                assert!(!taken && !parentless, "{save:?} on {parent:?}");
                let found = self.repo.find(reference.id.identity.as_str(), Wanted::Sampler).await.unwrap();
                self.added(found, save, session, parent.into_iter().collect(), text).await;
            }
            Err(error) => {
                let wanted = if taken { ErrorKind::AlreadyExists } else { ErrorKind::NotFound };
                assert!((taken || parentless) && error.kind() == wanted, "{error:?}");
            }
        }
    }

    async fn save_state(&mut self, save: &Save, shared: Option<u64>) {
        let (writer, session) = self.writer();
        let text = self.text();
        let mut state = self.saving(save, weights(&text));
        if let Some(shared) = shared {
            state = state.with_shared(self.records[&shared].info.clone());
        }
        let saved = writer.save_state(state).await;
        let taken = self.model.taken(true, &format!("n{}", save.name), session);
        let gone = shared.is_some_and(|shared| !self.model.live.contains_key(&shared));
        match saved {
            Ok(info) => {
                assert!(!taken && !gone, "{save:?} with {shared:?}");
                let there = shared.map(|shared| &self.records[&shared].origins);
                let origin = |what| there.and_then(|there| there.get(what)).copied().unwrap_or(info.seq);
                let origins: BTreeMap<_, _> = ALONE.map(|what| (what, origin(what))).into();
                let needs: BTreeSet<_> = origins.values().copied().filter(|seq| *seq != info.seq).collect();
                let folders = needs.iter().map(|seq| self.records[seq].info.dir.clone()).collect();
                assert_eq!(info.shares, folders, "{save:?} with {shared:?}");
                self.count("states that share", usize::from(!needs.is_empty()));
                let seq = info.seq;
                self.added(info, save, session, needs, text).await;
                self.records.get_mut(&seq).unwrap().origins = origins;
            }
            Err(error) => {
                let wanted = if taken { ErrorKind::AlreadyExists } else { ErrorKind::NotFound };
                assert!((taken || gone) && error.kind() == wanted, "{error:?}");
            }
        }
    }

    async fn added(
        &mut self,
        info: SnapshotInfo,
        save: &Save,
        session: u8,
        needs: BTreeSet<u64>,
        text: String,
    ) {
        let seq = info.seq;
        // A state's number is as old as its beginning.
        assert!(seq > self.last_seq || self.begun.iter().any(|begun| begun.seq == seq), "{info:?}");
        self.last_seq = self.last_seq.max(seq);
        let entry = Entry {
            seq,
            name: info.name.to_string(),
            state: info.kind == SnapshotKind::State,
            session,
            needs,
            expires: save.hours.map(|hours| self.model.now + i64::from(hours) * HOUR),
            step: save.step,
            metric: save.metric,
        };
        assert!(self.model.live.insert(seq, entry).is_none());
        let folder = key("job").join(info.dir.as_str()).unwrap();
        let files = self.objects(&folder).await;
        let files = files.into_iter().map(|object| (object.key, object.version)).collect();
        self.records.insert(seq, Record { info, text, files, origins: BTreeMap::new() });
        self.read(seq).await.unwrap();
    }

    async fn begin(&mut self, save: &Save) {
        let (writer, session) = self.writer();
        let begun = writer.begin_state(self.saving(save, Arc::default()), NonZeroU32::new(2).unwrap()).await;
        let taken = self.model.taken(true, &format!("n{}", save.name), session);
        match begun {
            Ok(begun) => {
                assert!(!taken, "{save:?}");
                let ticket = begun.ticket().clone();
                assert!(ticket.seq > self.last_seq);
                self.last_seq = ticket.seq;
                self.model.pending.insert(ticket.seq, self.model.now);
                let text = self.text();
                self.begun.push(Begun {
                    save: Some(begun),
                    what: save.clone(),
                    writer: self.sessions.len() - 1,
                    seq: ticket.seq,
                    dir: ticket.dir.to_string(),
                    text,
                    receipts: BTreeMap::new(),
                    doomed: false,
                });
            }
            Err(error) => assert!(taken && error.kind() == ErrorKind::AlreadyExists, "{error:?}"),
        }
    }

    /// A state whose commit nobody has tried.
    fn open_state(&self, pick: u8) -> Option<usize> {
        let open = |place: &usize| self.begun[*place].save.is_some();
        let open: Vec<_> = (0..self.begun.len()).filter(open).collect();
        at(&open, pick).map(|place| open[place])
    }

    async fn rank(&mut self, pick: u8, only: Option<bool>) {
        let Some(place) = self.open_state(pick) else { return };
        let begun = &mut self.begun[place];
        let Some(save) = &begun.save else { return };
        for second in [false, true] {
            if only.is_none_or(|only| only == second) {
                let part = part(&begun.text, second);
                let receipt = self.repo.write_rank(save.ticket(), u32::from(second), &part).await.unwrap();
                begun.receipts.insert(u32::from(second), receipt);
            }
        }
    }

    async fn commit(&mut self, pick: u8, with_receipts: bool, all: bool) {
        let Some(place) = self.open_state(pick) else { return };
        if all {
            self.rank(pick, None).await;
        }
        let Some(save) = self.begun[place].save.take() else { return };
        let begun = &self.begun[place];
        let (seq, text, what) = (begun.seq, begun.text.clone(), begun.what.clone());
        let complete = begun.receipts.len() == 2;
        let fenced = begun.writer + 1 < self.sessions.len();
        let session = self.sessions[begun.writer];
        let receipts: Vec<_> = begun.receipts.values().filter(|_| with_receipts).cloned().collect();
        let outcome = save.commit(&receipts, Duration::ZERO).await;
        let taken = self.model.taken(true, &format!("n{}", what.name), session);
        let pending = self.model.pending.contains_key(&seq);
        match outcome {
            Ok(info) => {
                assert!(complete && !fenced && !taken && pending && info.seq == seq, "{info:?}");
                self.model.pending.remove(&seq);
                self.count("committed by ranks", 1);
                self.added(info, &what, session, BTreeSet::new(), text).await;
                let origins = RANKED.map(|what| (what, seq)).into();
                self.records.get_mut(&seq).unwrap().origins = origins;
            }
            Err(error) => {
                let wanted = match (complete, fenced) {
                    (false, _) if receipts.is_empty() => ErrorKind::TimedOut,
                    (false, _) => ErrorKind::Invalid,
                    (_, true) => ErrorKind::Fenced,
                    _ if taken => ErrorKind::AlreadyExists,
                    _ => ErrorKind::Conflict,
                };
                let missing = if with_receipts { ErrorKind::NotFound } else { ErrorKind::TimedOut };
                let swept = begun.doomed && error.kind() == missing;
                assert!(swept || error.kind() == wanted, "wanted {wanted}: {error:?}");
                assert!(!complete || fenced || taken || !pending, "{error:?}");
                self.count("fenced", usize::from(error.kind() == ErrorKind::Fenced));
            }
        }
    }

    async fn ttl(&mut self, seq: u64, time: Option<u8>) {
        let set = self.repo.set_ttl(&self.records[&seq].info, hours(time)).await;
        if let Some(info) = self.expect_live(seq, set) {
            let expires = time.map(|time| self.model.now + i64::from(time) * HOUR);
            self.model.live.get_mut(&seq).unwrap().expires = expires;
            self.records.get_mut(&seq).unwrap().info = info;
        }
    }

    async fn delete(&mut self, seq: u64) {
        let deleted = self.repo.delete(&self.records[&seq].info).await;
        let wanted = self.model.delete(seq);
        let found = match deleted {
            Ok(None) => Deleted::Gone,
            Ok(Some(_)) => Deleted::Expired,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Conflict, "{error:?}");
                Deleted::Refused
            }
        };
        assert_eq!(found, wanted, "number {seq}");
        if found == Deleted::Expired {
            let listed = self.repo.list().await.unwrap();
            let info = listed.into_iter().find(|info| info.seq == seq).unwrap();
            self.records.get_mut(&seq).unwrap().info = info;
        }
        let what = match found {
            Deleted::Refused => "refused to delete",
            Deleted::Expired => "expired instead",
            Deleted::Gone => "deleted by name",
        };
        self.count(what, 1);
    }

    async fn prune(&mut self, policy: &Policy, grace: i64) {
        let mut retention = Retention::new();
        if let Some(count) = policy.last_states {
            retention = retention.with_last_states(count).unwrap();
        }
        if let Some(count) = policy.last_snapshots {
            retention = retention.with_last_snapshots(count).unwrap();
        }
        if let Some(steps) = policy.every {
            retention = retention.with_every_steps(steps).unwrap();
        }
        if let Some((count, highest)) = policy.best {
            retention = retention.with_best(Best::new("m", count.try_into().unwrap(), highest));
        }
        let pruned = self.repo.prune(&Prune::new(retention).with_grace(ms(grace))).await.unwrap();
        let (given_up, deleted) = self.model.prune(policy, grace);
        let seqs = |infos: &[SnapshotInfo]| infos.iter().map(|info| info.seq).collect::<Vec<_>>();
        assert_eq!(seqs(&pruned.given_up), given_up, "given up");
        assert_eq!(seqs(&pruned.deleted), deleted, "deleted");
        assert_eq!(seqs(&pruned.waiting), self.model.dead.keys().copied().collect::<Vec<_>>(), "waiting");
        let kept: Vec<_> = pruned.kept.iter().map(|(info, _)| info.seq).collect();
        assert_eq!(kept, self.model.live.keys().copied().collect::<Vec<_>>(), "kept");
        for begun in &mut self.begun {
            begun.doomed |= !self.model.pending.contains_key(&begun.seq);
        }
        for orphan in &pruned.orphans {
            assert!(!self.known(&orphan.dir), "{orphan:?}");
        }
        if grace == 0 {
            let objects = self.objects(&key("job")).await;
            let young = |dir: &str| {
                let of_it =
                    objects.iter().filter(|object| object.key.as_str().starts_with(&format!("job/{dir}/")));
                of_it.map(|object| object.modified_ms).max() > Some(pruned.now_ms)
            };
            for object in &objects {
                if let [_, class @ ("snapshots" | "states"), folder, ..] =
                    object.key.as_str().split('/').collect::<Vec<_>>()[..]
                {
                    let dir = format!("{class}/{folder}");
                    assert!(self.known(&dir) || young(&dir), "{dir} was left behind");
                }
            }
        }
        for seq in self.model.live.keys() {
            self.read(*seq).await.unwrap();
        }
        self.count("given up", given_up.len());
        self.count("deleted", deleted.len());
        self.count("orphans", pruned.orphans.len());
    }

    /// Whether a folder belongs to what is live, given up, or still being written.
    fn known(&self, dir: &str) -> bool {
        let stored = self.model.live.keys().chain(self.model.dead.keys());
        let mut stored = stored.map(|seq| self.records[seq].info.dir.as_str());
        let mut pending = self.begun.iter().filter(|begun| self.model.pending.contains_key(&begun.seq));
        stored.any(|known| known == dir) || pending.any(|begun| begun.dir == dir)
    }

    /// Reads what somebody found when it was live.
    async fn reader(&mut self, seq: u64) {
        let whole = self.model.whole(seq);
        match self.read(seq).await {
            Ok(()) => {
                assert!(whole, "number {seq} is gone");
                let dead = self.model.dead.contains_key(&seq);
                self.count(if dead { "read when given up" } else { "read" }, 1);
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
                assert!(!whole, "number {seq} is there: {error:?}");
                self.count("gone", 1);
            }
        }
    }

    /// Restores it and compares every bit.
    async fn read(&self, seq: u64) -> Result<()> {
        let record = &self.records[&seq];
        let found = match record.info.kind {
            SnapshotKind::State => self.repo.load_state(&record.info).await?.tensors,
            _ => self.repo.restore(&record.info).await?,
        };
        assert_eq!(found, *weights(&record.text), "{}", record.info.id);
        Ok(())
    }

    async fn zombie(&mut self, pick: u8, what: u8) {
        let fenced = self.sessions.len() - 1;
        let Some(place) = at(&self.sessions[..fenced], pick) else { return };
        let old = self.writers[place].get().unwrap();
        let text = self.text();
        let save = Save { name: NAMES, hours: None, step: None, metric: None };
        let live = self.model.live.values().rfind(|live| !live.state).map(|live| live.seq);
        let error = match what {
            0 => old.publish(self.publishing(&save, None, &text)).await.err(),
            1 => old.publish(self.publishing(&save, live, &text)).await.err(),
            2 => old.save_state(self.saving(&save, weights(&text))).await.err(),
            _ => old.begin_state(self.saving(&save, Arc::default()), NonZeroU32::MIN).await.err(),
        };
        assert_eq!(error.unwrap().kind(), ErrorKind::Fenced);
        self.count("fenced", 1);
    }

    async fn objects(&self, folder: &ObjectKey) -> Vec<ObjectInfo> {
        self.store.list(Some(folder)).try_collect().await.unwrap()
    }

    /// The head says what the model says, and every file of what is there is the one that was written.
    async fn check(&mut self) {
        let listed = self.repo.list().await.unwrap();
        let wanted: Vec<_> = self.model.live.keys().map(|seq| &self.records[seq].info).collect();
        assert_eq!(listed.iter().collect::<Vec<_>>(), wanted);
        for (info, entry) in listed.iter().zip(self.model.live.values()) {
            assert_eq!(info.expires_ms.is_some(), entry.expires.is_some());
            let parent = entry.needs.first().filter(|_| !entry.state);
            assert_eq!(info.parent.as_ref(), parent.map(|parent| &self.records[parent].info.id));
        }
        let pins = self.repo.pins().await.unwrap();
        let pins: BTreeMap<_, _> = pins.into_iter().map(|pin| (pin.id, pin.seq)).collect();
        assert_eq!(pins, self.model.pins);
        let objects = self.objects(&key("job")).await;
        let objects: BTreeMap<_, _> = objects.iter().map(|object| (&object.key, &object.version)).collect();
        for (seq, record) in &self.records {
            if self.model.live.contains_key(seq) || self.model.dead.contains_key(seq) {
                for (key, version) in &record.files {
                    assert_eq!(objects.get(key), Some(&version), "`{key}`");
                }
                assert!(self.model.dead.contains_key(seq) || self.model.whole(*seq));
            } else {
                let folder = key("job").join(record.info.dir.as_str()).unwrap();
                assert!(objects.keys().all(|key| !key.is_under(&folder)), "{}", record.info.id);
            }
        }
    }
}
