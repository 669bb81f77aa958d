//! Why a command ended early.

use std::fmt;

/// What a command returns.
pub(crate) type Result<T> = std::result::Result<T, Stop>;

/// A command that did not do its work.
#[derive(Debug)]
pub(crate) enum Stop {
    /// A check failed or a program did.
    Failed(String),
    /// The machine lacks something that the command needs; nothing was checked.
    Skipped(String),
    /// The command line is wrong.
    Usage(String),
    /// It failed and has already said so.
    Told,
}

impl Stop {
    /// A failure with a message.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }

    /// The exit code of the process: 1, 3 or 2.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) | Self::Told => 1,
            Self::Usage(_) => 2,
            Self::Skipped(_) => 3,
        }
    }

    /// Puts words before the message, `while: message`.
    pub(crate) fn context(self, words: &str) -> Self {
        match self {
            Self::Failed(text) => Self::Failed(format!("{words}: {text}")),
            Self::Skipped(text) => Self::Skipped(format!("{words}: {text}")),
            Self::Usage(text) => Self::Usage(format!("{words}: {text}")),
            Self::Told => Self::Told,
        }
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(text) | Self::Skipped(text) | Self::Usage(text) => f.write_str(text),
            Self::Told => f.write_str("failed"),
        }
    }
}

/// A failure that names the file and what was wanted of it.
pub(crate) fn file_error<'a>(
    doing: &'a str,
    path: &'a std::path::Path,
) -> impl FnOnce(std::io::Error) -> Stop + 'a {
    move |error| Stop::failed(format!("cannot {doing} `{}`: {error}", path.display()))
}
