//! Damaged snapshots out of the way, and back again.

use std::collections::BTreeSet;

use towline_core::{Error, ErrorKind, Result};

use super::SnapshotRepo;
use super::head::{Head, Quarantined};
use super::info::SnapshotInfo;
use super::verify::Depth;

/// What [`SnapshotRepo::repair`] has found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repaired {
    /// Verified, and in its place.
    pub good: Vec<SnapshotInfo>,
    /// Damaged, with what is wrong: put into quarantine by this run. `newest` and `list` do not find them any more.
    pub quarantined: Vec<(SnapshotInfo, String)>,
    /// In quarantine since an earlier run, with what is wrong.
    pub remaining: Vec<(SnapshotInfo, String)>,
    /// In quarantine before, and whole again: back among the others.
    pub returned: Vec<SnapshotInfo>,
}

impl SnapshotRepo {
    /// Verifies everything to `depth`, and puts what is damaged into quarantine: it is found no longer, so that a run
    /// resumes from the newest state that is whole, and its files are not touched. What is in quarantine and whole again,
    /// because somebody has copied a file back, returns unless its name was taken or what it needs was given up meanwhile. With `dry_run` it only tells.
    ///
    /// # Errors
    /// What the store answers, if it does not let a snapshot be judged: nothing is moved then. Only damage and missing
    /// files are no errors.
    pub async fn repair(&self, depth: Depth, dry_run: bool) -> Result<Repaired> {
        let head = self.existing(self.head_object()?.read().await?)?;
        let mut found = Repaired {
            good: Vec::new(),
            quarantined: Vec::new(),
            remaining: Vec::new(),
            returned: Vec::new(),
        };
        for info in &head.live {
            match self.damage(info, depth).await? {
                None => found.good.push(info.clone()),
                Some(why) => found.quarantined.push((info.clone(), why)),
            }
        }
        // What may return is tried on a copy: in the order of numbers, so that what it needs was there before.
        let mut trial = head.clone();
        found.quarantined.iter().for_each(|(info, why)| trial.quarantine(info.seq, why, 0));
        for Quarantined { info, .. } in &head.quarantined {
            let outcome = match self.damage(info, depth).await? {
                Some(why) => Err(why),
                None => trial.return_from_quarantine(info.seq),
            };
            match outcome {
                Ok(()) => found.returned.push(info.clone()),
                Err(why) => found.remaining.push((info.clone(), why)),
            }
        }
        if dry_run || found.quarantined.is_empty() && found.returned.is_empty() {
            return Ok(found);
        }
        let since_ms = self.store_now().await?;
        let change = |head: Option<Head>| {
            let mut head = self.existing(head)?;
            for (info, why) in &found.quarantined {
                head.quarantine(info.seq, why, since_ms);
            }
            for info in &found.returned {
                // Whether it did is read from the head below.
                let _stays = head.return_from_quarantine(info.seq);
            }
            Ok(head)
        };
        let done = |head: &Head| {
            let away = found.quarantined.iter().all(|(info, _)| head.live(info.seq).is_none());
            let still = head.quarantined.iter().map(|quarantined| quarantined.info.seq);
            away.then(|| still.collect::<BTreeSet<u64>>())
        };
        let still = self.head_object()?.replace(change, done).await?;
        let (stays, returned) = found.returned.into_iter().partition(|info| still.contains(&info.seq));
        let stays: Vec<SnapshotInfo> = stays;
        let why = "the job changed while it was verified: repair again";
        found.remaining.extend(stays.into_iter().map(|info| (info, why.to_owned())));
        found.returned = returned;
        Ok(found)
    }

    /// What is in quarantine, with what was wrong.
    ///
    /// # Errors
    /// As [`SnapshotRepo::list`].
    pub async fn quarantined(&self) -> Result<Vec<(SnapshotInfo, String)>> {
        let head = self.existing(self.head_object()?.read().await?)?;
        Ok(head.quarantined.into_iter().map(|Quarantined { info, why, .. }| (info, why)).collect())
    }

    /// What is wrong with a snapshot; nothing if it is whole.
    async fn damage(&self, info: &SnapshotInfo, depth: Depth) -> Result<Option<String>> {
        match self.verify_to(info, depth).await {
            Ok(_) => Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                Ok(Some(error.report()))
            }
            Err(error) => Err(judged(error, info)),
        }
    }
}

fn judged(error: Error, info: &SnapshotInfo) -> Error {
    error.context(format_args!("{} could not be judged, and nothing was moved", info.id))
}
