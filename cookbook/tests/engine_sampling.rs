//! Sampling and scoring: seeds, log-probabilities, prefixes, and equal bits on both sides.

use towline_cookbook::engine::{
    AdamParams, ByteTokenizer, Finish, LocalTrainer, Loss, Model, ModelConfig, Rng, Sample, SampleParams,
    TensorBytes, WeightDtype, params_from_bytes, prefill, sample_batch, sample_prefixes,
    sample_prefixes_while, score, task,
};

fn trainer() -> LocalTrainer {
    let mut trainer = LocalTrainer::new(&ModelConfig::tiny(), 3).unwrap();
    let mut rng = Rng::new(3);
    for _ in 0..8 {
        let batch = task::supervised_batch(&mut rng, 16);
        trainer.forward_backward(&batch, Loss::CrossEntropy).unwrap();
        trainer.optim_step(&AdamParams::new(3e-3)).unwrap();
    }
    trainer
}

fn model() -> Model {
    trainer().published_model(WeightDtype::Bf16).unwrap()
}

fn prompt(text: &str) -> Vec<u32> {
    ByteTokenizer.encode(text)
}

fn texts(samples: &[Sample]) -> Vec<&[u32]> {
    samples.iter().map(|sample| sample.tokens.as_slice()).collect()
}

#[test]
fn equal_seeds_give_equal_answers_whatever_else_is_asked() {
    let model = model();
    let params = SampleParams::new(6).with_seed(11);
    let alone = sample_batch(&model, &[prompt("3142>")], 8, &params).unwrap();
    assert_eq!(alone, sample_batch(&model, &[prompt("3142>")], 8, &params).unwrap());
    let others = [prompt("12>"), prompt("9999>"), prompt("3142>"), prompt("Q"), prompt("0000>")];
    let together = sample_batch(&model, &others, 8, &params).unwrap();
    assert_eq!(texts(&together[2]), texts(&alone[0]));
    for (a, b) in together[2].iter().zip(&alone[0]) {
        for (a, b) in a.logprobs.iter().zip(&b.logprobs) {
            assert!((a - b).abs() < 1e-4);
        }
    }
    let distinct: std::collections::BTreeSet<_> = texts(&alone[0]).into_iter().collect();
    assert!(distinct.len() > 4, "samples of one prompt must differ: {distinct:?}");
    let other_seed = sample_batch(&model, &[prompt("3142>")], 8, &params.clone().with_seed(12)).unwrap();
    assert_ne!(texts(&other_seed[0]), texts(&alone[0]));
    // The first samples do not depend on how many are asked for, and a prompt that is asked twice
    // is one prompt with twice the samples.
    let fewer = sample_batch(&model, &[prompt("3142>"), prompt("3142>")], 4, &params).unwrap();
    assert_eq!([texts(&fewer[0]), texts(&fewer[1])].concat(), texts(&alone[0]));
    // More rows than one batch takes.
    let many = sample_batch(&model, &[prompt("3142>")], 300, &params).unwrap();
    assert_eq!(many[0].len(), 300);
    assert_eq!(texts(&many[0])[..8], texts(&alone[0]));
}

#[test]
fn prompts_draw_from_streams_of_their_own() {
    // Untrained, the model is nearly indifferent between the ids: equal random numbers would give nearly
    // the same ids.
    let trainer = LocalTrainer::new(&ModelConfig::tiny(), 3).unwrap();
    let params = SampleParams::new(20);
    let answers = sample_batch(trainer.model(), &[prompt("1>"), prompt("2>")], 2, &params).unwrap();
    let all = [texts(&answers[0]), texts(&answers[1])].concat();
    for (index, a) in all.iter().enumerate() {
        for b in &all[..index] {
            let near = a.iter().zip(*b).filter(|(a, b)| a.abs_diff(**b) < 8).count();
            assert!(near < 10, "{a:?} {b:?}");
        }
    }
}

#[test]
fn sampled_logprobs_are_the_scores() {
    let trainer = trainer();
    let model = trainer.published_model(WeightDtype::Bf16).unwrap();
    let prompts = [prompt("3142>"), prompt("0007>"), prompt("5>")];
    for temperature in [1.0, 0.0] {
        let params = SampleParams::new(12).with_temperature(temperature);
        let answers = sample_batch(&model, &prompts, 3, &params).unwrap();
        for (prompt, samples) in prompts.iter().zip(&answers) {
            for sample in samples {
                let whole = [prompt.as_slice(), &sample.tokens].concat();
                let scores = score(&model, &whole).unwrap();
                assert_eq!(scores[0], 0.0);
                assert_eq!((scores.len(), sample.logprobs.len()), (whole.len(), 12));
                for (a, b) in scores[prompt.len()..].iter().zip(&sample.logprobs) {
                    assert!((a - b).abs() < 1e-4, "{a} {b}");
                }
            }
        }
    }
    // At another temperature it is the distribution that was drawn from.
    let cold = SampleParams::new(1).with_temperature(0.01);
    let greedy = SampleParams::new(1).with_temperature(0.0);
    let cold = &sample_batch(&model, &prompts, 1, &cold).unwrap()[0][0];
    let greedy = &sample_batch(&model, &prompts, 1, &greedy).unwrap()[0][0];
    assert_eq!(cold.tokens, greedy.tokens);
    assert!(cold.logprobs[0] > greedy.logprobs[0]);
}

