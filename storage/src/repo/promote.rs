//! Promotion: sampler weights as a model of the registry, a plain folder below the root of the store.
//!
//! `models/<id>/towline.json` is the commit. It claims the id before the first file is written, so that two sources
//! never mix, and says `ready` behind the last one.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use towline_core::safetensors::{Header, SafetensorsFiles, layout};
use towline_core::{
    BlockHasher, CheckpointInfo, Error, ErrorKind, FileEntry, JobId, MODELS, ModelId, ModelKind, ObjectKey,
    ObjectWriter, PromotedModel, PutMode, Result, SnapshotKind, TensorDigest, TensorMeta, Version, Weights,
};

use super::chain::Link;
use super::files::{ADAPTER_CONFIG, INDEX, finish_file, index_json, plain_files, plain_metadata};
use super::info::{SnapshotInfo, Wanted};
use super::ops::{Budget, may_have_landed};
use super::{SnapshotRepo, lost};
use crate::random::now_ms;

/// Where a model comes from, in its folder.
const RECORD: &str = "towline.json";
/// The only version of the record.
const VERSION: u32 = 1;
/// The largest record that is read.
const MAX_RECORD: u64 = 1 << 20;
/// What is copied at once.
const PIECE: u64 = 8 << 20;
/// What engines open first, of a model and of an adapter: written when all else is there.
const FIRST_READ: [&str; 2] = ["config.json", ADAPTER_CONFIG];

/// How to promote.
#[derive(Clone)]
pub struct Promote {
    model: ModelId,
    account: Option<JobId>,
    materialise: bool,
    progress: Option<Arc<dyn Fn(u64, u64) + Send + Sync>>,
}

impl Promote {
    /// To the model `output_model_id` of account `local`; deltas are refused.
    #[must_use]
    pub fn new(output_model_id: ModelId) -> Self {
        Self { model: output_model_id, account: None, materialise: false, progress: None }
    }

    /// Sets the account that the model's name begins with: `accounts/<account>/models/<id>`.
    #[must_use]
    pub fn with_account(mut self, account: JobId) -> Self {
        self.account = Some(account);
        self
    }

    /// Whether the full weights of a delta are written and promoted.
    #[must_use]
    pub fn with_materialise(mut self, materialise: bool) -> Self {
        self.materialise = materialise;
        self
    }

    /// Is told of the bytes of weights that are written, and of all that will be.
    #[must_use]
    pub fn with_progress(mut self, progress: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }
}

impl fmt::Debug for Promote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Promote")
            .field("model", &self.model)
            .field("account", &self.account)
            .field("materialise", &self.materialise)
            .finish_non_exhaustive()
    }
}

/// A model of the registry, in memory.
#[derive(Debug)]
#[non_exhaustive]
pub struct LoadedModel {
    /// What it is, and where it comes from.
    pub model: PromotedModel,
    /// Its weights.
    pub weights: Weights,
    /// Its other files by path, such as `config.json`.
    pub files: Vec<(String, Bytes)>,
}

/// The record of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    version: u32,
    ready: bool,
    model: PromotedModel,
    promoted_ms: u64,
}

/// Its stored form.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    record: Record,
    /// Of the record's compact JSON.
    digest: TensorDigest,
}

impl Record {
    fn digest(&self) -> Result<TensorDigest> {
        let json = serde_json::to_vec(self)
            .map_err(|error| Error::internal("a model's record could not be written").with_source(error))?;
        Ok(TensorDigest::of(&json))
    }

    fn to_bytes(&self) -> Result<Bytes> {
        let stored = Stored { record: self.clone(), digest: self.digest()? };
        serde_json::to_vec_pretty(&stored)
            .map(Bytes::from)
            .map_err(|error| Error::internal("a model's record could not be written").with_source(error))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let help = "delete the model's folder, and promote again";
        let stored: Stored = serde_json::from_slice(bytes).map_err(|error| {
            Error::corrupt("it is no record of a model").with_source(error).with_help(help)
        })?;
        if stored.record.version != VERSION {
            return Err(Error::unsupported(format!(
                "its version is {}, {VERSION} is known",
                stored.record.version
            )));
        }
        if stored.record.digest()? != stored.digest {
            return Err(Error::corrupt("it does not match its digest").with_help(help));
        }
        Ok(stored.record)
    }
}

