//! The transformer: gradients of every parameter, and the same numbers by every way through it.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use towline_cookbook::engine::{
    Datum, KvCache, Loss, Model, ModelConfig, Rng, batch_loss, expected_tensors, initial_params,
};

/// Three layers, untied, with weights large enough that every part matters.
fn config() -> ModelConfig {
    let mut config = ModelConfig::tiny();
    config.num_hidden_layers = 3;
    config.hidden_size = 24;
    config.intermediate_size = 40;
    config.num_attention_heads = 6;
    config.num_key_value_heads = 2;
    config.head_dim = 8;
    config.vocab_size = 50;
    config.tie_word_embeddings = false;
    config
}

fn params(config: &ModelConfig) -> BTreeMap<String, Tensor> {
    let params = initial_params(config, 5).unwrap();
    let scale = |(name, tensor): (String, Tensor)| {
        let scaled = if tensor.rank() == 2 { (tensor * 8.0).unwrap() } else { tensor };
        (name, scaled)
    };
    params.into_iter().map(scale).collect()
}

fn variables(params: &BTreeMap<String, Tensor>) -> BTreeMap<String, Var> {
    params.iter().map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap())).collect()
}

fn model_of(config: &ModelConfig, vars: &BTreeMap<String, Var>) -> Model {
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    Model::new(config, &tensors).unwrap()
}

fn random_tokens(rng: &mut Rng, length: usize, vocab: usize) -> Vec<u32> {
    (0..length).map(|_| rng.below(vocab as u64) as u32).collect()
}

fn random_batch(vocab: usize, lengths: &[usize]) -> Vec<Datum> {
    let mut rng = Rng::new(9);
    lengths
        .iter()
        .map(|&length| {
            let tokens = random_tokens(&mut rng, length, vocab);
            let targets = random_tokens(&mut rng, length, vocab);
            let weights = (0..length).map(|_| rng.uniform_f32()).collect();
            Datum::supervised(tokens, targets, weights)
        })
        .collect()
}

fn logits(model: &Model, rows: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    model.forward(&Tensor::new(rows.to_vec(), &Device::Cpu).unwrap()).unwrap().to_vec3().unwrap()
}

fn assert_close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= tolerance, "{what}: {a} {b}");
    }
}

#[test]
fn every_parameter_has_a_gradient() {
    for (config, names) in [(config(), 30), (ModelConfig::tiny(), 20)] {
        let vars = variables(&params(&config));
        let model = model_of(&config, &vars);
        for loss in [Loss::CrossEntropy, Loss::ImportanceSampling] {
            let mut batch = random_batch(config.vocab_size, &[7, 4, 9]);
            for datum in &mut batch {
                datum.advantages = datum.weights.clone();
                datum.logprobs = vec![-4.0; datum.tokens.len()];
            }
            let grads = batch_loss(&model, &batch, loss).unwrap().loss.backward().unwrap();
            let mut with_gradient = 0;
            for (name, var) in &vars {
                let gradient = grads.get(var).unwrap_or_else(|| panic!("{name}: no gradient"));
                let norm: f32 = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
                assert!(norm > 1e-4 && norm.is_finite(), "{name}: {norm}");
                with_gradient += 1;
            }
            assert_eq!(with_gradient, names);
            assert_eq!(expected_tensors(&config).len(), names);
        }
    }
}

#[test]
fn gradients_are_the_slopes() {
    let config = config();
    let vars = variables(&params(&config));
    let model = model_of(&config, &vars);
    let batch = random_batch(config.vocab_size, &[6, 8]);
    let loss = || {
        let loss = batch_loss(&model, &batch, Loss::CrossEntropy).unwrap().loss;
        loss.to_scalar::<f32>().unwrap()
    };
    let grads = batch_loss(&model, &batch, Loss::CrossEntropy).unwrap().loss.backward().unwrap();
    // The element with the largest gradient of every tensor: the slope is then far above the
    // rounding of the loss.
    for (name, var) in &vars {
        let gradient: Vec<f32> = grads.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let at = (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs()));
        let at = at.unwrap();
        let before: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
        let step = 1e-2;
        let moved = |by: f32| {
            let mut values = before.clone();
            values[at] += by;
            var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu).unwrap()).unwrap();
            loss()
        };
        let slope = (moved(step) - moved(-step)) / (2.0 * step);
        moved(0.0);
        let error = (slope - gradient[at]).abs();
        assert!(error < 0.02 * gradient[at].abs() + 5e-3, "{name}: {slope} {}", gradient[at]);
    }
}

