//! One zstd frame, read strictly: its length and content size are known before anything is decoded.

use towline_core::{Error, Result};
use zstd::zstd_safe::{
    self, DCtx, DParameter, InBuffer, OutBuffer, find_frame_compressed_size, get_dict_id_from_frame,
    get_error_name, get_frame_content_size,
};

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

    /// Decodes piece by piece. The pieces together have exactly [`Frame::content`] bytes after `Ok`, and never more.
    pub(crate) fn read_pieces(self, mut piece: impl FnMut(&[u8])) -> Result<()> {
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
