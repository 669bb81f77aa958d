//! Elements as unsigned integers of their width.

use towline_core::DType;

/// An element's bits.
pub(super) trait Elem: Copy + Eq + Ord + Default + Send + Sync + 'static {
    /// Its little-endian bytes.
    type Raw: Copy;
    /// The number of its bits.
    const BITS: u32;

    fn split(bytes: &[u8]) -> &[Self::Raw];
    fn split_mut(bytes: &mut [u8]) -> &mut [Self::Raw];
    fn bytes(raws: &[Self::Raw]) -> &[u8];
    fn load(raw: Self::Raw) -> Self;
    fn store(self) -> Self::Raw;
    /// What tells its class: the highest 8 bits behind the sign. For bf16 and f32 that is the exponent.
    fn key(self) -> u8;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn is_negative(self) -> bool;
    /// The distance from zero of a two's complement number.
    fn magnitude(self) -> Self;
    /// 0, −1, 1, −2 … as 0, 1, 2, 3 …
    fn zigzag(self) -> Self;
    fn unzigzag(self) -> Self;
    /// The sign behind everything else.
    fn sign_last(self) -> Self;
    fn sign_first(self) -> Self;
    /// Without its low bits.
    fn shifted(self, bits: u32) -> Self;
    /// Above so many zeros.
    fn lifted(self, bits: u32) -> Self;
    fn at_most_255(self) -> u8;
    fn wide(self) -> u64;
    /// The low bits of `wide`.
    fn narrow(wide: u64) -> Self;
}

macro_rules! elem {
    ($($unsigned:ty, $signed:ty, $bytes:literal);*) => {$(
        impl Elem for $unsigned {
            type Raw = [u8; $bytes];
            const BITS: u32 = <$unsigned>::BITS;

            #[inline(always)]
            fn split(bytes: &[u8]) -> &[Self::Raw] { bytes.as_chunks().0 }
            #[inline(always)]
            fn split_mut(bytes: &mut [u8]) -> &mut [Self::Raw] { bytes.as_chunks_mut().0 }
            #[inline(always)]
            fn bytes(raws: &[Self::Raw]) -> &[u8] { raws.as_flattened() }
            #[inline(always)]
            fn load(raw: Self::Raw) -> Self { Self::from_le_bytes(raw) }
            #[inline(always)]
            fn store(self) -> Self::Raw { self.to_le_bytes() }
            #[inline(always)]
            fn key(self) -> u8 { ((self << 1) >> (Self::BITS - 8)) as u8 }
            #[inline(always)]
            fn plus(self, other: Self) -> Self { self.wrapping_add(other) }
            #[inline(always)]
            fn minus(self, other: Self) -> Self { self.wrapping_sub(other) }
            #[inline(always)]
            fn is_negative(self) -> bool { self >> (Self::BITS - 1) != 0 }
            #[inline(always)]
            fn magnitude(self) -> Self { self.cast_signed().unsigned_abs() }
            #[inline(always)]
            fn zigzag(self) -> Self { (self << 1) ^ (self.cast_signed() >> (Self::BITS - 1)).cast_unsigned() }
            #[inline(always)]
            fn unzigzag(self) -> Self { (self >> 1) ^ (self & 1).wrapping_neg() }
            #[inline(always)]
            fn sign_last(self) -> Self { self.rotate_left(1) }
            #[inline(always)]
            fn sign_first(self) -> Self { self.rotate_right(1) }
            #[inline(always)]
            fn shifted(self, bits: u32) -> Self { self >> bits }
            #[inline(always)]
            fn lifted(self, bits: u32) -> Self { self << bits }
            #[inline(always)]
            #[allow(clippy::unnecessary_min_or_max, reason = "one of the widths is 8 bits")]
            fn at_most_255(self) -> u8 { self.min(255) as u8 }
            #[inline(always)]
            fn wide(self) -> u64 { u64::from(self) }
            #[inline(always)]
            fn narrow(wide: u64) -> Self { wide as Self }
        }
    )*};
}
elem!(u8, i8, 1; u16, i16, 2; u32, i32, 4; u64, i64, 8);

/// The bytes of the integers that elements of `dtype` are taken as. Packed types are taken byte by byte.
pub(super) fn width(dtype: DType) -> usize {
    match dtype.bits() {
        16 => 2,
        32 => 4,
        64 => 8,
        _ => 1,
    }
}
