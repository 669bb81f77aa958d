//! The commit: fences, lost answers, dropped calls, races.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{find, name, repo, session, shared, weights};
use towline_core::{ErrorKind, SnapshotKind, SnapshotStore};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan};
use towline_storage::{Local, Memory, Publish, SaveTrainState, SnapshotRepo, Writer};

fn base(text: &str) -> Publish {
    Publish::new(name(text), SnapshotKind::Base, shared(text))
}

async fn names(repo: &SnapshotRepo) -> Vec<String> {
    repo.list().await.unwrap().iter().map(|info| info.name.to_string()).collect()
}

/// A store whose head is hard to write, once [`next`] says so.
fn faulty() -> FaultStore {
    FaultStore::new(Arc::new(Memory::new()), Plan::default())
}

/// What happens to the next writes of the head, one after the other; afterwards nothing.
fn next(faulty: &FaultStore, faults: &[Fault]) {
    faulty.script(Operation::Put, "/head.json", faults.iter().copied());
}

async fn opened(faulty: &FaultStore) -> (SnapshotRepo, Writer) {
    let repo = repo(Arc::new(faulty.clone()));
    let writer = repo.writer(session(1)).await.unwrap();
    (repo, writer)
}

#[tokio::test]
async fn a_second_writer_fences_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let stores: [Arc<dyn SnapshotStore>; 2] =
        [Arc::new(Memory::new()), Arc::new(Local::open(dir.path()).unwrap())];
    for store in stores {
        let repo = repo(store);
        let first = repo.writer(session(1)).await.unwrap();
        first.publish(base("a")).await.unwrap();
        let second = repo.writer(session(2)).await.unwrap();
        assert_eq!((first.epoch(), second.epoch()), (1, 2));
        let error = first.publish(base("b")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Fenced);
        assert!(error.message().contains(session(2).as_str()), "{error}");
        let state = first.save_state(SaveTrainState::new(name("s"), shared("s"))).await.unwrap_err();
        assert_eq!(state.kind(), ErrorKind::Fenced);
        second.publish(base("c")).await.unwrap();
        assert_eq!(names(&repo).await, ["a", "c"]);
        // The same session again is another writer all the same.
        let third = repo.writer(session(2)).await.unwrap();
        assert_eq!(second.publish(base("d")).await.unwrap_err().kind(), ErrorKind::Fenced);
        third.publish(base("d")).await.unwrap();
        assert_eq!(names(&repo).await, ["a", "c", "d"]);
    }
}

#[tokio::test]
async fn a_writer_that_is_fenced_while_it_writes_commits_nothing() {
    let faulty = faulty();
    let (repo, first) = opened(&faulty).await;
    // The head is refused, so that the commit begins again; in between another writer opens the job.
    next(&faulty, &[Fault::Refuse(ErrorKind::Unavailable); 6]);
    let inner = common::repo(faulty.inner());
    let publish = first.publish(base("a"));
    let open = async {
        while faulty.left() == 6 {
            tokio::task::yield_now().await;
        }
        let second = inner.writer(session(2)).await.unwrap();
        next(&faulty, &[]);
        second
    };
    let (outcome, second) = tokio::join!(publish, open);
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Fenced);
    assert_eq!(names(&repo).await, [""; 0]);
    second.publish(base("a")).await.unwrap();
    assert_eq!(repo.restore(&find(&repo, "a").await).await.unwrap(), weights("a"));
}

#[tokio::test]
async fn a_lost_answer_of_the_commit_is_a_success() {
    let kinds = [ErrorKind::Unavailable, ErrorKind::TimedOut, ErrorKind::Conflict, ErrorKind::AlreadyExists];
    for kind in kinds {
        let faulty = faulty();
        // Already the opening's answer is lost.
        next(&faulty, &[Fault::Lose(kind)]);
        let (repo, writer) = opened(&faulty).await;
        assert_eq!(writer.epoch(), 1);
        next(&faulty, &[Fault::Lose(kind)]);
        writer.publish(base("a")).await.unwrap();
        next(&faulty, &[Fault::Refuse(kind), Fault::Refuse(kind), Fault::Lose(kind)]);
        writer.publish(base("b")).await.unwrap();
        assert_eq!((names(&repo).await, faulty.left()), (vec!["a".into(), "b".into()], 0));
        assert_eq!(repo.restore(&find(&repo, "b").await).await.unwrap(), weights("b"));
    }
}

