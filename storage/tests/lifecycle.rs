//! What goes away and what stays: expiry by the store's clock, rules, pins, leases, tombstones, orphans.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::clocked::Clocked;
use common::{find, name, session, shared, weights};
use futures_util::StreamExt as _;
use towline_core::testing::XorCodec;
use towline_core::{ErrorKind, ObjectKey, PutMode, SnapshotKind, SnapshotStore};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan};
use towline_storage::{
    Best, Kept, Local, Memory, Metric, Prune, Pruned, Publish, Retention, SaveTrainState, SnapshotInfo,
    SnapshotRepo, Wanted, Writer,
};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

struct Bench {
    clock: Arc<Clocked>,
    repo: SnapshotRepo,
    writer: Writer,
}

async fn bench() -> Bench {
    let clock = Clocked::new(Arc::new(Memory::new()));
    let store: Arc<dyn SnapshotStore> = Arc::<Clocked>::clone(&clock);
    let repo = common::repo(store);
    let writer = repo.writer(session(1)).await.unwrap();
    Bench { clock, repo, writer }
}

impl Bench {
    async fn base(&self, text: &str) -> SnapshotInfo {
        self.writer.publish(Publish::new(name(text), SnapshotKind::Base, shared(text))).await.unwrap();
        find(&self.repo, text).await
    }

    async fn delta(&self, text: &str, parent: &str) -> SnapshotInfo {
        let publish = Publish::new(name(text), SnapshotKind::Delta, shared(text))
            .with_parent(find(&self.repo, parent).await, shared(parent))
            .with_codec(Arc::new(XorCodec));
        self.writer.publish(publish).await.unwrap();
        find(&self.repo, text).await
    }

    async fn state(&self, text: &str) -> SnapshotInfo {
        self.writer.save_state(SaveTrainState::new(name(text), shared(text))).await.unwrap()
    }

    async fn prune(&self) -> Pruned {
        self.repo.prune(&Prune::new(Retention::new())).await.unwrap()
    }

    async fn prune_by(&self, retention: Retention) -> Pruned {
        self.repo.prune(&Prune::new(retention)).await.unwrap()
    }

    async fn names(&self) -> Vec<String> {
        self.repo.list().await.unwrap().iter().map(|info| info.name.to_string()).collect()
    }

    /// The objects below a folder of the job.
    async fn objects(&self, folder: &str) -> Vec<String> {
        let prefix = ObjectKey::new(format!("job/{folder}")).unwrap();
        let listed: Vec<_> = self.clock.list(Some(&prefix)).collect().await;
        listed.into_iter().map(|object| object.unwrap().key.to_string()).collect()
    }
}

fn names(infos: &[SnapshotInfo]) -> Vec<&str> {
    infos.iter().map(|info| info.name.as_str()).collect()
}

fn why(pruned: &Pruned, text: &str) -> Kept {
    pruned.kept.iter().find(|(info, _)| info.name.as_str() == text).unwrap().1.clone()
}

#[tokio::test]
async fn times_to_live_have_a_range() {
    let bench = bench().await;
    for (seconds, good) in [(3599, false), (3600, true), (315_360_000, true), (315_360_001, false)] {
        let ttl = Some(Duration::from_secs(seconds));
        let text = format!("ttl-{seconds}");
        let saved =
            bench.writer.save_state(SaveTrainState::new(name(&text), shared(&text)).with_ttl(ttl)).await;
        assert_eq!(saved.is_ok(), good, "{seconds}");
        let publish = Publish::new(name(&text), SnapshotKind::Base, shared(&text)).with_ttl(ttl);
        let published = bench.writer.publish(publish).await;
        match published {
            Ok(_) => assert!(good, "{seconds}"),
            Err(error) => {
                assert!(!good, "{seconds}");
                assert_eq!(error.kind(), ErrorKind::Invalid);
                assert!(error.message().contains("3600 to 315360000"), "{error}");
            }
        }
        let info = bench.state(&format!("s-{seconds}")).await;
        assert_eq!(bench.repo.set_ttl(&info, ttl).await.is_ok(), good, "{seconds}");
    }
    // The range is the store's.
    let narrow = bench.repo.clone().with_ttl_range(Duration::from_secs(1)..=Duration::from_secs(2));
    let info = find(&bench.repo, "s-3600").await;
    assert!(narrow.set_ttl(&info, Some(Duration::from_secs(2))).await.is_ok());
    assert!(narrow.set_ttl(&info, Some(Duration::from_secs(3))).await.is_err());
}

