//! Uploads in parts that were begun, in a file: what a server keeps of them after their process died is in no listing,
//! and costs money until somebody gives it up who knows its number.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    Error as Theirs, MultipartUpload, PutPayload, PutResult, Result as TheirResult, UploadPart,
};
use serde::{Deserialize, Serialize};
use towline_core::{Result, async_trait};

use crate::io::io_error;
use crate::random::random;

/// Whose errors they are.
const JOURNAL: &str = "upload journal";

/// The journal of one opened store. The file is its own, locked as long as it lives, and goes when no upload is open.
pub(super) struct Journal {
    uploads: Arc<dyn MultipartStore>,
    /// What lies before every path.
    prefix: Path,
    /// Which server and bucket: others may have their journals in the same folder.
    place: String,
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    own: Option<(File, PathBuf)>,
    /// Begun and not ended, by number.
    open: BTreeMap<String, Path>,
    /// Those of them that are to be given up and are not yet.
    given_up: Vec<Upload>,
    /// Whether what dead processes left was looked for.
    looked: bool,
}

impl State {
    /// Whether there may be something to give up.
    fn is_unsettled(&self) -> bool {
        !self.looked || !self.given_up.is_empty()
    }
}

/// An upload in parts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Upload {
    path: Path,
    id: String,
}

/// A line of a file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    Begun { place: String, path: String, id: String },
    Ended { place: String, id: String },
}

/// The file of a process that is dead, and what is open in it.
struct Left {
    /// Keeps others off as long as it is held.
    file: File,
    path: PathBuf,
    ours: Vec<Upload>,
    /// Whether it has open uploads of other places.
    others: bool,
}

impl Journal {
    /// A journal in `folder` for the server and bucket `place`. Nothing is read or written yet.
    pub(super) fn new(
        uploads: Arc<dyn MultipartStore>,
        place: String,
        prefix: Path,
        folder: PathBuf,
    ) -> Arc<Self> {
        Arc::new(Self { uploads, prefix, place, folder, state: Mutex::default() })
    }

    /// Begins an upload, and tries again to give up those that are left.
    pub(super) async fn begin(self: &Arc<Self>, path: &Path) -> TheirResult<Box<dyn MultipartUpload>> {
        if self.state().is_unsettled() {
            let journal = Arc::clone(self);
            tokio::spawn(async move { journal.settle().await });
        }
        let path: Path = self.prefix.parts().chain(path.parts()).collect();
        let id = self.uploads.create_multipart(&path).await?;
        let upload = Upload { path, id };
        let (journal, begun) = (Arc::clone(self), upload.clone());
        let noted = tokio::task::spawn_blocking(move || journal.note_begun(&begun)).await;
        let upload = Journaled { journal: Arc::clone(self), upload, next: 0, parts: Arc::default() };
        match noted {
            Ok(Ok(())) => Ok(Box::new(upload)),
            // What could not be noted is not begun.
            Ok(Err(error)) => {
                upload.journal.give_up(upload.upload).await?;
                Err(Theirs::Generic { store: JOURNAL, source: Box::new(error) })
            }
            Err(error) => Err(Theirs::Generic { store: JOURNAL, source: Box::new(error) }),
        }
    }

    /// Gives up what could not be given up before, and what dead processes have begun.
    async fn settle(&self) {
        let (again, look) = {
            let mut state = self.state();
            (std::mem::take(&mut state.given_up), !std::mem::replace(&mut state.looked, true))
        };
        for upload in again {
            // It is noted again if that fails again.
            let _tried = self.give_up(upload).await;
        }
        for left in if look { self.left() } else { Vec::new() } {
            let Left { mut file, path, ours, others } = left;
            let mut all = !others;
            for upload in ours {
                if self.abort(&upload).await.is_ok() {
                    // Should this fail, it is tried once more, for nothing.
                    let _noted = append(&mut file, &Line::Ended { place: self.place.clone(), id: upload.id });
                } else {
                    all = false;
                }
            }
            if all {
                let _removed = fs::remove_file(path);
            }
        }
    }

