//! The embedded server against bad snapshots and bad orders: each is refused, and the old weights keep serving.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use towline_cookbook::bridge;
use towline_cookbook::client::Completions;
use towline_cookbook::engine::{LocalTrainer, ModelConfig, WeightDtype};
use towline_cookbook::recipes::embedded_deployment;
use towline_cookbook::server::{Server, ServerOptions};
use towline_core::{
    Deployment, ErrorKind, HotLoad, JobId, ObjectKey, OpId, Outcome, PutMode, SessionId, SnapshotKind,
    SnapshotName, SnapshotRef, SnapshotStore, TensorMeta, Weights,
};
use towline_storage::{Publish, SnapshotRepo, Wanted, Writer};

struct Bench {
    store: Arc<dyn SnapshotStore>,
    repo: SnapshotRepo,
    writer: Writer,
    server: Server,
    deployment: Arc<dyn Deployment>,
    good: SnapshotRef,
    ops: u64,
}

fn weights(seed: u64) -> Weights {
    let trainer = LocalTrainer::new(&ModelConfig::tiny(), seed).unwrap();
    bridge::weights(trainer.export(WeightDtype::Bf16).unwrap(), WeightDtype::Bf16).unwrap()
}

impl Bench {
    async fn new() -> Self {
        let store: Arc<dyn SnapshotStore> = Arc::new(towline_storage::Memory::new());
        let repo =
            SnapshotRepo::new(Arc::clone(&store), JobId::new("refusals").unwrap(), towline_codec::all());
        let writer = repo.writer(SessionId::new("0000bbbb").unwrap()).await.unwrap();
        let server = Server::start(Arc::clone(&store), ServerOptions::default()).await.unwrap();
        let deployment = embedded_deployment(&server.url()).unwrap();
        let good = publish(&writer, "good", weights(0)).await;
        let mut bench = Self { store, repo, writer, server, deployment, good: good.clone(), ops: 0 };
        bench.order(&good).await.unwrap();
        bench
    }

