use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use towline_core::testing::laws::deployment as laws;
use towline_core::testing::{FakeDeployment, block_on};
use towline_core::{
    Capabilities, CodecId, Deployment, DeploymentStatus, Error, HotLoad, OpId, Result, SnapshotId,
    SnapshotIdentity, SnapshotKind, SnapshotRef, Stage, Weights, async_trait,
};

use crate::common::Harness;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    OnlySaysSo,
    NeverTwice,
    EveryCallIsNew,
    DeltaAsWhole,
    AnyParent,
    LosesTheOldOnFailure,
    SaysNothingOfFailure,
    ChecksNothing,
    TakesAnyCodec,
    TakesAdapters,
    NoReplicasAtFirst,
    WarmUpFails,
}

#[derive(Debug)]
struct Broken {
    inner: FakeDeployment,
    fault: Fault,
    calls: AtomicU64,
    said: Mutex<Option<SnapshotId>>,
    seen: Mutex<Vec<SnapshotIdentity>>,
}

impl Broken {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn again(&self, order: &HotLoad, change: impl FnOnce(&mut HotLoad)) -> Result<HotLoad> {
        let mut order = order.clone();
        if self.is(Fault::EveryCallIsNew) {
            order.op = OpId::new(format!("call-{}", self.calls.fetch_add(1, Ordering::SeqCst)))?;
        }
        change(&mut order);
        Ok(order)
    }
}

#[async_trait]
impl Deployment for Broken {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities().with_adapters(false)
    }

    async fn status(&self) -> Result<DeploymentStatus> {
        let mut status = self.inner.status().await?;
        if let Some(said) = self.said.lock().unwrap().clone() {
            for replica in &mut status.replicas {
                replica.identity = Some(said.identity.clone());
                replica.digest = Some(said.digest);
                replica.stage = Stage::Idle;
            }
        }
        if self.is(Fault::NoReplicasAtFirst) && self.seen.lock().unwrap().is_empty() {
            status.replicas.clear();
        }
        Ok(status)
    }

    async fn hot_load(&self, order: &HotLoad) -> Result<()> {
        let identity = order.snapshot.id.identity.clone();
        let seen = {
            let mut seen = self.seen.lock().unwrap();
            let before = seen.contains(&identity);
            seen.push(identity);
            before
        };
        let snapshot = &order.snapshot;
        if self.is(Fault::OnlySaysSo) {
            *self.said.lock().unwrap() = Some(snapshot.id.clone());
            return Ok(());
        }
        if self.is(Fault::NeverTwice) && seen {
            return Ok(());
        }
        let served = self.inner.status().await?.served()?;
        let delta = snapshot.kind == SnapshotKind::Delta;
        let order = self.again(order, |order| {
            if self.is(Fault::DeltaAsWhole) && delta {
                order.snapshot.kind = SnapshotKind::Base;
                order.previous = None;
            }
            if self.is(Fault::AnyParent)
                && delta
                && let Some((identity, Some(digest))) = served
            {
                order.previous = Some(SnapshotId { identity, digest });
            }
            if self.is(Fault::TakesAnyCodec) && delta {
                order.snapshot.codec = Some(CodecId::of("test-xor"));
            }
            if self.is(Fault::TakesAdapters) && snapshot.kind == SnapshotKind::Adapter {
                order.snapshot.kind = SnapshotKind::Base;
            }
        })?;
        match self.inner.hot_load(&order).await {
            Err(error) if self.is(Fault::LosesTheOldOnFailure) => {
                self.inner.become_foreign(SnapshotIdentity::new("nothing")?, &Weights::default());
                Err(error)
            }
            Err(_) if self.is(Fault::SaysNothingOfFailure) => Ok(()),
            outcome => outcome,
        }
    }

    async fn warm_up(&self) -> Result<()> {
        if self.is(Fault::WarmUpFails) {
            return Err(Error::unavailable("cold"));
        }
        self.inner.warm_up().await
    }
}

fn harness(fault: Fault) -> Harness {
    let checks = matches!(fault, Fault::ChecksNothing | Fault::DeltaAsWhole | Fault::AnyParent);
    Harness::around(
        |inner| if checks { inner.without_checks().with_replicas(2) } else { inner.with_replicas(2) },
        |inner| {
            Arc::new(Broken {
                inner,
                fault,
                calls: AtomicU64::new(0),
                said: Mutex::default(),
                seen: Mutex::default(),
            })
        },
    )
}

fn faults(law: &str) -> &'static [Fault] {
    match law {
        "serves_after_the_order" => &[Fault::OnlySaysSo],
        "bases_follow_each_other" => &[Fault::NeverTwice],
        "the_same_operation_is_one_swap" => &[Fault::EveryCallIsNew],
        "deltas_apply" => &[Fault::DeltaAsWhole],
        "a_wrong_parent_is_refused" => &[Fault::AnyParent],
        "an_unknown_snapshot_is_refused" => &[Fault::LosesTheOldOnFailure, Fault::SaysNothingOfFailure],
        "a_corrupt_snapshot_is_refused" => &[Fault::ChecksNothing],
        "denied_is_unsupported" => &[Fault::TakesAnyCodec, Fault::TakesAdapters],
        "status_is_truthful" => &[Fault::NoReplicasAtFirst],
        "warms_up" => &[Fault::WarmUpFails],
        other => panic!("no broken deployment for the law `{other}`"),
    }
}

#[test]
fn each_law_of_deployments_catches_its_fault() {
    for (name, law) in laws::ALL {
        block_on(laws::check(harness(Fault::None), *law)).unwrap();
        for &fault in faults(name) {
            let broken = block_on(laws::check(harness(fault), *law));
            let message = broken.expect_err(&format!("`{name}` did not catch {fault:?}"));
            println!("{name} catches {fault:?}: {message}");
        }
    }
}

#[test]
fn a_harness_that_publishes_other_weights_is_caught() {
    struct Liar(Harness);
    #[async_trait]
    impl towline_core::testing::DeploymentHarness for Liar {
        fn deployment(&self) -> Arc<dyn Deployment> {
            self.0.deployment()
        }
        async fn publish(&self, _: &Weights) -> Result<SnapshotRef> {
            self.0.publish(&towline_core::testing::tiny_weights(99)).await
        }
        async fn served(&self) -> Result<Option<towline_core::ContentDigest>> {
            self.0.served().await
        }
    }
    let (_, law) = laws::ALL[0];
    let message = block_on(laws::check(Liar(Harness::new(1)), law)).unwrap_err();
    assert!(message.contains("other weights"), "{message}");
}
