//! proptest strategies for tensors that look like the weights of a model and of its successor.

use std::ops::Range;

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

/// What a parent's elements look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Parent {
    /// Zeros.
    Zero,
    /// Trained weights: around 0, with a standard deviation of about 0.02.
    Trained,
    /// NaN payloads, both zeros, infinities, subnormals, and the ends of the integers.
    Special,
    /// Every bit by chance.
    Noise,
}

impl Parent {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Zero, Self::Trained, Self::Special, Self::Noise];
}

/// How a successor differs from its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Drift {
    /// Not at all.
    None,
    /// So many of 1000 elements move by 1 to `most` units in the last place, up or down, and wrap.
    Ulps {
        /// Elements of 1000 that move, by chance.
        per_mille: u16,
        /// The largest step; 0 counts as 1.
        most: u64,
    },
    /// So many of 1000 elements become noise.
    Sparse {
        /// Elements of 1000 that change, by chance.
        per_mille: u16,
    },
    /// So many of 1000 elements take a value of [`Parent::Special`].
    Special {
        /// Elements of 1000 that change, by chance.
        per_mille: u16,
    },
    /// All become noise.
    Noise,
}

impl Drift {
    /// One of every kind: few and many changes, small and large ones.
    pub const ALL: [Self; 8] = [
        Self::None,
        Self::Ulps { per_mille: 5, most: 1 },
        Self::Ulps { per_mille: 150, most: 1 },
        Self::Ulps { per_mille: 667, most: 3 },
        Self::Ulps { per_mille: 1000, most: 1 << 12 },
        Self::Sparse { per_mille: 50 },
        Self::Special { per_mille: 333 },
        Self::Noise,
    ];
}

/// Tensors and their successors, as a test wants them: types, sizes, parents and drifts.
///
/// ```
/// use towline_core::DType;
/// use towline_core::testing::proptest::{strategy::{Strategy, ValueTree}, test_runner::TestRunner};
/// use towline_core::testing::strategies::{Drift, Parent, TensorPairs};
///
/// let pairs = TensorPairs::new()
///     .dtypes([DType::BF16, DType::F32])
///     .elements(1..2000)
///     .parents([Parent::Trained])
///     .drifts([Drift::Ulps { per_mille: 20, most: 1 }])
///     .strategy();
/// let (meta, parent, current) = pairs.new_tree(&mut TestRunner::deterministic())?.current();
/// assert!(meta.elements() < 2000 && parent.len() == current.len());
/// # Ok::<(), towline_core::testing::proptest::test_runner::Reason>(())
/// ```
/// A failing case shrinks to the fewest elements that still fail, to one dimension, and to the first kinds that are
/// given; the elements that stay keep their values.
#[derive(Debug, Clone)]
pub struct TensorPairs {
    dtypes: Vec<DType>,
    size: Size,
    parents: Vec<Parent>,
    drifts: Vec<Drift>,
}

#[derive(Debug, Clone)]
enum Size {
    Elements(Range<usize>),
    Bytes(Range<usize>),
}

impl Default for TensorPairs {
    fn default() -> Self {
        Self {
            dtypes: DType::ALL.to_vec(),
            size: Size::Elements(0..3000),
            parents: Parent::ALL.to_vec(),
            drifts: Drift::ALL.to_vec(),
        }
    }
}

impl TensorPairs {
    /// Every type, parent and drift, with fewer than 3000 elements.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the element types, each as likely as the others. None means all.
    #[must_use]
    pub fn dtypes(mut self, dtypes: impl IntoIterator<Item = DType>) -> Self {
        self.dtypes = or_all(dtypes, DType::ALL);
        self
    }

    /// Sets the number of elements. Packed types are filled up to whole bytes.
    #[must_use]
    pub fn elements(mut self, elements: Range<usize>) -> Self {
        self.size = Size::Elements(elements);
        self
    }

    /// Sets the number of bytes instead, to about an element: for codecs whose units are blocks.
    #[must_use]
    pub fn bytes(mut self, bytes: Range<usize>) -> Self {
        self.size = Size::Bytes(bytes);
        self
    }

