//! The codec trait: one unit of one tensor to an encoded frame and back.

use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{CodecId, DType, Error, Result, TensorMeta};

/// Encodes weights, whole or as the difference from a parent.
///
/// Pure CPU: equal input gives equal output, on every machine and thread count. Calls may run at once from
/// several threads. The framing layer ([`crate::pipeline`], [`crate::shard`]) cuts tensors into units, runs them in
/// parallel and checks the digests; a codec sees bytes only.
///
/// # Implement it like this
/// ```
/// use towline_core::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};
///
/// /// Stores what differs from the parent as a mask, byte by byte.
/// #[derive(Debug)]
/// struct Xor;
///
/// impl Codec for Xor {
///     fn id(&self) -> CodecId { CodecId::of("xor") }
///     fn unit(&self) -> Unit { Unit::Whole }
///     fn modes(&self) -> Modes { Modes::Delta }
///     fn encode(&self, unit: &UnitMeta<'_>, parent: Option<&[u8]>, current: &[u8], out: &mut Vec<u8>) -> Result<()> {
///         let parent = unit.parent(parent)?;
///         out.extend(current.iter().zip(parent).map(|(new, old)| new ^ old));
///         Ok(())
///     }
///     fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
///         unit.check_mode(mode, self.modes())?;
///         if encoded.len() != target.len() {
///             return Err(Error::corrupt(format!("wanted {} bytes, found {}", target.len(), encoded.len())));
///         }
///         target.iter_mut().zip(encoded).for_each(|(byte, mask)| *byte ^= mask);
///         Ok(())
///     }
/// }
/// ```
pub trait Codec: Debug + Send + Sync + 'static {
    /// The id that manifests record. It never changes for a format.
    fn id(&self) -> CodecId;

    /// How tensors are cut before they are encoded.
    fn unit(&self) -> Unit;

    /// Whether it encodes bases, deltas or both.
    fn modes(&self) -> Modes;

    /// How encoded tensors are put into files. Only the public formats change the default.
    fn framing(&self) -> Framing {
        Framing::Container
    }

    /// Appends the frame of one unit to `out`, which it neither reads nor shortens. `parent` is `Some` for a delta
    /// and then as long as `current`.
    ///
    /// # Errors
    /// `Unsupported` for a mode or element type that the codec does not take.
    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()>;

    /// As [`Codec::encode`], and says how far it has read: calls `read` with the end of each stretch of the unit, in
    /// order, while the stretch's old and new bytes are in the processor's cache. The pipeline then digests them
    /// without fetching them again. A codec that took the digest in its own pass hands it over: the
    /// [`block_digest`](crate::block_digest) of the new bytes since the last call, which are a block of
    /// [`DIGEST_BLOCK`](crate::DIGEST_BLOCK) of the unit, or its last and shorter one. What is not told by the end
    /// counts as read then. Default: tells nothing.
    ///
    /// # Errors
    /// As [`Codec::encode`].
    fn encode_reading(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
        _read: &mut dyn FnMut(usize, Option<u128>),
    ) -> Result<()> {
        self.encode(unit, parent, current, out)
    }

    /// Fills `target` from a frame. It holds the parent's bytes for [`Mode::Delta`] and anything for
    /// [`Mode::Base`]. After `Ok` it is wholly written; after an error it is undefined.
    ///
    /// # Errors
    /// `Corrupt` for a frame that is cut short or was not made by this codec for this unit, as far as the format
    /// shows it. Noise never panics and never allocates more than a constant and a small multiple of what is there.
    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()>;

    /// As [`Codec::decode`], and hands each stretch of the result to `written`, in order, when it is final and still in
    /// the processor's cache. The pipeline then digests it without fetching it again, unless the codec took the digest
    /// itself: the stretch is a block then, as for [`Codec::encode_reading`]. What is not handed on by the end counts as
    /// written then. Default: hands on nothing.
    ///
    /// # Errors
    /// As [`Codec::decode`].
    fn decode_writing(
        &self,
        unit: &UnitMeta<'_>,
        mode: Mode,
        encoded: &[u8],
        target: &mut [u8],
        _written: &mut dyn FnMut(&[u8], Option<u128>),
    ) -> Result<()> {
        self.decode(unit, mode, encoded, target)
    }

    /// The checksum of a new tensor that the format stores beside it, for [`Framing::Safetensors`]: of the bytes whose
    /// checksum is `before`, if there are any, and `more` behind them.
    fn checksum(&self, _before: Option<u32>, _more: &[u8]) -> Option<u32> {
        None
    }

    /// How many elements the frame of a delta changes, where the format tells it without decoding. Default: it does
    /// not, and the pipeline compares the elements itself.
    fn changed(&self, _unit: &UnitMeta<'_>, _encoded: &[u8]) -> Option<u64> {
        None
    }

    /// Takes a delta back: `target` holds the new bytes and receives the parent's.
    ///
    /// # Errors
    /// `Unsupported` where the format cannot, which is the default.
    fn revert(&self, _unit: &UnitMeta<'_>, _encoded: &[u8], _target: &mut [u8]) -> Result<()> {
        Err(Error::unsupported(format!("codec {} cannot take a delta back", self.id()))
            .with_help("restore the parent from the store"))
    }

    /// Appends to `out` the delta that does what `first` and then `second` do, without the weights.
    ///
    /// # Errors
    /// `Unsupported` where the format cannot, which is the default.
    fn compose(&self, _unit: &UnitMeta<'_>, _first: &[u8], _second: &[u8], _out: &mut Vec<u8>) -> Result<()> {
        Err(Error::unsupported(format!("codec {} cannot join two deltas", self.id()))
            .with_help("apply them one after the other"))
    }
}

