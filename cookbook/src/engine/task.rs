//! The quickstart's task: put four digits in ascending order.
//!
//! Supervised training shows ascending and descending answers half and half, so the model ends up
//! undecided; reinforcement learning rewards the ascending one. The reward can be verified and
//! visibly rises.

use super::rng::Rng;
use super::sample::Sample;
use super::tokenizer::ByteTokenizer;
use towline_core::Datum;

/// Digits in a problem, and tokens in an answer.
pub const DIGITS: usize = 4;

/// One problem: four digits, repetitions allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    digits: [u8; DIGITS],
}

impl Problem {
    /// A random problem, every digit equally likely.
    pub fn random(rng: &mut Rng) -> Self {
        let digits = std::array::from_fn(|_| u8::try_from(rng.below(10)).unwrap_or_default());
        Self { digits }
    }

    /// The prompt, such as `3142>`.
    #[must_use]
    pub fn prompt(&self) -> String {
        let digits: String = self.digits.iter().map(|&digit| char::from(b'0' + digit)).collect();
        format!("{digits}>")
    }

    /// The prompt as ids.
    #[must_use]
    pub fn prompt_tokens(&self) -> Vec<u32> {
        ByteTokenizer.encode(&self.prompt())
    }

    /// The right answer as ids: the digits in ascending order.
    #[must_use]
    pub fn ascending(&self) -> Vec<u32> {
        let mut digits = self.digits;
        digits.sort_unstable();
        digits.iter().map(|&digit| u32::from(b'0' + digit)).collect()
    }

    /// The digits in descending order.
    #[must_use]
    pub fn descending(&self) -> Vec<u32> {
        self.ascending().into_iter().rev().collect()
    }

    /// The share of positions at which the answer is the ascending order, 0 to 1.
    #[must_use]
    pub fn reward(&self, answer: &[u32]) -> f64 {
        let right = self.ascending().iter().zip(answer).filter(|(a, b)| a == b).count();
        right as f64 / DIGITS as f64
    }

    /// Whether the answer is exactly the ascending order.
    #[must_use]
    pub fn is_exact(&self, answer: &[u32]) -> bool {
        self.ascending() == answer
    }

    /// The sequence for training on an answer with the cross-entropy; every token of the answer
    /// has this weight, the prompt none.
    #[must_use]
    pub fn supervised(&self, answer: &[u32], weight: f32) -> Datum {
        let (tokens, targets) = self.sequence(answer);
        let weights = on_answer(tokens.len(), std::iter::repeat_n(weight, answer.len()));
        Datum::supervised(tokens, targets, weights)
    }

    /// The sequence for training on a sampled answer with the policy gradient; every token of the
    /// answer has this advantage.
    #[must_use]
    pub fn policy(&self, tokens: &[u32], logprobs: &[f32], advantage: f64) -> Datum {
        let (inputs, targets) = self.sequence(tokens);
        let old = on_answer(inputs.len(), logprobs.iter().copied());
        let advantages =
            on_answer(inputs.len(), std::iter::repeat_n(super::init::narrow(advantage), tokens.len()));
        Datum::sampled(inputs, targets, old, advantages)
    }

    fn sequence(&self, answer: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let mut inputs = self.prompt_tokens();
        inputs.extend_from_slice(answer);
        let targets = inputs.get(1..).unwrap_or_default().to_vec();
        inputs.pop();
        (inputs, targets)
    }
}

/// A supervised batch: random problems, each answered in ascending or descending order with equal
/// chance. The weights make the loss the mean over the answers' tokens.
pub fn supervised_batch(rng: &mut Rng, size: usize) -> Vec<Datum> {
    let weight = 1.0 / (size.max(1) * DIGITS) as f32;
    (0..size)
        .map(|_| {
            let problem = Problem::random(rng);
            let answer = if rng.below(2) == 0 { problem.ascending() } else { problem.descending() };
            problem.supervised(&answer, weight)
        })
        .collect()
}

