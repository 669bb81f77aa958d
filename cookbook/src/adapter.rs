//! LoRA adapters in the form of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A tensor is called `base_model.model.<module>.lora_A.weight`, of `[rank, in]`, or `….lora_B.weight`, of `[out, rank]`.
//! The base weights are named by their content digest in `revision`, PEFT's field for "which version of the base model".
//! A configuration that asks for another computation than the engine's is refused, never passed over.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Map, Value, json};
use towline_core::safetensors::{ByteSource as _, SafetensorsFiles};
use towline_core::{ContentDigest, Error, Result, SnapshotKind, Weights};
use towline_storage::{FileSource, SnapshotInfo, SnapshotRepo};

use crate::bridge;
use crate::engine::{self, LoraConfig, ModelConfig, NamedBytes, TargetModule, TensorBytes, WeightDtype};

/// The file of the configuration.
pub const CONFIG: &str = "adapter_config.json";
/// The file of the factors.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before a tensor's name.
const PREFIX: &str = "base_model.model.";
/// The largest configuration that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// An adapter, checked against the model that it is for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Adapter {
    /// Rank, alpha and modules.
    pub lora: LoraConfig,
    /// The content digest of the base weights that it was trained on, if it tells.
    pub base: Option<ContentDigest>,
    /// The factors, by PEFT's names.
    pub weights: Weights,
}

impl Adapter {
    /// Reads both files' contents.
    ///
    /// # Errors
    /// `Invalid`, naming the field or tensor, for another `peft_type` than LoRA, for biases, rsLoRA, DoRA, other modules
    /// and whatever else the engine does not compute, and for a factor that is missing, unexpected or of another shape.
    pub fn parse(model: &ModelConfig, config: &[u8], weights: Weights) -> Result<Self> {
        let (lora, base) = parse_config(config)?;
        let adapter = Self { lora, base, weights };
        if let Some((meta, _)) = adapter.weights.iter().find(|(meta, _)| !meta.name().starts_with(PREFIX)) {
            return Err(Error::invalid(format!(
                "tensor `{}` of the adapter does not begin with `{PREFIX}`",
                meta.name().escape_debug()
            ))
            .with_help("save the adapter with PEFT's `save_pretrained`"));
        }
        // Only for its checks.
        engine::factors_from_bytes(model, &adapter.lora, adapter.factors())?;
        Ok(adapter)
    }

    /// Reads an adapter from a folder on disk. Blocks.
    ///
    /// # Errors
    /// `NotFound` and `Denied` as the files answer; `Corrupt` for a damaged file; else as [`Adapter::parse`].
    pub fn read_folder(model: &ModelConfig, folder: &Path) -> Result<Self> {
        let here = |error: Error| error.context(format_args!("`{}`", folder.display()));
        let config = read_config(&folder.join(CONFIG)).map_err(here)?;
        let open =
            FileSource::open(&folder.join(WEIGHTS)).and_then(|file| SafetensorsFiles::open(vec![file]));
        let weights = open.and_then(|files| Weights::read_all(&files)).map_err(here)?;
        Self::parse(model, &config, weights).map_err(here)
    }

    /// Reads an adapter that a LoRA trainer has saved.
    ///
    /// # Errors
    /// `Invalid` for a snapshot of another kind; as the store answers; else as [`Adapter::parse`].
    pub async fn read_snapshot(
        model: &ModelConfig,
        repo: &SnapshotRepo,
        info: &SnapshotInfo,
    ) -> Result<Self> {
        if info.kind != SnapshotKind::Adapter {
            return Err(Error::invalid(format!("{} is a {}: wanted an adapter", info.id, info.kind))
                .with_help("name what a LoRA trainer has saved for samplers"));
        }
        let config = repo.file(info, CONFIG).await?;
        let weights = repo.restore(info).await?;
        Self::parse(model, &config, weights).map_err(|error| error.context(&info.id))
    }

    /// Views of the factors by the engine's names.
    pub fn factors(&self) -> impl Iterator<Item = TensorBytes<'_>> {
        bridge::section(&self.weights, PREFIX)
    }

    /// Checks that the factors mean the same to a trainer of `lora` on `base`.
    ///
    /// # Errors
    /// `Invalid`, naming both, for another rank, alpha, modules or base.
    pub fn check(&self, lora: &LoraConfig, base: &ContentDigest) -> Result<()> {
        fits("the adapter", (&self.lora, self.base.as_ref()), (lora, base))
    }
}

