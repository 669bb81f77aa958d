//! The public hot-load API: its JSON and headers. Nothing else in this crate knows them.
//!
//! `POST` and `GET /hot_load/v1/models/hot_load`. Public servers refuse body fields that they do not know, so our
//! extras travel in headers on the way in; on the way out they stand in the field `towline` of each replica.

use serde::{Deserialize, Serialize};
use towline_core::{Error, ErrorKind, Result, Stage};

/// The path of the hot-load API.
pub const HOT_LOAD_PATH: &str = "/hot_load/v1/models/hot_load";
/// The path of completions behind the public gateway, where the warm-up goes first.
pub const INFERENCE_PATH: &str = "/inference/v1/completions";
/// The path of completions on a server itself.
pub const COMPLETIONS_PATH: &str = "/v1/completions";

/// Header: which model the order is for.
pub const MODEL_HEADER: &str = "fireworks-model";
/// Header: which deployment the order is for.
pub const DEPLOYMENT_HEADER: &str = "fireworks-deployment";
/// Header: where the deployment fetches snapshots.
pub const SOURCE_URL_HEADER: &str = "x-fireworks-hot-load-source-url";
/// Header: the operation's id; the same operation again changes nothing.
pub const OPERATION_HEADER: &str = "x-towline-operation";
/// Header: the digest of the snapshot's manifest.
pub const MANIFEST_HEADER: &str = "x-towline-manifest";
/// Header: the content digest of the weights that will be served.
pub const DIGEST_HEADER: &str = "x-towline-digest";

/// The body of an order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "a public wire format, built by clients and servers")]
pub struct HotLoadRequest {
    /// What to load.
    pub identity: String,
    /// Whether cached prompts are dropped; the server's choice if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reset_prompt_cache: Option<bool>,
    /// Present for a delta; without it the snapshot is taken as full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incremental_snapshot_metadata: Option<IncrementalMetadata>,
}

/// What a delta is applied to, and how it is encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "a public wire format, built by clients and servers")]
pub struct IncrementalMetadata {
    /// What must be served now.
    pub previous_snapshot_identity: String,
    /// The delta's codec.
    pub compression_format: String,
    /// `alder32`, as the public API spells it.
    #[serde(default = "checksum_format")]
    pub checksum_format: String,
}

impl IncrementalMetadata {
    /// A delta on `previous` in `codec`.
    pub fn new(previous: impl Into<String>, codec: impl Into<String>) -> Self {
        Self {
            previous_snapshot_identity: previous.into(),
            compression_format: codec.into(),
            checksum_format: checksum_format(),
        }
    }
}

/// The answer about the state. Unknown fields are passed over.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "a public wire format, built by clients and servers")]
pub struct StatusResponse {
    /// Every replica. An answer without this list is an error.
    pub replicas: Vec<ReplicaEntry>,
}

impl StatusResponse {
    /// Reads an answer.
    ///
    /// # Errors
    /// `Unsupported` if it has no list of replicas: whoever answers does not speak this API.
    pub fn parse(body: &[u8]) -> Result<Self> {
        serde_json::from_slice(body).map_err(|error| {
            Error::unsupported("the server's answer has no list of replicas")
                .with_help("check that the URL is that of a server with the hot-load API")
                .with_source(error)
        })
    }
}

/// One replica.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ReplicaEntry {
    /// What it serves.
    #[serde(default)]
    pub current_snapshot_identity: Option<String>,
    /// Whether it takes hot-loads and, once it serves something, answers requests. A server that waits for its
    /// first snapshot is ready.
    #[serde(default)]
    pub readiness: bool,
    /// Where it is with a hot-load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading_state: Option<LoadingState>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Adapters that it serves beside the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loaded_adapters: Option<Vec<LoadedAdapter>>,
    /// What our own servers tell besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub towline: Option<TowlineExtra>,
}

/// Where a replica is with a hot-load.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "a public wire format, built by clients and servers")]
pub struct LoadingState {
    /// `idle`, `load`, `swap` or `error`; see [`stage`] for anything else.
    #[serde(default)]
    pub stage: String,
    /// What the stage is about.
    #[serde(default)]
    pub target_snapshot_identity: Option<String>,
    /// Why the last load failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An adapter on a replica.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LoadedAdapter {
    /// The adapter's snapshot.
    #[serde(default)]
    pub identity: String,
    /// `loaded` once it is served.
    #[serde(default)]
    pub status: String,
}

impl LoadedAdapter {
    /// An adapter that is served.
    pub fn loaded(identity: impl Into<String>) -> Self {
        Self { identity: identity.into(), status: "loaded".into() }
    }
}

