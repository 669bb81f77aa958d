//! The two processes of one codec on one pair: one encodes, one decodes. Each run of a codec stands beside a run of what
//! the machine can do at best on the same buffers, so that both see the same noise.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use towline_core::{Codec, Error, Mode, Result};

use crate::args::Args;
use crate::files::Pair;
use crate::peers::{self, Encoded, Peer, Run};
use crate::system::{Memory, median_and_least};
use crate::{ours, physics};

/// After this long, two runs are enough.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is measured.
#[derive(Debug)]
pub(crate) enum Subject {
    Ours(Arc<dyn Codec>),
    Peer(&'static dyn Peer),
}

impl Subject {
    /// `ours:ID`, or the id of a peer.
    pub(crate) fn by_id(id: &str) -> Result<Self> {
        match (id.strip_prefix("ours:"), peers::by_id(id)) {
            (Some(ours), _) => towline_codec::by_id(ours).map(Self::Ours),
            (None, Some(peer)) => Ok(Self::Peer(peer)),
            (None, None) => Err(Error::invalid(format!("`{id}` is no codec"))
                .with_help("see `towline-peers list`; ours have `ours:` before their id")),
        }
    }
}

/// What both processes are told.
struct Order {
    pair: Pair,
    subject: Subject,
    threads: Vec<usize>,
    runs: usize,
    encoded: PathBuf,
}

impl Order {
    fn take(mut args: Args) -> Result<Self> {
        let (parent, base) = (args.path("--parent")?, args.path("--base")?);
        let current = args.path("--current")?.or(base);
        let current = current.ok_or_else(|| Error::invalid("`--current` or `--base` is missing"))?;
        let subject = Subject::by_id(&args.wanted("--codec")?)?;
        let (threads, runs) = (args.threads()?, args.number("--runs", 5usize)?.max(1));
        let encoded = PathBuf::from(args.wanted("--encoded")?);
        args.finish()?;
        Ok(Self { pair: Pair::load(parent.as_deref(), &current)?, subject, threads, runs, encoded })
    }
}

/// `encode-one`: measures encoding and leaves the encoded pair in a file.
pub(crate) fn encode(args: Args) -> Result<Value> {
    let Order { pair, subject, threads, runs, encoded } = Order::take(args)?;
    let data = pair.all()?;
    let most = threads.iter().copied().max().unwrap_or(1);
    let memory = Memory::start();
    let mut report = json!({"raw_bytes": pair.current.byte_len()});
    let rows: Vec<Value> = match &subject {
        Subject::Ours(codec) => {
            let once =
                |threads| ours::encode_pair(&mut std::io::sink(), codec.as_ref(), &pair, threads).map(|_| ());
            let rows = encode_rows(&pair, &data, &memory, &threads, runs, false, once)?;
            let mut out = BufWriter::new(create(&encoded)?);
            let summary = ours::encode_pair(&mut out, codec.as_ref(), &pair, most)?;
            out.flush().map_err(|error| unwritten(&encoded, error))?;
            report["encoded_bytes"] = json!(summary.bytes);
            report["manifest_bytes"] =
                json!(ours::manifest_bytes(codec.as_ref(), pair.metas(), &summary, pair.mode())?);
            rows
        }
        Subject::Peer(peer) => {
            let run = peers::run(*peer, &pair);
            let variant = run.best_variant(&data, most)?;
            let once = |threads| run.size(&data, variant, threads).map(|_| ());
            let rows = encode_rows(&pair, &data, &memory, &threads, runs, true, once)?;
            let frames = run.frames(&data, variant, most)?;
            report["encoded_bytes"] = json!(Run::bytes(&frames));
            report["variant"] = json!(variant);
            save(&encoded, &frames)?;
            rows
        }
    };
    report["rows"] = rows.into();
    Ok(report)
}

fn encode_rows(
    pair: &Pair,
    data: &[(Option<Bytes>, Bytes)],
    memory: &Memory,
    threads: &[usize],
    runs: usize,
    digest: bool,
    once: impl Fn(usize) -> Result<()>,
) -> Result<Vec<Value>> {
    let new: Vec<&[u8]> = data.iter().map(|(_, new)| new.as_ref()).collect();
    let row = |&threads: &usize| {
        memory.reset();
        once(threads)?;
        let extra_mib = memory.peak_mib();
        let mut times = Times::default();
        let mut patience = Patience::new(runs);
        while patience.again() {
            times.physics.push(seconds(|| physics::scan(pair.metas(), data, threads).map(|_| ()))?);
            times.clock.push(physics::clock_ghz());
            times.codec.push(seconds(|| once(threads))?);
            if digest {
                times.digest.push(seconds(|| physics::digest(pair.metas(), &new, threads))?);
            }
        }
        Ok(times.row(pair, threads, extra_mib))
    };
    threads.iter().map(row).collect()
}

/// `decode-one`: measures decoding in place over copies of the parent's tensors, and that the result is right.
pub(crate) fn decode(args: Args) -> Result<Value> {
    let Order { pair, subject, threads, runs, encoded } = Order::take(args)?;
    let data = pair.all()?;
    let mut targets: Vec<Vec<u8>> = data
        .iter()
        .map(|(old, new)| old.as_ref().map_or_else(|| vec![0; new.len()], |old| old.to_vec()))
        .collect();
    let read = || std::fs::read(&encoded).map_err(|error| unwritten(&encoded, error));
    let rows = match &subject {
        Subject::Ours(codec) => {
            let file = Bytes::from(read()?);
            decode_rows(&pair, &data, &mut targets, &threads, runs, false, |targets, threads| {
                ours::decode_all(&file, codec.as_ref(), pair.metas(), targets, threads)
            })?
        }
        Subject::Peer(peer) => {
            let frames = load(&read()?)?;
            let run = peers::run(*peer, &pair);
            decode_rows(&pair, &data, &mut targets, &threads, runs, true, |targets, threads| {
                run.decode(&frames, targets, threads)
            })?
        }
    };
    Ok(json!({"rows": rows}))
}

fn decode_rows(
    pair: &Pair,
    data: &[(Option<Bytes>, Bytes)],
    targets: &mut [Vec<u8>],
    threads: &[usize],
    runs: usize,
    digest: bool,
    once: impl Fn(&mut [Vec<u8>], usize) -> Result<()>,
) -> Result<Vec<Value>> {
    // Pages that nobody has written to are not resident: they would count as the codec's.
    reset(pair, data, targets, 1)?;
    let memory = Memory::start();
    let mut rows = Vec::new();
    for &threads in threads {
        reset(pair, data, targets, threads)?;
        memory.reset();
        once(targets, threads)?;
        let extra_mib = memory.peak_mib();
        check(data, targets)?;
        let mut times = Times::default();
        let mut patience = Patience::new(runs);
        while patience.again() {
            times.physics.push(reset(pair, data, targets, threads)?);
            times.clock.push(physics::clock_ghz());
            times.codec.push(seconds(|| once(targets, threads))?);
            if digest {
                let tensors: Vec<&[u8]> = targets.iter().map(Vec::as_slice).collect();
                times.digest.push(seconds(|| physics::digest(pair.metas(), &tensors, threads))?);
            }
            check(data, targets)?;
        }
        rows.push(times.row(pair, threads, extra_mib));
    }
    Ok(rows)
}

/// Puts the parent's bytes back, or nothing at all for a base, and returns how long a copy took.
fn reset(
    pair: &Pair,
    data: &[(Option<Bytes>, Bytes)],
    targets: &mut [Vec<u8>],
    threads: usize,
) -> Result<f64> {
    let copied = seconds(|| physics::copy(pair.metas(), data, targets, threads))?;
    if pair.mode() == Mode::Base {
        targets.iter_mut().for_each(|target| target.fill(0));
    }
    Ok(copied)
}

fn check(data: &[(Option<Bytes>, Bytes)], targets: &[Vec<u8>]) -> Result<()> {
    if data.len() == targets.len() && data.iter().zip(targets).all(|((_, new), target)| new == target) {
        return Ok(());
    }
    Err(Error::corrupt("the decoded tensors are not those that were encoded"))
}

/// Seconds of the runs of a codec, of what the machine does at best, and of the digests that a peer does not take.
#[derive(Default)]
struct Times {
    codec: Vec<f64>,
    physics: Vec<f64>,
    digest: Vec<f64>,
    clock: Vec<f64>,
}

impl Times {
    /// The speed in the middle and at best; with digests, which a codec of ours takes anyway; of the machine.
    fn row(self, pair: &Pair, threads: usize, extra_mib: Option<f64>) -> Value {
        let gigabytes = pair.current.byte_len() as f64 / 1e9;
        let runs = self.codec.len();
        // A parent's digests are known from the step before, to our codecs as well.
        let digest = if self.digest.is_empty() { 0.0 } else { median_and_least(self.digest).0 };
        let ((median, least), (physics, _)) = (median_and_least(self.codec), median_and_least(self.physics));
        json!({
            "threads": threads,
            "runs": runs,
            "gbps": gigabytes / median,
            "best_gbps": gigabytes / least,
            "checked_gbps": gigabytes / (median + digest),
            "physics_gbps": gigabytes / physics,
            "clock_ghz": median_and_least(self.clock).0,
            "extra_mib": extra_mib,
        })
    }
}

fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

/// How often something is run again.
struct Patience {
    left: usize,
    done: usize,
    started: Instant,
}

impl Patience {
    fn new(runs: usize) -> Self {
        Self { left: runs, done: 0, started: Instant::now() }
    }

