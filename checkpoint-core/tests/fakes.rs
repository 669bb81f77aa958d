//! The faults of the fakes do what they say.

use towline_core::testing::laws::codec;
use towline_core::testing::{
    CountingAllocator, FakeDeployment, FakeExporter, FakeSnapshots, Fault, XorCodec, block_on, tiny_weights,
};
use towline_core::{
    CodecId, DeltaParents, Deployment, ErrorKind, ExportRequest, HotLoad, OpId, Outcome, Result, SessionId,
    SnapshotExporter, SnapshotId, SnapshotIdentity, SnapshotKind, SnapshotName, SnapshotRef,
};

struct Rig {
    exporter: FakeExporter,
    deployment: FakeDeployment,
    ops: u32,
}

impl Rig {
    fn new(replicas: usize) -> Self {
        let snapshots = FakeSnapshots::new();
        Self {
            exporter: FakeExporter::new(snapshots.clone(), tiny_weights(0)),
            deployment: FakeDeployment::new(snapshots).with_replicas(replicas),
            ops: 0,
        }
    }

    fn save(&self, name: &str, seed: u64, parent: Option<&SnapshotRef>) -> Result<SnapshotRef> {
        self.exporter.set_weights(tiny_weights(seed));
        let kind = if parent.is_some() { SnapshotKind::Delta } else { SnapshotKind::Base };
        let request = ExportRequest::new(SnapshotName::new(name)?, kind, CodecId::of("arc_v2"));
        block_on(self.exporter.export(request.with_parent(parent.map(|parent| parent.id.clone()))))
    }

    fn load(&mut self, snapshot: &SnapshotRef) -> Result<()> {
        self.ops += 1;
        let order = HotLoad::new(OpId::new(format!("op-{}", self.ops))?, snapshot.clone())?;
        block_on(self.deployment.hot_load(&order))
    }

    fn outcome(&self, id: &SnapshotId) -> Outcome {
        block_on(self.deployment.status()).unwrap().outcome(id)
    }

    fn serves(&self, seed: u64) -> bool {
        self.deployment.weights().iter().all(|weights| weights.as_ref() == Some(&tiny_weights(seed)))
    }
}

#[test]
fn deltas_carry_the_difference_and_nothing_else() {
    let mut rig = Rig::new(2);
    let base = rig.save("a", 1, None).unwrap();
    let delta = rig.save("b", 2, Some(&base)).unwrap();
    rig.load(&base).unwrap();
    rig.load(&delta).unwrap();
    assert!(rig.serves(2));
    assert_eq!(rig.deployment.served().unwrap(), Some(tiny_weights(2).content_digest()));
    assert_eq!((rig.deployment.swaps(), rig.deployment.cache_resets()), (2, 2));
    // A back end that checks names alone applies it to anything of that name.
    let loose = Rig { deployment: rig.deployment.clone().without_checks(), ..rig };
    loose.deployment.become_foreign(base.id.identity, &tiny_weights(9));
    let order = HotLoad::new(OpId::new("again").unwrap(), delta.clone()).unwrap();
    block_on(loose.deployment.hot_load(&order)).unwrap();
    assert!(!loose.serves(2), "the XOR with other weights gives other weights");
    assert!(matches!(loose.outcome(&delta.id), Outcome::Failed(_)), "which the digest tells");
}

#[test]
fn faults_of_the_deployment() {
    for (fault, call, outcome, serves) in [
        (Fault::Reject, Some(ErrorKind::Unavailable), Outcome::Running, 1),
        (Fault::LoseReply, Some(ErrorKind::Unavailable), Outcome::Committed, 2),
        (Fault::Hang, None, Outcome::Running, 1),
        (Fault::Delay(2), None, Outcome::Running, 1),
    ] {
        let mut rig = Rig::new(2);
        let (one, two) = (rig.save("a", 1, None).unwrap(), rig.save("b", 2, None).unwrap());
        rig.load(&one).unwrap();
        rig.deployment.fault(fault);
        assert_eq!(rig.load(&two).err().map(|error| error.kind()), call, "{fault:?}");
        assert_eq!(rig.outcome(&two.id), outcome, "{fault:?}");
        assert!(rig.serves(serves), "{fault:?}");
    }
    let mut rig = Rig::new(2);
    let (one, two) = (rig.save("a", 1, None).unwrap(), rig.save("b", 2, None).unwrap());
    rig.load(&one).unwrap();
    rig.deployment.fault(Fault::Fail);
    rig.load(&two).unwrap();
    assert!(matches!(rig.outcome(&two.id), Outcome::Failed(_)));
    assert!(rig.serves(1));
    rig.load(&two).unwrap();
    assert_eq!(rig.outcome(&two.id), Outcome::Committed);
}

