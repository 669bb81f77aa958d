//! One writer of a key at a time: tasks of a process in order, processes by `flock`.

use std::fs::{File, TryLockError};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, OwnedMutexGuard};
use towline_core::{Error, ErrorKind, ObjectKey, Result};

use super::disk::Disk;
use crate::io::io_error;
use crate::random::jitter;

/// Keys share this many locks, so that lock files are few and never removed: removing one is a race.
const SLOTS: usize = 64;
/// How long a write waits for others.
const WAIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Slots(Vec<Arc<Mutex<()>>>);

impl Default for Slots {
    fn default() -> Self {
        Self((0..SLOTS).map(|_| Arc::default()).collect())
    }
}

impl Slots {
    pub(super) async fn take(&self, key: &ObjectKey) -> Result<Slot> {
        let number = number(key);
        let mutex = self.0.get(number).ok_or_else(|| Error::internal("a lock without a number"))?;
        match tokio::time::timeout(WAIT, Arc::clone(mutex).lock_owned()).await {
            Ok(guard) => Ok(Slot { number, _guard: guard }),
            Err(_) => Err(busy(&format!("`{key}`"))),
        }
    }
}

/// This process's turn. Moves into the thread that does the work, so that dropping the future frees nothing early.
#[derive(Debug)]
pub(super) struct Slot {
    number: usize,
    _guard: OwnedMutexGuard<()>,
}

impl Slot {
    /// Waits for the other processes. Blocks.
    pub(super) fn lock(&self, disk: &Disk) -> Result<FileLock> {
        let folder = disk.private().join("locks");
        let path = folder.join(format!("{:02x}", self.number));
        let open = || File::options().create(true).truncate(false).write(true).open(&path);
        let file = disk.make(&folder).and_then(|()| open());
        let fault = |error| io_error(error, format_args!("the lock `{}` could not be taken", path.display()));
        let file = file.map_err(fault)?;
        let deadline = Instant::now() + WAIT;
        let mut pause = Duration::from_micros(200);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(FileLock { _file: file }),
                Err(TryLockError::Error(error)) => return Err(fault(error)),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(busy(&path.display().to_string()));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(jitter(pause)),
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

/// Proof that nobody else writes the key. The operating system frees it with the process, however that ends.
#[derive(Debug)]
pub(super) struct FileLock {
    _file: File,
}

/// The same for every process and version: FNV-1a.
fn number(key: &ObjectKey) -> usize {
    let hash = key.as_str().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    usize::try_from(hash % SLOTS as u64).unwrap_or(0)
}

fn busy(what: &str) -> Error {
    let message = format!("{what} was locked by other writers for {} s", WAIT.as_secs());
    Error::new(ErrorKind::Unavailable, message).with_help("look for a writer that hangs, then try again")
}
