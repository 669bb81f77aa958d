//! Your own deployment: a directory that always holds a whole plain model, for an engine that reads directories.
//!
//! cargo run -p towline-cookbook --example own_deployment

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use towline_cookbook::engine::{ModelConfig, Rng};
use towline_cookbook::recipes::Trainer;
use towline_core::{
    Capabilities, Deployment, DeploymentStatus, Error, HotLoad, JobId, ReplicaStatus, Result, SnapshotId,
    SnapshotName, Stage, async_trait,
};
use towline_deploy::WeightSyncer;
use towline_storage::{SnapshotRepo, Wanted};

/// `<root>/<identity>/` is a Hugging Face directory; `<root>/current` points at the one to serve.
#[derive(Debug)]
struct ModelDirectory {
    repo: SnapshotRepo,
    root: PathBuf,
    served: Mutex<Option<SnapshotId>>,
}

impl ModelDirectory {
    fn served(&self) -> Option<SnapshotId> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Deployment for ModelDirectory {
    fn capabilities(&self) -> Capabilities {
        // The store restores deltas before they get here, in every codec that it knows.
        Capabilities::new(towline_codec::auto_order().iter().map(|codec| codec.id()).collect())
    }

    async fn status(&self) -> Result<DeploymentStatus> {
        let mut replica = ReplicaStatus::new("directory");
        let served = self.served();
        replica.ready = true;
        replica.identity = served.as_ref().map(|served| served.identity.clone());
        replica.digest = served.map(|served| served.digest);
        replica.stage = Stage::Idle;
        Ok(DeploymentStatus::new(vec![replica]))
    }

    async fn hot_load(&self, order: &HotLoad) -> Result<()> {
        let target = &order.snapshot.id;
        if self.served().as_ref() == Some(target) {
            return Ok(());
        }
        if order.previous.is_some() && order.previous != self.served() {
            return Err(Error::chain_mismatch(format!("{target} is a delta on something else"))
                .with_help("order a base"));
        }
        let info = self.repo.find(target.identity.as_str(), Wanted::Sampler).await?;
        let directory = self.root.join(target.identity.as_str());
        self.repo.export(&info, &directory).await?;
        // A link is made beside and renamed: a reader finds the old model or the new one, never half of one.
        let failed = |error| Error::unavailable("the link cannot be moved").with_source(error);
        let link = self.root.join(".next");
        std::os::unix::fs::symlink(&directory, &link).map_err(failed)?;
        std::fs::rename(&link, self.root.join("current")).map_err(failed)?;
        *self.served.lock().unwrap_or_else(PoisonError::into_inner) = Some(target.clone());
        Ok(())
    }

    async fn warm_up(&self) -> Result<()> {
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let root = std::env::temp_dir().join(format!("towline-own-deployment-{}", std::process::id()));
    std::fs::create_dir_all(&root).map_err(|error| Error::unavailable("no directory").with_source(error))?;
    let repo =
        SnapshotRepo::new(Arc::new(towline_storage::Memory::new()), JobId::new("own")?, towline_codec::all());
    let trainer = Trainer::start(&repo, &ModelConfig::tiny(), 1).await?;
    let deployment = Arc::new(ModelDirectory { repo, root: root.clone(), served: Mutex::default() });
    let syncer = WeightSyncer::new(Arc::clone(&trainer.client) as _)
        .with_deployment(deployment)
        .with_compression_format("auto");
    let mut rng = Rng::new(1);
    for step in 0..3 {
        let receipt = syncer.save_and_hotload(SnapshotName::new(format!("step-{step:05}"))?, None).await?;
        let model = root.join("current/model.safetensors.index.json");
        println!("{} {}: plain model behind {}", receipt.snapshot.kind, receipt.snapshot.id, model.display());
        assert!(model.exists());
        trainer.supervised_step(&mut rng, 1e-3).await?;
    }
    trainer.client.close().await?;
    std::fs::remove_dir_all(&root).map_err(|error| Error::unavailable("not removed").with_source(error))
}
