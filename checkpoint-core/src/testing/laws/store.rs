//! What every store keeps. Each law takes a store with nothing in it and returns what broke.
//!
//! No law has an object both at `a` and at `a/b`, which a directory could not hold, nor two names that differ in
//! case alone.

mod contents;
mod model;
mod races;
mod writers;

use std::any::Any;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use contents::{
    delete_is_idempotent, lists_are_complete, missing_is_not_found, prefixes_are_whole_segments,
    put_get_head, ranges, read_into_fills, stale_update_conflicts, versions_change,
};
pub use model::random_operations;
pub use races::{compare_and_swap_counter, exclusive_create, overwrites_are_whole};
pub use writers::{
    large_objects, unfinished_writers_leave_nothing, writers_are_invisible_until_finished, writers_overwrite,
};

use super::{Checked, Told};
use crate::testing::mix::Mix;
use crate::{ObjectInfo, ObjectKey, Result as CoreResult, SnapshotStore};

/// How long one law may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A law of stores, boxed so that all have one type.
pub type Law = fn(Arc<dyn SnapshotStore>) -> Checked;

/// Every law with its name.
pub const ALL: &[(&str, Law)] = &[
    ("put_get_head", |store| Box::pin(put_get_head(store))),
    ("ranges", |store| Box::pin(ranges(store))),
    ("read_into_fills", |store| Box::pin(read_into_fills(store))),
    ("missing_is_not_found", |store| Box::pin(missing_is_not_found(store))),
    ("exclusive_create", |store| Box::pin(exclusive_create(store))),
    ("compare_and_swap_counter", |store| Box::pin(compare_and_swap_counter(store))),
    ("stale_update_conflicts", |store| Box::pin(stale_update_conflicts(store))),
    ("overwrites_are_whole", |store| Box::pin(overwrites_are_whole(store))),
    ("writers_are_invisible_until_finished", |store| Box::pin(writers_are_invisible_until_finished(store))),
    ("unfinished_writers_leave_nothing", |store| Box::pin(unfinished_writers_leave_nothing(store))),
    ("writers_overwrite", |store| Box::pin(writers_overwrite(store))),
    ("large_objects", |store| Box::pin(large_objects(store))),
    ("delete_is_idempotent", |store| Box::pin(delete_is_idempotent(store))),
    ("prefixes_are_whole_segments", |store| Box::pin(prefixes_are_whole_segments(store))),
    ("lists_are_complete", |store| Box::pin(lists_are_complete(store))),
    ("versions_change", |store| Box::pin(versions_change(store))),
    ("random_operations", |store| Box::pin(random_operations(store))),
];

/// What [`crate::store_conformance!`] takes: a store, or a store and what must live as long as it.
pub trait FreshStore {
    /// The store, and what keeps it alive.
    fn into_parts(self) -> (Arc<dyn SnapshotStore>, Box<dyn Any>);
}

impl<S: SnapshotStore> FreshStore for S {
    fn into_parts(self) -> (Arc<dyn SnapshotStore>, Box<dyn Any>) {
        (Arc::new(self), Box::new(()))
    }
}

impl<S: SnapshotStore, K: 'static> FreshStore for (S, K) {
    fn into_parts(self) -> (Arc<dyn SnapshotStore>, Box<dyn Any>) {
        (Arc::new(self.0), Box::new(self.1))
    }
}

/// Checks `law` on `store`, within [`DEADLINE`].
///
/// # Errors
/// What broke.
#[expect(clippy::future_not_send, reason = "a law runs on the thread that checks it")]
pub async fn check<F>(
    store: impl FreshStore,
    law: impl FnOnce(Arc<dyn SnapshotStore>) -> F,
) -> Result<(), String>
where
    F: Future<Output = Result<(), String>>,
{
    let (store, _alive) = store.into_parts();
    tokio::time::timeout(DEADLINE, law(store))
        .await
        .unwrap_or_else(|_| Err(format!("not done after {} s", DEADLINE.as_secs())))
}

fn key(text: impl Display) -> Result<ObjectKey, String> {
    ObjectKey::new(text.to_string()).told("a key of the kit")
}

/// Bytes that look random and depend on `seed`.
fn body(seed: u64, length: usize) -> Bytes {
    Mix::new(seed).bytes(length).into()
}

async fn list(store: &dyn SnapshotStore, prefix: Option<&ObjectKey>) -> Result<Vec<ObjectInfo>, String> {
    let mut stream = store.list(prefix);
    let mut found = Vec::new();
    while let Some(info) = next(&mut stream).await {
        found.push(info.told("list")?);
    }
    found.sort_by(|left, right| left.key.cmp(&right.key));
    Ok(found)
}

async fn next(
    stream: &mut crate::BoxStream<'static, CoreResult<ObjectInfo>>,
) -> Option<CoreResult<ObjectInfo>> {
    std::future::poll_fn(|context| stream.as_mut().poll_next(context)).await
}

fn keys(found: &[ObjectInfo]) -> Vec<&str> {
    found.iter().map(|info| info.key.as_str()).collect()
}
