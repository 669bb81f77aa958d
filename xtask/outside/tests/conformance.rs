//! The three kits, as a third party uses them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use towline_core::bytes::Bytes;
use towline_core::testing::{CountingAllocator, DeploymentHarness};
use towline_core::{
    Codec, ContentDigest, Deployment, Result, SnapshotId, SnapshotIdentity, SnapshotKind, SnapshotRef,
    Weights, async_trait, pipeline,
};
use towline_outside::codec::Changes;
use towline_outside::deployment::{Published, Server};
use towline_outside::store::MapStore;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

towline_core::codec_conformance!(codec, Changes);
towline_core::store_conformance!(store, async { MapStore::default() });
towline_core::deployment_conformance!(deployment, async { Harness::default() });

#[derive(Default)]
struct Harness {
    server: Arc<Server>,
    count: AtomicU64,
}

impl Harness {
    fn put(&self, weights: &Weights, kind: SnapshotKind, published: Published) -> SnapshotRef {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let identity = SnapshotIdentity::new(format!("step-{number}")).unwrap();
        self.server.catalogue.lock().unwrap().insert(identity.clone(), published);
        SnapshotRef::new(SnapshotId { identity, digest: weights.content_digest() }, kind, "catalogue")
    }
}

#[async_trait]
impl DeploymentHarness for Harness {
    fn deployment(&self) -> Arc<dyn Deployment> {
        Arc::clone(&self.server) as Arc<dyn Deployment>
    }

    async fn publish(&self, weights: &Weights) -> Result<SnapshotRef> {
        Ok(self.put(weights, SnapshotKind::Base, Published::Base(weights.clone())))
    }

    async fn publish_delta(&self, parent: &SnapshotRef, weights: &Weights) -> Result<SnapshotRef> {
        // The kit publishes deltas on what is served.
        let served = self.server.serving.lock().unwrap().clone().unwrap();
        assert_eq!(served.0, parent.id);
        let mut frames = Vec::new();
        pipeline::encode(
            &Changes,
            weights,
            Some(&served.1),
            pipeline::Limits::default(),
            &mut |_, tensor| {
                frames.push(tensor.frames.into_iter().map(Bytes::from).collect());
                Ok(())
            },
        )?;
        let delta = self.put(weights, SnapshotKind::Delta, Published::Delta(frames));
        Ok(delta.with_parent(Some(served.0)).with_codec(Some(Changes.id())))
    }

    async fn served(&self) -> Result<Option<ContentDigest>> {
        Ok(self.server.serving.lock().unwrap().as_ref().map(|(_, weights)| weights.content_digest()))
    }

    async fn corrupt(&self, snapshot: &SnapshotRef) -> Result<bool> {
        let damaged = Published::Base(self.weights(666));
        self.server.catalogue.lock().unwrap().insert(snapshot.id.identity.clone(), damaged);
        Ok(true)
    }
}
