//! A loop whose checkpoints a manager saves: when they are due, in the background, and with what stays of them.

use std::sync::Arc;
use std::time::Duration;

use towline_cookbook::engine::{ModelConfig, Rng};
use towline_cookbook::recipes::Trainer;
use towline_core::{
    CheckpointCatalog as _, CheckpointInfo, ErrorKind, JobId, ModelId, SnapshotKind, SnapshotStore,
};
use towline_storage::testing::{Fault, FaultStore, Operation, Plan};
use towline_storage::{Memory, SnapshotRepo};
use towline_trainer_client::{
    CheckpointLog, CheckpointManager, CheckpointSettings, Every, Position, Resume, Resumed, Run, SaveKind,
};

const WEEK: Duration = Duration::from_secs(604_800);

struct Loop {
    trainer: Trainer,
    run: Arc<Run>,
    manager: CheckpointManager,
    resumed: Resumed,
    position: Position,
    rng: Rng,
}

impl Loop {
    async fn start(repo: &SnapshotRepo, log: Option<&CheckpointLog>, settings: CheckpointSettings) -> Self {
        let trainer = Trainer::start(repo, &ModelConfig::tiny(), 1).await.unwrap();
        let run = Run::new(Arc::clone(&trainer.client) as _, Arc::new(repo.clone()), repo.job().clone());
        let run = Arc::new(match log {
            Some(log) => run.with_log(log.clone()),
            None => run,
        });
        let resumed = run.resolve_resume(&Resume::default()).await.unwrap();
        let manager = CheckpointManager::start(Arc::clone(&run), settings, &resumed).await.unwrap();
        let position = resumed.position();
        Self { trainer, run, manager, rng: Rng::new(5 + position.step), resumed, position }
    }

    async fn steps(&mut self, count: u64) {
        for _ in 0..count {
            self.trainer.supervised_step(&mut self.rng, 1e-3).await.unwrap();
            let step = self.position.step + 1;
            self.position = Position::new(step, 32 * step).with_tokens(100 * step);
            self.manager.step(&self.position).await.unwrap();
        }
    }
}

fn repo(store: impl SnapshotStore, job: &str) -> SnapshotRepo {
    SnapshotRepo::new(Arc::new(store), JobId::new(job).unwrap(), towline_codec::all())
}

async fn listed(repo: &SnapshotRepo) -> Vec<CheckpointInfo> {
    let mut all = repo.list_checkpoints(repo.job()).await.unwrap();
    all.reverse();
    all
}

