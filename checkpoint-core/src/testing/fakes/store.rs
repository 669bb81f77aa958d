//! A store in memory: the example to implement one by.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_core::stream::BoxStream;

use crate::{Error, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore, Version, listing};

/// A complete [`SnapshotStore`] in memory. Clones share the objects. Its clock counts the writes.
#[derive(Debug, Clone, Default)]
pub struct FakeStore(Arc<Mutex<Objects>>);

#[derive(Debug, Default)]
struct Objects {
    writes: u64,
    map: BTreeMap<ObjectKey, (u64, Bytes)>,
}

impl FakeStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Objects> {
        // No code that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Objects {
    fn set(&mut self, key: &ObjectKey, body: Bytes) -> Version {
        self.writes += 1;
        self.map.insert(key.clone(), (self.writes, body));
        Version::new(self.writes.to_string())
    }

    fn get(&self, key: &ObjectKey) -> Result<(u64, Bytes)> {
        self.map.get(key).cloned().ok_or_else(|| Error::not_found(format!("`{key}` is not in the store")))
    }
}

fn info(key: &ObjectKey, write: u64, body: &Bytes) -> ObjectInfo {
    ObjectInfo::new(key.clone(), body.len() as u64, Version::new(write.to_string()), write)
}

#[async_trait]
impl SnapshotStore for FakeStore {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let mut objects = self.lock();
        let found = objects.map.get(key).map(|(write, _)| Version::new(write.to_string()));
        match mode {
            PutMode::Create if found.is_some() => {
                Err(Error::already_exists(format!("`{key}` is there already")))
            }
            PutMode::Update(wanted) if found.as_ref() != Some(&wanted) => {
                Err(Error::conflict(format!("`{key}` has another version than {}", wanted.as_str()))
                    .with_help("read it again, then decide"))
            }
            PutMode::Create | PutMode::Update(_) | PutMode::Overwrite => Ok(objects.set(key, body)),
        }
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(FakeWriter { store: self.clone(), key: key.clone(), body: Vec::new() }))
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let (write, body) = self.lock().get(key)?;
        let range = info(key, write, &body).cut(range)?;
        // A cut range lies within the body, whose length is a usize.
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        Ok(body.slice(index(range.start)..index(range.end)))
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        let (write, body) = self.lock().get(key)?;
        Ok(info(key, write, &body))
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.lock().map.remove(key);
        Ok(())
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let objects = self.lock();
        let under = |key: &ObjectKey| prefix.is_none_or(|prefix| key.is_under(prefix));
        let found = objects.map.iter().filter(|(key, _)| under(key));
        listing(found.map(|(key, (write, body))| Ok(info(key, *write, body))).collect::<Vec<_>>())
    }
}

#[derive(Debug)]
struct FakeWriter {
    store: FakeStore,
    key: ObjectKey,
    body: Vec<u8>,
}

#[async_trait]
impl ObjectWriter for FakeWriter {
    async fn write(&mut self, part: Bytes) -> Result<()> {
        self.body.extend_from_slice(&part);
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<Version> {
        let body = Bytes::from(self.body);
        Ok(self.store.lock().set(&self.key, body))
    }

    async fn abort(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
