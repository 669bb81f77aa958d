//! A process that publishes is killed at every operation on its store in turn. Afterwards every acknowledged
//! snapshot restores bit for bit, and nothing else is visible but a snapshot whose commit was done and whose
//! acknowledgement was cut off: it exists from the compare-and-swap of the head on, and restores as well.
//!
//! Another one, which also prunes, is killed at random instants: `TOWLINE_KILLS` (default 8) of them.
#![cfg(all(unix, feature = "local"))]

mod common;
mod life;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use common::{MaskCodec, find, key, name, repo, session, shared, weights};
use futures_util::TryStreamExt as _;
use life::place::Place;
use life::{Life, PRUNE, STEPS};
use towline_core::testing::XorCodec;
use towline_core::{
    BoxStream, Codec, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotKind, SnapshotStore,
    Version, async_trait,
};
use towline_storage::{Local, Publish, SaveTrainState, Writer};

const DIR: &str = "TOWLINE_KILL_DIR";
const STOP: &str = "TOWLINE_KILL_STOP";
/// The [`STOP`] of a child that goes through all steps and reports no operations.
const STEPPING: &str = "steps";
/// No child lives longer, whatever happens to its parent.
const LIFE: Duration = Duration::from_secs(60);

/// Where a child is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// It waits before the operation.
    Before,
    /// The operation has begun.
    Within,
    /// The operation has returned from the store, and nobody has seen the answer.
    After,
}

#[test]
fn killed_at_every_operation() {
    let started = Instant::now();
    let operations = count_operations();
    assert!(operations > 60, "{operations} operations are fewer than a base, two deltas and a state take");
    let points: Vec<_> = (1..=operations)
        .flat_map(|number| [Side::Before, Side::Within, Side::After].map(|side| (number, side)))
        .collect();
    let next = AtomicU64::new(0);
    let totals = Mutex::new(BTreeMap::<String, u64>::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(&(number, side)) = points.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let outcome = kill_at(number, side);
                    let mut totals = totals.lock().unwrap();
                    for (what, count) in outcome {
                        *totals.entry(what).or_default() += count;
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap();
    println!(
        "{operations} operations, {} kills in {:.1} s: {totals:?}",
        points.len(),
        started.elapsed().as_secs_f32()
    );
    assert!(totals["killed"] >= 2 * operations, "{totals:?}");
    assert!(totals["acknowledged"] > 0);
    // Four snapshots, each killed right behind its commit.
    assert_eq!(totals["committed, not acknowledged"], 4, "{totals:?}");
}

#[test]
fn killed_at_random_instants() {
    let started = Instant::now();
    let count: u64 = std::env::var("TOWLINE_KILLS").map_or(8, |count| count.parse().unwrap());
    let (mut span, whole) = stepping(Duration::MAX).1;
    assert!(whole.pruned && whole.acknowledged.len() + 1 == STEPS.len());
    let mut totals = BTreeMap::<&str, u64>::new();
    let mut killed = 0;
    while killed < count {
        // Spread over the whole life; a child that ends before its time is another one's turn.
        let part = (killed as f64 + fraction()) / count as f64;
        let after = span.mul_f64(part);
        let (dir, (_, life)) = stepping(after);
        let ended = life.acknowledged.len() + 1 == STEPS.len();
        killed += u64::from(!ended);
        if ended {
            // Lives are shorter than the first one was: on a machine less busy none would last until the last kills.
            span = after;
        }
        let found = Place::Local.on_threads(1, async |_| {
            let store: Arc<dyn SnapshotStore> = Arc::new(Local::open(dir.path()).unwrap());
            let found = life::recover(&store, &life, None, &Place::Local.pace()).await;
            let counts = [found.extra, found.swept, found.orphans];
            life::Totals::from_iter(FOUND.into_iter().zip(counts))
        });
        let cut = life.pruning && !life.pruned;
        let life = [("acknowledged", life.acknowledged.len() as u64), ("died pruning", u64::from(cut))];
        for (what, count) in found.into_iter().chain(life).chain([("ended before", u64::from(ended))]) {
            *totals.entry(what).or_default() += count;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    totals.insert("kills", killed);
    let figures =
        serde_json::json!({"totals": totals, "seconds": seconds, "life in ms": span.as_millis() as u64});
    println!("crash-matrix: {figures}");
}

const FOUND: [&str; 3] = ["committed, not acknowledged", "given up before, deleted after", "orphans"];

/// From 0 to 1, other each time.
fn fraction() -> f64 {
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64
}

/// Has a child go through all steps, and kills it `after` its beginning. Returns where it was, how long it lived, and
/// what it said.
fn stepping(after: Duration) -> (tempfile::TempDir, (Duration, Life)) {
    let dir = tempfile::tempdir().unwrap();
    let mut child = start(dir.path(), STEPPING);
    let said = lines(&mut child);
    let (sender, receiver) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut lines = said.inspect(|_| {
            // Nobody waits for more than the first.
            let _ = sender.send(());
        });
        lines.by_ref().collect::<Vec<_>>()
    });
    receiver.recv_timeout(LIFE).unwrap();
    let begun = Instant::now();
    if after < LIFE {
        std::thread::sleep(after);
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    let lived = begun.elapsed();
    let mut life = Life::default();
    for line in reader.join().unwrap() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["pruning"] => life.pruning = true,
            ["pruned"] => life.pruned = true,
            ["acknowledged", text, identity, digest] => {
                life.acknowledged.push((text.to_owned(), format!("{identity} {digest}")));
            }
            _ => {}
        }
    }
    let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    assert!(killed || life.acknowledged.len() + 1 == STEPS.len(), "{status}");
    (dir, (lived, life))
}

/// What the child does that is killed at a random instant.
async fn go_through_steps(store: Arc<dyn SnapshotStore>) {
    say("begun");
    let repo = life::repo(store);
    let writer = repo.writer(session(1)).await.unwrap();
    for text in STEPS {
        if text == PRUNE {
            say("pruning");
            life::prune(&repo).await.unwrap();
            say("pruned");
        } else {
            let id = life::step(&writer, text, 1).await.unwrap();
            say(&format!("acknowledged {text} {}", life::told(&id)));
        }
    }
}

/// How many operations the whole run takes.
fn count_operations() -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let mut child = start(dir.path(), "never");
    let mut last = 0;
    let mut acknowledged = 0;
    for line in lines(&mut child) {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["after", number, ..] => last = number.parse().unwrap(),
            ["acknowledged", ..] => acknowledged += 1,
            _ => {}
        }
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(acknowledged, 4);
    last
}

