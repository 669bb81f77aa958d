//! The transformer: Llama's shape, written with operations that candle can differentiate.
//!
//! candle's ready-made norm, rotary embedding and softmax are fused operations without a backward
//! pass: training through them silently reaches only the last layer. Everything here is made of
//! primitive operations, and a test asserts that every parameter receives a gradient.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};

use super::config::ModelConfig;
use super::error::{EngineError, Result};

/// The names and shapes of a model's tensors, in the order of the forward pass.
#[must_use]
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let width = config.hidden_size;
    let inner = config.intermediate_size;
    let queries = config.num_attention_heads.saturating_mul(config.head_dim);
    let keys = config.num_key_value_heads.saturating_mul(config.head_dim);
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, width])];
    for layer in 0..config.num_hidden_layers {
        for (name, shape) in [
            ("input_layernorm", vec![width]),
            ("self_attn.q_proj", vec![queries, width]),
            ("self_attn.k_proj", vec![keys, width]),
            ("self_attn.v_proj", vec![keys, width]),
            ("self_attn.o_proj", vec![width, queries]),
            ("post_attention_layernorm", vec![width]),
            ("mlp.gate_proj", vec![inner, width]),
            ("mlp.up_proj", vec![inner, width]),
            ("mlp.down_proj", vec![width, inner]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![width]));
    if !config.tie_word_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocab_size, width]));
    }
    tensors
}

/// A model: a configuration and its tensors. Cloning shares the tensors.
///
/// Built from variables it is the model that is trained: it sees every update of them. Built from
/// plain tensors it is a fixed version that may be served from many threads at once.
#[derive(Clone)]
pub struct Model {
    inner: Arc<Weights>,
}

struct Weights {
    config: ModelConfig,
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    /// The output head; the embedding when tied.
    head: Tensor,
}

struct Layer {
    input_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    post_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

/// The keys and values of the tokens that a sequence (or a batch of sequences of one length) has
/// seen. It belongs to one request; cloning it shares the tensors, which are never changed.
#[derive(Clone, Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    length: usize,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvCache").field("length", &self.length).finish_non_exhaustive()
    }
}

impl KvCache {
    /// A cache that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of tokens seen.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token has been seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of keys and values held, shared ones counted in full.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let elements = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.layers.iter().map(|(key, value)| elements(key) + elements(value)).sum()
    }

    /// One cache with the rows of several caches of one length, each repeated `n` times in a row.
    ///
    /// # Errors
    /// When the list is empty or the caches differ in length or in layers.
    pub(super) fn stack(caches: &[&Self], n: usize) -> Result<Self> {
        let Some(first) = caches.first() else {
            return Err(EngineError::new("no cache to stack"));
        };
        let alike = |cache: &&Self| cache.length == first.length && cache.layers.len() == first.layers.len();
        if !caches.iter().all(alike) {
            return Err(EngineError::new("caches of different lengths cannot be stacked"));
        }
        let repeat = |pick: &dyn Fn(&Self) -> Option<Tensor>| -> Result<Tensor> {
            let rows: Vec<Tensor> = caches
                .iter()
                .filter_map(|cache| pick(cache))
                .flat_map(|row| std::iter::repeat_n(row, n))
                .collect();
            Ok(Tensor::cat(&rows, 0)?)
        };
        let layers = (0..first.layers.len())
            .map(|layer| {
                let key = repeat(&|cache| cache.layers.get(layer).map(|(key, _)| key.clone()))?;
                let value = repeat(&|cache| cache.layers.get(layer).map(|(_, v)| v.clone()))?;
                Ok((key, value))
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers, length: first.length })
    }
}

