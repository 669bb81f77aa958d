//! A client of a server that is killed while it saves, and the one that looks afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use serde_json::{Value, json};
use towline_core::pipeline::Limits;
use towline_core::testing::XorCodec;
use towline_core::{Codec, Error, JobId, Result, SnapshotKind, SnapshotStore};
use towline_storage::{
    Prune, Publish, Retention, SaveTrainState, SnapshotInfo, SnapshotRepo, StoreOptions, Wanted, Writer,
};

use crate::common::{key, name, session, shared, weights};
use crate::life::{read, told};

/// How long the client goes on trying one thing: a restart takes less.
const PATIENCE: Duration = Duration::from_secs(120);
/// What pruning keeps, of snapshots and of states.
const KEPT: [usize; 2] = [3, 2];
/// So many things, the last of which is pruning, before it begins anew.
const ROUND: u64 = 8;

fn run<T>(task: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(task)
}

fn open(url: &str, job: &str) -> (Arc<dyn SnapshotStore>, SnapshotRepo) {
    let store = towline_storage::open(url, &StoreOptions::from_env().unwrap()).unwrap();
    let codecs: Vec<Arc<dyn Codec>> = vec![Arc::new(XorCodec)];
    let repo = SnapshotRepo::new(Arc::clone(&store), JobId::new(job).unwrap(), codecs);
    let repo = repo.with_shard_bytes(12_000).with_limits(Limits::default().with_window(1));
    (store, repo.with_deadline(Duration::from_secs(5)))
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

/// Does `count` things one after the other, each again until it is done. Says `ok NAME ID DIGEST` when something is
/// there, and `gone NAME` when it was given up.
pub(crate) fn save(url: &str, job: &str, count: u64) -> Value {
    run(async {
        let (_, repo) = open(url, job);
        let (mut tries, mut looked) = (0, 0);
        let writer = patiently(&mut tries, async || repo.writer(session(1)).await).await;
        let mut there: Vec<SnapshotInfo> = Vec::new();
        let mut last: Option<String> = None;
        for number in 0..count {
            if number % ROUND == ROUND - 1 {
                give_up(&repo, &mut there, &mut tries).await;
                continue;
            }
            let text = format!("n-{number}");
            let info =
                patiently(&mut tries, async || match one(&writer, number, &text, last.as_deref()).await {
                    Ok(()) => repo.find(&text, Wanted::Any).await,
                    Err(error) => {
                        // The answer alone may be lost.
                        let found = repo.find(&text, Wanted::Any).await.map_err(|_| error)?;
                        looked += 1;
                        Ok(found)
                    }
                })
                .await;
            say(&format!("ok {text} {}", told(&info.id)));
            if info.kind != SnapshotKind::State {
                last = Some(text);
            }
            there.push(info);
        }
        json!({"ended": true, "tries": tries, "found after an error": looked})
    })
}

/// A base, deltas on it, and a state in between.
async fn one(writer: &Writer, number: u64, text: &str, parent: Option<&str>) -> Result<()> {
    match (number % ROUND, parent) {
        (3, _) => {
            writer.save_state(SaveTrainState::new(name(text), shared(text))).await?;
        }
        (1.., Some(parent)) => {
            let info = writer.repo().find(parent, Wanted::Sampler).await?;
            let publish = Publish::new(name(text), SnapshotKind::Delta, shared(text));
            let publish = publish.with_parent(info, shared(parent)).with_codec(Arc::new(XorCodec));
            writer.publish(publish).await?;
        }
        _ => {
            writer.publish(Publish::new(name(text), SnapshotKind::Base, shared(text))).await?;
        }
    }
    Ok(())
}

async fn give_up(repo: &SnapshotRepo, there: &mut Vec<SnapshotInfo>, tries: &mut u64) {
    let retention = Retention::new().with_last_snapshots(KEPT[0]).unwrap().with_last_states(KEPT[1]).unwrap();
    let prune = Prune::new(retention).with_grace(Duration::ZERO);
    let live = patiently(tries, async || {
        repo.prune(&prune).await?;
        repo.list().await
    })
    .await;
    let state = |info: &&SnapshotInfo| info.kind == SnapshotKind::State;
    for (kept, of_class) in [
        (KEPT[0], there.iter().filter(|info| !state(info)).collect::<Vec<_>>()),
        (KEPT[1], there.iter().filter(state).collect()),
    ] {
        for info in of_class.iter().rev().take(kept) {
            assert!(live.contains(info), "{} was given up, and is among the newest {kept}", info.id);
        }
    }
    for info in there.iter().filter(|info| !live.contains(info)) {
        say(&format!("gone {}", info.name));
    }
    there.retain(|info| live.contains(info));
}

/// Tries until it is done. A server that is away comes back.
async fn patiently<T>(tries: &mut u64, mut attempt: impl AsyncFnMut() -> Result<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        *tries += 1;
        match attempt().await {
            Ok(done) => return done,
            Err(error) if Instant::now() < until => {
                say(&format!("failed {}", short(&error)));
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            Err(error) => panic!("{}", error.report()),
        }
    }
}

fn short(error: &Error) -> String {
    error.report().replace('\n', " ")
}

/// Reads what [`save`] said. What was acknowledged and not given up must be there, all that is there must be whole, and
/// nothing else may be there but what one lost answer can hide.
pub(crate) fn check(url: &str, job: &str) -> Value {
    let mut acknowledged = BTreeMap::new();
    let mut given_up = BTreeSet::new();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["ok", text, identity, digest] => {
                acknowledged.insert(text.to_owned(), format!("{identity} {digest}"));
            }
            ["gone", text] => {
                given_up.insert(text.to_owned());
            }
            _ => {}
        }
    }
    run(async {
        let (store, repo) = open(url, job);
        let live = repo.list().await.unwrap();
        let names: BTreeMap<_, _> = live.iter().map(|info| (info.name.to_string(), told(&info.id))).collect();
        let wanted = acknowledged.iter().filter(|(text, _)| !given_up.contains(*text));
        let lost: Vec<_> = wanted.clone().filter(|(text, id)| names.get(*text) != Some(id)).collect();
        let mut partial = Vec::new();
        for info in &live {
            let whole = async || {
                repo.verify(info).await?;
                Ok::<_, Error>(read(&repo, info).await? == weights(info.name.as_str()))
            };
            match whole().await {
                Ok(true) => {}
                Ok(false) => partial.push(format!("{}: other weights", info.id)),
                Err(error) => partial.push(format!("{}: {}", info.id, short(&error))),
            }
        }
        let extra = names.keys().filter(|text| !acknowledged.contains_key(*text)).count();
        let back = names.keys().filter(|text| given_up.contains(*text)).count();
        let objects: Vec<_> = store.list(Some(&key(job))).try_collect().await.unwrap();
        assert!(extra <= 1 && back == 0, "{extra} were never acknowledged, {back} were given up");
        assert!(lost.is_empty() && partial.is_empty(), "lost: {lost:?}, partial: {partial:?}");
        json!({
            "acknowledged": acknowledged.len(),
            "given up": given_up.len(),
            "live": live.len(),
            "lost": lost.len(),
            "partial": partial.len(),
            "committed, not acknowledged": extra,
            "objects": objects.len(),
        })
    })
}
