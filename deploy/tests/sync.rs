//! The weight syncer against an exporter and a deployment with faults.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Exporter, Fault, Servers, digest, id, name, serve};
use tokio::time::Instant;
use towline_core::SnapshotKind::{Adapter, Base, Delta, MergedBase};
use towline_core::{
    Capabilities, CheckpointType, CodecId, DeltaParents, Error, ErrorKind, ReplicaStatus, SnapshotKind,
    SnapshotRef, Stage,
};
use towline_deploy::{Receipt, WeightSyncer};

fn syncer(exporter: &Arc<Exporter>, servers: &Servers) -> WeightSyncer {
    WeightSyncer::new(Arc::clone(exporter) as _).with_deployment(Arc::new(servers.clone()))
}

fn pair(replicas: usize) -> (Arc<Exporter>, Servers, WeightSyncer) {
    let (exporter, servers) = (Arc::new(Exporter::new()), Servers::new(replicas));
    let syncer = syncer(&exporter, &servers);
    (exporter, servers, syncer)
}

#[test]
fn the_defaults_are_those_of_the_public_client() {
    let syncer = WeightSyncer::new(Arc::new(Exporter::new()));
    let settings = syncer.settings();
    assert_eq!(settings.deployment_id, None);
    assert_eq!(settings.base_model, "");
    assert_eq!(settings.hotload_timeout, Duration::from_secs(600));
    assert_eq!(settings.first_checkpoint_type, CheckpointType::Base);
    assert_eq!(settings.compression_format, "arc_v2");
    assert!(settings.warmup_after_hotload);
    assert_eq!(settings.warmup_max_retries, 10);
    assert_eq!(settings.warmup_interval, Duration::from_secs(10));
    assert_eq!(settings.poll_interval, Duration::from_secs(5));
    assert!(settings.reset_prompt_cache);
    assert_eq!(settings.lora_rank, 0);
}

#[tokio::test(start_paused = true)]
async fn a_base_comes_first_and_deltas_follow() {
    let (exporter, servers, syncer) = pair(2);
    let first = syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    let second = syncer.save_and_hotload(name("step-1"), None).await.unwrap();
    let third = syncer.save_and_hotload(name("step-2"), None).await.unwrap();
    assert_eq!(exporter.kinds(), [Base, Delta, Delta]);
    assert_eq!(servers.kinds(), [Base, Delta, Delta]);
    assert!(!servers.with(|inner| inner.mixed));
    assert_eq!(third.snapshot.parent, Some(second.snapshot.id.clone()));
    assert_eq!(first.reason, "the deployment serves nothing");
    assert_eq!(second.reason, "the deployment confirmed the parent");
    assert_eq!(second.snapshot.codec.as_ref().unwrap().as_str(), "arc_v2");
    assert_eq!(syncer.check_deployment_state().await.unwrap().unwrap().as_str(), "step-2-00ab12cd");
    assert!(second.synced && second.reset_prompt_cache);
    assert_eq!((second.replicas, second.stored_bytes, second.full_bytes), (2, 10, 120));
    assert_eq!((second.ratio, second.changed_share), (1.0 / 12.0, Some(0.25)));
    assert_eq!((second.pause_s, second.verify_s, second.warm_up_error.as_deref()), (Some(0.003), 0.02, None));
    assert_eq!(servers.with(|inner| inner.warm_ups), 3);
    let ops: std::collections::HashSet<_> =
        servers.with(|inner| inner.orders.iter().map(|order| order.op.to_string()).collect());
    assert_eq!(ops.len(), 3);
}