#[test]
fn padding_and_batching_do_not_change_a_sequence() {
    let config = config();
    let model = Model::new(&config, &params(&config)).unwrap();
    let mut rng = Rng::new(2);
    let rows: Vec<Vec<u32>> =
        [9, 4, 1, 7].iter().map(|&length| random_tokens(&mut rng, length, 50)).collect();
    let padded: Vec<Vec<u32>> =
        rows.iter().map(|row| row.iter().copied().chain(std::iter::repeat(0)).take(9).collect()).collect();
    let together = logits(&model, &padded);
    for (row, together) in rows.iter().zip(together) {
        let alone = &logits(&model, std::slice::from_ref(row))[0];
        for (alone, together) in alone.iter().zip(&together) {
            assert_close(alone, together, 1e-5, "padded");
        }
    }
}

/// The same model as plain loops over 64-bit numbers, one position at a time.
fn reference(config: &ModelConfig, params: &BTreeMap<String, Tensor>, tokens: &[u32]) -> Vec<Vec<f64>> {
    let weight = |name: &str| -> Vec<f64> {
        let values: Vec<f32> = params[name].flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f64::from).collect()
    };
    let linear = |x: &[f64], name: &str| -> Vec<f64> {
        let rows = weight(name);
        rows.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let norm = |x: &[f64], name: &str| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = (mean + config.rms_norm_eps).sqrt();
        x.iter().zip(weight(name)).map(|(x, weight)| x / scale * weight).collect()
    };
    let (width, half) = (config.head_dim, config.head_dim / 2);
    let rope = |x: &[f64], position: usize| -> Vec<f64> {
        let turned = |index: usize| {
            let exponent = 2.0 * (index % half) as f64 / width as f64;
            let angle = position as f64 / config.rope_theta.powf(exponent);
            let other = if index < half { -x[index + half] } else { x[index - half] };
            x[index] * angle.cos() + other * angle.sin()
        };
        (0..width).map(turned).collect()
    };
    let embed = weight("model.embed_tokens.weight");
    let size = config.hidden_size;
    let mut rows: Vec<Vec<f64>> =
        tokens.iter().map(|&token| embed[token as usize * size..][..size].to_vec()).collect();
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let normed: Vec<_> = rows.iter().map(|x| norm(x, &name("input_layernorm"))).collect();
        let all = |part: &str| -> Vec<Vec<f64>> { normed.iter().map(|x| linear(x, &name(part))).collect() };
        let (queries, keys, values) =
            (all("self_attn.q_proj"), all("self_attn.k_proj"), all("self_attn.v_proj"));
        for (position, row) in rows.iter_mut().enumerate() {
            let mut mixed = Vec::new();
            for head in 0..config.num_attention_heads {
                let shared = head / (config.num_attention_heads / config.num_key_value_heads);
                let query = rope(&queries[position][head * width..][..width], position);
                let weights: Vec<f64> = (0..=position)
                    .map(|at| {
                        let key = rope(&keys[at][shared * width..][..width], at);
                        let dot: f64 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                        (dot / (width as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for index in 0..width {
                    let value = |at: usize| weights[at] / total * values[at][shared * width + index];
                    mixed.push((0..=position).map(value).sum::<f64>());
                }
            }
            for (x, y) in row.iter_mut().zip(linear(&mixed, &name("self_attn.o_proj"))) {
                *x += y;
            }
            let normed = norm(row, &name("post_attention_layernorm"));
            let up = linear(&normed, &name("mlp.up_proj"));
            let gate = linear(&normed, &name("mlp.gate_proj"));
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            for (x, y) in row.iter_mut().zip(linear(&inner, &name("mlp.down_proj"))) {
                *x += y;
            }
        }
    }
    let head = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    rows.iter().map(|row| linear(&norm(row, "model.norm.weight"), head)).collect()
}

#[test]
fn the_logits_are_those_of_the_formulas() {
    for config in [config(), ModelConfig::tiny()] {
        let params = params(&config);
        let model = Model::new(&config, &params).unwrap();
        let tokens = random_tokens(&mut Rng::new(6), 10, config.vocab_size);
        let rows = logits(&model, std::slice::from_ref(&tokens));
        for (row, expected) in rows[0].iter().zip(reference(&config, &params, &tokens)) {
            let expected: Vec<f32> = expected.into_iter().map(|x| x as f32).collect();
            assert_close(row, &expected, 1e-4, "formulas");
        }
    }
}

#[test]
fn the_cache_gives_the_logits_of_the_full_pass() {
    let mut smollm2_heads = config();
    (smollm2_heads.hidden_size, smollm2_heads.head_dim) = (576, 64);
    (smollm2_heads.num_attention_heads, smollm2_heads.num_key_value_heads) = (9, 3);
    smollm2_heads.tie_word_embeddings = true;
    for config in [config(), ModelConfig::tiny(), smollm2_heads] {
        // At full strength the wide model's logits are in the hundreds; its usual weights will do.
        let wide = config.hidden_size > 100;
        let params = if wide { initial_params(&config, 5).unwrap() } else { params(&config) };
        let model = Model::new(&config, &params).unwrap();
        let tokens = random_tokens(&mut Rng::new(4), 12, config.vocab_size);
        let full = &logits(&model, std::slice::from_ref(&tokens))[0];
        // Read in pieces of 1, 4, 1, 1 and 5 tokens.
        let mut cache = KvCache::new();
        let mut seen = 0;
        for piece in [1, 4, 1, 1, 5] {
            let ids = Tensor::new(&tokens[seen..seen + piece], &Device::Cpu).unwrap();
            let before = cache.clone();
            let last = model.forward_cached(&ids.unsqueeze(0).unwrap(), &mut cache).unwrap();
            assert_eq!(before.len(), seen);
            seen += piece;
            assert_eq!(cache.len(), seen);
            let last = last.to_vec2::<f32>().unwrap();
            assert_close(&last[0], &full[seen - 1], 1e-4, "cached");
        }
    }
}

#[test]
fn wrong_tensors_are_named() {
    let config = config();
    let good = params(&config);
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut params = good.clone();
        change(&mut params);
        Model::new(&config, &params).unwrap_err().to_string()
    };
    let norm = "model.norm.weight";
    let text = refused(&|params| drop(params.remove(norm)));
    assert_eq!(text, "missing tensors: model.norm.weight");
    let text = refused(&|params| {
        params.insert("model.extra".into(), params[norm].clone());
    });
    assert_eq!(text, "unexpected tensors: model.extra");
    let text = refused(&|params| {
        params.insert(norm.into(), params["lm_head.weight"].clone());
    });
    assert_eq!(text, "tensor model.norm.weight has shape [50, 24], wanted [24]");
    let text = refused(&|params| {
        let half = params[norm].to_dtype(candle_core::DType::BF16).unwrap();
        params.insert(norm.into(), half);
    });
    assert_eq!(text, "tensor model.norm.weight has dtype BF16, wanted F32");
    let text = refused(&|params| params.clear());
    assert!(text.ends_with("and 25 more"), "{text}");
}

#[test]
fn wrong_sequences_are_refused() {
    let config = config();
    let model = Model::new(&config, &params(&config)).unwrap();
    let datum = |tokens: Vec<u32>| {
        let weights = vec![1.0; tokens.len()];
        Datum::supervised(tokens.clone(), tokens, weights)
    };
    let refused = |batch: &[Datum]| batch_loss(&model, batch, Loss::CrossEntropy).unwrap_err().to_string();
    assert!(refused(&[]).contains("batch is empty"));
    assert!(refused(&[datum(vec![])]).contains("has no tokens"));
    assert!(refused(&[datum(vec![50])]).contains("token id 50"));
    assert!(refused(&[datum(vec![1; 257])]).contains("257 tokens"));
    let mut uneven = datum(vec![1, 2]);
    uneven.weights.pop();
    assert!(refused(&[uneven]).contains("`weights` has 1 entries for 2 tokens"));
    let mut infinite = datum(vec![1, 2]);
    infinite.weights[0] = f32::NAN;
    assert!(refused(&[infinite]).contains("NaN"));
    let ids = Tensor::new(&[[50u32]], &Device::Cpu).unwrap();
    let error = model.forward(&ids).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
}
