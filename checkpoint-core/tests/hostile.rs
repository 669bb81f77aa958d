//! Bytes of every kind against every parser of core: an error or a value, never a panic, never more memory than a
//! small multiple of what is there.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use towline_core::bytes::Bytes;
use towline_core::safetensors::{Header, SafetensorsFiles, serialize};
use towline_core::shard::{ContainerWriter, MAGIC, ShardIndex, index_range, unit_checks};
use towline_core::testing::{CountingAllocator, strategies, tiny_weights};
use towline_core::{
    CheckpointRef, CodecId, ContentDigest, DType, FileEntry, JobId, Manifest, ManifestDigest, ManifestHead,
    ModelId, ObjectKey, OpId, SessionId, SnapshotIdentity, SnapshotKind, SnapshotName, TensorDigest,
    TensorEntry, Unit, Weights, WriteId,
};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// What a parser may hold: this, and so much for each byte it is given. JSON of `[[[[` or `{"a":0,…}` becomes larger
/// in memory than it is as text.
const CONSTANT: usize = 64 << 10;
const FACTOR: usize = 200;

fn run<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = Config {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(0x0bad_5eed),
        ..Config::default()
    };
    TestRunner::new(config).run(&strategy, test).unwrap_or_else(|error| panic!("{error}"));
}

/// Whether `parse` took it; it must not panic or hold more than the bound.
fn survives<T, E>(
    what: &str,
    length: usize,
    parse: impl FnOnce() -> Result<T, E>,
) -> Result<bool, TestCaseError> {
    let (outcome, peak) = CountingAllocator::measure(|| catch_unwind(AssertUnwindSafe(|| parse().is_ok())));
    let peak = peak.expect("the allocator is installed");
    let allowed = CONSTANT + FACTOR * length;
    let taken = outcome.map_err(|_| TestCaseError::fail(format!("{what} panicked")))?;
    prop_assert!(peak <= allowed, "{what} held {peak} bytes for {length}, {allowed} are allowed");
    Ok(taken)
}

/// Every parser of bytes.
fn parse_bytes(bytes: &[u8]) -> Result<u32, TestCaseError> {
    let source = Bytes::copy_from_slice(bytes);
    let size = bytes.len();
    let taken = [
        survives("Header::read", size, || Header::read(&source))?,
        survives("Header::parse", size, || Header::parse(bytes, 8 + size as u64))?,
        survives("SafetensorsFiles::open", size, || {
            SafetensorsFiles::open(vec![source.clone()]).and_then(|files| Weights::read_all(&files))
        })?,
        survives("ShardIndex::read", size, || ShardIndex::read(&source))?,
        survives("index_range", size, || index_range(bytes, size as u64))?,
        survives("Manifest::parse", size, || {
            Manifest::parse(bytes, None).and_then(|manifest| manifest.tensor_metas().map(drop))
        })?,
    ];
    Ok(taken.into_iter().map(u32::from).sum())
}

fn parse_text(text: &str) -> Result<(), TestCaseError> {
    let size = text.len();
    survives("CheckpointRef", size, || text.parse::<CheckpointRef>())?;
    survives("SnapshotIdentity", size, || SnapshotIdentity::new(text).map(|identity| identity.parts()))?;
    survives("SnapshotName", size, || SnapshotName::new(text))?;
    survives("JobId", size, || JobId::new(text))?;
    survives("ModelId", size, || ModelId::new(text))?;
    survives("SessionId", size, || SessionId::new(text))?;
    survives("WriteId", size, || WriteId::new(text))?;
    survives("CodecId", size, || CodecId::new(text))?;
    survives("OpId", size, || OpId::new(text))?;
    survives("ObjectKey", size, || ObjectKey::new(text))?;
    survives("DType", size, || text.parse::<DType>())?;
    survives("TensorDigest", size, || text.parse::<TensorDigest>())?;
    survives("ContentDigest", size, || text.parse::<ContentDigest>())?;
    survives("ManifestDigest", size, || text.parse::<ManifestDigest>())?;
    Ok(())
}

fn safetensors_file() -> Vec<u8> {
    let metadata = BTreeMap::from([("embed.weight".to_owned(), "1".to_owned())]);
    serialize(&tiny_weights(1), &metadata).unwrap()
}

fn container_file() -> Vec<u8> {
    let unit = Unit::Block(24.try_into().unwrap());
    let mut writer = ContainerWriter::new(&CodecId::of("raw"), unit, Some(&tiny_weights(1).content_digest()));
    let mut file = MAGIC.to_vec();
    for (meta, data) in tiny_weights(2).iter() {
        let frames: Vec<usize> = unit.ranges(data.len()).map(|range| range.len()).collect();
        writer.tensor(meta, &TensorDigest::of(data), &frames, &unit_checks(unit, data)).unwrap();
        file.extend_from_slice(data);
    }
    file.extend(writer.finish());
    file
}

