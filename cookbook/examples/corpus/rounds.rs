//! What one training step learns from: sampled answers with a reward that can be checked, or text.

use clap::ValueEnum;
use towline_cookbook::engine::task::group_advantages;
use towline_cookbook::engine::{Datum, LocalTrainer, Loss, Rng, SampleParams, WeightDtype, sample_batch};

use crate::Result;
use crate::words::Words;

/// Questions in a step, answers to each, and tokens of an answer.
const QUESTIONS: usize = 4;
const ANSWERS: usize = 4;
const ANSWER_TOKENS: usize = 6;
/// Shows the model what is asked for.
const EXAMPLES: &str = "11 + 2 = 13\n14 + 3 = 17\n25 + 4 = 29\n";
/// How often other questions are drawn when all answers to each got the same reward, which teaches nothing.
const DRAWS: u64 = 8;
/// Sequences of a supervised step, and tokens of each.
const SEQUENCES: usize = 4;
const SEQUENCE_TOKENS: usize = 64;
const SEED: u64 = 1;

/// How the model is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Policy gradient on sampled answers
    Rl,
    /// Cross-entropy on text
    Sft,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rl => "rl",
            Self::Sft => "sft",
        }
    }
}

/// The data of a trajectory.
pub(crate) struct Rounds {
    kind: Kind,
    words: Words,
    text: Vec<u32>,
}

/// A sum to work out.
struct Sum {
    left: u64,
    right: u64,
}

impl Rounds {
    pub(crate) fn new(kind: Kind, words: Words, text: &str) -> Result<Self> {
        let text = words.encode(text);
        if text.len() <= SEQUENCE_TOKENS {
            return Err(
                format!("the text has {} tokens, wanted more than {SEQUENCE_TOKENS}", text.len()).into()
            );
        }
        Ok(Self { kind, words, text })
    }

    /// Computes the gradients of a step, counted from 1. Returns what to say about it.
    pub(crate) fn gradients(&mut self, trainer: &mut LocalTrainer, step: u64) -> Result<String> {
        match self.kind {
            Kind::Sft => {
                let loss = trainer.forward_backward(&self.supervised(step), Loss::CrossEntropy)?.loss;
                Ok(format!("loss {loss:.3}"))
            }
            Kind::Rl => {
                let (batch, reward) = self.policy(trainer, step)?;
                trainer.forward_backward(&batch, Loss::ImportanceSampling)?;
                Ok(format!("reward {reward:.3}, {} answers taught", batch.len()))
            }
        }
    }

    /// The next stretches of the text, from its beginning again when it ends; the loss is the mean of a token.
    fn supervised(&self, step: u64) -> Vec<Datum> {
        let places = (self.text.len() - 1) / SEQUENCE_TOKENS;
        let weight = 1.0 / (SEQUENCES * SEQUENCE_TOKENS) as f32;
        let first = (step as usize - 1) * SEQUENCES;
        (first..first + SEQUENCES)
            .map(|number| {
                let start = number % places * SEQUENCE_TOKENS;
                let tokens = self.text[start..start + SEQUENCE_TOKENS].to_vec();
                let targets = self.text[start + 1..=start + SEQUENCE_TOKENS].to_vec();
                Datum::supervised(tokens, targets, vec![weight; SEQUENCE_TOKENS])
            })
            .collect()
    }