    fn again(&mut self) -> bool {
        if self.left == 0 || (self.done >= 2 && self.started.elapsed() > PATIENCE) {
            return false;
        }
        self.left -= 1;
        self.done += 1;
        true
    }
}

fn create(path: &Path) -> Result<std::fs::File> {
    std::fs::File::create(path).map_err(|error| unwritten(path, error))
}

fn unwritten(path: &Path, error: std::io::Error) -> Error {
    Error::unavailable(format!("`{}` could not be written or read", path.display())).with_source(error)
}

/// The frames of a peer on their way to the other process: variant, count, lengths, bytes.
fn save(path: &Path, encoded: &Encoded) -> Result<()> {
    let mut out = BufWriter::new(create(path)?);
    let numbers = [encoded.variant, encoded.frames.len()];
    let numbers = numbers.into_iter().chain(encoded.frames.iter().map(Vec::len));
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(|error| unwritten(path, error));
    for number in numbers {
        write(&(number as u64).to_le_bytes())?;
    }
    encoded.frames.iter().try_for_each(|frame| write(frame))?;
    out.flush().map_err(|error| unwritten(path, error))
}

fn load(bytes: &[u8]) -> Result<Encoded> {
    let bad = || Error::corrupt("the frames of a peer were cut short");
    let mut rest = bytes;
    let mut number = || {
        let (number, behind) = rest.split_first_chunk().ok_or_else(bad)?;
        rest = behind;
        usize::try_from(u64::from_le_bytes(*number)).map_err(|_| bad())
    };
    let (variant, count) = (number()?, number()?);
    let lengths = (0..count).map(|_| number()).collect::<Result<Vec<_>>>()?;
    let mut frames = Vec::new();
    for length in lengths {
        let (frame, behind) = rest.split_at_checked(length).ok_or_else(bad)?;
        frames.push(frame.to_vec());
        rest = behind;
    }
    Ok(Encoded { variant, frames })
}

#[cfg(test)]
mod tests {
    use towline_core::DType;

