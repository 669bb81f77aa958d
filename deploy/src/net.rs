//! HTTP under the manager: a client without global state, bounded answers, retries with a budget, errors as kinds.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Method, Response, StatusCode, Url};
use rustls::ClientConfig;
use rustls_platform_verifier::BuilderVerifierExt;
use tokio::time::{Instant, sleep};
use towline_core::{Error, ErrorKind, Result};

use crate::{random, wire};

/// The largest answer that is read.
const MAX_BODY: usize = 16 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Retries of one question: so many, and none after the request's own time is used up.
const MAX_RETRIES: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(100);

/// A request, to be sent as often as needed.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) url: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Vec<u8>>,
    /// Whether sending it twice is as good as once.
    pub(crate) retry: Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// After any fault that may pass.
    Any,
    /// Only where the server says that it did nothing and when to come again.
    WhenTold,
    Never,
}

/// What came back, of any status.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Vec<u8>,
    retry_after: Option<Duration>,
}

/// The HTTP client that this crate itself uses: rustls with every certificate verified, no redirects, no proxy to
/// this machine. `timeout` bounds each request.
///
/// # Errors
/// `Invalid` for a URL that is none; `Unavailable` if there are no root certificates for https.
pub fn http_client(base: &str, timeout: Duration) -> Result<Client> {
    build(&base_url(base)?, Some(timeout))
}

/// A client for this URL that follows no redirects, since they would carry the key along, and verifies every
/// certificate by the operating system's roots.
pub(crate) fn client(base: &Url) -> Result<Client> {
    build(base, None)
}

fn build(base: &Url, timeout: Option<Duration>) -> Result<Client> {
    let failed = |error: rustls::Error| {
        Error::new(ErrorKind::Unavailable, "cannot set up TLS")
            .with_help("install the operating system's root certificates (ca-certificates)")
            .with_source(error)
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(failed)?;
    let tls = if base.scheme() == "https" {
        builder.with_platform_verifier().map_err(failed)?
    } else {
        // Never used. It trusts nobody, so a machine without root certificates can still talk to itself.
        builder.with_root_certificates(rustls::RootCertStore::empty())
    };
    let mut client = Client::builder()
        .tls_backend_preconfigured(tls.with_no_client_auth())
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT);
    if is_loopback(base) {
        client = client.no_proxy();
    }
    if let Some(timeout) = timeout {
        client = client.timeout(timeout);
    }
    client.build().map_err(|error| Error::internal("cannot set up HTTP").with_source(error))
}

/// Parses a base URL: http or https, a host, no credentials, query or fragment.
pub(crate) fn base_url(text: &str) -> Result<Url> {
    let bad = |why: &str| {
        Err(Error::invalid(format!("the deployment's URL is not usable: {why}"))
            .with_help("pass something like https://host or http://127.0.0.1:8000"))
    };
    let Ok(url) = Url::parse(text) else { return bad("it does not parse") };
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return bad("wanted http or https and a host");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return bad("it holds credentials; pass them as an API key");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return bad("it has a query or a fragment");
    }
    Ok(url)
}

