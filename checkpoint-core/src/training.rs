//! The trainer's side: exporting snapshots, and the operations of a training client.

use std::fmt::{self, Debug};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    CheckpointRef, CheckpointType, CodecId, ContentDigest, Error, Pending, Result, SnapshotId,
    SnapshotIdentity, SnapshotKind, SnapshotName, SnapshotRef,
};

/// Whoever can turn the current policy into a stored snapshot.
#[async_trait]
pub trait SnapshotExporter: Debug + Send + Sync + 'static {
    /// What it can diff against. It does not change while it lives.
    fn delta_parents(&self) -> DeltaParents;

    /// Saves the current weights as asked, and returns once they are durable. Names are unique: a taken one is
    /// `AlreadyExists` at once. Not to be called twice at once. If the future is dropped, the save may have
    /// happened or not.
    ///
    /// # Errors
    /// `AlreadyExists`; `ChainMismatch` if the parent cannot be diffed against; `Fenced` if another writer took
    /// over; as the store answers.
    async fn export(&self, request: ExportRequest) -> Result<SnapshotRef>;

    /// Whether the weights of `digest` can be a delta's parent here.
    ///
    /// # Errors
    /// As the store answers.
    async fn holds(&self, digest: &ContentDigest) -> Result<bool>;

    /// The content digest of the sampler weights that this trainer was restored from, if it was.
    fn restored(&self) -> Option<ContentDigest> {
        None
    }
}

macro_rules! forward {
    ($($pointer:ident)*) => {$(
        #[async_trait]
        #[deny(clippy::missing_trait_methods)]
        impl<T: SnapshotExporter + ?Sized> SnapshotExporter for $pointer<T> {
            fn delta_parents(&self) -> DeltaParents { (**self).delta_parents() }
            async fn export(&self, request: ExportRequest) -> Result<SnapshotRef> { (**self).export(request).await }
            async fn holds(&self, digest: &ContentDigest) -> Result<bool> { (**self).holds(digest).await }
            fn restored(&self) -> Option<ContentDigest> { (**self).restored() }
        }
    )*};
}
forward!(Arc Box);

/// What an exporter can diff against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a wire that names the parent, or one that does not")]
pub enum DeltaParents {
    /// Any snapshot that it holds.
    Any,
    /// Only its own last save: the wire cannot name a parent.
    LastExported,
}

/// What to save.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ExportRequest {
    /// The caller's name; the exporter adds its session.
    pub name: SnapshotName,
    /// Base, delta, merged base or adapter.
    pub kind: SnapshotKind,
    /// What a delta is against.
    pub parent: Option<SnapshotId>,
    /// How a delta is encoded.
    pub codec: CodecId,
    /// How long the snapshot is kept; `None` for ever.
    pub ttl: Option<Duration>,
}

impl ExportRequest {
    /// A request; a delta needs [`ExportRequest::with_parent`].
    #[must_use]
    pub fn new(name: SnapshotName, kind: SnapshotKind, codec: CodecId) -> Self {
        Self { name, kind, parent: None, codec, ttl: None }
    }

    /// Sets what a delta is against.
    #[must_use]
    pub fn with_parent(mut self, parent: Option<SnapshotId>) -> Self {
        self.parent = parent;
        self
    }

    /// Sets how long the snapshot is kept.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Option<Duration>) -> Self {
        self.ttl = ttl;
        self
    }
}

/// A trainer: in this process, or a service behind HTTP.
///
/// The mutating calls are plain functions: an operation has its place in the order when the call returns, and runs
/// when those before it are done. Once an operation failed, those queued behind it fail too, and so does the next
/// call: nothing trains on after a lost step.
#[async_trait]
pub trait TrainingClient: SnapshotExporter {
    /// Runs the batch forwards and backwards; gradients add up until the next optimizer step.
    fn forward_backward(&self, batch: Batch) -> Pending<ForwardBackward>;

    /// Applies the gradients and clears them.
    fn optim_step(&self, params: AdamParams) -> Pending<OptimStep>;

    /// Saves sampler weights; a type of `None` lets the client choose as a lone client does: a base first, then
    /// deltas on its own last save. With a deployment, save through a weight syncer, which knows what is served.
    fn save_weights_for_sampler_ext(&self, request: SaveWeights) -> Pending<SavedWeights>;

    /// Saves weights, optimizer, schedule, step and RNG.
    fn save_state(&self, request: SaveState) -> Pending<StateRef>;

    /// Restores the weights alone. A live optimizer is left as it is.
    fn load_state(&self, state: &StateRef) -> Pending<()>;

    /// Restores weights, optimizer, schedule, step and RNG: training goes on bit for bit.
    fn load_state_with_optimizer(&self, state: &StateRef) -> Pending<()>;

