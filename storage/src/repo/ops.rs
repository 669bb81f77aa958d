//! Operations on the store with a deadline, and the retries that are safe.

use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use towline_core::{
    Digested, Error, ErrorKind, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore, Version,
};

use crate::random::jitter;

/// How long one operation on the store may take unless the caller says otherwise.
pub(super) const DEADLINE: Duration = Duration::from_secs(600);
/// How long files that are of no use any more may hold up the failure that made them so.
const CLEAR: Duration = Duration::from_secs(10);

/// A store whose every wait ends.
#[derive(Debug, Clone)]
pub(super) struct Ops {
    store: Arc<dyn SnapshotStore>,
    deadline: Duration,
}

impl Ops {
    pub(super) fn new(store: Arc<dyn SnapshotStore>) -> Self {
        Self { store, deadline: DEADLINE }
    }

    pub(super) fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(super) async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let mut budget = Budget::new(self.deadline);
        loop {
            match self.within(key, self.store.get(key, range.clone())).await {
                Err(error) if error.is_retryable() => budget.pause(error).await?,
                outcome => return outcome,
            }
        }
    }

    /// Fills `buffer` from byte `start`; see [`SnapshotStore::read_into`].
    pub(super) async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        let read = |buffer| self.store.read_into(key, start, buffer);
        self.filling(key, buffer, read).await
    }

    /// As [`Ops::read_into`], with the digests of the blocks where the store takes them.
    pub(super) async fn read_digested(
        &self,
        key: &ObjectKey,
        start: u64,
        buffer: BytesMut,
    ) -> Result<Digested> {
        let read = |buffer| self.store.read_digested(key, start, buffer);
        self.filling(key, buffer, read).await
    }

    async fn filling<T, F: Future<Output = Result<T>>>(
        &self,
        key: &ObjectKey,
        mut buffer: BytesMut,
        read: impl Fn(BytesMut) -> F,
    ) -> Result<T> {
        let mut budget = Budget::new(self.deadline);
        loop {
            let length = buffer.len();
            match self.within(key, read(buffer)).await {
                // The failed call took the buffer with it.
                Err(error) if error.is_retryable() => {
                    budget.pause(error).await?;
                    buffer = BytesMut::zeroed(length);
                }
                outcome => return outcome,
            }
        }
    }

    pub(super) async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        let mut budget = Budget::new(self.deadline);
        loop {
            match self.within(key, self.store.head(key)).await {
                Err(error) if error.is_retryable() => budget.pause(error).await?,
                outcome => return outcome,
            }
        }
    }

    /// One attempt: only the caller knows what a retry would mean.
    pub(super) async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        self.within(key, self.store.put(key, body, mode)).await
    }

    /// Creates an object that nobody else would write like this: one that is there already, equal to the last
    /// byte, is an earlier attempt of this call whose answer was lost.
    pub(super) async fn create(&self, key: &ObjectKey, body: &Bytes) -> Result<()> {
        let mut budget = Budget::new(self.deadline);
        loop {
            let error = match self.put(key, body.clone(), PutMode::Create).await {
                Ok(_) => return Ok(()),
                Err(error) if may_have_landed(&error) => error,
                Err(error) => return Err(error),
            };
            match self.get(key, None).await {
                Ok(found) if found == *body => return Ok(()),
                Ok(_) => return Err(error),
                Err(missing) if missing.kind() == ErrorKind::NotFound => budget.pause(error).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes an object; a missing one is `Ok`, so that it may be tried again.
    pub(super) async fn delete(&self, key: &ObjectKey) -> Result<()> {
        let mut budget = Budget::new(self.deadline);
        loop {
            match self.within(key, self.store.delete(key)).await {
                Err(error) if error.is_retryable() => budget.pause(error).await?,
                outcome => return outcome,
            }
        }
    }

    /// Everything under `prefix`. A listing that broke off begins anew.
    pub(super) async fn list(&self, prefix: &ObjectKey) -> Result<Vec<ObjectInfo>> {
        let mut budget = Budget::new(self.deadline);
        loop {
            let mut objects = self.store.list(Some(prefix));
            let mut found = Vec::new();
            let failed = loop {
                let next = async { objects.next().await.transpose() };
                match self.within(prefix, next).await {
                    Ok(Some(object)) => found.push(object),
                    Ok(None) => return Ok(found),
                    Err(error) => break error,
                }
            };
            if !failed.is_retryable() {
                return Err(failed);
            }
            budget.pause(failed).await?;
        }
    }

    /// Removes what is under `prefix`, as far as the store lets it go at the first attempt.
    pub(super) async fn clear(&self, prefix: &ObjectKey) {
        let work = async {
            let mut objects = self.store.list(Some(prefix));
            let mut found = Vec::new();
            while let Some(object) = objects.next().await.transpose()? {
                found.push(object.key);
            }
            for key in found {
                self.store.delete(&key).await?;
            }
            Ok(())
        };
        // Whoever calls this has a failure to tell of already.
        let _kept = tokio::time::timeout(self.deadline.min(CLEAR), work).await.unwrap_or(Ok::<_, Error>(()));
    }

    pub(super) async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        self.within(key, self.store.writer(key)).await
    }

    /// Ends `operation` on `what` at the deadline.
    pub(super) async fn within<T>(
        &self,
        what: impl Display,
        operation: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        match tokio::time::timeout(self.deadline, operation).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::timed_out(format!(
                "`{what}`: the store did not answer within {} s",
                self.deadline.as_secs_f32()
            ))
            .with_help("check the store and the network, or set a longer deadline")),
        }
    }
}

/// Whether a conditional write that answered with `error` may have taken effect all the same.
pub(super) fn may_have_landed(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::AlreadyExists | ErrorKind::Conflict | ErrorKind::Unavailable | ErrorKind::TimedOut
    )
}

/// Attempts with growing pauses of random length, and an end.
#[derive(Debug)]
pub(super) struct Budget {
    /// Attempts that may still meet a fault of the store.
    faults: u32,
    /// Attempts that may still lose against others, who have got further meanwhile.
    races: u32,
    pause: Duration,
    until: Instant,
}

impl Budget {
    pub(super) fn new(deadline: Duration) -> Self {
        Self { faults: 8, races: 100, pause: Duration::from_millis(20), until: Instant::now() + deadline }
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// `error`, once the budget is spent.
    pub(super) async fn pause(&mut self, error: Error) -> Result<()> {
        let race = matches!(error.kind(), ErrorKind::Conflict | ErrorKind::AlreadyExists);
        let (left, longest) = if race {
            (&mut self.races, Duration::from_millis(200))
        } else {
            (&mut self.faults, Duration::from_secs(2))
        };
        if *left == 0 || Instant::now() >= self.until {
            return Err(error);
        }
        *left -= 1;
        tokio::time::sleep(jitter(self.pause.min(longest))).await;
        self.pause = (self.pause * 2).min(Duration::from_secs(2));
        Ok(())
    }
}
