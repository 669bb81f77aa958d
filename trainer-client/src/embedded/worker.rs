//! The task that runs the operations of an embedded client, one after another.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};
use towline_core::{
    AdamParams, AdapterSource, Batch, Chain, ChainSettings, CodecId, ContentDigest, DeltaParents, Error,
    ExportRequest, ForwardBackward, OptimStep, Resolver, Result, SaveState, SaveWeights, SavedWeights,
    SnapshotRef, StateRef,
};

use super::Backend;
use crate::ledger::{Effect, Ledger, NameKind, Ticket};

/// What client and worker share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ledger: Ledger,
    restored: Mutex<Option<ContentDigest>>,
}

/// An operation and whom to tell.
pub(super) enum Command {
    ForwardBackward(Batch, Resolver<ForwardBackward>),
    OptimStep(AdamParams, Resolver<OptimStep>),
    SaveWeights(SaveWeights, CodecId, Resolver<SavedWeights>),
    SaveState(SaveState, Resolver<StateRef>),
    LoadState(StateRef, bool, Resolver<()>),
    LoadAdapter(AdapterSource, Resolver<()>),
    Export(ExportRequest, Resolver<SnapshotRef>),
    Holds(ContentDigest, Resolver<bool>),
    Drained(oneshot::Sender<()>),
}

struct Worker<B> {
    backend: B,
    shared: Arc<Shared>,
    /// What a lone client may save: its own last save takes the place of a deployment.
    chain: Chain,
}

/// Runs until every client is gone and the queue is empty.
pub(super) async fn run<B: Backend>(
    backend: B,
    mut queue: mpsc::Receiver<(Ticket, Command)>,
    shared: Arc<Shared>,
) {
    let chain =
        Chain::new(ChainSettings::default().with_lora(backend.is_lora()).with_parents(DeltaParents::Any));
    let mut worker = Worker { backend, shared, chain };
    while let Some((ticket, command)) = queue.recv().await {
        worker.run(ticket, command).await;
    }
}

