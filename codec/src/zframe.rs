//! One zstd frame, read strictly: its length and content size are known before anything is decoded.

mod bits;
mod codes;
mod fse;
mod huffman;
mod pack;
mod parts;
mod read_bits;
mod runs;
mod sequences;
mod unpack;
mod write;

pub(crate) use huffman::{code_lengths, count};
pub(crate) use parts::{Content, Parts, Plain, Xor};
pub(crate) use write::{BLOCK, Writer};

use towline_core::{Error, Result};
use zstd::zstd_safe::{
    self, DCtx, DParameter, InBuffer, OutBuffer, find_frame_compressed_size, get_dict_id_from_frame,
    get_error_name, get_frame_content_size,
};

use crate::xor::xor_into;

/// The largest window that is read, as a power of two: 128 MiB, what zstd itself writes at its highest level.
const MAX_WINDOW_LOG: u32 = 27;
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A frame that is whole, stands alone, needs no dictionary and says how many bytes it holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame<'a> {
    bytes: &'a [u8],
    content: usize,
}

impl<'a> Frame<'a> {
    /// Checks the frame's header and the chain of its blocks, without decoding them.
    pub(crate) fn open(bytes: &'a [u8]) -> Result<Self> {
        if !bytes.starts_with(&MAGIC) {
            return Err(bad("it does not begin as one"));
        }
        match find_frame_compressed_size(bytes) {
            Err(code) => return Err(bad(get_error_name(code))),
            Ok(length) if length != bytes.len() => {
                return Err(bad(&format!("it has {} bytes behind its end", bytes.len() - length)));
            }
            Ok(_) => {}
        }
        if let Some(id) = get_dict_id_from_frame(bytes) {
            return Err(bad(&format!("it needs dictionary {id}")));
        }
        let content = get_frame_content_size(bytes)
            .map_err(|_| bad("its header cannot be read"))?
            .ok_or_else(|| bad("it does not say how many bytes it holds"))?;
        let content =
            usize::try_from(content).map_err(|_| bad(&format!("it claims to hold {content} bytes")))?;
        Ok(Self { bytes, content })
    }

    /// The bytes that the frame says it holds.
    pub(crate) fn content(&self) -> usize {
        self.content
    }

    /// Fails unless the frame says that it holds `wanted` bytes.
    pub(crate) fn holds(self, wanted: usize) -> Result<Self> {
        match self.content {
            found if found == wanted => Ok(self),
            found => Err(bad(&format!("wanted {wanted} bytes, it holds {found}"))),
        }
    }

    /// Decodes into `target` in one go. The window is the target itself.
    pub(crate) fn read_into(self, target: &mut [u8]) -> Result<()> {
        let Self { bytes, content } = self.holds(target.len())?;
        let mut context = context()?;
        match context.decompress(target, bytes) {
            Ok(found) if found == content => Ok(()),
            Ok(found) => Err(bad(&format!("wanted {content} bytes, found {found}"))),
            Err(code) => Err(bad(get_error_name(code))),
        }
    }

    /// Decodes into a new buffer of [`Frame::content`] bytes, which the caller has found small enough.
    pub(crate) fn read_to_vec(self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.content];
        self.read_into(&mut bytes)?;
        Ok(bytes)
    }

    /// XORs the content into `target`, which is as long. Hands stretches that are done to `written`, in order.
    pub(crate) fn xor_into(self, target: &mut [u8], written: &mut dyn FnMut(&[u8])) -> Result<()> {
        let bytes = self.holds(target.len())?.bytes;
        let Err(done) = runs::xor(bytes, target, written) else { return Ok(()) };
        // From here on it is a frame of another writer, or a damaged one.
        let mut ready = done;
        let mut rest = target.get_mut(done..).unwrap_or_default();
        self.read_pieces(|piece| {
            let (skipped, piece) = piece.split_at(ready.min(piece.len()));
            ready -= skipped.len();
            let (place, behind) = std::mem::take(&mut rest).split_at_mut(piece.len());
            xor_into(place, piece);
            written(place);
            rest = behind;
        })
    }

    /// Decodes piece by piece. The pieces together have exactly [`Frame::content`] bytes after `Ok`, and never more.
    fn read_pieces(self, mut piece: impl FnMut(&[u8])) -> Result<()> {
        let mut context = context()?;
        context.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).map_err(failed)?;
        let mut buffer = vec![0; DCtx::out_size()];
        let mut input = InBuffer::around(self.bytes);
        let mut done = 0;
        loop {
            let before = input.pos();
            let mut output = OutBuffer::around(buffer.as_mut_slice());
            let left = context
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| bad(get_error_name(code)))?;
            let found = output.as_slice();
            done += found.len();
            if done > self.content {
                return Err(bad(&format!("it holds more than the {} bytes that it says", self.content)));
            }
            piece(found);
            if left == 0 {
                break;
            }
            if found.is_empty() && input.pos() == before {
                return Err(bad("it is cut short"));
            }
        }
        if done == self.content && input.pos() == self.bytes.len() {
            return Ok(());
        }
        Err(bad(&format!("wanted {} bytes, found {done}", self.content)))
    }
}