    /// Orders a load and waits for its end.
    async fn order(&mut self, snapshot: &SnapshotRef) -> Result<(), String> {
        self.ops += 1;
        let op = OpId::new(format!("op-{}", self.ops)).unwrap();
        let order = HotLoad::new(op, snapshot.clone()).unwrap();
        self.deployment.hot_load(&order).await.map_err(|error| error.report())?;
        for _ in 0..3000 {
            match self.deployment.status().await.unwrap().outcome(&snapshot.id) {
                Outcome::Committed => return Ok(()),
                Outcome::Failed(why) => return Err(why),
                Outcome::Running => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        panic!("no end in 15 s");
    }

    /// The order is refused with `why` in its reason, and the good weights still answer.
    async fn refused(&mut self, snapshot: &SnapshotRef, why: &str) {
        let reason = self.order(snapshot).await.expect_err("a bad snapshot was loaded");
        assert!(reason.contains(why), "wanted `{why}` in: {reason}");
        let scored = Completions::new(&self.server.url()).unwrap().score(&[51, 49], &self.good.id).await;
        assert!(scored.is_ok(), "the old weights must keep serving: {scored:?}");
        assert_eq!(self.server.served().unwrap().weights().content_digest(), self.good.id.digest);
    }

    /// The stored weights file of a snapshot, changed.
    async fn damage(&self, snapshot: &SnapshotRef, change: impl FnOnce(&mut Vec<u8>)) {
        let info = self.repo.find(snapshot.id.identity.as_str(), Wanted::Sampler).await.unwrap();
        let manifest = self.repo.manifest(&info).await.unwrap();
        let file = manifest.files.iter().find(|file| file.weights).unwrap();
        let key = ObjectKey::new(format!("{}/{}", snapshot.path, file.path)).unwrap();
        let mut bytes = self.store.get(&key, None).await.unwrap().to_vec();
        change(&mut bytes);
        self.store.put(&key, bytes.into(), PutMode::Overwrite).await.unwrap();
    }
}

async fn publish(writer: &Writer, name: &str, weights: Weights) -> SnapshotRef {
    let publish = Publish::new(SnapshotName::new(name).unwrap(), SnapshotKind::Base, Arc::new(weights) as _)
        .with_files(vec![bridge::config_file(&ModelConfig::tiny())]);
    writer.publish(publish).await.unwrap()
}

async fn publish_delta(
    bench: &Bench,
    name: &str,
    parent: &SnapshotRef,
    old: Weights,
    new: Weights,
) -> SnapshotRef {
    let info = bench.repo.find(parent.id.identity.as_str(), Wanted::Sampler).await.unwrap();
    let publish = Publish::new(SnapshotName::new(name).unwrap(), SnapshotKind::Delta, Arc::new(new) as _)
        .with_files(vec![bridge::config_file(&ModelConfig::tiny())])
        .with_parent(info, Arc::new(old) as _)
        .with_codec(towline_codec::by_id("arc_v2").unwrap());
    bench.writer.publish(publish).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_tensor_and_a_wrong_shape() {
    let mut bench = Bench::new().await;
    let all: Vec<_> = weights(1).iter().map(|(meta, data)| (meta.clone(), data.clone())).collect();
    let missing = publish(&bench.writer, "missing", Weights::new(all[1..].to_vec()).unwrap()).await;
    bench.refused(&missing, all[0].0.name()).await;
    let mut reshaped = all.clone();
    let (meta, data) = &all[0];
    let flat = TensorMeta::new(meta.name(), meta.dtype(), [meta.elements()]).unwrap();
    reshaped[0] = (flat, data.clone());
    let wrong = publish(&bench.writer, "shape", Weights::new(reshaped).unwrap()).await;
    bench.refused(&wrong, all[0].0.name()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_digest_and_a_truncated_file() {
    let mut bench = Bench::new().await;
    let flipped = publish(&bench.writer, "flipped", weights(1)).await;
    bench.damage(&flipped, |bytes| *bytes.last_mut().unwrap() ^= 1).await;
    bench.refused(&flipped, "corrupt").await;
    let cut = publish(&bench.writer, "cut", weights(2)).await;
    bench.damage(&cut, |bytes| bytes.truncate(bytes.len() - 7)).await;
    bench.refused(&cut, "corrupt").await;
    let delta = publish_delta(&bench, "delta", &bench.good.clone(), weights(0), weights(3)).await;
    bench
        .damage(&delta, |bytes| {
            let at = bytes.len() - 40;
            bytes[at] ^= 0x10;
        })
        .await;
    bench.refused(&delta, "corrupt").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_parent_and_a_delta_sent_as_a_full_snapshot() {
    let mut bench = Bench::new().await;
    let other = publish(&bench.writer, "other", weights(1)).await;
    let delta = publish_delta(&bench, "on-other", &other, weights(1), weights(2)).await;
    bench.refused(&delta, "chain_mismatch").await;
    // What the public Python client does after its first hot-load failed: a delta without its metadata.
    let http = towline_deploy::http_client(&bench.server.url(), Duration::from_secs(10)).unwrap();
    let url = format!("{}/hot_load/v1/models/hot_load", bench.server.url());
    let body = json!({"identity": delta.id.identity, "reset_prompt_cache": true});
    let response = http.post(&url).json(&body).send().await.unwrap();
    assert_eq!(response.status(), 412);
    assert!(response.text().await.unwrap().contains("ordered as a full snapshot"));
    // And after a later one failed: the right delta, with the wrong previous identity.
    let metadata = json!({
        "previous_snapshot_identity": bench.good.id.identity, "compression_format": "arc_v2",
        "checksum_format": "alder32",
    });
    let body = json!({"identity": delta.id.identity, "incremental_snapshot_metadata": metadata});
    assert_eq!(http.post(&url).json(&body).send().await.unwrap().status(), 412);
    bench.refused(&delta, "chain_mismatch").await;
    // Put right, it loads.
    bench.order(&other).await.unwrap();
    bench.order(&delta).await.unwrap();
    assert_eq!(bench.server.served().unwrap().weights().content_digest(), weights(2).content_digest());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_get_a_reason_and_nothing_before_the_first_load() {
    let store: Arc<dyn SnapshotStore> = Arc::new(towline_storage::Memory::new());
    let options = ServerOptions::default().with_ready_after(Duration::from_millis(400));
    let server = Server::start(store, options).await.unwrap();
    let http = towline_deploy::http_client(&server.url(), Duration::from_secs(10)).unwrap();
    let post =
        |path: &str, body: &str| http.post(format!("{}{path}", server.url())).body(body.to_owned()).send();
    let hot_load = "/hot_load/v1/models/hot_load";
    // Health is green before hot-loads are taken.
    let health = http.get(format!("{}/health", server.url())).send().await.unwrap();
    assert!(health.status().is_success());
    let early = post(hot_load, r#"{"identity": "x-00000000"}"#).await.unwrap();
    assert_eq!(early.status(), 503);
    let deployment = embedded_deployment(&server.url()).unwrap();
    assert!(!deployment.status().await.unwrap().replicas[0].ready);
    for _ in 0..100 {
        if deployment.status().await.unwrap().replicas[0].ready {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (path, body, status) in [
        ("/v1/completions", "", 400),
        ("/v1/completions", "{", 400),
        ("/v1/completions", r#"{"prompt": 7}"#, 400),
        ("/v1/completions", r#"{"prompt": "a"}"#, 503),
        (hot_load, "[]", 400),
        (hot_load, r#"{"identity": "x", "surprise": 1}"#, 400),
        (hot_load, r#"{"identity": ""}"#, 400),
        (hot_load, r#"{"identity": "absent-00000000"}"#, 404),
        ("/nowhere", "{}", 404),
    ] {
        let response = post(path, body).await.unwrap();
        assert_eq!(response.status(), status, "{path} {body}");
        assert!(response.text().await.unwrap().contains("message"), "{path} {body}");
    }
    let status = deployment.status().await.unwrap();
    assert_eq!(status.served().unwrap(), None);
    let order = HotLoad::new(OpId::new("gone").unwrap(), Bench::new().await.good).unwrap();
    assert_eq!(deployment.hot_load(&order).await.unwrap_err().kind(), ErrorKind::NotFound);
}
