//! Bits into bytes, the lowest first, as zstd's entropy coders want them.

/// Writes into a buffer of a fixed length. What does not fit is dropped, and [`BitWriter::finish`] says so.
pub(super) struct BitWriter<'a> {
    buffer: &'a mut [u8],
    at: usize,
    held: u64,
    bits: u32,
}

impl<'a> BitWriter<'a> {
    pub(super) fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, at: 0, held: 0, bits: 0 }
    }

    /// Takes the lowest `bits` bits of `value`, which has no others. At most 56 between two calls of `flush`.
    pub(super) fn add(&mut self, value: u64, bits: u32) {
        debug_assert!(bits < 57 && self.bits + bits < 64 && value >> bits == 0, "{value:x} {bits}");
        self.held |= value << self.bits;
        self.bits += bits;
    }

    /// Moves whole bytes into the buffer.
    pub(super) fn flush(&mut self) {
        if let Some(place) = self.buffer.get_mut(self.at..self.at + 8) {
            place.copy_from_slice(&self.held.to_le_bytes());
        }
        self.at += (self.bits / 8) as usize;
        self.held >>= self.bits & !7;
        self.bits &= 7;
    }

    /// Ends the stream where it is. The number of bytes, or `None` if they did not fit.
    pub(super) fn end(mut self) -> Option<usize> {
        self.flush();
        let length = self.at + usize::from(self.bits > 0);
        // `flush` writes 8 bytes at a time.
        (self.at + 8 <= self.buffer.len()).then_some(length)
    }

    /// Ends a stream that is read from its end: one bit marks where it begins.
    pub(super) fn end_marked(mut self) -> Option<usize> {
        self.flush();
        self.add(1, 1);
        self.end()
    }
}
