//! What a job should be: numbers and times instead of files, and its own reading of what pruning keeps.

use std::collections::{BTreeMap, BTreeSet};

pub(super) const MINUTE: i64 = 60_000;
pub(super) const HOUR: i64 = 60 * MINUTE;
/// How long after its time something is still taken for alive: clocks differ.
const SKEW: i64 = 5 * MINUTE;

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) seq: u64,
    pub(super) name: String,
    pub(super) state: bool,
    pub(super) session: u8,
    /// Its parent, and the states that it shares tensors with.
    pub(super) needs: BTreeSet<u64>,
    pub(super) expires: Option<i64>,
    pub(super) step: Option<u64>,
    pub(super) metric: Option<i8>,
}

/// Which stay, the best by count and whether more is better. No rule: all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    pub(super) last_states: Option<usize>,
    pub(super) last_snapshots: Option<usize>,
    pub(super) every: Option<u64>,
    pub(super) best: Option<(usize, bool)>,
}

/// What comes of deleting one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deleted {
    /// It must stay: nothing is changed.
    Refused,
    /// Something needs it: it has expired instead.
    Expired,
    /// It is given up, or was before.
    Gone,
}

/// Times are in milliseconds by the store's clock.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) now: i64,
    pub(super) live: BTreeMap<u64, Entry>,
    /// Given up, with the time, and not yet deleted.
    pub(super) dead: BTreeMap<u64, (Entry, i64)>,
    pub(super) pins: BTreeMap<String, u64>,
    /// Number and end.
    pub(super) leases: BTreeMap<usize, (u64, i64)>,
    pub(super) pending: BTreeMap<u64, i64>,
}

impl Model {
    pub(super) fn taken(&self, state: bool, name: &str, session: u8) -> bool {
        let same = |live: &Entry| live.name == name && (state || live.session == session);
        self.live.values().any(|live| live.state == state && same(live))
    }

    pub(super) fn lease(&mut self, lease: usize, seq: u64, time: i64) {
        self.leases.insert(lease, (seq, self.now + time + SKEW));
    }

    fn leased(&self, seq: u64) -> bool {
        self.leases.values().any(|&(leased, until)| leased == seq && self.now < until)
    }

    /// Returns what is given up, and what is deleted.
    pub(super) fn prune(&mut self, policy: &Policy, grace: i64) -> (Vec<u64>, Vec<u64>) {
        let goes = self.live.iter().filter(|(_, entry)| !self.keeps(entry, policy));
        let goes: Vec<u64> = goes.map(|(seq, _)| *seq).collect();
        for seq in &goes {
            let entry = self.live.remove(seq).unwrap();
            self.dead.insert(*seq, (entry, self.now));
        }
        let over = |since: i64| since + grace <= self.now;
        self.pending.retain(|_, since| !over(*since));
        let due = self.dead.iter().filter(|(seq, (_, since))| over(*since) && !self.read(**seq));
        let due: Vec<u64> = due.map(|(seq, _)| *seq).collect();
        self.dead.retain(|seq, _| !due.contains(seq));
        self.leases.retain(|_, (_, until)| self.now < *until);
        (goes, due)
    }

    pub(super) fn delete(&mut self, seq: u64) -> Deleted {
        let Some(entry) = self.live.get(&seq) else { return Deleted::Gone };
        let newest = self.live.values().filter(|live| live.state).map(|live| live.seq).max();
        if newest == Some(seq) || self.pins.values().any(|pinned| *pinned == seq) {
            return Deleted::Refused;
        }
        if self.leased(seq) || self.live.values().any(|live| live.needs.contains(&entry.seq)) {
            self.live.get_mut(&seq).unwrap().expires = Some(self.now - SKEW);
            return Deleted::Expired;
        }
        let entry = self.live.remove(&seq).unwrap();
        self.dead.insert(seq, (entry, self.now));
        Deleted::Gone
    }

    /// Whether somebody reads what was given up with this number, or something given up that needs it.
    fn read(&self, seq: u64) -> bool {
        let mut children = self.dead.values().filter(|(child, _)| child.needs.contains(&seq));
        self.leased(seq) || children.any(|(child, _)| self.read(child.seq))
    }

    fn keeps(&self, entry: &Entry, policy: &Policy) -> bool {
        let newest = self.live.values().filter(|live| live.state).map(|live| live.seq).max();
        let mut children = self.live.values().filter(|live| live.needs.contains(&entry.seq));
        self.pins.values().any(|seq| *seq == entry.seq)
            || self.leased(entry.seq)
            || newest == Some(entry.seq)
            || (self.fresh(entry) && self.ruled_in(entry, policy))
            || children.any(|child| self.keeps(child, policy))
    }

    fn fresh(&self, entry: &Entry) -> bool {
        entry.expires.is_none_or(|expires| self.now < expires + SKEW)
    }

    fn ruled_in(&self, entry: &Entry, policy: &Policy) -> bool {
        let peers = || self.live.values().filter(|live| live.state == entry.state && self.fresh(live));
        let Policy { last_states, last_snapshots, every, best } = *policy;
        let last = if entry.state { last_states } else { last_snapshots };
        if last.is_none() && every.is_none() && best.is_none() {
            return true;
        }
        let newer = peers().filter(|peer| peer.seq > entry.seq).count();
        let at_step = every.zip(entry.step).is_some_and(|(every, step)| step % every == 0);
        let best = best.zip(entry.metric).is_some_and(|((count, highest), mine)| {
            let sign = if highest { 1 } else { -1 };
            let rank = |metric: i8, seq| (metric * sign, seq);
            let better = peers().filter(|peer| {
                peer.metric.is_some_and(|metric| rank(metric, peer.seq) > rank(mine, entry.seq))
            });
            better.count() < count
        });
        last.is_some_and(|last| newer < last) || at_step || best
    }

    /// Whether a snapshot and all that it needs have files.
    pub(super) fn whole(&self, seq: u64) -> bool {
        let entry = self.live.get(&seq).or_else(|| self.dead.get(&seq).map(|(entry, _)| entry));
        entry.is_some_and(|entry| entry.needs.iter().all(|needed| self.whole(*needed)))
    }
}
