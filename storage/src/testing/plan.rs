//! What goes wrong, and when.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use towline_core::ErrorKind;

/// An operation on a store, or on a writer of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Operation {
    /// `SnapshotStore::put`.
    Put,
    /// `SnapshotStore::writer`.
    Writer,
    /// `ObjectWriter::write`.
    Write,
    /// `ObjectWriter::finish`.
    Finish,
    /// `ObjectWriter::abort`.
    Abort,
    /// `SnapshotStore::get` and `read_into`.
    Get,
    /// `SnapshotStore::head`.
    Head,
    /// `SnapshotStore::delete`.
    Delete,
    /// `SnapshotStore::list`, as a whole.
    List,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Put,
        Self::Writer,
        Self::Write,
        Self::Finish,
        Self::Abort,
        Self::Get,
        Self::Head,
        Self::Delete,
        Self::List,
    ];

    /// As it is called in the log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Writer => "writer",
            Self::Write => "write",
            Self::Finish => "finish",
            Self::Abort => "abort",
            Self::Get => "get",
            Self::Head => "head",
            Self::Delete => "delete",
            Self::List => "list",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something that goes wrong with an operation. Times are by tokio's clock, so that a paused one makes them free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It has no effect and fails with this kind.
    Refuse(ErrorKind),
    /// It takes effect, and its answer is lost: it fails with this kind. `Conflict` and `AlreadyExists` are what a
    /// client sees that repeated its own request.
    Lose(ErrorKind),
    /// This operation and those after it, so many in all, are refused with `Unavailable`.
    Burst(u32),
    /// It fails with `TimedOut` and takes effect this much later, even if the process is dead by then: the request
    /// was on its way. For puts, finished writers and deletes.
    Late(Duration),
    /// It begins this much later.
    Delay(Duration),
    /// It has no effect and never answers.
    Hang,
    /// One bit of what is read is another. For reads.
    FlipBit,
    /// What is read ends early: `read_into` says so with `Corrupt`, as every store does. For reads.
    Truncate,
    /// The answer is that of the last list under the same prefix, if there was one. For lists.
    StaleList,
}

impl Fault {
    /// Whether it can happen to `operation`.
    pub(super) fn fits(self, operation: Operation) -> bool {
        match self {
            Self::FlipBit | Self::Truncate => operation == Operation::Get,
            Self::StaleList => operation == Operation::List,
            Self::Late(_) => matches!(operation, Operation::Put | Operation::Finish | Operation::Delete),
            Self::Refuse(_) | Self::Lose(_) | Self::Burst(_) | Self::Delay(_) | Self::Hang => true,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refuse(kind) => write!(f, "refused with {kind}"),
            Self::Lose(kind) => write!(f, "done, answered with {kind}"),
            Self::Burst(length) => write!(f, "the first of {length} refused"),
            Self::Late(after) => write!(f, "timed out, done {} ms later", after.as_millis()),
            Self::Delay(time) => write!(f, "{} ms late", time.as_millis()),
            Self::Hang => f.write_str("never answered"),
            Self::FlipBit => f.write_str("a bit flipped"),
            Self::Truncate => f.write_str("cut short"),
            Self::StaleList => f.write_str("the list from before"),
        }
    }
}

/// A fault that happens by chance.
#[derive(Debug, Clone)]
pub struct Rule {
    fault: Fault,
    per_mille: u64,
    operations: Vec<Operation>,
    only: Option<String>,
    except: Option<String>,
}

impl Rule {
    /// `fault` happens to so many of a thousand operations that it fits.
    #[must_use]
    pub fn new(fault: Fault, per_mille: u64) -> Self {
        Self { fault, per_mille, operations: Operation::ALL.to_vec(), only: None, except: None }
    }

    /// It happens to these operations alone.
    #[must_use]
    pub fn on(mut self, operations: &[Operation]) -> Self {
        self.operations = operations.to_vec();
        self
    }

    /// It happens to objects alone whose key contains `part`.
    #[must_use]
    pub fn only(mut self, part: impl Into<String>) -> Self {
        self.only = Some(part.into());
        self
    }

    /// It spares objects whose key contains `part`.
    #[must_use]
    pub fn except(mut self, part: impl Into<String>) -> Self {
        self.except = Some(part.into());
        self
    }

    fn takes(&self, operation: Operation, key: &str) -> bool {
        self.fault.fits(operation)
            && self.operations.contains(&operation)
            && self.only.as_ref().is_none_or(|part| key.contains(part))
            && self.except.as_ref().is_none_or(|part| !key.contains(part))
    }
}

/// Which faults happen. What happens to operation `n` depends on the seed, on `n` and on what it is, and on nothing
/// else: the same operations in the same order meet the same faults.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    seed: u64,
    rules: Vec<Rule>,
    exact: BTreeMap<u64, Fault>,
}

impl Plan {
    /// Nothing goes wrong yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Adds a rule. Of several that would hit an operation the first one does.
    #[must_use]
    pub fn with(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// `fault` happens to operation `number`, from 1, if it fits.
    #[must_use]
    pub fn at(mut self, number: u64, fault: Fault) -> Self {
        self.exact.insert(number, fault);
        self
    }

    pub(super) fn exact(&self, number: u64) -> Option<Fault> {
        self.exact.get(&number).copied()
    }

    /// What chance brings, and the numbers to work it out with.
    pub(super) fn draw(&self, number: u64, operation: Operation, key: &str) -> (Option<Fault>, Mix) {
        let mut mix = Mix(self.seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
        // Each rule draws, whether it is asked or not: another rule's key changes nothing for this one.
        let hits: Vec<_> = self.rules.iter().filter(|rule| mix.below(1000) < rule.per_mille).collect();
        let hit = hits.into_iter().find(|rule| rule.takes(operation, key));
        (hit.map(|rule| rule.fault), mix)
    }
}

/// SplitMix64: equal seeds give equal numbers everywhere.
#[derive(Debug, Clone)]
pub(super) struct Mix(u64);

impl Mix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }
}
