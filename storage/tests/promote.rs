//! Promotion to the model registry, and the repo as a catalog of checkpoints.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::{find, key, name, repo, session, shared, weights};
use futures_util::future::join_all;
use towline_core::safetensors::SafetensorsFiles;
use towline_core::testing::XorCodec;
use towline_core::{
    CheckpointCatalog, CheckpointClass, CheckpointRef, ErrorKind, JobId, ModelId, ModelKind, PutMode,
    SnapshotKind, SnapshotStore, Weights,
};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan};
use towline_storage::{
    FileSource, Local, Memory, Promote, Prune, Publish, Retention, SaveTrainState, SnapshotRepo, Wanted,
    Writer,
};

/// How long a dead process is waited for. One that is only slow is given up too, which is another kind of death.
const SOON: Duration = Duration::from_millis(20);

fn to(model: &str) -> Promote {
    Promote::new(ModelId::new(model).unwrap())
}

fn job(text: &str) -> JobId {
    JobId::new(text).unwrap()
}

/// Base `a` with files beside it, delta `b` on it, train state `s`.
async fn fill(repo: &SnapshotRepo, writer: &Writer) {
    let files = vec![
        ("config.json".to_owned(), Bytes::from_static(b"{\"a\":1}")),
        ("tokenizer.json".to_owned(), Bytes::from_static(b"[]")),
    ];
    let base = Publish::new(name("a"), SnapshotKind::Base, shared("a")).with_files(files).with_step(4);
    writer.publish(base).await.unwrap();
    let a = find(repo, "a").await;
    let delta = Publish::new(name("b"), SnapshotKind::Delta, shared("b")).with_step(5);
    writer.publish(delta.with_parent(a, shared("a")).with_codec(Arc::new(XorCodec))).await.unwrap();
    writer.save_state(SaveTrainState::new(name("s"), shared("s")).with_step(6)).await.unwrap();
}

/// Base, delta and state of job `job` in `store`.
async fn filled(store: Arc<dyn SnapshotStore>) -> SnapshotRepo {
    let repo = repo(store);
    let writer = repo.writer(session(1)).await.unwrap();
    fill(&repo, &writer).await;
    repo
}

/// The weights of a promoted model in a folder, by the reader of plain folders.
fn read(dir: &std::path::Path) -> Weights {
    let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let weights = paths.filter(|path| path.extension().is_some_and(|text| text == "safetensors"));
    let files = weights.map(|path| FileSource::open(&path).unwrap()).collect();
    Weights::read_all(&SafetensorsFiles::open(files).unwrap()).unwrap()
}

