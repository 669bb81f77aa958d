//! `head.json`: what exists, and who may write. This file alone knows its form. Replacing it is the commit.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use towline_core::{
    Error, ErrorKind, JobId, ObjectKey, PutMode, Result, SessionId, SnapshotId, SnapshotIdentity,
    SnapshotName, TensorDigest, Version, WriteId,
};

use super::info::{SnapshotInfo, Wanted};
use super::ops::{Budget, Ops, may_have_landed};
use crate::random::{now_ms, random};

/// The version of the stored form that is written. Readers take this one and those before, and refuse newer ones.
const HEAD_VERSION: u32 = 2;
/// The largest head that is read, in bytes: about a hundred thousand snapshots.
pub const MAX_HEAD: u64 = 64 << 20;

/// What stands before a head's digest, before the head and behind it.
const DIGEST: &str = "{\"digest\":\"";
const HEAD: &str = "\",\"head\":";
const END: &[u8] = b"}\n";

/// The state of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head {
    version: u32,
    job: JobId,
    /// The writer that may commit.
    pub(super) fence: Fence,
    /// The attempt that wrote this head: no two are equal.
    write_id: WriteId,
    /// The number of the next snapshot. It never falls.
    pub(super) next_seq: u64,
    updated_ms: u64,
    /// Everything that exists, by number.
    pub(super) live: Vec<SnapshotInfo>,
    /// What must not go away. Since version 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) pins: Vec<Pin>,
    /// States whose ranks are writing, by number: their files are nobody else's. Since version 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) pending: Vec<Pending>,
    /// What exists no longer, and whose files are still to be deleted, by number. Since version 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) tombstones: Vec<Tombstone>,
    /// What is damaged, by number: not found any more, and not deleted. Since version 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) quarantined: Vec<Quarantined>,
}

/// A promise to keep a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Pin {
    /// Its name, by which it is taken away.
    pub id: String,
    /// The number of the snapshot.
    pub seq: u64,
    /// Why, for humans.
    pub reason: String,
}

/// A snapshot that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tombstone {
    pub(super) info: SnapshotInfo,
    /// When it was given up: milliseconds since 1970 by the store's clock.
    pub(super) since_ms: u64,
}

/// A snapshot that was found damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quarantined {
    pub(super) info: SnapshotInfo,
    /// When it was found: milliseconds since 1970 by the store's clock.
    pub(super) since_ms: u64,
    /// What is wrong.
    pub(super) why: String,
}

/// A state that was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pending {
    pub(super) seq: u64,
    pub(super) dir: ObjectKey,
    /// When it was begun: milliseconds since 1970 by the store's clock.
    pub(super) since_ms: u64,
}

/// Who may commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fence {
    /// Grows with every writer.
    pub(super) epoch: u64,
    /// Whose it is.
    pub(super) session: SessionId,
    /// The opening of this writer, told apart from every other, also of the same session.
    pub(super) opening: WriteId,
}

impl Head {
    /// The head after a writer has opened the job.
    pub(super) fn opened(old: Option<Self>, job: &JobId, session: &SessionId, opening: &WriteId) -> Self {
        let epoch = old.as_ref().map_or(0, |head| head.fence.epoch) + 1;
        let fence = Fence { epoch, session: session.clone(), opening: opening.clone() };
        let empty = || Self {
            version: HEAD_VERSION,
            job: job.clone(),
            fence: fence.clone(),
            write_id: opening.clone(),
            next_seq: 1,
            updated_ms: 0,
            live: Vec::new(),
            pins: Vec::new(),
            pending: Vec::new(),
            tombstones: Vec::new(),
            quarantined: Vec::new(),
        };
        let old = old.unwrap_or_else(empty);
        // What the writer before has begun, it can commit no more.
        Self { fence, write_id: opening.clone(), pending: Vec::new(), ..old }
    }

    /// # Errors
    /// `Fenced`, naming who has opened the job since.
    pub(super) fn check_fence(&self, mine: &Fence) -> Result<()> {
        if self.fence == *mine {
            return Ok(());
        }
        let Fence { epoch, session, .. } = &self.fence;
        Err(Error::fenced(format!(
            "session {session} has opened job {} with epoch {epoch}; this writer is session {} with epoch {}",
            self.job, mine.session, mine.epoch
        ))
        .with_help("stop this trainer, or open a new writer to take the job back"))
    }

