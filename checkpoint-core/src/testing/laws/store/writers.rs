//! Objects that are written in parts.

use std::sync::Arc;

use bytes::Bytes;

use super::{body, key, keys, list};
use crate::testing::laws::{Told, ensure, fails};
use crate::{ErrorKind, PutMode, SnapshotStore};

/// An object is there when its writer is finished, whole, and not before.
///
/// # Errors
/// What broke.
pub async fn writers_are_invisible_until_finished(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let key = key("parts/object")?;
    let mut writer = store.writer(&key).await.told("writer")?;
    let whole = body(1, 30_000);
    for part in [0..1, 1..1, 1..20_000, 20_000..30_000] {
        writer.write(whole.slice(part)).await.told("write")?;
        fails(store.get(&key, None).await, ErrorKind::NotFound, "get before the writer was finished")?;
        fails(store.head(&key).await, ErrorKind::NotFound, "head before the writer was finished")?;
        let found = list(&*store, None).await?;
        ensure!(found.is_empty(), "{:?} is listed before the writer was finished", keys(&found));
    }
    let version = writer.finish().await.told("finish")?;
    ensure!(store.get(&key, None).await.told("get")? == whole, "the parts did not become the whole");
    let head = store.head(&key).await.told("head")?;
    ensure!(head.version == version && head.size == 30_000, "finish said {version:?}, head says {head:?}");
    let empty = store.writer(&key).await.told("writer")?.finish().await;
    empty.told("finish without a part")?;
    ensure!(store.get(&key, None).await.told("get")?.is_empty(), "no parts made an object that is not empty");
    Ok(())
}

/// A writer that is aborted or dropped leaves nothing, and what was there stays.
///
/// # Errors
/// What broke.
pub async fn unfinished_writers_leave_nothing(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let (fresh, old) = (key("fresh")?, key("old")?);
    store.put(&old, body(1, 10), PutMode::Create).await.told("put")?;
    for key in [&fresh, &old] {
        for abort in [true, false] {
            let mut writer = store.writer(key).await.told("writer")?;
            writer.write(body(2, 50_000)).await.told("write")?;
            if abort {
                writer.abort().await.told("abort")?;
            } else {
                drop(writer);
            }
        }
    }
    // Nothing of it may come later either.
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    fails(store.get(&fresh, None).await, ErrorKind::NotFound, "get after an unfinished writer")?;
    ensure!(
        store.get(&old, None).await.told("get")? == body(1, 10),
        "an unfinished writer changed the object"
    );
    let found = list(&*store, None).await?;
    ensure!(keys(&found) == ["old"], "an unfinished writer left {:?}", keys(&found));
    Ok(())
}

/// A writer replaces what is there, whole, at its end: until then the old object is read.
///
/// # Errors
/// What broke.
pub async fn writers_overwrite(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let key = key("object")?;
    let first = store.put(&key, body(1, 50_000), PutMode::Create).await.told("put")?;
    let mut writer = store.writer(&key).await.told("writer")?;
    writer.write(body(2, 100)).await.told("write")?;
    ensure!(
        store.get(&key, None).await.told("get")? == body(1, 50_000),
        "an unfinished writer changed the object"
    );
    let second = writer.finish().await.told("finish over an object")?;
    ensure!(first != second, "the overwritten object kept its version");
    ensure!(
        store.get(&key, None).await.told("get")? == body(2, 100),
        "the writer did not replace the object whole"
    );
    // Two at once on one name: whoever finishes last wins.
    let mut slow = store.writer(&key).await.told("writer")?;
    let mut quick = store.writer(&key).await.told("a second writer")?;
    slow.write(body(3, 300)).await.told("write")?;
    quick.write(body(4, 200)).await.told("write")?;
    quick.finish().await.told("finish")?;
    ensure!(store.get(&key, None).await.told("get")? == body(4, 200), "two writers of one name were mixed");
    slow.finish().await.told("finish")?;
    ensure!(store.get(&key, None).await.told("get")? == body(3, 300), "two writers of one name were mixed");
    Ok(())
}

/// 13 MiB in uneven parts, more than two parts of every service, come back byte for byte.
///
/// # Errors
/// What broke.
pub async fn large_objects(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    const SIZE: usize = 13 << 20;
    let key = key("large")?;
    let block = body(1, 1 << 16);
    let whole: Bytes =
        (0..SIZE / block.len()).flat_map(|_| block.iter().copied()).collect::<Vec<u8>>().into();
    // Blocks must differ, so that parts in another order are seen.
    let whole: Bytes = whole
        .iter()
        .enumerate()
        .map(|(at, byte)| byte.wrapping_add(at.to_le_bytes()[2]))
        .collect::<Vec<u8>>()
        .into();
    let mut writer = store.writer(&key).await.told("writer")?;
    let (mut start, mut length) = (0, 700_001);
    while start < SIZE {
        let end = (start + length).min(SIZE);
        writer.write(whole.slice(start..end)).await.told("write")?;
        (start, length) = (end, length * 2 % 5_000_011);
    }
    writer.finish().await.told("finish")?;
    ensure!(store.head(&key).await.told("head")?.size == SIZE as u64, "the size is not that of all parts");
    ensure!(store.get(&key, None).await.told("get")? == whole, "13 MiB in parts came back with other bytes");
    let middle = 5 << 20;
    let range = store.get(&key, Some(middle as u64 - 9..middle as u64 + 9)).await.told("get of a range")?;
    ensure!(range == whole.slice(middle - 9..middle + 9), "a range of 13 MiB came back with other bytes");
    Ok(())
}