impl SnapshotRepo {
    /// Copies the sampler weights `checkpoint`, a name or identity of this job, to the model registry: a plain Hugging
    /// Face folder, or PEFT's for an adapter, at `models/<output_model_id>/` below the root of the store. Every byte is
    /// checked on its way. The source stays, with a pin. The same source again is a success and continues what a death
    /// has cut short. No trainer is needed, and none is disturbed.
    ///
    /// # Errors
    /// `NotFound`, naming what exists; `Invalid` for a train state, and for a delta that is not to be materialised, with
    /// the base that can be promoted; `AlreadyExists` if the model is there from another source; as
    /// [`SnapshotRepo::restore`], and what the store answers.
    pub async fn promote(&self, checkpoint: &str, promote: &Promote) -> Result<PromotedModel> {
        let info = self.promotable(checkpoint, promote.materialise).await?;
        let adapter = info.kind == SnapshotKind::Adapter;
        let kind = if adapter { ModelKind::HfPeftAddon } else { ModelKind::HfBaseModel };
        let folder = ObjectKey::new(format!("{MODELS}/{}", promote.model))?;
        let account = promote.account.as_ref().map_or("local", JobId::as_str);
        let name = format!("accounts/{account}/models/{}", promote.model);
        let model = PromotedModel::new(name, kind, folder.to_string(), self.checkpoint_info(&info));
        let key = folder.join(RECORD)?;
        // Before anything is changed.
        if let Some((found, _)) = self.record(&key).await? {
            same_source(&found.model, &model)?;
            if found.ready {
                return Ok(found.model);
            }
        }
        let pin = format!("model-{}-{}", promote.model, info.seq);
        self.pin(&info, &pin, &format!("promoted to {}", model.name)).await?;
        let record = Record { version: VERSION, ready: false, model, promoted_ms: now_ms() };
        match self.claim(&key, &record).await {
            Ok(()) => {}
            Err(error) => {
                if error.kind() == ErrorKind::AlreadyExists {
                    self.unpin(&pin).await?;
                }
                return Err(error);
            }
        }
        let mut tally = Tally { done: 0, all: 0, progress: promote.progress.clone() };
        if info.codec.is_none() {
            self.copy_files(&info, &folder, &mut tally).await?;
        } else {
            self.write_model(&info, &folder, &mut tally).await?;
        }
        self.settle(&key, record).await
    }

    /// Every model that is ready, by name.
    ///
    /// # Errors
    /// `Corrupt` for a damaged record; what the store answers.
    pub async fn models(&self) -> Result<Vec<PromotedModel>> {
        let mut found = Vec::new();
        for object in self.ops.list(&ObjectKey::new(MODELS)?).await? {
            let is_record = object.key.as_str().split('/').nth(2) == Some(RECORD);
            if is_record
                && let Some((record, _)) = self.record(&object.key).await?.filter(|(record, _)| record.ready)
            {
                found.push(record.model);
            }
        }
        found.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(found)
    }

    /// A model of the registry, in memory, every byte checked against what was promoted.
    ///
    /// # Errors
    /// `NotFound`, naming the models that there are; `Corrupt` for damage; what the store answers.
    pub async fn load_model(&self, id: &ModelId) -> Result<LoadedModel> {
        let folder = ObjectKey::new(format!("{MODELS}/{id}"))?;
        let found = self.record(&folder.join(RECORD)?).await?.filter(|(record, _)| record.ready);
        let Some((Record { model, .. }, _)) = found else {
            let ready = self.models().await?;
            let known: Vec<_> = ready.iter().map(|model| model.name.as_str()).collect();
            let missing = Error::not_found(format!("the store has no model `{id}`"));
            return Err(missing.with_help(match known.is_empty() {
                true => "promote a checkpoint first: the store has no model".to_owned(),
                false => format!("use one of {}", known.join(", ")),
            }));
        };
        let (mut files, mut others) = (Vec::new(), Vec::new());
        for object in self.ops.list(&folder).await? {
            let body = self.ops.get(&object.key, None).await?;
            let path = object.key.as_str().trim_start_matches(folder.as_str()).trim_start_matches('/');
            match path.ends_with(".safetensors") {
                true => files.push(body),
                false => others.push((path.to_owned(), body)),
            }
        }
        let read = SafetensorsFiles::open(files).and_then(|files| Weights::read_all(&files));
        let weights = read.map_err(|error| error.context(&folder))?;
        if weights.content_digest() != model.source.id.digest {
            return Err(Error::corrupt(format!("the weights in `{folder}` are not {}", model.source.id))
                .with_help("delete the model's folder, and promote again"));
        }
        Ok(LoadedModel { model, weights, files: others })
    }

