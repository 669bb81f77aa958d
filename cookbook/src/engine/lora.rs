//! LoRA: a pair of small factors beside each chosen projection, and the one function that folds them into it.
//!
//! A projection `W` of shape `[out, in]` gets `A` of `[rank, in]` and `B` of `[out, rank]`; the model computes with
//! `W + (alpha / rank) · B · A`. The base weights are frozen: only the factors are trained.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use super::dtype::{TensorBytes, tensors_from_bytes};
use super::error::{EngineError, Result};
use super::init::narrow;
use super::model::expected_tensors;
use super::rng::Rng;

/// A linear layer of every decoder layer that an adapter can be put beside. The embedding and the output head are
/// never adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::exhaustive_enums, reason = "Llama's decoder layer has these seven")]
pub enum TargetModule {
    /// The queries of attention.
    QProj,
    /// The keys of attention.
    KProj,
    /// The values of attention.
    VProj,
    /// The output of attention.
    OProj,
    /// The gate of the feed-forward layer.
    GateProj,
    /// The other input of the feed-forward layer.
    UpProj,
    /// The output of the feed-forward layer.
    DownProj,
}

impl TargetModule {
    /// All seven, in the order of the forward pass.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// Its name in Hugging Face models, such as `q_proj`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }
}

impl fmt::Display for TargetModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TargetModule {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|module| module.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|module| module.as_str()).collect();
            let found: String = text.chars().take(80).collect();
            EngineError::new(format!(
                "target module {found:?} is unknown, wanted one of {}",
                known.join(", ")
            ))
        })
    }
}

/// The shape of a LoRA adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LoraConfig {
    /// The inner dimension of the factors, 1 to the model's width.
    pub rank: usize,
    /// The adapter's weight is `alpha / rank`. Default 32, as Tinker's trainers use whatever the rank, so that a
    /// learning rate found at one rank holds at another (PEFT's own default, 8, is meant for rank 8).
    pub alpha: f64,
    /// Which projections are adapted. Default all seven.
    pub target_modules: BTreeSet<TargetModule>,
    /// Seed of the fresh factors; says nothing about trained ones. Default 0.
    #[serde(default, skip_serializing)]
    pub seed: u64,
}

impl LoraConfig {
    /// An adapter of this rank, the rest at the defaults.
    #[must_use]
    pub fn new(rank: usize) -> Self {
        Self { rank, alpha: 32.0, target_modules: BTreeSet::from(TargetModule::ALL), seed: 0 }
    }

    /// Sets `alpha`.
    #[must_use]
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets which projections are adapted.
    #[must_use]
    pub fn with_target_modules(mut self, modules: impl IntoIterator<Item = TargetModule>) -> Self {
        self.target_modules = modules.into_iter().collect();
        self
    }

    /// Sets the seed of the fresh factors.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// What `B · A` is multiplied by: `alpha / rank`.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Whether factors of `other` fit here and mean the same: rank, alpha and modules are equal. Seeds may differ.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        (self.rank, &self.target_modules) == (other.rank, &other.target_modules)
            && self.alpha.to_bits() == other.alpha.to_bits()
    }

    /// Checks the fields against a model.
    ///
    /// # Errors
    /// Names the field, its value and what was wanted.
    pub fn validate(&self, model: &ModelConfig) -> Result<()> {
        let width = model.hidden_size;
        if self.rank == 0 || self.rank > width {
            return Err(EngineError::new(format!(
                "the LoRA rank is {}, wanted 1 to {width}, the model's width",
                self.rank
            )));
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return Err(EngineError::new(format!(
                "the LoRA alpha is {}, wanted a finite number above 0",
                self.alpha
            )));
        }
        if self.target_modules.is_empty() {
            return Err(EngineError::new("the LoRA has no target modules, wanted at least one"));
        }
        Ok(())
    }
}

impl fmt::Display for LoraConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let modules: Vec<_> = self.target_modules.iter().map(|module| module.as_str()).collect();
        write!(f, "rank {}, alpha {}, on {}", self.rank, self.alpha, modules.join(" "))
    }
}

