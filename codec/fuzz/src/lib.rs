//! Fuzz targets: each takes any bytes, runs one decoder or parser of Towline on them, and panics if it panicked,
//! held more memory than is stated, or broke a promise about what it answered.
//!
//! `cargo run --release -- --target arc_v3 --seconds 60` runs one on stable Rust. With cargo-fuzz, call the function
//! of the same name from a `fuzz_target!`. Each returns whether the bytes were accepted.

pub mod mutate;
pub mod seeds;

use std::sync::atomic::{AtomicU64, Ordering};

use seeds::{Pair, pairs};
use towline_core::bytes::Bytes;
use towline_core::safetensors::{Header, SafetensorsFiles};
use towline_core::shard::ShardIndex;
use towline_core::testing::CountingAllocator;
use towline_core::{
    CheckpointRef, Codec, CodecId, DType, JobId, Manifest, Mode, ModelId, OpId, SessionId, SnapshotIdentity,
    SnapshotName, TensorSource, UnitMeta, WriteId,
};

const MIB: usize = 1 << 20;

/// A fuzz target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, also that of its function.
    pub name: &'static str,
    /// Runs it. Returns whether the bytes were accepted.
    pub run: fn(&[u8]) -> bool,
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident: $seeds:expr;)*) => {
        /// Every target.
        pub const TARGETS: &[Target] =
            &[$(Target { name: stringify!($name), run: $name, seeds: $seeds }),*];
    };
}

targets! {
    raw: || seeds::frames("raw");
    octave: || seeds::frames("octave");
    zstd: || seeds::frames("zstd");
    lz4: || seeds::frames("lz4");
    arc_v1: || seeds::frames("arc_v1");
    arc_v2: || seeds::frames("arc_v2");
    arc_v3: || seeds::frames("arc_v3");
    arc_pickle: seeds::payloads;
    round_trip: seeds::round_trips;
    recognise: || seeds::frames("arc_v3");
    safetensors_header: seeds::safetensors;
    shard_index: seeds::shards;
    manifest: seeds::manifests;
    checkpoint_ref: seeds::references;
    ids: seeds::ids;
    dtype_names: seeds::dtypes;
}

/// The `raw` codec. The first byte chooses tensor and mode, as for all codecs.
pub fn raw(data: &[u8]) -> bool {
    frame("raw", data)
}

/// The `octave` codec.
pub fn octave(data: &[u8]) -> bool {
    frame("octave", data)
}

/// The `zstd` codec.
pub fn zstd(data: &[u8]) -> bool {
    frame("zstd", data)
}

/// The `lz4` codec.
pub fn lz4(data: &[u8]) -> bool {
    frame("lz4", data)
}

/// The `arc_v1` codec.
pub fn arc_v1(data: &[u8]) -> bool {
    frame("arc_v1", data)
}

/// The `arc_v2` codec.
pub fn arc_v2(data: &[u8]) -> bool {
    frame("arc_v2", data)
}

/// The `arc_v3` codec.
pub fn arc_v3(data: &[u8]) -> bool {
    frame("arc_v3", data)
}

/// The pickles of `arc_v3`: the bytes behind the first are read as an envelope's pickle and as a payload's.
pub fn arc_pickle(data: &[u8]) -> bool {
    let Some((&choice, pickle)) = data.split_first() else { return false };
    let pair = choose(choice);
    let outer = [b"ARC3_ENVELOPE\0", pickle].concat();
    let outer = decode("arc_v3", pair, Mode::Delta, &outer);
    let inner = decode("arc_v3", pair, Mode::Delta, &seeds::envelope(&seeds::stored_zstd(pickle)));
    outer || inner
}

/// Every codec on a tensor made of the bytes: what is encoded comes back.
pub fn round_trip(data: &[u8]) -> bool {
    let Some((&choice, bytes)) = data.split_first() else { return false };
    let dtype = DType::ALL[usize::from(choice) % DType::ALL.len()];
    // A length that every element type divides, cut into parent and current.
    let half = bytes.len() / 2 / 24 * 24;
    let (old, new) = (&bytes[..half], &bytes[half..2 * half]);
    let elements = half * 8 / dtype.bits() as usize;
    let shape = if choice < 128 { vec![elements] } else { vec![half / 24, elements / (half / 24).max(1)] };
    let meta = towline_core::TensorMeta::new("t", dtype, shape).expect("a shape of whole bytes");
    for codec in towline_codec::all() {
        for mode in [Mode::Base, Mode::Delta] {
            if !codec.modes().contains(mode) {
                continue;
            }
            let mut target = old.to_vec();
            for range in codec.unit().ranges(half) {
                let unit = UnitMeta::new(&meta, range.clone());
                let parent = (mode == Mode::Delta).then(|| &old[range.clone()]);
                let mut frame = Vec::new();
                codec.encode(&unit, parent, &new[range.clone()], &mut frame).expect("a tensor is encoded");
                codec.decode(&unit, mode, &frame, &mut target[range]).expect("a frame is decoded");
            }
            assert_eq!(target, new, "{} {mode:?}", codec.id());
        }
    }
    half > 0
}

