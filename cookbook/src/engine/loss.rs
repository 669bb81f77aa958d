//! The losses of a batch of sequences.
//!
//! Both are **sums** over tokens. Whoever wants a mean divides in the weights or the advantages;
//! so a batch may be split over several calls and the gradients still add up to the same.

use candle_core::{D, Device, Tensor};
use towline_core::{Datum, Loss};

use super::error::{EngineError, Result};
use super::model::Model;

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
        check(model, datum, loss)?;
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
            let old = padded(batch, length, |datum| &datum.logprobs)?;
            let advantages = padded(batch, length, |datum| &datum.advantages)?;
            // A position that does not count must not overflow: infinity times zero is no number.
            let counts = advantages.ne(0f32)?;
            let zeros = logprobs.zeros_like()?;
            let difference = counts.where_cond(&(&logprobs - old)?, &zeros)?;
            (difference.exp()? * advantages)?.sum_all()?
        }
        _ => return Err(EngineError::new(format!("the embedded trainer has no loss {loss:?}"))),
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

fn check(model: &Model, datum: &Datum, loss: Loss) -> Result<()> {
    datum.check(loss).map_err(|error| EngineError::new(error.message()))?;
    model.check_tokens(&datum.tokens, datum.tokens.len())?;
    model.check_tokens(&datum.targets, datum.tokens.len())?;
    let mut numbers = datum.weights.iter().chain(&datum.logprobs).chain(&datum.advantages);
    match numbers.find(|number| !number.is_finite()) {
        Some(number) => Err(EngineError::new(format!("a datum holds {number}, wanted finite"))),
        None => Ok(()),
    }
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
