//! proptest strategies for tensors that look like the weights of a model and of its successor.

use bytes::Bytes;
use proptest::prelude::*;

use super::mix::Mix;
use crate::{DType, TensorMeta, Weights};

/// A tensor, its bytes in the parent, and its bytes now.
///
/// Every element type; scalars, empty and odd shapes up to some thousand elements (packed types padded to whole
/// bytes); parents like trained weights, zeros, noise or special values (NaN payloads, both zeros, infinities,
/// subnormals); successors that are equal, a few ulps away, changed here and there, all noise, or special.
/// Shrinks to small shapes, zero parents and equal successors.
pub fn tensor_pair() -> impl Strategy<Value = (TensorMeta, Vec<u8>, Vec<u8>)> {
    ("[a-z]{1,8}(\\.[a-z0-9]{1,6}){0,3}", tensor_type(), values(), drift())
        .prop_map(|(name, (dtype, shape), values, drift)| build(&name, dtype, shape, values, drift))
}

/// Two sets of up to six tensors with equal names, types and shapes: the parent's and the successor's.
pub fn weights_pair() -> impl Strategy<Value = (Weights, Weights)> {
    prop::collection::vec((tensor_type(), values(), drift()), 0..6).prop_map(|tensors| {
        let pairs: Vec<_> = tensors
            .into_iter()
            .enumerate()
            .map(|(index, ((dtype, shape), values, drift))| {
                build(&format!("layers.{index}.weight"), dtype, shape, values, drift)
            })
            .collect();
        let set = |side: fn(&Pair) -> &Vec<u8>| {
            // Names are unique and lengths fit by construction.
            Weights::new(pairs.iter().map(|pair| (pair.0.clone(), Bytes::from(side(pair).clone()))))
                .unwrap_or_default()
        };
        (set(|pair| &pair.1), set(|pair| &pair.2))
    })
}

/// Every element type alike.
pub fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL)
}

type Pair = (TensorMeta, Vec<u8>, Vec<u8>);

#[derive(Debug, Clone, Copy)]
enum Values {
    Zero,
    Trained(u64),
    Special(u64),
    Noise(u64),
}

#[derive(Debug, Clone, Copy)]
enum Drift {
    None,
    Ulps(u64),
    Sparse(u64),
    Special(u64),
    Noise(u64),
}

fn values() -> impl Strategy<Value = Values> {
    prop_oneof![
        1 => Just(Values::Zero),
        4 => any::<u64>().prop_map(Values::Trained),
        1 => any::<u64>().prop_map(Values::Special),
        1 => any::<u64>().prop_map(Values::Noise),
    ]
}

fn drift() -> impl Strategy<Value = Drift> {
    prop_oneof![
        1 => Just(Drift::None),
        3 => any::<u64>().prop_map(Drift::Ulps),
        3 => any::<u64>().prop_map(Drift::Sparse),
        1 => any::<u64>().prop_map(Drift::Special),
        2 => any::<u64>().prop_map(Drift::Noise),
    ]
}

/// A type and a shape whose length is a whole number of bytes.
fn tensor_type() -> impl Strategy<Value = (DType, Vec<usize>)> {
    let shape = prop_oneof![
        1 => Just(vec![]),
        1 => Just(vec![0]),
        4 => (1..40usize).prop_map(|n| vec![n]),
        2 => (200..3000usize).prop_map(|n| vec![n]),
        4 => (1..24usize, 1..40usize).prop_map(|(rows, columns)| vec![rows, columns]),
        1 => (0..3usize, 1..9usize, 1..9usize).prop_map(|(a, b, c)| vec![a, b, c]),
    ];
    (dtype(), shape).prop_map(|(dtype, mut shape)| {
        let packed = match dtype.bits() {
            4 => 2,
            6 => 4,
            _ => 1,
        };
        if packed > 1 {
            match shape.last_mut() {
                Some(last) => *last = last.next_multiple_of(packed),
                None => shape.push(packed),
            }
        }
        (dtype, shape)
    })
}

#[expect(clippy::expect_used, reason = "the name and shape are well formed by construction")]
fn build(name: &str, dtype: DType, shape: Vec<usize>, values: Values, drift: Drift) -> Pair {
    let meta = TensorMeta::new(name, dtype, shape).expect("a well-formed tensor");
    let parent = parent(dtype, meta.byte_len(), values);
    let current = successor(dtype, &parent, drift);
    (meta, parent, current)
}

fn parent(dtype: DType, length: usize, values: Values) -> Vec<u8> {
    let mut bytes = match values {
        Values::Zero => vec![0; length],
        Values::Noise(seed) => Mix::new(seed).bytes(length),
        Values::Special(seed) => {
            let mut bytes = vec![0; length];
            sprinkle(dtype, &mut bytes, &mut Mix::new(seed), 1);
            bytes
        }
        Values::Trained(seed) => {
            let mut mix = Mix::new(seed);
            let mut bytes = Vec::with_capacity(length + 8);
            while bytes.len() < length {
                element(dtype, mix.weight(), &mut bytes);
            }
            bytes.truncate(length);
            bytes
        }
    };
    well_formed(dtype, &mut bytes);
    bytes
}