/// Which `arc` format a payload has. What decodes is recognised.
pub fn recognise(data: &[u8]) -> bool {
    let Some((_, payload)) = data.split_first() else { return false };
    let found = towline_codec::recognise(payload);
    if frame("arc_v3", data) {
        assert_eq!(found.as_ref().map(CodecId::as_str), Some("arc_v3"));
    }
    found.is_some()
}

/// The header of a safetensors file, and its tensors.
pub fn safetensors_header(data: &[u8]) -> bool {
    let file = Bytes::copy_from_slice(data);
    within("safetensors_header", MIB + 64 * data.len(), || {
        let Ok(header) = Header::read(&file) else { return false };
        let tensors: u64 = header.entries.iter().map(|entry| entry.range.end - entry.range.start).sum();
        assert!(tensors <= data.len() as u64, "the tensors are longer than the file");
        let files = SafetensorsFiles::open(vec![file.clone()]).expect("its header was read");
        for (index, meta) in files.tensors().iter().enumerate() {
            assert_eq!(files.read(index).expect("it lies in the file").len(), meta.byte_len());
        }
        true
    })
}

/// The index of a file of encoded tensors, as it is and with the checksum that it should have.
///
/// A name may share all but a byte with the one before, so an index grows in memory by up to the longest name,
/// twice, for every 24 bytes.
pub fn shard_index(data: &[u8]) -> bool {
    let plain = index(data);
    let repaired = with_checksum(data).is_some_and(|repaired| index(&repaired));
    plain || repaired
}

fn index(data: &[u8]) -> bool {
    let file = Bytes::copy_from_slice(data);
    within("shard_index", MIB + 512 * data.len(), || {
        let Ok(index) = ShardIndex::read(&file) else { return false };
        assert!(index.payload_len() <= data.len() as u64, "the frames are longer than the file");
        for tensor in &index.tensors {
            assert_eq!(index.get(&tensor.name).map(|found| &found.name), Some(&tensor.name));
        }
        true
    })
}

/// A container whose footer has the index's length and checksum.
fn with_checksum(data: &[u8]) -> Option<Vec<u8>> {
    let (body, footer) = data.split_at_checked(data.len().checked_sub(32)?)?;
    let start = u64::from_le_bytes(*footer.first_chunk()?).clamp(8, body.len().max(8) as u64);
    let index = body.get(start as usize..)?;
    let numbers = [start, index.len() as u64, twox_hash::XxHash3_64::oneshot(index)];
    let mut repaired = body.to_vec();
    repaired.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    repaired.extend(b"TOWLIDX\x01");
    Some(repaired)
}

/// A manifest. What is read is written to bytes that are read as the same.
pub fn manifest(data: &[u8]) -> bool {
    within("manifest", MIB + 64 * data.len(), || {
        let Ok(manifest) = Manifest::parse(data, None) else { return false };
        let _metas = manifest.tensor_metas();
        let (bytes, digest) = manifest.to_bytes().expect("a manifest is written");
        assert_eq!(Manifest::parse(&bytes, Some(&digest)).expect("what we wrote is read"), manifest);
        true
    })
}

/// A reference to a checkpoint. What is read is written as text that is read as the same.
pub fn checkpoint_ref(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    within("checkpoint_ref", (64 << 10) + 16 * data.len(), || {
        let Ok(reference) = text.parse::<CheckpointRef>() else { return false };
        assert_eq!(reference.to_string().parse::<CheckpointRef>().expect("what we wrote is read"), reference);
        assert!(!text.split('/').any(|segment| segment == ".."), "{text:?} was accepted");
        true
    })
}