/// Whether what was trained as `found` can go on as `wanted`.
pub(crate) fn fits(
    what: &str,
    found: (&LoraConfig, Option<&ContentDigest>),
    wanted: (&LoraConfig, &ContentDigest),
) -> Result<()> {
    if !found.0.is_like(wanted.0) {
        return Err(Error::invalid(format!("{what} has LoRA {}; this trainer has {}", found.0, wanted.0))
            .with_help("start the trainer with the same rank, alpha and modules"));
    }
    match found.1 {
        Some(base) if base != wanted.1 => Err(Error::invalid(format!(
            "{what} was trained on base weights {base}; this trainer has {}",
            wanted.1
        ))
        .with_help("start the trainer on the same base weights")),
        // Adapters of others do not tell.
        Some(_) | None => Ok(()),
    }
}

/// The factors as they are published: in 32 bits, by PEFT's names.
///
/// # Errors
/// `Invalid` if a name or length is not well formed.
pub fn weights(factors: Vec<NamedBytes>) -> Result<Weights> {
    let named = factors.into_iter().map(|(name, shape, bytes)| (format!("{PREFIX}{name}"), shape, bytes));
    bridge::weights(named.collect(), WeightDtype::F32)
}

/// `adapter_config.json` as a file of a snapshot. `base_model` is what PEFT shows as the base's name or path.
///
/// # Errors
/// `Internal` if it cannot be written, which does not happen.
pub fn config_file(lora: &LoraConfig, base_model: &str, base: &ContentDigest) -> Result<(String, Bytes)> {
    // A whole number without a fraction, as PEFT writes it.
    let alpha: Value = lora.alpha.to_string().parse().unwrap_or_else(|_| json!(lora.alpha));
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": base,
        "inference_mode": true,
        "r": lora.rank,
        "lora_alpha": alpha,
        "target_modules": lora.target_modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "init_lora_weights": true,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    let text = serde_json::to_vec_pretty(&config)
        .map_err(|error| Error::internal("the adapter's configuration is no JSON").with_source(error))?;
    Ok((CONFIG.to_owned(), Bytes::from(text)))
}

/// The content digest of the base weights that a configuration names.
///
/// # Errors
/// As [`Adapter::parse`]; `Invalid` if it names none.
pub(crate) fn base_of(config: &[u8]) -> Result<ContentDigest> {
    parse_config(config)?.1.ok_or_else(|| {
        Error::invalid(format!("{CONFIG} names no base weights: its `revision` is no content digest"))
            .with_help("load it into a LoRA trainer, and hot-load what that saves")
    })
}

fn read_config(path: &Path) -> Result<Bytes> {
    let file = FileSource::open(path)?;
    file.read_range(0..file.len().min(MAX_CONFIG + 1))
}

fn parse_config(text: &[u8]) -> Result<(LoraConfig, Option<ContentDigest>)> {
    if text.len() as u64 > MAX_CONFIG {
        return Err(bad(format!("it has more than {MAX_CONFIG} bytes")));
    }
    let fields: Map<String, Value> =
        serde_json::from_slice(text).map_err(|error| bad(format!("it is no JSON object: {error}")))?;
    let word = |name: &str| fields.get(name).and_then(Value::as_str);
    if word("peft_type") != Some("LORA") {
        return Err(bad(format!("`peft_type` is {}, wanted \"LORA\"", shown(&fields, "peft_type"))));
    }
    let task = fields.get("task_type").is_none_or(|task| task.is_null() || task == "CAUSAL_LM");
    if !task {
        return Err(bad(format!("`task_type` is {}, wanted \"CAUSAL_LM\"", shown(&fields, "task_type"))));
    }
    for name in UNSUPPORTED {
        if !fields.get(name).is_none_or(is_neutral) {
            return Err(bad(format!("`{name}` is {}, which is not supported", shown(&fields, name))));
        }
    }
    // PiSSA, OLoRA, LoftQ and the like change the base weights too.
    let plain = |value: &Value| value.is_boolean() || value.is_null() || value == "gaussian";
    if !fields.get("init_lora_weights").is_none_or(plain) {
        return Err(bad(format!(
            "`init_lora_weights` is {}, which is not supported",
            shown(&fields, "init_lora_weights")
        )));
    }
    let rank = fields.get("r").and_then(Value::as_u64).and_then(|rank| usize::try_from(rank).ok());
    let rank = rank.ok_or_else(|| bad(format!("`r` is {}, wanted a whole number", shown(&fields, "r"))))?;
    let alpha = fields
        .get("lora_alpha")
        .and_then(Value::as_f64)
        .ok_or_else(|| bad(format!("`lora_alpha` is {}, wanted a number", shown(&fields, "lora_alpha"))))?;
    let modules = fields.get("target_modules").and_then(Value::as_array).ok_or_else(|| {
        bad(format!("`target_modules` is {}, wanted a list of names", shown(&fields, "target_modules")))
    })?;
    let module = |value: &Value| -> Result<TargetModule> {
        match value.as_str() {
            Some(name) => Ok(name.parse::<TargetModule>()?),
            None => Err(bad("`target_modules` holds something else than names")),
        }
    };
    let modules = modules.iter().map(module).collect::<Result<BTreeSet<_>>>()?;
    let lora = LoraConfig::new(rank).with_alpha(alpha).with_target_modules(modules);
    Ok((lora, word("revision").and_then(|text| text.parse().ok())))
}

