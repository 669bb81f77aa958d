//! The one scoring function that trainer and server share.

use candle_core::{Device, Tensor};

use super::error::Result;
use super::loss::target_logprobs;
use super::model::Model;

/// The log-probability of each token given the ones before it; the first, which has none before
/// it, is 0.
///
/// One sequence at a time, one full forward pass, no batch, no padding and no cache: the same
/// weights and tokens give the same bits wherever it is called on one machine.
///
/// # Errors
/// When the sequence is empty, too long, or holds an id outside the vocabulary.
pub fn score(model: &Model, tokens: &[u32]) -> Result<Vec<f32>> {
    model.check_tokens(tokens, tokens.len())?;
    let Some((_, targets)) = tokens.split_first() else {
        return Ok(Vec::new());
    };
    let mut scores = vec![0.0];
    if !targets.is_empty() {
        let context = tokens.get(..targets.len()).unwrap_or_default();
        let ids = Tensor::new(context, &Device::Cpu)?.unsqueeze(0)?;
        let targets = Tensor::new(targets, &Device::Cpu)?.unsqueeze(0)?;
        let logprobs = target_logprobs(&model.forward(&ids)?, &targets)?;
        scores.extend(logprobs.detach().flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(scores)
}