    use super::*;
    use crate::testing::{base, pair};

    #[test]
    fn frames_travel() {
        let path = std::env::temp_dir().join(format!("towline-peers-frames-{}", std::process::id()));
        let encoded = Encoded { variant: 1, frames: vec![vec![1, 2, 3], vec![], vec![4]] };
        save(&path, &encoded).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let back = load(&bytes).unwrap();
        assert_eq!((back.variant, &back.frames), (1, &encoded.frames));
        assert!(load(&bytes[..bytes.len() - 1]).is_err());
        assert!(load(&bytes[..9]).is_err());
    }

    #[test]
    fn a_wrong_result_is_found_and_a_base_is_wiped_before_it_is_decoded() {
        for subject in [pair(DType::U8, 0.5), base(DType::U8)] {
            let data = subject.all().unwrap();
            let mut targets: Vec<Vec<u8>> = data.iter().map(|(_, new)| new.to_vec()).collect();
            check(&data, &targets).unwrap();
            reset(&subject, &data, &mut targets, 1).unwrap();
            assert!(check(&data, &targets).is_err());
            // A codec that does nothing does not pass.
            assert!(decode_rows(&subject, &data, &mut targets, &[1], 1, true, |_, _| Ok(())).is_err());
        }
    }

    #[test]
    fn there_is_an_end() {
        let mut patience = Patience::new(3);
        assert_eq!(std::iter::from_fn(|| patience.again().then_some(())).count(), 3);
    }
}
