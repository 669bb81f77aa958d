//! What an order loads: from where its parts are read, and how they become what is served.

use std::sync::Arc;

use bytes::Bytes;
use towline_core::{ContentDigest, Error, Result, SnapshotId, SnapshotKind, Weights, same_tensors};
use towline_storage::{SnapshotInfo, SnapshotRepo};

use super::prefix::Salt;
use super::state::{Served, Shared};
use crate::adapter::{self, Adapter};
use crate::bridge;
use crate::engine::ModelConfig;

/// Full weights that are here already, or that are to be read.
pub(super) enum Full {
    Held(Arc<Served>),
    Stored(SnapshotRepo, SnapshotInfo),
}

/// Where the parts of what was ordered are.
pub(super) enum Source {
    /// A base, a merged base, or a delta on the base that is held.
    Full { repo: SnapshotRepo, info: SnapshotInfo, parent: Option<Arc<Served>> },
    /// An adapter, and what it is put on.
    Adapter { repo: SnapshotRepo, info: SnapshotInfo, config: Bytes, base: ContentDigest, on: Full },
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
    let served = shared.served();
    match (info.kind, served) {
        (SnapshotKind::Delta, None) => {
            Err(Error::chain_mismatch("nothing is served to apply a delta to").with_help("order a base"))
        }
        (SnapshotKind::Delta, parent) => Ok(Source::Full { repo, info, parent }),
        (SnapshotKind::Adapter, served) => {
            let config = repo.file(&info, adapter::CONFIG).await?;
            let base = adapter::base_of(&config).map_err(|error| error.context(&info.id))?;
            let on = match served {
                Some(served) if *served.base() == base => Full::Held(served),
                served => match stored(shared, &repo, &base).await? {
                    Some((repo, info)) => Full::Stored(repo, info),
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
            Ok(Source::Adapter { repo, info, config, base, on })
        }
        _ => Ok(Source::Full { repo, info, parent: None }),
    }
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

impl Source {
    /// Reads the parts.
    pub(super) async fn read(self) -> Result<Content> {
        match self {
            Self::Full { repo, info, parent } => {
                let weights = match parent {
                    Some(parent) => repo.apply(&info, parent.weights()).await?,
                    None => repo.restore(&info).await?,
                };
                let config = model_config(&repo, &info).await?;
                Ok(Content { digest: info.id.digest, id: info.id, config, weights, adapter: None })
            }
            Self::Adapter { repo, info, config, base, on } => {
                let adapter = Some((config, repo.restore(&info).await?));
                let (config, weights) = match on {
                    Full::Held(served) => (served.model().config().clone(), served.weights().clone()),
                    Full::Stored(repo, info) => {
                        (model_config(&repo, &info).await?, repo.restore(&info).await?)
                    }
                };
                Ok(Content { digest: base, id: info.id, config, weights, adapter })
            }
        }
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
    let config = repo.file(info, "config.json").await?;
    let text = std::str::from_utf8(&config).map_err(|_| Error::corrupt("config.json is no text"))?;
    Ok(ModelConfig::from_json(text)?)
}
