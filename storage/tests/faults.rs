//! The stores that fail: what each fault does, and that the laws of stores catch each lie.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt as _;
use towline_core::testing::laws::store as laws;
use towline_core::{ErrorKind, ObjectKey, PutMode, Result, SnapshotStore};
use towline_storage::Memory;
use towline_storage::testing::{Fault, FaultStore, Lie, LyingStore, Operation, Plan, Rule};

towline_core::store_conformance!(faultless, async { FaultStore::new(Arc::new(Memory::new()), Plan::new(1)) });
towline_core::store_conformance!(honest, async { LyingStore::new(Arc::new(Memory::new()), &[]) });

const BODY: &[u8] = b"0123456789abcdef";

fn key(text: &str) -> ObjectKey {
    ObjectKey::new(text).unwrap()
}

fn store(plan: Plan) -> FaultStore {
    FaultStore::new(Arc::new(Memory::new()), plan)
}

async fn put(store: &dyn SnapshotStore, name: &str) -> Result<()> {
    store.put(&key(name), Bytes::from_static(BODY), PutMode::Overwrite).await.map(drop)
}

async fn names(store: &dyn SnapshotStore) -> Vec<String> {
    let mut found: Vec<_> = store.list(None).map_ok(|info| info.key.to_string()).try_collect().await.unwrap();
    found.sort();
    found
}

/// Every operation once or more, whatever comes of it.
async fn everything(store: &FaultStore) {
    for round in 0..20 {
        let name = format!("job/object-{round}");
        let _ = put(store, &name).await;
        let _ = store.head(&key(&name)).await;
        let _ = store.get(&key(&name), Some(2..9)).await;
        let _ = store.read_into(&key(&name), 0, BytesMut::zeroed(4)).await;
        let _ = store.list(Some(&key("job"))).try_collect::<Vec<_>>().await;
        if let Ok(mut writer) = store.writer(&key("job/parts")).await {
            let _ = writer.write(Bytes::from_static(BODY)).await;
            let _ = if round % 2 == 0 { writer.finish().await.map(drop) } else { writer.abort().await };
        }
        let _ = store.delete(&key(&name)).await;
    }
}

