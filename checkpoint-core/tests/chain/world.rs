//! A trainer, its store and a deployment with real bytes, and what must hold between them and a chain.

use std::collections::BTreeMap;

use towline_core::{
    CheckpointType, ContentDigest, DType, DeltaParents, ErrorKind, LoadPlan, SavePlan, SessionId, SnapshotId,
    SnapshotIdentity, SnapshotKind, SnapshotName, SnapshotRef, TensorDigest,
};

use crate::{ChainUnderTest, Ending, Found, Op, Setting};

pub(crate) type Bytes = [u8; 8];
type Checked<T = ()> = Result<T, String>;

/// What happened, so that a run that proves nothing is seen.
#[derive(Debug, Default, Clone)]
pub(crate) struct Reach {
    pub(crate) confirmed_bases: u64,
    pub(crate) confirmed_deltas: u64,
    pub(crate) longest_chain: u64,
    pub(crate) refused_deltas: u64,
    pub(crate) attached: u64,
    pub(crate) ignored_words: u64,
    pub(crate) superseded: u64,
    pub(crate) late_effects: u64,
}

impl Reach {
    pub(crate) fn add(&mut self, other: &Self) {
        self.confirmed_bases += other.confirmed_bases;
        self.confirmed_deltas += other.confirmed_deltas;
        self.longest_chain = self.longest_chain.max(other.longest_chain);
        self.refused_deltas += other.refused_deltas;
        self.attached += other.attached;
        self.ignored_words += other.ignored_words;
        self.superseded += other.superseded;
        self.late_effects += other.late_effects;
    }
}

/// A published snapshot: what was stored, and the trainer's weights when it was saved.
#[derive(Debug, Clone)]
pub(crate) struct Saved {
    pub(crate) snapshot: SnapshotRef,
    pub(crate) payload: Bytes,
    pub(crate) weights: Bytes,
}

#[derive(Debug, Clone)]
struct Order {
    identity: SnapshotIdentity,
    previous: Option<SnapshotIdentity>,
    payload: Bytes,
}

/// Applies exactly what it is told: an order with a previous identity is XORed onto what is served if that has the
/// name; an order without is taken as whole weights. It looks at no digest.
#[derive(Debug, Default)]
pub(crate) struct Deployment {
    pub(crate) serves: Option<(SnapshotIdentity, Bytes)>,
    pending: Option<Order>,
}

impl Deployment {
    fn apply(&mut self, order: &Order) -> bool {
        let weights = match (&order.previous, &self.serves) {
            (None, _) => order.payload,
            (Some(previous), Some((identity, weights))) if previous == identity => {
                xor(*weights, order.payload)
            }
            (Some(_), _) => return false,
        };
        self.serves = Some((order.identity.clone(), weights));
        true
    }
}

pub(crate) struct World<C> {
    setting: Setting,
    pub(crate) chain: C,
    pub(crate) weights: Bytes,
    saves: Vec<Saved>,
    last_export: Option<Bytes>,
    session: u8,
    pub(crate) deployment: Deployment,
    /// What the deployment was last known to serve, by the world's own book, if nothing was ordered since.
    book: Option<SnapshotId>,
    /// What was served when somebody looked, and when that was.
    observations: Vec<(SnapshotId, u64)>,
    last_order: BTreeMap<SnapshotIdentity, u64>,
    clock: u64,
    pub(crate) reach: Reach,
}

impl<C: ChainUnderTest> World<C> {
    pub(crate) fn new(setting: Setting) -> Self {
        Self {
            setting,
            chain: C::new(setting.chain),
            weights: [1, 2, 3, 4, 5, 6, 7, 8],
            saves: Vec::new(),
            last_export: None,
            session: 0,
            deployment: Deployment::default(),
            book: None,
            observations: Vec::new(),
            last_order: BTreeMap::new(),
            clock: 0,
            reach: Reach::default(),
        }
    }