    /// Sets the kinds of parents. None means all.
    #[must_use]
    pub fn parents(mut self, parents: impl IntoIterator<Item = Parent>) -> Self {
        self.parents = or_all(parents, &Parent::ALL);
        self
    }

    /// Sets the kinds of drift. None means all.
    #[must_use]
    pub fn drifts(mut self, drifts: impl IntoIterator<Item = Drift>) -> Self {
        self.drifts = or_all(drifts, &Drift::ALL);
        self
    }

    /// The strategy: a tensor, its bytes in the parent, and its bytes now.
    pub fn strategy(self) -> impl Strategy<Value = (TensorMeta, Vec<u8>, Vec<u8>)> {
        let by_bytes = matches!(self.size, Size::Bytes(_));
        let (Size::Elements(range) | Size::Bytes(range)) = self.size;
        let length = range.start..range.end.max(range.start.saturating_add(1));
        // A seed that shrank would change what fails.
        let seeds = [any::<u64>().no_shrink(), any::<u64>().no_shrink()];
        let kinds = (
            prop::sample::select(self.dtypes),
            prop::sample::select(self.parents),
            prop::sample::select(self.drifts),
        );
        (kinds, length, 1..5usize, seeds).prop_map(
            move |((dtype, parent, drift), length, rows, [first, second])| {
                let bits = dtype.bits() as usize;
                let elements = if by_bytes { (length * 8).div_ceil(bits) } else { length };
                let elements = elements.next_multiple_of(packed(dtype));
                let shape = match elements / rows {
                    columns if rows > 1 && columns * rows == elements && columns % packed(dtype) == 0 => {
                        vec![rows, columns]
                    }
                    _ => vec![elements],
                };
                build("tensor", dtype, shape, (parent, first), (drift, second))
            },
        )
    }
}

fn or_all<T: Copy>(some: impl IntoIterator<Item = T>, all: &[T]) -> Vec<T> {
    let some: Vec<T> = some.into_iter().collect();
    if some.is_empty() { all.to_vec() } else { some }
}

/// The elements that fill whole bytes.
fn packed(dtype: DType) -> usize {
    match dtype.bits() {
        4 => 2,
        6 => 4,
        _ => 1,
    }
}

fn values() -> impl Strategy<Value = (Parent, u64)> {
    let kind = prop_oneof![
        1 => Just(Parent::Zero),
        4 => Just(Parent::Trained),
        1 => Just(Parent::Special),
        1 => Just(Parent::Noise),
    ];
    (kind, any::<u64>())
}

