//! Inputs to begin with: the golden vectors, what we encode of them, and texts of every form.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use towline_core::bytes::Bytes;
use towline_core::safetensors::{SafetensorsFiles, serialize};
use towline_core::shard::{ContainerWriter, MAGIC, ShardIndex, unit_checks};
use towline_core::{
    Codec, CodecId, ContentDigest, DType, FileEntry, JobId, Manifest, ManifestHead, Mode, SessionId,
    SnapshotKind, SnapshotName, TensorDigest, TensorEntry, TensorMeta, UnitMeta, Weights, WriteId,
};

/// A golden tensor in two versions.
#[derive(Debug)]
pub struct Pair {
    /// Name, element type and shape.
    pub meta: TensorMeta,
    /// The parent's bytes.
    pub old: Vec<u8>,
    /// The new bytes.
    pub new: Vec<u8>,
}

/// The golden tensors.
pub fn pairs() -> &'static [Pair] {
    static PAIRS: OnceLock<Vec<Pair>> = OnceLock::new();
    PAIRS.get_or_init(|| {
        let (base, next) = (weights("base.safetensors"), weights("next.safetensors"));
        let pair = |((meta, old), (_, new)): ((&TensorMeta, &Bytes), (&TensorMeta, &Bytes))| Pair {
            meta: meta.clone(),
            old: old.to_vec(),
            new: new.to_vec(),
        };
        base.iter().zip(next.iter()).map(pair).collect()
    })
}

/// For a codec: the frame of each golden tensor behind its number, in each mode; for an arc format also what the
/// public package wrote.
pub fn frames(id: &str) -> Vec<Vec<u8>> {
    let codec = towline_codec::by_id(id).expect("a codec");
    let mut seeds = Vec::new();
    for (number, pair) in (0u8..).zip(pairs()) {
        let unit = UnitMeta::new(&pair.meta, 0..pair.meta.byte_len());
        for (mode, choice, parent) in
            [(Mode::Delta, number, Some(&pair.old[..])), (Mode::Base, number + 128, None)]
        {
            if codec.modes().contains(mode) {
                let mut seed = vec![choice];
                codec.encode(&unit, parent, &pair.new, &mut seed).expect("a tensor is encoded");
                seeds.push(seed);
            }
        }
    }
    for (name, shard) in golden().filter(|(name, _)| {
        *name == format!("delta_{id}.safetensors") || id == "arc_v3" && name.starts_with("forced")
    }) {
        let index = ShardIndex::read(&shard).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (number, pair) in (0u8..).zip(pairs()) {
            let tensor = index.get(pair.meta.name()).expect("a tensor of the parent");
            seeds.push([&[number][..], slice(&shard, &tensor.frames[0])].concat());
        }
    }
    seeds
}

/// The pickles of arc_v3 payloads, behind the number of their tensor, and some by hand.
pub fn payloads() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = frames("arc_v3")
        .iter()
        .filter_map(|seed| {
            let start = seed.windows(4).position(|window| window == [0x28, 0xb5, 0x2f, 0xfd])?;
            let length = zstd::zstd_safe::find_frame_compressed_size(&seed[start..]).ok()?;
            let payload = zstd::decode_all(&seed[start..start + length]).ok()?;
            payload.starts_with(&[0x80]).then(|| [&seed[..1], &payload].concat())
        })
        .collect();
    assert!(seeds.len() > 100, "only {} payloads were found", seeds.len());
    seeds.push(b"\0\x80\x05}\x94(\x8c\x05codec\x94\x8c\x03bz2\x94\x8c\x04data\x94C\x03BZh\x94u.".to_vec());
    seeds.push(b"\0\x80\x05cos\nsystem\n(\x8c\x02lst R}2\x810\x93Nb.".to_vec());
    seeds
}

/// Two versions of a tensor, one behind the other.
pub fn round_trips() -> Vec<Vec<u8>> {
    let all = (0u8..).zip(pairs().iter().filter(|pair| pair.old.len() < 4096));
    all.map(|(number, pair)| {
        let length = pair.old.len() / 24 * 24;
        [&[number.wrapping_mul(37)], &pair.old[..length], &pair.new[..length]].concat()
    })
    .collect()
}

/// Small safetensors files.
pub fn safetensors() -> Vec<Vec<u8>> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut seeds: Vec<Vec<u8>> =
        [1, 2, 5].into_iter().map(|count| serialize(&some(count), &metadata).expect("a file")).collect();
    seeds.push(b"\x02\0\0\0\0\0\0\0{}".to_vec());
    seeds.extend(golden().filter(|(name, _)| name.starts_with("delta2")).map(|(_, file)| file.to_vec()));
    seeds
}