/// Every kind of id. What is accepted is kept as it was.
pub fn ids(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    within("ids", (64 << 10) + 16 * data.len(), || {
        let found = [
            SnapshotName::new(text).map(String::from),
            JobId::new(text).map(String::from),
            ModelId::new(text).map(String::from),
            SessionId::new(text).map(String::from),
            WriteId::new(text).map(String::from),
            CodecId::new(text).map(String::from),
            OpId::new(text).map(String::from),
            SnapshotIdentity::new(text).map(String::from),
        ];
        if let Ok(identity) = SnapshotIdentity::new(text)
            && let Some((name, session)) = identity.parts()
        {
            assert_eq!(SnapshotIdentity::of(&name, &session), identity);
        }
        let _codec = towline_codec::by_id(text).is_ok();
        found.into_iter().filter_map(Result::ok).inspect(|kept| assert_eq!(kept, text)).count() > 0
    })
}

/// The names of element types, and the lengths of tensors of them.
pub fn dtype_names(data: &[u8]) -> bool {
    let (text, numbers) = data.split_at(data.iter().position(|&byte| byte == 0).unwrap_or(data.len()));
    let Ok(text) = std::str::from_utf8(text) else { return false };
    within("dtype_names", (64 << 10) + 64 * data.len(), || {
        let Ok(dtype) = text.parse::<DType>() else { return false };
        assert_eq!(dtype.as_str(), text);
        assert_eq!(serde_json::to_string(&dtype).expect("a name is written"), format!("{text:?}"));
        let shape: Vec<usize> =
            numbers.as_chunks::<8>().0.iter().map(|number| u64::from_le_bytes(*number) as usize).collect();
        if let Ok(bytes) = dtype.byte_len(&shape) {
            let wide =
                shape.iter().fold(u128::from(dtype.bits()), |product, &n| product.saturating_mul(n as u128));
            assert_eq!(bytes as u128 * 8, wide);
        }
        true
    })
}

fn frame(id: &str, data: &[u8]) -> bool {
    let Some((&choice, frame)) = data.split_first() else { return false };
    let mode = if choice >= 128 && !id.starts_with("arc") { Mode::Base } else { Mode::Delta };
    decode(id, choose(choice), mode, frame)
}

fn choose(choice: u8) -> &'static Pair {
    &pairs()[usize::from(choice % 128) % pairs().len()]
}

/// Decodes within the memory that the codec crate states. Decoding again gives the same.
fn decode(id: &str, pair: &Pair, mode: Mode, frame: &[u8]) -> bool {
    let codec = towline_codec::by_id(id).expect("a codec of this crate");
    let (length, elements) = (pair.meta.byte_len(), pair.meta.elements());
    let bound = match id {
        // The message of an error.
        "raw" => 4096,
        "zstd" | "lz4" => length + MIB,
        "arc_v1" => MIB,
        "arc_v2" => length.min(128 * MIB) + MIB,
        _ => {
            6 * MIB
                + 2 * elements
                    * match pair.meta.dtype().bits() {
                        8 => 20,
                        16 => 21,
                        _ => 23,
                    }
        }
    };
    let unit = UnitMeta::new(&pair.meta, 0..length);
    let run = || {
        let mut target = pair.old.clone();
        let outcome = within(id, bound, || codec.decode(&unit, mode, frame, &mut target));
        outcome.map(|()| target)
    };
    match (run(), run()) {
        (Ok(first), Ok(second)) => {
            assert_eq!(first, second, "the same frame gave other bytes");
            true
        }
        (Err(_), Err(_)) => false,
        _ => panic!("the same frame was refused and accepted"),
    }
}

static HIGHEST: AtomicU64 = AtomicU64::new(0);

/// The largest share of a bound that was held since the last call, in thousandths, with the bytes behind it first.
pub fn highest() -> (u64, u64) {
    let packed = HIGHEST.swap(0, Ordering::Relaxed);
    (packed & ((1 << 48) - 1), packed >> 48)
}

/// Runs `work` and panics if it held more than `bound` bytes. Counts only where the allocator is installed.
fn within<T>(what: &str, bound: usize, work: impl FnOnce() -> T) -> T {
    let (outcome, peak) = CountingAllocator::measure(work);
    if let Some(peak) = peak {
        let share = (peak * 1000 / bound.max(1)).min(0xffff) as u64;
        HIGHEST.fetch_max(share << 48 | peak as u64, Ordering::Relaxed);
        assert!(peak <= bound, "{what} held {peak} bytes, {bound} are stated");
    }
    outcome
}
