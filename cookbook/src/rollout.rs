//! On-policy rollouts from a server, with proof of whose weights answered.

use towline_core::{Datum, Error, Result, SnapshotId};

use crate::client::{Completions, SampleRequest, Sampled};
use crate::engine::task::{DIGITS, Problem, group_advantages};
use crate::engine::{ByteTokenizer, Model, score};

/// How far a sampled log-prob may be from the one that a full forward pass gives: two orders of the same sums.
const LOGPROB_GAP: f64 = 1e-4;

/// What is served, and the trainer's model of it.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    pub(crate) id: SnapshotId,
    pub(crate) model: Model,
}

/// Samples and what they teach.
#[derive(Debug)]
pub(crate) struct Rollout {
    /// A batch for the policy gradient, normalised to a mean.
    pub(crate) data: Vec<Datum>,
    /// The mean reward.
    pub(crate) reward: f64,
    /// The share of exact answers.
    pub(crate) exact: f64,
    /// The largest distance between a sampled log-prob and that of a full forward pass.
    pub(crate) gap: f64,
}

/// `samples` answers to each problem, from exactly the weights of `policy`.
///
/// # Errors
/// `Internal` if other weights answered, or their log-probs are not those of the policy; as the server answers.
pub(crate) async fn collect(
    completions: &Completions,
    policy: &Policy,
    problems: &[Problem],
    samples: usize,
    seed: u64,
) -> Result<Rollout> {
    let prompts = problems.iter().map(Problem::prompt_tokens).collect();
    let answer = completions.sample(&SampleRequest { prompts, n: samples, max_tokens: DIGITS, seed }).await?;
    let (mut data, mut rewards, mut exact, mut gap) = (Vec::new(), Vec::new(), 0, 0f64);
    for (problem, samples) in problems.iter().zip(&answer) {
        let group: Vec<f64> = samples.iter().map(|sample| problem.reward(&sample.tokens)).collect();
        exact += samples.iter().filter(|sample| problem.is_exact(&sample.tokens)).count();
        for (sample, advantage) in samples.iter().zip(group_advantages(&group)) {
            data.push(problem.policy(&sample.tokens, &sample.logprobs, advantage));
        }
        if let Some(sample) = samples.first() {
            if sample.snapshot != policy.id.identity.as_str() {
                return Err(Error::internal(format!(
                    "wanted samples of {}, {} answered",
                    policy.id, sample.snapshot
                )));
            }
            gap = gap.max(logprob_gap(&policy.model, &problem.prompt_tokens(), sample)?);
        }
        rewards.extend(group);
    }
    if gap > LOGPROB_GAP {
        return Err(Error::internal(format!(
            "sampled log-probs are off by {gap:e}, at most {LOGPROB_GAP:e} is allowed"
        )));
    }
    let count = (problems.len() * samples) as f32;
    for datum in &mut data {
        datum.advantages.iter_mut().for_each(|advantage| *advantage /= count);
    }
    let reward = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
    Ok(Rollout { data, reward, exact: exact as f64 / f64::from(count), gap })
}

/// Checks that the server's log-probs are those of the policy, bit for bit.
///
/// # Errors
/// `Internal` if they are not; as [`Completions::score`].
pub(crate) async fn check_served(completions: &Completions, policy: &Policy) -> Result<()> {
    for prompt in ["3141>1134", "9876>6789", "0000>0000"] {
        let tokens = ByteTokenizer.encode(prompt);
        let ours = score(&policy.model, &tokens)?;
        let theirs = completions.score(&tokens, &policy.id).await?;
        let bits = |scores: &[f32]| scores.iter().map(|score| score.to_bits()).collect::<Vec<_>>();
        if bits(&ours) != bits(&theirs) {
            return Err(Error::internal(format!(
                "{}: the server's log-probs of `{prompt}` are {theirs:?}, the trainer's {ours:?}",
                policy.id
            )));
        }
    }
    Ok(())
}

fn logprob_gap(model: &Model, prompt: &[u32], sample: &Sampled) -> Result<f64> {
    let tokens = [prompt, &sample.tokens].concat();
    let scores = score(model, &tokens)?;
    let gaps = scores.iter().skip(prompt.len()).zip(&sample.logprobs);
    Ok(gaps.map(|(ours, theirs)| f64::from((ours - theirs).abs())).fold(0.0, f64::max))
}
