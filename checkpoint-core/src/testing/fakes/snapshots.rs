//! Published snapshots in memory, shared by the exporter that publishes and the deployment that loads.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{Error, Result, SnapshotIdentity, SnapshotKind, SnapshotRef, Weights, same_tensors};

/// Where a [`super::FakeDeployment`] gets weights from.
#[async_trait]
pub trait SnapshotSource: Debug + Send + Sync + 'static {
    /// The weights that `snapshot` makes of `served`, which is what the replica serves. A delta is applied to it
    /// whatever it is: the deployment checks that it is the parent.
    ///
    /// # Errors
    /// `NotFound` for what was never published, `Corrupt` for what is damaged or does not fit `served`.
    async fn load(&self, snapshot: &SnapshotRef, served: Option<&Weights>) -> Result<Weights>;
}

/// Snapshots by identity. A delta's payload is the XOR with its parent, so on another parent it yields other
/// weights. Clones share the snapshots.
#[derive(Debug, Clone, Default)]
pub struct FakeSnapshots(Arc<Mutex<BTreeMap<SnapshotIdentity, (SnapshotRef, Weights)>>>);

impl FakeSnapshots {
    /// Nothing is published yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Publishes `payload`: the weights, or for a delta what [`FakeSnapshots::delta`] gave.
    ///
    /// # Errors
    /// `AlreadyExists` if the identity is taken.
    pub fn publish(&self, snapshot: &SnapshotRef, payload: Weights) -> Result<()> {
        let mut map = self.lock();
        if map.contains_key(&snapshot.id.identity) {
            return Err(Error::already_exists(format!("{} is published already", snapshot.id))
                .with_help("choose another name"));
        }
        map.insert(snapshot.id.identity.clone(), (snapshot.clone(), payload));
        Ok(())
    }

    /// The XOR of two sets with the same tensors: parent and successor give the payload of a delta, parent and
    /// payload give the successor.
    ///
    /// # Errors
    /// `Invalid` if the tensors differ.
    pub fn delta(parent: &Weights, other: &Weights) -> Result<Weights> {
        same_tensors(parent.tensors(), other.tensors())?;
        Weights::new(parent.iter().zip(other.iter()).map(|((meta, old), (_, new))| {
            let mask: Vec<u8> = old.iter().zip(new).map(|(old, new)| old ^ new).collect();
            (meta.clone(), Bytes::from(mask))
        }))
    }

    /// The reference and the payload that were published under `identity`.
    #[must_use]
    pub fn get(&self, identity: &SnapshotIdentity) -> Option<(SnapshotRef, Weights)> {
        self.lock().get(identity).cloned()
    }

    /// Every reference, sorted by identity.
    #[must_use]
    pub fn published(&self) -> Vec<SnapshotRef> {
        self.lock().values().map(|(snapshot, _)| snapshot.clone()).collect()
    }

    /// Flips a bit of the payload; whether there was one.
    pub fn corrupt(&self, identity: &SnapshotIdentity) -> bool {
        let mut map = self.lock();
        let Some((_, payload)) = map.get_mut(identity) else { return false };
        let mut flipped = false;
        let tensors = payload.iter().map(|(meta, data)| {
            let mut data = data.to_vec();
            if let (false, Some(byte)) = (flipped, data.first_mut()) {
                *byte ^= 1;
                flipped = true;
            }
            (meta.clone(), Bytes::from(data))
        });
        match Weights::new(tensors.collect::<Vec<_>>()) {
            Ok(damaged) => *payload = damaged,
            Err(_) => return false,
        }
        flipped
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SnapshotIdentity, (SnapshotRef, Weights)>> {
        // No code that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl SnapshotSource for FakeSnapshots {
    async fn load(&self, snapshot: &SnapshotRef, served: Option<&Weights>) -> Result<Weights> {
        let (_, payload) = self
            .get(&snapshot.id.identity)
            .ok_or_else(|| Error::not_found(format!("{} was never published", snapshot.id)))?;
        match (snapshot.kind, served) {
            (SnapshotKind::Delta, Some(served)) => Self::delta(served, &payload)
                .map_err(|error| Error::corrupt(format!("{}: {}", snapshot.id, error.message()))),
            (SnapshotKind::Delta, None) => {
                Err(Error::chain_mismatch(format!("{} is a delta, and nothing is served", snapshot.id)))
            }
            _ => Ok(payload),
        }
    }
}
