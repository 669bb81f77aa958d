//! Sampling with a key-value cache, log-probabilities and a seed for each request.
//!
//! Every prompt is read on its own ([`prefill`]), so its part of the answer does not depend on
//! what else is asked at the time, and a cached prefix gives the very bits that a new reading
//! would. Only the decoding runs as a batch; the random numbers of a row come from the seed, the
//! prompt and the number of the sample, never from its place in the batch.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::error::{EngineError, Result};
use super::init::narrow;
use super::model::{KvCache, Model};
use super::rng::{Rng, hash_words};

/// How to sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SampleParams {
    /// The most tokens of an answer.
    pub max_tokens: usize,
    /// What the logits are divided by; 0 takes the most likely token.
    pub temperature: f64,
    /// Equal seeds, weights and prompts give equal answers.
    pub seed: u64,
    /// Ids that end an answer; the id that ended it is the answer's last token.
    pub stop: Vec<u32>,
}

impl SampleParams {
    /// Temperature 1, seed 0, no stop ids.
    #[must_use]
    pub fn new(max_tokens: usize) -> Self {
        Self { max_tokens, temperature: 1.0, seed: 0, stop: Vec::new() }
    }

    /// With this temperature.
    #[must_use]
    pub fn with_temperature(self, temperature: f64) -> Self {
        Self { temperature, ..self }
    }

