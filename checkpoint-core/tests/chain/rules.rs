//! The rules of the chain one by one, and the two faults step by step with their bytes.

use towline_core::{
    Chain, ChainSettings, CheckpointType, DeltaParents, ErrorKind, LoadPlan, Reason, SnapshotId,
    SnapshotIdentity, SnapshotKind, SnapshotRef,
};

use crate::faults::{FirstLoadFails, LaterLoadFails};
use crate::world::{World, digest};
use crate::{ChainUnderTest, Ending, Setting};

const AUTO: Option<CheckpointType> = None;
const BASE: Option<CheckpointType> = Some(CheckpointType::Base);
const DELTA: Option<CheckpointType> = Some(CheckpointType::Delta);
const MERGED: Option<CheckpointType> = Some(CheckpointType::MergedBase);

fn id(name: &str, weights: u8) -> SnapshotId {
    SnapshotId { identity: SnapshotIdentity::new(name).unwrap(), digest: digest(&[weights; 8]) }
}

fn base(name: &str, weights: u8) -> SnapshotRef {
    SnapshotRef::new(id(name, weights), SnapshotKind::Base, "store")
}

fn delta(name: &str, weights: u8, parent: &SnapshotRef) -> SnapshotRef {
    SnapshotRef::new(id(name, weights), SnapshotKind::Delta, "store").with_parent(Some(parent.id.clone()))
}

fn chain(change: impl FnOnce(ChainSettings) -> ChainSettings) -> Chain {
    Chain::new(change(ChainSettings::default()))
}

/// A chain whose deployment confirmed `snapshot`, which was also the last save.
fn serving(snapshot: &SnapshotRef, change: impl FnOnce(ChainSettings) -> ChainSettings) -> Chain {
    let mut chain = chain(change);
    chain.saved(snapshot);
    chain.ordered(&snapshot.id);
    assert!(chain.confirmed(&snapshot.id));
    chain
}

/// What is saved next for each request: kind and reason, or the kind of the error.
#[track_caller]
fn check(
    chain: &Chain,
    requested: Option<CheckpointType>,
    wanted: Result<(SnapshotKind, Reason), ErrorKind>,
) {
    let found = chain.plan_save(requested).map(|plan| (plan.kind, plan.reason)).map_err(|error| error.kind());
    assert_eq!(found, wanted, "{requested:?}");
}

#[test]
fn the_first_save_is_a_base_even_if_it_may_be_a_delta() {
    for first in [CheckpointType::Base, CheckpointType::Delta] {
        let chain = chain(|settings| settings.with_first(first));
        check(&chain, AUTO, Ok((SnapshotKind::Base, Reason::First)));
        check(&chain, BASE, Ok((SnapshotKind::Base, Reason::Requested)));
        check(&chain, DELTA, Err(ErrorKind::ChainMismatch));
    }
}

#[test]
fn after_a_confirmed_base_come_deltas_on_what_is_served() {
    let first = base("s0", 0);
    let mut chain = serving(&first, |settings| settings);
    check(&chain, AUTO, Ok((SnapshotKind::Delta, Reason::Confirmed)));
    check(&chain, DELTA, Ok((SnapshotKind::Delta, Reason::Requested)));
    assert_eq!(chain.plan_save(AUTO).unwrap().parent, Some(first.id.clone()));
    let second = delta("s1", 1, &first);
    chain.saved(&second);
    assert_eq!(chain.plan_load(&second).unwrap(), LoadPlan::Order { previous: Some(first.id) });
    chain.ordered(&second.id);
    assert!(chain.confirmed(&second.id));
    assert_eq!(chain.plan_save(AUTO).unwrap().parent, Some(second.id.clone()));
    assert_eq!(chain.plan_load(&second).unwrap(), LoadPlan::AlreadyServed);
}

