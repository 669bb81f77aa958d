//! Objects that are read into memory of the caller: in ranges, many at once, each copied once.

use std::ops::Range;
use std::sync::Arc;

use bytes::BytesMut;
use futures_util::StreamExt as _;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use towline_core::{Error, ObjectKey, Result, Version};

use super::{failed, path, version};

/// Ranges on their way at once, for all readers of a store. One connection rarely brings more than 100 MB/s.
pub(super) const AT_ONCE: usize = 16;
/// The length of a range in bytes.
const RANGE: usize = 8 << 20;

/// Fills `buffer`, which is not empty, from byte `start` of an object.
///
/// Each range is a task: one that waits for its caller would hold the place of others.
pub(super) async fn read(
    store: &Arc<dyn ObjectStore>,
    places: &Arc<Semaphore>,
    key: &ObjectKey,
    start: u64,
    mut buffer: BytesMut,
) -> Result<BytesMut> {
    let path = path(key)?;
    let mut tasks = JoinSet::new();
    let mut at = start;
    let mut count = 0usize;
    while !buffer.is_empty() {
        let part = buffer.split_to(buffer.len().min(RANGE));
        let range = Range { start: at, end: at.saturating_add(part.len() as u64) };
        at = range.end;
        let (store, places) = (Arc::clone(store), Arc::clone(places));
        let (path, key, number) = (path.clone(), key.clone(), count);
        count += 1;
        tasks.spawn(async move {
            // Nobody closes it.
            let _place = places.acquire().await.map_err(|error| gone(&key, error))?;
            fill(&*store, &path, &key, range, part).await.map(|filled| (number, filled))
        });
    }
    let mut parts: Vec<_> = (0..count).map(|_| BytesMut::new()).collect();
    let mut seen = None;
    // What is left of them ends with the first that fails, or with this future.
    while let Some(done) = tasks.join_next().await {
        let (number, (part, version)) = done.map_err(|error| gone(key, error))??;
        // Ranges of two objects are no object.
        if *seen.get_or_insert_with(|| version.clone()) != version {
            return Err(Error::unavailable(format!("`{key}` was replaced while it was read"))
                .with_help("read it again"));
        }
        if let Some(place) = parts.get_mut(number) {
            *place = part;
        }
    }
    // They lie side by side, so that nothing is copied.
    let joined = parts.into_iter().reduce(|mut all, part| {
        all.unsplit(part);
        all
    });
    Ok(joined.unwrap_or_default())
}

/// Fills `part` with exactly the bytes of `range`, and says of which version of the object they are.
async fn fill(
    store: &dyn ObjectStore,
    path: &Path,
    key: &ObjectKey,
    range: Range<u64>,
    mut part: BytesMut,
) -> Result<(BytesMut, Version)> {
    let short = |found: usize| {
        Error::corrupt(format!(
            "`{key}`: wanted {} bytes at {}, found {found}",
            range.end - range.start,
            range.start
        ))
    };
    // Servers read the numbers as signed ones, and refuse those that do not fit.
    let asked = range.start..range.end.min(i64::MAX as u64);
    let options = GetOptions { range: Some(GetRange::Bounded(asked)), ..GetOptions::default() };
    let found = match store.get_opts(path, options).await {
        Ok(found) => found,
        Err(error @ object_store::Error::NotFound { .. }) => return Err(failed(error, key, "read")),
        // Every back end says in its own way that the range begins at or behind the end.
        Err(error) => {
            return Err(
                match store.get_opts(path, GetOptions { head: true, ..GetOptions::default() }).await {
                    Ok(found) if found.meta.size == range.start => short(0),
                    Ok(found) if found.meta.size < range.start => Error::invalid(format!(
                        "`{key}`: bytes from {} were asked for, found {} in all",
                        range.start, found.meta.size
                    ))
                    .with_help("ask for a range that begins within the object"),
                    _ => failed(error, key, "read"),
                },
            );
        }
    };
    if found.range.start != range.start {
        return Err(Error::internal(format!(
            "`{key}`: wanted bytes from {}, the store answered with {:?}",
            range.start, found.range
        )));
    }
    let of = version(found.meta.e_tag.as_deref(), found.meta.version.as_deref());
    let mut filled = 0;
    let mut pieces = found.into_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| failed(error, key, "read"))?;
        let Some(target) = part.get_mut(filled..filled + piece.len()) else {
            return Err(short(filled + piece.len()));
        };
        target.copy_from_slice(&piece);
        filled += piece.len();
    }
    if filled == part.len() { Ok((part, of)) } else { Err(short(filled)) }
}

