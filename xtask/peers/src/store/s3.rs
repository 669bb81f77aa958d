//! `s3`: a model sent to an S3 server and brought back by our store and by others, one round of it. The settings of the
//! server and the keys are in the environment, where all clients look for them.

mod bare;
mod memory;
mod model;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::signer::{Method, Signer as _};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use towline_core::pipeline::Limits;
use towline_core::{
    Error, JobId, ObjectKey, Result, SessionId, SnapshotKind, SnapshotName, SnapshotStore, TensorSource,
    Weights,
};
use towline_storage::{Publish, SnapshotRepo, StoreOptions, Wanted};

use self::bare::Address;
pub(crate) use self::memory::serve as serve_memory;
use self::model::Model;
use super::failed;
use super::others::Others;
use crate::args::Args;
use crate::system::{Memory, processor_seconds};

/// What is compared, each with the names of the ways it is done here and in Python. What comes down is what `plain`
/// has sent, but for `snapshot`. `memory` is the same from a server that costs little.
const GROUPS: [(&str, &[&str], &[&str]); 3] = [
    ("up", &["bare", "plain", "snapshot"], &["boto3", "boto3-tuned", "s3torch"]),
    (
        "down",
        &["loopback", "bare", "bare-4", "plain", "snapshot"],
        &["boto3", "boto3-tuned", "boto3-file", "s3torch"],
    ),
    ("memory", &["bare", "plain", "snapshot"], &["boto3", "boto3-tuned", "s3torch"]),
];
/// What goes to a store's writer at once.
const PIECE: usize = 1 << 20;
/// How long a signed address is good for.
const SIGNED: Duration = Duration::from_secs(3600);
/// MiB that go up and down by every way before anything counts.
const WARM_UP: usize = 32;

pub(crate) fn command(mut args: Args) -> Result<Value> {
    let (mib, shard) = (args.number("--mib", 1024usize)?, args.number("--shard-mib", 256usize)?);
    let round = args.number("--round", 0usize)?;
    let url = args.wanted("--url")?;
    let scratch = args.path("--scratch")?.unwrap_or_else(std::env::temp_dir);
    let python = args.path("--python")?.zip(args.path("--script")?);
    args.finish()?;
    let shard = shard.max(1).saturating_mul(1 << 20);
    let scratch = super::Scratch::new(&scratch)?;
    let mut clients = Clients::new(&url, python.as_ref(), &scratch.0)?;
    clients.load(format!("warm-{round}"), Model::new(WARM_UP, shard)?)?;
    measure(&mut clients, round)?;
    clients.load(format!("model-{round}"), Model::new(mib, shard)?)?;
    let rows = measure(&mut clients, round)?;
    let versions = clients.others.as_ref().map_or(Value::Null, |others| others.versions().clone());
    let (bytes, files) = (clients.model.bytes(), clients.model.files.len());
    Ok(json!({"bytes": bytes, "files": files, "rows": rows, "versions": versions}))
}

/// Every way of every group once; who begins depends on `round`.
fn measure(clients: &mut Clients, round: usize) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for (group, here, python) in GROUPS {
        if group == "memory" {
            clients.copy_to_memory()?;
        }
        let python = python.iter().filter(|_| clients.others.is_some()).map(|way| ("python", *way));
        let mut all: Vec<_> = here.iter().map(|way| ("rust", *way)).chain(python).collect();
        let count = all.len();
        // Towards the front by two: neighbours in the list are alike.
        all.rotate_left(2 * round % count.max(1));
        for (by, way) in all {
            let mut row = if by == "rust" {
                clients.run(group, way)?
            } else {
                clients.ask(&json!({"group": group, "way": way}))?
            };
            (row["group"], row["by"], row["way"]) = (group.into(), by.into(), way.into());
            rows.push(row);
        }
    }
    Ok(rows)
}

/// What all ways need.
struct Clients {
    runtime: Runtime,
    bucket: String,
    store: Arc<dyn SnapshotStore>,
    /// The server that costs little, and the store there.
    memory: (memory::Server, Arc<dyn SnapshotStore>),
    signer: AmazonS3,
    others: Option<Others>,
    scratch: PathBuf,
    /// The folder of the bucket, and what goes there.
    folder: String,
    model: Arc<Model>,
}

