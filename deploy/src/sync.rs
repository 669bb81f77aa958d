//! The weight syncer: saves, hot-loads, waits, and keeps the chain.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};
use towline_core::{
    Chain, ChainSettings, CheckpointType, CodecId, ContentDigest, Deployment, DeploymentStatus, Error,
    ErrorKind, ExportRequest, HotLoad, LoadPlan, Result, SnapshotExporter, SnapshotIdentity, SnapshotKind,
    SnapshotName, SnapshotRef, Stage,
};

use crate::load;
use crate::{Receipt, SyncSettings, random};

/// The longest save. The public clients allow this much for saving and loading.
const SAVE_TIMEOUT: Duration = Duration::from_secs(2700);
/// How long a question about the state may take that is no part of a hot-load.
const STATE_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest wait for a deployment that has not reported a replica yet, before the first order.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
const READY_INTERVAL: Duration = Duration::from_secs(5);

/// Saves what a trainer has learnt and puts it onto a deployment.
///
/// One operation runs at a time; another call waits for it. A delta is saved only against what the deployment has
/// confirmed; after a failure, a timeout or a dropped future the next save is a base. So the caller names
/// snapshots and need not think of kinds.
///
/// ```no_run
/// # async fn example(
/// #     trainer: std::sync::Arc<dyn towline_core::SnapshotExporter>,
/// #     servers: std::sync::Arc<dyn towline_core::Deployment>,
/// # ) -> towline_core::Result<()> {
/// use towline_core::SnapshotName;
/// let syncer = towline_deploy::WeightSyncer::new(trainer)
///     .with_deployment(servers)
///     .with_compression_format("auto");
/// for step in 0..100 {
///     // … train …
///     let receipt = syncer.save_and_hotload(SnapshotName::new(format!("step-{step:05}"))?, None).await?;
///     assert!(receipt.synced);
/// }
/// # Ok(())
/// # }
/// ```
pub struct WeightSyncer {
    pub(crate) exporter: Arc<dyn SnapshotExporter>,
    pub(crate) deployment: Option<Arc<dyn Deployment>>,
    pub(crate) settings: SyncSettings,
    /// Held for a whole operation: one at a time.
    turn: tokio::sync::Mutex<()>,
    /// Held for moments: a reset must get in while an operation runs.
    pub(crate) state: Mutex<State>,
}

/// What is known of the deployment.
#[derive(Debug)]
pub(crate) struct State {
    chain: Chain,
    /// Whether the chain knows what the deployment served when it was met, or has been told to forget it.
    attached: bool,
    /// Whether the deployment was seen to serve the right model and to take orders.
    met: bool,
}

/// A snapshot on every replica.
struct Loaded {
    status: DeploymentStatus,
    took: Duration,
    reset_prompt_cache: bool,
}

impl WeightSyncer {
    /// A syncer that only saves, until it gets a deployment.
    pub fn new(exporter: Arc<dyn SnapshotExporter>) -> Self {
        let settings = SyncSettings::default();
        let state = Mutex::new(State::new(&settings, &*exporter));
        Self { exporter, deployment: None, settings, turn: tokio::sync::Mutex::new(()), state }
    }

    /// What it is set to.
    pub fn settings(&self) -> &SyncSettings {
        &self.settings
    }

    /// Saves the current weights as `name`, hot-loads them, and warms the deployment up. Without a deployment it
    /// only saves, and the receipt says `synced: false`. `None` lets the chain choose the type.
    ///
    /// If the future is dropped, the save or the load may have happened or not, and the next save is a base.
    ///
    /// # Errors
    /// `ChainMismatch` for a delta that is not allowed, and `Unsupported` for a codec or adapter that the deployment
    /// does not take, both before anything is saved; `Invalid` if another model is served; `TimedOut` if not every
    /// replica is ready in time; `Corrupt` if a replica refused the snapshot; else as the exporter and the
    /// deployment answer.
    pub async fn save_and_hotload(
        &self,
        name: SnapshotName,
        checkpoint_type: Option<CheckpointType>,
    ) -> Result<Receipt> {
        let _turn = self.turn.lock().await;
        let start = Instant::now();
        let (snapshot, reason) = self.save(name, checkpoint_type).await?;
        let mut receipt = Receipt::saved(snapshot, reason, start.elapsed().as_secs_f64());
        if let Some(deployment) = &self.deployment {
            let loaded = self.load(&**deployment, &receipt.snapshot).await.map_err(|error| {
                error.context(format_args!("{} is saved, but not synced", receipt.snapshot.id))
            })?;
            receipt.time_to_fresh_s = start.elapsed().as_secs_f64();
            self.finish(&mut receipt, &**deployment, loaded).await;
        }
        Ok(receipt)
    }

