//! The entropy floor of a pair: what an ideal coder would need that knows the old weights, and of each exponent of them
//! how often it changes and by which steps.
//!
//! Per tensor and exponent of the old value, with `n` elements of which `k` changed: `n H(k/n)` bits for which of them,
//! and for each change the entropy of its signed step, the difference of the bits as an integer of the element's width.
//! The frequencies are those of the data itself, so it is a floor for this class of models, not an absolute bound; where
//! nearly every step is another one (32-bit deltas) it is far too low.

use towline_core::{DType, Error, Result, TensorMeta, TensorSource};

/// What a pair holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Floor {
    pub(crate) bits: f64,
    pub(crate) changed: u64,
    pub(crate) elements: u64,
}

impl Floor {
    pub(crate) fn bytes(&self) -> f64 {
        self.bits / 8.0
    }
}

/// The floor of a whole pair, read tensor by tensor.
pub(crate) fn of_pair(parent: &dyn TensorSource, current: &dyn TensorSource) -> Result<Floor> {
    let mut sum = Floor::default();
    if parent.tensors() != current.tensors() {
        return Err(Error::invalid("the checkpoints do not have the same tensors"));
    }
    for (index, meta) in current.tensors().iter().enumerate() {
        let tensor = of_tensor(meta, &parent.read(index)?, &current.read(index)?);
        sum.bits += tensor.bits;
        sum.changed += tensor.changed;
        sum.elements += tensor.elements;
    }
    Ok(sum)
}

/// Where the exponent of a type lies: the bits below it, and its bits. Types without one have a single class.
fn exponent(dtype: DType) -> (u32, u32) {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the list of types may grow; the rest has no exponent"
    )]
    match dtype {
        DType::BF16 => (7, 8),
        DType::F16 => (10, 5),
        DType::F32 => (23, 8),
        DType::F64 => (52, 11),
        DType::F8E4M3 | DType::F8E4M3FNUZ => (3, 4),
        DType::F8E5M2 | DType::F8E5M2FNUZ => (2, 5),
        _ => (0, 0),
    }
}

fn of_tensor(meta: &TensorMeta, old: &[u8], new: &[u8]) -> Floor {
    match crate::peers::width(meta.dtype()) {
        1 => of_elements::<1>(meta.dtype(), old, new),
        2 => of_elements::<2>(meta.dtype(), old, new),
        4 => of_elements::<4>(meta.dtype(), old, new),
        _ => of_elements::<8>(meta.dtype(), old, new),
    }
}

/// Steps of at most this size are counted in a table, the others are sorted.
const NEAR: i64 = 128;
const TABLE: usize = 257;

/// The elements of one exponent.
#[derive(Debug, Clone)]
struct Class {
    elements: u64,
    near: Vec<u64>,
    far: Vec<i64>,
}

fn of_elements<const N: usize>(dtype: DType, old: &[u8], new: &[u8]) -> Floor {
    let (shift, bits) = exponent(dtype);
    let mask = (1u64 << bits) - 1;
    let empty = Class { elements: 0, near: vec![0; TABLE], far: Vec::new() };
    let mut classes = vec![empty; 1 << bits];
    for (old, new) in old.as_chunks::<N>().0.iter().zip(new.as_chunks::<N>().0) {
        let bits = unsigned(*old);
        let Some(class) = classes.get_mut(usize::try_from(bits >> shift & mask).unwrap_or(0)) else {
            continue;
        };
        class.elements += 1;
        if old != new {
            // The difference at the width of the element, with its sign.
            let spare = 64 - 8 * N;
            let step = (unsigned(*new).wrapping_sub(bits) << spare).cast_signed() >> spare;
            match usize::try_from(step + NEAR).ok().and_then(|at| class.near.get_mut(at)) {
                Some(count) if step.abs() <= NEAR => *count += 1,
                _ => class.far.push(step),
            }
        }
    }
    let mut floor = Floor::default();
    for mut class in classes.into_iter().filter(|class| class.elements > 0) {
        class.far.sort_unstable();
        let far = class.far.chunk_by(|left, right| left == right).map(|equal| equal.len() as u64);
        let counts = class.near.iter().copied().filter(|count| *count > 0).chain(far);
        let (steps, changed) = entropy_bits(counts);
        let (which, _) = entropy_bits([changed, class.elements - changed].into_iter());
        floor.bits += steps + which;
        floor.changed += changed;
        floor.elements += class.elements;
    }
    floor
}

