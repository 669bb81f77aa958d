//! Bits out of a stream that is read from its end, and out of one that is read from its start.

/// A stream whose last byte ends in the bit that marks where it begins. The next bits are the highest of `word`.
#[derive(Clone, Copy)]
pub(super) struct BackwardBits<'a> {
    bytes: &'a [u8],
    /// How many bits are left, those in `word` among them.
    left: usize,
    word: u64,
    /// How many bits of `word` were taken.
    taken: u32,
}

impl<'a> BackwardBits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
        let last = *bytes.last().filter(|last| **last > 0)?;
        Some(Self::with(bytes, bytes.len() * 8 - last.leading_zeros() as usize - 1))
    }

    /// What is left of a stream: its first `left` bits.
    pub(super) fn with(bytes: &'a [u8], left: usize) -> Self {
        let mut bits = Self { bytes, left, word: 0, taken: 0 };
        bits.load();
        bits
    }

    /// Makes the next 57 bits ready. `None` if more were taken than there were.
    #[inline]
    pub(super) fn refill(&mut self) -> Option<()> {
        self.left = self.left.checked_sub(self.taken as usize)?;
        self.load();
        Some(())
    }

    #[inline]
    fn load(&mut self) {
        let end = self.left.div_ceil(8);
        let bytes = self.bytes.get(..end).unwrap_or_default();
        let word = match bytes.last_chunk::<8>() {
            Some(bytes) => u64::from_le_bytes(*bytes),
            None => {
                bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)) << (8 * (8 - end) % 64)
            }
        };
        self.word = word << (end * 8 - self.left);
        self.taken = 0;
    }

    /// The next `count` bits, 1 to 32, which stay. After the end, zeros.
    #[inline]
    pub(super) fn peek(&self, count: u32) -> u32 {
        low(self.word >> (64 - count))
    }

    #[inline]
    pub(super) fn skip(&mut self, count: u32) {
        self.word <<= count;
        self.taken += count;
    }

    /// The next `count` bits, at most 32.
    #[inline]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        // In two steps: a shift by 64 is none.
        let bits = low(self.word >> 1 >> (63 - count));
        self.skip(count);
        bits
    }

    /// Whether all bits were taken, and none that was not there.
    pub(super) fn is_done(&self) -> bool {
        self.left == self.taken as usize
    }
}

/// The lowest 32.
pub(super) fn low(bits: u64) -> u32 {
    let [a, b, c, d, ..] = bits.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// A stream that is read from its start, the lowest bit first.
pub(super) struct ForwardBits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> ForwardBits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The next `count` bits, at most 16, which stay. After the end, zeros.
    pub(super) fn peek(&self, count: u32) -> u32 {
        let mut four = [0; 4];
        let rest = self.bytes.get(self.at / 8..).unwrap_or_default();
        four.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        u32::from_le_bytes(four) >> (self.at % 8) & ((1 << count) - 1)
    }

    pub(super) fn skip(&mut self, count: u32) {
        self.at += count as usize;
    }

    /// The whole bytes that were read; `None` if there were not as many.
    pub(super) fn length(&self) -> Option<usize> {
        let length = self.at.div_ceil(8);
        (length <= self.bytes.len()).then_some(length)
    }
}
