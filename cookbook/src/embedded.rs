//! The embedded trainer: real training in this process, its snapshots and states through the repo.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use towline_core::{
    AdamParams, AdapterSource, Batch, CheckpointCatalog as _, CheckpointClass, CheckpointRef, ContentDigest,
    DeltaParents, Error, ExportRequest, ForwardBackward, JobId, LOOP, OptimStep, Result, SaveState,
    SnapshotIdentity, SnapshotKind, SnapshotName, SnapshotRef, StateRef, Weights, async_trait,
};
use towline_storage::{Publish, SaveTrainState, SnapshotRepo, Wanted, Writer};
use towline_trainer_client::Backend;

use crate::adapter::{self, Adapter};
use crate::bridge;
use crate::engine::{self, LocalTrainer, LoraConfig, Model, ModelConfig, WeightDtype};

/// How many exported sets of weights are kept in memory as possible parents; older ones come from the store.
const KEPT_PARENTS: usize = 3;

/// The section of a train state that says what was trained.
const TRAINER: &str = "trainer";

/// A [`LocalTrainer`] whose sampler snapshots and train states go through a [`Writer`].
///
/// One that trains a LoRA adapter saves the whole adapter whatever type is asked for, a merged base excepted. With its
/// first adapter it publishes the base weights too, as `base-<digest>` and pinned, unless the job has them: a server finds
/// there what an adapter is to be put on.
#[derive(Debug)]
pub struct EmbeddedTrainer {
    trainer: Arc<Mutex<LocalTrainer>>,
    config: ModelConfig,
    dtype: WeightDtype,
    lora: Option<Lora>,
    writer: Writer,
    recent: VecDeque<(ContentDigest, Arc<Weights>)>,
    restored: Option<ContentDigest>,
}

/// What is known of a LoRA trainer's base and adapter.
#[derive(Debug)]
struct Lora {
    config: LoraConfig,
    /// The content digest of the base weights, once it was needed.
    base: Option<ContentDigest>,
    /// The snapshot of the base, once this trainer has seen to it that it is there.
    published: Option<SnapshotIdentity>,
    /// Whether the adapter was trained or loaded: fresh factors change nothing.
    ready: bool,
}

/// What a train state says of the adapter that it holds.
#[derive(Debug, Serialize, Deserialize)]
struct SavedLora {
    #[serde(flatten)]
    config: LoraConfig,
    /// The base weights, by content digest.
    base: ContentDigest,
}

impl EmbeddedTrainer {
    /// A trainer whose weights are published in the type that its configuration names; an adapter's factors in 32 bits.
    #[must_use]
    pub fn new(trainer: LocalTrainer, writer: Writer) -> Self {
        let config = trainer.config().clone();
        let lora = trainer.lora().map(|config| Lora {
            config: config.clone(),
            base: None,
            published: None,
            ready: trainer.step() > 0,
        });
        let dtype = if lora.is_some() { WeightDtype::F32 } else { config.dtype };
        let trainer = Arc::new(Mutex::new(trainer));
        Self { trainer, config, dtype, lora, writer, recent: VecDeque::new(), restored: None }
    }

