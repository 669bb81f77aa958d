//! The shape of a model, read from and written to a Hugging Face Llama `config.json`.

use serde_json::{Value, json};

use super::dtype::WeightDtype;
use super::error::{EngineError, Result};

/// The shape of a Llama-like decoder.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; even, because the rotary embedding works on two halves.
    pub head_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// What is added to the mean square in each norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the output head is the embedding matrix; then there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// The longest sequence, in tokens, prompt and answer together.
    pub max_position_embeddings: usize,
    /// Deviation of freshly initialised weights; not read when weights are loaded.
    pub initializer_range: f64,
    /// The element type of the published weights. The engine itself computes in 32 bits.
    pub dtype: WeightDtype,
}

/// Upper bounds of the integers: far above any Llama, low enough that products of two fit.
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 22;
const MAX_POSITIONS: usize = 1 << 24;

impl ModelConfig {
    /// The model of the quickstart: 2 layers of width 64, 4 heads on 2 key-value heads, tied
    /// embeddings of the 256 bytes, bfloat16 weights; 115,008 parameters.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            hidden_size: 64,
            intermediate_size: 192,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 256,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            tie_word_embeddings: true,
            max_position_embeddings: 256,
            initializer_range: 0.02,
            dtype: WeightDtype::Bf16,
        }
    }

    /// Reads the text of a `config.json`.
    ///
    /// What is absent takes the default of the Llama configuration: as many key-value heads as
    /// heads, `head_dim` = width / heads, eps 1e-6, theta 10000, 2048 positions, untied,
    /// initial deviation 0.02, float32.
    ///
    /// # Errors
    /// When the text is not JSON, a size is missing or out of bounds, or the file asks for
    /// something that this engine does not compute (scaled rotary embeddings, biases, another
    /// activation): it would load and answer wrongly.
    pub fn from_json(text: &str) -> Result<Self> {
        let root: Value = serde_json::from_str(text)
            .map_err(|error| EngineError::new(format!("config.json is not JSON: {error}")))?;
        if !root.is_object() {
            return Err(EngineError::new("config.json is not an object"));
        }
        refuse_unsupported(&root)?;
        let hidden_size = required(&root, "hidden_size")?;
        let num_attention_heads = required(&root, "num_attention_heads")?;
        let head_dim = match integer(&root, "head_dim")? {
            Some(width) => width,
            None if num_attention_heads == 0 || hidden_size % num_attention_heads != 0 => {
                return Err(EngineError::new(format!(
                    "hidden_size {hidden_size} is not divisible by num_attention_heads {num_attention_heads} and head_dim is not given"
                )));
            }
            None => hidden_size / num_attention_heads,
        };
        let theta = match rope_parameters(&root) {
            Some(rope) => number(rope, "rope_theta")?,
            None => None,
        };
        let theta = match theta {
            Some(theta) => Some(theta),
            None => number(&root, "rope_theta")?,
        };
        let config = Self {
            hidden_size,
            intermediate_size: required(&root, "intermediate_size")?,
            num_hidden_layers: required(&root, "num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: integer(&root, "num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            vocab_size: required(&root, "vocab_size")?,
            rms_norm_eps: number(&root, "rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: theta.unwrap_or(10_000.0),
            tie_word_embeddings: boolean(&root, "tie_word_embeddings")?.unwrap_or(false),
            max_position_embeddings: integer(&root, "max_position_embeddings")?.unwrap_or(2048),
            initializer_range: number(&root, "initializer_range")?.unwrap_or(0.02),
            dtype: match string(&root, "dtype")?.or(string(&root, "torch_dtype")?) {
                Some(name) => WeightDtype::from_hf(name)?,
                None => WeightDtype::F32,
            },
        };
        config.validate()?;
        Ok(config)
    }

    /// The text of a `config.json` that reads back as this configuration.
    #[must_use]
    pub fn to_json(&self) -> String {
        let value = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "torch_dtype": self.dtype.hf_name(),
            "attention_bias": false,
            "mlp_bias": false,
        });
        format!("{value:#}")
    }

    /// Checks every field against its bounds and against the others.
    ///
    /// # Errors
    /// Names the field, its value and what was wanted.
    pub fn validate(&self) -> Result<()> {
        for (name, value, max) in [
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_WIDTH),
            ("num_key_value_heads", self.num_key_value_heads, MAX_WIDTH),
            ("head_dim", self.head_dim, MAX_WIDTH),
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ] {
            if value == 0 || value > max {
                return Err(EngineError::new(format!("{name} is {value}, wanted 1 to {max}")));
            }
        }
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv != 0 {
            return Err(EngineError::new(format!(
                "num_attention_heads {heads} is not divisible by num_key_value_heads {kv}"
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(EngineError::new(format!("head_dim {} is odd, wanted even", self.head_dim)));
        }
        if heads * self.head_dim > MAX_WIDTH {
            return Err(EngineError::new(format!(
                "num_attention_heads {heads} x head_dim {} is more than {MAX_WIDTH}",
                self.head_dim
            )));
        }
        for (name, value) in
            [("rms_norm_eps", self.rms_norm_eps), ("initializer_range", self.initializer_range)]
        {
            if !(value > 0.0 && value < 1.0) {
                return Err(EngineError::new(format!("{name} is {value}, wanted a number between 0 and 1")));
            }
        }
        if !(self.rope_theta >= 1.0 && self.rope_theta.is_finite()) {
            return Err(EngineError::new(format!(
                "rope_theta is {}, wanted a finite number of at least 1",
                self.rope_theta
            )));
        }
        Ok(())
    }

    /// Number of parameters in all, tied ones counted once.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        super::model::expected_tensors(self)
            .iter()
            .map(|(_, shape)| shape.iter().map(|&dim| dim as u64).product::<u64>())
            .sum()
    }
}

