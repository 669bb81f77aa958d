//! What a store answers that should refuse everything.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use towline_core::{Error, ObjectKey, PutMode, Result, SnapshotStore};

/// How long one operation may take.
const LIMIT: Duration = Duration::from_secs(60);

/// An operation and what came of it.
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    /// The kind of its error; `ok` if it succeeded.
    pub(crate) kind: String,
    /// The error with its causes.
    pub(crate) report: String,
}

/// One operation of each sort. Deleting is not among them: of what is missing it always succeeds.
pub(crate) async fn operations(store: Arc<dyn SnapshotStore>) -> Vec<Operation> {
    let key = match ObjectKey::new("store-laws-probe/object") {
        Ok(key) => key,
        Err(error) => return vec![told("key", Err(error))],
    };
    let body = || Bytes::from_static(b"x");
    let put = async |mode| store.put(&key, body(), mode).await.map(drop);
    let list =
        store.list(key.as_str().split_once('/').and_then(|(top, _)| ObjectKey::new(top).ok()).as_ref());
    vec![
        told("put", within(put(PutMode::Overwrite)).await),
        told("create", within(put(PutMode::Create)).await),
        told("write parts", within(parts(&*store, &key)).await),
        told("get", within(async { store.get(&key, None).await.map(drop) }).await),
        told("get a range", within(async { store.get(&key, Some(0..1)).await.map(drop) }).await),
        told("head", within(async { store.head(&key).await.map(drop) }).await),
        told("list", within(async { list.try_collect::<Vec<_>>().await.map(drop) }).await),
    ]
}

/// More than one part of every service.
async fn parts(store: &dyn SnapshotStore, key: &ObjectKey) -> Result<()> {
    let mut writer = store.writer(key).await?;
    for _ in 0..5 {
        writer.write(vec![7; 4 << 20].into()).await?;
    }
    writer.finish().await.map(drop)
}

async fn within(operation: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::time::timeout(LIMIT, operation)
        .await
        .unwrap_or_else(|_| Err(Error::timed_out(format!("no answer within {} s", LIMIT.as_secs()))))
}

fn told(name: &'static str, outcome: Result<()>) -> Operation {
    let (kind, report) = match outcome {
        Ok(()) => ("ok".to_owned(), "it succeeded".to_owned()),
        Err(error) => (error.kind().to_string(), error.report()),
    };
    Operation { name, kind, report }
}
