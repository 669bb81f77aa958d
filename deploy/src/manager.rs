//! The hot-load API over HTTP as a deployment.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Method, StatusCode, Url};
use towline_core::{
    Capabilities, CodecId, Deployment, DeploymentStatus, Error, HotLoad, OpId, ReplicaStatus, Result, Secret,
    SnapshotId, SnapshotIdentity, SnapshotKind, Stage,
};

use crate::load;
use crate::net::{self, Answer, Call, Retry};
use crate::wire::{self, HotLoadRequest, IncrementalMetadata, ReplicaEntry, StatusResponse, WarmUpRequest};

/// A deployment behind the public hot-load API.
///
/// Certificates are always verified. Plain http is taken to this machine only, unless it is allowed by
/// [`DeploymentManager::with_insecure_http`]. Redirects are not followed.
///
/// Orders carry the operation's id, the manifest's digest and the content digest in headers, which public servers
/// pass over: there, a retried order is a second order of the same snapshot.
///
/// ```no_run
/// # async fn example() -> towline_core::Result<()> {
/// let deployment = towline_deploy::DeploymentManager::new("http://127.0.0.1:8000")?;
/// for replica in deployment.status().await?.replicas {
///     println!("{} serves {:?}", replica.name, replica.identity);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DeploymentManager {
    client: Client,
    base: Url,
    prefix: String,
    api_key: Option<Secret>,
    model: Option<String>,
    deployment: Option<String>,
    source_url: Option<String>,
    capabilities: Capabilities,
    request_timeout: Duration,
    insecure_http: bool,
    /// The last order, to tell its failure from an older one's and to find it among the adapters.
    last: Mutex<Option<(OpId, SnapshotIdentity)>>,
}

impl DeploymentManager {
    /// A manager for the servers behind `base_url`, http or https; a slash at the end does not matter.
    ///
    /// The public API cannot be asked for its capabilities. They are taken to be `arc_v2` deltas, a prompt cache
    /// and adapters, until [`DeploymentManager::with_capabilities`] says otherwise.
    ///
    /// # Errors
    /// `Invalid` for another kind of URL, or one with credentials; `Unavailable` if TLS cannot be set up because
    /// the machine has no root certificates.
    pub fn new(base_url: &str) -> Result<Self> {
        let base = net::base_url(base_url)?;
        let capabilities =
            Capabilities::new(vec![CodecId::new("arc_v2")?]).with_prompt_cache(true).with_adapters(true);
        Ok(Self {
            client: net::client(&base)?,
            prefix: base.as_str().trim_end_matches('/').to_owned(),
            base,
            api_key: None,
            model: None,
            deployment: None,
            source_url: None,
            capabilities,
            request_timeout: Duration::from_secs(30),
            insecure_http: false,
            last: Mutex::new(None),
        })
    }

    /// Sets the key that is sent as bearer token. Default none.
    #[must_use]
    pub fn with_api_key(mut self, key: Secret) -> Self {
        self.api_key = Some(key);
        self
    }

    /// Sets the model, sent in the header `fireworks-model` and with the warm-up. Default none.
    #[must_use]
    pub fn with_model(mut self, model: impl Into<String>) -> Self {
        self.model = Some(model.into());
        self
    }

    /// Sets the deployment, sent in the header `fireworks-deployment`. Default none.
    #[must_use]
    pub fn with_deployment(mut self, deployment: impl Into<String>) -> Self {
        self.deployment = Some(deployment.into());
        self
    }

    /// Sets where the deployment fetches snapshots, sent in the header `x-fireworks-hot-load-source-url`. Default
    /// none: it knows.
    #[must_use]
    pub fn with_source_url(mut self, url: impl Into<String>) -> Self {
        self.source_url = Some(url.into());
        self
    }

    /// Sets what the deployment can do.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// Sets how long one request may take, its retries included. Default 30 s.
    #[must_use]
    pub fn with_request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Allows plain http to other machines: whoever sits on the way reads the key and can swap the model. Default
    /// false.
    #[must_use]
    pub fn with_insecure_http(mut self, allowed: bool) -> Self {
        self.insecure_http = allowed;
        self
    }

    /// Orders a load, and returns once the order is accepted.
    ///
    /// A server that refuses `reset_prompt_cache` as an unknown field is asked again without it.
    ///
    /// # Errors
    /// As [`Deployment::hot_load`]; `Denied` for a bad key.
    pub async fn hotload(&self, order: &HotLoad) -> Result<()> {
        let mut request = self.request(order)?;
        let headers = self.order_headers(order)?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((order.op.clone(), order.snapshot.id.identity.clone()));
        let mut answer = self.post(wire::HOT_LOAD_PATH, headers.clone(), &request, Retry::WhenTold).await?;
        if request.reset_prompt_cache.is_some() && refuses_extra_fields(&answer) {
            request.reset_prompt_cache = None;
            answer = self.post(wire::HOT_LOAD_PATH, headers, &request, Retry::WhenTold).await?;
        }
        if answer.status.is_success() {
            return Ok(());
        }
        Err(self.refused(&answer, format_args!("hot-load of {}", order.snapshot.id)))
    }