/// Refuses what the forward pass does not compute.
fn refuse_unsupported(root: &Value) -> Result<()> {
    for name in ["attention_bias", "mlp_bias", "rope_interleaved"] {
        if boolean(root, name)? == Some(true) {
            return Err(EngineError::new(format!("{name} true is not supported")));
        }
    }
    let activation = string(root, "hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(EngineError::new(format!("hidden_act is {activation:?}, wanted \"silu\"")));
    }
    let model_type = string(root, "model_type")?.unwrap_or("llama");
    if model_type != "llama" {
        return Err(EngineError::new(format!("model_type is {model_type:?}, wanted \"llama\"")));
    }
    for rope in [root.get("rope_scaling"), rope_parameters(root)].into_iter().flatten() {
        for key in ["rope_type", "type"] {
            let kind = string(rope, key)?.unwrap_or("default");
            if kind != "default" {
                return Err(EngineError::new(format!(
                    "rotary embeddings of type {kind:?} are not supported, wanted \"default\""
                )));
            }
        }
    }
    Ok(())
}

fn rope_parameters(root: &Value) -> Option<&Value> {
    root.get("rope_parameters").filter(|value| !value.is_null())
}

/// A field that is present and not null.
fn field<'a>(root: &'a Value, name: &str) -> Option<&'a Value> {
    root.get(name).filter(|value| !value.is_null())
}

fn required(root: &Value, name: &str) -> Result<usize> {
    integer(root, name)?.ok_or_else(|| EngineError::new(format!("config.json has no {name}")))
}

fn integer(root: &Value, name: &str) -> Result<Option<usize>> {
    typed(root, name, "a whole number", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
}

fn number(root: &Value, name: &str) -> Result<Option<f64>> {
    typed(root, name, "a number", Value::as_f64)
}

fn boolean(root: &Value, name: &str) -> Result<Option<bool>> {
    typed(root, name, "true or false", Value::as_bool)
}

fn string<'a>(root: &'a Value, name: &str) -> Result<Option<&'a str>> {
    typed(root, name, "a string", Value::as_str)
}

