//! A stand-in for the XML API of Google Cloud Storage: what the `object_store` client asks of it, over real HTTP, and
//! knobs that make it misbehave.
//!
//! It keeps to what the service documents: one winner by generation, strict `404`, `412` and `416`, parts of at least
//! 5 MiB, ETags that tell bodies apart and not writes, listings in pages. What the client never asks is refused.
#![allow(unreachable_pub, reason = "a module of a test has no crate to be seen from")]
#![allow(dead_code, reason = "each test takes what it needs")]

mod answer;
mod bucket;
mod date;
mod fault;
mod list;
mod object;
mod request;
mod rules;
mod upload;
mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::Response;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use answer::{Outcome, Refusal, Reply};
use bucket::Bucket;
pub use fault::Fault;
use fault::Planned;
pub use request::Seen;
use wire::{Cut, Listen};

/// The token that opens the door.
pub const TOKEN: &str = "a-token-of-the-test";
/// A body above this is no test any more.
const LARGEST: usize = 256 << 20;
/// As many as the service lists at once.
const PAGE: usize = 1000;

/// A running stand-in on a port of its own. It ends with this handle.
#[derive(Debug)]
pub struct GcsSim {
    url: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl GcsSim {
    /// Starts one without buckets.
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared::default());
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let service = router.into_make_service_with_connect_info::<Cut>();
        let task = tokio::spawn(async move {
            let _ = axum::serve(Listen(listener), service).await;
        });
        Self { url, shared, task }
    }

    /// Starts one with an empty bucket.
    pub async fn with_bucket(name: &str) -> Self {
        let sim = Self::start().await;
        sim.create_bucket(name, false);
        sim
    }

    /// `http://127.0.0.1:<port>`, for `with_base_url`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A new empty bucket; a versioned one keeps what is replaced, to be read by its generation.
    pub fn create_bucket(&self, name: &str, versioned: bool) {
        self.shared.state().buckets.insert(name.to_owned(), Bucket::new(versioned));
    }

    /// How many entries a listing gives at once, at most. 1000 at first.
    pub fn set_page(&self, entries: usize) {
        self.shared.state().page = entries;
    }

    /// The next `times` requests that `matches` says yes to meet `fault`. Faults planned earlier go first.
    pub fn plan(&self, times: usize, fault: Fault, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) {
        self.shared.state().planned.push(Planned::new(times, fault, matches));
    }

    /// How many planned faults have not been met.
    pub fn planned(&self) -> usize {
        self.shared.state().planned.iter().map(Planned::left).sum()
    }

    /// Takes all planned faults back.
    pub fn heal(&self) {
        self.shared.state().planned.clear();
    }

    /// Every request that came, in order.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    /// How many requests of `method` came.
    pub fn count(&self, method: &Method) -> usize {
        self.shared.state().seen.iter().filter(|seen| seen.method == *method).count()
    }

    /// `<bucket>/<key>` of every upload that was neither completed nor aborted.
    pub fn open_uploads(&self) -> Vec<String> {
        let state = self.shared.state();
        let buckets = state.buckets.iter();
        buckets
            .flat_map(|(name, bucket)| {
                bucket.uploads.values().map(move |upload| format!("{name}/{}", upload.key))
            })
            .collect()
    }

    /// What is stored, past all knobs and without a request.
    pub fn object(&self, bucket: &str, key: &str) -> Option<Bytes> {
        self.shared.state().buckets.get(bucket)?.objects.get(key).map(|object| object.body.clone())
    }
}

impl Drop for GcsSim {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug, Default)]
struct Shared(Mutex<Sim>);

/// Everything, behind one lock: what one request does, it does at once.
#[derive(Debug)]
struct Sim {
    buckets: BTreeMap<String, Bucket>,
    page: usize,
    planned: Vec<Planned>,
    seen: Vec<Seen>,
    /// The generation or upload given last.
    last: u64,
}

