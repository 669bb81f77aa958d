//! One order to a deployment, from sending it to every replica being ready. Knows nothing of chains.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use towline_core::{
    Deployment, DeploymentStatus, Error, ErrorKind, HotLoad, Outcome, ReplicaStatus, Result, SnapshotId,
};

/// How long a single question to a deployment may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Asks every replica, within `deadline`.
pub(crate) async fn status(deployment: &dyn Deployment, deadline: Instant) -> Result<DeploymentStatus> {
    match timeout(remaining(deadline).min(CALL_TIMEOUT), deployment.status()).await {
        Ok(status) => status,
        Err(_) => Err(Error::timed_out("the deployment did not tell its state in time")
            .with_help("check that it runs and can be reached")),
    }
}

/// Orders a load and waits until every replica serves it.
///
/// A reply that got lost leaves open whether the order was taken: the same operation is sent again, and the
/// deployment's state settles it.
pub(crate) async fn order(
    deployment: &dyn Deployment,
    order: &HotLoad,
    deadline: Instant,
    every: Duration,
) -> Result<DeploymentStatus> {
    loop {
        let error = match timeout(remaining(deadline), deployment.hot_load(order)).await {
            Ok(Ok(())) => return served(deployment, &order.snapshot.id, deadline, every).await,
            Ok(Err(error)) => error,
            Err(_) => Error::timed_out("the deployment did not answer the order in time"),
        };
        let lost = is_passing(&error);
        if !lost && error.kind() != ErrorKind::Conflict {
            return Err(error);
        }
        // An error in the state may be an older order's, so only a success counts before ours is known to be taken;
        // and while another operation runs, what is served now will not stay.
        if lost
            && let Ok(status) = status(deployment, deadline).await
            && status.outcome(&order.snapshot.id) == Outcome::Committed
        {
            return Ok(status);
        }
        if !pause(deadline, every).await {
            return Err(Error::timed_out(format!(
                "the deployment did not take the order for {} in time",
                order.snapshot.id
            ))
            .with_source(error));
        }
    }
}

/// Waits until every replica serves `snapshot`.
pub(crate) async fn served(
    deployment: &dyn Deployment,
    snapshot: &SnapshotId,
    deadline: Instant,
    every: Duration,
) -> Result<DeploymentStatus> {
    loop {
        let state = match status(deployment, deadline).await {
            Ok(status) => match status.outcome(snapshot) {
                Outcome::Committed => return Ok(status),
                Outcome::Failed(why) => {
                    return Err(Error::corrupt(format!("the deployment did not load {snapshot}: {why}"))
                        .with_help("save a base and hot-load that"));
                }
                Outcome::Running => Ok(status),
            },
            Err(error) if is_passing(&error) => Err(error),
            Err(error) => return Err(error),
        };
        if !pause(deadline, every).await {
            let late = |found: &str| {
                Error::timed_out(format!("not every replica serves {snapshot} in time: {found}"))
                    .with_help("look at the slow replica, or allow more time; the next save must be a base")
            };
            return Err(match state {
                Ok(status) => late(&describe(&status)),
                Err(error) => late("the last question failed").with_source(error),
            });
        }
    }
}

/// Waits until `good` holds of the deployment's state, through errors that may pass.
pub(crate) async fn until(
    deployment: &dyn Deployment,
    deadline: Instant,
    every: Duration,
    good: impl Fn(&DeploymentStatus) -> bool + Send,
) -> Result<()> {
    loop {
        let state = match status(deployment, deadline).await {
            Ok(status) if good(&status) => return Ok(()),
            Ok(status) => Ok(status),
            // A route that is not there yet is part of a start.
            Err(error) if is_passing(&error) || error.kind() == ErrorKind::NotFound => Err(error),
            Err(error) => return Err(error),
        };
        if !pause(deadline, every).await {
            let late = |found: &str| {
                Error::timed_out(format!("the deployment does not take hot-loads in time: {found}"))
                    .with_help("check that its servers have started")
            };
            return Err(match state {
                Ok(status) => late(&describe(&status)),
                Err(error) => late("the last question failed").with_source(error),
            });
        }
    }
}

/// A warm-up request with its retries: nothing, or why it failed.
pub(crate) async fn warm_up(deployment: &dyn Deployment, retries: u32, interval: Duration) -> Option<String> {
    let mut tries = 0u32;
    loop {
        let error = match timeout(CALL_TIMEOUT, deployment.warm_up()).await {
            Ok(Ok(())) => return None,
            Ok(Err(error)) => error,
            Err(_) => Error::timed_out("the deployment did not answer the request"),
        };
        tries = tries.saturating_add(1);
        let hopeless =
            matches!(error.kind(), ErrorKind::Denied | ErrorKind::Invalid | ErrorKind::Unsupported);
        if hopeless || tries > retries {
            return Some(format!("after {tries} tries: {}", error.report()));
        }
        sleep(interval).await;
    }
}

/// The moment `after` from now; one that the clock cannot hold is as good as never.
pub(crate) fn deadline(after: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(60 * 60 * 24 * 365);
    let now = Instant::now();
    now.checked_add(after.min(NEVER)).unwrap_or(now)
}

/// Whether the same question may be answered later. After an order: whether its outcome is unknown.
pub(crate) fn is_passing(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut)
}

/// The slowest replica's value.
pub(crate) fn slowest(
    status: &DeploymentStatus,
    value: impl Fn(&ReplicaStatus) -> Option<Duration>,
) -> Option<Duration> {
    status.replicas.iter().filter_map(value).max()
}

/// Sleeps until the next question; false if the deadline has passed.
async fn pause(deadline: Instant, every: Duration) -> bool {
    let left = remaining(deadline);
    if left.is_zero() {
        return false;
    }
    // A pause of nothing would spin.
    sleep(left.min(every.max(Duration::from_millis(1)))).await;
    !remaining(deadline).is_zero()
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn describe(status: &DeploymentStatus) -> String {
    if status.replicas.is_empty() {
        return "it reports no replicas".into();
    }
    let one = |replica: &ReplicaStatus| {
        let serves = replica.identity.as_ref().map_or("nothing", |identity| identity.as_str());
        let ready = if replica.ready { "ready" } else { "not ready" };
        format!("replica {} serves {serves}, {:?}, {ready}", replica.name, replica.stage)
    };
    status.replicas.iter().take(8).map(one).collect::<Vec<_>>().join("; ")
}
