//! The embedded client over a backend that writes down what it is asked, and fails on demand.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use towline_core::{
    AdamParams, AdapterSource, Batch, CheckpointType, CodecId, ContentDigest, Datum, DeltaParents, Error,
    ErrorKind, ExportRequest, ForwardBackward, Loss, OptimStep, PendingStatus, Result, SaveState,
    SaveWeights, SessionId, SnapshotExporter, SnapshotId, SnapshotIdentity, SnapshotKind, SnapshotName,
    SnapshotRef, StateRef, TrainingClient, async_trait,
};
use towline_trainer_client::{Backend, EmbeddedClient, PendingExt};

/// What happened, and what is to happen.
#[derive(Debug)]
struct Script {
    log: Mutex<Vec<String>>,
    /// Fails the operation whose log entry starts so, once.
    fail: Mutex<Vec<(&'static str, ErrorKind)>>,
    /// Each operation takes one permit.
    gate: Semaphore,
    exports: Mutex<Vec<ExportRequest>>,
}

#[derive(Debug)]
struct Fake {
    script: Arc<Script>,
    restored: Option<ContentDigest>,
    lora: bool,
    steps: u64,
}

impl Fake {
    async fn enter(&self, entry: String) -> Result<()> {
        self.script.gate.acquire().await.unwrap().forget();
        self.script.log.lock().unwrap().push(entry.clone());
        let mut faults = self.script.fail.lock().unwrap();
        match faults.iter().position(|(start, _)| entry.starts_with(start)) {
            Some(index) => {
                let (start, kind) = faults.remove(index);
                Err(Error::new(kind, format!("{start} broke")))
            }
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for Fake {
    fn delta_parents(&self) -> DeltaParents {
        DeltaParents::LastExported
    }

    fn restored(&self) -> Option<ContentDigest> {
        self.restored
    }

    fn is_lora(&self) -> bool {
        self.lora
    }

    async fn holds(&mut self, digest: &ContentDigest) -> Result<bool> {
        Ok(*digest == ContentDigest::from_bytes([1; 32]))
    }

    async fn forward_backward(&mut self, batch: Batch) -> Result<ForwardBackward> {
        self.enter(format!("batch {}", batch.data[0].tokens[0])).await?;
        Ok(ForwardBackward::new(f64::from(batch.data[0].tokens[0]), vec![]))
    }

    async fn optim_step(&mut self, _: AdamParams) -> Result<OptimStep> {
        self.enter("step".into()).await?;
        self.steps += 1;
        Ok(OptimStep::new(self.steps, 0.0))
    }

    async fn export(&mut self, request: ExportRequest) -> Result<SnapshotRef> {
        self.enter(format!("export {}", request.name)).await?;
        let mut exports = self.script.exports.lock().unwrap();
        exports.push(request.clone());
        let identity = SnapshotIdentity::of(&request.name, &SessionId::new("00ab12cd").unwrap());
        let digest = ContentDigest::from_bytes([exports.len() as u8; 32]);
        let path = format!("job/{}", request.name);
        Ok(SnapshotRef::new(SnapshotId { identity, digest }, request.kind, path).with_parent(request.parent))
    }

    async fn save_state(&mut self, request: SaveState) -> Result<StateRef> {
        self.enter(format!("state {}", request.name)).await?;
        Ok(StateRef::new(request.name.clone(), format!("job/{}", request.name), self.steps))
    }

    async fn load_state(&mut self, state: &StateRef, with_optimizer: bool) -> Result<()> {
        self.enter(format!("load {state} {with_optimizer}")).await?;
        self.restored = Some(ContentDigest::from_bytes([9; 32]));
        Ok(())
    }

    async fn load_adapter(&mut self, source: &AdapterSource) -> Result<()> {
        self.enter(format!("load {source}")).await?;
        self.restored = Some(ContentDigest::from_bytes([8; 32]));
        Ok(())
    }
}

/// A client whose operations may begin once there are permits.
fn gated(permits: usize) -> (Arc<Script>, EmbeddedClient) {
    let script = Arc::new(Script {
        log: Mutex::default(),
        fail: Mutex::default(),
        gate: Semaphore::new(permits),
        exports: Mutex::default(),
    });
    let fake = Fake { script: Arc::clone(&script), restored: None, lora: false, steps: 0 };
    (script, EmbeddedClient::new(fake))
}

fn open() -> (Arc<Script>, EmbeddedClient) {
    gated(Semaphore::MAX_PERMITS)
}

impl Script {
    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn fail(&self, start: &'static str, kind: ErrorKind) {
        self.fail.lock().unwrap().push((start, kind));
    }

    fn kinds(&self) -> Vec<SnapshotKind> {
        self.exports.lock().unwrap().iter().map(|request| request.kind).collect()
    }
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn batch(number: u32) -> Batch {
    Batch::new(vec![Datum::supervised(vec![number], vec![number], vec![1.0])], Loss::CrossEntropy)
}

fn state(text: &str) -> StateRef {
    StateRef::new(name(text), "job/x", 0)
}

#[tokio::test]
async fn operations_run_in_the_order_of_the_calls() {
    let (script, client) = open();
    let second = {
        // Never awaited, and dropped at once: it runs all the same.
        drop(client.forward_backward(batch(1)));
        let step = client.optim_step(AdamParams::default());
        drop(client.forward_backward(batch(2)));
        drop(client.save_state(SaveState::new(name("s"))));
        drop(step);
        client.optim_step(AdamParams::default())
    };
    let saved =
        client.export(ExportRequest::new(name("w"), SnapshotKind::Base, CodecId::of("raw"))).await.unwrap();
    assert_eq!(saved.id.identity.as_str(), "w-00ab12cd");
    assert_eq!(second.await.unwrap().step, 2);
    assert_eq!(script.log(), ["batch 1", "step", "batch 2", "state s", "step", "export w"]);
    client.close().await.unwrap();
}

#[tokio::test]
async fn a_handle_tells_where_its_operation_is() {
    let (script, client) = gated(0);
    let first = client.forward_backward(batch(1));
    let second = client.optim_step(AdamParams::default());
    tokio::task::yield_now().await;
    assert_eq!((first.status(), second.status()), (PendingStatus::Running, PendingStatus::Queued));
    script.gate.add_permits(1);
    assert_eq!(first.await.unwrap().loss, 1.0);
    script.gate.add_permits(1);
    second.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_wait_and_not_the_operation() {
    let (script, client) = gated(0);
    let handle = client.forward_backward(batch(7));
    let start = Instant::now();
    let error = handle.wait(Duration::from_secs(3)).await.unwrap_err();
    assert_eq!((error.kind(), start.elapsed().as_secs()), (ErrorKind::TimedOut, 3));
    script.gate.add_permits(1);
    client.close().await.unwrap();
    assert_eq!(script.log(), ["batch 7"]);
}

#[tokio::test(start_paused = true)]
async fn a_wait_can_be_asked_again() {
    let (script, client) = gated(0);
    let mut handle = client.forward_backward(batch(7));
    let error = (&mut handle).wait(Duration::from_secs(3)).await.unwrap_err();
    assert!(error.message().contains("is running after 3 s"), "{error}");
    script.gate.add_permits(1);
    assert_eq!(handle.wait(Duration::from_secs(3)).await.unwrap().loss, 7.0);
}

#[tokio::test]
async fn a_failed_step_fails_what_is_behind_it_until_a_state_is_loaded() {
    let (script, client) = gated(0);
    script.fail("batch 1", ErrorKind::Unavailable);
    let failed = client.forward_backward(batch(1));
    let behind = client.optim_step(AdamParams::default());
    let load_behind = client.load_state_with_optimizer(&state("s"));
    let save_behind = client.save_state(SaveState::new(name("behind")));
    script.gate.add_permits(10);
    assert_eq!(failed.await.unwrap_err().message(), "batch 1 broke");
    for error in [
        behind.await.unwrap_err(),
        load_behind.await.unwrap_err(),
        save_behind.await.unwrap_err(),
        client.forward_backward(batch(2)).await.unwrap_err(),
        client.optim_step(AdamParams::default()).await.unwrap_err(),
        client.save_state(SaveState::new(name("late"))).await.unwrap_err(),
        client
            .export(ExportRequest::new(name("late"), SnapshotKind::Base, CodecId::of("raw")))
            .await
            .unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(
            error.message().contains("an earlier operation failed: unavailable: batch 1 broke"),
            "{error}"
        );
    }
    assert_eq!(script.log(), ["batch 1"]);
    client.load_state_with_optimizer(&state("s")).await.unwrap();
    client.forward_backward(batch(3)).await.unwrap();
    // Names of saves that did not happen are free.
    client.save_state(SaveState::new(name("behind"))).await.unwrap();
    client.save_state(SaveState::new(name("late"))).await.unwrap();
    assert_eq!(script.log(), ["batch 1", "load s true", "batch 3", "state behind", "state late"]);
    client.close().await.unwrap();
}

#[tokio::test]
async fn a_failed_load_leaves_nothing_to_train_on() {
    let (script, client) = open();
    script.fail("load", ErrorKind::NotFound);
    assert_eq!(client.load_state(&state("s")).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(client.optim_step(AdamParams::default()).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(client.optim_step(AdamParams::default()).await.unwrap_err().kind(), ErrorKind::NotFound);
    client.load_state(&state("s")).await.unwrap();
    client.optim_step(AdamParams::default()).await.unwrap();
    assert_eq!(script.log(), ["load s false", "load s false", "step"]);
}

#[tokio::test]
async fn a_failed_save_surfaces_at_the_next_call_and_no_longer() {
    let (script, client) = open();
    script.fail("state a", ErrorKind::Unavailable);
    assert!(client.save_state(SaveState::new(name("a"))).await.is_err());
    let error = client.forward_backward(batch(1)).await.unwrap_err();
    assert!(error.message().contains("state a broke"), "{error}");
    client.forward_backward(batch(1)).await.unwrap();
    client.save_state(SaveState::new(name("a"))).await.unwrap();
    client.close().await.unwrap();
}

#[tokio::test]
async fn what_nobody_saw_surfaces_at_close() {
    let (script, client) = gated(0);
    script.fail("state a", ErrorKind::Fenced);
    drop(client.save_state(SaveState::new(name("a"))));
    drop(client.save_state(SaveState::new(name("b"))));
    script.gate.add_permits(10);
    let error = client.close().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fenced);
    assert!(error.message().contains("state a broke"), "{error}");
    client.close().await.unwrap();
    assert_eq!(client.forward_backward(batch(1)).await.unwrap_err().kind(), ErrorKind::Gone);
    assert_eq!(script.log(), ["state a"]);
}

#[tokio::test]
async fn close_waits_for_what_was_submitted() {
    let (script, client) = gated(0);
    drop(client.forward_backward(batch(1)));
    drop(client.optim_step(AdamParams::default()));
    let close = client.close();
    tokio::pin!(close);
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut close).await.is_err());
    script.gate.add_permits(2);
    close.await.unwrap();
    assert_eq!(script.log(), ["batch 1", "step"]);
}

#[tokio::test]
async fn names_are_unique_per_kind() {
    let (script, client) = gated(0);
    let first = client.save_weights_for_sampler_ext(SaveWeights::new(name("step-1")));
    let other_kind = client.save_state(SaveState::new(name("step-1")));
    // Taken while the first still waits: told at once, without a place in the order.
    let again = client.save_weights_for_sampler_ext(SaveWeights::new(name("step-1")));
    assert_eq!(again.status(), PendingStatus::Done);
    assert_eq!(again.await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    let again =
        client.export(ExportRequest::new(name("step-1"), SnapshotKind::Base, CodecId::of("raw"))).await;
    assert_eq!(again.unwrap_err().kind(), ErrorKind::AlreadyExists);
    script.gate.add_permits(10);
    first.await.unwrap();
    other_kind.await.unwrap();
    let again = client.save_state(SaveState::new(name("step-1"))).await;
    assert_eq!(again.unwrap_err().kind(), ErrorKind::AlreadyExists);
    // Nothing of this holds up the rest.
    client.forward_backward(batch(1)).await.unwrap();
    client.close().await.unwrap();
}

#[tokio::test]
async fn a_lone_client_saves_a_base_and_then_deltas_on_its_last_save() {
    let (script, client) = open();
    let client = client.with_codec(CodecId::of("zstd"));
    let save = |text: &str| client.save_weights_for_sampler_ext(SaveWeights::new(name(text)));
    let first = save("a").await.unwrap();
    assert_eq!((first.snapshot_name.as_str(), first.path.as_str()), ("a-00ab12cd", "job/a"));
    let second = save("b").await.unwrap();
    assert_eq!(second.snapshot.parent, Some(first.snapshot.id));
    let ttl = Duration::from_secs(3600);
    let request = SaveWeights::new(name("c")).with_type(CheckpointType::Base).with_ttl(ttl);
    client.save_weights_for_sampler_ext(request).await.unwrap();
    save("d").await.unwrap();
    script.fail("export e", ErrorKind::Unavailable);
    save("e").await.unwrap_err();
    client.optim_step(AdamParams::default()).await.unwrap_err();
    save("f").await.unwrap();
    client.load_state(&state("s")).await.unwrap();
    save("g").await.unwrap();
    use SnapshotKind::{Base, Delta};
    assert_eq!(script.kinds(), [Base, Delta, Base, Delta, Base, Base]);
    let exports = script.exports.lock().unwrap();
    assert_eq!((exports[2].ttl, exports[3].ttl, exports[1].codec.as_str()), (Some(ttl), None, "zstd"));
}

#[tokio::test]
async fn a_delta_on_nothing_is_refused() {
    let (script, client) = open();
    let request = SaveWeights::new(name("a")).with_type(CheckpointType::Delta);
    let error = client.save_weights_for_sampler_ext(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ChainMismatch);
    assert!(script.log().is_empty());
}

#[tokio::test]
async fn a_lora_saves_adapters() {
    let (script, _) = open();
    let client =
        EmbeddedClient::new(Fake { script: Arc::clone(&script), restored: None, lora: true, steps: 0 });
    for (text, asked) in [("a", CheckpointType::Delta), ("b", CheckpointType::MergedBase)] {
        let request = SaveWeights::new(name(text)).with_type(asked);
        client.save_weights_for_sampler_ext(request).await.unwrap();
    }
    assert_eq!(script.kinds(), [SnapshotKind::Adapter, SnapshotKind::MergedBase]);
}

#[tokio::test]
async fn an_adapter_is_loaded_in_its_turn_and_ends_a_failure() {
    let (script, client) = gated(0);
    let batch = client.forward_backward(batch(1));
    let loaded = client.load_adapter(&AdapterSource::Checkpoint("sft:final".parse().unwrap()));
    assert_eq!(loaded.status(), PendingStatus::Queued);
    script.gate.add_permits(10);
    batch.await.unwrap();
    loaded.await.unwrap();
    assert_eq!(client.restored(), Some(ContentDigest::from_bytes([8; 32])));
    script.fail("step", ErrorKind::Unavailable);
    client.optim_step(AdamParams::default()).await.unwrap_err();
    client.optim_step(AdamParams::default()).await.unwrap_err();
    client.load_adapter(&AdapterSource::Folder("/peft".into())).await.unwrap();
    client.optim_step(AdamParams::default()).await.unwrap();
    assert_eq!(script.log(), ["batch 1", "load cross_job://sft/final", "step", "load `/peft`", "step"]);
    client.close().await.unwrap();
}

#[tokio::test]
async fn what_the_backend_holds_and_was_restored_from() {
    let (_, client) = open();
    assert_eq!(client.delta_parents(), DeltaParents::LastExported);
    assert!(client.holds(&ContentDigest::from_bytes([1; 32])).await.unwrap());
    assert!(!client.holds(&ContentDigest::from_bytes([2; 32])).await.unwrap());
    assert_eq!(client.restored(), None);
    client.load_state(&state("s")).await.unwrap();
    assert_eq!(client.restored(), Some(ContentDigest::from_bytes([9; 32])));
}

#[tokio::test]
async fn an_export_that_fails_holds_up_nobody_else() {
    let (script, client) = open();
    script.fail("export a", ErrorKind::Unavailable);
    let request = ExportRequest::new(name("a"), SnapshotKind::Base, CodecId::of("raw"));
    client.export(request.clone()).await.unwrap_err();
    client.forward_backward(batch(1)).await.unwrap();
    client.export(request).await.unwrap();
    client.close().await.unwrap();
}

#[tokio::test]
async fn a_batch_of_uneven_lists_is_refused_at_once() {
    let (script, client) = open();
    let uneven = Batch::new(vec![Datum::supervised(vec![1, 2], vec![1], vec![1.0])], Loss::CrossEntropy);
    assert_eq!(client.forward_backward(uneven).await.unwrap_err().kind(), ErrorKind::Invalid);
    client.forward_backward(batch(1)).await.unwrap();
    assert_eq!(script.log(), ["batch 1"]);
}

#[tokio::test]
async fn too_many_waiting_operations_are_refused() {
    let (script, client) = gated(0);
    let handles: Vec<_> = (0..1100).map(|_| client.optim_step(AdamParams::default())).collect();
    script.gate.add_permits(2000);
    let mut done = 0;
    for handle in handles {
        done += usize::from(handle.await.is_ok());
    }
    assert_eq!((done, script.log().len()), (1024, 1024));
    // Steps are lost: nothing goes on until a state is loaded.
    for _ in 0..2 {
        let error = client.forward_backward(batch(1)).await.unwrap_err();
        assert!(error.message().contains("1024 operations are waiting"), "{error}");
    }
    client.load_state_with_optimizer(&state("s")).await.unwrap();
    client.save_state(SaveState::new(name("s"))).await.unwrap();
    client.close().await.unwrap();
}

#[tokio::test]
async fn a_client_that_is_dropped_lets_its_operations_end() {
    let (script, client) = gated(0);
    let last = client.optim_step(AdamParams::default());
    drop(client);
    script.gate.add_permits(1);
    assert_eq!(last.await.unwrap().step, 1);
}

#[tokio::test]
async fn a_trainer_that_panics_fails_every_operation() {
    let (script, client) = open();
    script.gate.close();
    let first = client.optim_step(AdamParams::default());
    let second = client.optim_step(AdamParams::default());
    assert_eq!(first.await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(second.await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(client.optim_step(AdamParams::default()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(client.close().await.unwrap_err().kind(), ErrorKind::Unavailable);
}
