//! Randomness and the clock, from the standard library alone.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// 64 bits that no other call on any machine is likely to draw: keys of the operating system, which change with
/// each call, over time, process and thread. For names, not for secrets.
pub(crate) fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    SystemTime::now().hash(&mut hasher);
    std::process::id().hash(&mut hasher);
    std::thread::current().id().hash(&mut hasher);
    hasher.finish()
}

/// A random time of at most `limit`, so that clients that failed together do not come back together.
pub(crate) fn jitter(limit: Duration) -> Duration {
    let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(random() % nanos.max(1))
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    ms(SystemTime::now())
}

/// Milliseconds from 1970 to `time`; 0 for earlier times.
pub(crate) fn ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds of `time`.
pub(crate) fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_differ() {
        let mut seen: Vec<_> = (0..10_000).map(|_| random()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10_000);
        assert!(jitter(Duration::from_millis(3)) < Duration::from_millis(3));
    }
}
