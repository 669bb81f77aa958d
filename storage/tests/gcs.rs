//! Google Cloud Storage as `object_store` speaks to it, on a stand-in: the suite of that crate says that the stand-in
//! is one, the store laws say that our adapter keeps its word on it, and the rest is what goes wrong on the way.

mod common;
mod gcs_sim;

use std::error::Error as _;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use axum::http::Method;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder};
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use towline_core::{Error, ErrorKind, ObjectKey, ObjectWriter, PutMode, SnapshotKind, SnapshotStore};
use towline_storage::testing::Proxy;
use towline_storage::{ObjectAdapter, Publish, StoreOptions};

use common::{find, key, name, noise, repo, session, shared, weights};
use gcs_sim::{Fault, GcsSim, Seen, TOKEN};

const BUCKET: &str = "towline-test";
/// Tries again this often; then the caller hears of it.
const RETRIES: usize = 4;
const CLOSED: Fault = Fault::LostReply { reset: false };
const RESET: Fault = Fault::LostReply { reset: true };
const BUSY: Fault = Fault::Unavailable { retry_after: 1 };

/// A client of `bucket` that tries again soon.
fn builder(sim: &GcsSim, bucket: &str) -> GoogleCloudStorageBuilder {
    // One client does TLS in all builds of the workspace, so each wants a provider, even for plain HTTP.
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    // A proxy that serves nobody: that of the environment would not reach this machine.
    let options = ClientOptions::new().with_allow_http(true).with_timeout(Duration::from_secs(20));
    let options = options.with_proxy_url(sim.url()).with_proxy_excludes("127.0.0.1");
    let soon = Duration::from_millis(2);
    let backoff = BackoffConfig { init_backoff: soon, max_backoff: 8 * soon, base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: RETRIES, retry_timeout: Duration::from_secs(20) };
    GoogleCloudStorageBuilder::new()
        .with_base_url(sim.url())
        .with_bearer_token(TOKEN)
        .with_bucket_name(bucket)
        .with_client_options(options)
        .with_retry(retry)
}

fn client(sim: &GcsSim) -> GoogleCloudStorage {
    builder(sim, BUCKET).build().unwrap()
}

fn adapter(builder: GoogleCloudStorageBuilder) -> ObjectAdapter {
    ObjectAdapter::new(Arc::new(builder.build().unwrap()))
}

async fn fresh() -> (ObjectAdapter, GcsSim) {
    let sim = GcsSim::with_bucket(BUCKET).await;
    (adapter(builder(&sim, BUCKET)), sim)
}

towline_core::store_conformance!(laws, fresh());

/// By URL, with our own client.
async fn opened() -> (Arc<dyn SnapshotStore>, GcsSim) {
    let sim = GcsSim::with_bucket(BUCKET).await;
    let options = StoreOptions::new().with("base_url", sim.url()).with("bearer_token", TOKEN);
    (towline_storage::open(&format!("gs://{BUCKET}/a/prefix"), &options).unwrap(), sim)
}

towline_core::store_conformance!(by_url, opened());

#[tokio::test]
async fn our_client_waits_as_long_as_it_is_told() {
    let (store, sim) = opened().await;
    sim.plan(2, BUSY, |_| true);
    let started = Instant::now();
    store.put(&key("object"), Bytes::from_static(b"body"), PutMode::Create).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(store.get(&key("object"), None).await.unwrap(), "body");
}

