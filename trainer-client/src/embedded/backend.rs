//! The trainer behind an embedded client.

use async_trait::async_trait;
use towline_core::{
    AdamParams, AdapterSource, Batch, ContentDigest, DeltaParents, Error, ExportRequest, ForwardBackward,
    OptimStep, Result, SaveState, SnapshotRef, StateRef,
};

/// A trainer in this process. An [`crate::EmbeddedClient`] calls it one operation at a time.
///
/// The calls run on a task of the client's runtime: move long computations off it with
/// `tokio::task::spawn_blocking`, so that the runtime's other tasks go on.
#[async_trait]
pub trait Backend: Send + 'static {
    /// What [`Backend::export`] can diff against. It does not change while it lives.
    fn delta_parents(&self) -> DeltaParents;

    /// The content digest of the sampler weights that it was restored from, if it was. Read at the start and after
    /// each loaded state or adapter.
    fn restored(&self) -> Option<ContentDigest>;

    /// Whether it trains a LoRA adapter: a save that is not a merged base is then the whole adapter. Default false.
    fn is_lora(&self) -> bool {
        false
    }

    /// Whether the weights of `digest` can be a delta's parent.
    ///
    /// # Errors
    /// As the store answers.
    async fn holds(&mut self, digest: &ContentDigest) -> Result<bool>;

    /// Runs the batch, whose lengths have been checked, forwards and backwards; gradients add up.
    ///
    /// # Errors
    /// `Invalid` for tokens that the model does not have.
    async fn forward_backward(&mut self, batch: Batch) -> Result<ForwardBackward>;

    /// Applies the gradients and clears them.
    ///
    /// # Errors
    /// `Invalid` without gradients.
    async fn optim_step(&mut self, params: AdamParams) -> Result<OptimStep>;

    /// Saves the current weights as asked, durably.
    ///
    /// # Errors
    /// As [`towline_core::SnapshotExporter::export`].
    async fn export(&mut self, request: ExportRequest) -> Result<SnapshotRef>;

    /// Saves weights, optimizer, schedule, step, RNG and the loop's entries, durably.
    ///
    /// # Errors
    /// `AlreadyExists` for a name that the job has used; as the store answers.
    async fn save_state(&mut self, request: SaveState) -> Result<StateRef>;

    /// Restores a state: everything, or the weights alone.
    ///
    /// # Errors
    /// `NotFound` if there is no such state; as the store answers.
    async fn load_state(&mut self, state: &StateRef, with_optimizer: bool) -> Result<()>;

    /// Puts an adapter's factors in the place of those that are trained, and leaves the optimizer as it is.
    ///
    /// # Errors
    /// `Unsupported` if no adapter is trained, which is what the provided method answers; `NotFound` if there is no such
    /// adapter; `Invalid` if it does not fit.
    async fn load_adapter(&mut self, source: &AdapterSource) -> Result<()> {
        Err(Error::unsupported(format!("{source} was to be loaded, but this trainer loads no adapters"))
            .with_help("use a trainer of a LoRA adapter"))
    }
}
