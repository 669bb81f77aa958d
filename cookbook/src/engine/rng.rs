//! A small deterministic generator whose state can be saved: xoshiro256++ seeded by SplitMix64.
//!
//! A run that is resumed must draw the very numbers that the uninterrupted run would have drawn,
//! so the whole state is four words and there is no hidden cache.

use serde::{Deserialize, Serialize};

use super::error::{EngineError, Result};

/// A seeded generator. Equal seeds give equal streams; the state is four 64-bit words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "[u64; 4]", into = "[u64; 4]")]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// The generator of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut word = seed;
        // SplitMix64 never yields four zero words in a row, the one state that must not be.
        let state = std::array::from_fn(|_| {
            word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(word)
        });
        Self { state }
    }

    /// A generator of its own for a seed and a path below it (say prompt and sample number):
    /// different paths give unrelated streams, whatever order they are asked for in.
    #[must_use]
    pub fn derived(seed: u64, path: &[u64]) -> Self {
        Self::new(path.iter().fold(mix(seed), |hash, part| {
            mix(hash.rotate_left(5) ^ mix(part.wrapping_add(0x632b_e59b_d9b4_e019)))
        }))
    }

    /// A generator of its own for a seed and a name.
    #[must_use]
    pub fn named(seed: u64, name: &str) -> Self {
        Self::derived(seed, &[hash_words(name.bytes().map(u64::from))])
    }

    /// The whole state, for saving.
    #[must_use]
    pub fn state(&self) -> [u64; 4] {
        self.state
    }

    /// The generator that continues from a saved state.
    ///
    /// # Errors
    /// When all four words are zero, which no generator ever reaches.
    pub fn from_state(state: [u64; 4]) -> Result<Self> {
        if state == [0; 4] {
            return Err(EngineError::new("the generator's state is all zero"));
        }
        Ok(Self { state })
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (c, d) = (c ^ a, d ^ b);
        self.state = [a ^ d, b ^ c, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// Uniform in `[0, 1)`, a multiple of 2⁻⁵³.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `[0, 1)`, a multiple of 2⁻²⁴.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in `0..bound` without bias; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        // The first `2^64 mod bound` values are drawn again, so that every rest is equally likely.
        let skip = bound.wrapping_neg() % bound;
        loop {
            let word = self.next_u64();
            if word >= skip {
                return word % bound;
            }
        }
    }

    /// Normal with mean 0 and deviation 1 (Box–Muller; takes two words, keeps nothing).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform_f64()).cos()
    }

    /// Shuffles in place (Fisher–Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1);
            items.swap(last, usize::try_from(other).unwrap_or(last));
        }
    }
}

impl TryFrom<[u64; 4]> for Rng {
    type Error = EngineError;

    fn try_from(state: [u64; 4]) -> Result<Self> {
        Self::from_state(state)
    }
}

impl From<Rng> for [u64; 4] {
    fn from(rng: Rng) -> Self {
        rng.state
    }
}

/// A 64-bit hash of a sequence of words (FNV-1a, mixed), for deriving generators.
pub(super) fn hash_words(words: impl IntoIterator<Item = u64>) -> u64 {
    mix(words
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3)))
}

/// SplitMix64's finaliser: a bijection that spreads every bit.
fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_reference_stream() {
        // xoshiro256++ from the state [1, 2, 3, 4]: the first outputs of the reference code.
        let mut rng = Rng::from_state([1, 2, 3, 4]).unwrap();
        let first: Vec<u64> = (0..4).map(|_| rng.next_u64()).collect();
        assert_eq!(first, [41943041, 58720359, 3588806011781223, 3591011842654386]);
    }

    #[test]
    fn the_state_survives_json_and_continues() {
        let mut rng = Rng::new(7);
        rng.next_u64();
        let text = serde_json::to_string(&rng).unwrap();
        let mut again: Rng = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (0..9).map(|_| rng.next_u64()).collect::<Vec<_>>(),
            (0..9).map(|_| again.next_u64()).collect::<Vec<_>>()
        );
        assert!(serde_json::from_str::<Rng>("[0,0,0,0]").is_err());
    }

    #[test]
    fn draws_have_the_right_moments() {
        let mut rng = Rng::new(1);
        let n = 20_000;
        let uniform: f64 = (0..n).map(|_| rng.uniform_f64()).sum::<f64>() / f64::from(n);
        assert!((uniform - 0.5).abs() < 0.01, "{uniform}");
        let normals: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
        let mean = normals.iter().sum::<f64>() / f64::from(n);
        let square = normals.iter().map(|x| x * x).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.03 && (square - 1.0).abs() < 0.05, "{mean} {square}");
        let mut counts = [0; 10];
        for _ in 0..n {
            counts[rng.below(10) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (1800..2200).contains(count)), "{counts:?}");
        let mut order: Vec<u32> = (0..50).collect();
        rng.shuffle(&mut order);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn derived_streams_differ() {
        let firsts: std::collections::BTreeSet<u64> =
            (0..100).flat_map(|a| (0..10).map(move |b| Rng::derived(3, &[a, b]).next_u64())).collect();
        assert_eq!(firsts.len(), 1000);
    }
}
