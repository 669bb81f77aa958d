//! Waiting for a submitted operation until a deadline.

use std::future::Future;
use std::time::Duration;

use tokio::time::timeout;
use towline_core::{Error, Pending, Result};

/// Adds a wait with a deadline to the handle of a submitted operation.
///
/// On the handle itself the wait uses it up; on `&mut handle` it can be asked again after a deadline has passed.
pub trait PendingExt<T>: Sized {
    /// Waits for the result, at most for `deadline`.
    ///
    /// # Errors
    /// `TimedOut` if the operation is not done by then: it goes on, and its place in the order stays. Else what the
    /// operation answers.
    fn wait(self, deadline: Duration) -> impl Future<Output = Result<T>> + Send;
}

impl<T: Send> PendingExt<T> for Pending<T> {
    async fn wait(mut self, deadline: Duration) -> Result<T> {
        PendingExt::wait(&mut self, deadline).await
    }
}

impl<T: Send> PendingExt<T> for &mut Pending<T> {
    async fn wait(self, deadline: Duration) -> Result<T> {
        match timeout(deadline, &mut *self).await {
            Ok(result) => result,
            Err(_) => Err(Error::timed_out(format!(
                "the operation is {} after {} s, and goes on",
                format!("{:?}", self.status()).to_lowercase(),
                deadline.as_secs_f64()
            ))
            .with_help("wait longer, or look at its status")),
        }
    }
}
