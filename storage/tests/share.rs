//! Train states that refer to tensors of earlier ones.

mod common;

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{key, name, noise, repo, session};
use futures_util::TryStreamExt as _;
use towline_core::{DType, ErrorKind, PutMode, SnapshotStore, TensorMeta, Weights};
use towline_storage::{
    Kept, Local, Memory, Prune, Pruned, RankPart, Retention, SaveTrainState, SnapshotInfo, SnapshotRepo,
    Writer,
};

/// A tower that is frozen, of more than one block, a head that is trained, whose end differs alone, and small ones.
fn weights(text: &str) -> Arc<Weights> {
    let tensor = |title: &str, elements: usize, data: Bytes| {
        (TensorMeta::new(title, DType::F32, [elements / 8, 8]).unwrap(), data)
    };
    let mut head = noise("head", 4 * (600 << 10)).to_vec();
    let end = head.len() - 1;
    head[end] = text.len() as u8;
    let tower = noise("tower", 4 * (700 << 10));
    Arc::new(
        Weights::new([
            tensor("empty", 0, Bytes::new()),
            tensor("head", 600 << 10, head.into()),
            tensor("norm", 64, noise("norm", 256)),
            tensor("scale", 64, noise(text, 256)),
            tensor("tower", 700 << 10, tower),
        ])
        .unwrap(),
    )
}

const TOWER: u64 = 4 * (700 << 10);

struct Bench {
    store: Arc<dyn SnapshotStore>,
    repo: SnapshotRepo,
    writer: Writer,
}

async fn bench(store: Arc<dyn SnapshotStore>) -> Bench {
    let repo = repo(Arc::clone(&store)).with_shard_bytes(2 << 20);
    let writer = repo.writer(session(1)).await.unwrap();
    Bench { store, repo, writer }
}

impl Bench {
    async fn save(&self, text: &str, earlier: Option<&SnapshotInfo>) -> towline_core::Result<SnapshotInfo> {
        let mut save = SaveTrainState::new(name(text), weights(text));
        if let Some(earlier) = earlier {
            save = save.with_shared(earlier.clone());
        }
        self.writer.save_state(save).await
    }

    async fn check(&self, info: &SnapshotInfo) {
        let state = self.repo.load_state(info).await.unwrap();
        assert!(state.tensors == *weights(info.name.as_str()), "{} came back with other weights", info.id);
        let verified = self.repo.verify(info).await.unwrap();
        assert_eq!(verified.tensors, 5);
    }

    async fn prune(&self) -> Pruned {
        let retention = Retention::new().with_last_states(1).unwrap();
        self.repo.prune(&Prune::new(retention).with_grace(Duration::ZERO)).await.unwrap()
    }

    async fn folders(&self) -> BTreeSet<String> {
        let objects: Vec<_> = self.store.list(Some(&key("job/states"))).try_collect().await.unwrap();
        objects.iter().map(|object| object.key.as_str().split('/').nth(2).unwrap().to_owned()).collect()
    }
}

async fn stores() -> (tempfile::TempDir, Vec<Arc<dyn SnapshotStore>>) {
    let dir = tempfile::tempdir().unwrap();
    let local = Local::open(dir.path()).unwrap();
    (dir, vec![Arc::new(Memory::new()), Arc::new(local)])
}

#[tokio::test]
async fn what_is_the_same_is_referred_to_and_stays() {
    let (_dir, stores) = stores().await;
    for store in stores {
        let bench = bench(store).await;
        let first = bench.save("first", None).await.unwrap();
        let second = bench.save("second", Some(&first)).await.unwrap();
        let third = bench.save("thirdly", Some(&second)).await.unwrap();
        let alone = bench.save("alone-too", None).await.unwrap();
        assert!(first.shares.is_empty() && alone.shares.is_empty());
        assert_eq!(second.shares, BTreeSet::from([first.dir.clone()]));
        // Not through the second one: what it refers to is referred to where it lies.
        assert_eq!(third.shares, BTreeSet::from([first.dir.clone()]));
        for info in [&second, &third] {
            assert!(info.stored_bytes + TOWER <= first.stored_bytes, "{}", info.stored_bytes);
            assert_eq!(info.full_bytes, first.full_bytes);
        }
        for info in [&first, &second, &third, &alone] {
            bench.check(info).await;
        }
        let wanted = weights("thirdly").content_digest();
        assert_eq!(third.id.digest, wanted, "sharing changes no identity");

        let pin = bench.repo.pin(&third, "keep", "a test").await;
        pin.unwrap();
        let pruned = bench.prune().await;
        let given_up: Vec<_> = pruned.given_up.iter().map(|info| info.name.as_str()).collect();
        assert_eq!(given_up, ["second"]);
        let why = pruned.kept.iter().find(|(info, _)| info.seq == first.seq).map(|(_, why)| why.clone());
        assert_eq!(why, Some(Kept::NeededBy(third.seq)));
        bench.prune().await;
        assert_eq!(bench.folders().await.len(), 3);
        bench.check(&third).await;

        bench.repo.unpin("keep").await.unwrap();
        bench.prune().await;
        bench.prune().await;
        assert_eq!(bench.folders().await.len(), 1);
        bench.check(&alone).await;
    }
}

