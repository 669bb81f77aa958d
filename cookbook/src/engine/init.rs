//! Seeded initial weights.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::error::{EngineError, Result};
use super::model::expected_tensors;
use super::rng::Rng;

/// The most parameters that are made from nothing; more would fill the memory by a typing error.
const MAX_PARAMETERS: u64 = 2_000_000_000;

/// Initial 32-bit parameters: normal with the configuration's `initializer_range`, ones for the
/// norms. Every tensor draws from a generator of its own, derived from the seed and its name.
///
/// # Errors
/// When the configuration is not valid or has more than two thousand million parameters.
pub fn initial_params(config: &ModelConfig, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    config.validate()?;
    let parameters = config.parameters();
    if parameters > MAX_PARAMETERS {
        return Err(EngineError::new(format!(
            "the model has {parameters} parameters, at most {MAX_PARAMETERS} are initialised"
        )));
    }
    expected_tensors(config)
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let values = if shape.len() == 1 {
                vec![1.0; count]
            } else {
                let mut rng = Rng::named(seed, &name);
                (0..count).map(|_| narrow(rng.normal() * config.initializer_range)).collect()
            };
            Ok((name, Tensor::from_vec(values, shape, &Device::Cpu)?))
        })
        .collect()
}

/// The nearest 32-bit value.
#[expect(clippy::cast_possible_truncation, reason = "rounding to 32 bits is what is wanted")]
pub(super) fn narrow(value: f64) -> f32 {
    value as f32
}