#[tokio::test]
async fn what_expires_is_given_up_and_deleted_after_the_grace() {
    let bench = bench().await;
    let save = SaveTrainState::new(name("old"), shared("old")).with_ttl(Some(HOUR));
    let old = bench.writer.save_state(save).await.unwrap();
    bench.state("new").await;
    assert!(bench.prune().await.given_up.is_empty());
    bench.clock.later(HOUR * 2);
    // A dry run changes nothing. Its time is this machine's.
    let dry = bench.repo.prune(&Prune::new(Retention::new()).with_dry_run(true)).await.unwrap();
    assert!(dry.given_up.is_empty());
    let pruned = bench.prune().await;
    assert_eq!((names(&pruned.given_up), names(&pruned.waiting)), (vec!["old"], vec!["old"]));
    assert_eq!(bench.names().await, ["new"]);
    assert!(!bench.objects(old.dir.as_str()).await.is_empty(), "readers may still be at it");
    assert_eq!(bench.repo.find("old", Wanted::Any).await.unwrap_err().kind(), ErrorKind::NotFound);
    bench.clock.later(DAY - Duration::from_secs(60));
    assert_eq!(names(&bench.prune().await.waiting), ["old"]);
    bench.clock.later(Duration::from_secs(120));
    let pruned = bench.prune().await;
    assert_eq!((names(&pruned.deleted), pruned.waiting.len()), (vec!["old"], 0));
    assert!(bench.objects(old.dir.as_str()).await.is_empty());
    assert!(bench.prune().await.deleted.is_empty());
    // The name is free again, the number is not.
    let again = bench.state("old").await;
    assert!(again.seq > old.seq);
    assert_eq!(bench.repo.restore(&again).await.unwrap(), weights("old"));
}

