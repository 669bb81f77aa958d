//! The files of a run log: locked, read up to a limit, and on the disk before a call returns.

use std::fmt::Display;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use towline_core::{Error, ErrorKind, Result};

/// The longest pause between two looks at a lock.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The folder's lock, freed when dropped or with the process, however that ends.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until nobody else writes or reads.
    pub(super) fn exclusive(path: &Path, wait: Duration) -> Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(path);
        let file = file.map_err(|error| fault(error, path, "could not be opened"))?;
        Self::take(file, path, wait, File::try_lock)
    }

    /// Waits until nobody writes. Without a lock file nobody has written yet, and a reader that may not open it reads
    /// without.
    pub(super) fn shared(path: &Path, wait: Duration) -> Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => Self::take(file, path, wait, File::try_lock_shared).map(Some),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) =>
            {
                Ok(None)
            }
            Err(error) => Err(fault(error, path, "could not be opened")),
        }
    }

    fn take(
        file: File,
        path: &Path,
        wait: Duration,
        lock: impl Fn(&File) -> Result<(), TryLockError>,
    ) -> Result<Self> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            match lock(&file) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::Error(error)) => return Err(fault(error, path, "could not be locked")),
                Err(TryLockError::WouldBlock) if start.elapsed() >= wait => {
                    let message =
                        format!("`{}` was locked by others for {} s", path.display(), wait.as_secs_f64());
                    return Err(Error::unavailable(message)
                        .with_help("look for a process that hangs, then try again"));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// The whole file, or `None` if there is none.
pub(super) fn read_bounded(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    // Opening a pipe would wait for whoever writes into it.
    match fs::metadata(path) {
        Ok(data) if data.is_file() => {}
        Ok(_) => return Err(Error::invalid(format!("`{}` is no file", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(error, path, "could not be read")),
    }
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(max.saturating_add(1)).read_to_end(&mut bytes));
    match read {
        Ok(_) if bytes.len() as u64 > max => Err(too_large(path, max)),
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(fault(error, path, "could not be read")),
    }
}

/// What a file above its limit is answered with.
pub(super) fn too_large(path: &Path, max: u64) -> Error {
    Error::invalid(format!("`{}` has more than {max} bytes, the limit", path.display()))
        .with_help("repair the log, which leaves out checkpoints that are gone, or raise its limit")
}

/// Appends `bytes` to the file at `path`, durably; makes it if there is none.
pub(super) fn append_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let append = || {
        let mut file = File::options().create(true).append(true).open(path)?;
        let new = file.metadata()?.len() == 0;
        file.write_all(bytes)?;
        file.sync_all()?;
        if new { sync_folder(path) } else { Ok(()) }
    };
    append().map_err(|error| fault(error, path, "could not be written"))
}

/// Puts `bytes` in the place of the file at `path`: whoever looks sees the old contents or the new ones.
pub(super) fn replace(path: &Path, temporary: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(temporary)?;
        if let Ok(data) = fs::metadata(path) {
            file.set_permissions(data.permissions())?;
        }
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(temporary, path)?;
        sync_folder(path)
    };
    write().map_err(|error| {
        // What cannot be removed now is overwritten by the next one.
        let _ = fs::remove_file(temporary);
        fault(error, path, "could not be replaced")
    })
}

/// Makes the folder and lets its name reach the disk.
pub(super) fn make_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder)
        .and_then(|()| sync_folder(folder))
        .map_err(|error| fault(error, folder, "could not be made"))
}

/// Lets the name of `path` reach the disk. Only Unix lets a program ask for it.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if cfg!(unix) => {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder)?.sync_all()
        }
        Some(_) | None => Ok(()),
    }
}

/// An error of the operating system with the caller's reaction to it.
pub(super) fn fault(error: io::Error, path: &Path, what: impl Display) -> Error {
    use io::ErrorKind as Kind;
    #[expect(clippy::wildcard_enum_match_arm, reason = "the operating system has more faults than reactions")]
    let (kind, help) = match error.kind() {
        Kind::NotFound => (ErrorKind::NotFound, None),
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
            (ErrorKind::Denied, Some("allow it to this user, or choose another folder"))
        }
        Kind::InvalidFilename | Kind::InvalidInput | Kind::IsADirectory | Kind::NotADirectory => {
            (ErrorKind::Invalid, None)
        }
        Kind::Unsupported => (ErrorKind::Unsupported, Some("choose a file system that has locks")),
        Kind::StorageFull | Kind::QuotaExceeded => (ErrorKind::Unavailable, Some("free space on the disk")),
        _ => (ErrorKind::Unavailable, None),
    };
    let wrapped = Error::new(kind, format!("`{}` {what}", path.display())).with_source(error);
    match help {
        Some(help) => wrapped.with_help(help),
        None => wrapped,
    }
}
