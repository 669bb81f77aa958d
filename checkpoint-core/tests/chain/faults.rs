//! The two faults of the public Python client, put back around the chain. What both have in common: saving alone
//! moves the chain on, whatever becomes of the hot-load.

use towline_core::{
    Chain, ChainSettings, CheckpointType, ContentDigest, DeltaParents, LoadPlan, Reason, Result, SavePlan,
    SnapshotId, SnapshotKind, SnapshotRef,
};

use crate::{ChainUnderTest, Found};

/// The first hot-load fails, but "a base was saved": the next save is a delta, and since nothing was ever loaded it
/// is sent without a parent, as if it were whole.
pub(crate) type FirstLoadFails = Python<true>;

/// A later hot-load fails, but the last save stays the parent of the next delta.
pub(crate) type LaterLoadFails = Python<false>;

pub(crate) struct Python<const FIRST: bool> {
    chain: Chain,
    lora: bool,
    last_saved: Option<SnapshotId>,
    ever_confirmed: bool,
    last_failed: bool,
}

impl<const FIRST: bool> Python<FIRST> {
    fn faulty(&self) -> bool {
        self.last_failed && self.ever_confirmed != FIRST && !self.lora
    }

    fn forget(&mut self) {
        (self.last_saved, self.ever_confirmed, self.last_failed) = (None, false, false);
    }
}

impl<const FIRST: bool> ChainUnderTest for Python<FIRST> {
    fn new(settings: ChainSettings) -> Self {
        let chain = Chain::new(settings);
        Self { chain, lora: settings.lora, last_saved: None, ever_confirmed: false, last_failed: false }
    }

    fn plan_save(&self, requested: Option<CheckpointType>) -> Result<SavePlan> {
        let Some(parent) = self.last_saved.clone().filter(|_| requested.is_none() && self.faulty()) else {
            return self.chain.plan_save(requested);
        };
        let mut plan = self.chain.plan_save(Some(CheckpointType::Base))?;
        (plan.kind, plan.parent, plan.reason) = (SnapshotKind::Delta, Some(parent), Reason::Confirmed);
        Ok(plan)
    }

    fn saved(&mut self, snapshot: &SnapshotRef) {
        self.last_saved = Some(snapshot.id.clone());
        self.chain.saved(snapshot);
    }

    fn save_failed(&mut self) {
        self.chain.save_failed();
    }

    fn plan_load(&self, snapshot: &SnapshotRef) -> Result<LoadPlan> {
        if snapshot.kind == SnapshotKind::Delta && self.faulty() {
            return Ok(LoadPlan::Order { previous: snapshot.parent.clone().filter(|_| !FIRST) });
        }
        self.chain.plan_load(snapshot)
    }

    fn ordered(&mut self, snapshot: &SnapshotId) {
        self.chain.ordered(snapshot);
    }

    fn confirmed(&mut self, snapshot: &SnapshotId) -> bool {
        let counted = self.chain.confirmed(snapshot);
        self.ever_confirmed |= counted;
        self.last_failed &= !counted;
        counted
    }

    fn failed(&mut self, snapshot: &SnapshotId) {
        self.last_failed = true;
        self.chain.failed(snapshot);
    }

    fn reset(&mut self) {
        self.forget();
        self.chain.reset();
    }

    fn attach(&mut self, found: Found, restored: Option<&ContentDigest>, held: bool) {
        self.forget();
        self.chain.attach(found, restored, held);
        self.ever_confirmed = self.chain.confirmed_snapshot().is_some();
    }

    fn confirmed_snapshot(&self) -> Option<SnapshotId> {
        self.chain.confirmed_snapshot().cloned()
    }
}

/// One rule of the chain left out.
pub(crate) const BELIEVES_LATE_WORDS: u8 = 0;
pub(crate) const FORGETS_FAILURES: u8 = 1;
pub(crate) const IGNORES_THE_LAST_EXPORT: u8 = 2;
pub(crate) const ATTACHES_TO_ANYTHING: u8 = 3;
pub(crate) const LOADS_ANY_DELTA: u8 = 4;

pub(crate) struct Without<const RULE: u8> {
    chain: Chain,
    before: Option<SnapshotId>,
}

impl<const RULE: u8> Without<RULE> {
    fn pretend(&mut self, snapshot: &SnapshotId) -> bool {
        self.chain.ordered(snapshot);
        self.chain.confirmed(snapshot)
    }
}

impl<const RULE: u8> ChainUnderTest for Without<RULE> {
    fn new(mut settings: ChainSettings) -> Self {
        if RULE == IGNORES_THE_LAST_EXPORT {
            settings = settings.with_parents(DeltaParents::Any);
        }
        Self { chain: Chain::new(settings), before: None }
    }

    fn plan_save(&self, requested: Option<CheckpointType>) -> Result<SavePlan> {
        self.chain.plan_save(requested)
    }

    fn saved(&mut self, snapshot: &SnapshotRef) {
        self.chain.saved(snapshot);
    }

    fn save_failed(&mut self) {
        self.chain.save_failed();
    }

    fn plan_load(&self, snapshot: &SnapshotRef) -> Result<LoadPlan> {
        match self.chain.plan_load(snapshot) {
            Err(_) if RULE == LOADS_ANY_DELTA => Ok(LoadPlan::Order { previous: self.confirmed_snapshot() }),
            plan => plan,
        }
    }

    fn ordered(&mut self, snapshot: &SnapshotId) {
        self.before = self.confirmed_snapshot();
        self.chain.ordered(snapshot);
    }

    fn confirmed(&mut self, snapshot: &SnapshotId) -> bool {
        if RULE == BELIEVES_LATE_WORDS { self.pretend(snapshot) } else { self.chain.confirmed(snapshot) }
    }

    fn failed(&mut self, snapshot: &SnapshotId) {
        self.chain.failed(snapshot);
        if let Some(before) = self.before.take().filter(|_| RULE == FORGETS_FAILURES) {
            self.pretend(&before);
        }
    }

    fn reset(&mut self) {
        self.chain.reset();
    }

    fn attach(&mut self, found: Found, restored: Option<&ContentDigest>, held: bool) {
        match found {
            Some((identity, _)) if RULE == ATTACHES_TO_ANYTHING => {
                let digest = restored.copied().unwrap_or(ContentDigest::from_bytes([0; 32]));
                self.pretend(&SnapshotId { identity, digest });
            }
            found => self.chain.attach(found, restored, held),
        }
    }

    fn confirmed_snapshot(&self) -> Option<SnapshotId> {
        self.chain.confirmed_snapshot().cloned()
    }
}
