//! Damaged snapshots are put out of the way, and come back when they are whole.

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{key, name, repo, session, shared};
use towline_core::testing::XorCodec;
use towline_core::{ErrorKind, ObjectKey, PutMode, SnapshotKind, SnapshotStore};
use towline_storage::testing::{Fault, FaultStore, Plan, Rule};
use towline_storage::{
    Depth, Memory, Prune, Publish, Repaired, Retention, SaveTrainState, SnapshotInfo, SnapshotRepo, Wanted,
    Writer,
};

struct Bench {
    store: Arc<Memory>,
    repo: SnapshotRepo,
    writer: Writer,
}

impl Bench {
    /// A base, a delta on it, and two states.
    async fn new() -> Self {
        let store = Arc::new(Memory::new());
        let repo = repo(Arc::clone(&store) as Arc<dyn SnapshotStore>);
        let writer = repo.writer(session(1)).await.unwrap();
        let bench = Self { store, repo, writer };
        bench.writer.publish(Publish::new(name("base"), SnapshotKind::Base, shared("base"))).await.unwrap();
        let base = bench.find("base").await;
        let delta = Publish::new(name("delta"), SnapshotKind::Delta, shared("delta"))
            .with_parent(base, shared("base"))
            .with_codec(Arc::new(XorCodec));
        bench.writer.publish(delta).await.unwrap();
        for text in ["one", "two"] {
            bench.save(text).await;
        }
        bench
    }

    async fn save(&self, text: &str) -> SnapshotInfo {
        self.writer.save_state(SaveTrainState::new(name(text), shared(text))).await.unwrap()
    }

    async fn find(&self, text: &str) -> SnapshotInfo {
        self.repo.find(text, Wanted::Any).await.unwrap()
    }

    async fn repair(&self) -> Repaired {
        self.repo.repair(Depth::Full, false).await.unwrap()
    }

    /// The key of a file that holds tensors of `info`, and its bytes.
    async fn file(&self, info: &SnapshotInfo) -> (ObjectKey, Bytes) {
        let manifest = self.repo.manifest(info).await.unwrap();
        let file = manifest.files.iter().find(|file| file.weights && file.bytes > 4000).unwrap();
        let key = key(&format!("job/{}/{}", info.dir, file.path));
        let body = self.store.get(&key, None).await.unwrap();
        (key, body)
    }

    /// Flips a bit; returns what undoes it.
    async fn damage(&self, info: &SnapshotInfo) -> (ObjectKey, Bytes) {
        let (key, body) = self.file(info).await;
        let mut bad = body.to_vec();
        let at = bad.len() - 9;
        bad[at] ^= 4;
        self.store.put(&key, bad.into(), PutMode::Overwrite).await.unwrap();
        (key, body)
    }
}

fn names(infos: &[SnapshotInfo]) -> Vec<&str> {
    infos.iter().map(|info| info.name.as_str()).collect()
}

fn whys(infos: &[(SnapshotInfo, String)]) -> Vec<&str> {
    infos.iter().map(|(info, _)| info.name.as_str()).collect()
}

#[tokio::test]
async fn a_damaged_state_is_passed_over_and_comes_back() {
    let bench = Bench::new().await;
    assert_eq!(names(&bench.repair().await.good), ["base", "delta", "one", "two"]);
    let two = bench.find("two").await;
    let (key, body) = bench.damage(&two).await;
    let told = bench.repo.repair(Depth::Full, true).await.unwrap();
    assert_eq!(whys(&told.quarantined), ["two"]);
    assert_eq!(bench.repo.list().await.unwrap().len(), 4, "a dry run moves nothing");

    let repaired = bench.repair().await;
    assert_eq!(
        (whys(&repaired.quarantined), names(&repaired.good)),
        (vec!["two"], vec!["base", "delta", "one"])
    );
    assert!(repaired.quarantined[0].1.contains("corrupt"), "{:?}", repaired.quarantined);
    assert_eq!(bench.repo.newest(Wanted::State).await.unwrap().unwrap().name.as_str(), "one");
    assert_eq!(bench.repo.find("two", Wanted::State).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bench.repo.quarantined().await.unwrap(), repaired.quarantined);

    // Pruning without any grace leaves its files, which are neither a snapshot's nor an orphan's.
    bench.repo.prune(&Prune::new(Retention::new()).with_grace(std::time::Duration::ZERO)).await.unwrap();
    assert_eq!(whys(&bench.repair().await.remaining), ["two"]);
    bench.store.put(&key, body, PutMode::Overwrite).await.unwrap();
    assert_eq!(names(&bench.repair().await.returned), ["two"]);
    assert_eq!(bench.repo.newest(Wanted::State).await.unwrap(), Some(two));
    assert!(bench.repo.quarantined().await.unwrap().is_empty());
}