#[tokio::test]
async fn a_base_becomes_a_plain_folder_once() {
    let dir = tempfile::tempdir().unwrap();
    let repo = filled(Arc::new(Local::open(dir.path()).unwrap())).await;
    let told = Arc::new(Mutex::new(Vec::new()));
    let listener = Arc::clone(&told);
    let order = to("my-model").with_progress(move |done, all| listener.lock().unwrap().push((done, all)));
    let model = repo.promote("a", &order).await.unwrap();
    assert_eq!((model.name.as_str(), model.kind), ("accounts/local/models/my-model", ModelKind::HfBaseModel));
    let source = &model.source;
    assert_eq!((source.job.as_str(), source.step, source.kind), ("job", Some(4), SnapshotKind::Base));
    let folder = dir.path().join(&model.path);
    assert_eq!(read(&folder), weights("a"));
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{\"a\":1}");
    assert_eq!(std::fs::read(folder.join("tokenizer.json")).unwrap(), b"[]");
    let told = std::mem::take(&mut *told.lock().unwrap());
    assert!(told.is_sorted() && told.last().is_some_and(|(done, all)| done == all), "{told:?}");
    // Again, and by its identity: nothing happens. Pruning leaves its source alone.
    assert_eq!(repo.promote(model.source.id.identity.as_str(), &order).await.unwrap(), model);
    let prune = Prune::new(Retention::new().with_last_snapshots(1).unwrap()).with_grace(Duration::ZERO);
    repo.prune(&prune).await.unwrap();
    assert!(repo.find("a", Wanted::Sampler).await.is_ok());
    assert_eq!(repo.models().await.unwrap(), [model]);
    // Another source is refused and changes nothing, the pin neither.
    let writer = repo.writer(session(2)).await.unwrap();
    writer.publish(Publish::new(name("z"), SnapshotKind::Base, shared("z"))).await.unwrap();
    let pins = repo.pins().await.unwrap();
    let error = repo.promote("z", &to("my-model")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(
        error.message(),
        format!(
            "accounts/local/models/my-model is there already, from {} of job job",
            pins_source(&repo).await
        )
    );
    assert_eq!(repo.pins().await.unwrap(), pins);
    assert_eq!(read(&folder), weights("a"));
    assert_eq!(towline_storage::jobs(&Local::open(dir.path()).unwrap()).await.unwrap(), [job("job")]);
}

#[tokio::test]
async fn an_adapter_is_one_plain_file_and_its_configuration_whatever_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let repo = repo(Arc::new(Local::open(dir.path()).unwrap())).with_shard_bytes(1);
    let writer = repo.writer(session(1)).await.unwrap();
    let config = ("adapter_config.json".to_owned(), Bytes::from_static(b"{\"r\":8}"));
    let adapter = |text: &str| Publish::new(name(text), SnapshotKind::Adapter, shared("a"));
    let saved = writer.publish(adapter("a").with_files(vec![config.clone()])).await.unwrap();
    assert_eq!((saved.kind, saved.codec), (SnapshotKind::Adapter, None));
    let info = find(&repo, "a").await;
    assert_eq!(repo.restore(&info).await.unwrap(), weights("a"));
    let files = |folder: &std::path::Path| {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let both = ["adapter_config.json", "adapter_model.safetensors"];
    let stored: Vec<_> =
        repo.manifest(&info).await.unwrap().files.into_iter().map(|file| file.path).collect();
    assert_eq!(stored, ["adapter_model.safetensors", "adapter_config.json"]);
    let model = repo.promote("a", &to("addon")).await.unwrap();
    assert_eq!(model.kind, ModelKind::HfPeftAddon);
    let folder = dir.path().join(&model.path);
    assert_eq!(files(&folder), [&both[..], &["towline.json"]].concat());
    assert_eq!(read(&folder), weights("a"));
    let copy = dir.path().join("copy");
    repo.export(&info, &copy).await.unwrap();
    assert_eq!((files(&copy), read(&copy)), (both.map(str::to_owned).to_vec(), weights("a")));

    for (publish, says) in [
        (adapter("b"), "`b`: an adapter without `adapter_config.json`"),
        (
            adapter("c").with_files(vec![config.clone()]).with_codec(Arc::new(XorCodec)),
            "`c`: an adapter in codec test-xor",
        ),
        (
            adapter("d").with_files(vec![config, ("adapter_model.safetensors".to_owned(), Bytes::new())]),
            "`d`: the file name `adapter_model.safetensors` is taken",
        ),
    ] {
        let error = writer.publish(publish).await.unwrap_err();
        assert_eq!((error.kind(), error.message()), (ErrorKind::Invalid, says));
    }
}

async fn pins_source(repo: &SnapshotRepo) -> String {
    repo.models().await.unwrap()[0].source.id.to_string()
}

#[tokio::test]
async fn what_cannot_be_promoted_says_what_can() {
    let dir = tempfile::tempdir().unwrap();
    let repo = filled(Arc::new(Local::open(dir.path()).unwrap())).await;
    let (a, b) = (find(&repo, "a").await.id, find(&repo, "b").await.id);
    for (text, kind, message, help) in [
        (
            "b",
            ErrorKind::Invalid,
            format!("{b} is a delta: only full weights can be promoted"),
            format!("promote its base {a}, or have its full weights written with `--materialise`"),
        ),
        (
            "s",
            ErrorKind::Invalid,
            "s-00000001 is a train state: it can be resumed from, never promoted".to_owned(),
            "promote a sampler checkpoint of type base".to_owned(),
        ),
        (
            "x",
            ErrorKind::NotFound,
            "job job has no snapshot called `x`".to_owned(),
            format!("use one of {b}, {a}"),
        ),
    ] {
        let error = repo.promote(text, &to("m")).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.message(), error.help()),
            (kind, message.as_str(), Some(help.as_str()))
        );
    }
    assert!(repo.pins().await.unwrap().is_empty() && repo.models().await.unwrap().is_empty());
    // The delta's full weights, with the files that its base came with.
    let model = repo.promote("b", &to("m").with_materialise(true).with_account(job("acme"))).await.unwrap();
    assert_eq!(model.name, "accounts/acme/models/m");
    let folder = dir.path().join("models/m");
    assert_eq!(read(&folder), weights("b"));
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{\"a\":1}");
    // So with a base that is kept encoded.
    let writer = repo.writer(session(2)).await.unwrap();
    let encoded = Publish::new(name("e"), SnapshotKind::Base, shared("e")).with_codec(Arc::new(XorCodec));
    writer.publish(encoded).await.unwrap();
    repo.promote("e", &to("e")).await.unwrap();
    assert_eq!(read(&dir.path().join("models/e")), weights("e"));
}

