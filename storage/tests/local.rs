//! The folder as a store, where it is more than the laws ask for: several openings of one folder, and files.

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::key;
use futures_util::{StreamExt as _, TryStreamExt as _};
use towline_core::{ErrorKind, PutMode, SnapshotStore};
use towline_storage::Local;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_tasks_on_two_openings_count_without_a_lost_step() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [Local::open(dir.path()).unwrap(), Local::open(dir.path()).unwrap()];
    let counter = key("a/counter");
    stores[0].put(&counter, Bytes::from_static(b"0"), PutMode::Create).await.unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|task| {
            let (store, counter) = (stores[task % 2].clone(), counter.clone());
            tokio::spawn(async move {
                let mut conflicts = 0;
                for _ in 0..10 {
                    loop {
                        let version = store.head(&counter).await.unwrap().version;
                        let body = store.get(&counter, None).await.unwrap();
                        let count: u64 = std::str::from_utf8(&body).unwrap().parse().unwrap();
                        let next = Bytes::from((count + 1).to_string());
                        match store.put(&counter, next, PutMode::Update(version)).await {
                            Ok(_) => break,
                            Err(error) => assert_eq!(error.kind(), ErrorKind::Conflict, "{error}"),
                        }
                        conflicts += 1;
                    }
                }
                conflicts
            })
        })
        .collect();
    let mut conflicts = 0;
    for task in tasks {
        conflicts += task.await.unwrap();
    }
    assert_eq!(stores[1].get(&counter, None).await.unwrap(), "160");
    assert!(conflicts > 0, "nobody raced");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_64_racers_on_four_openings_creates() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..5 {
        let target = key(&format!("race/{round}"));
        let racers: Vec<_> = (0..64u8)
            .map(|racer| {
                let store = Local::open(dir.path()).unwrap();
                let target = target.clone();
                tokio::spawn(
                    async move { store.put(&target, vec![racer; 100].into(), PutMode::Create).await },
                )
            })
            .collect();
        let mut winners = Vec::new();
        for (number, racer) in (0u8..).zip(racers) {
            match racer.await.unwrap() {
                Ok(_) => winners.push(number),
                Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}"),
            }
        }
        assert_eq!(winners.len(), 1);
        let store = Local::open(dir.path()).unwrap();
        assert_eq!(store.get(&target, None).await.unwrap(), vec![winners[0]; 100]);
    }
}

#[tokio::test]
async fn versions_never_come_back_however_fast_the_writes_are() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..300 {
        let version = store.put(&key("a"), Bytes::from_static(b"same"), PutMode::Overwrite).await.unwrap();
        assert_eq!(store.head(&key("a")).await.unwrap().version, version);
        assert!(seen.insert(version));
    }
    // Not even when the clock is set back: the file's own time goes on.
    let future = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    std::fs::File::options().write(true).open(dir.path().join("a")).unwrap().set_modified(future).unwrap();
    for _ in 0..5 {
        let version = store.put(&key("a"), Bytes::from_static(b"same"), PutMode::Overwrite).await.unwrap();
        assert!(seen.insert(version));
    }
    let leftovers = std::fs::read_dir(dir.path().join("~towline/tmp")).unwrap().count();
    assert_eq!(leftovers, 0, "temporary files were left");
}

#[tokio::test]
async fn what_others_put_there_is_no_object() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    store.put(&key("a/b/c"), Bytes::from_static(b"1"), PutMode::Create).await.unwrap();
    std::fs::write(dir.path().join("a/not a key"), b"x").unwrap();
    std::fs::create_dir(dir.path().join("a/empty")).unwrap();
    let all: Vec<_> = store.list(None).try_collect().await.unwrap();
    assert_eq!(all.iter().map(|info| info.key.as_str()).collect::<Vec<_>>(), ["a/b/c"]);
    assert_eq!(store.list(Some(&key("nothing"))).count().await, 0);
    // A key and a key below it cannot both be files.
    let below = store.put(&key("a/b/c/d"), Bytes::new(), PutMode::Create).await.unwrap_err();
    assert!(matches!(below.kind(), ErrorKind::Invalid | ErrorKind::AlreadyExists), "{below:?}");
    let above = store.put(&key("a/b"), Bytes::new(), PutMode::Overwrite).await.unwrap_err();
    assert_eq!(above.kind(), ErrorKind::Invalid, "{above:?}");
    assert_eq!(store.get(&key("a/b"), None).await.unwrap_err().kind(), ErrorKind::NotFound);
    store.delete(&key("a/b")).await.unwrap();
    assert_eq!(store.get(&key("a/b/c"), None).await.unwrap(), "1");
}

#[tokio::test]
async fn a_store_that_is_gone_is_not_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let store: Arc<dyn SnapshotStore> = Arc::new(Local::open(&root).unwrap());
    std::fs::remove_dir_all(&root).unwrap();
    let listed: Result<Vec<_>, _> = store.list(Some(&key("a"))).try_collect().await;
    assert!(listed.is_err());
}

#[test]
fn a_file_is_no_store() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), b"").unwrap();
    assert!(Local::open(dir.path().join("f")).is_err());
}