#[test]
fn a_lagging_replica_shows_the_old_weights_for_so_many_looks() {
    let mut rig = Rig::new(3);
    let (one, two) = (rig.save("a", 1, None).unwrap(), rig.save("b", 2, None).unwrap());
    rig.load(&one).unwrap();
    rig.deployment.fault(Fault::Lag(2));
    rig.load(&two).unwrap();
    assert_eq!(rig.load(&one).unwrap_err().kind(), ErrorKind::Conflict, "one operation at a time");
    for _ in 0..2 {
        let status = block_on(rig.deployment.status()).unwrap();
        assert_eq!(status.outcome(&two.id), Outcome::Running);
        assert_eq!(status.served().unwrap_err().kind(), ErrorKind::Conflict);
    }
    assert_eq!(rig.outcome(&two.id), Outcome::Committed);
}

#[test]
fn readiness_and_warm_ups() {
    let mut rig = Rig::new(1);
    rig.deployment = rig.deployment.with_not_ready(2);
    let one = rig.save("a", 1, None).unwrap();
    assert!(block_on(rig.deployment.warm_up()).is_err(), "nothing is served yet");
    rig.load(&one).unwrap();
    assert_eq!(rig.outcome(&one.id), Outcome::Running);
    assert_eq!(rig.outcome(&one.id), Outcome::Running);
    assert_eq!(rig.outcome(&one.id), Outcome::Committed);
    rig.deployment.fail_warm_ups(1);
    assert!(block_on(rig.deployment.warm_up()).unwrap_err().is_retryable());
    block_on(rig.deployment.warm_up()).unwrap();
    assert_eq!(rig.deployment.warm_ups(), 1);
}

#[test]
fn a_foreign_or_split_deployment() {
    let rig = Rig::new(2);
    let name = |text| SnapshotIdentity::new(text).unwrap();
    rig.deployment.become_foreign(name("theirs"), &tiny_weights(5));
    let status = block_on(rig.deployment.status()).unwrap();
    assert_eq!(status.served().unwrap(), Some((name("theirs"), Some(tiny_weights(5).content_digest()))));
    rig.deployment.split(1, name("other"), &tiny_weights(6));
    assert_eq!(block_on(rig.deployment.status()).unwrap().served().unwrap_err().kind(), ErrorKind::Conflict);
    assert!(rig.deployment.served().is_err());
}

#[test]
fn the_exporter_keeps_its_rules() {
    let rig = Rig::new(1);
    let one = rig.save("a", 1, None).unwrap();
    assert_eq!(rig.save("a", 2, None).unwrap_err().kind(), ErrorKind::AlreadyExists);
    let two = rig.save("b", 2, Some(&one)).unwrap();
    // Any parent that it exported, not the last alone.
    rig.save("c", 3, Some(&one)).unwrap();
    assert!(block_on(rig.exporter.holds(&two.id.digest)).unwrap());
    assert!(!block_on(rig.exporter.holds(&tiny_weights(9).content_digest())).unwrap());
    let other = rig.exporter.clone().with_session(SessionId::from_random([0, 0, 0, 2]));
    rig.exporter.fail_next(ErrorKind::Fenced);
    assert_eq!(rig.save("d", 4, None).unwrap_err().kind(), ErrorKind::Fenced);
    assert!(rig.save("a", 4, None).is_ok(), "another session, another name: {other:?}");

    let last = Rig { exporter: rig.exporter.clone().with_parents(DeltaParents::LastExported), ..rig };
    assert_eq!(last.save("e", 5, Some(&one)).unwrap_err().kind(), ErrorKind::ChainMismatch);
    assert_eq!(last.exporter.restored(), None);
    let restored = last.exporter.clone().with_restored(&tiny_weights(8));
    assert_eq!(restored.restored(), Some(tiny_weights(8).content_digest()));
    assert!(block_on(restored.holds(&tiny_weights(8).content_digest())).unwrap());
}

/// This test crate installs no counting allocator: the law must see that, and says that it was skipped.
#[test]
fn without_the_allocator_nothing_is_measured() {
    let (length, peak) = CountingAllocator::measure(|| vec![0u8; 1 << 20].len());
    assert_eq!((length, peak), (1 << 20, None));
    codec::check(&XorCodec, codec::bounded_allocation).unwrap();
}
