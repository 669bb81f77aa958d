//! What may go away, and why the rest stays: a function of the head, without a store.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use towline_core::{Error, Result, SnapshotKind};

use super::head::Head;
use super::info::{SnapshotInfo, Wanted};
use crate::random::whole_ms;

/// How far the clock of a writer and that of the store may differ before something expires too early.
pub(super) const SKEW: Duration = Duration::from_secs(300);

/// Which snapshots and states a job keeps. Without a rule for a kind, all of it stays until it expires.
///
/// Whatever the rules, these stay: what is pinned or leased, the newest train state, and what something that stays
/// needs as its parent or for a tensor that it shares. An expiry goes before the rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retention {
    /// The newest so many train states stay.
    pub last_states: Option<NonZeroUsize>,
    /// The newest so many snapshots for samplers stay.
    pub last_snapshots: Option<NonZeroUsize>,
    /// Whatever was saved at a step that is a multiple of this stays.
    pub every_steps: Option<NonZeroU64>,
    /// The best ones by a metric stay.
    pub best: Option<Best>,
}

/// The best by a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Best {
    /// The name that the metric was saved under.
    pub metric: String,
    /// How many stay, of train states and of snapshots each.
    pub count: NonZeroUsize,
    /// Whether more is better.
    pub highest: bool,
}

impl Best {
    /// All fields.
    pub fn new(metric: impl Into<String>, count: NonZeroUsize, highest: bool) -> Self {
        Self { metric: metric.into(), count, highest }
    }
}

impl Retention {
    /// Nothing but expiries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many of the newest train states stay.
    ///
    /// # Errors
    /// `Invalid` for 0: there would be nothing to resume from.
    pub fn with_last_states(mut self, count: usize) -> Result<Self> {
        self.last_states = Some(at_least_one(count, "train state")?);
        Ok(self)
    }

    /// Sets how many of the newest snapshots for samplers stay.
    ///
    /// # Errors
    /// `Invalid` for 0: nothing could be served.
    pub fn with_last_snapshots(mut self, count: usize) -> Result<Self> {
        self.last_snapshots = Some(at_least_one(count, "snapshot")?);
        Ok(self)
    }

    /// Sets the steps between those that stay.
    ///
    /// # Errors
    /// `Invalid` for 0.
    pub fn with_every_steps(mut self, steps: u64) -> Result<Self> {
        self.every_steps = Some(NonZeroU64::new(steps).ok_or_else(|| {
            Error::invalid("every 0 steps is no interval").with_help("give a number from 1, or leave it out")
        })?);
        Ok(self)
    }

    /// Sets the metric whose best stay.
    #[must_use]
    pub fn with_best(mut self, best: Best) -> Self {
        self.best = Some(best);
        self
    }

    /// Whether a rule speaks of `class`.
    fn rules(&self, class: Wanted) -> bool {
        let last = if class == Wanted::State { self.last_states } else { self.last_snapshots };
        last.is_some() || self.every_steps.is_some() || self.best.is_some()
    }
}

fn at_least_one(count: usize, noun: &str) -> Result<NonZeroUsize> {
    NonZeroUsize::new(count).ok_or_else(|| {
        Error::invalid(format!("a rule that keeps no {noun} would delete the last one"))
            .with_help("keep at least 1, or leave the rule out to keep all")
    })
}

/// Why a snapshot stays.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kept {
    /// Nothing says that it should go.
    NoRule,
    /// It is among the newest.
    Last,
    /// Its step is a multiple.
    Every,
    /// It is among the best.
    Best,
    /// A pin of this name holds it.
    Pinned(String),
    /// A reader holds it.
    Leased,
    /// It is the newest train state.
    NewestState,
    /// The snapshot of this number needs it.
    NeededBy(u64),
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRule => f.write_str("no rule"),
            Self::Last => f.write_str("among the newest"),
            Self::Every => f.write_str("by its step"),
            Self::Best => f.write_str("among the best"),
            Self::Pinned(id) => write!(f, "pinned as `{id}`"),
            Self::Leased => f.write_str("being read"),
            Self::NewestState => f.write_str("the newest train state"),
            Self::NeededBy(seq) => write!(f, "number {seq} needs it"),
        }
    }
}

/// Why each snapshot of `head` stays, by number; the others may go. `now_ms` is the store's time.
pub(super) fn kept(
    head: &Head,
    retention: &Retention,
    leased: &BTreeSet<u64>,
    now_ms: u64,
) -> BTreeMap<u64, Kept> {
    let mut kept = BTreeMap::new();
    for class in [Wanted::State, Wanted::Sampler] {
        let fresh = |info: &&SnapshotInfo| {
            class.takes(info.kind) && !info.is_expired(now_ms.saturating_sub(whole_ms(SKEW)))
        };
        let fresh: Vec<_> = head.live.iter().filter(fresh).collect();
        by_rules(&fresh, class, retention, &mut kept);
    }
    for info in head.live.iter().filter(|info| leased.contains(&info.seq)) {
        kept.insert(info.seq, Kept::Leased);
    }
    if let Some(state) = head.live.iter().rfind(|info| info.kind == SnapshotKind::State) {
        kept.insert(state.seq, Kept::NewestState);
    }
    for pin in &head.pins {
        kept.insert(pin.seq, Kept::Pinned(pin.id.clone()));
    }
    // What is needed has a lower number than what needs it.
    for (at, info) in head.live.iter().enumerate().rev() {
        if !kept.contains_key(&info.seq) {
            continue;
        }
        for needed in head.live.iter().take(at).filter(|before| info.needs(before)) {
            kept.entry(needed.seq).or_insert(Kept::NeededBy(info.seq));
        }
    }
    kept
}

/// What the rules keep of `fresh`, the snapshots of `class` that have not expired.
fn by_rules(fresh: &[&SnapshotInfo], class: Wanted, retention: &Retention, kept: &mut BTreeMap<u64, Kept>) {
    if !retention.rules(class) {
        kept.extend(fresh.iter().map(|info| (info.seq, Kept::NoRule)));
        return;
    }
    if let Some(best) = &retention.best {
        let metric = |info: &SnapshotInfo| info.metrics.get(&best.metric).map(|metric| metric.value());
        let mut measured: Vec<_> = fresh.iter().filter_map(|info| Some((metric(info)?, info.seq))).collect();
        // Of equals the newer one is better.
        measured.sort_by(|left, right| left.0.total_cmp(&right.0).then(left.1.cmp(&right.1)));
        if !best.highest {
            measured.sort_by(|left, right| right.0.total_cmp(&left.0).then(left.1.cmp(&right.1)));
        }
        kept.extend(measured.iter().rev().take(best.count.get()).map(|(_, seq)| (*seq, Kept::Best)));
    }
    if let Some(every) = retention.every_steps {
        let at_step = |info: &&&SnapshotInfo| info.step.is_some_and(|step| step % every == 0);
        kept.extend(fresh.iter().filter(at_step).map(|info| (info.seq, Kept::Every)));
    }
    let last = if class == Wanted::State { retention.last_states } else { retention.last_snapshots };
    if let Some(last) = last {
        kept.extend(fresh.iter().rev().take(last.get()).map(|info| (info.seq, Kept::Last)));
    }
}