    pub(crate) fn step(&mut self, op: Op) -> Checked {
        self.clock += 1;
        match op {
            Op::Train(seed) => self.weights[usize::from(seed % 8)] ^= seed,
            Op::SaveOnly(kind) => {
                self.save(kind)?;
            }
            Op::SaveFails(kind) => {
                if self.plan(kind)?.is_some() {
                    // The trainer may have diffed and moved on, or not.
                    self.last_export = None;
                    self.chain.save_failed();
                }
            }
            Op::Sync(kind, ending) => {
                if let Some(saved) = self.save(kind)? {
                    self.load(&saved, ending)?;
                }
            }
            Op::Load(back, ending) => {
                if let Some(saved) = self.saved(back) {
                    self.load(&saved, ending)?;
                }
            }
            Op::TakesEffect => {
                if let Some(order) = self.deployment.pending.take() {
                    self.reach.late_effects += u64::from(self.deployment.apply(&order));
                }
            }
            Op::LateWord(back) => self.late_word(back),
            Op::Reset => {
                self.chain.reset();
                self.book = None;
            }
            Op::Reattach => self.attach(None),
            Op::Foreign(seed) => {
                let identity = SnapshotIdentity::new(format!("foreign/{}", self.clock)).unwrap();
                self.deployment = Deployment { serves: Some((identity, [seed; 8])), pending: None };
                self.attach(None);
            }
            Op::Emptied => {
                self.deployment = Deployment::default();
                self.attach(None);
            }
            Op::Restart(back) => {
                self.session += 1;
                self.chain = C::new(self.setting.chain);
                self.last_export = None;
                let restored = back.and_then(|back| self.saved(back));
                self.weights = restored.as_ref().map_or([9; 8], |saved| saved.weights);
                self.attach(restored.map(|saved| saved.snapshot.id.digest));
            }
        }
        self.check()
    }

    /// Whatever the chain says is confirmed is served, byte for byte, and is what its base and deltas add up to.
    pub(crate) fn check(&self) -> Checked {
        let Some(confirmed) = self.chain.confirmed_snapshot() else { return Ok(()) };
        let Some((identity, served)) = &self.deployment.serves else {
            return Err(format!("{confirmed} is confirmed, but nothing is served"));
        };
        if *identity != confirmed.identity || digest(served) != confirmed.digest {
            let how = match self.find(&confirmed.identity).map(|saved| saved.snapshot.kind) {
                Some(SnapshotKind::Delta) => "the delta was taken for something else",
                _ => "the names or weights differ",
            };
            return Err(format!(
                "{confirmed} is confirmed, but {identity} with the weights {served:?} is served: {how}"
            ));
        }
        if let Some(saved) = self.find(&confirmed.identity) {
            let sum = self.sum(saved)?;
            if sum != *served {
                return Err(format!("{confirmed}: base and deltas give {sum:?}, served is {served:?}"));
            }
        }
        Ok(())
    }

    /// B ⊕ d1 ⊕ … ⊕ dn, from what is stored.
    fn sum(&self, saved: &Saved) -> Checked<Bytes> {
        match &saved.snapshot.parent {
            None => Ok(saved.payload),
            Some(parent) => {
                // The oldest with these weights: older than `saved`, so this ends.
                let parent =
                    self.saves.iter().find(|other| other.snapshot.id.digest == parent.digest).ok_or_else(
                        || format!("the parent {parent} of {} is not stored", saved.snapshot.id),
                    )?;
                Ok(xor(self.sum(parent)?, saved.payload))
            }
        }
    }

    fn depth(&self, saved: &Saved) -> u64 {
        let parent = saved.snapshot.parent.as_ref().and_then(|parent| self.find(&parent.identity));
        parent.map_or(0, |parent| 1 + self.depth(parent))
    }