    /// The bytes to store: JSON, with the digest of the head before it.
    fn to_bytes(&self) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self).map_err(|error| {
            Error::internal(format!("the head of job {} could not be written", self.job)).with_source(error)
        })?;
        let digest = TensorDigest::of(&json);
        Ok([format!("{DIGEST}{digest}{HEAD}").as_bytes(), &json, END].concat())
    }

    /// Parses stored bytes of `job` and checks what they say of themselves.
    fn parse(bytes: &[u8], job: &JobId) -> Result<Self> {
        let bad = |why: &str| {
            Error::corrupt(format!("head of job {job}: {why}")).with_help("restore head.json from a copy")
        };
        // A flipped bit that goes unnoticed here would be written back with the next commit. Version 1 had no digest.
        let bytes = match bytes.strip_prefix(DIGEST.as_bytes()) {
            None => bytes,
            Some(rest) => {
                let place = rest.windows(HEAD.len()).position(|window| window == HEAD.as_bytes());
                let (digest, rest) = place.and_then(|at| rest.split_at_checked(at)).unwrap_or_default();
                let json = rest.get(HEAD.len()..).and_then(|json| json.strip_suffix(END)).unwrap_or_default();
                if TensorDigest::of(json).to_string().as_bytes() != digest {
                    return Err(bad("it does not match its digest"));
                }
                json
            }
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(bytes)
            .map_err(|error| bad("no JSON with a version").with_source(error))?;
        if !(1..=HEAD_VERSION).contains(&version) {
            return Err(Error::unsupported(format!(
                "head of job {job}: version {version} is stored, versions up to {HEAD_VERSION} are known"
            ))
            .with_help("upgrade Towline"));
        }
        let head: Self =
            serde_json::from_slice(bytes).map_err(|error| bad("not of this form").with_source(error))?;
        head.check(job).map_err(|why| bad(&why))?;
        Ok(head)
    }

    fn check(&self, job: &JobId) -> Result<(), String> {
        if self.job != *job {
            return Err(format!("it is the head of job {}", self.job));
        }
        if self.fence.epoch == 0 {
            return Err("epoch 0 is no writer's".into());
        }
        let mut dirs = BTreeSet::new();
        let mut seqs = BTreeSet::new();
        let dead = self.tombstones.iter().map(|tombstone| &tombstone.info).collect::<Vec<_>>();
        for infos in [self.live.iter().collect(), dead] {
            let mut last = 0;
            for info in infos {
                if info.seq <= last || info.seq >= self.next_seq || !seqs.insert(info.seq) {
                    return Err(format!("number {} behind {last}, below {}", info.seq, self.next_seq));
                }
                last = info.seq;
                let folder = format!("{}/{:08}-{}-", Wanted::class(info.kind).folder(), info.seq, info.name);
                if !info.dir.as_str().starts_with(&folder) || !dirs.insert(&info.dir) {
                    return Err(format!("{} lies in `{}`", info.id, info.dir));
                }
            }
        }
        if let Some(pending) = self.pending.iter().find(|pending| pending.seq >= self.next_seq) {
            return Err(format!("number {} was begun, the next one is {}", pending.seq, self.next_seq));
        }
        match self.pins.iter().find(|pin| self.live(pin.seq).is_none()) {
            Some(pin) => Err(format!("pin `{}` holds number {}, which does not exist", pin.id, pin.seq)),
            None => Ok(()),
        }
    }

    /// What exists with this number.
    pub(super) fn live(&self, seq: u64) -> Option<&SnapshotInfo> {
        self.live.binary_search_by_key(&seq, |info| info.seq).ok().and_then(|at| self.live.get(at))
    }

    /// What has files: it exists, was given up, or is in quarantine.
    fn all(&self) -> impl Iterator<Item = &SnapshotInfo> {
        let dead = self.tombstones.iter().map(|tombstone| &tombstone.info);
        self.live.iter().chain(dead).chain(self.quarantined.iter().map(|quarantined| &quarantined.info))
    }

    /// What has files, and this number and identity.
    pub(super) fn stored(&self, seq: u64, id: &SnapshotId) -> Option<&SnapshotInfo> {
        self.all().find(|info| info.seq == seq && info.id == *id)
    }

    /// What exists of `class` under this name: a train state by its name alone, a snapshot by its identity.
    pub(super) fn named(
        &self,
        class: Wanted,
        name: &SnapshotName,
        identity: &SnapshotIdentity,
    ) -> Option<&SnapshotInfo> {
        self.live.iter().filter(|live| class.takes(live.kind)).find(|live| {
            if class == Wanted::State { live.name == *name } else { live.id.identity == *identity }
        })
    }

    /// Moves a snapshot out of the way.
    pub(super) fn quarantine(&mut self, seq: u64, why: &str, since_ms: u64) {
        let Ok(at) = self.live.binary_search_by_key(&seq, |info| info.seq) else { return };
        let info = self.live.remove(at);
        self.quarantined.push(Quarantined { info, since_ms, why: why.to_owned() });
        self.quarantined.sort_by_key(|quarantined| quarantined.info.seq);
    }

    /// Moves a snapshot back. If it must stay: why.
    pub(super) fn return_from_quarantine(&mut self, seq: u64) -> std::result::Result<(), String> {
        let at = self.quarantined.iter().position(|quarantined| quarantined.info.seq == seq);
        let Some((at, info)) = at.and_then(|at| Some((at, self.quarantined.get(at)?.info.clone()))) else {
            return Ok(());
        };
        if let Some(other) = self.named(Wanted::class(info.kind), &info.name, &info.id.identity) {
            return Err(format!("its name is that of number {} now", other.seq));
        }
        // What was given up loses its files one day.
        if let Some(parent) = info.parent.as_ref().filter(|id| self.live.iter().all(|live| live.id != **id)) {
            return Err(format!("it needs {parent}, which is not there"));
        }
        if let Some(dir) = info.shares.iter().find(|dir| self.live.iter().all(|live| live.dir != **dir)) {
            return Err(format!("it shares tensors with `{dir}`, which is not there"));
        }
        self.quarantined.remove(at);
        self.add(info);
        Ok(())
    }

    /// Adds to `held`, numbers of snapshots, what was given up and they need.
    pub(super) fn hold_needed(&self, held: &mut BTreeSet<u64>) {
        // What is needed has a lower number than what needs it.
        for Tombstone { info, .. } in self.tombstones.iter().rev() {
            if held.contains(&info.seq) {
                let dead = self.tombstones.iter().map(|tombstone| &tombstone.info);
                held.extend(dead.filter(|dead| info.needs(dead)).map(|dead| dead.seq));
            }
        }
    }

    /// Whether something that has files, or a state that was begun has the folder `dir`.
    pub(super) fn knows(&self, dir: &str) -> bool {
        self.all()
            .map(|info| &info.dir)
            .chain(self.pending.iter().map(|pending| &pending.dir))
            .any(|known| known.as_str() == dir)
    }

    /// Adds what exists from now on, in its place by number.
    pub(super) fn add(&mut self, info: SnapshotInfo) {
        self.next_seq = self.next_seq.max(info.seq + 1);
        self.pending.retain(|pending| pending.seq != info.seq);
        let at = self.live.partition_point(|live| live.seq < info.seq);
        self.live.insert(at, info);
    }

    /// As [`Head::live`].
    pub(super) fn live_mut(&mut self, seq: u64) -> Option<&mut SnapshotInfo> {
        let at = self.live.binary_search_by_key(&seq, |info| info.seq).ok()?;
        self.live.get_mut(at)
    }
}

