//! The checkpoints that jobs have, whether their trainers live or not, and promotion to models.

use std::fmt::{self, Debug};
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    CheckpointRef, CodecId, Error, JobId, ModelId, Result, SnapshotId, SnapshotIdentity, SnapshotKind,
    SnapshotName, StateRef,
};

/// Where checkpoints are looked up. Nothing here needs a trainer that is alive.
#[async_trait]
pub trait CheckpointCatalog: Debug + Send + Sync + 'static {
    /// A page of a job's checkpoints, the newest first: at most `limit`, from where the page before ended.
    ///
    /// # Errors
    /// `NotFound` for a job that does not exist; `Invalid` for a cursor that this job did not give out; what the medium
    /// answers. Never an empty page instead of an error.
    async fn list_page(&self, job: &JobId, cursor: Option<&str>, limit: usize) -> Result<CheckpointPage>;

    /// What `reference` names, as a train state or as weights for samplers: the two have names of their own. A name
    /// without a job is one of `source_job`. What has expired and is still there is found: it was named.
    ///
    /// # Errors
    /// `NotFound`, naming what exists; `Invalid` if the name is that of the other class; `Unsupported` for a reference
    /// that only another service knows.
    async fn resolve_checkpoint(
        &self,
        reference: &CheckpointRef,
        source_job: &JobId,
        class: CheckpointClass,
    ) -> Result<CheckpointInfo>;

    /// What the training loop has saved with a train state.
    ///
    /// # Errors
    /// `Invalid` for sampler weights; `NotFound` if it is gone; `Corrupt` for damage; `Unsupported` where states are
    /// kept without such entries.
    async fn loop_state(&self, state: &CheckpointInfo) -> Result<Map<String, Value>>;

    /// Gives a checkpoint up: what nothing else needs is found no more, and its bytes go as the medium does it. One that
    /// is gone already is `Ok`. By default `Unsupported`.
    ///
    /// # Errors
    /// `Conflict` if it must stay: pinned, promoted, or the newest train state; what the medium answers.
    async fn delete_checkpoint(&self, checkpoint: &CheckpointInfo) -> Result<()> {
        Err(Error::unsupported(format!("{} cannot be deleted here", checkpoint.id))
            .with_help("save it with a time to live instead"))
    }

    /// Copies sampler weights of `job` to the model registry under `output_model_id`. The same source again is a
    /// success, also after a lost answer or a death halfway.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is a delta or a train state, with what can be promoted; `AlreadyExists` if the model
    /// is there from another source.
    async fn promote_checkpoint(
        &self,
        job: &JobId,
        checkpoint: &SnapshotIdentity,
        output_model_id: &ModelId,
    ) -> Result<PromotedModel>;

    /// All of a job's checkpoints, the newest first.
    ///
    /// # Errors
    /// As [`CheckpointCatalog::list_page`].
    async fn list_checkpoints(&self, job: &JobId) -> Result<Vec<CheckpointInfo>> {
        let mut page = self.list_page(job, None, PAGE).await?;
        let mut all = page.checkpoints;
        while let Some(cursor) = page.next {
            page = self.list_page(job, Some(&cursor), PAGE).await?;
            if page.checkpoints.is_empty() {
                break;
            }
            all.append(&mut page.checkpoints);
        }
        Ok(all)
    }
}

/// What [`CheckpointCatalog::list_checkpoints`] asks for at once.
const PAGE: usize = 200;

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: CheckpointCatalog + ?Sized> CheckpointCatalog for Arc<T> {
    async fn list_page(&self, job: &JobId, cursor: Option<&str>, limit: usize) -> Result<CheckpointPage> {
        (**self).list_page(job, cursor, limit).await
    }
    async fn resolve_checkpoint(
        &self,
        reference: &CheckpointRef,
        source_job: &JobId,
        class: CheckpointClass,
    ) -> Result<CheckpointInfo> {
        (**self).resolve_checkpoint(reference, source_job, class).await
    }
    async fn loop_state(&self, state: &CheckpointInfo) -> Result<Map<String, Value>> {
        (**self).loop_state(state).await
    }
    async fn delete_checkpoint(&self, checkpoint: &CheckpointInfo) -> Result<()> {
        (**self).delete_checkpoint(checkpoint).await
    }
    async fn promote_checkpoint(
        &self,
        job: &JobId,
        checkpoint: &SnapshotIdentity,
        output_model_id: &ModelId,
    ) -> Result<PromotedModel> {
        (**self).promote_checkpoint(job, checkpoint, output_model_id).await
    }
    async fn list_checkpoints(&self, job: &JobId) -> Result<Vec<CheckpointInfo>> {
        (**self).list_checkpoints(job).await
    }
}

