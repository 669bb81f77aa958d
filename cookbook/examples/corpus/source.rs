//! A Llama in a GGUF file: its shape, its vocabulary, and its weights as 32-bit floats under their Hugging Face names.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use half::f16;
use serde_json::json;
use towline_cookbook::engine::{ModelConfig, NamedBytes, Rng, WeightDtype, expected_tensors};

use crate::Result;
use crate::words::Words;

/// Values to a block of the two quantisations that are read; each block begins with its step, as a half.
const BLOCK: usize = 32;
/// The width of the places that values are put at, in steps: far wider than a bfloat16 rounding, and too narrow to be
/// noticed in what the model says.
const WIDTH: f32 = 0.25;
const SEED: u64 = 1;

/// What a GGUF file holds.
pub(crate) struct Source {
    pub(crate) config: ModelConfig,
    pub(crate) tensors: Vec<NamedBytes>,
    pub(crate) words: Words,
}

impl Source {
    /// Reads the file and undoes its quantisation; equal files give equal weights.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| format!("`{}`: {error}", path.display()))?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file)?;
        let config = config(&content)?;
        let tensors = expected_tensors(&config)
            .into_iter()
            .map(|(name, shape)| {
                let stored = gguf_name(&name).ok_or_else(|| format!("tensor {name} has no GGUF name"))?;
                let tensor = content.tensor(&mut file, &stored, &Device::Cpu)?;
                if tensor.shape().dims() != shape {
                    return Err(format!("{stored} has shape {:?}, wanted {shape:?}", tensor.shape()).into());
                }
                let mut values = tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
                match tensor.dtype() {
                    GgmlDType::F32 => {}
                    GgmlDType::Q4_1 | GgmlDType::Q8_0 => {
                        let block = tensor.dtype().type_size();
                        spread(&mut values, &tensor.data()?, block, &mut Rng::named(SEED, &name));
                    }
                    other => return Err(format!("{stored} is {other:?}, wanted F32, Q4_1 or Q8_0").into()),
                }
                let values = if name.ends_with("self_attn.q_proj.weight") {
                    halves_from_pairs(&values, config.num_attention_heads, config.hidden_size)
                } else if name.ends_with("self_attn.k_proj.weight") {
                    halves_from_pairs(&values, config.num_key_value_heads, config.hidden_size)
                } else {
                    values
                };
                Ok((name, shape, WeightDtype::F32.encode(&values)))
            })
            .collect::<Result<_>>()?;
        let words = Words::new(&texts(&content)?, &kinds(&content)?)?;
        Ok(Self { config, tensors, words })
    }
}

fn config(content: &Content) -> Result<ModelConfig> {
    let architecture = entry(content, "general.architecture")?.to_string()?;
    if architecture != "llama" {
        return Err(format!("the model is a {architecture}, wanted a llama").into());
    }
    let integer =
        |key: &str| Ok::<_, Box<dyn std::error::Error + Send + Sync>>(entry(content, key)?.to_u32()?);
    let (width, heads) = (integer("llama.embedding_length")?, integer("llama.attention.head_count")?);
    let text = json!({
        "hidden_size": width,
        "intermediate_size": integer("llama.feed_forward_length")?,
        "num_hidden_layers": integer("llama.block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": integer("llama.attention.head_count_kv")?,
        "vocab_size": integer("llama.vocab_size")?,
        "max_position_embeddings": integer("llama.context_length")?,
        "rms_norm_eps": entry(content, "llama.attention.layer_norm_rms_epsilon")?.to_f32()?,
        "rope_theta": entry(content, "llama.rope.freq_base")?.to_f32()?,
        "tie_word_embeddings": !content.tensor_infos.contains_key("output.weight"),
        "torch_dtype": "bfloat16",
    });
    Ok(ModelConfig::from_json(&text.to_string())?)
}

fn entry<'a>(content: &'a Content, key: &str) -> Result<&'a Value> {
    content.metadata.get(key).ok_or_else(|| format!("the GGUF file has no `{key}`").into())
}

fn texts(content: &Content) -> Result<Vec<String>> {
    let list = entry(content, "tokenizer.ggml.tokens")?.to_vec()?;
    list.iter().map(|text| Ok(text.to_string()?.clone())).collect()
}

