//! Keys as files: reading, and putting a written file into its place.

use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use towline_core::{Error, ObjectInfo, ObjectKey, PutMode, Result, Version};

use super::lock::{FileLock, Slot, Slots};
use super::temp::Temp;
use crate::io::{clip, io_error, read_at};
use crate::random::ms;

/// Where locks and temporary files live. No key can name it: keys have no `~`.
const PRIVATE: &str = "~towline";
/// What is read at once: together with where it comes from, it stays in a core's cache until its digest is taken.
const PIECE: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct Disk {
    root: PathBuf,
    slots: Slots,
}

impl Disk {
    pub(super) fn open(root: &Path) -> Result<Self> {
        let fault =
            |error| io_error(error, format_args!("the store `{}` could not be opened", root.display()));
        fs::create_dir_all(root).map_err(fault)?;
        let root = fs::canonicalize(root).map_err(fault)?;
        Ok(Self { root, slots: Slots::default() })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of locks and temporary files.
    pub(super) fn private(&self) -> PathBuf {
        self.root.join(PRIVATE)
    }

    /// The file of `key`.
    pub(super) fn path(&self, key: &ObjectKey) -> PathBuf {
        key.as_str().split('/').fold(self.root.clone(), |path, segment| path.join(segment))
    }

    /// Waits for this process's turn at `key`.
    pub(super) async fn slot(&self, key: &ObjectKey) -> Result<Slot> {
        self.slots.take(key).await
    }

    pub(super) fn read(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let (file, data) = self.file(key)?;
        let range = clip(key, range, data.len())?;
        let length = usize::try_from(range.end - range.start).map_err(|_| {
            Error::unsupported(format!("`{key}`: bytes {range:?} do not fit in this machine's memory"))
        })?;
        let mut bytes = vec![0; length];
        read_at(&file, range.start, &mut bytes).map_err(|error| unreadable(error, key))?;
        Ok(bytes.into())
    }

    /// Fills `buffer`, and shows it in pieces to `seen`, each while it is in the processor's cache.
    pub(super) fn fill(
        &self,
        key: &ObjectKey,
        start: u64,
        buffer: &mut [u8],
        mut seen: impl FnMut(&[u8]),
    ) -> Result<()> {
        let (file, data) = self.file(key)?;
        clip(key, Some(start..start.saturating_add(buffer.len() as u64)), data.len())?;
        let mut at = start;
        for piece in buffer.chunks_mut(PIECE) {
            read_at(&file, at, piece).map_err(|error| unreadable(error, key))?;
            seen(piece);
            at += piece.len() as u64;
        }
        Ok(())
    }

    pub(super) fn info(&self, key: ObjectKey) -> Result<ObjectInfo> {
        match stat(&self.path(&key)).map_err(|error| unreadable(error, &key))? {
            Some(data) => Ok(info(key, &data)),
            None => Err(missing(&key)),
        }
    }

    /// Whether `mode` allows a write to `key` as things are.
    pub(super) fn check(&self, key: &ObjectKey, mode: &PutMode) -> Result<Option<Metadata>> {
        let found = stat(&self.path(key)).map_err(|error| unreadable(error, key))?;
        match (mode, &found) {
            (PutMode::Overwrite, _) | (PutMode::Create, None) => Ok(found),
            (PutMode::Create, Some(_)) => Err(taken(key)),
            (PutMode::Update(wanted), Some(data)) if version(data) == *wanted => Ok(found),
            (PutMode::Update(wanted), found) => {
                let found = found.as_ref().map_or("nothing".to_owned(), |data| version(data).as_str().into());
                Err(Error::conflict(format!("`{key}`: wanted version {}, found {found}", wanted.as_str()))
                    .with_help("read it again, then decide"))
            }
        }
    }

    /// Puts a written and synced file into the place of `key`, if `mode` still allows it.
    pub(super) fn install(
        &self,
        _: &FileLock,
        temp: Temp,
        key: &ObjectKey,
        mode: &PutMode,
    ) -> Result<Version> {
        let old = self.check(key, mode)?;
        let fault = |error| io_error(error, format_args!("`{key}` could not be written"));
        let path = self.path(key);
        let folder = path.parent().unwrap_or(&self.root);
        self.make(folder).map_err(fault)?;
        let data = later_than(old.as_ref(), temp.file()).map_err(fault)?;
        if *mode == PutMode::Create {
            // A link fails if something is there, even if it was put there by somebody who ignores our locks.
            match fs::hard_link(temp.path(), &path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(taken(key)),
                linked => linked.map_err(fault)?,
            }
        } else {
            fs::rename(temp.path(), &path).map_err(fault)?;
            temp.moved();
        }
        sync_folder(folder).map_err(fault)?;
        Ok(version(&data))
    }

    pub(super) fn remove(&self, _: &FileLock, key: &ObjectKey) -> Result<()> {
        let path = self.path(key);
        let fault = |error| io_error(error, format_args!("`{key}` could not be deleted"));
        if stat(&path).map_err(fault)?.is_none() {
            return Ok(());
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| sync_folder(path.parent().unwrap_or(&self.root))).map_err(fault),
        }
    }

