//! The deployment kit on the embedded server, driven over HTTP: real models, real deltas, real damage.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use towline_cookbook::bridge;
use towline_cookbook::engine::{LocalTrainer, ModelConfig, WeightDtype};
use towline_cookbook::recipes::embedded_deployment;
use towline_cookbook::server::{Server, ServerOptions};
use towline_core::testing::DeploymentHarness;
use towline_core::{
    ContentDigest, Deployment, JobId, ObjectKey, PutMode, Result, SessionId, SnapshotKind, SnapshotName,
    SnapshotRef, SnapshotStore, Weights, async_trait,
};
use towline_storage::{Publish, SnapshotRepo, Wanted, Writer};

towline_core::deployment_conformance!(embedded_server, async { Harness::start().await });

struct Harness {
    store: Arc<dyn SnapshotStore>,
    repo: SnapshotRepo,
    writer: Writer,
    server: Server,
    deployment: Arc<dyn Deployment>,
    count: AtomicU64,
}

impl Harness {
    async fn start() -> Self {
        let store: Arc<dyn SnapshotStore> = Arc::new(towline_storage::Memory::new());
        let repo = SnapshotRepo::new(Arc::clone(&store), JobId::new("kit").unwrap(), towline_codec::all());
        let writer = repo.writer(SessionId::new("0000dddd").unwrap()).await.unwrap();
        let server = Server::start(Arc::clone(&store), ServerOptions::default()).await.unwrap();
        let deployment = embedded_deployment(&server.url()).unwrap();
        Self { store, repo, writer, server, deployment, count: AtomicU64::new(0) }
    }

    fn publication(&self, kind: SnapshotKind, weights: &Weights) -> Publish {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let name = SnapshotName::new(format!("snapshot-{number}")).unwrap();
        Publish::new(name, kind, Arc::new(weights.clone()) as _)
            .with_files(vec![bridge::config_file(&ModelConfig::tiny())])
    }
}

#[async_trait]
impl DeploymentHarness for Harness {
    fn deployment(&self) -> Arc<dyn Deployment> {
        Arc::clone(&self.deployment)
    }

    async fn publish(&self, weights: &Weights) -> Result<SnapshotRef> {
        self.writer.publish(self.publication(SnapshotKind::Base, weights)).await
    }

    async fn publish_delta(&self, parent: &SnapshotRef, weights: &Weights) -> Result<SnapshotRef> {
        let info = self.repo.find(parent.id.identity.as_str(), Wanted::Sampler).await?;
        let old = self.repo.restore(&info).await?;
        let delta = self.publication(SnapshotKind::Delta, weights).with_parent(info, Arc::new(old) as _);
        self.writer.publish(delta.with_codec(towline_codec::by_id("arc_v3")?)).await
    }

    async fn served(&self) -> Result<Option<ContentDigest>> {
        Ok(self.server.served().map(|served| served.weights().content_digest()))
    }

    fn weights(&self, seed: u64) -> Weights {
        let trainer = LocalTrainer::new(&ModelConfig::tiny(), seed).unwrap();
        bridge::weights(trainer.export(WeightDtype::Bf16).unwrap(), WeightDtype::Bf16).unwrap()
    }

    async fn corrupt(&self, snapshot: &SnapshotRef) -> Result<bool> {
        let info = self.repo.find(snapshot.id.identity.as_str(), Wanted::Sampler).await?;
        let manifest = self.repo.manifest(&info).await?;
        for file in manifest.files.iter().filter(|file| file.weights) {
            let key = ObjectKey::new(format!("{}/{}", snapshot.path, file.path))?;
            let mut bytes = self.store.get(&key, None).await?.to_vec();
            let middle = bytes.len() * 3 / 4;
            bytes[middle] ^= 0x55;
            self.store.put(&key, bytes.into(), PutMode::Overwrite).await?;
        }
        Ok(true)
    }
}
