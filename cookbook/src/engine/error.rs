//! The error of the engine: one message, fit to be shown to a user or sent over the wire.

/// What a fallible engine function returns.
pub type Result<T> = std::result::Result<T, EngineError>;

/// Why the engine refused: a message in lower case that says what was wanted and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineError {
    message: String,
}

impl EngineError {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }

    /// The message, without a trailing full stop and without any backtrace.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl std::fmt::Display for EngineError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for EngineError {}

/// candle's text ends in a Rust backtrace when `RUST_BACKTRACE` is set; it is cut off, because
/// the message may be sent to a client.
impl From<candle_core::Error> for EngineError {
    fn from(error: candle_core::Error) -> Self {
        let mut error = error;
        while let candle_core::Error::WithBacktrace { inner, .. } = error {
            error = *inner;
        }
        let text = error.to_string();
        let message: Vec<&str> = text
            .lines()
            .map(str::trim)
            .take_while(|line| !is_frame(line))
            .filter(|line| !line.is_empty())
            .collect();
        Self::new(message.join("; "))
    }
}

/// Whether a line looks like the frame of a backtrace: `12: path::of::function`.
fn is_frame(line: &str) -> bool {
    line.split_once(": ")
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn backtraces_do_not_reach_the_message() {
        let nested =
            candle_core::Error::Msg("outer\n   0: std::backtrace\n   1: main".into()).context("while adding");
        assert_eq!(EngineError::from(nested).message(), "while adding; outer");
        let (a, b) = (
            Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap(),
            Tensor::zeros((4, 5), candle_core::DType::F32, &Device::Cpu).unwrap(),
        );
        let error = EngineError::from(a.add(&b).unwrap_err());
        assert!(error.message().contains("shape"), "{error}");
        assert!(!error.message().contains("candle_core::"), "{error}");
    }
}
