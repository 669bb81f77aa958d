//! What a run of all parameters saves, in every use: `tests/lora.rs` has the same for what a LoRA run saves.
//!
//! | saved | trainer | resume | initialise | promote | load as adapter |
//! |---|---|---|---|---|---|
//! | state | full | bit for bit | bit for bit | refused | refused |
//! | state | LoRA | refused | refused | refused | refused |
//! | base | either | refused | refused | base model | refused |
//! | delta | either | refused | refused | refused; on request its full weights | refused |

mod common;

use std::sync::Arc;

use common::Use;
use towline_cookbook::engine::{LoraConfig, ModelConfig, Rng};
use towline_cookbook::recipes::{DEADLINE, Trainer};
use towline_core::{
    CheckpointCatalog as _, CheckpointRef, CheckpointType, JobId, ModelId, ModelKind, SaveWeights,
    SnapshotIdentity, SnapshotName, SnapshotStore, TrainingClient as _,
};
use towline_storage::{Memory, Promote, SnapshotRepo};
use towline_trainer_client::{PendingExt as _, Position, Run, SaveKind};

fn repo(store: &Arc<dyn SnapshotStore>, job: &str) -> SnapshotRepo {
    SnapshotRepo::new(Arc::clone(store), JobId::new(job).unwrap(), towline_codec::all())
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn run(trainer: &Trainer, repo: &SnapshotRepo) -> Run {
    Run::new(Arc::clone(&trainer.client) as _, Arc::new(repo.clone()), repo.job().clone())
}

async fn save(trainer: &Trainer, text: &str, kind: CheckpointType) {
    let request = SaveWeights::new(name(text)).with_type(kind);
    trainer.client.save_weights_for_sampler_ext(request).wait(DEADLINE).await.unwrap();
}

/// Job `full` with a state, a base and a delta on it; the state has the delta's weights.
async fn shelf(store: &Arc<dyn SnapshotStore>) -> Trainer {
    let repo = repo(store, "full");
    let trainer = Trainer::start(&repo, &ModelConfig::tiny(), 1).await.unwrap();
    save(&trainer, "base-0", CheckpointType::Base).await;
    trainer.supervised_step(&mut Rng::new(5), 1e-2).await.unwrap();
    save(&trainer, "delta-1", CheckpointType::Delta).await;
    let position = Position::new(1, 32);
    run(&trainer, &repo).save_checkpoint(&name("state-1"), SaveKind::State, &position, None).await.unwrap();
    trainer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_goes_where_it_fits_and_is_refused_with_a_reason_elsewhere() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let saved = shelf(&store).await.weights.published_weights().await.unwrap().content_digest();
    let (full, no_state) =
        ("this trainer trains all parameters: it has no LoRA adapter", "wanted a train state");
    let holds_all = "state state-1 holds all parameters; this trainer trains a LoRA adapter";
    let mut cells = 0;
    for (what, is_lora, how, refusal) in [
        ("state-1", false, Use::Resume, None),
        ("state-1", false, Use::Initialise, None),
        ("state-1", false, Use::LoadAsAdapter, Some(full)),
        ("state-1", true, Use::Resume, Some(holds_all)),
        ("state-1", true, Use::Initialise, Some(holds_all)),
        ("state-1", true, Use::LoadAsAdapter, Some("(state): wanted a sampler checkpoint")),
        ("base-0", false, Use::Resume, Some(no_state)),
        ("base-0", false, Use::Initialise, Some(no_state)),
        ("base-0", false, Use::LoadAsAdapter, Some(full)),
        ("base-0", true, Use::Resume, Some(no_state)),
        ("base-0", true, Use::Initialise, Some(no_state)),
        ("base-0", true, Use::LoadAsAdapter, Some("is a base: wanted an adapter")),
        ("delta-1", false, Use::Resume, Some(no_state)),
        ("delta-1", false, Use::Initialise, Some(no_state)),
        ("delta-1", false, Use::LoadAsAdapter, Some(full)),
        ("delta-1", true, Use::Resume, Some(no_state)),
        ("delta-1", true, Use::Initialise, Some(no_state)),
        ("delta-1", true, Use::LoadAsAdapter, Some("is a delta: wanted an adapter")),
    ] {
        cells += 1;
        let own = repo(&store, &format!("cell-{cells}"));
        let config = ModelConfig::tiny();
        let trainer = match is_lora {
            true => Trainer::start_lora(&own, &config, 9, &LoraConfig::new(4)).await.unwrap(),
            false => Trainer::start(&own, &config, 9).await.unwrap(),
        };
        let run = run(&trainer, &own);
        let reference: CheckpointRef = format!("full:{what}").parse().unwrap();
        let outcome = how.of(reference, &trainer, &run).await;
        match refusal {
            None => {
                outcome.unwrap();
                let loaded = trainer.weights.published_weights().await.unwrap().content_digest();
                assert_eq!(loaded, saved, "{what} {how:?}");
            }
            Some(says) => {
                let error = outcome.unwrap_err();
                assert!(error.message().contains(says), "{what} {is_lora} {how:?}: {error}");
                assert!(error.help().is_some(), "{what} {is_lora} {how:?} has no next step");
            }
        }
    }
    assert_eq!(cells, 18);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_is_promoted_a_delta_on_request_and_a_state_never() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let trainer = shelf(&store).await;
    let repo = repo(&store, "full");
    let promote = async |what: &str, to: &str| {
        let (what, to) = (SnapshotIdentity::new(what).unwrap(), ModelId::new(to).unwrap());
        repo.promote_checkpoint(repo.job(), &what, &to).await
    };
    assert_eq!(promote("base-0", "first").await.unwrap().kind, ModelKind::HfBaseModel);
    let error = promote("state-1", "none").await.unwrap_err();
    assert!(error.message().ends_with("is a train state: it can be resumed from, never promoted"), "{error}");
    let error = promote("delta-1", "none").await.unwrap_err();
    assert!(error.message().ends_with("is a delta: only full weights can be promoted"), "{error}");
    let help = error.help().unwrap();
    assert!(help.starts_with("promote its base base-0-") && help.contains("--materialise"), "{help}");
    let materialised = Promote::new(ModelId::new("second").unwrap()).with_materialise(true);
    repo.promote("delta-1", &materialised).await.unwrap();
    let loaded = repo.load_model(&ModelId::new("second").unwrap()).await.unwrap();
    assert_eq!(loaded.weights, trainer.weights.published_weights().await.unwrap());
}
