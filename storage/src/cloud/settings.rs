//! What the settings of [`StoreOptions`] come down to for one back end.

use std::str::FromStr;
use std::time::Duration;

use object_store::{BackoffConfig, RetryConfig};
use reqwest::Url;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use towline_core::{Error, ErrorKind, Result};

use super::http::{Connector, is_loopback};
use crate::StoreOptions;

/// How long a server may be silent, unless the caller says otherwise.
const IDLE: Duration = Duration::from_secs(120);
/// Settings that would take the bucket from elsewhere than the URL, or weaken TLS.
const NOT_TAKEN: [&str; 4] = ["bucket", "bucket_name", "container_name", "allow_invalid_certificates"];

/// What a back end's builder is given.
pub(super) struct Settings<K> {
    /// The builder's own.
    pub(super) builder: Vec<(K, String)>,
    pub(super) connector: Connector,
    /// Whether the server is the cloud's own.
    pub(super) native: bool,
    /// Its URLs if it is not.
    pub(super) endpoints: String,
}

impl<K: FromStr> Settings<K> {
    /// Sorts the settings for `scheme`, whose builder knows their names with or without `prefix`. `endpoints` are the
    /// names of those that hold the server's URL.
    pub(super) fn of(scheme: &str, prefix: &str, options: &StoreOptions, endpoints: &[&str]) -> Result<Self> {
        let settings = options.settings(scheme);
        let allow_http = settings.iter().find(|(name, ..)| *name == "allow_http");
        let allow_http =
            allow_http.map_or(Ok(false), |(name, value, _)| parse(name, value, "true or false"))?;
        let (mut builder, mut idle) = (Vec::new(), IDLE);
        let (mut roots, mut urls) = (Vec::new(), Vec::new());
        for (name, value, explicit) in settings {
            match name {
                "allow_http" => {}
                "idle_timeout" => idle = Duration::from_secs(parse(name, value, "whole seconds")?),
                "ca_bundle" => roots = certificates(value)?,
                _ => {
                    let key = format!("{prefix}{name}").parse().or_else(|_| name.parse());
                    let key = key.ok().filter(|_| !NOT_TAKEN.contains(&name));
                    if key.is_none() && explicit {
                        return Err(Error::invalid(format!("`{}` is no setting", name.escape_debug()))
                            .with_help("see the documentation of `StoreOptions` for the names"));
                    }
                    if endpoints.contains(&name) {
                        urls.push(check_endpoint(name, value, allow_http)?);
                    }
                    // A variable that is none of ours belongs to something else.
                    builder.extend(key.map(|key| (key, value.to_owned())));
                }
            }
        }
        let here = !urls.is_empty() && urls.iter().all(|url| url.host_str().is_some_and(is_loopback));
        let secure = urls.is_empty() || urls.iter().any(|url| url.scheme() == "https");
        let connector = Connector::new(allow_http, idle, roots, here, secure)?;
        let endpoints = urls.iter().map(Url::as_str).collect::<Vec<_>>().join(" ");
        Ok(Self { builder, connector, native: urls.is_empty(), endpoints })
    }
}

/// Retries of one request. All requests of a store share one budget beside; see [`Connector`].
pub(super) fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            base: 2.0,
        },
        max_retries: 5,
        retry_timeout: Duration::from_secs(60),
    }
}

/// An error of a builder: settings that are missing or do not fit.
pub(super) fn unbuilt(error: object_store::Error) -> Error {
    let source = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
    Error::new(ErrorKind::Invalid, format!("the settings do not fit: {source}"))
        .with_help("set what is missing in the environment or in the options")
        .with_source(error)
}

fn parse<T: FromStr>(name: &str, value: &str, wanted: &str) -> Result<T> {
    value
        .parse()
        .map_err(|_| Error::invalid(format!("{name}: wanted {wanted}, found `{}`", value.escape_debug())))
}

fn check_endpoint(name: &str, value: &str, allow_http: bool) -> Result<Url> {
    let url = Url::parse(value).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some(url) = url.filter(|url| url.username().is_empty() && url.password().is_none()) else {
        return Err(Error::invalid(format!("{name}: wanted a URL with http or https and no credentials"))
            .with_help("write something like https://host:9000"));
    };
    if url.scheme() == "http" && !allow_http && !url.host_str().is_some_and(is_loopback) {
        return Err(Error::invalid(format!("{name}: plain HTTP would show the credentials to the network"))
            .with_help("use https, or set `allow_http` to true if the network is yours alone"));
    }
    Ok(url)
}

fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>> {
    let bad = |why: String| Error::invalid(format!("ca_bundle `{}`: {why}", path.escape_debug()));
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|error| bad(error.to_string()))?;
    if certificates.is_empty() {
        return Err(bad("it holds no certificate".to_owned()));
    }
    Ok(certificates)
}
