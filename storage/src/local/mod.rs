//! A folder as a store, with fsync and a compare-and-swap of its own.

mod disk;
mod list;
mod lock;
mod temp;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinHandle;
use towline_core::{
    BlockHasher, BoxStream, Digested, Error, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result,
    SnapshotStore, Version, async_trait,
};

use crate::io::blocking;
use disk::Disk;
use temp::Temp;

/// A folder as a store. Every object is a plain file under its key; clones share the locks.
///
/// * Writes go to a temporary file, are synced, and then linked or renamed into place; the folder is synced too.
/// * Writers of one key wait for each other, across processes, on a lock file under `~towline/`, which no key can
///   reach. The file system must support `flock`, hard links and times finer than a second.
/// * An object's version is its inode, its time, which grows with every write, and its size.
/// * A key and a key below it cannot both be objects: one is a file, the other needs a folder of that name.
#[derive(Debug, Clone)]
pub struct Local {
    disk: Arc<Disk>,
}

impl Local {
    /// Opens `root` and makes it if it is missing. Temporary files that a dead process left are removed.
    ///
    /// # Errors
    /// `Invalid` if it is no folder, `Denied`; what the operating system answers.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let disk = Arc::new(Disk::open(&root.into())?);
        temp::remove_stale(&disk.private());
        Ok(Self { disk })
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Disk) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let disk = Arc::clone(&self.disk);
        blocking(move || work(&disk)).await
    }
}

#[async_trait]
impl SnapshotStore for Local {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let key = key.clone();
        if matches!(mode, PutMode::Update(_)) {
            // Whoever would lose finds out before it writes.
            let slot = self.disk.slot(&key).await?;
            return self
                .on_disk(move |disk| {
                    let lock = slot.lock(disk)?;
                    disk.check(&key, &mode)?;
                    let temp = Temp::holding(disk, &body)?;
                    disk.install(&lock, temp, &key, &mode)
                })
                .await;
        }
        let temp = self
            .on_disk({
                let (key, mode) = (key.clone(), mode.clone());
                move |disk| {
                    disk.check(&key, &mode)?;
                    Temp::holding(disk, &body)
                }
            })
            .await?;
        let slot = self.disk.slot(&key).await?;
        self.on_disk(move |disk| disk.install(&slot.lock(disk)?, temp, &key, &mode)).await
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        let temp = self.on_disk(Temp::new).await?;
        Ok(Box::new(FileWriter {
            store: self.clone(),
            key: key.clone(),
            temp: Some(temp),
            unsynced: 0,
            syncing: None,
        }))
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let key = key.clone();
        self.on_disk(move |disk| disk.read(&key, range)).await
    }

    async fn read_into(&self, key: &ObjectKey, start: u64, mut buffer: BytesMut) -> Result<BytesMut> {
        let key = key.clone();
        self.on_disk(move |disk| {
            disk.fill(&key, start, &mut buffer, |_| {})?;
            Ok(buffer)
        })
        .await
    }

    async fn read_digested(&self, key: &ObjectKey, start: u64, mut buffer: BytesMut) -> Result<Digested> {
        let key = key.clone();
        self.on_disk(move |disk| {
            let mut hasher = BlockHasher::default();
            disk.fill(&key, start, &mut buffer, |piece| hasher.update(piece))?;
            Ok(Digested { buffer, blocks: Some(hasher.finish()) })
        })
        .await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        let key = key.clone();
        self.on_disk(move |disk| disk.info(key)).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        let key = key.clone();
        let slot = self.disk.slot(&key).await?;
        self.on_disk(move |disk| disk.remove(&slot.lock(disk)?, &key)).await
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        list::stream(Arc::clone(&self.disk), prefix.cloned())
    }
}

/// Bytes that are written before they are sent on to the disk while the next ones are written. Without that, the
/// system keeps all of them until the end, and the disk idles meanwhile.
const SYNC_EVERY: usize = 32 << 20;

/// A temporary file that takes its place when it is finished.
#[derive(Debug)]
struct FileWriter {
    store: Local,
    key: ObjectKey,
    temp: Option<Temp>,
    /// Bytes that no sync covers yet.
    unsynced: usize,
    syncing: Option<JoinHandle<Result<()>>>,
}

impl FileWriter {
    /// Begins to sync what was written, unless that is being done.
    async fn sync_early(&mut self, temp: &Temp) -> Result<()> {
        if self.unsynced < SYNC_EVERY || self.syncing.as_ref().is_some_and(|sync| !sync.is_finished()) {
            return Ok(());
        }
        self.synced().await?;
        let sync = temp.sync_apart()?;
        self.syncing = Some(tokio::spawn(blocking(sync)));
        self.unsynced = 0;
        Ok(())
    }

    /// Waits for the sync that was begun. The system tells of a failure once, so that its answer must not be lost.
    async fn synced(&mut self) -> Result<()> {
        match self.syncing.take() {
            Some(sync) => {
                sync.await.map_err(|error| Error::internal("a sync ended early").with_source(error))?
            }
            None => Ok(()),
        }
    }
}

#[async_trait]
impl ObjectWriter for FileWriter {
    async fn write(&mut self, part: Bytes) -> Result<()> {
        let mut temp = self.temp.take().ok_or_else(lost)?;
        self.unsynced += part.len();
        let temp = blocking(move || temp.append(&part).map(|()| temp)).await?;
        self.sync_early(&temp).await?;
        self.temp = Some(temp);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<Version> {
        let temp = self.temp.take().ok_or_else(lost)?;
        self.synced().await?;
        let temp = blocking(move || temp.sync().map(|()| temp)).await?;
        let slot = self.store.disk.slot(&self.key).await?;
        let key = self.key.clone();
        self.store.on_disk(move |disk| disk.install(&slot.lock(disk)?, temp, &key, &PutMode::Overwrite)).await
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        drop(self.temp.take());
        Ok(())
    }
}

fn lost() -> Error {
    Error::internal("this writer has failed before").with_help("start the object again")
}
