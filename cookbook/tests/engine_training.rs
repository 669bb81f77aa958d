//! The trainer: resuming bit for bit, the losses, the optimizer, and that it learns its task.

use towline_cookbook::engine::task::{Problem, policy_batch, supervised_batch};
use towline_cookbook::engine::{
    AdamParams, Datum, LocalTrainer, LoraConfig, Loss, ModelConfig, Rng, SampleParams, Schedule,
    TargetModule, TensorBytes, WeightDtype, expected_factors, sample_batch, score,
};

type Export = Vec<(String, Vec<usize>, Vec<u8>)>;

fn views(export: &Export, dtype: WeightDtype) -> Vec<TensorBytes<'_>> {
    export.iter().map(|entry| TensorBytes::of(entry, dtype)).collect()
}

fn weights(trainer: &LocalTrainer) -> Export {
    trainer.export(WeightDtype::F32).unwrap()
}

/// Runs the steps `from..to` of one fixed training run.
fn run(trainer: &mut LocalTrainer, rng: &mut Rng, from: u64, to: u64) {
    let schedule = Schedule::new(3e-3, 3, 12, 1e-4);
    for step in from..to {
        // Two calls before each step: their gradients add up.
        for _ in 0..2 {
            trainer.forward_backward(&supervised_batch(rng, 8), Loss::CrossEntropy).unwrap();
        }
        let params = AdamParams::new(schedule.at(step)).with_weight_decay(0.01);
        trainer.optim_step(&params.with_grad_clip_norm(1.0)).unwrap();
    }
}

#[test]
fn a_resumed_run_is_the_uninterrupted_run() {
    let config = ModelConfig::tiny();
    let (mut whole, mut rng) = (LocalTrainer::new(&config, 1).unwrap(), Rng::new(2));
    run(&mut whole, &mut rng, 0, 5);
    let saved = (weights(&whole), whole.optimizer_state().unwrap(), whole.step(), rng.state());
    run(&mut whole, &mut rng, 5, 12);

    let mut resumed = LocalTrainer::new(&config, 99).unwrap();
    resumed.load_weights(views(&saved.0, WeightDtype::F32)).unwrap();
    resumed.load_optimizer_state(saved.2, views(&saved.1, WeightDtype::F32)).unwrap();
    assert_eq!(resumed.optimizer_state().unwrap(), saved.1);
    let mut again = Rng::from_state(saved.3).unwrap();
    run(&mut resumed, &mut again, 5, 12);
    assert!(weights(&resumed) == weights(&whole), "weights differ");
    assert!(resumed.optimizer_state() == whole.optimizer_state(), "moments differ");
    assert_eq!((resumed.step(), again), (whole.step(), rng));

    let mut weights_only = LocalTrainer::from_bytes(&config, views(&saved.0, WeightDtype::F32)).unwrap();
    run(&mut weights_only, &mut Rng::from_state(saved.3).unwrap(), 5, 12);
    assert!(weights(&weights_only) != weights(&whole), "the optimizer made no difference");

    let mut rounded = LocalTrainer::new(&config, 1).unwrap();
    run(&mut rounded, &mut Rng::new(2), 0, 5);
    let bf16 = rounded.export(WeightDtype::Bf16).unwrap();
    rounded.load_weights(views(&bf16, WeightDtype::Bf16)).unwrap();
    assert_eq!(rounded.export(WeightDtype::Bf16).unwrap(), bf16);
    assert!(weights(&rounded) != saved.0, "rounding made no difference");
}

