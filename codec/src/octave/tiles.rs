//! Which elements differ, and which rank each has within its class: a tile at a time.

use super::classes::{Classes, MAX};
use super::elem::Elem;
use super::simd::{Instructions, Isa, Kernel, TILE, WORDS};

/// The class of each element of a tile, as masks with running counts.
#[derive(Debug)]
pub(super) struct TileMasks {
    keys: [u8; TILE],
    masks: [[u64; WORDS]; MAX],
    sums: [[u16; WORDS]; MAX],
    counts: [u32; MAX],
}

impl Default for TileMasks {
    fn default() -> Self {
        Self { keys: [0; TILE], masks: [[0; WORDS]; MAX], sums: [[0; WORDS]; MAX], counts: [0; MAX] }
    }
}

impl TileMasks {
    /// Takes at most [`TILE`] elements.
    #[inline(always)]
    pub(super) fn fill<E: Elem, I: Isa>(
        &mut self,
        isa: I,
        old: &[E::Raw],
        classes: &Classes,
        table: &[u8; 256],
    ) {
        self.keys.iter_mut().zip(old).for_each(|(key, &raw)| *key = E::load(raw).key());
        isa.class_masks(&self.keys, classes, table, &mut self.masks);
        for class in 0..classes.count() {
            let (masks, sums) = (&mut self.masks[class], &mut self.sums[class]);
            if old.len() < TILE {
                // The keys behind the end are of another tile.
                let (whole, more) = (old.len() / 64, old.len() % 64);
                masks[whole..].iter_mut().for_each(|mask| *mask &= (1 << more) - 1);
                masks[whole + 1..].fill(0);
            }
            self.counts[class] = isa.running_counts(masks, sums);
        }
    }

    /// The elements of `class`.
    #[inline(always)]
    pub(super) fn count(&self, class: usize) -> u32 {
        self.counts[class]
    }

    /// The elements of `class` before bit `bit` of word `word`.
    #[inline(always)]
    pub(super) fn rank(&self, class: usize, word: usize, bit: usize) -> u32 {
        let below = self.masks[class][word] & ((1 << bit) - 1);
        u32::from(self.sums[class][word]) + below.count_ones()
    }

    /// The element of `class` that has `rank` of them before it; there is one.
    #[inline(always)]
    pub(super) fn position<I: Isa>(&self, isa: I, class: usize, rank: u32) -> usize {
        let word = isa.find(&self.sums[class], rank as u16);
        let rest = rank - u32::from(self.sums[class][word]);
        word * 64 + isa.select(self.masks[class][word], rest) as usize
    }
}

/// Sets the bit of each element that differs, 64 to a word, and returns how many there are.
pub(super) fn differing<E: Elem>(
    level: Instructions,
    old: &[E::Raw],
    new: &[E::Raw],
    masks: &mut Vec<u64>,
) -> usize {
    masks.clear();
    masks.reserve(old.len().div_ceil(64));
    level.run(Differing::<E> { old, new, masks })
}

struct Differing<'a, E: Elem> {
    old: &'a [E::Raw],
    new: &'a [E::Raw],
    masks: &'a mut Vec<u64>,
}

impl<E: Elem> Kernel for Differing<'_, E> {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        let mut count = 0;
        for (old, new) in self.old.chunks(64).zip(self.new.chunks(64)) {
            let mut differs = [0; 64];
            match (old.first_chunk::<64>(), new.first_chunk::<64>()) {
                (Some(old), Some(new)) => {
                    for index in 0..64 {
                        differs[index] = u8::from(E::load(old[index]) != E::load(new[index]));
                    }
                }
                _ => {
                    for (to, (old, new)) in differs.iter_mut().zip(old.iter().zip(new)) {
                        *to = u8::from(E::load(*old) != E::load(*new));
                    }
                }
            }
            let mask = isa.nonzero(&differs);
            count += mask.count_ones() as usize;
            self.masks.push(mask);
        }
        count
    }
}
