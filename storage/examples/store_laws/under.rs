//! A store that sees one folder of another as the whole.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _};
use towline_core::{
    BoxStream, Error, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore, Version,
    async_trait,
};

/// `inner` below `prefix`.
#[derive(Debug)]
pub(crate) struct Under {
    inner: Arc<dyn SnapshotStore>,
    prefix: ObjectKey,
}

impl Under {
    pub(crate) fn new(inner: Arc<dyn SnapshotStore>, prefix: ObjectKey) -> Self {
        Self { inner, prefix }
    }

    /// Removes every object, 16 at once, within `limit`.
    pub(crate) async fn clear(&self, limit: Duration) -> Result<()> {
        let cleared = self.inner.list(Some(&self.prefix)).try_for_each_concurrent(16, async |info| {
            // A law that timed out may still be at work; what is gone already is gone.
            self.inner.delete(&info.key).await
        });
        let late = |_| Error::timed_out(format!("not all removed within {} s", limit.as_secs()));
        tokio::time::timeout(limit, cleared).await.map_err(late)?
    }

    fn key(&self, key: &ObjectKey) -> Result<ObjectKey> {
        self.prefix.join(key.as_str())
    }

    fn outside(&self, info: &ObjectInfo) -> Error {
        Error::internal(format!("`{}` was listed, which is not under `{}`", info.key, self.prefix))
    }
}

#[async_trait]
impl SnapshotStore for Under {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        self.inner.put(&self.key(key)?, body, mode).await
    }
    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        self.inner.writer(&self.key(key)?).await
    }
    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        self.inner.get(&self.key(key)?, range).await
    }
    async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        self.inner.read_into(&self.key(key)?, start, buffer).await
    }
    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        let mut info = self.inner.head(&self.key(key)?).await?;
        info.key = key.clone();
        Ok(info)
    }
    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.inner.delete(&self.key(key)?).await
    }
    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let folder = prefix.map_or_else(|| Ok(self.prefix.clone()), |prefix| self.key(prefix));
        let folder = match folder {
            Ok(folder) => folder,
            Err(error) => return futures_util::stream::once(async { Err(error) }).boxed(),
        };
        let this = Self { inner: Arc::clone(&self.inner), prefix: self.prefix.clone() };
        let objects = self.inner.list(Some(&folder)).map(move |info| {
            let mut info = info?;
            let below = info.key.as_str().strip_prefix(this.prefix.as_str());
            let below = below.and_then(|rest| rest.strip_prefix('/')).ok_or_else(|| this.outside(&info))?;
            info.key = ObjectKey::new(below)?;
            Ok(info)
        });
        objects.boxed()
    }
}
