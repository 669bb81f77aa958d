//! What an order loads: from where its parts are read, and how they become what is served.

use std::sync::Arc;

use bytes::Bytes;
use towline_core::{
    ContentDigest, Error, JobId, ModelId, Result, SnapshotId, SnapshotKind, Weights, same_tensors,
};
use towline_storage::{LoadedModel, SnapshotInfo, SnapshotRepo};

use super::prefix::Salt;
use super::state::{Served, Shared};
use crate::adapter::{self, Adapter};
use crate::bridge;
use crate::engine::ModelConfig;

/// What was ordered, and where its parts are.
pub(super) struct Source {
    repo: SnapshotRepo,
    info: SnapshotInfo,
    parts: Parts,
}

enum Parts {
    /// A base or a merged base: nothing else is needed.
    Whole,
    /// A delta on the base that is held.
    Delta(Arc<Served>),
    /// An adapter: its configuration, and what it is put on.
    Adapter { config: Bytes, base: ContentDigest, on: Full },
}

/// Full weights that are here already, or that are to be read.
enum Full {
    Held(Arc<Served>),
    Stored(Box<(SnapshotRepo, SnapshotInfo)>),
}

/// The parts, read.
pub(super) struct Content {
    id: SnapshotId,
    config: ModelConfig,
    weights: Weights,
    /// What `weights` must be.
    digest: ContentDigest,
    /// The adapter's configuration and factors.
    adapter: Option<(Bytes, Weights)>,
}

/// Where the parts of `info`, which was checked against the order, are.
///
/// # Errors
/// `ChainMismatch` for an adapter on base weights that are neither here nor in the store.
pub(super) async fn source(shared: &Shared, repo: SnapshotRepo, info: SnapshotInfo) -> Result<Source> {
    let parts = match (info.kind, shared.served()) {
        (SnapshotKind::Delta, Some(parent)) => Parts::Delta(parent),
        (SnapshotKind::Delta, None) => {
            return Err(
                Error::chain_mismatch("nothing is served to apply a delta to").with_help("order a base")
            );
        }
        (SnapshotKind::Adapter, served) => {
            let config = repo.file(&info, adapter::CONFIG).await?;
            let base = adapter::base_of(&config).map_err(|error| error.context(&info.id))?;
            let on = match served {
                Some(served) if *served.base() == base => Full::Held(served),
                served => match stored(shared, &repo, &base).await? {
                    Some(found) => Full::Stored(Box::new(found)),
                    None => {
                        let held = served.map_or("nothing".to_owned(), |served| served.base().to_string());
                        return Err(Error::chain_mismatch(format!(
                            "{} is an adapter on base weights {base}; {held} is held here, and the store has no \
                             such weights",
                            info.id
                        ))
                        .with_help("hot-load the base first"));
                    }
                },
            };
            Parts::Adapter { config, base, on }
        }
        _ => Parts::Whole,
    };
    Ok(Source { repo, info, parts })
}

/// A snapshot of the full weights `digest`: of the job of `repo`, or of any other.
async fn stored(
    shared: &Shared,
    repo: &SnapshotRepo,
    digest: &ContentDigest,
) -> Result<Option<(SnapshotRepo, SnapshotInfo)>> {
    if let Some(info) = repo.find_digest(digest).await? {
        return Ok(Some((repo.clone(), info)));
    }
    for job in towline_storage::jobs(shared.store.as_ref()).await? {
        let repo = repo.of_job(job);
        if let Some(info) = repo.find_digest(digest).await? {
            return Ok(Some((repo, info)));
        }
    }
    Ok(None)
}

