//! The losses of a batch of sequences.
//!
//! Both are **sums** over tokens. Whoever wants a mean divides in the weights or the advantages;
//! so a batch may be split over several calls and the gradients still add up to the same.

use candle_core::{D, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::error::{EngineError, Result};
use super::model::Model;

/// One training sequence. The lists all have one length; position `i` predicts `targets[i]` from
/// `tokens[..=i]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Datum {
    /// What the model reads.
    pub tokens: Vec<u32>,
    /// What it should say next at each position; usually `tokens` shifted by one.
    pub targets: Vec<u32>,
    /// Factor of each position in the cross-entropy; 0 leaves it out. Not read by the policy
    /// gradient.
    pub weights: Vec<f32>,
    /// Log-probability of each target when it was sampled. Read by the policy gradient only.
    pub old_logprobs: Vec<f32>,
    /// Advantage of each target; 0 leaves it out. Read by the policy gradient only.
    pub advantages: Vec<f32>,
}

impl Datum {
    /// A sequence for [`Loss::CrossEntropy`].
    #[must_use]
    pub fn cross_entropy(tokens: Vec<u32>, targets: Vec<u32>, weights: Vec<f32>) -> Self {
        let zeros = vec![0.0; tokens.len()];
        Self { tokens, targets, weights, old_logprobs: zeros.clone(), advantages: zeros }
    }

    /// A sequence for [`Loss::ImportanceSampling`].
    #[must_use]
    pub fn policy(tokens: Vec<u32>, targets: Vec<u32>, old_logprobs: Vec<f32>, advantages: Vec<f32>) -> Self {
        let weights = vec![0.0; tokens.len()];
        Self { tokens, targets, weights, old_logprobs, advantages }
    }

    fn check(&self, model: &Model) -> Result<()> {
        let length = self.tokens.len();
        for (name, other) in [
            ("targets", self.targets.len()),
            ("weights", self.weights.len()),
            ("old_logprobs", self.old_logprobs.len()),
            ("advantages", self.advantages.len()),
        ] {
            if other != length {
                return Err(EngineError::new(format!(
                    "a datum has {length} tokens and {other} {name}, wanted equal lengths"
                )));
            }
        }
        model.check_tokens(&self.tokens, length)?;
        model.check_tokens(&self.targets, length)?;
        let numbers = self.weights.iter().chain(&self.old_logprobs).chain(&self.advantages);
        match numbers.clone().find(|number| !number.is_finite()) {
            Some(number) => Err(EngineError::new(format!("a datum holds {number}, wanted finite"))),
            None => Ok(()),
        }
    }
}

/// Which loss is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Loss {
    /// `-Σ weight · logp`.
    CrossEntropy,
    /// `-Σ exp(logp - old_logp) · advantage`: the policy gradient, corrected for the difference
    /// between the weights that sampled and the weights that are trained.
    ImportanceSampling,
}

/// The loss of a batch.
#[derive(Debug)]
#[non_exhaustive]
pub struct BatchLoss {
    /// The sum over all tokens of all sequences, a scalar that can be differentiated.
    pub loss: Tensor,
    /// Log-probability of each target of each sequence, padding removed.
    pub logprobs: Vec<Vec<f32>>,
}

/// Computes the loss of a batch in one forward pass, shorter sequences padded on the right.
///
/// # Errors
/// When the batch is empty or a datum does not fit the model (lengths, ids, numbers).
pub fn batch_loss(model: &Model, batch: &[Datum], loss: Loss) -> Result<BatchLoss> {
    for datum in batch {
        datum.check(model)?;
    }
    let length = batch.iter().map(|datum| datum.tokens.len()).max().unwrap_or(0);
    if length == 0 {
        return Err(EngineError::new("the batch is empty, wanted at least one datum"));
    }
    let ids = padded(batch, length, |datum| &datum.tokens)?;
    let targets = padded(batch, length, |datum| &datum.targets)?;
    let logprobs = target_logprobs(&model.forward(&ids)?, &targets)?;
    let sum = match loss {
        Loss::CrossEntropy => (&logprobs * padded(batch, length, |datum| &datum.weights)?)?.sum_all()?,
        Loss::ImportanceSampling => {
            let old = padded(batch, length, |datum| &datum.old_logprobs)?;
            let advantages = padded(batch, length, |datum| &datum.advantages)?;
            // A position that does not count must not overflow: infinity times zero is no number.
            let counts = advantages.ne(0f32)?;
            let zeros = logprobs.zeros_like()?;
            let difference = counts.where_cond(&(&logprobs - old)?, &zeros)?;
            (difference.exp()? * advantages)?.sum_all()?
        }
    };
    let rows = logprobs.detach().to_vec2::<f32>()?;
    let logprobs = rows
        .into_iter()
        .zip(batch)
        .map(|(mut row, datum)| {
            row.truncate(datum.tokens.len());
            row
        })
        .collect();
    Ok(BatchLoss { loss: sum.neg()?, logprobs })
}

/// Log-probability of each target: logits `[batch, seq, vocab]` and ids `[batch, seq]` give
/// `[batch, seq]`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn target_logprobs(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let max = logits.detach().max_keepdim(D::Minus1)?;
    let shifted = logits.broadcast_sub(&max)?;
    let total = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let picked = shifted.gather(&targets.unsqueeze(D::Minus1)?, D::Minus1)?;
    Ok((picked - total)?.squeeze(D::Minus1)?)
}

/// One list of every datum as a `[batch, length]` tensor, zeros at the end.
fn padded<T: candle_core::WithDType + Default>(
    batch: &[Datum],
    length: usize,
    list: impl Fn(&Datum) -> &Vec<T>,
) -> Result<Tensor> {
    let mut values = Vec::with_capacity(batch.len() * length);
    for datum in batch {
        let list = list(datum);
        values.extend_from_slice(list);
        values.extend(std::iter::repeat_n(T::default(), length - list.len()));
    }
    Ok(Tensor::from_vec(values, (batch.len(), length), &Device::Cpu)?)
}
