use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::watch;
use towline_core::bytes::{Bytes, BytesMut};
use towline_core::testing::laws::store as laws;
use towline_core::testing::{FakeStore, block_on};
use towline_core::{
    BoxStream, Error, ErrorKind, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore,
    Version, async_trait, listing,
};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    WrongSize,
    NoCut,
    ReversedIsEmpty,
    ShortRead,
    MissingIsEmpty,
    CreateLooksFirst,
    UpdateLooksFirst,
    UpdateCreates,
    WritesInHalves,
    ShowsParts,
    DropFinishes,
    AbortFinishes,
    FinishKeepsTheOld,
    LosesLargeParts,
    DeleteWantsIt,
    PrefixesAreText,
    OnePage,
    VersionsComeAgain,
    CutsLongUpdates,
}

#[derive(Debug, Clone)]
struct Broken {
    inner: FakeStore,
    fault: Fault,
    /// How many looked before they wrote, or read.
    seen: Arc<watch::Sender<usize>>,
}

impl Broken {
    fn new(fault: Fault) -> Self {
        Self { inner: FakeStore::new(), fault, seen: Arc::default() }
    }

    fn see(&self) -> usize {
        self.seen.send_modify(|seen| *seen += 1);
        *self.seen.borrow()
    }

    /// Keeps a faulty operation half done until others came into its way: else it were up to the scheduler whether
    /// a law can see the fault at all.
    async fn until_seen(&self, wanted: usize) {
        let mut seen = self.seen.subscribe();
        let met = seen.wait_for(|seen| *seen >= wanted);
        tokio::time::timeout(Duration::from_secs(10), met).await.expect("nobody came").expect("a store");
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn version(&self, version: Version) -> Version {
        if !self.is(Fault::VersionsComeAgain) {
            return version;
        }
        Version::new(format!("v{}", version.as_str().parse::<u64>().unwrap() % 8))
    }

    async fn checked_before(&self, key: &ObjectKey, mode: &PutMode) -> Result<()> {
        let found = self.inner.head(key).await.ok().map(|info| info.version);
        match mode {
            PutMode::Create if found.is_some() => Err(Error::already_exists("there")),
            PutMode::Update(wanted) if found.as_ref() != Some(wanted) => Err(Error::conflict("other")),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl SnapshotStore for Broken {
    async fn put(&self, key: &ObjectKey, mut body: Bytes, mut mode: PutMode) -> Result<Version> {
        let looks_first = match mode {
            PutMode::Create => self.is(Fault::CreateLooksFirst),
            PutMode::Update(_) => self.is(Fault::UpdateLooksFirst),
            PutMode::Overwrite => false,
        };
        if looks_first {
            self.checked_before(key, &mode).await?;
            self.see();
            self.until_seen(2).await;
            return self.inner.put(key, body, PutMode::Overwrite).await;
        }
        if let PutMode::Update(version) = &mode {
            match self.inner.head(key).await {
                Err(_) if self.is(Fault::UpdateCreates) => mode = PutMode::Create,
                Ok(info) if self.version(info.version.clone()) == *version => {
                    mode = PutMode::Update(info.version)
                }
                _ => {}
            }
            if self.is(Fault::CutsLongUpdates) {
                body.truncate(1500);
            }
        }
        if self.is(Fault::WritesInHalves) && mode == PutMode::Overwrite {
            self.inner.put(key, body.slice(..body.len() / 2), PutMode::Overwrite).await?;
            let seen = *self.seen.borrow();
            self.until_seen(seen + 1).await;
        }
        self.inner.put(key, body, mode).await.map(|version| self.version(version))
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(Writer { store: self.clone(), key: key.clone(), body: Vec::new(), done: false }))
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let found = self.inner.get(key, range.clone()).await;
        if self.is(Fault::WritesInHalves) {
            self.see();
        }
        match (&found, self.fault, range) {
            (Err(error), Fault::MissingIsEmpty, _) if error.kind() == ErrorKind::NotFound => Ok(Bytes::new()),
            (Err(error), Fault::ReversedIsEmpty, _) if error.kind() == ErrorKind::Invalid => Ok(Bytes::new()),
            (Ok(body), Fault::NoCut, Some(range)) if (body.len() as u64) < range.end - range.start => {
                Err(Error::invalid("behind the end"))
            }
            _ => found,
        }
    }

    async fn read_into(&self, key: &ObjectKey, start: u64, mut buffer: BytesMut) -> Result<BytesMut> {
        let found = self.get(key, Some(start..start + buffer.len() as u64)).await?;
        if found.len() < buffer.len() && !self.is(Fault::ShortRead) {
            return Err(Error::corrupt("cut short"));
        }
        buffer[..found.len()].copy_from_slice(&found);
        Ok(buffer)
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        let mut info = self.inner.head(key).await?;
        info.version = self.version(info.version);
        info.size += u64::from(self.is(Fault::WrongSize));
        Ok(info)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        if self.is(Fault::DeleteWantsIt) {
            self.inner.head(key).await?;
        }
        self.inner.delete(key).await
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let mut all = self.inner.list(None);
        let mut all =
            std::iter::from_fn(|| at_once(std::future::poll_fn(|context| all.as_mut().poll_next(context))));
        let text = self.is(Fault::PrefixesAreText);
        let limit = if self.is(Fault::OnePage) { 256 } else { usize::MAX };
        let under = |key: &ObjectKey| {
            prefix.is_none_or(|prefix| {
                if text { key.as_str().starts_with(prefix.as_str()) } else { key.is_under(prefix) }
            })
        };
        let found: Vec<_> = all
            .by_ref()
            .map(Result::unwrap)
            .filter(|info| under(&info.key))
            .take(limit)
            .map(|mut info| {
                info.version = self.version(info.version);
                Ok(info)
            })
            .collect();
        listing(found)
    }
}

/// The fake answers at once, so nothing of it ever waits.
fn at_once<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer,
        Poll::Pending => panic!("the fake waits"),
    }
}

#[derive(Debug)]
struct Writer {
    store: Broken,
    key: ObjectKey,
    body: Vec<u8>,
    done: bool,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, part: Bytes) -> Result<()> {
        if self.store.is(Fault::LosesLargeParts) && part.len() > 4 << 20 {
            return Ok(());
        }
        self.body.extend_from_slice(&part);
        if self.store.is(Fault::ShowsParts) {
            self.store.put(&self.key, self.body.clone().into(), PutMode::Overwrite).await?;
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<Version> {
        self.done = true;
        let body = Bytes::from(std::mem::take(&mut self.body));
        if self.store.is(Fault::FinishKeepsTheOld) && self.store.head(&self.key).await.is_ok() {
            return Ok(self.store.head(&self.key).await?.version);
        }
        let version = self.store.inner.put(&self.key, body, PutMode::Overwrite).await?;
        Ok(self.store.version(version))
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        self.done = true;
        if self.store.is(Fault::AbortFinishes) {
            self.finish().await?;
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.store.is(Fault::DropFinishes) && !self.done {
            let body = Bytes::from(std::mem::take(&mut self.body));
            at_once(self.store.inner.put(&self.key, body, PutMode::Overwrite)).unwrap();
        }
    }
}

fn faults(law: &str) -> &'static [Fault] {
    match law {
        "put_get_head" => &[Fault::WrongSize],
        "ranges" => &[Fault::NoCut, Fault::ReversedIsEmpty],
        "read_into_fills" => &[Fault::ShortRead],
        "missing_is_not_found" => &[Fault::MissingIsEmpty],
        "exclusive_create" => &[Fault::CreateLooksFirst],
        "compare_and_swap_counter" => &[Fault::UpdateLooksFirst],
        "stale_update_conflicts" => &[Fault::UpdateCreates],
        "overwrites_are_whole" => &[Fault::WritesInHalves],
        "writers_are_invisible_until_finished" => &[Fault::ShowsParts],
        "unfinished_writers_leave_nothing" => &[Fault::DropFinishes, Fault::AbortFinishes],
        "writers_overwrite" => &[Fault::FinishKeepsTheOld],
        "large_objects" => &[Fault::LosesLargeParts],
        "delete_is_idempotent" => &[Fault::DeleteWantsIt],
        "prefixes_are_whole_segments" => &[Fault::PrefixesAreText],
        "lists_are_complete" => &[Fault::OnePage],
        "versions_change" => &[Fault::VersionsComeAgain],
        "random_operations" => &[Fault::CutsLongUpdates],
        other => panic!("no broken store for the law `{other}`"),
    }
}

#[test]
fn each_law_of_stores_catches_its_fault() {
    for (name, law) in laws::ALL {
        block_on(laws::check(Broken::new(Fault::None), *law)).unwrap();
        for &fault in faults(name) {
            let broken = block_on(laws::check(Broken::new(fault), *law));
            let message = broken.expect_err(&format!("`{name}` did not catch {fault:?}"));
            println!("{name} catches {fault:?}: {message}");
        }
    }
}

#[test]
fn a_pair_keeps_its_second_half_alive_until_the_law_is_done() {
    let guard = Arc::new(());
    let watched = Arc::clone(&guard);
    block_on(laws::check((FakeStore::new(), guard), |_| async move {
        if Arc::strong_count(&watched) == 2 { Ok(()) } else { Err("dropped".to_owned()) }
    }))
    .unwrap();
}