fn names(infos: &[CheckpointInfo]) -> Vec<(&str, SnapshotKind)> {
    infos.iter().map(|info| (info.name.as_str(), info.kind)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_is_saved_and_a_killed_run_saves_at_the_same_steps() {
    use SnapshotKind::{Base, State};
    let dir = tempfile::tempdir().unwrap();
    let log = CheckpointLog::new(dir.path());
    let repo = repo(Memory::new(), "train");
    let settings = CheckpointSettings::default()
        .with_periodic(Every::steps(4), SaveKind::Both, Some(WEEK))
        .with_rolling(Every::steps(1), Some(Duration::from_secs(7200)))
        .with_output_model_id(ModelId::new("sorter").unwrap());
    let mut first = Loop::start(&repo, Some(&log), settings.clone()).await;
    assert_eq!(first.resumed, Resumed::Fresh);
    first.steps(6).await;
    first.manager.wait().await.unwrap();
    let all = listed(&repo).await;
    // Each rolling state has taken the place of the one before, and a periodic one that of the last before it.
    let wanted =
        [("step-000000", State), ("step-000004", State), ("step-000004", Base), ("rolling-000006", State)];
    assert_eq!(names(&all), wanted);
    let lives = |info: &CheckpointInfo| (info.expires_ms.unwrap() - info.created_ms) / 1000;
    assert!(lives(&all[1]).abs_diff(604_800) < 60 && lives(&all[3]).abs_diff(7200) < 60, "{all:?}");

    // Killed: what another process finds, it goes on from, and it deletes what is then too much.
    drop(first);
    let mut second = Loop::start(&repo, Some(&log), settings).await;
    assert_eq!(second.position, Position::new(6, 192).with_tokens(600));
    second.steps(3).await;
    let finished = second.manager.finish(&second.position).await.unwrap();
    let model = finished.model.unwrap();
    assert_eq!(model.name, "accounts/local/models/sorter");
    let all = listed(&repo).await;
    let kept = [
        ("step-000000", State),
        ("step-000004", State),
        ("step-000004", Base),
        ("step-000008", State),
        ("step-000008", Base),
        ("final", State),
        ("final", Base),
    ];
    assert_eq!(names(&all), kept);
    assert!(all.iter().all(|info| (info.expires_ms.is_none()) == (info.name.as_str() == "final")), "{all:?}");
    assert_eq!(model.source.id, all[6].id);
    let lines = log.read().unwrap().lines;
    let rolling: Vec<_> =
        lines.iter().filter(|line| line.rolling == Some(true)).map(|line| line.name.as_str()).collect();
    assert_eq!(rolling.len(), 7, "{rolling:?}");
    assert_eq!(lines.last().unwrap().name, "final");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_branch_of_a_run_takes_names_of_its_own() {
    let repo = repo(Memory::new(), "train");
    let settings = CheckpointSettings::default().with_periodic(Every::steps(2), SaveKind::State, None);
    let mut first = Loop::start(&repo, None, settings.clone()).await;
    first.steps(4).await;
    first.manager.wait().await.unwrap();
    // Back to step 2, and on from there otherwise.
    let mut branch = Loop::start(&repo, None, settings.clone()).await;
    let back = Resume::default().with_from("step-000002".parse().unwrap());
    let resumed = branch.run.resolve_resume(&back).await.unwrap();
    branch.manager = CheckpointManager::start(Arc::clone(&branch.run), settings, &resumed).await.unwrap();
    branch.position = resumed.position();
    branch.steps(2).await;
    branch.manager.wait().await.unwrap();
    let all = listed(&repo).await;
    let names: Vec<_> = all.iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["step-000000", "step-000002", "step-000004", "step-000004-2"]);
    assert_ne!(all[2].id.digest, all[3].id.digest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_and_time_make_saves_due() {
    let by_tokens = repo(Memory::new(), "tokens");
    let every = Every::tokens(250);
    let settings =
        CheckpointSettings::default().with_first(false).with_periodic(every, SaveKind::State, None);
    let mut tokens = Loop::start(&by_tokens, None, settings.clone()).await;
    tokens.steps(6).await;
    tokens.manager.wait().await.unwrap();
    let all = listed(&by_tokens).await;
    // 250 and 500 are passed at 300 and 500.
    let steps: Vec<_> = all.iter().map(|info| info.name.as_str()).collect();
    assert_eq!(steps, ["step-000003", "step-000005"]);
    let error = tokens.manager.step(&Position::new(7, 0)).await.unwrap_err();
    assert_eq!(error.message(), "step 7 says nothing of its tokens");

    let by_time = repo(Memory::new(), "time");
    let every = Every::time(Duration::from_millis(1));
    let settings =
        CheckpointSettings::default().with_first(false).with_periodic(every, SaveKind::State, None);
    let mut time = Loop::start(&by_time, None, settings).await;
    tokio::time::sleep(Duration::from_millis(2)).await;
    time.steps(1).await;
    time.manager.wait().await.unwrap();
    assert_eq!(listed(&by_time).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_in_the_background_is_the_error_of_a_later_call() {
    let faulty = FaultStore::new(Arc::new(Memory::new()), Plan::default());
    let repo = repo(faulty.clone(), "train");
    let settings = CheckpointSettings::default().with_periodic(Every::steps(1), SaveKind::State, None);
    let mut all = Loop::start(&repo, None, settings).await;
    all.manager.wait().await.unwrap();
    faulty.script(Operation::Put, "manifest.json", vec![Fault::Refuse(ErrorKind::Denied); 3]);
    all.trainer.supervised_step(&mut all.rng, 1e-3).await.unwrap();
    all.manager.step(&Position::new(1, 32)).await.unwrap();
    let error = all.manager.wait().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", error.report());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_failed_is_finished_by_the_same_call_and_nothing_is_saved_twice() {
    let faulty = FaultStore::new(Arc::new(Memory::new()), Plan::default());
    let repo = repo(faulty.clone(), "train");
    let settings = CheckpointSettings::default().with_output_model_id(ModelId::new("sorter").unwrap());
    let mut all = Loop::start(&repo, None, settings).await;
    all.steps(1).await;
    faulty.script(Operation::Put, "towline.json", [Fault::Refuse(ErrorKind::Denied)]);
    let error = all.manager.finish(&all.position).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", error.report());
    let saved = listed(&repo).await;
    let finished = all.manager.finish(&all.position).await.unwrap();
    assert_eq!(finished.model.unwrap().name, "accounts/local/models/sorter");
    assert_eq!(listed(&repo).await.len(), saved.len());
    // Of both kinds, called again: the same answer. At another position: another checkpoint.
    let name = finished.saved.state.clone().unwrap().name;
    let again = all.run.save_checkpoint(&name, SaveKind::Both, &all.position, None).await.unwrap();
    assert_eq!(again, finished.saved);
    let later = Position::new(2, 64);
    let error = all.run.save_checkpoint(&name, SaveKind::Both, &later, None).await.unwrap_err();
    assert_eq!(error.message(), "job train has a state final of another position");
}
