//! Directories of slime: what its own code wrote is read, what we write comes back, and damage is found.
#![cfg(feature = "slime")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use common::{MaskCodec, find, name, repo, session, weights};
use towline_core::safetensors::{Header, SafetensorsFiles, serialize};
use towline_core::testing::XorCodec;
use towline_core::testing::proptest::prelude::*;
use towline_core::testing::strategies::{TensorPairs, weights_pair};
use towline_core::{DType, Error, ErrorKind, Result, SnapshotKind, TensorMeta, TensorSource, Weights};
use towline_storage::slime::{
    Applied, Checksum, Delta, Directory, Encoding, Import, Options, Written, directory_name, newest, open,
    write_delta,
};
use towline_storage::{FileSource, Memory, Publish};

const ENCODINGS: [Encoding; 2] = [Encoding::Xor, Encoding::Overwrite];
const INDEX: &str = "model.safetensors.index.json";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/slime")
}

fn plain(dir: &Path) -> Weights {
    let source = FileSource::open(&dir.join("model.safetensors")).unwrap();
    Weights::read_all(&SafetensorsFiles::open(vec![source]).unwrap()).unwrap()
}

fn delta(dir: &Path) -> Result<Delta> {
    match Directory::open(dir)? {
        Directory::Delta(delta) => Ok(delta),
        Directory::Full(_) => Err(Error::internal("a full checkpoint")),
    }
}

/// The result of one delta directory on `old`.
fn apply(dir: &Path, old: &Weights) -> Result<Weights> {
    let delta = delta(dir)?;
    let version = delta.base_version();
    Weights::read_all(&Applied::new(old, version).then(delta)?)
}

fn save(dir: &Path, weights: &Weights) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("model.safetensors"), serialize(weights, &BTreeMap::new()).unwrap()).unwrap();
}

/// Writes `weight_v000001` below `folder`.
fn write(folder: &Path, old: &Weights, new: &Weights, encoding: Encoding, checksum: Checksum) -> Written {
    let options = Options::new(1).with_encoding(encoding).with_checksum(checksum).with_shard_bytes(4000);
    write_delta(folder, &options, old, new).unwrap()
}

fn edit_index(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join(INDEX);
    let mut index = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut index);
    fs::write(path, index.to_string()).unwrap();
}

#[test]
fn what_slime_wrote_is_read() {
    let folder = golden();
    let base = folder.join("base");
    assert_eq!(newest(&folder).unwrap(), Some(4));
    let applied = open(&folder, None, Some(&base)).unwrap();
    assert_eq!((applied.version(), applied.base_version(), applied.deltas().len()), (4, 0, 4));
    let found: Vec<_> = applied.deltas().iter().map(|delta| (delta.encoding(), delta.checksum())).collect();
    let wanted = [
        (Encoding::Xor, Checksum::Xxh3),
        (Encoding::Overwrite, Checksum::Blake3),
        (Encoding::Xor, Checksum::Adler32),
        (Encoding::Overwrite, Checksum::Adler32),
    ];
    assert_eq!(found, wanted);
    assert_eq!(applied.deltas()[2].tensors().count(), 0, "nothing changed in that step");
    assert!(!applied.deltas()[3].changes("same") && applied.deltas()[3].changes("brain"));
    applied.verify().unwrap();
    assert_eq!(Weights::read_all(&applied).unwrap(), plain(&folder.join("final")));
    assert_ne!(plain(&base), plain(&folder.join("final")));
    let (at, _) = applied.tensors().iter().enumerate().find(|(_, meta)| meta.name() == "brain").unwrap();
    assert_eq!(applied.read_range(at, 3..40).unwrap(), applied.read(at).unwrap().slice(3..40));
    assert!(applied.read_range(at, 0..9999).is_err() && applied.read(99).is_err());
}

