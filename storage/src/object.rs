//! Any back end of the `object_store` crate as a store.

mod download;
mod journal;
mod upload;

use std::fmt::Display;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{
    Error as Theirs, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutOptions,
    PutResult, UpdateVersion,
};
use tokio::sync::Semaphore;
use towline_core::{
    BoxStream, Error, ErrorKind, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result, SnapshotStore,
    Version, async_trait,
};

use self::journal::Journal;
use self::upload::PartWriter;
use crate::io::clip;

/// Listed objects that are looked at, at once, for what the listing left out.
const HEADS_AT_ONCE: usize = 16;

/// A [`SnapshotStore`] over any back end of the `object_store` crate that has conditional writes.
///
/// Objects above 8 MiB go up in parts, 8 of them at once; parts that are handed over in pieces of 64 KiB or more are sent
/// from where they lie. What is read into a caller's buffer comes in ranges of 8 MiB, 16 of them at once for all readers
/// of this store and its clones, each straight to its place. A writer that is dropped gives up its parts as far as the runtime still
/// lets it; for the rest there is [`StoreOptions::with_upload_journal`](crate::StoreOptions::with_upload_journal), or a
/// rule for incomplete uploads on the bucket.
#[derive(Debug, Clone)]
pub struct ObjectAdapter {
    inner: Arc<dyn ObjectStore>,
    /// Whether objects have more of a version than listings tell. Known after the first listed object.
    lists_less: Arc<OnceLock<bool>>,
    /// How many more ranges may be on their way.
    ranges: Arc<Semaphore>,
    journal: Option<Arc<Journal>>,
}

impl ObjectAdapter {
    /// The store on `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self {
            inner,
            lists_less: Arc::default(),
            ranges: Arc::new(Semaphore::new(download::AT_ONCE)),
            journal: None,
        }
    }

    /// Notes uploads in parts in a file in `folder` until they have ended; see
    /// [`StoreOptions::with_upload_journal`](crate::StoreOptions::with_upload_journal). `uploads` is the same back end, and
    /// `prefix` what lies before every path there and not here, or nothing. `place` names server and bucket.
    #[must_use]
    pub fn with_upload_journal(
        mut self,
        uploads: Arc<dyn MultipartStore>,
        prefix: &str,
        place: impl Into<String>,
        folder: impl Into<PathBuf>,
    ) -> Self {
        self.journal = Some(Journal::new(uploads, place.into(), Path::from(prefix), folder.into()));
        self
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes> {
        if range.start >= range.end {
            // No request can ask for nothing: the size alone tells whether the place exists.
            clip(key, Some(range), self.head(key).await?.size)?;
            return Ok(Bytes::new());
        }
        // Servers read the numbers as signed ones, and refuse those that do not fit.
        let asked = range.start..range.end.min(i64::MAX as u64);
        let options = GetOptions { range: Some(GetRange::Bounded(asked)), ..GetOptions::default() };
        match self.inner.get_opts(&path(key)?, options).await {
            Ok(found) if found.range.start != range.start => Err(Error::internal(format!(
                "`{key}`: wanted bytes from {}, the store answered with {:?}",
                range.start, found.range
            ))),
            Ok(found) => {
                let wanted = found.range.end - found.range.start;
                let bytes = found.bytes().await.map_err(|error| failed(error, key, "read"))?;
                if bytes.len() as u64 != wanted {
                    return Err(Error::corrupt(format!(
                        "`{key}`: wanted {wanted} bytes at {}, found {}",
                        range.start,
                        bytes.len()
                    )));
                }
                Ok(bytes)
            }
            Err(Theirs::NotFound { source, path }) => {
                Err(failed(Theirs::NotFound { source, path }, key, "read"))
            }
            // Every back end says in its own way that the range begins at or behind the end.
            Err(error) => match self.head(key).await {
                Ok(info) if clip(key, Some(range), info.size)?.is_empty() => Ok(Bytes::new()),
                _ => Err(failed(error, key, "read")),
            },
        }
    }
}

#[async_trait]
impl SnapshotStore for ObjectAdapter {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let mode = match mode {
            PutMode::Create => object_store::PutMode::Create,
            PutMode::Overwrite => object_store::PutMode::Overwrite,
            PutMode::Update(version) => object_store::PutMode::Update(update_version(&version)),
        };
        let put = self.inner.put_opts(&path(key)?, body.into(), PutOptions::from(mode)).await;
        put.map(|put| put_version(&put)).map_err(|error| failed(error, key, "written"))
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        let writer = PartWriter::new(Arc::clone(&self.inner), path(key)?, key.clone());
        Ok(Box::new(writer.with_journal(self.journal.clone())))
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let Some(range) = range else {
            let found = self.inner.get(&path(key)?).await.map_err(|error| failed(error, key, "read"))?;
            return found.bytes().await.map_err(|error| failed(error, key, "read"));
        };
        self.get_range(key, range).await
    }

    async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        if buffer.is_empty() {
            return Ok(buffer);
        }
        download::read(&self.inner, &self.ranges, key, start, buffer).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        let meta = self.inner.head(&path(key)?).await.map_err(|error| failed(error, key, "looked at"))?;
        Ok(info(key.clone(), &meta))
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        match self.inner.delete(&path(key)?).await {
            Ok(()) | Err(Theirs::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed(error, key, "deleted")),
        }
    }

    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let folder = match prefix.map(path).transpose() {
            Ok(folder) => folder,
            Err(error) => return futures_util::stream::once(async { Err(error) }).boxed(),
        };
        let prefix = prefix.cloned();
        let (inner, lists_less) = (Arc::clone(&self.inner), Arc::clone(&self.lists_less));
        let objects = self.inner.list(folder.as_ref()).map(move |object| {
            let (inner, lists_less) = (Arc::clone(&inner), Arc::clone(&lists_less));
            let found = match object {
                // What others put there under names that are no keys is none of ours.
                Ok(meta) => ObjectKey::new(meta.location.as_ref())
                    .ok()
                    .filter(|key| prefix.as_ref().is_none_or(|prefix| key.is_under(prefix)))
                    .map(|key| Ok((key, meta))),
                Err(error) => Some(Err(failed(error, &"the store", "listed"))),
            };
            async move {
                match found? {
                    Ok((key, meta)) => completed(&*inner, &lists_less, key, meta).await.transpose(),
                    Err(error) => Some(Err(error)),
                }
            }
        });
        let objects = objects.buffered(HEADS_AT_ONCE).filter_map(|found| async { found });
        objects.boxed()
    }
}

