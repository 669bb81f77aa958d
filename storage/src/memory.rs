//! A store in memory.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use object_store::memory::InMemory;
use towline_core::{
    BoxStream, Digested, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore, Version,
    async_trait,
};

use crate::ObjectAdapter;

/// Objects in this process's memory, gone with the last clone. For tests and for trials.
#[derive(Debug, Clone)]
pub struct Memory(ObjectAdapter);

impl Memory {
    /// A new and empty store.
    #[must_use]
    pub fn new() -> Self {
        Self(ObjectAdapter::new(Arc::new(InMemory::new())))
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SnapshotStore for Memory {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        self.0.put(key, body, mode).await
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        self.0.writer(key).await
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        self.0.get(key, range).await
    }

    async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        self.0.read_into(key, start, buffer).await
    }

    async fn read_digested(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<Digested> {
        self.0.read_digested(key, start, buffer).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        self.0.head(key).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.0.delete(key).await
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        self.0.list(prefix)
    }
}
