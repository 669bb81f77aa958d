//! One tensor of a delta: a zstd frame of what changed, made and applied.

use std::io::Write as _;

use towline_core::{Error, Result};
use zstd::stream::write::Encoder;
use zstd::zstd_safe::{
    self, DCtx, DParameter, InBuffer, OutBuffer, find_frame_compressed_size, get_dict_id_from_frame,
    get_error_name, get_frame_content_size,
};

use super::Encoding;
use super::checksum::{Checksum, Hasher};

/// Bytes that are worked on at once, so that they stay in the cache.
const PIECE: usize = 64 << 10;
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// A window that every reader of the format takes, as a power of two: 8 MiB.
const WINDOW_LOG: u32 = 23;
/// The largest window that is read where the tensor is as large: 128 MiB, what zstd writes at its highest level.
const MAX_WINDOW_LOG: u32 = 27;

/// The frame that turns `old` into `new`, which are equally long.
pub(super) fn encode(encoding: Encoding, level: i32, old: &[u8], new: &[u8]) -> Result<Vec<u8>> {
    let failed = |error: std::io::Error| Error::unavailable("zstd could not compress").with_source(error);
    let level = level.clamp(zstd_safe::min_c_level(), zstd_safe::max_c_level());
    let mut out = Encoder::new(Vec::new(), level).map_err(failed)?;
    // Readers want the length in the frame's header.
    let mut pledge = |length: usize| out.set_pledged_src_size(Some(length as u64)).map_err(failed);
    match encoding {
        Encoding::Xor => {
            pledge(new.len())?;
            let mut mask = Vec::with_capacity(PIECE);
            for (old, new) in old.chunks(PIECE).zip(new.chunks(PIECE)) {
                mask.clear();
                mask.extend(old.iter().zip(new).map(|(old, new)| old ^ new));
                out.write_all(&mask).map_err(failed)?;
            }
        }
        Encoding::Overwrite => {
            let wide = || {
                Error::unsupported(format!(
                    "overwrite has positions of 32 bits: a tensor of {} bytes has more",
                    new.len()
                ))
                .with_help("write the delta as xor")
            };
            u32::try_from(new.len()).map_err(|_| wide())?;
            let changes = || old.iter().zip(new).enumerate().filter(|(_, (old, new))| old != new);
            let count = changes().count();
            pledge(4 + 5 * count)?;
            out.write_all(&u32::try_from(count).map_err(|_| wide())?.to_le_bytes()).map_err(failed)?;
            let mut piece = Vec::with_capacity(PIECE + 4);
            for (at, _) in changes() {
                piece.extend_from_slice(&u32::try_from(at).map_err(|_| wide())?.to_le_bytes());
                if piece.len() >= PIECE {
                    out.write_all(&piece).map_err(failed)?;
                    piece.clear();
                }
            }
            for (_, (_, new)) in changes() {
                piece.push(*new);
                if piece.len() >= PIECE {
                    out.write_all(&piece).map_err(failed)?;
                    piece.clear();
                }
            }
            out.write_all(&piece).map_err(failed)?;
        }
    }
    out.finish().map_err(failed)
}

/// Applies a frame to `target`, which holds the old bytes, and answers the checksum of all of it. After an error the
/// target is undefined. Beyond what it is given it takes some 128 KiB, zstd's window (at most 8 MiB, or 128 MiB where
/// the tensor is that large), and for `overwrite` at most 8 bytes for each byte that changes.
pub(super) fn apply(
    encoding: Encoding,
    checksum: Checksum,
    frame: &[u8],
    target: &mut [u8],
) -> Result<String> {
    let mut hasher = checksum.hasher();
    match encoding {
        Encoding::Xor => xor(frame, target, &mut hasher)?,
        Encoding::Overwrite => {
            let most = target.len().saturating_mul(5).saturating_add(4);
            let mut scatter =
                Scatter { target, word: Vec::new(), count: None, positions: Vec::new(), values: 0 };
            unpack(frame, most, |piece| scatter.push(piece))?;
            scatter.finish()?;
            hasher.update(target);
        }
    }
    Ok(hasher.finish())
}

fn xor(frame: &[u8], target: &mut [u8], hasher: &mut Hasher) -> Result<()> {
    let length = target.len();
    let mut rest = target;
    let done = unpack(frame, length, |piece| {
        // There is never more than fits.
        let (place, behind) = std::mem::take(&mut rest).split_at_mut(piece.len());
        place.iter_mut().zip(piece).for_each(|(byte, mask)| *byte ^= mask);
        hasher.update(place);
        rest = behind;
        Ok(())
    })?;
    if done == length {
        return Ok(());
    }
    Err(bad(&format!("wanted {length} bytes, found {done}")))
}