/// A policy-gradient batch from sampled groups: each answer's advantage is its reward, normalised
/// within its group, and divided by the tokens of the whole batch so that the loss is a mean.
/// Groups whose rewards are all equal teach nothing and are left out; the batch may be empty.
#[must_use]
pub fn policy_batch(problems: &[Problem], groups: &[Vec<Sample>]) -> Vec<Datum> {
    let samples: usize = groups.iter().map(Vec::len).sum();
    let share = 1.0 / (samples.max(1) * DIGITS) as f64;
    let mut batch = Vec::new();
    for (problem, group) in problems.iter().zip(groups) {
        let rewards: Vec<f64> = group.iter().map(|sample| problem.reward(&sample.tokens)).collect();
        let advantages = group_advantages(&rewards);
        if advantages.iter().all(|&advantage| advantage == 0.0) {
            continue;
        }
        for (sample, advantage) in group.iter().zip(advantages) {
            let advantage = advantage * share;
            batch.push(problem.policy(&sample.tokens, &sample.logprobs, advantage));
        }
    }
    batch
}

/// Rewards minus their mean, over their deviation; all 0 when the rewards are all equal.
#[must_use]
pub fn group_advantages(rewards: &[f64]) -> Vec<f64> {
    let count = rewards.len().max(1) as f64;
    let mean = rewards.iter().sum::<f64>() / count;
    let variance = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f64>() / count;
    let deviation = variance.sqrt();
    rewards.iter().map(|reward| if deviation < 1e-9 { 0.0 } else { (reward - mean) / deviation }).collect()
}

/// Values for the last positions of a sequence, zeros before them.
fn on_answer(length: usize, values: impl ExactSizeIterator<Item = f32>) -> Vec<f32> {
    let prompt = length.saturating_sub(values.len());
    std::iter::repeat_n(0.0, prompt).chain(values).take(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_count_positions() {
        let problem = Problem { digits: [3, 1, 4, 1] };
        assert_eq!(problem.prompt(), "3141>");
        let answer = |text: &str| ByteTokenizer.encode(text);
        assert_eq!(problem.ascending(), answer("1134"));
        assert_eq!(problem.descending(), answer("4311"));
        for (text, reward) in [("1134", 1.0), ("4311", 0.0), ("1143", 0.5), ("11", 0.5), ("", 0.0)] {
            assert_eq!(problem.reward(&answer(text)), reward, "{text}");
        }
        assert!(problem.is_exact(&answer("1134")) && !problem.is_exact(&answer("11345")));
    }

    #[test]
    fn only_the_answer_is_trained() {
        let problem = Problem { digits: [3, 1, 4, 2] };
        let datum = problem.supervised(&problem.ascending(), 0.25);
        assert_eq!(datum.tokens, ByteTokenizer.encode("3142>123"));
        assert_eq!(datum.targets, ByteTokenizer.encode("142>1234"));
        assert_eq!(datum.weights, [0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25]);
        let datum = problem.policy(&problem.ascending(), &[-1.0, -2.0, -3.0, -4.0], 0.5);
        assert_eq!(datum.logprobs, [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0]);
        assert_eq!(datum.advantages, [0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]);
    }

    #[test]
    fn advantages_are_normalised_in_their_group() {
        assert_eq!(group_advantages(&[0.5, 0.5]), [0.0, 0.0]);
        assert_eq!(group_advantages(&[0.0, 1.0]), [-1.0, 1.0]);
        assert!(group_advantages(&[]).is_empty());
    }

    #[test]
    fn the_mix_is_half_and_half() {
        let batch = supervised_batch(&mut Rng::new(1), 2000);
        let ascending = batch.iter().filter(|datum| datum.targets[4] < datum.targets[7]).count();
        assert!((880..1120).contains(&ascending), "{ascending}");
        assert!(batch.iter().map(|datum| datum.weights.iter().sum::<f32>()).sum::<f32>() > 0.999);
    }
}