    /// Answers sampled from the weights as a server has them, in bfloat16, with advantages normalised in their group,
    /// divided by all tokens; and the mean reward.
    fn policy(&self, trainer: &LocalTrainer, step: u64) -> Result<(Vec<Datum>, f64)> {
        let served = trainer.published_model(WeightDtype::Bf16)?;
        let end = self.words.encode("\n");
        for draw in 0..DRAWS {
            let mut rng = Rng::derived(SEED, &[step, draw]);
            let sums: Vec<Sum> = (0..QUESTIONS).map(|_| Sum::random(&mut rng)).collect();
            let prompts: Vec<Vec<u32>> = sums.iter().map(|sum| self.words.encode(&sum.prompt())).collect();
            let params = SampleParams::new(ANSWER_TOKENS).with_seed(rng.next_u64()).with_stop(end.clone());
            let groups = sample_batch(&served, &prompts, ANSWERS, &params)?;
            let tokens: usize = groups.iter().flatten().map(|sample| sample.tokens.len()).sum();
            let (mut batch, mut total) = (Vec::new(), 0.0);
            for ((sum, prompt), group) in sums.iter().zip(&prompts).zip(&groups) {
                let rewards: Vec<f64> =
                    group.iter().map(|sample| sum.reward(&self.words.decode(&sample.tokens))).collect();
                total += rewards.iter().sum::<f64>();
                for (sample, advantage) in group.iter().zip(group_advantages(&rewards)) {
                    if advantage != 0.0 {
                        let advantage = (advantage / tokens as f64) as f32;
                        batch.push(answer(prompt, &sample.tokens, &sample.logprobs, advantage));
                    }
                }
            }
            if !batch.is_empty() {
                return Ok((batch, total / (QUESTIONS * ANSWERS) as f64));
            }
        }
        Err(format!("{DRAWS} draws of questions gave equal rewards: nothing to learn from").into())
    }
}

impl Sum {
    fn random(rng: &mut Rng) -> Self {
        Self { left: 10 + rng.below(20), right: 2 + rng.below(8) }
    }

    fn prompt(&self) -> String {
        format!("{EXAMPLES}{} + {} =", self.left, self.right)
    }

    /// 1 if the first number of the answer is the sum, else 0.
    fn reward(&self, answer: &str) -> f64 {
        let first = answer.split(|sign: char| !sign.is_ascii_digit()).find(|digits| !digits.is_empty());
        let right = first.and_then(|digits| digits.parse().ok()) == Some(self.left + self.right);
        if right { 1.0 } else { 0.0 }
    }
}

/// A sampled answer for the policy gradient: the prompt's tokens have no advantage.
fn answer(prompt: &[u32], sampled: &[u32], logprobs: &[f32], advantage: f32) -> Datum {
    let mut tokens = [prompt, sampled].concat();
    let targets = tokens[1..].to_vec();
    tokens.pop();
    let zeros = vec![0.0; tokens.len() - sampled.len()];
    let advantages = [zeros.as_slice(), &vec![advantage; sampled.len()]].concat();
    Datum::sampled(tokens, targets, [zeros.as_slice(), logprobs].concat(), advantages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_counts() {
        let sum = Sum { left: 7, right: 5 };
        for (text, reward) in
            [(" 12\n", 1.0), (" 12 13", 1.0), ("13 12", 0.0), (" twelve", 0.0), ("", 0.0), ("112", 0.0)]
        {
            assert_eq!(sum.reward(text), reward, "{text}");
        }
        assert!(sum.prompt().ends_with("\n7 + 5 ="));
    }

    #[test]
    fn only_the_answer_has_an_advantage() {
        let datum = answer(&[1, 2, 3], &[4, 5], &[-1.0, -2.0], 0.5);
        assert_eq!(datum.tokens, [1, 2, 3, 4]);
        assert_eq!(datum.targets, [2, 3, 4, 5]);
        assert_eq!(datum.logprobs, [0.0, 0.0, -1.0, -2.0]);
        assert_eq!(datum.advantages, [0.0, 0.0, 0.5, 0.5]);
        datum.check(Loss::ImportanceSampling).unwrap();
    }

    #[test]
    fn the_text_is_read_on_and_again() {
        let words = Words::new(&["a".to_owned(), "b".to_owned()], &[1, 1]).unwrap();
        let text = "ab".repeat(SEQUENCE_TOKENS * 3) + "b";
        let rounds = Rounds::new(Kind::Sft, words, &text).unwrap();
        let (one, two) = (rounds.supervised(1), rounds.supervised(2));
        assert_eq!(one.len(), SEQUENCES);
        assert_eq!(one[0].targets[..2], [1, 0]);
        // Six stretches: the second step has the last two of them and the first two.
        assert_eq!(two[1].targets.last(), Some(&1));
        assert_eq!(two[2], one[0]);
        let weights: f32 = one.iter().flat_map(|datum| &datum.weights).sum();
        assert!((weights - 1.0).abs() < 1e-5);
    }
}
