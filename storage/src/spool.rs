//! Frames of a file whose header comes first and is known last.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek as _, SeekFrom, Write};

use tempfile::tempfile;
use towline_core::Result;

use crate::io::{io_error, write};

/// Bytes above which frames wait on disk instead of in memory.
const MOST_HELD: usize = 32 << 20;

/// Keeps frames in their order, as they are or, above 32 MiB, in an unlinked temporary file.
#[derive(Debug, Default)]
pub(crate) struct Spool {
    held: Vec<Vec<u8>>,
    bytes: usize,
    file: Option<File>,
}

impl Spool {
    pub(crate) fn push(&mut self, mut frame: Vec<u8>) -> Result<()> {
        if self.file.is_none() && self.bytes + frame.len() > MOST_HELD {
            let mut file =
                tempfile().map_err(|error| io_error(error, "a temporary file could not be made"))?;
            std::mem::take(&mut self.held).iter().try_for_each(|frame| append(&mut file, frame))?;
            self.file = Some(file);
        }
        self.bytes += frame.len();
        match &mut self.file {
            Some(file) => append(file, &frame),
            None => {
                // An encoder may have taken room for what cannot be made smaller.
                frame.shrink_to_fit();
                self.held.push(frame);
                Ok(())
            }
        }
    }

    /// Writes all frames to `out`.
    ///
    /// # Errors
    /// What the temporary file and `out` answer, and which of them.
    pub(crate) fn write_to(self, out: &mut impl Write) -> Result<()> {
        self.held.iter().try_for_each(|frame| write(out, frame))?;
        let Some(mut file) = self.file else { return Ok(()) };
        file.seek(SeekFrom::Start(0)).map_err(unread)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = match file.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                count => count.map_err(unread)?,
            };
            match buffer.get(..count) {
                None | Some([]) => return Ok(()),
                Some(part) => write(out, part)?,
            }
        }
    }
}

fn append(file: &mut File, frame: &[u8]) -> Result<()> {
    file.write_all(frame).map_err(|error| io_error(error, "a temporary file could not be written"))
}

fn unread(error: std::io::Error) -> towline_core::Error {
    io_error(error, "a temporary file could not be read back")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_in_order_from_memory_and_from_disk() {
        for length in [0, 1000, MOST_HELD / 3, MOST_HELD] {
            let frames: Vec<Vec<u8>> = (1..6).map(|value| vec![value; length]).collect();
            let mut spool = Spool::default();
            frames.iter().for_each(|frame| spool.push(frame.clone()).unwrap());
            assert_eq!(spool.file.is_some(), 5 * length > MOST_HELD);
            assert!(spool.held.iter().map(Vec::len).sum::<usize>() <= MOST_HELD);
            let mut out = Vec::new();
            spool.write_to(&mut out).unwrap();
            assert!(out == frames.concat(), "{length}");
        }
    }
}
