//! A store whose clock can be set.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use towline_core::{
    BoxStream, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore, Version, async_trait,
};

/// Any store, with a clock that goes like the real one until it is set. Each object keeps the time of its writing.
#[derive(Debug)]
pub struct Clocked {
    inner: Arc<dyn SnapshotStore>,
    times: Arc<Times>,
}

#[derive(Debug)]
struct Times {
    /// When this began by the real clock, in milliseconds since 1970. It cannot go back while a test runs.
    start_ms: u64,
    started: Instant,
    /// Milliseconds before the real time.
    ahead: AtomicI64,
    written: Mutex<BTreeMap<ObjectKey, u64>>,
}

impl Times {
    fn wrote(&self, key: &ObjectKey) {
        let real = self.start_ms + self.started.elapsed().as_millis() as u64;
        let now = real.saturating_add_signed(self.ahead.load(Ordering::SeqCst));
        self.written.lock().unwrap().insert(key.clone(), now);
    }

    fn shown(&self, mut info: ObjectInfo) -> ObjectInfo {
        if let Some(time) = self.written.lock().unwrap().get(&info.key) {
            info.modified_ms = *time;
        }
        info
    }
}

impl Clocked {
    pub fn new(inner: Arc<dyn SnapshotStore>) -> Arc<Self> {
        let start_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        let (ahead, written) = (AtomicI64::new(0), Mutex::default());
        let times = Times { start_ms, started: Instant::now(), ahead, written };
        Arc::new(Self { inner, times: Arc::new(times) })
    }

    pub fn later(&self, time: Duration) {
        self.times.ahead.fetch_add(time.as_millis() as i64, Ordering::SeqCst);
    }

    pub fn earlier(&self, time: Duration) {
        self.times.ahead.fetch_sub(time.as_millis() as i64, Ordering::SeqCst);
    }
}

#[async_trait]
impl SnapshotStore for Clocked {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let put = self.inner.put(key, body, mode).await?;
        self.times.wrote(key);
        Ok(put)
    }
    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.inner.writer(key).await?;
        Ok(Box::new(ClockedWriter { inner, times: Arc::clone(&self.times), key: key.clone() }))
    }
    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        self.inner.get(key, range).await
    }
    async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        self.inner.read_into(key, start, buffer).await
    }
    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        self.inner.head(key).await.map(|info| self.times.shown(info))
    }
    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.inner.delete(key).await
    }
    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let times = Arc::clone(&self.times);
        self.inner.list(prefix).map(move |info| info.map(|info| times.shown(info))).boxed()
    }
}

#[derive(Debug)]
struct ClockedWriter {
    inner: Box<dyn ObjectWriter>,
    times: Arc<Times>,
    key: ObjectKey,
}

#[async_trait]
impl ObjectWriter for ClockedWriter {
    async fn write(&mut self, part: Bytes) -> Result<()> {
        self.inner.write(part).await
    }
    async fn finish(self: Box<Self>) -> Result<Version> {
        let finished = self.inner.finish().await?;
        self.times.wrote(&self.key);
        Ok(finished)
    }
    async fn abort(self: Box<Self>) -> Result<()> {
        self.inner.abort().await
    }
}
