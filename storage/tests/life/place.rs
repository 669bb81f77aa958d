//! Where lives are lived, and how fast time goes there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use towline_core::SnapshotStore;
use towline_storage::testing::{FaultStore, Plan};
use towline_storage::{Local, Memory, StoreOptions};

use super::{STEPS, Totals, live};

/// How long things take.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Whether the clock is paused: then waiting costs nothing.
    pub paused: bool,
    /// How long a process waits for one operation.
    pub deadline: Duration,
    /// Longer than that.
    pub slow: Duration,
    /// Longer than anything that is late.
    pub settle: Duration,
}

/// A store for each life.
#[derive(Debug, Clone)]
pub enum Place {
    Memory,
    /// A new folder for each.
    Local,
    /// A new prefix below this URL for each.
    Url(String),
}

impl Place {
    /// `memory`, `local`, or the URL of a store, which must be there.
    pub fn new(text: &str) -> Self {
        match text {
            "memory" => Self::Memory,
            "local" => Self::Local,
            url => Self::Url(url.trim_end_matches('/').to_owned()),
        }
    }

    pub fn pace(&self) -> Pace {
        let seconds = Duration::from_secs;
        match self {
            Self::Memory | Self::Local => {
                Pace { paused: true, deadline: seconds(20), slow: seconds(30), settle: seconds(300) }
            }
            // A network goes by the real clock.
            Self::Url(_) => {
                Pace { paused: false, deadline: seconds(2), slow: seconds(3), settle: seconds(4) }
            }
        }
    }

    /// The store of life `number`, and the folder that is to be removed behind it.
    pub fn open(&self, number: u64) -> (Arc<dyn SnapshotStore>, Option<TempDir>) {
        match self {
            Self::Memory => (Arc::new(Memory::new()), None),
            Self::Local => {
                let dir = tempfile::tempdir().unwrap();
                (Arc::new(Local::open(dir.path()).unwrap()), Some(dir))
            }
            Self::Url(url) => {
                let url = format!("{url}/{}-{number}", std::process::id());
                let options = StoreOptions::from_env().unwrap();
                (towline_storage::open(&url, &options).unwrap(), None)
            }
        }
    }

    /// How many lives at once: those on a network mostly wait.
    fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4));
        if matches!(self, Self::Url(_)) { 8 * cores } else { cores }
    }

    /// Runs `case` for each number below `count` on a few threads, each with its own clock, and adds up what they count.
    pub fn on_threads<F>(&self, count: u64, case: impl Fn(u64) -> F + Sync) -> Totals
    where
        F: Future<Output = Totals>,
    {
        let next = AtomicU64::new(0);
        let totals = Mutex::new(Totals::new());
        std::thread::scope(|scope| {
            for _ in 0..self.threads() {
                scope.spawn(|| {
                    let mut builder = tokio::runtime::Builder::new_current_thread();
                    let paused = self.pace().paused;
                    let runtime = builder.enable_all().start_paused(paused).build().unwrap();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            break;
                        }
                        let counted = runtime.block_on(case(number));
                        let mut totals = totals.lock().unwrap();
                        counted
                            .into_iter()
                            .for_each(|(what, times)| *totals.entry(what).or_default() += times);
                    }
                });
            }
        });
        totals.into_inner().unwrap()
    }

    /// How many operations the undisturbed life takes. It is the same for all places.
    pub fn count_operations() -> u64 {
        let totals = Self::Memory.on_threads(1, async |_| {
            let process = FaultStore::new(Arc::new(Memory::new()), Plan::default());
            let life = live(&process, 1, &Self::Memory.pace()).await;
            assert_eq!(life.acknowledged.len() + 1, STEPS.len());
            assert!(life.pruned);
            Totals::from([("operations", process.operations())])
        });
        totals["operations"]
    }
}