/// The network goes away and comes back.
#[tokio::test]
async fn a_network_that_drops_is_told_and_comes_back() {
    let sim = GcsSim::with_bucket(BUCKET).await;
    let upstream = sim.url().strip_prefix("http://").unwrap().parse().unwrap();
    let network = Proxy::start(upstream).await.unwrap();
    let options = StoreOptions::new()
        .with("base_url", format!("http://{}", network.address()))
        .with("bearer_token", TOKEN);
    let store = towline_storage::open(&format!("gs://{BUCKET}"), &options).unwrap();
    let repo = repo(Arc::clone(&store));
    let writer = repo.writer(session(1)).await.unwrap();
    let publish = |text: &str| Publish::new(name(text), SnapshotKind::Base, shared(text));
    writer.publish(publish("a")).await.unwrap();
    network.refuse(true);
    network.cut_all();
    let started = Instant::now();
    let error = store.get(&key("job/head.json"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.help().is_some() && started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    network.refuse(false);
    assert_eq!(repo.restore(&find(&repo, "a").await).await.unwrap(), weights("a"));
    writer.publish(publish("b")).await.unwrap();
    assert_eq!(repo.list().await.unwrap().len(), 2, "nothing is half there");
}

/// A store that answers nothing but errors is not asked for ever: the budget of all requests together ends it.
#[tokio::test]
async fn a_store_that_is_down_is_not_stormed() {
    let (store, sim) = opened().await;
    sim.plan(usize::MAX, Fault::Unavailable { retry_after: 0 }, |_| true);
    let mut asked = 0;
    for round in 0..100 {
        let before = sim.seen().len();
        let error = store.get(&key("object"), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.help().is_some(), "{error:?}");
        asked = sim.seen().len() - before;
        if asked == 1 {
            assert!(round > 3, "the first ones are tried again");
            break;
        }
    }
    assert_eq!(asked, 1, "in the end each is asked once");
    sim.heal();
    store.put(&key("object"), Bytes::from_static(b"body"), PutMode::Create).await.unwrap();
}

/// Every function of `object_store::integration`, each on a bucket of its own. All apply: none is left out.
/// `response_extensions` wants the suite's own connector.
mod suite {
    use object_store::integration as theirs;
    use object_store::path::Path;

    use super::*;

    /// A listing gives so many entries at once, the least that the suite allows: it asks for five itself.
    const PAGE: usize = 5;

    async fn start() -> (GoogleCloudStorage, GcsSim) {
        let sim = GcsSim::start().await;
        // The suite reads an old generation.
        sim.create_bucket(BUCKET, true);
        sim.set_page(PAGE);
        (client(&sim), sim)
    }

    macro_rules! suite {
        ($($name:ident($store:ident $(, $more:expr)*);)*) => {$(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let ($store, sim) = start().await;
                theirs::$name(&$store $(, $more)*).await;
                // Whatever the suite began it completed or aborted.
                assert_eq!(sim.open_uploads(), [""; 0]);
            }
        )*};
    }

    suite! {
        put_get_delete_list(store);
        put_get_attributes(store);
        get_opts(store);
        put_opts(store, true);
        stream_get(store);
        list_uses_directories_correctly(store);
        list_with_delimiter(store);
        rename_and_copy(store);
        copy_if_not_exists(store);
        copy_rename_nonexistent_object(store);
        multipart(store, &store);
        multipart_with_opts(store, &store);
        multipart_put_part_out_of_order(store, &store);
        multipart_race_condition(store, true);
        multipart_out_of_order(store);
        list_paginated(store, &store);
        list_with_offset_exclusivity(store);
    }

    #[tokio::test]
    async fn get_nonexistent_object() {
        let (store, _sim) = start().await;
        let error = theirs::get_nonexistent_object(&store, None).await.unwrap_err();
        assert!(matches!(error, object_store::Error::NotFound { .. }), "{error}");
        let error = theirs::get_nonexistent_object(&store, Some(Path::from("no/such"))).await.unwrap_err();
        let object_store::Error::NotFound { path, .. } = error else { panic!("{error}") };
        assert_eq!(path, "no/such");
    }

    #[tokio::test]
    async fn response_extensions() {
        let (_, sim) = start().await;
        let marked = builder(&sim, BUCKET).with_http_connector(theirs::MarkerHttpConnector::default());
        theirs::response_extensions(&marked.build().unwrap(), true).await;
    }
}

fn read(outcome: towline_core::Result<Bytes>) -> Bytes {
    outcome.unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn kind<T: std::fmt::Debug>(outcome: towline_core::Result<T>) -> ErrorKind {
    outcome.unwrap_err().kind()
}

/// An error with all its causes.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

async fn write(store: &ObjectAdapter, key: &ObjectKey, body: &Bytes) -> Box<dyn ObjectWriter> {
    let mut writer = store.writer(key).await.unwrap();
    writer.write(body.clone()).await.unwrap();
    writer
}

async fn listed(store: &ObjectAdapter) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    let mut objects = store.list(None);
    while let Some(object) = objects.next().await {
        found.push(object?.key.to_string());
    }
    Ok(found)
}

#[tokio::test]
async fn a_create_whose_reply_is_lost_is_found_to_be_ours() {
    // A connection that ends is tried again, and finds the object that it made; one that is reset is not.
    for (fault, wanted, puts) in [(CLOSED, ErrorKind::AlreadyExists, 2), (RESET, ErrorKind::Unavailable, 1)] {
        let (store, sim) = fresh().await;
        let key = key("job/manifest.json");
        sim.plan(1, fault, Seen::creates);
        assert_eq!(kind(store.put(&key, "by writer 1".into(), PutMode::Create).await), wanted);
        assert_eq!((sim.planned(), sim.count(&Method::PUT)), (0, puts));
        assert_eq!(read(store.get(&key, None).await), "by writer 1");
        // The next one is told the same, and finds that it is not its own.
        let other = store.put(&key, "by writer 2".into(), PutMode::Create).await;
        assert_eq!(kind(other), ErrorKind::AlreadyExists);
        assert_eq!(read(store.get(&key, None).await), "by writer 1");
    }
}

#[tokio::test]
async fn an_update_whose_reply_is_lost_is_found_to_be_ours() {
    for (fault, wanted) in [(CLOSED, ErrorKind::Conflict), (RESET, ErrorKind::Unavailable)] {
        let (store, sim) = fresh().await;
        let key = key("job/head.json");
        let first = store.put(&key, "1".into(), PutMode::Create).await.unwrap();
        sim.plan(1, fault, Seen::updates);
        assert_eq!(kind(store.put(&key, "2".into(), PutMode::Update(first.clone())).await), wanted);
        assert_eq!(read(store.get(&key, None).await), "2");
        // It took effect once: the version before is stale now, and the one that is read is not.
        assert_eq!(kind(store.put(&key, "3".into(), PutMode::Update(first)).await), ErrorKind::Conflict);
        let now = store.head(&key).await.unwrap().version;
        store.put(&key, "3".into(), PutMode::Update(now)).await.unwrap();
    }
}

#[tokio::test]
async fn an_overwrite_whose_reply_is_lost_is_made_again() {
    for fault in [CLOSED, RESET] {
        let (store, sim) = fresh().await;
        sim.plan(1, fault, |seen| seen.method == Method::PUT);
        store.put(&key("a"), "body".into(), PutMode::Overwrite).await.unwrap();
        assert_eq!((read(store.get(&key("a"), None).await), sim.count(&Method::PUT)), ("body".into(), 2));
    }
}

#[tokio::test]
async fn an_upload_whose_completion_is_not_answered_is_there_whole() {
    for fault in [CLOSED, RESET] {
        let (store, sim) = fresh().await;
        let body = noise("large", 9 << 20);
        let writer = write(&store, &key("large"), &body).await;
        sim.plan(1, fault, Seen::completes);
        // Tried again, it asks for an upload that is no more. What became of it only a read can tell.
        assert_eq!(kind(writer.finish().await), ErrorKind::Unavailable);
        assert!(store.get(&key("large"), None).await.unwrap() == body);
        assert_eq!(sim.open_uploads(), [""; 0]);
    }
}

#[tokio::test]
async fn snapshots_are_committed_over_lost_replies() {
    for fault in [CLOSED, RESET] {
        let (store, sim) = fresh().await;
        let repo = repo(Arc::new(store));
        sim.plan(1, fault.clone(), Seen::creates);
        let writer = repo.writer(session(1)).await.unwrap();
        for text in ["a", "b", "c"] {
            // Of every object that must not be there the first answer is lost, and of the head's replacement too.
            sim.plan(1, fault.clone(), Seen::creates);
            sim.plan(1, fault.clone(), Seen::updates);
            writer.publish(Publish::new(name(text), SnapshotKind::Base, shared(text))).await.unwrap();
            assert_eq!(sim.planned(), 0);
            assert_eq!(repo.restore(&find(&repo, text).await).await.unwrap(), weights(text));
        }
        let names: Vec<_> = repo.list().await.unwrap().iter().map(|info| info.name.to_string()).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }
}

#[tokio::test]
async fn a_busy_store_is_asked_again() {
    let (store, sim) = fresh().await;
    let busy = |sim: &GcsSim| sim.plan(RETRIES, BUSY, |_| true);
    busy(&sim);
    store.put(&key("small"), "body".into(), PutMode::Create).await.unwrap();
    busy(&sim);
    assert_eq!(read(store.get(&key("small"), None).await), "body");
    busy(&sim);
    assert_eq!(store.head(&key("small")).await.unwrap().size, 4);
    // Each request of an upload has a budget of its own.
    let body = noise("large", 17 << 20);
    sim.plan(RETRIES, BUSY, |seen| seen.query("uploads").is_some());
    sim.plan(RETRIES, BUSY, |seen| seen.query("partNumber") == Some("2"));
    sim.plan(RETRIES, BUSY, Seen::completes);
    write(&store, &key("large"), &body).await.finish().await.unwrap();
    assert!(store.get(&key("large"), None).await.unwrap() == body);
    busy(&sim);
    assert_eq!(listed(&store).await.unwrap(), ["large", "small"]);
    busy(&sim);
    store.delete(&key("small")).await.unwrap();
    assert_eq!((sim.planned(), sim.object(BUCKET, "small")), (0, None));
}

#[tokio::test]
async fn a_store_that_stays_busy_is_unavailable_and_nothing_else() {
    let (store, sim) = fresh().await;
    store.put(&key("there"), "body".into(), PutMode::Create).await.unwrap();
    sim.plan(usize::MAX, BUSY, |_| true);
    let before = sim.seen().len();
    assert_eq!(kind(store.get(&key("there"), None).await), ErrorKind::Unavailable);
    assert_eq!(sim.seen().len() - before, RETRIES + 1);
    assert_eq!(kind(store.head(&key("there")).await), ErrorKind::Unavailable);
    assert_eq!(kind(store.put(&key("new"), "".into(), PutMode::Create).await), ErrorKind::Unavailable);
    assert_eq!(kind(store.delete(&key("there")).await), ErrorKind::Unavailable);
    // A listing that fails is no empty one.
    assert_eq!(kind(listed(&store).await), ErrorKind::Unavailable);
    sim.heal();
    assert_eq!(listed(&store).await.unwrap(), ["there"]);
}

#[tokio::test]
async fn a_listing_that_fails_in_the_middle_is_an_error() {
    let (store, sim) = fresh().await;
    sim.set_page(2);
    for number in 0..7 {
        store.put(&key(&format!("a/{number}")), Bytes::new(), PutMode::Create).await.unwrap();
    }
    let gets = sim.count(&Method::GET);
    assert_eq!(listed(&store).await.unwrap().len(), 7);
    assert_eq!(sim.count(&Method::GET) - gets, 4);
    sim.plan(RETRIES + 1, BUSY, |seen| seen.query("continuation-token").is_some());
    assert_eq!(kind(listed(&store).await), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_truncated_body_is_never_short_data() {
    let (store, sim) = fresh().await;
    let (key, body) = (key("object"), noise("object", 300_000));
    store.put(&key, body.clone(), PutMode::Create).await.unwrap();
    let ranges = [None, Some(0..300_000), Some(1000..200_000)];
    for range in ranges {
        let wanted =
            range.clone().map_or(body.clone(), |range| body.slice(range.start as usize..range.end as usize));
        // Cut a few times, the rest is asked for; what came already is not.
        sim.plan(RETRIES - 1, Fault::TruncatedBody { after: 10_000 }, Seen::reads);
        assert!(store.get(&key, range.clone()).await.unwrap() == wanted);
        assert_eq!(sim.planned(), 0);
        let rest = sim.seen().last().unwrap().range.clone().unwrap();
        let start = range.clone().map_or(0, |range| range.start) + 10_000 * (RETRIES as u64 - 1);
        assert!(rest.starts_with(&format!("bytes={start}-")), "{rest}");
        // Cut each time, there is no answer.
        for after in [0, 1, 10_000] {
            sim.plan(usize::MAX, Fault::TruncatedBody { after }, Seen::reads);
            assert_eq!(kind(store.get(&key, range.clone()).await), ErrorKind::Unavailable);
            assert_eq!(
                kind(store.read_into(&key, 0, BytesMut::zeroed(300_000)).await),
                ErrorKind::Unavailable
            );
            sim.heal();
        }
    }
}

#[tokio::test]
async fn a_body_that_lies_about_its_range_is_corrupt() {
    let (store, sim) = fresh().await;
    store.put(&key("object"), noise("object", 5000), PutMode::Create).await.unwrap();
    sim.plan(1, Fault::ShortBody { after: 4000 }, Seen::reads);
    let outcome = store.read_into(&key("object"), 0, BytesMut::zeroed(5000)).await;
    assert_eq!((kind(outcome), sim.planned()), (ErrorKind::Corrupt, 0));
    sim.plan(1, Fault::ShortBody { after: 4000 }, Seen::reads);
    let outcome = store.get(&key("object"), Some(0..5000)).await;
    assert_eq!((kind(outcome), sim.planned()), (ErrorKind::Corrupt, 0));
}

#[tokio::test]
async fn a_slow_body_comes_whole_or_not_at_all() {
    let sim = GcsSim::with_bucket(BUCKET).await;
    let patient = adapter(builder(&sim, BUCKET));
    let body = noise("object", 100_000);
    patient.put(&key("object"), body.clone(), PutMode::Create).await.unwrap();
    let slow = Fault::SlowBody { piece: 10_000, pause: Duration::from_millis(30) };
    sim.plan(1, slow, Seen::reads);
    let start = Instant::now();
    assert!(patient.get(&key("object"), None).await.unwrap() == body);
    assert!(start.elapsed() >= Duration::from_millis(300));

    let options = ClientOptions::new().with_allow_http(true).with_timeout(Duration::from_millis(200));
    let options = options.with_proxy_url(sim.url()).with_proxy_excludes("127.0.0.1");
    let hasty = adapter(builder(&sim, BUCKET).with_client_options(options));
    let stuck = Fault::SlowBody { piece: 1, pause: Duration::from_secs(60) };
    sim.plan(usize::MAX, stuck, Seen::reads);
    let start = Instant::now();
    assert_eq!(kind(hasty.get(&key("object"), None).await), ErrorKind::Unavailable);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_wrong_token_is_denied() {
    let (right, sim) = fresh().await;
    right.put(&key("object"), "body".into(), PutMode::Create).await.unwrap();
    let wrong = adapter(builder(&sim, BUCKET).with_bearer_token("another-token"));
    for object in ["object", "missing"] {
        let key = key(object);
        assert_eq!(kind(wrong.get(&key, None).await), ErrorKind::Denied);
        assert_eq!(kind(wrong.get(&key, Some(0..2)).await), ErrorKind::Denied);
        assert_eq!(kind(wrong.head(&key).await), ErrorKind::Denied);
        for mode in [PutMode::Create, PutMode::Overwrite] {
            assert_eq!(kind(wrong.put(&key, "x".into(), mode).await), ErrorKind::Denied);
        }
        assert_eq!(kind(wrong.delete(&key).await), ErrorKind::Denied);
        assert_eq!(kind(write(&wrong, &key, &noise("small", 9)).await.finish().await), ErrorKind::Denied);
        let mut large = wrong.writer(&key).await.unwrap();
        assert_eq!(kind(large.write(noise("large", 9 << 20)).await), ErrorKind::Denied);
    }
    assert!(listed(&wrong).await.is_err());
    assert_eq!(sim.object(BUCKET, "object").unwrap(), "body");
    assert!(sim.open_uploads().is_empty());
    // Nobody tries again with a key that does not fit.
    let error = wrong.get(&key("object"), None).await.unwrap_err();
    assert!(chain(&error).contains("401"), "{}", chain(&error));
}

#[tokio::test]
async fn a_missing_bucket_is_told_by_its_name() {
    let (_, sim) = fresh().await;
    let store = adapter(builder(&sim, "no-such-bucket"));
    let key = key("object");
    let mut large = store.writer(&key).await.unwrap();
    let outcomes = [
        store.get(&key, None).await.map(drop),
        store.get(&key, Some(0..2)).await.map(drop),
        store.put(&key, "x".into(), PutMode::Create).await.map(drop),
        store.put(&key, "x".into(), PutMode::Overwrite).await.map(drop),
        write(&store, &key, &noise("small", 9)).await.finish().await.map(drop),
        large.write(noise("large", 9 << 20)).await,
    ];
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        // For good, either way: nobody waits for it.
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let told = chain(&error);
        assert!(
            told.contains("`object`") && told.contains("NoSuchBucket") && told.contains("no-such-bucket"),
            "{told}"
        );
    }
    // No bucket is not an empty one.
    let told = chain(&listed(&store).await.unwrap_err());
    assert!(told.contains("NoSuchBucket"), "{told}");
}

#[tokio::test]
async fn uploads_that_are_given_up_leave_nothing() {
    let (store, sim) = fresh().await;
    let (key, body) = (key("large"), noise("large", 9 << 20));
    write(&store, &key, &body).await.abort().await.unwrap();
    assert!(sim.open_uploads().is_empty());
    drop(write(&store, &key, &body).await);
    let start = Instant::now();
    while !sim.open_uploads().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "a dropped upload stays open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((listed(&store).await.unwrap(), sim.count(&Method::DELETE)), (vec![], 2));
    // An abort that does not get through says so, and then something is left.
    let writer = write(&store, &key, &body).await;
    sim.plan(RETRIES + 1, BUSY, |seen| seen.method == Method::DELETE);
    assert_eq!(kind(writer.abort().await), ErrorKind::Unavailable);
    assert_eq!(sim.open_uploads(), [format!("{BUCKET}/large")]);
}