macro_rules! forward {
    ($($pointer:ident)*) => {$(
        #[deny(clippy::missing_trait_methods)]
        impl<T: Codec + ?Sized> Codec for $pointer<T> {
            fn id(&self) -> CodecId { (**self).id() }
            fn unit(&self) -> Unit { (**self).unit() }
            fn modes(&self) -> Modes { (**self).modes() }
            fn framing(&self) -> Framing { (**self).framing() }
            fn encode(&self, unit: &UnitMeta<'_>, parent: Option<&[u8]>, current: &[u8], out: &mut Vec<u8>) -> Result<()> {
                (**self).encode(unit, parent, current, out)
            }
            fn encode_reading(&self, unit: &UnitMeta<'_>, parent: Option<&[u8]>, current: &[u8], out: &mut Vec<u8>, read: &mut dyn FnMut(usize, Option<u128>)) -> Result<()> {
                (**self).encode_reading(unit, parent, current, out, read)
            }
            fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
                (**self).decode(unit, mode, encoded, target)
            }
            fn decode_writing(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8], written: &mut dyn FnMut(&[u8], Option<u128>)) -> Result<()> {
                (**self).decode_writing(unit, mode, encoded, target, written)
            }
            fn checksum(&self, before: Option<u32>, more: &[u8]) -> Option<u32> { (**self).checksum(before, more) }
            fn changed(&self, unit: &UnitMeta<'_>, encoded: &[u8]) -> Option<u64> {
                (**self).changed(unit, encoded)
            }
            fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
                (**self).revert(unit, encoded, target)
            }
            fn compose(&self, unit: &UnitMeta<'_>, first: &[u8], second: &[u8], out: &mut Vec<u8>) -> Result<()> {
                (**self).compose(unit, first, second, out)
            }
        }
    )*};
}
forward!(Arc Box);

/// Whether bytes stand alone or on a parent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::exhaustive_enums, reason = "weights stand alone or on a parent; there is no third way")]
pub enum Mode {
    /// Whole weights.
    Base,
    /// The difference from a parent.
    Delta,
}

