//! The store trait: objects on some medium.

use std::fmt::{self, Debug};
use std::ops::Range;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_core::stream::{BoxStream, Stream};
use serde::{Deserialize, Serialize};

use crate::id::shown;
use crate::{Error, Result};

/// Objects on some store.
///
/// * An object is invisible until it is whole, and a reader never sees a mixture of two.
/// * [`PutMode::Create`] and [`PutMode::Update`] have exactly one winner, however many race.
/// * After a call returned `Ok`, every later read sees its effect, from any client.
/// * A call that failed with `Unavailable` or `TimedOut` may have taken effect: callers that care write something
///   of their own into the body and read it back.
/// * Futures may be dropped: a write then took effect whole or not at all.
/// * All methods may run at once from several tasks.
///
/// Errors: `NotFound` for a missing object (never an empty answer), `Denied` for credentials, `Unavailable` for
/// passing faults. A listing that fails ends with an error, never early.
///
/// # Implement it like this
/// `testing::FakeStore` (feature `testing`) is a complete store in memory; `towline-storage` has those for
/// production.
#[async_trait]
pub trait SnapshotStore: Debug + Send + Sync + 'static {
    /// Writes a whole object and returns its new version.
    ///
    /// # Errors
    /// `AlreadyExists` for [`PutMode::Create`] of an existing object, `Conflict` for [`PutMode::Update`] of an
    /// object that has another version or is missing.
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version>;

    /// Starts an object that is written in parts and replaces what is there when it is finished.
    ///
    /// # Errors
    /// As the medium answers.
    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>>;

    /// Reads `range` of an object, or all of it. A range that goes beyond the end is cut at the end.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a range that starts behind the end or is reversed.
    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes>;

    /// Fills `buffer`, as long as it is, from byte `start`, and gives it back.
    ///
    /// # Errors
    /// As [`SnapshotStore::get`]; `Corrupt` if the object ends before the buffer is full.
    async fn read_into(&self, key: &ObjectKey, start: u64, mut buffer: BytesMut) -> Result<BytesMut> {
        if buffer.is_empty() {
            return Ok(buffer);
        }
        let bytes = self.get(key, Some(start..start.saturating_add(buffer.len() as u64))).await?;
        if bytes.len() != buffer.len() {
            return Err(Error::corrupt(format!(
                "`{key}`: wanted {} bytes at {start}, found {}",
                buffer.len(),
                bytes.len()
            )));
        }
        buffer.copy_from_slice(&bytes);
        Ok(buffer)
    }

    /// As [`SnapshotStore::read_into`], with the [`block_digest`](crate::block_digest) of each [`DIGEST_BLOCK`](crate::DIGEST_BLOCK) of the
    /// buffer, the last of which may be shorter, if the store takes them while the bytes are in the processor's cache.
    /// A store that does not, as by default, leaves them to the caller.
    ///
    /// # Errors
    /// As [`SnapshotStore::read_into`].
    async fn read_digested(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<Digested> {
        Ok(Digested { buffer: self.read_into(key, start, buffer).await?, blocks: None })
    }

    /// Size, version and time of an object.
    ///
    /// # Errors
    /// `NotFound`.
    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo>;

    /// Removes an object. A missing one is `Ok`.
    ///
    /// # Errors
    /// As the medium answers.
    async fn delete(&self, key: &ObjectKey) -> Result<()>;

    /// Every object under `prefix` by whole segments (`a/b` lists `a/b/c`, neither `a/bc` nor `a/b` itself), in no
    /// particular order.
    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>>;
}

/// An object that is written in parts. Dropping it leaves nothing visible.
#[async_trait]
pub trait ObjectWriter: Debug + Send {
    /// Appends `part`, of any length.
    ///
    /// # Errors
    /// As the medium answers; the writer is then of no more use.
    async fn write(&mut self, part: Bytes) -> Result<()>;

    /// Makes the object visible and durable, and returns its version.
    ///
    /// # Errors
    /// As the medium answers.
    async fn finish(self: Box<Self>) -> Result<Version>;

    /// Gives up. Nothing becomes visible.
    ///
    /// # Errors
    /// As the medium answers; parts may then remain until a clean-up.
    async fn abort(self: Box<Self>) -> Result<()>;
}

macro_rules! forward {
    ($($pointer:ident)*) => {$(
        #[async_trait]
        #[deny(clippy::missing_trait_methods)]
        impl<T: SnapshotStore + ?Sized> SnapshotStore for $pointer<T> {
            async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
                (**self).put(key, body, mode).await
            }
            async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
                (**self).writer(key).await
            }
            async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
                (**self).get(key, range).await
            }
            async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
                (**self).read_into(key, start, buffer).await
            }
            async fn read_digested(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<Digested> {
                (**self).read_digested(key, start, buffer).await
            }
            async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
                (**self).head(key).await
            }
            async fn delete(&self, key: &ObjectKey) -> Result<()> {
                (**self).delete(key).await
            }
            fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
                (**self).list(prefix)
            }
        }
    )*};
}
forward!(Arc Box);

/// What [`SnapshotStore::read_digested`] has read.
#[derive(Debug)]
#[expect(clippy::exhaustive_structs, reason = "stores of others make it")]
pub struct Digested {
    /// The caller's buffer, filled.
    pub buffer: BytesMut,
    /// The digest of each block, if they were taken.
    pub blocks: Option<Vec<u128>>,
}

