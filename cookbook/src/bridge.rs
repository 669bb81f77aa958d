//! The border between the engine's plain types and Towline's.

use std::sync::Arc;

use bytes::Bytes;
use towline_core::{DType, Error, Result, TensorMeta, TensorSource, Weights};

use crate::adapter::Adapter;
use crate::engine::{self, EngineError, Model, ModelConfig, TensorBytes, WeightDtype};

impl From<EngineError> for Error {
    fn from(error: EngineError) -> Self {
        Self::invalid(error.message())
    }
}

/// Exported tensors as Towline's weights.
///
/// # Errors
/// `Invalid` if a name or length is not well formed.
pub fn weights(tensors: Vec<(String, Vec<usize>, Vec<u8>)>, dtype: WeightDtype) -> Result<Weights> {
    let dtype: DType = dtype.name().parse()?;
    let tensors = tensors
        .into_iter()
        .map(|(name, shape, bytes)| Ok((TensorMeta::new(name, dtype, shape)?, Bytes::from(bytes))));
    Weights::new(tensors.collect::<Result<Vec<_>>>()?)
}

/// Views of weights, for the engine.
pub fn views(weights: &Weights) -> impl Iterator<Item = TensorBytes<'_>> {
    weights
        .iter()
        .map(|(meta, data)| TensorBytes::new(meta.name(), meta.dtype().as_str(), meta.shape(), data))
}

/// The model that a server runs on these published weights. Trainer and server call this same function.
///
/// # Errors
/// `Invalid` if a tensor is missing, unexpected, or of another shape or type than the configuration says.
pub fn model(config: &ModelConfig, weights: &Weights) -> Result<Model> {
    let params = engine::params_from_bytes(config, views(weights))?;
    Ok(Model::new(config, &params)?)
}

/// The model that a server runs on an adapter and its base's published weights: [`engine::fold`], as in the trainer.
///
/// # Errors
/// `Invalid` if a tensor is missing, unexpected, or of another shape or type than the configurations say.
pub fn adapted_model(config: &ModelConfig, base: &Weights, adapter: &Adapter) -> Result<Model> {
    let base = engine::params_from_bytes(config, views(base))?;
    let factors = engine::factors_from_bytes(config, &adapter.lora, adapter.factors())?;
    Ok(Model::new(config, &engine::fold(config, &adapter.lora, &base, &factors)?)?)
}

/// `config.json` as a file of a snapshot.
#[must_use]
pub fn config_file(config: &ModelConfig) -> (String, Bytes) {
    ("config.json".into(), Bytes::from(config.to_json()))
}

/// The tensors of a train state, under their section's name.
///
/// # Errors
/// `Invalid` if a name or length is not well formed.
pub fn state_tensors(
    weights: Vec<(String, Vec<usize>, Vec<u8>)>,
    optimizer: Vec<(String, Vec<usize>, Vec<u8>)>,
) -> Result<Arc<dyn TensorSource>> {
    let named = |prefix: &str, tensors: Vec<(String, Vec<usize>, Vec<u8>)>| -> Vec<_> {
        tensors.into_iter().map(|(name, shape, bytes)| (format!("{prefix}{name}"), shape, bytes)).collect()
    };
    let mut all = named(WEIGHTS, weights);
    all.extend(named(OPTIMIZER, optimizer));
    Ok(Arc::new(self::weights(all, WeightDtype::F32)?))
}

/// The tensors of one section of a train state, with the prefix taken off their names.
pub fn section<'a>(state: &'a Weights, prefix: &'a str) -> impl Iterator<Item = TensorBytes<'a>> {
    views(state).filter_map(move |mut view| {
        view.name = view.name.strip_prefix(prefix)?;
        Some(view)
    })
}

/// The prefix of a state's weights.
pub const WEIGHTS: &str = "weights/";
/// The prefix of a state's optimizer tensors.
pub const OPTIMIZER: &str = "optimizer/";