/// Kills one child and looks at what it left.
fn kill_at(number: u64, side: Side) -> Vec<(String, u64)> {
    let dir = tempfile::tempdir().unwrap();
    let stop = match side {
        Side::Before => format!("before {number}"),
        Side::After => format!("after {number}"),
        Side::Within => "never".to_owned(),
    };
    let wanted = match side {
        Side::After => format!("after {number} "),
        Side::Before | Side::Within => format!("before {number} "),
    };
    let mut child = start(dir.path(), &stop);
    let mut acknowledged = Vec::new();
    let mut at = None;
    for line in lines(&mut child) {
        if let Some(operation) = line.strip_prefix(&wanted) {
            at = Some(operation.to_owned());
            child.kill().unwrap();
        } else if let Some(snapshot) = line.strip_prefix("acknowledged ") {
            // What it could still say before the signal came counts as well.
            acknowledged.push(snapshot.to_owned());
        }
    }
    let status = child.wait().unwrap();
    let at = at.unwrap_or_else(|| panic!("the child ended with {status} before {stop}"));
    let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    assert!(killed || side == Side::Within, "{status} at {number} {side:?}");

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let extra = runtime.block_on(look(dir.path(), &acknowledged));
    let commit = at.starts_with("put job/head.json") && number > 2;
    match side {
        Side::Before => assert_eq!(extra, 0, "visible before {at}"),
        Side::After => assert_eq!(extra, u64::from(commit), "visible after {at}"),
        // It goes on until the signal comes: it may have committed this one, not two.
        Side::Within => assert!(extra <= 1, "{extra} visible within {at}"),
    }
    let end = if killed { "killed" } else { "done before the signal came" };
    let mut outcome = vec![(end.to_owned(), 1), ("acknowledged".to_owned(), acknowledged.len() as u64)];
    outcome.push(("committed, not acknowledged".to_owned(), if side == Side::Within { 0 } else { extra }));
    outcome.push((format!("{side:?}"), 1));
    outcome
}

/// Checks the store of a dead child and goes on with it. Returns how many snapshots are visible that were not
/// acknowledged.
async fn look(dir: &Path, acknowledged: &[String]) -> u64 {
    let store: Arc<dyn SnapshotStore> = Arc::new(Local::open(dir).unwrap());
    let repo = repo(Arc::clone(&store));
    let live = repo.list().await.unwrap();
    let found: Vec<_> = live.iter().map(|info| format!("{} {}", info.id.identity, info.id.digest)).collect();
    assert_eq!(
        found.iter().take(acknowledged.len()).collect::<Vec<_>>(),
        acknowledged.iter().collect::<Vec<_>>()
    );
    for info in &live {
        repo.verify(info).await.unwrap();
        assert_eq!(repo.restore(info).await.unwrap(), weights(info.name.as_str()));
    }
    // No temporary file is an object.
    let objects: Vec<_> = store.list(None).try_collect().await.unwrap();
    assert!(objects.iter().all(|object| object.key.is_under(&key("job"))), "{objects:?}");
    // The job goes on, on what was there.
    let writer = repo.writer(session(9)).await.unwrap();
    let parent = live.iter().rev().find(|info| info.kind != SnapshotKind::State);
    let parent = match parent {
        Some(parent) => parent.name.to_string(),
        None => {
            publish_base(&writer, "again").await;
            "again".to_owned()
        }
    };
    publish_delta(&writer, "more", &parent, Arc::new(XorCodec)).await;
    let more = find(&repo, "more").await;
    assert_eq!(repo.restore(&more).await.unwrap(), weights("more"));
    assert!(live.iter().all(|info| info.seq < more.seq));
    (live.len() - acknowledged.len()) as u64
}

