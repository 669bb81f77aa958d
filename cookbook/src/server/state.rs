//! What is served, what is being loaded, and the swap between them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use towline_core::{
    ContentDigest, Error, ManifestDigest, OpId, Result, SnapshotId, SnapshotIdentity, SnapshotKind,
    SnapshotStore, Stage, Weights,
};
use towline_storage::{SnapshotInfo, SnapshotRepo, Wanted};

use super::ServerOptions;
use super::load::{Source, source};
use super::prefix::{PrefixCache, Salt};
use crate::engine::Model;

/// One set of weights as it is served: the bytes, for the next delta or adapter, and the model, for requests.
#[derive(Debug)]
pub struct Served {
    pub(super) id: SnapshotId,
    pub(super) weights: Weights,
    pub(super) salt: Salt,
    pub(super) model: Model,
}

impl Served {
    /// Identity and content digest.
    #[must_use]
    pub fn id(&self) -> &SnapshotId {
        &self.id
    }

    /// The published bytes of the full weights: of the base, if an adapter is served on it.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Identity and content digest of the adapter, if one is served.
    #[must_use]
    pub fn adapter(&self) -> Option<&SnapshotId> {
        self.salt.adapter.is_some().then_some(&self.id)
    }

    /// The content digest of [`Served::weights`].
    #[must_use]
    pub fn base(&self) -> &ContentDigest {
        &self.salt.weights
    }

    /// What cached prompts are salted with.
    pub(super) fn salt(&self) -> &Salt {
        &self.salt
    }

    /// The model on them.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: ServerOptions,
    pub(super) prefixes: PrefixCache,
    pub(super) store: Arc<dyn SnapshotStore>,
    started: Instant,
    served: ArcSwapOption<Served>,
    swaps: AtomicU64,
    requests: AtomicU64,
    load: Mutex<Load>,
}

/// How many operation ids are remembered, so that an old order that comes again changes nothing.
const KEPT_OPERATIONS: usize = 1024;

/// The last hot-load, running or done.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) stage: Stage,
    pub(super) op: Option<OpId>,
    pub(super) target: Option<SnapshotIdentity>,
    pub(super) error: Option<String>,
    pub(super) load: Option<Duration>,
    pub(super) verify: Option<Duration>,
    pub(super) pause: Option<Duration>,
    /// The operations that were taken, this one included, oldest first.
    seen: VecDeque<OpId>,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            stage: Stage::Idle,
            op: None,
            target: None,
            error: None,
            load: None,
            verify: None,
            pause: None,
            seen: VecDeque::new(),
        }
    }
}

/// A hot-load as the API states it.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) op: Option<OpId>,
    pub(super) identity: SnapshotIdentity,
    pub(super) previous: Option<SnapshotIdentity>,
    pub(super) reset_prompt_cache: bool,
    pub(super) manifest: Option<ManifestDigest>,
    pub(super) digest: Option<ContentDigest>,
}

impl Shared {
    pub(super) fn new(store: Arc<dyn SnapshotStore>, options: ServerOptions) -> Self {
        Self {
            prefixes: PrefixCache::new(options.cached_prompts),
            options,
            store,
            started: Instant::now(),
            served: ArcSwapOption::empty(),
            swaps: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            load: Mutex::default(),
        }
    }

    /// Serves the model that the options name, if they name one.
    pub(super) async fn serve_promoted(&self) -> Result<()> {
        let Some(id) = &self.options.promoted else { return Ok(()) };
        let served = super::load::promoted(self, id).await?;
        self.served.store(Some(Arc::new(served)));
        Ok(())
    }

    pub(super) fn served(&self) -> Option<Arc<Served>> {
        self.served.load_full()
    }

    /// How often weights were swapped since the start.
    pub(super) fn swaps(&self) -> u64 {
        self.swaps.load(Ordering::Acquire)
    }