/// What a checkpoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::exhaustive_enums, reason = "a checkpoint is for samplers or for trainers")]
pub enum CheckpointClass {
    /// Weights for samplers.
    Sampler,
    /// A train state.
    State,
}

impl CheckpointClass {
    /// The class of what is of `kind`.
    #[must_use]
    pub fn of(kind: SnapshotKind) -> Self {
        if kind.is_resumable() { Self::State } else { Self::Sampler }
    }
}

impl fmt::Display for CheckpointClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sampler => "sampler checkpoint",
            Self::State => "train state",
        })
    }
}

/// Some of a job's checkpoints.
#[derive(Debug, Clone, PartialEq, Default)]
#[expect(clippy::exhaustive_structs, reason = "catalogs of others make it")]
pub struct CheckpointPage {
    /// The newest first.
    pub checkpoints: Vec<CheckpointInfo>,
    /// Where the next page begins; `None` if this is the last.
    pub next: Option<String>,
}

/// What a catalog knows of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CheckpointInfo {
    /// The job that saved it.
    pub job: JobId,
    /// The name that it is stored under.
    pub name: SnapshotName,
    /// Identity and content digest.
    pub id: SnapshotId,
    /// What it is.
    pub kind: SnapshotKind,
    /// Where it is, in the words of whoever stores it.
    pub path: String,
    /// Optimizer steps done when it was saved.
    pub step: Option<u64>,
    /// Bytes in the store.
    pub bytes: u64,
    /// Milliseconds since 1970 when it was saved.
    pub created_ms: u64,
    /// Milliseconds since 1970 when it expires; `None` for never.
    pub expires_ms: Option<u64>,
    /// Its time is over; it is still there because something needs it, or because nothing has swept yet.
    pub expired: bool,
    /// For a delta: what it must be applied to.
    pub parent: Option<SnapshotId>,
    /// How its tensors are encoded; `None` for plain ones.
    pub codec: Option<CodecId>,
    /// Whether training can resume from it.
    pub resumable: bool,
    /// Whether it can be promoted to a model.
    pub promotable: bool,
}

impl CheckpointInfo {
    /// What was saved when; resumable and promotable as its kind says, for ever, without step, size and parent.
    #[must_use]
    pub fn new(
        job: JobId,
        name: SnapshotName,
        id: SnapshotId,
        kind: SnapshotKind,
        path: String,
        created_ms: u64,
    ) -> Self {
        Self {
            job,
            name,
            id,
            kind,
            path,
            step: None,
            bytes: 0,
            created_ms,
            expires_ms: None,
            expired: false,
            parent: None,
            codec: None,
            resumable: kind.is_resumable(),
            promotable: kind.is_promotable(),
        }
    }

    /// Sets the optimizer step.
    #[must_use]
    pub fn with_step(mut self, step: Option<u64>) -> Self {
        self.step = step;
        self
    }

    /// Sets the bytes in the store.
    #[must_use]
    pub fn with_bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets when it expires, and whether that is over.
    #[must_use]
    pub fn with_expiry(mut self, expires_ms: Option<u64>, expired: bool) -> Self {
        (self.expires_ms, self.expired) = (expires_ms, expired);
        self
    }

    /// Sets a delta's parent.
    #[must_use]
    pub fn with_parent(mut self, parent: Option<SnapshotId>) -> Self {
        self.parent = parent;
        self
    }

    /// Sets how its tensors are encoded.
    #[must_use]
    pub fn with_codec(mut self, codec: Option<CodecId>) -> Self {
        self.codec = codec;
        self
    }

