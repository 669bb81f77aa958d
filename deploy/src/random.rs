//! Randomness for names and jitter, which need to differ but not to be secret.

use std::hash::{BuildHasher, Hasher, RandomState};

use towline_core::{OpId, Result};

/// 64 bits that no other call gives, in this process or another: the standard library seeds its hash tables from
/// the operating system once a thread, and counts on from there.
pub(crate) fn bits() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// An operation id that nobody used before.
pub(crate) fn op() -> Result<OpId> {
    OpId::new(format!("{:016x}{:016x}", bits(), bits()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn operations_differ() {
        let ids: std::collections::HashSet<_> =
            (0..1000).map(|_| super::op().unwrap().as_str().to_owned()).collect();
        assert_eq!(ids.len(), 1000);
    }
}
