//! The error type of the whole workspace: one word wide, with a kind for the caller's reaction.

use std::error::Error as StdError;
use std::fmt;

/// A result with Towline's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about an [`Error`]. A new kind is added only where the reaction differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The name is taken. Choose another one, or use what is there.
    AlreadyExists,
    /// A delta does not fit what it would be applied to. Publish a base.
    ChainMismatch,
    /// Somebody else changed the object first. Read again, then decide.
    Conflict,
    /// Stored bytes are damaged: truncated, altered or not of this format. Restore from elsewhere.
    Corrupt,
    /// The credentials do not allow it. Change them.
    Denied,
    /// Another writer has taken over this job. Stop.
    Fenced,
    /// It existed and has been removed or has expired. Do not retry.
    Gone,
    /// The request itself is wrong. Change it.
    Invalid,
    /// No such thing.
    NotFound,
    /// A passing fault. Retry with a budget.
    Unavailable,
    /// This implementation cannot do it. Ask another one, or another way.
    Unsupported,
    /// A deadline passed; whether the operation took effect is unknown.
    TimedOut,
    /// A fault in this program. Report it.
    Internal,
}

impl ErrorKind {
    /// The kind's name as it is printed and sent over HTTP, in `snake_case`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AlreadyExists => "already_exists",
            Self::ChainMismatch => "chain_mismatch",
            Self::Conflict => "conflict",
            Self::Corrupt => "corrupt",
            Self::Denied => "denied",
            Self::Fenced => "fenced",
            Self::Gone => "gone",
            Self::Invalid => "invalid",
            Self::NotFound => "not_found",
            Self::Unavailable => "unavailable",
            Self::Unsupported => "unsupported",
            Self::TimedOut => "timed_out",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong, what was wanted and found, and the next step.
///
/// `Display` is one line and leaves the source out: print the chain of sources for the causes.
///
/// ```
/// use towline_core::{Error, ErrorKind};
/// let error = Error::new(ErrorKind::ChainMismatch, "step-40 is a delta on step-30, but the deployment serves step-20")
///     .with_help("publish a base, or hot-load step-30 first");
/// assert_eq!(
///     error.to_string(),
///     "step-40 is a delta on step-30, but the deployment serves step-20 \
///      (help: publish a base, or hot-load step-30 first)"
/// );
/// assert!(!error.is_retryable());
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    help: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind`. The message is lower case, without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), help: None, source: None }))
    }

    /// Adds the next step, as an order.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    /// Adds the cause, which the message must not repeat.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Puts `context: ` before the message: the tensor, file or step that was in work.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.0.message = format!("{context}: {}", self.0.message);
        self
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was wanted and what was found.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The next step, where there is one to name.
    #[must_use]
    pub fn help(&self) -> Option<&str> {
        self.0.help.as_deref()
    }

    /// Whether the same call may succeed later without any change.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.0.kind == ErrorKind::Unavailable
    }

    /// Kind, message, help and all causes in one line, for logs and HTTP bodies.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = format!("{}: {self}", self.kind());
        let mut source = self.source();
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),* $(,)?) => {
        impl Error {
            $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self { Self::new(ErrorKind::$kind, message) })*
        }
    };
}

constructors! {
    /// [`ErrorKind::AlreadyExists`].
    already_exists => AlreadyExists,
    /// [`ErrorKind::ChainMismatch`].
    chain_mismatch => ChainMismatch,
    /// [`ErrorKind::Conflict`].
    conflict => Conflict,
    /// [`ErrorKind::Corrupt`].
    corrupt => Corrupt,
    /// [`ErrorKind::Fenced`].
    fenced => Fenced,
    /// [`ErrorKind::Invalid`].
    invalid => Invalid,
    /// [`ErrorKind::NotFound`].
    not_found => NotFound,
    /// [`ErrorKind::Unavailable`].
    unavailable => Unavailable,
    /// [`ErrorKind::Unsupported`].
    unsupported => Unsupported,
    /// [`ErrorKind::TimedOut`].
    timed_out => TimedOut,
    /// [`ErrorKind::Internal`].
    internal => Internal,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        match &self.0.help {
            Some(help) => write!(f, " (help: {help})"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.report())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_word_wide_and_shareable() {
        fn shareable<T: Send + Sync + 'static>() {}
        shareable::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }

    #[test]
    fn display_leaves_the_source_to_the_chain() {
        let error = Error::corrupt("`a.bin` is cut short").with_source(std::io::Error::other("eof"));
        assert_eq!(error.to_string(), "`a.bin` is cut short");
        assert_eq!(error.report(), "corrupt: `a.bin` is cut short: eof");
    }
}
