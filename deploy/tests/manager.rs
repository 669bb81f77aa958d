//! The deployment manager against a small HTTP server with scripted answers.
#![cfg(feature = "http")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use towline_core::{
    Capabilities, CodecId, ContentDigest, Deployment, ErrorKind, HotLoad, OpId, Outcome, Secret, SnapshotId,
    SnapshotIdentity, SnapshotKind, SnapshotRef, Stage,
};
use towline_deploy::DeploymentManager;
use towline_deploy::wire::{HotLoadRequest, IncrementalMetadata};

/// What was asked: the first line, the headers in lower case, the body.
#[derive(Debug, Clone)]
struct Request {
    line: String,
    headers: String,
    body: String,
}

/// Serves the answers in turn, and the last one again and again; an empty one breaks the connection off.
#[derive(Debug)]
struct Server {
    url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    async fn start(answers: impl IntoIterator<Item = String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let mut answers: VecDeque<String> = answers.into_iter().collect();
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer = if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() };
                serve(stream, &answer.unwrap(), &seen).await;
            }
        });
        Self { url, requests }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    fn manager(&self) -> DeploymentManager {
        DeploymentManager::new(&self.url).unwrap().with_request_timeout(Duration::from_secs(10))
    }
}

async fn serve(mut stream: TcpStream, answer: &str, seen: &Mutex<Vec<Request>>) {
    let mut bytes = Vec::new();
    let (head, length) = loop {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk).await.unwrap();
        assert!(count > 0, "the request was cut off");
        bytes.extend_from_slice(&chunk[..count]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, _)) = text.split_once("\r\n\r\n") {
            let length = head.to_lowercase().lines().find_map(|line| {
                line.strip_prefix("content-length:").map(|length| length.trim().parse::<usize>().unwrap())
            });
            break (head.to_owned(), length.unwrap_or(0));
        }
    };
    while bytes.len() < head.len() + 4 + length {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk).await.unwrap();
        bytes.extend_from_slice(&chunk[..count]);
    }
    let body = String::from_utf8(bytes[head.len() + 4..].to_vec()).unwrap();
    let (line, headers) = head.split_once("\r\n").unwrap();
    seen.lock().unwrap().push(Request { line: line.into(), headers: headers.to_lowercase(), body });
    if !answer.is_empty() {
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
    stream.shutdown().await.unwrap();
}

fn answer(status: u16, body: &str) -> String {
    with_header(status, "x-nothing: 0", body)
}

fn with_header(status: u16, header: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} Text\r\ncontent-length: {}\r\n{header}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn id(text: &str, seed: u8) -> SnapshotId {
    SnapshotId {
        identity: SnapshotIdentity::new(text).unwrap(),
        digest: ContentDigest::from_bytes([seed; 32]),
    }
}

fn base() -> HotLoad {
    let snapshot = SnapshotRef::new(id("step-0-00ab12cd", 1), SnapshotKind::Base, "job/0");
    HotLoad::new(OpId::new("op-1").unwrap(), snapshot).unwrap()
}

fn delta() -> HotLoad {
    let snapshot = SnapshotRef::new(id("step-1-00ab12cd", 2), SnapshotKind::Delta, "job/1")
        .with_parent(Some(id("step-0-00ab12cd", 1)))
        .with_codec(Some(CodecId::of("arc_v2")));
    HotLoad::new(OpId::new("op-2").unwrap(), snapshot).unwrap().with_reset_prompt_cache(false)
}

const IDLE: &str = r#"{"replicas":[{"current_snapshot_identity":null,"readiness":true}]}"#;

