//! What one client sees of its own objects.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{body, key, keys, list};
use crate::testing::laws::{Told, ensure, fails};
use crate::{DIGEST_BLOCK, Digested, ErrorKind, PutMode, SnapshotStore, Version, block_digest};

/// What is put is got, with its size and version; an empty object is an object.
///
/// # Errors
/// What broke.
pub async fn put_get_head(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    for (name, length) in [("empty", 0), ("one", 1), ("deep/er/some-file_1.bin=x", 70_000)] {
        let (key, body) = (key(name)?, body(1, length));
        let version = store.put(&key, body.clone(), PutMode::Create).await.told("put")?;
        ensure!(store.get(&key, None).await.told("get")? == body, "`{name}`: other bytes than were put");
        let head = store.head(&key).await.told("head")?;
        ensure!(
            head.key == key && head.size == length as u64,
            "`{name}` of {length} bytes: head says {head:?}"
        );
        ensure!(head.version == version, "`{name}`: put said {version:?}, head says {:?}", head.version);
    }
    Ok(())
}

/// A range is cut at the end; one that starts behind it or is reversed is `Invalid`.
///
/// # Errors
/// What broke.
pub async fn ranges(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let (key, body) = (key("object")?, body(2, 1000));
    store.put(&key, body.clone(), PutMode::Create).await.told("put")?;
    let good: &[(Range<u64>, Range<usize>)] = &[
        (0..1000, 0..1000),
        (0..1, 0..1),
        (10..20, 10..20),
        (999..1000, 999..1000),
        (990..5000, 990..1000),
        (0..u64::MAX, 0..1000),
        (5..5, 5..5),
    ];
    for (asked, wanted) in good {
        let found =
            store.get(&key, Some(asked.clone())).await.told(format_args!("bytes {asked:?} of 1000"))?;
        ensure!(found == body.slice(wanted.clone()), "bytes {asked:?} of 1000: found {} others", found.len());
    }
    for bad in [Range { start: 1001, end: 1002 }, Range { start: 20, end: 10 }] {
        fails(
            store.get(&key, Some(bad.clone())).await,
            ErrorKind::Invalid,
            format_args!("bytes {bad:?} of 1000"),
        )?;
    }
    Ok(())
}

/// [`SnapshotStore::read_into`] fills the buffer and never pretends to have.
///
/// # Errors
/// What broke.
pub async fn read_into_fills(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let (name, body) = (key("object")?, body(3, 5000));
    store.put(&name, body.clone(), PutMode::Create).await.told("put")?;
    for (start, length) in [(0, 5000), (0, 1), (4096, 904), (77, 1000), (9, 0)] {
        let dirty = BytesMut::from(&vec![0xee; length][..]);
        let found = store.read_into(&name, start as u64, dirty).await;
        let found = found.told(format_args!("{length} bytes at {start} of 5000"))?;
        ensure!(
            found == body.slice(start..start + length),
            "{length} bytes at {start} of 5000: found {} others",
            found.len()
        );
        let read = store.read_digested(&name, start as u64, BytesMut::zeroed(length)).await;
        let Digested { buffer, blocks } = read.told(format_args!("{length} bytes at {start}, digested"))?;
        let wanted: Vec<_> = buffer.chunks(DIGEST_BLOCK).map(block_digest).collect();
        ensure!(
            buffer == found && blocks.as_ref().is_none_or(|blocks| *blocks == wanted),
            "{length} bytes at {start} of 5000: other bytes or digests when the store takes digests"
        );
    }
    for (start, length) in [(0, 5001), (4999, 2)] {
        let outcome = store.read_into(&name, start, BytesMut::zeroed(length)).await;
        fails(outcome, ErrorKind::Corrupt, format_args!("{length} bytes at {start} of 5000"))?;
    }
    let missing = store.read_into(&key("missing")?, 0, BytesMut::zeroed(1)).await;
    fails(missing, ErrorKind::NotFound, "read_into of a missing object")
}

/// A missing object is `NotFound`, never an empty one.
///
/// # Errors
/// What broke.
pub async fn missing_is_not_found(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    store.put(&key("a/there")?, body(4, 3), PutMode::Create).await.told("put")?;
    for name in ["missing", "a/missing", "a", "a/there/below"] {
        let key = key(name)?;
        fails(store.get(&key, None).await, ErrorKind::NotFound, format_args!("get of missing `{name}`"))?;
        let range = store.get(&key, Some(0..1)).await;
        fails(range, ErrorKind::NotFound, format_args!("get of a range of missing `{name}`"))?;
        fails(store.head(&key).await, ErrorKind::NotFound, format_args!("head of missing `{name}`"))?;
    }
    Ok(())
}