impl Model {
    /// Builds the model from exactly the tensors of [`expected_tensors`]. Nothing is copied.
    ///
    /// # Errors
    /// When the configuration is not valid, or a tensor is missing, unexpected, of the wrong
    /// shape or not of 32 bits; the tensor is named.
    pub fn new(config: &ModelConfig, params: &BTreeMap<String, Tensor>) -> Result<Self> {
        config.validate()?;
        check(config, params)?;
        let take = |name: &str| {
            params.get(name).cloned().ok_or_else(|| EngineError::new(format!("missing tensors: {name}")))
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let of = |part: &str| take(&format!("model.layers.{layer}.{part}.weight"));
                Ok(Layer {
                    input_norm: of("input_layernorm")?,
                    query: of("self_attn.q_proj")?,
                    key: of("self_attn.k_proj")?,
                    value: of("self_attn.v_proj")?,
                    output: of("self_attn.o_proj")?,
                    post_norm: of("post_attention_layernorm")?,
                    gate: of("mlp.gate_proj")?,
                    up: of("mlp.up_proj")?,
                    down: of("mlp.down_proj")?,
                })
            })
            .collect::<Result<_>>()?;
        let embed = take("model.embed_tokens.weight")?;
        let head = if config.tie_word_embeddings { embed.clone() } else { take("lm_head.weight")? };
        let norm = take("model.norm.weight")?;
        Ok(Self { inner: Arc::new(Weights { config: config.clone(), embed, layers, norm, head }) })
    }

    /// The shape of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// Checks that ids are in the vocabulary and that a sequence of `length` tokens is not empty
    /// and not longer than the model's positions.
    ///
    /// # Errors
    /// Says which id or length was found and what the model takes.
    pub fn check_tokens(&self, tokens: &[u32], length: usize) -> Result<()> {
        let config = self.config();
        if length == 0 {
            return Err(EngineError::new("the sequence is empty, wanted at least one token"));
        }
        if length > config.max_position_embeddings {
            return Err(EngineError::new(format!(
                "the sequence has {length} tokens, the model takes at most {}",
                config.max_position_embeddings
            )));
        }
        let vocab = config.vocab_size;
        match tokens.iter().find(|&&token| token as usize >= vocab) {
            Some(token) => {
                Err(EngineError::new(format!("token id {token} is outside the vocabulary of {vocab}")))
            }
            None => Ok(()),
        }
    }

    /// The logits of every position: `[batch, seq]` ids give `[batch, seq, vocab]`.
    ///
    /// The mask is causal, so right padding does not reach the positions before it.
    ///
    /// # Errors
    /// When ids or lengths do not fit the model (see [`Self::check_tokens`]).
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let hidden = self.hidden(ids, None)?;
        let logits = self.head(&hidden)?;
        Ok(logits.reshape((batch, length, self.config().vocab_size))?)
    }

    /// The logits after the last of the new tokens, `[batch, new]` ids giving `[batch, vocab]`;
    /// the cache then has seen the new tokens too.
    ///
    /// # Errors
    /// When ids or lengths do not fit the model or the cache; the cache is then as before.
    pub fn forward_cached(&self, ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let width = self.config().hidden_size;
        let mut grown = cache.clone();
        let hidden = self.hidden(ids, Some(&mut grown))?;
        let last = hidden.reshape((batch, length, width))?.narrow(1, length - 1, 1)?;
        let logits = self.head(&last.reshape((batch, width))?)?;
        *cache = grown;
        Ok(logits)
    }

    /// The normed output of the last layer, one row a token.
    fn hidden(&self, ids: &Tensor, mut cache: Option<&mut KvCache>) -> Result<Tensor> {
        let weights = &*self.inner;
        let (batch, length) = ids.dims2()?;
        let seen = cache.as_ref().map_or(0, |cache| cache.length);
        self.check_tokens(&[], if length == 0 { 0 } else { seen + length })?;
        let place = Place::new(&weights.config, batch, seen, length)?;
        let mut x = weights.embed.index_select(&ids.flatten_all()?, 0)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            let slot = cache.as_deref_mut().map(|cache| (cache, index));
            let normed = rms_norm(&x, &layer.input_norm, weights.config.rms_norm_eps)?;
            x = (x + attention(layer, &normed, &place, slot)?)?;
            let normed = rms_norm(&x, &layer.post_norm, weights.config.rms_norm_eps)?;
            x = (x + feed_forward(layer, &normed)?)?;
        }
        if let Some(cache) = cache {
            cache.length += length;
        }
        rms_norm(&x, &weights.norm, weights.config.rms_norm_eps)
    }

    fn head(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, &self.inner.head)
    }
}