/// What the registry has as `id`, ready to be served: an adapter on its base, which a job of the store must have.
pub(super) async fn promoted(shared: &Shared, id: &ModelId) -> Result<Served> {
    // The registry is the store's: any job's repo reads it.
    let repo = SnapshotRepo::new(Arc::clone(&shared.store), JobId::new("server")?, towline_codec::all());
    let LoadedModel { model, weights, files, .. } = repo.load_model(id).await?;
    let file = |name: &str| files.iter().find(|(path, _)| path == name).map(|(_, body)| body.clone());
    let source = model.source.id;
    let content = if let Some(text) = file(adapter::CONFIG) {
        let base = adapter::base_of(&text).map_err(|error| error.context(id))?;
        let (repo, info) = stored(shared, &repo, &base).await?.ok_or_else(|| {
            Error::chain_mismatch(format!(
                "`{id}` is an adapter on base weights {base}, which the store does not have"
            ))
            .with_help("serve a merged base, or save the base to this store")
        })?;
        let (config, on) = (model_config(&repo, &info).await?, repo.restore(&info).await?);
        Content { id: source, config, weights: on, digest: base, adapter: Some((text, weights)) }
    } else {
        let text = file("config.json").ok_or_else(|| {
            Error::unsupported(format!("model `{id}` has no config.json"))
                .with_help("promote it from a snapshot with one")
        })?;
        let (config, digest) = (parse_config(&text)?, source.digest);
        Content { id: source, config, weights, digest, adapter: None }
    };
    let build = tokio::task::spawn_blocking(move || content.build(None));
    build.await.map_err(|error| Error::internal("the loader panicked").with_source(error))?
}

impl Source {
    /// Reads the parts.
    pub(super) async fn read(self) -> Result<Content> {
        let Self { repo, info, parts } = self;
        let (config, weights, digest, adapter) = match parts {
            Parts::Whole => {
                let config = model_config(&repo, &info).await?;
                (config, repo.restore(&info).await?, info.id.digest, None)
            }
            Parts::Delta(parent) => {
                let config = model_config(&repo, &info).await?;
                (config, repo.apply(&info, parent.weights()).await?, info.id.digest, None)
            }
            Parts::Adapter { config, base, on } => {
                let adapter = Some((config, repo.restore(&info).await?));
                let (config, weights) = match on {
                    Full::Held(served) => (served.model().config().clone(), served.weights().clone()),
                    Full::Stored(found) => {
                        let (repo, info) = *found;
                        (model_config(&repo, &info).await?, repo.restore(&info).await?)
                    }
                };
                (config, weights, base, adapter)
            }
        };
        Ok(Content { id: info.id, config, weights, digest, adapter })
    }
}

impl Content {
    /// Checks the parts and makes of them what is served after `served`. Takes time.
    pub(super) fn build(self, served: Option<&Served>) -> Result<Served> {
        let Self { id, config, weights, digest, adapter } = self;
        if let Some(served) = served {
            same_tensors(served.weights().tensors(), weights.tensors()).map_err(|error| {
                error.context("the snapshot is of another model than the one that is served")
            })?;
        }
        if weights.content_digest() != digest {
            return Err(Error::corrupt(format!("the loaded weights of {id} are not {digest}")));
        }
        let Some((text, factors)) = adapter else {
            let model = bridge::model(&config, &weights)?;
            return Ok(Served { id, weights, salt: Salt { weights: digest, adapter: None }, model });
        };
        if factors.content_digest() != id.digest {
            return Err(Error::corrupt(format!("the loaded adapter is not {id}")));
        }
        let adapter = Adapter::parse(&config, &text, factors).map_err(|error| error.context(&id))?;
        let model = bridge::adapted_model(&config, &weights, &adapter)?;
        let salt = Salt { weights: digest, adapter: Some((id.digest, adapter.lora.scale().to_bits())) };
        Ok(Served { id, weights, salt, model })
    }
}

async fn model_config(repo: &SnapshotRepo, info: &SnapshotInfo) -> Result<ModelConfig> {
    parse_config(&repo.file(info, "config.json").await?)
}

fn parse_config(bytes: &[u8]) -> Result<ModelConfig> {
    let text = std::str::from_utf8(bytes).map_err(|_| Error::corrupt("config.json is no text"))?;
    Ok(ModelConfig::from_json(text)?)
}
