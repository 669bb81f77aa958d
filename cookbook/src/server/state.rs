//! What is served, what is being loaded, and the swap between them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use towline_core::{
    ContentDigest, Error, JobId, ManifestDigest, OpId, Result, SnapshotId, SnapshotIdentity, SnapshotKind,
    SnapshotStore, Stage, Weights, same_tensors,
};
use towline_storage::{SnapshotInfo, SnapshotRepo, Wanted};

use super::ServerOptions;
use super::prefix::PrefixCache;
use crate::bridge;
use crate::engine::{Model, ModelConfig};

/// One set of weights as it is served: the bytes, for the next delta, and the model, for requests.
#[derive(Debug)]
pub struct Served {
    id: SnapshotId,
    weights: Weights,
    model: Model,
}

impl Served {
    /// Identity and content digest.
    #[must_use]
    pub fn id(&self) -> &SnapshotId {
        &self.id
    }

    /// The published bytes.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
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
    store: Arc<dyn SnapshotStore>,
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
        // The registry is the store's: any job's repo reads it.
        let repo = SnapshotRepo::new(Arc::clone(&self.store), JobId::new("server")?, towline_codec::all());
        let loaded = repo.load_model(id).await?;
        let source = loaded.model.source.id;
        let config = loaded.files.iter().find(|(path, _)| path == "config.json").map(|(_, body)| body);
        let config = config.ok_or_else(|| {
            Error::unsupported(format!("model `{id}` has no config.json"))
                .with_help("serve a model of full weights")
        })?;
        let model = bridge::model(&parse_config(config)?, &loaded.weights)?;
        self.served.store(Some(Arc::new(Served { id: source, weights: loaded.weights, model })));
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
        let found = self.find(&order).await;
        let checked = found.and_then(|found| self.check(&order, &found.1).map(|()| found));
        match checked {
            Ok((repo, info)) => {
                let shared = Arc::clone(self);
                let work = Arc::clone(self);
                // In a task of its own, so that even a panic ends in a stage that callers see.
                let work = tokio::spawn(async move { work.run(&order, &repo, &info).await });
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
            (SnapshotKind::Base | SnapshotKind::MergedBase, None) => Ok(()),
            (SnapshotKind::Base | SnapshotKind::MergedBase, Some(_)) => Err(Error::chain_mismatch(format!(
                "{} is a full snapshot, but it was ordered as a delta",
                info.id
            ))
            .with_help("leave `incremental_snapshot_metadata` out")),
            (kind, _) => Err(Error::unsupported(format!("this server loads no {kind}"))),
        }
    }

    /// Loads, checks and swaps. Until the swap nothing that is served is touched.
    async fn run(self: &Arc<Self>, order: &Order, repo: &SnapshotRepo, info: &SnapshotInfo) -> Result<()> {
        let started = Instant::now();
        let served = self.served();
        let weights = match (info.kind, &served) {
            (SnapshotKind::Delta, Some(served)) => repo.apply(info, &served.weights).await?,
            (SnapshotKind::Delta, None) => {
                return Err(Error::chain_mismatch("nothing is served to apply a delta to"));
            }
            _ => repo.restore(info).await?,
        };
        let config = repo.file(info, "config.json").await?;
        let loaded = started.elapsed();
        let id = info.id.clone();
        let build = tokio::task::spawn_blocking(move || {
            let started = Instant::now();
            let config = parse_config(&config)?;
            if let Some(served) = &served {
                same_tensors(served.weights.tensors(), weights.tensors()).map_err(|error| {
                    error.context("the snapshot is of another model than the one that is served")
                })?;
            }
            if weights.content_digest() != id.digest {
                return Err(Error::corrupt(format!("the loaded weights are not {id}")));
            }
            let model = bridge::model(&config, &weights)?;
            Ok((Served { id, weights, model }, started.elapsed()))
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

fn parse_config(bytes: &[u8]) -> Result<ModelConfig> {
    let text = std::str::from_utf8(bytes).map_err(|_| Error::corrupt("config.json is no text"))?;
    Ok(ModelConfig::from_json(text)?)
}
