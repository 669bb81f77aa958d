//! Deterministic blocks of every element type: like trained weights, with special values, or noise.

use towline_codec::Octave;
use towline_core::{Codec, DType, Mode, TensorMeta, UnitMeta};

use crate::octave_reference::{self, Used};

/// SplitMix64.
pub(crate) struct Mix(pub(crate) u64);

impl Mix {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// The bits of the integers that elements of `dtype` are taken as.
pub(crate) fn width(dtype: DType) -> u32 {
    if dtype.bits() < 8 { 8 } else { dtype.bits() }
}

fn bytes(width: u32, elements: &[u64]) -> Vec<u8> {
    elements.iter().flat_map(|element| element.to_le_bytes()[..width as usize / 8].to_vec()).collect()
}

/// A tensor of one unit.
pub(crate) struct Block {
    pub(crate) meta: TensorMeta,
    pub(crate) old: Vec<u8>,
    pub(crate) new: Vec<u8>,
}

impl Block {
    pub(crate) fn new(name: &str, dtype: DType, old: &[u64], new: &[u64]) -> Self {
        let width = width(dtype);
        let (old, new) = (bytes(width, old), bytes(width, new));
        let packed = (old.len() * 8) / dtype.bits() as usize;
        Self { meta: TensorMeta::new(name, dtype, [packed]).unwrap(), old, new }
    }

    pub(crate) fn unit(&self) -> UnitMeta<'_> {
        UnitMeta::new(&self.meta, 0..self.old.len())
    }

    pub(crate) fn frame(&self, codec: Octave, mode: Mode) -> Vec<u8> {
        let mut frame = Vec::new();
        let parent = (mode == Mode::Delta).then_some(&self.old[..]);
        codec.encode(&self.unit(), parent, &self.new, &mut frame).unwrap();
        frame
    }

    /// What a target holds before a frame is decoded into it.
    pub(crate) fn start(&self, mode: Mode) -> Vec<u8> {
        match mode {
            Mode::Delta => self.old.clone(),
            Mode::Base => vec![0xa5; self.old.len()],
        }
    }

    pub(crate) fn decode(&self, codec: Octave, mode: Mode, frame: &[u8]) -> Vec<u8> {
        let mut target = self.start(mode);
        codec.decode(&self.unit(), mode, frame, &mut target).unwrap();
        target
    }

    /// Decodes with the second decoder and says which parts of the format the frame uses.
    pub(crate) fn reference(&self, mode: Mode, frame: &[u8]) -> Used {
        let mut target = self.start(mode);
        let name = self.meta.name();
        let used = octave_reference::decode(width(self.meta.dtype()), mode, frame, &mut target)
            .unwrap_or_else(|error| panic!("{name} {mode:?}: {error}"));
        assert_eq!(target, self.new, "{name} {mode:?}: the second decoder");
        used
    }
}

/// An element that looks like a trained weight, like what the type also knows, or like noise.
pub(crate) fn element(mix: &mut Mix, width: u32, kind: u64) -> u64 {
    let top = 1u64 << (width - 1);
    let mask = u64::MAX >> (64 - width);
    let exponents = mask >> 1 & !(mask >> 9);
    match kind {
        // Each octave has half as many as the one above it.
        0 if width > 8 => {
            let key = 120 - u64::from(mix.next().trailing_zeros().min(40));
            mix.next() & (top | mask >> 9) | key << (width - 9)
        }
        0 => (mix.below(40) + mix.below(40)).wrapping_sub(40) & mask,
        // Both zeros, infinities, NaNs with a payload, the least and the largest subnormal, the largest number.
        1 => {
            [0, top, exponents, top | exponents, exponents | 0x41, mask, 1, mask >> 9, exponents - 1]
                [mix.below(9) as usize]
                & mask
        }
        // Small integers.
        2 => mix.below(200).wrapping_sub(100) & mask,
        _ => mix.next() & mask,
    }
}

/// The `case`-th block: 19 of 20 have few elements.
pub(crate) fn block(seed: u64, case: u64) -> Block {
    let mut mix = Mix(seed ^ case.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let dtype = DType::ALL[mix.below(DType::ALL.len() as u64) as usize];
    let width = width(dtype);
    let mut length = match case % 100 {
        0 => 5000 + mix.below(35_000),
        1..5 => 300 + mix.below(4700),
        5..40 => mix.below(66),
        _ => mix.below(300),
    };
    if dtype.bits() < 8 {
        // Whole bytes, and elements that fill them: 4 of 6 bits, 2 of 4.
        length = length.next_multiple_of(3);
    }
    let kinds = mix.below(5);
    let old: Vec<u64> = (0..length)
        .map(|_| {
            let kind = if kinds == 4 { [0, 0, 0, 1, 2][mix.below(5) as usize] } else { kinds };
            element(&mut mix, width, kind)
        })
        .collect();
    // Changes of 1000 elements that may change, and of 1000 of those with a low exponent.
    let densities = [0, 1, 10, 40, 130, 180, 400, 1000];
    let (dense, low) = (densities[mix.below(8) as usize], densities[mix.below(8) as usize]);
    let largest = [0, 1, 3, 8, 40][mix.below(5) as usize];
    let new = old
        .iter()
        .map(|&old| {
            let key = old << 1 >> (width - 8) & 0xff;
            if mix.below(1000) >= if key < 117 { low } else { dense } {
                return old;
            }
            let step = 1 + mix.next() % (1u64 << mix.below(largest + 1));
            let step = if mix.below(2) == 0 { step } else { step.wrapping_neg() };
            old.wrapping_add(step) & (u64::MAX >> (64 - width))
        })
        .collect::<Vec<_>>();
    Block::new("block", dtype, &old, &new)
}