#[tokio::test]
async fn a_death_at_any_operation_leaves_a_claim_that_the_same_source_finishes() {
    // How many operations a whole promotion takes.
    let whole = FaultStore::new(Arc::new(Memory::new()), Plan::default());
    let repo = filled(Arc::new(whole.clone())).await;
    let before = whole.operations();
    repo.promote("b", &to("m").with_materialise(true)).await.unwrap();
    let count = whole.operations() - before;
    assert!(count > 20, "{count}");
    for (number, after) in (0..count).flat_map(|number| [(number, false), (number, true)]) {
        let store = FaultStore::new(Arc::new(Memory::new()), Plan::default());
        let repo = filled(Arc::new(store.clone())).await;
        let at = store.operations() + number;
        if after {
            store.crash_after(at)
        } else {
            store.crash_before(at)
        }
        let dying = repo.clone().with_deadline(SOON);
        let (order, other) = (to("m").with_materialise(true), to("m"));
        let died = tokio::time::timeout(SOON, dying.promote("b", &order)).await;
        let survivor = common::repo(store.inner());
        let visible = survivor.models().await.unwrap();
        assert!(visible.is_empty() || matches!(died, Ok(Ok(_))) || after && number + 1 == count, "{number}");
        let claimed = survivor.promote("a", &other).await;
        let again = survivor.promote("b", &order).await;
        match claimed {
            // Dead before the claim: whoever comes first has the id.
            Ok(_) => assert_eq!(again.unwrap_err().kind(), ErrorKind::AlreadyExists, "{number}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{number}: {error}");
                again.unwrap();
            }
        }
        let model = survivor.models().await.unwrap().remove(0);
        let wanted = weights(if model.source.name == name("a") { "a" } else { "b" });
        let index = store.inner().get(&key("models/m/model.safetensors.index.json"), None).await.unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        for (meta, data) in wanted.iter() {
            let file = index["weight_map"][meta.name()].as_str().unwrap();
            let body = store.inner().get(&key(&format!("models/m/{file}")), None).await.unwrap();
            let whole = Weights::read_all(&SafetensorsFiles::open(vec![body]).unwrap()).unwrap();
            assert_eq!(whole.get(meta.name()).unwrap().1, data, "{number}");
        }
    }
}