fn successor(dtype: DType, parent: &[u8], drift: Drift) -> Vec<u8> {
    let mut bytes = parent.to_vec();
    let width = width(dtype);
    match drift {
        Drift::None => {}
        Drift::Noise(seed) => bytes = Mix::new(seed).bytes(parent.len()),
        Drift::Special(seed) => sprinkle(dtype, &mut bytes, &mut Mix::new(seed), 3),
        Drift::Ulps(seed) => {
            let mut mix = Mix::new(seed);
            for element in bytes.chunks_exact_mut(width) {
                if mix.below(3) > 0 {
                    let step = u64::from(mix.byte() % 4);
                    add(element, if mix.below(2) == 0 { step } else { step.wrapping_neg() });
                }
            }
        }
        Drift::Sparse(seed) => {
            let mut mix = Mix::new(seed);
            for element in bytes.chunks_exact_mut(width) {
                if mix.below(20) == 0 {
                    element.iter_mut().for_each(|byte| *byte = mix.byte());
                }
            }
        }
    }
    well_formed(dtype, &mut bytes);
    bytes
}

/// One element near `value`. Exact where it is easy: only the look of the bits matters.
#[expect(clippy::wildcard_enum_match_arm, reason = "the other types have no special look")]
fn element(dtype: DType, value: f32, out: &mut Vec<u8>) {
    let bits = value.to_bits().to_le_bytes();
    match dtype {
        DType::F64 => out.extend_from_slice(&f64::from(value).to_le_bytes()),
        DType::BF16 => out.extend_from_slice(&bits[2..]),
        DType::F16 => {
            let [_, _, low, high] = bits;
            let (sign, rest) = (u16::from(high & 0x80) << 8, u16::from_be_bytes([high & 0x7f, low]));
            // From 8 to 5 exponent bits; what is too small becomes 0.
            let shifted = rest.checked_sub(112 << 7).map_or(0, |moved| moved << 3);
            out.extend_from_slice(&(sign | shifted).to_le_bytes());
        }
        other if other.bits() >= 32 && other.is_float() => out.extend_from_slice(&bits),
        other => {
            let [_, _, low, high] = bits;
            out.push(low ^ high);
            out.resize(out.len() + width(other) - 1, 0);
        }
    }
}

/// Writes special values over about one element in `every`.
#[expect(clippy::wildcard_enum_match_arm, reason = "the other types have no special look")]
fn sprinkle(dtype: DType, bytes: &mut [u8], mix: &mut Mix, every: usize) {
    let special: &[u64] = match dtype {
        DType::F16 => &[0x7e01, 0xfe55, 0x8000, 0, 0x7c00, 0xfc00, 1, 0x8001, 0x03ff, 0x7bff],
        DType::BF16 => &[0x7fc1, 0xffd5, 0x8000, 0, 0x7f80, 0xff80, 1, 0x8001, 0x007f, 0x7f7f],
        DType::F32 => {
            &[0x7fc0_0001, 0xffc1_2345, 0x8000_0000, 0, 0x7f80_0000, 0xff80_0000, 1, 0x007f_ffff, 0x7f7f_ffff]
        }
        DType::F64 => &[
            0x7ff8_0000_0000_0001,
            1 << 63,
            0,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            1,
            (1 << 52) - 1,
        ],
        _ => &[0, 0x80, 0xff, 0x7f, 1, 0x81, u64::MAX, i64::MAX.unsigned_abs(), 1 << 63],
    };
    for element in bytes.chunks_exact_mut(width(dtype)) {
        if mix.below(every) == 0 {
            let value = special.get(mix.below(special.len())).copied().unwrap_or(0);
            element.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, new)| *byte = new);
        }
    }
}

/// Adds to a little-endian integer of any width, wrapping.
fn add(element: &mut [u8], step: u64) {
    let mut wide = [0; 8];
    wide.iter_mut().zip(element.iter()).for_each(|(wide, byte)| *wide = *byte);
    let sum = u64::from_le_bytes(wide).wrapping_add(step);
    element.iter_mut().zip(sum.to_le_bytes()).for_each(|(byte, new)| *byte = new);
}

fn well_formed(dtype: DType, bytes: &mut [u8]) {
    if dtype == DType::Bool {
        bytes.iter_mut().for_each(|byte| *byte &= 1);
    }
}

fn width(dtype: DType) -> usize {
    match dtype.bits() {
        16 => 2,
        32 => 4,
        64 => 8,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    use std::collections::BTreeSet;

    #[test]
    fn every_kind_of_tensor_comes_up_and_shrinks_to_nothing() {
        let mut runner = TestRunner::deterministic();
        let (mut dtypes, mut seen) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..2000 {
            let mut tree = tensor_pair().new_tree(&mut runner).unwrap();
            let (meta, parent, current) = tree.current();
            assert_eq!((parent.len(), current.len()), (meta.byte_len(), meta.byte_len()));
            dtypes.insert(meta.dtype());
            seen.insert(if meta.shape().is_empty() { "scalar" } else { "shaped" });
            seen.insert(if parent.is_empty() { "empty" } else { "full" });
            seen.insert(if parent == current { "equal" } else { "changed" });
            seen.insert(if parent.len() % 2 == 1 { "odd" } else { "even" });
            seen.insert(if parent.len() > 3072 { "long" } else { "short" });
            while tree.simplify() {}
            let (meta, parent, current) = tree.current();
            assert!(meta.byte_len() <= 8 && parent == current, "{meta:?}");
        }
        assert_eq!(dtypes.len(), DType::ALL.len());
        assert_eq!(seen.len(), 10, "{seen:?}");
    }

    #[test]
    fn trained_halves_are_small_numbers() {
        let bytes = parent(DType::F16, 2000, Values::Trained(1));
        let small = bytes.chunks_exact(2).filter(|pair| (pair[1] & 0x7f) < 0x30).count();
        assert!(small > 900, "{small} of 1000 are below 0.125");
    }
}