    /// The number of the next request.
    pub(super) fn next_request(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether hot-loads are taken: health is green before that.
    pub(super) fn takes_hot_loads(&self) -> bool {
        self.started.elapsed() >= self.options.ready_after
    }

    pub(super) fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an order: what can be refused at once is refused, the rest goes on in the background.
    pub(super) async fn accept(self: &Arc<Self>, order: Order) -> Result<()> {
        if !self.takes_hot_loads() {
            return Err(Error::unavailable("this server does not take hot-loads yet")
                .with_help("wait until `readiness` is true, then order again"));
        }
        if !self.begin(&order)? {
            return Ok(());
        }
        match self.prepare(&order).await {
            Ok(source) => {
                let shared = Arc::clone(self);
                let work = Arc::clone(self);
                // In a task of its own, so that even a panic ends in a stage that callers see.
                let work = tokio::spawn(async move { work.run(&order, source).await });
                tokio::spawn(async move {
                    let outcome = work.await.unwrap_or_else(|error| {
                        Err(Error::internal("the hot-load panicked").with_source(error))
                    });
                    shared.end(outcome);
                });
                Ok(())
            }
            Err(error) => {
                self.end(Err(Error::new(error.kind(), error.message())));
                Err(error)
            }
        }
    }

    /// Claims the loader. `false`: this very operation was taken before.
    fn begin(&self, order: &Order) -> Result<bool> {
        let mut load = self.load();
        let known = order.op.as_ref().is_some_and(|op| load.seen.contains(op));
        if known {
            return Ok(false);
        }
        if matches!(load.stage, Stage::Load | Stage::Swap) {
            let busy = load.target.as_ref().map_or_else(String::new, ToString::to_string);
            return Err(
                Error::conflict(format!("{busy} is being loaded")).with_help("order again when it is done")
            );
        }
        let mut seen = std::mem::take(&mut load.seen);
        seen.extend(order.op.clone());
        if seen.len() > KEPT_OPERATIONS {
            seen.pop_front();
        }
        *load = Load {
            stage: Stage::Load,
            op: order.op.clone(),
            target: Some(order.identity.clone()),
            seen,
            ..Load::default()
        };
        Ok(true)
    }

    fn end(&self, outcome: Result<()>) {
        let mut load = self.load();
        match outcome {
            Ok(()) => load.stage = Stage::Idle,
            Err(error) => {
                load.stage = Stage::Error;
                load.error = Some(error.report());
            }
        }
    }

    /// Finds what is ordered, and refuses what cannot be loaded before a byte of its weights is read.
    async fn prepare(&self, order: &Order) -> Result<Source> {
        let (repo, info) = self.find(order).await?;
        self.check(order, &info)?;
        source(self, repo, info).await
    }

    async fn find(&self, order: &Order) -> Result<(SnapshotRepo, SnapshotInfo)> {
        for job in towline_storage::jobs(self.store.as_ref()).await? {
            let repo = SnapshotRepo::new(Arc::clone(&self.store), job, towline_codec::all());
            match repo.find(order.identity.as_str(), Wanted::Sampler).await {
                Ok(info) if info.id.identity == order.identity => return Ok((repo, info)),
                Ok(_) => {}
                Err(error) if error.kind() == towline_core::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::not_found(format!("the store holds no snapshot {}", order.identity))
            .with_help("save it to the store that this server was started with"))
    }

    /// What can be known before a byte of the weights is read.
    fn check(&self, order: &Order, info: &SnapshotInfo) -> Result<()> {
        if order.manifest.is_some_and(|manifest| manifest != info.manifest)
            || order.digest.is_some_and(|digest| digest != info.id.digest)
        {
            return Err(Error::corrupt(format!("{} is not the snapshot that was ordered", info.id))
                .with_help("order it by the reference that its save returned"));
        }
        let served = self.served().map(|served| served.id().clone());
        match (info.kind, &order.previous) {
            (SnapshotKind::Delta, None) => Err(Error::chain_mismatch(format!(
                "{} is a delta, but it was ordered as a full snapshot",
                info.id
            ))
            .with_help("send `incremental_snapshot_metadata`, or order a base")),
            (SnapshotKind::Delta, Some(previous)) => {
                let parent = info.parent.as_ref();
                match served {
                    Some(served)
                        if served.identity == *previous
                            && parent.is_some_and(|parent| parent.digest == served.digest) =>
                    {
                        Ok(())
                    }
                    served => Err(Error::chain_mismatch(format!(
                        "{} is a delta on {}, ordered onto {previous}, but {} is served",
                        info.id,
                        parent.map_or("nothing".into(), ToString::to_string),
                        served.map_or("nothing".into(), |served| served.to_string()),
                    ))
                    .with_help("order a base")),
                }
            }
            (SnapshotKind::Base | SnapshotKind::MergedBase | SnapshotKind::Adapter, None) => Ok(()),
            (SnapshotKind::Base | SnapshotKind::MergedBase | SnapshotKind::Adapter, Some(_)) => {
                Err(Error::chain_mismatch(format!(
                    "{} is a full snapshot, but it was ordered as a delta",
                    info.id
                ))
                .with_help("leave `incremental_snapshot_metadata` out"))
            }
            (kind, _) => Err(Error::unsupported(format!("this server loads no {kind}"))),
        }
    }

    /// Loads, checks and swaps. Until the swap nothing that is served is touched.
    async fn run(self: &Arc<Self>, order: &Order, source: Source) -> Result<()> {
        let started = Instant::now();
        let served = self.served();
        let content = source.read().await?;
        let loaded = started.elapsed();
        let build = tokio::task::spawn_blocking(move || {
            let started = Instant::now();
            content.build(served.as_deref()).map(|next| (next, started.elapsed()))
        });
        let (next, verified) =
            build.await.map_err(|error| Error::internal("the loader panicked").with_source(error))??;
        self.load().stage = Stage::Swap;
        let swap = Instant::now();
        self.served.store(Some(Arc::new(next)));
        self.swaps.fetch_add(1, Ordering::AcqRel);
        let pause = swap.elapsed();
        if order.reset_prompt_cache {
            self.prefixes.reset();
        }
        let mut load = self.load();
        (load.load, load.verify, load.pause) = (Some(loaded), Some(verified), Some(pause));
        Ok(())
    }
}
