//! The run log `checkpoints.jsonl`: one line for each save, which the public cookbooks read and write too.

mod dataloader;
mod file;
mod form;
mod json;
mod line;
mod merge;
mod scan;

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use towline_core::{Error, Result};

pub use dataloader::Dataloader;
pub use line::CheckpointLine;
pub use merge::{MergedLines, merge_lines};
pub use scan::{BadLine, TornLine};

use file::{Lock, append_durably, fault, make_folder, read_bounded, replace, sync_folder, too_large};
use scan::{MAX_BAD, Tail, last_resumable, refuse_bad, scan, tail};

const FILE: &str = "checkpoints.jsonl";
const LOCK_WAIT: Duration = Duration::from_secs(60);
const MAX_LINE: usize = 1 << 20;
const MAX_FILE: u64 = 32 << 20;

/// The file `checkpoints.jsonl` in the folder of a run.
///
/// It is a **derived view**: what exists is what the store says, and [`CheckpointLog::repair`] rebuilds the log from it.
/// A save is safe before its line is written, and a lost line loses no checkpoint.
///
/// # Writers
/// A call holds an exclusive lock, writes its line whole, and returns when it is on the disk. The lock is on
/// `checkpoints.jsonl.lock`, which stays: the log itself is replaced by a repair, and a lock on the old file would then
/// exclude nobody. The public cookbooks take no lock: let them read while a run goes on, but not write.
///
/// # Damage
/// | found | [`read`](Self::read) | [`append`](Self::append) |
/// |---|---|---|
/// | no file, or an empty one | no lines | writes the first |
/// | last line cut off, without a newline | [`LogRead::torn`], the others are read | moves it to `checkpoints.jsonl.torn` first |
/// | last line whole, without a newline | a line: all of it was written | completes the newline first |
/// | any other line that is no checkpoint, or no UTF-8 | `Corrupt` with its number | appends |
/// | blank lines, `\r\n`, a byte order mark in front | passed over | appends |
///
/// # Readers of the last line
/// The tinker-cookbook resumes from the last line that has a `state_path`; the Fireworks cookbook from the last line,
/// whatever it has. So behind a line without a `state_path`, the last line that has one is written once more, without
/// its `sampler_path` and marked `"towline_repeat":true`, in the same write. **The last line can be resumed from as soon
/// as any can.** Before the first state there is none, and the Fireworks reader then stops with a `KeyError`. Here
/// repetitions are not counted as lines.
///
/// # Blocking
/// All calls block, at most as long as the lock's wait and the disk: from a task call them in
/// `tokio::task::spawn_blocking`. Reading takes about four times the file's length of memory, and fifty times
/// for one that was made to take most.
///
/// ```
/// use towline_trainer_client::{CheckpointLine, CheckpointLog};
/// # fn main() -> towline_core::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("towline-log-{}", std::process::id()));
/// let log = CheckpointLog::new(&folder);
/// let line = CheckpointLine::new("step-40").with_step(40).with_state_path("cross_job://run/step-40");
/// log.append(&line)?;
/// log.append(&CheckpointLine::new("step-41").with_step(41).with_sampler_path("step-41-00ab12cd"))?;
/// assert_eq!(log.read()?.last_resumable(), Some(&line));
/// # let _ = std::fs::remove_dir_all(folder);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointLog {
    folder: PathBuf,
    lock_wait: Duration,
    max_line: usize,
    max_file: u64,
}

/// What [`CheckpointLog::read`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LogRead {
    /// The lines, oldest first.
    pub lines: Vec<CheckpointLine>,
    /// **A warning**: the end of the file is torn. What it says is in the store, if the save came that far.
    pub torn: Option<TornLine>,
}

impl LogRead {
    /// The last line that a run can be resumed from.
    #[must_use]
    pub fn last_resumable(&self) -> Option<&CheckpointLine> {
        self.lines.iter().rfind(|line| line.is_resumable())
    }

    /// The last line of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&CheckpointLine> {
        self.lines.iter().rfind(|line| line.name == name)
    }
}

/// What [`CheckpointLog::append`] did beside its line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Appended {
    /// A torn line that it has moved to `checkpoints.jsonl.torn`.
    pub set_aside: Option<TornLine>,
}

/// All that a log holds, good and bad.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SalvagedLog {
    /// The lines that could be read, oldest first.
    pub lines: Vec<CheckpointLine>,
    /// The others.
    pub bad: Vec<BadLine>,
    /// The torn end.
    pub torn: Option<TornLine>,
    /// Which file this was.
    mark: u64,
}

/// What [`CheckpointLog::repair`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repaired {
    /// The lines that the log has now.
    pub lines: Vec<CheckpointLine>,
    /// Lines whose checkpoint the store does not have. They are in `checkpoints.jsonl.torn` now.
    pub gone: Vec<CheckpointLine>,
    /// How many bad and torn lines were moved to `checkpoints.jsonl.torn`.
    pub set_aside: usize,
}