    /// Puts an adapter's factors in the place of those that are trained: a warm start, not a resume. A live optimizer is
    /// left as it is. `Unsupported` where no LoRA adapter is trained, which is what this provided method answers.
    fn load_adapter(&self, source: &AdapterSource) -> Pending<()> {
        let error =
            Error::unsupported(format!("{source} was to be loaded, but this trainer loads no adapters"));
        Pending::ready(Err(error.with_help("use a trainer of a LoRA adapter")))
    }
}

/// Where an adapter is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterSource {
    /// Sampler weights that a LoRA trainer has saved.
    Checkpoint(CheckpointRef),
    /// A folder in PEFT's form on the trainer's machine: `adapter_config.json` and `adapter_model.safetensors`.
    Folder(PathBuf),
}

impl fmt::Display for AdapterSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checkpoint(reference) => write!(f, "{reference}"),
            Self::Folder(path) => write!(f, "`{}`", path.display()),
        }
    }
}

/// A batch and its loss.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Batch {
    /// The sequences.
    pub data: Vec<Datum>,
    /// What is minimised.
    pub loss: Loss,
}

impl Batch {
    /// These sequences under this loss.
    #[must_use]
    pub fn new(data: Vec<Datum>, loss: Loss) -> Self {
        Self { data, loss }
    }
}

/// What is minimised, summed over tokens: the caller normalises through weights or advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Loss {
    /// `-Σ weight · logp(target)`.
    CrossEntropy,
    /// `-Σ exp(logp(target) - old_logprob) · advantage`.
    ImportanceSampling,
}

/// One sequence. All present lists have the length of `tokens`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Datum {
    /// Input tokens.
    pub tokens: Vec<u32>,
    /// The token to predict at each position.
    pub targets: Vec<u32>,
    /// For cross-entropy: each position's weight.
    pub weights: Vec<f32>,
    /// For importance sampling: the log-prob under the policy that sampled the target.
    pub logprobs: Vec<f32>,
    /// For importance sampling: each position's advantage.
    pub advantages: Vec<f32>,
}

impl Datum {
    /// A sequence for cross-entropy.
    #[must_use]
    pub fn supervised(tokens: Vec<u32>, targets: Vec<u32>, weights: Vec<f32>) -> Self {
        Self { tokens, targets, weights, ..Self::default() }
    }

    /// A sequence for importance sampling.
    #[must_use]
    pub fn sampled(tokens: Vec<u32>, targets: Vec<u32>, logprobs: Vec<f32>, advantages: Vec<f32>) -> Self {
        Self { tokens, targets, logprobs, advantages, ..Self::default() }
    }

    /// Checks the lengths for `loss`.
    ///
    /// # Errors
    /// `Invalid` if a list that the loss needs has another length than `tokens`, or there are no tokens.
    pub fn check(&self, loss: Loss) -> Result<()> {
        let wanted = self.tokens.len();
        let lists: &[(&str, usize)] = match loss {
            Loss::CrossEntropy => &[("targets", self.targets.len()), ("weights", self.weights.len())],
            Loss::ImportanceSampling => &[
                ("targets", self.targets.len()),
                ("logprobs", self.logprobs.len()),
                ("advantages", self.advantages.len()),
            ],
        };
        if wanted == 0 {
            return Err(Error::invalid("a sequence of the batch has no tokens"));
        }
        match lists.iter().find(|(_, length)| *length != wanted) {
            Some((name, length)) => {
                Err(Error::invalid(format!("`{name}` has {length} entries for {wanted} tokens")))
            }
            None => Ok(()),
        }
    }
}

/// What a forward and backward pass gives.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ForwardBackward {
    /// The loss, summed over the batch.
    pub loss: f64,
    /// Each sequence's log-probs of its targets.
    pub logprobs: Vec<Vec<f32>>,
}

impl ForwardBackward {
    /// All fields.
    #[must_use]
    pub fn new(loss: f64, logprobs: Vec<Vec<f32>>) -> Self {
        Self { loss, logprobs }
    }
}

/// One AdamW step. The defaults are Tinker's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AdamParams {
    /// Default 1e-4.
    pub learning_rate: f64,
    /// Default 0.9.
    pub beta1: f64,
    /// Default 0.95.
    pub beta2: f64,
    /// Default 1e-12.
    pub eps: f64,
    /// Default 0.
    pub weight_decay: f64,
    /// The largest norm of all gradients together; 0, the default, for no limit.
    pub grad_clip_norm: f64,
}

impl Default for AdamParams {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-12,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
        }
    }
}

impl AdamParams {
    /// The defaults at this learning rate.
    #[must_use]
    pub fn new(learning_rate: f64) -> Self {
        Self { learning_rate, ..Self::default() }
    }