fn gone(key: &ObjectKey, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::internal(format!("`{key}`: the reading of a range ended early")).with_source(error)
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt as _;
    use object_store::memory::InMemory;
    use object_store::throttle::{ThrottleConfig, ThrottledStore};
    use towline_core::ErrorKind;

    use super::*;

    #[test]
    fn any_part_of_an_object_comes_to_its_place() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let all: Vec<u8> = (0..2 * RANGE + 77).map(|at| (at / 5) as u8).collect();
            let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            store.put(&Path::from("a"), all.clone().into()).await.unwrap();
            // Fewer places than ranges: they wait for one another, and nobody for ever.
            let places = Arc::new(Semaphore::new(1));
            let key = ObjectKey::new("a").unwrap();
            let get = |key: &ObjectKey, start: usize, length: usize| {
                let (store, places, key) = (Arc::clone(&store), Arc::clone(&places), key.clone());
                async move { read(&store, &places, &key, start as u64, BytesMut::zeroed(length)).await }
            };
            for (start, length) in
                [(0, all.len()), (0, 1), (76, 2 * RANGE + 1), (RANGE, RANGE), (RANGE - 1, 2)]
            {
                let found = get(&key, start, length).await.unwrap();
                assert!(found[..] == all[start..start + length], "{length} bytes at {start}");
            }
            let end = all.len();
            let ask = [
                (0, end + 1, ErrorKind::Corrupt),
                (end, 1, ErrorKind::Corrupt),
                (end + 1, 1, ErrorKind::Invalid),
            ];
            for (start, length, kind) in ask {
                assert_eq!(
                    get(&key, start, length).await.unwrap_err().kind(),
                    kind,
                    "{length} bytes at {start}"
                );
            }
            let missing = ObjectKey::new("b").unwrap();
            assert_eq!(get(&missing, 0, 3 * RANGE).await.unwrap_err().kind(), ErrorKind::NotFound);
            assert_eq!(places.available_permits(), 1);
        });
    }

    #[test]
    fn ranges_of_two_objects_are_no_object() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let wait = std::time::Duration::from_millis(2);
            let slow = ThrottleConfig { wait_get_per_call: wait, ..ThrottleConfig::default() };
            let store: Arc<dyn ObjectStore> = Arc::new(ThrottledStore::new(InMemory::new(), slow));
            let (key, places) = (ObjectKey::new("a").unwrap(), Arc::new(Semaphore::new(1)));
            let body = |byte: u8| bytes::Bytes::from(vec![byte; 2 * RANGE + 1]);
            let bodies = [body(1), body(2)];
            store.put(&Path::from("a"), bodies[0].clone().into()).await.unwrap();
            let replaced = {
                let (store, bodies) = (Arc::clone(&store), bodies.clone());
                tokio::spawn(async move {
                    for round in 0.. {
                        tokio::time::sleep(wait * (round % 11)).await;
                        let body = bodies[round as usize % 2].clone();
                        store.put(&Path::from("a"), body.into()).await.unwrap();
                    }
                })
            };
            let (mut whole, mut refused) = (0, 0);
            for _ in 0..60 {
                match read(&store, &places, &key, 0, BytesMut::zeroed(2 * RANGE + 1)).await {
                    Ok(found) => {
                        assert!(bodies.iter().any(|body| *body == found), "a mixture");
                        whole += 1;
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                        refused += 1;
                    }
                }
            }
            replaced.abort();
            assert!(whole > 0 && refused > 0, "{whole} whole, {refused} refused");
        });
    }

    #[test]
    fn a_reader_that_gives_up_leaves_its_places_to_others() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let (key, places) = (ObjectKey::new("a").unwrap(), Arc::new(Semaphore::new(1)));
            let held = Arc::clone(&places).acquire_owned().await.unwrap();
            let read = read(&store, &places, &key, 0, BytesMut::zeroed(RANGE + 1));
            assert!(tokio::time::timeout(std::time::Duration::from_millis(20), read).await.is_err());
            drop(held);
            let place = tokio::time::timeout(std::time::Duration::from_secs(10), places.acquire()).await;
            assert!(place.unwrap().is_ok());
        });
    }
}
