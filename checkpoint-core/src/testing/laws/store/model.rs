//! Random operations against a map.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::{body, key, list};
use crate::testing::laws::{Told, ensure, fails};
use crate::{ErrorKind, ObjectKey, PutMode, SnapshotStore, Version};

#[derive(Debug, Clone)]
enum Op {
    Create(usize, u16),
    Overwrite(usize, u16),
    /// With the current version, or with the one before.
    Update(usize, u16, bool),
    Write(usize, Vec<u16>),
    Abandon(usize, u16),
    Get(usize),
    Range(usize, u64, u64),
    Delete(usize),
    List(bool),
}

const NAMES: [&str; 5] = ["a", "b/x", "b/y", "c/d/e", "f-1"];

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let name = 0..NAMES.len();
    let op = prop_oneof![
        (name.clone(), 0..2000u16).prop_map(|(name, length)| Op::Create(name, length)),
        (name.clone(), 0..2000u16).prop_map(|(name, length)| Op::Overwrite(name, length)),
        (name.clone(), 0..2000u16, any::<bool>())
            .prop_map(|(name, length, now)| Op::Update(name, length, now)),
        (name.clone(), prop::collection::vec(0..900u16, 0..4))
            .prop_map(|(name, parts)| Op::Write(name, parts)),
        (name.clone(), 0..900u16).prop_map(|(name, length)| Op::Abandon(name, length)),
        name.clone().prop_map(Op::Get),
        (name.clone(), 0..2100u64, 0..2100u64).prop_map(|(name, start, end)| Op::Range(name, start, end)),
        name.prop_map(Op::Delete),
        any::<bool>().prop_map(Op::List),
    ];
    prop::collection::vec(op, 1..40)
}

/// Any sequence of operations does what it would do to a map. A failing sequence is made as short as can be.
///
/// # Errors
/// What broke, and the sequence.
#[expect(clippy::future_not_send, reason = "a law runs on the thread that checks it")]
pub async fn random_operations(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    const RUNS: usize = 24;
    let mut runner = TestRunner::deterministic();
    let mut root = 0;
    for _ in 0..RUNS {
        let mut tree = ops().new_tree(&mut runner).map_err(|error| error.to_string())?;
        let mut smallest = None;
        let mut tries = 0;
        loop {
            root += 1;
            tries += 1;
            let ops = tree.current();
            let outcome = run(&*store, root, &ops).await;
            let broken = outcome.is_err();
            if let Err(error) = outcome {
                smallest = Some(format!("{error}, after {ops:?}"));
            } else if smallest.is_none() {
                break;
            }
            if tries > 300 || !(if broken { tree.simplify() } else { tree.complicate() }) {
                break;
            }
        }
        if let Some(error) = smallest {
            return Err(error);
        }
    }
    Ok(())
}

struct Model {
    objects: BTreeMap<ObjectKey, (Bytes, Version)>,
    stale: BTreeMap<ObjectKey, Version>,
}

impl Model {
    fn set(&mut self, key: &ObjectKey, body: Bytes, version: Version) {
        if let Some((_, old)) = self.objects.insert(key.clone(), (body, version)) {
            self.stale.insert(key.clone(), old);
        }
    }
}

