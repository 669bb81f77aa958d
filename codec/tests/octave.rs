//! `octave`: every instruction level writes and reads the same, damage never passes, and the format stands still.

#[path = "common/octave_blocks.rs"]
mod octave_blocks;
#[path = "common/octave_reference.rs"]
mod octave_reference;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use octave_blocks::{Block, Mix, block, element, width};
use octave_reference::Used;
use towline_codec::{Instructions, Octave};
use towline_core::bytes::Bytes;
use towline_core::pipeline::{self, Decode, Limits};
use towline_core::safetensors::ByteSource;
use towline_core::shard::{ContainerWriter, MAGIC, ShardIndex};
use towline_core::{
    Codec, DIGEST_BLOCK, DType, ErrorKind, ManifestDigest, Mode, Result, TensorDigest, TensorMeta,
    TensorSource, Unit, UnitMeta, Weights, block_digest,
};

const MODES: [Mode; 2] = [Mode::Base, Mode::Delta];

/// Runs `work` on every case, on as many threads as the processor has.
fn each_case(cases: u64, work: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let case @ 0.. = next.fetch_add(1, Ordering::Relaxed)
                    && case < cases
                {
                    work(case);
                }
            });
        }
    });
}

#[test]
fn all_instructions_write_the_same_and_read_what_the_others_wrote() {
    const SEED: u64 = 0x000c_7a7e;
    const CASES: u64 = 10_000;
    let levels: BTreeSet<Instructions> = Instructions::ALL.map(Instructions::available).into();
    println!("levels that this processor has: {levels:?}");
    if levels.len() < Instructions::ALL.len() {
        println!("the others fall back and were not compared");
    }
    let [simplest, ..] = Instructions::ALL.map(|level| Octave::default().with_instructions(level));
    let seen = Mutex::new(BTreeSet::new());
    each_case(CASES, |case| {
        let block = block(SEED, case);
        for mode in MODES {
            let at = format!("seed {SEED:#x}, case {case}, {mode:?}, {:?}", block.meta);
            let frame = block.frame(simplest, mode);
            for level in Instructions::ALL {
                let codec = Octave::default().with_instructions(level);
                // Equal frames: what a level reads here is what each of them wrote.
                assert!(block.frame(codec, mode) == frame, "{at}: {level:?} writes another frame");
                assert!(block.decode(codec, mode, &frame) == block.new, "{at}: {level:?} reads other bytes");
            }
            let long = block.meta.byte_len() * 8 / width(block.meta.dtype()) as usize >= 4096;
            seen.lock().unwrap().insert((format!("{mode:?}"), frame[0], width(block.meta.dtype()), long));
        }
    });
    let seen = seen.into_inner().unwrap();
    for width in [8, 16, 32, 64] {
        for long in [false, true] {
            for (mode, form) in [("Base", 3), ("Delta", 2), ("Delta", 4)] {
                assert!(seen.contains(&(mode.to_owned(), form, width, long)), "{mode} {form} {width} {long}");
            }
        }
        assert!(seen.contains(&("Delta".to_owned(), 3, width, true)), "no dense delta of {width} bits");
    }
    assert!(seen.iter().any(|(_, form, ..)| *form == 0) && seen.iter().any(|(_, form, ..)| *form == 1));
}

