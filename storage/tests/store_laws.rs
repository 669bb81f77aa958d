//! The bigger laws of the example `store_laws`: a good store keeps them, one that lies breaks them.

#[path = "../examples/store_laws/bigger.rs"]
mod bigger;
#[path = "../examples/store_laws/cycle.rs"]
mod cycle;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use towline_core::{
    BoxStream, Error, ErrorKind, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore,
    Version, async_trait,
};
use towline_storage::Memory;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_keeps_all() {
    for (name, law) in bigger::ALL {
        // The object of 256 MiB is for services: here it would be but a copy.
        if *name != "object_of_256_mib" {
            law(Arc::new(Memory::new())).await.unwrap_or_else(|broke| panic!("{name}: {broke}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_answers_are_settled() {
    for name in ["create_race_of_64", "counter_of_8", "repo_cycle"] {
        let store = Bent { inner: Memory::new(), how: Way::LosesAnswers, puts: AtomicUsize::new(0) };
        law(name)(Arc::new(store)).await.unwrap_or_else(|broke| panic!("{name}: {broke}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_that_do_not_hold_are_found() {
    for (name, broke) in
        [("create_race_of_64", "racers created the object"), ("counter_of_8", "of them are there")]
    {
        let store = Bent { inner: Memory::new(), how: Way::ChecksThenPuts, puts: AtomicUsize::new(0) };
        let found = law(name)(Arc::new(store)).await.unwrap_err();
        assert!(found.contains(broke), "{name}: {found}");
    }
}

fn law(name: &str) -> bigger::Law {
    bigger::ALL.iter().find(|(known, _)| *known == name).unwrap().1
}

#[derive(Debug, PartialEq)]
enum Way {
    /// Every third conditional write that takes effect answers with an error.
    LosesAnswers,
    /// A condition is looked at, and the write follows a while later.
    ChecksThenPuts,
}

#[derive(Debug)]
struct Bent {
    inner: Memory,
    how: Way,
    puts: AtomicUsize,
}

#[async_trait]
impl SnapshotStore for Bent {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        if self.how == Way::LosesAnswers {
            let version = self.inner.put(key, body, mode).await?;
            return match self.puts.fetch_add(1, Ordering::Relaxed) % 3 {
                1 => Err(Error::new(ErrorKind::TimedOut, "the answer was lost")),
                _ => Ok(version),
            };
        }
        let found = self.inner.head(key).await.ok().map(|info| info.version);
        match (mode, found) {
            (PutMode::Create, Some(_)) => return Err(Error::already_exists("it is there")),
            (PutMode::Update(wanted), found) if found.as_ref() != Some(&wanted) => {
                return Err(Error::new(ErrorKind::Conflict, "another version is there"));
            }
            _ => {}
        }
        // Long enough that others look meanwhile, however the threads are scheduled.
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.inner.put(key, body, PutMode::Overwrite).await
    }
    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        self.inner.writer(key).await
    }
    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        self.inner.get(key, range).await
    }
    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        self.inner.head(key).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.inner.delete(key).await
    }
    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        self.inner.list(prefix)
    }
}
