//! Bytes of every kind against every decoder: an error or a tensor, never a panic, never more memory than stated.
#![cfg(all(feature = "zstd", feature = "lz4"))]

mod common;

use std::sync::Arc;

use common::{Pair, envelope, noise, pair, stated_bound};
use proptest::prelude::*;
use towline_core::pipeline::verify;
use towline_core::testing::CountingAllocator;
use towline_core::{Codec, DType, ErrorKind, Mode, TensorDigest};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const MODES: [Mode; 2] = [Mode::Base, Mode::Delta];

fn codecs() -> impl Iterator<Item = (Arc<dyn Codec>, Mode)> {
    let each = |codec: Arc<dyn Codec>| MODES.map(|mode| (Arc::clone(&codec), mode));
    towline_codec::all().into_iter().flat_map(each).filter(|(codec, mode)| codec.modes().contains(*mode))
}

/// Tensors whose frames take different branches: sparse, dense, unchanged, incompressible, without floats, empty.
fn tensors() -> Vec<Pair> {
    let mut unchanged = pair(DType::BF16, &[10, 20], 1);
    unchanged.new.clone_from(&unchanged.old);
    let mut unrelated = pair(DType::F32, &[8, 9], 1);
    unrelated.new = noise(5, unrelated.new.len());
    vec![
        pair(DType::BF16, &[40, 30], 9),
        pair(DType::F16, &[5, 7, 9], 2),
        pair(DType::F8E4M3, &[300], 20),
        pair(DType::I64, &[9], 5),
        pair(DType::F32, &[], 4),
        unchanged,
        unrelated,
    ]
}

/// Decodes and holds the memory to the stated bound.
fn decode(codec: &dyn Codec, pair: &Pair, mode: Mode, frame: &[u8]) -> towline_core::Result<Vec<u8>> {
    let mut target = pair.old.clone();
    let (outcome, peak) = CountingAllocator::measure(|| codec.decode(&pair.unit(), mode, frame, &mut target));
    let (peak, bound) = (peak.expect("the allocator counts"), stated_bound(codec.id().as_str(), &pair.meta));
    assert!(peak <= bound, "{}: {peak} bytes are above the stated {bound}", codec.id());
    outcome.map(|()| target)
}

#[test]
fn every_truncation_is_corrupt() {
    let mut frames = 0;
    for (codec, mode) in codecs() {
        for pair in tensors() {
            let frame = pair.frame(&codec, mode);
            for length in 0..frame.len() {
                let error = decode(&codec, &pair, mode, &frame[..length]).expect_err(&format!(
                    "{} {mode:?}: {length} of {} bytes",
                    codec.id(),
                    frame.len()
                ));
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
            }
            frames += 1;
        }
    }
    assert_eq!(frames, 11 * 7);
}

#[test]
fn bytes_behind_the_end_are_corrupt() {
    for (codec, mode) in codecs() {
        for pair in tensors() {
            let frame = pair.frame(&codec, mode);
            for tail in [
                &[0][..],
                &frame,
                &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0],
                &[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0],
            ] {
                let longer = [&frame, tail].concat();
                if !frame.is_empty() || !tail.is_empty() {
                    let outcome = decode(&codec, &pair, mode, &longer);
                    // A stored or LZ4 body has no end of its own, but the length of its tensor.
                    assert_eq!(outcome.expect_err(codec.id().as_str()).kind(), ErrorKind::Corrupt);
                }
            }
        }
    }
}

#[test]
fn every_flipped_byte_is_refused_or_found_by_the_check_behind_the_decoder() {
    let (mut refused, mut found_later, mut harmless, mut missed) = (0, 0, 0, 0);
    for (codec, mode) in codecs() {
        for pair in tensors() {
            let frame = pair.frame(&codec, mode);
            // What the two framings store: a digest in a container, a checksum beside an arc payload.
            let checksum = codec.checksum(None, &pair.new);
            let digest = checksum.is_none().then(|| TensorDigest::of(&pair.new));
            for at in 0..frame.len() {
                for bits in [0x01, 0x80, 0xff] {
                    let mut flipped = frame.clone();
                    flipped[at] ^= bits;
                    match decode(&codec, &pair, mode, &flipped) {
                        Err(_) => refused += 1,
                        Ok(bytes) if bytes == pair.new => harmless += 1,
                        Ok(bytes) => {
                            let checked = verify(&codec, &pair.meta, &bytes, digest.as_ref(), checksum);
                            // Adler-32 is weak: it does not see a bit that moves between two pairs of places.
                            let weak = checksum.is_some();
                            assert!(weak || checked.is_err(), "{} byte {at} of {}", codec.id(), frame.len());
                            missed += usize::from(checked.is_ok());
                            found_later += 1;
                        }
                    }
                }
            }
        }
    }
    // Each of the three happens: the last where a header has bits that its reader may ignore.
    assert!(
        refused > 1000
            && found_later > 1000
            && harmless < (refused + found_later) / 100
            && missed < found_later / 5000,
        "{refused} {found_later} {harmless} {missed}"
    );
}

