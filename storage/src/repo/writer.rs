//! The one writer of a job: data first, then the manifest, then the head.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Mutex;
use towline_core::{
    BaseRef, Codec, Error, FileEntry, Manifest, ManifestHead, Mode, ObjectKey, ParentRef, Result, SessionId,
    SnapshotIdentity, SnapshotKind, SnapshotName, SnapshotRef, TensorDigest, TensorEntry, TensorSource,
    WriteId, same_tensors,
};

use super::SnapshotRepo;
use super::chain::MAX_DEPTH;
use super::files::{
    ADAPTER, ADAPTER_CONFIG, INDEX, Work, Written, cut, cut_like, index_json, model_names, plain_files,
    write_files,
};
use super::head::{Fence, Head, HeadObject, Pending};
use super::info::{Metric, SnapshotInfo, Wanted};
use super::publish::{Publish, SaveTrainState};
use super::ranks::{RankIndex, RankPart, RankReceipt, StateTicket, assemble, index_path};
use crate::random::{now_ms, random, whole_ms};
use crate::shard::check_mode;

/// The writer of a job until another one opens it. Its calls follow one another.
///
/// A call that is dropped leaves either nothing visible or the whole snapshot.
#[derive(Debug)]
pub struct Writer {
    repo: SnapshotRepo,
    head: HeadObject,
    fence: Fence,
    /// The lowest number that no commit of this writer has tried. A call that was dropped or timed out may still
    /// land: its number is not tried again.
    turn: Mutex<u64>,
}

impl SnapshotRepo {
    /// Opens the job for writing and makes it if it does not exist. Whoever wrote before is fenced: its next call
    /// fails, and nothing of it becomes visible any more.
    ///
    /// # Errors
    /// What the store answers; `Corrupt` for a damaged head.
    pub async fn writer(&self, session: SessionId) -> Result<Writer> {
        let head = self.head_object()?;
        let opening = WriteId::from_random(random().to_be_bytes());
        let open = |old| Ok(Head::opened(old, &self.job, &session, &opening));
        let opened = |head: &Head| (head.fence.opening == opening).then(|| head.fence.clone());
        let fence = head.replace(open, opened).await?;
        Ok(Writer { repo: self.clone(), head, fence, turn: Mutex::default() })
    }
}

impl Writer {
    /// Whose writer it is.
    #[must_use]
    pub fn session(&self) -> &SessionId {
        &self.fence.session
    }

    /// The repo that it writes to.
    #[must_use]
    pub fn repo(&self) -> &SnapshotRepo {
        &self.repo
    }

