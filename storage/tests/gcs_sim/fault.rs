//! What goes wrong, and for whom.

use std::fmt;
use std::time::Duration;

use super::request::Seen;

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It has no effect; the answer is 503 with `Retry-After` in seconds.
    Unavailable { retry_after: u64 },
    /// It takes effect; then the connection is closed, or reset, without a byte of an answer.
    LostReply { reset: bool },
    /// The body comes in pieces of so many bytes with a pause before each.
    SlowBody { piece: usize, pause: Duration },
    /// The body ends after so many bytes, with the connection, though the answer promised all of it.
    TruncatedBody { after: usize },
    /// The body ends after so many bytes as if that were its length, whatever `Content-Range` says.
    ShortBody { after: usize },
}

/// A fault for the next requests that match.
pub struct Planned {
    left: usize,
    fault: Fault,
    matches: Box<dyn Fn(&Seen) -> bool + Send + Sync>,
}

impl Planned {
    pub fn new(times: usize, fault: Fault, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Self {
        Self { left: times, fault, matches: Box::new(matches) }
    }

    pub fn left(&self) -> usize {
        self.left
    }

    /// The fault, if `seen` meets it.
    pub fn meets(&mut self, seen: &Seen) -> Option<Fault> {
        if self.left == 0 || !(self.matches)(seen) {
            return None;
        }
        self.left -= 1;
        Some(self.fault.clone())
    }
}

impl fmt::Debug for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Planned")
            .field("left", &self.left)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
