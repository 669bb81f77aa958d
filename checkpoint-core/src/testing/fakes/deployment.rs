//! A deployment in memory: the example to implement one by, with faults to order.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::SnapshotSource;
use crate::{
    Capabilities, CodecId, ContentDigest, Deployment, DeploymentStatus, Error, HotLoad, OpId, ReplicaStatus,
    Result, SnapshotId, SnapshotIdentity, Stage, Weights,
};

/// A complete [`Deployment`] in memory. Clones share the replicas.
///
/// An order is done when it is accepted, but for faults. By default: one replica, deltas in `arc_v2` and
/// `test-xor`, a prompt cache, and every result checked against its content digest.
#[derive(Debug, Clone)]
pub struct FakeDeployment {
    source: Arc<dyn SnapshotSource>,
    capabilities: Capabilities,
    checks: bool,
    state: Arc<Mutex<State>>,
}

/// What goes wrong with the next order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The call fails with `Unavailable`; nothing happens.
    Reject,
    /// Accepted, then shown as an error of every replica; the old weights keep serving.
    Fail,
    /// Applied, but the call fails with `Unavailable`.
    LoseReply,
    /// Accepted, and nothing happens until somebody gives up.
    Hang,
    /// Applied, but the last replica shows the old weights for this many looks at the status.
    Lag(u32),
    /// Applied after this many looks at the status, on every replica at once.
    Delay(u32),
}

#[derive(Debug, Default)]
struct State {
    replicas: Vec<Replica>,
    faults: VecDeque<Fault>,
    orders: Vec<HotLoad>,
    done: Vec<OpId>,
    swaps: u64,
    resets: u64,
    warm_ups: u64,
    failing_warm_ups: u32,
    not_ready: u32,
}

#[derive(Debug, Clone, Default)]
struct Replica {
    serves: Option<(SnapshotId, Weights)>,
    next: Option<(SnapshotId, Weights, u32)>,
    target: Option<SnapshotIdentity>,
    error: Option<String>,
}

impl FakeDeployment {
    /// One replica that serves nothing yet and loads from `source`.
    pub fn new(source: impl SnapshotSource) -> Self {
        let capabilities = Capabilities::new(vec![CodecId::of("arc_v2"), CodecId::of("test-xor")]);
        Self {
            source: Arc::new(source),
            capabilities: capabilities.with_prompt_cache(true),
            checks: true,
            state: Arc::new(Mutex::new(State { replicas: vec![Replica::default()], ..State::default() })),
        }
    }

    /// Sets the number of replicas; 0 counts as 1.
    #[must_use]
    pub fn with_replicas(self, count: usize) -> Self {
        self.lock().replicas.resize(count.max(1), Replica::default());
        self
    }

    /// Sets what it can do.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// Checks the parent by its name alone and results not at all, as a hosted service does: a delta on other
    /// weights of that name then really yields wrong ones.
    #[must_use]
    pub fn without_checks(mut self) -> Self {
        self.checks = false;
        self
    }

    /// Says that it is not ready for this many looks at the status.
    #[must_use]
    pub fn with_not_ready(self, looks: u32) -> Self {
        self.lock().not_ready = looks;
        self
    }

    /// Queues a fault for the next order that has none yet.
    pub fn fault(&self, fault: Fault) {
        self.lock().faults.push_back(fault);
    }

    /// Lets the next warm-ups fail.
    pub fn fail_warm_ups(&self, count: u32) {
        self.lock().failing_warm_ups = count;
    }

    /// Somebody else loads these weights on every replica.
    pub fn become_foreign(&self, identity: SnapshotIdentity, weights: &Weights) {
        let id = SnapshotId { identity, digest: weights.content_digest() };
        for replica in &mut self.lock().replicas {
            *replica = Replica { serves: Some((id.clone(), weights.clone())), ..Replica::default() };
        }
    }

    /// Somebody else loads these weights on one replica.
    pub fn split(&self, replica: usize, identity: SnapshotIdentity, weights: &Weights) {
        let id = SnapshotId { identity, digest: weights.content_digest() };
        if let Some(replica) = self.lock().replicas.get_mut(replica) {
            replica.serves = Some((id, weights.clone()));
        }
    }

    /// The weights of each replica.
    #[must_use]
    pub fn weights(&self) -> Vec<Option<Weights>> {
        self.lock().replicas.iter().map(|replica| replica.serves.as_ref().map(|(_, w)| w.clone())).collect()
    }

    /// The digest of the weights that all replicas serve, taken from their bytes.
    ///
    /// # Errors
    /// `Conflict` if replicas differ.
    pub fn served(&self) -> Result<Option<ContentDigest>> {
        let digests: Vec<_> =
            self.weights().iter().map(|weights| weights.as_ref().map(Weights::content_digest)).collect();
        match digests.split_first() {
            Some((first, rest)) if rest.iter().all(|digest| digest == first) => Ok(*first),
            _ => Err(Error::conflict("the replicas serve different weights")),
        }
    }

    /// Every order that was accepted or lost, repeats included.
    #[must_use]
    pub fn orders(&self) -> Vec<HotLoad> {
        self.lock().orders.clone()
    }

    /// How many times weights were swapped, all replicas together counting once.
    #[must_use]
    pub fn swaps(&self) -> u64 {
        self.lock().swaps
    }

    /// How many times the prompt cache was dropped.
    #[must_use]
    pub fn cache_resets(&self) -> u64 {
        self.lock().resets
    }

