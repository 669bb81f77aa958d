//! The delta chain against a deployment that does what it is told: whatever fails, is repeated or comes late, what
//! the chain says is confirmed is what is served, byte for byte.
//!
//! The same property runs on the two faults of the public Python client, and must fail on them.

mod faults;
mod rules;
mod world;

use std::cell::RefCell;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner};
use towline_core::{
    Chain, ChainSettings, CheckpointType, ContentDigest, DeltaParents, LoadPlan, Result, SavePlan,
    SnapshotId, SnapshotIdentity, SnapshotRef,
};

use faults::{
    ATTACHES_TO_ANYTHING, BELIEVES_LATE_WORDS, FORGETS_FAILURES, FirstLoadFails, IGNORES_THE_LAST_EXPORT,
    LOADS_ANY_DELTA, LaterLoadFails, Without,
};
use world::{Reach, World};

/// The chain, as the property drives it.
trait ChainUnderTest {
    fn new(settings: ChainSettings) -> Self;
    fn plan_save(&self, requested: Option<CheckpointType>) -> Result<SavePlan>;
    fn saved(&mut self, snapshot: &SnapshotRef);
    fn save_failed(&mut self);
    fn plan_load(&self, snapshot: &SnapshotRef) -> Result<LoadPlan>;
    fn ordered(&mut self, snapshot: &SnapshotId);
    fn confirmed(&mut self, snapshot: &SnapshotId) -> bool;
    fn failed(&mut self, snapshot: &SnapshotId);
    fn reset(&mut self);
    fn attach(&mut self, found: Found, restored: Option<&ContentDigest>, held: bool);
    fn confirmed_snapshot(&self) -> Option<SnapshotId>;
}

type Found = Option<(SnapshotIdentity, Option<ContentDigest>)>;

impl ChainUnderTest for Chain {
    fn new(settings: ChainSettings) -> Self {
        Self::new(settings)
    }
    fn plan_save(&self, requested: Option<CheckpointType>) -> Result<SavePlan> {
        self.plan_save(requested)
    }
    fn saved(&mut self, snapshot: &SnapshotRef) {
        self.saved(snapshot);
    }
    fn save_failed(&mut self) {
        self.save_failed();
    }
    fn plan_load(&self, snapshot: &SnapshotRef) -> Result<LoadPlan> {
        self.plan_load(snapshot)
    }
    fn ordered(&mut self, snapshot: &SnapshotId) {
        self.ordered(snapshot);
    }
    fn confirmed(&mut self, snapshot: &SnapshotId) -> bool {
        self.confirmed(snapshot)
    }
    fn failed(&mut self, snapshot: &SnapshotId) {
        self.failed(snapshot);
    }
    fn reset(&mut self) {
        self.reset();
    }
    fn attach(&mut self, found: Found, restored: Option<&ContentDigest>, held: bool) {
        self.attach(found, restored, held);
    }
    fn confirmed_snapshot(&self) -> Option<SnapshotId> {
        self.confirmed_snapshot().cloned()
    }
}

/// One thing that happens.
#[derive(Debug, Clone, Copy)]
enum Op {
    /// The weights change; 0 leaves them as they are.
    Train(u8),
    /// A save alone.
    SaveOnly(Option<CheckpointType>),
    /// A save that fails after it was planned.
    SaveFails(Option<CheckpointType>),
    /// A save and a hot-load of it.
    Sync(Option<CheckpointType>, Ending),
    /// A hot-load of the n-th last save.
    Load(usize, Ending),
    /// An order that was accepted long ago takes effect now.
    TakesEffect,
    /// Somebody learns now what was served n observations ago.
    LateWord(usize),
    /// `reset_delta_chain`.
    Reset,
    /// The syncer looks again at what is served.
    Reattach,
    /// Somebody else loads other weights, and the syncer attaches to them.
    Foreign(u8),
    /// The deployment starts anew with nothing, and the syncer attaches to it.
    Emptied,
    /// A new trainer session: from the weights of the n-th last save, or from nothing; it attaches.
    Restart(Option<usize>),
}

/// How a hot-load ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ending {
    /// Applied and confirmed.
    Served,
    /// The order goes out twice; applied and confirmed.
    Repeated,
    /// The call fails; nothing happens.
    Rejected,
    /// Accepted, then an error; the old weights keep serving.
    Refused,
    /// Applied, but nobody hears of it in time.
    TimedOutApplied,
    /// Nothing happens in time; it may take effect later.
    TimedOutPending,
    /// Applied, and there is no word of it at all, neither good nor bad.
    SilentApplied,
    /// Accepted, and there is no word of it at all.
    SilentPending,
}

#[derive(Debug, Clone, Copy)]
struct Setting {
    chain: ChainSettings,
    tells_digest: bool,
}

