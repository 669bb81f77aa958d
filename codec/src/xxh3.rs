//! XXH3-128 of long inputs, in steps: so that a loop over weights that waits for memory digests them meanwhile.
//!
//! Seed 0 and the default secret, as the specification of xxHash has it (`doc/xxhash_spec.md` of `Cyan4973/xxHash`).

/// The bytes that go into all lanes at once.
pub(crate) const STRIPE: usize = 64;
/// The bytes after which the lanes are scrambled.
pub(crate) const BLOCK: usize = 1024;
/// Where the secret of a scramble begins; that of a block's stripe begins 8 bytes behind the one before.
pub(crate) const SCRAMBLE: usize = SECRET.len() - STRIPE;
/// Inputs up to this length are digested in other ways.
const SHORT: usize = 240;

const PRIME32_1: u64 = 0x9e37_79b1;
const PRIME32_2: u64 = 0x85eb_ca77;
const PRIME32_3: u64 = 0xc2b2_ae3d;
const PRIME64_1: u64 = 0x9e37_79b1_85eb_ca87;
const PRIME64_2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const PRIME64_3: u64 = 0x1656_67b1_9e37_79f9;
const PRIME64_4: u64 = 0x85eb_ca77_c2b2_ae63;
const PRIME64_5: u64 = 0x27d4_eb2f_1656_67c5;

/// What the lanes of a scramble are multiplied by.
pub(crate) const SCRAMBLE_BY: u64 = PRIME32_1;

#[rustfmt::skip]
pub(crate) static SECRET: [u8; 192] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

/// What whole blocks from the start of an input leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lanes(pub(crate) [u64; 8]);

impl Default for Lanes {
    fn default() -> Self {
        Self([PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1])
    }
}

impl Lanes {
    fn stripe(&mut self, stripe: &[u8; STRIPE], secret: usize) {
        let words = stripe.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        for (lane, word) in words.enumerate() {
            let mixed = word ^ secret_word(secret + 8 * lane);
            self.0[lane ^ 1] = self.0[lane ^ 1].wrapping_add(word);
            self.0[lane] = self.0[lane].wrapping_add((mixed & 0xffff_ffff).wrapping_mul(mixed >> 32));
        }
    }

    fn scramble(&mut self) {
        for (index, lane) in self.0.iter_mut().enumerate() {
            *lane = (*lane ^ *lane >> 47 ^ secret_word(SCRAMBLE + 8 * index)).wrapping_mul(SCRAMBLE_BY);
        }
    }

    fn stripes(&mut self, stripes: &[[u8; STRIPE]]) {
        for (index, stripe) in stripes.iter().enumerate() {
            self.stripe(stripe, 8 * index);
        }
    }

    /// The digest of an input of `length` bytes, the last of which are `rest`: whole blocks are in the lanes, what is
    /// behind them is not. Nothing if the input is short or not even a stripe is left of it.
    pub(crate) fn finish(mut self, length: usize, rest: &[u8]) -> Option<u128> {
        let last = rest.last_chunk().filter(|_| length > SHORT)?;
        // Never all of it: a block is scrambled only if something comes behind it.
        let (blocks, rest) = rest.split_at((rest.len() - 1) / BLOCK * BLOCK);
        for block in blocks.chunks(BLOCK) {
            self.stripes(block.as_chunks().0);
            self.scramble();
        }
        self.stripes(rest[..rest.len() - 1].as_chunks().0);
        self.stripe(last, SCRAMBLE - 7);
        let length = length as u64;
        let low = self.merge(11, length.wrapping_mul(PRIME64_1));
        let high = self.merge(SCRAMBLE - 11, !length.wrapping_mul(PRIME64_2));
        Some(u128::from(high) << 64 | u128::from(low))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves of a product")]
    fn merge(&self, secret: usize, start: u64) -> u64 {
        let pairs = (secret..).step_by(16).zip(self.0.as_chunks::<2>().0);
        let sum = pairs.fold(start, |sum, (secret, [low, high])| {
            let product = u128::from(low ^ secret_word(secret)) * u128::from(high ^ secret_word(secret + 8));
            sum.wrapping_add((product as u64) ^ (product >> 64) as u64)
        });
        let mixed = (sum ^ sum >> 37).wrapping_mul(0x1656_6791_9e37_79f9);
        mixed ^ mixed >> 32
    }
}

fn secret_word(at: usize) -> u64 {
    SECRET[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_core::block_digest;

    #[test]
    fn it_is_the_digest_of_a_block() {
        let bytes: Vec<u8> = (0..20_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for length in [241, 255, 256, 257, 1023, 1024, 1025, 1088, 2047, 2048, 2049, 8192, 19_999] {
            let wanted = Some(block_digest(&bytes[..length]));
            assert_eq!(Lanes::default().finish(length, &bytes[..length]), wanted, "{length}");
        }
        for length in [0, 1, 63, 64, 240] {
            assert_eq!(Lanes::default().finish(length, &bytes[..length]), None, "{length}");
        }
    }
}