/// What our own servers tell of a replica besides.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TowlineExtra {
    /// The content digest of what it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_digest: Option<String>,
    /// The last operation that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// The model that it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// How long requests had to wait for the last swap, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// How long the last load took, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_ms: Option<f64>,
    /// How much of that was checking, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_ms: Option<f64>,
}

/// The body of a warm-up request: tokens in, so that no tokenizer is needed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WarmUpRequest {
    /// The model, if one is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Tokens 1 and 2.
    pub prompt: Vec<u32>,
    /// 4.
    pub max_tokens: u32,
    /// 0.
    pub temperature: u32,
}

impl WarmUpRequest {
    /// The public client's request.
    #[must_use]
    pub fn new(model: Option<String>) -> Self {
        Self { model, prompt: vec![1, 2], max_tokens: 4, temperature: 0 }
    }
}

/// The body of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "a wire format, built by clients and servers")]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "a wire format, built by clients and servers")]
pub struct ErrorDetail {
    /// [`ErrorKind::as_str`]; other servers have codes of their own.
    #[serde(default)]
    pub code: String,
    /// What was wanted and found.
    #[serde(default)]
    pub message: String,
    /// The next step.
    #[serde(default)]
    pub help: Option<String>,
}

impl From<&Error> for ErrorBody {
    fn from(error: &Error) -> Self {
        Self {
            error: ErrorDetail {
                code: error.kind().as_str().into(),
                message: error.message().into(),
                help: error.help().map(Into::into),
            },
        }
    }
}

/// The stage of a replica. Unknown words are a load, unless the replica is ready.
#[must_use]
pub fn stage(text: &str, ready: bool) -> Stage {
    match text {
        "idle" | "" => Stage::Idle,
        "load" => Stage::Load,
        "swap" => Stage::Swap,
        "error" => Stage::Error,
        _ if ready => Stage::Idle,
        _ => Stage::Load,
    }
}

/// The kind that a code names, if it is one of ours.
#[must_use]
pub fn kind(code: &str) -> Option<ErrorKind> {
    use ErrorKind::{
        AlreadyExists, ChainMismatch, Conflict, Corrupt, Denied, Fenced, Gone, Internal, Invalid, NotFound,
        TimedOut, Unavailable, Unsupported,
    };
    let all = [
        AlreadyExists,
        ChainMismatch,
        Conflict,
        Corrupt,
        Denied,
        Fenced,
        Gone,
        Invalid,
        NotFound,
        Unavailable,
        Unsupported,
        TimedOut,
        Internal,
    ];
    all.into_iter().find(|kind| kind.as_str() == code)
}

fn checksum_format() -> String {
    "alder32".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_has_the_public_form() {
        let mut request = HotLoadRequest { identity: "step-1-00ab12cd".into(), ..HotLoadRequest::default() };
        assert_eq!(serde_json::to_string(&request).unwrap(), r#"{"identity":"step-1-00ab12cd"}"#);
        request.reset_prompt_cache = Some(true);
        request.incremental_snapshot_metadata = Some(IncrementalMetadata::new("step-0-00ab12cd", "arc_v2"));
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(
            text,
            r#"{"identity":"step-1-00ab12cd","reset_prompt_cache":true,"incremental_snapshot_metadata":{"previous_snapshot_identity":"step-0-00ab12cd","compression_format":"arc_v2","checksum_format":"alder32"}}"#
        );
        assert_eq!(serde_json::from_str::<HotLoadRequest>(&text).unwrap(), request);
        assert!(serde_json::from_str::<HotLoadRequest>(r#"{"identity":"a","operation":"b"}"#).is_err());
    }

    #[test]
    fn the_state_of_public_servers_is_read() {
        let text = r#"{"replicas":[{"current_snapshot_identity":"a","readiness":true,"zone":"x",
            "loading_state":{"stage":"done","target_snapshot_identity":"a"},
            "loaded_adapters":[{"identity":"b","status":"loaded","slot":1}]}],"more":1}"#;
        let status: StatusResponse = serde_json::from_str(text).unwrap();
        let replica = &status.replicas[0];
        assert_eq!(stage(&replica.loading_state.as_ref().unwrap().stage, true), Stage::Idle);
        assert_eq!(stage("warming", false), Stage::Load);
        assert_eq!(replica.loaded_adapters.as_ref().unwrap()[0].identity, "b");
        assert!(StatusResponse::parse(b"{\"status\":\"ok\"}").is_err());
    }

    #[test]
    fn every_kind_has_its_code() {
        let error = Error::chain_mismatch("a").with_help("b");
        let body = ErrorBody::from(&error);
        assert_eq!(kind(&body.error.code), Some(ErrorKind::ChainMismatch));
        assert_eq!(body.error.help.as_deref(), Some("b"));
        assert_eq!(kind("timed_out"), Some(ErrorKind::TimedOut));
        assert_eq!(kind("rate_limit_exceeded"), None);
    }
}
