//! Publishing and restoring: what goes in comes out, and damage is found.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{MaskCodec, find, key, name, repo, session, shared, weights};
use futures_util::TryStreamExt as _;
use towline_core::pipeline::Limits;
use towline_core::safetensors::SafetensorsFiles;
use towline_core::testing::XorCodec;
use towline_core::{
    Codec, DType, ErrorKind, JobId, PutMode, SnapshotKind, SnapshotStore, TensorMeta, Weights,
};
use towline_storage::testing::{FaultStore, Plan};
use towline_storage::{
    FileSource, Local, Memory, Publish, SaveTrainState, SnapshotRepo, Wanted, Writer, jobs,
};

/// Every store of this crate, and what keeps it.
fn stores() -> Vec<(Arc<dyn SnapshotStore>, Option<tempfile::TempDir>)> {
    let dir = tempfile::tempdir().unwrap();
    vec![(Arc::new(Memory::new()), None), (Arc::new(Local::open(dir.path()).unwrap()), Some(dir))]
}

async fn base(writer: &Writer, text: &str) {
    let publish = Publish::new(name(text), SnapshotKind::Base, shared(text))
        .with_files(vec![("config.json".into(), Bytes::from_static(b"{\"model_type\":\"x\"}"))])
        .with_step(7);
    writer.publish(publish).await.unwrap();
}

async fn delta(writer: &Writer, text: &str, parent: &str, codec: Arc<dyn Codec>) {
    let info = find(writer.repo(), parent).await;
    let publish = Publish::new(name(text), SnapshotKind::Delta, shared(text))
        .with_parent(info, shared(parent))
        .with_codec(codec);
    let published = writer.publish(publish).await.unwrap();
    assert_eq!(published.kind, SnapshotKind::Delta);
    assert!(published.changed_share.is_some_and(|share| share > 0.3 && share < 0.9), "{published:?}");
    assert!(published.path.starts_with("job/snapshots/"), "{published:?}");
}

/// A base `a`, deltas `b`, `c`, `d` on it in both forms, and a base `e` in a container.
async fn chain(writer: &Writer) {
    base(writer, "a").await;
    delta(writer, "b", "a", Arc::new(XorCodec)).await;
    delta(writer, "c", "b", Arc::new(MaskCodec)).await;
    delta(writer, "d", "c", Arc::new(XorCodec)).await;
    let encoded = Publish::new(name("e"), SnapshotKind::Base, shared("e")).with_codec(Arc::new(XorCodec));
    writer.publish(encoded).await.unwrap();
}

#[tokio::test]
async fn bases_and_deltas_come_back_bit_for_bit() {
    for (store, _dir) in stores() {
        let repo = repo(Arc::clone(&store));
        let writer = repo.writer(session(1)).await.unwrap();
        chain(&writer).await;
        for (seq, text) in (1..).zip(["a", "b", "c", "d", "e"]) {
            let info = find(&repo, text).await;
            assert_eq!((info.seq, info.id.digest), (seq, weights(text).content_digest()));
            assert_eq!(repo.restore(&info).await.unwrap(), weights(text), "{text}");
            let one = repo.clone().with_limits(Limits::threads(3).with_window(1));
            let mut found = Vec::new();
            one.restore_each(&info, &mut |meta, data| {
                found.push((meta, data));
                Ok(())
            })
            .await
            .unwrap();
            assert!(found.windows(2).all(|pair| pair[0].0.name() < pair[1].0.name()));
            assert_eq!(Weights::new(found).unwrap(), weights(text));
            let verified = repo.verify(&info).await.unwrap();
            assert_eq!(verified.tensors, 9);
            assert_eq!(repo.find_digest(&info.id.digest).await.unwrap(), Some(info.clone()));
            assert_eq!(find(&repo, info.id.identity.as_str()).await, info);
            let manifest = repo.manifest(&info).await.unwrap();
            let reference = repo.reference(&info, &manifest);
            assert_eq!(
                (reference.full_bytes, reference.stored_bytes),
                (weights(text).byte_len(), info.stored_bytes)
            );
            assert_eq!(reference.manifest, Some(info.manifest));
        }
        let manifest = repo.manifest(&find(&repo, "d").await).await.unwrap();
        let base = manifest.base.unwrap();
        assert_eq!((base.seq, base.depth, manifest.parent.unwrap().seq), (1, 3, 3));
        assert!(manifest.files.len() > 2, "several files were wanted");
        // The delta's files hold the same tensors as the base's.
        let places = |manifest: &towline_core::Manifest| -> Vec<_> {
            manifest.tensors.iter().map(|tensor| manifest.files[tensor.file].path.clone()).collect()
        };
        let of = async |text: &str| places(&repo.manifest(&find(&repo, text).await).await.unwrap());
        assert_eq!(of("a").await, of("c").await);
        assert!(of("b").await.iter().all(|path| path.ends_with(".towline")));
        assert_eq!(jobs(&*store).await.unwrap(), [JobId::new("job").unwrap()]);
    }
}

