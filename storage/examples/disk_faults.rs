//! A repo on a folder whose disk is full, and on one that is read-only.
//!
//! ```text
//! disk_faults full DIR        DIR is empty, on a disk of its own of about 48 MiB, which this fills
//! disk_faults read-only DIR   the same one after that, mounted anew without the right to write
//! ```
//!
//! It panics if anything breaks. `cargo xtask disks` makes such a disk, without rights that a user does not have.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{key, name, noise, repo, session};
use towline_core::{
    DType, Error, ErrorKind, PutMode, Result, SnapshotKind, SnapshotStore, TensorMeta, Weights,
};
use towline_storage::{
    BackgroundSaver, Depth, Local, Prune, Publish, Retention, SaveTrainState, SnapshotRepo, Writer,
};

/// How long a failure may take: its few attempts, and no storm of them.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes that the disk still has: from none to enough for a save of 4 MiB.
const FREE: [u64; 8] = [0, 4 << 10, 16 << 10, 300 << 10, 1 << 20, 3 << 20, (4 << 20) + (8 << 10), 6 << 20];

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["full", dir] => runtime.block_on(full(Path::new(dir))),
        ["read-only", dir] => runtime.block_on(read_only(Path::new(dir))),
        _ => {
            eprintln!("usage: disk_faults full|read-only DIR");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

async fn full(dir: &Path) {
    let store = dir.join("store");
    let repo = open(&store);
    let writer = Arc::new(repo.writer(session(1)).await.unwrap());
    publish(&writer, "first").await.unwrap();
    state(&writer, "begin").await.unwrap();
    let mut there = vec!["first".to_owned(), "begin".to_owned()];

    let (mut refused, mut taken) = (0, 0);
    for free in FREE {
        for attempt in ["base", "state", "background"] {
            let ballast = Ballast::fill(dir, free);
            let wanted = format!("{attempt}-{free}");
            let started = Instant::now();
            let outcome = match attempt {
                "base" => publish(&writer, &wanted).await,
                "state" => state(&writer, &wanted).await,
                _ => {
                    let mut saver = BackgroundSaver::new(Arc::clone(&writer));
                    saver.save(SaveTrainState::new(name(&wanted), weights(&wanted))).await.unwrap();
                    saver.close().await.map(drop)
                }
            };
            match outcome {
                Ok(()) => {
                    taken += 1;
                    there.push(wanted.clone());
                }
                Err(error) => {
                    refused += 1;
                    told(&error, ErrorKind::Unavailable, "free space");
                    assert!(started.elapsed() < PATIENCE, "{wanted} failed after {:?}", started.elapsed());
                }
            }
            // A full disk is read as any other, and what failed has left nothing, visible or not.
            only(&repo, &there).await;
            assert_eq!(folders(&store), there.len(), "{wanted} left files");
            drop(ballast);
        }
    }
    assert!(refused >= 18 && taken >= 3, "{refused} saves were refused, {taken} taken");

    // Pruning needs a little room for the head; without it, it fails whole.
    let ballast = Ballast::fill(dir, 0);
    let prune = Prune::new(Retention::new()).with_grace(Duration::ZERO);
    if let Err(error) = repo.prune(&prune).await {
        told(&error, ErrorKind::Unavailable, "free space");
    }
    only(&repo, &there).await;
    drop(ballast);

    // With space again the same writer goes on, under the names that failed before.
    publish(&writer, "base-0").await.unwrap();
    there.push("base-0".to_owned());
    repo.prune(&prune).await.unwrap();
    only(&repo, &there).await;
    println!("full disk: {refused} saves refused, {taken} taken, nothing of the refused ones left");
}

async fn read_only(dir: &Path) {
    let store = dir.join("store");
    let before = files(&store);
    let repo = open(&store);
    let listed = repo.list().await.unwrap();
    assert!(listed.len() >= 3, "{} are listed", listed.len());
    for info in &listed {
        repo.verify_to(info, Depth::Full).await.unwrap();
    }
    let denied = |error: &Error| told(error, ErrorKind::Denied, "allow it");
    let started = Instant::now();
    denied(&repo.writer(session(2)).await.unwrap_err());
    denied(&repo.prune(&Prune::new(Retention::new())).await.unwrap_err());
    denied(&repo.pin(&listed[0], "mine", "a test").await.unwrap_err());
    let local = Local::open(&store).unwrap();
    for mode in [PutMode::Create, PutMode::Overwrite] {
        denied(&local.put(&key("a/b"), "x".into(), mode).await.unwrap_err());
    }
    denied(&local.delete(&listed_key(&store)).await.unwrap_err());
    denied(&local.writer(&key("a/c")).await.unwrap_err());
    denied(&Local::open(dir.join("other")).unwrap_err());
    assert!(started.elapsed() < PATIENCE, "refused after {:?}", started.elapsed());
    assert_eq!(files(&store), before);
    println!("read-only disk: {} snapshots verified, every write denied at once", listed.len());
}

/// `error` is of `kind`, and says what to do.
fn told(error: &Error, kind: ErrorKind, step: &str) {
    assert_eq!(error.kind(), kind, "{}", error.report());
    assert!(error.help().is_some_and(|help| help.contains(step)), "{}", error.report());
}

/// Folders that hold a file of a snapshot, of a train state, or of one that is not finished.
fn folders(store: &Path) -> usize {
    let parent = |path: PathBuf| path.parent().unwrap().to_owned();
    let mut found: Vec<_> = files(store).into_iter().map(|(path, _)| parent(path)).collect();
    found.retain(|folder| ["snapshots", "states", "tmp"].iter().any(|part| is_below(folder, part)));
    found.dedup();
    found.len()
}

fn is_below(folder: &Path, part: &str) -> bool {
    folder.iter().any(|segment| segment == part)
}

/// Exactly the `wanted` ones are listed and whole.
async fn only(repo: &SnapshotRepo, wanted: &[String]) {
    let listed = repo.list().await.unwrap();
    let mut names: Vec<_> = listed.iter().map(|info| info.name.to_string()).collect();
    let mut wanted = wanted.to_vec();
    names.sort();
    wanted.sort();
    assert_eq!(names, wanted);
    for info in &listed {
        let found = if info.kind == SnapshotKind::State {
            repo.load_state(info).await.unwrap().tensors
        } else {
            repo.restore(info).await.unwrap()
        };
        assert!(found == *weights(info.name.as_str()), "{} came back with other weights", info.name);
    }
}

fn open(store: &Path) -> SnapshotRepo {
    repo(Arc::new(Local::open(store).unwrap())).with_shard_bytes(3 << 20)
}

async fn publish(writer: &Writer, text: &str) -> Result<()> {
    writer.publish(Publish::new(name(text), SnapshotKind::Base, weights(text))).await.map(drop)
}

async fn state(writer: &Writer, text: &str) -> Result<()> {
    writer.save_state(SaveTrainState::new(name(text), weights(text))).await.map(drop)
}

/// 4 MiB.
fn weights(text: &str) -> Arc<Weights> {
    let tensors = (0..4).map(|number| {
        let meta = TensorMeta::new(format!("layer.{number}"), DType::F32, [512, 512]).unwrap();
        let data = noise(&format!("{text} {number}"), meta.byte_len());
        (meta, data)
    });
    Arc::new(Weights::new(tensors).unwrap())
}

fn listed_key(store: &Path) -> towline_core::ObjectKey {
    let path = files(store).into_iter().find(|(path, _)| path.ends_with("manifest.json")).unwrap().0;
    key(path.strip_prefix(store).unwrap().to_str().unwrap())
}

/// Every file below `folder` and its length, but for locks, which are empty.
fn files(folder: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let data = entry.metadata().unwrap();
        if data.is_dir() {
            found.extend(files(&entry.path()));
        } else if data.len() > 0 {
            found.push((entry.path(), data.len()));
        }
    }
    found.sort();
    found
}

/// A file that leaves a disk as much space as it is told.
struct Ballast(PathBuf);

impl Ballast {
    fn fill(dir: &Path, free: u64) -> Self {
        let path = dir.join("ballast");
        let mut file = File::create(&path).unwrap();
        let piece = vec![1; 4096];
        let mut length = 0u64;
        while file.write_all(&piece).is_ok() {
            length += piece.len() as u64;
        }
        // The last piece may have gone in by half.
        file.set_len(length.saturating_sub(free)).unwrap();
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}
