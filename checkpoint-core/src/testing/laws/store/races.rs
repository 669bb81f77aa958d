//! What many clients see of each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;

use super::{body, key};
use crate::testing::laws::{Told, ensure};
use crate::{ErrorKind, PutMode, SnapshotStore};

/// Of 64 racers to create an object, one wins, the others get `AlreadyExists`, and what is stored is the winner's.
///
/// # Errors
/// What broke.
pub async fn exclusive_create(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    let key = key("race/object")?;
    let start = Arc::new(tokio::sync::Barrier::new(64));
    let racers: Vec<_> = (0..64u64)
        .map(|racer| {
            let (store, key, start) = (Arc::clone(&store), key.clone(), Arc::clone(&start));
            tokio::spawn(async move {
                start.wait().await;
                (racer, store.put(&key, body(racer, 200), PutMode::Create).await)
            })
        })
        .collect();
    let mut winners = Vec::new();
    for racer in racers {
        let (racer, outcome) = racer.await.map_err(|error| format!("a racer died: {error}"))?;
        match outcome {
            Ok(version) => winners.push((racer, version)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(format!("a loser of the race: wanted already_exists, found {error:?}")),
        }
    }
    let [(winner, version)] = &winners[..] else {
        return Err(format!("{} of 64 racers created the object", winners.len()));
    };
    ensure!(
        store.get(&key, None).await.told("get")? == body(*winner, 200),
        "the stored body is not the winner's"
    );
    ensure!(store.head(&key).await.told("head")?.version == *version, "the version is not the winner's");
    Ok(())
}

/// Eight tasks count together by compare-and-swap, and no step is lost.
///
/// # Errors
/// What broke.
pub async fn compare_and_swap_counter(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    const TASKS: usize = 8;
    const STEPS: usize = 12;
    let key = key("counter")?;
    store.put(&key, Bytes::from_static(b"0"), PutMode::Create).await.told("put")?;
    let start = Arc::new(tokio::sync::Barrier::new(TASKS));
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (store, key, start) = (Arc::clone(&store), key.clone(), Arc::clone(&start));
            tokio::spawn(async move {
                start.wait().await;
                for _ in 0..STEPS {
                    step(&*store, &key).await?;
                }
                Ok::<_, String>(())
            })
        })
        .collect();
    for task in tasks {
        task.await.map_err(|error| format!("a counting task died: {error}"))??;
    }
    let count = number(&store.get(&key, None).await.told("get")?)?;
    let wanted = (TASKS * STEPS) as u64;
    ensure!(count == wanted, "{wanted} steps were counted, the counter says {count}");
    Ok(())
}

/// One step of the counter, tried until it wins. The law's deadline bounds it.
async fn step(store: &dyn SnapshotStore, key: &crate::ObjectKey) -> Result<(), String> {
    loop {
        // The version first: the body may be newer than it, which the swap then refuses.
        let version = store.head(key).await.told("head")?.version;
        let count = number(&store.get(key, None).await.told("get")?)?;
        let next = Bytes::from((count + 1).to_string());
        match store.put(key, next, PutMode::Update(version)).await {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Conflict => tokio::task::yield_now().await,
            Err(error) => return Err(format!("a lost swap: wanted conflict, found {error:?}")),
        }
    }
}

/// Readers beside a writer that overwrites see whole bodies only, and never nothing.
///
/// # Errors
/// What broke.
pub async fn overwrites_are_whole(store: Arc<dyn SnapshotStore>) -> Result<(), String> {
    const ROUNDS: usize = 40;
    const READS: usize = 400;
    let key = key("object")?;
    let bodies: Vec<Bytes> =
        [40_000, 10, 90_000, 1].iter().zip(0u8..).map(|(length, fill)| vec![fill; *length].into()).collect();
    let body = |bodies: &[Bytes], round: usize| bodies.get(round % bodies.len()).cloned().unwrap_or_default();
    store.put(&key, body(&bodies, 0), PutMode::Create).await.told("put")?;
    let (done, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (store, key, bodies) = (Arc::clone(&store), key.clone(), bodies.clone());
            let (done, reads) = (Arc::clone(&done), Arc::clone(&reads));
            tokio::spawn(async move {
                let mut outcome = Ok(());
                while outcome.is_ok() && !done.load(Ordering::Acquire) {
                    outcome = match store.get(&key, None).await.told("get beside an overwrite") {
                        Ok(found) if bodies.contains(&found) => Ok(()),
                        Ok(found) => {
                            Err(format!("a reader saw {} bytes that nobody wrote as a whole", found.len()))
                        }
                        Err(broken) => Err(broken),
                    };
                    reads.fetch_add(1, Ordering::AcqRel);
                    tokio::task::yield_now().await;
                }
                done.store(true, Ordering::Release);
                outcome
            })
        })
        .collect();
    // A task as the readers are: where the store waits, they have their turn.
    let writer = tokio::spawn(async move {
        let mut outcome = Ok(());
        let mut round = 0;
        // A quick store would be done before the first reader has begun.
        while outcome.is_ok()
            && !done.load(Ordering::Acquire)
            && (round < ROUNDS || reads.load(Ordering::Acquire) < READS)
        {
            round += 1;
            outcome =
                store.put(&key, body(&bodies, round), PutMode::Overwrite).await.told("overwrite").map(drop);
            tokio::task::yield_now().await;
        }
        done.store(true, Ordering::Release);
        outcome
    });
    for task in readers.into_iter().chain([writer]) {
        task.await.map_err(|error| format!("a reader or the writer died: {error}"))??;
    }
    Ok(())
}

fn number(body: &[u8]) -> Result<u64, String> {
    let text = std::str::from_utf8(body).ok().and_then(|text| text.parse().ok());
    text.ok_or_else(|| format!("the counter holds {} bytes that are no number", body.len()))
}
