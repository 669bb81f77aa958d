//! The local trainer: a model of variables, their gradients and their optimizer.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};

use towline_core::{AdamParams, Datum, Loss};

use super::adamw::AdamW;
use super::config::ModelConfig;
use super::dtype::{NamedBytes, TensorBytes, WeightDtype, params_from_bytes, tensors_from_bytes};
use super::error::{EngineError, Result};
use super::init::initial_params;
use super::lora::{LoraConfig, expected_factors, factors_from_bytes, fold, initial_factors};
use super::loss::batch_loss;
use super::model::{Model, expected_tensors};

/// The most logits that one forward pass computes; longer batches are split. It bounds the memory
/// (a few copies of 256 MiB) for models with a large vocabulary.
const MAX_LOGITS: usize = 1 << 26;

/// What a forward and backward pass returns.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Output {
    /// The loss, a sum over all tokens.
    pub loss: f64,
    /// Log-probability of each target of each datum, before the next step.
    pub logprobs: Vec<Vec<f32>>,
}

/// What an optimizer step returns.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepOutput {
    /// Steps taken, this one included.
    pub step: u64,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
}

/// Trains a model in this process: all its parameters, or the factors of a LoRA adapter beside frozen base weights.
/// Deterministic: equal starts and equal calls give equal bits.
#[derive(Debug)]
pub struct LocalTrainer {
    config: ModelConfig,
    /// What a LoRA adapter is trained beside; `None` if all parameters are trained.
    frozen: Option<Frozen>,
    vars: BTreeMap<String, Var>,
    /// Built on the variables, so it sees every update of them; with an adapter, on the folded weights, which are
    /// computed anew after every update.
    model: Model,
    optimizer: AdamW,
    /// Sums since the last step.
    gradients: BTreeMap<String, Tensor>,
}

/// The frozen side of a LoRA adapter.
#[derive(Debug)]
struct Frozen {
    lora: LoraConfig,
    base: BTreeMap<String, Tensor>,
}

impl LocalTrainer {
    /// A trainer of freshly initialised weights.
    ///
    /// # Errors
    /// When the configuration is not valid.
    pub fn new(config: &ModelConfig, seed: u64) -> Result<Self> {
        Self::from_params(config, initial_params(config, seed)?)
    }

