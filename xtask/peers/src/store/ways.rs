//! The ways to save, load and stage a state that are measured in this process.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tokio::runtime::{Builder, Runtime};
use towline_core::pipeline::Limits;
use towline_core::{Error, JobId, Result, SessionId, SnapshotName, TensorSource};
use towline_storage::{
    BackgroundSaver, BoxRead, Local, Prune, Retention, SaveTrainState, SnapshotInfo, SnapshotRepo, Writer,
};

use super::failed;
use super::state::State;

/// What is written or read at once without a library.
const PIECE: usize = 8 << 20;

/// A state, memory to load it into, and what was saved.
pub(super) struct Ways {
    dir: PathBuf,
    state: Arc<State>,
    /// Touched before anything is measured; as long as the tensors.
    kept: Vec<BytesMut>,
    /// Memory for a whole file, where a library wants the file in memory.
    file: Vec<u8>,
    runtime: Runtime,
    /// Our stores by threads, with the state in them.
    saved: BTreeMap<usize, (SnapshotRepo, SnapshotInfo)>,
    saver: Option<(SnapshotRepo, BackgroundSaver)>,
    count: usize,
}

impl Ways {
    pub(super) fn new(dir: PathBuf, state: State) -> Result<Self> {
        let kept = state.data().iter().map(|data| BytesMut::from(&data[..])).collect();
        Ok(Self {
            dir,
            state: Arc::new(state),
            kept,
            file: Vec::new(),
            runtime: runtime()?,
            saved: BTreeMap::new(),
            saver: None,
            count: 0,
        })
    }

    /// Seconds of one run. Loads are checked, outside of the time.
    pub(super) fn run(&mut self, group: &str, way: &str) -> Result<f64> {
        match (group, way) {
            ("save", "raw") => self.save_file("raw", save_raw),
            ("save", "safetensors") => self.save_file("safetensors", save_safetensors),
            ("save", "ours-1") => self.save_ours(1),
            ("save", "ours-2") => self.save_ours(2),
            ("load", way) => self.load(way),
            ("stall", "memcpy") => timed(|| {
                self.copy();
                Ok(())
            }),
            ("stall", "ours") => self.stall(),
            _ => Err(unknown(group, way)),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name).join("model.safetensors")
    }

    fn save_file(&self, name: &str, save: impl Fn(&State, &Path) -> Result<()>) -> Result<f64> {
        let folder = self.dir.join(name);
        fresh(&folder)?;
        let path = self.path(name);
        timed(|| save(&self.state, &path))
    }

    fn save_ours(&mut self, threads: usize) -> Result<f64> {
        let folder = self.dir.join(format!("ours-{threads}"));
        fresh(&folder)?;
        let (repo, writer) = self.runtime.block_on(open(&folder, Limits::threads(threads)))?;
        let state = request("state", &self.state)?;
        let started = Instant::now();
        let info = self.runtime.block_on(writer.save_state(state))?;
        let seconds = started.elapsed().as_secs_f64();
        self.saved.insert(threads, (repo, info));
        Ok(seconds)
    }

    fn copy(&mut self) {
        for (kept, data) in self.kept.iter_mut().zip(self.state.data()) {
            kept.copy_from_slice(data);
        }
    }

    fn load(&mut self, way: &str) -> Result<f64> {
        for tensor in &mut self.kept {
            // So that nobody passes for having read what was there.
            for byte in tensor.iter_mut().step_by(4096) {
                *byte ^= 0x55;
            }
        }
        let seconds = match way {
            "memcpy" => timed(|| {
                self.copy();
                Ok(())
            }),
            "raw" => {
                let path = self.path("raw");
                timed(|| load_raw(&path, &mut self.kept))
            }
            "safetensors" => {
                let path = self.path("safetensors");
                // The memory for the file is touched before, as that of the tensors is.
                self.file = vec![1; file_length(&path)?];
                let seconds = timed(|| load_safetensors(&path, &mut self.file, &self.state, &mut self.kept));
                self.file = Vec::new();
                seconds
            }
            "ours" => {
                let found =
                    self.saved.get(&1).ok_or_else(|| Error::invalid("nothing was saved to be loaded"))?;
                let kept = std::mem::take(&mut self.kept);
                let started = Instant::now();
                self.kept = self.runtime.block_on(load_ours(&found.0, &found.1, &self.state, kept))?;
                Ok(started.elapsed().as_secs_f64())
            }
            way => Err(unknown("load", way)),
        }?;
        if self.kept.iter().zip(self.state.data()).all(|(kept, data)| kept[..] == data[..]) {
            return Ok(seconds);
        }
        Err(Error::corrupt(format!("what `{way}` loaded is not what was saved")))
    }

