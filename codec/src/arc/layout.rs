//! Which element types arc_v3 takes apart into sign, exponent and mantissa.

use towline_core::{DType, UnitMeta};

/// How the bits of an element type are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// The bytes of an element.
    pub(super) bytes: usize,
    /// The low bits that are its mantissa.
    pub(super) mantissa_bits: u32,
    /// The names of the type in a payload. The first one is written.
    pub(super) names: &'static [&'static str],
}

const LAYOUTS: [(DType, Layout); 6] = [
    (DType::BF16, Layout { bytes: 2, mantissa_bits: 7, names: &["torch.bfloat16"] }),
    (DType::F16, Layout { bytes: 2, mantissa_bits: 10, names: &["torch.float16"] }),
    (DType::F32, Layout { bytes: 4, mantissa_bits: 23, names: &["torch.float32"] }),
    // A writer names e4m3 after its GPU, whatever the file says; the bits are divided alike.
    (DType::F8E4M3, Layout { bytes: 1, mantissa_bits: 3, names: &["torch.float8_e4m3fn", FNUZ] }),
    (DType::F8E4M3FNUZ, Layout { bytes: 1, mantissa_bits: 3, names: &[FNUZ, "torch.float8_e4m3fn"] }),
    (DType::F8E5M2, Layout { bytes: 1, mantissa_bits: 2, names: &["torch.float8_e5m2"] }),
];
const FNUZ: &str = "torch.float8_e4m3fnuz";

impl Layout {
    /// The layout of `dtype`, if it is one that the format knows.
    pub(super) fn of(dtype: DType) -> Option<Self> {
        LAYOUTS.iter().find(|(known, _)| *known == dtype).map(|(_, layout)| *layout)
    }

    /// The bits of an element.
    pub(super) fn total_bits(&self) -> u32 {
        8 * match self.bytes {
            1 => 1,
            2 => 2,
            _ => 4,
        }
    }

    /// The bits that are the mantissa.
    pub(super) fn mask(&self) -> u32 {
        (1 << self.mantissa_bits) - 1
    }

    /// What the format calls the unsigned integer of this width.
    pub(super) fn uint(&self) -> &'static str {
        uint_name(self.bytes)
    }
}

/// The rows and the row width of a tensor: rows are the first dimension, one where there are fewer than two.
pub(super) fn rows(unit: &UnitMeta<'_>) -> (usize, usize) {
    match unit.shape {
        [rows, rest @ ..] if !rest.is_empty() => (*rows, rest.iter().product::<usize>().max(1)),
        shape => (1, shape.iter().product::<usize>().max(1)),
    }
}

/// The name of the unsigned integer of `bytes` bytes.
pub(super) fn uint_name(bytes: usize) -> &'static str {
    match bytes {
        1 => "uint8",
        2 => "uint16",
        4 => "uint32",
        _ => "uint64",
    }
}

/// The bytes of the unsigned integer called `name`.
pub(super) fn uint_bytes(name: &str) -> Option<usize> {
    [1, 2, 4, 8].into_iter().find(|&bytes| uint_name(bytes) == name)
}

/// The bytes of the narrowest unsigned integer that holds `value`.
pub(super) fn narrowest(value: u64) -> usize {
    match value {
        0..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    }
}

/// An element's bits.
#[inline]
pub(super) fn load<const N: usize>(element: [u8; N]) -> u32 {
    let mut bytes = [0; 4];
    bytes.iter_mut().zip(element).for_each(|(to, from)| *to = from);
    u32::from_le_bytes(bytes)
}
