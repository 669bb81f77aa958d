//! The laws: functions that return what broke. The macros turn each into a test.

pub mod codec;
pub mod deployment;
pub mod store;

use std::fmt::{Debug, Display};
use std::io::Write;
use std::pin::Pin;

use crate::{ErrorKind, Result as CoreResult};

/// What a law of asynchronous things returns. It need not move between threads.
pub type Checked = Pin<Box<dyn Future<Output = Result<(), String>>>>;

/// Says that a law could not be checked, past the capture of test output: a skipped law must not look like a kept one.
fn skipped(law: &str, why: &str) {
    #[expect(clippy::disallowed_methods, reason = "the harness swallows what is printed in any other way")]
    let mut out = std::io::stderr();
    let _unwritable = writeln!(out, "skipped: {law}: {why}");
}

/// Turns a broken condition into what broke.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}
use ensure;

/// Says what was tried when it failed.
trait Told<T> {
    fn told(self, what: impl Display) -> Result<T, String>;
}

impl<T> Told<T> for CoreResult<T> {
    fn told(self, what: impl Display) -> Result<T, String> {
        self.map_err(|error| format!("{what}: {error:?}"))
    }
}

/// The call must fail with this kind.
fn fails<T: Debug>(outcome: CoreResult<T>, wanted: ErrorKind, what: impl Display) -> Result<(), String> {
    match outcome {
        Err(error) if error.kind() == wanted => Ok(()),
        Err(error) => Err(format!("{what}: wanted {wanted}, found {error:?}")),
        Ok(value) => Err(format!("{what}: wanted {wanted}, found {value:?}")),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_macros_have_every_law() {
        let text = include_str!("../macros.rs");
        let words: Vec<_> = text.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        let codec = super::codec::ALL.iter().map(|(name, _)| *name);
        let store = super::store::ALL.iter().map(|(name, _)| *name);
        let deployment = super::deployment::ALL.iter().map(|(name, _)| *name);
        for name in codec.chain(store).chain(deployment) {
            assert!(words.contains(&name), "no macro has the law `{name}`");
        }
    }
}
