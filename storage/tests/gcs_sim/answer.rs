//! What goes back: replies, refusals, and what a fault makes of them.

use std::fmt::Display;
use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use futures_util::stream::{self, BoxStream, StreamExt as _};

use super::fault::Fault;

pub type Outcome = Result<Reply, Refusal>;

/// A reply with its whole body.
#[derive(Debug, Default)]
pub struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    pub fn new(status: StatusCode) -> Self {
        Self { status, ..Self::default() }
    }

    pub fn xml(body: String) -> Self {
        let body = format!("<?xml version='1.0' encoding='UTF-8'?>{body}");
        Self::new(StatusCode::OK).header(CONTENT_TYPE, "application/xml; charset=UTF-8").body(body.into())
    }

    pub fn unavailable(retry_after: u64) -> Self {
        let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", "try again later");
        Self::from(refusal).header(RETRY_AFTER, retry_after)
    }

    pub fn header(mut self, name: impl Into<HeaderName>, value: impl Display) -> Self {
        self.headers.insert(name.into(), HeaderValue::from_str(&value.to_string()).unwrap());
        self
    }

    pub fn headers(mut self, more: &HeaderMap) -> Self {
        self.headers.extend(more.clone());
        self
    }

    pub fn body(self, body: Bytes) -> Self {
        Self { body, ..self }
    }

    pub fn with_fault(self, fault: Option<&Fault>) -> Response {
        let Self { status, mut headers, mut body } = self;
        if let Some(Fault::ShortBody { after }) = fault {
            body.truncate(*after);
        }
        // The reply to HEAD says a length that is not its own.
        headers.entry(CONTENT_LENGTH).or_insert_with(|| body.len().into());
        let body = match fault {
            Some(Fault::SlowBody { piece, pause }) => Body::from_stream(slowly(body, *piece, *pause)),
            Some(Fault::TruncatedBody { after }) if *after < body.len() => {
                Body::from_stream(truncated(body.slice(..*after)))
            }
            _ => Body::from(body),
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

fn slowly(body: Bytes, piece: usize, pause: Duration) -> BoxStream<'static, io::Result<Bytes>> {
    let pieces = stream::unfold(body, move |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        tokio::time::sleep(pause).await;
        let piece = rest.split_to(piece.min(rest.len()));
        Some((Ok(piece), rest))
    });
    pieces.boxed()
}

/// `body`, and then the connection is cut, after the bytes had the time to leave.
fn truncated(body: Bytes) -> BoxStream<'static, io::Result<Bytes>> {
    let end = stream::once(async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        Err(io::Error::new(io::ErrorKind::BrokenPipe, "cut by the test"))
    });
    stream::iter((!body.is_empty()).then_some(Ok(body))).chain(end).boxed()
}

/// A reply that says no.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    pub fn invalid(what: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidArgument", format!("invalid argument: {what}"))
    }

    pub fn no_bucket(name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NoSuchBucket", format!("the bucket `{name}` does not exist"))
    }

    pub fn no_key(key: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NoSuchKey", format!("the key `{key}` does not exist"))
    }

    pub fn no_upload(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NoSuchUpload", format!("the upload `{id}` does not exist"))
    }

    pub fn precondition() -> Self {
        let message = "at least one of the conditions you specified did not hold";
        Self::new(StatusCode::PRECONDITION_FAILED, "PreconditionFailed", message)
    }

    pub fn not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", "not of this stand-in")
    }
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        let (code, message) = (refusal.code, escape(&refusal.message));
        let mut reply = Self::xml(format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>"));
        reply.status = refusal.status;
        reply
    }
}

/// `text` as it stands in XML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// What [`escape`] was given.
pub fn unescape(text: &str) -> String {
    text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&")
}