    /// Sets the largest norm of all gradients together.
    #[must_use]
    pub fn with_grad_clip_norm(mut self, norm: f64) -> Self {
        self.grad_clip_norm = norm;
        self
    }

    /// Sets the decays of the two moments.
    #[must_use]
    pub fn with_betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.beta1, self.beta2) = (beta1, beta2);
        self
    }

    /// Sets what is added to the root of the second moment.
    #[must_use]
    pub fn with_eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Sets the decoupled weight decay.
    #[must_use]
    pub fn with_weight_decay(mut self, decay: f64) -> Self {
        self.weight_decay = decay;
        self
    }
}

/// What an optimizer step gives.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct OptimStep {
    /// Steps done since the optimizer was new.
    pub step: u64,
    /// The norm of all gradients together, before clipping.
    pub grad_norm: f64,
}

impl OptimStep {
    /// All fields.
    #[must_use]
    pub fn new(step: u64, grad_norm: f64) -> Self {
        Self { step, grad_norm }
    }
}

/// A request to save sampler weights.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SaveWeights {
    /// The caller's name.
    pub name: SnapshotName,
    /// What to save; `None` lets the client choose.
    pub checkpoint_type: Option<CheckpointType>,
    /// How long it is kept; `None` for ever.
    pub ttl: Option<Duration>,
}

impl SaveWeights {
    /// Saves under `name`, with the type chosen by the client, for ever.
    #[must_use]
    pub fn new(name: SnapshotName) -> Self {
        Self { name, checkpoint_type: None, ttl: None }
    }

    /// Sets the type.
    #[must_use]
    pub fn with_type(mut self, checkpoint_type: CheckpointType) -> Self {
        self.checkpoint_type = Some(checkpoint_type);
        self
    }

    /// Sets `ttl_seconds`.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }
}

/// Where saved sampler weights are.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SavedWeights {
    /// The trainer's path.
    pub path: String,
    /// `<name>-<session>`.
    pub snapshot_name: SnapshotIdentity,
    /// The whole reference.
    pub snapshot: SnapshotRef,
}

impl SavedWeights {
    /// What the client answers for `snapshot`.
    #[must_use]
    pub fn new(snapshot: SnapshotRef) -> Self {
        Self { path: snapshot.path.clone(), snapshot_name: snapshot.id.identity.clone(), snapshot }
    }
}

/// The section of a train state that holds the training loop's own entries.
pub const LOOP: &str = "loop";

/// A request to save the train state.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SaveState {
    /// The caller's name, unique among the job's states.
    pub name: SnapshotName,
    /// How long it is kept; `None` for ever.
    pub ttl: Option<Duration>,
    /// What the loop wants to find again: cursor, RNG, rewards.
    pub loop_state: serde_json::Map<String, serde_json::Value>,
}

impl SaveState {
    /// Saves under `name`, for ever, with nothing of the loop's.
    #[must_use]
    pub fn new(name: SnapshotName) -> Self {
        Self { name, ttl: None, loop_state: serde_json::Map::new() }
    }

    /// Sets `ttl_seconds`.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Adds an entry for the loop.
    #[must_use]
    pub fn with_entry(mut self, key: impl Into<String>, value: impl Into<serde_json::Value>) -> Self {
        self.loop_state.insert(key.into(), value.into());
        self
    }
}

/// A saved train state. A sampler checkpoint has another type and cannot stand in its place:
///
/// ```compile_fail,E0308
/// use towline_core::{SnapshotRef, TrainingClient};
/// fn resume(client: &dyn TrainingClient, sampler: &SnapshotRef) {
///     let _ = client.load_state(sampler);
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StateRef {
    /// The name that the trainer stored it under, which is authoritative.
    pub name: SnapshotName,
    /// The trainer's path.
    pub path: String,
    /// Optimizer steps done when it was saved.
    pub step: u64,
}

impl StateRef {
    /// All fields.
    pub fn new(name: SnapshotName, path: impl Into<String>, step: u64) -> Self {
        Self { name, path: path.into(), step }
    }
}

impl fmt::Display for StateRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_traits_are_object_safe() {
        fn shared<T: Send + Sync + ?Sized>() {}
        shared::<dyn SnapshotExporter>();
        shared::<dyn TrainingClient>();
    }

    #[test]
    fn a_batch_of_uneven_lists_is_refused() {
        let datum = Datum::supervised(vec![1, 2], vec![2, 3], vec![1.0]);
        assert!(datum.check(Loss::CrossEntropy).unwrap_err().message().contains("`weights` has 1"));
        assert!(Datum::default().check(Loss::CrossEntropy).is_err());
    }
}
