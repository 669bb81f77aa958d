//! Train states saved in the background: training stops for a copy in memory alone.

use std::fmt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinHandle;
use towline_core::{Error, Result, SnapshotName, TensorMeta, TensorSource};

use super::info::SnapshotInfo;
use super::publish::SaveTrainState;
use super::writer::Writer;
use crate::io::blocking;

/// Saves train states in the background, one at a time.
///
/// [`BackgroundSaver::save`] copies the tensors into buffers that are kept from save to save, and returns. Training may
/// then change them. Memory: one copy of the state. A save that failed is heard of at the next call, and at
/// [`BackgroundSaver::close`], which must not be forgotten: dropping the saver lets the save go on, and nobody hears how
/// it ends.
#[must_use = "close it to hear whether the last save ended well"]
pub struct BackgroundSaver {
    writer: Arc<Writer>,
    when_busy: WhenBusy,
    running: Option<(SnapshotName, JoinHandle<Ended>)>,
    kept: Vec<BytesMut>,
}

/// What became of a save, and its buffers.
type Ended = (Result<SnapshotInfo>, Arc<Staged>);

/// What happens to a save while the one before is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WhenBusy {
    /// It waits. Training is then held up as long.
    #[default]
    Wait,
    /// It is refused with `Conflict`, and nothing of it is saved.
    Refuse,
}

impl BackgroundSaver {
    /// Saves with `writer`. A save that comes too early waits.
    pub fn new(writer: Arc<Writer>) -> Self {
        Self { writer, when_busy: WhenBusy::default(), running: None, kept: Vec::new() }
    }

    /// Sets what happens to a save while the one before is not done.
    pub fn with_when_busy(mut self, when_busy: WhenBusy) -> Self {
        self.when_busy = when_busy;
        self
    }

    /// Copies `state` and begins to save it. The copy is what it holds when this is called, and it is whole when this
    /// returns.
    ///
    /// # Errors
    /// That of the save before, if it failed: nothing of this one is saved then, and it may be tried again. `Conflict`
    /// if that one is not done and is not to be waited for. What the source of the tensors answers.
    pub async fn save(&mut self, state: SaveTrainState) -> Result<()> {
        if let Some((name, running)) = &self.running
            && self.when_busy == WhenBusy::Refuse
            && !running.is_finished()
        {
            return Err(Error::conflict(format!("`{}`: the save of `{name}` is not done", state.name))
                .with_help("save later, or let saves wait for each other"));
        }
        self.wait().await?;
        let (source, kept) = (Arc::clone(&state.tensors), std::mem::take(&mut self.kept));
        let staged = Arc::new(blocking(move || Staged::copy(&*source, kept)).await?);
        let name = state.name.clone();
        let copied = SaveTrainState { tensors: Arc::<Staged>::clone(&staged), ..state };
        let writer = Arc::clone(&self.writer);
        let running = tokio::spawn(async move { (writer.save_state(copied).await, staged) });
        self.running = Some((name, running));
        Ok(())
    }

    /// Waits until the save in work is done. `None` if there is none.
    ///
    /// # Errors
    /// That of the save.
    pub async fn wait(&mut self) -> Result<Option<SnapshotInfo>> {
        let Some((name, running)) = &mut self.running else { return Ok(None) };
        let ended = running.await;
        let name = name.clone();
        self.running = None;
        let (outcome, staged) = ended.map_err(|error| {
            Error::internal(format!("the background save of `{name}` ended early")).with_source(error)
        })?;
        if let Ok(staged) = Arc::try_unwrap(staged) {
            self.kept = staged.into_buffers();
        }
        outcome
            .map(Some)
            .map_err(|error| error.context(format_args!("the background save of `{name}` failed")))
    }

    /// Waits for the last save.
    ///
    /// # Errors
    /// That of the save.
    pub async fn close(mut self) -> Result<Option<SnapshotInfo>> {
        self.wait().await
    }
}

impl fmt::Debug for BackgroundSaver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackgroundSaver")
            .field("writer", &self.writer)
            .field("when_busy", &self.when_busy)
            .field("running", &self.running.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

/// A copy of tensors.
#[derive(Debug)]
struct Staged {
    tensors: Vec<TensorMeta>,
    data: Vec<Bytes>,
}

impl Staged {
    /// Copies into `kept` where that is long enough: memory that was used before is written much faster.
    fn copy(source: &dyn TensorSource, kept: Vec<BytesMut>) -> Result<Self> {
        let mut kept = kept.into_iter();
        let mut data = Vec::with_capacity(source.tensors().len());
        for (index, meta) in source.tensors().iter().enumerate() {
            let bytes = source.read(index)?;
            let mut buffer = kept.next().unwrap_or_default();
            buffer.clear();
            if buffer.capacity() < bytes.len() {
                buffer = BytesMut::with_capacity(bytes.len());
            }
            buffer.extend_from_slice(&bytes);
            if buffer.len() != meta.byte_len() {
                return Err(Error::invalid(format!(
                    "tensor `{}`: wanted {} bytes, its source gave {}",
                    meta.name(),
                    meta.byte_len(),
                    buffer.len()
                )));
            }
            data.push(buffer.freeze());
        }
        Ok(Self { tensors: source.tensors().to_vec(), data })
    }

    fn into_buffers(self) -> Vec<BytesMut> {
        // What somebody still holds is made anew.
        self.data.into_iter().map(|data| data.try_into_mut().unwrap_or_default()).collect()
    }
}

impl TensorSource for Staged {
    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        let count = self.data.len();
        self.data
            .get(index)
            .cloned()
            .ok_or_else(|| Error::invalid(format!("tensor {index} of {count} was asked for")))
    }
}