#[tokio::test]
async fn what_is_given_up_is_not_shared() {
    let bench = bench(Arc::new(Memory::new())).await;
    let first = bench.save("first", None).await.unwrap();
    let second = bench.save("second", None).await.unwrap();
    let pruned = bench.prune().await;
    assert_eq!(pruned.given_up.len(), 1);
    // Its files may still be there, and are no reason to build on it.
    let error = bench.save("third", Some(&first)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{}", error.report());
    assert_eq!(bench.repo.list().await.unwrap(), std::slice::from_ref(&second));
    bench.check(&bench.save("third", Some(&second)).await.unwrap()).await;
}

#[tokio::test]
async fn damage_of_a_shared_file_is_found() {
    let bench = bench(Arc::new(Memory::new())).await;
    let first = bench.save("first", None).await.unwrap();
    let second = bench.save("second", Some(&first)).await.unwrap();
    let folder = key("job").join(first.dir.as_str()).unwrap();
    let files: Vec<_> = bench.store.list(Some(&folder)).try_collect().await.unwrap();
    let tower = files.iter().max_by_key(|object| object.size).unwrap();
    let mut body = bench.store.get(&tower.key, None).await.unwrap().to_vec();
    let at = body.len() - 100;
    body[at] ^= 1;
    bench.store.put(&tower.key, body.into(), PutMode::Overwrite).await.unwrap();
    let error = bench.repo.load_state(&second).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.report().contains("tower"), "{}", error.report());
    assert_eq!(bench.repo.verify(&second).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

fn half(text: &str, rank: usize) -> RankPart {
    let all = weights(text);
    let mut tensors = Vec::new();
    let mut part = Vec::new();
    for (meta, data) in all.iter() {
        let rows = meta.shape()[0];
        if rows < 2 {
            if rank == 0 {
                tensors.push((meta.clone(), data.clone()));
            }
            continue;
        }
        let bytes = data.len() / 2;
        let own = TensorMeta::new(meta.name(), meta.dtype(), [rows / 2, 8]).unwrap();
        tensors.push((own, data.slice(rank * bytes..(rank + 1) * bytes)));
        part.push((meta.clone(), rank * rows / 2));
    }
    part.into_iter().fold(RankPart::new(Arc::new(Weights::new(tensors).unwrap())), |part, (meta, row)| {
        part.with_box(meta.name(), meta.name(), meta.shape(), [row, 0])
    })
}

#[tokio::test]
async fn ranks_share_their_boxes_and_a_second_attempt_deletes_nothing_of_others() {
    let bench = bench(Arc::new(Memory::new())).await;
    let two = NonZeroU32::new(2).unwrap();
    let mut saved: Vec<SnapshotInfo> = Vec::new();
    for text in ["first", "second"] {
        let mut state = SaveTrainState::ranked(name(text));
        if let Some(earlier) = saved.first() {
            state = state.with_shared(earlier.clone());
        }
        let begun = bench.writer.begin_state(state, two).await.unwrap();
        for rank in [0, 1, 1] {
            bench.repo.write_rank(begun.ticket(), rank, &half(text, rank as usize)).await.unwrap();
        }
        saved.push(begun.commit(&[], Duration::from_secs(5)).await.unwrap());
    }
    assert_eq!(saved[1].shares, BTreeSet::from([saved[0].dir.clone()]));
    assert!(saved[1].stored_bytes + TOWER <= saved[0].stored_bytes);
    for info in &saved {
        bench.check(info).await;
    }
    // One process cuts in other boxes: it finds none of its own, and shares only what nobody cut.
    let alone = bench.save("third", Some(&saved[0])).await.unwrap();
    assert!(alone.stored_bytes > TOWER);
    bench.check(&alone).await;
}
