//! Writes zlib streams of runs and frequencies (RFC 1950, RFC 1951), as `zframe` does for zstd: a run is a match at
//! distance one, and every block has Huffman codes of its own.

use simd_adler32::Adler32;

use crate::zframe::{BLOCK, Content, Parts, Plain, Xor, code_lengths, count};

/// The longest match, and its code.
const LONGEST: usize = 258;
const LONGEST_CODE: usize = 285;
/// The shortest match.
const SHORTEST: usize = 3;
/// The code that ends a block, behind those of the literals.
const END: usize = 256;
/// How many codes there are for literals, the end and lengths.
const CODES: usize = 286;

/// Appends `left ^ right`, which are of one length, to `out` as one stream.
pub(super) fn write_xor(left: &[u8], right: &[u8], out: &mut Vec<u8>) {
    write(left.chunks(BLOCK).zip(right.chunks(BLOCK)).map(|(left, right)| Xor(left, right)), out);
}

/// Appends `bytes` to `out` as one stream.
pub(super) fn write_plain(bytes: &[u8], out: &mut Vec<u8>) {
    write(bytes.chunks(BLOCK).map(Plain), out);
}

fn write<C: Content>(blocks: impl Iterator<Item = C>, out: &mut Vec<u8>) {
    // Deflate with a window of 32 KiB, packed as usual.
    out.extend_from_slice(&[0x78, 0x9c]);
    let mut bits = Bits { out, held: 0, count: 0 };
    let (mut parts, mut plain, mut adler) = (Parts::new(BLOCK), vec![0; BLOCK], Adler32::new());
    let mut blocks = blocks.peekable();
    if blocks.peek().is_none() {
        // One last block of fixed codes that holds its end only.
        bits.add(3, 10);
    }
    while let Some(content) = blocks.next() {
        content.copy(&mut plain);
        adler.write(plain.get(..content.len()).unwrap_or_default());
        parts.take(&content);
        block(&parts, blocks.peek().is_none(), &mut bits);
    }
    bits.end();
    out.extend_from_slice(&adler.finish().to_be_bytes());
}

/// Writes a block with codes of its own.
fn block(parts: &Parts, last: bool, bits: &mut Bits<'_>) {
    let literals = parts.literals.get(..parts.count as usize).unwrap_or_default();
    let mut counts = [0; CODES];
    counts.iter_mut().zip(count(literals)).for_each(|(to, from)| *to = from);
    counts[END] = 1;
    for sequence in parts.sequences() {
        matches(sequence.run as usize, |length| counts[length_code(length).0] += 1);
    }
    // A literal and the end at least: there are two symbols.
    let Some(lengths) = code_lengths(&counts, 15) else { return };
    bits.add(u32::from(last) | 2 << 1, 3);
    write_lengths(&lengths, bits);
    let codes = codes(&lengths);
    let mut rest = literals;
    for sequence in parts.sequences() {
        let (number, run) = (sequence.literals as usize, sequence.run as usize);
        let (now, later) = rest.split_at(number.min(rest.len()));
        now.iter().for_each(|&literal| bits.put(codes[usize::from(literal)]));
        rest = later;
        matches(run, |length| {
            let (code, extra, value) = length_code(length);
            bits.put(codes[code]);
            // The extra bits, and the one bit of the only distance.
            bits.add(value, extra + 1);
        });
    }
    rest.iter().for_each(|&literal| bits.put(codes[usize::from(literal)]));
    bits.put(codes[END]);
}

/// Cuts a run into matches.
fn matches(mut run: usize, mut sink: impl FnMut(usize)) {
    while run > LONGEST {
        // What is left must be a match too.
        let now = if run - LONGEST < SHORTEST { LONGEST - SHORTEST } else { LONGEST };
        sink(now);
        run -= now;
    }
    sink(run);
}

/// The code of a match length, how many extra bits it has, and which.
fn length_code(length: usize) -> (usize, u32, u32) {
    // Lengths are 3 to 258.
    let above = u32::try_from(length.saturating_sub(SHORTEST)).unwrap_or_default();
    match above {
        0..8 => (257 + above as usize, 0, 0),
        255 => (LONGEST_CODE, 0, 0),
        _ => {
            // Four codes for each doubling.
            let extra = above.ilog2() - 2;
            (257 + (4 * extra + (above >> extra)) as usize, extra, above & ((1 << extra) - 1))
        }
    }
}