#[tokio::test]
async fn damage_is_not_promoted_and_lost_answers_are_no_failure() {
    let store = Arc::new(Memory::new());
    let repo = filled(Arc::clone(&store) as _).await;
    let info = find(&repo, "a").await;
    let file = repo.manifest(&info).await.unwrap().files[0].path.clone();
    let file = key(&format!("job/{}/{file}", info.dir));
    let good = store.get(&file, None).await.unwrap();
    let mut bad = good.to_vec();
    *bad.last_mut().unwrap() ^= 1;
    store.put(&file, bad.into(), PutMode::Overwrite).await.unwrap();
    let error = repo.promote("a", &to("m")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(repo.models().await.unwrap().is_empty());
    store.put(&file, good, PutMode::Overwrite).await.unwrap();
    repo.promote("a", &to("m")).await.unwrap();
    // A record that is not what was written is an error, not another model.
    let record = key("models/m/towline.json");
    let text = store.get(&record, None).await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap().replacen("\"step\": 4", "\"step\": 5", 1);
    store.put(&record, text.into(), PutMode::Overwrite).await.unwrap();
    assert_eq!(repo.promote("a", &to("m")).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(repo.models().await.unwrap_err().kind(), ErrorKind::Corrupt);

    for fault in [ErrorKind::Unavailable, ErrorKind::Conflict, ErrorKind::AlreadyExists] {
        for (operation, ending) in [(Operation::Put, "towline.json"), (Operation::Finish, ".safetensors")] {
            let store = FaultStore::new(Arc::new(Memory::new()), Plan::default());
            let repo = filled(Arc::new(store.clone())).await;
            store.script(operation, ending, [Fault::Lose(fault), Fault::Lose(fault)]);
            repo.promote("a", &to("m")).await.unwrap();
            assert_eq!((store.left(), repo.models().await.unwrap().len()), (0, 1));
        }
    }
}

#[tokio::test]
async fn of_many_sources_one_has_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let repo = filled(Arc::new(Local::open(dir.path()).unwrap())).await;
    let writer = repo.writer(session(2)).await.unwrap();
    let names: Vec<_> = (0..6).map(|number| format!("n-{number}")).collect();
    for text in &names {
        writer.publish(Publish::new(name(text), SnapshotKind::Base, shared(text))).await.unwrap();
    }
    let order = to("m");
    let all =
        join_all(names.iter().flat_map(|text| [text, text]).map(|text| repo.promote(text, &order))).await;
    let won: Vec<_> = all.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
    assert!(won.len() == 2 && won[0] == won[1], "{all:?}");
    assert!(
        all.iter().filter_map(|outcome| outcome.as_ref().err()).all(|e| e.kind() == ErrorKind::AlreadyExists)
    );
    assert_eq!(read(&dir.path().join("models/m")), weights(won[0].source.name.as_str()));
    assert_eq!(repo.pins().await.unwrap().len(), 1, "only the winner is kept");
}

#[tokio::test]
async fn checkpoints_are_listed_by_page_and_resolved_by_reference() {
    let repo = filled(Arc::new(Memory::new())).await;
    let (here, catalog): (_, &dyn CheckpointCatalog) = (job("job"), &repo);
    let all = catalog.list_checkpoints(&here).await.unwrap();
    let shown: Vec<_> =
        all.iter().map(|info| (info.name.as_str(), info.resumable, info.promotable, info.step)).collect();
    assert_eq!(
        shown,
        [("s", true, false, Some(6)), ("b", false, false, Some(5)), ("a", false, true, Some(4))]
    );
    assert_eq!(all[1].parent, Some(all[2].id.clone()));
    let first = catalog.list_page(&here, None, 2).await.unwrap();
    let second = catalog.list_page(&here, first.next.as_deref(), 2).await.unwrap();
    assert_eq!((&first.checkpoints[..], &second.checkpoints[..], second.next), (&all[..2], &all[2..], None));
    assert_eq!(catalog.list_page(&here, Some("x"), 2).await.unwrap_err().kind(), ErrorKind::Invalid);
    let missing = catalog.list_checkpoints(&job("other")).await.unwrap_err();
    assert_eq!((missing.kind(), missing.message()), (ErrorKind::NotFound, "job other does not exist"));

    let resolve = async |text: &str, class| {
        let reference: CheckpointRef = text.parse().unwrap();
        catalog.resolve_checkpoint(&reference, &here, class).await
    };
    use CheckpointClass::{Sampler, State};
    for (text, class, found) in [
        ("s", State, 0),
        ("s-00000001", State, 0),
        ("job:s", State, 0),
        ("cross_job://job/s", State, 0),
        ("tinker://job/weights/s", State, 0),
        ("tinker://job/sampler_weights/a", Sampler, 2),
        ("b", Sampler, 1),
    ] {
        assert_eq!(resolve(text, class).await.unwrap(), all[found], "{text}");
    }
    for (text, class, kind, message) in [
        (
            "a",
            State,
            ErrorKind::Invalid,
            "a-00000001 of job job is a sampler checkpoint (base): wanted a train state",
        ),
        (
            "s",
            Sampler,
            ErrorKind::Invalid,
            "s-00000001 of job job is a train state (state): wanted a sampler checkpoint",
        ),
        (
            "tinker://job/sampler_weights/a",
            State,
            ErrorKind::Invalid,
            "tinker://job/sampler_weights/a names another class of checkpoint: wanted a train state",
        ),
        ("x", State, ErrorKind::NotFound, "job job has no train state called `x`"),
        ("other:s", State, ErrorKind::NotFound, "job other has no train state called `s`"),
        (
            "tinker://job/external_weights/a",
            Sampler,
            ErrorKind::Unsupported,
            "tinker://job/external_weights/a is not in this store",
        ),
    ] {
        let error = resolve(text, class).await.unwrap_err();
        assert_eq!((error.kind(), error.message()), (kind, message));
        assert!(error.help().is_some(), "{text}");
    }
    let state = all[0].state().unwrap();
    assert_eq!((state.name.as_str(), state.step), ("s", 6));
    assert!(all[2].state().unwrap_err().message().contains("wanted a train state"));
    let model = catalog.promote_checkpoint(&here, &all[2].id.identity, &ModelId::new("m").unwrap()).await;
    assert_eq!(model.unwrap().source, all[2]);
}