impl<B: Backend> Worker<B> {
    async fn run(&mut self, ticket: Ticket, command: Command) {
        let shared = Arc::clone(&self.shared);
        let ledger = &shared.ledger;
        let backend = &mut self.backend;
        match command {
            Command::ForwardBackward(batch, resolver) => {
                let work = || backend.forward_backward(batch);
                operation(ledger, ticket, Effect::Trains, resolver, work).await;
            }
            Command::OptimStep(params, resolver) => {
                operation(ledger, ticket, Effect::Trains, resolver, || backend.optim_step(params)).await;
            }
            Command::SaveWeights(request, codec, resolver) => {
                let name = request.name.clone();
                let work = || self.save_weights(request, codec);
                if let Some(error) = operation(ledger, ticket, Effect::Saves, resolver, work).await {
                    ledger.give_back(NameKind::Sampler, name, &error);
                }
            }
            Command::SaveState(request, resolver) => {
                let name = request.name.clone();
                let work = || backend.save_state(request);
                if let Some(error) = operation(ledger, ticket, Effect::Saves, resolver, work).await {
                    ledger.give_back(NameKind::State, name, &error);
                }
            }
            Command::LoadState(state, with_optimizer, resolver) => {
                let work = || self.load_state(state, with_optimizer);
                operation(ledger, ticket, Effect::Restores, resolver, work).await;
            }
            Command::LoadAdapter(source, resolver) => {
                let work = || self.load_adapter(source);
                operation(ledger, ticket, Effect::Restores, resolver, work).await;
            }
            Command::Export(request, resolver) => {
                resolver.running();
                let name = request.name.clone();
                let result = match ledger.may_run(ticket) {
                    Ok(()) => self.export(request).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = &result {
                    ledger.give_back(NameKind::Sampler, name, error);
                }
                resolver.resolve(result);
            }
            Command::Holds(digest, resolver) => {
                resolver.running();
                resolver.resolve(backend.holds(&digest).await);
            }
            // Whoever closed may have stopped waiting.
            Command::Drained(done) => drop(done.send(())),
        }
    }

    async fn save_weights(&mut self, request: SaveWeights, codec: CodecId) -> Result<SavedWeights> {
        let plan = self.chain.plan_save(request.checkpoint_type)?;
        let export =
            ExportRequest::new(request.name, plan.kind, codec).with_parent(plan.parent).with_ttl(request.ttl);
        Ok(SavedWeights::new(self.export(export).await?))
    }

    async fn export(&mut self, request: ExportRequest) -> Result<SnapshotRef> {
        // Dropped or failed, it may have happened or not: the next save is a base.
        self.chain.reset();
        let snapshot = self.backend.export(request).await?;
        self.chain.saved(&snapshot);
        self.chain.ordered(&snapshot.id);
        self.chain.confirmed(&snapshot.id);
        Ok(snapshot)
    }

    async fn load_state(&mut self, state: StateRef, with_optimizer: bool) -> Result<()> {
        self.backend.load_state(&state, with_optimizer).await?;
        self.restored();
        Ok(())
    }

    async fn load_adapter(&mut self, source: AdapterSource) -> Result<()> {
        self.backend.load_adapter(&source).await?;
        self.restored();
        Ok(())
    }

    /// Other weights: what was saved before is no longer where these come from.
    fn restored(&mut self) {
        self.chain.reset();
        self.shared.set_restored(self.backend.restored());
        self.shared.ledger.restored();
    }
}

/// Runs an operation in its turn, if nothing failed before it, and tells ledger and caller. The error comes back.
async fn operation<T, F: Future<Output = Result<T>>>(
    ledger: &Ledger,
    ticket: Ticket,
    effect: Effect,
    resolver: Resolver<T>,
    work: impl FnOnce() -> F,
) -> Option<Error> {
    resolver.running();
    if let Err(error) = ledger.may_run(ticket) {
        let told = again(&error);
        resolver.resolve(Err(error));
        return Some(told);
    }
    let result = work().await;
    let error = result.as_ref().err().map(again);
    if let Err(error) = &result {
        // Before the caller hears of it, so that its next call is told.
        ledger.failed(error, effect);
    }
    resolver.resolve(result);
    error
}

/// An error's kind and message once more.
fn again(error: &Error) -> Error {
    Error::new(error.kind(), error.message())
}

impl Command {
    /// Fails an operation that did not get into the queue. Nothing of it has happened.
    pub(super) fn refuse(self, error: Error, ledger: &Ledger) {
        let effect = match &self {
            Self::ForwardBackward(..) | Self::OptimStep(..) => Some(Effect::Trains),
            Self::LoadState(..) | Self::LoadAdapter(..) => Some(Effect::Restores),
            Self::SaveWeights(..) | Self::SaveState(..) => Some(Effect::Saves),
            // Whoever asked waits for the answer.
            Self::Export(..) | Self::Holds(..) | Self::Drained(_) => None,
        };
        if let Some(effect) = effect {
            ledger.refused(&error, effect);
        }
        match self {
            Self::ForwardBackward(_, resolver) => resolver.resolve(Err(error)),
            Self::OptimStep(_, resolver) => resolver.resolve(Err(error)),
            Self::SaveWeights(request, _, resolver) => {
                ledger.give_back(NameKind::Sampler, request.name, &error);
                resolver.resolve(Err(error));
            }
            Self::SaveState(request, resolver) => {
                ledger.give_back(NameKind::State, request.name, &error);
                resolver.resolve(Err(error));
            }
            Self::LoadState(_, _, resolver) | Self::LoadAdapter(_, resolver) => resolver.resolve(Err(error)),
            Self::Export(request, resolver) => {
                ledger.give_back(NameKind::Sampler, request.name, &error);
                resolver.resolve(Err(error));
            }
            Self::Holds(_, resolver) => resolver.resolve(Err(error)),
            Self::Drained(done) => drop(done),
        }
    }
}

impl Shared {
    pub(super) fn new(ledger: Ledger, restored: Option<ContentDigest>) -> Self {
        Self { ledger, restored: Mutex::new(restored) }
    }

    pub(super) fn restored(&self) -> Option<ContentDigest> {
        *self.restored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_restored(&self, digest: Option<ContentDigest>) {
        *self.restored.lock().unwrap_or_else(PoisonError::into_inner) = digest;
    }
}
