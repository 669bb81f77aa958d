//! AdamW over named 32-bit variables, with a state that is saved and restored exactly.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use towline_core::AdamParams;

use super::error::{EngineError, Result};
use super::init::narrow;

/// The optimizer: two moments for each variable, and the number of steps taken.
#[derive(Debug, Clone)]
pub struct AdamW {
    moments: BTreeMap<String, Moments>,
    step: u64,
}

#[derive(Debug, Clone)]
struct Moments {
    shape: Vec<usize>,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// The two families of saved tensors: first and second moments.
const FIRST: &str = "optimizer.m.";
const SECOND: &str = "optimizer.v.";

impl AdamW {
    /// A fresh optimizer: no step taken, moments of zero.
    #[must_use]
    pub fn new(vars: &BTreeMap<String, Var>) -> Self {
        let moments = vars
            .iter()
            .map(|(name, var)| {
                let zeros = vec![0.0; var.elem_count()];
                let shape = var.dims().to_vec();
                (name.clone(), Moments { shape, first: zeros.clone(), second: zeros })
            })
            .collect();
        Self { moments, step: 0 }
    }

    /// Steps taken.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Takes a step with these gradients and returns their norm before clipping. A variable
    /// without a gradient is taken to have a gradient of zero.
    ///
    /// # Errors
    /// When a parameter of the step is out of range or the gradients are not finite; nothing is
    /// changed then.
    pub fn update(
        &mut self,
        vars: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, Tensor>,
        params: &AdamParams,
    ) -> Result<f64> {
        check(params)?;
        let mut flat = BTreeMap::new();
        let mut squares = 0f64;
        for (name, gradient) in gradients {
            let values = gradient.flatten_all()?.to_vec1::<f32>()?;
            let wanted = self.moments.get(name).map(|moments| moments.first.len());
            if wanted != Some(values.len()) {
                return Err(EngineError::new(format!("gradient {name} fits no variable")));
            }
            squares += values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>();
            flat.insert(name.as_str(), values);
        }
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Err(EngineError::new(format!("the norm of the gradients is {norm}")));
        }
        let clip = params.grad_clip_norm;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let step = self.step + 1;
        let rule = Rule::new(params, scale, step);
        for (name, moments) in &mut self.moments {
            let Some(var) = vars.get(name) else {
                return Err(EngineError::new(format!("variable {name} is missing")));
            };
            let mut values = var.flatten_all()?.to_vec1::<f32>()?;
            match flat.get(name.as_str()) {
                Some(gradient) => rule.apply(&mut values, gradient, moments),
                None => rule.apply(&mut values, &vec![0.0; moments.first.len()], moments),
            }
            var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?)?;
        }
        self.step = step;
        Ok(norm)
    }

    /// The names and shapes of the saved moments.
    pub(super) fn expected(&self) -> Vec<(String, Vec<usize>)> {
        let family = |prefix: &'static str| {
            self.moments.iter().map(move |(name, moments)| (format!("{prefix}{name}"), moments.shape.clone()))
        };
        family(FIRST).chain(family(SECOND)).collect()
    }

    /// The moments in the order of [`Self::expected`].
    pub(super) fn values(&self) -> impl Iterator<Item = &[f32]> {
        let first = self.moments.values().map(|moments| moments.first.as_slice());
        first.chain(self.moments.values().map(|moments| moments.second.as_slice()))
    }

    /// Replaces step and moments, given in the order of [`Self::expected`], lengths checked.
    pub(super) fn restore(&mut self, step: u64, values: Vec<Vec<f32>>) -> Result<()> {
        let mut first = values;
        let second = first.split_off(first.len() / 2);
        // The root of a negative second moment would be no number, far from here.
        if second.iter().flatten().any(|value| !value.is_finite() || *value < 0.0)
            || first.iter().flatten().any(|value| !value.is_finite())
        {
            return Err(EngineError::new(
                "the optimizer state holds moments that are negative or not finite",
            ));
        }
        for (moments, (first, second)) in self.moments.values_mut().zip(first.into_iter().zip(second)) {
            (moments.first, moments.second) = (first, second);
        }
        self.step = step;
        Ok(())
    }
}

/// One step's constants, rounded to the 32 bits that it computes in.
struct Rule {
    scale: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    rate: f32,
    /// What the second moment is multiplied by to undo its start at zero.
    correction2: f32,
    eps: f32,
    keep: f32,
}

impl Rule {
    fn new(params: &AdamParams, scale: f64, step: u64) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Self {
            scale: narrow(scale),
            beta1: narrow(params.beta1),
            rest1: narrow(1.0 - params.beta1),
            beta2: narrow(params.beta2),
            rest2: narrow(1.0 - params.beta2),
            rate: narrow(params.learning_rate / correction(params.beta1)),
            correction2: narrow(1.0 / correction(params.beta2)),
            eps: narrow(params.eps),
            keep: narrow(1.0 - params.learning_rate * params.weight_decay),
        }
    }

    fn apply(&self, values: &mut [f32], gradient: &[f32], moments: &mut Moments) {
        let state = moments.first.iter_mut().zip(&mut moments.second);
        for ((value, &gradient), (first, second)) in values.iter_mut().zip(gradient).zip(state) {
            let gradient = gradient * self.scale;
            *first = self.beta1 * *first + self.rest1 * gradient;
            *second = self.beta2 * *second + self.rest2 * gradient * gradient;
            let root = (*second * self.correction2).sqrt() + self.eps;
            // With an eps of zero a parameter that never had a gradient stays where it is.
            let change = if *first == 0.0 { 0.0 } else { self.rate * *first / root };
            *value = *value * self.keep - change;
        }
    }
}

fn check(params: &AdamParams) -> Result<()> {
    for (name, value, below) in [
        ("learning_rate", params.learning_rate, f64::INFINITY),
        ("beta1", params.beta1, 1.0),
        ("beta2", params.beta2, 1.0),
        ("eps", params.eps, f64::INFINITY),
        ("weight_decay", params.weight_decay, f64::INFINITY),
        ("grad_clip_norm", params.grad_clip_norm, f64::INFINITY),
    ] {
        if !(0.0..below).contains(&value) {
            return Err(EngineError::new(format!("{name} is {value}, wanted at least 0 and below {below}")));
        }
    }
    Ok(())
}
