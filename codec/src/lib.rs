//! The codecs of Towline: how the bytes of a tensor, or their difference from a parent's, become a frame.
//!
//! | id | unit | modes | frame |
//! |---|---|---|---|
//! | `raw` | block | base, delta | the current bytes |
//! | `octave` | block | base, delta | positions and steps by the octave of the old value |
//! | `zstd` | block | base, delta | zstd of the bytes, or of their XOR with the parent's |
//! | `lz4` | block | base, delta | the same with LZ4: faster, larger |
//! | `arc_v1` | whole tensor | delta | zlib of the XOR, in a safetensors file |
//! | `arc_v2` | whole tensor | delta | zstd of the XOR, in a safetensors file |
//! | `arc_v3` | whole tensor | delta | positions and mantissas of the changed elements, or an `arc_v2` frame |
//!
//! The `arc` formats are those of the public package `fireworks-delta-compression`. `zstd` and `arc_*` need the
//! feature `zstd`, `lz4` needs the feature `lz4`; both are on by default.
//!
//! # Bounds
//! A decoder takes any bytes. It answers with an error or a tensor, never with a panic. Beyond what it is given it
//! allocates at most, for a unit of `n` bytes:
//!
//! | codec | at most |
//! |---|---|
//! | `raw` | nothing |
//! | `octave` | 16 `n` + 1 MiB, kept by the thread for its next unit; `n` is at most 2 MiB |
//! | `zstd`, `lz4` | `n` + 1 MiB |
//! | `arc_v1` | 1 MiB |
//! | `arc_v2` | min(`n`, 128 MiB) + 1 MiB |
//! | `arc_v3` | 6 MiB + twice 20, 21 or 23 bytes for each element of 1, 2 or 4 bytes |
//!
//! A payload of `arc_v3` is bounded by what its tensor can need; real ones take a few bytes for each element that
//! changed.
//!
//! # Revert and compose
//! A delta that is a XOR works both ways, and two of them join without the weights, because the XOR of two masks does
//! what both do: `zstd`, `lz4`, `arc_v1` and `arc_v2` can do both. `raw` holds the new bytes only: what was there
//! before is gone. `arc_v3` can do neither: a change of sign or exponent is stored as the new value alone, and the
//! difference of two mantissas does not join with a XOR, which its other form is.
//!
//! ```
//! use towline_core::{DType, Mode, TensorMeta, UnitMeta};
//!
//! let codec = towline_codec::by_id("raw")?;
//! let meta = TensorMeta::new("weight", DType::F16, [2])?;
//! let unit = UnitMeta::new(&meta, 0..4);
//! let mut frame = Vec::new();
//! codec.encode(&unit, None, &[1, 2, 3, 4], &mut frame)?;
//! let mut target = [0; 4];
//! codec.decode(&unit, Mode::Base, &frame, &mut target)?;
//! assert_eq!(target, [1, 2, 3, 4]);
//! # Ok::<(), towline_core::Error>(())
//! ```

#[cfg(feature = "zstd")]
mod arc;
mod block;
#[cfg(feature = "lz4")]
mod lz4;
mod octave;
mod raw;
mod spare;
mod tally;
mod xor;
mod xxh3;
#[cfg(feature = "zstd")]
mod zframe;
#[cfg(feature = "zstd")]
mod zstandard;

use std::sync::Arc;

use towline_core::{Codec, CodecId, Error, Result};

#[cfg(feature = "zstd")]
pub use arc::{ArcV1, ArcV2, ArcV3};
#[cfg(feature = "lz4")]
pub use lz4::Lz4;
pub use octave::{Instructions, Octave};
pub use raw::Raw;
#[cfg(feature = "zstd")]
pub use zstandard::Zstd;

/// The first bytes of an `arc_v3` envelope.
const ARC_V3_TAG: &[u8] = b"ARC3_ENVELOPE\0";
/// The longest safetensors header of an `arc_v3` fallback that is read, in bytes. Real ones have about 130.
const MAX_FALLBACK_HEADER: usize = 64 << 10;

/// Every codec of the enabled features, with its default settings.
#[must_use]
pub fn all() -> Vec<Arc<dyn Codec>> {
    vec![
        Arc::new(Raw),
        Arc::new(Octave::default()),
        #[cfg(feature = "zstd")]
        Arc::new(Zstd::default()),
        #[cfg(feature = "lz4")]
        Arc::new(Lz4),
        #[cfg(feature = "zstd")]
        Arc::new(ArcV1),
        #[cfg(feature = "zstd")]
        Arc::new(ArcV2),
        #[cfg(feature = "zstd")]
        Arc::new(ArcV3),
    ]
}

