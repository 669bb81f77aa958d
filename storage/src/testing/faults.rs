//! A store that fails by plan, and dies where it is told to.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::watch;
use towline_core::{
    BoxStream, Digested, Error, ErrorKind, ObjectInfo, ObjectKey, ObjectWriter, PutMode, Result,
    SnapshotStore, Version, async_trait,
};

use super::plan::{Fault, Mix, Operation, Plan};

/// Any store, with faults by a [`Plan`] and a death at a chosen operation. Clones share everything: together they
/// are one process. Another process, or the same one started again, is another `FaultStore` on the same inner store.
///
/// Operations are numbered from 1 in the order in which they begin; each write, finish and abort of a writer is one.
/// A dead process gets `Unavailable` for whatever it asks, also for what it waits for, and has no effect any more,
/// except for what was [late](Fault::Late). It counts no operations.
#[derive(Debug, Clone)]
pub struct FaultStore {
    inner: Arc<dyn SnapshotStore>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    plan: Plan,
    dead: watch::Sender<bool>,
    live: Mutex<Live>,
}

#[derive(Debug, Default)]
struct Live {
    operations: u64,
    crash: Option<(u64, Side)>,
    /// How many more operations the burst refuses.
    burst: u32,
    script: Option<Script>,
    listings: BTreeMap<Option<ObjectKey>, Vec<ObjectInfo>>,
    log: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Before,
    After,
}

#[derive(Debug)]
struct Script {
    operation: Operation,
    ending: String,
    faults: VecDeque<Fault>,
}

impl FaultStore {
    /// `inner` with the faults of `plan`.
    #[must_use]
    pub fn new(inner: Arc<dyn SnapshotStore>, plan: Plan) -> Self {
        let state = State { plan, dead: watch::Sender::new(false), live: Mutex::default() };
        Self { inner, state: Arc::new(state) }
    }

    /// The store without faults.
    #[must_use]
    pub fn inner(&self) -> Arc<dyn SnapshotStore> {
        Arc::clone(&self.inner)
    }

    /// The process dies before operation `number` has any effect; at once, at its next operation, if that number is
    /// gone by.
    pub fn crash_before(&self, number: u64) {
        self.state.live().crash = Some((number, Side::Before));
    }

    /// The process dies when operation `number` is done, and never sees its answer.
    pub fn crash_after(&self, number: u64) {
        self.state.live().crash = Some((number, Side::After));
    }

    /// The process dies now.
    pub fn kill(&self) {
        self.state.dead.send_replace(true);
    }

    /// The process was only thought dead: it goes on, with no other death in sight.
    pub fn revive(&self) {
        self.state.live().crash = None;
        self.state.dead.send_replace(false);
    }

    /// Whether the process is dead.
    #[must_use]
    pub fn dead(&self) -> bool {
        self.state.dead()
    }