/// The count, the positions and the values of `overwrite`, which come in pieces.
struct Scatter<'a> {
    target: &'a mut [u8],
    /// The beginning of a word.
    word: Vec<u8>,
    count: Option<usize>,
    positions: Vec<u32>,
    /// Values that are in their places.
    values: usize,
}

impl Scatter<'_> {
    fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() && self.count.is_none_or(|count| self.positions.len() < count) {
            let (taken, rest) = bytes.split_at(bytes.len().min(4 - self.word.len()));
            self.word.extend_from_slice(taken);
            bytes = rest;
            if let Ok(word) = <[u8; 4]>::try_from(self.word.as_slice()) {
                self.word.clear();
                self.take(u32::from_le_bytes(word))?;
            }
        }
        for byte in bytes {
            let place = self.positions.get(self.values).and_then(|&at| self.target.get_mut(at as usize));
            let place =
                place.ok_or_else(|| bad(&format!("more values than the {} positions", self.values)))?;
            *place = *byte;
            self.values += 1;
        }
        Ok(())
    }

    fn take(&mut self, word: u32) -> Result<()> {
        let length = self.target.len();
        if self.count.is_none() {
            if word as usize > length {
                return Err(bad(&format!("it changes {word} of {length} bytes")));
            }
            self.count = Some(word as usize);
            return Ok(());
        }
        if word as usize >= length || self.positions.last().is_some_and(|last| *last >= word) {
            let last = self.positions.last();
            return Err(bad(&format!("position {word} behind {last:?} in a tensor of {length} bytes")));
        }
        self.positions.push(word);
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        if self.count == Some(self.values) {
            return Ok(());
        }
        Err(bad(&format!("it changes {:?} bytes and holds {} values", self.count, self.values)))
    }
}

/// Decodes a frame that is whole and stands alone, piece by piece, to at most `most` bytes. Answers how many.
fn unpack(frame: &[u8], most: usize, mut piece: impl FnMut(&[u8]) -> Result<()>) -> Result<usize> {
    if !frame.starts_with(&MAGIC) {
        return Err(bad("it does not begin as one"));
    }
    match find_frame_compressed_size(frame) {
        Err(code) => return Err(bad(get_error_name(code))),
        Ok(length) if length != frame.len() => {
            return Err(bad(&format!("it has {} bytes behind its end", frame.len().saturating_sub(length))));
        }
        Ok(_) => {}
    }
    if let Some(id) = get_dict_id_from_frame(frame) {
        return Err(bad(&format!("it needs dictionary {id}")));
    }
    let content = get_frame_content_size(frame).map_err(|_| bad("its header cannot be read"))?;
    if content.is_some_and(|content| content > most as u64) {
        return Err(bad(&format!("it claims to hold {content:?} bytes, at most {most} fit")));
    }
    let mut context =
        DCtx::try_create().ok_or_else(|| Error::unavailable("zstd found no memory for a decoder"))?;
    let window = most.max(1).ilog2().saturating_add(1).clamp(WINDOW_LOG, MAX_WINDOW_LOG);
    context.set_parameter(DParameter::WindowLogMax(window)).map_err(|code| bad(get_error_name(code)))?;
    let mut buffer = vec![0; PIECE];
    let mut input = InBuffer::around(frame);
    let mut done = 0usize;
    loop {
        let before = input.pos();
        let mut output = OutBuffer::around(buffer.as_mut_slice());
        let left =
            context.decompress_stream(&mut output, &mut input).map_err(|code| bad(get_error_name(code)))?;
        let found = output.as_slice();
        done = done.saturating_add(found.len());
        if done > most {
            return Err(bad(&format!("it holds more than the {most} bytes that fit")));
        }
        piece(found)?;
        if left == 0 {
            break;
        }
        if found.is_empty() && input.pos() == before {
            return Err(bad("it is cut short"));
        }
    }
    if input.pos() == frame.len() {
        return Ok(done);
    }
    Err(bad("it has bytes behind its end"))
}