/// The codecs that encode deltas, best first: what `compression_format = auto` chooses from where a deployment
/// takes them all.
#[must_use]
pub fn auto_order() -> Vec<Arc<dyn Codec>> {
    let order = ["octave", "zstd", "arc_v3", "arc_v2", "lz4", "arc_v1", "raw"];
    order.iter().filter_map(|id| by_id(id).ok()).collect()
}

/// The codec for an id as people write it: case does not matter, and the public aliases `xor_one_to_one_zlib`
/// (`arc_v1`) and `xor_one_to_one_zstd` (`arc_v2`) are known.
///
/// # Errors
/// `Invalid` for an unknown id, `Unsupported` for one whose feature is off. Both list the ids that are there.
pub fn by_id(text: &str) -> Result<Arc<dyn Codec>> {
    let lower = text.to_ascii_lowercase();
    let wanted = match lower.as_str() {
        "xor_one_to_one_zlib" => "arc_v1",
        "xor_one_to_one_zstd" => "arc_v2",
        other => other,
    };
    let known = all();
    if let Some(codec) = known.iter().find(|codec| codec.id().as_str() == wanted) {
        return Ok(Arc::clone(codec));
    }
    let ids: Vec<_> = known.iter().map(|codec| codec.id().to_string()).collect();
    let help = format!("use one of {}", ids.join(", "));
    let feature = match wanted {
        "zstd" | "arc_v1" | "arc_v2" | "arc_v3" => "zstd",
        "lz4" => "lz4",
        _ => {
            let shown: String = text.chars().take(40).collect();
            return Err(Error::invalid(format!("`{}` is no codec", shown.escape_debug())).with_help(help));
        }
    };
    Err(Error::unsupported(format!("codec {wanted} is not built in"))
        .with_help(format!("{help}, or build towline-codec with the feature `{feature}`")))
}

/// The `arc` format of a delta file, from the payload of one of its tensors. The beginning of it is enough.
#[must_use]
pub fn recognise(first_payload: &[u8]) -> Option<CodecId> {
    // An envelope's tag, a zstd frame's magic number and the two bytes of a zlib header exclude each other. The
    // length before a fallback's header could pass for a zlib header, so the fallback is tried first.
    let zlib = |bytes: [u8; 2]| {
        bytes[0] & 0x0f == 8
            && bytes[0] >> 4 <= 7
            && bytes[1] & 0x20 == 0
            && u16::from_be_bytes(bytes).is_multiple_of(31)
    };
    let id = if first_payload.starts_with(ARC_V3_TAG) || fallback_header(first_payload).is_some() {
        "arc_v3"
    } else if first_payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        "arc_v2"
    } else if first_payload.first_chunk().is_some_and(|&bytes| zlib(bytes)) {
        "arc_v1"
    } else {
        return None;
    };
    Some(CodecId::of(id))
}

/// The length of the safetensors header at the start of an `arc_v3` fallback.
fn fallback_header(payload: &[u8]) -> Option<usize> {
    let (length, json) = payload.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    ((2..=MAX_FALLBACK_HEADER).contains(&length) && json.first() == Some(&b'{')).then_some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_and_unknown_ones_are_told_what_there_is() {
        for codec in all() {
            let id = codec.id();
            assert_eq!(by_id(id.as_str()).unwrap().id(), id);
            assert_eq!(by_id(&id.as_str().to_uppercase()).unwrap().id(), id);
        }
        let error = by_id("gzip\n").unwrap_err();
        assert!(error.message().contains("`gzip\\n`"), "{error}");
        assert!(error.help().unwrap().contains("raw"), "{error}");
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn aliases() {
        assert_eq!(by_id("XOR_one_to_one_zlib").unwrap().id().as_str(), "arc_v1");
        assert_eq!(by_id("xor_one_to_one_zstd").unwrap().id().as_str(), "arc_v2");
    }

    #[cfg(not(feature = "zstd"))]
    #[test]
    fn a_codec_that_is_not_built_in_names_its_feature() {
        assert!(by_id("arc_v2").unwrap_err().help().unwrap().contains("feature `zstd`"));
    }

    #[test]
    fn payloads_are_recognised() {
        let id = |bytes: &[u8]| recognise(bytes).map(String::from);
        assert_eq!(id(b"\x78\x9c\x03\x00").as_deref(), Some("arc_v1"));
        assert_eq!(id(b"\x28\xb5\x2f\xfd\x20").as_deref(), Some("arc_v2"));
        assert_eq!(id(b"ARC3_ENVELOPE\0\x80\x05").as_deref(), Some("arc_v3"));
        assert_eq!(id(b"\x78\x01\0\0\0\0\0\0{\"").as_deref(), Some("arc_v3"));
        for nothing in [&b""[..], b"\x78", b"ARC3", b"PK\x03\x04", b"\x78\xbb\0\0", b"{\"a\":1}"] {
            assert_eq!(id(nothing), None, "{nothing:?}");
        }
    }
}
