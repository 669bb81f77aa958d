//! A small generator of numbers that look random: equal seeds give equal numbers everywhere.

/// SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Mix(u64);

impl Mix {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let drawn = self.next().checked_rem(bound as u64).unwrap_or(0);
        usize::try_from(drawn).unwrap_or(0)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.byte()).collect()
    }

    /// Around 0 with a standard deviation of about 0.02, as trained weights are.
    pub(crate) fn weight(&mut self) -> f32 {
        let sum: i32 = (0..4).map(|_| i32::from(self.byte()) - 127).sum();
        // The low bits make the mantissa dense: quarters of 127ths alone would compress too well.
        let fine = f32::from(self.byte()) / 256.0;
        (f32::from(i16::try_from(sum).unwrap_or(0)) + fine) * 1.3e-4
    }
}