    /// Waits until every replica serves `snapshot`, asking every `every`.
    ///
    /// # Errors
    /// `TimedOut` after `timeout`, `Corrupt` if a replica refused the snapshot; at once for an answer that will not
    /// change, such as `Denied`.
    pub async fn wait_for_hotload(
        &self,
        snapshot: &SnapshotId,
        timeout: Duration,
        every: Duration,
    ) -> Result<DeploymentStatus> {
        load::served(self, snapshot, load::deadline(timeout), every).await
    }

    /// Orders a load and waits until every replica serves it. A reply that got lost is settled by sending the same
    /// operation again and by the deployment's state.
    ///
    /// # Errors
    /// As [`DeploymentManager::hotload`] and [`DeploymentManager::wait_for_hotload`].
    pub async fn hotload_and_wait(
        &self,
        order: &HotLoad,
        timeout: Duration,
        every: Duration,
    ) -> Result<DeploymentStatus> {
        load::order(self, order, load::deadline(timeout), every).await
    }

    /// Sends one small completion: first to the path of the public gateway, then to that of a server itself.
    ///
    /// # Errors
    /// `Unavailable` while the deployment is not ready to answer; else by the answer's status.
    pub async fn warmup(&self) -> Result<()> {
        let request = WarmUpRequest::new(self.model.clone());
        let mut answer = self.post(wire::INFERENCE_PATH, self.headers()?, &request, Retry::Never).await?;
        if answer.status == StatusCode::NOT_FOUND {
            answer = self.post(wire::COMPLETIONS_PATH, self.headers()?, &request, Retry::Never).await?;
        }
        if answer.status.is_success() { Ok(()) } else { Err(self.refused(&answer, "warm-up")) }
    }

    /// Every replica as it is now.
    ///
    /// # Errors
    /// `Unavailable` or `TimedOut` if the servers cannot be asked, `Unsupported` for an answer without a list of
    /// replicas, `Conflict` if replicas serve different models; else by the answer's status.
    pub async fn status(&self) -> Result<DeploymentStatus> {
        let answer = self.send(Method::GET, wire::HOT_LOAD_PATH, self.headers()?, None, Retry::Any).await?;
        if !answer.status.is_success() {
            return Err(self.refused(&answer, "state of the deployment"));
        }
        let response = StatusResponse::parse(&answer.body)?;
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let model = model(&response.replicas)?;
        let replicas = response
            .replicas
            .into_iter()
            .enumerate()
            .map(|(index, entry)| replica(index, entry, last.as_ref()))
            .collect::<Result<Vec<_>>>()?;
        Ok(DeploymentStatus::new(replicas).with_model(model))
    }

    /// The body of an order, refused here where the deployment would refuse it.
    fn request(&self, order: &HotLoad) -> Result<HotLoadRequest> {
        let snapshot = &order.snapshot;
        let denied = |what: String| {
            Err(Error::unsupported(format!("the deployment does not take {what}"))
                .with_help("hot-load a base, or correct the manager's capabilities"))
        };
        let incremental = match snapshot.kind {
            SnapshotKind::State => {
                return Err(Error::invalid(format!(
                    "{} is a train state, which cannot be served",
                    snapshot.id
                )));
            }
            SnapshotKind::Adapter if !self.capabilities.adapters => return denied("adapters".into()),
            SnapshotKind::Delta => {
                let (Some(previous), Some(codec)) = (&order.previous, &snapshot.codec) else {
                    return Err(Error::invalid(format!(
                        "the delta {} names no parent or codec",
                        snapshot.id
                    )));
                };
                if !self.capabilities.delta_codecs.contains(codec) {
                    return denied(format!("{codec} deltas"));
                }
                Some(IncrementalMetadata::new(previous.identity.as_str(), codec.as_str()))
            }
            SnapshotKind::Base | SnapshotKind::MergedBase | SnapshotKind::Adapter => None,
            other => return denied(format!("snapshots of kind {other}")),
        };
        Ok(HotLoadRequest {
            identity: snapshot.id.identity.to_string(),
            reset_prompt_cache: self.capabilities.resets_prompt_cache.then_some(order.reset_prompt_cache),
            incremental_snapshot_metadata: incremental,
        })
    }

    fn order_headers(&self, order: &HotLoad) -> Result<HeaderMap> {
        let mut headers = self.headers()?;
        put(&mut headers, wire::OPERATION_HEADER, Some(order.op.as_str()))?;
        put(&mut headers, wire::DIGEST_HEADER, Some(&order.snapshot.id.digest.to_string()))?;
        put(
            &mut headers,
            wire::MANIFEST_HEADER,
            order.snapshot.manifest.map(|it| it.to_string()).as_deref(),
        )?;
        put(&mut headers, wire::SOURCE_URL_HEADER, self.source_url.as_deref())?;
        Ok(headers)
    }

