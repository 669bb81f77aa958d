//! Golden vectors: what the public package wrote is read to the byte, and what we write does not change unseen.
#![cfg(all(feature = "zstd", feature = "lz4"))]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use towline_core::bytes::Bytes;
use towline_core::pipeline::{self, Limits};
use towline_core::safetensors::{ByteSource, Header, SafetensorsFiles};
use towline_core::shard::{ContainerWriter, MAGIC, ShardIndex};
use towline_core::{
    Codec, DType, Framing, ManifestDigest, Mode, TensorDigest, TensorMeta, TensorSource, Weights,
};

const FORMATS: [&str; 3] = ["arc_v1", "arc_v2", "arc_v3"];

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn file(name: &str) -> Bytes {
    std::fs::read(path(name)).unwrap_or_else(|error| panic!("{name}: {error}")).into()
}

fn weights(name: &str) -> Weights {
    Weights::read_all(&SafetensorsFiles::open(vec![file(&format!("{name}.safetensors"))]).unwrap()).unwrap()
}

/// Applies an encoded shard to `parent` and checks every digest and checksum that it has.
fn apply(shard: &Bytes, codec: Option<&dyn Codec>, parent: Option<&Weights>) -> Weights {
    let index = ShardIndex::read(shard).unwrap();
    let frames = |index: usize, all: &ShardIndex| -> Vec<Bytes> {
        let ranges = &all.tensors[index].frames;
        ranges.iter().map(|range| shard.read_range(range.clone()).unwrap()).collect()
    };
    // A shard may mix formats only in arc_v3, whose two forms are recognised alike.
    let recognised = towline_codec::recognise(&frames(0, &index)[0]);
    let id = index.codec.clone().or(recognised).expect("the codec of the file");
    let found = towline_codec::by_id(id.as_str()).unwrap();
    let codec = codec.unwrap_or(&found);
    assert_eq!(codec.id(), id);
    let tensors = (0..index.tensors.len()).map(|at| {
        let tensor = &index.tensors[at];
        let old = parent.and_then(|parent| parent.get(&tensor.name));
        let meta = tensor.meta.clone().unwrap_or_else(|| old.expect("the parent's tensor").0.clone());
        let mut target = match (index.mode, old) {
            (Mode::Delta, Some((_, bytes))) => bytes.to_vec(),
            (Mode::Delta, None) => panic!("no parent for {}", tensor.name),
            (Mode::Base, _) => vec![0xee; meta.byte_len()],
        };
        let threads = NonZeroUsize::new(2).unwrap();
        pipeline::decode(codec, &meta, index.mode, &frames(at, &index), tensor.unit, &mut target, threads)
            .unwrap_or_else(|error| panic!("{}: {error:?}", tensor.name));
        assert_eq!(tensor.checksum.is_some(), index.content.is_none());
        pipeline::verify(codec, &meta, &target, None, tensor.checksum).unwrap();
        (meta, Bytes::from(target))
    });
    let weights = Weights::new(tensors).unwrap();
    index.check_content(&weights.iter().map(|(_, data)| TensorDigest::of(data)).collect::<Vec<_>>()).unwrap();
    weights
}

/// Encodes a shard in the framing of the codec.
fn encode(codec: &dyn Codec, parent: Option<&Weights>, current: &Weights, threads: usize) -> Bytes {
    let mut body = Vec::new();
    let parent_digest = parent.map(Weights::content_digest);
    let mut writer = ContainerWriter::new(&codec.id(), codec.unit(), parent_digest.as_ref());
    let (mut metas, mut checksums) = (Vec::new(), BTreeMap::new());
    let parent = parent.map(|parent| parent as &dyn TensorSource);
    pipeline::encode(codec, current, parent, Limits::threads(threads), &mut |meta, encoded| {
        let lengths: Vec<usize> = encoded.frames.iter().map(Vec::len).collect();
        let whole = encoded.whole.as_ref().expect("tensors below the window come whole");
        writer.tensor(meta, &whole.digest, &lengths, &encoded.checks)?;
        if let Some(checksum) = whole.checksum {
            checksums.insert(meta.name().to_owned(), checksum.to_string());
        }
        metas.push(TensorMeta::new(meta.name(), DType::U8, [lengths.iter().sum::<usize>()])?);
        body.extend(encoded.frames.concat());
        Ok(())
    })
    .unwrap();
    let shard = match codec.framing() {
        Framing::Safetensors => [Header::encode(&metas, &checksums).unwrap(), body].concat(),
        _ => [MAGIC.to_vec(), body, writer.finish()].concat(),
    };
    shard.into()
}