#[test]
fn every_encoding_and_checksum_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (weights("a"), weights("b"));
    for encoding in ENCODINGS {
        for checksum in Checksum::ALL {
            for threads in [1, 3] {
                let folder = dir.path().join(format!("{encoding}-{checksum}-{threads}"));
                let options = Options::new(1)
                    .with_encoding(encoding)
                    .with_checksum(checksum)
                    .with_shard_bytes(4000)
                    .with_level(3)
                    .with_threads(threads);
                let written = write_delta(&folder, &options, &old, &new).unwrap();
                assert_eq!((written.version, written.base_version), (1, Some(0)));
                assert_eq!(written.dir, folder.join("weight_v000001"));
                assert_eq!(apply(&written.dir, &old).unwrap(), new, "{encoding} {checksum}");
                // A third of the tensors is the same, and one is empty.
                assert_eq!(written.tensors, 5);
                let read = delta(&written.dir).unwrap();
                assert_eq!(read.tensors().count(), 5);
                assert!(!read.changes("embed") && !read.changes("empty"));
                assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");
            }
        }
    }
}

#[test]
fn files_and_index_are_as_slime_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path(), &weights("a"), &weights("b"), Encoding::Xor, Checksum::Xxh3);
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(written.dir.join(INDEX)).unwrap()).unwrap();
    let metadata = serde_json::json!({
        "version": "000001", "base_version": "000000", "delta_encoding": "xor", "compression_format": "zstd",
        "checksum_format": "xxh3-128",
    });
    assert_eq!(index["metadata"], metadata);
    let mut names: Vec<_> = fs::read_dir(&written.dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != INDEX)
        .collect();
    names.sort();
    let count = names.len();
    assert!(count > 1, "{names:?}");
    let mut bytes = 0;
    for (number, file) in names.iter().enumerate() {
        assert_eq!(*file, format!("model-{number:05}-of-{count:05}.safetensors"));
        let data = Bytes::from(fs::read(written.dir.join(file)).unwrap());
        bytes += data.len() as u64;
        let header = Header::read(&data).unwrap();
        assert_eq!(header.metadata.len(), header.entries.len());
        for entry in header.entries {
            assert_eq!((entry.meta.dtype(), entry.meta.shape().len()), (DType::U8, 1));
            assert_eq!(index["weight_map"][entry.meta.name()], *file);
            let wanted = Checksum::Xxh3.of(weights("b").get(entry.meta.name()).unwrap().1);
            assert_eq!(header.metadata[entry.meta.name()], wanted);
        }
    }
    assert_eq!(bytes, written.bytes);
}

#[test]
fn a_step_without_changes_is_an_index_alone() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path(), &weights("a"), &weights("a"), Encoding::Overwrite, Checksum::Blake3);
    assert_eq!((written.tensors, written.bytes), (0, 0));
    assert_eq!(fs::read_dir(&written.dir).unwrap().count(), 1);
    assert_eq!(apply(&written.dir, &weights("a")).unwrap(), weights("a"));
}