    async fn give_up(&self, upload: Upload) -> TheirResult<()> {
        let outcome = self.abort(&upload).await;
        match outcome {
            Ok(()) => self.ended(&upload.id),
            Err(_) => self.state().given_up.push(upload),
        }
        outcome
    }

    async fn abort(&self, upload: &Upload) -> TheirResult<()> {
        match self.uploads.abort_multipart(&upload.path, &upload.id).await {
            // Ended otherwise: given up by a rule of the bucket, or finished, with an answer that was lost.
            Err(Theirs::NotFound { .. }) => Ok(()),
            outcome => outcome,
        }
    }

    fn note_begun(&self, upload: &Upload) -> Result<()> {
        let mut state = self.state();
        let fault = |error| {
            io_error(
                error,
                format_args!("the upload journal in `{}` could not be written", self.folder.display()),
            )
        };
        if state.own.is_none() {
            state.own = Some(self.new_file().map_err(fault)?);
        }
        if let Some((file, _)) = &mut state.own {
            let path = upload.path.to_string();
            let line = Line::Begun { place: self.place.clone(), path, id: upload.id.clone() };
            append(file, &line).and_then(|()| file.sync_data()).map_err(fault)?;
        }
        state.open.insert(upload.id.clone(), upload.path.clone());
        Ok(())
    }

    fn ended(&self, id: &str) {
        let mut state = self.state();
        state.open.remove(id);
        if let Some((file, _)) = &mut state.own {
            // Should this fail, it is given up once more one day, and is not there.
            let _noted = append(file, &Line::Ended { place: self.place.clone(), id: id.to_owned() });
        }
    }

    fn new_file(&self) -> io::Result<(File, PathBuf)> {
        fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{}-{:016x}.jsonl", std::process::id(), random()));
        let file = File::options().create_new(true).append(true).open(&path)?;
        file.try_lock().map_err(io::Error::from)?;
        Ok((file, path))
    }