/// Whether the URL's host is this machine by its very name.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Sends `call`, again where it may be, all within `limit`.
pub(crate) async fn send(client: &Client, call: &Call, limit: Duration) -> Result<Answer> {
    let deadline = crate::load::deadline(limit);
    let mut backoff = FIRST_BACKOFF;
    for retry in 0.. {
        let left = deadline.saturating_duration_since(Instant::now());
        let result = once(client, call, left).await;
        let told = match &result {
            Ok(answer) if busy(answer.status) => answer.retry_after,
            Ok(answer) if call.retry == Retry::Any && answer.status.is_server_error() => None,
            Err(error) if call.retry == Retry::Any && error.is_retryable() => None,
            Ok(_) | Err(_) => return result,
        };
        let wait = match (call.retry, told) {
            (Retry::Any | Retry::WhenTold, Some(told)) => told,
            (Retry::Any, None) => jittered(backoff),
            (Retry::WhenTold, None) | (Retry::Never, _) => return result,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if retry >= MAX_RETRIES || wait >= left {
            return result;
        }
        sleep(wait).await;
        backoff = backoff.saturating_mul(2);
    }
    Err(Error::internal("a retry loop ended"))
}

/// The error that an answer stands for. The body's code counts if it is one of ours; the status does otherwise.
pub(crate) fn error(answer: &Answer, what: &str) -> Error {
    let detail = serde_json::from_slice::<wire::ErrorBody>(&answer.body).ok().map(|body| body.error);
    let coded = detail.as_ref().and_then(|detail| wire::kind(&detail.code));
    let kind = match (coded, answer.status.as_u16()) {
        // What went wrong in there may be over the next time, and nobody here can report it.
        (Some(kind), _) if kind != ErrorKind::Internal => kind,
        (_, 401 | 403) => ErrorKind::Denied,
        (_, 404) => ErrorKind::NotFound,
        (_, 409) => ErrorKind::Conflict,
        (_, 410) => ErrorKind::Gone,
        (_, 412) => ErrorKind::ChainMismatch,
        (_, 405 | 501) => ErrorKind::Unsupported,
        (_, 408 | 425 | 429 | 500..) => ErrorKind::Unavailable,
        _ => ErrorKind::Invalid,
    };
    let message = match &detail {
        Some(detail) if !detail.message.is_empty() => shown(&detail.message),
        Some(_) | None => shown(&String::from_utf8_lossy(&answer.body)),
    };
    let error =
        Error::new(kind, format!("{what}: the server answered {}: {message}", answer.status.as_u16()));
    match detail.and_then(|detail| detail.help) {
        Some(help) => error.with_help(shown(&help)),
        None if answer.status.is_redirection() => error.with_help("use the URL that it redirects to"),
        None if kind == ErrorKind::Denied => error.with_help("check the API key and what it may do"),
        None => error,
    }
}

async fn once(client: &Client, call: &Call, limit: Duration) -> Result<Answer> {
    let mut request =
        client.request(call.method.clone(), &call.url).headers(call.headers.clone()).timeout(limit);
    if let Some(body) = &call.body {
        request = request.header("content-type", "application/json").body(body.clone());
    }
    let mut response = request.send().await.map_err(transport)?;
    let (status, retry_after) = (response.status(), retry_after(&response));
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(transport)? {
        if body.len().saturating_add(chunk.len()) > MAX_BODY {
            return Err(Error::unsupported(format!("the server's answer is longer than {MAX_BODY} bytes"))
                .with_help("check that the URL is that of a server with the hot-load API"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { status, body, retry_after })
}

fn transport(error: reqwest::Error) -> Error {
    // The URL is the caller's own; sources repeat it.
    let error = error.without_url();
    if error.is_builder() {
        return Error::invalid("the request cannot be built").with_source(error);
    }
    if error.is_timeout() {
        return Error::timed_out("the server did not answer in time")
            .with_help("check that it runs, or allow more time")
            .with_source(error);
    }
    Error::unavailable("the server cannot be reached, or broke off")
        .with_help("check that it runs and that the URL is right")
        .with_source(error)
}

/// `Retry-After` in seconds. Its other form, a date, needs a clock that agrees with the server's.
fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    Some(Duration::from_secs(text.trim().parse().ok()?))
}

fn busy(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

/// Half of `backoff`, and a random part of the other half.
fn jittered(backoff: Duration) -> Duration {
    let half = backoff / 2;
    let share = u32::try_from(random::bits() % 1024).unwrap_or(0);
    half + half * share / 1024
}

/// A header's value, hidden from logs if it is a secret.
pub(crate) fn header(text: &str, secret: bool, what: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_| Error::invalid(format!("{what} holds characters that no header takes")))?;
    value.set_sensitive(secret);
    Ok(value)
}

/// A server's text for a message: escaped and cut.
fn shown(text: &str) -> String {
    const MAX: usize = 400;
    let text = text.trim();
    let mut cut: String = text.chars().take(MAX).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    cut.escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for (url, expected) in [
            ("http://127.0.0.1:1", true),
            ("http://127.9.9.9", true),
            ("http://[::1]:80", true),
            ("http://localhost", true),
            ("http://localhost.example.com", false),
            ("http://127.0.0.1.example.com", false),
            ("http://10.0.0.1", false),
            ("http://[::2]", false),
            ("http://example.com", false),
        ] {
            assert_eq!(is_loopback(&base_url(url).unwrap()), expected, "{url}");
        }
    }

    #[test]
    fn urls_that_cannot_be_used() {
        for bad in ["", "host", "ftp://host", "http://", "http://u:p@host", "http://host?a", "http://host/#b"]
        {
            assert_eq!(base_url(bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
        assert!(!base_url("https://user:secret@host").unwrap_err().report().contains("secret"));
    }

    #[test]
    fn answers_become_kinds() {
        let answer = |status: u16, body: &str| Answer {
            status: StatusCode::from_u16(status).unwrap(),
            body: body.into(),
            retry_after: None,
        };
        let ours = |code: &str| format!(r#"{{"error":{{"code":"{code}","message":"m","help":"h"}}}}"#);
        for (status, body, kind) in [
            (401, String::new(), ErrorKind::Denied),
            (403, String::new(), ErrorKind::Denied),
            (404, "<html>".into(), ErrorKind::NotFound),
            (409, String::new(), ErrorKind::Conflict),
            (409, ours("chain_mismatch"), ErrorKind::ChainMismatch),
            (412, String::new(), ErrorKind::ChainMismatch),
            (412, ours("conflict"), ErrorKind::Conflict),
            (422, ours("corrupt"), ErrorKind::Corrupt),
            (400, ours("unsupported"), ErrorKind::Unsupported),
            (400, String::new(), ErrorKind::Invalid),
            (429, String::new(), ErrorKind::Unavailable),
            (500, ours("internal"), ErrorKind::Unavailable),
            (503, String::new(), ErrorKind::Unavailable),
            (302, String::new(), ErrorKind::Invalid),
        ] {
            assert_eq!(error(&answer(status, &body), "order").kind(), kind, "{status} {body}");
        }
        let error = error(&answer(409, &ours("chain_mismatch")), "order");
        assert_eq!((error.message(), error.help()), ("order: the server answered 409: m", Some("h")));
    }

    #[test]
    fn jitter_stays_in_its_half() {
        for _ in 0..100 {
            let wait = jittered(Duration::from_millis(100));
            assert!((50..=100).contains(&wait.as_millis()));
        }
    }
}
