//! arc_v1: one zlib stream of the XOR.

use flate2::{Decompress, FlushDecompress, Status};
use towline_core::{Codec, CodecId, Error, Framing, Mode, Modes, Result, Unit, UnitMeta};

use super::{CHUNK, adler_of_more, deflate, joined_mask, moved, parent_of};
use crate::xor::xor_into;

/// zlib (RFC 1950) of the XOR with the parent; also called `xor_one_to_one_zlib`. Our streams have runs and
/// frequencies only, which on training steps makes them smaller than those of any level.
#[derive(Debug, Clone, Copy, Default)]
pub struct ArcV1;

impl Codec for ArcV1 {
    fn id(&self) -> CodecId {
        CodecId::of("arc_v1")
    }

    fn unit(&self) -> Unit {
        Unit::Whole
    }

    fn modes(&self) -> Modes {
        Modes::Delta
    }

    fn framing(&self) -> Framing {
        Framing::Safetensors
    }

    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let parent = parent_of(unit, parent, current)?;
        deflate::write_xor(current, parent, out);
        Ok(())
    }

    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        unit.check_mode(mode, self.modes())?;
        let bad = |why: &str| {
            Error::corrupt(format!("arc_v1 payload: {why}")).with_help("copy the delta file again")
        };
        let mut inflate = Decompress::new(true);
        let mut buffer = vec![0; CHUNK];
        let (mut read, mut done) = (0, 0);
        loop {
            let (read_before, out_before) = (inflate.total_in(), inflate.total_out());
            let status = inflate
                .decompress(encoded.get(read..).unwrap_or_default(), &mut buffer, FlushDecompress::None)
                .map_err(|error| bad("no zlib stream").with_source(error))?;
            let consumed = moved(read_before, inflate.total_in());
            let produced = moved(out_before, inflate.total_out());
            let piece = buffer.get(..produced).unwrap_or_default();
            let place = target
                .get_mut(done..done + produced)
                .ok_or_else(|| bad("it holds more bytes than the tensor"))?;
            xor_into(place, piece);
            read += consumed;
            done += produced;
            match status {
                Status::StreamEnd => break,
                Status::Ok | Status::BufError if consumed == 0 && produced == 0 => {
                    return Err(bad("it is cut short"));
                }
                Status::Ok | Status::BufError => {}
            }
        }
        if done != target.len() {
            return Err(bad(&format!("wanted {} bytes, found {done}", target.len())));
        }
        if read != encoded.len() {
            return Err(bad(&format!("{} bytes behind its end", encoded.len() - read)));
        }
        Ok(())
    }

    fn checksum(&self, before: Option<u32>, more: &[u8]) -> Option<u32> {
        Some(adler_of_more(before, more))
    }

    fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode(unit, Mode::Delta, encoded, target)
    }

    fn compose(&self, unit: &UnitMeta<'_>, first: &[u8], second: &[u8], out: &mut Vec<u8>) -> Result<()> {
        deflate::write_plain(&joined_mask(self, unit, first, second)?, out);
        Ok(())
    }
}