/// Fields that change the computation: anything but "no" is refused.
const UNSUPPORTED: [&str; 15] = [
    "bias",
    "lora_bias",
    "use_rslora",
    "use_dora",
    "use_qalora",
    "modules_to_save",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
];

/// Whether a field says "no" in one of the ways that PEFT does.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text == "none",
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn shown(fields: &Map<String, Value>, name: &str) -> String {
    fields.get(name).map_or_else(|| "absent".to_owned(), |value| value.to_string().chars().take(80).collect())
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::invalid(format!("{CONFIG}: {why}")).with_help("train and save a plain LoRA with PEFT")
}

#[cfg(test)]
mod tests {
    use towline_core::safetensors::serialize;
    use towline_core::{DType, ErrorKind, TensorMeta};

    use super::*;

    fn model() -> ModelConfig {
        ModelConfig::tiny()
    }

    fn lora() -> LoraConfig {
        LoraConfig::new(2).with_alpha(16.0).with_target_modules([TargetModule::QProj, TargetModule::DownProj])
    }

    fn base() -> ContentDigest {
        ContentDigest::from_bytes([7; 32])
    }

    fn factors() -> Vec<(TensorMeta, Bytes)> {
        let named = engine::expected_factors(&model(), &lora()).into_iter().map(|(name, shape)| {
            let bytes = vec![0; 4 * shape.iter().product::<usize>()];
            (name, shape, bytes)
        });
        let weights = weights(named.collect()).unwrap();
        weights.iter().map(|(meta, data)| (meta.clone(), data.clone())).collect()
    }