#[tokio::test]
async fn a_delta_applies_to_its_parent_in_memory_and_shares_what_it_leaves() {
    let repo = repo(Arc::new(Memory::new()));
    let writer = repo.writer(session(1)).await.unwrap();
    chain(&writer).await;
    let mut current = weights("a");
    for text in ["b", "c", "d"] {
        let next = repo.apply(&find(&repo, text).await, &current).await.unwrap();
        assert_eq!(next, weights(text));
        for (meta, data) in next.iter() {
            let old = current.get(meta.name()).unwrap().1;
            let shared = data.as_ptr() == old.as_ptr();
            assert!(shared == (data == old) || data.is_empty(), "{}", meta.name());
        }
        current = next;
    }
    let mismatch = repo.apply(&find(&repo, "c").await, &weights("a")).await.unwrap_err();
    assert_eq!(mismatch.kind(), ErrorKind::ChainMismatch);
    let no_delta = repo.apply(&find(&repo, "a").await, &weights("a")).await.unwrap_err();
    assert_eq!(no_delta.kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn an_export_is_a_plain_folder() {
    for (store, _dir) in stores() {
        let repo = repo(store);
        let writer = repo.writer(session(1)).await.unwrap();
        chain(&writer).await;
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deep/out");
        repo.export(&find(&repo, "d").await, &out).await.unwrap();
        assert_eq!(read_folder(&out), weights("d"));
        assert_eq!(std::fs::read(out.join("config.json")).unwrap(), b"{\"model_type\":\"x\"}");
        let index = std::fs::read(out.join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], weights("d").byte_len());
        for meta in weights("d").tensors() {
            let file = index["weight_map"][meta.name()].as_str().unwrap();
            let file = SafetensorsFiles::open(vec![FileSource::open(&out.join(file)).unwrap()]).unwrap();
            assert!(
                towline_core::position(towline_core::TensorSource::tensors(&file), meta.name()).is_some()
            );
        }
        let again = repo.export(&find(&repo, "a").await, &out).await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "something was left beside");
    }
}

fn read_folder(dir: &Path) -> Weights {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|suffix| suffix == "safetensors"));
    let files = files.map(|path| FileSource::open(&path).unwrap()).collect();
    Weights::read_all(&SafetensorsFiles::open(files).unwrap()).unwrap()
}

#[tokio::test]
async fn a_base_lies_as_plain_files() {
    let dir = tempfile::tempdir().unwrap();
    let repo = repo(Arc::new(Local::open(dir.path()).unwrap()));
    base(&repo.writer(session(1)).await.unwrap(), "a").await;
    let info = find(&repo, "a").await;
    assert_eq!(read_folder(&dir.path().join("job").join(info.dir.as_str())), weights("a"));
    assert_eq!(repo.file(&info, "config.json").await.unwrap(), "{\"model_type\":\"x\"}");
    let missing = repo.file(&info, "tokenizer.json").await.unwrap_err();
    assert!(missing.help().unwrap().contains("config.json"), "{missing}");
}