impl Default for Sim {
    fn default() -> Self {
        Self { buckets: BTreeMap::new(), page: PAGE, planned: Vec::new(), seen: Vec::new(), last: 0 }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, Sim> {
        self.0.lock().unwrap()
    }
}

/// One request, from its fault to its reply.
async fn answer(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(cut): ConnectInfo<Cut>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let Some(seen) = Seen::new(&parts) else {
        return Reply::from(Refusal::invalid("the address is no bucket and key")).with_fault(None);
    };
    // A body that does not come whole has no effect.
    let Ok(body) = to_bytes(body, LARGEST).await else {
        return Reply::from(Refusal::new(StatusCode::BAD_REQUEST, "IncompleteBody", "the body is not whole"))
            .with_fault(None);
    };
    let (fault, reply) = {
        let mut sim = shared.state();
        let fault = sim.planned.iter_mut().find_map(|planned| planned.meets(&seen));
        sim.seen.push(seen.clone());
        let reply = match &fault {
            Some(Fault::Unavailable { retry_after }) => Reply::unavailable(*retry_after),
            _ => sim.act(&seen, &parts.headers, body).unwrap_or_else(Reply::from),
        };
        (fault, reply)
    };
    if let Some(Fault::LostReply { reset }) = fault {
        cut.cut(reset);
    }
    reply.with_fault(fault.as_ref())
}

impl Sim {
    fn act(&mut self, seen: &Seen, headers: &HeaderMap, body: Bytes) -> Outcome {
        let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        if bearer.and_then(|text| text.strip_prefix("Bearer ")) != Some(TOKEN) {
            return Err(Refusal::new(
                StatusCode::UNAUTHORIZED,
                "AuthenticationRequired",
                "wrong or no token",
            ));
        }
        // The source may lie in another bucket, so it is taken first.
        let source = match headers.get("x-goog-copy-source") {
            Some(source) => Some(self.source(source.to_str().unwrap_or_default())?),
            None => None,
        };
        let (fresh, page) = (self.fresh(), self.page);
        let bucket = self.buckets.get_mut(&seen.bucket).ok_or_else(|| Refusal::no_bucket(&seen.bucket))?;
        if seen.key.is_empty() {
            return match seen.method {
                Method::GET if seen.query("list-type") == Some("2") => list::page(bucket, seen, page),
                _ => Err(Refusal::not_allowed()),
            };
        }
        match (&seen.method, seen.query("uploadId"), seen.query("uploads")) {
            (&Method::POST, None, Some(_)) => upload::start(bucket, seen, headers, fresh),
            (&Method::POST, Some(id), None) => upload::complete(bucket, seen, id, headers, &body, fresh),
            (&Method::PUT, Some(id), None) => upload::part(bucket, seen, id, body),
            (&Method::DELETE, Some(id), None) => upload::abort(bucket, seen, id),
            (&Method::PUT, None, None) => match source {
                Some(source) => object::copy(bucket, seen, source, headers, fresh),
                None => object::put(bucket, seen, headers, body, fresh),
            },
            (&Method::GET | &Method::HEAD, None, None) => object::get(bucket, seen, headers),
            (&Method::DELETE, None, None) => object::delete(bucket, seen, headers),
            _ => Err(Refusal::not_allowed()),
        }
    }

    /// A number that was never given: microseconds as the service's generations, but always growing.
    fn fresh(&mut self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        self.last = u64::try_from(now).unwrap_or(u64::MAX).max(self.last + 1);
        self.last
    }

    fn source(&self, source: &str) -> Result<bucket::Object, Refusal> {
        let (name, key) = request::place(source).ok_or_else(|| Refusal::invalid("x-goog-copy-source"))?;
        let bucket = self.buckets.get(&name).ok_or_else(|| Refusal::no_bucket(&name))?;
        bucket.objects.get(&key).cloned().ok_or_else(|| Refusal::no_key(&key))
    }
}
