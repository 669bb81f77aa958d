//! Files read at an offset, errors of the operating system, and work that blocks.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use towline_core::safetensors::ByteSource;
use towline_core::{Error, ErrorKind, Result};

/// A file as a [`ByteSource`], read at offsets, so that it may be larger than memory. Calls may run at once.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len: u64,
    path: PathBuf,
}

impl FileSource {
    /// Opens `path` and takes its length.
    ///
    /// # Errors
    /// `NotFound`, `Denied`; `Invalid` if it is a folder.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let file = File::open(path)
            .map_err(|error| io_error(error, format_args!("`{shown}` could not be opened")))?;
        let data =
            file.metadata().map_err(|error| io_error(error, format_args!("`{shown}` could not be read")))?;
        if data.is_dir() {
            return Err(Error::invalid(format!("`{shown}` is a folder: wanted a file")));
        }
        Ok(Self { file, len: data.len(), path: path.to_owned() })
    }
}

impl ByteSource for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        read_at(&self.file, offset, buffer)
            .map_err(|error| io_error(error, format_args!("`{}` could not be read", self.path.display())))
    }
}

/// Fills `buffer` from byte `offset` of `file`.
pub(crate) fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset);
    #[cfg(not(unix))]
    {
        use std::io::{Read, Seek};
        // No positional read here: a second handle keeps a place of its own.
        let mut file = file.try_clone()?;
        file.seek(io::SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    }
}

/// Writes a part of an encoded file.
pub(crate) fn write(out: &mut impl io::Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|error| io_error(error, "an encoded file could not be written"))
}

/// An error of the operating system with the caller's reaction to it.
pub(crate) fn io_error(error: io::Error, message: impl Display) -> Error {
    use io::ErrorKind as Kind;
    #[expect(clippy::wildcard_enum_match_arm, reason = "the operating system has more faults than reactions")]
    let (kind, help) = match error.kind() {
        Kind::NotFound => (ErrorKind::NotFound, None),
        Kind::AlreadyExists => (ErrorKind::AlreadyExists, None),
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
            (ErrorKind::Denied, Some("allow it to this user, or choose another place"))
        }
        Kind::InvalidFilename
        | Kind::InvalidInput
        | Kind::IsADirectory
        | Kind::NotADirectory
        | Kind::DirectoryNotEmpty => (ErrorKind::Invalid, None),
        Kind::UnexpectedEof => (ErrorKind::Corrupt, Some("copy the file again: it is cut short")),
        Kind::Unsupported => (ErrorKind::Unsupported, Some("choose another file system")),
        Kind::StorageFull | Kind::QuotaExceeded => (ErrorKind::Unavailable, Some("free space on the disk")),
        _ => (ErrorKind::Unavailable, None),
    };
    let wrapped = Error::new(kind, message.to_string()).with_source(error);
    match help {
        Some(help) => wrapped.with_help(help),
        None => wrapped,
    }
}

/// The part of an object of `size` bytes that a request for `range` gets.
pub(crate) fn clip(key: &impl Display, range: Option<Range<u64>>, size: u64) -> Result<Range<u64>> {
    let Some(range) = range else { return Ok(0..size) };
    if range.start > range.end || range.start > size {
        return Err(Error::invalid(format!("`{key}`: bytes {range:?} were asked for, found {size} in all"))
            .with_help("ask for a range that begins within the object"));
    }
    Ok(range.start..range.end.min(size))
}

/// Runs `work` where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => {
            Err(Error::internal("a thread that worked for the store did not come to its end")
                .with_source(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_the_end() {
        assert_eq!(clip(&"k", None, 5).unwrap(), 0..5);
        assert_eq!(clip(&"k", Some(2..9), 5).unwrap(), 2..5);
        assert_eq!(clip(&"k", Some(5..9), 5).unwrap(), 5..5);
        for (start, end) in [(6, 9), (3, 2)] {
            let range = Some(Range { start, end });
            assert_eq!(clip(&"k", range, 5).unwrap_err().kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn files_are_read_at_offsets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"0123456789").unwrap();
        let source = FileSource::open(&path).unwrap();
        assert_eq!(source.read_range(3..6).unwrap().as_ref(), b"345");
        assert_eq!(source.read_at(8, &mut [0; 3]).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(FileSource::open(dir.path()).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(FileSource::open(&dir.path().join("b")).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