#[test]
fn what_cannot_be_told_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (weights("a"), weights("b"));
    let fewer = Weights::new(old.iter().skip(1).map(|(meta, data)| (meta.clone(), data.clone()))).unwrap();
    let refused = |options: Options, old: &Weights| write_delta(dir.path(), &options, old, &new).unwrap_err();
    let error = refused(Options::new(1), &fewer);
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(error.help(), Some("write a full checkpoint"));
    assert_eq!(refused(Options::new(0), &old).kind(), ErrorKind::Invalid);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    fs::create_dir(dir.path().join(directory_name(1))).unwrap();
    assert_eq!(refused(Options::new(1), &old).kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // A source that fails leaves nothing behind.
    struct Broken<'a>(&'a Weights);
    impl TensorSource for Broken<'_> {
        fn tensors(&self) -> &[TensorMeta] {
            self.0.tensors()
        }
        fn read(&self, index: usize) -> Result<Bytes> {
            if index == 7 { Err(Error::unavailable("gone")) } else { self.0.read(index) }
        }
    }
    for threads in [1, 4] {
        let options = Options::new(2).with_threads(threads);
        let error = write_delta(dir.path(), &options, &old, &Broken(&new)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

#[test]
fn every_flipped_byte_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let old = small(1);
    let new = small(2);
    let mut flips = 0;
    for (encoding, checksum) in [(Encoding::Xor, Checksum::Xxh3), (Encoding::Overwrite, Checksum::Adler32)] {
        let folder = dir.path().join(encoding.as_str());
        let base = folder.join("base");
        save(&base, &old);
        let written = write(&folder, &old, &new, encoding, checksum);
        for entry in fs::read_dir(&written.dir).unwrap() {
            let path = entry.unwrap().path();
            let good = fs::read(&path).unwrap();
            for at in 0..good.len() {
                for mask in [1, 0x80, 0x20] {
                    let mut bad = good.clone();
                    bad[at] ^= mask;
                    fs::write(&path, bad).unwrap();
                    let found = open(&folder, None, Some(&base)).and_then(|found| Weights::read_all(&found));
                    flips += 1;
                    // White space, and bits that zstd does not use, may change nothing.
                    if let Ok(found) = found {
                        assert_eq!(found, new, "{} byte {at} ^ {mask}", path.display());
                    }
                }
            }
            for length in 0..good.len() {
                fs::write(&path, &good[..length]).unwrap();
                let found = open(&folder, None, Some(&base)).and_then(|found| Weights::read_all(&found));
                assert!(found.is_err(), "{} cut to {length}", path.display());
            }
            fs::remove_file(&path).unwrap();
            let error = open(&folder, None, Some(&base)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{} is gone: {error}", path.display());
            assert!(error.help().is_some());
            fs::write(&path, good).unwrap();
        }
        let found = open(&folder, None, Some(&base)).unwrap();
        assert_eq!(Weights::read_all(&found).unwrap(), new);
    }
    assert!(flips > 3000, "{flips}");
}

/// Few tensors of odd lengths.
fn small(step: u8) -> Weights {
    Weights::new(["a", "b", "same"].into_iter().zip([31, 1, 9]).map(|(name, length)| {
        let change = if name == "same" { 0 } else { step };
        let data: Vec<u8> = (0..length).map(|at| if at % 5 == 0 { at ^ change } else { at }).collect();
        (TensorMeta::new(name, DType::U8, [data.len()]).unwrap(), data.into())
    }))
    .unwrap()
}

#[test]
fn another_base_is_refused_before_a_byte_is_out() {
    let dir = tempfile::tempdir().unwrap();
    for encoding in ENCODINGS {
        let folder = dir.path().join(encoding.as_str());
        let written = write(&folder, &weights("a"), &weights("b"), encoding, Checksum::Xxh3);
        let error = apply(&written.dir, &weights("c")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.help().unwrap().contains("version 000000"), "{error}");
        let read = || delta(&written.dir).unwrap();
        let error = Applied::new(weights("a"), 3).then(read()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ChainMismatch);
        let error = Applied::new(small(1), 0).then(read()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ChainMismatch);
        // The base's own bytes are never written to.
        let old = weights("a");
        let kept = old.clone();
        let applied = Applied::new(old, 0).then(read()).unwrap();
        assert_eq!(Weights::read_all(&applied).unwrap(), weights("b"));
        assert_eq!(kept, weights("a"));
    }
}

#[test]
fn an_index_that_disagrees_is_refused() {
    type Change = fn(&mut serde_json::Value);
    let changes: &[(&str, ErrorKind, Change)] = &[
        ("version", ErrorKind::Corrupt, |index| index["metadata"]["version"] = "000002".into()),
        ("version", ErrorKind::Corrupt, |index| index["metadata"]["version"] = "1".into()),
        ("version", ErrorKind::Corrupt, |index| index["metadata"]["version"] = 1.into()),
        ("base_version", ErrorKind::Corrupt, |index| index["metadata"]["base_version"] = "-00001".into()),
        ("has no `base_version`", ErrorKind::Corrupt, |index| {
            index["metadata"].as_object_mut().unwrap().remove("base_version");
        }),
        ("has no `delta_encoding`", ErrorKind::Corrupt, |index| {
            index["metadata"].as_object_mut().unwrap().remove("delta_encoding");
        }),
        ("the checksums of a delta", ErrorKind::Corrupt, |index| {
            index.as_object_mut().unwrap().remove("metadata");
        }),
        ("delta encoding", ErrorKind::Unsupported, |index| {
            index["metadata"]["delta_encoding"] = "add".into()
        }),
        ("compression", ErrorKind::Unsupported, |index| {
            index["metadata"]["compression_format"] = "lz4".into()
        }),
        ("checksum", ErrorKind::Unsupported, |index| index["metadata"]["checksum_format"] = "md5".into()),
        ("no blake3 checksum", ErrorKind::Corrupt, |index| {
            index["metadata"]["checksum_format"] = "blake3".into();
        }),
        ("which is not there", ErrorKind::Corrupt, |index| {
            index["weight_map"]["a"] = "../x.safetensors".into()
        }),
        ("which is not there", ErrorKind::Corrupt, |index| {
            index["weight_map"]["z"] = "model-00001-of-00002.safetensors".into();
        }),
        ("the files hold", ErrorKind::Corrupt, |index| {
            index["weight_map"]["z"] = index["weight_map"]["a"].clone()
        }),
        ("the index says None", ErrorKind::Corrupt, |index| {
            index["weight_map"].as_object_mut().unwrap().remove("a");
        }),
        ("not the index of a model", ErrorKind::Corrupt, |index| *index = serde_json::json!([])),
    ];
    for (what, kind, change) in changes {
        let dir = tempfile::tempdir().unwrap();
        let written = write(dir.path(), &small(1), &small(2), Encoding::Xor, Checksum::Xxh3);
        edit_index(&written.dir, change);
        let error = Directory::open(&written.dir).unwrap_err();
        assert_eq!(error.kind(), *kind, "{what}: {error}");
        assert!(error.message().contains(what), "{what}: {error}");
    }
    // A shard that nobody told of, which slime would read.
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path(), &small(1), &small(2), Encoding::Xor, Checksum::Xxh3);
    let extra = serialize(&small(3), &BTreeMap::new()).unwrap();
    fs::write(written.dir.join("extra.safetensors"), extra).unwrap();
    assert_eq!(Directory::open(&written.dir).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(Directory::open(&dir.path().join("none")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_tensor_that_is_no_payload_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bomb = zstd_of(&vec![0; 32 << 20]);
    let checksum = Checksum::Xxh3.of(&[0; 31]);
    for (dtype, shape, data, checksum, what) in [
        (DType::U8, vec![bomb.len()], bomb.clone(), checksum.clone(), "claims to hold"),
        (DType::I8, vec![bomb.len()], bomb.clone(), checksum.clone(), "wanted U8"),
        (DType::U8, vec![1, bomb.len()], bomb.clone(), checksum.clone(), "wanted U8"),
        (DType::U8, vec![bomb.len()], bomb, "FF".repeat(16), "no xxh3-128 checksum"),
        (DType::U8, vec![0], Vec::new(), checksum, "zstd frame"),
    ] {
        let written = write(dir.path(), &small(1), &small(2), Encoding::Xor, Checksum::Xxh3);
        let tensor = (TensorMeta::new("a", dtype, shape).unwrap(), Bytes::from(data));
        let shard = Weights::new([tensor]).unwrap();
        let file = "model-00000-of-00001.safetensors";
        let metadata = BTreeMap::from([("a".to_owned(), checksum)]);
        fs::write(written.dir.join(file), serialize(&shard, &metadata).unwrap()).unwrap();
        edit_index(&written.dir, |index| index["weight_map"] = serde_json::json!({"a": file}));
        let error = apply(&written.dir, &small(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.message().contains(what), "{error}");
        fs::remove_dir_all(&written.dir).unwrap();
    }
}

/// A frame of the kind that slime writes, by way of a delta from zeros.
fn zstd_of(data: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let one = |byte: u8| {
        let meta = TensorMeta::new("x", DType::U8, [data.len()]).unwrap();
        Weights::new([(meta, Bytes::from(vec![byte; data.len()]))]).unwrap()
    };
    let written = write_delta(dir.path(), &Options::new(1), &one(0), &one(1)).unwrap();
    let source = FileSource::open(&written.dir.join("model-00000-of-00001.safetensors")).unwrap();
    SafetensorsFiles::open(vec![source]).unwrap().read(0).unwrap().to_vec()
}

#[test]
fn chains_are_walked_and_broken_ones_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    assert_eq!(newest(&folder.join("none")).unwrap(), None);
    assert_eq!(open(folder, None, None).unwrap_err().kind(), ErrorKind::NotFound);
    for (version, pair) in (1..).zip(["a", "b", "c", "d"].windows(2)) {
        let encoding = ENCODINGS[version as usize % 2];
        let options = Options::new(version).with_encoding(encoding);
        write_delta(folder, &options, &weights(pair[0]), &weights(pair[1])).unwrap();
    }
    fs::create_dir(folder.join("weight_v7")).unwrap();
    // Without the checkpoint below.
    let error = open(folder, None, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("weight_v000000") && error.help().unwrap().contains("began with"));
    let base = folder.join("hf");
    save(&base, &weights("a"));
    let whole = |version| Weights::read_all(&open(folder, version, Some(&base)).unwrap()).unwrap();
    assert_eq!(whole(None), weights("d"));
    assert_eq!(whole(Some(2)), weights("c"));
    assert_eq!(whole(Some(0)), weights("a"));
    // A delta is no base.
    let error = open(folder, None, Some(&folder.join("weight_v000003"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ChainMismatch);
    // A full checkpoint resets the chain.
    save(&folder.join("weight_v000004"), &weights("x"));
    write_delta(folder, &Options::new(5), &weights("x"), &weights("y")).unwrap();
    let applied = open(folder, None, None).unwrap();
    assert_eq!((applied.version(), applied.base_version()), (5, 4));
    assert_eq!(Weights::read_all(&applied).unwrap(), weights("y"));
    // A hole.
    fs::rename(folder.join("weight_v000002"), folder.join("aside")).unwrap();
    let error = open(folder, Some(3), Some(&base)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("rests on version 000002"), "{error}");
    fs::rename(folder.join("aside"), folder.join("weight_v000002")).unwrap();
    // A version that builds on itself, on a newer one, and on one too far below.
    for (below, why) in
        [("000002", "chains fall"), ("000003", "chains fall"), ("000000", "follow one another")]
    {
        edit_index(&folder.join("weight_v000002"), |index| index["metadata"]["base_version"] = below.into());
        let error = open(folder, Some(3), Some(&base)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ChainMismatch);
        assert!(error.message().contains(why), "{error}");
    }
}

#[tokio::test]
async fn snapshots_go_out_and_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("out");
    let from = repo(Arc::new(Memory::new()));
    let writer = from.writer(session(1)).await.unwrap();
    let base = |text: &str| Publish::new(name(text), SnapshotKind::Base, Arc::new(weights(text)));
    let config = vec![("config.json".to_owned(), Bytes::from_static(b"{}"))];
    writer.publish(base("a").with_files(config)).await.unwrap();
    for (parent, text) in [("a", "b"), ("b", "c")] {
        let publish = Publish::new(name(text), SnapshotKind::Delta, Arc::new(weights(text)));
        let publish = publish.with_parent(find(&from, parent).await, Arc::new(weights(parent)));
        writer.publish(publish.with_codec(Arc::new(XorCodec))).await.unwrap();
    }
    writer.publish(base("e")).await.unwrap();
    let (a, b, c, e) =
        (find(&from, "a").await, find(&from, "b").await, find(&from, "c").await, find(&from, "e").await);
    let export =
        async |info, parent, options: Options| from.export_slime(info, parent, &folder, &options).await;
    let full = export(&a, None, Options::new(3).with_shard_bytes(3000)).await.unwrap();
    assert_eq!((full.base_version, full.tensors, full.bytes), (None, 9, weights("a").byte_len()));
    assert!(fs::read_dir(&full.dir).unwrap().count() > 3, "shards, index and config");
    export(&b, Some(&a), Options::new(4)).await.unwrap();
    // Two steps at once, and a parent that is none of its own.
    let overwrite = Options::new(5).with_encoding(Encoding::Overwrite).with_checksum(Checksum::Blake3);
    export(&e, Some(&b), overwrite.with_threads(3)).await.unwrap();
    let last = export(&c, Some(&e), Options::new(6).with_checksum(Checksum::Adler32)).await.unwrap();
    assert_eq!((last.base_version, last.tensors), (Some(5), 5));
    for (version, text) in [(3, "a"), (4, "b"), (5, "e"), (6, "c")] {
        let found = open(&folder, Some(version), None).unwrap();
        assert_eq!(Weights::read_all(&found).unwrap(), weights(text));
    }
    let error = export(&c, Some(&b), Options::new(6)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let error = export(&c, None, Options::new(6)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let config = vec![("adapter_config.json".to_owned(), Bytes::from_static(b"{}"))];
    let adapter = Publish::new(name("f"), SnapshotKind::Adapter, Arc::new(weights("f"))).with_files(config);
    writer.publish(adapter).await.unwrap();
    let error = export(&find(&from, "f").await, None, Options::new(7)).await.unwrap_err();
    assert!(error.message().ends_with(" is of kind adapter: wanted a model's weights"), "{error}");

    // The same directories, into another repo.
    let into = repo(Arc::new(Memory::new()));
    let writer = into.writer(session(2)).await.unwrap();
    let import = |version| Import::new(folder.join(directory_name(version)));
    let error = writer.import_slime(import(4)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "a delta without a parent");
    writer.import_slime(import(3)).await.unwrap();
    let mut parent = find(&into, "weight-v000003").await;
    assert_eq!(into.file(&parent, "config.json").await.unwrap().as_ref(), b"{}");
    let error = writer.import_slime(import(3).with_parent(parent.clone())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "a full checkpoint with a parent");
    let skips = import(5).with_parent(parent.clone()).with_codec(Arc::new(MaskCodec));
    let error = writer.import_slime(skips).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ChainMismatch);
    assert!(
        error.message().contains("builds on version 4") && error.message().contains("is version 3"),
        "{error}"
    );
    for (version, text) in [(4, "b"), (5, "e"), (6, "c")] {
        let one = import(version).with_parent(parent).with_codec(Arc::new(XorCodec)).with_step(version);
        let published = writer.import_slime(one).await.unwrap();
        assert_eq!(published.kind, SnapshotKind::Delta);
        parent = find(&into, &format!("weight-v{version:06}")).await;
        assert_eq!((parent.step, parent.id.digest), (Some(version), weights(text).content_digest()));
        assert_eq!(into.restore(&parent).await.unwrap(), weights(text));
        assert_eq!(into.manifest(&parent).await.unwrap().metadata["slime.version"], version.to_string());
    }
    // A parent that was not imported must be named for what it is, and cannot be taken for another.
    let alien = Publish::new(name("alien"), SnapshotKind::Base, Arc::new(weights("a")));
    writer.publish(alien).await.unwrap();
    let alien = find(&into, "alien").await;
    let again =
        || import(4).with_name(name("again")).with_parent(alien.clone()).with_codec(Arc::new(XorCodec));
    let error = writer.import_slime(again()).await.unwrap_err();
    assert!(error.message().contains("was not imported"), "{error}");
    let error = writer.import_slime(again().with_parent_version(2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ChainMismatch);
    let lied = import(4).with_parent(parent).with_codec(Arc::new(XorCodec)).with_parent_version(3);
    assert_eq!(writer.import_slime(lied).await.unwrap_err().kind(), ErrorKind::ChainMismatch);
    // A damaged directory publishes nothing, whatever the parent.
    let shard = folder.join("weight_v000004/model-00000-of-00001.safetensors");
    let good = fs::read(&shard).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(&shard, bad).unwrap();
    let before = into.list().await.unwrap().len();
    let error = writer.import_slime(again().with_parent_version(3)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(into.list().await.unwrap().len(), before);
    fs::write(&shard, good).unwrap();
    writer.import_slime(again().with_parent_version(3)).await.unwrap();
    assert_eq!(into.restore(&find(&into, "again").await).await.unwrap(), weights("b"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_pair_comes_back(
        (meta, old, new) in TensorPairs::new().strategy(),
        encoding in prop::sample::select(ENCODINGS.to_vec()),
        checksum in prop::sample::select(Checksum::ALL.to_vec()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let one = |data: &[u8]| Weights::new([(meta.clone(), Bytes::copy_from_slice(data))]).unwrap();
        let written = write(dir.path(), &one(&old), &one(&new), encoding, checksum);
        prop_assert_eq!(written.tensors, usize::from(old != new));
        prop_assert_eq!(apply(&written.dir, &one(&old)).unwrap(), one(&new));
    }

    #[test]
    fn any_set_comes_back((old, new) in weights_pair(), threads in 1usize..4) {
        let dir = tempfile::tempdir().unwrap();
        let options = Options::new(1).with_shard_bytes(500).with_threads(threads);
        let written = write_delta(dir.path(), &options, &old, &new).unwrap();
        prop_assert_eq!(apply(&written.dir, &old).unwrap(), new);
    }
}