    fn plan(&mut self, kind: Option<CheckpointType>) -> Checked<Option<SavePlan>> {
        let lora = self.setting.chain.lora;
        let plan = match self.chain.plan_save(kind) {
            Ok(plan) => plan,
            Err(error) => {
                return match (kind, error.kind()) {
                    (Some(CheckpointType::Delta), ErrorKind::ChainMismatch) if !lora => {
                        // It must be refused for the reason that makes the automatic choice a base.
                        let chosen = self.chain.plan_save(None).map_err(|error| format!("{error:?}"))?;
                        self.reach.refused_deltas += 1;
                        (chosen.kind == SnapshotKind::Base).then_some(None).ok_or_else(|| {
                            format!("a delta was refused, but chosen when nobody asked: {error:?}")
                        })
                    }
                    (Some(CheckpointType::MergedBase), ErrorKind::Invalid) if !lora => Ok(None),
                    _ => Err(format!("a save of {kind:?} was refused: {error:?}")),
                };
            }
        };
        let allowed: &[SnapshotKind] = match (kind, lora) {
            (Some(CheckpointType::MergedBase), true) => &[SnapshotKind::MergedBase],
            (_, true) => &[SnapshotKind::Adapter],
            (Some(CheckpointType::Base), false) => &[SnapshotKind::Base],
            (Some(CheckpointType::Delta), false) => &[SnapshotKind::Delta],
            (_, false) => &[SnapshotKind::Base, SnapshotKind::Delta],
        };
        if !allowed.contains(&plan.kind) || plan.parent.is_some() != (plan.kind == SnapshotKind::Delta) {
            return Err(format!("a save of {kind:?} was planned as {plan:?}"));
        }
        if plan.kind == SnapshotKind::Delta && plan.parent != self.book {
            return Err(format!(
                "a delta was planned on the parent {:?}, but the deployment last confirmed {:?}",
                plan.parent, self.book
            ));
        }
        Ok(Some(plan))
    }

    pub(crate) fn save(&mut self, kind: Option<CheckpointType>) -> Checked<Option<Saved>> {
        let Some(plan) = self.plan(kind)? else { return Ok(None) };
        self.export(&plan)
    }

    /// The trainer: a wire without parents diffs against its last save, whatever the plan says.
    pub(crate) fn export(&mut self, plan: &SavePlan) -> Checked<Option<Saved>> {
        let parent = match (&plan.parent, self.setting.chain.parents) {
            (None, _) => None,
            (Some(_), DeltaParents::LastExported) => match self.last_export {
                Some(last) => Some(last),
                None => {
                    self.chain.save_failed();
                    return Ok(None);
                }
            },
            (Some(parent), DeltaParents::Any) => {
                let stored = self.saves.iter().find(|saved| saved.snapshot.id.digest == parent.digest);
                Some(
                    stored
                        .ok_or_else(|| format!("a delta on the parent {parent}, which is not stored"))?
                        .weights,
                )
            }
        };
        let name = SnapshotName::new(format!("step-{}", self.saves.len())).unwrap();
        let identity = SnapshotIdentity::of(&name, &SessionId::from_random([0, 0, 0, self.session]));
        let id = SnapshotId { identity, digest: digest(&self.weights) };
        let saved = Saved {
            snapshot: SnapshotRef::new(id, plan.kind, "store").with_parent(plan.parent.clone()),
            payload: parent.map_or(self.weights, |parent| xor(parent, self.weights)),
            weights: self.weights,
        };
        self.chain.saved(&saved.snapshot);
        self.last_export = Some(self.weights);
        self.saves.push(saved.clone());
        Ok(Some(saved))
    }

