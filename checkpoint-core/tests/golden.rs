//! The frozen formats. `cargo xtask golden --bless` writes what is found; the diff is the review.

#![expect(clippy::disallowed_methods, reason = "golden files lie on the disk, and a variable blesses them")]

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use towline_core::bytes::Bytes;
use towline_core::shard::{ContainerWriter, MAGIC, ShardIndex, unit_checks};
use towline_core::{
    BaseRef, CodecId, DIGEST_BLOCK, DType, FileEntry, JobId, Manifest, ManifestDigest, ManifestHead,
    ParentRef, SessionId, SnapshotId, SnapshotIdentity, SnapshotKind, SnapshotName, TensorDigest,
    TensorEntry, TensorMeta, Unit, Weights, WriteId, safetensors,
};

/// Compares `found` with the golden file, or writes it when `TOWLINE_BLESS=1`.
fn check(name: &str, found: &str) {
    if std::env::var("TOWLINE_BLESS").is_ok_and(|value| value == "1") {
        std::fs::create_dir_all(folder()).unwrap();
        std::fs::write(folder().join(name), found).unwrap();
    }
    let wanted = frozen(name);
    assert!(
        wanted == found,
        "the format `{name}` changed\n--- frozen ---\n{wanted}\n--- found ---\n{found}\n\
         (help: readers in the field know the frozen form; if it must change, raise its version and bless)"
    );
}

fn frozen(name: &str) -> String {
    std::fs::read_to_string(folder().join(name))
        .unwrap_or_else(|error| panic!("{name}: {error} (help: run `cargo xtask golden --bless`)"))
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(32) {
        line.iter().for_each(|byte| write!(text, "{byte:02x}").unwrap());
        text.push('\n');
    }
    text
}

/// Bytes that any program can make again: `byte n = (n * n + n / 256) mod 251`.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| ((n.wrapping_mul(n) + n / 256) % 251) as u8).collect()
}

/// One tensor of every element type.
fn weights() -> Weights {
    let every = DType::ALL.iter().enumerate().map(|(index, &dtype)| {
        let name = format!("types.{}", dtype.as_str().to_lowercase());
        TensorMeta::new(name, dtype, [index + 1, 8]).unwrap()
    });
    let odd = [
        TensorMeta::new("odd.scalar", DType::F64, []).unwrap(),
        TensorMeta::new("odd.empty", DType::BF16, [0, 7]).unwrap(),
        TensorMeta::new("odd.ünïcode", DType::U8, [3]).unwrap(),
    ];
    Weights::new(every.chain(odd).map(|meta| {
        let data = pattern(meta.byte_len());
        (meta, Bytes::from(data))
    }))
    .unwrap()
}

#[test]
fn digests() {
    let mut text = String::new();
    for length in [0, 1, 16, 17, 240, 241, 1024, DIGEST_BLOCK, DIGEST_BLOCK + 1, 3 * DIGEST_BLOCK + 5] {
        writeln!(text, "tensor digest of {length} bytes: {}", TensorDigest::of(&pattern(length))).unwrap();
    }
    writeln!(text, "content digest of nothing: {}", Weights::default().content_digest()).unwrap();
    writeln!(text, "content digest of every type: {}", weights().content_digest()).unwrap();
    writeln!(text, "manifest digest of 5 bytes: {}", ManifestDigest::of(&pattern(5))).unwrap();
    check("digests.txt", &text);
}

#[test]
fn safetensors_file() {
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let file = safetensors::serialize(&weights(), &metadata).unwrap();
    check("every_type.safetensors.hex", &hex(&file));
}

#[test]
fn container() {
    let parent = Weights::default().content_digest();
    for (name, parent) in [("base.container.hex", None), ("delta.container.hex", Some(&parent))] {
        let unit = if parent.is_none() { Unit::Whole } else { Unit::Block(NonZeroUsize::new(24).unwrap()) };
        let mut writer = ContainerWriter::new(&CodecId::of("raw"), unit, parent);
        let mut file = MAGIC.to_vec();
        for (meta, data) in weights().iter() {
            let frames: Vec<usize> = unit.ranges(data.len()).map(|range| range.len()).collect();
            writer.tensor(meta, &TensorDigest::of(data), &frames, &unit_checks(unit, data)).unwrap();
            file.extend_from_slice(data);
        }
        file.extend(writer.finish());
        check(name, &hex(&file));
        let index = ShardIndex::read(&Bytes::from(file)).unwrap();
        assert_eq!(index.tensors.len(), weights().tensors().len());
    }
}

fn manifest() -> Manifest {
    let head = ManifestHead {
        kind: SnapshotKind::Delta,
        name: SnapshotName::new("step-00040").unwrap(),
        job: JobId::new("job-1").unwrap(),
        session: SessionId::from_random([0x00, 0xab, 0x12, 0xcd]),
        seq: 40,
        epoch: 3,
        write_id: WriteId::from_random([1, 2, 3, 4, 5, 6, 7, 8]),
        created_ms: 1_700_000_000_000,
    };
    let id = |name: &str| SnapshotId {
        identity: SnapshotIdentity::new(name).unwrap(),
        digest: Weights::default().content_digest(),
    };
    let files = vec![
        FileEntry::new("model-00001-of-00001.delta", 4096, TensorDigest::of(b"file"), true),
        FileEntry::new("config.json", 17, TensorDigest::of(b"config"), false),
    ];
    let tensors =
        weights().iter().map(|(meta, data)| TensorEntry::new(meta, TensorDigest::of(data), 0)).collect();
    let mut manifest = Manifest::new(head, files, tensors);
    manifest.step = Some(40);
    manifest.expires_ms = Some(1_700_003_600_000);
    manifest.parent = Some(ParentRef::new(39, id("step-00039-00ab12cd")));
    manifest.base = Some(BaseRef::new(20, id("step-00020-00ab12cd"), 20));
    manifest.codec = Some(CodecId::of("arc_v2"));
    manifest.sections.insert("cursor".into(), serde_json::json!({"epoch": 1, "row": 7}));
    manifest.metadata.insert("note".into(), "by hand".into());
    manifest.changed = Some((123, 4567));
    manifest
}

#[test]
fn manifest_json() {
    let (bytes, digest) = manifest().to_bytes().unwrap();
    let mut text = String::from_utf8(bytes).unwrap();
    text.push('\n');
    check("manifest.json", &text);
    check("manifest.digest.txt", &format!("{digest}\n"));
    // What an older version stored is still read.
    let stored = frozen("manifest.json");
    let digest = frozen("manifest.digest.txt").trim().parse().unwrap();
    let parsed = Manifest::parse(stored.trim_end().as_bytes(), Some(&digest)).unwrap();
    assert_eq!(parsed, manifest());
}

#[test]
fn snapshot_reference_json() {
    let id = manifest().id();
    let parent = manifest().parent.unwrap().id;
    let snapshot = towline_core::SnapshotRef::new(id, SnapshotKind::Delta, "job-1/snapshots/40")
        .with_parent(Some(parent))
        .with_codec(Some(CodecId::of("arc_v2")))
        .with_manifest(ManifestDigest::of(b"manifest"))
        .with_sizes(4096, 8192, Some(0.25));
    let text = serde_json::to_string_pretty(&snapshot).unwrap() + "\n";
    check("snapshot_ref.json", &text);
    assert_eq!(serde_json::from_str::<towline_core::SnapshotRef>(&text).unwrap(), snapshot);
}
