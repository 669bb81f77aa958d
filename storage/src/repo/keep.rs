//! What keeps a snapshot: pins, leases, and how long it lives.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use towline_core::{Error, ErrorKind, ObjectInfo, ObjectKey, PutMode, Result, WriteId};

use super::SnapshotRepo;
use super::head::{Head, Pin};
use super::info::SnapshotInfo;
use super::retain::SKEW;
use crate::random::{random, whole_ms};

impl SnapshotRepo {
    /// Keeps a snapshot, and what it needs, until [`SnapshotRepo::unpin`] of the same `id`. Twice is once; an `id` that
    /// holds another snapshot moves to this one.
    ///
    /// # Errors
    /// `NotFound` if the snapshot does not exist any more; `Invalid` for an `id` that is no segment of a key.
    pub async fn pin(&self, info: &SnapshotInfo, id: &str, reason: &str) -> Result<()> {
        let segment = ObjectKey::new(id).ok().filter(|id| !id.as_str().contains('/'));
        if segment.is_none() {
            return Err(Error::invalid(format!("`{}` is no name of a pin", id.escape_debug()))
                .with_help("use letters, digits, `_`, `.`, `-` and `=`"));
        }
        let pin = Pin { id: id.to_owned(), seq: info.seq, reason: reason.to_owned() };
        let change = |head: Option<Head>| {
            let mut head = self.existing(head)?;
            self.alive(&head, info)?;
            head.pins.retain(|other| other.id != pin.id);
            head.pins.push(pin.clone());
            Ok(head)
        };
        self.head_object()?.replace(change, |head| head.pins.contains(&pin).then_some(())).await
    }

    /// Takes a pin away. A missing one is `Ok`.
    ///
    /// # Errors
    /// `NotFound` if the job does not exist; what the store answers.
    pub async fn unpin(&self, id: &str) -> Result<()> {
        let change = |head: Option<Head>| {
            let mut head = self.existing(head)?;
            head.pins.retain(|pin| pin.id != id);
            Ok(head)
        };
        let gone = |head: &Head| head.pins.iter().all(|pin| pin.id != id).then_some(());
        self.head_object()?.replace(change, gone).await
    }