#[test]
fn draws_follow_the_distribution() {
    let model = model();
    let tokens = prompt("3142>");
    let n = 4000;
    let samples = sample_batch(&model, std::slice::from_ref(&tokens), n, &SampleParams::new(1)).unwrap();
    let mut counts = std::collections::BTreeMap::<u32, (f64, f64)>::new();
    for sample in &samples[0] {
        let entry = counts.entry(sample.tokens[0]).or_default();
        *entry = (entry.0 + 1.0 / n as f64, f64::from(sample.logprobs[0]).exp());
    }
    for (token, (share, probability)) in counts {
        let deviation = (probability * (1.0 - probability) / n as f64).sqrt();
        assert!((share - probability).abs() < 5.0 * deviation, "{token}: {share} {probability}");
    }
}

#[test]
fn both_sides_score_to_the_same_bits() {
    let trainer = trainer();
    let config = trainer.config();
    for dtype in [WeightDtype::Bf16, WeightDtype::F16, WeightDtype::F32] {
        let export = trainer.export(dtype).unwrap();
        let views = export.iter().map(|entry| TensorBytes::of(entry, dtype));
        let server = Model::new(config, &params_from_bytes(config, views).unwrap()).unwrap();
        let mine = trainer.published_model(dtype).unwrap();
        for text in ["3142>1234", "x", "a longer text, with more than sixteen bytes in it"] {
            let bits = |model: &Model| -> Vec<u32> {
                score(model, &prompt(text)).unwrap().into_iter().map(f32::to_bits).collect()
            };
            assert_eq!(bits(&server), bits(&mine), "{text}");
            // In 32 bits the variables that are being trained are the published weights.
            if dtype == WeightDtype::F32 {
                assert_eq!(bits(&server), bits(trainer.model()), "{text}");
            }
        }
    }
    let bf16 = score(&trainer.published_model(WeightDtype::Bf16).unwrap(), &prompt("3142>1234"));
    assert_ne!(bf16, score(trainer.model(), &prompt("3142>1234")), "rounding must show");
}

#[test]
fn prefixes_are_shared_and_extended() {
    let model = model();
    let params = SampleParams::new(5).with_seed(2);
    let whole = prefill(&model, &prompt("3142>")).unwrap();
    let direct = sample_batch(&model, &[prompt("3142>")], 4, &params).unwrap();
    let shared = whole.clone();
    assert_eq!(sample_prefixes(&model, &[&shared], 4, &params).unwrap(), direct);
    // Sampling has not changed the prefix.
    assert_eq!(sample_prefixes(&model, &[&whole], 4, &params).unwrap(), direct);
    let extended = prefill(&model, &prompt("31")).unwrap().extended(&model, &prompt("42>")).unwrap();
    assert_eq!(extended.tokens(), whole.tokens());
    assert_eq!(extended.bytes(), whole.bytes());
    let again = sample_prefixes(&model, &[&extended], 4, &params).unwrap();
    assert_eq!(texts(&again[0]), texts(&direct[0]));
    assert!(extended.extended(&model, &[]).is_err());
}

#[test]
fn answers_stop() {
    let model = model();
    let params = SampleParams::new(8).with_seed(5);
    let free = sample_batch(&model, &[prompt("3142>")], 6, &params).unwrap();
    assert!(free[0].iter().all(|sample| sample.finish == Finish::Length));
    let stop = free[0][0].tokens[3];
    let stopped = sample_batch(&model, &[prompt("3142>")], 6, &params.clone().with_stop(vec![stop])).unwrap();
    for (free, stopped) in free[0].iter().zip(&stopped[0]) {
        match free.tokens.iter().position(|&token| token == stop) {
            Some(at) => {
                assert_eq!(stopped.tokens, free.tokens[..=at]);
                assert_eq!(stopped.logprobs.len(), at + 1);
                assert_eq!(stopped.finish, Finish::Stop);
            }
            None => assert_eq!(stopped, free),
        }
    }
    assert_eq!(stopped[0][0].finish, Finish::Stop);
    let prefix = prefill(&model, &prompt("3142>")).unwrap();
    let mut left = 3;
    let stopped = sample_prefixes_while(&model, &[&prefix], 2, &params, &mut || {
        left -= 1;
        left > 0
    });
    assert!(stopped.unwrap_err().message().contains("stopped"));
}

#[test]
fn bad_requests_are_refused() {
    let model = model();
    let refused = |prompt: Vec<u32>, params: &SampleParams| {
        sample_batch(&model, &[prompt], 1, params).unwrap_err().to_string()
    };
    let params = SampleParams::new(4);
    assert!(refused(vec![], &params).contains("empty"));
    assert!(refused(vec![256], &params).contains("token id 256"));
    assert!(refused(vec![1; 253], &params).contains("253 tokens"));
    assert!(refused(vec![1], &SampleParams::new(usize::MAX)).contains("max_tokens"));
    assert!(refused(vec![1], &params.clone().with_temperature(-1.0)).contains("temperature"));
    assert!(refused(vec![1], &params.clone().with_temperature(f64::NAN)).contains("temperature"));
    assert!(refused(vec![1], &params.clone().with_stop(vec![999])).contains("999"));
    assert!(score(&model, &[]).is_err() && score(&model, &[300]).is_err());
    assert_eq!(score(&model, &[65]).unwrap(), [0.0]);
    let none = sample_batch(&model, &[vec![65]], 1, &SampleParams::new(0)).unwrap();
    assert!(none[0][0].tokens.is_empty());
    assert!(sample_batch(&model, &[], 3, &params).unwrap().is_empty());
}