impl CheckpointLog {
    /// The log in `folder`, which need not exist yet. Touches no file.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), lock_wait: LOCK_WAIT, max_line: MAX_LINE, max_file: MAX_FILE }
    }

    /// Sets how long a call waits for the lock. Default 60 s.
    #[must_use]
    pub fn with_lock_wait(mut self, wait: Duration) -> Self {
        self.lock_wait = wait;
        self
    }

    /// Sets the longest line in bytes. Default 1 MiB.
    #[must_use]
    pub fn with_max_line(mut self, bytes: usize) -> Self {
        self.max_line = bytes;
        self
    }

    /// Sets the longest file in bytes. Default 32 MiB, some 100,000 lines.
    #[must_use]
    pub fn with_max_file(mut self, bytes: u64) -> Self {
        self.max_file = bytes;
        self
    }

    /// Where the log is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// Where torn and bad lines are kept, one after the other, each with a newline behind it.
    #[must_use]
    pub fn torn_path(&self) -> PathBuf {
        self.beside("torn")
    }

    /// Appends a line durably, and makes folder and file if there are none. If it fails, the line is taken back as far
    /// as the disk lets it; a line that comes twice is no harm.
    ///
    /// # Errors
    /// `Invalid` for a line without a name or a path, or above a limit; `Unavailable` if the lock could not be had in
    /// time or the disk is full; `Denied`; `Unsupported` where the file system has no locks.
    pub fn append(&self, line: &CheckpointLine) -> Result<Appended> {
        if line.state_path.is_none() && line.sampler_path.is_none() {
            return Err(Error::invalid(format!(
                "the line of `{}` has neither a state nor a sampler path",
                line.name
            ))
            .with_help("set the path that the store answered"));
        }
        let text = self.text(line)?;
        make_folder(&self.folder)?;
        let _lock = Lock::exclusive(&self.beside("lock"), self.lock_wait)?;
        let path = self.path();
        let unwritable = |error| fault(error, &path, "could not be written");
        let mut end = End::find(&path).map_err(unwritable)?;
        let mut set_aside = None;
        let mut text = format!("{text}\n");
        if end.without_newline || !line.is_resumable() {
            let bytes = read_bounded(&path, self.max_file)?.unwrap_or_default();
            match tail(&bytes) {
                Tail::Nothing(start) => end.cut = start as u64,
                Tail::Whole => text.insert(0, '\n'),
                Tail::Torn(torn) => {
                    append_durably(&self.torn_path(), &[torn.bytes.as_slice(), b"\n"].concat())?;
                    end.cut = torn.offset;
                    set_aside = Some(torn);
                }
            }
            if !line.is_resumable()
                && let Some(state) = last_resumable(&bytes, self.max_line)
            {
                text.push_str(&state.repeated().to_json());
                text.push('\n');
            }
        }
        if end.cut.saturating_add(text.len() as u64) > self.max_file {
            return Err(too_large(&path, self.max_file));
        }
        end.write(&path, text.as_bytes()).map_err(unwritable)?;
        Ok(Appended { set_aside })
    }

    /// Reads all lines.
    ///
    /// # Errors
    /// `Corrupt` with the line's number if any but a torn last one is bad, or above the limit; `Invalid` for a file
    /// above its limit, or something else than a file; `Unavailable` if a writer held the lock all the time; `Denied`.
    pub fn read(&self) -> Result<LogRead> {
        let SalvagedLog { lines, bad, torn, mark: _ } = self.salvage()?;
        refuse_bad(&bad, &self.path().display())?;
        Ok(LogRead { lines, torn })
    }

    /// Reads what can be read, for a repair or for showing it.
    ///
    /// # Errors
    /// As [`CheckpointLog::read`], but bad lines are no error, up to 10,000 of them; more are `Corrupt`.
    pub fn salvage(&self) -> Result<SalvagedLog> {
        let _lock = Lock::shared(&self.beside("lock"), self.lock_wait)?;
        self.look()
    }

    /// Puts `lines` in the place of all that the log holds, in one step. What could not be read is kept in
    /// `checkpoints.jsonl.torn`; lines that could are gone unless they are among `lines`.
    ///
    /// # Errors
    /// `Invalid` for a line without a name, or above a limit; else as [`CheckpointLog::append`].
    pub fn rewrite(&self, lines: &[CheckpointLine]) -> Result<()> {
        let text = self.contents(lines)?;
        make_folder(&self.folder)?;
        let _lock = Lock::exclusive(&self.beside("lock"), self.lock_wait)?;
        self.replace(&text, &self.look()?, &[])
    }

    /// Rebuilds the log from `stored`, the checkpoints of the store, oldest first, as [`merge_lines`] does. `before` is
    /// what [`CheckpointLog::salvage`] found **before** the store was listed: a line that came since would else be taken
    /// for one whose checkpoint is gone.
    ///
    /// # Errors
    /// `Conflict` if the log has changed since `before`; else as [`CheckpointLog::rewrite`].
    pub fn repair(&self, before: &SalvagedLog, stored: Vec<CheckpointLine>) -> Result<Repaired> {
        make_folder(&self.folder)?;
        let _lock = Lock::exclusive(&self.beside("lock"), self.lock_wait)?;
        let found = self.look()?;
        if found.mark != before.mark {
            let message = format!("`{}` has changed since it was read for the repair", self.path().display());
            return Err(Error::new(towline_core::ErrorKind::Conflict, message)
                .with_help("read the log again, list the store again, then repair"));
        }
        let MergedLines { lines, gone, .. } = merge_lines(&found.lines, stored);
        self.replace(&self.contents(&lines)?, &found, &gone)?;
        Ok(Repaired { lines, gone, set_aside: found.bad.len() + usize::from(found.torn.is_some()) })
    }

    fn look(&self) -> Result<SalvagedLog> {
        let bytes = read_bounded(&self.path(), self.max_file)?.unwrap_or_default();
        let mut mark = DefaultHasher::new();
        bytes.hash(&mut mark);
        let found = scan(&bytes, self.max_line);
        if found.bad.len() > MAX_BAD {
            let message =
                format!("`{}` has more than {MAX_BAD} bad lines: it is no run log", self.path().display());
            return Err(
                Error::corrupt(message).with_help("move the file away, then repair the log from the store")
            );
        }
        Ok(SalvagedLog { lines: found.lines, bad: found.bad, torn: found.torn, mark: mark.finish() })
    }

    fn replace(&self, text: &str, found: &SalvagedLog, gone: &[CheckpointLine]) -> Result<()> {
        let mut aside = Vec::new();
        let bad = found.bad.iter().map(|bad| bad.bytes.clone());
        let torn = found.torn.iter().map(|torn| torn.bytes.clone());
        for piece in bad.chain(torn).chain(gone.iter().map(|line| line.to_json().into_bytes())) {
            aside.extend(piece);
            aside.push(b'\n');
        }
        if !aside.is_empty() {
            append_durably(&self.torn_path(), &aside)?;
        }
        replace(&self.path(), &self.beside("tmp"), text.as_bytes())
    }

    /// The file that has these lines, and ends with one that can be resumed from.
    fn contents(&self, lines: &[CheckpointLine]) -> Result<String> {
        let last = lines.iter().rfind(|line| line.is_resumable());
        let again = match lines.last() {
            Some(line) if !line.is_resumable() => last.map(CheckpointLine::repeated),
            Some(_) | None => None,
        };
        let mut contents = String::new();
        for line in lines.iter().chain(&again) {
            contents.push_str(&self.text(line)?);
            contents.push('\n');
            if contents.len() as u64 > self.max_file {
                return Err(too_large(&self.path(), self.max_file));
            }
        }
        Ok(contents)
    }

    /// The line as it is written; one that would not be read again is refused.
    fn text(&self, line: &CheckpointLine) -> Result<String> {
        let text = line.to_json();
        let (limit, name) = (self.max_line, form::shown(&line.name));
        if text.len() > limit {
            return Err(Error::invalid(format!(
                "the line of {name} has {} bytes, at most {limit} fit",
                text.len()
            ))
            .with_help("keep large values elsewhere and log where they are"));
        }
        form::parse(&text).map_err(|problem| Error::invalid(format!("the line of {name}: {problem}")))?;
        Ok(text)
    }

    fn beside(&self, ending: &str) -> PathBuf {
        self.folder.join(format!("{FILE}.{ending}"))
    }
}

/// Where a file ends, and where the next line goes.
struct End {
    without_newline: bool,
    /// What lies from this byte on is replaced.
    cut: u64,
    len: u64,
}

impl End {
    fn find(path: &Path) -> io::Result<Self> {
        let len = match fs::metadata(path) {
            Ok(data) if data.is_file() => data.len(),
            Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let mut last = [b'\n'];
        if len > 0 {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(len - 1))?;
            file.read_exact(&mut last)?;
        }
        Ok(Self { without_newline: last != [b'\n'], cut: len, len })
    }

    /// Cuts, writes and syncs; takes the text back if that fails.
    fn write(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        let mut file = File::options().create(true).append(true).open(path)?;
        if self.cut != self.len {
            file.set_len(self.cut)?;
        }
        let write = file.write_all(text).and_then(|()| file.sync_all());
        if write.is_err() {
            // If that fails too, the next append finds a torn line.
            let _ = file.set_len(self.cut);
        }
        write?;
        if self.len == 0 { sync_folder(path) } else { Ok(()) }
    }
}
