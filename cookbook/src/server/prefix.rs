//! The prefix cache: prompts that were read before, for the weights that read them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use towline_core::ContentDigest;

use crate::engine::Prefix;

/// Everything that decides what the served model computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Salt {
    /// The full weights: what is served, or what the adapter is on.
    pub(super) weights: ContentDigest,
    /// The adapter's factors, and the bits of their scale.
    pub(super) adapter: Option<(ContentDigest, u64)>,
}

/// Read prompts, salted by the digests of the weights: an entry can never be used with other weights.
///
/// Without a reset, entries of older weights stay and serve again when those weights come back.
#[derive(Debug)]
pub(super) struct PrefixCache {
    capacity: usize,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    map: HashMap<(Salt, Vec<u32>), (Arc<Prefix>, u64)>,
    clock: u64,
}

impl PrefixCache {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, entries: Mutex::default() }
    }

    /// The longest cached beginning of `prompt` under these weights.
    pub(super) fn longest(&self, weights: &Salt, prompt: &[u32]) -> Option<Arc<Prefix>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.clock += 1;
        let now = entries.clock;
        for length in (1..=prompt.len()).rev() {
            let key = (*weights, prompt.get(..length)?.to_vec());
            if let Some((prefix, used)) = entries.map.get_mut(&key) {
                *used = now;
                return Some(Arc::clone(prefix));
            }
        }
        None
    }

    /// Keeps a read prompt; the one that was used longest ago makes room.
    pub(super) fn insert(&self, weights: &Salt, prefix: Arc<Prefix>) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.clock += 1;
        let now = entries.clock;
        entries.map.insert((*weights, prefix.tokens().to_vec()), (prefix, now));
        while entries.map.len() > self.capacity {
            let oldest = entries.map.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            match oldest {
                Some(key) => entries.map.remove(&key),
                None => return,
            };
        }
    }

    /// Drops everything.
    pub(super) fn reset(&self) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).map.clear();
    }
}