fn typed<'a, T>(
    root: &'a Value,
    name: &str,
    wanted: &str,
    read: impl Fn(&'a Value) -> Option<T>,
) -> Result<Option<T>> {
    field(root, name)
        .map(|value| {
            read(value).ok_or_else(|| {
                let found: String = value.to_string().chars().take(80).collect();
                EngineError::new(format!("{name} is {found}, wanted {wanted}"))
            })
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOLLM2: &str = r#"{"architectures":["LlamaForCausalLM"],"attention_bias":false,
        "hidden_act":"silu","hidden_size":576,"intermediate_size":1536,"is_llama_config":true,
        "max_position_embeddings":8192,"model_type":"llama","num_attention_heads":9,
        "num_hidden_layers":30,"num_key_value_heads":3,"rms_norm_eps":1e-05,
        "rope_interleaved":false,"rope_scaling":null,"rope_theta":100000,
        "tie_word_embeddings":true,"torch_dtype":"bfloat16","vocab_size":49152}"#;

    #[test]
    fn smollm2_and_tiny_have_their_sizes() {
        let config = ModelConfig::from_json(SMOLLM2).unwrap();
        assert_eq!((config.head_dim, config.rope_theta), (64, 100_000.0));
        assert_eq!(config.parameters(), 134_515_008);
        assert_eq!(ModelConfig::tiny().parameters(), 115_008);
        ModelConfig::tiny().validate().unwrap();
    }

    #[test]
    fn json_reads_back() {
        let mut config = ModelConfig::tiny();
        config.tie_word_embeddings = false;
        config.dtype = WeightDtype::F16;
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn newer_spellings_are_read() {
        let text = SMOLLM2
            .replace(
                "\"rope_theta\":100000",
                "\"rope_parameters\":{\"rope_theta\":5e5,\"rope_type\":\"default\"}",
            )
            .replace("torch_dtype", "dtype");
        let config = ModelConfig::from_json(&text).unwrap();
        assert_eq!((config.rope_theta, config.dtype), (5e5, WeightDtype::Bf16));
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for (from, to, wanted) in [
            ("\"hidden_size\":576", "\"hidden_size\":577", "hidden_size 577 is not divisible"),
            ("\"hidden_size\":576", "\"hidden_size\":-1", "hidden_size is -1"),
            ("\"hidden_size\":576", "\"hidden_size\":9e99", "hidden_size is"),
            (
                "\"num_key_value_heads\":3",
                "\"num_key_value_heads\":4",
                "is not divisible by num_key_value_heads 4",
            ),
            ("\"num_key_value_heads\":3", "\"num_key_value_heads\":0", "num_key_value_heads is 0"),
            ("\"vocab_size\":49152", "\"vocab_size\":99999999999", "vocab_size is 99999999999"),
            ("\"num_hidden_layers\":30", "\"num_hidden_layers\":null", "no num_hidden_layers"),
            ("\"rms_norm_eps\":1e-05", "\"rms_norm_eps\":0", "rms_norm_eps is 0"),
            ("\"rope_theta\":100000", "\"rope_theta\":\"x\"", "rope_theta is"),
            ("\"rope_scaling\":null", "\"rope_scaling\":{\"rope_type\":\"llama3\"}", "llama3"),
            ("\"hidden_act\":\"silu\"", "\"hidden_act\":\"gelu\"", "hidden_act"),
            ("\"attention_bias\":false", "\"attention_bias\":true", "attention_bias"),
            ("bfloat16", "int8", "int8"),
            ("\"model_type\":\"llama\"", "\"head_dim\":63", "head_dim 63 is odd"),
        ] {
            let text = SMOLLM2.replace(from, to);
            assert_ne!(text, SMOLLM2);
            let error = ModelConfig::from_json(&text).unwrap_err();
            assert!(error.message().contains(wanted), "{error} / {wanted}");
        }
        assert!(ModelConfig::from_json("[]").is_err());
        assert!(ModelConfig::from_json("{").is_err());
    }
}
