//! A harness around the fakes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use towline_core::testing::{DeploymentHarness, FakeDeployment, FakeExporter, FakeSnapshots};
use towline_core::{
    CodecId, ContentDigest, Deployment, ExportRequest, Result, SnapshotExporter, SnapshotKind, SnapshotName,
    SnapshotRef, Weights, async_trait,
};

/// `deployment` is what the laws see; `inner` is where the weights are.
pub(crate) struct Harness {
    pub(crate) snapshots: FakeSnapshots,
    pub(crate) inner: FakeDeployment,
    pub(crate) deployment: Arc<dyn Deployment>,
    exporter: FakeExporter,
    count: AtomicUsize,
}

impl Harness {
    pub(crate) fn new(replicas: usize) -> Self {
        Self::around(|inner| inner.with_replicas(replicas), |inner| Arc::new(inner))
    }

    pub(crate) fn around(
        configure: impl FnOnce(FakeDeployment) -> FakeDeployment,
        wrap: impl FnOnce(FakeDeployment) -> Arc<dyn Deployment>,
    ) -> Self {
        let snapshots = FakeSnapshots::new();
        let exporter = FakeExporter::new(snapshots.clone(), Weights::default());
        let inner = configure(FakeDeployment::new(snapshots.clone()));
        Self { deployment: wrap(inner.clone()), inner, snapshots, exporter, count: AtomicUsize::new(0) }
    }

    async fn export(&self, weights: &Weights, parent: Option<&SnapshotRef>) -> Result<SnapshotRef> {
        self.exporter.set_weights(weights.clone());
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        let name = SnapshotName::new(format!("step-{number}"))?;
        let kind = if parent.is_some() { SnapshotKind::Delta } else { SnapshotKind::Base };
        let request = ExportRequest::new(name, kind, CodecId::of("test-xor"));
        self.exporter.export(request.with_parent(parent.map(|parent| parent.id.clone()))).await
    }
}

#[async_trait]
impl DeploymentHarness for Harness {
    fn deployment(&self) -> Arc<dyn Deployment> {
        Arc::clone(&self.deployment)
    }

    async fn publish(&self, weights: &Weights) -> Result<SnapshotRef> {
        self.export(weights, None).await
    }

    async fn publish_delta(&self, parent: &SnapshotRef, weights: &Weights) -> Result<SnapshotRef> {
        self.export(weights, Some(parent)).await
    }

    async fn served(&self) -> Result<Option<ContentDigest>> {
        self.inner.served()
    }

    async fn corrupt(&self, snapshot: &SnapshotRef) -> Result<bool> {
        Ok(self.snapshots.corrupt(&snapshot.id.identity))
    }

    fn deadline(&self) -> Duration {
        Duration::from_millis(300)
    }
}
