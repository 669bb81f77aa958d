//! Verification to several depths, and the doctor on good and bad stores.

mod common;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;

use common::{find, name, session, shared};
use towline_core::{ErrorKind, ObjectKey, PutMode, SnapshotKind, SnapshotStore};
use towline_storage::testing::{Lie, LyingStore};
use towline_storage::{Depth, Memory, Prune, Publish, Retention, SaveTrainState, SnapshotRepo};

async fn filled(store: &Arc<dyn SnapshotStore>) -> SnapshotRepo {
    let repo = common::repo(Arc::clone(store));
    let writer = repo.writer(session(1)).await.unwrap();
    writer.publish(Publish::new(name("a"), SnapshotKind::Base, shared("a"))).await.unwrap();
    writer.save_state(SaveTrainState::new(name("s"), shared("s"))).await.unwrap();
    repo
}

/// The largest file below a folder of the job: one with tensors.
async fn largest(store: &Arc<dyn SnapshotStore>, dir: &ObjectKey) -> ObjectKey {
    let folder = ObjectKey::new(format!("job/{dir}")).unwrap();
    let listed: Vec<_> = store.list(Some(&folder)).map(Result::unwrap).collect().await;
    let tensors = listed.into_iter().filter(|object| object.key.as_str().ends_with(".safetensors"));
    tensors.max_by_key(|object| object.size).unwrap().key
}

async fn damage(store: &Arc<dyn SnapshotStore>, key: &ObjectKey, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = store.get(key, None).await.unwrap().to_vec();
    change(&mut bytes);
    store.put(key, bytes.into(), PutMode::Overwrite).await.unwrap();
}

#[tokio::test]
async fn each_depth_finds_what_it_looks_for() {
    for text in ["a", "s"] {
        let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
        let repo = filled(&store).await;
        let info = find(&repo, text).await;
        let tensors = shared(text).tensors().len() as u64;
        assert_eq!(repo.verify_to(&info, Depth::Quick).await.unwrap().tensors, 0);
        assert_eq!(repo.verify_to(&info, Depth::Sample(1.0)).await.unwrap().tensors, tensors);
        assert_eq!(repo.verify_to(&info, Depth::Full).await.unwrap().tensors, tensors);
        for share in [-0.1, 1.1, f64::NAN] {
            let error = repo.verify_to(&info, Depth::Sample(share)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
        // The last byte is a tensor's: the sizes are right.
        let file = largest(&store, &info.dir).await;
        damage(&store, &file, |bytes| *bytes.last_mut().unwrap() ^= 1).await;
        assert!(repo.verify_to(&info, Depth::Quick).await.is_ok());
        for depth in [Depth::Sample(1.0), Depth::Full] {
            assert_eq!(repo.verify_to(&info, depth).await.unwrap_err().kind(), ErrorKind::Corrupt);
        }
        damage(&store, &file, |bytes| bytes.truncate(bytes.len() - 1)).await;
        assert_eq!(repo.verify_to(&info, Depth::Quick).await.unwrap_err().kind(), ErrorKind::Corrupt);
        store.delete(&file).await.unwrap();
        let error = repo.verify_to(&info, Depth::Quick).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
    }
}

#[tokio::test]
async fn a_good_store_is_well() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = filled(&store).await;
    let findings = repo.doctor().await;
    assert!(findings.iter().all(|finding| finding.good), "{findings:#?}");
    assert_eq!(findings.len(), 7);
    // Nothing of it stays.
    assert!(store.get(&ObjectKey::new("job/doctor").unwrap(), None).await.is_err());
    let pruned = repo.prune(&Prune::new(Retention::new()).with_grace(Duration::ZERO)).await.unwrap();
    assert!(pruned.orphans.is_empty());
}

#[tokio::test]
async fn lies_and_losses_are_found() {
    for (lie, what) in [
        (Lie::OverwritesOnCreate, "create of what exists"),
        (Lie::AcceptsStaleUpdates, "update of an old version"),
    ] {
        let store: Arc<dyn SnapshotStore> = Arc::new(LyingStore::new(Arc::new(Memory::new()), &[lie]));
        let findings = filled(&store).await.doctor().await;
        let bad: Vec<_> = findings.iter().filter(|finding| !finding.good).collect();
        assert!(bad.iter().any(|finding| finding.what == what && finding.help.is_some()), "{bad:#?}");
    }
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = filled(&store).await;
    let info = find(&repo, "a").await;
    store.delete(&ObjectKey::new(format!("job/{}/manifest.json", info.dir)).unwrap()).await.unwrap();
    let findings = repo.doctor().await;
    let bad: Vec<_> = findings.iter().filter(|finding| !finding.good).map(|finding| finding.what).collect();
    assert_eq!(bad, ["files"]);
}