    /// Its fence number, from 1.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.fence.epoch
    }

    /// Publishes a snapshot. When this returns it is durable and visible.
    ///
    /// # Errors
    /// * `AlreadyExists` at once if a snapshot for samplers has this identity;
    /// * `Fenced` if another writer has opened the job;
    /// * `ChainMismatch` if the parent's weights are not those of the named parent; nothing is committed;
    /// * `NotFound` if the parent is gone; `Invalid` for a delta without parent or codec, an adapter with a codec or
    ///   without `adapter_config.json`, and the like;
    /// * `Unsupported` if the codec cannot write this kind;
    /// * `Unavailable` or `TimedOut` if the store fails; if that happens to the very last step, it may have taken
    ///   effect: look for it before publishing again.
    pub async fn publish(&self, publish: Publish) -> Result<SnapshotRef> {
        let Publish { name, kind, weights, parent, codec, files, step, ttl, metadata, metrics } = publish;
        let delta = kind == SnapshotKind::Delta;
        if kind == SnapshotKind::State {
            return Err(Error::invalid(format!("`{name}`: a train state is not published"))
                .with_help("save it as a train state"));
        }
        if delta != parent.is_some() || (delta && codec.is_none()) {
            return Err(Error::invalid(format!(
                "`{name}`: a {kind} with parent: {}, codec: {}",
                parent.is_some(),
                codec.is_some()
            ))
            .with_help("give a delta a parent and a codec, and a parent to nothing else"));
        }
        if let Some(codec) = &codec {
            check_mode(codec, if delta { Mode::Delta } else { Mode::Base })?;
        }
        check_paths(&name, &files)?;
        if kind == SnapshotKind::Adapter {
            check_adapter(&name, codec.as_ref(), &files)?;
        }
        let save = Save {
            name,
            kind,
            weights,
            parent,
            codec,
            files,
            step,
            ttl,
            metadata,
            sections: serde_json::Map::new(),
            metrics,
            shared: None,
        };
        let (info, manifest) = Box::pin(self.save(save)).await?;
        Ok(self.repo.reference(&info, &manifest))
    }

    /// Saves a train state. When this returns it is durable and visible.
    ///
    /// # Errors
    /// `AlreadyExists` at once if a train state has this name; else as [`Writer::publish`].
    pub async fn save_state(&self, state: SaveTrainState) -> Result<SnapshotInfo> {
        Ok(Box::pin(self.save(Save::of_state(state))).await?.0)
    }

    /// Begins a train state that `ranks` processes write, each its own part by [`SnapshotRepo::write_rank`] with the
    /// ticket. Other saves may go on meanwhile.
    ///
    /// # Errors
    /// `Invalid` if `state` holds tensors: each rank gives its own; `AlreadyExists` and `Fenced` as
    /// [`Writer::save_state`].
    pub async fn begin_state(&self, state: SaveTrainState, ranks: NonZeroU32) -> Result<RankedSave<'_>> {
        if !state.tensors.tensors().is_empty() {
            return Err(Error::invalid(format!(
                "`{}` holds tensors, and {ranks} ranks are to write",
                state.name
            ))
            .with_help("begin it with `SaveTrainState::ranked`"));
        }
        self.repo.check_ttl(state.ttl)?;
        let save = Save::of_state(state);
        let since_ms = self.repo.store_now().await?;
        let mut lowest = self.turn.lock().await;
        let write_id = WriteId::from_random(random().to_be_bytes());
        let change = |head: Option<Head>| {
            let mut head = self.repo.existing(head)?;
            self.check(&head, &save)?;
            let seq = head.next_seq.max(*lowest);
            let dir = ObjectKey::new(format!("states/{seq:08}-{}-{write_id}", save.name))?;
            head.next_seq = seq + 1;
            head.pending.push(Pending { seq, dir, since_ms });
            Ok(head)
        };
        let suffix = format!("-{write_id}");
        let begun = |pending: &&Pending| pending.dir.as_str().ends_with(&suffix);
        let Pending { seq, dir, .. } =
            self.head.replace(change, |head| head.pending.iter().find(begun).cloned()).await?;
        *lowest = seq + 1;
        let ticket = StateTicket::new(self.repo.job.clone(), save.name.clone(), dir, seq, ranks)
            .with_shared(save.shared.clone());
        Ok(RankedSave { writer: self, ticket, write_id, save })
    }

    async fn save(&self, save: Save) -> Result<(SnapshotInfo, Manifest)> {
        self.repo.check_ttl(save.ttl)?;
        let mut lowest = self.turn.lock().await;
        let head = self.head.read().await?.ok_or_else(|| {
            Error::corrupt(format!("the head of job {} is gone", self.repo.job))
                .with_help("restore head.json from a copy")
        })?;
        self.check(&head, &save)?;
        let seq = head.next_seq.max(*lowest);
        let write_id = WriteId::from_random(random().to_be_bytes());
        let class = Wanted::class(save.kind);
        let dir = ObjectKey::new(format!("{}/{seq:08}-{}-{write_id}", class.folder(), save.name))?;
        let folder = ObjectKey::new(format!("{}/{dir}", self.repo.job))?;

        let content = match self.write(&save, &folder).await {
            Ok(content) => content,
            Err(error) => {
                // Nothing names these files yet. If they cannot be deleted now, they are when they are old.
                self.repo.ops.clear(&folder).await;
                return Err(error);
            }
        };
        *lowest = seq + 1;
        self.seal(&save, Place { seq, dir, write_id, reserved: false }, content).await
    }

    /// Writes all files of `save` but the manifest.
    async fn write(&self, save: &Save, folder: &ObjectKey) -> Result<Content> {
        if save.kind == SnapshotKind::State {
            return self.write_alone(save, folder).await;
        }
        let lineage = self.lineage(save).await?;
        let shards = self.shards(save, lineage.as_ref().map(|(_, _, manifest)| manifest));
        let work = Work {
            weights: Arc::clone(&save.weights),
            parent: save.parent.as_ref().map(|(_, weights)| Arc::clone(weights)),
            codec: save.codec.clone(),
            limits: self.repo.limits,
            shards,
        };
        let Written { mut files, tensors, raw_bytes, changed, parent, .. } =
            write_files(&self.repo.ops, folder, work).await?;
        if let Some((named, _)) = &save.parent
            && parent != Some(named.id.digest)
        {
            let found = parent.map_or("none".into(), |digest| digest.to_string());
            return Err(Error::chain_mismatch(format!(
                "the weights given as parent {} have content digest {found}, it has {}",
                named.id, named.id.digest
            ))
            .with_help("publish a base"));
        }
        let mut extra = save.files.clone();
        if save.codec.is_none() && save.kind != SnapshotKind::Adapter {
            let path = |file: usize| files.get(file).map_or("", |file| file.path.as_str());
            let places = tensors.iter().map(|tensor| (tensor.name.as_str(), path(tensor.file)));
            extra.push((INDEX.to_owned(), index_json(raw_bytes, places)?));
        }
        let lineage = lineage.map(|(parent, base, _)| (parent, base));
        for (path, body) in extra {
            self.repo.ops.create(&folder.join(&path)?, &body).await?;
            files.push(FileEntry::new(path, body.len() as u64, TensorDigest::of(&body), false));
        }

        Ok(Content { files, tensors, raw_bytes, changed: Some(changed), ranks: 0, lineage })
    }

    /// Writes all files of a train state but the manifest, as its only rank.
    async fn write_alone(&self, save: &Save, folder: &ObjectKey) -> Result<Content> {
        let part = RankPart::new(Arc::clone(&save.weights));
        let shared = self.repo.shared(save.shared.as_ref()).await?;
        let name = |number| format!("rank-0-{number}.safetensors");
        let index = self.repo.write_part(folder, &part, shared, (0, NonZeroU32::MIN), name).await?;
        let (body, digest) = index.encode()?;
        self.repo.ops.create(&folder.join(&index_path(0))?, &body).await?;
        let entry = FileEntry::new(index_path(0), body.len() as u64, digest, false);
        Content::of_ranks(&[(index, entry)])
    }

    /// Writes the manifest of files that are all there, and commits.
    async fn seal(&self, save: &Save, place: Place, content: Content) -> Result<(SnapshotInfo, Manifest)> {
        let Place { seq, dir, write_id, reserved } = place;
        let Content { files, tensors, raw_bytes, changed, ranks, lineage } = content;
        let folder = ObjectKey::new(format!("{}/{dir}", self.repo.job))?;
        let created_ms = now_ms();
        let start = ManifestHead {
            kind: save.kind,
            name: save.name.clone(),
            job: self.repo.job.clone(),
            session: self.fence.session.clone(),
            seq,
            epoch: self.fence.epoch,
            write_id,
            created_ms,
        };
        let mut manifest = Manifest::new(start, files, tensors);
        manifest.step = save.step;
        manifest.expires_ms = save.ttl.map(|ttl| created_ms.saturating_add(whole_ms(ttl)));
        manifest.codec = save.codec.as_ref().map(|codec| codec.id());
        manifest.changed = changed;
        manifest.ranks = ranks;
        manifest.metadata = save.metadata.clone();
        manifest.sections = save.sections.clone();
        if let Some((parent, base)) = lineage {
            (manifest.parent, manifest.base) = (Some(parent), Some(base));
        }
        let (bytes, digest) = manifest.to_bytes()?;
        let manifest_key = folder.join("manifest.json")?;
        self.repo.ops.create(&manifest_key, &Bytes::from(bytes)).await?;
        // Others compare the expiry with the store's clock, so that it is counted by it.
        let expires_ms = match save.ttl {
            None => None,
            Some(ttl) => {
                let written = self.repo.ops.head(&manifest_key).await?.modified_ms;
                Some(written.saturating_add(whole_ms(ttl)))
            }
        };

        let own = manifest.files.iter().filter(|file| file.dir.is_none());
        let info = SnapshotInfo {
            seq,
            kind: save.kind,
            name: save.name.clone(),
            id: manifest.id(),
            parent: save.parent.as_ref().map(|(parent, _)| parent.id.clone()),
            dir,
            manifest: digest,
            created_ms,
            expires_ms,
            step: save.step,
            stored_bytes: own.map(|file| file.bytes).sum(),
            full_bytes: raw_bytes,
            codec: manifest.codec.clone(),
            metrics: save.metrics.clone(),
            shares: manifest.files.iter().filter_map(|file| file.dir.clone()).collect(),
        };
        self.commit(save, &info, reserved).await?;
        Ok((info, manifest))
    }

    /// The compare-and-swap of the head that makes `info` exist.
    /// A number that was reserved must still be.
    async fn commit(&self, save: &Save, info: &SnapshotInfo, reserved: bool) -> Result<()> {
        let add = |head: Option<Head>| {
            let mut head = head.ok_or_else(|| {
                Error::corrupt(format!("the head of job {} is gone", self.repo.job))
                    .with_help("restore head.json from a copy")
            })?;
            self.check(&head, save)?;
            let begun = |pending: &Pending| pending.seq == info.seq && pending.dir == info.dir;
            if reserved && !head.pending.iter().any(begun) {
                return Err(Error::conflict(format!(
                    "`{}` was begun so long ago that its files may be deleted",
                    info.name
                ))
                .with_help("save it again"));
            }
            if !reserved && head.next_seq > info.seq {
                return Err(Error::conflict(format!(
                    "number {} was given away: the next one is {}",
                    info.seq, head.next_seq
                ))
                .with_help("publish again"));
            }
            head.add(info.clone());
            Ok(head)
        };
        // By its folder, which no other attempt has: others may have changed its expiry since, or given it up.
        let dead = |head: &Head| head.tombstones.iter().any(|tombstone| tombstone.info.dir == info.dir);
        let landed = |head: &Head| head.live(info.seq).is_some_and(|live| live.dir == info.dir) || dead(head);
        self.head.replace(add, |head| landed(head).then_some(())).await
    }

    /// Whether `save` may be committed to `head`.
    fn check(&self, head: &Head, save: &Save) -> Result<()> {
        head.check_fence(&self.fence)?;
        let class = Wanted::class(save.kind);
        let identity = SnapshotIdentity::of(&save.name, &self.fence.session);
        if let Some(info) = head.named(class, &save.name, &identity) {
            return Err(Error::already_exists(format!(
                "job {} has a {} called {} with number {}",
                self.repo.job,
                class.noun(),
                info.id,
                info.seq
            ))
            .with_help("choose another name"));
        }
        if let Some(shared) = &save.shared
            && head.live.iter().all(|info| info.dir != shared.dir)
        {
            return Err(Error::not_found(format!(
                "{}, which tensors were to be shared with, does not exist in job {}",
                shared.id, self.repo.job
            ))
            .with_help("share nothing, or with a state that stays"));
        }
        match &save.parent {
            Some((parent, _))
                if !head.live.iter().any(|info| info.id == parent.id && info.seq == parent.seq) =>
            {
                Err(Error::not_found(format!("parent {} does not exist in job {}", parent.id, self.repo.job))
                    .with_help("publish a base"))
            }
            _ => Ok(()),
        }
    }

    /// Parent, base and the parent's manifest, for a delta.
    async fn lineage(&self, save: &Save) -> Result<Option<(ParentRef, BaseRef, Manifest)>> {
        let Some((parent, weights)) = &save.parent else { return Ok(None) };
        if parent.kind == SnapshotKind::State {
            return Err(
                Error::invalid(format!("parent {} is a train state", parent.id)).with_help("publish a base")
            );
        }
        same_tensors(weights.tensors(), save.weights.tensors()).map_err(|error| {
            error.context("the weights do not fit their parent").with_help("publish a base")
        })?;
        let manifest = self.repo.manifest(parent).await?;
        let base = match &manifest.base {
            None => BaseRef::new(parent.seq, parent.id.clone(), 1),
            Some(base) => BaseRef::new(base.seq, base.id.clone(), base.depth.saturating_add(1)),
        };
        if base.depth > MAX_DEPTH {
            return Err(Error::invalid(format!(
                "`{}` would be delta {} on base {}: at most {MAX_DEPTH} are allowed",
                save.name, base.depth, base.id
            ))
            .with_help("publish a base"));
        }
        Ok(Some((ParentRef::new(parent.seq, parent.id.clone()), base, manifest)))
    }

    fn shards(&self, save: &Save, parent: Option<&Manifest>) -> Vec<(String, std::ops::Range<usize>)> {
        let tensors = save.weights.tensors();
        if save.codec.is_none() {
            return plain_files(save.kind, tensors, self.repo.shard_bytes);
        }
        let like_parent = parent
            .filter(|parent| parent.tensors.len() == tensors.len())
            .and_then(|parent| cut_like(&parent.tensors));
        let runs = like_parent.unwrap_or_else(|| cut(tensors, self.repo.shard_bytes));
        model_names(runs, save.codec.as_deref())
    }
}

