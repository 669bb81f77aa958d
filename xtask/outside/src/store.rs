//! Objects in a sorted map.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use towline_core::bytes::Bytes;
use towline_core::{
    BoxStream, Error, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore, Version,
    async_trait, buffered_writer, listing,
};

type Objects = BTreeMap<ObjectKey, (ObjectInfo, Bytes)>;

/// Objects, and how often one was written. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct MapStore(Arc<Mutex<(u64, Objects)>>);

impl MapStore {
    fn find(&self, key: &ObjectKey) -> Result<(ObjectInfo, Bytes)> {
        let found = self.0.lock().unwrap().1.get(key).cloned();
        found.ok_or_else(|| Error::not_found(format!("`{key}` is not there")))
    }
}

#[async_trait]
impl SnapshotStore for MapStore {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let (writes, objects) = &mut *self.0.lock().unwrap();
        match (mode, objects.get(key)) {
            (PutMode::Create, Some(_)) => return Err(Error::already_exists(format!("`{key}` is taken"))),
            (PutMode::Update(wanted), found) if found.is_none_or(|(info, _)| info.version != wanted) => {
                return Err(Error::conflict(format!("`{key}` is no longer {}", wanted.as_str())));
            }
            _ => *writes += 1,
        }
        let version = Version::new(format!("v{writes}"));
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
        self.0.lock().unwrap().1.remove(key);
        Ok(())
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let all: Vec<_> = self.0.lock().unwrap().1.values().map(|(info, _)| info.clone()).collect();
        let prefix = prefix.cloned();
        let under = move |info: &ObjectInfo| prefix.as_ref().is_none_or(|prefix| info.key.is_under(prefix));
        listing(all.into_iter().filter(under).map(Ok))
    }
}