    /// The reference by which any job of the same store finds it.
    #[must_use]
    pub fn reference(&self) -> CheckpointRef {
        CheckpointRef::CrossJob { job: self.job.clone(), name: self.id.identity.clone() }
    }

    /// It as a train state.
    ///
    /// # Errors
    /// `Invalid` if it holds weights for samplers.
    pub fn state(&self) -> Result<StateRef> {
        if !self.resumable {
            return Err(Error::invalid(format!(
                "{} of job {} holds weights for samplers ({}): wanted a train state",
                self.id, self.job, self.kind
            ))
            .with_help("name a state that `save_state` has saved; sampler checkpoints have no optimizer"));
        }
        Ok(StateRef::new(self.name.clone(), self.path.clone(), self.step.unwrap_or(0)))
    }
}

/// What a promoted model is to those who serve it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ModelKind {
    /// Full weights.
    #[serde(rename = "HF_BASE_MODEL")]
    HfBaseModel,
    /// A LoRA adapter.
    #[serde(rename = "HF_PEFT_ADDON")]
    HfPeftAddon,
}

/// A model in the registry, and where it comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PromotedModel {
    /// `accounts/<account>/models/<output_model_id>`.
    pub name: String,
    /// Full weights or an adapter.
    pub kind: ModelKind,
    /// Where its files are, below the root of the store.
    pub path: String,
    /// What was promoted.
    pub source: CheckpointInfo,
}

impl PromotedModel {
    /// All fields.
    #[must_use]
    pub fn new(name: String, kind: ModelKind, path: String, source: CheckpointInfo) -> Self {
        Self { name, kind, path, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ContentDigest, SessionId, TensorDigest};

    #[derive(Debug)]
    struct Numbers(u64);

    fn info(number: u64, kind: SnapshotKind) -> CheckpointInfo {
        let name = SnapshotName::new(format!("step-{number}")).unwrap();
        let digest = ContentDigest::of_tensors([("t", crate::DType::U8, &[1][..], &TensorDigest::of(&[1]))]);
        let identity = SnapshotIdentity::of(&name, &SessionId::from_random([0; 4]));
        let id = SnapshotId { identity, digest };
        CheckpointInfo::new(JobId::new("job").unwrap(), name, id, kind, "job/x".to_owned(), number)
    }

    #[async_trait]
    impl CheckpointCatalog for Numbers {
        async fn list_page(&self, _: &JobId, cursor: Option<&str>, limit: usize) -> Result<CheckpointPage> {
            let from = cursor.map_or(0, |cursor| cursor.parse().unwrap());
            let to = self.0.min(from + limit as u64);
            let checkpoints = (from..to).map(|number| info(number, SnapshotKind::Base)).collect();
            Ok(CheckpointPage { checkpoints, next: (to < self.0).then(|| to.to_string()) })
        }
        async fn resolve_checkpoint(
            &self,
            _: &CheckpointRef,
            _: &JobId,
            _: CheckpointClass,
        ) -> Result<CheckpointInfo> {
            Ok(info(0, SnapshotKind::Base))
        }
        async fn loop_state(&self, state: &CheckpointInfo) -> Result<Map<String, Value>> {
            state.state().map(|_| Map::new())
        }
        async fn promote_checkpoint(
            &self,
            _: &JobId,
            _: &SnapshotIdentity,
            _: &ModelId,
        ) -> Result<PromotedModel> {
            Err(Error::unsupported("no registry"))
        }
    }

    #[test]
    fn all_pages_are_read() {
        for count in [0, 1, 200, 201, 1001] {
            let catalog: Arc<dyn CheckpointCatalog> = Arc::new(Numbers(count));
            let all =
                crate::testing::block_on(catalog.list_checkpoints(&JobId::new("job").unwrap())).unwrap();
            assert!(all.iter().map(|info| info.created_ms).eq(0..count));
        }
    }

    #[test]
    fn sampler_weights_are_no_state() {
        assert_eq!(info(3, SnapshotKind::State).with_step(Some(3)).state().unwrap().step, 3);
        let error = info(3, SnapshotKind::Adapter).state().unwrap_err();
        assert!(error.message().contains("weights for samplers (adapter): wanted a train state"), "{error}");
    }
}