/// A listed object with its whole version. The client reads no generation from Google's listings, and nothing else
/// can be compared and swapped there. `None` if the object went meanwhile.
async fn completed(
    store: &dyn ObjectStore,
    lists_less: &OnceLock<bool>,
    key: ObjectKey,
    meta: ObjectMeta,
) -> Result<Option<ObjectInfo>> {
    if meta.version.is_some() || lists_less.get() == Some(&false) {
        return Ok(Some(info(key, &meta)));
    }
    match store.head(&meta.location).await {
        Ok(found) => {
            lists_less.get_or_init(|| found.version.is_some());
            Ok(Some(info(key, &found)))
        }
        Err(Theirs::NotFound { .. }) => Ok(None),
        Err(error) => Err(failed(error, &key, "listed")),
    }
}

fn path(key: &ObjectKey) -> Result<Path> {
    Path::parse(key.as_str())
        .map_err(|error| Error::invalid(format!("`{key}` is no path of this store")).with_source(error))
}

fn info(key: ObjectKey, meta: &ObjectMeta) -> ObjectInfo {
    let modified = u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0);
    ObjectInfo::new(key, meta.size, version(meta.e_tag.as_deref(), meta.version.as_deref()), modified)
}

fn put_version(put: &PutResult) -> Version {
    version(put.e_tag.as_deref(), put.version.as_deref())
}

/// Both texts are kept, the second behind a line break that no ETag has: some stores compare one, some the other.
fn version(e_tag: Option<&str>, version: Option<&str>) -> Version {
    // A bucket without versions says so, and of uploads in parts alone.
    let version = version.filter(|version| *version != "null");
    match (e_tag, version) {
        // Azure's lists leave the quotes out that all its other answers have.
        (Some(e_tag), None) if e_tag.starts_with("0x") => Version::new(format!("\"{e_tag}\"")),
        (Some(e_tag), None) => Version::new(e_tag),
        (e_tag, version) => {
            Version::new(format!("{}\n{}", e_tag.unwrap_or_default(), version.unwrap_or_default()))
        }
    }
}

fn update_version(version: &Version) -> UpdateVersion {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    match version.as_str().split_once('\n') {
        Some((e_tag, version)) => UpdateVersion { e_tag: text(e_tag), version: text(version) },
        None => UpdateVersion { e_tag: text(version.as_str()), version: None },
    }
}

/// `error` of the back end with the caller's reaction to it.
fn failed(error: Theirs, key: &impl Display, what: &str) -> Error {
    // No `match`: which kinds there are depends on the crate's features.
    let (kind, help) = if says(&error, &["NoSuchBucket", "ContainerNotFound", "bucket does not exist"]) {
        // Not `NotFound`: a job that is not there would look like a new one.
        (ErrorKind::Invalid, Some("create the bucket, or correct the store's URL"))
    } else if matches!(error, Theirs::NotFound { .. }) {
        (ErrorKind::NotFound, None)
    } else if matches!(error, Theirs::AlreadyExists { .. }) {
        (ErrorKind::AlreadyExists, None)
    } else if matches!(error, Theirs::Precondition { .. } | Theirs::NotModified { .. })
        // A version that is not of this store, so that its object cannot have it.
        || says(&error, &["Version required for conditional update"])
    {
        (ErrorKind::Conflict, None)
    } else if says(&error, &["RequestTimeTooSkewed"]) {
        (ErrorKind::Denied, Some("set this machine's clock"))
    } else if matches!(error, Theirs::PermissionDenied { .. } | Theirs::Unauthenticated { .. })
        // A list that is refused has no kind of its own.
        || says(&error, &["status code: 401", "status code: 403"])
    {
        (ErrorKind::Denied, Some("check the credentials and what they may do"))
    } else if matches!(error, Theirs::NotSupported { .. } | Theirs::NotImplemented { .. }) {
        (ErrorKind::Unsupported, None)
    } else if matches!(error, Theirs::InvalidPath { .. } | Theirs::UnknownConfigurationKey { .. }) {
        (ErrorKind::Invalid, None)
    } else {
        (ErrorKind::Unavailable, Some("check that the store runs and that the network reaches it"))
    };
    let failed = Error::new(kind, format!("`{key}` could not be {what}")).with_source(error);
    match help {
        Some(help) => failed.with_help(help),
        None => failed,
    }
}

/// Whether the server's answer has one of `codes` in it. Only its text tells some faults apart.
fn says(error: &Theirs, codes: &[&str]) -> bool {
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if codes.iter().any(|code| text.contains(code)) {
            return true;
        }
        next = error.source();
    }
    false
}