impl Clients {
    fn new(url: &str, python: Option<&(PathBuf, PathBuf)>, scratch: &Path) -> Result<Self> {
        let bucket = url.strip_prefix("s3://").filter(|bucket| !bucket.contains('/'));
        let bucket = bucket
            .ok_or_else(|| Error::invalid(format!("`{url}`: wanted s3:// and the name of a bucket")))?;
        let signer = AmazonS3Builder::from_env().with_bucket_name(bucket).with_allow_http(true);
        let signer = signer.with_http_connector(bare::Unconnected).build();
        let server = memory::Server::start()?;
        let endpoint = format!("http://{}", server.address);
        let order = json!({"bucket": bucket, "memory": endpoint});
        let others = python.map(|(python, script)| Others::start(python, script, &order));
        let there = towline_storage::open(url, &StoreOptions::from_env()?.with("endpoint_url", endpoint))?;
        Ok(Self {
            runtime: Builder::new_multi_thread()
                .enable_all()
                .build()
                .map_err(|error| failed("start threads", error))?,
            bucket: bucket.to_owned(),
            store: towline_storage::open(url, &StoreOptions::from_env()?)?,
            memory: (server, there),
            signer: signer.map_err(|error| failed("set up the signer", error))?,
            others: others.transpose()?,
            scratch: scratch.to_owned(),
            folder: String::new(),
            model: Arc::new(Model::new(4, 1 << 20)?),
        })
    }

    /// What goes up from now on, in Python from files.
    fn load(&mut self, folder: String, model: Model) -> Result<()> {
        self.model = Arc::new(model);
        self.folder = folder;
        if self.others.is_none() {
            return Ok(());
        }
        let dir = self.scratch.join(&self.folder);
        std::fs::create_dir_all(&dir).map_err(|error| failed("make a folder", error))?;
        for (number, file) in self.model.files.iter().enumerate() {
            std::fs::write(dir.join(name(number)), file)
                .map_err(|error| failed("write the model's files", error))?;
        }
        let files: Vec<String> = (0..self.model.files.len()).map(name).collect();
        self.ask(&json!({"dir": dir, "folder": self.folder, "files": files, "down": "plain"})).map(|_| ())
    }

    fn ask(&mut self, order: &Value) -> Result<Value> {
        let others = self.others.as_mut().ok_or_else(|| Error::internal("Python was not started"))?;
        others.ask(order)
    }

    fn run(&self, group: &str, way: &str) -> Result<Value> {
        match (group, way) {
            ("up", "bare") => {
                let to = self.addresses(group, &Method::PUT, "bare")?;
                timed(|| to.iter().zip(&self.model.files).try_for_each(|(to, file)| bare::put(to, file)))
                    .map(|(row, ())| row)
            }
            ("up", "plain") => timed(|| self.runtime.block_on(self.upload("plain"))).map(|(row, ())| row),
            ("up", "snapshot") => {
                let publish = Publish::new(
                    SnapshotName::new("base")?,
                    SnapshotKind::Base,
                    Arc::<Model>::clone(&self.model) as Arc<dyn TensorSource>,
                );
                let repo = self.repo(group)?;
                let (row, _) = timed(|| {
                    self.runtime.block_on(async {
                        repo.writer(SessionId::new("00000001")?).await?.publish(publish).await
                    })
                })?;
                Ok(row)
            }
            ("down", "loopback") => timed(|| bare::loopback(&self.model.files)).map(|(row, ())| row),
            ("down" | "memory", "bare") => {
                let from = self.addresses(group, &Method::GET, "plain")?;
                timed(|| {
                    from.iter()
                        .zip(&self.model.files)
                        .try_for_each(|(from, file)| bare::get(from, file.len()))
                })
                .map(|(row, ())| row)
            }
            ("down", "bare-4") => self.bare_at_once(group),
            ("down" | "memory", "plain") => self.download(group),
            ("down" | "memory", "snapshot") => {
                let repo = self.repo(group)?;
                let (row, weights) = timed(|| {
                    self.runtime.block_on(async {
                        let info = repo.newest(Wanted::Any).await?;
                        repo.restore(&info.ok_or_else(|| Error::not_found("nothing was published"))?).await
                    })
                })?;
                same_weights(&weights, &self.model)?;
                Ok(row)
            }
            _ => Err(Error::invalid(format!("`{way}` is no way of `{group}`"))),
        }
    }

    fn at(&self, group: &str) -> &Arc<dyn SnapshotStore> {
        if group == "memory" { &self.memory.1 } else { &self.store }
    }

    /// What comes down from there: the files of `plain`, and the snapshot.
    fn copy_to_memory(&self) -> Result<()> {
        self.runtime.block_on(async {
            for folder in [format!("{}/plain", self.folder), format!("job-{}", self.folder)] {
                let mut objects = self.store.list(Some(&ObjectKey::new(folder)?));
                while let Some(object) = objects.next().await {
                    let key = object?.key;
                    let body = self.store.get(&key, None).await?;
                    memory::put(&self.memory.0.address, &format!("/{}/{key}", self.bucket), &body)?;
                }
            }
            Ok(())
        })
    }