#[test]
fn an_explicit_base_is_allowed_at_any_time() {
    let first = base("s0", 0);
    let mut states = vec![chain(|settings| settings), serving(&first, |settings| settings)];
    for change in [
        (|chain: &mut Chain| chain.ordered(&id("x", 1))) as fn(&mut Chain),
        |chain| chain.failed(&id("x", 1)),
        Chain::reset,
        |chain| chain.attach(None, None, false),
    ] {
        let mut chain = serving(&first, |settings| settings);
        change(&mut chain);
        states.push(chain);
    }
    for chain in states {
        check(&chain, BASE, Ok((SnapshotKind::Base, Reason::Requested)));
        assert_eq!(chain.plan_load(&base("older", 9)).unwrap(), LoadPlan::Order { previous: None });
    }
}

#[test]
fn failures_doubt_and_resets_make_the_next_save_a_base() {
    let first = base("s0", 0);
    let x = id("x", 1);
    type Change = fn(&mut Chain, &SnapshotId);
    let cases: [(Change, Reason); 4] = [
        (|chain, x| chain.ordered(x), Reason::InDoubt(x.identity.clone())),
        (|chain, x| chain.failed(x), Reason::Failed(x.identity.clone())),
        (|chain, _| chain.reset(), Reason::Reset),
        (
            |chain, x| chain.attach(Some((x.identity.clone(), None)), None, true),
            Reason::Foreign(Some(x.identity.clone())),
        ),
    ];
    for (change, reason) in cases {
        let mut chain = serving(&first, |settings| settings);
        change(&mut chain, &x);
        check(&chain, AUTO, Ok((SnapshotKind::Base, reason)));
        check(&chain, DELTA, Err(ErrorKind::ChainMismatch));
        let refused = chain.plan_load(&delta("s1", 1, &first)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ChainMismatch);
        assert_eq!(refused.help(), Some("save a base and hot-load that"));
    }
}

#[test]
fn a_late_or_wrong_word_does_not_count() {
    let (first, second) = (base("s0", 0), base("s1", 1));
    let mut chain = serving(&first, |settings| settings);
    assert!(!chain.confirmed(&first.id), "nothing was ordered since");
    chain.ordered(&second.id);
    assert!(!chain.confirmed(&first.id), "that was the order before");
    assert!(!chain.confirmed(&id("s1", 9)), "the same name over other weights");
    chain.failed(&second.id);
    assert!(!chain.confirmed(&second.id), "it was given up");
    assert_eq!(chain.confirmed_snapshot(), None);
}

#[test]
fn a_delta_fits_by_its_parents_weights_not_by_its_name() {
    let first = base("s0", 0);
    let renamed = base("renamed", 0);
    let chain = serving(&renamed, |settings| settings);
    let plan = chain.plan_load(&delta("s1", 1, &first)).unwrap();
    assert_eq!(plan, LoadPlan::Order { previous: Some(renamed.id) });
    let impostor = serving(&base("s0", 7), |settings| settings);
    assert!(impostor.plan_load(&delta("s1", 1, &first)).is_err());
}

#[test]
fn a_long_chain_gets_a_base_by_itself() {
    let first = base("s0", 0);
    let mut chain = serving(&first, |settings| settings.with_max_deltas(2));
    let mut parent = first;
    for step in 1..=2 {
        check(&chain, AUTO, Ok((SnapshotKind::Delta, Reason::Confirmed)));
        parent = delta(&format!("s{step}"), step, &parent);
        chain.saved(&parent);
        chain.ordered(&parent.id);
        assert!(chain.confirmed(&parent.id));
    }
    check(&chain, AUTO, Ok((SnapshotKind::Base, Reason::Length(2))));
    check(&chain, DELTA, Ok((SnapshotKind::Delta, Reason::Requested)));
    let next = base("s3", 3);
    chain.saved(&next);
    chain.ordered(&next.id);
    assert!(chain.confirmed(&next.id));
    check(&chain, AUTO, Ok((SnapshotKind::Delta, Reason::Confirmed)));
}

