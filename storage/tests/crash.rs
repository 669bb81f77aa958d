//! A process that publishes and prunes dies at every operation on its store, simulated within this process: before
//! the operation, and after it with the answer unseen. Then the same with faults of all kinds on top, by seed. What must
//! hold afterwards is said in `life`.
//!
//! `TOWLINE_SEEDS` (default 50) says how many seeds, `TOWLINE_FIRST_SEED` (default 0) which one is the first, and
//! `TOWLINE_POINTS` (default 1, at most all) at how many operations each of them dies. A failure names its seed. The
//! example `crash_matrix` runs more of them, also on other stores.

mod common;
mod life;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use life::place::Place;
use life::{ATTEMPTS, Told, Totals, among_faults, crash, damage, live, recover};
use towline_core::{ErrorKind, SnapshotStore};
use towline_storage::Memory;
use towline_storage::testing::{Fault, FaultStore, Plan, Rule};

#[test]
fn a_crash_at_every_operation() {
    let started = Instant::now();
    let operations = Place::count_operations();
    assert!(operations > 150, "{operations} operations are fewer than eight saves and a pruning take");
    let pace = Place::Memory.pace();
    let totals = Place::Memory.on_threads(2 * operations, async |index| {
        let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
        let process = FaultStore::new(Arc::clone(&store), Plan::default());
        let _told = Told(crash(&process, index));
        let life = live(&process, 1, &pace).await;
        assert!(process.dead());
        let last = process.injected().pop().unwrap();
        let found = recover(&store, &life, Some(&process), &pace).await;
        assert!(found.extra == 0 || last.ends_with("put job/head.json: dead after it"), "{last}");
        assert!(found.extra <= 1);
        let (begun, given_up) = (life.pruning && !life.pruned, found.swept > 0);
        assert!(begun || !given_up, "what is pruned is swept");
        Totals::from([
            ("crash points", 1),
            ("acknowledged", life.acknowledged.len() as u64),
            ("committed, not acknowledged", found.extra),
            ("died pruning", u64::from(begun)),
            ("died sweeping", u64::from(given_up)),
            ("orphans", found.orphans),
        ])
    });
    println!("{operations} operations: {totals:?} in {:.1} s", started.elapsed().as_secs_f32());
    assert_eq!(totals["crash points"], 2 * operations);
    // Eight snapshots, each with one crash right behind its commit.
    assert_eq!(totals["committed, not acknowledged"], 8);
    assert!(totals["died sweeping"] > 40 && totals["died pruning"] > totals["died sweeping"]);
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

#[test]
fn crashes_among_faults_of_all_kinds() {
    let started = Instant::now();
    let operations = Place::count_operations();
    let (seeds, first) = (setting("TOWLINE_SEEDS", 50), setting("TOWLINE_FIRST_SEED", 0));
    let each = setting("TOWLINE_POINTS", 1).clamp(1, 2 * operations);
    let points = Mutex::new(BTreeSet::new());
    let totals = Place::Memory.on_threads(seeds * each, async |index| {
        let seed = first + index / each;
        // One seed's points follow one another; the next seed's begin elsewhere, so that few seeds see much.
        let point = (seed * 37 + index % each) % (2 * operations);
        let totals = among_faults(Arc::new(Memory::new()), seed, point, &Place::Memory.pace()).await;
        if totals["died"] > 0 {
            points.lock().unwrap().insert(point);
        }
        totals
    });
    println!(
        "{seeds} seeds, {} of {} crash points: {totals:?} in {:.1} s",
        points.lock().unwrap().len(),
        2 * operations,
        started.elapsed().as_secs_f32()
    );
    assert_eq!(totals["lives"], seeds * each);
    if seeds >= 50 {
        for what in ["died", "faults", "acknowledged", "corrupt"] {
            assert!(totals[what] > seeds / 4, "{what}: {totals:?}");
        }
        assert!(totals["right in spite of damage"] > 0, "{totals:?}");
    }
}

/// A log without the random part of folders and of files that ranks write.
fn without_write_ids(log: Vec<String>) -> Vec<String> {
    let folder = |part: &str| {
        let numbered = part.as_bytes().iter().take(8).all(u8::is_ascii_digit) || part.starts_with("rank-");
        match part.rsplit_once('-') {
            Some((start, id)) if numbered && id.len() >= 16 => {
                format!("{start}{}", id.get(16..).unwrap_or_default())
            }
            _ => part.to_owned(),
        }
    };
    log.iter().map(|line| line.split('/').map(folder).collect::<Vec<_>>().join("/")).collect()
}

#[test]
fn the_same_seed_lives_the_same_life() {
    // What is late races with pauses of random length: the one thing that no seed decides.
    let plan = |seed| {
        let kinds = [ErrorKind::Unavailable, ErrorKind::TimedOut, ErrorKind::Conflict];
        let faults = kinds.into_iter().flat_map(|kind| [Fault::Refuse(kind), Fault::Lose(kind)]);
        let faults = faults.chain([Fault::Burst(4), Fault::Hang, Fault::Delay(Duration::from_secs(30))]);
        damage(faults.fold(Plan::new(seed), |plan, fault| plan.with(Rule::new(fault, 8))), 8)
    };
    let totals = Place::Memory.on_threads(20, async |seed| {
        let trace = async || {
            let process = FaultStore::new(Arc::new(Memory::new()), plan(seed));
            let life = live(&process, ATTEMPTS, &Place::Memory.pace()).await;
            (without_write_ids(process.injected()), process.operations(), life.acknowledged)
        };
        let first = trace().await;
        assert_eq!(first, trace().await, "seed {seed}");
        Totals::from([("faults", first.0.len() as u64)])
    });
    assert!(totals["faults"] > 20, "{totals:?}");
}