/// What the codec digests while it compares or writes: blocks that end with a tile, shortly behind one, within one, and
/// short ones.
#[test]
fn digests_of_the_pass_are_those_of_the_blocks() {
    const TILE: usize = 4096;
    let mut forms = BTreeSet::new();
    for (dtype, size) in [(DType::F8E4M3, 1), (DType::BF16, 2), (DType::F32, 4), (DType::I64, 8)] {
        let lengths = [8, 240, 248, TILE * size, TILE * size + 56, TILE * size + 64, 3 * TILE * size - 8];
        let large =
            [DIGEST_BLOCK - 8, DIGEST_BLOCK, DIGEST_BLOCK + 8, DIGEST_BLOCK + 48 * 1024, 2 * DIGEST_BLOCK];
        for (length, every) in
            lengths.into_iter().chain(large).flat_map(|length| [(length, 53), (length, 997)])
        {
            let old: Vec<u8> =
                (0..length as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
            let mut new = old.clone();
            new.iter_mut().step_by(every * size).for_each(|byte| *byte ^= 1);
            let meta = TensorMeta::new("w", dtype, [length / size]).unwrap();
            let unit = UnitMeta::new(&meta, 0..length);
            for level in Instructions::ALL {
                let codec = Octave::default().with_instructions(level);
                let (mut out, mut ends, mut digests) = (Vec::new(), vec![0], Vec::new());
                let mut read = |end, digest| {
                    digests.extend(digest);
                    ends.push(end);
                };
                codec.encode_reading(&unit, Some(&old), &new, &mut out, &mut read).unwrap();
                let (mut target, mut written, mut of_written) = (old.clone(), Vec::new(), Vec::new());
                let mut write = |bytes: &[u8], digest| {
                    written.extend_from_slice(bytes);
                    of_written.extend(digest);
                };
                codec.decode_writing(&unit, Mode::Delta, &out, &mut target, &mut write).unwrap();
                let at = format!("{dtype:?}, {length} bytes, one of {every}, {level:?}");
                assert_eq!(ends.last(), Some(&length), "{at}");
                assert_eq!(target, new, "{at}");
                // The last block may be too short to be digested in steps.
                let wanted: Vec<u128> = match level.available() {
                    Instructions::Avx512 => {
                        new.chunks(DIGEST_BLOCK).filter(|block| block.len() > 240).map(block_digest).collect()
                    }
                    _ => Vec::new(),
                };
                assert_eq!(digests, wanted, "{at}");
                // Stored bytes are not handed on.
                if out[0] != 1 {
                    assert_eq!(written, new, "{at}");
                    assert_eq!(of_written, wanted, "{at}");
                }
                forms.insert((out[0], size));
            }
        }
    }
    for size in [1, 2, 4, 8] {
        assert!(forms.contains(&(2, size)) && forms.contains(&(4, size)), "{forms:?}");
    }
}

#[test]
fn a_second_decoder_written_from_the_document_agrees() {
    each_case(1500, |case| {
        let block = block(0xd0c, case);
        for mode in MODES {
            block.reference(mode, &block.frame(Octave::default(), mode));
        }
    });
}

/// The hexadecimal bytes behind `label:` in the document.
fn documented(label: &str) -> Vec<u8> {
    let document = include_str!("../FORMAT.md");
    let line = document
        .lines()
        .find_map(|line| line.trim().strip_prefix(label)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("FORMAT.md has no line `{label}:`"));
    line.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

#[test]
fn the_examples_of_the_document_are_right() {
    for (label, mode) in [("delta", Mode::Delta), ("base", Mode::Base)] {
        let (frame, new) = (documented(&format!("{label} frame")), documented(&format!("{label} result")));
        let meta = TensorMeta::new(label, DType::BF16, [new.len() / 2]).unwrap();
        let old = match mode {
            Mode::Base => vec![0; new.len()],
            Mode::Delta => documented("delta parent"),
        };
        let block = Block { meta, old, new };
        let encoded = block.frame(Octave::default(), mode);
        assert_eq!(encoded, frame, "{label}: {encoded:02x?}");
        assert_eq!(block.decode(Octave::default(), mode, &frame), block.new, "{label}");
        block.reference(mode, &frame);
    }
}

/// Writes a container of `octave` frames.
fn container(current: &Weights, parent: Option<&Weights>) -> Vec<u8> {
    let codec = Octave::default();
    let digest = parent.map(Weights::content_digest);
    let mut writer = ContainerWriter::new(&codec.id(), codec.unit(), digest.as_ref());
    let mut file = MAGIC.to_vec();
    let parent = parent.map(|parent| parent as &dyn TensorSource);
    pipeline::encode(&codec, current, parent, Limits::default(), &mut |meta, encoded| {
        let lengths: Vec<usize> = encoded.frames.iter().map(Vec::len).collect();
        let whole = encoded.whole.as_ref().expect("tensors below the window come whole");
        writer.tensor(meta, &whole.digest, &lengths, &encoded.checks)?;
        file.extend(encoded.frames.concat());
        Ok(())
    })
    .unwrap();
    file.extend(writer.finish());
    file
}

/// Reads a container and applies it to `parent` unit by unit, checked as the pipeline does it.
fn open(file: &Bytes, parent: &Weights) -> Result<Vec<Vec<u8>>> {
    let index = ShardIndex::read(file)?;
    let (mut frames, mut targets) = (Vec::new(), Vec::new());
    for tensor in &index.tensors {
        let read = tensor.frames.iter().map(|range| file.read_range(range.clone()));
        frames.push(read.collect::<Result<Vec<_>>>()?);
        targets.push(match index.mode {
            Mode::Delta => parent.get(&tensor.name).unwrap().1.to_vec(),
            Mode::Base => vec![0xee; tensor.meta.as_ref().unwrap().byte_len()],
        });
    }
    let decodes =
        index.tensors.iter().zip(&frames).zip(&mut targets).map(|((tensor, frames), target)| {
            Decode::new(tensor.meta.as_ref().unwrap(), tensor, frames, target)
        });
    let codec = Octave::default();
    let digests = pipeline::decode_all(&codec, index.mode, decodes.collect(), NonZeroUsize::MIN)?;
    index.check_content(&digests.into_iter().flatten().collect::<Vec<_>>())?;
    Ok(targets)
}

fn plain(weights: &Weights) -> Vec<Vec<u8>> {
    weights.iter().map(|(_, bytes)| bytes.to_vec()).collect()
}

/// Two small sets of weights whose containers use every form of a frame.
fn small_weights() -> [Weights; 2] {
    let mut mix = Mix(9);
    let mut blocks = Vec::new();
    for (name, dtype, length, one_in) in [
        ("a.sparse", DType::BF16, 300, 12),
        ("b.same", DType::F32, 20, u64::MAX),
        ("c.stored", DType::I8, 40, 1),
        ("d.wide", DType::F64, 30, 4),
        ("e.sparse", DType::BF16, 300, 12),
        ("f.empty", DType::F16, 0, 1),
    ] {
        let old: Vec<u64> = (0..length).map(|_| element(&mut mix, width(dtype), 0)).collect();
        let new: Vec<u64> = old
            .iter()
            .map(|&old| match mix.below(one_in) {
                0 if dtype == DType::I8 => mix.next() & 0xff,
                0 => old + 1 + mix.below(2),
                _ => old,
            })
            .collect();
        blocks.push(Block::new(name, dtype, &old, &new));
    }
    // A dense delta wants 4096 elements; few values keep it short.
    let old: Vec<u64> = (0..4096).map(|at| 0x3c00 + at % 3).collect();
    let new: Vec<u64> = old.iter().map(|old| old + mix.below(6) / 4).collect();
    blocks.push(Block::new("g.dense", DType::BF16, &old, &new));
    let set = |side: fn(&Block) -> &Vec<u8>| {
        Weights::new(blocks.iter().map(|block| (block.meta.clone(), Bytes::from(side(block).clone()))))
            .unwrap()
    };
    [set(|block| &block.old), set(|block| &block.new)]
}

#[test]
fn every_flipped_byte_and_every_truncation_of_a_container_is_refused() {
    let [old, new] = small_weights();
    for parent in [None, Some(&old)] {
        let file = container(&new, parent);
        let index = ShardIndex::read(&Bytes::from(file.clone())).unwrap();
        let payload = MAGIC.len()..MAGIC.len() + index.payload_len() as usize;
        assert_eq!(open(&Bytes::from(file.clone()), &old).unwrap(), plain(&new));
        let (refused, harmless) = (AtomicU64::new(0), AtomicU64::new(0));
        each_case(file.len() as u64, |at| {
            let at = at as usize;
            let cut = ShardIndex::read(&Bytes::copy_from_slice(&file[..at])).unwrap_err();
            assert_eq!(cut.kind(), ErrorKind::Corrupt, "the first {at} bytes: {cut:?}");
            let masks = (0..8).map(|bit| 1 << bit).chain([0xff]);
            // The long frames of a base are all alike inside: each byte there is flipped in two ways.
            for mask in masks.filter(|mask| file.len() < 4000 || matches!(mask, 1 | 0xff)) {
                let mut bad = file.clone();
                bad[at] ^= mask;
                match open(&Bytes::from(bad), &old) {
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {at} ^ {mask:#x}: {error:?}");
                        let named = error.message().contains("tensor `") || !payload.contains(&at);
                        assert!(named, "byte {at} ^ {mask:#x}: {error}");
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                    // Some frames say the same in two ways: a class may begin at a key that no element has.
                    Ok(found) => {
                        assert_eq!(found, plain(&new), "byte {at} ^ {mask:#x} went unseen");
                        assert!(payload.contains(&at), "byte {at} ^ {mask:#x} of the index went unseen");
                        harmless.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        let (refused, harmless) = (refused.into_inner(), harmless.into_inner());
        println!("{} bytes: {refused} refused, {harmless} harmless", file.len());
        assert!(refused > 50 * harmless, "{refused} refused, {harmless} harmless");
    }
}

const UNIT: usize = 2 << 20;

/// A tensor of three and a half units. Frames of the whole ones have equal lengths, but change other elements.
fn large_weights() -> [Weights; 2] {
    let old: Vec<u8> = (0..UNIT / 2 * 7).map(|at| [0x41, 0x3c, 0x77, 0x3d][at % 4]).collect();
    let mut new = old.clone();
    for unit in 0..3 {
        new[unit * UNIT + 1000 + 2 * unit] ^= 1;
    }
    let meta = TensorMeta::new("layer.weight", DType::BF16, [old.len() / 2]).unwrap();
    [old, new].map(|bytes| Weights::new([(meta.clone(), Bytes::from(bytes))]).unwrap())
}

fn frames(file: &[u8]) -> Vec<std::ops::Range<usize>> {
    let index = ShardIndex::read(&Bytes::copy_from_slice(file)).unwrap();
    let ranges = index.tensors.iter().flat_map(|tensor| &tensor.frames);
    ranges.map(|range| range.start as usize..range.end as usize).collect()
}

#[track_caller]
fn refused(file: Vec<u8>, parent: &Weights, at: usize) {
    let error = open(&Bytes::from(file), parent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
    let place = format!("tensor `layer.weight`, byte {at}:");
    assert!(error.message().contains(&place), "wanted {place}, found {error}");
}

#[test]
fn a_bad_unit_is_named_by_tensor_and_byte() {
    assert_eq!(Octave::default().unit(), Unit::Block(NonZeroUsize::new(UNIT).unwrap()));
    let [old, new] = large_weights();
    let file = container(&new, Some(&old));
    assert_eq!(open(&Bytes::from(file.clone()), &old).unwrap(), plain(&new));
    let frames = frames(&file);
    assert_eq!(frames.len(), 4);
    for (left, right) in [(0, 1), (1, 2)] {
        // Both frames are good, and each is of the other unit.
        let (left_bytes, right_bytes) =
            (file[frames[left].clone()].to_vec(), file[frames[right].clone()].to_vec());
        assert_eq!(left_bytes.len(), right_bytes.len());
        assert_ne!(left_bytes, right_bytes);
        let mut swapped = file.clone();
        swapped[frames[left].clone()].copy_from_slice(&right_bytes);
        swapped[frames[right].clone()].copy_from_slice(&left_bytes);
        refused(swapped, &old, left * UNIT);
    }
    for (unit, frame) in frames.iter().enumerate() {
        // An unknown form, which the decoder sees.
        let mut unknown = file.clone();
        unknown[frame.start] = 0x7f;
        refused(unknown, &old, unit * UNIT);
    }
    // A frame that is good but says that nothing changes wants the check of the unit.
    let mut two = new.get("layer.weight").unwrap().1.to_vec();
    two[2 * UNIT + 77] ^= 1;
    let meta = new.tensors()[0].clone();
    let parent = Weights::new([(meta, Bytes::from(two))]).unwrap();
    refused(container(&new, Some(&new)), &parent, 2 * UNIT);
}

#[test]
fn swapped_units_of_a_base_are_refused() {
    let [_, new] = large_weights();
    let file = container(&new, None);
    let frames = frames(&file);
    let (first, second) = (frames[0].clone(), frames[1].clone());
    let mut swapped = file[..first.start].to_vec();
    swapped.extend_from_slice(&file[second.clone()]);
    swapped.extend_from_slice(&file[first.clone()]);
    swapped.extend_from_slice(&file[second.end..]);
    assert_eq!((first.len(), file.len()), (second.len(), swapped.len()));
    assert_ne!(file, swapped);
    refused(swapped, &new, 0);
}

#[test]
fn a_wrong_parent_is_refused() {
    let [old, new] = small_weights();
    let file = Bytes::from(container(&new, Some(&old)));
    assert_eq!(ShardIndex::read(&file).unwrap().parent, Some(old.content_digest()));
    let mut parents = 0;
    for (wrong, (meta, bytes)) in old.iter().enumerate() {
        for at in 0..bytes.len().min(200) {
            let damaged = Weights::new(old.iter().enumerate().map(|(index, (meta, bytes))| {
                let mut bytes = bytes.to_vec();
                if index == wrong {
                    bytes[at] ^= 0x10;
                }
                (meta.clone(), Bytes::from(bytes))
            }))
            .unwrap();
            assert_ne!(Some(damaged.content_digest()), ShardIndex::read(&file).unwrap().parent);
            let error = open(&file, &damaged).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
            assert!(error.message().contains(&format!("tensor `{}`", meta.name())), "{error}");
            assert!(
                error.help().is_some_and(|help| help.contains("parent") || help.contains("again")),
                "{error:?}"
            );
            parents += 1;
        }
    }
    assert_eq!(parents, 200 + 80 + 40 + 200 + 200 + 200);
}

/// Blocks that reach every form of the format.
fn golden_blocks() -> Vec<Block> {
    let mut blocks = Vec::new();
    for dtype in [DType::I8, DType::BF16, DType::F32, DType::F64] {
        let width = width(dtype);
        let mask = u64::MAX >> (64 - width);
        let mut mix = Mix(u64::from(width));
        let mut add = |name: &str,
                       length: u64,
                       kind: u64,
                       step: &mut dyn FnMut(&mut Mix, u64, u64) -> u64| {
            let old: Vec<u64> = (0..length).map(|_| element(&mut mix, width, kind)).collect();
            let new: Vec<u64> =
                (0..).zip(&old).map(|(at, &old)| old.wrapping_add(step(&mut mix, at, old)) & mask).collect();
            blocks.push(Block::new(&format!("{name}.{dtype}"), dtype, &old, &new));
        };
        let sign = |step: u64, mix: &mut Mix| if mix.below(2) == 0 { step } else { step.wrapping_neg() };
        let zero = |old: u64| old << 1 >> (width - 8) & 0xff == 0;
        add("same", 5000, 0, &mut |_, _, _| 0);
        add("stored", 5000, 3, &mut |mix, _, _| mix.next() | 1);
        add("one", 40_000, 0, &mut |mix, _, _| if mix.below(30) == 0 { sign(1, mix) } else { 0 });
        add("halves", 40_001, 0, &mut |mix, _, old| {
            let key = old << 1 >> (width - 8) & 0xff;
            if mix.below(1 << (key.abs_diff(120) % 8 + 3)) == 0 { sign(1, mix) } else { 0 }
        });
        // Everything near zero changes, or all but a little: gaps that are zero, or listed.
        add("zeros", 3000, 1, &mut |mix, _, old| if zero(old) { sign(1, mix) } else { 0 });
        add("most zeros", 3000, 1, &mut |mix, _, old| if zero(old) && mix.below(30) > 0 { 1 } else { 0 });
        let mut next = 0;
        add("even gaps", 9000, 2, &mut |mix, at, _| {
            if at < next {
                return 0;
            }
            next = at + 1 + mix.below(64);
            sign(1 + mix.below(16), mix)
        });
        add("few large", 9000, 0, &mut |mix, _, _| match mix.below(600) {
            0 => 50,
            1..20 => 1,
            _ => 0,
        });
        // Magnitudes that follow a law; with tables for 1, 4 and 32 states.
        for (name, length) in [("short", 3000), ("middle", 24_000), ("long", 100_000)] {
            add(name, length, 0, &mut |mix, _, _| match mix.below(20) {
                0 => sign([1, 1, 1, 7, 8][mix.below(5) as usize], mix),
                _ => 0,
            });
        }
        add("few each", 400, 0, &mut |mix, _, _| match mix.below(8) {
            0 => sign(1 + u64::from(mix.next().trailing_zeros()), mix),
            _ => 0,
        });
        add("dense", 20_000, 0, &mut |mix, _, old| {
            let key = old << 1 >> (width - 8) & 0xff;
            let step = mix.next() % (2 + key.abs_diff(121) * 4);
            sign(step, mix)
        });
        add("dense wide", 5003, 0, &mut |mix, _, _| {
            let step = mix.next() >> (64 - width.min(40) / 2);
            sign(step, mix)
        });
        add("special", 300, 1, &mut |mix, _, _| mix.below(3));
        add("integers", 4500, 2, &mut |mix, _, _| mix.below(2));
        // At most one element in 160: steps that are learned.
        add("rare", 60_000, 0, &mut |mix, _, old| {
            let key = old << 1 >> (width - 8) & 0xff;
            match mix.below(1 << (key.abs_diff(120) % 4 + 8)) {
                0 => sign(1 + mix.next() % (1 << (key % 7)), mix),
                1 if mix.below(8) == 0 => 1 << (width - 1),
                _ => 0,
            }
        });
        blocks.push(by_column(dtype, &mut mix));
    }
    blocks
}

/// A matrix of 24 columns: of each, nearly all elements that change move the same way.
fn by_column(dtype: DType, mix: &mut Mix) -> Block {
    let width = width(dtype);
    let old: Vec<u64> = (0..2000 * 24).map(|_| element(mix, width, 0)).collect();
    let new: Vec<u64> = (0..)
        .zip(&old)
        .map(|(at, &old)| {
            let (up, negative) = (at % 24 % 2 == 0, old >> (width - 1) == 1);
            match mix.below(200) {
                0 if up != negative => old.wrapping_add(1 + mix.below(3)),
                0 => old.wrapping_sub(1 + mix.below(3)),
                _ => old,
            }
        })
        .map(|new| new & (u64::MAX >> (64 - width)))
        .collect();
    let block = Block::new("by column", dtype, &old, &new);
    Block { meta: TensorMeta::new(format!("by column.{dtype}"), dtype, [2000, 24]).unwrap(), ..block }
}

/// The frames of the blocks above, by digest. `TOWLINE_BLESS=1` records them anew: readers of old files then need
/// to know both forms.
#[test]
fn frames_are_frozen() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/octave.txt");
    let mut found = String::new();
    let mut used = Used::new();
    for block in golden_blocks() {
        for mode in MODES {
            let frame = block.frame(Octave::default(), mode);
            used.extend(block.reference(mode, &frame));
            assert_eq!(block.decode(Octave::default(), mode, &frame), block.new, "{}", block.meta.name());
            let (xxh3, blake3) = (TensorDigest::of(&frame), ManifestDigest::of(&frame));
            writeln!(
                found,
                "{} {mode:?} form {} {} of {} bytes xxh3 {xxh3} blake3 {blake3}",
                block.meta.name(),
                frame[0],
                frame.len(),
                block.new.len()
            )
            .unwrap();
        }
    }
    let wanted = [
        "1 states",
        "4 states",
        "32 states",
        "across zero",
        "base far",
        "columns",
        "dense shift none",
        "dense shift some",
        "gaps each",
        "gaps fixed",
        "gaps listed",
        "gaps zero",
        "magnitudes coded",
        "magnitudes each",
        "magnitudes fixed",
        "magnitudes listed",
        "magnitudes zero",
    ];
    let missing: Vec<_> = wanted.iter().filter(|part| !used.contains(**part)).collect();
    assert!(missing.is_empty(), "no block has {missing:?}, only {used:?}");
    for width in [8, 16, 32, 64] {
        for part in [
            "form 0 Delta",
            "form 1 Delta",
            "form 1 Base",
            "form 2 Delta",
            "form 3 Delta",
            "form 4 Delta",
            "form 3 Base",
        ] {
            assert!(used.contains(&format!("{part} {width}")), "no block of {width} bits has {part}");
        }
    }
    if std::env::var_os("TOWLINE_BLESS").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        found, wanted,
        "if the change is meant, run this test with TOWLINE_BLESS=1 and say so in the log"
    );
}

#[test]
fn a_delta_is_neither_taken_back_nor_joined() {
    let block = block(1, 7);
    let frame = block.frame(Octave::default(), Mode::Delta);
    let mut target = block.new.clone();
    let mut out = Vec::new();
    for error in [
        Octave::default().revert(&block.unit(), &frame, &mut target).unwrap_err(),
        Octave::default().compose(&block.unit(), &frame, &frame, &mut out).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
        assert!(error.message().contains("octave") && error.help().is_some(), "{error:?}");
    }
    assert!(target == block.new && out.is_empty());
}