/// The modes that a codec takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "every set of the two modes but the empty one")]
pub enum Modes {
    /// Whole weights only.
    Base,
    /// Differences only.
    Delta,
    /// Both.
    Both,
}

impl Modes {
    /// Whether `mode` is among them.
    #[must_use]
    pub fn contains(self, mode: Mode) -> bool {
        match (self, mode) {
            (Self::Both, _) | (Self::Base, Mode::Base) | (Self::Delta, Mode::Delta) => true,
            (Self::Base, Mode::Delta) | (Self::Delta, Mode::Base) => false,
        }
    }
}

/// How a codec wants tensors cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unit {
    /// Not at all: the format knows only whole tensors.
    Whole,
    /// Into blocks of this many bytes, a multiple of 8 so that no element of 1 to 8 bytes is cut; the last may be
    /// shorter. Sizes that divide 1 MiB, or are a multiple of it, are digested as they are encoded; tensors of others
    /// are one piece of work each.
    Block(NonZeroUsize),
}

impl Unit {
    /// The ranges of a tensor of `byte_len` bytes. An empty tensor is one empty unit when whole, none in blocks.
    pub fn ranges(self, byte_len: usize) -> impl ExactSizeIterator<Item = std::ops::Range<usize>> + Clone {
        let (size, count) = match self {
            Self::Whole => (byte_len, 1),
            Self::Block(size) => (size.get(), byte_len.div_ceil(size.get())),
        };
        (0..count).map(move |index| index * size..((index + 1).saturating_mul(size)).min(byte_len))
    }
}

/// How the frames of a codec are put into files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Framing {
    /// Towline's own container ([`crate::shard`]).
    Container,
    /// A safetensors file with one `U8` tensor for each frame and the checksums in `__metadata__`: the arc formats.
    Safetensors,
}

/// Which part of which tensor a frame holds.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct UnitMeta<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: DType,
    /// Its whole shape.
    pub shape: &'a [usize],
    /// The first byte of the unit within the tensor.
    pub offset: usize,
    /// The bytes of the unit.
    pub len: usize,
}

impl<'a> UnitMeta<'a> {
    /// The unit of `tensor` that covers `range`.
    #[must_use]
    pub fn new(tensor: &'a TensorMeta, range: std::ops::Range<usize>) -> Self {
        Self {
            name: tensor.name(),
            dtype: tensor.dtype(),
            shape: tensor.shape(),
            offset: range.start,
            len: range.len(),
        }
    }

    /// The parent's bytes, for a codec that encodes deltas only.
    ///
    /// # Errors
    /// `Unsupported` if there is none.
    pub fn parent<'b>(&self, parent: Option<&'b [u8]>) -> Result<&'b [u8]> {
        parent.ok_or_else(|| {
            Error::unsupported(format!("tensor `{}`: this codec encodes deltas only", self.name))
                .with_help("give a parent, or store the base with `raw`, `zstd` or `lz4`")
        })
    }

    /// Checks `mode` against what the codec takes.
    ///
    /// # Errors
    /// `Unsupported` if it is not among them.
    pub fn check_mode(&self, mode: Mode, modes: Modes) -> Result<()> {
        if modes.contains(mode) {
            return Ok(());
        }
        Err(Error::unsupported(format!("tensor `{}`: this codec has no {mode:?} mode", self.name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trait_is_object_safe() {
        fn shared<T: Send + Sync + ?Sized>() {}
        shared::<dyn Codec>();
    }

    #[test]
    fn units_tile_a_tensor() {
        let block = Unit::Block(NonZeroUsize::new(24).unwrap());
        assert_eq!(block.ranges(50).collect::<Vec<_>>(), [0..24, 24..48, 48..50]);
        assert_eq!(block.ranges(0).count(), 0);
        assert!(Unit::Whole.ranges(0).eq(std::iter::once(0..0)));
    }
}