    /// With this seed.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// With these stop ids.
    #[must_use]
    pub fn with_stop(self, stop: Vec<u32>) -> Self {
        Self { stop, ..self }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Finish {
    /// A stop id was sampled.
    Stop,
    /// `max_tokens` were sampled.
    Length,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Sample {
    /// The sampled ids, the stop id included.
    pub tokens: Vec<u32>,
    /// The log-probability of each id under the distribution that it was drawn from (logits
    /// divided by the temperature); at temperature 0 under the plain softmax.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// A prompt that has been read: its keys and values and the logits after it. Cloning is cheap, so
/// it can be kept and shared between requests; it belongs to the weights that read it.
#[derive(Debug, Clone)]
pub struct Prefix {
    tokens: Vec<u32>,
    cache: KvCache,
    logits: Vec<f32>,
}

impl Prefix {
    /// The prompt.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Bytes held, for bounding a store of prefixes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.cache.bytes() + (self.tokens.len() + self.logits.len()) * 4
    }

    /// The prefix that continues this one. Its numbers equal those of reading the whole prompt at
    /// once to rounding, not to the bit.
    ///
    /// # Errors
    /// When nothing is added, or what is added does not fit the model.
    pub fn extended(&self, model: &Model, more: &[u32]) -> Result<Self> {
        let mut tokens = self.tokens.clone();
        tokens.extend_from_slice(more);
        let mut cache = self.cache.clone();
        let logits = read(model, more, &mut cache)?;
        Ok(Self { tokens, cache, logits })
    }
}

/// Reads a prompt.
///
/// # Errors
/// When it is empty, too long, or holds an id outside the vocabulary.
pub fn prefill(model: &Model, prompt: &[u32]) -> Result<Prefix> {
    let mut cache = KvCache::new();
    let logits = read(model, prompt, &mut cache)?;
    Ok(Prefix { tokens: prompt.to_vec(), cache, logits })
}

/// `n` answers for every prompt: `answers[prompt][sample]`. Equal prompts are read once; together
/// they get different answers, as if one prompt had asked for all of them.
///
/// # Errors
/// When a prompt or a parameter does not fit the model.
pub fn sample_batch(
    model: &Model,
    prompts: &[Vec<u32>],
    n: usize,
    params: &SampleParams,
) -> Result<Vec<Vec<Sample>>> {
    let mut read: BTreeMap<&[u32], Prefix> = BTreeMap::new();
    for prompt in prompts {
        check(model, prompt.len(), params)?;
        if !read.contains_key(prompt.as_slice()) {
            read.insert(prompt, prefill(model, prompt)?);
        }
    }
    let prefixes: Vec<&Prefix> = prompts.iter().filter_map(|prompt| read.get(prompt.as_slice())).collect();
    sample_prefixes(model, &prefixes, n, params)
}

/// `n` answers for every prefix that `model` has read: `answers[prefix][sample]`.
///
/// # Errors
/// When a prefix or a parameter does not fit the model.
pub fn sample_prefixes(
    model: &Model,
    prefixes: &[&Prefix],
    n: usize,
    params: &SampleParams,
) -> Result<Vec<Vec<Sample>>> {
    sample_prefixes_while(model, prefixes, n, params, &mut || true)
}

/// As [`sample_prefixes`], asking before every step whether to go on (a deadline, a client that
/// has left).
///
/// # Errors
/// Also when `go_on` says no.
pub fn sample_prefixes_while(
    model: &Model,
    prefixes: &[&Prefix],
    n: usize,
    params: &SampleParams,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Vec<Vec<Sample>>> {
    // Rows of one length need no padding, and a bounded number of rows bounds the memory.
    const MAX_ROWS: usize = 256;
    let mut by_length: BTreeMap<usize, Vec<(usize, &Prefix, u64)>> = BTreeMap::new();
    let mut asked: BTreeMap<&[u32], u64> = BTreeMap::new();
    for (index, prefix) in prefixes.iter().enumerate() {
        check(model, prefix.tokens.len(), params)?;
        let before = asked.entry(&prefix.tokens).or_default();
        by_length.entry(prefix.tokens.len()).or_default().push((index, prefix, *before));
        *before += n as u64;
    }
    let mut answers: Vec<Vec<Sample>> = vec![Vec::new(); prefixes.len()];
    for group in by_length.values() {
        // Samples of one prefix may be split over batches, prefixes may share one.
        let rows: Vec<(usize, &Prefix, u64)> = group
            .iter()
            .flat_map(|&(index, prefix, before)| {
                (0..n as u64).map(move |sample| (index, prefix, before + sample))
            })
            .collect();
        for rows in rows.chunks(MAX_ROWS) {
            let samples = decode(model, rows, params, go_on)?;
            for ((index, ..), sample) in rows.iter().zip(samples) {
                if let Some(list) = answers.get_mut(*index) {
                    list.push(sample);
                }
            }
        }
    }
    Ok(answers)
}

/// Decodes rows of one length together.
fn decode(
    model: &Model,
    rows: &[(usize, &Prefix, u64)],
    params: &SampleParams,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Vec<Sample>> {
    let vocab = model.config().vocab_size;
    let mut states: Vec<Row> = rows
        .iter()
        .map(|(_, prefix, sample)| {
            let prompt = hash_words(prefix.tokens.iter().map(|&token| u64::from(token)));
            Row {
                rng: Rng::derived(params.seed, &[prompt, *sample]),
                sample: Sample { tokens: Vec::new(), logprobs: Vec::new(), finish: Finish::Length },
                next: 0,
            }
        })
        .collect();
    let caches: Vec<&KvCache> = rows.iter().map(|(_, prefix, _)| &prefix.cache).collect();
    let mut cache = KvCache::stack(&caches, 1)?;
    for step in 0..params.max_tokens {
        if !go_on() {
            return Err(EngineError::new("sampling was stopped"));
        }
        if step == 0 {
            for (state, (_, prefix, _)) in states.iter_mut().zip(rows) {
                state.take(&prefix.logits, params)?;
            }
        } else {
            let ids: Vec<u32> = states.iter().map(|state| state.next).collect();
            let ids = Tensor::from_vec(ids, (rows.len(), 1), &Device::Cpu)?;
            let logits = model.forward_cached(&ids, &mut cache)?;
            let logits = logits.detach().flatten_all()?.to_vec1::<f32>()?;
            for (state, logits) in states.iter_mut().zip(logits.chunks_exact(vocab)) {
                state.take(logits, params)?;
            }
        }
        if states.iter().all(Row::ended) {
            break;
        }
    }
    Ok(states.into_iter().map(|state| state.sample).collect())
}

/// One answer in the making.
struct Row {
    rng: Rng,
    sample: Sample,
    /// The id that is fed next. A row that has ended runs along until all have, its ids dropped.
    next: u32,
}

impl Row {
    fn ended(&self) -> bool {
        self.sample.finish == Finish::Stop
    }

    fn take(&mut self, logits: &[f32], params: &SampleParams) -> Result<()> {
        if self.ended() {
            return Ok(());
        }
        let (token, logprob) = pick(logits, params.temperature, &mut self.rng)?;
        self.next = token;
        self.sample.tokens.push(token);
        self.sample.logprobs.push(logprob);
        if params.stop.contains(&token) {
            self.sample.finish = Finish::Stop;
        }
        Ok(())
    }
}

/// Draws an id and returns it with its log-probability.
fn pick(logits: &[f32], temperature: f64, rng: &mut Rng) -> Result<(u32, f32)> {
    let greedy = temperature == 0.0;
    let scale = if greedy { 1.0 } else { 1.0 / temperature };
    let mut best = 0;
    let mut max = f32::NEG_INFINITY;
    for (index, &logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return Err(EngineError::new(format!("the logit of id {index} is {logit}")));
        }
        if logit > max {
            (best, max) = (index, logit);
        }
    }
    let weight = |logit: f32| (f64::from(logit - max) * scale).exp();
    let weights: Vec<f64> = logits.iter().map(|&logit| weight(logit)).collect();
    let total: f64 = weights.iter().sum();
    let mut chosen = best;
    if !greedy {
        let mut left = rng.uniform_f64() * total;
        for (index, &weight) in weights.iter().enumerate() {
            // Rounding may leave a rest after the last id; the most likely one takes it.
            if left < weight {
                chosen = index;
                break;
            }
            left -= weight;
        }
    }
    let logit = logits.get(chosen).copied().unwrap_or(max);
    let logprob = f64::from(logit - max) * scale - total.ln();
    let token =
        u32::try_from(chosen).map_err(|_| EngineError::new(format!("id {chosen} does not fit 32 bits")))?;
    Ok((token, narrow(logprob)))
}

fn read(model: &Model, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
    model.check_tokens(tokens, tokens.len())?;
    let ids = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    let logits = model.forward_cached(&ids, cache)?;
    Ok(logits.detach().flatten_all()?.to_vec1::<f32>()?)
}

fn check(model: &Model, prompt: usize, params: &SampleParams) -> Result<()> {
    let temperature = params.temperature;
    if !(temperature == 0.0 || (1e-3..=1e3).contains(&temperature)) {
        return Err(EngineError::new(format!("temperature is {temperature}, wanted 0 or 0.001 to 1000")));
    }
    model.check_tokens(&params.stop, 1)?;
    let most = model.config().max_position_embeddings;
    if prompt.saturating_add(params.max_tokens) > most {
        return Err(EngineError::new(format!(
            "the prompt has {prompt} tokens and max_tokens is {}, the model takes {most} in all",
            params.max_tokens
        )));
    }
    Ok(())
}