/// A train state whose ranks are writing.
///
/// If it is dropped nothing becomes visible, and the files go when the job is pruned.
#[derive(Debug)]
pub struct RankedSave<'a> {
    writer: &'a Writer,
    ticket: StateTicket,
    write_id: WriteId,
    save: Save,
}

impl RankedSave<'_> {
    /// What each rank needs.
    #[must_use]
    pub fn ticket(&self) -> &StateTicket {
        &self.ticket
    }

    /// Commits the parts that the receipts name, or without receipts those of all ranks, waiting for them at most
    /// `deadline` in all. When this returns the state is durable and visible.
    ///
    /// # Errors
    /// * `TimedOut`, naming the rank that has not written;
    /// * `Invalid` for a tensor with a hole or an overlap, or one that ranks do not agree on, and for missing receipts;
    /// * `Conflict` if it was begun so long ago that its files may be deleted;
    /// * else as [`Writer::save_state`]. Nothing is visible then.
    pub async fn commit(self, receipts: &[RankReceipt], deadline: Duration) -> Result<SnapshotInfo> {
        let Self { writer, ticket, write_id, save } = self;
        let indexes = writer.repo.collect_ranks(&ticket, receipts, deadline).await?;
        let content = Content::of_ranks(&indexes)?;
        let place = Place { seq: ticket.seq, dir: ticket.dir, write_id, reserved: true };
        Ok(Box::pin(writer.seal(&save, place, content)).await?.0)
    }
}

