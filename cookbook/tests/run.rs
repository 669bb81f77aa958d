//! A run's checkpoints on the embedded stack: saved once, resumed from bit for bit, and never guessed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use towline_cookbook::engine::{ModelConfig, Rng};
use towline_cookbook::recipes::Trainer;
use towline_core::{
    CheckpointCatalog, CheckpointClass, CheckpointInfo, CheckpointPage, CheckpointRef, ContentDigest,
    ErrorKind, JobId, ModelId, PromotedModel, PutMode, Result, SnapshotIdentity, SnapshotName, SnapshotStore,
    async_trait,
};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan};
use towline_storage::{Memory, SnapshotRepo, Wanted};
use towline_trainer_client::{
    CheckpointLog, DataChanged, Init, Position, Resume, Resumed, Run, SaveKind, repair_log,
};

fn repo(store: &Arc<dyn SnapshotStore>, job: &str) -> SnapshotRepo {
    let store = Arc::clone(store);
    SnapshotRepo::new(store, JobId::new(job).unwrap(), towline_codec::all())
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn reference(text: &str) -> CheckpointRef {
    text.parse().unwrap()
}

/// A process of a training loop: a trainer with other weights each time, and the run.
struct Process {
    trainer: Trainer,
    run: Run,
}

impl Process {
    async fn start(repo: &SnapshotRepo, folder: &Path, seed: u64) -> Self {
        let trainer = Trainer::start(repo, &ModelConfig::tiny(), seed).await.unwrap();
        let run = Run::new(Arc::clone(&trainer.client) as _, Arc::new(repo.clone()), repo.job().clone());
        let run = run.with_log(CheckpointLog::new(folder)).with_base_model("tiny").with_data("rows-1");
        Self { trainer, run }
    }

    async fn train(&self, rng: &mut Rng, steps: u64) {
        for _ in 0..steps {
            self.trainer.supervised_step(rng, 1e-3).await.unwrap();
        }
    }

    async fn digest(&self) -> ContentDigest {
        self.trainer.weights.published_weights().await.unwrap().content_digest()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_run_goes_on_bit_for_bit_and_saves_the_same_names() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(&store, "train");
    let first = Process::start(&repo, dir.path(), 1).await;
    assert_eq!(first.run.resolve_resume(&Resume::default()).await.unwrap(), Resumed::Fresh);
    let mut rng = Rng::new(5);
    first.train(&mut rng, 3).await;
    let half = Position::new(3, 96).with_entry("reward", 0.5);
    let (at, kind) = (name("step-3"), SaveKind::Both);
    let saved = first.run.save_checkpoint(&at, kind, &half, None).await.unwrap();
    // Called again, as after a lost answer: found, not saved twice.
    let listed = repo.list().await.unwrap().len();
    let again = first.run.save_checkpoint(&at, SaveKind::State, &half, None).await.unwrap();
    assert_eq!((again.state, repo.list().await.unwrap().len()), (saved.state.clone(), listed));
    let other =
        first.run.save_checkpoint(&at, SaveKind::State, &Position::new(4, 128), None).await.unwrap_err();
    assert_eq!(other.message(), "job train has a state step-3 of another position");
    let mut after = rng.clone();
    first.train(&mut after, 2).await;
    let end = Position::new(5, 160);
    first.run.save_checkpoint(&name("final"), SaveKind::Both, &end, None).await.unwrap();
    let undisturbed = first.digest().await;

    // Another process, from the middle and from the end.
    let second = Process::start(&repo, dir.path(), 77).await;
    let resumed = second.run.resolve_resume(&Resume::default().with_from(reference("step-3"))).await.unwrap();
    assert_eq!(resumed.position(), half);
    second.train(&mut rng, 2).await;
    assert_eq!(second.digest().await, undisturbed);
    let third = Process::start(&repo, dir.path(), 78).await;
    let resumed = third.run.resolve_resume(&Resume::default()).await.unwrap();
    assert!(matches!(&resumed, Resumed::Continued { state, skipped, .. }
        if state.name == name("final") && skipped.is_empty()));
    assert_eq!((resumed.position(), third.digest().await), (end.clone(), undisturbed));
    // It has nothing left to do but what its predecessor did last: the state is its own, the sampler weights are new.
    third.run.save_checkpoint(&name("final"), SaveKind::Both, &end, None).await.unwrap();
    assert!(
        first
            .run
            .save_checkpoint(&name("late"), SaveKind::State, &end, None)
            .await
            .is_err_and(|error| { error.kind() == ErrorKind::Fenced })
    );

    // The log says what the store answered, and is rebuilt from it.
    let log = CheckpointLog::new(dir.path());
    let lines = log.read().unwrap().lines;
    let states: Vec<_> = lines.iter().filter_map(|line| line.state_path.as_deref()).collect();
    assert_eq!(states[..2], ["cross_job://train/step-3", "cross_job://train/step-3"]);
    assert_eq!(states.last(), Some(&"cross_job://train/final"));
    assert_eq!(lines[0].sampler_path.as_deref(), Some(saved.sampler.unwrap().snapshot_name.as_str()));
    assert_eq!((lines[0].step, lines[0].data_consumed), (Some(3), Some(96)));
    std::fs::write(log.path(), "torn").unwrap();
    let repaired = repair_log(&repo, repo.job(), &log).await.unwrap();
    assert_eq!((repaired.set_aside, repaired.gone.len()), (1, 0));
    let lines = log.read().unwrap();
    assert_eq!(lines.last_resumable().unwrap().state_path.as_deref(), Some("cross_job://train/final"));
    assert_eq!(lines.find("step-3").unwrap().data_consumed, Some(96));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_run_begins_with_the_state_of_another_job_and_then_goes_on_from_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let old = Process::start(&repo(&store, "sft"), &dir.path().join("sft"), 1).await;
    let mut rng = Rng::new(5);
    old.train(&mut rng, 2).await;
    let position = Position::new(2, 64);
    old.run.save_checkpoint(&name("final"), SaveKind::Both, &position, None).await.unwrap();

    let rl = repo(&store, "rl");
    let begin = Resume::default().with_init(Init::weights(reference("sft:final")));
    let new = Process::start(&rl, &dir.path().join("rl"), 2).await;
    let resumed = new.run.resolve_resume(&begin).await.unwrap();
    assert!(matches!(&resumed, Resumed::Initialised { state, .. } if state.job.as_str() == "sft"));
    assert_eq!((resumed.position(), new.digest().await), (Position::default(), old.digest().await));
    let kept = Init::weights(reference("cross_job://sft/final")).with_optimizer().with_position();
    let again = Process::start(&repo(&store, "rl-2"), &dir.path().join("rl-2"), 3).await;
    let resumed = again.run.resolve_resume(&Resume::default().with_init(kept)).await.unwrap();
    assert_eq!(resumed.position(), position);
    new.train(&mut rng, 1).await;
    new.run.save_checkpoint(&name("step-1"), SaveKind::State, &Position::new(1, 32), None).await.unwrap();
    let trained = new.digest().await;
    // The same command again: its own state counts now.
    let killed = Process::start(&rl, &dir.path().join("rl"), 4).await;
    let resumed = killed.run.resolve_resume(&begin).await.unwrap();
    assert!(matches!(&resumed, Resumed::Continued { .. }));
    assert_eq!((resumed.position().step, killed.digest().await), (1, trained));
    for (text, kind, says) in [
        ("sft:gone", ErrorKind::NotFound, "job sft has no train state called `gone`"),
        ("gone:final", ErrorKind::NotFound, "job gone has no train state called `final`"),
    ] {
        let error =
            killed.run.resolve_resume(&Resume::default().with_from(reference(text))).await.unwrap_err();
        assert_eq!((error.kind(), error.message()), (kind, says));
    }
    // Sampler weights are no state, on the command line; in Rust they are another type.
    old.run.save_checkpoint(&name("served"), SaveKind::Sampler, &position, None).await.unwrap();
    let served = killed.run.resolve_resume(&Resume::default().with_from(reference("sft:served"))).await;
    assert!(served.unwrap_err().message().contains("wanted a train state"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_or_cannot_be_seen_is_an_error_and_never_a_fresh_start() {
    let dir = tempfile::tempdir().unwrap();
    let faulty = FaultStore::new(Arc::new(Memory::new()), Plan::default());
    let store: Arc<dyn SnapshotStore> = Arc::new(faulty.clone());
    let repo = repo(&store, "train");
    let process = Process::start(&repo, dir.path(), 1).await;
    let mut rng = Rng::new(5);
    for step in 1..=2 {
        process.train(&mut rng, 1).await;
        let position = Position::new(step, 32 * step);
        process
            .run
            .save_checkpoint(&name(&format!("step-{step}")), SaveKind::State, &position, None)
            .await
            .unwrap();
    }
    let again = async |model: &str, data: &str| {
        let trainer = Trainer::start(&repo, &ModelConfig::tiny(), 9).await.unwrap();
        let run = Run::new(Arc::clone(&trainer.client) as _, Arc::new(repo.clone()), repo.job().clone());
        run.with_base_model(model).with_data(data)
    };
    let plain = Resume::default();
    let error = again("large", "rows-1").await.resolve_resume(&plain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.message().ends_with("was trained from tiny: this run trains large"), "{error}");
    let run = again("tiny", "rows-2").await;
    let error = run.resolve_resume(&plain).await.unwrap_err();
    assert!(error.message().ends_with("its fingerprint is rows-1, this run's is rows-2"), "{error}");
    assert!(error.help().unwrap().contains("--data-changed keep"));
    for (what, rows) in [(DataChanged::Keep, 64), (DataChanged::ResetCursor, 0)] {
        let resumed = run.resolve_resume(&plain.clone().with_data_changed(what)).await.unwrap();
        assert_eq!(resumed.position(), Position::new(2, rows));
    }

    // The store refuses to be read.
    let run = again("tiny", "rows-1").await;
    faulty.script(Operation::Get, "head.json", [Fault::Refuse(ErrorKind::Denied)]);
    assert_eq!(run.resolve_resume(&plain).await.unwrap_err().kind(), ErrorKind::Denied);
    // The newest state is damaged: an error, or on request the one before.
    let info = repo.find("step-2", Wanted::State).await.unwrap();
    let files = repo.manifest(&info).await.unwrap().files;
    let file = files.iter().find(|file| file.weights).unwrap();
    let key = towline_core::ObjectKey::new(format!("train/{}/{}", info.dir, file.path)).unwrap();
    let mut bytes = store.get(&key, None).await.unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    store.put(&key, bytes.into(), PutMode::Overwrite).await.unwrap();
    let error = run.resolve_resume(&plain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.help().unwrap().contains("allow an older state"), "{}", error.report());
    let resumed = run.resolve_resume(&plain.clone().with_fall_back()).await.unwrap();
    let Resumed::Continued { state, position, skipped } = resumed else { panic!("{resumed:?}") };
    assert_eq!((state.name, position), (name("step-1"), Position::new(1, 32)));
    assert!(skipped[0].0.name == name("step-2") && skipped[0].1.contains("digest"), "{skipped:?}");
}

/// A catalog some hours later: the time of what was given one is over, and nobody has pruned yet.
#[derive(Debug)]
struct Later(SnapshotRepo);

#[async_trait]
impl CheckpointCatalog for Later {
    async fn list_page(&self, job: &JobId, cursor: Option<&str>, limit: usize) -> Result<CheckpointPage> {
        let mut page = self.0.list_page(job, cursor, limit).await?;
        for info in &mut page.checkpoints {
            info.expired = info.expires_ms.is_some();
        }
        Ok(page)
    }

    async fn resolve_checkpoint(
        &self,
        reference: &CheckpointRef,
        source_job: &JobId,
        class: CheckpointClass,
    ) -> Result<CheckpointInfo> {
        self.0.resolve_checkpoint(reference, source_job, class).await
    }

    async fn loop_state(&self, state: &CheckpointInfo) -> Result<serde_json::Map<String, serde_json::Value>> {
        self.0.loop_state(state).await
    }

    async fn promote_checkpoint(
        &self,
        job: &JobId,
        checkpoint: &SnapshotIdentity,
        model: &ModelId,
    ) -> Result<PromotedModel> {
        self.0.promote_checkpoint(job, checkpoint, model).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_newest_state_is_an_error_or_the_one_before() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(&store, "train");
    let trainer = Trainer::start(&repo, &ModelConfig::tiny(), 1).await.unwrap();
    let later = Arc::new(Later(repo.clone()));
    let run = Run::new(Arc::clone(&trainer.client) as _, later, repo.job().clone());
    for (step, ttl) in [(1, None), (2, Some(Duration::from_secs(3600)))] {
        let name = name(&format!("step-{step}"));
        run.save_checkpoint(&name, SaveKind::State, &Position::new(step, step), ttl).await.unwrap();
    }
    let error = run.resolve_resume(&Resume::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(error.help().unwrap().contains("allow an older state"), "{}", error.report());
    let named = run.resolve_resume(&Resume::default().with_from(reference("step-2"))).await.unwrap();
    assert_eq!(named.position(), Position::new(2, 2));
    let resumed = run.resolve_resume(&Resume::default().with_fall_back()).await.unwrap();
    let Resumed::Continued { state, position, skipped } = resumed else { panic!("{resumed:?}") };
    assert_eq!((state.name, position), (name("step-1"), Position::new(1, 1)));
    assert!(skipped[0].0.name == name("step-2") && skipped[0].1.contains("expired"), "{skipped:?}");
    // Where nothing else is left, falling back ends with what was found, not with a fresh start.
    repo.delete(&repo.find("step-1", Wanted::State).await.unwrap()).await.unwrap();
    let error = run.resolve_resume(&Resume::default().with_fall_back()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_that_runs_into_the_deadline_is_waited_for_by_the_next_call() {
    let dir = tempfile::tempdir().unwrap();
    let faulty = FaultStore::new(Arc::new(Memory::new()), Plan::default());
    let store: Arc<dyn SnapshotStore> = Arc::new(faulty.clone());
    let repo = repo(&store, "train");
    let Process { trainer, run } = Process::start(&repo, dir.path(), 1).await;
    let run = run.with_deadline(Duration::from_millis(300));
    faulty.script(Operation::Put, "manifest.json", [Fault::Delay(Duration::from_secs(1))]);
    let (at, position) = (name("step-0"), Position::default());
    let late = run.save_checkpoint(&at, SaveKind::State, &position, None).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut);
    assert!(CheckpointLog::new(dir.path()).read().unwrap().lines.is_empty(), "nothing is recorded yet");
    let saved = loop {
        match run.save_checkpoint(&at, SaveKind::State, &position, None).await {
            Err(error) if error.kind() == ErrorKind::TimedOut => {}
            saved => break saved.unwrap(),
        }
    };
    assert_eq!(saved.state.unwrap().name, at);
    assert_eq!(repo.list().await.unwrap().len(), 1);
    trainer.client.close().await.unwrap();
}
