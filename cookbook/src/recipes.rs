//! Ready-made compositions: what a recipe starts with, on embedded defaults.

use std::sync::Arc;
use std::time::Duration;

use towline_core::{
    AdamParams, Batch, Capabilities, Deployment, JobId, Loss, Result, SessionId, SnapshotStore,
    TrainingClient,
};
use towline_deploy::{DeploymentManager, WeightSyncer};
use towline_storage::SnapshotRepo;
use towline_trainer_client::{EmbeddedClient, PendingExt};

use crate::embedded::{EmbeddedTrainer, TrainerHandle};
use crate::engine::task::supervised_batch;
use crate::engine::{LocalTrainer, LoraConfig, ModelConfig, Rng, TensorBytes};
use crate::server::{Server, ServerOptions};

/// How long one operation of the embedded trainer or server may take in recipes: they take milliseconds.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// One client session of the embedded trainer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Trainer {
    /// Submits operations in order.
    pub client: Arc<EmbeddedClient>,
    /// A view of the weights.
    pub weights: TrainerHandle,
}

impl Trainer {
    /// A trainer with fresh weights from `seed`. Its session takes the job over from whoever wrote to it before.
    ///
    /// # Errors
    /// As the store answers.
    pub async fn start(repo: &SnapshotRepo, config: &ModelConfig, seed: u64) -> Result<Self> {
        Self::start_from(repo, LocalTrainer::new(config, seed)?).await
    }

    /// A trainer of a fresh LoRA adapter beside fresh base weights from `seed`; the adapter has a seed of its own. Its
    /// session takes the job over from whoever wrote to it before.
    ///
    /// # Errors
    /// `Invalid` for an adapter that does not fit the model; as the store answers.
    pub async fn start_lora(
        repo: &SnapshotRepo,
        config: &ModelConfig,
        seed: u64,
        lora: &LoraConfig,
    ) -> Result<Self> {
        let base = LocalTrainer::new(config, seed)?.export(config.dtype)?;
        let views = base.iter().map(|entry| TensorBytes::of(entry, config.dtype));
        Self::start_from(repo, LocalTrainer::with_lora(config, views, lora)?).await
    }

    /// A trainer that goes on from `trainer`. Its session takes the job over from whoever wrote to it before.
    ///
    /// # Errors
    /// As the store answers.
    pub async fn start_from(repo: &SnapshotRepo, trainer: LocalTrainer) -> Result<Self> {
        let embedded = EmbeddedTrainer::new(trainer, repo.writer(SessionId::from_random(random())).await?);
        let weights = embedded.handle();
        Ok(Self { client: Arc::new(EmbeddedClient::new(embedded)), weights })
    }

    /// One supervised step on a batch of 32 of the sorting task. Returns the mean loss of a token.
    ///
    /// # Errors
    /// As the trainer answers.
    pub async fn supervised_step(&self, rng: &mut Rng, learning_rate: f64) -> Result<f64> {
        let batch = Batch::new(supervised_batch(rng, 32), Loss::CrossEntropy);
        let forward = self.client.forward_backward(batch);
        let step = self.client.optim_step(AdamParams::new(learning_rate));
        let output = forward.wait(DEADLINE).await?;
        step.wait(DEADLINE).await?;
        Ok(output.loss)
    }
}

/// The hot-load API of a server that runs Towline's engine: it takes deltas in every codec, and LoRA adapters.
///
/// # Errors
/// `Invalid` for a URL that is none.
pub fn embedded_deployment(url: &str) -> Result<Arc<dyn Deployment>> {
    let codecs = towline_codec::auto_order().iter().map(|codec| codec.id()).collect();
    let capabilities = Capabilities::new(codecs).with_prompt_cache(true).with_adapters(true);
    Ok(Arc::new(DeploymentManager::new(url)?.with_capabilities(capabilities)))
}

/// A syncer from `trainer` to the embedded server at `url`: deltas in the best codec, or whole adapters from a LoRA
/// trainer, polled every 5 ms.
///
/// # Errors
/// `Invalid` for a URL that is none.
pub fn syncer(trainer: &Trainer, url: &str) -> Result<WeightSyncer> {
    let rank = trainer.weights.lora().map_or(0, |lora| u32::try_from(lora.rank).unwrap_or(u32::MAX));
    Ok(WeightSyncer::new(Arc::clone(&trainer.client) as _)
        .with_deployment(embedded_deployment(url)?)
        .with_compression_format("auto")
        .with_lora_rank(rank)
        .with_poll_interval(Duration::from_millis(5))
        .with_hotload_timeout(DEADLINE))
}

/// A store, a trainer and a server in one process.
#[derive(Debug)]
#[non_exhaustive]
pub struct Stack {
    /// The job's snapshots.
    pub repo: SnapshotRepo,
    /// The trainer.
    pub trainer: Trainer,
    /// The server, which reads the same store.
    pub server: Server,
}

impl Stack {
    /// Starts all three on `store`.
    ///
    /// # Errors
    /// As the store and the system answer.
    pub async fn start(store: Arc<dyn SnapshotStore>, job: &str) -> Result<Self> {
        let repo = SnapshotRepo::new(Arc::clone(&store), JobId::new(job)?, towline_codec::all());
        let trainer = Trainer::start(&repo, &ModelConfig::tiny(), 1).await?;
        let server = Server::start(store, ServerOptions::default()).await?;
        Ok(Self { repo, trainer, server })
    }

    /// A syncer from the trainer to the server.
    ///
    /// # Errors
    /// As [`syncer`].
    pub fn syncer(&self) -> Result<WeightSyncer> {
        syncer(&self.trainer, &self.server.url())
    }
}

/// Four bytes for a session id.
pub(crate) fn random() -> [u8; 4] {
    use std::hash::{BuildHasher, RandomState};
    let [a, b, c, d, ..] = RandomState::new().hash_one(std::process::id()).to_le_bytes();
    [a, b, c, d]
}
