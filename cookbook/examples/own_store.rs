//! Your own store: objects in a map. Everything above it (commits, fences, deltas, restores) comes for free.
//!
//! cargo run -p towline-cookbook --example own_store

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use towline_cookbook::recipes::Stack;
use towline_core::bytes::Bytes;
use towline_core::{
    BoxStream, Error, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotName, SnapshotStore,
    Version, async_trait,
};

type Objects = BTreeMap<ObjectKey, (u64, Bytes)>;

#[derive(Debug, Clone, Default)]
struct MapStore(Arc<Mutex<Objects>>);

impl MapStore {
    fn lock(&self) -> MutexGuard<'_, Objects> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn info(key: &ObjectKey, (version, body): &(u64, Bytes)) -> ObjectInfo {
    ObjectInfo::new(key.clone(), body.len() as u64, Version::new(version.to_string()), *version)
}

#[async_trait]
impl SnapshotStore for MapStore {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let mut objects = self.lock();
        let found = objects.get(key).map(|(version, _)| Version::new(version.to_string()));
        match (mode, found) {
            (PutMode::Create, Some(_)) => return Err(Error::already_exists(format!("`{key}` exists"))),
            (PutMode::Update(wanted), found) if found.as_ref() != Some(&wanted) => {
                return Err(Error::conflict(format!("`{key}`: wanted {wanted:?}, found {found:?}")));
            }
            _ => {}
        }
        let version = objects.values().map(|(version, _)| *version).max().unwrap_or(0) + 1;
        objects.insert(key.clone(), (version, body));
        Ok(Version::new(version.to_string()))
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(Writer { store: self.clone(), key: key.clone(), body: Vec::new() }))
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let body = self.lock().get(key).map(|(_, body)| body.clone());
        let body = body.ok_or_else(|| Error::not_found(format!("`{key}` is missing")))?;
        let Some(range) = range else { return Ok(body) };
        let (start, end) = (range.start as usize, (range.end as usize).min(body.len()));
        if range.start > range.end || start > body.len() {
            return Err(Error::invalid(format!("`{key}` has {} bytes, not {range:?}", body.len())));
        }
        Ok(body.slice(start..end))
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        self.lock()
            .get(key)
            .map(|found| info(key, found))
            .ok_or_else(|| Error::not_found(format!("`{key}` is missing")))
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.lock().remove(key);
        Ok(())
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let under = |key: &ObjectKey| prefix.is_none_or(|prefix| key.is_under(prefix));
        let found: Vec<_> =
            self.lock().iter().filter(|(key, _)| under(key)).map(|(key, it)| Ok(info(key, it))).collect();
        Box::pin(futures_util::stream::iter(found))
    }
}

#[derive(Debug)]
struct Writer {
    store: MapStore,
    key: ObjectKey,
    body: Vec<u8>,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, part: Bytes) -> Result<()> {
        self.body.extend_from_slice(&part);
        Ok(())
    }
    async fn finish(self: Box<Self>) -> Result<Version> {
        self.store.put(&self.key, self.body.into(), PutMode::Overwrite).await
    }
    async fn abort(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let store = MapStore::default();
    let stack = Stack::start(Arc::new(store.clone()), "own-store").await?;
    let receipt = stack.syncer()?.save_and_hotload(SnapshotName::new("step-00000")?, None).await?;
    println!("{} is served from {} objects of our own store", receipt.snapshot.id, store.lock().len());
    stack.trainer.client.close().await
}