#[tokio::test]
async fn an_order_is_sent_as_the_public_api_wants_it() {
    let server = Server::start([answer(200, "{}")]).await;
    let manager = server
        .manager()
        .with_api_key(Secret::new("k-1"))
        .with_model("accounts/a/models/m")
        .with_deployment("accounts/a/deployments/d")
        .with_source_url("s3://bucket/job");
    manager.hot_load(&delta()).await.unwrap();
    manager.hotload(&base()).await.unwrap();
    let requests = server.requests();
    assert_eq!(requests[0].line, "POST /hot_load/v1/models/hot_load HTTP/1.1");
    for header in [
        "authorization: bearer k-1",
        "fireworks-model: accounts/a/models/m",
        "fireworks-deployment: accounts/a/deployments/d",
        "x-fireworks-hot-load-source-url: s3://bucket/job",
        "x-towline-operation: op-2",
        "content-type: application/json",
        &format!("x-towline-digest: {}", id("step-1-00ab12cd", 2).digest),
    ] {
        assert!(
            requests[0].headers.lines().any(|line| line == header),
            "{header} in {}",
            requests[0].headers
        );
    }
    let body = |request: &Request| serde_json::from_str::<HotLoadRequest>(&request.body).unwrap();
    assert_eq!(
        body(&requests[0]),
        HotLoadRequest {
            identity: "step-1-00ab12cd".into(),
            reset_prompt_cache: Some(false),
            incremental_snapshot_metadata: Some(IncrementalMetadata::new("step-0-00ab12cd", "arc_v2")),
        }
    );
    assert_eq!(body(&requests[1]).incremental_snapshot_metadata, None);
    assert!(!format!("{manager:?}").contains("k-1"));
}