#[test]
fn a_heavy_chain_gets_a_base_by_itself() {
    let first = base("s0", 0).with_sizes(100, 100, None);
    let mut chain = serving(&first, |settings| settings.with_max_delta_share(1.5));
    let mut parent = first;
    for step in 1..=4 {
        // 50, 100 and 151 bytes of deltas lie on a base of 100.
        let expected = match step {
            4 => Ok((SnapshotKind::Base, Reason::Bytes(151))),
            _ => Ok((SnapshotKind::Delta, Reason::Confirmed)),
        };
        check(&chain, AUTO, expected);
        let bytes = if step == 3 { 51 } else { 50 };
        parent = delta(&format!("s{step}"), step, &parent).with_sizes(bytes, 100, None);
        chain.saved(&parent);
        chain.ordered(&parent.id);
        assert!(chain.confirmed(&parent.id));
    }
    check(&chain, DELTA, Ok((SnapshotKind::Delta, Reason::Requested)));
    let next = base("s5", 5).with_sizes(100, 100, None);
    chain.saved(&next);
    chain.ordered(&next.id);
    assert!(chain.confirmed(&next.id));
    check(&chain, AUTO, Ok((SnapshotKind::Delta, Reason::Confirmed)));
}

#[test]
fn a_lora_save_is_always_the_whole_adapter() {
    let first = base("s0", 0);
    for chain in
        [chain(|settings| settings.with_lora(true)), serving(&first, |settings| settings.with_lora(true))]
    {
        for requested in [AUTO, BASE, DELTA] {
            check(&chain, requested, Ok((SnapshotKind::Adapter, Reason::Adapter)));
        }
        check(&chain, MERGED, Ok((SnapshotKind::MergedBase, Reason::Requested)));
    }
    check(&serving(&first, |settings| settings), MERGED, Err(ErrorKind::Invalid));
}

#[test]
fn attaching_goes_on_only_from_known_weights() {
    let (found, other) = (id("s9-00000007", 3), digest(&[4; 8]));
    let told = Some((found.identity.clone(), Some(found.digest)));
    let untold = Some((found.identity.clone(), None));
    for (first, found_here, restored, held, goes_on) in [
        (CheckpointType::Base, told.clone(), Some(found.digest), false, true),
        (CheckpointType::Base, told.clone(), Some(other), true, false),
        (CheckpointType::Base, told.clone(), None, true, false),
        (CheckpointType::Delta, told.clone(), None, true, true),
        (CheckpointType::Delta, told.clone(), None, false, false),
        (CheckpointType::Delta, untold.clone(), Some(found.digest), true, false),
        (CheckpointType::Base, untold, Some(found.digest), true, false),
        (CheckpointType::Delta, None, Some(found.digest), true, false),
    ] {
        let mut chain = chain(|settings| settings.with_first(first));
        chain.attach(found_here, restored.as_ref(), held);
        let kind = chain.plan_save(AUTO).unwrap().kind;
        assert_eq!(kind == SnapshotKind::Delta, goes_on, "{first:?} {restored:?} {held}");
    }
}

#[test]
fn a_wire_that_names_no_parent_diffs_only_if_its_last_save_is_served() {
    let first = base("s0", 0);
    let last = |settings: ChainSettings| settings.with_parents(DeltaParents::LastExported);
    let mut chain = serving(&first, last);
    check(&chain, AUTO, Ok((SnapshotKind::Delta, Reason::Confirmed)));
    // A save that is not loaded moves the trainer on.
    chain.saved(&delta("s1", 1, &first));
    check(&chain, AUTO, Ok((SnapshotKind::Base, Reason::LastExport)));
    check(&chain, DELTA, Err(ErrorKind::ChainMismatch));
    let mut failed = serving(&first, last);
    failed.save_failed();
    check(&failed, AUTO, Ok((SnapshotKind::Base, Reason::LastExport)));
    // Whoever can name the parent is not bound to the last save.
    let mut any = serving(&first, |settings| settings);
    any.saved(&delta("s1", 1, &first));
    assert_eq!(any.plan_save(AUTO).unwrap().parent, Some(first.id));
}

