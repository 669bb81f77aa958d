//! Laws for services: races whose lost answers are settled, listings of several pages, traffic, uploads in parts.
//!
//! A service may answer a conditional write with a time-out or not at all, and its client may then have tried again by
//! itself. What such a write came to is told by reading, as a repo does it. Each law returns a note with its figures.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::task::JoinSet;
use towline_core::{Error, ErrorKind, ObjectKey, PutMode, SnapshotStore};

use crate::cycle::repo_cycle;

/// A note with figures, or what broke.
pub(crate) type Outcome = Result<String, String>;
/// A law under way.
pub(crate) type Checking = Pin<Box<dyn Future<Output = Outcome>>>;
/// A law.
pub(crate) type Law = fn(Arc<dyn SnapshotStore>) -> Checking;

/// Every law with its name.
pub(crate) const ALL: &[(&str, Law)] = &[
    ("create_race_of_64", |store| Box::pin(create_race_of_64(store))),
    ("counter_of_8", |store| Box::pin(counter_of_8(store))),
    ("pages_of_2500", |store| Box::pin(pages_of_2500(store))),
    ("traffic_of_64", |store| Box::pin(traffic_of_64(store))),
    ("uploads_in_parts", |store| Box::pin(uploads_in_parts(store))),
    ("repo_cycle", |store| Box::pin(repo_cycle(store))),
    ("object_of_256_mib", |store| Box::pin(object_of_256_mib(store))),
];

const MIB: usize = 1 << 20;

/// Of 64 racers to create an object, one wins, and the object stays the winner's. Racers whose answer was lost are
/// settled by reading.
pub(crate) async fn create_race_of_64(store: Arc<dyn SnapshotStore>) -> Outcome {
    const ROUNDS: u64 = 3;
    const RACERS: u64 = 64;
    let mut unclear = 0;
    for round in 0..ROUNDS {
        let key = key(format_args!("race/{round}"))?;
        let start = Arc::new(tokio::sync::Barrier::new(64));
        let mut racers = JoinSet::new();
        for racer in 0..RACERS {
            let (store, key, start) = (Arc::clone(&store), key.clone(), Arc::clone(&start));
            racers.spawn(async move {
                start.wait().await;
                (racer, store.put(&key, block(racer, 200), PutMode::Create).await)
            });
        }
        let (mut winners, mut open) = (Vec::new(), Vec::new());
        while let Some(outcome) = racers.join_next().await {
            match outcome.map_err(|error| format!("a racer died: {error}"))? {
                (racer, Ok(_)) => winners.push(racer),
                (_, Err(error)) if error.kind() == ErrorKind::AlreadyExists => {}
                (racer, Err(error)) if is_unclear(&error) => open.push((racer, error)),
                (_, Err(error)) => {
                    return Err(format!("a loser: wanted already_exists, found {}", error.report()));
                }
            }
        }
        ensure(winners.len() <= 1, || format!("{} of {RACERS} racers created the object", winners.len()))?;
        let found = told("get", store.get(&key, None).await)?;
        let standing = (0..RACERS).find(|racer| block(*racer, 200) == found);
        let standing =
            standing.ok_or_else(|| format!("{} bytes stand there that are no racer's", found.len()))?;
        if let [winner] = winners[..] {
            ensure(winner == standing, || {
                format!("racer {winner} was told that it won, but racer {standing}'s object stands")
            })?;
        }
        if !open.is_empty() {
            // None of them may come late and replace it.
            tokio::time::sleep(Duration::from_millis(500)).await;
            ensure(told("get", store.get(&key, None).await)? == found, || {
                "the object changed after the race".into()
            })?;
        }
        unclear += open.len();
    }
    Ok(format!("{ROUNDS} rounds, {unclear} answers settled by reading"))
}