#[test]
fn bad_states_are_refused_and_change_nothing() {
    let config = ModelConfig::tiny();
    let mut trainer = LocalTrainer::new(&config, 1).unwrap();
    run(&mut trainer, &mut Rng::new(2), 0, 2);
    let before = (weights(&trainer), trainer.optimizer_state().unwrap());
    let f32s = WeightDtype::F32;

    let mut cut = before.0.clone();
    cut[3].2.pop();
    let error = trainer.load_weights(views(&cut, f32s)).unwrap_err();
    assert!(error.message().contains(&cut[3].0), "{error}");
    let error = trainer.load_weights(views(&before.0, f32s).into_iter().skip(1)).unwrap_err();
    assert!(error.message().contains("model.embed_tokens.weight"), "{error}");
    let mut twice = views(&before.0, f32s);
    twice.push(twice[0]);
    assert!(trainer.load_weights(twice).unwrap_err().message().contains("twice"));
    let mut strange = views(&before.0, f32s);
    strange[0].dtype = "I32";
    assert!(trainer.load_weights(strange).unwrap_err().message().contains("I32"));

    let mut negative = before.1.clone();
    let last = negative.last_mut().unwrap();
    last.2[..4].copy_from_slice(&(-1f32).to_le_bytes());
    assert!(trainer.load_optimizer_state(2, views(&negative, f32s)).is_err());
    assert!(trainer.load_optimizer_state(2, views(&before.0, f32s)).is_err());

    assert!(trainer.optim_step(&AdamParams::new(1e-3)).is_err(), "a step without gradients");
    trainer.forward_backward(&supervised_batch(&mut Rng::new(1), 2), Loss::CrossEntropy).unwrap();
    assert!(trainer.optimizer_state().is_err(), "a state that leaves gradients out");
    assert!(trainer.optim_step(&AdamParams::new(f64::NAN)).is_err());
    trainer.clear_gradients();
    assert!((weights(&trainer), trainer.optimizer_state().unwrap()) == before);
}

#[test]
fn gradients_add_up_over_calls() {
    let config = ModelConfig::tiny();
    let batch = supervised_batch(&mut Rng::new(3), 6);
    let mut one = LocalTrainer::new(&config, 1).unwrap();
    let mut two = LocalTrainer::new(&config, 1).unwrap();
    let whole = one.forward_backward(&batch, Loss::CrossEntropy).unwrap();
    let first = two.forward_backward(&batch[..2], Loss::CrossEntropy).unwrap();
    let second = two.forward_backward(&batch[2..], Loss::CrossEntropy).unwrap();
    assert!((whole.loss - first.loss - second.loss).abs() < 1e-5);
    for (name, gradient) in one.gradients() {
        let distance = (gradient - &two.gradients()[name]).unwrap().abs().unwrap();
        let distance = distance.max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(distance < 1e-6, "{name}: {distance}");
    }
    one.optim_step(&AdamParams::new(1e-3)).unwrap();
    assert!(one.gradients().is_empty());
}

#[test]
fn importance_sampling_at_ratio_one_is_the_policy_gradient() {
    // At ratio 1 the gradient of exp(new - old) * advantage is advantage * gradient of logp: that
    // of the cross-entropy with the advantages as weights.
    let config = ModelConfig::tiny();
    let mut rng = Rng::new(4);
    let mut policy = LocalTrainer::new(&config, 1).unwrap();
    let mut entropy = LocalTrainer::new(&config, 1).unwrap();
    let mut batch = supervised_batch(&mut rng, 5);
    batch[2].tokens.truncate(6);
    batch[2].targets.truncate(6);
    batch[2].weights.truncate(6);
    for datum in &mut batch {
        for weight in &mut datum.weights {
            *weight *= rng.normal() as f32;
        }
    }
    let zeros = |datum: &Datum| vec![0.0; datum.tokens.len()];
    for datum in &mut batch {
        (datum.logprobs, datum.advantages) = (zeros(datum), zeros(datum));
    }
    let logprobs = entropy.forward_backward(&batch, Loss::CrossEntropy).unwrap().logprobs;
    for (datum, logprobs) in batch.iter_mut().zip(&logprobs) {
        let none = zeros(datum);
        datum.advantages = std::mem::replace(&mut datum.weights, none);
        datum.logprobs = logprobs.clone();
        // A position that does not count may hold anything without harm.
        datum.logprobs[0] = -1e30;
    }
    let output = policy.forward_backward(&batch, Loss::ImportanceSampling).unwrap();
    let advantages: f32 = batch.iter().flat_map(|datum| &datum.advantages).sum();
    assert!((output.loss + f64::from(advantages)).abs() < 1e-5);
    assert_eq!(output.logprobs, logprobs);
    for (name, gradient) in policy.gradients() {
        let other = &entropy.gradients()[name];
        let largest = |tensor: &candle_core::Tensor| {
            tensor.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
        };
        let distance = largest(&(gradient - other).unwrap());
        assert!(distance <= 1e-5 * largest(other), "{name}: {distance}");
    }
    // Away from ratio 1 the gradient is scaled by the ratio.
    let mut doubled = LocalTrainer::new(&config, 1).unwrap();
    for datum in &mut batch {
        datum.logprobs.iter_mut().for_each(|logprob| *logprob -= 2f32.ln());
    }
    let twice = doubled.forward_backward(&batch, Loss::ImportanceSampling).unwrap();
    assert!((twice.loss - 2.0 * output.loss).abs() < 1e-5);
}