fn every_fault(seed: u64) -> Plan {
    let often = 25;
    [
        Fault::Refuse(ErrorKind::Unavailable),
        Fault::Lose(ErrorKind::Conflict),
        Fault::Burst(3),
        Fault::Late(Duration::from_millis(3)),
        Fault::Delay(Duration::from_millis(3)),
        Fault::FlipBit,
        Fault::Truncate,
        Fault::StaleList,
    ]
    .into_iter()
    .fold(Plan::new(seed), |plan, fault| plan.with(Rule::new(fault, often)))
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_trace() {
    let trace = async |seed| {
        let store = store(every_fault(seed));
        everything(&store).await;
        store.injected()
    };
    let first = trace(1).await;
    assert_eq!(first, trace(1).await);
    assert_ne!(first, trace(2).await);
    let all: Vec<_> = [first, trace(2).await, trace(3).await].concat();
    for fault in [
        "refused with unavailable",
        "answered with conflict",
        "first of 3",
        "3 ms later",
        "3 ms late",
        "flipped",
        "cut short",
        "from before",
    ] {
        assert!(
            all.iter().any(|line| line.ends_with(fault) || line.contains(fault)),
            "no `{fault}` in {all:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn refused_is_without_effect_and_lost_is_with() {
    for kind in [ErrorKind::Unavailable, ErrorKind::TimedOut, ErrorKind::Conflict, ErrorKind::AlreadyExists] {
        let store = store(Plan::new(0).at(1, Fault::Refuse(kind)).at(2, Fault::Lose(kind)));
        assert_eq!(put(&store, "refused").await.unwrap_err().kind(), kind);
        assert_eq!(put(&store, "lost").await.unwrap_err().kind(), kind);
        put(&store, "kept").await.unwrap();
        assert_eq!(names(&*store.inner()).await, ["kept", "lost"]);
        assert_eq!(store.operations(), 3);
        assert_eq!(
            store.injected(),
            [
                format!("1 put refused: refused with {kind}"),
                format!("2 put lost: done, answered with {kind}")
            ]
        );
    }
    // A refusal of the store itself is told as it is.
    let store = store(Plan::new(0).at(2, Fault::Lose(ErrorKind::TimedOut)));
    put(&store, "a").await.unwrap();
    let again = store.put(&key("a"), Bytes::new(), PutMode::Create).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
}

#[tokio::test(start_paused = true)]
async fn late_delayed_and_endless() {
    let secs = Duration::from_secs;
    let plan = Plan::new(0).at(1, Fault::Late(secs(5))).at(2, Fault::Delay(secs(6))).at(3, Fault::Hang);
    let store = store(plan);
    assert_eq!(put(&store, "late").await.unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(names(&*store.inner()).await, [""; 0]);
    let started = tokio::time::Instant::now();
    put(&store, "delayed").await.unwrap();
    assert_eq!(started.elapsed().as_secs(), 6);
    assert_eq!(names(&*store.inner()).await, ["delayed", "late"]);
    let (outcome, ()) = tokio::join!(put(&store, "endless"), async {
        tokio::time::sleep(secs(3600)).await;
        store.kill();
    });
    assert_eq!(outcome.unwrap_err().message(), "the process is dead");
    assert_eq!((started.elapsed().as_secs(), names(&*store.inner()).await.len()), (3606, 2));
}

#[tokio::test(start_paused = true)]
async fn a_burst_refuses_whatever_comes() {
    let store = store(Plan::new(0).at(2, Fault::Burst(3)));
    put(&store, "a").await.unwrap();
    assert_eq!(put(&store, "b").await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(store.head(&key("a")).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let list: Result<Vec<_>> = store.list(None).try_collect().await;
    assert_eq!(list.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(names(&store).await, ["a"]);
}

#[tokio::test]
async fn reads_are_damaged_as_told() {
    for seed in 0..50 {
        let faults = [Fault::FlipBit, Fault::Truncate, Fault::FlipBit, Fault::Truncate];
        let store = store((2..).zip(faults).fold(Plan::new(seed), |plan, (at, fault)| plan.at(at, fault)));
        put(&store, "a").await.unwrap();
        let bits = |found: &[u8]| -> u32 {
            assert_eq!(found.len(), BODY.len());
            found.iter().zip(BODY).map(|(found, wanted)| (found ^ wanted).count_ones()).sum()
        };
        assert_eq!(bits(&store.get(&key("a"), None).await.unwrap()), 1);
        let cut = store.get(&key("a"), None).await.unwrap();
        assert!(cut.len() < BODY.len() && BODY.starts_with(&cut), "{cut:?}");
        assert_eq!(bits(&store.read_into(&key("a"), 0, BytesMut::zeroed(16)).await.unwrap()), 1);
        let cut = store.read_into(&key("a"), 0, BytesMut::zeroed(16)).await.unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::Corrupt);
        assert_eq!(store.get(&key("a"), None).await.unwrap(), BODY, "what is stored is whole");
    }
}

#[tokio::test]
async fn a_stale_list_is_the_one_before() {
    let stale = Rule::new(Fault::StaleList, 1000);
    let store = store(Plan::new(0).with(stale));
    put(&store, "a/1").await.unwrap();
    assert_eq!(names(&store).await, ["a/1"], "there was none before");
    put(&store, "a/2").await.unwrap();
    assert_eq!(names(&store).await, ["a/1"]);
    assert_eq!(names(&store).await, ["a/1", "a/2"]);
    let under: Vec<_> = store.list(Some(&key("a"))).try_collect().await.unwrap();
    assert_eq!(under.len(), 2, "another prefix is another list");
}

#[tokio::test]
async fn rules_choose_operations_and_keys() {
    let refuse = |per_mille| Rule::new(Fault::Refuse(ErrorKind::Unavailable), per_mille);
    let chosen = store(
        Plan::new(0)
            .with(refuse(1000).on(&[Operation::Head]).only("x"))
            .with(refuse(1000).only("y").except("yz")),
    );
    for name in ["x", "yz", "a"] {
        put(&chosen, name).await.unwrap();
    }
    assert!(put(&chosen, "y").await.is_err());
    assert!(chosen.head(&key("x")).await.is_err());
    chosen.get(&key("x"), None).await.unwrap();
    chosen.head(&key("a")).await.unwrap();

    let sometimes = store(Plan::new(3).with(refuse(100)));
    let mut refused = 0;
    for _ in 0..1000 {
        refused += u32::from(put(&sometimes, "a").await.is_err());
    }
    assert!((70..130).contains(&refused), "{refused} of 1000 at 100 per mille");
}

#[tokio::test]
async fn a_script_comes_first() {
    let store =
        store(Plan::new(0).with(Rule::new(Fault::Refuse(ErrorKind::Denied), 1000).on(&[Operation::Put])));
    let faults = [Fault::Lose(ErrorKind::TimedOut), Fault::Refuse(ErrorKind::Conflict)];
    store.script(Operation::Put, "/head.json", faults);
    assert_eq!(put(&store, "job/other").await.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(store.left(), 2);
    assert_eq!(put(&store, "job/head.json").await.unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(put(&store, "job/head.json").await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(store.left(), 0);
    assert_eq!(put(&store, "job/head.json").await.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(names(&*store.inner()).await, ["job/head.json"]);
}

/// Puts `a`, writes `b` in two parts, deletes `a`.
async fn six_operations(store: &FaultStore) -> Result<()> {
    put(store, "a").await?;
    let mut writer = store.writer(&key("b")).await?;
    writer.write(Bytes::from_static(b"one")).await?;
    writer.write(Bytes::from_static(b"two")).await?;
    writer.finish().await?;
    store.delete(&key("a")).await
}

#[tokio::test]
async fn death_comes_at_every_operation() {
    let alive = store(Plan::new(0));
    six_operations(&alive).await.unwrap();
    assert_eq!(alive.operations(), 6);
    let done: [&[&str]; 7] = [&[], &["a"], &["a"], &["a"], &["a"], &["a", "b"], &["b"]];
    for number in 1..=6u64 {
        for after in [false, true] {
            let store = store(Plan::new(0));
            if after {
                store.crash_after(number)
            } else {
                store.crash_before(number)
            }
            let error = six_operations(&store).await.unwrap_err();
            assert_eq!((error.kind(), error.message()), (ErrorKind::Unavailable, "the process is dead"));
            assert!(store.dead());
            let wanted = done[number as usize - usize::from(!after)];
            assert_eq!(names(&*store.inner()).await, wanted, "at {number}, after: {after}");
            // Nothing works any more, and nothing is counted.
            for outcome in [put(&store, "more").await, store.delete(&key("b")).await] {
                assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unavailable);
            }
            assert!(store.list(None).try_collect::<Vec<_>>().await.is_err());
            assert_eq!(store.operations(), number);
            assert_eq!(names(&*store.inner()).await, wanted);
            // It was only thought dead.
            store.revive();
            put(&store, "more").await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_dies_as_well() {
    let store = store(Plan::new(0).at(1, Fault::Delay(Duration::from_secs(9))));
    store.crash_after(2);
    let (slow, last) = tokio::join!(put(&store, "slow"), put(&store, "last"));
    assert!(slow.is_err() && last.is_err());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(names(&*store.inner()).await, ["last"]);
}

#[tokio::test]
async fn a_writer_that_has_failed_makes_nothing_visible() {
    let store = store(Plan::new(0).at(2, Fault::Refuse(ErrorKind::Unavailable)));
    let mut writer = store.writer(&key("a")).await.unwrap();
    assert!(writer.write(Bytes::from_static(b"one")).await.is_err());
    assert!(writer.write(Bytes::from_static(b"two")).await.is_err());
    assert!(writer.finish().await.is_err());
    let dropped = store.writer(&key("b")).await.unwrap();
    drop(dropped);
    assert_eq!(names(&store).await, [""; 0]);
}

/// The law holds on the honest store, and returns what it says of the one that tells `lie`.
fn caught(law: &str, lie: Lie) -> String {
    let (_, check) = laws::ALL.iter().find(|(name, _)| *name == law).unwrap();
    let with = |lies: &[Lie]| {
        let store = LyingStore::new(Arc::new(Memory::new()), lies);
        towline_core::testing::block_on(async { laws::check(store, check).await })
    };
    assert_eq!(with(&[]), Ok(()));
    with(&[lie]).expect_err(law)
}

#[test]
fn races_with_several_winners_are_caught() {
    let told = caught("exclusive_create", Lie::LooksThenPuts);
    assert!(told.ends_with("of 64 racers created the object"), "{told}");
    let told = caught("compare_and_swap_counter", Lie::LooksThenPuts);
    assert!(told.starts_with("96 steps were counted"), "{told}");
}

#[test]
fn accepted_stale_updates_are_caught() {
    let told = caught("stale_update_conflicts", Lie::AcceptsStaleUpdates);
    assert!(told.starts_with("update of a stale version"), "{told}");
}

#[test]
fn overwriting_creates_are_caught() {
    let told = caught("exclusive_create", Lie::OverwritesOnCreate);
    assert_eq!(told, "64 of 64 racers created the object");
    let told = caught("stale_update_conflicts", Lie::OverwritesOnCreate);
    assert!(told.starts_with("create of what is there"), "{told}");
}

#[test]
fn lost_puts_are_caught() {
    let told = caught("put_get_head", Lie::LosesPut(1));
    assert!(told.starts_with("get: not_found"), "{told}");
    let told = caught("compare_and_swap_counter", Lie::LosesPut(50));
    assert_eq!(told, "96 steps were counted, the counter says 95");
}

#[test]
fn short_lists_are_caught() {
    let told = caught("lists_are_complete", Lie::ListsNotAll);
    assert_eq!(told, "300 objects were put, 299 are listed");
}