    fn headers(&self) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        if let Some(key) = &self.api_key {
            let value: HeaderValue = net::header(&format!("Bearer {}", key.reveal()), true, "the API key")?;
            headers.insert(AUTHORIZATION, value);
        }
        put(&mut headers, wire::MODEL_HEADER, self.model.as_deref())?;
        put(&mut headers, wire::DEPLOYMENT_HEADER, self.deployment.as_deref())?;
        Ok(headers)
    }

    async fn post(
        &self,
        path: &str,
        headers: HeaderMap,
        body: &(impl serde::Serialize + Sync),
        retry: Retry,
    ) -> Result<Answer> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Error::internal("the request is no JSON").with_source(error))?;
        self.send(Method::POST, path, headers, Some(body), retry).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Option<Vec<u8>>,
        retry: Retry,
    ) -> Result<Answer> {
        if self.base.scheme() == "http" && !self.insecure_http && !net::is_loopback(&self.base) {
            return Err(Error::new(
                towline_core::ErrorKind::Denied,
                format!("plain http to {} is not allowed", self.base.host_str().unwrap_or("this host")),
            )
            .with_help(
                "use https, or allow it with `with_insecure_http(true)` on a network that you trust",
            ));
        }
        let call = Call { method, url: format!("{}{path}", self.prefix), headers, body, retry };
        net::send(&self.client, &call, self.request_timeout).await
    }

    /// The error of an answer, without the key, should a server repeat it.
    fn refused(&self, answer: &Answer, what: impl std::fmt::Display) -> Error {
        let error = net::error(answer, &what.to_string());
        match &self.api_key {
            Some(key) if !key.reveal().is_empty() && error.report().contains(key.reveal()) => {
                let clean = Error::new(error.kind(), error.message().replace(key.reveal(), "***"));
                match error.help() {
                    Some(help) => clean.with_help(help.replace(key.reveal(), "***")),
                    None => clean,
                }
            }
            Some(_) | None => error,
        }
    }
}

#[async_trait]
impl Deployment for DeploymentManager {
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    async fn status(&self) -> Result<DeploymentStatus> {
        self.status().await
    }

    async fn hot_load(&self, order: &HotLoad) -> Result<()> {
        self.hotload(order).await
    }

    async fn warm_up(&self) -> Result<()> {
        self.warmup().await
    }
}

/// A replica as core knows it. `last` is the last order that went out from here.
fn replica(
    index: usize,
    entry: ReplicaEntry,
    last: Option<&(OpId, SnapshotIdentity)>,
) -> Result<ReplicaStatus> {
    let identity =
        |text: Option<String>| text.filter(|text| !text.is_empty()).map(SnapshotIdentity::new).transpose();
    let extra = entry.towline.unwrap_or_default();
    let mut replica = ReplicaStatus::new(entry.name.unwrap_or_else(|| index.to_string()));
    replica.ready = entry.readiness;
    replica.identity = identity(entry.current_snapshot_identity)?;
    replica.digest = extra.content_digest.map(|text| text.parse()).transpose()?;
    if let Some(state) = entry.loading_state {
        replica.stage = wire::stage(&state.stage, entry.readiness);
        replica.target = identity(state.target_snapshot_identity)?;
        replica.error = state.error;
    }
    replica.pause = extra.pause_us.map(Duration::from_micros);
    replica.load = extra.load_ms.and_then(milliseconds);
    replica.verify = extra.verify_ms.and_then(milliseconds);
    if let Some((op, target)) = last {
        // The same snapshot can be ordered twice; the first one's failure is not the second one's.
        if replica.stage == Stage::Error && extra.operation.is_some_and(|done| done != op.as_str()) {
            replica.stage = Stage::Idle;
            replica.error = None;
        }
        // Some servers report an adapter beside the model, not in its place.
        let adapters = entry.loaded_adapters.unwrap_or_default();
        let beside = replica.identity.as_ref() != Some(target);
        if beside && adapters.iter().any(|it| it.identity == target.as_str() && it.status == "loaded") {
            replica.identity = Some(target.clone());
            replica.digest = None;
        }
    }
    Ok(replica)
}

/// The one model that the replicas tell of.
fn model(replicas: &[ReplicaEntry]) -> Result<Option<String>> {
    let mut told = replicas.iter().filter_map(|entry| entry.towline.as_ref()?.model.as_ref());
    let Some(first) = told.next() else { return Ok(None) };
    match told.find(|other| *other != first) {
        Some(other) => {
            Err(Error::conflict(format!("the replicas serve different models: {first} and {other}"))
                .with_help("hot-load to a deployment of one model"))
        }
        None => Ok(Some(first.clone())),
    }
}

fn milliseconds(value: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(value / 1e3).ok()
}

fn put(headers: &mut HeaderMap, name: &'static str, value: Option<&str>) -> Result<()> {
    if let Some(value) = value {
        headers.insert(HeaderName::from_static(name), net::header(value, false, name)?);
    }
    Ok(())
}

fn refuses_extra_fields(answer: &Answer) -> bool {
    answer.status == StatusCode::BAD_REQUEST
        && String::from_utf8_lossy(&answer.body).to_ascii_lowercase().contains("extra inputs")
}