async fn run(store: &dyn SnapshotStore, root: usize, ops: &[Op]) -> Result<(), String> {
    let root = key(format_args!("run-{root}"))?;
    let named = |name: usize| key(format_args!("{root}/{}", NAMES.get(name).unwrap_or(&"a")));
    let mut model = Model { objects: BTreeMap::new(), stale: BTreeMap::new() };
    for (index, op) in ops.iter().enumerate() {
        // A body of its own for each write: versions may be digests of bodies.
        let fresh = |length: u16| {
            let mut bytes = (index as u64).to_le_bytes().to_vec();
            bytes.extend(body(u64::from(length), usize::from(length)));
            Bytes::from(bytes)
        };
        match op {
            Op::Create(name, length) => {
                let (key, body) = (named(*name)?, fresh(*length));
                let outcome = store.put(&key, body.clone(), PutMode::Create).await;
                if model.objects.contains_key(&key) {
                    fails(outcome, ErrorKind::AlreadyExists, format_args!("{op:?}"))?;
                } else {
                    model.set(&key, body, outcome.told(format_args!("{op:?}"))?);
                }
            }
            Op::Overwrite(name, length) => {
                let (key, body) = (named(*name)?, fresh(*length));
                let version =
                    store.put(&key, body.clone(), PutMode::Overwrite).await.told(format_args!("{op:?}"))?;
                model.set(&key, body, version);
            }
            Op::Update(name, length, now) => {
                let (key, body) = (named(*name)?, fresh(*length));
                let current = model.objects.get(&key).map(|(_, version)| version.clone());
                let version = if *now { current.clone() } else { model.stale.get(&key).cloned() };
                let version = version.unwrap_or_else(|| Version::new("none"));
                let outcome = store.put(&key, body.clone(), PutMode::Update(version.clone())).await;
                if current.as_ref() == Some(&version) {
                    model.set(&key, body, outcome.told(format_args!("{op:?}"))?);
                } else {
                    fails(outcome, ErrorKind::Conflict, format_args!("{op:?}"))?;
                }
            }
            Op::Write(name, parts) => {
                let key = named(*name)?;
                let mut writer = store.writer(&key).await.told(format_args!("{op:?}"))?;
                let mut whole = Vec::new();
                for length in parts {
                    let part = fresh(*length);
                    whole.extend_from_slice(&part);
                    writer.write(part).await.told(format_args!("{op:?}"))?;
                }
                let version = writer.finish().await.told(format_args!("{op:?}"))?;
                model.set(&key, whole.into(), version);
            }
            Op::Abandon(name, length) => {
                let mut writer = store.writer(&named(*name)?).await.told(format_args!("{op:?}"))?;
                writer.write(fresh(*length)).await.told(format_args!("{op:?}"))?;
                writer.abort().await.told(format_args!("{op:?}"))?;
            }
            Op::Get(name) => get(store, &model, &named(*name)?, None).await?,
            Op::Range(name, start, end) => get(store, &model, &named(*name)?, Some(*start..*end)).await?,
            Op::Delete(name) => {
                let key = named(*name)?;
                store.delete(&key).await.told(format_args!("{op:?}"))?;
                model.objects.remove(&key).map(|(_, version)| model.stale.insert(key, version));
            }
            Op::List(below) => {
                let prefix = if *below { root.join("b").told("a key of the kit")? } else { root.clone() };
                compare(&model, &prefix, &list(store, Some(&prefix)).await?)?;
            }
        }
    }
    for name in 0..NAMES.len() {
        get(store, &model, &named(name)?, None).await?;
    }
    compare(&model, &root, &list(store, Some(&root)).await?)
}

async fn get(
    store: &dyn SnapshotStore,
    model: &Model,
    key: &ObjectKey,
    range: Option<std::ops::Range<u64>>,
) -> Result<(), String> {
    let what = format!("get of {range:?} of `{key}`");
    let outcome = store.get(key, range.clone()).await;
    let Some((body, version)) = model.objects.get(key) else {
        return fails(outcome, ErrorKind::NotFound, what);
    };
    let wanted = match range {
        None => body.clone(),
        Some(range) => {
            let size = body.len() as u64;
            if range.start > size || range.start > range.end {
                return fails(outcome, ErrorKind::Invalid, what);
            }
            // An empty range at the very end: some media cannot tell it from one behind the end.
            if range.start == size {
                return Ok(());
            }
            let index = |at: u64| usize::try_from(at.min(size)).unwrap_or(usize::MAX);
            body.slice(index(range.start)..index(range.end))
        }
    };
    ensure!(outcome.told(&what)? == wanted, "{what}: other bytes than were written");
    let head = store.head(key).await.told("head")?;
    ensure!(head.version == *version, "`{key}` has the version {:?}, wanted {version:?}", head.version);
    Ok(())
}

fn compare(model: &Model, prefix: &ObjectKey, found: &[crate::ObjectInfo]) -> Result<(), String> {
    let found: Vec<_> = found.iter().map(|info| (&info.key, info.size, &info.version)).collect();
    let wanted: Vec<_> = model
        .objects
        .iter()
        .filter(|(key, _)| key.is_under(prefix))
        .map(|(key, (body, version))| (key, body.len() as u64, version))
        .collect();
    ensure!(found == wanted, "under `{prefix}`: wanted {wanted:?}, listed {found:?}");
    Ok(())
}
