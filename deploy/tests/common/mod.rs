//! An exporter and a deployment of small parts, with faults to order. The deployment is as trusting as a public
//! server: it applies whatever it is told, and remembers if that mixed weights.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use towline_core::{
    Capabilities, CodecId, ContentDigest, DeltaParents, Deployment, DeploymentStatus, Error, ExportRequest,
    HotLoad, ReplicaStatus, Result, SessionId, SnapshotExporter, SnapshotId, SnapshotIdentity, SnapshotKind,
    SnapshotName, SnapshotRef, Stage, async_trait,
};

pub(crate) fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

pub(crate) fn digest(seed: u8) -> ContentDigest {
    ContentDigest::from_bytes([seed; 32])
}

pub(crate) fn id(text: &str, seed: u8) -> SnapshotId {
    SnapshotId { identity: SnapshotIdentity::new(text).unwrap(), digest: digest(seed) }
}

#[derive(Debug)]
pub(crate) struct Exporter {
    pub(crate) parents: DeltaParents,
    pub(crate) restored: Option<ContentDigest>,
    pub(crate) held: Vec<ContentDigest>,
    pub(crate) requests: Mutex<Vec<ExportRequest>>,
    pub(crate) faults: Mutex<VecDeque<Error>>,
}

impl Exporter {
    pub(crate) fn new() -> Self {
        Self {
            parents: DeltaParents::Any,
            restored: None,
            held: Vec::new(),
            requests: Mutex::default(),
            faults: Mutex::default(),
        }
    }

    pub(crate) fn kinds(&self) -> Vec<SnapshotKind> {
        self.requests.lock().unwrap().iter().map(|request| request.kind).collect()
    }
}

#[async_trait]
impl SnapshotExporter for Exporter {
    fn delta_parents(&self) -> DeltaParents {
        self.parents
    }

    async fn export(&self, request: ExportRequest) -> Result<SnapshotRef> {
        if let Some(error) = self.faults.lock().unwrap().pop_front() {
            return Err(error);
        }
        let mut requests = self.requests.lock().unwrap();
        requests.push(request.clone());
        let identity = SnapshotIdentity::of(&request.name, &SessionId::new("00ab12cd").unwrap());
        let id = SnapshotId { identity, digest: digest(100 + requests.len() as u8) };
        let codec = (request.kind == SnapshotKind::Delta).then_some(request.codec);
        let stored = if request.kind == SnapshotKind::Delta { 10 } else { 120 };
        Ok(SnapshotRef::new(id, request.kind, format!("job/{}", request.name))
            .with_parent(request.parent)
            .with_codec(codec)
            .with_sizes(stored, 120, (request.kind == SnapshotKind::Delta).then_some(0.25)))
    }

    async fn holds(&self, digest: &ContentDigest) -> Result<bool> {
        Ok(self.held.contains(digest))
    }

    fn restored(&self) -> Option<ContentDigest> {
        self.restored
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Refused at once.
    Refuse,
    /// Accepted, then reported as failed.
    Fail,
    /// Nothing arrives, and the caller is told that nothing is known.
    LoseOrder,
    /// Applied, and the caller is told that nothing is known.
    LoseReply,
    /// Accepted, never done.
    Hang,
    /// Done on all replicas but the last.
    Lag,
    /// Another operation is running.
    Busy,
}

#[derive(Debug, Default)]
pub(crate) struct Inner {
    pub(crate) replicas: Vec<ReplicaStatus>,
    pub(crate) faults: VecDeque<Fault>,
    pub(crate) orders: Vec<HotLoad>,
    pub(crate) mixed: bool,
    pub(crate) warm_ups: u32,
    pub(crate) failing_warm_ups: u32,
    pub(crate) asked: u32,
    /// So many questions fail before one is answered.
    pub(crate) deaf: u32,
    pub(crate) model: Option<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct Servers {
    pub(crate) inner: Arc<Mutex<Inner>>,
    pub(crate) capabilities: Capabilities,
}

impl Servers {
    pub(crate) fn new(replicas: usize) -> Self {
        let mut inner = Inner::default();
        for index in 0..replicas {
            let mut replica = ReplicaStatus::new(index.to_string());
            replica.ready = true;
            inner.replicas.push(replica);
        }
        let codecs = ["arc_v2", "zstd"].map(CodecId::of).to_vec();
        Self {
            inner: Arc::new(Mutex::new(inner)),
            capabilities: Capabilities::new(codecs).with_prompt_cache(true).with_adapters(true),
        }
    }

    pub(crate) fn serving(replicas: usize, snapshot: &SnapshotId) -> Self {
        let servers = Self::new(replicas);
        for replica in &mut servers.inner.lock().unwrap().replicas {
            serve(replica, snapshot);
        }
        servers
    }

    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        change(&mut self.inner.lock().unwrap())
    }

    pub(crate) fn fault(&self, fault: Fault) {
        self.with(|inner| inner.faults.push_back(fault));
    }

    pub(crate) fn kinds(&self) -> Vec<SnapshotKind> {
        self.with(|inner| inner.orders.iter().map(|order| order.snapshot.kind).collect())
    }
}

pub(crate) fn serve(replica: &mut ReplicaStatus, snapshot: &SnapshotId) {
    replica.identity = Some(snapshot.identity.clone());
    replica.digest = Some(snapshot.digest);
    replica.stage = Stage::Idle;
    replica.error = None;
    replica.pause = Some(Duration::from_millis(3));
    replica.verify = Some(Duration::from_millis(20));
}

#[async_trait]
impl Deployment for Servers {
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    async fn status(&self) -> Result<DeploymentStatus> {
        self.with(|inner| {
            inner.asked += 1;
            if inner.deaf > 0 {
                inner.deaf -= 1;
                return Err(Error::unavailable("starting"));
            }
            Ok(DeploymentStatus::new(inner.replicas.clone()).with_model(inner.model.clone()))
        })
    }

    async fn hot_load(&self, order: &HotLoad) -> Result<()> {
        self.with(|inner| {
            let again = inner.orders.iter().any(|done| done.op == order.op);
            let fault = inner.faults.pop_front();
            match fault {
                Some(Fault::Refuse) => return Err(Error::chain_mismatch("refused")),
                Some(Fault::LoseOrder) => return Err(Error::unavailable("connection reset")),
                Some(Fault::Busy) => return Err(Error::conflict("another operation is running")),
                _ => {}
            }
            if again {
                return Ok(());
            }
            inner.orders.push(order.clone());
            let count = inner.replicas.len();
            for (index, replica) in inner.replicas.iter_mut().enumerate() {
                match fault {
                    Some(Fault::Hang) => continue,
                    Some(Fault::Lag) if index + 1 == count => continue,
                    Some(Fault::Fail) => {
                        replica.stage = Stage::Error;
                        replica.target = Some(order.snapshot.id.identity.clone());
                        replica.error = Some("digest differs".into());
                        continue;
                    }
                    _ => {}
                }
                if let Some(parent) = &order.snapshot.parent {
                    inner.mixed |= replica.digest != Some(parent.digest);
                    inner.mixed |= replica.identity != order.previous.as_ref().map(|it| it.identity.clone());
                }
                serve(replica, &order.snapshot.id);
            }
            match fault {
                Some(Fault::LoseReply) => Err(Error::timed_out("no reply")),
                _ => Ok(()),
            }
        })
    }

    async fn warm_up(&self) -> Result<()> {
        self.with(|inner| {
            inner.warm_ups += 1;
            if inner.failing_warm_ups > 0 {
                inner.failing_warm_ups -= 1;
                return Err(Error::unavailable("not warm"));
            }
            Ok(())
        })
    }
}
