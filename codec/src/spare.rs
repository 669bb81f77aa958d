//! Working memory that outlives the thread that used it.
//!
//! The pipeline starts its threads anew for each snapshot. Memory of their own would come from the system each time, page
//! by page, which takes as long as the work on some MiB of weights.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most that is kept for threads to come.
const MOST: usize = 16;

/// What nobody uses at the moment.
#[derive(Debug)]
pub(crate) struct Spare<T>(Mutex<Vec<Box<T>>>);

impl<T: Default> Spare<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// What was last used of what is kept, as it was left, or a new one.
    pub(crate) fn take(&self) -> Box<T> {
        self.kept().pop().unwrap_or_default()
    }

    /// Keeps it for the next one to take.
    pub(crate) fn put(&self, used: Box<T>) {
        let mut kept = self.kept();
        if kept.len() < MOST {
            kept.push(used);
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Box<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_thread_leaves_another_takes() {
        static SPARE: Spare<Vec<u8>> = Spare::new();
        let leave = || {
            let mut taken = SPARE.take();
            taken.push(7);
            SPARE.put(taken);
        };
        std::thread::scope(|scope| scope.spawn(leave).join()).unwrap();
        assert_eq!(*SPARE.take(), [7]);
        assert!(SPARE.take().is_empty());
        for _ in 0..2 * MOST {
            SPARE.put(Box::default());
        }
        assert_eq!(SPARE.kept().len(), MOST);
    }
}