    /// Every pin.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn pins(&self) -> Result<Vec<Pin>> {
        Ok(self.head_object()?.read().await?.map(|head| head.pins).unwrap_or_default())
    }

    /// Sets how long a snapshot lives from now on, by the store's clock; `None` for ever. Returns how it is listed now.
    ///
    /// # Errors
    /// `Invalid` for a time outside the allowed range; `NotFound` if the snapshot does not exist any more.
    pub async fn set_ttl(&self, info: &SnapshotInfo, ttl: Option<Duration>) -> Result<SnapshotInfo> {
        self.check_ttl(ttl)?;
        let expires_ms = match ttl {
            Some(ttl) => Some(self.store_now().await?.saturating_add(whole_ms(ttl))),
            None => None,
        };
        let change = |head: Option<Head>| {
            let mut head = self.existing(head)?;
            self.alive(&head, info)?;
            if let Some(live) = head.live_mut(info.seq) {
                live.expires_ms = expires_ms;
            }
            Ok(head)
        };
        let set = |head: &Head| head.live(info.seq).filter(|live| live.expires_ms == expires_ms).cloned();
        self.head_object()?.replace(change, set).await
    }

    /// Keeps a snapshot, and what it needs, while it is being read: for `time`, by the store's clock, unless it is
    /// renewed. Needs the right to write.
    ///
    /// # Errors
    /// `NotFound` if the snapshot does not exist any more.
    pub async fn lease(&self, info: &SnapshotInfo, time: Duration) -> Result<Lease> {
        let id = WriteId::from_random(random().to_be_bytes());
        let seconds = time.as_secs().max(1);
        let key = ObjectKey::new(format!("{}/leases/{:08}-{seconds}-{id}", self.job, info.seq))?;
        let lease = Lease { repo: self.clone(), info: info.clone(), key };
        match lease.renew().await {
            Ok(()) => Ok(lease),
            Err(error) => {
                if error.kind() == ErrorKind::NotFound {
                    // It would hold up the sweeping of what nobody has found. Where this fails it ends by itself.
                    let _ = self.ops.delete(&lease.key).await;
                }
                Err(error)
            }
        }
    }

    /// The numbers that are leased at `now_ms`.
    pub(super) async fn leased(&self, now_ms: u64) -> Result<BTreeSet<u64>> {
        let objects = self.ops.list(&ObjectKey::new(format!("{}/leases", self.job))?).await?;
        Ok(objects
            .iter()
            .filter_map(lease_of)
            .filter(|(_, until)| now_ms < *until)
            .map(|(seq, _)| seq)
            .collect())
    }

    /// Deletes the leases that are over at `now_ms`.
    pub(super) async fn clear_leases(&self, now_ms: u64) -> Result<()> {
        for object in self.ops.list(&ObjectKey::new(format!("{}/leases", self.job))?).await? {
            if lease_of(&object).is_none_or(|(_, until)| until <= now_ms) {
                self.ops.delete(&object.key).await?;
            }
        }
        Ok(())
    }

    /// The store's time, in milliseconds since 1970: that of an object that is written for this.
    pub(super) async fn store_now(&self) -> Result<u64> {
        let key = ObjectKey::new(format!("{}/clock", self.job))?;
        let body = Bytes::from(format!("{}\n", WriteId::from_random(random().to_be_bytes())));
        self.ops.put(&key, body, PutMode::Overwrite).await?;
        Ok(self.ops.head(&key).await?.modified_ms)
    }

    pub(super) fn check_ttl(&self, ttl: Option<Duration>) -> Result<()> {
        let Some(ttl) = ttl.filter(|ttl| !self.ttl.contains(ttl)) else { return Ok(()) };
        let (least, most) = (self.ttl.start().as_secs_f64(), self.ttl.end().as_secs_f64());
        Err(Error::invalid(format!("a time to live of {} s: wanted {least} to {most} s", ttl.as_secs_f64()))
            .with_help("choose a time in this range, or none to keep it for ever"))
    }

    pub(super) fn existing(&self, head: Option<Head>) -> Result<Head> {
        head.ok_or_else(|| {
            Error::not_found(format!("job {} does not exist", self.job)).with_help("save a snapshot first")
        })
    }

    fn alive(&self, head: &Head, info: &SnapshotInfo) -> Result<()> {
        if head.live(info.seq).is_some_and(|live| live.dir == info.dir) {
            return Ok(());
        }
        Err(Error::not_found(format!("{} does not exist any more in job {}", info.id, self.job))
            .with_help("list the job and choose another"))
    }
}

/// A promise that a snapshot is not swept while it is read. It ends by itself; [`Lease::release`] ends it at once.
#[derive(Debug)]
pub struct Lease {
    repo: SnapshotRepo,
    info: SnapshotInfo,
    key: ObjectKey,
}

impl Lease {
    /// What is kept.
    #[must_use]
    pub fn info(&self) -> &SnapshotInfo {
        &self.info
    }

    /// Begins its time anew.
    ///
    /// # Errors
    /// `NotFound` if the snapshot was given up meanwhile; what the store answers.
    pub async fn renew(&self) -> Result<()> {
        let put = self.repo.ops.put(&self.key, Bytes::from_static(b"\n"), PutMode::Overwrite);
        put.await?;
        // Whoever sweeps lists the leases after it has given a snapshot up: if it is alive now, it sees this one.
        let head = self.repo.existing(self.repo.head_object()?.read().await?)?;
        self.repo.alive(&head, &self.info)
    }

    /// Ends it.
    ///
    /// # Errors
    /// What the store answers; it then ends by itself.
    pub async fn release(self) -> Result<()> {
        self.repo.ops.delete(&self.key).await
    }
}

/// The number that a lease holds, and until when.
fn lease_of(object: &ObjectInfo) -> Option<(u64, u64)> {
    let (_, name) = object.key.as_str().rsplit_once('/')?;
    let mut parts = name.splitn(3, '-');
    let seq = parts.next()?.parse().ok()?;
    let seconds: u64 = parts.next()?.parse().ok()?;
    let time = seconds.saturating_mul(1000).saturating_add(whole_ms(SKEW));
    Some((seq, object.modified_ms.saturating_add(time)))
}
