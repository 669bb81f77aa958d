//! The laws of codecs, for each codec.

use towline_core::codec_conformance;
use towline_core::testing::CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

codec_conformance!(raw, towline_codec::by_id("raw").unwrap());
codec_conformance!(octave, towline_codec::Octave::default());
codec_conformance!(
    octave_avx2,
    towline_codec::Octave::default().with_instructions(towline_codec::Instructions::Avx2)
);
codec_conformance!(
    octave_scalar,
    towline_codec::Octave::default().with_instructions(towline_codec::Instructions::Scalar)
);
#[cfg(feature = "lz4")]
codec_conformance!(lz4, towline_codec::by_id("lz4").unwrap());
#[cfg(feature = "zstd")]
codec_conformance!(zstd, towline_codec::by_id("zstd").unwrap());
#[cfg(feature = "zstd")]
codec_conformance!(zstd_19, towline_codec::Zstd::default().with_level(19));
#[cfg(feature = "zstd")]
codec_conformance!(arc_v1, towline_codec::by_id("arc_v1").unwrap());
#[cfg(feature = "zstd")]
codec_conformance!(arc_v2, towline_codec::by_id("arc_v2").unwrap());
#[cfg(feature = "zstd")]
codec_conformance!(arc_v3, towline_codec::by_id("arc_v3").unwrap());
