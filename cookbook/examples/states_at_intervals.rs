//! States at intervals, beside syncs: a second client resumes from the newest one, bit for bit.
//!
//! cargo run -p towline-cookbook --example states_at_intervals

use std::sync::Arc;
use std::time::Duration;

use towline_cookbook::embedded::loop_state;
use towline_cookbook::engine::{ModelConfig, Rng};
use towline_cookbook::recipes::{DEADLINE, Stack, Trainer};
use towline_core::{Error, Result, SaveState, SnapshotName, StateRef, TrainingClient};
use towline_trainer_client::PendingExt;

const STATE_EVERY: u64 = 4;

#[tokio::main]
async fn main() -> Result<()> {
    let stack = Stack::start(Arc::new(towline_storage::Memory::new()), "states").await?;
    let syncer = stack.syncer()?;
    let mut rng = Rng::new(1);
    let mut newest = None;

    for step in 0..10u64 {
        if step % STATE_EVERY == 0 {
            // Submitted now, awaited later: the save has its place in the order when the call returns.
            let request = SaveState::new(SnapshotName::new(format!("state-{step:05}"))?)
                .with_ttl(Duration::from_secs(7 * 24 * 3600))
                .with_entry("step", step)
                .with_entry("rng", rng.state().to_vec());
            newest = Some(stack.trainer.client.save_state(request).wait(DEADLINE).await?);
            syncer.save_and_hotload(SnapshotName::new(format!("step-{step:05}"))?, None).await?;
        }
        stack.trainer.supervised_step(&mut rng, 1e-3).await?;
    }
    let expected = stack.trainer.weights.published_weights().await?.content_digest();
    stack.trainer.client.close().await?;

    let state: StateRef = newest.ok_or_else(|| Error::internal("no state was saved"))?;
    let entries = loop_state(&stack.repo, &state).await?;
    println!("resuming from {} at {}, saved entries {:?}", state.name, state.path, entries.keys());
    let resumed = Trainer::start(&stack.repo, &ModelConfig::tiny(), 99).await?;
    resumed.client.load_state_with_optimizer(&state).wait(DEADLINE).await?;
    let words: Vec<u64> = serde_json::from_value(entries["rng"].clone()).unwrap_or_default();
    let mut rng = Rng::from_state(words.try_into().map_err(|_| Error::corrupt("the RNG has four words"))?)?;
    for _ in state.step..10 {
        resumed.supervised_step(&mut rng, 1e-3).await?;
    }
    let found = resumed.weights.published_weights().await?.content_digest();
    assert_eq!(found, expected, "the resumed run must end as the undisturbed one");
    println!("steps {} to 10 repeated bit for bit: {found}", state.step);
    resumed.client.close().await
}