/// Where a job's head is, and how it is read and replaced.
#[derive(Debug, Clone)]
pub(super) struct HeadObject {
    ops: Ops,
    job: JobId,
    key: ObjectKey,
}

impl HeadObject {
    pub(super) fn new(ops: Ops, job: JobId) -> Result<Self> {
        let key = ObjectKey::new(format!("{job}/head.json"))?;
        Ok(Self { ops, job, key })
    }

    /// The head; `None` if the job does not exist.
    pub(super) async fn read(&self) -> Result<Option<Head>> {
        Ok(self.read_version().await?.map(|(head, _)| head))
    }

    /// The version is asked for first: if the head is replaced in between, the version is too old and the
    /// compare-and-swap fails, never the other way round.
    async fn read_version(&self) -> Result<Option<(Head, Version)>> {
        let info = match self.ops.head(&self.key).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            info => info?,
        };
        if info.size > MAX_HEAD {
            return Err(Error::corrupt(format!(
                "head of job {}: {} bytes, at most {MAX_HEAD} are read",
                self.job, info.size
            ))
            .with_help("restore head.json from a copy"));
        }
        let read = async || {
            let bytes = self.ops.get(&self.key, Some(0..MAX_HEAD + 1)).await?;
            Head::parse(&bytes, &self.job)
        };
        // Bytes that were damaged on their way come right the second time.
        let head = match read().await {
            Err(error) if error.kind() == ErrorKind::Corrupt => read().await?,
            head => head?,
        };
        Ok(Some((head, info.version)))
    }

    /// Replaces the head by what `change` makes of it. `done` finds the effect in a head that was read back, for a
    /// write that took effect although it answered with an error, and even if another writer has followed since.
    pub(super) async fn replace<T>(
        &self,
        mut change: impl FnMut(Option<Head>) -> Result<Head> + Send,
        done: impl Fn(&Head) -> Option<T> + Send + Sync,
    ) -> Result<T> {
        let mut budget = Budget::new(self.ops.deadline());
        let mut failed: Option<Error> = None;
        loop {
            let current = self.read_version().await?;
            if let Some(error) = failed.take() {
                // Mine: success. Another's: `change` decides. Nothing: once more, within the budget.
                if let Some(effect) = current.as_ref().and_then(|(head, _)| done(head)) {
                    return Ok(effect);
                }
                budget.pause(error).await?;
            }
            let (head, mode) = match current {
                Some((head, version)) => (Some(head), PutMode::Update(version)),
                None => (None, PutMode::Create),
            };
            let mut next = change(head)?;
            next.version = HEAD_VERSION;
            next.write_id = WriteId::from_random(random().to_be_bytes());
            next.updated_ms = now_ms();
            match self.ops.put(&self.key, Bytes::from(next.to_bytes()?), mode).await {
                Ok(_) => {
                    return done(&next)
                        .ok_or_else(|| Error::internal("a change of the head left no trace in it"));
                }
                Err(error) if may_have_landed(&error) => failed = Some(error),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Head {
        let job = JobId::new("job").unwrap();
        let opening = WriteId::from_random([1; 8]);
        Head::opened(None, &job, &SessionId::from_random([1; 4]), &opening)
    }

    #[test]
    fn a_head_goes_round_and_says_what_is_wrong() {
        let job = JobId::new("job").unwrap();
        let bytes = example().to_bytes().unwrap();
        assert_eq!(Head::parse(&bytes, &job).unwrap(), example());
        let as_json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(as_json["head"]["next_seq"], 1, "other tools can read it");
        for length in 0..bytes.len() {
            assert_eq!(Head::parse(&bytes[..length], &job).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << bit;
                assert!(Head::parse(&bytes, &job).is_err(), "bit {bit} of byte {at}");
            }
        }
        assert!(Head::parse(&bytes, &JobId::new("other").unwrap()).is_err());
        // Without a digest, as version 1 was.
        let text = serde_json::to_string(&example()).unwrap();
        let newer = text.replace("\"version\":2", "\"version\":3");
        assert_eq!(Head::parse(newer.as_bytes(), &job).unwrap_err().kind(), ErrorKind::Unsupported);
        let older = text.replace("\"version\":2", "\"version\":1");
        assert_eq!(Head::parse(older.as_bytes(), &job).unwrap(), Head { version: 1, ..example() });
        let odd = text.replace("\"next_seq\":1", "\"next_seq\":1,\"more\":1");
        assert_eq!(Head::parse(odd.as_bytes(), &job).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest::proptest! {
        #[test]
        fn altered_heads_are_errors_or_heads(at in 0usize..400, byte: u8, cut in 0usize..400) {
            let job = JobId::new("job").unwrap();
            let mut bytes = serde_json::to_vec(&example()).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.drain(cut.min(bytes.len())..(cut + 3).min(bytes.len()));
            if let Ok(head) = Head::parse(&bytes, &job) {
                proptest::prop_assert_eq!(Head::parse(&serde_json::to_vec(&head).unwrap(), &job).unwrap(), head);
            }
        }
    }

    #[test]
    fn a_second_opening_fences_the_first_even_of_the_same_session() {
        let first = example();
        let opening = WriteId::from_random([2; 8]);
        let second = Head::opened(Some(first.clone()), &first.job, &first.fence.session, &opening);
        assert_eq!(second.fence.epoch, 2);
        assert!(first.check_fence(&first.fence).is_ok());
        assert_eq!(second.check_fence(&first.fence).unwrap_err().kind(), ErrorKind::Fenced);
    }
}