fn unsigned<const N: usize>(element: [u8; N]) -> u64 {
    let mut bytes = [0; 8];
    bytes.iter_mut().zip(element).for_each(|(to, from)| *to = from);
    u64::from_le_bytes(bytes)
}

/// The bits that symbols with these counts need in all, and how many there are: `sum c log2(total / c)`.
fn entropy_bits(counts: impl Iterator<Item = u64>) -> (f64, u64) {
    let (mut total, mut weighted) = (0u64, 0.0);
    for count in counts.filter(|count| *count > 0) {
        total += count;
        weighted += count as f64 * (count as f64).log2();
    }
    if total == 0 { (0.0, 0) } else { ((total as f64).mul_add((total as f64).log2(), -weighted), total) }
}

#[cfg(test)]
mod tests {
    use towline_core::Weights;

    use super::*;

    fn of(dtype: DType, old: &[u8], new: &[u8]) -> Floor {
        let elements = old.len() / crate::peers::width(dtype);
        let meta = TensorMeta::new("t", dtype, [elements]).unwrap();
        let weights =
            |data: &[u8]| Weights::new([(meta.clone(), bytes::Bytes::copy_from_slice(data))]).unwrap();
        of_pair(&weights(old), &weights(new)).unwrap()
    }

    /// By hand: 8 elements of exponent 100, of which 2 change, by +1 and -1; 4 of exponent 101, of which 1 changes.
    #[test]
    fn a_floor_worked_out_by_hand() {
        let old: Vec<u16> = [[100 << 7 | 5; 8].as_slice(), &[101 << 7 | 9; 4]].concat();
        let mut new = old.clone();
        new[1] += 1;
        new[6] -= 1;
        new[8] += 300;
        let bytes = |values: &[u16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        let floor = of(DType::BF16, &bytes(&old), &bytes(&new));
        // 8 H(1/4) + 2 H(1/2) + 4 H(1/4) + 0, H(1/4) = 2 - 3/4 log2(3)
        let wanted = 12.0 * (2.0 - 0.75 * 3f64.log2()) + 2.0;
        assert!((floor.bits - wanted).abs() < 1e-9, "{} is not {wanted}", floor.bits);
        assert_eq!((floor.changed, floor.elements), (3, 12));
        // The same as integers: one class, and three different steps.
        let floor = of(DType::U16, &bytes(&old), &bytes(&new));
        let wanted = 12.0 * (2.0 - 0.75 * 3f64.log2()) + 3.0 * 3f64.log2();
        assert!((floor.bits - wanted).abs() < 1e-9, "{} is not {wanted}", floor.bits);
    }

    /// A step across the sign is a large one, and wraps at the width of the element: 0x80 - 0x01 is one step as -1 + 128.
    #[test]
    fn steps_have_the_width_of_the_element() {
        let floor = of(DType::F8E5M2, &[0, 0, 0, 0], &[0x7f, 0x80, 0x81, 0]);
        // One class of four, three changed, three different steps.
        let wanted = 4.0 * (2.0 - 0.75 * 3f64.log2()) + 3.0 * 3f64.log2();
        assert!((floor.bits - wanted).abs() < 1e-9, "{}", floor.bits);
        assert_eq!(of(DType::F32, &[1; 16], &[1; 16]), Floor { bits: 0.0, changed: 0, elements: 4 });
    }
}