/// Where a snapshot comes to lie.
struct Place {
    seq: u64,
    dir: ObjectKey,
    write_id: WriteId,
    /// Whether the number was taken from the head before.
    reserved: bool,
}

/// What was written of a snapshot, all but its manifest.
struct Content {
    files: Vec<FileEntry>,
    tensors: Vec<TensorEntry>,
    raw_bytes: u64,
    changed: Option<(u64, u64)>,
    ranks: u32,
    lineage: Option<(ParentRef, BaseRef)>,
}

impl Content {
    /// A train state of the parts of all its ranks.
    fn of_ranks(indexes: &[(RankIndex, FileEntry)]) -> Result<Self> {
        let (files, tensors) = assemble(indexes)?;
        let mut raw_bytes = 0;
        for entry in &tensors {
            raw_bytes += entry.meta()?.byte_len() as u64;
        }
        let ranks =
            u32::try_from(indexes.len()).map_err(|_| Error::internal("more ranks than can be told"))?;
        Ok(Self { files, tensors, raw_bytes, changed: None, ranks, lineage: None })
    }
}

/// What both kinds of saves come down to.
struct Save {
    name: SnapshotName,
    kind: SnapshotKind,
    weights: Arc<dyn TensorSource>,
    parent: Option<(SnapshotInfo, Arc<dyn TensorSource>)>,
    codec: Option<Arc<dyn Codec>>,
    files: Vec<(String, Bytes)>,
    step: Option<u64>,
    ttl: Option<Duration>,
    metadata: BTreeMap<String, String>,
    sections: serde_json::Map<String, serde_json::Value>,
    metrics: BTreeMap<String, Metric>,
    shared: Option<SnapshotInfo>,
}