#[test]
fn the_first_steps_are_those_of_adam() {
    let config = ModelConfig::tiny();
    let mut trainer = LocalTrainer::new(&config, 1).unwrap();
    let name = "model.norm.weight";
    let values = |trainer: &LocalTrainer| trainer.params().unwrap()[name].to_vec1::<f32>().unwrap();
    let (mut m, mut v) = (vec![0f64; 64], vec![0f64; 64]);
    let mut expected: Vec<f64> = values(&trainer).into_iter().map(f64::from).collect();
    let mut rng = Rng::new(5);
    for step in 1..=3 {
        trainer.forward_backward(&supervised_batch(&mut rng, 4), Loss::CrossEntropy).unwrap();
        let gradient = trainer.gradients()[name].to_vec1::<f32>().unwrap();
        let output = trainer.optim_step(&AdamParams::new(0.01).with_weight_decay(0.1)).unwrap();
        assert_eq!(output.step, step as u64);
        for (index, gradient) in gradient.into_iter().map(f64::from).enumerate() {
            m[index] = 0.9 * m[index] + 0.1 * gradient;
            v[index] = 0.95 * v[index] + 0.05 * gradient * gradient;
            let (m, v) = (m[index] / (1.0 - 0.9f64.powi(step)), v[index] / (1.0 - 0.95f64.powi(step)));
            expected[index] -= 0.01 * (0.1 * expected[index] + m / (v.sqrt() + 1e-12));
        }
        for (value, expected) in values(&trainer).iter().zip(&expected) {
            assert!((f64::from(*value) - expected).abs() < 1e-5, "{value} {expected}");
        }
    }
}

/// One reinforcement step of `prompts` groups of 8; returns the share of exact answers.
fn policy_step(trainer: &mut LocalTrainer, rng: &mut Rng, seed: u64, prompts: usize, rate: f64) -> f64 {
    let problems: Vec<Problem> = (0..prompts).map(|_| Problem::random(rng)).collect();
    let prompts: Vec<Vec<u32>> = problems.iter().map(Problem::prompt_tokens).collect();
    let model = trainer.published_model(WeightDtype::Bf16).unwrap();
    let groups = sample_batch(&model, &prompts, 8, &SampleParams::new(4).with_seed(seed)).unwrap();
    let exact = problems.iter().zip(&groups).flat_map(|(problem, group)| {
        group.iter().map(|sample| f64::from(u8::from(problem.is_exact(&sample.tokens))))
    });
    let exact = exact.sum::<f64>() / (problems.len() * 8) as f64;
    let batch = policy_batch(&problems, &groups);
    if !batch.is_empty() {
        trainer.forward_backward(&batch, Loss::ImportanceSampling).unwrap();
        trainer.optim_step(&AdamParams::new(rate)).unwrap();
    }
    exact
}