fn settings() -> impl Strategy<Value = Setting> {
    (any::<bool>(), prop::bool::weighted(0.15), any::<bool>(), any::<bool>()).prop_map(
        |(first_delta, lora, last_exported, tells_digest)| {
            let first = if first_delta { CheckpointType::Delta } else { CheckpointType::Base };
            let parents = if last_exported { DeltaParents::LastExported } else { DeltaParents::Any };
            let chain = ChainSettings::default().with_first(first).with_lora(lora).with_parents(parents);
            Setting { chain, tells_digest }
        },
    )
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let kind = || {
        prop_oneof![
            6 => Just(None),
            1 => Just(Some(CheckpointType::Base)),
            2 => Just(Some(CheckpointType::Delta)),
            1 => Just(Some(CheckpointType::MergedBase)),
        ]
    };
    let ending = || {
        prop_oneof![
            16 => Just(Ending::Served),
            1 => Just(Ending::Rejected),
            1 => Just(Ending::Refused),
            1 => Just(Ending::Repeated),
            1 => Just(Ending::TimedOutApplied),
            1 => Just(Ending::TimedOutPending),
            1 => Just(Ending::SilentApplied),
            1 => Just(Ending::SilentPending),
        ]
    };
    let op = prop_oneof![
        6 => any::<u8>().prop_map(Op::Train),
        10 => (kind(), ending()).prop_map(|(kind, ending)| Op::Sync(kind, ending)),
        3 => kind().prop_map(Op::SaveOnly),
        1 => kind().prop_map(Op::SaveFails),
        5 => (0..6usize, ending()).prop_map(|(back, ending)| Op::Load(back, ending)),
        2 => Just(Op::TakesEffect),
        3 => (0..6usize).prop_map(Op::LateWord),
        1 => Just(Op::Reset),
        2 => Just(Op::Reattach),
        1 => any::<u8>().prop_map(Op::Foreign),
        1 => Just(Op::Emptied),
        2 => prop::option::of(0..4usize).prop_map(Op::Restart),
    ];
    prop::collection::vec(op, 1..40)
}

type Outcome = std::result::Result<(), TestError<(Setting, Vec<Op>)>>;

/// Runs the property and adds up what its cases reached.
fn run<C: ChainUnderTest>(cases: u32) -> (Outcome, Reach) {
    let config = Config {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(0x0010_ad5e),
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let total = RefCell::new(Reach::default());
    let outcome = TestRunner::new(config).run(&(settings(), ops()), |(setting, ops)| {
        let mut world = World::<C>::new(setting);
        for op in ops {
            world.step(op).map_err(TestCaseError::fail)?;
        }
        total.borrow_mut().add(&world.reach);
        Ok(())
    });
    (outcome, total.into_inner())
}

#[test]
fn what_is_confirmed_is_served_whatever_happens() {
    let (outcome, reach) = run::<Chain>(4000);
    if let Err(error) = outcome {
        panic!("{error}");
    }
    println!("{reach:?}");
    // A property over sequences that never get anywhere would prove nothing.
    assert!(reach.confirmed_deltas > 3000 && reach.confirmed_bases > 3000, "{reach:?}");
    assert!(reach.longest_chain >= 5 && reach.attached > 100 && reach.ignored_words > 100, "{reach:?}");
    assert!(reach.refused_deltas > 100 && reach.superseded > 100 && reach.late_effects > 100, "{reach:?}");
}

fn fails_on<C: ChainUnderTest>(fault: &str) -> String {
    match run::<C>(4000).0 {
        Err(TestError::Fail(reason, (setting, ops))) => {
            println!("{fault}: {reason}\n  after {ops:?}\n  with {setting:?}");
            assert!(ops.len() <= 6, "the sequence should shrink to the fault: {ops:?}");
            reason.to_string()
        }
        other => panic!("the property does not see the fault `{fault}`: {other:?}"),
    }
}

#[test]
fn the_property_fails_on_a_delta_sent_as_a_whole_snapshot() {
    let reason =
        fails_on::<FirstLoadFails>("the first hot-load fails, the next save is a delta sent as full");
    assert!(reason.contains("delta"), "{reason}");
}

#[test]
fn the_property_fails_on_a_delta_on_the_wrong_parent() {
    let reason = fails_on::<LaterLoadFails>("a later hot-load fails, the next delta names the wrong parent");
    assert!(reason.contains("parent"), "{reason}");
}

#[test]
fn the_property_fails_without_any_one_of_the_rules() {
    fails_on::<Without<BELIEVES_LATE_WORDS>>("a word about an older order is believed");
    fails_on::<Without<FORGETS_FAILURES>>("after a failure the old parent is taken as served");
    fails_on::<Without<IGNORES_THE_LAST_EXPORT>>("a wire without parents diffs although it saved since");
    fails_on::<Without<ATTACHES_TO_ANYTHING>>("foreign weights are taken for the restored ones");
    fails_on::<Without<LOADS_ANY_DELTA>>("a delta is ordered onto whatever is served");
}
