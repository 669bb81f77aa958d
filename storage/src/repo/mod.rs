//! The snapshots and train states of one job.

mod background;
mod boxes;
mod catalog;
mod chain;
mod collect;
mod doctor;
mod export;
mod files;
mod head;
mod info;
mod keep;
mod ops;
mod promote;
mod publish;
mod ranks;
mod repair;
mod reshard;
mod restore;
mod retain;
mod share;
#[cfg(feature = "slime")]
mod slime;
mod verify;
mod writer;

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use towline_core::pipeline::Limits;
use towline_core::{
    Codec, CodecId, ContentDigest, Error, ErrorKind, FileEntry, JobId, MAX_MANIFEST, Manifest, ObjectKey,
    Result, SnapshotRef, SnapshotStore, TensorDigest,
};

use crate::random::now_ms;
use head::{Head, HeadObject};
use ops::Ops;

pub use background::{BackgroundSaver, WhenBusy};
pub use collect::{Orphan, Prune, Pruned};
pub use doctor::Finding;
pub use head::{MAX_HEAD, Pin};
pub use info::{Metric, SnapshotInfo, Wanted};
pub use keep::Lease;
pub use promote::{LoadedModel, Promote};
pub use publish::{Publish, SaveTrainState};
pub use ranks::{RankPart, RankReceipt, StateTicket};
pub use repair::Repaired;
pub use reshard::{BoxRead, StateReader};
pub use restore::TrainState;
pub use retain::{Best, Kept, Retention};
#[cfg(feature = "slime")]
pub use slime::Import;
pub use verify::{Depth, Verified};
pub use writer::{RankedSave, Writer};

/// Plain bytes in one file unless the caller says otherwise.
const SHARD_BYTES: u64 = 512 << 20;
/// One hour to ten years, as the public training APIs allow.
const TTL: RangeInclusive<Duration> = Duration::from_secs(3600)..=Duration::from_secs(315_360_000);

/// One job's snapshots and train states on a store. Cloning is cheap.
///
/// Reading needs no writer and never waits for one. Every byte that leaves it was checked against a digest.
#[derive(Clone)]
pub struct SnapshotRepo {
    ops: Ops,
    job: JobId,
    codecs: Vec<Arc<dyn Codec>>,
    limits: Limits,
    shard_bytes: u64,
    ttl: RangeInclusive<Duration>,
}

impl SnapshotRepo {
    /// The repo of `job` on `store`. Snapshots in the formats of `codecs` can be restored; plain ones always.
    pub fn new(store: Arc<dyn SnapshotStore>, job: JobId, codecs: Vec<Arc<dyn Codec>>) -> Self {
        Self {
            ops: Ops::new(store),
            job,
            codecs,
            limits: Limits::default(),
            shard_bytes: SHARD_BYTES,
            ttl: TTL,
        }
    }