/// Supervised, then reinforcement with a fresh optimizer; returns the mean share of exact answers
/// of every ten reinforcement steps.
fn learn(supervised: u64, policy: u64, prompts: usize, rate: f64) -> Vec<f64> {
    let start = std::time::Instant::now();
    let mut trainer = LocalTrainer::new(&ModelConfig::tiny(), 0).unwrap();
    let mut rng = Rng::new(0);
    let mut losses = Vec::new();
    for _ in 0..supervised {
        let batch = supervised_batch(&mut rng, 64);
        losses.push(trainer.forward_backward(&batch, Loss::CrossEntropy).unwrap().loss);
        trainer.optim_step(&AdamParams::new(3e-3)).unwrap();
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("supervised: loss {first:.3} -> {last:.3} in {:?}", start.elapsed());
    assert!(last < 0.2 * first);
    trainer.reset_optimizer();
    let exact: Vec<f64> =
        (0..policy).map(|step| policy_step(&mut trainer, &mut rng, step, prompts, rate)).collect();
    let curve = exact.chunks(10).map(|part| part.iter().sum::<f64>() / part.len() as f64).collect();
    println!("policy: exact-match of every ten steps {curve:.3?}, in all {:?}", start.elapsed());
    curve
}

#[test]
fn it_learns_to_sort() {
    let curve = learn(100, 40, 8, 3e-4);
    assert!(curve[3] >= curve[0] + 0.1, "{curve:?}");
}

#[test]
fn only_the_factors_of_an_adapter_are_trained_and_all_of_them() {
    let (config, lora) = (ModelConfig::tiny(), LoraConfig::new(4).with_seed(7));
    let base = LocalTrainer::new(&config, 1).unwrap().export(config.dtype).unwrap();
    let fresh = || LocalTrainer::with_lora(&config, views(&base, config.dtype), &lora).unwrap();
    let (mut trainer, mut rng) = (fresh(), Rng::new(2));
    assert_eq!(trainer.lora(), Some(&lora));
    let full = LocalTrainer::from_bytes(&config, views(&base, config.dtype)).unwrap();
    let tokens = [51, 49, 52, 50, 62, 49];
    let scored = |trainer: &LocalTrainer| score(trainer.model(), &tokens).unwrap();
    assert_eq!(scored(&trainer), scored(&full), "a fresh adapter changes nothing");
    assert_eq!(trainer.export_merged(config.dtype).unwrap(), base);

    let mut losses = Vec::new();
    for step in 0..40 {
        let output = trainer.forward_backward(&supervised_batch(&mut rng, 16), Loss::CrossEntropy).unwrap();
        losses.push(output.loss);
        let names: Vec<_> = expected_factors(&config, &lora).into_iter().map(|(name, _)| name).collect();
        assert_eq!(trainer.gradients().len(), names.len());
        for name in &names {
            let gradient = trainer.gradients()[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let reached = gradient.iter().any(|value| *value != 0.0);
            // B begins at zero, and A's gradient goes through it.
            assert_eq!(reached, step > 0 || name.contains("lora_B"), "{name} in step {step}");
        }
        trainer.optim_step(&AdamParams::new(3e-3)).unwrap();
    }
    assert!(losses[39] < losses[0] - 0.4, "{losses:?}");
    assert_eq!(trainer.export_base().unwrap(), base, "the base is frozen");
    assert_ne!(trainer.export_merged(config.dtype).unwrap(), base);
    // What is published is what is trained: the factors are exact in 32 bits.
    let published = trainer.published_model(WeightDtype::F32).unwrap();
    assert_eq!(score(&published, &tokens).unwrap(), scored(&trainer));
    assert_ne!(scored(&trainer), scored(&full));

    // The same run again, broken off in the middle and resumed by another trainer.
    let step = |trainer: &mut LocalTrainer, rng: &mut Rng| {
        trainer.forward_backward(&supervised_batch(rng, 16), Loss::CrossEntropy).unwrap();
        trainer.optim_step(&AdamParams::new(3e-3)).unwrap();
    };
    let (mut first, mut rng) = (fresh(), Rng::new(2));
    (0..20).for_each(|_| step(&mut first, &mut rng));
    let other = lora.clone().with_seed(8);
    let mut second = LocalTrainer::with_lora(&config, views(&base, config.dtype), &other).unwrap();
    second.load_weights(views(&weights(&first), WeightDtype::F32)).unwrap();
    let moments = first.optimizer_state().unwrap();
    second.load_optimizer_state(first.step(), views(&moments, WeightDtype::F32)).unwrap();
    (0..20).for_each(|_| step(&mut second, &mut rng));
    assert!(weights(&second) == weights(&trainer) && second.optimizer_state() == trainer.optimizer_state());
}

#[test]
fn some_projections_alone_can_be_adapted() {
    let config = ModelConfig::tiny();
    let lora = LoraConfig::new(2).with_target_modules([TargetModule::QProj, TargetModule::DownProj]);
    let base = LocalTrainer::new(&config, 1).unwrap().export(config.dtype).unwrap();
    let mut trainer = LocalTrainer::with_lora(&config, views(&base, config.dtype), &lora).unwrap();
    run(&mut trainer, &mut Rng::new(2), 0, 3);
    for (before, after) in base.iter().zip(trainer.export_merged(config.dtype).unwrap()) {
        let adapted = after.0.contains("q_proj") || after.0.contains("down_proj");
        assert_eq!(before.2 != after.2, adapted, "{}", after.0);
    }
    let full = LocalTrainer::new(&config, 1).unwrap();
    for error in [full.export_base().unwrap_err(), full.export_merged(config.dtype).unwrap_err()] {
        assert_eq!(error.message(), "all parameters are trained, wanted a trainer of a LoRA adapter");
    }
}