#[tokio::test]
async fn a_server_that_knows_no_reset_is_asked_without() {
    let refusal = r#"{"detail":[{"msg":"Extra inputs are not permitted","loc":["reset_prompt_cache"]}]}"#;
    let server = Server::start([answer(400, refusal), answer(200, "{}")]).await;
    server.manager().hotload(&base()).await.unwrap();
    let bodies: Vec<_> = server.requests().into_iter().map(|request| request.body).collect();
    assert_eq!(bodies.len(), 2);
    assert!(bodies[0].contains("reset_prompt_cache") && !bodies[1].contains("reset_prompt_cache"));
    // Once, and only for this reason.
    let server = Server::start([answer(400, refusal)]).await;
    assert_eq!(server.manager().hotload(&base()).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(server.requests().len(), 2);
    let server = Server::start([answer(400, "bad identity")]).await;
    let error = server.manager().hotload(&base()).await.unwrap_err();
    assert!(error.message().contains("answered 400: bad identity"), "{error}");
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn every_replica_is_read() {
    let digest = id("a", 7).digest;
    let body = format!(
        r#"{{"replicas":[
            {{"current_snapshot_identity":"a","readiness":true,"name":"east","zone":1,
              "loading_state":{{"stage":"idle","target_snapshot_identity":null}},
              "towline":{{"content_digest":"{digest}","operation":"o","model":"tiny","pause_us":1500,"load_ms":20.5,"verify_ms":4,"new":0}}}},
            {{"current_snapshot_identity":"","readiness":false,
              "loading_state":{{"stage":"downloading","target_snapshot_identity":"b","error":null}}}}]}}"#
    );
    let server = Server::start([answer(200, &body)]).await;
    let status = server.manager().status().await.unwrap();
    let [east, second] = &status.replicas[..] else { panic!("two replicas") };
    assert_eq!((east.name.as_str(), east.ready, east.digest), ("east", true, Some(digest)));
    assert_eq!((east.stage, east.pause), (Stage::Idle, Some(Duration::from_micros(1500))));
    assert_eq!(east.load, Some(Duration::from_micros(20_500)));
    assert_eq!(east.verify, Some(Duration::from_millis(4)));
    assert_eq!((second.name.as_str(), second.ready, &second.identity), ("1", false, &None));
    assert_eq!((second.stage, second.target.as_ref().unwrap().as_str()), (Stage::Load, "b"));
    assert_eq!(status.model.as_deref(), Some("tiny"));
    assert_eq!(status.served().unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn an_answer_without_replicas_is_an_error() {
    for body in ["{}", r#"{"replicas":null}"#, r#"{"replicas":{}}"#, "<html>", "", "[]"] {
        let server = Server::start([answer(200, body)]).await;
        let error = server.manager().status().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{body}: {error}");
    }
    let server = Server::start([answer(200, r#"{"replicas":[{"towline":{"content_digest":"zz"}}]}"#)]).await;
    server.manager().status().await.unwrap_err();
    let models = r#"{"replicas":[{"towline":{"model":"a"}},{"towline":{"model":"b"}}]}"#;
    let server = Server::start([answer(200, models)]).await;
    assert_eq!(server.manager().status().await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn an_endless_answer_is_cut() {
    let body = format!(r#"{{"replicas":[],"more":"{}"}}"#, "x".repeat(17 << 20));
    let server = Server::start([answer(200, &body)]).await;
    let error = server.manager().status().await.unwrap_err();
    assert!(error.message().contains("longer than 16777216 bytes"), "{error}");
}

#[tokio::test]
async fn questions_are_asked_again_and_orders_are_not() {
    let server =
        Server::start([answer(503, ""), String::new(), answer(500, "oops"), answer(200, IDLE)]).await;
    assert_eq!(server.manager().status().await.unwrap().replicas.len(), 1);
    assert_eq!(server.requests().len(), 4);
    let server = Server::start([answer(503, "starting")]).await;
    assert_eq!(server.manager().status().await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(server.requests().len(), 5);
    let server = Server::start([answer(503, "starting")]).await;
    assert_eq!(server.manager().hotload(&base()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn a_server_says_when_to_come_again() {
    let later = |seconds: u32| with_header(429, &format!("retry-after: {seconds}"), "");
    let server = Server::start([later(1), answer(200, "{}")]).await;
    let start = Instant::now();
    server.manager().hotload(&base()).await.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
    // Longer than the request may take: told at once.
    let server = Server::start([later(3600)]).await;
    let start = Instant::now();
    assert_eq!(server.manager().status().await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn plain_http_stays_on_this_machine() {
    for url in ["http://192.0.2.1:1", "http://deployment.invalid"] {
        let manager = DeploymentManager::new(url).unwrap().with_request_timeout(Duration::from_millis(300));
        for error in [
            manager.status().await.unwrap_err(),
            manager.hotload(&base()).await.unwrap_err(),
            manager.warmup().await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.message().starts_with("plain http to"), "{error}");
        }
        // Allowed, it is tried; nobody is there.
        let error = manager.with_insecure_http(true).status().await.unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Denied, "{error}");
    }
    assert_eq!(DeploymentManager::new("ftp://host").unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn errors_keep_their_kind_and_lose_the_key() {
    let body =
        r#"{"error":{"code":"chain_mismatch","message":"wanted k-secret, found b","help":"send a base"}}"#;
    let server = Server::start([answer(412, body)]).await;
    let manager = server.manager().with_api_key(Secret::new("k-secret"));
    let error = manager.hotload(&delta()).await.unwrap_err();
    assert_eq!((error.kind(), error.help()), (ErrorKind::ChainMismatch, Some("send a base")));
    assert_eq!(error.message(), "hot-load of step-1-00ab12cd: the server answered 412: wanted ***, found b");
    let server = Server::start([with_header(302, "location: http://127.0.0.1:1/", "")]).await;
    let error = server.manager().status().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn the_warm_up_falls_back_to_the_servers_own_path() {
    let server = Server::start([answer(404, ""), answer(200, "{}")]).await;
    server.manager().with_model("tiny").warm_up().await.unwrap();
    let requests = server.requests();
    let lines: Vec<_> = requests.iter().map(|request| request.line.as_str()).collect();
    assert_eq!(lines, ["POST /inference/v1/completions HTTP/1.1", "POST /v1/completions HTTP/1.1"]);
    assert_eq!(requests[1].body, r#"{"model":"tiny","prompt":[1,2],"max_tokens":4,"temperature":0}"#);
    let server = Server::start([answer(503, "no weights yet")]).await;
    assert_eq!(server.manager().warmup().await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn what_the_capabilities_deny_is_not_sent() {
    let server = Server::start([answer(200, "{}")]).await;
    let manager = server.manager().with_capabilities(Capabilities::new(vec![CodecId::of("zstd")]));
    assert_eq!(manager.hotload(&delta()).await.unwrap_err().kind(), ErrorKind::Unsupported);
    let adapter = SnapshotRef::new(id("a", 1), SnapshotKind::Adapter, "job/a");
    let adapter = HotLoad::new(OpId::new("op").unwrap(), adapter).unwrap();
    assert_eq!(manager.hotload(&adapter).await.unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(server.requests().is_empty());
    // No prompt cache: not a word about it.
    manager.hotload(&base()).await.unwrap();
    assert_eq!(server.requests()[0].body, r#"{"identity":"step-0-00ab12cd"}"#);
}

#[tokio::test]
async fn an_older_operations_error_is_stale() {
    let entry = |stage: &str, current: &str, op: &str| {
        answer(
            200,
            &format!(
                r#"{{"replicas":[{{"current_snapshot_identity":{current},"readiness":true,
                   "loading_state":{{"stage":"{stage}","target_snapshot_identity":"step-0-00ab12cd","error":"e"}},
                   "towline":{{"operation":"{op}"}}}}]}}"#
            ),
        )
    };
    let (wait, every) = (Duration::from_secs(5), Duration::from_millis(5));
    let server = Server::start([
        answer(200, "{}"),
        entry("error", "null", "op-0"),
        entry("idle", "\"step-0-00ab12cd\"", "op-1"),
    ])
    .await;
    let status = server.manager().hotload_and_wait(&base(), wait, every).await.unwrap();
    assert_eq!(status.outcome(&base().snapshot.id), Outcome::Committed);
    let server = Server::start([answer(200, "{}"), entry("error", "null", "op-1")]).await;
    let error = server.manager().hotload_and_wait(&base(), wait, every).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    // A lost reply: the same operation once more.
    let server = Server::start([
        String::new(),
        answer(200, IDLE),
        answer(200, "{}"),
        entry("idle", "\"step-0-00ab12cd\"", "op-1"),
    ])
    .await;
    server.manager().hotload_and_wait(&base(), wait, every).await.unwrap();
    assert_eq!(
        server.requests().iter().filter(|it| it.headers.contains("x-towline-operation: op-1")).count(),
        2
    );
}

#[tokio::test]
async fn an_adapter_beside_the_model_counts() {
    let adapter = SnapshotRef::new(id("lora-0-00ab12cd", 1), SnapshotKind::Adapter, "job/a");
    let order = HotLoad::new(OpId::new("op").unwrap(), adapter).unwrap();
    let loaded = |status: &str| {
        answer(
            200,
            &format!(
                r#"{{"replicas":[{{"current_snapshot_identity":"model","readiness":true,
                   "loaded_adapters":[{{"identity":"lora-0-00ab12cd","status":"{status}"}}]}}]}}"#
            ),
        )
    };
    let server = Server::start([answer(200, "{}"), loaded("loading"), loaded("loaded")]).await;
    let manager = server.manager();
    manager.hotload_and_wait(&order, Duration::from_secs(5), Duration::from_millis(5)).await.unwrap();
    assert_eq!(server.requests().len(), 3);
    manager
        .wait_for_hotload(&order.snapshot.id, Duration::from_secs(5), Duration::from_millis(5))
        .await
        .unwrap();
}

#[tokio::test]
async fn an_adapter_in_the_model_s_place_is_known_by_its_digest() {
    let adapter = SnapshotRef::new(id("lora-0-00ab12cd", 1), SnapshotKind::Adapter, "job/a");
    let order = HotLoad::new(OpId::new("op").unwrap(), adapter).unwrap();
    let serves = |digest: &str| {
        answer(
            200,
            &format!(
                r#"{{"replicas":[{{"current_snapshot_identity":"lora-0-00ab12cd","readiness":true,
                   "loaded_adapters":[{{"identity":"lora-0-00ab12cd","status":"loaded"}}],
                   "towline":{{"content_digest":"{digest}"}}}}]}}"#
            ),
        )
    };
    let (wait, every) = (Duration::from_secs(5), Duration::from_millis(5));
    let server = Server::start([answer(200, "{}"), serves(&"01".repeat(32))]).await;
    server.manager().hotload_and_wait(&order, wait, every).await.unwrap();
    let server = Server::start([answer(200, "{}"), serves(&"02".repeat(32))]).await;
    let error = server.manager().hotload_and_wait(&order, wait, every).await.unwrap_err();
    assert!(error.message().contains("serves other weights under the name lora-0-00ab12cd"), "{error}");
}

#[tokio::test]
async fn https_is_set_up_without_global_state() {
    let manager = DeploymentManager::new("https://127.0.0.1:1/").unwrap();
    let manager = manager.with_request_timeout(Duration::from_secs(2));
    assert!(manager.status().await.unwrap_err().is_retryable());
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());
}