/// An adapted projection: where its weight is, and how its factors are called.
struct Place {
    weight: String,
    a: String,
    b: String,
    out: usize,
    input: usize,
}

/// The adapted projections, in the order of the forward pass.
fn places(model: &ModelConfig, lora: &LoraConfig) -> impl Iterator<Item = Place> {
    expected_tensors(model).into_iter().filter_map(|(weight, shape)| {
        let [out, input] = *shape.as_slice() else { return None };
        let module = weight.strip_suffix(".weight")?;
        let (_, last) = module.rsplit_once('.')?;
        lora.target_modules.iter().find(|target| target.as_str() == last)?;
        let (a, b) = (format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight"));
        Some(Place { weight, a, b, out, input })
    })
}

/// The names and shapes of an adapter's factors, in the order of the forward pass: `<module>.lora_A.weight` of
/// `[rank, in]`, then `<module>.lora_B.weight` of `[out, rank]`.
#[must_use]
pub fn expected_factors(model: &ModelConfig, lora: &LoraConfig) -> Vec<(String, Vec<usize>)> {
    places(model, lora)
        .flat_map(|place| [(place.a, vec![lora.rank, place.input]), (place.b, vec![place.out, lora.rank])])
        .collect()
}

/// Fresh 32-bit factors: `A` uniform within `1 / √in` of zero, as PEFT's Kaiming initialisation draws it, `B` zero, so
/// that the model begins as its base. Every factor draws from a generator of its own.
///
/// # Errors
/// When the configuration does not fit the model.
pub fn initial_factors(model: &ModelConfig, lora: &LoraConfig) -> Result<BTreeMap<String, Tensor>> {
    model.validate()?;
    lora.validate(model)?;
    let mut factors = BTreeMap::new();
    for place in places(model, lora) {
        let mut rng = Rng::named(lora.seed, &place.a);
        let bound = (place.input as f64).sqrt().recip();
        let values = (0..lora.rank * place.input).map(|_| narrow((2.0 * rng.uniform_f64() - 1.0) * bound));
        let a = Tensor::from_vec(values.collect(), (lora.rank, place.input), &Device::Cpu)?;
        let b = Tensor::from_vec(vec![0f32; place.out * lora.rank], (place.out, lora.rank), &Device::Cpu)?;
        factors.extend([(place.a, a), (place.b, b)]);
    }
    Ok(factors)
}

/// The 32-bit factors of published bytes. All or nothing.
///
/// # Errors
/// When the configuration does not fit the model; when a factor is missing, unexpected, given twice, or of another shape,
/// element type or length than wanted; the factor is named.
pub fn factors_from_bytes<'a>(
    model: &ModelConfig,
    lora: &LoraConfig,
    factors: impl IntoIterator<Item = TensorBytes<'a>>,
) -> Result<BTreeMap<String, Tensor>> {
    model.validate()?;
    lora.validate(model)?;
    let wanted = expected_factors(model, lora);
    tensors_from_bytes(&wanted, factors)?
        .into_iter()
        .zip(wanted)
        .map(|(values, (name, shape))| Ok((name, Tensor::from_vec(values, shape, &Device::Cpu)?)))
        .collect()
}