fn context() -> Result<DCtx<'static>> {
    DCtx::try_create().ok_or_else(|| Error::unavailable("zstd found no memory for a decoder"))
}

fn bad(why: &str) -> Error {
    Error::corrupt(format!("zstd frame: {why}")).with_help("copy the file again")
}

/// The answer of a zstd call that fails only for want of memory.
pub(crate) fn failed(code: zstd_safe::ErrorCode) -> Error {
    Error::internal(format!("zstd: {}", get_error_name(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, the same on each run.
    struct Noise(u64);

    impl Noise {
        fn next(&mut self) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 33) as usize
        }

        fn below(&mut self, limit: usize) -> usize {
            self.next() % limit
        }
    }

    /// Contents of many densities, alphabets and lengths, with runs of zeros and of other bytes.
    fn contents() -> impl Iterator<Item = Vec<u8>> {
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        let lengths = [
            0, 1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 1023, 4096, 65_791, 65_792, 131_072, 131_073,
            300_007,
        ];
        (0..400).map(move |index| {
            let length = if index < 40 { lengths[index % lengths.len()] } else { 1 + noise.below(300_000) };
            let every = [1, 2, 3, 9, 40, 700, 30_000, usize::MAX][noise.below(8)];
            let alphabet = [1, 2, 5, 30, 200, 255][noise.below(6)];
            let mut content = vec![if index % 5 == 0 { 7 } else { 0 }; length];
            let mut at = 0;
            while at < length {
                let steep = noise.below(alphabet) * noise.below(alphabet) / alphabet;
                content[at] = (255 - steep) as u8;
                if noise.below(20) == 0 {
                    let end = length.min(at + noise.below(50));
                    let byte = content[at];
                    content[at..end].fill(byte);
                }
                at = at.saturating_add(1 + noise.below(every.saturating_mul(2).min(1 << 30)));
            }
            content
        })
    }

    fn written(content: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        let mut writer = Writer::new(&mut frame, content.len());
        writer.write(content);
        writer.finish().unwrap();
        frame
    }

    #[test]
    fn the_library_and_the_reader_of_runs_read_what_is_written() {
        let (mut understood, mut all) = (0, 0);
        for content in contents() {
            let frame = written(&content);
            assert!(frame.len() <= content.len() + 32, "{} for {}", frame.len(), content.len());
            let opened = Frame::open(&frame).unwrap();
            assert_eq!(opened.content(), content.len());
            assert!(opened.read_to_vec().unwrap() == content, "{} bytes", content.len());
            // XORed into itself, nothing is left.
            let mut target = content.clone();
            understood += usize::from(runs::xor(&frame, &mut target, &mut |_| {}).is_ok());
            all += 1;
            let mut target = content.clone();
            opened.xor_into(&mut target, &mut |_| {}).unwrap();
            assert!(target.iter().all(|&byte| byte == 0), "{} bytes", content.len());
            let mut frame = Vec::new();
            let other: Vec<u8> = content.iter().map(|byte| byte ^ 0x5a).collect();
            Writer::new(&mut frame, content.len())
                .finish_with_xor(&other, &vec![0x5a; content.len()], &mut |_, _| {})
                .unwrap();
            assert!(
                Frame::open(&frame).unwrap().read_to_vec().unwrap() == content,
                "{} bytes",
                content.len()
            );
        }
        assert!(understood * 4 > all * 3, "{understood} of {all}");
    }

    #[test]
    fn frames_of_the_library_are_read_through_both_readers() {
        for (index, content) in contents().enumerate() {
            let frame =
                zstd::bulk::compress(&content, [1, 3, 19][index % 3].min(if index > 60 { 3 } else { 19 }))
                    .unwrap();
            let (mut target, mut seen) = (content.clone(), 0);
            let mut written = |bytes: &[u8]| {
                assert!(bytes.iter().all(|&byte| byte == 0));
                seen += bytes.len();
            };
            Frame::open(&frame).unwrap().xor_into(&mut target, &mut written).unwrap();
            assert_eq!(seen, content.len());
            assert!(target.iter().all(|&byte| byte == 0), "{} bytes", content.len());
        }
    }

    #[test]
    fn what_the_reader_of_runs_understands_the_library_reads_alike() {
        let mut noise = Noise(77);
        let mut understood = 0;
        for content in contents().filter(|content| content.len() < 100_000) {
            let frame = written(&content);
            for _ in 0..60 {
                let mut damaged = frame.clone();
                let at = noise.below(damaged.len());
                damaged[at] ^= 1 << noise.below(8);
                let Ok(opened) = Frame::open(&damaged).and_then(|frame| frame.holds(content.len())) else {
                    continue;
                };
                let mut target = vec![0; content.len()];
                if runs::xor(&damaged, &mut target, &mut |_| {}).is_ok() {
                    assert!(opened.read_to_vec().unwrap() == target, "byte {at} of {}", frame.len());
                    understood += 1;
                }
            }
        }
        assert!(understood > 1000, "{understood}");
    }

    #[test]
    fn every_byte_of_a_frame_of_equal_runs_is_as_strict_as_the_library() {
        // Literals and runs all have one length: their codes stand in the frame as they are.
        let content: Vec<u8> =
            (0..4096u32).map(|at| if at % 16 == 0 { 1 + (at / 16 % 5) as u8 } else { 0 }).collect();
        let frame = written(&content);
        let (mut understood, mut refused) = (0, 0);
        for at in 0..frame.len() {
            for value in 0..=255 {
                let mut damaged = frame.clone();
                damaged[at] = value;
                let Ok(opened) = Frame::open(&damaged).and_then(|frame| frame.holds(content.len())) else {
                    continue;
                };
                let mut target = vec![0; content.len()];
                if runs::xor(&damaged, &mut target, &mut |_| {}).is_ok() {
                    let read = opened.read_to_vec();
                    assert!(read.is_ok_and(|read| read == target), "byte {at} is {value}");
                    understood += 1;
                } else {
                    refused += 1;
                }
            }
        }
        assert!(understood > 1000 && refused > 1000, "{understood} {refused}");
    }

    #[test]
    fn a_damaged_block_leaves_those_before_it_right() {
        // Two blocks of many sequences each, which are decoded side by side.
        let mut noise = Noise(5);
        let mut content = vec![0; 2 * BLOCK];
        let mut at = 0;
        while at < content.len() {
            content[at] = 1 + noise.below(5) as u8;
            at += 7 + noise.below(60);
        }
        let frame = written(&content);
        // The header of a frame of the first block alone is 5 bytes shorter.
        let first = written(&content[..BLOCK]).len() + 5;
        let (mut refused, mut understood) = (0, 0);
        for _ in 0..3000 {
            let mut damaged = frame.clone();
            let at = noise.below(frame.len() - first) + first;
            damaged[at] ^= 1 << noise.below(8);
            let mut target = vec![0; content.len()];
            let mut seen = 0;
            match runs::xor(&damaged, &mut target, &mut |bytes| seen += bytes.len()) {
                Ok(()) => {
                    understood += 1;
                    assert!(zstd::bulk::decompress(&damaged, content.len()).is_ok_and(|read| read == target));
                }
                Err(done) => {
                    refused += 1;
                    assert!(seen >= BLOCK && done >= seen, "{at}: {seen}, {done}");
                }
            }
            assert!(target[..BLOCK] == content[..BLOCK], "{at} of {}", frame.len());
        }
        assert!(refused > 100 && understood > 100, "{refused} {understood}");
    }

    #[test]
    fn a_writer_that_was_given_too_little_or_too_much_fails() {
        for given in [99, 101, 400_000] {
            let mut frame = Vec::new();
            let mut writer = Writer::new(&mut frame, 100);
            writer.write(&vec![3; given]);
            assert!(writer.finish().is_err());
        }
    }
}