    /// Saves the current weights as `name` and loads nothing. `None` lets the chain choose the type.
    ///
    /// # Errors
    /// As [`WeightSyncer::save_and_hotload`] before the load.
    pub async fn save_only(
        &self,
        name: SnapshotName,
        checkpoint_type: Option<CheckpointType>,
    ) -> Result<SnapshotRef> {
        let _turn = self.turn.lock().await;
        Ok(self.save(name, checkpoint_type).await?.0)
    }

    /// Hot-loads a snapshot that was saved before, and warms the deployment up. `checkpoint_type` must be what it
    /// was saved as; a LoRA adapter counts as a base.
    ///
    /// # Errors
    /// `Invalid` without a deployment, for another type and for a train state; `ChainMismatch` for a delta on
    /// anything but what the deployment has confirmed; else as [`WeightSyncer::save_and_hotload`].
    pub async fn hotload(&self, snapshot: &SnapshotRef, checkpoint_type: CheckpointType) -> Result<Receipt> {
        let deployment = self.deployed()?;
        let fits = match snapshot.kind {
            SnapshotKind::Base | SnapshotKind::Adapter => checkpoint_type == CheckpointType::Base,
            SnapshotKind::Delta => checkpoint_type == CheckpointType::Delta,
            SnapshotKind::MergedBase => checkpoint_type == CheckpointType::MergedBase,
            SnapshotKind::State => false,
            // A kind of a later version.
            _ => false,
        };
        if !fits {
            return Err(Error::invalid(format!(
                "{} was saved as {}, but is to be loaded as {checkpoint_type}",
                snapshot.id, snapshot.kind
            ))
            .with_help("pass the type that it was saved with"));
        }
        let _turn = self.turn.lock().await;
        self.meet().await?;
        let start = Instant::now();
        let loaded = self.load(deployment, snapshot).await?;
        let mut receipt = Receipt::saved(snapshot.clone(), "loaded as it was saved".into(), 0.0);
        receipt.time_to_fresh_s = start.elapsed().as_secs_f64();
        self.finish(&mut receipt, deployment, loaded).await;
        Ok(receipt)
    }

    /// What all replicas serve; `None` if they serve nothing.
    ///
    /// # Errors
    /// `Invalid` without a deployment or if another model is served, `Conflict` if replicas differ, `Unavailable`
    /// if there are none or they cannot be asked.
    pub async fn check_deployment_state(&self) -> Result<Option<SnapshotIdentity>> {
        let status = load::status(self.deployed()?, load::deadline(STATE_TIMEOUT)).await?;
        self.check_model(&status)?;
        Ok(status.served()?.map(|(identity, _)| identity))
    }

    /// Waits until every replica takes hot-loads, for 300 s, asking every 5 s. A server's health can be green
    /// before that.
    ///
    /// # Errors
    /// As [`WeightSyncer::wait_for_hotload_ready_for`].
    pub async fn wait_for_hotload_ready(&self) -> Result<()> {
        self.wait_for_hotload_ready_for(READY_TIMEOUT, READY_INTERVAL).await
    }

    /// Waits until every replica takes hot-loads.
    ///
    /// # Errors
    /// `Invalid` without a deployment, `TimedOut` if it takes longer than `timeout`; at once if the deployment
    /// answers with an error that will not pass.
    pub async fn wait_for_hotload_ready_for(&self, timeout: Duration, every: Duration) -> Result<()> {
        let ready = |status: &DeploymentStatus| {
            !status.replicas.is_empty() && status.replicas.iter().all(|replica| replica.ready)
        };
        load::until(self.deployed()?, load::deadline(timeout), every, ready).await
    }

    /// Forgets what the deployment serves: the next save is a base. Call it after the deployment was attached to
    /// another trainer or bucket. A hot-load that is running goes on, but confirms nothing.
    pub fn reset_delta_chain(&self) {
        self.state(|state| {
            state.chain.reset();
            state.attached = true;
        });
    }