#[tokio::test]
async fn the_newest_state_and_live_parents_stay_however_expired() {
    let bench = bench().await;
    let base = bench.base("base").await;
    bench.delta("middle", "base").await;
    bench.delta("leaf", "middle").await;
    bench.state("s1").await;
    bench.state("s2").await;
    for text in ["base", "middle", "s1", "s2"] {
        bench.repo.set_ttl(&find(&bench.repo, text).await, Some(HOUR)).await.unwrap();
    }
    bench.clock.later(HOUR * 5);
    let pruned = bench.prune().await;
    assert_eq!(names(&pruned.given_up), ["s1"]);
    assert_eq!(
        pruned.expired_kept().map(|(info, _)| info.name.as_str()).collect::<Vec<_>>(),
        ["base", "middle", "s2"]
    );
    let leaf = find(&bench.repo, "leaf").await;
    assert_eq!(why(&pruned, "s2"), Kept::NewestState);
    assert_eq!(why(&pruned, "middle"), Kept::NeededBy(leaf.seq));
    assert_eq!(bench.repo.restore(&leaf).await.unwrap(), weights("leaf"));
    // Loaded only when it is named.
    let now = pruned.now_ms;
    assert!(find(&bench.repo, "s2").await.is_expired(now) && !leaf.is_expired(now));
    // Cleared, it lives on; without the leaf, the chain goes.
    bench.repo.set_ttl(&base, None).await.unwrap();
    bench.repo.set_ttl(&leaf, Some(HOUR)).await.unwrap();
    bench.clock.later(HOUR * 5);
    let pruned = bench.prune().await;
    assert_eq!(names(&pruned.given_up), ["middle", "leaf"]);
    assert_eq!(why(&pruned, "base"), Kept::NoRule);
    // Nothing is built on what was given up.
    let publish = Publish::new(name("late"), SnapshotKind::Delta, shared("late"))
        .with_parent(leaf, shared("leaf"))
        .with_codec(Arc::new(XorCodec));
    assert_eq!(bench.writer.publish(publish).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn what_expired_is_not_the_newest() {
    let repo = common::repo(Arc::new(Memory::new()))
        .with_ttl_range(Duration::from_millis(1)..=Duration::from_secs(9));
    let writer = repo.writer(session(1)).await.unwrap();
    writer.save_state(SaveTrainState::new(name("a"), shared("a"))).await.unwrap();
    let brief = SaveTrainState::new(name("b"), shared("b")).with_ttl(Some(Duration::from_millis(1)));
    writer.save_state(brief).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(repo.newest(Wanted::State).await.unwrap().unwrap().name, name("a"));
    assert_eq!(repo.newest(Wanted::Sampler).await.unwrap(), None);
    // It can still be named.
    assert_eq!(repo.restore(&find(&repo, "b").await).await.unwrap(), weights("b"));
}

#[tokio::test]
async fn a_clock_that_goes_back_only_delays() {
    let bench = bench().await;
    let save = SaveTrainState::new(name("a"), shared("a")).with_ttl(Some(HOUR));
    bench.writer.save_state(save).await.unwrap();
    bench.state("b").await;
    bench.clock.earlier(DAY * 365);
    assert!(bench.prune().await.given_up.is_empty());
    bench.clock.later(DAY * 365 + HOUR * 2);
    assert_eq!(names(&bench.prune().await.given_up), ["a"]);
    bench.clock.earlier(DAY * 400);
    let pruned = bench.prune().await;
    assert_eq!((pruned.deleted.len(), names(&pruned.waiting)), (0, vec!["a"]));
    bench.clock.later(DAY * 402);
    assert_eq!(names(&bench.prune().await.deleted), ["a"]);
}

#[tokio::test]
async fn rules() {
    let bench = bench().await;
    for step in 1..=12u64 {
        let text = format!("s-{step}");
        let save = SaveTrainState::new(name(&text), shared(&text))
            .with_step(step)
            .with_metric("loss", Metric::new((step as f64 - 3.5).abs()).unwrap());
        bench.writer.save_state(save).await.unwrap();
    }
    bench.base("x").await;
    let one = |metric: &str, count: usize, highest| Best::new(metric, count.try_into().unwrap(), highest);
    let rules = Retention::new()
        .with_last_states(2)
        .unwrap()
        .with_every_steps(5)
        .unwrap()
        .with_best(one("loss", 1, false));
    let pruned = bench.prune_by(rules).await;
    // 3 and 4 are as good: the newer one is kept.
    assert_eq!(bench.names().await, ["s-4", "s-5", "s-10", "s-11", "s-12"]);
    assert_eq!(
        (why(&pruned, "s-4"), why(&pruned, "s-5"), why(&pruned, "s-11")),
        (Kept::Best, Kept::Every, Kept::Last)
    );
    assert_eq!(names(&pruned.given_up).last(), Some(&"x"), "steps and metrics are rules for snapshots too");
    // The best by more; who has no metric is not the best.
    bench.prune_by(Retention::new().with_best(one("loss", 2, true))).await;
    assert_eq!(bench.names().await, ["s-11", "s-12"]);
    bench.prune_by(Retention::new().with_best(one("other", 2, true))).await;
    assert_eq!(bench.names().await, ["s-12"], "the newest state stays");
    // No rule for snapshots: they stay.
    bench.base("y").await;
    bench.prune_by(Retention::new().with_last_states(1).unwrap()).await;
    assert_eq!(bench.names().await, ["s-12", "y"]);
    for error in [
        Retention::new().with_last_states(0).unwrap_err(),
        Retention::new().with_last_snapshots(0).unwrap_err(),
        Retention::new().with_every_steps(0).unwrap_err(),
        Metric::new(f64::NAN).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn pins_hold() {
    let bench = bench().await;
    bench.base("a").await;
    bench.delta("b", "a").await;
    bench.base("c").await;
    let last = || Retention::new().with_last_snapshots(1).unwrap();
    bench.repo.pin(&find(&bench.repo, "b").await, "promoted", "a model rests on it").await.unwrap();
    let pruned = bench.prune_by(last()).await;
    assert_eq!(bench.names().await, ["a", "b", "c"]);
    assert_eq!(why(&pruned, "b"), Kept::Pinned("promoted".into()));
    assert_eq!(bench.repo.pins().await.unwrap()[0].reason, "a model rests on it");
    bench.repo.unpin("promoted").await.unwrap();
    bench.repo.unpin("promoted").await.unwrap();
    let gone = find(&bench.repo, "a").await;
    assert_eq!(names(&bench.prune_by(last()).await.given_up), ["a", "b"]);
    assert_eq!(bench.repo.pin(&gone, "late", "").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bench.repo.set_ttl(&gone, None).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bench.repo.pin(&gone, "a/b", "").await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn deleting_gives_up_one_and_never_what_something_needs() {
    let bench = bench().await;
    for text in ["state-1", "state-2"] {
        bench.state(text).await;
    }
    let (base, delta, alone) =
        (bench.base("base").await, bench.delta("delta", "base").await, bench.base("alone").await);
    let newest = find(&bench.repo, "state-2").await;
    let error = bench.repo.delete(&newest).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.message().ends_with("is not deleted: the newest train state"), "{error}");
    bench.repo.pin(&alone, "best", "").await.unwrap();
    let error = bench.repo.delete(&alone).await.unwrap_err();
    assert!(error.message().ends_with("is not deleted: pinned as `best`"), "{error}");
    bench.repo.unpin("best").await.unwrap();

    let older = find(&bench.repo, "state-1").await;
    for _ in 0..2 {
        assert_eq!(bench.repo.delete(&older).await.unwrap(), None);
        assert_eq!(bench.repo.delete(&alone).await.unwrap(), None);
    }
    assert_eq!(bench.repo.delete(&base).await.unwrap(), Some(Kept::NeededBy(delta.seq)));
    let live = bench.repo.list().await.unwrap();
    assert_eq!(names(&live), ["state-2", "base", "delta"]);
    let pruned = bench.prune().await;
    assert_eq!(why(&pruned, "base"), Kept::NeededBy(delta.seq));
    assert_eq!(names(&pruned.waiting), ["state-1", "alone"]);
    assert!(bench.repo.restore(&delta).await.is_ok());
    // Free: the next pruning takes it.
    bench.repo.delete(&delta).await.unwrap();
    assert_eq!(names(&bench.prune().await.given_up), ["base"]);
}

#[tokio::test]
async fn leases_hold_while_they_last() {
    let bench = bench().await;
    let a = bench.base("a").await;
    let b = bench.base("b").await;
    bench.base("c").await;
    let last = || Retention::new().with_last_snapshots(1).unwrap();
    let on_a = bench.repo.lease(&a, HOUR).await.unwrap();
    let pruned = bench.prune_by(last()).await;
    assert_eq!((names(&pruned.given_up), why(&pruned, "a")), (vec!["b"], Kept::Leased));
    // Too late for what was given up.
    assert_eq!(bench.repo.lease(&b, HOUR).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bench.objects("leases").await.len(), 1, "what failed holds nothing");
    on_a.renew().await.unwrap();
    on_a.release().await.unwrap();
    assert_eq!(names(&bench.prune_by(last()).await.given_up), ["a"]);
    // A lease from before holds the files beyond the grace.
    let c = bench.base("d").await;
    let lease = bench.repo.lease(&c, DAY * 30).await.unwrap();
    bench.clock.later(DAY * 2);
    assert_eq!(names(&bench.prune_by(last()).await.deleted), ["a", "b"]);
    assert_eq!(lease.info().name, name("d"));
    bench.clock.later(DAY * 40);
    bench.prune_by(last()).await;
    assert!(bench.objects("leases").await.is_empty(), "leases that are over are cleared");
}

/// A listing that came from before the lease is what a race comes to: whoever prunes has not seen it when it gave the
/// snapshot up, and the reader has seen the snapshot alive.
#[tokio::test]
async fn a_lease_that_raced_with_giving_up_holds_the_chain() {
    let bench = bench().await;
    let a = bench.base("a").await;
    bench.delta("b", "a").await;
    let c = bench.delta("c", "b").await;
    bench.base("d").await;
    let faulty = FaultStore::new(Arc::<Clocked>::clone(&bench.clock), Plan::default());
    let pruner = common::repo(Arc::new(faulty.clone()));
    let prune = || Prune::new(Retention::new().with_last_snapshots(1).unwrap()).with_grace(Duration::ZERO);
    pruner.prune(&Prune::new(Retention::new())).await.unwrap();
    let lease = bench.repo.lease(&c, HOUR).await.unwrap();
    faulty.script(Operation::List, "leases", [Fault::StaleList]);
    let pruned = pruner.prune(&prune()).await.unwrap();
    assert_eq!(faulty.left(), 0);
    assert_eq!(names(&pruned.given_up), ["a", "b", "c"]);
    assert_eq!((pruned.deleted.len(), names(&pruned.waiting)), (0, vec!["a", "b", "c"]));
    assert_eq!(bench.names().await, ["d"]);
    // It was given up, and whoever holds it can read it.
    assert_eq!(bench.repo.restore(&c).await.unwrap(), weights("c"));
    // Nobody else can hold it, and whoever tries delays nothing.
    assert_eq!(bench.repo.lease(&c, DAY * 30).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bench.repo.lease(&a, DAY * 30).await.unwrap_err().kind(), ErrorKind::NotFound);
    lease.release().await.unwrap();
    assert_eq!(names(&pruner.prune(&prune()).await.unwrap().deleted), ["a", "b", "c"]);
    assert_eq!(bench.repo.restore(&c).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn who_found_it_before_it_was_given_up_reads_it_until_the_grace_is_over() {
    let bench = bench().await;
    bench.base("a").await;
    let b = bench.delta("b", "a").await;
    bench.base("c").await;
    let last = || Retention::new().with_last_snapshots(1).unwrap();
    assert_eq!(names(&bench.prune_by(last()).await.given_up), ["a", "b"]);
    assert_eq!(bench.repo.restore(&b).await.unwrap(), weights("b"));
    bench.repo.verify(&b).await.unwrap();
    bench.clock.later(DAY + HOUR);
    assert_eq!(names(&bench.prune_by(last()).await.deleted), ["a", "b"]);
    assert_eq!(bench.repo.restore(&b).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn files_of_no_snapshot_are_deleted_when_they_are_old() {
    let bench = bench().await;
    let live = bench.base("a").await;
    for (place, length) in
        [("snapshots/00000007-x-0/model", 5), ("states/00000003-y-1/a/b", 7), ("other/z", 9)]
    {
        let key = ObjectKey::new(format!("job/{place}")).unwrap();
        bench.clock.put(&key, Bytes::from(vec![0; length]), PutMode::Create).await.unwrap();
    }
    let far = ObjectKey::new("job/snapshots/99999999999-q-0/model").unwrap();
    bench.clock.put(&far, Bytes::new(), PutMode::Create).await.unwrap();
    assert!(bench.prune().await.orphans.is_empty(), "too young");
    bench.clock.later(DAY * 2);
    let orphans = bench.prune().await.orphans;
    let found: Vec<_> =
        orphans.iter().map(|orphan| (orphan.dir.as_str(), orphan.files, orphan.bytes)).collect();
    assert_eq!(found, [("snapshots/00000007-x-0", 1, 5), ("states/00000003-y-1", 1, 7)]);
    assert_eq!(bench.objects("states").await.len(), 0);
    assert_eq!(bench.objects("other").await.len(), 1);
    assert_eq!(bench.repo.restore(&live).await.unwrap(), weights("a"));
    // Whoever still works on number 7 comes too late: the next one is 8.
    assert_eq!(bench.base("b").await.seq, 8);
}

/// With no grace at all, pruning takes the files away under writers and readers. What was acknowledged still is whole,
/// and what lost its files is not visible.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pruning_without_grace_races_with_a_writer() {
    let dir = tempfile::tempdir().unwrap();
    let repo = common::repo(Arc::new(Local::open(dir.path()).unwrap()));
    let writer = repo.writer(session(1)).await.unwrap();
    let pruner = repo.clone();
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let pruning = tokio::spawn(async move {
        let (mut runs, mut orphans) = (0, 0);
        while !*stopped.borrow_and_update() {
            let retention = Retention::new().with_last_snapshots(3).unwrap();
            let pruned = pruner.prune(&Prune::new(retention).with_grace(Duration::ZERO)).await.unwrap();
            orphans += pruned.orphans.len();
            runs += 1;
        }
        (runs, orphans)
    });
    let (mut acknowledged, mut refused) = (BTreeSet::new(), 0);
    for number in 0..150 {
        let text = format!("n-{number}");
        match writer.publish(Publish::new(name(&text), SnapshotKind::Base, shared(&text))).await {
            Ok(_) => {
                acknowledged.insert(text);
            }
            // Its files or its number were taken away.
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Conflict | ErrorKind::NotFound), "{error:?}");
                refused += 1;
            }
        }
    }
    stop.send(true).unwrap();
    let (runs, orphans) = pruning.await.unwrap();
    let live = repo.list().await.unwrap();
    assert!(live.len() >= 3.min(acknowledged.len()), "{} of {}", live.len(), acknowledged.len());
    for info in &live {
        assert!(acknowledged.contains(info.name.as_str()), "{} was refused and is visible", info.name);
        assert_eq!(repo.restore(info).await.unwrap(), weights(info.name.as_str()));
    }
    assert!(runs > 1 && !acknowledged.is_empty(), "{runs} runs, {orphans} orphans, {refused} refused");
}