fn drift() -> impl Strategy<Value = (Drift, u64)> {
    let kind = prop_oneof![
        1 => Just(Drift::None),
        3 => Just(Drift::Ulps { per_mille: 500, most: 3 }),
        3 => Just(Drift::Sparse { per_mille: 50 }),
        1 => Just(Drift::Special { per_mille: 333 }),
        2 => Just(Drift::Noise),
    ];
    (kind, any::<u64>())
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
        let packed = packed(dtype);
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
fn build(name: &str, dtype: DType, shape: Vec<usize>, values: (Parent, u64), drift: (Drift, u64)) -> Pair {
    let meta = TensorMeta::new(name, dtype, shape).expect("a well-formed tensor");
    let parent = parent(dtype, meta.byte_len(), values);
    let current = successor(dtype, &parent, drift.0, drift.1);
    (meta, parent, current)
}

fn parent(dtype: DType, length: usize, (kind, seed): (Parent, u64)) -> Vec<u8> {
    let mut mix = Mix::new(seed);
    let mut bytes = match kind {
        Parent::Zero => vec![0; length],
        Parent::Noise => mix.bytes(length),
        Parent::Special => {
            let mut bytes = vec![0; length];
            sprinkle(dtype, &mut bytes, &mut mix, 1000);
            bytes
        }
        Parent::Trained => {
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

/// The successor of weights of one's own: equal seeds give equal successors.
#[must_use]
pub fn successor(dtype: DType, parent: &[u8], drift: Drift, seed: u64) -> Vec<u8> {
    let mut bytes = parent.to_vec();
    let mut mix = Mix::new(seed);
    let width = width(dtype);
    match drift {
        Drift::None => return bytes,
        Drift::Noise => bytes = mix.bytes(parent.len()),
        Drift::Special { per_mille } => sprinkle(dtype, &mut bytes, &mut mix, per_mille),
        Drift::Ulps { per_mille, most } => {
            for element in bytes.chunks_exact_mut(width) {
                if mix.below(1000) < usize::from(per_mille) {
                    let step = 1 + mix.next() % most.max(1);
                    add(element, if mix.below(2) == 0 { step } else { step.wrapping_neg() });
                }
            }
        }
        Drift::Sparse { per_mille } => {
            for element in bytes.chunks_exact_mut(width) {
                if mix.below(1000) < usize::from(per_mille) {
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

/// Writes special values over about so many of 1000 elements.
#[expect(clippy::wildcard_enum_match_arm, reason = "the other types have no special look")]
fn sprinkle(dtype: DType, bytes: &mut [u8], mix: &mut Mix, per_mille: u16) {
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
        if mix.below(1000) < usize::from(per_mille) {
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
    use proptest::test_runner::{TestCaseError, TestError, TestRunner};
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
    fn the_knobs_are_kept() {
        let mut runner = TestRunner::deterministic();
        let pairs = TensorPairs::new().dtypes([DType::BF16, DType::F4]).elements(100..200);
        let pairs =
            pairs.parents([Parent::Trained]).drifts([Drift::Ulps { per_mille: 1000, most: 1 }]).strategy();
        let bytes = TensorPairs::new().dtypes([]).bytes(5000..5010).strategy();
        let mut dtypes = BTreeSet::new();
        for _ in 0..300 {
            let (meta, parent, current) = pairs.new_tree(&mut runner).unwrap().current();
            assert!((100..201).contains(&meta.elements()), "{meta:?}");
            assert!([DType::BF16, DType::F4].contains(&meta.dtype()), "{meta:?}");
            let same = parent.chunks(width(meta.dtype())).zip(current.chunks(width(meta.dtype())));
            assert_eq!(same.filter(|(old, new)| old == new).count(), 0, "{meta:?}");
            let (meta, _, current) = bytes.new_tree(&mut runner).unwrap().current();
            assert!((5000..5020).contains(&current.len()), "{meta:?}");
            dtypes.insert(meta.dtype());
        }
        assert_eq!(dtypes.len(), DType::ALL.len());
    }

    #[test]
    fn a_failing_tensor_shrinks_to_the_fewest_elements_that_fail() {
        // What a broken codec may be: wrong from the 77th element on, if there is one that changed.
        let broken = |meta: &TensorMeta, parent: &[u8], current: &[u8]| {
            let changed = parent.chunks(2).zip(current.chunks(2)).skip(76).any(|(old, new)| old != new);
            meta.dtype() == DType::BF16 && changed
        };
        let pairs = TensorPairs::new()
            .elements(0..100_000)
            .drifts([Drift::None, Drift::Ulps { per_mille: 900, most: 9 }]);
        let failed = TestRunner::deterministic().run(&pairs.strategy(), |(meta, parent, current)| {
            if broken(&meta, &parent, &current) { Err(TestCaseError::fail("broken")) } else { Ok(()) }
        });
        let Err(TestError::Fail(_, (meta, parent, current))) = failed else { panic!("{failed:?}") };
        assert!(broken(&meta, &parent, &current));
        assert!((77..80).contains(&meta.elements()) && meta.shape().len() == 1, "{meta:?}");
        assert!(parent.iter().all(|&byte| byte == 0), "a parent of zeros fails too");
    }

    #[test]
    fn trained_halves_are_small_numbers() {
        let bytes = parent(DType::F16, 2000, (Parent::Trained, 1));
        let small = bytes.chunks_exact(2).filter(|pair| (pair[1] & 0x7f) < 0x30).count();
        assert!(small > 900, "{small} of 1000 are below 0.125");
    }
}