    /// What is to be promoted, if it can be.
    async fn promotable(&self, checkpoint: &str, materialise: bool) -> Result<SnapshotInfo> {
        let info = match self.find(checkpoint, Wanted::Sampler).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let state = self.find(checkpoint, Wanted::State).await.map_err(|_| error)?;
                return Err(Error::invalid(format!(
                    "{} is a train state: it can be resumed from, never promoted",
                    state.id
                ))
                .with_help("promote a sampler checkpoint of type base"));
            }
            found => found?,
        };
        if info.kind.is_promotable() || materialise {
            return Ok(info);
        }
        let base = self.manifest(&info).await?.base;
        let help = match base {
            Some(base) => {
                format!("promote its base {}, or have its full weights written with `--materialise`", base.id)
            }
            None => "have its full weights written with `--materialise`".to_owned(),
        };
        Err(Error::invalid(format!("{} is a {}: only full weights can be promoted", info.id, info.kind))
            .with_help(help))
    }

    async fn record(&self, key: &ObjectKey) -> Result<Option<(Record, Version)>> {
        let found = match self.ops.head(key).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            found => found?,
        };
        if found.size > MAX_RECORD {
            return Err(Error::corrupt(format!(
                "`{key}`: {} bytes, at most {MAX_RECORD} are read",
                found.size
            )));
        }
        let record = Record::parse(&self.ops.get(key, None).await?).map_err(|error| error.context(key))?;
        Ok(Some((record, found.version)))
    }

    /// Takes the id, or finds that the same source has it.
    async fn claim(&self, key: &ObjectKey, record: &Record) -> Result<()> {
        match self.ops.create(key, &record.to_bytes()?).await {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => match self.record(key).await? {
                Some((found, _)) => same_source(&found.model, &record.model),
                None => Err(error),
            },
            outcome => outcome,
        }
    }

    /// Says that all files are there.
    async fn settle(&self, key: &ObjectKey, mut record: Record) -> Result<PromotedModel> {
        record.ready = true;
        let body = record.to_bytes()?;
        let mut budget = Budget::new(self.ops.deadline());
        loop {
            let Some((found, version)) = self.record(key).await? else {
                return Err(Error::conflict(format!("`{key}` was deleted while the model was written"))
                    .with_help("promote again"));
            };
            same_source(&found.model, &record.model)?;
            if found.ready {
                return Ok(found.model);
            }
            match self.ops.put(key, body.clone(), PutMode::Update(version)).await {
                Ok(_) => return Ok(record.model),
                Err(error) if may_have_landed(&error) => budget.pause(error).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// The files of a plain snapshot, as they are.
    async fn copy_files(&self, info: &SnapshotInfo, folder: &ObjectKey, tally: &mut Tally) -> Result<()> {
        let mut files = self.manifest(info).await?.files;
        files.sort_by_key(|entry| (!entry.weights, FIRST_READ.contains(&entry.path.as_str())));
        tally.all = files.iter().map(|entry| entry.bytes).sum();
        for entry in files {
            self.copy_file(info, &entry, folder, tally).await?;
        }
        Ok(())
    }

    async fn copy_file(
        &self,
        info: &SnapshotInfo,
        entry: &FileEntry,
        folder: &ObjectKey,
        tally: &mut Tally,
    ) -> Result<()> {
        let from = self.file_key(info, entry)?;
        let mut file = ModelFile::create(self, folder.join(&entry.path)?).await?;
        let mut hasher = BlockHasher::default();
        for start in (0..entry.bytes).step_by(usize::try_from(PIECE).unwrap_or(usize::MAX)) {
            let range = start..entry.bytes.min(start + PIECE);
            let piece = self.ops.get(&from, Some(range.clone())).await.map_err(|error| lost(error, info))?;
            if piece.len() as u64 != range.end - range.start {
                return Err(Error::corrupt(format!(
                    "`{from}`: wanted bytes {range:?}, found {} of them",
                    piece.len()
                )));
            }
            hasher.update(&piece);
            file.write(self, piece, tally).await?;
        }
        if TensorDigest::of_blocks(hasher.finish()) != entry.digest {
            file.abort(self).await?;
            return Err(Error::corrupt(format!("`{from}` does not match its digest"))
                .with_help("promote another snapshot, or copy the file back"));
        }
        file.finish(self).await
    }

    /// The full weights of an encoded snapshot as plain files, tensor by tensor, and what was passed through with it.
    async fn write_model(&self, info: &SnapshotInfo, folder: &ObjectKey, tally: &mut Tally) -> Result<()> {
        let chain = self.open_chain(info).await?;
        let metas = chain.last().map(|link| link.metas.clone()).unwrap_or_default();
        tally.all = metas.iter().map(|meta| meta.byte_len() as u64).sum();
        let total = tally.all;
        let shards = plain_files(info.kind, &metas, self.shard_bytes);
        for (name, run) in &shards {
            let held = metas.get(run.clone()).unwrap_or_default();
            let order = layout(held);
            let sorted: Vec<TensorMeta> = order.iter().filter_map(|&at| held.get(at).cloned()).collect();
            let mut file = ModelFile::create(self, folder.join(name)?).await?;
            file.put(self, Header::encode(&sorted, &plain_metadata())?.into()).await?;
            for at in order {
                let (_, data) = self.restore_tensor(&chain, run.start + at).await?;
                file.write(self, data, tally).await?;
            }
            file.finish(self).await?;
        }
        let places = shards.iter().flat_map(|(name, run)| {
            metas.get(run.clone()).unwrap_or_default().iter().map(|meta| (meta.name(), name.as_str()))
        });
        self.small_file(folder, INDEX, index_json(total, places)?).await?;
        for (path, body) in self.passed_through(&chain).await? {
            self.small_file(folder, &path, body).await?;
        }
        Ok(())
    }

    async fn small_file(&self, folder: &ObjectKey, path: &str, body: Bytes) -> Result<()> {
        let mut file = ModelFile::create(self, folder.join(path)?).await?;
        file.put(self, body).await?;
        file.finish(self).await
    }

    /// The files that were passed through with the last snapshot of a chain, or the nearest below it that has any:
    /// the configuration is the last.
    pub(super) async fn passed_through(&self, chain: &[Link]) -> Result<Vec<(String, Bytes)>> {
        let mut files = Vec::new();
        for link in chain.iter().rev() {
            for entry in link.manifest.files.iter().filter(|entry| !entry.weights && entry.path != INDEX) {
                files.push((entry.path.clone(), self.file(&link.info, &entry.path).await?));
            }
            if !files.is_empty() {
                break;
            }
        }
        files.sort_by_key(|(path, _)| FIRST_READ.contains(&path.as_str()));
        Ok(files)
    }

    /// What a catalog knows of `info`.
    pub(super) fn checkpoint_info(&self, info: &SnapshotInfo) -> CheckpointInfo {
        let path = format!("{}/{}", self.job, info.dir);
        CheckpointInfo::new(
            self.job.clone(),
            info.name.clone(),
            info.id.clone(),
            info.kind,
            path,
            info.created_ms,
        )
        .with_step(info.step)
        .with_bytes(info.stored_bytes)
        .with_expiry(info.expires_ms, info.is_expired(now_ms()))
        .with_parent(info.parent.clone())
        .with_codec(info.codec.clone())
    }
}

/// Whether `wanted` is the model that is there.
fn same_source(found: &PromotedModel, wanted: &PromotedModel) -> Result<()> {
    let source = |model: &PromotedModel| (model.source.job.clone(), model.source.id.clone());
    if source(found) == source(wanted) && found.name == wanted.name {
        return Ok(());
    }
    Err(Error::already_exists(format!(
        "{} is there already, from {} of job {}",
        found.name, found.source.id, found.source.job
    ))
    .with_help("choose another output model id, or delete that model's folder"))
}

/// What is written, and who is told of it.
struct Tally {
    done: u64,
    all: u64,
    progress: Option<Arc<dyn Fn(u64, u64) + Send + Sync>>,
}

/// A file of a model on its way to the store.
struct ModelFile {
    key: ObjectKey,
    writer: Box<dyn ObjectWriter>,
    bytes: u64,
}

impl ModelFile {
    async fn create(repo: &SnapshotRepo, key: ObjectKey) -> Result<Self> {
        let writer = repo.ops.writer(&key).await?;
        Ok(Self { key, writer, bytes: 0 })
    }

    async fn put(&mut self, repo: &SnapshotRepo, data: Bytes) -> Result<()> {
        self.bytes += data.len() as u64;
        repo.ops.within(&self.key, self.writer.write(data)).await
    }

    async fn write(&mut self, repo: &SnapshotRepo, data: Bytes, tally: &mut Tally) -> Result<()> {
        tally.done += data.len() as u64;
        self.put(repo, data).await?;
        if let Some(progress) = &tally.progress {
            progress(tally.done, tally.all);
        }
        Ok(())
    }

    async fn finish(self, repo: &SnapshotRepo) -> Result<()> {
        finish_file(&repo.ops, &self.key, self.writer, self.bytes).await
    }

    async fn abort(self, repo: &SnapshotRepo) -> Result<()> {
        repo.ops.within(&self.key, self.writer.abort()).await
    }
}
