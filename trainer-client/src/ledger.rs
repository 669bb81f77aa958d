//! What every client keeps beside its trainer: names that are taken, and a failure until somebody has seen it.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use towline_core::{Error, ErrorKind, Result, SnapshotName};

/// Names are unique among these, not between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum NameKind {
    Sampler,
    State,
}

/// What an operation has to do with the trained weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It changes them: once it is lost, only a restored state is worth training on.
    Trains,
    /// It restores them: after a failure this is what may come next.
    Restores,
    /// It only saves them.
    Saves,
}

/// How many failures there had been when an operation got its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ticket(u64);

/// The books of one client. Locked for moments only.
#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    names: HashSet<(NameKind, SnapshotName)>,
    /// Failures so far.
    failures: u64,
    last: Option<Failure>,
    closed: bool,
}

#[derive(Debug)]
struct Failure {
    kind: ErrorKind,
    report: String,
    /// Whether a later call has told it.
    seen: bool,
    /// Whether the trained weights are in doubt until a state is restored.
    lost: bool,
}

impl Ledger {
    /// Lets a call in, or tells it why not: the client is closed, or an earlier operation failed.
    pub(crate) fn admit(&self, effect: Effect) -> Result<Ticket> {
        let mut books = self.books();
        if books.closed {
            return Err(Error::new(ErrorKind::Gone, "the training client is closed"));
        }
        if effect != Effect::Restores
            && let Some(failure) = books.last.as_mut().filter(|failure| failure.lost || !failure.seen)
        {
            failure.seen = true;
            return Err(failure.error());
        }
        Ok(Ticket(books.failures))
    }

    /// Whether an operation may run whose turn has come, or has an earlier one failed since it was submitted.
    pub(crate) fn may_run(&self, ticket: Ticket) -> Result<()> {
        let books = self.books();
        match &books.last {
            Some(failure) if ticket.0 < books.failures => Err(failure.error()),
            Some(_) | None => Ok(()),
        }
    }

    /// Records that an operation failed while it ran. Those queued behind it fail.
    pub(crate) fn failed(&self, error: &Error, effect: Effect) {
        let mut books = self.books();
        books.failures = books.failures.saturating_add(1);
        books.record(error, effect);
    }

    /// Records that an operation got no place in the order. Those that have one run.
    pub(crate) fn refused(&self, error: &Error, effect: Effect) {
        self.books().record(error, effect);
    }

    /// Records that a state was restored, optimizer or not: there are whole weights to train on again, and whoever
    /// restored them has dealt with the failure.
    pub(crate) fn restored(&self) {
        if let Some(failure) = &mut self.books().last {
            (failure.seen, failure.lost) = (true, false);
        }
    }

    /// Takes a name.
    pub(crate) fn take(&self, kind: NameKind, name: &SnapshotName) -> Result<()> {
        if self.books().names.insert((kind, name.clone())) {
            return Ok(());
        }
        let what = match kind {
            NameKind::Sampler => "sampler checkpoint",
            NameKind::State => "state",
        };
        Err(Error::already_exists(format!("this client has saved a {what} {name} already"))
            .with_help("choose another name, such as one with the step"))
    }

    /// Gives a name back after a save that failed, unless the store says that it is taken.
    pub(crate) fn give_back(&self, kind: NameKind, name: SnapshotName, error: &Error) {
        if error.kind() != ErrorKind::AlreadyExists {
            self.books().names.remove(&(kind, name));
        }
    }

    /// Lets no more calls in.
    pub(crate) fn close(&self) {
        self.books().closed = true;
    }

    /// The failure that no call has told yet.
    pub(crate) fn unseen(&self) -> Result<()> {
        match self.books().last.as_mut().filter(|failure| !failure.seen) {
            Some(failure) => {
                failure.seen = true;
                Err(failure.error())
            }
            None => Ok(()),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Nothing that panics runs under this lock, so the books are whole whatever happened elsewhere.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn record(&mut self, error: &Error, effect: Effect) {
        // A lost step stays lost, whatever fails after it.
        let lost = effect != Effect::Saves || self.last.as_ref().is_some_and(|failure| failure.lost);
        // The first failure that nobody saw is the one to tell.
        match &mut self.last {
            Some(unseen) if !unseen.seen => unseen.lost = lost,
            last => *last = Some(Failure { kind: error.kind(), report: error.report(), seen: false, lost }),
        }
    }
}

impl Failure {
    fn error(&self) -> Error {
        let error = Error::new(self.kind, format!("an earlier operation failed: {}", self.report));
        match self.lost {
            true => error.with_help("load the last state, then go on from its step"),
            false => error,
        }
    }
}
