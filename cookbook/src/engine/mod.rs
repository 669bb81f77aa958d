//! The machine-learning engine: a Llama-shaped transformer, its trainer and its sampler.
//!
//! Pure computation on the CPU: no network, no files, no clock. The trainer and the inference
//! server are built from the same [`Model`], and both read log-probabilities through the same
//! [`score()`], so what one computes the other computes bit for bit.
//!
//! Weights cross the border of this module as names, shapes and little-endian bytes
//! ([`TensorBytes`]), so that nothing outside needs to know candle.

mod adamw;
mod config;
mod dtype;
mod error;
mod init;
mod lora;
mod loss;
mod model;
mod rng;
mod sample;
mod schedule;
mod score;
pub mod task;
mod tokenizer;
mod trainer;

pub use adamw::AdamW;
pub use config::ModelConfig;
pub use dtype::{NamedBytes, TensorBytes, WeightDtype, params_from_bytes};
pub use error::{EngineError, Result};
pub use init::initial_params;
pub use lora::{LoraConfig, TargetModule, expected_factors, factors_from_bytes, fold, initial_factors};
pub use loss::{BatchLoss, batch_loss, target_logprobs};
pub use model::{KvCache, Model, expected_tensors};
pub use rng::Rng;
pub use sample::{
    Finish, Prefix, Sample, SampleParams, prefill, sample_batch, sample_prefixes, sample_prefixes_while,
};
pub use schedule::Schedule;
pub use score::score;
pub use tokenizer::ByteTokenizer;
pub use towline_core::{AdamParams, Datum, Loss};
pub use trainer::{LocalTrainer, Output, StepOutput};
