//! Bits, least significant first, and Exp-Golomb codes.

use towline_core::{Error, Result};

/// Appends bits to bytes.
#[derive(Debug)]
pub(super) struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    pending: u64,
    /// Bits in `pending`, fewer than 32 between calls.
    fill: u32,
}

impl<'a> BitWriter<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, pending: 0, fill: 0 }
    }

    /// Appends the low `count` bits of `value`, at most 32; the others are zero.
    #[inline]
    pub(super) fn put(&mut self, value: u64, count: u32) {
        debug_assert!(count <= 32 && value >> count == 0);
        self.pending |= value << self.fill;
        self.fill += count;
        if self.fill >= 32 {
            self.out.extend_from_slice(&self.pending.to_le_bytes()[..4]);
            self.pending >>= 32;
            self.fill -= 32;
        }
    }

    /// Appends the low `count` bits of `value`, at most 64; the others are zero.
    #[inline]
    pub(super) fn put_wide(&mut self, value: u64, count: u32) {
        if count <= 32 {
            self.put(value, count);
        } else {
            self.put(value & u64::from(u32::MAX), 32);
            self.put(value >> 32, count - 32);
        }
    }

    /// Exp-Golomb: the number of bits of `(value >> order) + 1` less one in unary, its bits, the low `order` bits.
    pub(super) fn exp_golomb(&mut self, value: u64, order: u32) {
        let head = u128::from(value >> order) + 1;
        let length = head.ilog2();
        self.put_wide(0, length);
        self.put(1, 1);
        // `length` is at most 64, where the head is 2^64 and its low bits are zero.
        self.put_wide((head & !(1 << length)) as u64, length);
        self.put_wide(value & low(order), order);
    }

    /// Appends the whole bytes that are pending; returns what is left and how many bits that is, at most 7.
    #[inline]
    pub(super) fn take_bytes(&mut self) -> (u64, u32) {
        let bytes = (self.fill >> 3) as usize;
        self.out.extend_from_slice(self.pending.to_le_bytes().get(..bytes).unwrap_or_default());
        (self.pending >> (self.fill & 56), self.fill & 7)
    }

    /// Goes on behind what [`BitWriter::take_bytes`] left, if that was changed.
    #[inline]
    pub(super) fn set_pending(&mut self, pending: u64, fill: u32) {
        (self.pending, self.fill) = (pending, fill);
    }

    /// Appends bytes behind those that [`BitWriter::take_bytes`] appended.
    #[inline]
    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Fills the last byte with zeros.
    pub(super) fn finish(self) {
        let bytes = self.fill.div_ceil(8) as usize;
        self.out.extend_from_slice(self.pending.to_le_bytes().get(..bytes).unwrap_or_default());
    }
}

/// The low `count` bits, at most 64, set.
#[inline]
pub(super) fn low(count: u32) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// The most bits that are taken at once: what a word has that begins within a byte.
pub(super) const MOST_TAKEN: u32 = 57;

/// Takes bits from bytes. Behind the end it reads zeros, which [`BitReader::finish`] finds.
#[derive(Debug, Clone)]
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    /// In bits.
    position: usize,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// At least the next [`MOST_TAKEN`] bits.
    #[inline]
    pub(super) fn peek(&self) -> u64 {
        let at = self.position >> 3;
        let word = match self.bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
            Some(word) => u64::from_le_bytes(*word),
            None => self.last_word(at),
        };
        word >> (self.position & 7)
    }

    #[cold]
    fn last_word(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        let rest = self.bytes.get(at..).unwrap_or_default();
        word.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        u64::from_le_bytes(word)
    }

    /// The next `count` bits, at most [`MOST_TAKEN`].
    #[inline]
    pub(super) fn take(&mut self, count: u32) -> u64 {
        let value = self.peek() & low(count);
        self.position += count as usize;
        value
    }

    /// The next `count` bits, at most 64.
    #[inline]
    pub(super) fn take_wide(&mut self, count: u32) -> u64 {
        if count <= 32 {
            return self.take(count);
        }
        let bottom = self.take(32);
        bottom | self.take(count - 32) << 32
    }

    pub(super) fn exp_golomb(&mut self, order: u32) -> Result<u64> {
        let mut length = 0;
        loop {
            let word = self.peek();
            if word != 0 && word.trailing_zeros() < MOST_TAKEN {
                length += word.trailing_zeros();
                self.position += word.trailing_zeros() as usize + 1;
                break;
            }
            length += MOST_TAKEN;
            self.position += MOST_TAKEN as usize;
            if length > 64 {
                return Err(too_large());
            }
        }
        if length > 64 {
            return Err(too_large());
        }
        let head = (1u128 << length | u128::from(self.take_wide(length))) - 1;
        let value = head << order | u128::from(self.take_wide(order));
        u64::try_from(value).map_err(|_| too_large())
    }

    #[inline]
    pub(super) fn skip(&mut self, count: u32) {
        self.position += count as usize;
    }

    /// The bytes behind the one that holds the last bit taken.
    ///
    /// # Errors
    /// `Corrupt` if more was taken than there is, or bits that fill the last byte are set.
    pub(super) fn rest(&self) -> Result<&'a [u8]> {
        let at = self.position.div_ceil(8);
        let rest = self.bytes.get(at..).ok_or_else(|| Error::corrupt("it is cut short"))?;
        let used = self.position & 7;
        if used != 0 && self.bytes.get(at - 1).is_some_and(|last| last >> used != 0) {
            return Err(Error::corrupt("bits are set behind its end"));
        }
        Ok(rest)
    }

    /// # Errors
    /// As [`BitReader::rest`], or if bytes are left.
    pub(super) fn finish(&self) -> Result<()> {
        match self.rest()? {
            [] => Ok(()),
            rest => Err(Error::corrupt(format!("{} bytes behind its end", rest.len()))),
        }
    }
}

pub(super) fn too_large() -> Error {
    Error::corrupt("a number has more than 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        let mut numbers: Vec<u64> =
            (0..70).chain([255, 256, 1 << 20, u64::MAX >> 1, u64::MAX - 1, u64::MAX]).collect();
        numbers.extend((0..64).map(|shift| 1 << shift));
        let mut out = vec![9];
        let mut writer = BitWriter::new(&mut out);
        for &number in &numbers {
            for order in [0, 1, 5, 12, 31] {
                writer.exp_golomb(number, order);
            }
            writer.put_wide(number, 64);
        }
        writer.finish();
        let mut reader = BitReader::new(&out[1..]);
        for &number in &numbers {
            for order in [0, 1, 5, 12, 31] {
                assert_eq!(reader.exp_golomb(order).unwrap(), number, "{order}");
            }
            assert_eq!(reader.take_wide(64), number);
        }
        reader.finish().unwrap();
        for length in 1..out.len() {
            let mut reader = BitReader::new(&out[1..length]);
            let whole = numbers.iter().try_for_each(|_| {
                for order in [0, 1, 5, 12, 31] {
                    reader.exp_golomb(order)?;
                }
                reader.take_wide(64);
                Ok::<_, Error>(())
            });
            assert!(whole.and_then(|()| reader.finish()).is_err(), "{length}");
        }
    }
}
