//! Handles of submitted operations, without a runtime.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::{Error, Result};

/// A submitted operation. It was submitted when the call returned, not when this is polled; dropping it cancels
/// nothing. Await it for the result; `towline-trainer-client` adds a wait with a deadline.
#[must_use = "the result of the operation, its failure included, comes only through this"]
pub struct Pending<T>(Arc<Mutex<Slot<T>>>);

/// The other end of a [`Pending`]: whoever runs the operation. Dropped without a word, it fails the operation.
pub struct Resolver<T>(Arc<Mutex<Slot<T>>>);

/// Where a submitted operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PendingStatus {
    /// It waits its turn.
    Queued,
    /// It is being done.
    Running,
    /// The result is there.
    Done,
}

struct Slot<T> {
    status: PendingStatus,
    result: Option<Result<T>>,
    waker: Option<Waker>,
}

/// A handle and its resolver.
pub fn pending<T>() -> (Resolver<T>, Pending<T>) {
    let slot = Arc::new(Mutex::new(Slot { status: PendingStatus::Queued, result: None, waker: None }));
    (Resolver(Arc::clone(&slot)), Pending(slot))
}

impl<T> Pending<T> {
    /// A handle whose result is already there.
    pub fn ready(result: Result<T>) -> Self {
        let (resolver, pending) = pending();
        resolver.resolve(result);
        pending
    }

    /// Where the operation is.
    #[must_use]
    pub fn status(&self) -> PendingStatus {
        lock(&self.0).status
    }
}

impl<T> Future for Pending<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T>> {
        let mut slot = lock(&self.0);
        match slot.result.take() {
            Some(result) => Poll::Ready(result),
            None if slot.status == PendingStatus::Done => {
                Poll::Ready(Err(Error::internal("the result of an operation was taken before")))
            }
            None => {
                slot.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<T> Resolver<T> {
    /// Says that the operation is being done.
    pub fn running(&self) {
        lock(&self.0).status = PendingStatus::Running;
    }

    /// Gives the result.
    pub fn resolve(self, result: Result<T>) {
        self.settle(result);
    }

    fn settle(&self, result: Result<T>) {
        let mut slot = lock(&self.0);
        if slot.status == PendingStatus::Done {
            return;
        }
        slot.status = PendingStatus::Done;
        slot.result = Some(result);
        let waker = slot.waker.take();
        drop(slot);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Resolver<T> {
    fn drop(&mut self) {
        self.settle(Err(Error::unavailable("the trainer stopped before the operation was done")
            .with_help("resume from the last state")));
    }
}

impl<T> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pending").field(&self.status()).finish()
    }
}

impl<T> fmt::Debug for Resolver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Resolver").field(&lock(&self.0).status).finish()
    }
}

fn lock<T>(slot: &Mutex<Slot<T>>) -> MutexGuard<'_, Slot<T>> {
    // No code that can panic runs under this lock, so the slot is whole whatever happened elsewhere.
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_that_is_dropped_fails_the_operation() {
        let (resolver, pending) = pending::<()>();
        assert_eq!(pending.status(), PendingStatus::Queued);
        resolver.running();
        assert_eq!(pending.status(), PendingStatus::Running);
        drop(resolver);
        assert_eq!(pending.status(), PendingStatus::Done);
        assert!(crate::testing::block_on(pending).unwrap_err().is_retryable());
    }

    #[test]
    fn a_result_wakes_whoever_waits() {
        let (resolver, pending) = pending();
        let thread = std::thread::spawn(move || resolver.resolve(Ok(7)));
        assert_eq!(crate::testing::block_on(pending).unwrap(), 7);
        thread.join().unwrap();
    }
}
