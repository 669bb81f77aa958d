//! Errors as HTTP answers.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use towline_core::{Error, ErrorKind};

/// An error with the status that fits its kind, and a body that names kind, message and next step.
pub(super) fn refuse(error: &Error) -> Response {
    let status = match error.kind() {
        ErrorKind::Invalid | ErrorKind::Unsupported => StatusCode::BAD_REQUEST,
        ErrorKind::Denied => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::AlreadyExists | ErrorKind::Conflict | ErrorKind::Fenced => StatusCode::CONFLICT,
        ErrorKind::Gone => StatusCode::GONE,
        ErrorKind::ChainMismatch => StatusCode::PRECONDITION_FAILED,
        ErrorKind::Corrupt => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        ErrorKind::Internal | _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let body = json!({"error": {
        "code": error.kind().as_str(), "message": error.message(), "help": error.help(),
    }});
    (status, Json(body)).into_response()
}

/// A body as JSON of a known form.
pub(super) fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| {
        Error::invalid(format!("the body is not the JSON that this route takes: {error}"))
            .with_help("see the route's documentation for its fields")
    })
}