fn assert_same(found: &Weights, wanted: &Weights, what: &str) {
    for ((meta, found), (_, wanted)) in found.iter().zip(wanted.iter()) {
        assert_eq!(found, wanted, "{what}: {}", meta.name());
    }
    assert_eq!(found, wanted, "{what}");
}

#[test]
fn both_steps_of_the_three_formats_decode_to_the_byte() {
    let [base, next, next2] = ["base", "next", "next2"].map(weights);
    let mut tensors = 0;
    for format in FORMATS {
        for (delta, parent, wanted) in [("delta", &base, &next), ("delta2", &next, &next2)] {
            let name = format!("{delta}_{format}.safetensors");
            let codec = towline_codec::by_id(format).unwrap();
            let found = apply(&file(&name), Some(&codec), Some(parent));
            assert_same(&found, wanted, &name);
            tensors += found.tensors().len();
        }
    }
    assert_eq!(tensors, 6 * base.tensors().len());
    assert_eq!(base.tensors().len(), 36);
}

#[test]
fn every_branch_of_arc_v3_decodes_to_the_byte() {
    let [base, next] = ["base", "next"].map(weights);
    let names: BTreeSet<String> = std::fs::read_dir(path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("forced_"))
        .collect();
    assert_eq!(names.len(), 20);
    for name in names {
        assert_same(&apply(&file(&name), None, Some(&base)), &next, &name);
    }
}

#[test]
fn a_delta_on_the_wrong_parent_is_found() {
    let next2 = weights("next2");
    for format in FORMATS {
        let shard = file(&format!("delta_{format}.safetensors"));
        let index = ShardIndex::read(&shard).unwrap();
        let codec = towline_codec::by_id(format).unwrap();
        let tensor = index.get("bf16.sparse_ulp").unwrap();
        let (meta, old) = next2.get("bf16.sparse_ulp").unwrap();
        let mut target = old.to_vec();
        let frame = vec![shard.read_range(tensor.frames[0].clone()).unwrap()];
        let decoded =
            pipeline::decode(&codec, meta, Mode::Delta, &frame, tensor.unit, &mut target, NonZeroUsize::MIN);
        let checked = decoded.and_then(|()| pipeline::verify(&codec, meta, &target, None, tensor.checksum));
        assert!(checked.unwrap_err().message().contains("checksum"), "{format}");
    }
}

/// The encoded bytes of every codec, by digest. `TOWLINE_BLESS=1` records them anew; a change of a compression
/// library changes them too, and readers of old files are then covered by the vectors above. `TOWLINE_GOLDEN_OUT`
/// names a directory to write the shards to, for another reader.
#[test]
fn our_own_encodings_are_frozen_and_round_trip() {
    let [base, next] = ["base", "next"].map(weights);
    let mut found = String::new();
    for codec in towline_codec::all() {
        for (mode, parent) in [(Mode::Base, None), (Mode::Delta, Some(&base))] {
            if !codec.modes().contains(mode) {
                continue;
            }
            let shard = encode(&codec, parent, &next, 1);
            assert_eq!(shard, encode(&codec, parent, &next, 3), "{}: threads change the bytes", codec.id());
            assert_same(&apply(&shard, None, parent), &next, codec.id().as_str());
            if let Some(directory) = std::env::var_os("TOWLINE_GOLDEN_OUT") {
                let name = format!("{}-{mode:?}.safetensors", codec.id());
                std::fs::write(PathBuf::from(directory).join(name), &shard).unwrap();
            }
            let (xxh3, blake3) = (TensorDigest::of(&shard), ManifestDigest::of(&shard));
            writeln!(found, "{} {mode:?} {} bytes xxh3 {xxh3} blake3 {blake3}", codec.id(), shard.len())
                .unwrap();
        }
    }
    if std::env::var_os("TOWLINE_BLESS").is_some() {
        std::fs::write(path("ours.txt"), &found).unwrap();
    }
    let wanted = String::from_utf8(file("ours.txt").to_vec()).unwrap();
    assert_eq!(
        found, wanted,
        "if the change is meant, run this test with TOWLINE_BLESS=1 and say so in the log"
    );
}

#[test]
fn an_unchanged_unit_takes_one_byte_in_a_block() {
    let base = weights("base");
    for id in ["octave", "zstd", "lz4"] {
        let codec = towline_codec::by_id(id).unwrap();
        let mut frames = Vec::new();
        let source: &dyn TensorSource = &base;
        pipeline::encode(&codec, &base, Some(source), Limits::default(), &mut |_, encoded| {
            frames.extend(encoded.frames);
            Ok(())
        })
        .unwrap();
        assert!(!frames.is_empty() && frames.iter().all(|frame| frame.len() == 1), "{id}");
    }
}
