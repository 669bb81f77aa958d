//! The embedded inference server: completions, models, health, and the public hot-load API.
//!
//! Weights sit behind an atomic swap. A request takes the weights once, when it begins, and keeps them; a load
//! that fails cannot touch what is served.
//!
//! A LoRA adapter is served on the base weights that it names by content digest: those that are served, or that the
//! adapter being served is on, or else any snapshot of the store that has them, the adapter's own job first. So one order
//! is enough for a server that has just started. A full snapshot that is loaded later takes the adapter's place.

mod answer;
mod completions;
mod hot_load;
mod load;
mod prefix;
mod state;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{get, post};
use serde_json::{Value, json};
use towline_core::{Error, ModelId, Result, SnapshotStore};

pub use state::Served;
use state::Shared;

/// The largest request body in bytes.
const MAX_BODY: usize = 4 << 20;
/// How long a request may run before it is given up.
const REQUEST_DEADLINE: Duration = Duration::from_secs(120);

/// What a server is started with.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Where to listen. Default 127.0.0.1 on a port of the system's choice.
    pub address: SocketAddr,
    /// The model's name in requests and answers. Default `towline`.
    pub model: String,
    /// How long after the start hot-loads are refused although health is green. Default 0.
    pub ready_after: Duration,
    /// Prompts kept by the prefix cache. Default 1024.
    pub cached_prompts: usize,
    /// The model of the registry that is served from the start. Default: nothing, until the first hot-load.
    pub promoted: Option<ModelId>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            model: "towline".into(),
            ready_after: Duration::ZERO,
            cached_prompts: 1024,
            promoted: None,
        }
    }
}

impl ServerOptions {
    /// Sets where to listen.
    #[must_use]
    pub fn with_address(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    /// Sets the model's name.
    #[must_use]
    pub fn with_model(mut self, model: impl Into<String>) -> Self {
        self.model = model.into();
        self
    }

    /// Sets the model of the registry that is served from the start.
    #[must_use]
    pub fn with_promoted(mut self, model: Option<ModelId>) -> Self {
        self.promoted = model;
        self
    }

    /// Sets how long hot-loads are refused after the start.
    #[must_use]
    pub fn with_ready_after(mut self, delay: Duration) -> Self {
        self.ready_after = delay;
        self
    }
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Listens and serves; snapshots are read from `store`. Without a promoted model nothing is served until the first
    /// hot-load.
    ///
    /// # Errors
    /// `Unavailable` if the address cannot be bound; as [`SnapshotRepo::load_model`](towline_storage::SnapshotRepo).
    pub async fn start(store: Arc<dyn SnapshotStore>, options: ServerOptions) -> Result<Self> {
        let shared = Arc::new(Shared::new(store, options));
        shared.serve_promoted().await?;
        let options = &shared.options;
        let listener = tokio::net::TcpListener::bind(options.address).await.map_err(|error| {
            Error::unavailable(format!("{} cannot be listened on", options.address))
                .with_help("choose another port, or 0 for a free one")
                .with_source(error)
        })?;
        let address = listener
            .local_addr()
            .map_err(|error| Error::internal("the listener has no address").with_source(error))?;
        let router = router(Arc::clone(&shared));
        let task = tokio::spawn(async move {
            // axum::serve ends only with the task.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, shared, task })
    }

    /// `http://` and the address that it listens on.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What is served now.
    #[must_use]
    pub fn served(&self) -> Option<Arc<Served>> {
        self.shared.served()
    }

    /// Waits until the server ends, which it does only when it fails.
    pub async fn wait(mut self) {
        let _ = (&mut self.task).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/health", get(|| async { axum::Json(json!({"status": "ok"})) }))
        .route("/v1/models", get(models))
        .route("/v1/completions", post(completions::complete))
        .route("/inference/v1/completions", post(completions::complete))
        .route("/hot_load/v1/models/hot_load", get(hot_load::status).post(hot_load::order))
        .fallback(|| async { answer::refuse(&Error::not_found("there is no such route")) })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(shared)
}

async fn models(State(shared): State<Arc<Shared>>) -> axum::Json<Value> {
    let snapshot = shared.served().map(|served| served.id().identity.to_string());
    axum::Json(json!({
        "object": "list",
        "data": [{"id": shared.options.model, "object": "model", "owned_by": "towline", "snapshot": snapshot}],
    }))
}
