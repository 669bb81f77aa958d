//! A TCP proxy that fails on purpose.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{Either, select, try_join};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use towline_core::Result;

use crate::io::io_error;

/// The most bytes that pass at once.
const CHUNK: usize = 16 << 10;

/// Which way bytes pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a connection has two directions")]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// A proxy on a port of its own of `127.0.0.1`, in front of one server. Its knobs work on connections that are open
/// as well as on new ones. Clones are handles of the same proxy; with the last one it ends and cuts what is open.
#[derive(Debug, Clone)]
pub struct Proxy(Arc<Running>);

#[derive(Debug)]
struct Running {
    shared: Arc<Shared>,
    accepting: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    upstream: SocketAddr,
    knobs: Mutex<Knobs>,
    /// Grows whenever everything that is open is cut.
    cut_all: watch::Sender<u64>,
    connections: AtomicU64,
    cuts: AtomicU64,
    swallowed: AtomicU64,
}

#[derive(Debug, Default)]
struct Knobs {
    refusing: bool,
    delay: Duration,
    /// Bytes a second, each way of each connection.
    throttle: Option<u64>,
    cut: Option<Cut>,
    swallow: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Cut {
    direction: Direction,
    bytes: u64,
    times: u32,
}

impl Proxy {
    /// Starts it on the current runtime, which needs its I/O and its timer.
    ///
    /// # Errors
    /// What the operating system answers to the wish for a port.
    pub async fn start(upstream: SocketAddr) -> Result<Self> {
        let failed = |error| io_error(error, "the proxy could not listen on 127.0.0.1");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(failed)?;
        let shared = Arc::new(Shared {
            address: listener.local_addr().map_err(failed)?,
            upstream,
            knobs: Mutex::default(),
            cut_all: watch::Sender::default(),
            connections: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            swallowed: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared))).abort_handle();
        Ok(Self(Arc::new(Running { shared, accepting })))
    }

    /// Where clients find it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.shared.address
    }

    /// Resets every connection that is open.
    pub fn cut_all(&self) {
        self.0.shared.cut_all.send_modify(|times| *times += 1);
    }

    /// Whether new connections are reset at once. Off at the start.
    pub fn refuse(&self, refusing: bool) {
        self.0.shared.knobs().refusing = refusing;
    }

    /// Resets the next `times` connections that have passed `bytes` this way, right behind that byte. It replaces
    /// what was left of an earlier order; 0 times ends it.
    pub fn cut_after(&self, direction: Direction, bytes: u64, times: u32) {
        self.0.shared.knobs().cut = (times > 0).then_some(Cut { direction, bytes, times });
    }

    /// Lets at most so many bytes a second pass, each way of each connection; `None` for all that come.
    pub fn throttle(&self, bytes_per_second: Option<u64>) {
        self.0.shared.knobs().throttle = bytes_per_second;
    }

    /// Keeps everything back for this long, piece by piece.
    pub fn delay(&self, time: Duration) {
        self.0.shared.knobs().delay = time;
    }

    /// The next connection that brings a request with these bytes in it loses the answer: the request passes whole,
    /// and when the server begins to answer, the connection is closed. An interim `100 Continue` passes.
    pub fn swallow_reply(&self, request: impl Into<Vec<u8>>) {
        self.0.shared.knobs().swallow = Some(request.into()).filter(|pattern| !pattern.is_empty());
    }

    /// How many connections were accepted, also those that were reset at once.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.0.shared.connections.load(Ordering::Relaxed)
    }

    /// How many connections were reset.
    #[must_use]
    pub fn cuts(&self) -> u64 {
        self.0.shared.cuts.load(Ordering::Relaxed)
    }

    /// How many answers were swallowed.
    #[must_use]
    pub fn swallowed(&self) -> u64 {
        self.0.shared.swallowed.load(Ordering::Relaxed)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.accepting.abort();
        self.shared.cut_all.send_modify(|times| *times += 1);
    }
}

impl Shared {
    fn knobs(&self) -> MutexGuard<'_, Knobs> {
        // No code that can panic runs under this lock.
        self.knobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resets what it is given instead of closing it in order.
    fn reset(&self, streams: impl IntoIterator<Item = TcpStream>) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        for stream in streams {
            let _gone_already = stream.set_zero_linger();
        }
    }
}

impl Knobs {
    /// How long `bytes` are kept back.
    fn pause(&self, bytes: usize) -> Duration {
        let throttled = self.throttle.map_or(Duration::ZERO, |rate| {
            Duration::from_micros((bytes as u64).saturating_mul(1_000_000) / rate.max(1))
        });
        self.delay + throttled
    }