/// An update of another version, or of nothing, is `Conflict` and changes nothing; a create of what is there is
/// `AlreadyExists`.
///
/// # Errors
/// What broke.
pub async fn stale_update_conflicts(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let key_ = key("object")?;
    let first = store.put(&key_, body(1, 10), PutMode::Create).await.told("create")?;
    let second = store.put(&key_, body(2, 10), PutMode::Update(first.clone())).await.told("update")?;
    let stale = store.put(&key_, body(3, 10), PutMode::Update(first)).await;
    fails(stale, ErrorKind::Conflict, "update of a stale version")?;
    let unknown = store.put(&key_, body(3, 10), PutMode::Update(Version::new("no-such-version"))).await;
    fails(unknown, ErrorKind::Conflict, "update of a version that never was")?;
    let again = store.put(&key_, body(4, 10), PutMode::Create).await;
    fails(again, ErrorKind::AlreadyExists, "create of what is there")?;
    ensure!(store.get(&key_, None).await.told("get")? == body(2, 10), "a refused write changed the object");
    let missing = key("missing")?;
    let update = store.put(&missing, body(5, 10), PutMode::Update(second.clone())).await;
    fails(update, ErrorKind::Conflict, "update of a missing object")?;
    fails(store.head(&missing).await, ErrorKind::NotFound, "head after a refused update")?;
    store.delete(&key_).await.told("delete")?;
    let deleted = store.put(&key_, body(6, 10), PutMode::Update(second)).await;
    fails(deleted, ErrorKind::Conflict, "update of a deleted object")
}

/// Deleting works, again too, and lets the name be created anew.
///
/// # Errors
/// What broke.
pub async fn delete_is_idempotent(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let (gone, kept) = (key("a/gone")?, key("a/kept")?);
    for key in [&gone, &kept] {
        store.put(key, body(1, 10), PutMode::Create).await.told("put")?;
    }
    for time in ["first", "second"] {
        store.delete(&gone).await.told(format_args!("the {time} delete"))?;
        fails(store.get(&gone, None).await, ErrorKind::NotFound, "get of a deleted object")?;
    }
    store.delete(&key("never/was/there")?).await.told("delete of what never was there")?;
    ensure!(keys(&list(&*store, None).await?) == ["a/kept"], "delete left or took something else");
    store.put(&gone, body(2, 10), PutMode::Create).await.told("create after delete")?;
    ensure!(store.get(&gone, None).await.told("get")? == body(2, 10), "the deleted body came back");
    Ok(())
}

/// A prefix means whole segments, and not the object of that name.
///
/// # Errors
/// What broke.
pub async fn prefixes_are_whole_segments(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    for name in ["a/b/1", "a/b/c/2", "a/bc/3", "a/b.d", "ab", "b/a/b/4"] {
        store.put(&key(name)?, Bytes::from_static(b"x"), PutMode::Create).await.told("put")?;
    }
    let cases: &[(&str, &[&str])] = &[
        ("a/b", &["a/b/1", "a/b/c/2"]),
        ("a", &["a/b.d", "a/b/1", "a/b/c/2", "a/bc/3"]),
        ("a/b/c", &["a/b/c/2"]),
        ("ab", &[]),
        ("a/b/1", &[]),
        ("nothing", &[]),
    ];
    for (prefix, wanted) in cases {
        let found = list(&*store, Some(&key(prefix)?)).await?;
        ensure!(keys(&found) == *wanted, "under `{prefix}`: wanted {wanted:?}, found {:?}", keys(&found));
    }
    Ok(())
}

/// A list has every object once, with its size and version: more than a page of most services' small ones.
///
/// # Errors
/// What broke.
pub async fn lists_are_complete(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let mut wanted = Vec::new();
    for number in 0..300usize {
        let key = key(format_args!("job/{}/object-{number:04}", number % 7))?;
        let version = store.put(&key, body(number as u64, number), PutMode::Create).await.told("put")?;
        wanted.push((key, number as u64, version));
    }
    wanted.sort_by(|left, right| left.0.cmp(&right.0));
    for prefix in [None, Some(key("job")?)] {
        let found = list(&*store, prefix.as_ref()).await?;
        ensure!(found.len() == 300, "300 objects were put, {} are listed", found.len());
        let same = found
            .iter()
            .zip(&wanted)
            .all(|(info, wanted)| (&info.key, info.size, &info.version) == (&wanted.0, wanted.1, &wanted.2));
        ensure!(same, "the list tells other names, sizes or versions than the puts");
    }
    Ok(())
}

/// Each write of another body has a version that the object never had, and head tells the last one.
///
/// # Errors
/// What broke.
pub async fn versions_change(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let key = key("object")?;
    let mut seen = Vec::new();
    for round in 0..20 {
        let mode = match (round, seen.last()) {
            (0, _) => PutMode::Create,
            (_, Some(last)) if round % 2 == 0 => PutMode::Update(Version::clone(last)),
            _ => PutMode::Overwrite,
        };
        let version = store.put(&key, body(round, 16), mode).await.told("put")?;
        ensure!(!seen.contains(&version), "write {round} has the version of an earlier one: {version:?}");
        let head = store.head(&key).await.told("head")?;
        ensure!(head.version == version, "put said {version:?}, head says {:?}", head.version);
        seen.push(version);
    }
    Ok(())
}
