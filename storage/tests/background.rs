//! Saves in the background: training goes on after a copy, and failures are heard of.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::{find, name, session, weights};
use towline_core::{Error, ErrorKind, Result, SnapshotStore, TensorMeta, TensorSource, Weights};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan};
use towline_storage::{BackgroundSaver, Memory, SaveTrainState, WhenBusy};

/// Tensors that training changes in place.
#[derive(Debug)]
struct Training {
    metas: Vec<TensorMeta>,
    now: Mutex<Vec<Vec<u8>>>,
}

impl Training {
    fn new(text: &str) -> Arc<Self> {
        let weights = weights(text);
        let now = weights.iter().map(|(_, data)| data.to_vec()).collect();
        Arc::new(Self { metas: weights.tensors().to_vec(), now: Mutex::new(now) })
    }

    fn step(&self, text: &str) {
        *self.now.lock().unwrap() = weights(text).iter().map(|(_, data)| data.to_vec()).collect();
    }
}

impl TensorSource for Training {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        let now = self.now.lock().unwrap();
        now.get(index).map(|data| Bytes::from(data.clone())).ok_or_else(|| Error::invalid("no such tensor"))
    }
}

fn state(text: &str, training: &Arc<Training>) -> SaveTrainState {
    let tensors: Arc<dyn TensorSource> = Arc::<Training>::clone(training);
    SaveTrainState::new(name(text), tensors)
}

#[tokio::test]
async fn what_is_saved_is_what_was_there_at_the_call() {
    let repo = common::repo(Arc::new(Memory::new()));
    let mut saver = BackgroundSaver::new(Arc::new(repo.writer(session(1)).await.unwrap()));
    let training = Training::new("n-0");
    for step in 0..5 {
        saver.save(state(&format!("s-{step}"), &training)).await.unwrap();
        training.step(&format!("n-{}", step + 1));
    }
    let last = saver.close().await.unwrap().unwrap();
    assert_eq!(last.name, name("s-4"));
    for step in 0..5 {
        let info = find(&repo, &format!("s-{step}")).await;
        assert_eq!(repo.load_state(&info).await.unwrap().tensors, weights(&format!("n-{step}")));
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_comes_too_early_waits_or_is_refused() {
    let slow = FaultStore::new(Arc::new(Memory::new()), Plan::new(1));
    let store: Arc<dyn SnapshotStore> = Arc::new(slow.clone());
    let repo = common::repo(store);
    let writer = Arc::new(repo.writer(session(1)).await.unwrap());
    let training = Training::new("n");
    for (when_busy, refused) in [(WhenBusy::Refuse, true), (WhenBusy::Wait, false)] {
        let mut saver = BackgroundSaver::new(Arc::clone(&writer)).with_when_busy(when_busy);
        slow.script(Operation::Put, "manifest.json", [Fault::Delay(Duration::from_secs(5))]);
        saver.save(state(&format!("first-{refused}"), &training)).await.unwrap();
        let second = saver.save(state(&format!("second-{refused}"), &training)).await;
        assert_eq!(second.as_ref().err().map(Error::kind), refused.then_some(ErrorKind::Conflict));
        let last = saver.close().await.unwrap().unwrap();
        assert_eq!(last.name.as_str(), if refused { "first-true" } else { "second-false" });
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_heard_of_at_the_next_call_and_at_the_end() {
    let faulty = FaultStore::new(Arc::new(Memory::new()), Plan::new(1));
    let store: Arc<dyn SnapshotStore> = Arc::new(faulty.clone());
    let repo = common::repo(store);
    let mut saver = BackgroundSaver::new(Arc::new(repo.writer(session(1)).await.unwrap()));
    let training = Training::new("n");
    let denied = [Fault::Refuse(ErrorKind::Denied)];
    faulty.script(Operation::Put, "manifest.json", denied);
    saver.save(state("a", &training)).await.unwrap();
    let error = saver.save(state("b", &training)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("background save of `a`"), "{error}");
    // Heard once; the next one is saved.
    saver.save(state("b", &training)).await.unwrap();
    assert_eq!(saver.wait().await.unwrap().unwrap().name, name("b"));
    assert_eq!(saver.wait().await.unwrap(), None);
    faulty.script(Operation::Put, "manifest.json", denied);
    saver.save(state("c", &training)).await.unwrap();
    assert_eq!(saver.close().await.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(repo.list().await.unwrap().len(), 1);
}

/// Smaller and larger states may follow each other in the buffers that are kept.
#[tokio::test]
async fn states_of_any_size_follow_each_other() {
    let repo = common::repo(Arc::new(Memory::new()));
    let mut saver = BackgroundSaver::new(Arc::new(repo.writer(session(1)).await.unwrap()));
    let large = |byte: u8| {
        let meta = TensorMeta::new("t", towline_core::DType::U8, [3 << 20]).unwrap();
        Arc::new(Weights::new([(meta, Bytes::from(vec![byte; 3 << 20]))]).unwrap())
    };
    for number in 0..3u8 {
        saver.save(SaveTrainState::new(name(&format!("s-{number}")), large(number))).await.unwrap();
        saver.wait().await.unwrap();
    }
    // A smaller and a larger state after it.
    for (text, length) in [("small", 5), ("large", 5 << 20)] {
        let meta = TensorMeta::new("t", towline_core::DType::U8, [length]).unwrap();
        let tensors = Arc::new(Weights::new([(meta, Bytes::from(vec![7; length]))]).unwrap());
        saver.save(SaveTrainState::new(name(text), tensors)).await.unwrap();
    }
    saver.close().await.unwrap();
    for (text, byte, length) in
        [("s-0", 0, 3 << 20), ("s-2", 2, 3 << 20), ("small", 7, 5), ("large", 7, 5 << 20)]
    {
        let tensors = repo.load_state(&find(&repo, text).await).await.unwrap().tensors;
        assert_eq!(*tensors.get("t").unwrap().1, vec![byte; length]);
    }
}