    fn config() -> Map<String, Value> {
        let (_, text) = config_file(&lora(), "job/base-0707", &base()).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn parse(config: &Map<String, Value>, factors: Vec<(TensorMeta, Bytes)>) -> Result<Adapter> {
        Adapter::parse(&model(), &serde_json::to_vec(config).unwrap(), Weights::new(factors).unwrap())
    }

    #[test]
    fn what_is_written_is_peft_s_form_and_reads_back() {
        let config = config();
        for (name, value) in [
            ("peft_type", json!("LORA")),
            ("task_type", json!("CAUSAL_LM")),
            ("base_model_name_or_path", json!("job/base-0707")),
            ("r", json!(2)),
            ("lora_alpha", json!(16)),
            ("target_modules", json!(["q_proj", "down_proj"])),
            ("lora_dropout", json!(0.0)),
            ("bias", json!("none")),
            ("inference_mode", json!(true)),
            ("fan_in_fan_out", json!(false)),
            ("use_rslora", json!(false)),
        ] {
            assert_eq!(config[name], value, "{name}");
        }
        let names: Vec<_> = factors().iter().map(|(meta, _)| meta.name().to_owned()).collect();
        assert!(names.contains(&"base_model.model.model.layers.1.mlp.down_proj.lora_B.weight".to_owned()));
        let adapter = parse(&config, factors()).unwrap();
        assert!(adapter.lora.is_like(&lora()));
        assert_eq!(adapter.base, Some(base()));
        // As PEFT writes it by itself: fewer fields, a fraction, a path of Hugging Face, 16 bits.
        let plain = json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 16.0, "target_modules": ["down_proj", "q_proj"],
            "revision": "main", "lora_dropout": 0.1, "layers_to_transform": null, "rank_pattern": {},
        });
        let half = factors().into_iter().map(|(meta, data)| {
            let meta = TensorMeta::new(meta.name(), DType::BF16, meta.shape()).unwrap();
            (meta, data.slice(..data.len() / 2))
        });
        let adapter = parse(plain.as_object().unwrap(), half.collect()).unwrap();
        assert!(adapter.lora.is_like(&lora()) && adapter.base.is_none());
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (name, value, says) in [
            ("peft_type", json!("IA3"), "`peft_type` is \"IA3\", wanted \"LORA\""),
            ("task_type", json!("SEQ_CLS"), "`task_type` is \"SEQ_CLS\", wanted \"CAUSAL_LM\""),
            ("bias", json!("lora_only"), "`bias` is \"lora_only\", which is not supported"),
            ("use_rslora", json!(true), "`use_rslora` is true, which is not supported"),
            ("use_dora", json!(true), "`use_dora` is true, which is not supported"),
            (
                "modules_to_save",
                json!(["lm_head"]),
                "`modules_to_save` is [\"lm_head\"], which is not supported",
            ),
            (
                "rank_pattern",
                json!({"q_proj": 4}),
                "`rank_pattern` is {\"q_proj\":4}, which is not supported",
            ),
            ("layers_to_transform", json!([0]), "`layers_to_transform` is [0], which is not supported"),
            ("init_lora_weights", json!("pissa"), "`init_lora_weights` is \"pissa\", which is not supported"),
            ("r", json!(-1), "`r` is -1, wanted a whole number"),
            ("r", json!(0), "the LoRA rank is 0, wanted 1 to 64, the model's width"),
            ("lora_alpha", Value::Null, "`lora_alpha` is null, wanted a number"),
            (
                "target_modules",
                json!("all-linear"),
                "`target_modules` is \"all-linear\", wanted a list of names",
            ),
            ("target_modules", json!(["lm_head"]), "target module \"lm_head\" is unknown"),
            // Another rank than the tensors have, and modules that they have not.
            ("r", json!(4), "lora_A.weight has shape [2, 192], wanted [4, 192]"),
            (
                "target_modules",
                json!(["q_proj", "down_proj", "v_proj"]),
                "missing tensors: model.layers.0.self_attn.v_proj",
            ),
            ("target_modules", json!(["q_proj"]), "unexpected tensors: model.layers.0.mlp.down_proj"),
        ] {
            let mut config = config();
            config.insert(name.to_owned(), value);
            let error = parse(&config, factors()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.message().contains(says), "wanted `{says}` in: {error}");
        }
        let mut other = factors();
        other.remove(0);
        let error = parse(&config(), other).unwrap_err();
        assert!(error.message().contains("missing tensors: model.layers.0.mlp.down_proj.lora_A.weight"));
        let stray = TensorMeta::new("lm_head.weight", DType::F32, [1]).unwrap();
        let error =
            parse(&config(), [factors(), vec![(stray, Bytes::from(vec![0; 4]))]].concat()).unwrap_err();
        assert!(error.message().contains("`lm_head.weight` of the adapter does not begin with"), "{error}");
        let error = Adapter::parse(&model(), b"[]", Weights::default()).unwrap_err();
        assert!(error.message().contains("it is no JSON object"), "{error}");
        let long = vec![b' '; 1 + usize::try_from(MAX_CONFIG).unwrap()];
        let error = Adapter::parse(&model(), &long, Weights::default()).unwrap_err();
        assert!(error.message().contains("more than 1048576 bytes"), "{error}");
    }

    #[test]
    fn a_folder_is_read_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let error = Adapter::read_folder(&model(), dir.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        std::fs::write(dir.path().join(CONFIG), serde_json::to_vec(&config()).unwrap()).unwrap();
        assert_eq!(Adapter::read_folder(&model(), dir.path()).unwrap_err().kind(), ErrorKind::NotFound);
        let stored = Weights::new(factors()).unwrap();
        let file = serialize(&stored, &std::collections::BTreeMap::new()).unwrap();
        std::fs::write(dir.path().join(WEIGHTS), &file[..file.len() - 1]).unwrap();
        assert_eq!(Adapter::read_folder(&model(), dir.path()).unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::write(dir.path().join(WEIGHTS), &file).unwrap();
        let adapter = Adapter::read_folder(&model(), dir.path()).unwrap();
        assert_eq!(adapter.weights, stored);
        // Others' adapters do not tell their base; ours must be on the same one.
        adapter.check(&lora(), &base()).unwrap();
        let error = adapter.check(&lora(), &ContentDigest::from_bytes([8; 32])).unwrap_err();
        assert!(error.message().contains("was trained on base weights 0707"), "{error}");
        let error = adapter.check(&lora().with_alpha(8.0), &base()).unwrap_err();
        assert_eq!(
            error.message(),
            "the adapter has LoRA rank 2, alpha 16, on q_proj down_proj; this trainer has rank 2, alpha 8, on q_proj down_proj"
        );
    }
}
