//! The embedded trainer: real training in this process, its snapshots and states through the repo.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;
use towline_core::{
    AdamParams, Batch, CheckpointCatalog as _, CheckpointClass, CheckpointRef, ContentDigest, DeltaParents,
    Error, ExportRequest, ForwardBackward, JobId, LOOP, OptimStep, Result, SaveState, SnapshotIdentity,
    SnapshotKind, SnapshotRef, StateRef, Weights, async_trait,
};
use towline_storage::{Publish, SaveTrainState, SnapshotRepo, Wanted, Writer};
use towline_trainer_client::Backend;

use crate::bridge;
use crate::engine::{self, LocalTrainer, Model, ModelConfig, WeightDtype};

/// How many exported sets of weights are kept in memory as possible parents; older ones come from the store.
const KEPT_PARENTS: usize = 3;

/// A [`LocalTrainer`] whose sampler snapshots and train states go through a [`Writer`].
#[derive(Debug)]
pub struct EmbeddedTrainer {
    trainer: Arc<Mutex<LocalTrainer>>,
    config: ModelConfig,
    dtype: WeightDtype,
    writer: Writer,
    recent: VecDeque<(ContentDigest, Arc<Weights>)>,
    restored: Option<ContentDigest>,
}

impl EmbeddedTrainer {
    /// A trainer whose weights are published in the type that its configuration names.
    #[must_use]
    pub fn new(trainer: LocalTrainer, writer: Writer) -> Self {
        let config = trainer.config().clone();
        let dtype = config.dtype;
        let trainer = Arc::new(Mutex::new(trainer));
        Self { trainer, config, dtype, writer, recent: VecDeque::new(), restored: None }
    }

    /// A view of the weights that stays when the trainer has gone into a client.
    #[must_use]
    pub fn handle(&self) -> TrainerHandle {
        TrainerHandle { trainer: Arc::clone(&self.trainer), dtype: self.dtype }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut LocalTrainer) -> engine::Result<T> + Send + 'static,
    ) -> Result<T> {
        run(&self.trainer, work).await
    }

    async fn parent(&self, digest: &ContentDigest) -> Result<Arc<Weights>> {
        if let Some((_, weights)) = self.recent.iter().find(|(known, _)| known == digest) {
            return Ok(Arc::clone(weights));
        }
        let repo = self.writer.repo();
        match repo.find_digest(digest).await? {
            Some(info) => Ok(Arc::new(repo.restore(&info).await?)),
            None => Err(Error::chain_mismatch(format!(
                "the store of job {} holds no weights {digest}",
                repo.job()
            ))
            .with_help("save a base")),
        }
    }

    fn keep(&mut self, digest: ContentDigest, weights: Arc<Weights>) {
        self.recent.retain(|(known, _)| *known != digest);
        self.recent.push_front((digest, weights));
        self.recent.truncate(KEPT_PARENTS);
    }
}

/// A view of an embedded trainer's current weights.
#[derive(Debug, Clone)]
pub struct TrainerHandle {
    trainer: Arc<Mutex<LocalTrainer>>,
    dtype: WeightDtype,
}

impl TrainerHandle {
    /// The model on the weights as they would be published now: rounded.
    ///
    /// # Errors
    /// `Invalid` if a weight is not finite.
    pub async fn published_model(&self) -> Result<Model> {
        let dtype = self.dtype;
        run(&self.trainer, move |trainer| trainer.published_model(dtype)).await
    }

    /// The weights as they would be published now.
    ///
    /// # Errors
    /// `Invalid` if a weight is not finite.
    pub async fn published_weights(&self) -> Result<Weights> {
        let dtype = self.dtype;
        bridge::weights(run(&self.trainer, move |trainer| trainer.export(dtype)).await?, dtype)
    }
}

/// Runs `work` on the trainer, off the runtime's own threads.
async fn run<T: Send + 'static>(
    trainer: &Arc<Mutex<LocalTrainer>>,
    work: impl FnOnce(&mut LocalTrainer) -> engine::Result<T> + Send + 'static,
) -> Result<T> {
    let trainer = Arc::clone(trainer);
    let done = tokio::task::spawn_blocking(move || {
        work(&mut trainer.lock().unwrap_or_else(PoisonError::into_inner))
    });
    match done.await {
        Ok(result) => Ok(result?),
        Err(error) => Err(Error::internal("the training step panicked").with_source(error)),
    }
}

#[async_trait]
impl Backend for EmbeddedTrainer {
    fn delta_parents(&self) -> DeltaParents {
        DeltaParents::Any
    }

    fn restored(&self) -> Option<ContentDigest> {
        self.restored
    }

    async fn holds(&mut self, digest: &ContentDigest) -> Result<bool> {
        let known = self.recent.iter().any(|(known, _)| known == digest);
        Ok(known || self.writer.repo().find_digest(digest).await?.is_some())
    }