    /// The files in the folder that nobody holds, as far as they can be read.
    fn left(&self) -> Vec<Left> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        entries.flatten().filter_map(|entry| self.read(&entry.path())).collect()
    }

    fn read(&self, path: &FilePath) -> Option<Left> {
        if path.extension().is_none_or(|ending| ending != "jsonl") {
            return None;
        }
        let file = File::options().append(true).read(true).open(path).ok()?;
        file.try_lock().ok()?;
        let text = fs::read_to_string(path).ok()?;
        let mut open = BTreeMap::new();
        // The last line may be torn: its upload is then not known to anybody.
        for line in text.lines().filter_map(|line| serde_json::from_str(line).ok()) {
            match line {
                Line::Begun { place, path, id } => {
                    open.insert((place, id), path);
                }
                Line::Ended { place, id } => {
                    open.remove(&(place, id));
                }
            }
        }
        let (ours, others): (Vec<_>, Vec<_>) =
            open.into_iter().partition(|((place, _), _)| *place == self.place);
        let upload =
            |((_, id), path): ((String, String), String)| Some(Upload { path: Path::parse(path).ok()?, id });
        let ours = ours.into_iter().filter_map(upload).collect();
        Some(Left { file, path: path.to_owned(), ours, others: !others.is_empty() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let (Some((_, path)), true) = (&state.own, state.open.is_empty()) {
            // A file without open uploads is of no use; another process removes it as well.
            let _removed = fs::remove_file(path);
        }
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal")
            .field("place", &self.place)
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

fn append(file: &mut File, line: &Line) -> io::Result<()> {
    let mut text = serde_json::to_string(line).map_err(io::Error::other)?;
    text.push('\n');
    file.write_all(text.as_bytes())
}

/// An upload that the journal knows.
struct Journaled {
    journal: Arc<Journal>,
    upload: Upload,
    next: usize,
    parts: Arc<Mutex<BTreeMap<usize, PartId>>>,
}

#[async_trait]
impl MultipartUpload for Journaled {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let number = self.next;
        self.next += 1;
        let (uploads, parts) = (Arc::clone(&self.journal.uploads), Arc::clone(&self.parts));
        let Upload { path, id } = self.upload.clone();
        Box::pin(async move {
            let part = uploads.put_part(&path, &id, number, data).await?;
            parts.lock().unwrap_or_else(PoisonError::into_inner).insert(number, part);
            Ok(())
        })
    }

    async fn complete(&mut self) -> TheirResult<PutResult> {
        let parts = std::mem::take(&mut *self.parts.lock().unwrap_or_else(PoisonError::into_inner));
        if parts.len() != self.next {
            let what = format!("{} of {} parts of an upload are there", parts.len(), self.next);
            return Err(Theirs::Generic { store: JOURNAL, source: what.into() });
        }
        let Upload { path, id } = &self.upload;
        let put = self.journal.uploads.complete_multipart(path, id, parts.into_values().collect()).await?;
        self.journal.ended(id);
        Ok(put)
    }

    async fn abort(&mut self) -> TheirResult<()> {
        self.journal.give_up(self.upload.clone()).await
    }
}

impl fmt::Debug for Journaled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journaled").field("upload", &self.upload).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bytes::Bytes;
    use object_store::ObjectStore;
    use object_store::memory::InMemory;
    use towline_core::{ObjectKey, SnapshotStore as _};

    use super::*;
    use crate::ObjectAdapter;

    /// A server that knows which uploads are open, and refuses to give some up.
    #[derive(Debug)]
    struct Server {
        memory: Arc<InMemory>,
        open: Mutex<BTreeSet<(Path, String)>>,
        refusals: AtomicUsize,
    }

    #[async_trait]
    impl MultipartStore for Server {
        async fn create_multipart(&self, path: &Path) -> TheirResult<String> {
            let id = self.memory.create_multipart(path).await?;
            self.open.lock().unwrap().insert((path.clone(), id.clone()));
            Ok(id)
        }
        async fn put_part(
            &self,
            path: &Path,
            id: &String,
            part: usize,
            data: PutPayload,
        ) -> TheirResult<PartId> {
            self.memory.put_part(path, id, part, data).await
        }
        async fn complete_multipart(
            &self,
            path: &Path,
            id: &String,
            parts: Vec<PartId>,
        ) -> TheirResult<PutResult> {
            let put = self.memory.complete_multipart(path, id, parts).await?;
            assert!(self.open.lock().unwrap().remove(&(path.clone(), id.clone())));
            Ok(put)
        }
        async fn abort_multipart(&self, path: &Path, id: &String) -> TheirResult<()> {
            let less = |left: usize| left.checked_sub(1);
            if self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
                return Err(Theirs::Generic { store: "test", source: "no".into() });
            }
            if self.open.lock().unwrap().remove(&(path.clone(), id.clone())) {
                self.memory.abort_multipart(path, id).await
            } else {
                Err(Theirs::NotFound { path: path.to_string(), source: "no such upload".into() })
            }
        }
    }

    struct Bench {
        server: Arc<Server>,
        dir: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let memory = Arc::new(InMemory::new());
            let server = Server { memory, open: Mutex::default(), refusals: AtomicUsize::new(0) };
            Self { server: Arc::new(server), dir: tempfile::tempdir().unwrap() }
        }

        fn journal(&self, place: &str) -> Arc<Journal> {
            let uploads = Arc::clone(&self.server) as Arc<dyn MultipartStore>;
            Journal::new(uploads, place.to_owned(), Path::from("pre"), self.dir.path().join("uploads"))
        }

        fn open(&self) -> Vec<String> {
            self.server.open.lock().unwrap().iter().map(|(path, _)| path.to_string()).collect()
        }

        fn files(&self) -> usize {
            fs::read_dir(self.dir.path().join("uploads")).map_or(0, Iterator::count)
        }
    }

    #[tokio::test]
    async fn an_object_goes_up_and_a_writer_that_is_given_up_leaves_nothing() {
        let bench = Bench::new();
        let prefixed = object_store::prefix::PrefixStore::new(Arc::clone(&bench.server.memory), "pre");
        let objects: Arc<dyn ObjectStore> = Arc::new(prefixed);
        let store = ObjectAdapter::new(objects).with_upload_journal(
            Arc::clone(&bench.server) as Arc<dyn MultipartStore>,
            "pre",
            "here",
            bench.dir.path().join("uploads"),
        );
        let key = ObjectKey::new("a/b").unwrap();
        let body: Vec<u8> = (0..20 << 20).map(|at| (at / 7) as u8).collect();
        for finished in [true, false] {
            let mut writer = store.writer(&key).await.unwrap();
            writer.write(Bytes::from(body.clone())).await.unwrap();
            assert_eq!(bench.open(), ["pre/a/b"]);
            assert_eq!(bench.files(), 1);
            if finished {
                writer.finish().await.unwrap();
            } else {
                writer.abort().await.unwrap();
            }
            assert!(bench.open().is_empty());
        }
        assert!(store.get(&key, None).await.unwrap() == body);
        drop(store);
        assert_eq!(bench.files(), 0);
    }

    #[tokio::test]
    async fn what_a_dead_process_began_is_given_up_and_what_a_living_one_began_is_not() {
        let bench = Bench::new();
        let (dead, living, other) = (bench.journal("here"), bench.journal("here"), bench.journal("there"));
        for (journal, path) in [(&dead, "dead"), (&living, "living"), (&other, "other")] {
            journal.begin(&Path::from(path)).await.unwrap();
        }
        // Its line was torn when it died.
        dead.state().own.as_mut().unwrap().0.write_all(b"{\"begun\":{\"pla").unwrap();
        drop((dead, other));
        assert_eq!(bench.files(), 3);
        let next = bench.journal("here");
        next.settle().await;
        assert_eq!(bench.open(), ["pre/living", "pre/other"]);
        assert_eq!(bench.files(), 2);
        // Once: whoever dies later is the next one's.
        drop(living);
        next.settle().await;
        assert_eq!(bench.open(), ["pre/living", "pre/other"]);
        bench.journal("here").settle().await;
        bench.journal("there").settle().await;
        assert!(bench.open().is_empty());
        assert_eq!(bench.files(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_given_up_is_tried_again() {
        let bench = Bench::new();
        let journal = bench.journal("here");
        let mut upload = journal.begin(&Path::from("a")).await.unwrap();
        bench.server.refusals.store(2, Ordering::SeqCst);
        assert!(upload.abort().await.is_err());
        journal.settle().await;
        assert_eq!(bench.open(), ["pre/a"]);
        journal.settle().await;
        assert!(bench.open().is_empty());

        upload = journal.begin(&Path::from("b")).await.unwrap();
        bench.server.refusals.store(2, Ordering::SeqCst);
        assert!(upload.abort().await.is_err());
        drop((upload, journal));
        // Nor can the next process.
        bench.journal("here").settle().await;
        assert_eq!((bench.open().len(), bench.files()), (1, 1));
        bench.journal("here").settle().await;
        assert_eq!((bench.open().len(), bench.files()), (0, 0));
    }

    #[tokio::test]
    async fn a_journal_that_cannot_be_written_begins_nothing() {
        let bench = Bench::new();
        fs::write(bench.dir.path().join("uploads"), "a file").unwrap();
        assert!(bench.journal("here").begin(&Path::from("a")).await.is_err());
        assert!(bench.open().is_empty());
    }
}
