//! Bits, least significant first, and the two codes for numbers: Rice and Exp-Golomb.

use towline_core::{Error, Result};

/// The longest unary part of a Rice code. What is above goes into an Exp-Golomb code behind it.
const MAX_UNARY: u32 = 24;
/// The order of that Exp-Golomb code.
const TAIL_ORDER: u32 = 4;
/// The largest parameter of a Rice code, so that a code without tail fits one read.
pub(super) const MAX_RICE: u32 = 31;

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

    /// Rice: `value >> order` in unary (zeros, then a one), then the low `order` bits.
    #[inline]
    pub(super) fn rice(&mut self, value: u64, order: u32) {
        let head = value >> order;
        if head < u64::from(MAX_UNARY) {
            // At most 24 + 31 bits.
            self.put_wide((1 | (value & low(order)) << 1) << head, head as u32 + 1 + order);
        } else {
            self.put(1 << MAX_UNARY, MAX_UNARY + 1);
            self.exp_golomb(head - u64::from(MAX_UNARY), TAIL_ORDER);
            self.put_wide(value & low(order), order);
        }
    }

    /// Appends the whole bytes that are pending; returns what is left and how many bits that is, at most 7.
    #[inline]
    fn take_bytes(&mut self) -> (u64, u32) {
        let bytes = (self.fill >> 3) as usize;
        self.out.extend_from_slice(self.pending.to_le_bytes().get(..bytes).unwrap_or_default());
        (self.pending >> (self.fill & 56), self.fill & 7)
    }

    /// A Rice code for each number. Faster than one by one.
    #[inline(always)]
    pub(super) fn rice_each(&mut self, numbers: impl Iterator<Item = u64>, order: u32) {
        // Whole bytes go into `room`, and from there to `out` as soon as eight more might not fit.
        let mut room = [0; 1024];
        let mut used = 0;
        let (mut pending, mut fill) = self.take_bytes();
        for number in numbers {
            let head = number >> order;
            if used > room.len() - 16 || head >= u64::from(MAX_UNARY) {
                self.out.extend_from_slice(&room[..used]);
                used = 0;
            }
            if head >= u64::from(MAX_UNARY) {
                (self.pending, self.fill) = (pending, fill);
                self.rice(number, order);
                (pending, fill) = self.take_bytes();
                continue;
            }
            // At most 7 bits, and 24 + 31 more.
            pending |= (1 | (number & low(order)) << 1) << head << fill;
            fill += head as u32 + 1 + order;
            if let Some(place) = room[used..].first_chunk_mut() {
                *place = pending.to_le_bytes();
            }
            used += (fill >> 3) as usize;
            pending >>= fill & 56;
            fill &= 7;
        }
        self.out.extend_from_slice(&room[..used]);
        (self.pending, self.fill) = (pending, fill);
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

    /// At least the next 57 bits.
    #[inline]
    fn peek(&self) -> u64 {
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

    /// The next `count` bits, at most 57.
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
            if word != 0 && word.trailing_zeros() < 57 {
                length += word.trailing_zeros();
                self.position += word.trailing_zeros() as usize + 1;
                break;
            }
            length += 57;
            self.position += 57;
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

    /// One Rice code. `order` is at most [`MAX_RICE`].
    #[inline]
    pub(super) fn rice(&mut self, order: u32) -> Result<u64> {
        let word = self.peek();
        let head = word.trailing_zeros();
        if head < MAX_UNARY {
            self.position += (head + 1 + order) as usize;
            return Ok(u64::from(head) << order | (word >> (head + 1)) & low(order));
        }
        self.rice_tail(head, order)
    }

    #[cold]
    fn rice_tail(&mut self, head: u32, order: u32) -> Result<u64> {
        if head != MAX_UNARY {
            return Err(Error::corrupt("a code has no end"));
        }
        self.position += MAX_UNARY as usize + 1;
        let head = self.exp_golomb(TAIL_ORDER)?.checked_add(u64::from(MAX_UNARY)).ok_or_else(too_large)?;
        if head.leading_zeros() < order {
            return Err(too_large());
        }
        Ok(head << order | self.take_wide(order))
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

fn too_large() -> Error {
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
        writer.rice_each(numbers.iter().copied(), 3);
        for &number in &numbers {
            for order in [0, 1, 5, 12, MAX_RICE] {
                writer.rice(number, order);
                writer.exp_golomb(number, order);
            }
            writer.put_wide(number, 64);
        }
        writer.finish();
        let mut reader = BitReader::new(&out[1..]);
        for &number in &numbers {
            assert_eq!(reader.rice(3).unwrap(), number);
        }
        for &number in &numbers {
            for order in [0, 1, 5, 12, MAX_RICE] {
                assert_eq!(reader.rice(order).unwrap(), number, "{order}");
                assert_eq!(reader.exp_golomb(order).unwrap(), number, "{order}");
            }
            assert_eq!(reader.take_wide(64), number);
        }
        reader.finish().unwrap();
        for length in 1..out.len() {
            let mut reader = BitReader::new(&out[1..length]);
            let each = numbers.iter().try_for_each(|_| reader.rice(3).map(drop));
            let whole = numbers.iter().try_for_each(|_| {
                for order in [0, 1, 5, 12, MAX_RICE] {
                    reader.rice(order)?;
                    reader.exp_golomb(order)?;
                }
                reader.take_wide(64);
                Ok::<_, Error>(())
            });
            assert!(each.and(whole).and_then(|()| reader.finish()).is_err(), "{length}");
        }
    }
}