fn bad(why: &str) -> Error {
    Error::corrupt(format!("zstd frame: {why}")).with_help("copy the folder again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_core::ErrorKind;
    use zstd::stream::raw::CParameter;

    fn pair(length: usize, every: usize) -> (Vec<u8>, Vec<u8>) {
        let old: Vec<u8> = (0..length).map(|at| (at * at % 251) as u8).collect();
        let mut new = old.clone();
        new.iter_mut().step_by(every).for_each(|byte| *byte ^= 0x55);
        (old, new)
    }

    #[test]
    fn frames_come_back_at_every_length() {
        for encoding in [Encoding::Xor, Encoding::Overwrite] {
            for length in [0, 1, 2, 3, 5, 7, 255, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7] {
                for every in [1, 2, 97, length.max(1)] {
                    let (old, new) = pair(length, every);
                    let frame = encode(encoding, 1, &old, &new).unwrap();
                    assert!(get_frame_content_size(&frame).unwrap().is_some());
                    let mut target = old.clone();
                    let found = apply(encoding, Checksum::Xxh3, &frame, &mut target).unwrap();
                    assert!(target == new, "{encoding} {length} {every}");
                    assert_eq!(found, Checksum::Xxh3.of(&new));
                }
            }
        }
    }

    #[test]
    fn a_bomb_and_a_cut_frame_are_refused() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        assert!(bomb.len() < 10_000);
        let mut unsized_bomb = Encoder::new(Vec::new(), 1).unwrap();
        unsized_bomb.include_contentsize(false).unwrap();
        unsized_bomb.write_all(&vec![0; 64 << 20]).unwrap();
        let unsized_bomb = unsized_bomb.finish().unwrap();
        let (old, new) = pair(1000, 3);
        for encoding in [Encoding::Xor, Encoding::Overwrite] {
            for frame in [&bomb, &unsized_bomb] {
                let error = apply(encoding, Checksum::Xxh3, frame, &mut old.clone()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            }
            let frame = encode(encoding, 1, &old, &new).unwrap();
            for length in 0..frame.len() {
                let cut = &frame[..length];
                let error = apply(encoding, Checksum::Xxh3, cut, &mut old.clone()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            }
            let twice = [&frame[..], &frame[..]].concat();
            assert!(apply(encoding, Checksum::Xxh3, &twice, &mut old.clone()).is_err());
            let other = encode(encoding, 1, &old[..999], &new[..999]).unwrap();
            let shorter = apply(encoding, Checksum::Xxh3, &other, &mut old.clone());
            // Positions and values fit a longer tensor too: there the checksum tells.
            assert_eq!(shorter.is_err(), encoding == Encoding::Xor);
        }
    }

    #[test]
    fn frames_that_do_not_tell_their_length_are_read() {
        let (old, new) = pair(3 * PIECE + 1, 11);
        let mask: Vec<u8> = old.iter().zip(&new).map(|(old, new)| old ^ new).collect();
        let mut stream = Encoder::new(Vec::new(), 19).unwrap();
        stream.include_contentsize(false).unwrap();
        stream.include_checksum(true).unwrap();
        stream.write_all(&mask).unwrap();
        let frame = stream.finish().unwrap();
        assert_eq!(get_frame_content_size(&frame).unwrap(), None);
        let mut target = old;
        let found = apply(Encoding::Xor, Checksum::Blake3, &frame, &mut target).unwrap();
        assert!(target == new && found == Checksum::Blake3.of(&new));
        // One byte more or less than the tensor has.
        for length in [mask.len() - 1, mask.len() + 1] {
            let error = apply(Encoding::Xor, Checksum::Blake3, &frame, &mut vec![0; length]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
    }

    #[test]
    fn a_window_that_the_tensor_does_not_need_is_refused() {
        let mut wide = Encoder::new(Vec::new(), 1).unwrap();
        wide.include_contentsize(false).unwrap();
        wide.set_parameter(CParameter::WindowLog(27)).unwrap();
        wide.write_all(&[0; 1000]).unwrap();
        let frame = wide.finish().unwrap();
        let error = apply(Encoding::Xor, Checksum::Xxh3, &frame, &mut [0; 1000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }

    #[test]
    fn overwrites_that_do_not_fit_are_refused() {
        let words = |words: &[u32], values: &[u8]| {
            let mut plain: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            plain.extend_from_slice(values);
            let mut target = [0u8; 8];
            let frame = zstd::bulk::compress(&plain, 1).unwrap();
            apply(Encoding::Overwrite, Checksum::Adler32, &frame, &mut target).map(|_| target)
        };
        assert_eq!(words(&[2, 0, 7], &[1, 2]).unwrap(), [1, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(words(&[0], &[]).unwrap(), [0; 8]);
        for (bad, values) in [
            (&[9u32, 0][..], &[1u8][..]),
            (&[u32::MAX], &[]),
            (&[1, 8], &[1]),
            (&[2, 1, 1], &[1, 2]),
            (&[2, 2, 1], &[1, 2]),
            (&[2, 0, 1], &[1]),
            (&[2, 0, 1], &[1, 2, 3]),
            (&[2, 0], &[]),
            (&[], &[]),
            (&[], &[1, 2]),
        ] {
            assert_eq!(words(bad, values).unwrap_err().kind(), ErrorKind::Corrupt, "{bad:?} {values:?}");
        }
    }
}