/// The public client's first fault: it goes on with a delta, which is then loaded as if it were full.
#[tokio::test(start_paused = true)]
async fn after_a_failed_first_load_comes_a_base() {
    let (exporter, servers, syncer) = pair(1);
    servers.fault(Fault::Fail);
    let error = syncer.save_and_hotload(name("step-0"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("step-0-00ab12cd is saved, but not synced"), "{error}");
    assert!(error.message().contains("digest differs"), "{error}");
    let receipt = syncer.save_and_hotload(name("step-1"), None).await.unwrap();
    assert_eq!(exporter.kinds(), [Base, Base]);
    assert_eq!(receipt.reason, "the hot-load of step-0-00ab12cd failed");
    assert_eq!(syncer.save_and_hotload(name("step-2"), None).await.unwrap().kind, Delta);
    assert!(!servers.with(|inner| inner.mixed));
}

/// The public client's second fault: its next delta names the snapshot that was never loaded.
#[tokio::test(start_paused = true)]
async fn after_a_failed_later_load_comes_a_base() {
    for fault in [Fault::Fail, Fault::Refuse, Fault::Hang, Fault::Lag] {
        let (exporter, servers, syncer) = pair(2);
        syncer.save_and_hotload(name("step-0"), None).await.unwrap();
        servers.fault(fault);
        syncer.save_and_hotload(name("step-1"), None).await.unwrap_err();
        syncer.save_and_hotload(name("step-2"), None).await.unwrap();
        syncer.save_and_hotload(name("step-3"), None).await.unwrap();
        assert_eq!(exporter.kinds(), [Base, Delta, Base, Delta], "{fault:?}");
        assert!(!servers.with(|inner| inner.mixed), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_lagging_replica_is_a_timeout_and_not_a_success() {
    let (_, servers, syncer) = pair(3);
    let syncer = syncer.with_deployment_id("dep-1").with_hotload_timeout(Duration::from_secs(60));
    servers.fault(Fault::Lag);
    let start = Instant::now();
    let error = syncer.save_and_hotload(name("step-0"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.message().contains("deployment dep-1"), "{error}");
    assert!(error.message().contains("replica 2 serves nothing"), "{error}");
    assert_eq!(start.elapsed().as_secs(), 60);
    assert_eq!(syncer.check_deployment_state().await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(syncer.save_only(name("step-1"), None).await.unwrap().kind, Base);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_the_whole_600_seconds() {
    let (_, servers, syncer) = pair(1);
    servers.fault(Fault::Hang);
    let start = Instant::now();
    let error = syncer.save_and_hotload(name("step-0"), None).await.unwrap_err();
    assert_eq!((error.kind(), start.elapsed().as_secs()), (ErrorKind::TimedOut, 600));
}

#[tokio::test(start_paused = true)]
async fn lost_replies_are_settled_with_the_same_operation() {
    let (exporter, servers, syncer) = pair(2);
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    servers.fault(Fault::LoseReply);
    assert!(syncer.save_and_hotload(name("step-1"), None).await.unwrap().synced);
    servers.fault(Fault::LoseOrder);
    servers.fault(Fault::LoseOrder);
    assert!(syncer.save_and_hotload(name("step-2"), None).await.unwrap().synced);
    servers.fault(Fault::Busy);
    assert!(syncer.save_and_hotload(name("step-3"), None).await.unwrap().synced);
    assert_eq!(exporter.kinds(), [Base, Delta, Delta, Delta]);
    // Each was applied once.
    assert_eq!(servers.kinds().len(), 4);
    assert!(!servers.with(|inner| inner.mixed));
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_stays_lost_leaves_a_doubt() {
    let (exporter, servers, syncer) = pair(1);
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    for _ in 0..1000 {
        servers.fault(Fault::LoseOrder);
    }
    let error = syncer.save_and_hotload(name("step-1"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.report().contains("connection reset"), "{}", error.report());
    servers.with(|inner| inner.faults.clear());
    syncer.save_and_hotload(name("step-2"), None).await.unwrap();
    assert_eq!(exporter.kinds(), [Base, Delta, Base]);
}

#[tokio::test(start_paused = true)]
async fn an_error_about_another_snapshot_is_stale() {
    let (_, servers, syncer) = pair(1);
    servers.with(|inner| {
        inner.replicas[0].stage = Stage::Error;
        inner.replicas[0].target = Some(id("other-11111111", 9).identity);
        inner.replicas[0].error = Some("old".into());
    });
    servers.fault(Fault::Hang);
    let syncer = syncer.with_hotload_timeout(Duration::from_secs(20));
    let (result, ()) = tokio::join!(syncer.save_and_hotload(name("step-0"), None), async {
        tokio::time::sleep(Duration::from_secs(12)).await;
        servers.with(|inner| {
            let loaded = inner.orders[0].snapshot.id.clone();
            serve(&mut inner.replicas[0], &loaded);
        });
    });
    let receipt = result.unwrap();
    assert_eq!((receipt.load_s, receipt.time_to_fresh_s), (15.0, 15.0));
}

#[tokio::test(start_paused = true)]
async fn a_foreign_snapshot_gets_a_base_first() {
    let exporter = Arc::new(Exporter::new());
    let servers = Servers::serving(1, &id("other-11111111", 9));
    let receipt = syncer(&exporter, &servers).save_and_hotload(name("step-0"), None).await.unwrap();
    assert_eq!(receipt.kind, Base);
    assert!(receipt.reason.contains("serves other-11111111"), "{}", receipt.reason);
}

#[tokio::test(start_paused = true)]
async fn a_deployment_that_changed_behind_our_back_gets_a_base() {
    type Change = fn(&mut Vec<ReplicaStatus>);
    let changes: [Change; 3] = [
        |replicas| replicas.iter_mut().for_each(|replica| serve(replica, &id("other-11111111", 9))),
        // Restarted: it serves nothing.
        |replicas| replicas.iter_mut().for_each(|replica| (replica.identity, replica.digest) = (None, None)),
        // A new replica joined.
        |replicas| replicas.push(ReplicaStatus::new("new")),
    ];
    for change in changes {
        let (exporter, servers, syncer) = pair(2);
        let base = syncer.save_and_hotload(name("step-0"), None).await.unwrap().snapshot;
        let delta = syncer.save_only(name("step-1"), None).await.unwrap();
        assert_eq!((delta.kind, &delta.parent), (Delta, &Some(base.id)));
        servers.with(|inner| change(&mut inner.replicas));
        let error = syncer.hotload(&delta, CheckpointType::Delta).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ChainMismatch);
        servers.with(|inner| inner.replicas.iter_mut().for_each(|replica| replica.ready = true));
        syncer.save_and_hotload(name("step-2"), None).await.unwrap();
        assert_eq!(exporter.kinds(), [Base, Delta, Base]);
        assert!(!servers.with(|inner| inner.mixed));
    }
}

#[tokio::test(start_paused = true)]
async fn a_first_delta_needs_weights_that_can_be_restored() {
    let served = id("step-9-11111111", 9);
    for (first, held, restored, expected) in [
        (CheckpointType::Delta, true, false, Delta),
        (CheckpointType::Delta, false, false, Base),
        (CheckpointType::Base, true, false, Base),
        (CheckpointType::Base, true, true, Delta),
        (CheckpointType::Base, false, true, Base),
    ] {
        let mut exporter = Exporter::new();
        exporter.held = if held { vec![digest(9)] } else { Vec::new() };
        exporter.restored = restored.then_some(digest(9));
        let (exporter, servers) = (Arc::new(exporter), Servers::serving(1, &served));
        let syncer = syncer(&exporter, &servers).with_first_checkpoint_type(first);
        let receipt = syncer.save_and_hotload(name("step-10"), None).await.unwrap();
        assert_eq!(receipt.kind, expected, "{first} held {held} restored {restored}: {}", receipt.reason);
        assert!(!servers.with(|inner| inner.mixed));
    }
}

#[tokio::test(start_paused = true)]
async fn a_trainer_that_diffs_against_its_last_save_gets_no_other_parent() {
    let mut exporter = Exporter::new();
    exporter.parents = DeltaParents::LastExported;
    let (exporter, servers) = (Arc::new(exporter), Servers::new(1));
    let syncer = syncer(&exporter, &servers);
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    syncer.save_only(name("step-1"), None).await.unwrap();
    // The last save is step-1, which is not served.
    syncer.save_and_hotload(name("step-2"), None).await.unwrap();
    // A save that failed may have moved the trainer on.
    exporter.faults.lock().unwrap().push_back(Error::unavailable("store"));
    syncer.save_only(name("step-3"), None).await.unwrap_err();
    syncer.save_and_hotload(name("step-4"), None).await.unwrap();
    assert_eq!(exporter.kinds(), [Base, Delta, Base, Base]);
}

#[tokio::test(start_paused = true)]
async fn a_failed_warm_up_is_tried_ten_times_more_and_recorded() {
    let (_, servers, syncer) = pair(1);
    servers.with(|inner| inner.failing_warm_ups = u32::MAX);
    let receipt = syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    assert_eq!(servers.with(|inner| inner.warm_ups), 11);
    assert_eq!(receipt.warm_up_s, 100.0);
    assert_eq!(receipt.warm_up_error.as_deref(), Some("after 11 tries: unavailable: not warm"));
    assert!(receipt.synced && receipt.time_to_fresh_s < 1.0);
    // The sync holds: a delta follows.
    servers.with(|inner| inner.failing_warm_ups = 2);
    let receipt = syncer.save_and_hotload(name("step-1"), None).await.unwrap();
    assert_eq!((receipt.kind, receipt.warm_up_s, receipt.warm_up_error), (Delta, 20.0, None));
    let syncer = syncer.with_warmup_after_hotload(false);
    syncer.save_and_hotload(name("step-2"), None).await.unwrap();
    assert_eq!(servers.with(|inner| inner.warm_ups), 14);
}

#[tokio::test(start_paused = true)]
async fn saved_first_and_loaded_later() {
    let (exporter, servers, syncer) = pair(1);
    let base = syncer.save_only(name("resume-step-0"), Some(CheckpointType::Base)).await.unwrap();
    assert_eq!(base.id.identity.as_str(), "resume-step-0-00ab12cd");
    assert!(servers.kinds().is_empty());
    // A save alone confirms nothing.
    assert_eq!(syncer.save_only(name("early"), None).await.unwrap().kind, Base);
    let wrong = syncer.hotload(&base, CheckpointType::Delta).await.unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::Invalid);
    let receipt = syncer.hotload(&base, CheckpointType::Base).await.unwrap();
    assert!(receipt.synced && receipt.save_s == 0.0);
    let delta = syncer.save_and_hotload(name("step-1"), None).await.unwrap().snapshot;
    assert_eq!(delta.parent, Some(base.id));
    // Served already: nothing is ordered.
    assert!(syncer.hotload(&delta, CheckpointType::Delta).await.unwrap().synced);
    assert_eq!(servers.kinds(), [Base, Delta]);
    let state = SnapshotRef::new(id("state", 1), SnapshotKind::State, "job/state");
    for checkpoint_type in [CheckpointType::Base, CheckpointType::Delta, CheckpointType::MergedBase] {
        assert_eq!(syncer.hotload(&state, checkpoint_type).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert_eq!(exporter.kinds(), [Base, Base, Delta]);
}

#[tokio::test(start_paused = true)]
async fn a_reset_makes_the_next_save_a_base() {
    let (exporter, servers, syncer) = pair(1);
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    syncer.reset_delta_chain();
    let receipt = syncer.save_and_hotload(name("step-1"), None).await.unwrap();
    assert_eq!((receipt.kind, receipt.reason.as_str()), (Base, "the chain was reset"));
    // Also while a hot-load runs.
    servers.fault(Fault::Hang);
    let (result, ()) = tokio::join!(syncer.save_and_hotload(name("step-2"), None), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        syncer.reset_delta_chain();
        servers.with(|inner| {
            let loaded = inner.orders[2].snapshot.id.clone();
            serve(&mut inner.replicas[0], &loaded);
        });
    });
    assert!(result.unwrap().synced);
    syncer.save_and_hotload(name("step-3"), None).await.unwrap();
    assert_eq!(exporter.kinds(), [Base, Base, Delta, Base]);
}

#[tokio::test(start_paused = true)]
async fn a_lora_is_always_whole() {
    let (exporter, servers, syncer) = pair(1);
    let syncer = syncer.with_lora_rank(8).with_compression_format("arc_v3");
    for (step, asked) in
        [None, Some(CheckpointType::Delta), Some(CheckpointType::Base), Some(CheckpointType::MergedBase)]
            .into_iter()
            .enumerate()
    {
        syncer.save_and_hotload(name(&format!("step-{step}")), asked).await.unwrap();
    }
    assert_eq!(exporter.kinds(), [Adapter, Adapter, Adapter, MergedBase]);
    let adapter = servers.with(|inner| inner.orders[0].snapshot.clone());
    syncer.hotload(&adapter, CheckpointType::Base).await.unwrap();

    let mut plain = Servers::new(1);
    plain.capabilities = plain.capabilities.with_adapters(false);
    let exporter = Arc::new(Exporter::new());
    let syncer = crate::syncer(&exporter, &plain).with_lora_rank(8);
    let error = syncer.save_and_hotload(name("step-0"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(exporter.kinds().is_empty());
}

#[tokio::test(start_paused = true)]
async fn without_a_deployment_it_only_saves() {
    let exporter = Arc::new(Exporter::new());
    let syncer = WeightSyncer::new(Arc::clone(&exporter) as _);
    let receipt = syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    assert!(!receipt.synced);
    assert_eq!((receipt.replicas, receipt.load_s), (0, 0.0));
    let again: Receipt = serde_json::from_str(&serde_json::to_string(&receipt).unwrap()).unwrap();
    assert_eq!(again, receipt);
    assert_eq!(syncer.save_and_hotload(name("step-1"), None).await.unwrap().kind, Base);
    let kind = |error: Error| error.kind();
    assert_eq!(
        syncer.hotload(&receipt.snapshot, CheckpointType::Base).await.map_err(kind).unwrap_err(),
        ErrorKind::Invalid
    );
    assert_eq!(syncer.check_deployment_state().await.map_err(kind).unwrap_err(), ErrorKind::Invalid);
    assert_eq!(syncer.wait_for_hotload_ready().await.map_err(kind).unwrap_err(), ErrorKind::Invalid);
}

#[tokio::test(start_paused = true)]
async fn a_delta_that_is_not_allowed_is_refused_before_anything_is_saved() {
    let (exporter, servers, syncer) = pair(1);
    let delta = Some(CheckpointType::Delta);
    for asked in [delta, Some(CheckpointType::MergedBase)] {
        let error = syncer.save_and_hotload(name("step-0"), asked).await.unwrap_err();
        let expected = if asked == delta { ErrorKind::ChainMismatch } else { ErrorKind::Invalid };
        assert_eq!(error.kind(), expected);
    }
    assert_eq!(syncer.save_only(name("step-0"), delta).await.unwrap_err().kind(), ErrorKind::ChainMismatch);
    assert!(exporter.kinds().is_empty() && servers.kinds().is_empty());
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    assert_eq!(syncer.save_and_hotload(name("step-1"), delta).await.unwrap().reason, "requested");
}

#[tokio::test(start_paused = true)]
async fn codecs_that_the_deployment_does_not_apply() {
    let (exporter, _, syncer) = pair(1);
    let syncer = syncer.with_compression_format("arc_v3");
    let error = syncer.save_and_hotload(name("step-0"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().contains("it applies: arc_v2, zstd"), "{error}");
    assert!(exporter.kinds().is_empty());
    // Whoever asks for bases only needs no codec.
    syncer.save_and_hotload(name("step-0"), Some(CheckpointType::Base)).await.unwrap();
    let bad = syncer.with_compression_format("no codec");
    assert_eq!(bad.save_only(name("step-1"), None).await.unwrap_err().kind(), ErrorKind::Invalid);

    let (exporter, mut servers) = (Arc::new(Exporter::new()), Servers::new(1));
    servers.capabilities = Capabilities::new(vec![CodecId::of("zstd"), CodecId::of("arc_v2")]);
    let syncer = crate::syncer(&exporter, &servers).with_compression_format("auto");
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    let receipt = syncer.save_and_hotload(name("step-1"), None).await.unwrap();
    assert_eq!(receipt.snapshot.codec.unwrap().as_str(), "zstd");
    // It has no prompt cache, so nobody asks for a reset.
    assert!(!receipt.reset_prompt_cache && !servers.with(|inner| inner.orders[1].reset_prompt_cache));

    let (exporter, mut servers) = (Arc::new(Exporter::new()), Servers::new(1));
    servers.capabilities = Capabilities::new(Vec::new());
    let syncer = crate::syncer(&exporter, &servers);
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    let receipt = syncer.save_and_hotload(name("step-1"), None).await.unwrap();
    assert_eq!((receipt.kind, receipt.reason.as_str()), (Base, "the deployment applies no deltas"));
    let error = syncer.save_and_hotload(name("step-2"), Some(CheckpointType::Delta)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[tokio::test(start_paused = true)]
async fn the_prompt_cache_is_kept_if_asked() {
    let (_, servers, syncer) = pair(1);
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    let syncer = syncer.with_reset_prompt_cache(false);
    assert!(!syncer.save_and_hotload(name("step-1"), None).await.unwrap().reset_prompt_cache);
    let told: Vec<_> =
        servers.with(|inner| inner.orders.iter().map(|order| order.reset_prompt_cache).collect());
    assert_eq!(told, [true, false]);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_future_leaves_a_doubt_behind() {
    let (exporter, servers, syncer) = pair(1);
    syncer.save_and_hotload(name("step-0"), None).await.unwrap();
    servers.fault(Fault::Hang);
    let cut =
        tokio::time::timeout(Duration::from_secs(7), syncer.save_and_hotload(name("step-1"), None)).await;
    assert!(cut.is_err());
    // The order may still be carried out.
    servers.with(|inner| {
        let loaded = inner.orders[1].snapshot.id.clone();
        serve(&mut inner.replicas[0], &loaded);
    });
    let receipt = syncer.save_and_hotload(name("step-2"), None).await.unwrap();
    assert_eq!(
        (receipt.kind, receipt.reason.as_str()),
        (Base, "the hot-load of step-1-00ab12cd is not confirmed")
    );
    syncer.save_and_hotload(name("step-3"), None).await.unwrap();
    assert_eq!(exporter.kinds(), [Base, Delta, Base, Delta]);
}

#[tokio::test(start_paused = true)]
async fn another_model_is_refused() {
    let (exporter, servers, syncer) = pair(1);
    servers.with(|inner| inner.model = Some("tiny".into()));
    let syncer = syncer.with_base_model("large");
    let error = syncer.save_and_hotload(name("step-0"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(exporter.kinds().is_empty() && servers.kinds().is_empty());
    assert_eq!(syncer.check_deployment_state().await.unwrap_err().kind(), ErrorKind::Invalid);
    syncer.with_base_model("tiny").save_and_hotload(name("step-0"), None).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deployment_that_still_starts_is_waited_for() {
    let (exporter, servers, syncer) = pair(1);
    servers.with(|inner| {
        inner.deaf = 4;
        inner.replicas[0].ready = false;
    });
    // Saved at once, ordered once the deployment answers; ready a little later.
    let (result, ()) = tokio::join!(syncer.save_and_hotload(name("step-0"), None), async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        servers.with(|inner| inner.replicas[0].ready = true);
    });
    assert!(result.unwrap().synced);
    assert_eq!(exporter.kinds(), [Base]);
    // Asked: once before the save, three times deaf and once answering before the order.
    assert!(servers.with(|inner| inner.asked) >= 5);
}

#[tokio::test(start_paused = true)]
async fn ready_means_every_replica() {
    let (_, servers, syncer) = pair(2);
    servers.with(|inner| {
        inner.deaf = 2;
        inner.replicas[1].ready = false;
    });
    let start = Instant::now();
    let error = syncer.wait_for_hotload_ready().await.unwrap_err();
    assert_eq!((error.kind(), start.elapsed().as_secs()), (ErrorKind::TimedOut, 300));
    assert!(error.message().contains("replica 1 serves nothing, Idle, not ready"), "{error}");
    assert_eq!(servers.with(|inner| inner.asked), 60);
    servers.with(|inner| inner.replicas[1].ready = true);
    syncer.wait_for_hotload_ready_for(Duration::from_secs(1), Duration::from_secs(1)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn operations_take_turns() {
    let (exporter, servers, syncer) = pair(1);
    let (a, b, c) = tokio::join!(
        syncer.save_and_hotload(name("a"), None),
        syncer.save_and_hotload(name("b"), None),
        syncer.save_and_hotload(name("c"), None),
    );
    assert!(a.is_ok() && b.is_ok() && c.is_ok());
    assert_eq!(exporter.kinds(), [Base, Delta, Delta]);
    assert!(!servers.with(|inner| inner.mixed));
}