fn manifest_file() -> Vec<u8> {
    let head = ManifestHead {
        kind: SnapshotKind::Base,
        name: SnapshotName::new("step-1").unwrap(),
        job: JobId::new("job").unwrap(),
        session: SessionId::from_random([1; 4]),
        seq: 1,
        epoch: 1,
        write_id: WriteId::from_random([2; 8]),
        created_ms: 1,
    };
    let weights = tiny_weights(1);
    let tensors =
        weights.iter().map(|(meta, data)| TensorEntry::new(meta, TensorDigest::of(data), 0)).collect();
    let files = vec![FileEntry::new("model.safetensors", 92, TensorDigest::of(b"x"), true)];
    Manifest::new(head, files, tensors).to_bytes().unwrap().0
}

/// A good file, changed in a few places, cut, or lengthened.
fn damaged(file: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let length = file.len();
    let edits = prop::collection::vec((0..length, any::<u8>()), 0..4);
    let stretch = prop::option::of((
        0..length,
        prop::sample::select(&[0u8, 0x7f, 0x80, 0xff, b'9', b'['][..]),
        1..12usize,
    ));
    (edits, stretch, prop::option::of(0..=length), prop::collection::vec(any::<u8>(), 0..9)).prop_map(
        move |(edits, stretch, cut, more)| {
            let mut bytes = file.clone();
            for (at, byte) in edits {
                bytes[at] = byte;
            }
            if let Some((at, fill, width)) = stretch {
                bytes.iter_mut().skip(at).take(width).for_each(|byte| *byte = fill);
            }
            bytes.truncate(cut.unwrap_or(bytes.len()));
            bytes.extend(more);
            bytes
        },
    )
}

#[test]
fn noise() {
    run(4000, prop::collection::vec(any::<u8>(), 0..600), |bytes| parse_bytes(&bytes).map(drop));
}

#[test]
fn noise_behind_a_good_start() {
    let magic = prop::sample::select(vec![
        MAGIC.to_vec(),
        8u64.to_le_bytes().to_vec(),
        300u64.to_le_bytes().to_vec(),
        u64::MAX.to_le_bytes().to_vec(),
        b"{\"version\":1,".to_vec(),
        [&40u64.to_le_bytes()[..], b"{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999,"].concat(),
    ]);
    run(4000, (magic, prop::collection::vec(any::<u8>(), 0..400)), |(mut bytes, noise)| {
        bytes.extend(noise);
        parse_bytes(&bytes).map(drop)
    });
}

#[test]
fn damaged_files() {
    for file in [safetensors_file(), container_file(), manifest_file()] {
        assert!(parse_bytes(&file).unwrap() > 0, "the file itself is good");
        run(3000, damaged(file), |bytes| parse_bytes(&bytes).map(drop));
    }
}

/// An index whose checksum is right and whose numbers are not: what no accident but somebody makes.
#[test]
fn forged_container_indexes() {
    let tail =
        prop::collection::vec(prop_oneof![any::<u8>(), Just(0xff), Just(0), Just(1), Just(0x7f)], 0..200);
    run(6000, (tail, any::<bool>()), |(tail, good_start)| {
        let mut index = Vec::new();
        if good_start {
            index.extend(b"\x03raw\x00\x18");
        }
        index.extend(tail);
        let mut file = MAGIC.to_vec();
        let start = file.len() as u64;
        file.extend_from_slice(&index);
        for number in [start, index.len() as u64, twox_hash::XxHash3_64::oneshot(&index)] {
            file.extend_from_slice(&number.to_le_bytes());
        }
        file.extend_from_slice(b"TOWLIDX\x01");
        parse_bytes(&file).map(drop)
    });
}

#[test]
fn deep_and_wide_json() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("{\"__metadata__\":{\"a\":", "}}")] {
        for depth in [100, 10_000] {
            let text = format!("{}0{}", open.repeat(depth), close.repeat(depth));
            parse_bytes(text.as_bytes()).unwrap();
            parse_bytes(&[&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()).unwrap();
            let manifest = format!("{{\"version\":1,\"sections\":{text}}}");
            parse_bytes(manifest.as_bytes()).unwrap();
        }
    }
}

#[test]
fn text() {
    run(4000, ".{0,80}", |text: String| parse_text(&text));
    run(4000, "(cross_job://|tinker://|gs://|/)?[a-zA-Z0-9._/\\\\:-]{0,90}", |text: String| {
        parse_text(&text)
    });
    for text in ["é".repeat(600), "a".repeat(100_000), "a/".repeat(50_000), "\0".repeat(99), "🦀".repeat(20)]
    {
        parse_text(&text).unwrap();
    }
}

/// What is written is read back, whatever the weights.
#[test]
fn good_files_are_taken() {
    run(300, strategies::weights_pair(), |(weights, _)| {
        let bytes = Bytes::from(serialize(&weights, &BTreeMap::new()).unwrap());
        let read = SafetensorsFiles::open(vec![bytes]).and_then(|files| Weights::read_all(&files));
        prop_assert_eq!(read.unwrap(), weights);
        Ok(())
    });
}