#[test]
fn a_train_state_is_never_loaded() {
    let state = SnapshotRef::new(id("state", 1), SnapshotKind::State, "store");
    assert_eq!(chain(|settings| settings).plan_load(&state).unwrap_err().kind(), ErrorKind::Invalid);
}

/// One save and load without the world's check of the plan: what the bytes come to.
fn sync<C: ChainUnderTest>(world: &mut World<C>, byte: u8, ending: Ending) -> SnapshotKind {
    world.weights[0] = byte;
    let plan = world.chain.plan_save(None).unwrap();
    let saved = world.export(&plan).unwrap().unwrap();
    world.load(&saved, ending).unwrap();
    plan.kind
}

fn world<C: ChainUnderTest>(parents: DeltaParents) -> World<C> {
    World::new(Setting { chain: ChainSettings::default().with_parents(parents), tells_digest: false })
}

/// Fault (a): the first hot-load fails, the next save is a delta that is loaded as a full snapshot.
#[test]
fn after_a_failed_first_hot_load_comes_a_base() {
    for parents in [DeltaParents::Any, DeltaParents::LastExported] {
        let mut good = world::<Chain>(parents);
        assert_eq!(sync(&mut good, 11, Ending::Refused), SnapshotKind::Base);
        assert_eq!(sync(&mut good, 12, Ending::Served), SnapshotKind::Base);
        assert_eq!(sync(&mut good, 13, Ending::Served), SnapshotKind::Delta);
        good.check().unwrap();
        assert_eq!(good.deployment.serves.as_ref().unwrap().1, good.weights);

        let mut faulty = world::<FirstLoadFails>(parents);
        assert_eq!(sync(&mut faulty, 11, Ending::Refused), SnapshotKind::Base);
        assert_eq!(sync(&mut faulty, 12, Ending::Served), SnapshotKind::Delta);
        // The deployment serves the bare difference, and believes that it is a snapshot.
        assert_eq!(faulty.deployment.serves.as_ref().unwrap().1, [11 ^ 12, 0, 0, 0, 0, 0, 0, 0]);
        assert!(faulty.check().unwrap_err().contains("is served"));
    }
}

/// Fault (b): a later hot-load fails, the next delta names the wrong parent.
#[test]
fn after_a_failed_later_hot_load_comes_a_base() {
    for parents in [DeltaParents::Any, DeltaParents::LastExported] {
        for ending in [Ending::Refused, Ending::TimedOutApplied, Ending::TimedOutPending, Ending::Rejected] {
            let mut good = world::<Chain>(parents);
            assert_eq!(sync(&mut good, 11, Ending::Served), SnapshotKind::Base);
            assert_eq!(sync(&mut good, 12, ending), SnapshotKind::Delta);
            assert_eq!(sync(&mut good, 13, Ending::Served), SnapshotKind::Base);
            good.check().unwrap();
            assert_eq!(good.deployment.serves.as_ref().unwrap().1, good.weights);
        }
        let mut faulty = world::<LaterLoadFails>(parents);
        assert_eq!(sync(&mut faulty, 11, Ending::Served), SnapshotKind::Base);
        assert_eq!(sync(&mut faulty, 12, Ending::Refused), SnapshotKind::Delta);
        faulty.weights[0] = 13;
        let plan = faulty.chain.plan_save(None).unwrap();
        let served = faulty.deployment.serves.clone().unwrap();
        assert_eq!(plan.kind, SnapshotKind::Delta);
        assert_ne!(plan.parent.as_ref().unwrap().identity, served.0, "the delta names what is not served");
        // The deployment refuses it by its name, and so does every later one: the syncs never recover.
        let saved = faulty.export(&plan).unwrap().unwrap();
        faulty.load(&saved, Ending::Served).unwrap();
        assert_eq!(faulty.deployment.serves.unwrap(), served);
    }
}