    /// A trainer of published weights, with a fresh optimizer.
    ///
    /// # Errors
    /// As [`params_from_bytes`].
    pub fn from_bytes<'a>(
        config: &ModelConfig,
        tensors: impl IntoIterator<Item = TensorBytes<'a>>,
    ) -> Result<Self> {
        Self::from_params(config, params_from_bytes(config, tensors)?)
    }

    /// A trainer of a fresh LoRA adapter on published base weights, which stay as they are: rounded to the
    /// configuration's element type, so that they are the very weights that a server of the base has.
    ///
    /// # Errors
    /// When the adapter's configuration does not fit the model; as [`params_from_bytes`]; when a base weight is not
    /// finite.
    pub fn with_lora<'a>(
        config: &ModelConfig,
        base: impl IntoIterator<Item = TensorBytes<'a>>,
        lora: &LoraConfig,
    ) -> Result<Self> {
        let factors = initial_factors(config, lora)?;
        let base = params_from_bytes(config, base)?;
        let rounded = encode_all(expected_tensors(config), |name| base.get(name), config.dtype)?;
        let views = rounded.iter().map(|entry| TensorBytes::of(entry, config.dtype));
        let frozen = Frozen { lora: lora.clone(), base: params_from_bytes(config, views)? };
        Self::build(config, factors, Some(frozen))
    }

    fn from_params(config: &ModelConfig, params: BTreeMap<String, Tensor>) -> Result<Self> {
        Self::build(config, params, None)
    }

    fn build(
        config: &ModelConfig,
        trained: BTreeMap<String, Tensor>,
        frozen: Option<Frozen>,
    ) -> Result<Self> {
        let vars = trained
            .into_iter()
            .map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let model = model_of(config, frozen.as_ref(), &tensors_of(&vars))?;
        let optimizer = AdamW::new(&vars);
        Ok(Self { config: config.clone(), frozen, vars, model, optimizer, gradients: BTreeMap::new() })
    }

    /// The adapter that is trained; `None` if all parameters are.
    #[must_use]
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.frozen.as_ref().map(|frozen| &frozen.lora)
    }

    /// The shape of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The model that is trained, in 32 bits. It changes with every step; what is published is
    /// [`Self::published_model`].
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Computes the loss and adds its gradients to those since the last step.
    ///
    /// # Errors
    /// When the batch is empty or does not fit the model, or the loss is not finite; the
    /// gradients are then as before.
    pub fn forward_backward(&mut self, batch: &[Datum], loss: Loss) -> Result<Output> {
        let mut output = Output { loss: 0.0, logprobs: Vec::with_capacity(batch.len()) };
        let mut gradients = self.gradients.clone();
        for part in self.parts(batch) {
            let result = batch_loss(&self.model, part, loss)?;
            let value = f64::from(result.loss.to_scalar::<f32>()?);
            if !value.is_finite() {
                return Err(EngineError::new(format!("the loss is {value}")));
            }
            output.loss += value;
            output.logprobs.extend(result.logprobs);
            let mut grads = result.loss.backward()?;
            for (name, var) in &self.vars {
                let Some(gradient) = grads.remove(var) else {
                    return Err(EngineError::new(format!("parameter {name} got no gradient")));
                };
                let sum = match gradients.get(name) {
                    Some(before) => (before + gradient)?,
                    None => gradient,
                };
                gradients.insert(name.clone(), sum.detach());
            }
        }
        if output.logprobs.is_empty() {
            return Err(EngineError::new("the batch is empty, wanted at least one datum"));
        }
        self.gradients = gradients;
        Ok(output)
    }

    /// Takes an optimizer step with the gradients since the last one, and clears them.
    ///
    /// # Errors
    /// When there are no gradients, they are not finite, or a parameter is out of range; nothing
    /// is changed then.
    pub fn optim_step(&mut self, params: &AdamParams) -> Result<StepOutput> {
        if self.gradients.is_empty() {
            return Err(EngineError::new("there are no gradients, wanted a forward_backward first"));
        }
        let grad_norm = self.optimizer.update(&self.vars, &self.gradients, params)?;
        self.gradients.clear();
        self.fold_again()?;
        Ok(StepOutput { step: self.optimizer.step(), grad_norm })
    }

    /// The gradients since the last step.
    #[must_use]
    pub fn gradients(&self) -> &BTreeMap<String, Tensor> {
        &self.gradients
    }

    /// Drops the gradients since the last step.
    pub fn clear_gradients(&mut self) {
        self.gradients.clear();
    }

    /// A copy of the trained parameters in 32 bits, which later steps do not change.
    ///
    /// # Errors
    /// When the memory is not readable as 32-bit floats, which does not happen.
    pub fn params(&self) -> Result<BTreeMap<String, Tensor>> {
        let copy = |(name, var): (&String, &Var)| {
            let values = var.flatten_all()?.to_vec1::<f32>()?;
            Ok((name.clone(), Tensor::from_vec(values, var.dims(), &Device::Cpu)?))
        };
        self.vars.iter().map(copy).collect()
    }

    /// The trained parameters as `(name, shape, little-endian bytes)` in the order of the forward pass,
    /// rounded to the nearest value of `dtype`, ties to even. [`WeightDtype::F32`] is exact. Of an adapter these are its
    /// factors, called as [`expected_factors`] calls them.
    ///
    /// # Errors
    /// When a parameter is not finite (as `dtype`): such weights must not be published.
    pub fn export(&self, dtype: WeightDtype) -> Result<Vec<NamedBytes>> {
        encode_all(self.expected(), |name| self.vars.get(name).map(|var| &**var), dtype)
    }

    /// The frozen base weights beside an adapter, in the configuration's element type and the order of the forward
    /// pass. They never change.
    ///
    /// # Errors
    /// When all parameters are trained.
    pub fn export_base(&self) -> Result<Vec<NamedBytes>> {
        let frozen = self.frozen()?;
        encode_all(expected_tensors(&self.config), |name| frozen.base.get(name), self.config.dtype)
    }

    /// The base weights with the adapter folded in ([`fold`]), rounded to the nearest value of `dtype`, ties to even.
    ///
    /// # Errors
    /// When all parameters are trained; when a folded weight is not finite (as `dtype`).
    pub fn export_merged(&self, dtype: WeightDtype) -> Result<Vec<NamedBytes>> {
        let Frozen { lora, base } = self.frozen()?;
        let folded = fold(&self.config, lora, base, &tensors_of(&self.vars))?;
        encode_all(expected_tensors(&self.config), |name| folded.get(name), dtype)
    }

    /// The model that a server has after loading [`Self::export`] (an adapter onto its base): for checking it by
    /// [`super::score()`], and for sampling without a server.
    ///
    /// # Errors
    /// As [`Self::export`].
    pub fn published_model(&self, dtype: WeightDtype) -> Result<Model> {
        let export = self.export(dtype)?;
        let views = export.iter().map(|entry| TensorBytes::of(entry, dtype));
        let trained = match &self.frozen {
            None => params_from_bytes(&self.config, views)?,
            Some(frozen) => factors_from_bytes(&self.config, &frozen.lora, views)?,
        };
        model_of(&self.config, self.frozen.as_ref(), &trained)
    }

    /// Puts other weights in the place of the trained ones: all parameters, or the factors of an adapter. The optimizer is
    /// left as it is: a live one keeps its moments, a new one starts cold. Gradients are cleared.
    ///
    /// # Errors
    /// When the tensors are not exactly those of [`Self::export`]; nothing is changed then.
    pub fn load_weights<'a>(&mut self, tensors: impl IntoIterator<Item = TensorBytes<'a>>) -> Result<()> {
        let params = match &self.frozen {
            None => params_from_bytes(&self.config, tensors)?,
            Some(frozen) => factors_from_bytes(&self.config, &frozen.lora, tensors)?,
        };
        for (name, var) in &self.vars {
            let value =
                params.get(name).ok_or_else(|| EngineError::new(format!("tensor {name} is missing")))?;
            var.set(value)?;
        }
        self.gradients.clear();
        self.fold_again()
    }

    /// Optimizer steps taken.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.optimizer.step()
    }

    /// Starts the optimizer afresh: no step taken, moments of zero.
    pub fn reset_optimizer(&mut self) {
        self.optimizer = AdamW::new(&self.vars);
    }

    /// The moments as `(name, shape, little-endian 32-bit bytes)`, names beginning with
    /// `optimizer.`. With [`Self::step`] and the weights in 32 bits they are all that a resumed
    /// run needs.
    ///
    /// # Errors
    /// When there are gradients that no step has used: they are not part of the state, so a
    /// resumed run would differ.
    pub fn optimizer_state(&self) -> Result<Vec<NamedBytes>> {
        if !self.gradients.is_empty() {
            return Err(EngineError::new(
                "there are gradients since the last step, wanted an optim_step before saving",
            ));
        }
        let named = self.optimizer.expected().into_iter().zip(self.optimizer.values());
        Ok(named.map(|((name, shape), values)| (name, shape, WeightDtype::F32.encode(values))).collect())
    }

    /// Restores what [`Self::optimizer_state`] and [`Self::step`] gave; gradients are dropped.
    ///
    /// # Errors
    /// When the tensors are not exactly those of this model's optimizer, not in 32 bits, or hold
    /// values that no optimizer has; nothing is changed then.
    pub fn load_optimizer_state<'a>(
        &mut self,
        step: u64,
        tensors: impl IntoIterator<Item = TensorBytes<'a>>,
    ) -> Result<()> {
        let tensors: Vec<TensorBytes<'a>> = tensors.into_iter().collect();
        if let Some(tensor) = tensors.iter().find(|tensor| tensor.dtype != "F32") {
            return Err(EngineError::new(format!(
                "tensor {} has dtype {}, wanted F32",
                tensor.name, tensor.dtype
            )));
        }
        let values = tensors_from_bytes(&self.optimizer.expected(), tensors)?;
        self.optimizer.restore(step, values)?;
        self.gradients.clear();
        Ok(())
    }

    /// The names and shapes of the trained parameters, in the order of the forward pass.
    fn expected(&self) -> Vec<(String, Vec<usize>)> {
        match &self.frozen {
            None => expected_tensors(&self.config),
            Some(frozen) => expected_factors(&self.config, &frozen.lora),
        }
    }

    fn frozen(&self) -> Result<&Frozen> {
        self.frozen
            .as_ref()
            .ok_or_else(|| EngineError::new("all parameters are trained, wanted a trainer of a LoRA adapter"))
    }

    /// Brings the folded weights up to the factors.
    fn fold_again(&mut self) -> Result<()> {
        if self.frozen.is_some() {
            self.model = model_of(&self.config, self.frozen.as_ref(), &tensors_of(&self.vars))?;
        }
        Ok(())
    }

    /// Splits a batch so that no part computes more than [`MAX_LOGITS`], padding included; a
    /// single datum is never split.
    fn parts<'a>(&self, batch: &'a [Datum]) -> Vec<&'a [Datum]> {
        let most = (MAX_LOGITS / self.config.vocab_size).max(1);
        let mut parts = Vec::new();
        let (mut start, mut longest) = (0, 0);
        for (index, datum) in batch.iter().enumerate() {
            let length = longest.max(datum.tokens.len());
            if index > start && length * (index + 1 - start) > most {
                parts.extend(batch.get(start..index));
                (start, longest) = (index, datum.tokens.len());
            } else {
                longest = length;
            }
        }
        if start < batch.len() {
            parts.extend(batch.get(start..));
        }
        parts
    }
}

