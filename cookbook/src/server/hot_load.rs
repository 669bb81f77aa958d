//! The public hot-load API over the server's state.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use towline_core::{Error, Result, SnapshotIdentity, Stage};
use towline_deploy::wire::{
    DIGEST_HEADER, HotLoadRequest, LoadedAdapter, LoadingState, MANIFEST_HEADER, OPERATION_HEADER,
    ReplicaEntry, StatusResponse, TowlineExtra,
};

use super::answer;
use super::state::{Order, Shared};

pub(super) async fn order(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let accepted = match parse(&headers, &body) {
        Ok(order) => shared.accept(order).await,
        Err(error) => Err(error),
    };
    match accepted {
        Ok(()) => Json(json!({"status": "accepted"})).into_response(),
        Err(error) => answer::refuse(&error),
    }
}

pub(super) async fn status(State(shared): State<Arc<Shared>>) -> Json<StatusResponse> {
    let served = shared.served();
    let load = shared.load();
    let ms = |duration: Option<std::time::Duration>| duration.map(|duration| duration.as_secs_f64() * 1e3);
    let mut entry = ReplicaEntry::default();
    entry.name = Some("0".into());
    entry.current_snapshot_identity = served.as_ref().map(|served| served.id().identity.to_string());
    entry.readiness = shared.takes_hot_loads() && !matches!(load.stage, Stage::Load | Stage::Swap);
    entry.loading_state = Some(LoadingState {
        stage: match load.stage {
            Stage::Idle => "idle",
            Stage::Swap => "swap",
            Stage::Error => "error",
            Stage::Load | _ => "load",
        }
        .into(),
        target_snapshot_identity: load.target.as_ref().map(ToString::to_string),
        error: load.error.clone(),
    });
    entry.loaded_adapters = served.as_ref().map(|served| {
        served.adapter().into_iter().map(|id| LoadedAdapter::loaded(id.identity.as_str())).collect()
    });
    let mut extra = TowlineExtra::default();
    extra.content_digest = served.map(|served| served.id().digest.to_string());
    extra.operation = load.op.as_ref().map(ToString::to_string);
    extra.load_ms = ms(load.load);
    extra.verify_ms = ms(load.verify);
    extra.pause_us = load.pause.map(|pause| u64::try_from(pause.as_micros()).unwrap_or(u64::MAX));
    extra.model = Some(shared.options.model.clone());
    drop(load);
    entry.towline = Some(extra);
    Json(StatusResponse { replicas: vec![entry] })
}

fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Order> {
    let request: HotLoadRequest = answer::parse(body)?;
    let previous = match &request.incremental_snapshot_metadata {
        None => None,
        Some(metadata) => {
            towline_codec::by_id(&metadata.compression_format)?;
            Some(SnapshotIdentity::new(metadata.previous_snapshot_identity.as_str())?)
        }
    };
    Ok(Order {
        op: header(headers, OPERATION_HEADER)?,
        identity: SnapshotIdentity::new(request.identity)?,
        previous,
        reset_prompt_cache: request.reset_prompt_cache.unwrap_or(true),
        manifest: header(headers, MANIFEST_HEADER)?,
        digest: header(headers, DIGEST_HEADER)?,
    })
}

fn header<T: std::str::FromStr<Err = Error>>(headers: &HeaderMap, name: &str) -> Result<Option<T>> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = value.to_str().map_err(|_| Error::invalid(format!("header {name} is no text")))?;
    text.parse().map(Some).map_err(|error: Error| error.context(format_args!("header {name}")))
}