#[test]
fn a_frame_of_another_codec_mode_or_tensor_never_passes_for_the_right_one() {
    for (codec, mode) in codecs() {
        for pair in tensors() {
            for other in towline_codec::all() {
                let frame = pair.frame(&other, Mode::Delta);
                let _outcome = decode(&codec, &pair, mode, &frame);
            }
            let longer = common::pair(DType::BF16, &[41, 30], 9);
            if longer.meta.byte_len() != pair.meta.byte_len() {
                assert!(decode(&codec, &pair, mode, &longer.frame(&codec, mode)).is_err(), "{}", codec.id());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2048) })]

    #[test]
    fn noise_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400), head in 0..8usize) {
        let heads: [&[u8]; 8] = [
            b"", &[0x28, 0xb5, 0x2f, 0xfd], &[0x78, 0x9c], b"ARC3_ENVELOPE\0", b"ARC3_ENVELOPE\0\x80\x05}(", &[2], &[1],
            b"\x70\0\0\0\0\0\0\0{\"__metadata__\":{\"tensor\":\"1\"},\"tensor\":",
        ];
        let bytes = [heads[head], &bytes].concat();
        let pair = pair(DType::BF16, &[6, 11], 3);
        for (codec, mode) in codecs() {
            // A panic fails the test. Noise may happen to be a frame.
            let _outcome = decode(&codec, &pair, mode, &bytes);
        }
        // As the pickle of a payload, under both compressions.
        for data in [&bytes, &[&b"\x80\x05}("[..], &bytes].concat()] {
            let zstd = envelope("zstd", &zstd::bulk::compress(data, 1).unwrap());
            prop_assert!(decode(&towline_codec::ArcV3, &pair, Mode::Delta, &zstd).is_err());
        }
    }
}

/// 64 MiB of zeros in a few KiB.
fn zeros_zstd() -> Vec<u8> {
    zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap()
}

#[test]
fn a_zstd_bomb_is_refused_before_it_is_decoded() {
    let bomb = zeros_zstd();
    assert!(bomb.len() < 64 << 10);
    let pair = pair(DType::BF16, &[6, 11], 3);
    let tagged = [&[2][..], &bomb].concat();
    for (id, frame) in [("zstd", &tagged), ("arc_v2", &bomb), ("arc_v3", &envelope("zstd", &bomb))] {
        let codec = towline_codec::by_id(id).unwrap();
        assert_eq!(decode(&codec, &pair, Mode::Delta, frame).unwrap_err().kind(), ErrorKind::Corrupt, "{id}");
    }
    // The same without the content size in the header: only decoding would tell how much there is.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), 64 << 20), &mut encoder).unwrap();
    let unsized_frame = encoder.finish().unwrap();
    let error = decode(&towline_codec::ArcV2, &pair, Mode::Delta, &unsized_frame).unwrap_err();
    assert!(error.message().contains("does not say"), "{error}");
}

#[test]
fn a_zlib_bomb_is_refused_at_the_tensors_end() {
    use std::io::Write;
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&vec![0; 16 << 20]).unwrap();
    let bomb = encoder.finish().unwrap();
    let pair = pair(DType::BF16, &[6, 11], 3);
    let error = decode(&towline_codec::ArcV1, &pair, Mode::Delta, &bomb).unwrap_err();
    assert!(error.message().contains("more bytes than the tensor"), "{error}");
}

#[test]
fn a_bz2_bomb_is_refused_at_the_payloads_limit() {
    use std::io::Write;
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    encoder.write_all(&vec![0; 16 << 20]).unwrap();
    let bomb = encoder.finish().unwrap();
    let pair = pair(DType::BF16, &[6, 11], 3);
    let error = decode(&towline_codec::ArcV3, &pair, Mode::Delta, &envelope("bz2", &bomb)).unwrap_err();
    assert!(error.message().contains("can need"), "{error}");
}

