//! Split: save first, wait until the server takes hot-loads, then load; and what happens to a stale delta.
//!
//! cargo run -p towline-cookbook --example split_save_and_sync

use std::sync::Arc;
use std::time::Duration;

use towline_cookbook::engine::Rng;
use towline_cookbook::recipes::Stack;
use towline_core::{CheckpointType, ErrorKind, Result, SnapshotName};

#[tokio::main]
async fn main() -> Result<()> {
    let stack = Stack::start(Arc::new(towline_storage::Memory::new()), "split").await?;
    let syncer = stack.syncer()?;
    let mut rng = Rng::new(1);

    // A resumed run publishes its weights as a base before anything is sampled.
    let base = syncer.save_only(SnapshotName::new("resume-step-0")?, Some(CheckpointType::Base)).await?;
    println!(
        "saved {} ({} bytes), served: {:?}",
        base.id,
        base.stored_bytes,
        syncer.check_deployment_state().await?
    );
    syncer.wait_for_hotload_ready_for(Duration::from_secs(30), Duration::from_millis(50)).await?;
    let receipt = syncer.hotload(&base, CheckpointType::Base).await?;
    println!("loaded {} in {:.1} ms", receipt.snapshot.id, 1e3 * receipt.load_s);

    // Two deltas on the same parent: only one of them can be the next.
    stack.trainer.supervised_step(&mut rng, 1e-3).await?;
    let first = syncer.save_only(SnapshotName::new("step-00001")?, None).await?;
    stack.trainer.supervised_step(&mut rng, 1e-3).await?;
    let second = syncer.save_only(SnapshotName::new("step-00002")?, None).await?;
    syncer.hotload(&second, CheckpointType::Delta).await?;
    let refused = syncer.hotload(&first, CheckpointType::Delta).await;
    match refused {
        Err(error) if error.kind() == ErrorKind::ChainMismatch => println!("refused, as it must be: {error}"),
        other => panic!("wanted a chain mismatch, found {other:?}"),
    }
    let served = syncer.check_deployment_state().await?;
    assert_eq!(served, Some(second.id.identity.clone()));
    println!("still served: {}", second.id);
    stack.trainer.client.close().await
}
