//! A trainer in this process.

mod backend;
mod worker;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use towline_core::{
    AdamParams, AdapterSource, Batch, CodecId, ContentDigest, DeltaParents, Error, ExportRequest,
    ForwardBackward, OptimStep, Pending, Resolver, Result, SaveState, SaveWeights, SavedWeights,
    SnapshotExporter, SnapshotName, SnapshotRef, StateRef, TrainingClient, pending,
};

pub use backend::Backend;

use crate::ledger::{Effect, Ledger, NameKind, Ticket};
use worker::{Command, Shared};

/// How many operations may wait their turn.
const MAX_QUEUED: usize = 1024;
/// How long [`EmbeddedClient::close`] waits: the public clients allow a training operation this long.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3600);

/// A [`TrainingClient`] over a trainer in this process.
///
/// One task runs the operations in the order of the calls. If one fails, those queued behind it fail too, and so
/// does the next call. After a failed save that is all. After a failed training or loading operation every call
/// fails until a state or an adapter is loaded: nothing trains on after a lost step. Exports through [`SnapshotExporter`] answer
/// whoever waits for them, and their failure holds up nobody else. At most 1024 operations wait their turn; one
/// more is refused, which counts as its failure.
///
/// Dropping the client lets what has been submitted run to its end, in the background.
pub struct EmbeddedClient {
    commands: mpsc::Sender<(Ticket, Command)>,
    shared: Arc<Shared>,
    delta_parents: DeltaParents,
    codec: CodecId,
}

impl EmbeddedClient {
    /// Starts a client for `backend`, whose worker is a task of the current tokio runtime.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(backend: impl Backend) -> Self {
        let (commands, queue) = mpsc::channel(MAX_QUEUED);
        let shared = Arc::new(Shared::new(Ledger::default(), backend.restored()));
        let delta_parents = backend.delta_parents();
        tokio::spawn(worker::run(backend, queue, Arc::clone(&shared)));
        Self { commands, shared, delta_parents, codec: CodecId::of("arc_v2") }
    }

    /// Sets the codec of the deltas that this client chooses by itself. Default `arc_v2`.
    #[must_use]
    pub fn with_codec(mut self, codec: CodecId) -> Self {
        self.codec = codec;
        self
    }

    /// Lets no more calls in, and waits until everything submitted is done.
    ///
    /// # Errors
    /// The first failure that no later call has told, whether or not its own handle was awaited; `Unavailable` if
    /// the trainer stopped, which only a panic does; `TimedOut` if it is not done within an hour: it goes on.
    pub async fn close(&self) -> Result<()> {
        self.shared.ledger.close();
        let (done, drained) = oneshot::channel();
        let last = (Ticket::default(), Command::Drained(done));
        let drain = async { self.commands.send(last).await.is_ok() && drained.await.is_ok() };
        match timeout(CLOSE_TIMEOUT, drain).await {
            Ok(true) => self.shared.ledger.unseen(),
            Ok(false) => Err(Error::unavailable("the trainer stopped before everything was done")
                .with_help("resume from the last state")),
            Err(_) => Err(Error::timed_out("the trainer still works on what was submitted")
                .with_help("look whether it hangs; close again to go on waiting")),
        }
    }

    /// Gives an operation its place in the order.
    fn submit<T>(&self, effect: Effect, command: impl FnOnce(Resolver<T>) -> Command) -> Pending<T> {
        let (resolver, handle) = pending();
        match self.shared.ledger.admit(effect) {
            Ok(ticket) => {
                self.queue(ticket, command(resolver));
                handle
            }
            Err(error) => Pending::ready(Err(error)),
        }
    }

    /// As [`EmbeddedClient::submit`], for a save, whose name must be new.
    fn submit_save<T>(
        &self,
        kind: NameKind,
        name: &SnapshotName,
        command: impl FnOnce(Resolver<T>) -> Command,
    ) -> Pending<T> {
        let (resolver, handle) = pending();
        let ledger = &self.shared.ledger;
        match ledger.admit(Effect::Saves).and_then(|ticket| ledger.take(kind, name).map(|()| ticket)) {
            Ok(ticket) => {
                self.queue(ticket, command(resolver));
                handle
            }
            Err(error) => Pending::ready(Err(error)),
        }
    }

    fn queue(&self, ticket: Ticket, command: Command) {
        use mpsc::error::TrySendError::{Closed, Full};
        let (refused, why) = match self.commands.try_send((ticket, command)) {
            Ok(()) => return,
            Err(Full((_, command))) => (
                command,
                Error::unavailable(format!("{MAX_QUEUED} operations are waiting already"))
                    .with_help("await some of them before the next"),
            ),
            Err(Closed((_, command))) => (
                command,
                Error::unavailable("the trainer has stopped").with_help("resume from the last state"),
            ),
        };
        refused.refuse(why, &self.shared.ledger);
    }
}

#[async_trait]
impl SnapshotExporter for EmbeddedClient {
    fn delta_parents(&self) -> DeltaParents {
        self.delta_parents
    }

    async fn export(&self, request: ExportRequest) -> Result<SnapshotRef> {
        let name = request.name.clone();
        self.submit_save(NameKind::Sampler, &name, |resolver| Command::Export(request, resolver)).await
    }

    async fn holds(&self, digest: &ContentDigest) -> Result<bool> {
        let (resolver, held) = pending();
        self.queue(Ticket::default(), Command::Holds(*digest, resolver));
        held.await
    }

    fn restored(&self) -> Option<ContentDigest> {
        self.shared.restored()
    }
}

#[async_trait]
impl TrainingClient for EmbeddedClient {
    fn forward_backward(&self, batch: Batch) -> Pending<ForwardBackward> {
        if let Some(error) = batch.data.iter().find_map(|datum| datum.check(batch.loss).err()) {
            // Nothing was done and nothing is lost.
            return Pending::ready(Err(error));
        }
        self.submit(Effect::Trains, |resolver| Command::ForwardBackward(batch, resolver))
    }

    fn optim_step(&self, params: AdamParams) -> Pending<OptimStep> {
        self.submit(Effect::Trains, |resolver| Command::OptimStep(params, resolver))
    }

    fn save_weights_for_sampler_ext(&self, request: SaveWeights) -> Pending<SavedWeights> {
        let (name, codec) = (request.name.clone(), self.codec.clone());
        self.submit_save(NameKind::Sampler, &name, |resolver| Command::SaveWeights(request, codec, resolver))
    }

    fn save_state(&self, request: SaveState) -> Pending<StateRef> {
        let name = request.name.clone();
        self.submit_save(NameKind::State, &name, |resolver| Command::SaveState(request, resolver))
    }

    fn load_state(&self, state: &StateRef) -> Pending<()> {
        let state = state.clone();
        self.submit(Effect::Restores, |resolver| Command::LoadState(state, false, resolver))
    }

    fn load_state_with_optimizer(&self, state: &StateRef) -> Pending<()> {
        let state = state.clone();
        self.submit(Effect::Restores, |resolver| Command::LoadState(state, true, resolver))
    }

    fn load_adapter(&self, source: &AdapterSource) -> Pending<()> {
        let source = source.clone();
        self.submit(Effect::Restores, |resolver| Command::LoadAdapter(source, resolver))
    }
}

impl fmt::Debug for EmbeddedClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedClient")
            .field("delta_parents", &self.delta_parents)
            .field("codec", &self.codec)
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}