/// What every layer of one forward pass needs to know about the positions.
struct Place {
    batch: usize,
    length: usize,
    kv_heads: usize,
    /// Query heads on each key-value head.
    group: usize,
    head_dim: usize,
    /// `[length, head_dim]`, the two halves equal.
    cos: Tensor,
    /// `[length, head_dim]`, the first half negated: it multiplies the swapped halves.
    sin: Tensor,
    /// `[length, seen + length]` of 0 and minus infinity; none for a single new token.
    mask: Option<Tensor>,
}

impl Place {
    fn new(config: &ModelConfig, batch: usize, seen: usize, length: usize) -> Result<Self> {
        let head_dim = config.head_dim;
        let half = head_dim / 2;
        let mut cos = vec![0f32; length * head_dim];
        let mut sin = vec![0f32; length * head_dim];
        for (step, (cos, sin)) in
            cos.chunks_exact_mut(head_dim).zip(sin.chunks_exact_mut(head_dim)).enumerate()
        {
            let (cos_low, cos_high) = cos.split_at_mut(half);
            let (sin_low, sin_high) = sin.split_at_mut(half);
            for (pair, (((cos_low, cos_high), sin_low), sin_high)) in
                cos_low.iter_mut().zip(cos_high).zip(sin_low).zip(sin_high).enumerate()
            {
                let frequency = config.rope_theta.powf(-2.0 * pair as f64 / head_dim as f64);
                let (s, c) = ((seen + step) as f64 * frequency).sin_cos();
                let (s, c) = (super::init::narrow(s), super::init::narrow(c));
                (*cos_low, *cos_high, *sin_low, *sin_high) = (c, c, -s, s);
            }
        }
        let mask = if length > 1 {
            let total = seen + length;
            let row = |step: usize| {
                (0..total).map(move |at| if at <= seen + step { 0.0 } else { f32::NEG_INFINITY })
            };
            let mask: Vec<f32> = (0..length).flat_map(row).collect();
            Some(Tensor::from_vec(mask, (length, total), &Device::Cpu)?)
        } else {
            None
        };
        Ok(Self {
            batch,
            length,
            kv_heads: config.num_key_value_heads,
            group: config.num_attention_heads / config.num_key_value_heads,
            head_dim,
            cos: Tensor::from_vec(cos, (length, head_dim), &Device::Cpu)?,
            sin: Tensor::from_vec(sin, (length, head_dim), &Device::Cpu)?,
            mask,
        })
    }

    /// Rows of tokens to `[batch, heads, length, head_dim]`.
    fn split(&self, rows: &Tensor, heads: usize) -> Result<Tensor> {
        let shape = (self.batch, self.length, heads, self.head_dim);
        Ok(rows.reshape(shape)?.transpose(1, 2)?.contiguous()?)
    }

    /// The rotary embedding, in Llama's layout: element `i` turns with element `i + half`.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let half = self.head_dim / 2;
        let swapped =
            Tensor::cat(&[x.narrow(D::Minus1, half, half)?, x.narrow(D::Minus1, 0, half)?], D::Minus1)?;
        Ok((x.broadcast_mul(&self.cos)? + swapped.broadcast_mul(&self.sin)?)?)
    }
}