    /// Sets the threads and the window of tensors in work. Default: one thread, 32 MiB.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets how long one operation on the store may take. Default 600 s.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.ops = self.ops.with_deadline(deadline);
        self
    }

    /// Sets the plain bytes that one file holds at most; one tensor is never cut. Default 512 MiB.
    #[must_use]
    pub fn with_shard_bytes(mut self, bytes: u64) -> Self {
        self.shard_bytes = bytes;
        self
    }

    /// Sets how short and how long a time to live may be. Default: 3600 to 315,360,000 s.
    #[must_use]
    pub fn with_ttl_range(mut self, range: RangeInclusive<Duration>) -> Self {
        self.ttl = range;
        self
    }

    /// The snapshots of another job on the same store.
    #[must_use]
    pub fn of_job(&self, job: JobId) -> Self {
        Self { job, ..self.clone() }
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> &JobId {
        &self.job
    }

    /// Everything that exists, by number: one read of the head. Empty for a job that does not exist.
    ///
    /// # Errors
    /// `Corrupt` for a damaged head; what the store answers. Never an empty list instead of an error.
    pub async fn list(&self) -> Result<Vec<SnapshotInfo>> {
        Ok(self.head_object()?.read().await?.map(|head| head.live).unwrap_or_default())
    }

    /// The newest snapshot of this kind whose time is not over by this machine's clock: what to resume from, or to
    /// serve, if none is named. `None` if there is none.
    ///
    /// # Errors
    /// As [`SnapshotRepo::list`].
    pub async fn newest(&self, wanted: Wanted) -> Result<Option<SnapshotInfo>> {
        let now = now_ms();
        let fresh = |info: &SnapshotInfo| wanted.takes(info.kind) && !info.is_expired(now);
        Ok(self.list().await?.into_iter().rfind(fresh))
    }

    /// The newest snapshot with this name or identity, also one whose time is over and that is still there.
    ///
    /// # Errors
    /// `NotFound`, naming what exists; as [`SnapshotRepo::list`].
    pub async fn find(&self, name_or_identity: &str, wanted: Wanted) -> Result<SnapshotInfo> {
        let live = self.list().await?;
        let is_it = |info: &&SnapshotInfo| {
            wanted.takes(info.kind)
                && (info.name.as_str() == name_or_identity || info.id.identity.as_str() == name_or_identity)
        };
        if let Some(info) = live.iter().rev().find(is_it) {
            return Ok(info.clone());
        }
        let text = name_or_identity.escape_debug();
        let missing = Error::not_found(format!("job {} has no {} called `{text}`", self.job, wanted.noun()));
        let mut known: Vec<_> = live.iter().rev().filter(|info| wanted.takes(info.kind)).collect();
        let more = known.len().saturating_sub(5);
        known.truncate(5);
        let known: Vec<_> = known.iter().map(|info| info.id.to_string()).collect();
        Err(missing.with_help(match (known.is_empty(), more) {
            (true, _) => format!("save one first: job {} has none", self.job),
            (false, 0) => format!("use one of {}", known.join(", ")),
            (false, more) => format!("use one of {} or {more} older ones", known.join(", ")),
        }))
    }

    /// The newest snapshot for samplers with these weights.
    ///
    /// # Errors
    /// As [`SnapshotRepo::list`].
    pub async fn find_digest(&self, digest: &ContentDigest) -> Result<Option<SnapshotInfo>> {
        let is_it = |info: &SnapshotInfo| Wanted::Sampler.takes(info.kind) && info.id.digest == *digest;
        Ok(self.list().await?.into_iter().rfind(is_it))
    }

    /// The manifest of a snapshot, checked against the head's digest and against `info`.
    ///
    /// # Errors
    /// `NotFound` if it is missing; `Corrupt` if it is damaged or another's.
    pub async fn manifest(&self, info: &SnapshotInfo) -> Result<Manifest> {
        let key = self.key(info, "manifest.json")?;
        let size = self.ops.head(&key).await.map_err(|error| lost(error, info))?.size;
        if size > MAX_MANIFEST {
            return Err(Error::corrupt(format!("`{key}`: {size} bytes, at most {MAX_MANIFEST} are read")));
        }
        let bytes = self.ops.get(&key, None).await.map_err(|error| lost(error, info))?;
        let manifest =
            Manifest::parse(&bytes, Some(&info.manifest)).map_err(|error| error.context(&info.id))?;
        let same = manifest.id() == info.id
            && (manifest.seq, manifest.kind, &manifest.job) == (info.seq, info.kind, &self.job)
            && manifest.codec == info.codec;
        if !same {
            return Err(Error::corrupt(format!(
                "`{key}` is the manifest of {} of job {}, wanted {} of job {}",
                manifest.identity, manifest.job, info.id, self.job
            )));
        }
        Ok(manifest)
    }

    /// What flows to deployments and logs.
    #[must_use]
    pub fn reference(&self, info: &SnapshotInfo, manifest: &Manifest) -> SnapshotRef {
        let share = match (info.kind, manifest.changed) {
            (towline_core::SnapshotKind::Delta, Some((changed, all))) if all > 0 => {
                Some(changed as f64 / all as f64)
            }
            _ => None,
        };
        SnapshotRef::new(info.id.clone(), info.kind, format!("{}/{}", self.job, info.dir))
            .with_parent(info.parent.clone())
            .with_codec(info.codec.clone())
            .with_manifest(info.manifest)
            .with_sizes(info.stored_bytes, info.full_bytes, share)
    }

    /// A whole file of a snapshot, such as `config.json`, checked against its digest.
    ///
    /// # Errors
    /// `NotFound`, naming the files that exist; `Corrupt` if it is damaged.
    pub async fn file(&self, info: &SnapshotInfo, path: &str) -> Result<Bytes> {
        let manifest = self.manifest(info).await?;
        let own = || manifest.files.iter().filter(|entry| entry.dir.is_none());
        let Some(entry) = own().find(|entry| entry.path == path) else {
            let known: Vec<_> = own().map(|entry| entry.path.as_str()).collect();
            return Err(Error::not_found(format!("{} has no file `{}`", info.id, path.escape_debug()))
                .with_help(format!("use one of {}", known.join(", "))));
        };
        let key = self.file_key(info, entry)?;
        let size = self.ops.head(&key).await.map_err(|error| lost(error, info))?.size;
        if size != entry.bytes {
            return Err(Error::corrupt(format!("`{key}`: wanted {} bytes, found {size}", entry.bytes)));
        }
        let bytes = self.ops.get(&key, None).await.map_err(|error| lost(error, info))?;
        if TensorDigest::of(&bytes) != entry.digest {
            return Err(Error::corrupt(format!("`{key}` does not match its digest"))
                .with_help("restore another snapshot"));
        }
        Ok(bytes)
    }

    fn head_object(&self) -> Result<HeadObject> {
        HeadObject::new(self.ops.clone(), self.job.clone())
    }

    async fn head(&self) -> Result<Head> {
        self.head_object()?.read().await?.ok_or_else(|| {
            Error::not_found(format!("job {} does not exist", self.job)).with_help("save a snapshot first")
        })
    }

    /// The key of a file of `info`.
    fn file_key(&self, info: &SnapshotInfo, entry: &FileEntry) -> Result<ObjectKey> {
        let dir = entry.dir.as_ref().unwrap_or(&info.dir);
        ObjectKey::new(format!("{}/{dir}/{}", self.job, entry.path))
    }

    /// The key of a file in the folder of `info`.
    fn key(&self, info: &SnapshotInfo, path: &str) -> Result<ObjectKey> {
        ObjectKey::new(format!("{}/{}/{path}", self.job, info.dir))
    }

    fn codec(&self, id: &CodecId) -> Result<Arc<dyn Codec>> {
        self.codecs.iter().find(|codec| codec.id() == *id).map(Arc::clone).ok_or_else(|| {
            let known: Vec<_> = self.codecs.iter().map(|codec| codec.id().to_string()).collect();
            Error::unsupported(format!(
                "codec {id} is wanted, but this repo was given [{}]",
                known.join(", ")
            ))
            .with_help(format!("open the repo with codec {id}"))
        })
    }
}

impl fmt::Debug for SnapshotRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotRepo").field("job", &self.job).field("ops", &self.ops).finish_non_exhaustive()
    }
}

/// Every job on `store`, sorted. Lists the whole store, which may take long: it is for humans.
///
/// # Errors
/// What the store answers.
pub async fn jobs(store: &dyn SnapshotStore) -> Result<Vec<JobId>> {
    let mut found = Vec::new();
    let mut objects = store.list(None);
    loop {
        let object = tokio::time::timeout(ops::DEADLINE, objects.next()).await.map_err(|_| {
            Error::timed_out(format!("the store listed nothing for {} s", ops::DEADLINE.as_secs()))
        })?;
        let Some(object) = object.transpose()? else { break };
        if let Some((job, "head.json")) = object.key.as_str().split_once('/') {
            found.extend(JobId::new(job));
        }
    }
    found.sort();
    Ok(found)
}

/// A file that the manifest or the head promises and the store does not have.
fn lost(error: Error, info: &SnapshotInfo) -> Error {
    if error.kind() == ErrorKind::NotFound {
        return error
            .context(format_args!("{} is damaged", info.id))
            .with_help("restore another snapshot, or copy the missing file back");
    }
    error.context(&info.id)
}