/// The model on these trained parameters.
fn model_of(
    config: &ModelConfig,
    frozen: Option<&Frozen>,
    trained: &BTreeMap<String, Tensor>,
) -> Result<Model> {
    match frozen {
        None => Model::new(config, trained),
        Some(Frozen { lora, base }) => Model::new(config, &fold(config, lora, base, trained)?),
    }
}

fn tensors_of(vars: &BTreeMap<String, Var>) -> BTreeMap<String, Tensor> {
    vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect()
}

/// The wanted tensors as bytes of `dtype`, rounded.
fn encode_all<'a>(
    wanted: Vec<(String, Vec<usize>)>,
    find: impl Fn(&str) -> Option<&'a Tensor>,
    dtype: WeightDtype,
) -> Result<Vec<NamedBytes>> {
    let largest = match dtype {
        WeightDtype::F16 => half::f16::MAX.to_f32(),
        WeightDtype::Bf16 => half::bf16::MAX.to_f32(),
        WeightDtype::F32 => f32::MAX,
    };
    let fits = |value: &f32| value.is_finite() && value.abs() <= largest;
    let encode = |(name, shape): (String, Vec<usize>)| {
        let tensor = find(&name).ok_or_else(|| EngineError::new(format!("variable {name} is missing")))?;
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        if let Some(value) = values.iter().find(|value| !fits(value)) {
            return Err(EngineError::new(format!(
                "tensor {name} holds {value}, which is not a finite {}",
                dtype.name()
            )));
        }
        Ok((name, shape, dtype.encode(&values)))
    };
    wanted.into_iter().map(encode).collect()
}
