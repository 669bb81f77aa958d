//! HTTP under the back ends: TLS that is always verified, no plain HTTP to others, one budget of retries.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use reqwest::{Client, StatusCode};
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls_platform_verifier::Verifier;
use towline_core::{Error, ErrorKind, Result, async_trait};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What failed exchanges of one store may spend, in quarters: a failure takes four, a success brings one back.
const BUDGET: u32 = 4 * 64;
/// The longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Makes every back end's client: one and the same.
///
/// The back ends retry each request a few times with random pauses. Beyond that all requests of a store share a
/// budget: where most of them fail, retries end and the failure shows, so that a store that is down is not stormed.
#[derive(Debug, Clone)]
pub(super) struct Connector {
    client: Client,
    allow_http: bool,
    budget: Arc<AtomicU32>,
}

impl Connector {
    /// A client that trusts `roots` beside the operating system's. `here`: the server is on this machine, so that no
    /// proxy is asked. Without `secure` it never speaks TLS, and needs no certificates.
    pub(super) fn new(
        allow_http: bool,
        idle: Duration,
        roots: Vec<CertificateDer<'static>>,
        here: bool,
        secure: bool,
    ) -> Result<Self> {
        let failed = |error: rustls::Error| {
            Error::new(ErrorKind::Unavailable, "cannot set up TLS")
                .with_help("install the operating system's root certificates (ca-certificates)")
                .with_source(error)
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(failed)?;
        let tls = if secure {
            let verifier = Verifier::new_with_extra_roots(roots, provider).map_err(failed)?;
            tls.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        } else {
            tls.with_root_certificates(rustls::RootCertStore::empty())
        };
        let mut client = Client::builder()
            .tls_backend_preconfigured(tls.with_no_client_auth())
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(idle)
            .http1_only();
        if here {
            client = client.no_proxy();
        }
        let client =
            client.build().map_err(|error| Error::internal("cannot set up HTTP").with_source(error))?;
        Ok(Self { client, allow_http, budget: Arc::new(AtomicU32::new(BUDGET)) })
    }

    /// Whether the credentials may go there.
    fn may_ask(&self, request: &HttpRequest) -> bool {
        let host = request.uri().host().unwrap_or_default();
        self.allow_http
            || request.uri().scheme_str() == Some("https")
            || is_loopback(host)
            || is_metadata(host)
    }

    /// Notes how an exchange went. Whether there is something left to spend on another.
    fn note(&self, well: bool) -> bool {
        let next = |left: u32| if well { BUDGET.min(left + 1) } else { left.saturating_sub(4) };
        let before = self.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(next(left)));
        well || before.is_ok_and(|before| before > 4)
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        if !self.may_ask(&request) {
            let refused = Error::invalid("plain HTTP to another machine").with_help("use https");
            return Err(HttpError::new(HttpErrorKind::Unknown, refused));
        }
        let answer = HttpService::call(&self.client, request).await;
        let busy = match &answer {
            Ok(answer) => {
                answer.status().is_server_error() || answer.status() == StatusCode::TOO_MANY_REQUESTS
            }
            Err(_) => true,
        };
        if !self.note(!busy) {
            // Of this kind nothing is tried again.
            let spent =
                Error::unavailable("most requests to this store fail; the budget of retries is spent");
            return Err(match answer {
                Ok(answer) => HttpError::new(
                    HttpErrorKind::Unknown,
                    spent.context(format_args!("status {}", answer.status())),
                ),
                Err(error) => HttpError::new(HttpErrorKind::Unknown, spent.with_source(error)),
            });
        }
        if busy
            && let Ok(answer) = &answer
            && let Some(pause) = retry_after(answer)
        {
            tokio::time::sleep(pause).await;
        }
        answer
    }
}

/// `Retry-After` in seconds. Its other form, a date, needs a clock that agrees with the server's.
fn retry_after(answer: &HttpResponse) -> Option<Duration> {
    let seconds = answer.headers().get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_PAUSE))
}

/// Whether `host` is this machine by its very name.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether `host` is one of those that give a machine of a cloud its credentials, by plain HTTP and on its own link.
fn is_metadata(host: &str) -> bool {
    host == "metadata.google.internal"
        || matches!(host.parse(), Ok(IpAddr::V4(address)) if address.is_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_plain_http_may_reach() {
        for (host, here, metadata) in [
            ("127.0.0.1", true, false),
            ("[::1]", true, false),
            ("localhost", true, false),
            ("localhost.example.com", false, false),
            ("10.0.0.1", false, false),
            ("169.254.169.254", false, true),
            ("metadata.google.internal", false, true),
            ("metadata.google.internal.example.com", false, false),
        ] {
            assert_eq!((is_loopback(host), is_metadata(host)), (here, metadata), "{host}");
        }
    }

    #[test]
    fn the_budget_is_spent_and_earned() {
        let connector = Connector::new(false, CONNECT_TIMEOUT, Vec::new(), true, false).unwrap();
        let failures = |connector: &Connector| (0..1000).take_while(|_| connector.note(false)).count();
        assert_eq!(failures(&connector), 63);
        assert!(!connector.note(false));
        for _ in 0..40 {
            assert!(connector.note(true));
        }
        assert_eq!(failures(&connector), 9);
    }
}
