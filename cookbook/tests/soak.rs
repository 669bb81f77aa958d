//! Hot-swap soak over HTTP: answers while weights change, each from exactly the version that it is stamped with.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use towline_cookbook::bridge;
use towline_cookbook::engine::{LocalTrainer, ModelConfig, WeightDtype};
use towline_cookbook::recipes::embedded_deployment;
use towline_cookbook::server::{Server, ServerOptions};
use towline_core::{
    Deployment, HotLoad, JobId, OpId, Outcome, SessionId, SnapshotKind, SnapshotName, SnapshotRef,
    SnapshotStore,
};
use towline_storage::{Publish, SnapshotRepo};

const PROMPTS: [&str; 3] = ["3141>", "the quick brown fox", "0000>"];
const SWAPS: u64 = 1000;
const CLIENTS: usize = 4;

struct Setup {
    server: Server,
    deployment: Arc<dyn Deployment>,
    snapshots: Vec<SnapshotRef>,
    http: reqwest::Client,
}

impl Setup {
    async fn new(snapshots: u64) -> Self {
        let store: Arc<dyn SnapshotStore> = Arc::new(towline_storage::Memory::new());
        let repo = SnapshotRepo::new(Arc::clone(&store), JobId::new("soak").unwrap(), towline_codec::all());
        let writer = repo.writer(SessionId::new("0000aaaa").unwrap()).await.unwrap();
        let config = ModelConfig::tiny();
        let mut refs = Vec::new();
        for seed in 0..snapshots {
            let trainer = LocalTrainer::new(&config, seed).unwrap();
            let weights =
                bridge::weights(trainer.export(WeightDtype::Bf16).unwrap(), WeightDtype::Bf16).unwrap();
            let name = SnapshotName::new(format!("seed-{seed}")).unwrap();
            let publish = Publish::new(name, SnapshotKind::Base, Arc::new(weights) as _)
                .with_files(vec![bridge::config_file(&config)]);
            refs.push(writer.publish(publish).await.unwrap());
        }
        let server = Server::start(store, ServerOptions::default()).await.unwrap();
        let deployment = embedded_deployment(&server.url()).unwrap();
        let http = towline_deploy::http_client(&server.url(), Duration::from_secs(60)).unwrap();
        Self { server, deployment, snapshots: refs, http }
    }

    async fn load(&self, number: u64, snapshot: &SnapshotRef, reset: bool) {
        let op = OpId::new(format!("op-{number}")).unwrap();
        let order = HotLoad::new(op, snapshot.clone()).unwrap().with_reset_prompt_cache(reset);
        self.deployment.hot_load(&order).await.unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            match self.deployment.status().await.unwrap().outcome(&snapshot.id) {
                Outcome::Committed => return,
                Outcome::Running => assert!(tokio::time::Instant::now() < deadline, "not loaded in 60 s"),
                Outcome::Failed(why) => panic!("{why}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn complete(&self, prompt: &str, max_tokens: usize) -> Value {
        let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 1.0, "seed": 5});
        let response =
            self.http.post(format!("{}/v1/completions", self.server.url())).json(&body).send().await.unwrap();
        assert!(response.status().is_success());
        response.json().await.unwrap()
    }
}

fn text(answer: &Value) -> String {
    answer["choices"][0]["tokens"].to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_answer_is_of_the_version_that_it_is_stamped_with() {
    let setup = Arc::new(Setup::new(2).await);
    let mut reference = BTreeMap::new();
    for (number, snapshot) in (0u64..).zip(&setup.snapshots) {
        setup.load(number, snapshot, true).await;
        for prompt in PROMPTS {
            let answer = setup.complete(prompt, 24).await;
            assert_eq!(answer["snapshot"], snapshot.id.identity.as_str());
            reference.insert((snapshot.id.identity.to_string(), prompt), text(&answer));
        }
    }
    for prompt in PROMPTS {
        let texts: Vec<_> = setup
            .snapshots
            .iter()
            .map(|snapshot| &reference[&(snapshot.id.identity.to_string(), prompt)])
            .collect();
        assert_ne!(texts[0], texts[1], "the two versions must answer differently");
    }
    let reference = Arc::new(reference);
    let done = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (setup, reference, done) = (Arc::clone(&setup), Arc::clone(&reference), Arc::clone(&done));
            tokio::spawn(async move {
                let (mut answers, mut spanning) = (0u64, 0u64);
                for round in client.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let prompt = PROMPTS[round % PROMPTS.len()];
                    let answer = setup.complete(prompt, 24).await;
                    let stamp = answer["snapshot"].as_str().unwrap().to_owned();
                    assert_eq!(text(&answer), reference[&(stamp, prompt)], "a mixed or wrong answer");
                    answers += 1;
                    spanning += u64::from(answer["swaps_during"].as_u64().unwrap() > 0);
                }
                (answers, spanning)
            })
        })
        .collect();
    let mut swaps = 0;
    // Goes on past the wanted swaps until enough answers have lived through one; the deadline is the runner's.
    for number in 0..SWAPS {
        let snapshot = &setup.snapshots[usize::try_from(number % 2).unwrap()];
        setup.load(100 + number, snapshot, number % 3 == 0).await;
        swaps += 1;
    }
    done.store(true, Ordering::Relaxed);
    let (mut answers, mut spanning) = (0, 0);
    for client in clients {
        let (more, across) = client.await.unwrap();
        answers += more;
        spanning += across;
    }
    println!(
        "{swaps} swaps, {CLIENTS} clients, {answers} answers, {spanning} of them across a swap, 0 mixed"
    );
    assert!(spanning >= 200, "only {spanning} answers lived through a swap");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resetting_the_prompt_cache_is_told_from_keeping_it() {
    let setup = Setup::new(2).await;
    let cached = async |setup: &Setup| {
        setup.complete(PROMPTS[1], 2).await["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    let length = PROMPTS[1].len() as u64;
    setup.load(0, &setup.snapshots[0], true).await;
    assert_eq!(cached(&setup).await, 0);
    assert_eq!(cached(&setup).await, length, "the second reading of a prompt comes from the cache");
    setup.load(1, &setup.snapshots[1], false).await;
    assert_eq!(cached(&setup).await, 0, "what older weights read is never used by newer ones");
    setup.load(2, &setup.snapshots[0], false).await;
    assert_eq!(cached(&setup).await, length, "kept: the older weights find their prompt again");
    setup.load(3, &setup.snapshots[1], false).await;
    setup.load(4, &setup.snapshots[0], true).await;
    assert_eq!(cached(&setup).await, 0, "reset: nothing is left");
}
