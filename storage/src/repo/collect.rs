//! Giving snapshots up, and deleting what was given up.
//!
//! First the head's compare-and-swap moves a snapshot from what exists to the tombstones: from then on nobody finds it
//! or builds on it. Its files go later, when everybody who had found it before is done. Stopping anywhere is safe: the
//! next run goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use towline_core::{Error, ErrorKind, ObjectKey, Result};

use super::SnapshotRepo;
use super::head::{Head, Pending, Tombstone};
use super::info::{SnapshotInfo, Wanted};
use super::retain::{Kept, Retention, SKEW, kept};
use crate::random::{now_ms, whole_ms};

/// How long files stay after their snapshot was given up, and files that never became one.
const GRACE: Duration = Duration::from_secs(24 * 3600);
/// A writer tries no number so far above the next one.
const FAR: u64 = 1 << 20;

/// What to prune, and how carefully.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Prune {
    /// What stays.
    pub retention: Retention,
    /// How long files stay after their snapshot was given up: longer than any restore without a lease. And how old
    /// files are that belong to no snapshot before they are deleted: longer than any save. Default 24 h.
    pub grace: Duration,
    /// Only says what would be done; writes nothing. The time is then this machine's.
    pub dry_run: bool,
}

impl Prune {
    /// Prunes by `retention`, with a grace of 24 h.
    #[must_use]
    pub fn new(retention: Retention) -> Self {
        Self { retention, grace: GRACE, dry_run: false }
    }

    /// Sets the grace.
    #[must_use]
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Sets whether nothing is written.
    #[must_use]
    pub fn with_dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }
}

/// What pruning did, or would do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pruned {
    /// The time that expiries were compared with, in milliseconds since 1970.
    pub now_ms: u64,
    /// What stays, and why.
    pub kept: Vec<(SnapshotInfo, Kept)>,
    /// What was given up by this run.
    pub given_up: Vec<SnapshotInfo>,
    /// What was given up before, by this run or an earlier one, and whose files wait for the end of their grace.
    pub waiting: Vec<SnapshotInfo>,
    /// Whose files were deleted.
    pub deleted: Vec<SnapshotInfo>,
    /// Files of no snapshot that were deleted.
    pub orphans: Vec<Orphan>,
}

impl Pruned {
    /// What is there although its time is over.
    pub fn expired_kept(&self) -> impl Iterator<Item = &(SnapshotInfo, Kept)> {
        self.kept.iter().filter(|(info, _)| info.is_expired(self.now_ms))
    }
}