#[tokio::test]
async fn a_commit_that_lands_late_counts_once() {
    let faulty = faulty();
    let (repo, writer) = opened(&faulty).await;
    for after in [0, 1, 5, 20, 60] {
        let text = format!("late-{after}");
        next(&faulty, &[Fault::Late(Duration::from_millis(after))]);
        writer.publish(base(&text)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(after + 5)).await;
        let names = names(&repo).await;
        assert_eq!(names.iter().filter(|name| **name == text).count(), 1, "{names:?}");
    }
    let seqs: Vec<_> = repo.list().await.unwrap().iter().map(|info| info.seq).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn a_lost_answer_followed_by_another_writer_is_still_a_success() {
    let faulty = faulty();
    let (repo, first) = opened(&faulty).await;
    let inner = common::repo(faulty.inner());
    // The commit lands and its answer is lost; before it is read back, another writer opens the job.
    next(&faulty, &[Fault::Late(Duration::ZERO)]);
    let open = async {
        while names(&inner).await.is_empty() {
            tokio::task::yield_now().await;
        }
        inner.writer(session(2)).await.unwrap()
    };
    let (outcome, _second) = tokio::join!(first.publish(base("a")), open);
    outcome.unwrap();
    assert_eq!(names(&repo).await, ["a"]);
    assert_eq!(first.publish(base("b")).await.unwrap_err().kind(), ErrorKind::Fenced);
}

#[tokio::test]
async fn errors_that_cannot_have_landed_are_final() {
    let faulty = faulty();
    let (repo, writer) = opened(&faulty).await;
    next(&faulty, &[Fault::Refuse(ErrorKind::Denied)]);
    assert_eq!(writer.publish(base("a")).await.unwrap_err().kind(), ErrorKind::Denied);
    next(&faulty, &[Fault::Refuse(ErrorKind::Unavailable); 40]);
    let error = writer.publish(base("a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "a budget ends");
    next(&faulty, &[]);
    assert_eq!(names(&repo).await, [""; 0]);
    writer.publish(base("a")).await.unwrap();
}

#[tokio::test]
async fn a_store_that_never_answers_ends_at_the_deadline() {
    let faulty = faulty();
    let repo = repo(Arc::new(faulty.clone())).with_deadline(Duration::from_millis(100));
    let writer = repo.writer(session(1)).await.unwrap();
    next(&faulty, &[Fault::Hang; 40]);
    let started = std::time::Instant::now();
    let error = writer.publish(base("a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_dropped_publish_is_whole_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let repo = repo(Arc::new(Local::open(dir.path()).unwrap()));
    let writer = repo.writer(session(1)).await.unwrap();
    let mut dropped = 0;
    for number in 0..60 {
        let text = format!("n-{number}");
        let patience = Duration::from_micros(number * 300);
        if tokio::time::timeout(patience, writer.publish(base(&text))).await.is_err() {
            dropped += 1;
        }
    }
    assert!(dropped > 0);
    writer.publish(base("last")).await.unwrap();
    let live = repo.list().await.unwrap();
    assert_eq!(live.last().unwrap().name, name("last"));
    for info in live {
        assert_eq!(repo.restore(&info).await.unwrap(), weights(info.name.as_str()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_writers_publish_or_are_fenced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let racers: Vec<_> = (0..8u8)
        .map(|racer| {
            let repo = repo(Arc::new(Local::open(&path).unwrap()));
            tokio::spawn(async move {
                let mut done = Vec::new();
                for round in 0..4 {
                    let writer = repo.writer(session(racer)).await.unwrap();
                    let text = format!("r-{racer}-{round}");
                    match writer.publish(base(&text)).await {
                        Ok(_) => done.push(text),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Fenced, "{error}"),
                    }
                }
                done
            })
        })
        .collect();
    let mut done = Vec::new();
    for racer in racers {
        done.extend(racer.await.unwrap());
    }
    let repo = repo(Arc::new(Local::open(&path).unwrap()));
    let mut found = names(&repo).await;
    found.sort();
    done.sort();
    assert_eq!(found, done, "acknowledged and visible must be the same");
    assert!(!done.is_empty());
}
