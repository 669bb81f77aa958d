//! Every codec gives every tensor back: all element types, special values, empty tensors, scalars, several blocks.

mod common;

use common::{noise, pair};
use proptest::prelude::*;
use towline_core::{Codec, DType, Mode, TensorMeta, UnitMeta};

/// Encodes and decodes `new` in every mode of `codec`, cut into its units.
fn check(codec: &dyn Codec, meta: &TensorMeta, old: &[u8], new: &[u8]) -> Result<(), String> {
    for mode in [Mode::Base, Mode::Delta] {
        if !codec.modes().contains(mode) {
            continue;
        }
        let mut target = if mode == Mode::Delta { old.to_vec() } else { noise(3, new.len()) };
        for range in codec.unit().ranges(new.len()) {
            let unit = UnitMeta::new(meta, range.clone());
            let parent = (mode == Mode::Delta).then(|| &old[range.clone()]);
            let mut frame = b"before".to_vec();
            codec.encode(&unit, parent, &new[range.clone()], &mut frame).map_err(|error| error.report())?;
            let frame = frame.strip_prefix(b"before").ok_or("what was before is gone")?;
            codec
                .decode(&unit, mode, frame, &mut target[range.clone()])
                .map_err(|error| format!("{mode:?}: {}", error.report()))?;
            if mode == Mode::Delta {
                let mut back = target[range.clone()].to_vec();
                if codec.revert(&unit, frame, &mut back).is_ok() && back != old[range] {
                    return Err("the delta was not taken back".into());
                }
            }
        }
        if target != new {
            return Err(format!("{mode:?}: other bytes came back"));
        }
    }
    Ok(())
}

/// A shape of at most some hundred elements whose length is a whole number of bytes.
fn shapes(dtype: DType) -> impl Strategy<Value = Vec<usize>> {
    // Four 6-bit elements and two 4-bit elements make whole bytes.
    let step = match dtype.bits() {
        4 => 2,
        6 => 4,
        _ => 1,
    };
    let scalar = if step == 1 { vec![] } else { vec![step] };
    prop_oneof![
        1 => Just(scalar),
        1 => Just(vec![0, step]),
        1 => Just(vec![3, 0]),
        3 => (0usize..300).prop_map(move |n| vec![n * step]),
        4 => (1usize..20, 1usize..20).prop_map(move |(a, b)| vec![a, b * step]),
        2 => (1usize..6, 1usize..6, 1usize..6).prop_map(move |(a, b, c)| vec![a, b, c * step]),
    ]
}

