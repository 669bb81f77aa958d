//! LoRA on the embedded stack: adapters are served as they are trained, and each kind of checkpoint goes where it fits.
//!
//! | saved by a LoRA run | trainer | resume | initialise | promote | load as adapter |
//! |---|---|---|---|---|---|
//! | state | full | refused | refused | refused | refused |
//! | state | LoRA | bit for bit | bit for bit | refused | refused |
//! | adapter | full | refused | refused | PEFT add-on | refused |
//! | adapter | LoRA | refused | refused | PEFT add-on | bit for bit |
//! | merged base | full | refused | as its weights | base model | refused |
//! | merged base | LoRA | refused | as its base | base model | refused |
//!
//! Promotion needs no trainer; a full-parameter run saves neither adapters nor merged bases. Runs resume from states and
//! begin with them; the weights of a merged base begin a new trainer, not a run's state: that is refused.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::Use;
use serde_json::{Value, json};
use towline_cookbook::adapter::{self, Adapter};
use towline_cookbook::bridge;
use towline_cookbook::client::Completions;
use towline_cookbook::engine::{self, LocalTrainer, LoraConfig, ModelConfig, Rng, TargetModule};
use towline_cookbook::recipes::{DEADLINE, Trainer, embedded_deployment, syncer};
use towline_cookbook::server::{Server, ServerOptions};
use towline_core::{
    AdapterSource, CheckpointCatalog, CheckpointRef, CheckpointType, CodecId, ContentDigest, ErrorKind,
    ExportRequest, HotLoad, JobId, ModelId, ModelKind, OpId, Outcome, Result, SaveWeights, SessionId,
    SnapshotExporter, SnapshotIdentity, SnapshotKind, SnapshotName, SnapshotRef, SnapshotStore,
    TrainingClient, Weights,
};
use towline_storage::{Local, Memory, Publish, SnapshotRepo, Wanted};
use towline_trainer_client::{CheckpointLog, PendingExt, Position, Resume, Resumed, Run, SaveKind};

const TOKENS: [u32; 6] = [51, 49, 52, 50, 62, 49];