/// Files of a save that never became a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Orphan {
    /// Their folder, below the job's.
    pub dir: String,
    /// How many files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl SnapshotRepo {
    /// Gives up what has expired or no rule keeps, and deletes the files of what was given up before the grace, and
    /// those of saves that never ended. Any process may prune, also while a writer works. Stopped anywhere, it goes on
    /// when it is called again.
    ///
    /// # Errors
    /// What the store answers. What was done until then stays done.
    pub async fn prune(&self, prune: &Prune) -> Result<Pruned> {
        let now_ms = if prune.dry_run { now_ms() } else { self.store_now().await? };
        let (kept, given_up) = self.give_up(prune, now_ms).await?;
        let (deleted, waiting) = self.sweep(prune, now_ms, &given_up).await?;
        let orphans = self.sweep_orphans(prune, now_ms).await?;
        if !prune.dry_run {
            self.clear_leases(now_ms).await?;
        }
        Ok(Pruned { now_ms, kept, given_up, waiting, deleted, orphans })
    }

    /// Gives one snapshot up, whatever the rules say; [`SnapshotRepo::prune`] deletes its files after the grace. What a
    /// reader holds or something live needs expires now instead, and goes with the first pruning that finds it free:
    /// the reason is returned. Twice is once.
    ///
    /// # Errors
    /// `Conflict` if it is pinned or the newest train state: nothing is changed then. What the store answers.
    pub async fn delete(&self, info: &SnapshotInfo) -> Result<Option<Kept>> {
        let now_ms = self.store_now().await?;
        let leased = self.leased(now_ms).await?;
        let mut reason = None;
        let change = |head: Option<Head>| {
            let mut head = self.existing(head)?;
            let needs = |other: &&SnapshotInfo| other.needs(info);
            reason = match kept(&head, &Retention::new(), &leased, now_ms).remove(&info.seq) {
                Some(why @ (Kept::Pinned(_) | Kept::NewestState)) => {
                    let refused = format!("{} of job {} is not deleted: {why}", info.id, self.job);
                    return Err(Error::new(ErrorKind::Conflict, refused)
                        .with_help("take the pin away, or save another state first"));
                }
                Some(Kept::Leased) => Some(Kept::Leased),
                // By no rule, but for what lives.
                _ => head.live.iter().find(needs).map(|other| Kept::NeededBy(other.seq)),
            };
            let at = head.live.iter().position(|live| live.seq == info.seq && live.dir == info.dir);
            if let Some(at) = at {
                if reason.is_none() {
                    let info = head.live.remove(at);
                    head.tombstones.push(Tombstone { info, since_ms: now_ms });
                    head.tombstones.sort_by_key(|tombstone| tombstone.info.seq);
                } else if let Some(live) = head.live.get_mut(at) {
                    live.expires_ms = Some(now_ms.saturating_sub(whole_ms(SKEW)));
                }
            }
            Ok(head)
        };
        let done = |head: &Head| {
            head.live(info.seq)
                .is_none_or(|live| live.dir != info.dir || live.is_expired(now_ms))
                .then_some(())
        };
        self.head_object()?.replace(change, done).await?;
        Ok(reason)
    }

    /// What stays, and what is moved to the tombstones.
    async fn give_up(
        &self,
        prune: &Prune,
        now_ms: u64,
    ) -> Result<(Vec<(SnapshotInfo, Kept)>, Vec<SnapshotInfo>)> {
        let leased = self.leased(now_ms).await?;
        let split = |head: &Head| {
            let mut reasons = kept(head, &prune.retention, &leased, now_ms);
            let (mut stays, mut goes) = (Vec::new(), Vec::new());
            for info in &head.live {
                match reasons.remove(&info.seq) {
                    Some(reason) => stays.push((info.clone(), reason)),
                    None => goes.push(info.clone()),
                }
            }
            (stays, goes)
        };
        let stale = |pending: &Pending| pending.since_ms.saturating_add(whole_ms(prune.grace)) <= now_ms;
        let head = self.existing(self.head_object()?.read().await?)?;
        let (stays, goes) = split(&head);
        if prune.dry_run || goes.is_empty() && !head.pending.iter().any(stale) {
            return Ok((stays, goes));
        }
        let mut outcome = (stays, goes);
        let change = |head: Option<Head>| {
            let mut head = self.existing(head)?;
            outcome = split(&head);
            let goes: BTreeSet<u64> = outcome.1.iter().map(|info| info.seq).collect();
            head.live.retain(|info| !goes.contains(&info.seq));
            let dead = outcome.1.iter().map(|info| Tombstone { info: info.clone(), since_ms: now_ms });
            head.tombstones.extend(dead);
            head.tombstones.sort_by_key(|tombstone| tombstone.info.seq);
            head.pending.retain(|pending| !stale(pending));
            Ok(head)
        };
        // What one run finds to give up, another may have given up in between: only that nothing is left counts.
        let done = |head: &Head| (split(head).1.is_empty() && !head.pending.iter().any(stale)).then_some(());
        self.head_object()?.replace(change, done).await?;
        Ok(outcome)
    }

    /// Deletes the files behind tombstones older than the grace. Returns whose, and who waits.
    async fn sweep(
        &self,
        prune: &Prune,
        now_ms: u64,
        given_up: &[SnapshotInfo],
    ) -> Result<(Vec<SnapshotInfo>, Vec<SnapshotInfo>)> {
        let head = self.existing(self.head_object()?.read().await?)?;
        // Listed after the tombstones were read: who took a lease before one was set is in here, and who took it
        // later has found the snapshot gone.
        let mut held = self.leased(now_ms).await?;
        head.hold_needed(&mut held);
        let due = |tombstone: &Tombstone| {
            tombstone.since_ms.saturating_add(whole_ms(prune.grace)) <= now_ms
                && !held.contains(&tombstone.info.seq)
        };
        let (deleted, waiting): (Vec<_>, Vec<_>) =
            head.tombstones.iter().partition(|tombstone| due(tombstone));
        let infos = |tombstones: Vec<&Tombstone>| -> Vec<SnapshotInfo> {
            tombstones.into_iter().map(|tombstone| tombstone.info.clone()).collect()
        };
        let (deleted, mut waiting) = (infos(deleted), infos(waiting));
        if prune.dry_run {
            waiting.extend(given_up.iter().cloned());
            return Ok((deleted, waiting));
        }
        for info in &deleted {
            self.delete_folder(info.dir.as_str()).await?;
        }
        if !deleted.is_empty() {
            let seqs: BTreeSet<u64> = deleted.iter().map(|info| info.seq).collect();
            let change = |head: Option<Head>| {
                let mut head = self.existing(head)?;
                head.tombstones.retain(|tombstone| !seqs.contains(&tombstone.info.seq));
                Ok(head)
            };
            let gone = |head: &Head| {
                head.tombstones.iter().all(|tombstone| !seqs.contains(&tombstone.info.seq)).then_some(())
            };
            self.head_object()?.replace(change, gone).await?;
        }
        Ok((deleted, waiting))
    }

    /// The manifest goes first: whoever finds the folder then does not take it for a snapshot.
    async fn delete_folder(&self, dir: &str) -> Result<()> {
        let folder = ObjectKey::new(format!("{}/{dir}", self.job))?;
        self.ops.delete(&folder.join("manifest.json")?).await?;
        for object in self.ops.list(&folder).await? {
            self.ops.delete(&object.key).await?;
        }
        Ok(())
    }

    /// Deletes the folders that no snapshot and no tombstone has, whose newest file is older than the grace.
    async fn sweep_orphans(&self, prune: &Prune, now_ms: u64) -> Result<Vec<Orphan>> {
        // Folder, with the time of its newest file.
        let mut folders: BTreeMap<String, (Orphan, u64)> = BTreeMap::new();
        for class in [Wanted::Sampler, Wanted::State] {
            let prefix = ObjectKey::new(format!("{}/{}", self.job, class.folder()))?;
            for object in self.ops.list(&prefix).await? {
                let rest = object.key.as_str().strip_prefix(prefix.as_str()).unwrap_or_default();
                let Some((name, _)) = rest.trim_start_matches('/').split_once('/') else { continue };
                let dir = format!("{}/{name}", class.folder());
                let orphan = Orphan { dir: dir.clone(), files: 0, bytes: 0 };
                let (orphan, newest) = folders.entry(dir).or_insert((orphan, 0));
                orphan.files += 1;
                orphan.bytes += object.size;
                *newest = object.modified_ms.max(*newest);
            }
        }
        // Read after the listing: what was committed meanwhile is no orphan.
        let mut head = self.existing(self.head_object()?.read().await?)?;
        // What no writer of this job can have numbered is somebody else's.
        let far = head.next_seq.saturating_add(FAR);
        folders.retain(|dir, (_, newest)| {
            let old = newest.saturating_add(whole_ms(prune.grace)) <= now_ms;
            old && !head.knows(dir) && number(dir).is_some_and(|seq| seq < far)
        });
        let above = folders.keys().filter_map(|dir| number(dir)).max().map_or(0, |seq| seq + 1);
        if head.next_seq < above && !prune.dry_run {
            // A writer that is slower than the grace must not commit what is deleted now: its number is given away.
            let change = |head: Option<Head>| {
                let mut head = self.existing(head)?;
                head.next_seq = head.next_seq.max(above);
                Ok(head)
            };
            let given_away = |head: &Head| (head.next_seq >= above).then(|| head.clone());
            head = self.head_object()?.replace(change, given_away).await?;
            // It may have come before.
            folders.retain(|dir, _| !head.knows(dir));
        }
        let orphans: Vec<_> = folders.into_values().map(|(orphan, _)| orphan).collect();
        if prune.dry_run {
            return Ok(orphans);
        }
        for orphan in &orphans {
            self.delete_folder(&orphan.dir).await?;
        }
        Ok(orphans)
    }
}

/// The number that a folder's name begins with.
fn number(dir: &str) -> Option<u64> {
    dir.rsplit_once('/')?.1.split_once('-')?.0.parse().ok()
}