#[tokio::test]
async fn a_train_state_comes_back_with_its_sections() {
    for (store, _dir) in stores() {
        let repo = repo(Arc::clone(&store));
        let writer = repo.writer(session(1)).await.unwrap();
        let sections = serde_json::json!({"rng": [1, 2, 3], "cursor": {"epoch": 4, "row": 5}});
        let save = |text: &str| {
            SaveTrainState::new(name(text), shared(text))
                .with_step(40)
                .with_ttl(Some(Duration::from_secs(3600)))
                .with_sections(sections.as_object().unwrap().clone())
        };
        let info = writer.save_state(save("s")).await.unwrap();
        // Counted from when the store wrote it, by its clock.
        let manifest = key(&format!("job/{}/manifest.json", info.dir));
        let written = store.head(&manifest).await.unwrap().modified_ms;
        assert_eq!((info.step, info.expires_ms), (Some(40), Some(written + 3_600_000)));
        let state = repo.load_state(&info).await.unwrap();
        assert_eq!(state.tensors, weights("s"));
        assert_eq!(serde_json::Value::from(state.manifest.sections), sections);
        // A state and a snapshot may have one name; two states may not, not even of two sessions.
        base(&writer, "s").await;
        let second = repo.writer(session(2)).await.unwrap();
        assert_eq!(second.save_state(save("s")).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
        base(&second, "s").await;
        assert_eq!(repo.find("s", Wanted::State).await.unwrap(), info);
        assert_eq!(repo.find("s", Wanted::Sampler).await.unwrap().seq, 3);
        let sampler = repo.find("s", Wanted::Sampler).await.unwrap();
        assert_eq!(repo.load_state(&sampler).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_and_leave_nothing() {
    let repo = repo(Arc::new(Memory::new()));
    assert_eq!(repo.list().await.unwrap(), []);
    assert_eq!(repo.find("a", Wanted::Any).await.unwrap_err().kind(), ErrorKind::NotFound);
    let writer = repo.writer(session(1)).await.unwrap();
    base(&writer, "a").await;
    let a = find(&repo, "a").await;
    let xor: Arc<dyn Codec> = Arc::new(XorCodec);
    let new = |kind| Publish::new(name("n"), kind, shared("n"));
    let (base_kind, delta_kind) = (SnapshotKind::Base, SnapshotKind::Delta);
    let other = Arc::new(Weights::new([]).unwrap());
    let stranger = {
        let mut stranger = a.clone();
        stranger.seq = 9;
        stranger
    };
    let file = |path: &str| vec![(path.to_owned(), Bytes::new())];
    for (what, publish, kind) in [
        ("taken", Publish::new(name("a"), base_kind, shared("a")), ErrorKind::AlreadyExists),
        ("state", new(SnapshotKind::State), ErrorKind::Invalid),
        ("no parent", new(delta_kind).with_codec(Arc::clone(&xor)), ErrorKind::Invalid),
        ("no codec", new(delta_kind).with_parent(a.clone(), shared("a")), ErrorKind::Invalid),
        ("parent of a base", new(base_kind).with_parent(a.clone(), shared("a")), ErrorKind::Invalid),
        ("mask base", new(base_kind).with_codec(Arc::new(MaskCodec)), ErrorKind::Unsupported),
        (
            "wrong parent",
            new(delta_kind).with_codec(Arc::clone(&xor)).with_parent(a.clone(), shared("b")),
            ErrorKind::ChainMismatch,
        ),
        (
            "wrong parent in the other form",
            new(delta_kind).with_codec(Arc::new(MaskCodec)).with_parent(a.clone(), shared("b")),
            ErrorKind::ChainMismatch,
        ),
        (
            "other tensors",
            new(delta_kind).with_codec(Arc::clone(&xor)).with_parent(a.clone(), other),
            ErrorKind::Invalid,
        ),
        (
            "unknown parent",
            new(delta_kind).with_codec(Arc::clone(&xor)).with_parent(stranger, shared("a")),
            ErrorKind::NotFound,
        ),
        ("our file", new(base_kind).with_files(file("manifest.json")), ErrorKind::Invalid),
        ("bad path", new(base_kind).with_files(file("../x")), ErrorKind::Invalid),
    ] {
        let error = writer.publish(publish).await.expect_err(what);
        assert_eq!(error.kind(), kind, "{what}: {error}");
    }
    assert_eq!(repo.list().await.unwrap(), std::slice::from_ref(&a));
    // None of it took a number.
    base(&writer, "z").await;
    assert_eq!(find(&repo, "z").await.seq, 2);
    let missing = repo.find("nobody", Wanted::Sampler).await.unwrap_err();
    assert!(missing.help().unwrap().contains("z-00000001, a-00000001"), "{missing}");
}

#[tokio::test]
async fn a_codec_that_was_not_given_is_named() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(Arc::clone(&store));
    chain(&repo.writer(session(1)).await.unwrap()).await;
    let poor = SnapshotRepo::new(store, repo.job().clone(), vec![Arc::new(XorCodec)]);
    assert_eq!(poor.restore(&find(&repo, "b").await).await.unwrap(), weights("b"));
    let error = poor.restore(&find(&repo, "d").await).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().contains("test-mask"), "{error}");
}

#[tokio::test]
async fn a_flipped_bit_in_any_file_is_found() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(Arc::clone(&store));
    let writer = repo.writer(session(1)).await.unwrap();
    chain(&writer).await;
    let state = writer.save_state(SaveTrainState::new(name("s"), shared("s"))).await.unwrap();
    let (d, e) = (find(&repo, "d").await, find(&repo, "e").await);
    let objects: Vec<_> = store.list(Some(&key("job"))).try_collect().await.unwrap();
    let mut tried = 0;
    for object in objects {
        let good = store.get(&object.key, None).await.unwrap();
        let path = object.key.as_str();
        if path.ends_with("/head.json") {
            continue;
        }
        let info = [&state, &e].into_iter().find(|info| path.contains(info.dir.as_str())).unwrap_or(&d);
        let last = good.len() - 1;
        for at in (0..good.len()).step_by(good.len() / 24 + 1).chain([8.min(last), last]) {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            store.put(&object.key, bad.into(), PutMode::Overwrite).await.unwrap();
            let error = repo.verify(info).await.expect_err(path);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{path} at {at}: {error}");
            // What reads weights finds it too, where it reads that byte at all.
            if let Ok(found) = repo.restore(info).await {
                assert_eq!(found, weights(info.name.as_str()), "{path} at {at}");
            }
            tried += 1;
        }
        store.put(&object.key, good.slice(..last), PutMode::Overwrite).await.unwrap();
        assert_eq!(repo.verify(info).await.expect_err(path).kind(), ErrorKind::Corrupt, "{path} cut");
        store.delete(&object.key).await.unwrap();
        let error = repo.verify(info).await.expect_err(path);
        assert_eq!(error.kind(), ErrorKind::NotFound, "{path} deleted: {error}");
        assert!(error.message().contains("is damaged") && error.help().is_some(), "{error:?}");
        store.put(&object.key, good, PutMode::Overwrite).await.unwrap();
    }
    assert!(tried > 500, "{tried}");
    for info in [&d, &e, &state] {
        repo.verify(info).await.unwrap();
    }
}

#[tokio::test]
async fn a_damaged_head_is_an_error_never_an_empty_list() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(Arc::clone(&store));
    let writer = repo.writer(session(1)).await.unwrap();
    base(&writer, "a").await;
    let head = key("job/head.json");
    let good = store.get(&head, None).await.unwrap();
    for length in (0..good.len()).step_by(7) {
        store.put(&head, good.slice(..length), PutMode::Overwrite).await.unwrap();
        assert_eq!(repo.list().await.unwrap_err().kind(), ErrorKind::Corrupt, "{length}");
    }
    let publish = Publish::new(name("b"), SnapshotKind::Base, shared("b"));
    assert_eq!(writer.publish(publish).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(repo.writer(session(2)).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn a_delta_without_its_parent_says_what_is_missing() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(Arc::clone(&store));
    chain(&repo.writer(session(1)).await.unwrap()).await;
    let d = find(&repo, "d").await;
    let head = key("job/head.json");
    let json: serde_json::Value = serde_json::from_slice(&store.get(&head, None).await.unwrap()).unwrap();
    // A head of version 1 had no digest.
    let mut json = json["head"].clone();
    json["live"].as_array_mut().unwrap().remove(1);
    store.put(&head, serde_json::to_vec(&json).unwrap().into(), PutMode::Overwrite).await.unwrap();
    let error = repo.restore(&d).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("b-00000001") && error.help().is_some(), "{error}");
}

#[tokio::test]
async fn chains_end_at_their_bound() {
    let repo = repo(Arc::new(Memory::new()));
    let writer = repo.writer(session(1)).await.unwrap();
    let tiny = |number: u32| {
        let meta = TensorMeta::new("t", DType::U32, [1]).unwrap();
        Arc::new(Weights::new([(meta, number.to_le_bytes().to_vec().into())]).unwrap())
    };
    let step = |number: u32| name(&format!("step-{number}"));
    writer.publish(Publish::new(step(0), SnapshotKind::Base, tiny(0))).await.unwrap();
    for number in 1..=1025 {
        let parent = find(&repo, step(number - 1).as_str()).await;
        let publish = Publish::new(step(number), SnapshotKind::Delta, tiny(number))
            .with_parent(parent, tiny(number - 1))
            .with_codec(Arc::new(XorCodec));
        match writer.publish(publish).await {
            Ok(_) => assert!(number <= 1024),
            Err(error) => {
                assert_eq!((number, error.kind()), (1025, ErrorKind::Invalid));
                assert_eq!(error.help(), Some("publish a base"));
            }
        }
    }
    assert_eq!(repo.restore(&find(&repo, "step-1024").await).await.unwrap(), *tiny(1024));
}

#[tokio::test]
async fn odd_sets_of_tensors_go_round() {
    let meta = |name: &str, length| TensorMeta::new(name, DType::U8, [length]).unwrap();
    let large = common::noise("large", (3 << 20) + 17);
    let sets = [
        Weights::default(),
        Weights::new([(meta("only-empty", 0), Bytes::new())]).unwrap(),
        Weights::new([(meta("large", large.len()), large)]).unwrap(),
    ];
    for (number, set) in sets.into_iter().enumerate() {
        let repo = repo(Arc::new(Memory::new())).with_limits(Limits::threads(2));
        let writer = repo.writer(session(1)).await.unwrap();
        let set = Arc::new(set);
        let base = Publish::new(name("a"), SnapshotKind::Base, Arc::<Weights>::clone(&set))
            .with_metadata(BTreeMap::from([("k".into(), "v".into())]));
        writer.publish(base).await.unwrap();
        let a = find(&repo, "a").await;
        for (text, codec) in [("b", Arc::new(XorCodec) as Arc<dyn Codec>), ("c", Arc::new(MaskCodec))] {
            let delta = Publish::new(name(text), SnapshotKind::Delta, Arc::<Weights>::clone(&set))
                .with_parent(a.clone(), Arc::<Weights>::clone(&set))
                .with_codec(codec);
            writer.publish(delta).await.unwrap();
            assert_eq!(repo.restore(&find(&repo, text).await).await.unwrap(), *set, "{number} {text}");
            repo.verify(&find(&repo, text).await).await.unwrap();
        }
        assert_eq!(repo.manifest(&a).await.unwrap().metadata["k"], "v");
        let dir = tempfile::tempdir().unwrap();
        repo.export(&a, &dir.path().join("out")).await.unwrap();
        assert_eq!(read_folder(&dir.path().join("out")), *set);
    }
}

/// What it costs to open the newest snapshot does not grow with what the job has.
#[tokio::test]
async fn opening_the_newest_takes_the_same_requests_with_ten_thousand() {
    let mut counts = Vec::new();
    for existing in [10, 10_000] {
        let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
        let counted = FaultStore::new(Arc::clone(&store), Plan::new(1));
        let repo = repo(Arc::new(counted.clone()));
        base(&repo.writer(session(1)).await.unwrap(), "first").await;
        // The others are there by the head's word alone.
        let head = key("job/head.json");
        let json: serde_json::Value = serde_json::from_slice(&store.get(&head, None).await.unwrap()).unwrap();
        let mut json = json["head"].clone();
        let first = json["live"][0].clone();
        let more = (2..existing).map(|seq| {
            let mut info = first.clone();
            info["seq"] = seq.into();
            info["dir"] = format!("snapshots/{seq:08}-first-{seq:016x}").into();
            info
        });
        json["live"].as_array_mut().unwrap().extend(more);
        json["next_seq"] = existing.into();
        store.put(&head, serde_json::to_vec(&json).unwrap().into(), PutMode::Overwrite).await.unwrap();
        base(&repo.writer(session(2)).await.unwrap(), "last").await;
        let before = counted.operations();
        let newest = repo.newest(Wanted::Sampler).await.unwrap().unwrap();
        assert_eq!((newest.seq, newest.name.as_str()), (existing, "last"));
        repo.manifest(&newest).await.unwrap();
        let opened = counted.operations() - before;
        assert_eq!(repo.restore(&newest).await.unwrap(), weights("last"));
        counts.push((opened, counted.operations() - before));
    }
    assert_eq!(counts[0], counts[1]);
    assert_eq!(counts[0].0, 4, "size and body of the head and of the manifest");
}
