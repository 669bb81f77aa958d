//! Types, rules and traits of Towline: snapshots of model weights, delta chains, codecs, stores, deployments,
//! training clients, and the conformance kits that check an implementation of them.
//!
//! No I/O, no runtime, no clock, no environment: other crates bring those.
//!
//! | you have | you implement | you check it with |
//! |---|---|---|
//! | a format for weights | [`Codec`] | `codec_conformance!` |
//! | a place for objects | [`SnapshotStore`] | `store_conformance!` |
//! | inference servers | [`Deployment`] | `deployment_conformance!` |
//! | a trainer | [`SnapshotExporter`], [`TrainingClient`] | – |
//!
//! The kits are behind the feature `testing`.

mod catalog;
mod chain;
mod codec;
mod deployment;
mod digest;
mod dtype;
mod error;
mod id;
mod manifest;
mod pending;
pub mod pipeline;
mod reference;
pub mod safetensors;
mod secret;
pub mod shard;
mod snapshot;
mod store;
mod tensor;
#[cfg(feature = "testing")]
pub mod testing;
mod training;

pub use async_trait::async_trait;
pub use bytes;
pub use futures_core::stream::BoxStream;

pub use catalog::{
    CheckpointCatalog, CheckpointClass, CheckpointInfo, CheckpointPage, ModelKind, PromotedModel,
};
pub use chain::{Chain, ChainSettings, LoadPlan, Reason, SavePlan};
pub use codec::{Codec, Framing, Mode, Modes, Unit, UnitMeta};
pub use deployment::{Capabilities, Deployment, DeploymentStatus, HotLoad, Outcome, ReplicaStatus, Stage};
pub use digest::{BlockHasher, ContentDigest, DIGEST_BLOCK, ManifestDigest, TensorDigest, block_digest};
pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
pub use id::{CodecId, JobId, MODELS, ModelId, OpId, SessionId, SnapshotIdentity, SnapshotName, WriteId};
pub use manifest::{
    BaseRef, FileEntry, MANIFEST_VERSION, MAX_MANIFEST, Manifest, ManifestHead, ParentRef, TensorEntry,
};
pub use pending::{Pending, PendingStatus, Resolver, pending};
pub use reference::{CheckpointRef, TinkerKind};
pub use secret::Secret;
pub use snapshot::{CheckpointType, SnapshotId, SnapshotKind, SnapshotRef};
pub use store::{
    Digested, ObjectInfo, ObjectKey, ObjectWriter, PutMode, SnapshotStore, Version, buffered_writer, listing,
};
pub use tensor::{TensorMeta, TensorSource, Weights, position, same_tensors};
pub use training::{
    AdamParams, AdapterSource, Batch, Datum, DeltaParents, ExportRequest, ForwardBackward, LOOP, Loss,
    OptimStep, SaveState, SaveWeights, SavedWeights, SnapshotExporter, StateRef, TrainingClient,
};