impl Save {
    fn of_state(state: SaveTrainState) -> Self {
        let SaveTrainState { name, tensors, step, ttl, sections, metrics, shared } = state;
        Self {
            name,
            kind: SnapshotKind::State,
            weights: tensors,
            parent: None,
            codec: None,
            files: Vec::new(),
            step,
            ttl,
            metadata: BTreeMap::new(),
            sections,
            metrics,
            shared,
        }
    }
}

impl fmt::Debug for Save {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Save").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// Passed-through files lie beside ours and must not take their names.
fn check_paths(name: &SnapshotName, files: &[(String, Bytes)]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for (path, _) in files {
        let ours = matches!(path.as_str(), "manifest.json" | INDEX | ADAPTER)
            || path.starts_with("model-") && (path.ends_with(".safetensors") || path.ends_with(".towline"));
        if ours || !seen.insert(path) {
            return Err(Error::invalid(format!(
                "`{name}`: the file name `{}` is taken",
                path.escape_debug()
            ))
            .with_help("leave out what the snapshot writes itself, and name each file once"));
        }
        ObjectKey::new(path.as_str())?;
    }
    Ok(())
}

/// An adapter is stored as it is used: whole, in PEFT's two files.
fn check_adapter(
    name: &SnapshotName,
    codec: Option<&Arc<dyn Codec>>,
    files: &[(String, Bytes)],
) -> Result<()> {
    if let Some(codec) = codec {
        return Err(Error::invalid(format!("`{name}`: an adapter in codec {}", codec.id()))
            .with_help("publish it without a codec: adapters are stored plain"));
    }
    if files.iter().all(|(path, _)| path != ADAPTER_CONFIG) {
        return Err(Error::invalid(format!("`{name}`: an adapter without `{ADAPTER_CONFIG}`"))
            .with_help("pass its configuration through as a file"));
    }
    Ok(())
}