    async fn save(
        &self,
        name: SnapshotName,
        requested: Option<CheckpointType>,
    ) -> Result<(SnapshotRef, String)> {
        self.meet().await?;
        let (request, reason) = self.plan(name, requested)?;
        // Until it is known to be done, a trainer that diffs against its last save may have done either.
        self.state(|state| state.chain.save_failed());
        let Ok(saved) = timeout(SAVE_TIMEOUT, self.exporter.export(request)).await else {
            return Err(Error::timed_out(format!("the save took longer than {} s", SAVE_TIMEOUT.as_secs()))
                .with_help("look whether the trainer and its store still work; save under another name"));
        };
        let snapshot = saved?;
        self.state(|state| state.chain.saved(&snapshot));
        Ok((snapshot, reason))
    }

    /// Chooses kind and codec, and refuses what the deployment would refuse.
    fn plan(&self, name: SnapshotName, requested: Option<CheckpointType>) -> Result<(ExportRequest, String)> {
        let capabilities = self.deployment.as_ref().map(|deployment| deployment.capabilities());
        let best = capabilities.as_ref().and_then(|found| found.delta_codecs.first());
        let codec = match (self.settings.compression_format.as_str(), best) {
            ("auto", Some(best)) => best.clone(),
            ("auto", None) => CodecId::new("raw")?,
            (named, _) => CodecId::new(named)?,
        };
        let mut plan = self.state(|state| state.chain.plan_save(requested))?;
        let mut reason = plan.reason.to_string();
        if let Some(capabilities) = capabilities {
            if plan.kind == SnapshotKind::Adapter && !capabilities.adapters {
                return Err(Error::unsupported("the deployment loads no LoRA adapters")
                    .with_help("save a merged_base, or enable adapters on the deployment"));
            }
            // A deployment that applies no deltas at all simply gets bases.
            if capabilities.delta_codecs.is_empty() && plan.kind == SnapshotKind::Delta && requested.is_none()
            {
                (plan.kind, plan.parent) = (SnapshotKind::Base, None);
                reason = "the deployment applies no deltas".into();
            }
            // Said at the first base already, if deltas will follow.
            let deltas = plan.kind == SnapshotKind::Delta
                || (plan.kind == SnapshotKind::Base
                    && requested.is_none()
                    && !capabilities.delta_codecs.is_empty());
            if deltas && !capabilities.delta_codecs.contains(&codec) {
                let known: Vec<_> = capabilities.delta_codecs.iter().map(CodecId::as_str).collect();
                return Err(Error::unsupported(format!(
                    "the deployment does not apply {codec} deltas; it applies: {}",
                    if known.is_empty() { "none".into() } else { known.join(", ") }
                ))
                .with_help("use one of those or `auto` as compression format, or ask for bases"));
            }
        }
        Ok((ExportRequest::new(name, plan.kind, codec).with_parent(plan.parent), reason))
    }

