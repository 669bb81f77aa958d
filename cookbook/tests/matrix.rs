//! Every codec, on every store, to every deployment: what is served is what was trained, bit for bit.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use towline_cookbook::engine::{ModelConfig, Rng};
use towline_cookbook::recipes::{Trainer, embedded_deployment};
use towline_cookbook::server::{Server, ServerOptions};
use towline_core::{
    Capabilities, ContentDigest, Deployment, DeploymentStatus, HotLoad, JobId, ReplicaStatus, Result,
    SnapshotId, SnapshotKind, SnapshotName, SnapshotStore, Weights, async_trait,
};
use towline_deploy::WeightSyncer;
use towline_storage::{SnapshotRepo, StoreOptions, Wanted};

/// A deployment without HTTP or a model: it holds weights and applies what it is told.
#[derive(Debug)]
struct Holder {
    repo: SnapshotRepo,
    served: Mutex<Option<(SnapshotId, Weights)>>,
}

impl Holder {
    fn served(&self) -> Option<(SnapshotId, Weights)> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Deployment for Holder {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(towline_codec::all().iter().map(|codec| codec.id()).collect())
    }

    async fn status(&self) -> Result<DeploymentStatus> {
        let mut replica = ReplicaStatus::new("holder");
        replica.ready = true;
        if let Some((id, _)) = self.served() {
            (replica.identity, replica.digest) = (Some(id.identity), Some(id.digest));
        }
        Ok(DeploymentStatus::new(vec![replica]))
    }

    async fn hot_load(&self, order: &HotLoad) -> Result<()> {
        let info = self.repo.find(order.snapshot.id.identity.as_str(), Wanted::Sampler).await?;
        let weights = match (info.kind, self.served()) {
            (SnapshotKind::Delta, Some((_, parent))) => self.repo.apply(&info, &parent).await?,
            _ => self.repo.restore(&info).await?,
        };
        *self.served.lock().unwrap_or_else(PoisonError::into_inner) = Some((info.id, weights));
        Ok(())
    }

    async fn warm_up(&self) -> Result<()> {
        Ok(())
    }
}

enum Served {
    Server(Server),
    Holder(Arc<Holder>),
}

impl Served {
    fn digest(&self) -> Option<ContentDigest> {
        match self {
            Self::Server(server) => Some(server.served()?.weights().content_digest()),
            Self::Holder(holder) => Some(holder.served()?.1.content_digest()),
        }
    }
}

async fn one(codec: &str, store: Arc<dyn SnapshotStore>, over_http: bool) -> (u64, u64) {
    let job = JobId::new(format!("matrix-{}", codec.replace('_', "-"))).unwrap();
    let repo = SnapshotRepo::new(Arc::clone(&store), job, towline_codec::all());
    let trainer = Trainer::start(&repo, &ModelConfig::tiny(), 3).await.unwrap();
    let (served, deployment): (Served, Arc<dyn Deployment>) = if over_http {
        let server = Server::start(store, ServerOptions::default()).await.unwrap();
        let deployment = embedded_deployment(&server.url()).unwrap();
        (Served::Server(server), deployment)
    } else {
        let holder = Arc::new(Holder { repo, served: Mutex::default() });
        (Served::Holder(Arc::clone(&holder)), holder)
    };
    let syncer = WeightSyncer::new(Arc::clone(&trainer.client) as _)
        .with_deployment(deployment)
        .with_compression_format(codec)
        .with_poll_interval(Duration::from_millis(2));
    let mut rng = Rng::new(9);
    let mut kinds = Vec::new();
    let (mut stored, mut full) = (0, 0);
    for step in 0..4 {
        let name = SnapshotName::new(format!("step-{step}")).unwrap();
        let receipt = syncer.save_and_hotload(name, None).await.unwrap();
        let trained = trainer.weights.published_weights().await.unwrap().content_digest();
        assert_eq!(served.digest(), Some(trained), "{codec}, step {step}");
        assert_eq!(receipt.snapshot.id.digest, trained);
        if receipt.snapshot.kind == SnapshotKind::Delta {
            assert_eq!(receipt.snapshot.codec.as_ref().unwrap().as_str(), codec);
            stored += receipt.stored_bytes;
            full += receipt.full_bytes;
        }
        kinds.push(receipt.snapshot.kind);
        trainer.supervised_step(&mut rng, 1e-4).await.unwrap();
    }
    assert_eq!(kinds, [SnapshotKind::Base, SnapshotKind::Delta, SnapshotKind::Delta, SnapshotKind::Delta]);
    trainer.client.close().await.unwrap();
    (stored, full)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_codecs_two_stores_two_deployments() {
    let codecs = towline_codec::all();
    assert_eq!(codecs.len(), 7);
    let directory = tempfile::tempdir().unwrap();
    for codec in codecs {
        let id = codec.id();
        for over_http in [true, false] {
            let local = directory.path().join(format!("{id}-{over_http}"));
            let stores = [("memory", "memory:".to_owned()), ("local", local.display().to_string())];
            for (name, url) in stores {
                let (stored, full) =
                    one(id.as_str(), towline_storage::open(&url, &StoreOptions::new()).unwrap(), over_http)
                        .await;
                println!(
                    "{id}, {name}, {}: {stored} of {full} bytes",
                    if over_http { "server" } else { "holder" }
                );
            }
        }
    }
}