    /// A view of the weights that stays when the trainer has gone into a client.
    #[must_use]
    pub fn handle(&self) -> TrainerHandle {
        let lora = self.lora.as_ref().map(|lora| lora.config.clone());
        let (trainer, config) = (Arc::clone(&self.trainer), self.config.clone());
        TrainerHandle { trainer, config, lora, dtype: self.dtype }
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

/// The adapter's side.
impl EmbeddedTrainer {
    /// The adapter's configuration and the content digest of its base.
    async fn lora(&mut self) -> Result<(LoraConfig, ContentDigest)> {
        let (config, known) = match &self.lora {
            Some(lora) => (lora.config.clone(), lora.base),
            None => return Err(no_adapter("this trainer")),
        };
        let base = match known {
            Some(base) => base,
            None => self.handle().base_weights().await?.content_digest(),
        };
        if let Some(lora) = &mut self.lora {
            lora.base = Some(base);
        }
        Ok((config, base))
    }

    /// Sees to it that the job has the base weights for good, and says as which snapshot.
    async fn publish_base(&mut self, base: &ContentDigest) -> Result<SnapshotIdentity> {
        if let Some(published) = self.lora.as_ref().and_then(|lora| lora.published.clone()) {
            return Ok(published);
        }
        let short: String = base.to_string().chars().take(12).collect();
        let name = format!("base-{short}");
        let repo = self.writer.repo();
        let info = match repo.find_digest(base).await? {
            Some(info) => info,
            None => {
                let weights = Arc::new(self.handle().base_weights().await?);
                let publish =
                    Publish::new(SnapshotName::new(name.as_str())?, SnapshotKind::Base, weights as _)
                        .with_files(vec![bridge::config_file(&self.config)]);
                let snapshot = self.writer.publish(publish).await?;
                repo.find(snapshot.id.identity.as_str(), Wanted::Sampler).await?
            }
        };
        repo.pin(&info, &name, "LoRA adapters are put on it").await?;
        if let Some(lora) = &mut self.lora {
            lora.published = Some(info.id.identity.clone());
        }
        Ok(info.id.identity)
    }

    /// An adapter, or its base with it folded in.
    async fn export_lora(&mut self, request: ExportRequest) -> Result<SnapshotRef> {
        let (config, base) = self.lora().await?;
        let handle = self.handle();
        let step = self.run(|trainer| Ok(trainer.step())).await?;
        let (kind, weights, files) = if request.kind == SnapshotKind::MergedBase {
            if self.lora.as_ref().is_some_and(|lora| !lora.ready) {
                return Err(Error::invalid(
                    "a merged base was asked for, but the adapter was neither trained nor loaded yet",
                )
                .with_help("take an optimizer step, or load a state or an adapter, and save then"));
            }
            (request.kind, handle.merged_weights().await?, vec![bridge::config_file(&self.config)])
        } else {
            let published = self.publish_base(&base).await?;
            let name = format!("{}/{published}", self.writer.repo().job());
            let files = vec![adapter::config_file(&config, &name, &base)?];
            (SnapshotKind::Adapter, handle.published_weights().await?, files)
        };
        let publish = Publish::new(request.name, kind, Arc::new(weights) as _)
            .with_files(files)
            .with_ttl(request.ttl)
            .with_step(step);
        self.writer.publish(publish).await
    }

    /// Refuses a train state of something else than what is trained here.
    async fn check_state(&mut self, state: &str, sections: &Map<String, Value>) -> Result<()> {
        let saved = sections.get(TRAINER).and_then(|section| section.get("lora"));
        let saved: Option<SavedLora> = match saved {
            None | Some(Value::Null) => None,
            Some(saved) => Some(SavedLora::deserialize(saved).map_err(|error| {
                Error::corrupt(format!("state {state} does not tell its adapter")).with_source(error)
            })?),
        };
        let what = format!("state {state}");
        match (saved, &self.lora) {
            (None, None) => Ok(()),
            (Some(saved), None) => Err(Error::invalid(format!(
                "{what} holds a LoRA adapter ({}); this trainer trains all parameters",
                saved.config
            ))
            .with_help("load it into a trainer of that adapter, or begin with a merged base")),
            (None, Some(lora)) => Err(Error::invalid(format!(
                "{what} holds all parameters; this trainer trains a LoRA adapter ({})",
                lora.config
            ))
            .with_help("load it into a full-parameter trainer, or put the adapter on its weights as a base")),
            (Some(saved), Some(_)) => {
                let (config, base) = self.lora().await?;
                adapter::fits(&what, (&saved.config, Some(&saved.base)), (&config, &base))
            }
        }
    }

    async fn read_adapter(&self, source: &AdapterSource) -> Result<Adapter> {
        match source {
            AdapterSource::Checkpoint(reference) => {
                let repo = self.writer.repo();
                let class = CheckpointClass::Sampler;
                let found = repo.resolve_checkpoint(reference, repo.job(), class).await?;
                let repo = repo.of_job(found.job);
                let info = repo.find(found.id.identity.as_str(), Wanted::Sampler).await?;
                Adapter::read_snapshot(&self.config, &repo, &info).await
            }
            AdapterSource::Folder(folder) => {
                let (config, folder) = (self.config.clone(), folder.clone());
                let read = tokio::task::spawn_blocking(move || Adapter::read_folder(&config, &folder));
                read.await.map_err(|error| Error::internal("the reader panicked").with_source(error))?
            }
            other => Err(Error::unsupported(format!("{other} is no place that adapters are read from here"))
                .with_help("name a checkpoint or a folder")),
        }
    }

    /// Notes what the loaded weights are as they are published: a deployment may have them already.
    async fn note_restored(&mut self) -> Result<()> {
        if let Some(lora) = &mut self.lora {
            lora.ready = true;
        }
        self.restored = Some(self.handle().published_weights().await?.content_digest());
        Ok(())
    }
}

fn no_adapter(what: &str) -> Error {
    Error::unsupported(format!("{what} trains all parameters: it has no LoRA adapter"))
        .with_help("start the trainer with a LoRA configuration")
}

/// A view of an embedded trainer's current weights.
#[derive(Debug, Clone)]
pub struct TrainerHandle {
    trainer: Arc<Mutex<LocalTrainer>>,
    config: ModelConfig,
    lora: Option<LoraConfig>,
    dtype: WeightDtype,
}

impl TrainerHandle {
    /// The adapter that is trained; `None` if all parameters are.
    #[must_use]
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// The model on the weights as they would be published now: rounded, or with the adapter on its base.
    ///
    /// # Errors
    /// `Invalid` if a weight is not finite.
    pub async fn published_model(&self) -> Result<Model> {
        let dtype = self.dtype;
        run(&self.trainer, move |trainer| trainer.published_model(dtype)).await
    }

    /// The weights as they would be published now: the model's, or the adapter's by PEFT's names.
    ///
    /// # Errors
    /// `Invalid` if a weight is not finite.
    pub async fn published_weights(&self) -> Result<Weights> {
        let dtype = self.dtype;
        let trained = run(&self.trainer, move |trainer| trainer.export(dtype)).await?;
        match &self.lora {
            None => bridge::weights(trained, dtype),
            Some(_) => adapter::weights(trained),
        }
    }

    /// The frozen weights that an adapter is trained beside, as a server of the base has them.
    ///
    /// # Errors
    /// `Invalid` if all parameters are trained.
    pub async fn base_weights(&self) -> Result<Weights> {
        bridge::weights(run(&self.trainer, |trainer| trainer.export_base()).await?, self.config.dtype)
    }

    /// The base weights with the adapter folded in, as a merged base would be published now.
    ///
    /// # Errors
    /// `Invalid` if all parameters are trained, or a weight is not finite.
    pub async fn merged_weights(&self) -> Result<Weights> {
        let dtype = self.config.dtype;
        bridge::weights(run(&self.trainer, move |trainer| trainer.export_merged(dtype)).await?, dtype)
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

    fn is_lora(&self) -> bool {
        self.lora.is_some()
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
        if let Some(lora) = &mut self.lora {
            lora.ready = true;
        }
        Ok(OptimStep::new(output.step, output.grad_norm))
    }

    async fn export(&mut self, request: ExportRequest) -> Result<SnapshotRef> {
        if self.lora.is_some() {
            return self.export_lora(request).await;
        }
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
        let mut sections = Map::new();
        let config: Value = serde_json::from_str(&self.config.to_json())
            .map_err(|error| Error::internal("the configuration is no JSON").with_source(error))?;
        let lora = match self.lora.is_some() {
            true => {
                let (config, base) = self.lora().await?;
                Some(SavedLora { config, base })
            }
            false => None,
        };
        let trainer = json!({"optimizer_step": step, "config": config, "lora": lora});
        sections.insert(TRAINER.into(), trainer);
        sections.insert(LOOP.into(), Value::Object(request.loop_state));
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
        self.check_state(state.name.as_str(), &repo.manifest(&info).await?.sections).await?;
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
        self.note_restored().await
    }

    async fn load_adapter(&mut self, source: &AdapterSource) -> Result<()> {
        let (config, base) = self.lora().await?;
        let adapter = self.read_adapter(source).await?;
        adapter.check(&config, &base).map_err(|error| error.context(source))?;
        self.run(move |trainer| trainer.load_weights(adapter.factors())).await?;
        self.note_restored().await
    }
}

/// The loop's own entries of a saved state.
///
/// # Errors
/// `NotFound` if there is no such state; as the store answers.
pub async fn loop_state(repo: &SnapshotRepo, state: &StateRef) -> Result<Map<String, Value>> {
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