    /// Looks at the deployment before an operation: takes it up at the first time, and again if it serves something
    /// else than it has confirmed. One that cannot be asked is left for the next time: its first save is a base.
    async fn meet(&self) -> Result<()> {
        let Some(deployment) = &self.deployment else { return Ok(()) };
        let status = match load::status(&**deployment, load::deadline(STATE_TIMEOUT)).await {
            Ok(status) => status,
            Err(error) if load::is_passing(&error) || error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.named(error)),
        };
        self.check_model(&status)?;
        if status.replicas.is_empty() {
            return Ok(());
        }
        let busy = status.replicas.iter().any(|replica| matches!(replica.stage, Stage::Load | Stage::Swap));
        let (found, one) = match status.served() {
            Ok(found) if !busy => (found, true),
            // Replicas that differ serve nothing that a delta could be on, and what one that is loading will serve
            // in a moment is not known: somebody else's order may be under way.
            Ok(_) | Err(_) => {
                let first = status.replicas.iter().find_map(|replica| replica.identity.clone());
                (first.map(|identity| (identity, None)), false)
            }
        };
        let known = self.state(|state| {
            state.met = true;
            match state.chain.confirmed_snapshot() {
                Some(confirmed) => found.as_ref().is_some_and(|(identity, digest)| {
                    let same = digest.is_none_or(|digest| digest == confirmed.digest);
                    one && same && *identity == confirmed.identity
                }),
                None => state.attached,
            }
        });
        if !known {
            let restored = self.exporter.restored();
            let held = match &found {
                Some((_, Some(digest))) => self.may_continue_on(digest, restored.as_ref()).await?,
                Some((_, None)) | None => false,
            };
            self.state(|state| {
                state.chain.attach(found, restored.as_ref().filter(|_| held), held);
                state.attached = true;
            });
        }
        Ok(())
    }

    async fn may_continue_on(
        &self,
        digest: &ContentDigest,
        restored: Option<&ContentDigest>,
    ) -> Result<bool> {
        let wanted = restored == Some(digest) || self.settings.first_checkpoint_type == CheckpointType::Delta;
        Ok(wanted && self.exporter.holds(digest).await?)
    }

    async fn load(&self, deployment: &dyn Deployment, snapshot: &SnapshotRef) -> Result<Loaded> {
        let start = Instant::now();
        let deadline = load::deadline(self.settings.hotload_timeout);
        let every = self.settings.poll_interval;
        let capabilities = deployment.capabilities();
        let previous = match self.state(|state| state.chain.plan_load(snapshot))? {
            LoadPlan::Order { previous } => previous,
            LoadPlan::AlreadyServed => {
                let status = load::status(deployment, deadline).await?;
                return Ok(Loaded { status, took: Duration::ZERO, reset_prompt_cache: false });
            }
        };
        let reset_prompt_cache = self.settings.reset_prompt_cache && capabilities.resets_prompt_cache;
        let mut order =
            HotLoad::new(random::op()?, snapshot.clone())?.with_reset_prompt_cache(reset_prompt_cache);
        order.previous = previous;
        if !self.state(|state| state.met) {
            // An order to a server that is still starting can kill it.
            let limit = deadline.min(load::deadline(READY_TIMEOUT));
            load::until(deployment, limit, every, |status| !status.replicas.is_empty()).await?;
            self.check_model(&load::status(deployment, deadline).await?)?;
        }
        // From here on what is served is in doubt, also if this future is dropped.
        self.state(|state| {
            state.chain.ordered(&snapshot.id);
            state.attached = true;
            state.met = true;
        });
        match load::order(deployment, &order, deadline, every).await {
            Ok(status) => {
                // Not confirmed if the chain was reset in the meantime: the next save is then a base.
                self.state(|state| state.chain.confirmed(&snapshot.id));
                Ok(Loaded { status, took: start.elapsed(), reset_prompt_cache })
            }
            Err(error) => {
                self.state(|state| state.chain.failed(&snapshot.id));
                Err(self.named(error))
            }
        }
    }

    async fn finish(&self, receipt: &mut Receipt, deployment: &dyn Deployment, loaded: Loaded) {
        let seconds = |value: Duration| value.as_secs_f64();
        receipt.synced = true;
        receipt.load_s = seconds(loaded.took);
        receipt.verify_s = load::slowest(&loaded.status, |replica| replica.verify).map_or(0.0, seconds);
        receipt.pause_s = load::slowest(&loaded.status, |replica| replica.pause).map(seconds);
        receipt.reset_prompt_cache = loaded.reset_prompt_cache;
        receipt.replicas = loaded.status.replicas.len();
        if self.settings.warmup_after_hotload {
            let start = Instant::now();
            let SyncSettings { warmup_max_retries, warmup_interval, .. } = self.settings;
            receipt.warm_up_error = load::warm_up(deployment, warmup_max_retries, warmup_interval).await;
            receipt.warm_up_s = seconds(start.elapsed());
        }
    }

    fn check_model(&self, status: &DeploymentStatus) -> Result<()> {
        let wanted = &self.settings.base_model;
        match &status.model {
            Some(served) if !wanted.is_empty() && served != wanted => Err(Error::invalid(format!(
                "the deployment serves model `{served}`, but base_model is `{wanted}`"
            ))
            .with_help("sync to a deployment of the model that is trained, or correct base_model")),
            Some(_) | None => Ok(()),
        }
    }

    fn deployed(&self) -> Result<&dyn Deployment> {
        self.deployment.as_deref().ok_or_else(|| {
            Error::invalid("this syncer has no deployment").with_help("give it one with `with_deployment`")
        })
    }

    fn named(&self, error: Error) -> Error {
        match &self.settings.deployment_id {
            Some(id) => error.context(format_args!("deployment {id}")),
            None => error,
        }
    }

    fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        // Nothing that panics runs under this lock, so the state is whole whatever happened elsewhere.
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for WeightSyncer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeightSyncer")
            .field("exporter", &self.exporter)
            .field("deployment", &self.deployment)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl State {
    pub(crate) fn new(settings: &SyncSettings, exporter: &dyn SnapshotExporter) -> Self {
        let settings = ChainSettings::default()
            .with_first(settings.first_checkpoint_type)
            .with_lora(settings.lora_rank > 0)
            .with_parents(exporter.delta_parents());
        Self { chain: Chain::new(settings), attached: false, met: false }
    }
}