    /// How long training waits for a save in the background; the save itself is waited for afterwards.
    fn stall(&mut self) -> Result<f64> {
        let (repo, saver) = match &mut self.saver {
            Some(opened) => opened,
            empty => {
                let folder = self.dir.join("background");
                fresh(&folder)?;
                let (repo, writer) = self.runtime.block_on(open(&folder, Limits::threads(1)))?;
                empty.insert((repo, BackgroundSaver::new(Arc::new(writer))))
            }
        };
        self.count += 1;
        let state = request(&format!("state-{}", self.count), &self.state)?;
        let started = Instant::now();
        self.runtime.block_on(saver.save(state))?;
        let seconds = started.elapsed().as_secs_f64();
        let prune = Prune::new(Retention::new().with_last_states(1)?).with_grace(Duration::ZERO);
        self.runtime.block_on(async {
            saver.wait().await?;
            repo.prune(&prune).await
        })?;
        Ok(seconds)
    }
}

pub(super) fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread().enable_time().build().map_err(|error| failed("start threads", error))
}

/// The job's store in a folder, and the right to write there.
pub(super) async fn open(folder: &Path, limits: Limits) -> Result<(SnapshotRepo, Writer)> {
    let repo = repo(folder, limits)?;
    let writer = repo.writer(SessionId::new("00000001")?).await?;
    Ok((repo, writer))
}

pub(super) fn repo(folder: &Path, limits: Limits) -> Result<SnapshotRepo> {
    let store = Arc::new(Local::open(folder)?);
    Ok(SnapshotRepo::new(store, JobId::new("bench")?, Vec::new()).with_limits(limits))
}

fn request(name: &str, state: &Arc<State>) -> Result<SaveTrainState> {
    let tensors: Arc<dyn TensorSource> = Arc::<State>::clone(state);
    Ok(SaveTrainState::new(SnapshotName::new(name)?, tensors))
}

/// Verified, as all that our store reads is.
async fn load_ours(
    repo: &SnapshotRepo,
    info: &SnapshotInfo,
    state: &State,
    kept: Vec<BytesMut>,
) -> Result<Vec<BytesMut>> {
    let reader = repo.open_state(info).await?;
    let boxes = state.tensors().iter().zip(kept).map(|(meta, kept)| BoxRead::whole(meta, kept));
    reader.read_boxes(boxes.collect()).await
}

fn save_raw(state: &State, path: &Path) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        for data in state.data() {
            data.chunks(PIECE).try_for_each(|piece| file.write_all(piece))?;
        }
        file.sync_all()?;
        sync_folder(path)
    };
    write().map_err(|error| failed("write the raw file", error))
}

fn save_safetensors(state: &State, path: &Path) -> Result<()> {
    let wrong = |error| failed("save with safetensors", error);
    let views = state.tensors().iter().zip(state.data()).map(|(meta, data)| {
        let view = TensorView::new(Dtype::F32, meta.shape().to_vec(), data).map_err(wrong)?;
        Ok((meta.name(), view))
    });
    safetensors::serialize_to_file(views.collect::<Result<Vec<_>>>()?, None, path).map_err(wrong)?;
    let sync = || {
        File::open(path)?.sync_all()?;
        sync_folder(path)
    };
    sync().map_err(|error| failed("sync the safetensors file", error))
}

fn load_raw(path: &Path, kept: &mut [BytesMut]) -> Result<()> {
    let mut read = || {
        let file = File::open(path)?;
        let mut start = 0;
        for tensor in kept.iter_mut() {
            for piece in tensor.chunks_mut(PIECE) {
                file.read_exact_at(piece, start)?;
                start += piece.len() as u64;
            }
        }
        Ok(())
    };
    read().map_err(|error: io::Error| failed("read the raw file", error))
}

fn load_safetensors(path: &Path, file: &mut [u8], state: &State, kept: &mut [BytesMut]) -> Result<()> {
    File::open(path)
        .and_then(|mut opened| opened.read_exact(file))
        .map_err(|error| failed("read the safetensors file", error))?;
    let wrong = |error| failed("load with safetensors", error);
    let tensors = SafeTensors::deserialize(file).map_err(wrong)?;
    for (meta, kept) in state.tensors().iter().zip(kept) {
        kept.copy_from_slice(tensors.tensor(meta.name()).map_err(wrong)?.data());
    }
    Ok(())
}

fn file_length(path: &Path) -> Result<usize> {
    let length = fs::metadata(path).map_err(|error| failed("find the safetensors file", error))?.len();
    usize::try_from(length).map_err(|error| failed("hold the file in memory", error))
}

/// An empty folder, and nothing left to do for the disk.
fn fresh(folder: &Path) -> Result<()> {
    let make = || {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir_all(folder)?,
        }
        sync_folder(folder)
    };
    make().map_err(|error| failed("make a folder", error))
}

/// Makes what the folder of `path` holds durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

fn unknown(group: &str, way: &str) -> Error {
    Error::invalid(format!("`{way}` is no way of `{group}`"))
}
