//! Files that are not objects yet.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use towline_core::Result;

use super::disk::Disk;
use crate::io::io_error;
use crate::random::random;

/// Unlocked temporary files of this age belong to nobody any more.
const STALE: Duration = Duration::from_secs(3600);

/// A file that removes itself unless it has found its place. It stays locked while it is written.
#[derive(Debug)]
pub(super) struct Temp {
    file: File,
    path: PathBuf,
    moved: bool,
}

impl Temp {
    pub(super) fn new(disk: &Disk) -> Result<Self> {
        let folder = folder(&disk.private());
        let path = folder.join(format!("{}-{:016x}", std::process::id(), random()));
        let make = || {
            disk.make(&folder)?;
            File::options().write(true).create_new(true).open(&path)
        };
        let file = make().map_err(|error| {
            io_error(error, format_args!("the temporary file `{}` could not be made", path.display()))
        })?;
        // Only keeps others from taking it for stale: without it they still wait for an hour.
        let _ = file.try_lock();
        Ok(Self { file, path, moved: false })
    }

    /// A new file with `body`, synced.
    pub(super) fn holding(disk: &Disk, body: &[u8]) -> Result<Self> {
        let mut temp = Self::new(disk)?;
        temp.append(body)?;
        temp.sync()?;
        Ok(temp)
    }

    pub(super) fn append(&mut self, part: &[u8]) -> Result<()> {
        self.file.write_all(part).map_err(|error| self.fault(error))
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| self.fault(error))
    }

    /// What syncs the bytes written so far while others are written.
    pub(super) fn sync_apart(&self) -> Result<impl FnOnce() -> Result<()> + Send + 'static> {
        let file = self.file.try_clone().map_err(|error| self.fault(error))?;
        let path = self.path.clone();
        Ok(move || file.sync_data().map_err(|error| unwritable(error, &path)))
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file has another name now and stays.
    pub(super) fn moved(mut self) {
        self.moved = true;
    }

    fn fault(&self, error: io::Error) -> towline_core::Error {
        unwritable(error, &self.path)
    }
}

fn unwritable(error: io::Error, path: &Path) -> towline_core::Error {
    io_error(error, format_args!("the temporary file `{}` could not be written", path.display()))
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.moved {
            // What cannot be removed now is removed when the store is opened again.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes what dead processes left, as far as that is possible.
pub(super) fn remove_stale(private: &Path) {
    let Ok(entries) = fs::read_dir(folder(private)) else { return };
    for entry in entries.flatten() {
        let age = entry.metadata().and_then(|data| data.modified()).map(|time| time.elapsed());
        let old = matches!(age, Ok(Ok(age)) if age > STALE);
        if old && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn folder(private: &Path) -> PathBuf {
    private.join("tmp")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn only_old_and_unlocked_files_are_stale() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        let old = SystemTime::now() - 2 * STALE;
        let living = Temp::new(&disk).unwrap();
        living.file.set_modified(old).unwrap();
        let dead = folder(&disk.private()).join("1-dead");
        File::create(&dead).unwrap().set_modified(old).unwrap();
        let young = folder(&disk.private()).join("1-young");
        File::create(&young).unwrap();
        remove_stale(&disk.private());
        assert!(living.path.exists() && young.exists() && !dead.exists());
        let path = living.path.clone();
        drop(living);
        assert!(!path.exists());
    }
}