    pub(crate) fn load(&mut self, saved: &Saved, ending: Ending) -> Checked {
        let id = &saved.snapshot.id;
        let previous = match self.chain.plan_load(&saved.snapshot) {
            Ok(LoadPlan::AlreadyServed) => return Ok(()),
            Ok(LoadPlan::Order { previous }) => previous,
            Err(error)
                if error.kind() == ErrorKind::ChainMismatch && saved.snapshot.kind == SnapshotKind::Delta =>
            {
                self.reach.refused_deltas += 1;
                return Ok(());
            }
            Err(error) => return Err(format!("a load of {id} was refused: {error:?}")),
        };
        self.chain.ordered(id);
        self.book = None;
        self.last_order.insert(id.identity.clone(), self.clock);
        let order = Order {
            identity: id.identity.clone(),
            previous: previous.map(|previous| previous.identity),
            payload: saved.payload,
        };
        if ending != Ending::Rejected {
            // Whatever was accepted before will not take effect any more.
            self.reach.superseded += u64::from(self.deployment.pending.take().is_some());
        }
        match ending {
            Ending::Rejected | Ending::Refused => self.chain.failed(id),
            Ending::TimedOutPending => {
                self.deployment.pending = Some(order);
                self.chain.failed(id);
            }
            Ending::SilentPending => self.deployment.pending = Some(order),
            Ending::TimedOutApplied => {
                self.deployment.apply(&order);
                self.observe();
                self.chain.failed(id);
            }
            Ending::SilentApplied => {
                self.deployment.apply(&order);
                self.observe();
            }
            Ending::Served | Ending::Repeated => {
                let applied = self.deployment.apply(&order);
                if ending == Ending::Repeated {
                    // No operation ids here: a delta must not be applied twice for its parent's name alone.
                    self.deployment.apply(&order);
                }
                self.observe();
                if applied { self.confirm(saved) } else { self.chain.failed(id) }
            }
        }
        Ok(())
    }

    /// The syncer sees the target's name in the status, as a hosted service shows it.
    fn confirm(&mut self, saved: &Saved) {
        let id = &saved.snapshot.id;
        if self.chain.confirmed(id) {
            self.book = Some(id.clone());
            match saved.snapshot.kind {
                SnapshotKind::Delta => self.reach.confirmed_deltas += 1,
                _ => self.reach.confirmed_bases += 1,
            }
            self.reach.longest_chain = self.reach.longest_chain.max(self.depth(saved));
        }
    }

    fn observe(&mut self) {
        if let Some((identity, _)) = &self.deployment.serves
            && let Some(saved) = self.find(identity)
        {
            self.observations.push((saved.snapshot.id.clone(), self.clock));
        }
    }

    /// An old status arrives. Whoever waits for an order looks at the status after it went out, so what was seen
    /// before the last order of that very snapshot is not taken for its success; anything else is passed on.
    fn late_word(&mut self, back: usize) {
        let Some((id, seen)) = nth_last(&self.observations, back).cloned() else { return };
        if self.last_order.get(&id.identity).is_some_and(|ordered| seen < *ordered) {
            return;
        }
        if self.chain.confirmed(&id) {
            self.book = Some(id);
        } else {
            self.reach.ignored_words += 1;
        }
    }

    /// The syncer looks at what is served. While an order is under way the status says so, and the syncer takes
    /// that for foreign weights.
    fn attach(&mut self, restored: Option<ContentDigest>) {
        let under_way = self.deployment.pending.is_some();
        let found: Found = self.deployment.serves.as_ref().map(|(identity, weights)| {
            (identity.clone(), (self.setting.tells_digest && !under_way).then(|| digest(weights)))
        });
        let told = found.as_ref().and_then(|(_, digest)| *digest);
        let held = match self.setting.chain.parents {
            DeltaParents::Any => self.saves.iter().any(|saved| Some(saved.snapshot.id.digest) == told),
            DeltaParents::LastExported => self.last_export.is_some_and(|last| Some(digest(&last)) == told),
        };
        self.chain.attach(found, restored.as_ref(), held);
        self.book = self.chain.confirmed_snapshot();
        self.reach.attached += u64::from(self.book.is_some());
    }

    fn saved(&self, back: usize) -> Option<Saved> {
        nth_last(&self.saves, back).cloned()
    }

    fn find(&self, identity: &SnapshotIdentity) -> Option<&Saved> {
        self.saves.iter().find(|saved| saved.snapshot.id.identity == *identity)
    }
}

fn nth_last<T>(list: &[T], back: usize) -> Option<&T> {
    list.len().checked_sub(1 + back % list.len().max(1)).and_then(|index| list.get(index))
}

pub(crate) fn digest(weights: &Bytes) -> ContentDigest {
    ContentDigest::of_tensors([("w", DType::U8, &[8usize][..], &TensorDigest::of(weights))])
}

fn xor(left: Bytes, right: Bytes) -> Bytes {
    std::array::from_fn(|index| left[index] ^ right[index])
}