fn repo(store: &Arc<dyn SnapshotStore>, job: &str) -> SnapshotRepo {
    SnapshotRepo::new(Arc::clone(store), JobId::new(job).unwrap(), towline_codec::all())
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn lora() -> LoraConfig {
    LoraConfig::new(4)
}

/// A trainer on the base of seed 1, its fresh factors from `seed`.
async fn start(repo: &SnapshotRepo, seed: u64) -> Trainer {
    Trainer::start_lora(repo, &ModelConfig::tiny(), 1, &lora().with_seed(seed)).await.unwrap()
}

async fn train(trainer: &Trainer, rng: &mut Rng, steps: u64) {
    for _ in 0..steps {
        trainer.supervised_step(rng, 1e-2).await.unwrap();
    }
}

async fn digest(trainer: &Trainer) -> ContentDigest {
    trainer.weights.published_weights().await.unwrap().content_digest()
}

async fn save(trainer: &Trainer, text: &str, kind: CheckpointType) -> Result<SnapshotRef> {
    let request = SaveWeights::new(name(text)).with_type(kind);
    Ok(trainer.client.save_weights_for_sampler_ext(request).wait(DEADLINE).await?.snapshot)
}

/// Asserts that the server's log-probs are the trainer's, bit for bit.
async fn serves(server: &Server, trainer: &Trainer, snapshot: &SnapshotRef) {
    let served = Completions::new(&server.url()).unwrap().score(&TOKENS, &snapshot.id).await.unwrap();
    assert_eq!(served, engine::score(&trainer.weights.published_model().await.unwrap(), &TOKENS).unwrap());
}

async fn api(server: &Server, path: &str, body: Option<Value>) -> Value {
    let http = towline_deploy::http_client(&server.url(), DEADLINE).unwrap();
    let url = format!("{}{path}", server.url());
    let request = match body {
        Some(body) => http.post(url).json(&body),
        None => http.get(url),
    };
    serde_json::from_slice(&request.send().await.unwrap().bytes().await.unwrap()).unwrap()
}

/// How many tokens of a prompt were in the server's cache.
async fn cached(server: &Server) -> u64 {
    let body = json!({"prompt": TOKENS, "max_tokens": 1});
    let answer = api(server, "/v1/completions", Some(body)).await;
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_sync_puts_the_whole_adapter_onto_its_base() {
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(&store, "sync");
    let trainer = start(&repo, 1).await;
    let server = Server::start(Arc::clone(&store), ServerOptions::default()).await.unwrap();
    let syncer = syncer(&trainer, &server.url()).unwrap();
    assert_eq!(syncer.settings().lora_rank, 4);
    let base = trainer.weights.base_weights().await.unwrap().content_digest();
    let (mut rng, mut before) = (Rng::new(5), None);
    // A delta that is asked for is the adapter, too.
    for (step, asked) in
        [(0, None), (1, Some(CheckpointType::Base)), (2, Some(CheckpointType::Delta)), (3, None)]
    {
        let receipt = syncer.save_and_hotload(name(&format!("step-{step}")), asked).await.unwrap();
        let snapshot = &receipt.snapshot;
        assert_eq!((snapshot.kind, &snapshot.parent, &snapshot.codec), (SnapshotKind::Adapter, &None, &None));
        assert!(receipt.synced && receipt.reset_prompt_cache && receipt.warm_up_error.is_none());
        assert!(snapshot.stored_bytes < 80_000, "{} bytes: the base is not sent", snapshot.stored_bytes);
        serves(&server, &trainer, snapshot).await;
        let served = server.served().unwrap();
        assert_eq!((served.base(), served.adapter()), (&base, Some(&snapshot.id)));
        assert_ne!(before.replace(snapshot.id.digest), Some(snapshot.id.digest));
        assert_eq!((cached(&server).await, cached(&server).await), (0, 6), "nothing of the weights before");
        let status = api(&server, "/hot_load/v1/models/hot_load", None).await;
        let loaded = json!([{"identity": snapshot.id.identity, "status": "loaded"}]);
        assert_eq!(status["replicas"][0]["loaded_adapters"], loaded);
        assert_eq!(status["replicas"][0]["towline"]["content_digest"], snapshot.id.digest.to_string());
        train(&trainer, &mut rng, 1).await;
    }
    let kinds: Vec<_> = repo.list().await.unwrap().iter().map(|info| info.kind).collect();
    let adapters = [SnapshotKind::Adapter; 4];
    assert_eq!(kinds, [&[SnapshotKind::Base], &adapters[..]].concat(), "the base once, and no delta");
    assert_eq!(repo.pins().await.unwrap().len(), 1, "the base stays");

    // A merged base is a model of its own; the next adapter is put on the base again.
    let merged = Some(CheckpointType::MergedBase);
    let receipt = syncer.save_and_hotload(name("merged"), merged).await.unwrap();
    assert_eq!(receipt.snapshot.kind, SnapshotKind::MergedBase);
    let model =
        bridge::model(&ModelConfig::tiny(), &trainer.weights.merged_weights().await.unwrap()).unwrap();
    let scored = Completions::new(&server.url()).unwrap().score(&TOKENS, &receipt.snapshot.id).await.unwrap();
    assert_eq!(scored, engine::score(&model, &TOKENS).unwrap());
    assert_eq!(server.served().unwrap().adapter(), None);
    let status = api(&server, "/hot_load/v1/models/hot_load", None).await;
    assert_eq!(status["replicas"][0]["loaded_adapters"], json!([]));
    let receipt = syncer.save_and_hotload(name("again"), None).await.unwrap();
    serves(&server, &trainer, &receipt.snapshot).await;
    assert_eq!(server.served().unwrap().base(), &base);

    // A server that has just started needs no other order.
    let fresh = Server::start(Arc::clone(&store), ServerOptions::default()).await.unwrap();
    let attach = towline_cookbook::recipes::syncer(&trainer, &fresh.url()).unwrap();
    attach.hotload(&receipt.snapshot, CheckpointType::Base).await.unwrap();
    serves(&fresh, &trainer, &receipt.snapshot).await;
    // Nor is a delta ever put on an adapter, not even one on the very weights that it is on.
    let full = Trainer::start(&self::repo(&store, "full"), &ModelConfig::tiny(), 1).await.unwrap();
    assert_eq!(save(&full, "base", CheckpointType::Base).await.unwrap().id.digest, base);
    train(&full, &mut rng, 1).await;
    let delta = save(&full, "delta", CheckpointType::Delta).await.unwrap();
    let error = order(&fresh, "op-delta", &delta, true).await.unwrap_err();
    assert_eq!((error.kind(), error.help()), (ErrorKind::ChainMismatch, Some("order a base")));
    serves(&fresh, &trainer, &receipt.snapshot).await;
    trainer.client.close().await.unwrap();
}

/// Orders a load, and waits for its end.
async fn order(server: &Server, op: &str, snapshot: &SnapshotRef, reset: bool) -> Result<Outcome> {
    let deployment = embedded_deployment(&server.url()).unwrap();
    let order =
        HotLoad::new(OpId::new(op).unwrap(), snapshot.clone()).unwrap().with_reset_prompt_cache(reset);
    deployment.hot_load(&order).await?;
    loop {
        match deployment.status().await?.outcome(&snapshot.id) {
            Outcome::Running => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            end => return Ok(end),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adapter_without_its_base_is_refused_and_cached_prompts_know_the_scale() {
    let (model, store) = (ModelConfig::tiny(), Arc::new(Memory::new()) as Arc<dyn SnapshotStore>);
    let trainer = start(&repo(&(Arc::new(Memory::new()) as _), "elsewhere"), 1).await;
    train(&trainer, &mut Rng::new(5), 1).await;
    let base = trainer.weights.base_weights().await.unwrap();
    let server = Server::start(Arc::clone(&store), ServerOptions::default()).await.unwrap();
    let writer = repo(&store, "here").writer(SessionId::new("0000aaaa").unwrap()).await.unwrap();
    let factors = Arc::new(trainer.weights.published_weights().await.unwrap());
    let publish = async |text: &str, lora: &LoraConfig| {
        let file = adapter::config_file(lora, "elsewhere", &base.content_digest()).unwrap();
        let publish = Publish::new(name(text), SnapshotKind::Adapter, Arc::clone(&factors) as _);
        writer.publish(publish.with_files(vec![file])).await.unwrap()
    };
    let plain = publish("plain", &lora()).await;
    let error = order(&server, "op-1", &plain, true).await.unwrap_err();
    assert_eq!((error.kind(), error.help()), (ErrorKind::ChainMismatch, Some("hot-load the base first")));
    let digest = base.content_digest();
    assert!(
        error.message().contains(&format!("is an adapter on base weights {digest}; nothing is held here")),
        "{error}"
    );
    assert!(server.served().is_none());
    // The base of any job will do, and once it is there the order is taken.
    let other = repo(&store, "other").writer(SessionId::new("0000bbbb").unwrap()).await.unwrap();
    let full = Publish::new(name("full"), SnapshotKind::Base, Arc::new(base.clone()) as _);
    let full = other.publish(full.with_files(vec![bridge::config_file(&model)])).await.unwrap();
    assert_eq!(order(&server, "op-2", &full, true).await.unwrap(), Outcome::Committed);
    assert_eq!(order(&server, "op-3", &plain, true).await.unwrap(), Outcome::Committed);
    serves(&server, &trainer, &plain).await;
    assert_eq!((cached(&server).await, cached(&server).await), (0, 6));
    // The same factors at another scale are other weights, whose prompts were not read yet.
    let louder = publish("louder", &lora().with_alpha(64.0)).await;
    assert_eq!(louder.id.digest, plain.id.digest);
    assert_eq!(order(&server, "op-4", &louder, false).await.unwrap(), Outcome::Committed);
    assert_eq!(cached(&server).await, 0);
    let scored = Completions::new(&server.url()).unwrap().score(&TOKENS, &louder.id).await.unwrap();
    assert_ne!(scored, engine::score(&trainer.weights.published_model().await.unwrap(), &TOKENS).unwrap());
    assert_eq!(order(&server, "op-5", &plain, false).await.unwrap(), Outcome::Committed);
    assert_eq!(cached(&server).await, 6, "kept for when these weights come back");
    // A configuration that does not fit the factors is found before anything is swapped.
    let wrong = publish("wrong", &LoraConfig::new(8)).await;
    let Outcome::Failed(why) = order(&server, "op-6", &wrong, true).await.unwrap() else {
        panic!("loaded factors of another rank")
    };
    assert!(why.contains("lora_A.weight has shape [4, 192], wanted [8, 192]"), "{why}");
    serves(&server, &trainer, &plain).await;
    // Adapters are stored as PEFT's two files.
    let bare = Publish::new(name("bare"), SnapshotKind::Adapter, Arc::clone(&factors) as _);
    let error = writer.publish(bare).await.unwrap_err();
    assert_eq!(error.message(), "`bare`: an adapter without `adapter_config.json`");
    let encoded = Publish::new(name("encoded"), SnapshotKind::Adapter, Arc::clone(&factors) as _);
    let encoded = encoded.with_codec(towline_codec::by_id("zstd").unwrap());
    let error = writer.publish(encoded).await.unwrap_err();
    assert_eq!(error.message(), "`encoded`: an adapter in codec zstd");
}

fn run(trainer: &Trainer, repo: &SnapshotRepo) -> Run {
    Run::new(Arc::clone(&trainer.client) as _, Arc::new(repo.clone()), repo.job().clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_run_of_an_adapter_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn SnapshotStore> = Arc::new(Memory::new());
    let repo = repo(&store, "train");
    let first = start(&repo, 1).await;
    let log = || CheckpointLog::new(dir.path());
    let mut rng = Rng::new(5);
    train(&first, &mut rng, 3).await;
    let half = Position::new(3, 96);
    let saves = run(&first, &repo).with_log(log());
    let saved = saves.save_checkpoint(&name("step-3"), SaveKind::Both, &half, None).await.unwrap();
    assert_eq!(saved.sampler.unwrap().snapshot.kind, SnapshotKind::Adapter);
    let mut after = rng.clone();
    train(&first, &mut after, 3).await;
    let undisturbed = digest(&first).await;

    let second = start(&repo, 77).await;
    let resumed = run(&second, &repo).with_log(log()).resolve_resume(&Resume::default()).await.unwrap();
    assert!(matches!(&resumed, Resumed::Continued { position, .. } if *position == half));
    let mut again = rng.clone();
    train(&second, &mut again, 3).await;
    assert_eq!(digest(&second).await, undisturbed, "with the optimizer: bit for bit");
    let weights_only = start(&repo, 78).await;
    let state: CheckpointRef = "step-3".parse().unwrap();
    let found =
        repo.resolve_checkpoint(&state, repo.job(), towline_core::CheckpointClass::State).await.unwrap();
    weights_only.client.load_state(&found.state().unwrap()).wait(DEADLINE).await.unwrap();
    train(&weights_only, &mut rng, 3).await;
    assert_ne!(digest(&weights_only).await, undisturbed, "a cold optimizer goes another way");
    assert_eq!(repo.pins().await.unwrap().len(), 1, "all three share one base");
}

/// What a LoRA run `lora` and a full-parameter run `full` have saved.
struct Shelf {
    store: Arc<dyn SnapshotStore>,
    adapter: ContentDigest,
    merged: Weights,
}

impl Shelf {
    async fn new(dir: &Path) -> Self {
        let store: Arc<dyn SnapshotStore> = Arc::new(Local::open(dir).unwrap());
        let repo = repo(&store, "lora");
        let trainer = start(&repo, 1).await;
        let error = save(&trainer, "early", CheckpointType::MergedBase).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert_eq!(
            error.message(),
            "a merged base was asked for, but the adapter was neither trained nor loaded yet"
        );
        // The failure is told once more, to the next call, and is then over.
        assert_eq!(trainer.client.forward_backward(batch()).await.unwrap_err().kind(), ErrorKind::Invalid);
        train(&trainer, &mut Rng::new(5), 3).await;
        let position = Position::new(3, 96);
        let saves = run(&trainer, &repo);
        saves.save_checkpoint(&name("state-3"), SaveKind::State, &position, None).await.unwrap();
        let adapter = save(&trainer, "adapter-3", CheckpointType::Base).await.unwrap();
        assert_eq!(adapter.kind, SnapshotKind::Adapter);
        let merged = save(&trainer, "merged-3", CheckpointType::MergedBase).await.unwrap();
        let weights = trainer.weights.merged_weights().await.unwrap();
        assert_eq!(merged.id.digest, weights.content_digest());
        let base = trainer.weights.base_weights().await.unwrap();
        check_merged(&base, &trainer.weights.published_weights().await.unwrap(), &weights);
        Self { store, adapter: adapter.id.digest, merged: weights }
    }

    /// A fresh trainer of job `job`.
    async fn trainer(&self, job: &str, is_lora: bool) -> Trainer {
        let repo = repo(&self.store, job);
        match is_lora {
            true => start(&repo, 9).await,
            false => Trainer::start(&repo, &ModelConfig::tiny(), 2).await.unwrap(),
        }
    }
}

fn batch() -> towline_core::Batch {
    let batch = engine::task::supervised_batch(&mut Rng::new(3), 2);
    towline_core::Batch::new(batch, towline_core::Loss::CrossEntropy)
}

/// Asserts that `merged` is the base plus the folded adapter, rounded: by PEFT's formula, element by element.
fn check_merged(base: &Weights, factors: &Weights, merged: &Weights) {
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
    };
    let halves = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks::<2>().0.iter().map(|raw| half::bf16::from_le_bytes(*raw).to_f32()).collect()
    };
    let mut adapted = 0;
    for ((meta, before), (_, after)) in base.iter().zip(merged.iter()) {
        let module = meta.name().strip_suffix(".weight").unwrap();
        let factor = |which: &str| factors.get(&format!("base_model.model.{module}.lora_{which}.weight"));
        let (Some((_, a)), Some((_, b))) = (factor("A"), factor("B")) else {
            assert_eq!(before, after, "{module}");
            continue;
        };
        let (a, b, input) = (floats(a), floats(b), meta.shape()[1]);
        for (at, (before, after)) in halves(before).into_iter().zip(halves(after)).enumerate() {
            let (row, column) = (at / input, at % input);
            let update: f32 = (0..4).map(|k| b[row * 4 + k] * a[k * input + column]).sum();
            // One unit in the last place of 16 bits: the sum may be rounded in another order.
            let wanted = before + 32.0 / 4.0 * update;
            assert!((after - wanted).abs() <= wanted.abs() / 128.0 + 1e-6, "{module} {at}: {after} {wanted}");
        }
        adapted += 1;
    }
    assert_eq!(adapted, 2 * TargetModule::ALL.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_goes_into_the_trainers_that_it_fits_and_the_others_say_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(dir.path()).await;
    let all = "rank 4, alpha 32, on q_proj k_proj v_proj o_proj gate_proj up_proj down_proj";
    let holds = format!("state state-3 holds a LoRA adapter ({all}); this trainer trains all parameters");
    let full = "this trainer trains all parameters: it has no LoRA adapter";
    for (number, (what, is_lora, how, refusal)) in [
        ("state-3", false, Use::Resume, Some(holds.as_str())),
        ("state-3", false, Use::Initialise, Some(&holds)),
        ("state-3", false, Use::LoadAsAdapter, Some(full)),
        ("state-3", true, Use::Resume, None),
        ("state-3", true, Use::Initialise, None),
        ("state-3", true, Use::LoadAsAdapter, Some("(state): wanted a sampler checkpoint")),
        ("adapter-3", false, Use::Resume, Some("(adapter): wanted a train state")),
        ("adapter-3", false, Use::Initialise, Some("(adapter): wanted a train state")),
        ("adapter-3", false, Use::LoadAsAdapter, Some(full)),
        ("adapter-3", true, Use::Resume, Some("(adapter): wanted a train state")),
        ("adapter-3", true, Use::Initialise, Some("(adapter): wanted a train state")),
        ("adapter-3", true, Use::LoadAsAdapter, None),
        ("merged-3", false, Use::Resume, Some("(merged_base): wanted a train state")),
        ("merged-3", false, Use::Initialise, Some("(merged_base): wanted a train state")),
        ("merged-3", false, Use::LoadAsAdapter, Some(full)),
        ("merged-3", true, Use::Resume, Some("(merged_base): wanted a train state")),
        ("merged-3", true, Use::Initialise, Some("(merged_base): wanted a train state")),
        ("merged-3", true, Use::LoadAsAdapter, Some("is a merged_base: wanted an adapter")),
    ]
    .into_iter()
    .enumerate()
    {
        let job = format!("cell-{number}");
        let trainer = shelf.trainer(&job, is_lora).await;
        let run = run(&trainer, &repo(&shelf.store, &job));
        let reference: CheckpointRef = format!("lora:{what}").parse().unwrap();
        let outcome = how.of(reference, &trainer, &run).await;
        match refusal {
            None => {
                outcome.unwrap();
                assert_eq!(digest(&trainer).await, shelf.adapter, "{what} {how:?}");
                // What was loaded can be merged at once.
                let merged = save(&trainer, "merged", CheckpointType::MergedBase).await.unwrap();
                assert_eq!(merged.id.digest, shelf.merged.content_digest());
            }
            Some(says) => {
                let error = outcome.unwrap_err();
                assert!(error.message().contains(says), "{what} {is_lora} {how:?}: {error}");
                assert!(error.help().is_some(), "{what} {is_lora} {how:?} has no next step");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn merged_bases_begin_new_runs_and_adapters_stay_with_their_base_and_shape() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(dir.path()).await;
    let model = ModelConfig::tiny();
    // A full-parameter run, and a second adapter, on the merged weights.
    let info = repo(&shelf.store, "lora").find("merged-3", Wanted::Sampler).await.unwrap();
    let weights = repo(&shelf.store, "lora").restore(&info).await.unwrap();
    let job = repo(&shelf.store, "full");
    let local = LocalTrainer::from_bytes(&model, bridge::views(&weights)).unwrap();
    let trainer = Trainer::start_from(&job, local).await.unwrap();
    assert_eq!(digest(&trainer).await, shelf.merged.content_digest());
    let job = repo(&shelf.store, "second");
    let local = LocalTrainer::with_lora(&model, bridge::views(&weights), &lora()).unwrap();
    let second = Trainer::start_from(&job, local).await.unwrap();
    let base = second.weights.base_weights().await.unwrap();
    assert_eq!(base.content_digest(), shelf.merged.content_digest());
    // It is served on the merged base of the other job, which is the same weights.
    let server = Server::start(Arc::clone(&shelf.store), ServerOptions::default()).await.unwrap();
    train(&second, &mut Rng::new(6), 1).await;
    let receipt =
        syncer(&second, &server.url()).unwrap().save_and_hotload(name("step-1"), None).await.unwrap();
    serves(&server, &second, &receipt.snapshot).await;

    // Another base, another rank, another scale, other modules: each names both.
    let state = Resume::default().with_from("lora:state-3".parse().unwrap());
    let source = AdapterSource::Checkpoint("lora:adapter-3".parse().unwrap());
    let error = run(&second, &job).resolve_resume(&state).await.unwrap_err();
    let says = format!("; this trainer has {}", base.content_digest());
    assert!(error.message().contains("state state-3 was trained on base weights "), "{error}");
    assert!(error.message().contains(&says), "{error}");
    let error = second.client.load_adapter(&source).wait(DEADLINE).await.unwrap_err();
    assert!(error.message().contains("the adapter was trained on base weights "), "{error}");
    let modules = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj";
    for (number, (other, this)) in [
        (LoraConfig::new(8), format!("rank 8, alpha 32, on {modules}")),
        (lora().with_alpha(16.0), format!("rank 4, alpha 16, on {modules}")),
        (lora().with_target_modules([TargetModule::VProj]), "rank 4, alpha 32, on v_proj".to_owned()),
    ]
    .into_iter()
    .enumerate()
    {
        let job = repo(&shelf.store, &format!("other-{number}"));
        let trainer = Trainer::start_lora(&job, &model, 1, &other).await.unwrap();
        let both = format!("has LoRA rank 4, alpha 32, on {modules}; this trainer has {this}");
        for error in [
            run(&trainer, &job).resolve_resume(&state).await.unwrap_err(),
            trainer.client.load_adapter(&source).wait(DEADLINE).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.message().contains(&both), "{error}");
        }
    }
    // A state of all parameters is no adapter's.
    train(&trainer, &mut Rng::new(7), 1).await;
    let own = run(&trainer, &repo(&shelf.store, "full"));
    own.save_checkpoint(&name("state-1"), SaveKind::State, &Position::new(1, 32), None).await.unwrap();
    let third = shelf.trainer("third", true).await;
    let resume = Resume::default().with_from("full:state-1".parse().unwrap());
    let error = run(&third, &repo(&shelf.store, "third")).resolve_resume(&resume).await.unwrap_err();
    assert!(
        error.message().contains("state state-1 holds all parameters; this trainer trains a LoRA adapter")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_and_merged_bases_are_promoted_and_states_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(dir.path()).await;
    let lora_repo = repo(&shelf.store, "lora");
    let promote = async |what: &str, to: &str| {
        let (what, to) = (SnapshotIdentity::new(what).unwrap(), ModelId::new(to).unwrap());
        lora_repo.promote_checkpoint(lora_repo.job(), &what, &to).await
    };
    let error = promote("state-3", "state").await.unwrap_err();
    assert!(error.message().contains("is a train state: it can be resumed from, never promoted"), "{error}");

    let model = promote("adapter-3", "addon").await.unwrap();
    assert_eq!(model.kind, ModelKind::HfPeftAddon);
    let folder = dir.path().join(&model.path);
    let files = |folder: &Path| -> Vec<String> {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(files(&folder), ["adapter_config.json", "adapter_model.safetensors", "towline.json"]);
    let read = Adapter::read_folder(&ModelConfig::tiny(), &folder).unwrap();
    assert_eq!(read.weights.content_digest(), shelf.adapter);
    let copy = dir.path().join("copy");
    let info = lora_repo.find("adapter-3", Wanted::Sampler).await.unwrap();
    lora_repo.export(&info, &copy).await.unwrap();
    assert_eq!(files(&copy), ["adapter_config.json", "adapter_model.safetensors"]);
    for place in [folder, copy] {
        let trainer = shelf.trainer("warm", true).await;
        let source = AdapterSource::Folder(place);
        trainer.client.load_adapter(&source).wait(DEADLINE).await.unwrap();
        assert_eq!((digest(&trainer).await, trainer.client.restored()), (shelf.adapter, Some(shelf.adapter)));
    }

    let merged = promote("merged-3", "whole").await.unwrap();
    assert_eq!(merged.kind, ModelKind::HfBaseModel);
    // Both are served from the start.
    let (mut scores, completions) = (Vec::new(), |server: &Server| Completions::new(&server.url()).unwrap());
    for model in [&model, &merged] {
        let id = ModelId::new(model.name.rsplit_once('/').unwrap().1).unwrap();
        let options = ServerOptions::default().with_promoted(Some(id));
        let server = Server::start(Arc::clone(&shelf.store), options).await.unwrap();
        scores.push(completions(&server).score(&TOKENS, &model.source.id).await.unwrap());
    }
    let trainer = shelf.trainer("served", true).await;
    let source = AdapterSource::Folder(dir.path().join("copy"));
    trainer.client.load_adapter(&source).wait(DEADLINE).await.unwrap();
    let own = engine::score(&trainer.weights.published_model().await.unwrap(), &TOKENS).unwrap();
    assert_eq!(scores[0], own);
    // Merged weights are rounded once more.
    assert!(scores[1].iter().zip(&own).all(|(left, right)| (left - right).abs() < 0.1), "{scores:?}");
    let model = merged;
    let names = files(&dir.path().join(&model.path));
    assert!(names.contains(&"config.json".to_owned()) && !names.contains(&"adapter_config.json".to_owned()));

    // A full-parameter run has nothing of both kinds to promote.
    let full = shelf.trainer("full", false).await;
    let request = ExportRequest::new(name("adapter"), SnapshotKind::Adapter, CodecId::of("raw"));
    let error = full.client.export(request).await.unwrap_err();
    assert!(error.message().contains("trains all parameters: it has no adapter"), "{error}");
    let error = save(&full, "merged", CheckpointType::MergedBase).await.unwrap_err();
    assert_eq!(error.message(), "a merged base was asked for, but the model has no LoRA adapter");
}