    /// The most bytes that pass at once, so that a slow connection is slow all the time.
    fn room(&self) -> usize {
        let share = self.throttle.map_or(u64::MAX, |rate| (rate / 20).max(1));
        usize::try_from(share).map_or(CHUNK, |share| share.min(CHUNK))
    }

    /// How many of `more` bytes still pass if the connection is cut among them.
    fn cut_within(&mut self, direction: Direction, passed: u64, more: usize) -> Option<usize> {
        let cut = self.cut.as_mut().filter(|cut| cut.direction == direction && cut.times > 0)?;
        let left = usize::try_from(cut.bytes.saturating_sub(passed)).unwrap_or(usize::MAX);
        if left > more {
            return None;
        }
        cut.times -= 1;
        Some(left)
    }

    /// Takes the order to swallow if `seen` has its bytes and ends `new` bytes or fewer behind them.
    fn take_swallow(&mut self, seen: &[u8], new: usize) -> bool {
        let found = self.swallow.as_ref().is_some_and(|pattern| {
            let old = seen.len().saturating_sub(new);
            // What was there before counts only as the beginning of what has come now.
            let from = (old + 1).saturating_sub(pattern.len());
            let window = seen.get(from..).unwrap_or_default();
            window.windows(pattern.len()).any(|part| part == pattern)
        });
        if found {
            self.swallow = None;
        }
        found
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: others may give theirs back.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        shared.connections.fetch_add(1, Ordering::Relaxed);
        if shared.knobs().refusing {
            shared.reset([client]);
            continue;
        }
        // From here on a cut concerns this connection.
        let cut_all = shared.cut_all.subscribe();
        tokio::spawn(carry(client, Arc::clone(&shared), cut_all));
    }
}

/// Why a connection ends before both sides are done.
enum End {
    Cut,
    Swallowed,
    /// One side has broken it.
    Broken,
}

async fn carry(mut client: TcpStream, shared: Arc<Shared>, mut cut_all: watch::Receiver<u64>) {
    let Ok(mut server) = TcpStream::connect(shared.upstream).await else {
        shared.reset([client]);
        return;
    };
    let _only_slower = (client.set_nodelay(true), server.set_nodelay(true));
    let end = {
        let swallowing = AtomicBool::new(false);
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let up = pass(&shared, Direction::Up, &swallowing, from_client, to_server);
        let down = pass(&shared, Direction::Down, &swallowing, from_server, to_client);
        match select(pin!(try_join(up, down)), pin!(cut_all.changed())).await {
            Either::Left((outcome, _)) => outcome.err(),
            Either::Right(_) => Some(End::Cut),
        }
    };
    match end {
        Some(End::Cut) => shared.reset([client, server]),
        Some(End::Swallowed) => {
            shared.swallowed.fetch_add(1, Ordering::Relaxed);
        }
        Some(End::Broken) | None => {}
    }
}

/// Passes bytes one way until their source ends.
async fn pass(
    shared: &Shared,
    direction: Direction,
    swallowing: &AtomicBool,
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
) -> Result<(), End> {
    let broken = |_: io::Error| End::Broken;
    let mut buffer = vec![0; CHUNK];
    // The last bytes of the request, in which the wanted ones may have begun.
    let mut seen = Vec::new();
    let mut passed = 0u64;
    loop {
        let room = shared.knobs().room();
        let Some(space) = buffer.get_mut(..room) else { return Err(End::Broken) };
        let read = from.read(space).await.map_err(broken)?;
        let part = space.get(..read).unwrap_or_default();
        if part.is_empty() {
            return to.shutdown().await.map_err(broken);
        }
        match direction {
            Direction::Up => {
                seen.extend_from_slice(part);
                if shared.knobs().take_swallow(&seen, read) {
                    swallowing.store(true, Ordering::Relaxed);
                }
                let old = seen.len().saturating_sub(CHUNK);
                seen.drain(..old);
            }
            Direction::Down => {
                if swallowing.load(Ordering::Relaxed) && !part.starts_with(b"HTTP/1.1 100") {
                    return Err(End::Swallowed);
                }
            }
        }
        let pause = shared.knobs().pause(read);
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let cut = shared.knobs().cut_within(direction, passed, read);
        let whole = part.get(..cut.unwrap_or(read)).unwrap_or_default();
        to.write_all(whole).await.map_err(broken)?;
        if cut.is_some() {
            return Err(End::Cut);
        }
        passed += whole.len() as u64;
    }
}