#[tokio::test]
async fn what_needs_a_damaged_one_goes_and_comes_with_it() {
    let bench = Bench::new().await;
    let base = bench.find("base").await;
    let (key, body) = bench.damage(&base).await;
    assert_eq!(whys(&bench.repair().await.quarantined), ["base", "delta"]);
    // The writer knows nothing of it, and cannot build on what is away.
    let delta = Publish::new(name("next"), SnapshotKind::Delta, shared("next"))
        .with_parent(base, shared("base"))
        .with_codec(Arc::new(XorCodec));
    assert_eq!(bench.writer.publish(delta).await.unwrap_err().kind(), ErrorKind::NotFound);
    bench.store.put(&key, body, PutMode::Overwrite).await.unwrap();
    assert_eq!(names(&bench.repair().await.returned), ["base", "delta"]);
    let delta = bench.find("delta").await;
    assert!(bench.repo.restore(&delta).await.unwrap() == *shared("delta"));
}

#[tokio::test]
async fn a_name_that_was_taken_meanwhile_stays_taken() {
    let bench = Bench::new().await;
    let two = bench.find("two").await;
    let (key, body) = bench.file(&two).await;
    bench.store.delete(&key).await.unwrap();
    assert_eq!(whys(&bench.repair().await.quarantined), ["two"]);
    let again = bench.save("two").await;
    bench.store.put(&key, body, PutMode::Create).await.unwrap();
    let repaired = bench.repair().await;
    assert_eq!(whys(&repaired.remaining), ["two"]);
    assert!(repaired.remaining[0].1.contains(&again.seq.to_string()), "{:?}", repaired.remaining);
    assert_eq!(bench.find("two").await, again);
}

#[tokio::test]
async fn what_needs_something_that_was_given_up_does_not_come_back() {
    let bench = Bench::new().await;
    let (key, body) = bench.damage(&bench.find("delta").await).await;
    assert_eq!(whys(&bench.repair().await.quarantined), ["delta"]);
    bench.writer.publish(Publish::new(name("newer"), SnapshotKind::Base, shared("newer"))).await.unwrap();
    let retention = Retention::new().with_last_snapshots(1).unwrap();
    let pruned = bench.repo.prune(&Prune::new(retention)).await.unwrap();
    assert_eq!(names(&pruned.given_up), ["base"]);
    // The base's files are still there, so that the delta can be read: today.
    bench.store.put(&key, body, PutMode::Overwrite).await.unwrap();
    let repaired = bench.repair().await;
    assert_eq!((whys(&repaired.remaining), names(&repaired.returned)), (vec!["delta"], vec![]));
    assert!(repaired.remaining[0].1.contains("base"), "{:?}", repaired.remaining);
}

#[tokio::test]
async fn a_store_that_is_away_is_no_damage() {
    let bench = Bench::new().await;
    let rule = Rule::new(Fault::Refuse(ErrorKind::Denied), 1000).only("manifest.json");
    let plan = Plan::new(1).with(rule);
    let process = FaultStore::new(Arc::clone(&bench.store) as Arc<dyn SnapshotStore>, plan);
    let error = repo(Arc::new(process)).repair(Depth::Quick, false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", error.report());
    assert_eq!(bench.repo.list().await.unwrap().len(), 4);
}
