//! The resume oracle, through client, repo and store: with the optimizer bit for bit, without it not.

use std::sync::Arc;

use towline_cookbook::engine::{ModelConfig, Rng};
use towline_cookbook::recipes::{DEADLINE, Trainer};
use towline_core::{ContentDigest, JobId, SaveState, SnapshotName, StateRef, TrainingClient};
use towline_storage::SnapshotRepo;
use towline_trainer_client::PendingExt;

const BEFORE: u64 = 5;
const AFTER: u64 = 5;

async fn go_on(trainer: &Trainer, mut rng: Rng) -> (ContentDigest, f64) {
    let mut loss = 0.0;
    for _ in 0..AFTER {
        loss = trainer.supervised_step(&mut rng, 1e-3).await.unwrap();
    }
    (trainer.weights.published_weights().await.unwrap().content_digest(), loss)
}

async fn resumed(
    repo: &SnapshotRepo,
    state: &StateRef,
    rng: &Rng,
    with_optimizer: bool,
) -> (ContentDigest, f64) {
    let trainer = Trainer::start(repo, &ModelConfig::tiny(), 77).await.unwrap();
    let loaded = if with_optimizer {
        trainer.client.load_state_with_optimizer(state)
    } else {
        trainer.client.load_state(state)
    };
    loaded.wait(DEADLINE).await.unwrap();
    let end = go_on(&trainer, rng.clone()).await;
    trainer.client.close().await.unwrap();
    end
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uninterrupted_equals_resumed_with_the_optimizer_and_differs_from_weights_only() {
    let store = Arc::new(towline_storage::Memory::new());
    let repo = SnapshotRepo::new(store, JobId::new("resume").unwrap(), towline_codec::all());
    let trainer = Trainer::start(&repo, &ModelConfig::tiny(), 1).await.unwrap();
    let mut rng = Rng::new(5);
    for _ in 0..BEFORE {
        trainer.supervised_step(&mut rng, 1e-3).await.unwrap();
    }
    let request = SaveState::new(SnapshotName::new("half").unwrap());
    let state = trainer.client.save_state(request).wait(DEADLINE).await.unwrap();
    assert_eq!(state.step, BEFORE);
    let uninterrupted = go_on(&trainer, rng.clone()).await;
    trainer.client.close().await.unwrap();

    assert_eq!(resumed(&repo, &state, &rng, true).await, uninterrupted, "with the optimizer: bit for bit");
    let weights_only = resumed(&repo, &state, &rng, false).await;
    assert_ne!(weights_only, uninterrupted, "weights only: a cold optimizer goes another way");
    println!("uninterrupted {uninterrupted:?}, weights only {weights_only:?}");
}