    fn key(&self, way: &str, number: usize) -> Result<ObjectKey> {
        ObjectKey::new(format!("{}/{way}/{}", self.folder, name(number)))
    }

    fn repo(&self, group: &str) -> Result<SnapshotRepo> {
        let longest = self.model.files.iter().map(Bytes::len).max().unwrap_or(1);
        let repo = SnapshotRepo::new(
            Arc::clone(self.at(group)),
            JobId::new(format!("job-{}", self.folder))?,
            Vec::new(),
        );
        Ok(repo.with_limits(Limits::threads(2)).with_shard_bytes(longest as u64))
    }

    /// Each file as a stream of pieces, one file after the other.
    async fn upload(&self, way: &str) -> Result<()> {
        for (number, file) in self.model.files.iter().enumerate() {
            let mut writer = self.store.writer(&self.key(way, number)?).await?;
            let mut rest = file.clone();
            while !rest.is_empty() {
                writer.write(rest.split_to(PIECE.min(rest.len()))).await?;
            }
            writer.finish().await?;
        }
        Ok(())
    }

    /// Each file into memory that was touched before, one file after the other.
    fn download(&self, group: &str) -> Result<Value> {
        let kept = self.model.files.iter().map(|file| {
            let mut kept = BytesMut::zeroed(file.len());
            kept.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
            kept
        });
        let kept: Vec<BytesMut> = kept.collect();
        let read = async {
            let mut full = Vec::new();
            for (number, kept) in kept.into_iter().enumerate() {
                full.push(self.at(group).read_into(&self.key("plain", number)?, 0, kept).await?);
            }
            Ok(full)
        };
        let (row, full) = timed(|| self.runtime.block_on(read))?;
        if full.iter().zip(&self.model.files).all(|(found, file)| found == file) {
            return Ok(row);
        }
        Err(Error::corrupt("what came down is not what went up"))
    }

    /// All files at once by four threads at most.
    fn bare_at_once(&self, group: &str) -> Result<Value> {
        let from = self.addresses(group, &Method::GET, "plain")?;
        let pairs: Vec<_> = from.iter().zip(&self.model.files).collect();
        let (row, ()) = timed(|| {
            std::thread::scope(|scope| {
                let threads = (0..4).map(|first| {
                    let mine = pairs.iter().skip(first).step_by(4);
                    scope.spawn(move || {
                        mine.into_iter().try_for_each(|(from, file)| bare::get(from, file.len()))
                    })
                });
                let threads: Vec<_> = threads.collect();
                threads.into_iter().try_for_each(|thread| {
                    thread.join().map_err(|_| Error::internal("a thread ended early"))?
                })
            })
        })?;
        Ok(row)
    }

    fn addresses(&self, group: &str, method: &Method, way: &str) -> Result<Vec<Address>> {
        let sign = |number| {
            let path = object_store::path::Path::from(self.key(way, number)?.as_str());
            let url = self.runtime.block_on(self.signer.signed_url(method.clone(), &path, SIGNED));
            let url = url.map_err(|error| failed("sign a request", error))?;
            let (Some(host), Some(port)) = (url.host_str(), url.port()) else {
                return Err(Error::invalid(format!("{url}: wanted a server with a port")));
            };
            let target = format!("{}?{}", url.path(), url.query().unwrap_or_default());
            let server =
                if group == "memory" { self.memory.0.address.clone() } else { format!("{host}:{port}") };
            Ok(Address { server, target })
        };
        (0..self.model.files.len()).map(sign).collect()
    }
}

fn name(number: usize) -> String {
    format!("part-{number:05}.safetensors")
}

fn same_weights(found: &Weights, model: &Model) -> Result<()> {
    if found.tensors() != model.tensors() {
        return Err(Error::corrupt("other tensors came down than went up"));
    }
    for index in 0..model.tensors().len() {
        if found.read(index)? != model.read(index)? {
            return Err(Error::corrupt(format!("tensor {index} is not what went up")));
        }
    }
    Ok(())
}

/// What a way took of time, of the processor in this process, and of memory beyond what was there.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(Value, T)> {
    let memory = Memory::start();
    memory.reset();
    let (before, started) = (processor_seconds(), Instant::now());
    let done = work()?;
    let seconds = started.elapsed().as_secs_f64();
    let used = processor_seconds().zip(before).map(|(after, before)| after - before);
    Ok((json!({"seconds": seconds, "cpu": used, "peak_mib": memory.peak_mib()}), done))
}
