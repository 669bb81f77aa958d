//! A store that breaks its promises: the negative control of everything that checks stores.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::watch;
use towline_core::{
    BoxStream, Digested, Error, ErrorKind, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result,
    SnapshotStore, Version, async_trait,
};

/// How long a put that has looked waits for another one.
const PATIENCE: Duration = Duration::from_millis(100);

/// A promise that a [`LyingStore`] breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lie {
    /// Conditional puts look, wait up to 100 ms for another one to look as well, and write then: races have several
    /// winners.
    LooksThenPuts,
    /// An update takes any version for the current one.
    AcceptsStaleUpdates,
    /// A create replaces what is there.
    OverwritesOnCreate,
    /// This put, counted from 1 among those that are acknowledged, has no effect.
    LosesPut(u64),
    /// A list lacks one object of those that it should have.
    ListsNotAll,
}

/// Any store that tells lies. Without any it is honest. Clones share the count of puts.
#[derive(Debug, Clone)]
pub struct LyingStore {
    inner: Arc<dyn SnapshotStore>,
    lies: Arc<[Lie]>,
    puts: Arc<AtomicU64>,
    /// Grows with each look.
    looks: Arc<watch::Sender<u64>>,
}

impl LyingStore {
    /// `inner` with these lies.
    #[must_use]
    pub fn new(inner: Arc<dyn SnapshotStore>, lies: &[Lie]) -> Self {
        Self { inner, lies: lies.into(), puts: Arc::default(), looks: Arc::default() }
    }

    fn tells(&self, lie: Lie) -> bool {
        self.lies.contains(&lie)
    }

    /// Waits until another put has looked as well, or nobody does: turns alone would leave it to the scheduler
    /// whether a race has a second winner.
    async fn let_others_look(&self) {
        self.looks.send_modify(|looks| *looks += 1);
        let mut looks = self.looks.subscribe();
        let _nobody_else = tokio::time::timeout(PATIENCE, looks.changed()).await;
    }

    /// Whether `mode` holds for what is there now.
    async fn look(&self, key: &ObjectKey, mode: &PutMode) -> Result<()> {
        let there = match self.inner.head(key).await {
            Ok(info) => Some(info.version),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        match mode {
            PutMode::Create if there.is_some() => {
                Err(Error::already_exists(format!("`{key}` is there already")))
            }
            PutMode::Update(wanted) if there.as_ref() != Some(wanted) => {
                Err(Error::conflict(format!("`{key}` has another version")))
            }
            PutMode::Create | PutMode::Update(_) | PutMode::Overwrite => Ok(()),
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SnapshotStore for LyingStore {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let overwrites = match mode {
            PutMode::Create => self.tells(Lie::OverwritesOnCreate),
            PutMode::Update(_) => self.tells(Lie::AcceptsStaleUpdates),
            PutMode::Overwrite => true,
        };
        let mode = if overwrites { PutMode::Overwrite } else { mode };
        let loses = self.lies.iter().any(|lie| matches!(lie, Lie::LosesPut(_)));
        if loses || self.tells(Lie::LooksThenPuts) {
            self.look(key, &mode).await?;
        }
        if loses {
            let number = self.puts.fetch_add(1, Ordering::Relaxed) + 1;
            if self.tells(Lie::LosesPut(number)) {
                return Ok(Version::new(format!("lost-{number}")));
            }
        }
        if mode == PutMode::Overwrite || !self.tells(Lie::LooksThenPuts) {
            return self.inner.put(key, body, mode).await;
        }
        self.let_others_look().await;
        self.inner.put(key, body, PutMode::Overwrite).await
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        self.inner.writer(key).await
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        self.inner.get(key, range).await
    }

    async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        self.inner.read_into(key, start, buffer).await
    }

    async fn read_digested(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<Digested> {
        Ok(Digested { buffer: self.read_into(key, start, buffer).await?, blocks: None })
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        self.inner.head(key).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.inner.delete(key).await
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let objects = self.inner.list(prefix);
        if !self.tells(Lie::ListsNotAll) {
            return objects;
        }
        let shortened = async {
            let mut objects: Vec<ObjectInfo> = objects.try_collect().await?;
            objects.pop();
            Ok(stream::iter(objects.into_iter().map(Ok)))
        };
        stream::once(shortened).try_flatten().boxed()
    }
}
