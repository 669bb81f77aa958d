//! pcodec at its default level: the difference from the parent as integers, or the values of a base.

use half::f16;
use pco::ChunkConfig;
use pco::data_types::Number;
use pco::standalone::{simple_compress_into, simple_decompress_into};
use towline_core::{DType, Mode, Result};

use super::{Kind, Part, Peer, Scratch, broken};

/// Numbers that one call gets: a multiple of the chunk that pco cuts anyway (2^18), so that no size is lost by it.
const NUMBERS: usize = 1 << 22;

/// pco, level 8. A delta is the wrapping difference `new - old` of the elements' bits as unsigned integers; a base is the
/// bits as unsigned integers or the floating-point values (16-bit floats of either kind as pco's one kind, which puts
/// them in the same order).
#[derive(Debug)]
pub(super) struct Pcodec;

impl Peer for Pcodec {
    fn id(&self) -> &'static str {
        "pcodec"
    }

    fn variants(&self, mode: Mode, dtype: DType) -> usize {
        if mode == Mode::Base && dtype.is_float() && matches!(dtype.bits(), 16 | 32) { 2 } else { 1 }
    }

    fn cut(&self, width: usize) -> usize {
        NUMBERS * width
    }

    fn encode(&self, part: &Part<'_>, scratch: &mut Scratch, out: &mut Vec<u8>) -> Result<()> {
        match (part.kind.width(), part.kind.variant) {
            (1, _) => encode::<1, u8>(part, scratch, out),
            (2, 0) => encode::<2, u16>(part, scratch, out),
            (2, _) => encode::<2, f16>(part, scratch, out),
            (4, 0) => encode::<4, u32>(part, scratch, out),
            (4, _) => encode::<4, f32>(part, scratch, out),
            (..) => encode::<8, u64>(part, scratch, out),
        }
    }

    fn decode(&self, kind: Kind, encoded: &[u8], scratch: &mut Scratch, target: &mut [u8]) -> Result<()> {
        match (kind.width(), kind.variant) {
            (1, _) => decode::<1, u8>(kind.mode, encoded, scratch, target),
            (2, 0) => decode::<2, u16>(kind.mode, encoded, scratch, target),
            (2, _) => decode::<2, f16>(kind.mode, encoded, scratch, target),
            (4, 0) => decode::<4, u32>(kind.mode, encoded, scratch, target),
            (4, _) => decode::<4, f32>(kind.mode, encoded, scratch, target),
            (..) => decode::<8, u64>(kind.mode, encoded, scratch, target),
        }
    }
}

/// A number of pco that is made of `N` bytes of ours.
trait Lane<const N: usize>: Number {
    fn read(bytes: [u8; N]) -> Self;
    fn bytes(self) -> [u8; N];
    /// `new - old`, wrapping; never asked of floating-point numbers.
    fn minus(new: [u8; N], old: [u8; N]) -> Self;
    /// `old + self`, wrapping.
    fn plus(self, old: [u8; N]) -> [u8; N];
}

macro_rules! lanes {
    ($($bytes:literal $bits:ident: $($number:ident)*;)*) => {$($(
        impl Lane<$bytes> for $number {
            fn read(bytes: [u8; $bytes]) -> Self { Self::from_le_bytes(bytes) }
            fn bytes(self) -> [u8; $bytes] { self.to_le_bytes() }
            fn minus(new: [u8; $bytes], old: [u8; $bytes]) -> Self {
                let difference = $bits::from_le_bytes(new).wrapping_sub($bits::from_le_bytes(old));
                Self::from_le_bytes(difference.to_le_bytes())
            }
            fn plus(self, old: [u8; $bytes]) -> [u8; $bytes] {
                $bits::from_le_bytes(old).wrapping_add($bits::from_le_bytes(self.to_le_bytes())).to_le_bytes()
            }
        }
    )*)*};
}
lanes! {
    1 u8: u8;
    2 u16: u16 f16;
    4 u32: u32 f32;
    8 u64: u64;
}

/// The thread's numbers, kept from part to part.
fn numbers<T: Number>(scratch: &mut Scratch) -> Result<&mut Vec<T>> {
    let kept = scratch.numbers.get_or_insert_with(|| Box::new(Vec::<T>::new()));
    if !kept.is::<Vec<T>>() {
        *kept = Box::new(Vec::<T>::new());
    }
    kept.downcast_mut().ok_or_else(|| broken("pcodec", "the numbers have another type"))
}

fn encode<const N: usize, T: Lane<N>>(
    part: &Part<'_>,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Result<()> {
    let numbers = numbers::<T>(scratch)?;
    let (new, old) = (part.current.as_chunks::<N>().0, part.parent.as_chunks::<N>().0);
    numbers.clear();
    match part.kind.mode {
        Mode::Delta => numbers.extend(new.iter().zip(old).map(|(&new, &old)| T::minus(new, old))),
        Mode::Base => numbers.extend(new.iter().map(|&new| T::read(new))),
    }
    let mut config = ChunkConfig::default().with_compression_level(8);
    config.enable_8_bit = true;
    simple_compress_into(numbers, &config, out).map_err(|error| broken("pcodec", error))?;
    Ok(())
}

fn decode<const N: usize, T: Lane<N>>(
    mode: Mode,
    encoded: &[u8],
    scratch: &mut Scratch,
    target: &mut [u8],
) -> Result<()> {
    let numbers = numbers::<T>(scratch)?;
    let target = target.as_chunks_mut::<N>().0;
    // What an earlier part left is overwritten.
    numbers.resize(target.len(), T::read([0; N]));
    let done = simple_decompress_into(encoded, numbers).map_err(|error| broken("pcodec", error))?;
    if done.n_processed != target.len() {
        return Err(broken("pcodec", format!("wanted {} numbers, found {}", target.len(), done.n_processed)));
    }
    for (element, number) in target.iter_mut().zip(numbers) {
        *element = match mode {
            Mode::Delta => number.plus(*element),
            Mode::Base => number.bytes(),
        };
    }
    Ok(())
}
