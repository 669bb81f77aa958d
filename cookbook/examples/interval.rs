//! Interval: a sync every N steps, step 0 included, counted by the absolute step.
//!
//! cargo run -p towline-cookbook --example interval

use std::sync::Arc;

use towline_cookbook::engine::Rng;
use towline_cookbook::recipes::Stack;
use towline_core::{Result, SnapshotKind, SnapshotName};

const SYNC_EVERY: u64 = 5;

#[tokio::main]
async fn main() -> Result<()> {
    let stack = Stack::start(Arc::new(towline_storage::Memory::new()), "interval").await?;
    let syncer = stack.syncer()?;
    let mut rng = Rng::new(1);
    let mut kinds = Vec::new();

    for step in 0..20 {
        if step % SYNC_EVERY == 0 {
            let receipt =
                syncer.save_and_hotload(SnapshotName::new(format!("step-{step:05}"))?, None).await?;
            println!(
                "step {step}: {} because {}, ratio {:.3}",
                receipt.snapshot.kind, receipt.reason, receipt.ratio
            );
            kinds.push(receipt.snapshot.kind);
        }
        stack.trainer.supervised_step(&mut rng, 1e-3).await?;
    }

    assert_eq!(kinds, [SnapshotKind::Base, SnapshotKind::Delta, SnapshotKind::Delta, SnapshotKind::Delta]);
    let served = syncer.check_deployment_state().await?;
    println!("the server runs {}", served.map_or("nothing".into(), |identity| identity.to_string()));
    stack.trainer.client.close().await
}