/// The parameters of the model with its adapter: `W + (alpha / rank) · B · A` in 32 bits for each adapted projection,
/// the base's own tensors for all others.
///
/// The trainer computes with these in every pass, the server serves them, and a merged base is these, rounded: one
/// function, so that equal bytes give equal bits everywhere. Gradients flow to factors that are variables.
///
/// # Errors
/// When a tensor is missing or of another shape than the model's.
pub fn fold(
    model: &ModelConfig,
    lora: &LoraConfig,
    base: &BTreeMap<String, Tensor>,
    factors: &BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>> {
    let take = |tensors: &BTreeMap<String, Tensor>, name: &str| {
        tensors.get(name).cloned().ok_or_else(|| EngineError::new(format!("missing tensors: {name}")))
    };
    let mut params = base.clone();
    for place in places(model, lora) {
        let update = (take(factors, &place.b)?.matmul(&take(factors, &place.a)?)? * lora.scale())?;
        let folded = (take(base, &place.weight)? + update)?;
        params.insert(place.weight, folded);
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::initial_params;

    #[test]
    fn fresh_factors_change_nothing_and_come_from_the_seed_alone() {
        let (model, lora) = (ModelConfig::tiny(), LoraConfig::new(4).with_seed(3));
        let factors = initial_factors(&model, &lora).unwrap();
        assert_eq!(factors.len(), model.num_hidden_layers * 7 * 2);
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let a = flat(&factors["model.layers.1.mlp.down_proj.lora_A.weight"]);
        let bound = (model.intermediate_size as f32).sqrt().recip();
        assert!(
            a.iter().all(|value| value.abs() <= bound) && a.iter().any(|value| value.abs() > 0.9 * bound)
        );
        assert_eq!(
            a,
            flat(&initial_factors(&model, &lora).unwrap()["model.layers.1.mlp.down_proj.lora_A.weight"])
        );
        let other = initial_factors(&model, &lora.clone().with_seed(4)).unwrap();
        assert_ne!(a, flat(&other["model.layers.1.mlp.down_proj.lora_A.weight"]));
        let base = initial_params(&model, 1).unwrap();
        let folded = fold(&model, &lora, &base, &factors).unwrap();
        assert!(folded.iter().all(|(name, tensor)| flat(tensor) == flat(&base[name])));
    }

    #[test]
    fn folding_is_the_formula() {
        let (model, base) = (ModelConfig::tiny(), initial_params(&ModelConfig::tiny(), 1).unwrap());
        let lora = LoraConfig::new(2).with_alpha(3.0).with_target_modules([TargetModule::KProj]);
        let ones = |name: &str, shape: Vec<usize>| {
            let fill = if name.contains("lora_A") { 0.5 } else { 2.0 };
            Tensor::full(fill as f32, shape, &Device::Cpu).unwrap()
        };
        let factors = expected_factors(&model, &lora);
        assert_eq!(factors.len(), 2 * model.num_hidden_layers);
        let factors = factors.into_iter().map(|(name, shape)| (name.clone(), ones(&name, shape))).collect();
        let folded = fold(&model, &lora, &base, &factors).unwrap();
        for (name, tensor) in &folded {
            // rank 2 · 0.5 · 2.0 = 2, times 3 / 2.
            let change = if name.contains("k_proj") { 3.0 } else { 0.0 };
            let pairs = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter();
            let before = base[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(pairs.zip(before).all(|(after, before)| after == before + change), "{name}");
        }
    }

    #[test]
    fn bad_configurations_are_refused_by_name() {
        let model = ModelConfig::tiny();
        for (lora, wanted) in [
            (LoraConfig::new(0), "the LoRA rank is 0, wanted 1 to 64, the model's width"),
            (LoraConfig::new(65), "the LoRA rank is 65, wanted 1 to 64, the model's width"),
            (LoraConfig::new(8).with_alpha(0.0), "the LoRA alpha is 0, wanted a finite number above 0"),
            (
                LoraConfig::new(8).with_alpha(f64::NAN),
                "the LoRA alpha is NaN, wanted a finite number above 0",
            ),
            (
                LoraConfig::new(8).with_target_modules([]),
                "the LoRA has no target modules, wanted at least one",
            ),
        ] {
            assert_eq!(initial_factors(&model, &lora).unwrap_err().message(), wanted);
        }
        let error = "lm_head".parse::<TargetModule>().unwrap_err();
        assert!(error.message().starts_with("target module \"lm_head\" is unknown, wanted one of q_proj"));
        for module in TargetModule::ALL {
            assert_eq!(module.as_str().parse(), Ok(module));
        }
    }
}