    /// How many operations have begun.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state.live().operations
    }

    /// The next operations of this kind on objects whose keys end with `ending` meet these faults, one each, before
    /// any that chance brings. What is left of an earlier script is forgotten.
    pub fn script(
        &self,
        operation: Operation,
        ending: impl Into<String>,
        faults: impl IntoIterator<Item = Fault>,
    ) {
        let script = Script { operation, ending: ending.into(), faults: faults.into_iter().collect() };
        self.state.live().script = Some(script);
    }

    /// How many faults of the script are left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.state.live().script.as_ref().map_or(0, |script| script.faults.len())
    }

    /// What went wrong so far: number, operation, key, fault.
    #[must_use]
    pub fn injected(&self) -> Vec<String> {
        self.state.live().log.clone()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SnapshotStore for FaultStore {
    async fn put(&self, key: &ObjectKey, body: Bytes, mode: PutMode) -> Result<Version> {
        let turn = self.state.begin(Operation::Put, Some(key))?;
        let (inner, key) = (Arc::clone(&self.inner), key.clone());
        self.state.act(&turn, async move { inner.put(&key, body, mode).await }).await
    }

    async fn writer(&self, key: &ObjectKey) -> Result<Box<dyn ObjectWriter>> {
        let turn = self.state.begin(Operation::Writer, Some(key))?;
        let (inner, key) = (Arc::clone(&self.inner), key.clone());
        let opened = key.clone();
        let inner = self.state.act(&turn, async move { inner.writer(&opened).await }).await?;
        Ok(Box::new(FaultWriter { inner: Some(inner), state: Arc::clone(&self.state), key }))
    }

    async fn get(&self, key: &ObjectKey, range: Option<Range<u64>>) -> Result<Bytes> {
        let mut turn = self.state.begin(Operation::Get, Some(key))?;
        let (inner, owned) = (Arc::clone(&self.inner), key.clone());
        let bytes = self.state.act(&turn, async move { inner.get(&owned, range).await }).await?;
        match turn.fault {
            Some(Fault::FlipBit) => {
                let mut bytes = BytesMut::from(bytes);
                turn.flip_bit(&mut bytes);
                Ok(bytes.freeze())
            }
            Some(Fault::Truncate) => Ok(bytes.slice(..turn.shorter(bytes.len()))),
            _ => Ok(bytes),
        }
    }

    async fn read_into(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<BytesMut> {
        let mut turn = self.state.begin(Operation::Get, Some(key))?;
        let (inner, owned) = (Arc::clone(&self.inner), key.clone());
        let read = async move { inner.read_into(&owned, start, buffer).await };
        let mut buffer = self.state.act(&turn, read).await?;
        match turn.fault {
            Some(Fault::FlipBit) => turn.flip_bit(&mut buffer),
            Some(Fault::Truncate) if !buffer.is_empty() => {
                return Err(Error::corrupt(format!(
                    "`{key}`: wanted {} bytes at {start}, found {}",
                    buffer.len(),
                    turn.shorter(buffer.len())
                )));
            }
            _ => {}
        }
        Ok(buffer)
    }

    async fn read_digested(&self, key: &ObjectKey, start: u64, buffer: BytesMut) -> Result<Digested> {
        Ok(Digested { buffer: self.read_into(key, start, buffer).await?, blocks: None })
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectInfo> {
        let turn = self.state.begin(Operation::Head, Some(key))?;
        let (inner, key) = (Arc::clone(&self.inner), key.clone());
        self.state.act(&turn, async move { inner.head(&key).await }).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        let turn = self.state.begin(Operation::Delete, Some(key))?;
        let (inner, key) = (Arc::clone(&self.inner), key.clone());
        self.state.act(&turn, async move { inner.delete(&key).await }).await
    }

    /// The answer comes as a whole, once all of it is known.
    fn list(&self, prefix: Option<&ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
        let turn = self.state.begin(Operation::List, prefix);
        let (this, prefix) = (self.clone(), prefix.cloned());
        let whole = async move {
            let turn = turn?;
            let objects = this.inner.list(prefix.as_ref());
            let fresh = this.state.act(&turn, objects.try_collect::<Vec<_>>()).await?;
            let mut live = this.state.live();
            let before = live.listings.insert(prefix, fresh.clone());
            let shown = if turn.fault == Some(Fault::StaleList) { before } else { None };
            Ok(stream::iter(shown.unwrap_or(fresh).into_iter().map(Ok)))
        };
        stream::once(whole).try_flatten().boxed()
    }
}

/// A writer that fails as its store does. Dead or dropped, it leaves nothing visible.
#[derive(Debug)]
struct FaultWriter {
    /// Gone once a write has failed: what would follow is no whole object.
    inner: Option<Box<dyn ObjectWriter>>,
    state: Arc<State>,
    key: ObjectKey,
}

impl FaultWriter {
    fn take(&mut self) -> Result<Box<dyn ObjectWriter>> {
        self.inner.take().ok_or_else(|| {
            Error::unavailable(format!("`{}`: an earlier write of this object has failed", self.key))
                .with_help("begin again with a new writer")
        })
    }
}

#[async_trait]
impl ObjectWriter for FaultWriter {
    async fn write(&mut self, part: Bytes) -> Result<()> {
        let turn = self.state.begin(Operation::Write, Some(&self.key))?;
        let mut inner = self.take()?;
        let write = async move { inner.write(part).await.map(|()| inner) };
        self.inner = Some(self.state.act(&turn, write).await?);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<Version> {
        let turn = self.state.begin(Operation::Finish, Some(&self.key))?;
        let inner = self.take()?;
        self.state.act(&turn, async move { inner.finish().await }).await
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        let turn = self.state.begin(Operation::Abort, Some(&self.key))?;
        let Some(inner) = self.inner.take() else { return Ok(()) };
        self.state.act(&turn, async move { inner.abort().await }).await
    }
}

/// What is in store for one operation.
#[derive(Debug)]
struct Turn {
    fault: Option<Fault>,
    /// The process dies when it is done.
    last: bool,
    mix: Mix,
    key: String,
}

impl Turn {
    fn flip_bit(&mut self, bytes: &mut [u8]) {
        let bit = self.mix.below(8 * bytes.len() as u64);
        if let Some(byte) = usize::try_from(bit / 8).ok().and_then(|at| bytes.get_mut(at)) {
            *byte ^= 1 << (bit % 8);
        }
    }

    /// A length below `length`, if there is one.
    fn shorter(&mut self, length: usize) -> usize {
        usize::try_from(self.mix.below(length as u64)).unwrap_or(0)
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(kind, format!("`{}`: an injected fault", self.key))
    }
}

impl State {
    fn live(&self) -> MutexGuard<'_, Live> {
        // No code that can panic runs under this lock.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dead(&self) -> bool {
        *self.dead.borrow()
    }

    /// Counts an operation and decides what happens to it.
    fn begin(&self, operation: Operation, key: Option<&ObjectKey>) -> Result<Turn> {
        let mut live = self.live();
        if self.dead() {
            return Err(dead());
        }
        live.operations += 1;
        let number = live.operations;
        let shown = key.map_or("*", ObjectKey::as_str);
        let last = live.crash == Some((number, Side::After));
        if live.crash.is_some_and(|(crash, _)| number >= crash) {
            let side = if last { "after" } else { "before" };
            live.log.push(format!("{number} {operation} {shown}: dead {side} it"));
            if !last {
                drop(live);
                self.dead.send_replace(true);
                return Err(dead());
            }
        }
        let (drawn, mix) = self.plan.draw(number, operation, shown);
        let fault = live.scripted(operation, shown).or_else(|| self.plan.exact(number));
        let fault = fault.or_else(|| live.in_burst()).or(drawn);
        let stale = |fault: &Fault| *fault == Fault::StaleList;
        let fault = fault
            .filter(|fault| !last && fault.fits(operation))
            .filter(|fault| !stale(fault) || live.listings.contains_key(&key.cloned()));
        if let Some(fault) = fault {
            if let Fault::Burst(length) = fault {
                live.burst = length.saturating_sub(1);
            }
            live.log.push(format!("{number} {operation} {shown}: {fault}"));
        }
        Ok(Turn { fault, last, mix, key: shown.to_owned() })
    }

    /// Has `effect`, or not, and answers.
    async fn act<T: Send + 'static>(
        &self,
        turn: &Turn,
        effect: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        if turn.last {
            let _nobody_sees_it = effect.await;
            self.dead.send_replace(true);
            return Err(dead());
        }
        let mut death = self.dead.subscribe();
        let death = pin!(death.wait_for(|dead| *dead));
        let outcome = match select(pin!(perform(turn, effect)), death).await {
            Either::Left((outcome, _)) => outcome,
            Either::Right(_) => Err(dead()),
        };
        if self.dead() { Err(dead()) } else { outcome }
    }
}

impl Live {
    fn scripted(&mut self, operation: Operation, key: &str) -> Option<Fault> {
        let script = self.script.as_mut()?;
        let meant = script.operation == operation && key.ends_with(&script.ending);
        if meant { script.faults.pop_front() } else { None }
    }

    fn in_burst(&mut self) -> Option<Fault> {
        self.burst = self.burst.checked_sub(1)?;
        Some(Fault::Refuse(ErrorKind::Unavailable))
    }
}

async fn perform<T: Send + 'static>(
    turn: &Turn,
    effect: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match turn.fault {
        Some(Fault::Refuse(kind)) => Err(turn.error(kind)),
        Some(Fault::Burst(_)) => Err(turn.error(ErrorKind::Unavailable)),
        Some(Fault::Lose(kind)) => {
            effect.await?;
            Err(turn.error(kind))
        }
        Some(Fault::Late(after)) => {
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                effect.await
            });
            Err(turn.error(ErrorKind::TimedOut))
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(time).await;
            effect.await
        }
        Some(Fault::FlipBit | Fault::Truncate | Fault::StaleList) | None => effect.await,
    }
}

fn dead() -> Error {
    Error::unavailable("the process is dead")
}