/// Causal attention with grouped queries.
fn attention(
    layer: &Layer,
    x: &Tensor,
    place: &Place,
    cache: Option<(&mut KvCache, usize)>,
) -> Result<Tensor> {
    let Place { batch, length, kv_heads, group, head_dim, .. } = *place;
    let query = place.rotate(&place.split(&linear(x, &layer.query)?, kv_heads * group)?)?;
    let mut key = place.rotate(&place.split(&linear(x, &layer.key)?, kv_heads)?)?;
    let mut value = place.split(&linear(x, &layer.value)?, kv_heads)?;
    if let Some((cache, index)) = cache {
        if let Some((seen_key, seen_value)) = cache.layers.get(index) {
            key = Tensor::cat(&[seen_key, &key], 2)?;
            value = Tensor::cat(&[seen_value, &value], 2)?;
        }
        let grown = (key.clone(), value.clone());
        match cache.layers.get_mut(index) {
            Some(slot) => *slot = grown,
            None => cache.layers.push(grown),
        }
    }
    // The query heads of a group lie one after the other, so that each key-value head is used
    // as it is, without being repeated.
    let query = query.reshape((batch, kv_heads, group * length, head_dim))?;
    let scale = 1.0 / (head_dim as f64).sqrt();
    let mut scores = (query * scale)?.matmul(&key.transpose(2, 3)?)?;
    if let Some(mask) = &place.mask {
        let total = key.dim(2)?;
        scores = scores.reshape((batch, kv_heads, group, length, total))?.broadcast_add(mask)?.reshape((
            batch,
            kv_heads,
            group * length,
            total,
        ))?;
    }
    let mixed = softmax(&scores)?.matmul(&value)?;
    let heads = kv_heads * group;
    let rows = mixed
        .reshape((batch, heads, length, head_dim))?
        .transpose(1, 2)?
        .reshape((batch * length, heads * head_dim))?;
    linear(&rows, &layer.output)
}

/// The gated feed-forward layer, SwiGLU.
fn feed_forward(layer: &Layer, x: &Tensor) -> Result<Tensor> {
    let gate = linear(x, &layer.gate)?.silu()?;
    linear(&(gate * linear(x, &layer.up)?)?, &layer.down)
}

/// `x · wᵀ` for rows `x`.
fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(x.matmul(&weight.t()?)?)
}

/// Root-mean-square norm over the last dimension.
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok(x.broadcast_mul(&scale)?.broadcast_mul(weight)?)
}

/// Softmax over the last dimension. The maximum only shifts, so no gradient goes through it.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let max = x.detach().max_keepdim(D::Minus1)?;
    let exp = x.broadcast_sub(&max)?.exp()?;
    let sum = exp.sum_keepdim(D::Minus1)?;
    Ok(exp.broadcast_mul(&sum.recip()?)?)
}

fn check(config: &ModelConfig, params: &BTreeMap<String, Tensor>) -> Result<()> {
    let expected: BTreeMap<String, Vec<usize>> = expected_tensors(config).into_iter().collect();
    let missing: Vec<&str> =
        expected.keys().filter(|name| !params.contains_key(*name)).map(String::as_str).collect();
    if !missing.is_empty() {
        return Err(EngineError::new(format!("missing tensors: {}", name_some(&missing))));
    }
    let mut unexpected = Vec::new();
    for (name, tensor) in params {
        let Some(shape) = expected.get(name) else {
            unexpected.push(name.as_str());
            continue;
        };
        if tensor.dims() != shape.as_slice() {
            return Err(EngineError::new(format!(
                "tensor {name} has shape {:?}, wanted {shape:?}",
                tensor.dims()
            )));
        }
        if tensor.dtype() != DType::F32 {
            return Err(EngineError::new(format!(
                "tensor {name} has dtype {:?}, wanted F32",
                tensor.dtype()
            )));
        }
    }
    if !unexpected.is_empty() {
        return Err(EngineError::new(format!("unexpected tensors: {}", name_some(&unexpected))));
    }
    Ok(())
}

/// The first few of a list of names.
pub(super) fn name_some(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