    /// Makes `folder` and what lies between it and the root, durably.
    pub(super) fn make(&self, folder: &Path) -> io::Result<()> {
        if folder.is_dir() {
            return Ok(());
        }
        let parent = folder.parent().unwrap_or(&self.root);
        if folder != self.root {
            self.make(parent)?;
        }
        match fs::create_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !folder.is_dir() => Err(error),
            _ => sync_folder(parent),
        }
    }

    fn file(&self, key: &ObjectKey) -> Result<(File, Metadata)> {
        let open = |path: &Path| -> io::Result<Option<(File, Metadata)>> {
            let file = match File::open(path) {
                Err(error) if is_missing(&error) => return Ok(None),
                file => file?,
            };
            let data = file.metadata()?;
            Ok(data.is_file().then_some((file, data)))
        };
        open(&self.path(key)).map_err(|error| unreadable(error, key))?.ok_or_else(|| missing(key))
    }
}

pub(super) fn info(key: ObjectKey, data: &Metadata) -> ObjectInfo {
    let modified = data.modified().map_or(0, ms);
    ObjectInfo::new(key, data.len(), version(data), modified)
}

/// What is known of the file at `path`; `None` if there is no file, be it that a folder is there.
fn stat(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::metadata(path) {
        Ok(data) => Ok(data.is_file().then_some(data)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &io::Error) -> bool {
    // The second: a file lies where the path wants a folder.
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Inode numbers are used again, times stand still within a tick: the version rests on the time that
/// [`later_than`] sets, and the rest only makes accidents rarer.
fn version(data: &Metadata) -> Version {
    #[cfg(unix)]
    let inode = std::os::unix::fs::MetadataExt::ino(data);
    #[cfg(not(unix))]
    let inode = 0;
    let time = data.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Version::new(format!("{inode:x}-{:x}-{:x}", time.as_nanos(), data.len()))
}

/// Gives `file` a time that is later than that of `old`, however fast they follow and whatever the clock says.
fn later_than(old: Option<&Metadata>, file: &File) -> io::Result<Metadata> {
    let now = SystemTime::now();
    let Some(old) = old.map(Metadata::modified).transpose()? else {
        file.set_modified(now)?;
        return file.metadata();
    };
    // The second step is for file systems that round times.
    for step in [Duration::from_nanos(1), Duration::from_secs(4)] {
        file.set_modified(now.max(old + step))?;
        let data = file.metadata()?;
        if data.modified()? > old {
            return Ok(data);
        }
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "the file system does not keep the times of files"))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn missing(key: &ObjectKey) -> Error {
    Error::not_found(format!("`{key}` does not exist"))
}

fn taken(key: &ObjectKey) -> Error {
    Error::already_exists(format!("`{key}` exists"))
}

fn unreadable(error: io::Error, key: &ObjectKey) -> Error {
    io_error(error, format_args!("`{key}` could not be read"))
}