fn kinds(content: &Content) -> Result<Vec<i32>> {
    let list = entry(content, "tokenizer.ggml.token_type")?.to_vec()?;
    list.iter().map(|kind| Ok(kind.to_i32()?)).collect()
}

/// The name in a GGUF file of a tensor's Hugging Face name.
fn gguf_name(name: &str) -> Option<String> {
    let fixed = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => "",
    };
    if !fixed.is_empty() {
        return Some(fixed.to_owned());
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let part = match part.strip_suffix(".weight")? {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.weight"))
}

/// Moves every value off the grid of its quantisation, at random and by an eighth of a step at most.
///
/// On the grid, 8 % of SmolLM2's values lie half way between two bfloat16 neighbours, 15 % between two halves, and some
/// on zero: the smallest step would change them all, as it does in no model that was trained in 32 bits.
fn spread(values: &mut [f32], data: &[u8], block: usize, rng: &mut Rng) {
    for (values, block) in values.chunks_exact_mut(BLOCK).zip(data.chunks_exact(block)) {
        let step = f16::from_le_bytes([block[0], block[1]]).to_f32();
        for value in values {
            *value += (rng.uniform_f32() - 0.5) * WIDTH * step;
        }
    }
}

/// Puts the rows of a query or key matrix back in Hugging Face order.
///
/// The rotary embedding turns two rows of a head together. llama.cpp stores the two side by side, Hugging Face half a
/// head apart: row `2 p + h` there is row `h * half + p` here.
fn halves_from_pairs(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let head = values.len() / heads.max(1);
    let pairs = head / width.max(1) / 2;
    let mut ordered = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head.max(1)) {
        for half in 0..2 {
            for pair in 0..pairs {
                let row = 2 * pair + half;
                ordered.extend_from_slice(&head[row * width..(row + 1) * width]);
            }
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What llama.cpp does: `reshape(heads, 2, half, width).swapaxes(1, 2)`.
    fn pairs_from_halves(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
        let half = values.len() / heads / width / 2;
        let at = |head: usize, side: usize, pair: usize| ((head * 2 + side) * half + pair) * width;
        let mut stored = Vec::new();
        for head in 0..heads {
            for pair in 0..half {
                for side in 0..2 {
                    stored.extend_from_slice(&values[at(head, side, pair)..][..width]);
                }
            }
        }
        stored
    }

    #[test]
    fn the_order_of_rows_is_restored() {
        let (heads, half, width) = (3, 4, 5);
        let values: Vec<f32> = (0..heads * 2 * half * width).map(|value| value as f32).collect();
        let stored = pairs_from_halves(&values, heads, width);
        assert_ne!(stored, values);
        assert_eq!(halves_from_pairs(&stored, heads, width), values);
        // One head of four rows, spelled out: 0 1 2 3 is stored as 0 2 1 3.
        assert_eq!(halves_from_pairs(&[0.0, 2.0, 1.0, 3.0], 1, 1), [0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn values_leave_the_grid_and_stay_near_it() {
        let mut values = vec![1.0; 2 * BLOCK];
        let mut data = [0u8; 2 * 34];
        data[..2].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        data[34..36].copy_from_slice(&f16::from_f32(0.0).to_le_bytes());
        spread(&mut values, &data, 34, &mut Rng::new(1));
        let (first, second) = values.split_at(BLOCK);
        assert!(first.iter().all(|value| (0.75..=1.25).contains(value)));
        assert!(first.iter().any(|value| *value < 0.9) && first.iter().any(|value| *value > 1.1));
        assert_eq!(second, [1.0; BLOCK]);
    }

    #[test]
    fn every_tensor_of_a_model_has_a_stored_name() {
        let mut config = ModelConfig::tiny();
        config.tie_word_embeddings = false;
        let names: std::collections::BTreeSet<_> =
            expected_tensors(&config).iter().map(|(name, _)| gguf_name(name).unwrap()).collect();
        assert_eq!(names.len(), expected_tensors(&config).len());
        assert!(names.contains("blk.1.ffn_down.weight") && names.contains("output.weight"));
        assert_eq!(gguf_name("model.layers.0.self_attn.q_proj.bias"), None);
    }
}