fn start(dir: &Path, stop: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(STOP, stop)
        .stdout(Stdio::piped())
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// What the child says, until it ends.
fn lines(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.map_while(std::result::Result::ok).filter_map(|line| {
        // The test runner may have begun the line.
        line.split_once("@ ").map(|(_, said)| said.to_owned())
    })
}

/// The process that is killed. Nothing when the tests run by themselves.
#[test]
fn child() {
    let Ok(dir) = std::env::var(DIR) else { return };
    std::thread::spawn(|| {
        std::thread::sleep(LIFE);
        std::process::exit(3);
    });
    let stop = std::env::var(STOP).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    if stop == STEPPING {
        return runtime.block_on(go_through_steps(Arc::new(Local::open(dir).unwrap())));
    }
    runtime.block_on(async {
        let store = Counting { inner: Arc::new(Local::open(dir).unwrap()), gate: Arc::new(Gate::new(stop)) };
        let repo = repo(Arc::new(store));
        let writer = repo.writer(session(1)).await.unwrap();
        publish_base(&writer, "a").await;
        acknowledge("a");
        publish_delta(&writer, "b", "a", Arc::new(XorCodec)).await;
        acknowledge("b");
        writer.save_state(SaveTrainState::new(name("s"), shared("s"))).await.unwrap();
        acknowledge("s");
        publish_delta(&writer, "c", "b", Arc::new(MaskCodec)).await;
        acknowledge("c");
    });
}

async fn publish_base(writer: &Writer, text: &str) {
    let publish = Publish::new(name(text), SnapshotKind::Base, shared(text));
    writer
        .publish(publish.with_files(vec![("config.json".into(), Bytes::from_static(b"{}"))]))
        .await
        .unwrap();
}

async fn publish_delta(writer: &Writer, text: &str, parent: &str, codec: Arc<dyn Codec>) {
    let info = find(writer.repo(), parent).await;
    let publish = Publish::new(name(text), SnapshotKind::Delta, shared(text));
    writer.publish(publish.with_parent(info, shared(parent)).with_codec(codec)).await.unwrap();
}

/// Says that the call has returned.
fn acknowledge(text: &str) {
    say(&format!("acknowledged {text}-{} {}", session(1), weights(text).content_digest()));
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@ {text}").unwrap();
    out.flush().unwrap();
}

/// Counts the operations and stops at one of them.
#[derive(Debug)]
struct Gate {
    count: AtomicU64,
    stop: String,
}

impl Gate {
    fn new(stop: String) -> Self {
        Self { count: AtomicU64::new(0), stop }
    }

    async fn pass<T>(&self, what: String, operation: impl Future<Output = T>) -> T {
        let number = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        self.report("before", number, &what).await;
        let outcome = operation.await;
        self.report("after", number, &what).await;
        outcome
    }

    async fn report(&self, side: &str, number: u64, what: &str) {
        say(&format!("{side} {number} {what}"));
        if self.stop == format!("{side} {number}") {
            std::future::pending::<()>().await;
        }
    }
}

#[derive(Debug)]
struct Counting {
    inner: Arc<dyn SnapshotStore>,
    gate: Arc<Gate>,
}

#[async_trait]
impl SnapshotStore for Counting {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        self.gate.pass(format!("put {key}"), self.inner.put(key, body, mode)).await
    }
    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.gate.pass(format!("writer {key}"), self.inner.writer(key)).await?;
        Ok(Box::new(CountingWriter { inner, gate: Arc::clone(&self.gate), key: key.clone() }))
    }
    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        self.gate.pass(format!("get {key}"), self.inner.get(key, range)).await
    }
    async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        self.gate.pass(format!("read_into {key}"), self.inner.read_into(key, start, buffer)).await
    }
    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        self.gate.pass(format!("head {key}"), self.inner.head(key)).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.gate.pass(format!("delete {key}"), self.inner.delete(key)).await
    }
    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        self.inner.list(prefix)
    }
}

#[derive(Debug)]
struct CountingWriter {
    inner: Box<dyn ObjectWriter>,
    gate: Arc<Gate>,
    key: ObjectKey,
}

#[async_trait]
impl ObjectWriter for CountingWriter {
    async fn write(&mut self, part: Bytes) -> Result<()> {
        self.gate.pass(format!("write {}", self.key), self.inner.write(part)).await
    }
    async fn finish(self: Box<Self>) -> Result<Version> {
        self.gate.pass(format!("finish {}", self.key), self.inner.finish()).await
    }
    async fn abort(self: Box<Self>) -> Result<()> {
        self.gate.pass(format!("abort {}", self.key), self.inner.abort()).await
    }
}
