//! Changes to inputs.

/// A small generator of numbers: equal seeds give equal runs.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator from a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, or 0.
    pub fn below(&mut self, limit: usize) -> usize {
        if limit == 0 { 0 } else { (self.number() >> 11) as usize % limit }
    }
}

const BYTES: [u8; 12] = [0, 1, 2, 7, 8, 0x28, 0x7f, 0x80, 0x94, 0xfe, 0xff, b'.'];
const LENGTHS: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    u64::MAX - 7,
    u64::MAX,
];

/// Changes `input` one to eight times. `other` is another input, to take pieces from.
pub fn mutate(random: &mut Random, input: &mut Vec<u8>, other: &[u8], max_len: usize) {
    for _ in 0..1 + random.below(8) {
        let at = random.below(input.len());
        match random.below(13) {
            0 | 1 => change(input, at, |byte| byte ^ 1 << (at % 8)),
            2 => {
                let bit = 1 << random.below(8);
                change(input, at, |byte| byte ^ bit);
            }
            3 => {
                let byte = BYTES[random.below(BYTES.len())];
                change(input, at, |_| byte);
            }
            4 => {
                let byte = random.number() as u8;
                change(input, at, |_| byte);
            }
            5 => {
                let step = random.below(35) as u8;
                change(input, at, |byte| byte.wrapping_add(step).wrapping_sub(17));
            }
            6 => input.truncate(at),
            7 => {
                let end = (at + 1 + random.below(16)).min(input.len());
                input.drain(at..end);
            }
            8 => {
                let byte = BYTES[random.below(BYTES.len())];
                let count = 1 + random.below(16);
                input.splice(at..at, std::iter::repeat_n(byte, count));
            }
            9 => {
                let end = (at + 1 + random.below(64)).min(input.len());
                let piece = input[at..end].to_vec();
                let to = random.below(input.len());
                input.splice(to..to, piece);
            }
            10 => {
                let from = random.below(other.len());
                let end = (from + 1 + random.below(128)).min(other.len());
                let replaced = (at + random.below(128)).min(input.len());
                input.splice(at..replaced, other[from..end].iter().copied());
            }
            11 => length(random, input, at),
            _ => small_length(random, input, at),
        }
    }
    input.truncate(max_len);
}

fn change(input: &mut [u8], at: usize, to: impl FnOnce(u8) -> u8) {
    if let Some(byte) = input.get_mut(at) {
        *byte = to(*byte);
    }
}

/// Writes a length of interest over 1, 2, 4 or 8 bytes.
fn length(random: &mut Random, input: &mut [u8], at: usize) {
    let width = 1 << random.below(4);
    let number = LENGTHS[random.below(LENGTHS.len())].to_le_bytes();
    for (to, from) in input[at..].iter_mut().zip(&number[..width]) {
        *to = *from;
    }
}

/// Adds or takes a little from the number of 2, 4 or 8 bytes that stands there.
fn small_length(random: &mut Random, input: &mut [u8], at: usize) {
    let width = 2 << random.below(3);
    let Some(place) = input.get_mut(at..at + width) else { return };
    let mut number = [0; 8];
    number[..width].copy_from_slice(place);
    let step = random.below(17) as u64;
    let number = u64::from_le_bytes(number).wrapping_add(step).wrapping_sub(8).to_le_bytes();
    place.copy_from_slice(&number[..width]);
}