/// A tensor and two versions of its bytes: equal, a few bits apart, a few bytes apart, or unrelated.
fn pairs() -> impl Strategy<Value = (TensorMeta, Vec<u8>, Vec<u8>)> {
    let dtype = proptest::sample::select(DType::ALL);
    dtype.prop_flat_map(|dtype| (Just(dtype), shapes(dtype))).prop_flat_map(|(dtype, shape)| {
        let meta = TensorMeta::new("tensor", dtype, shape).unwrap();
        let length = meta.byte_len();
        let changes = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..40);
        let old = prop_oneof![Just(vec![0; length]), any::<u64>().prop_map(move |seed| noise(seed, length))];
        (old, changes, 0..4u8, any::<u64>()).prop_map(move |(old, changes, kind, seed)| {
            let mut new = old.clone();
            match kind {
                0 => {}
                1 => new = noise(seed, length),
                2 => new.iter_mut().for_each(|byte| *byte ^= 1),
                _ => {
                    for (index, byte) in changes.into_iter().filter(|_| length > 0) {
                        new[index.index(length)] = byte;
                    }
                }
            }
            (meta.clone(), old, new)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn every_codec_gives_every_tensor_back((meta, old, new) in pairs()) {
        for codec in towline_codec::all() {
            check(&codec, &meta, &old, &new)
                .map_err(|why| TestCaseError::fail(format!("{} {meta:?}: {why}", codec.id())))?;
        }
    }
}

#[test]
fn every_element_type_is_taken() {
    for &dtype in DType::ALL {
        for (shape, every) in [(vec![24, 16], 5), (vec![0], 1), (vec![48], 1), (vec![4], 100)] {
            let pair = pair(dtype, &shape, every);
            for codec in towline_codec::all() {
                check(&codec, &pair.meta, &pair.old, &pair.new)
                    .unwrap_or_else(|why| panic!("{} {dtype} {shape:?}: {why}", codec.id()));
            }
        }
    }
}

#[test]
fn nan_infinity_and_both_zeros_keep_their_bits() {
    let f32s =
        [0.0, -0.0, 1.0, f32::NAN, f32::from_bits(0xffc0_0001), f32::INFINITY, f32::NEG_INFINITY, 1e-45];
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let mut turned = f32s;
    turned.rotate_left(1);
    let halves =
        |shift: u16| (0..=u16::MAX).flat_map(|bits| (bits ^ shift).to_le_bytes()).collect::<Vec<u8>>();
    let quarters = |shift: u8| (0..=255u8).map(|bits| bits.wrapping_add(shift)).collect::<Vec<u8>>();
    let cases = [
        (DType::F32, vec![8], bytes(&f32s), bytes(&turned)),
        (DType::BF16, vec![256, 256], halves(0), halves(0x8001)),
        (DType::F16, vec![65536], halves(0), halves(3)),
        (DType::F8E4M3, vec![16, 16], quarters(0), quarters(1)),
        (DType::F8E4M3FNUZ, vec![256], quarters(0), quarters(128)),
        (DType::F8E5M2, vec![256], quarters(0), quarters(3)),
    ];
    for (dtype, shape, old, new) in cases {
        let meta = TensorMeta::new("tensor", dtype, shape).unwrap();
        for codec in towline_codec::all() {
            check(&codec, &meta, &old, &new).unwrap_or_else(|why| panic!("{} {dtype}: {why}", codec.id()));
        }
    }
}

#[test]
fn tensors_of_several_blocks_and_chunks() {
    for (dtype, shape, every) in [
        (DType::BF16, vec![300, 1001], 1000),
        (DType::F32, vec![150_001], 7),
        (DType::F8E5M2, vec![2, 300_001], 1),
        (DType::U8, vec![1_000_003], 3),
        // Far changes, so that gaps need 1, 2 and 4 bytes, in rows and flat.
        (DType::BF16, vec![1, 200_000], 390_000),
        (DType::BF16, vec![1000, 300], 590_000),
    ] {
        let pair = pair(dtype, &shape, every);
        for codec in towline_codec::all() {
            check(&codec, &pair.meta, &pair.old, &pair.new)
                .unwrap_or_else(|why| panic!("{} {dtype} {shape:?}: {why}", codec.id()));
        }
    }
}

#[test]
fn a_parent_of_another_length_is_refused() {
    let pair = pair(DType::BF16, &[8], 3);
    for codec in towline_codec::all() {
        let outcome = codec.encode(&pair.unit(), Some(&pair.old[1..]), &pair.new, &mut Vec::new());
        assert!(outcome.is_err() || codec.id().as_str() == "raw", "{}", codec.id());
    }
}

/// Both layouts of arc_v3 are written, each where it is smaller.
#[cfg(feature = "zstd")]
#[test]
fn arc_v3_writes_flat_and_row_positions_and_fallbacks() {
    let codec = towline_codec::ArcV3;
    let payload = |pair: &common::Pair| {
        let frame = pair.frame(&codec, Mode::Delta);
        // The compressor begins with the frame's magic number, 8 bytes behind the opcode of its length.
        let start = frame.windows(4).position(|window| window == [0x28, 0xb5, 0x2f, 0xfd]).unwrap();
        let end = frame.len() - 2;
        let data = zstd::decode_all(&frame[start..end]);
        (frame.starts_with(b"ARC3_ENVELOPE\0"), data.unwrap_or_default())
    };
    let has = |data: &[u8], text: &[u8]| data.windows(text.len()).any(|window| window == text);

    // Every fourth element, far more than 256 KiB: gaps of one byte, rows would add their heads.
    let (envelope, data) = payload(&pair(DType::BF16, &[300, 1001], 10));
    assert!(envelope && has(&data, b"flat") && has(&data, b"zigzag"));
    // Two dense rows far apart: one gap above 65535 makes flat gaps 4 bytes wide.
    let mut two = pair(DType::BF16, &[1000, 2000], usize::MAX);
    two.new.copy_from_slice(&two.old);
    for row in [100, 900] {
        two.new[row * 4000..(row + 1) * 4000].iter_mut().step_by(2).for_each(|byte| *byte ^= 1);
    }
    let (envelope, data) = payload(&two);
    assert!(envelope && has(&data, b"n_rows"));
    assert_eq!(two.decode(&codec, Mode::Delta, &two.frame(&codec, Mode::Delta)).unwrap(), two.new);
    // Integers have no mantissa; unrelated floats are mostly exceptions.
    assert!(!payload(&pair(DType::I32, &[300, 300], 100)).0);
    let mut unrelated = pair(DType::F32, &[300, 400], 3);
    unrelated.new = noise(99, unrelated.new.len());
    assert!(!payload(&unrelated).0);
    // Unchanged: strategy none, without compressing zeros.
    two.new.copy_from_slice(&two.old);
    let (envelope, data) = payload(&two);
    assert!(envelope && has(&data, b"none"));
}