/// A writer that keeps its parts in memory and puts them as a whole, for [`SnapshotStore::writer`] of stores whose
/// medium has no parts. `store` is a handle whose clones share the objects.
pub fn buffered_writer<S: SnapshotStore>(store: S, key: &ObjectKey) -> Box<dyn ObjectWriter> {
    #[derive(Debug)]
    struct Buffered<S>(S, ObjectKey, Vec<u8>);
    #[async_trait]
    impl<S: SnapshotStore> ObjectWriter for Buffered<S> {
        async fn write(&mut self, part: Bytes) -> Result<()> {
            self.2.extend_from_slice(&part);
            Ok(())
        }
        async fn finish(self: Box<Self>) -> Result<Version> {
            self.0.put(&self.1, self.2.into(), PutMode::Overwrite).await
        }
        async fn abort(self: Box<Self>) -> Result<()> {
            Ok(())
        }
    }
    Box::new(Buffered(store, key.clone(), Vec::new()))
}

/// A stream of what is known already, for [`SnapshotStore::list`] of stores that list at once.
pub fn listing<I>(objects: I) -> BoxStream<'static, Result<ObjectInfo>>
where
    I: IntoIterator<Item = Result<ObjectInfo>, IntoIter: Send + 'static>,
{
    struct Known<I>(I);
    // The iterator is never pinned: it is only taken from.
    impl<I> Unpin for Known<I> {}
    impl<I: Iterator> Stream for Known<I> {
        type Item = I::Item;
        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<I::Item>> {
            Poll::Ready(self.0.next())
        }
    }
    Box::pin(Known(objects.into_iter()))
}

/// What [`SnapshotStore::put`] wants of what is there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "absent, of a known version, or whatever: the three conditions of every store"
)]
pub enum PutMode {
    /// Nothing may be there.
    Create,
    /// This version must be there.
    Update(Version),
    /// Anything may be there.
    Overwrite,
}

/// An object's version as the store tells it (an ETag, a generation): opaque, only equal or not.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Version(String);

impl Version {
    /// A version from the store's text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The store's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a store says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectInfo {
    /// Where it is.
    pub key: ObjectKey,
    /// Its length in bytes.
    pub size: u64,
    /// Its version.
    pub version: Version,
    /// When it was written, by the store's clock, in milliseconds since 1970.
    pub modified_ms: u64,
}

impl ObjectInfo {
    /// All fields.
    #[must_use]
    pub fn new(key: ObjectKey, size: u64, version: Version, modified_ms: u64) -> Self {
        Self { key, size, version, modified_ms }
    }

    /// The bytes that [`SnapshotStore::get`] of `range` reads: all of them for `None`, cut at the end.
    ///
    /// # Errors
    /// `Invalid` for a range that starts behind the end or is reversed.
    pub fn cut(&self, range: Option<Range<u64>>) -> Result<Range<u64>> {
        let range = range.unwrap_or(0..self.size);
        if range.start > range.end || range.start > self.size {
            return Err(Error::invalid(format!(
                "`{}`: bytes {range:?} of {} were asked for",
                self.key, self.size
            )));
        }
        Ok(range.start..range.end.min(self.size))
    }
}

/// A relative path of 1 to 1024 bytes: segments of `a-z A-Z 0-9 _ . - =` joined by `/`, none empty, `.` or `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectKey(String);

impl ObjectKey {
    /// Parses `text`.
    ///
    /// # Errors
    /// `Invalid`, with the rule that was broken.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '=');
        let segment = |segment: &str| !matches!(segment, "" | "." | "..") && segment.chars().all(good);
        if text.len() <= 1024 && text.split('/').all(segment) {
            return Ok(Self(text));
        }
        Err(Error::invalid(format!("{} is no object key", shown(&text)))
            .with_help("use segments of letters, digits, `_`, `.`, `-` and `=` joined by `/`"))
    }

    /// This key with `segments` behind it.
    ///
    /// # Errors
    /// `Invalid` as [`ObjectKey::new`].
    pub fn join(&self, segments: &str) -> Result<Self> {
        Self::new(format!("{}/{segments}", self.0))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this key lies under `prefix` by whole segments.
    #[must_use]
    pub fn is_under(&self, prefix: &Self) -> bool {
        self.0.strip_prefix(&prefix.0).is_some_and(|rest| rest.starts_with('/'))
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&self.0, f)
    }
}

impl FromStr for ObjectKey {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}

impl TryFrom<String> for ObjectKey {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        Self::new(text)
    }
}

impl From<ObjectKey> for String {
    fn from(key: ObjectKey) -> Self {
        key.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_traits_are_object_safe() {
        fn shared<T: Send + Sync + ?Sized>() {}
        shared::<dyn SnapshotStore>();
        fn sent<T: Send + ?Sized>() {}
        sent::<dyn ObjectWriter>();
    }

    #[test]
    fn keys() {
        let key = ObjectKey::new("a/b.c/d=1").unwrap();
        assert!(key.is_under(&ObjectKey::new("a/b.c").unwrap()));
        assert!(!key.is_under(&ObjectKey::new("a/b").unwrap()));
        assert!(!key.is_under(&key));
        for bad in ["", "/a", "a//b", "a/../b", "a b", "a/", "ä", &"a".repeat(1025)] {
            assert!(ObjectKey::new(bad).is_err(), "{bad}");
        }
    }
}