    async fn forward_backward(&mut self, batch: Batch) -> Result<ForwardBackward> {
        let output = self.run(move |trainer| trainer.forward_backward(&batch.data, batch.loss)).await?;
        Ok(ForwardBackward::new(output.loss, output.logprobs))
    }

    async fn optim_step(&mut self, params: AdamParams) -> Result<OptimStep> {
        let output = self.run(move |trainer| trainer.optim_step(&params)).await?;
        Ok(OptimStep::new(output.step, output.grad_norm))
    }

    async fn export(&mut self, request: ExportRequest) -> Result<SnapshotRef> {
        let dtype = self.dtype;
        let weights =
            Arc::new(bridge::weights(self.run(move |trainer| trainer.export(dtype)).await?, dtype)?);
        let step = self.run(|trainer| Ok(trainer.step())).await?;
        let mut publish = Publish::new(request.name, request.kind, Arc::clone(&weights) as _)
            .with_files(vec![bridge::config_file(&self.config)])
            .with_ttl(request.ttl)
            .with_step(step);
        match (request.kind, request.parent) {
            (SnapshotKind::Base, _) => {}
            (SnapshotKind::Delta, Some(parent)) => {
                let old = self.parent(&parent.digest).await?;
                let info = self.writer.repo().find_digest(&parent.digest).await?.ok_or_else(|| {
                    Error::chain_mismatch(format!("{parent} is no longer in the store"))
                        .with_help("save a base")
                })?;
                publish =
                    publish.with_parent(info, old).with_codec(towline_codec::by_id(request.codec.as_str())?);
            }
            (kind, _) => {
                return Err(Error::unsupported(format!(
                    "the embedded trainer trains all parameters: it has no {kind}"
                ))
                .with_help("save a base or a delta"));
            }
        }
        let snapshot = self.writer.publish(publish).await?;
        self.keep(snapshot.id.digest, weights);
        Ok(snapshot)
    }

    async fn save_state(&mut self, request: SaveState) -> Result<StateRef> {
        let (weights, optimizer, step) = self
            .run(|trainer| {
                Ok((trainer.export(WeightDtype::F32)?, trainer.optimizer_state()?, trainer.step()))
            })
            .await?;
        let mut sections = serde_json::Map::new();
        let config: serde_json::Value = serde_json::from_str(&self.config.to_json())
            .map_err(|error| Error::internal("the configuration is no JSON").with_source(error))?;
        sections.insert("trainer".into(), json!({"optimizer_step": step, "config": config}));
        sections.insert(LOOP.into(), serde_json::Value::Object(request.loop_state));
        let state = SaveTrainState::new(request.name, bridge::state_tensors(weights, optimizer)?)
            .with_step(step)
            .with_ttl(request.ttl)
            .with_sections(sections);
        let info = self.writer.save_state(state).await?;
        Ok(StateRef::new(info.name, format!("{}/{}", self.writer.repo().job(), info.dir), step))
    }

    async fn load_state(&mut self, state: &StateRef, with_optimizer: bool) -> Result<()> {
        let repo = repo_of(self.writer.repo(), &state.path)?;
        let info = repo.find(state.name.as_str(), Wanted::State).await?;
        let stored = repo.load_state(&info).await?;
        let step = stored.manifest.step.unwrap_or(0);
        self.run(move |trainer| {
            trainer.load_weights(bridge::section(&stored.tensors, bridge::WEIGHTS))?;
            if with_optimizer {
                trainer.load_optimizer_state(step, bridge::section(&stored.tensors, bridge::OPTIMIZER))?;
            }
            Ok(())
        })
        .await?;
        // What the restored weights are once they are rounded for serving: a deployment may have them already.
        let dtype = self.dtype;
        let rounded = bridge::weights(self.run(move |trainer| trainer.export(dtype)).await?, dtype)?;
        self.restored = Some(rounded.content_digest());
        Ok(())
    }
}

/// The loop's own entries of a saved state.
///
/// # Errors
/// `NotFound` if there is no such state; as the store answers.
pub async fn loop_state(
    repo: &SnapshotRepo,
    state: &StateRef,
) -> Result<serde_json::Map<String, serde_json::Value>> {
    let repo = repo_of(repo, &state.path)?;
    let name = CheckpointRef::Local(SnapshotIdentity::new(state.name.as_str())?);
    let found = repo.resolve_checkpoint(&name, repo.job(), CheckpointClass::State).await?;
    repo.loop_state(&found).await
}

/// The repo of the job that a state's path names.
fn repo_of(repo: &SnapshotRepo, path: &str) -> Result<SnapshotRepo> {
    match path.split_once('/') {
        Some((job, _)) if job != repo.job().as_str() => Ok(repo.of_job(JobId::new(job)?)),
        Some(_) | None => Ok(repo.clone()),
    }
}