/// Eight tasks append to one object by compare-and-swap, and every line of every task is there once. A lost answer is
/// settled by reading.
pub(crate) async fn counter_of_8(store: Arc<dyn SnapshotStore>) -> Outcome {
    const TASKS: usize = 8;
    const STEPS: usize = 12;
    let key = key("counter")?;
    told("put", store.put(&key, Bytes::from_static(b"begin\n"), PutMode::Create).await)?;
    let (settled, tries) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (store, key) = (Arc::clone(&store), key.clone());
        let (settled, tries) = (Arc::clone(&settled), Arc::clone(&tries));
        tasks.spawn(async move {
            for step in 0..STEPS {
                append(&*store, &key, &format!("{task}.{step}"), &settled, &tries).await?;
            }
            Ok::<_, String>(())
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.map_err(|error| format!("a counting task died: {error}"))??;
    }
    let found = told("get", store.get(&key, None).await)?;
    let mut counts = BTreeMap::<&str, usize>::new();
    for line in lines(&found)?.skip(1) {
        *counts.entry(line).or_default() += 1;
    }
    let twice = counts.values().filter(|count| **count > 1).count();
    let (wanted, have) = (TASKS * STEPS, counts.len());
    ensure(have == wanted && twice == 0, || {
        format!("{wanted} lines were acknowledged, {have} of them are there, {twice} more than once")
    })?;
    let (settled, tries) = (settled.load(Ordering::Relaxed), tries.load(Ordering::Relaxed));
    Ok(format!("{wanted} steps in {tries} tries, {settled} answers settled by reading"))
}

/// Appends a line, tried until it stands there. The law's deadline bounds it.
async fn append(
    store: &dyn SnapshotStore,
    key: &ObjectKey,
    line: &str,
    settled: &AtomicUsize,
    tries: &AtomicUsize,
) -> Result<(), String> {
    loop {
        // The version first: the body may be newer than it, which the swap then refuses.
        let version = told("head", store.head(key).await)?.version;
        let body = told("get", store.get(key, None).await)?;
        if lines(&body)?.any(|found| found == line) {
            settled.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        tries.fetch_add(1, Ordering::Relaxed);
        let next = Bytes::from([&body[..], line.as_bytes(), b"\n"].concat());
        match store.put(key, next, PutMode::Update(version)).await {
            Ok(_) => return Ok(()),
            Err(error) if is_unclear(&error) => tokio::task::yield_now().await,
            Err(error) => return Err(format!("a lost swap: wanted conflict, found {}", error.report())),
        }
    }
}

/// 2,500 objects, more than two pages of every service, are listed once each, below a folder and below its parent.
pub(crate) async fn pages_of_2500(store: Arc<dyn SnapshotStore>) -> Outcome {
    const COUNT: usize = 2500;
    let started = Instant::now();
    let name = |number: usize| key(format_args!("pages/{}/object-{number:05}", number % 3));
    futures_util::stream::iter(0..COUNT)
        .map(async |number| {
            let put = store.put(&name(number)?, block(1, number % 50), PutMode::Overwrite).await;
            told("put", put).map(drop)
        })
        .buffer_unordered(32)
        .try_collect::<()>()
        .await?;
    let put = started.elapsed();
    let started = Instant::now();
    for (prefix, numbers) in
        [("pages", (0..COUNT).collect::<Vec<_>>()), ("pages/1", (1..COUNT).step_by(3).collect())]
    {
        let mut wanted = BTreeMap::new();
        for number in numbers {
            wanted.insert(name(number)?, (number % 50) as u64);
        }
        let count = wanted.len();
        let mut listed = store.list(Some(&key(prefix)?));
        let mut total = 0;
        while let Some(info) = listed.next().await {
            let info = told("list", info)?;
            total += 1;
            let size = wanted.remove(&info.key);
            ensure(size == Some(info.size), || {
                format!(
                    "under `{prefix}`: `{}` is listed with {} bytes or twice, wanted {size:?}",
                    info.key, info.size
                )
            })?;
        }
        ensure(wanted.is_empty(), || {
            format!("under `{prefix}`: {count} objects were put, {total} are listed")
        })?;
    }
    Ok(format!("put in {:.1} s, listed in {:.2} s", put.as_secs_f64(), started.elapsed().as_secs_f64()))
}

/// 64 tasks at once write, read, overwrite and read parts of objects of 1 MiB, and each reads what it wrote.
pub(crate) async fn traffic_of_64(store: Arc<dyn SnapshotStore>) -> Outcome {
    const TASKS: u64 = 64;
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (store, key) = (Arc::clone(&store), key(format_args!("traffic/{}/object-{task}", task % 4))?);
        tasks.spawn(async move {
            for (round, mode) in [(0, PutMode::Create), (1, PutMode::Overwrite)] {
                let body = block(task * 2 + round, MIB);
                told("put", store.put(&key, body.clone(), mode).await)?;
                ensure(told("get", store.get(&key, None).await)? == body, || {
                    format!("`{key}`: other bytes than were put")
                })?;
                let found = told("get a range", store.get(&key, Some(500_000..700_001)).await)?;
                ensure(found == body.slice(500_000..700_001), || format!("`{key}`: other bytes in a range"))?;
                let size = told("head", store.head(&key).await)?.size;
                ensure(size == MIB as u64, || format!("`{key}`: head says {size} bytes"))?;
            }
            told("delete", store.delete(&key).await)?;
            match store.get(&key, None).await {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                other => Err(format!("get of a deleted object: wanted not_found, found {other:?}")),
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.map_err(|error| format!("a task died: {error}"))??;
    }
    let mib = 2.0 * 2.2 * 64.0;
    Ok(format!("{:.0} MiB/s both ways", mib / started.elapsed().as_secs_f64()))
}

/// An upload in parts is seen at its end and not before; one that is aborted or dropped changes nothing.
pub(crate) async fn uploads_in_parts(store: Arc<dyn SnapshotStore>) -> Outcome {
    const PARTS: u64 = 20;
    let (fresh, old) = (key("parts/fresh")?, key("parts/old")?);
    told("put", store.put(&old, block(9, 100), PutMode::Create).await)?;
    let whole: Vec<Bytes> = (0..PARTS).map(|number| block(number, MIB)).collect();
    let whole = Bytes::from(whole.concat());
    for end in ["abort", "drop", "finish"] {
        for key in [&fresh, &old] {
            let mut writer = told("writer", store.writer(key).await)?;
            for part in whole.chunks(MIB) {
                told("write", writer.write(whole.slice_ref(part)).await)?;
            }
            let found = store.get(key, None).await;
            let good = match &found {
                Ok(found) => *key == old && *found == block(9, 100),
                Err(error) => *key == fresh && error.kind() == ErrorKind::NotFound,
            };
            ensure(good, || format!("`{key}` changed before its upload was finished"))?;
            match end {
                "abort" => told("abort", writer.abort().await)?,
                "drop" => drop(writer),
                _ => {
                    let version = told("finish", writer.finish().await)?;
                    let head = told("head", store.head(key).await)?;
                    ensure(head.version == version && head.size == whole.len() as u64, || {
                        format!("finish said {version:?}, head says {head:?}")
                    })?;
                    ensure(told("get", store.get(key, None).await)? == whole, || {
                        format!("`{key}`: the parts did not become the whole")
                    })?;
                }
            }
        }
        // Nothing of a dropped upload may come later either.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let listed: Vec<_> = told("list", store.list(Some(&key("parts")?)).try_collect().await)?;
        let wanted = if end == "finish" { 2 } else { 1 };
        ensure(listed.len() == wanted, || {
            format!("after {end}: wanted {wanted} objects, listed {listed:?}")
        })?;
    }
    Ok(String::new())
}

/// 256 MiB in parts, read back in eight ranges at once.
pub(crate) async fn object_of_256_mib(store: Arc<dyn SnapshotStore>) -> Outcome {
    const BLOCKS: usize = 256;
    const READERS: usize = 8;
    let key = key("large/object")?;
    let started = Instant::now();
    let mut writer = told("writer", store.writer(&key).await)?;
    for number in 0..BLOCKS {
        told("write", writer.write(block(number as u64, MIB)).await)?;
    }
    told("finish", writer.finish().await)?;
    let up = started.elapsed().as_secs_f64();
    let size = told("head", store.head(&key).await)?.size;
    ensure(size == (BLOCKS * MIB) as u64, || format!("head says {size} bytes"))?;
    let started = Instant::now();
    let mut readers = JoinSet::new();
    for reader in 0..READERS {
        let (store, key) = (Arc::clone(&store), key.clone());
        readers.spawn(async move {
            let blocks = BLOCKS / READERS;
            let first = reader * blocks;
            let buffer = BytesMut::zeroed(blocks * MIB);
            let found = told("read_into", store.read_into(&key, (first * MIB) as u64, buffer).await)?;
            for (number, found) in (first..).zip(found.chunks(MIB)) {
                ensure(found == block(number as u64, MIB), || {
                    format!("block {number} came back with other bytes")
                })?;
            }
            Ok::<_, String>(())
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader.map_err(|error| format!("a reader died: {error}"))??;
    }
    let down = started.elapsed().as_secs_f64();
    Ok(format!("{:.0} MiB/s up, {:.0} MiB/s down", 256.0 / up, 256.0 / down))
}

/// Bytes that look random and depend on `seed`.
pub(crate) fn block(seed: u64, length: usize) -> Bytes {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// Whether a conditional write that answered so may have taken effect: reading tells.
fn is_unclear(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Unavailable | ErrorKind::TimedOut)
}

fn lines(body: &[u8]) -> Result<impl Iterator<Item = &str>, String> {
    Ok(std::str::from_utf8(body).map_err(|error| format!("the counter is no text: {error}"))?.lines())
}

fn key(text: impl Display) -> Result<ObjectKey, String> {
    told("a key", ObjectKey::new(text.to_string()))
}

/// Says what was tried when it failed.
pub(crate) fn told<T>(what: &str, outcome: towline_core::Result<T>) -> Result<T, String> {
    outcome.map_err(|error| format!("{what}: {}", error.report()))
}

/// Turns a broken condition into what broke.
pub(crate) fn ensure(condition: bool, broke: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(broke()) }
}