    /// How many warm-ups succeeded.
    #[must_use]
    pub fn warm_ups(&self) -> u64 {
        self.lock().warm_ups
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What every replica serves, checked to be what the order wants.
    fn parent(&self, order: &HotLoad) -> Result<Option<Weights>> {
        let state = self.lock();
        let Some(previous) = &order.previous else { return Ok(None) };
        for replica in &state.replicas {
            let serves = replica.serves.as_ref().map(|(id, _)| id);
            let fits = serves.is_some_and(|id| {
                if self.checks { id.digest == previous.digest } else { id.identity == previous.identity }
            });
            if !fits {
                let serves = serves.map_or("nothing".to_owned(), ToString::to_string);
                return Err(Error::chain_mismatch(format!(
                    "{} is a delta on {previous}, but {serves} is served",
                    order.snapshot.id
                ))
                .with_help("save a base and hot-load that"));
            }
        }
        Ok(state
            .replicas
            .first()
            .and_then(|replica| replica.serves.as_ref())
            .map(|(_, weights)| weights.clone()))
    }
}

#[async_trait]
impl Deployment for FakeDeployment {
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    async fn status(&self) -> Result<DeploymentStatus> {
        let mut state = self.lock();
        let ready = state.not_ready == 0;
        state.not_ready = state.not_ready.saturating_sub(1);
        let mut swapped = false;
        for replica in &mut state.replicas {
            swapped |= replica.advance();
        }
        state.swaps += u64::from(swapped);
        let replicas = state.replicas.iter().enumerate().map(|(index, replica)| replica.status(index, ready));
        Ok(DeploymentStatus::new(replicas.collect()))
    }

    async fn hot_load(&self, order: &HotLoad) -> Result<()> {
        self.capabilities.check(&order.snapshot)?;
        let fault = {
            let mut state = self.lock();
            state.orders.push(order.clone());
            if state.done.contains(&order.op) {
                return Ok(());
            }
            if state.replicas.iter().any(|replica| replica.next.is_some()) {
                return Err(
                    Error::conflict("another operation is running").with_help("wait until it is done")
                );
            }
            state.faults.pop_front()
        };
        if fault == Some(Fault::Reject) {
            return Err(Error::unavailable("the deployment did not take the order").with_help("try again"));
        }
        let parent = self.parent(order)?;
        let weights = self.source.load(&order.snapshot, parent.as_ref()).await?;
        if self.checks && weights.content_digest() != order.snapshot.id.digest {
            return Err(Error::corrupt(format!(
                "{}: the weights do not match their digest",
                order.snapshot.id
            ))
            .with_help("publish it again"));
        }
        self.lock().accept(order, &weights, fault);
        match fault {
            Some(Fault::LoseReply) => Err(Error::unavailable("the reply was lost")),
            _ => Ok(()),
        }
    }

    async fn warm_up(&self) -> Result<()> {
        let mut state = self.lock();
        if state.failing_warm_ups > 0 {
            state.failing_warm_ups -= 1;
            return Err(Error::unavailable("the deployment is not ready to answer"));
        }
        if state.replicas.iter().any(|replica| replica.serves.is_none()) {
            return Err(Error::unavailable("nothing is served yet").with_help("hot-load a base"));
        }
        state.warm_ups += 1;
        Ok(())
    }
}

impl State {
    fn accept(&mut self, order: &HotLoad, weights: &Weights, fault: Option<Fault>) {
        self.done.push(order.op.clone());
        self.resets += u64::from(order.reset_prompt_cache);
        let last = self.replicas.len().saturating_sub(1);
        let id = &order.snapshot.id;
        let mut swapped = false;
        for (index, replica) in self.replicas.iter_mut().enumerate() {
            replica.target = Some(id.identity.clone());
            replica.error = None;
            let looks = match fault {
                Some(Fault::Fail) => {
                    replica.error = Some("a fault of the test".into());
                    continue;
                }
                Some(Fault::Hang) => continue,
                Some(Fault::Delay(looks)) => looks,
                Some(Fault::Lag(looks)) if index == last => looks,
                Some(Fault::Lag(_) | Fault::Reject | Fault::LoseReply) | None => 0,
            };
            replica.next = Some((id.clone(), weights.clone(), looks));
            swapped |= looks == 0 && replica.advance();
        }
        self.swaps += u64::from(swapped);
    }
}

impl Replica {
    /// One look at the status: whether the weights were swapped.
    fn advance(&mut self) -> bool {
        match self.next.take() {
            Some((id, weights, 0)) => {
                self.serves = Some((id, weights));
                true
            }
            Some((id, weights, looks)) => {
                self.next = Some((id, weights, looks - 1));
                false
            }
            None => false,
        }
    }

    fn status(&self, index: usize, ready: bool) -> ReplicaStatus {
        let mut status = ReplicaStatus::new(format!("replica-{index}"));
        status.ready = ready;
        if let Some((id, weights)) = &self.serves {
            status.identity = Some(id.identity.clone());
            status.digest = Some(weights.content_digest());
        }
        status.stage = match (&self.error, &self.target) {
            (Some(_), _) => Stage::Error,
            (None, target) if *target == status.identity => Stage::Idle,
            (None, Some(_)) => Stage::Load,
            (None, None) => Stage::Idle,
        };
        status.error.clone_from(&self.error);
        status.target.clone_from(&self.target);
        status
    }
}