/// Writes how long the codes are, in the way of the format: packed by lengths of repeats, and by a code for these.
fn write_lengths(lengths: &[u8; CODES], bits: &mut Bits<'_>) {
    const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
    let used = lengths.iter().rposition(|&length| length > 0).map_or(0, |last| last + 1).max(END + 1);
    // Behind them the length of the only distance code.
    let all: Vec<u8> = lengths.iter().take(used).copied().chain([1]).collect();
    let mut packed: Vec<(usize, u32, u32)> = Vec::new();
    for run in all.chunk_by(|left, right| left == right) {
        let (length, mut left) = (usize::from(run.first().copied().unwrap_or_default()), run.len());
        if length > 0 {
            packed.push((length, 0, 0));
            left -= 1;
        }
        while left > 0 {
            let (code, extra, least, most) = match (length, left) {
                (0, 11..) => (18, 7, 11, 138),
                (0, 3..) => (17, 3, 3, 10),
                (1.., 3..) => (16, 2, 3, 6),
                _ => (length, 0, 1, 1),
            };
            let now = left.min(most);
            packed.push((code, extra, u32::try_from(now - least).unwrap_or_default()));
            left -= now;
        }
    }
    let mut counts = [0; 19];
    packed.iter().for_each(|(code, ..)| counts[*code] += 1);
    // Zeros and another length occur at least.
    let Some(lengths) = code_lengths(&counts, 7) else { return };
    let sent = ORDER.iter().rposition(|&code| lengths[code] > 0).map_or(0, |last| last + 1).max(4);
    // The numbers of codes: above 257, above 1 and above 4.
    bits.add(u32::try_from(used - END - 1).unwrap_or_default(), 5);
    bits.add(0, 5);
    bits.add(u32::try_from(sent - 4).unwrap_or_default(), 4);
    ORDER.iter().take(sent).for_each(|&code| bits.add(lengths[code].into(), 3));
    let codes = codes(&lengths);
    for (code, extra, value) in packed {
        bits.put(codes[code]);
        bits.add(value, extra);
    }
}

/// The codes of these lengths, each with its length, the first bit lowest.
fn codes<const N: usize>(lengths: &[u8; N]) -> [(u32, u32); N] {
    let mut numbers = [0u32; 17];
    for &length in lengths.iter().filter(|length| **length > 0) {
        numbers[usize::from(length) + 1] += 1;
    }
    // Codes ascend with the symbol among those of one length, and begin after the shorter ones.
    let mut next = 0;
    for number in &mut numbers {
        next = (next + *number) << 1;
        *number = next;
    }
    let mut codes = [(0, 0); N];
    for (code, &length) in codes.iter_mut().zip(lengths).filter(|(_, length)| **length > 0) {
        let next = &mut numbers[usize::from(length)];
        *code = (next.reverse_bits() >> (32 - u32::from(length)), length.into());
        *next += 1;
    }
    codes
}

/// Bits into bytes, the lowest first.
struct Bits<'a> {
    out: &'a mut Vec<u8>,
    held: u64,
    count: u32,
}

impl Bits<'_> {
    /// Appends the lowest `count` bits of `value`, which has no others. At most 32.
    #[inline]
    fn add(&mut self, value: u32, count: u32) {
        self.held |= u64::from(value) << self.count;
        self.count += count;
        if self.count >= 32 {
            let [a, b, c, d, ..] = self.held.to_le_bytes();
            self.out.extend_from_slice(&[a, b, c, d]);
            self.held >>= 32;
            self.count -= 32;
        }
    }

    #[inline]
    fn put(&mut self, (code, length): (u32, u32)) {
        self.add(code, length);
    }

    fn end(&mut self) {
        let bytes = self.count.div_ceil(8) as usize;
        self.out.extend_from_slice(self.held.to_le_bytes().get(..bytes).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &[u8]) -> Vec<u8> {
        use std::io::Read;
        let mut bytes = Vec::new();
        flate2::read::ZlibDecoder::new(stream).read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let mut state = 1u32;
        let mut noise = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let mut contents: Vec<Vec<u8>> =
            [0, 1, 2, 9, 12, 260, 261, 262, 517, 518, 519, 131_072, 131_073, 400_000]
                .map(|length| vec![0; length])
                .into();
        for every in [1, 2, 5, 30, 300, 5_000, 100_000] {
            for mask in [1, 0xff] {
                let mut content = vec![0; 300_000];
                let mut at = 0;
                while at < content.len() {
                    content[at] = (noise() & mask) as u8;
                    at += 1 + noise() as usize % (2 * every);
                }
                contents.push(content);
            }
        }
        for content in contents {
            let mut out = vec![9];
            write_plain(&content, &mut out);
            assert!(read(&out[1..]) == content, "{} bytes", content.len());
            let other: Vec<u8> = content.iter().map(|byte| byte ^ 0x33).collect();
            let mut by_xor = vec![9];
            write_xor(&other, &vec![0x33; content.len()], &mut by_xor);
            assert_eq!(by_xor, out);
        }
    }

    #[test]
    fn every_match_length_has_its_code() {
        // RFC 1951, section 3.2.5.
        for (length, wanted) in [
            (3, (257, 0, 0)),
            (10, (264, 0, 0)),
            (11, (265, 1, 0)),
            (12, (265, 1, 1)),
            (18, (268, 1, 1)),
            (19, (269, 2, 0)),
            (115, (280, 4, 0)),
            (131, (281, 5, 0)),
            (257, (284, 5, 30)),
            (258, (285, 0, 0)),
        ] {
            assert_eq!(length_code(length), wanted, "{length}");
        }
        for run in 3..2000 {
            let mut sum = 0;
            matches(run, |length| {
                assert!((3..=258).contains(&length));
                sum += length;
            });
            assert_eq!(sum, run);
        }
    }
}