#[test]
fn a_huge_zstd_window_is_refused_or_costs_no_more_than_the_tensor() {
    let pair = pair(DType::U8, &[100_000], 3);
    // Magic number; descriptor: content size in 4 bytes; window 2^31; one raw last block that is cut short.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0b1000_0000, (31 - 10) << 3];
    frame.extend(100_000u32.to_le_bytes());
    frame.extend([0x01 | (5 << 3), 0, 0, 1, 2, 3, 4, 5]);
    for id in ["zstd", "arc_v2"] {
        let codec = towline_codec::by_id(id).unwrap();
        let frame = if id == "zstd" { [&[2][..], &frame].concat() } else { frame.clone() };
        assert_eq!(
            decode(&codec, &pair, Mode::Delta, &frame).unwrap_err().kind(),
            ErrorKind::Corrupt,
            "{id}"
        );
    }
}

#[test]
fn a_frame_that_needs_a_dictionary_is_refused() {
    let pair = pair(DType::U8, &[1000], 3);
    // Magic number; descriptor: single segment, content size in 2 bytes, dictionary id in 1 byte.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0b0110_0001, 7];
    frame.extend(744u16.to_le_bytes());
    frame.extend([0x01 | 2, 0x1f, 0, 9]);
    let error = decode(&towline_codec::ArcV2, &pair, Mode::Delta, &frame).unwrap_err();
    assert!(error.message().contains("dictionary 7"), "{error}");
}

#[test]
fn a_zlib_stream_that_needs_a_dictionary_is_refused() {
    let pair = pair(DType::U8, &[4], 3);
    let error = decode(&towline_codec::ArcV1, &pair, Mode::Delta, &[0x78, 0xbb, 0, 0, 0, 1, 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn large_tensors_and_windows_keep_to_the_bound_and_zstd_is_counted() {
    let pair = pair(DType::BF16, &[1024, 1024], 1000);
    for (codec, mode) in codecs() {
        assert_eq!(decode(&codec, &pair, mode, &pair.frame(&codec, mode)).unwrap(), pair.new);
    }
    // The widest window that is read, as `zstd --ultra -22 --long=27` writes it.
    let mask: Vec<u8> = pair.old.iter().zip(&pair.new).map(|(old, new)| old ^ new).collect();
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 19).unwrap();
    encoder.window_log(27).unwrap();
    encoder.set_pledged_src_size(Some(mask.len() as u64)).unwrap();
    std::io::Write::write_all(&mut encoder, &mask).unwrap();
    let frame = encoder.finish().unwrap();
    assert_eq!(decode(&towline_codec::ArcV2, &pair, Mode::Delta, &frame).unwrap(), pair.new);
    let mut target = pair.old.clone();
    let (_, peak) = CountingAllocator::measure(|| {
        towline_codec::ArcV2.decode(&pair.unit(), Mode::Delta, &frame, &mut target)
    });
    // The window alone is as long as the tensor: a smaller peak would mean that zstd's memory is not seen.
    assert!(peak.unwrap() > pair.new.len(), "{peak:?}");
}

#[test]
fn a_payload_of_the_largest_size_that_is_read_keeps_to_the_bound() {
    use std::io::Write;
    let pair = pair(DType::BF16, &[1 << 18], 1000);
    let limit = (1 << 18) * 21 + (64 << 10);
    for (length, why) in [(limit, "begin with PROTO"), (limit + 1, "can need")] {
        let zeros = vec![0; length];
        let zstd = zstd::bulk::compress(&zeros, 1).unwrap();
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
        encoder.write_all(&zeros).unwrap();
        for frame in [envelope("zstd", &zstd), envelope("bz2", &encoder.finish().unwrap())] {
            let error = decode(&towline_codec::ArcV3, &pair, Mode::Delta, &frame).unwrap_err();
            assert!(error.message().contains(why), "{length}: {error}");
        }
    }
}

#[test]
fn encoders_of_the_public_formats_hold_little_besides_their_output() {
    const MIB: usize = 1 << 20;
    for (dtype, every) in [(DType::BF16, 2000), (DType::BF16, 6), (DType::F32, 4), (DType::F8E5M2, 1)] {
        let pair = pair(dtype, &[1 << 9, 1 << 11], every);
        let changed = pair.new.len() / every;
        for id in ["arc_v1", "arc_v2", "arc_v3"] {
            let codec = towline_codec::by_id(id).unwrap();
            let (frame, peak) = CountingAllocator::measure(|| pair.frame(&codec, Mode::Delta));
            // A growing vector may hold what it had beside what it gets.
            let output = 3 * frame.len();
            let list = if id == "arc_v3" { 9 * changed } else { 0 };
            let (peak, bound) = (peak.unwrap(), output + list + MIB);
            assert!(peak <= bound, "{id} {dtype} {every}: {peak} bytes are above {bound}");
        }
    }
}
