//! What a save and a load of ours take beyond the state, which is larger than memory: it is made while it is saved, and
//! read box by box into one buffer.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use serde_json::{Value, json};
use towline_core::pipeline::Limits;
use towline_core::{Error, Result, SnapshotName, TensorMeta};
use towline_storage::{SaveTrainState, StateReader, Wanted};

use super::state::{Made, fill, metas};
use super::ways::{open, repo, runtime};
use crate::args::Args;
use crate::system::{Memory, again};

/// Bytes in work of a save, and the buffer of a load.
const WINDOW: usize = 64 << 20;

/// Each in a process of its own, so that what one has freed does not hide what the next one takes.
pub(super) fn measure(scratch: &Path, gib: usize) -> Result<Vec<Value>> {
    let folder = scratch.join("peak");
    let run = |command: &str| {
        let words = [command.into(), "--gib".into(), gib.to_string().into(), "--folder".into()];
        let arguments: Vec<OsString> = words.into_iter().chain([folder.clone().into()]).collect();
        again(&arguments)
    };
    Ok(vec![run("store-peak-save")?, run("store-peak-load")?])
}

fn order(mut args: Args) -> Result<(Vec<TensorMeta>, std::path::PathBuf)> {
    let gib = args.number("--gib", 8usize)?;
    let folder = args.wanted("--folder")?.into();
    args.finish()?;
    Ok((metas(gib.saturating_mul(1024))?, folder))
}

fn row(direction: &str, metas: &[TensorMeta], taken: Duration, memory: &Memory) -> Value {
    let bytes: usize = metas.iter().map(TensorMeta::byte_len).sum();
    let largest = metas.iter().map(TensorMeta::byte_len).max();
    json!({
        "direction": direction,
        "bytes": bytes,
        "largest": largest,
        "window_mib": WINDOW >> 20,
        "gbps": bytes as f64 / 1e9 / taken.as_secs_f64(),
        "extra_mib": memory.peak_mib(),
    })
}

/// `store-peak-save`.
pub(crate) fn save(args: Args) -> Result<Value> {
    let (metas, folder) = order(args)?;
    let runtime = runtime()?;
    let (_, writer) = runtime.block_on(open(&folder, Limits::threads(2).with_window(WINDOW)))?;
    let state = SaveTrainState::new(SnapshotName::new("state")?, Arc::new(Made(metas.clone())));
    let memory = Memory::start();
    memory.reset();
    let started = Instant::now();
    runtime.block_on(writer.save_state(state))?;
    Ok(row("save", &metas, started.elapsed(), &memory))
}

/// `store-peak-load`. The buffer is part of what is counted.
pub(crate) fn load(args: Args) -> Result<Value> {
    let (metas, folder) = order(args)?;
    let runtime = runtime()?;
    let memory = Memory::start();
    memory.reset();
    let taken = runtime.block_on(async {
        let started = Instant::now();
        let repo = repo(&folder, Limits::threads(2))?;
        let info = repo
            .newest(Wanted::State)
            .await?
            .ok_or_else(|| Error::not_found("nothing was saved to be loaded"))?;
        let reader = repo.open_state(&info).await?;
        let mut taken = started.elapsed();
        let mut kept = BytesMut::zeroed(WINDOW);
        for (index, meta) in metas.iter().enumerate() {
            kept = boxes(&reader, index, meta, kept, &mut taken).await?;
        }
        Ok::<_, Error>(taken)
    })?;
    Ok(row("load", &metas, taken, &memory))
}

/// Reads one tensor, as many rows at a time as fit into `kept`, and compares them with what was saved.
async fn boxes(
    reader: &StateReader,
    index: usize,
    meta: &TensorMeta,
    mut kept: BytesMut,
    taken: &mut Duration,
) -> Result<BytesMut> {
    let rows = meta.shape().first().copied().unwrap_or(1).max(1);
    let row = meta.byte_len() / rows;
    let step = (WINDOW / row.max(1)).max(1);
    let mut expected = vec![0; 4096];
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let mut shape = meta.shape().to_vec();
        let mut offset = vec![0; shape.len()];
        if let (Some(shape), Some(offset)) = (shape.first_mut(), offset.first_mut()) {
            (*shape, *offset) = (count, first);
        }
        let rest = kept.split_off(count * row);
        let started = Instant::now();
        kept = reader.read_into(meta.name(), &offset, &shape, kept).await?;
        *taken += started.elapsed();
        for (number, piece) in kept.chunks(4096).enumerate() {
            let wanted = expected.get_mut(..piece.len()).unwrap_or_default();
            fill(index, first * row + number * 4096, wanted);
            if *wanted != *piece {
                return Err(Error::corrupt(format!("tensor `{}` is not what was saved", meta.name())));
            }
        }
        kept.unsplit(rest);
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;

    #[test]
    fn a_state_that_is_never_in_memory_goes_round() {
        let dir = std::env::temp_dir().join(format!("towline-peers-peak-{}", std::process::id()));
        let args = || Args::new(["--gib".into(), "0".into(), "--folder".into(), dir.display().to_string()]);
        assert!(save(args()).is_err(), "a state of 0 GiB");
        let metas = metas(200).unwrap();
        let runtime = runtime().unwrap();
        runtime.block_on(async {
            let (repo, writer) = open(&dir, Limits::threads(2).with_window(1 << 20)).await.unwrap();
            let state = SaveTrainState::new(SnapshotName::new("s").unwrap(), Arc::new(Made(metas.clone())));
            let info = writer.save_state(state).await.unwrap();
            let reader = repo.open_state(&info).await.unwrap();
            let mut taken = Duration::ZERO;
            let kept = BytesMut::zeroed(WINDOW);
            let kept = boxes(&reader, 0, &metas[0], kept, &mut taken).await.unwrap();
            assert_eq!(kept.len(), WINDOW);
            assert!(boxes(&reader, 1, &metas[0], kept, &mut taken).await.is_err(), "another tensor's bytes");
        });
        std::fs::remove_dir_all(dir).unwrap();
    }
}
