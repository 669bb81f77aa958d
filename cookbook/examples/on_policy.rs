//! On-policy: a sync after every optimizer step, so that each rollout comes from the newest weights.
//!
//! cargo run -p towline-cookbook --example on_policy

use std::sync::Arc;

use towline_cookbook::client::{Completions, SampleRequest};
use towline_cookbook::engine::task::{DIGITS, Problem, group_advantages};
use towline_cookbook::engine::{ByteTokenizer, Rng};
use towline_cookbook::recipes::{DEADLINE, Stack};
use towline_core::{AdamParams, Batch, Loss, Result, SnapshotName, TrainingClient};
use towline_trainer_client::PendingExt;

#[tokio::main]
async fn main() -> Result<()> {
    let stack = Stack::start(Arc::new(towline_storage::Memory::new()), "on-policy").await?;
    let syncer = stack.syncer()?;
    let completions = Completions::new(&stack.server.url())?;
    let mut rng = Rng::new(1);

    for _ in 0..60 {
        stack.trainer.supervised_step(&mut rng, 3e-3).await?;
    }
    let mut receipt = syncer.save_and_hotload(SnapshotName::new("step-00000")?, None).await?;
    println!("step 0: {} ({}), {} bytes", receipt.snapshot.kind, receipt.reason, receipt.stored_bytes);

    for step in 1..=5 {
        // Sample from the server that runs the weights of the step before.
        let problems: Vec<Problem> = (0..8).map(|_| Problem::random(&mut rng)).collect();
        let prompts = problems.iter().map(Problem::prompt_tokens).collect();
        let request = SampleRequest { prompts, n: 4, max_tokens: DIGITS, seed: step };
        let answers = completions.sample(&request).await?;

        // Learn from the group-normalised rewards.
        let (mut data, mut total) = (Vec::new(), 0.0);
        for (problem, samples) in problems.iter().zip(&answers) {
            let rewards: Vec<f64> = samples.iter().map(|sample| problem.reward(&sample.tokens)).collect();
            total += rewards.iter().sum::<f64>();
            for (sample, advantage) in samples.iter().zip(group_advantages(&rewards)) {
                assert_eq!(
                    sample.snapshot,
                    receipt.snapshot.id.identity.as_str(),
                    "an answer of other weights"
                );
                data.push(problem.policy(&sample.tokens, &sample.logprobs, advantage / 32.0));
            }
        }
        let client = Arc::clone(&stack.trainer.client);
        client.forward_backward(Batch::new(data, Loss::ImportanceSampling)).wait(DEADLINE).await?;
        client.optim_step(AdamParams::new(1e-4)).wait(DEADLINE).await?;

        // Save the difference and put it on the server.
        receipt = syncer.save_and_hotload(SnapshotName::new(format!("step-{step:05}"))?, None).await?;
        println!(
            "step {step}: {} of {:.2} % ({:.2} % of the elements changed), fresh after {:.0} ms, reward {:.3}",
            receipt.snapshot.kind,
            100.0 * receipt.ratio,
            100.0 * receipt.changed_share.unwrap_or(1.0),
            1e3 * receipt.time_to_fresh_s,
            total / 32.0,
        );
        assert_eq!(receipt.snapshot.kind, towline_core::SnapshotKind::Delta);
    }
    let scored = completions.score(&ByteTokenizer.encode("3141>1134"), &receipt.snapshot.id).await?;
    println!("log-prob of 1134 for 3141: {:.3}", scored[5..].iter().sum::<f32>());
    stack.trainer.client.close().await
}
