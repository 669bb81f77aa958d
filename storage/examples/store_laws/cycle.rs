//! A whole life of a job on the store: two writers, a base, a delta, a train state, and everything read again.

use std::sync::Arc;
use std::time::Duration;

use towline_core::testing::XorCodec;
use towline_core::{
    Codec, DType, ErrorKind, JobId, SessionId, SnapshotKind, SnapshotName, SnapshotStore, TensorMeta, Weights,
};
use towline_storage::{Publish, SaveTrainState, SnapshotInfo, SnapshotRepo, Wanted, Writer};

use crate::bigger::{Outcome, block, ensure, told};

/// Publishes, takes the job over, publishes again, lists, restores and verifies. The writer that lost is `Fenced`.
pub(crate) async fn repo_cycle(store: Arc<dyn SnapshotStore>) -> Outcome {
    let codecs: Vec<Arc<dyn Codec>> = vec![Arc::new(XorCodec)];
    let repo = SnapshotRepo::new(store, told("job", JobId::new("store-laws"))?, codecs)
        .with_shard_bytes(9 << 20)
        .with_deadline(Duration::from_secs(60));
    let first = told("open", repo.writer(SessionId::from_random([0, 0, 0, 1])).await)?;
    told("publish a base", base(&first, "base").await)?;
    let parent = told("find", repo.find("base", Wanted::Sampler).await)?;

    let second = told("open again", repo.writer(SessionId::from_random([0, 0, 0, 2])).await)?;
    match base(&first, "lost").await {
        Err(error) if error.kind() == ErrorKind::Fenced => {}
        other => return Err(format!("the writer that lost the job: wanted fenced, found {other:?}")),
    }
    let delta =
        Publish::new(told("name", SnapshotName::new("delta"))?, SnapshotKind::Delta, weights("delta"))
            .with_parent(parent, weights("base"))
            .with_codec(Arc::new(XorCodec));
    told("publish a delta", second.publish(delta).await)?;
    let mut sections = serde_json::Map::new();
    sections.insert("cursor".to_owned(), 7.into());
    let state = SaveTrainState::new(told("name", SnapshotName::new("state"))?, weights("state"))
        .with_sections(sections.clone());
    told("save a state", second.save_state(state).await)?;

    let listed = told("list", repo.list().await)?;
    let names: Vec<_> = listed.iter().map(|info| info.name.as_str()).collect();
    ensure(names == ["base", "delta", "state"], || {
        format!("base, delta and state were wanted, found {names:?}")
    })?;
    let mut bytes = 0;
    for info in &listed {
        bytes += read(&repo, info, &sections).await?;
    }
    Ok(format!("3 snapshots, {} MiB verified", bytes >> 20))
}

async fn base(writer: &Writer, name: &str) -> towline_core::Result<()> {
    let publish = Publish::new(SnapshotName::new(name)?, SnapshotKind::Base, weights(name));
    writer.publish(publish).await.map(drop)
}

/// Restores and verifies; returns the bytes that were read.
async fn read(
    repo: &SnapshotRepo,
    info: &SnapshotInfo,
    sections: &serde_json::Map<String, serde_json::Value>,
) -> Result<u64, String> {
    let name = info.name.as_str();
    let restored = if info.kind == SnapshotKind::State {
        let state = told("load the state", repo.load_state(info).await)?;
        ensure(state.manifest.sections == *sections, || {
            "the state came back with other sections".to_owned()
        })?;
        state.tensors
    } else {
        told("restore", repo.restore(info).await)?
    };
    ensure(restored == *weights(name), || format!("{name} came back with other weights"))?;
    let verified = told("verify", repo.verify(info).await)?;
    ensure(verified.tensors == restored.tensors().len() as u64, || format!("{name}: {verified:?}"))?;
    Ok(verified.bytes)
}

/// 16 MiB that depend on `name`, so that files go up in parts; one tensor is the same for every name.
fn weights(name: &str) -> Arc<Weights> {
    let seed = name.bytes().fold(1, |seed, byte| seed * 31 + u64::from(byte));
    let tensors = (0..5u64).map(|number| {
        let shape: &[usize] = if number == 4 { &[32] } else { &[1024, 1024] };
        let meta = TensorMeta::new(format!("layer.{number}"), DType::F32, shape).unwrap();
        let seed = if number == 0 { 0 } else { seed + number };
        let data = block(seed, meta.byte_len());
        (meta, data)
    });
    Arc::new(Weights::new(tensors).unwrap())
}