/// Containers, and deltas in the safetensors form.
pub fn shards() -> Vec<Vec<u8>> {
    let parent = ContentDigest::of_tensors([]);
    let mut seeds = Vec::new();
    for (id, parent) in [("octave", Some(&parent)), ("zstd", Some(&parent)), ("raw", None)] {
        let codec = towline_codec::by_id(id).expect("a codec");
        for count in [0, 1, 6] {
            let mut file = MAGIC.to_vec();
            let mut writer = ContainerWriter::new(&codec.id(), codec.unit(), parent);
            for (meta, bytes) in some(count).iter() {
                let frames: Vec<&[u8]> =
                    codec.unit().ranges(bytes.len()).map(|range| &bytes[range]).collect();
                let lengths: Vec<usize> = frames.iter().map(|frame| frame.len()).collect();
                let checks = unit_checks(codec.unit(), bytes);
                writer.tensor(meta, &TensorDigest::of(bytes), &lengths, &checks).expect("in order");
                file.extend(frames.concat());
            }
            file.extend(writer.finish());
            seeds.push(file);
        }
    }
    // Long names that differ in their end: little to store, much to hold.
    let mut writer = ContainerWriter::new(&CodecId::of("raw"), towline_core::Unit::Whole, None);
    for number in 0..400 {
        let name = format!("{}{number:04}", "n".repeat(4000));
        let meta = TensorMeta::new(name, DType::U8, [0]).expect("a tensor");
        writer.tensor(&meta, &TensorDigest::of(b""), &[0], &unit_checks(towline_core::Unit::Whole, b"")).expect("in order");
    }
    seeds.push([MAGIC.to_vec(), writer.finish()].concat());
    seeds.extend(golden().filter(|(name, _)| name.starts_with("delta2")).map(|(_, file)| file.to_vec()));
    seeds
}

/// Manifests of a base.
pub fn manifests() -> Vec<Vec<u8>> {
    [1, 4]
        .into_iter()
        .map(|count| {
            let head = ManifestHead {
                kind: SnapshotKind::Base,
                name: SnapshotName::new("step-1").expect("a name"),
                job: JobId::new("job").expect("a name"),
                session: SessionId::from_random([1; 4]),
                seq: 1,
                epoch: 1,
                write_id: WriteId::from_random([2; 8]),
                created_ms: 1,
            };
            let file = FileEntry::new("model.safetensors", 2, TensorDigest::of(b"12"), true);
            let entry =
                |(meta, bytes): (&TensorMeta, &Bytes)| TensorEntry::new(meta, TensorDigest::of(bytes), 0);
            let mut manifest = Manifest::new(head, vec![file], some(count).iter().map(entry).collect());
            manifest.codec = Some(CodecId::of("arc_v3"));
            manifest.metadata.insert("note".into(), "a \u{1f600} note".into());
            manifest.to_bytes().expect("a manifest").0
        })
        .collect()
}

/// References of every form.
pub fn references() -> Vec<Vec<u8>> {
    let texts = [
        "step-40",
        "step-40-00ab12cd",
        "cross_job://other/step-40",
        "account/run-0123456789abcdef0123456789abcdef/step-40",
        "tinker://run-1/weights/step-40",
        "tinker://run-1/sampler_weights/step-40",
        "tinker://a:b/external_weights/x",
        "gs://bucket/a/../b",
        "/absolute",
        "a\\b",
        "./x/..",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

/// Ids of every kind.
pub fn ids() -> Vec<Vec<u8>> {
    let texts = [
        "step-00040",
        "job",
        "00ab12cd",
        "0123456789abcdef",
        "arc_v2",
        "Op.1_x-y",
        "step-40-00ab12cd",
        "é\u{0}",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

/// Names of element types with shapes behind them.
pub fn dtypes() -> Vec<Vec<u8>> {
    let shape: Vec<u8> = [3u64, 8, 1 << 40].iter().flat_map(|number| number.to_le_bytes()).collect();
    DType::ALL.iter().map(|dtype| [dtype.as_str().as_bytes(), b"\0", &shape].concat()).collect()
}

/// An arc_v3 payload around zstd data.
pub fn envelope(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_le_bytes();
    [b"ARC3_ENVELOPE\0\x80\x05}(\x8c\x05codec\x8c\x04zstd\x8c\x04dataB", &length[..], data, b"u."].concat()
}

/// A zstd frame that holds `data` as it is, so that a fuzzer's bytes reach the parser behind it.
pub fn stored_zstd(data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0b1010_0000];
    frame.extend((data.len() as u32).to_le_bytes());
    let mut blocks = data.chunks(128 << 10).peekable();
    if data.is_empty() {
        frame.extend([1, 0, 0]);
    }
    while let Some(block) = blocks.next() {
        let header = (block.len() as u32) << 3 | u32::from(blocks.peek().is_none());
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame
}

fn some(count: usize) -> Weights {
    let small = pairs().iter().filter(|pair| pair.new.len() < 300).take(count);
    Weights::new(small.map(|pair| (pair.meta.clone(), Bytes::from(pair.new.clone()))))
        .expect("golden tensors")
}

fn slice<'a>(file: &'a Bytes, range: &std::ops::Range<u64>) -> &'a [u8] {
    &file[range.start as usize..range.end as usize]
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn golden() -> impl Iterator<Item = (String, Bytes)> {
    let mut names: Vec<String> = std::fs::read_dir(directory())
        .expect("the golden files")
        .map(|entry| entry.expect("a golden file").file_name().to_string_lossy().into_owned())
        .filter(|name| {
            name.starts_with("delta_") || name.starts_with("delta2_") || name.starts_with("forced_")
        })
        .collect();
    names.sort();
    names.into_iter().map(|name| {
        let bytes = std::fs::read(directory().join(&name)).expect("a golden file");
        (name, bytes.into())
    })
}

fn weights(name: &str) -> Weights {
    let file = Bytes::from(std::fs::read(directory().join(name)).expect("a golden file"));
    Weights::read_all(&SafetensorsFiles::open(vec![file]).expect("a golden file")).expect("a golden file")
}
