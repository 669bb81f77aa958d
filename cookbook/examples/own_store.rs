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
    Version, async_trait, buffered_writer, listing,
};

type Objects = BTreeMap<ObjectKey, (ObjectInfo, Bytes)>;

#[derive(Debug, Clone, Default)]
struct MapStore(Arc<Mutex<(u64, Objects)>>);

impl MapStore {
    fn lock(&self) -> MutexGuard<'_, (u64, Objects)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, key: &ObjectKey) -> Result<(ObjectInfo, Bytes)> {
        let found = self.lock().1.get(key).cloned();
        found.ok_or_else(|| Error::not_found(format!("`{key}` is missing")))
    }
}

#[async_trait]
impl SnapshotStore for MapStore {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let (writes, objects) = &mut *self.lock();
        match (mode, objects.get(key)) {
            (PutMode::Create, Some(_)) => return Err(Error::already_exists(format!("`{key}` exists"))),
            (PutMode::Update(wanted), found) if found.is_none_or(|(info, _)| info.version != wanted) => {
                return Err(Error::conflict(format!("`{key}` is no longer {}", wanted.as_str())));
            }
            _ => *writes += 1,
        }
        let version = Version::new(writes.to_string());
        let info = ObjectInfo::new(key.clone(), body.len() as u64, version.clone(), *writes);
        objects.insert(key.clone(), (info, body));
        Ok(version)
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        Ok(buffered_writer(self.clone(), key))
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let (info, body) = self.find(key)?;
        let Range { start, end } = info.cut(range)?;
        Ok(body.slice(start as usize..end as usize))
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        Ok(self.find(key)?.0)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.lock().1.remove(key);
        Ok(())
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let under = |info: &&ObjectInfo| prefix.is_none_or(|prefix| info.key.is_under(prefix));
        let found: Vec<_> = self.lock().1.values().map(|(info, _)| info).filter(under).cloned().collect();
        listing(found.into_iter().map(Ok))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let store = MapStore::default();
    let stack = Stack::start(Arc::new(store.clone()), "own-store").await?;
    let receipt = stack.syncer()?.save_and_hotload(SnapshotName::new("step-00000")?, None).await?;
    println!("{} is served from {} objects of our own store", receipt.snapshot.id, store.lock().1.len());
    stack.trainer.client.close().await
}
