//! New folders that are there whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use towline_core::{Error, Result};

use crate::io::io_error;
use crate::random::random;

/// A folder that takes its name when it is whole and is removed otherwise.
pub(crate) struct NewFolder {
    /// Where to write until it is whole.
    pub(crate) path: PathBuf,
    target: PathBuf,
    kept: bool,
}

impl NewFolder {
    /// Prepares to make `target`, which must not be there or be an empty folder.
    pub(crate) fn beside(target: PathBuf) -> Result<Self> {
        let is_empty = match fs::read_dir(&target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if !is_empty {
            return Err(Error::already_exists(format!("`{}` exists and is not empty", target.display()))
                .with_help("name a new folder"));
        }
        let Some(name) = target.file_name() else {
            return Err(Error::invalid(format!("`{}` names no new folder", target.display())));
        };
        let path = target.with_file_name(format!(".{}.{:016x}", name.display(), random()));
        fs::create_dir_all(&path).map_err(|error| unwritten(error, &path))?;
        Ok(Self { path, target, kept: false })
    }

    /// Writes a file below it, and syncs it.
    pub(crate) fn write(&self, path: &str, body: &[u8]) -> Result<()> {
        let path = self.path.join(path);
        let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
        let written = folder.and_then(|()| File::create_new(&path)).and_then(|mut file| {
            file.write_all(body)?;
            file.sync_all()
        });
        written.map_err(|error| unwritten(error, &path))
    }

    /// Renames it into its place.
    pub(crate) fn keep(mut self) -> Result<()> {
        let moved = fs::rename(&self.path, &self.target);
        moved.map_err(|error| unwritten(error, &self.target))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.kept {
            // It has a name of its own, so that a rest of it is in nobody's way.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// A file or folder that the disk did not take.
pub(crate) fn unwritten(error: io::Error, path: &Path) -> Error {
    io_error(error, format_args!("`{}` could not be written", path.display()))
}
