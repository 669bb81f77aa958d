//! Classes of elements: runs of keys of the old values, cut so that a block becomes small.
//!
//! The optimizer moves a weight by about the learning rate. Whether that crosses a rounding boundary, and how many
//! of them, follows from the distance between two numbers at the old value: from its exponent.

use towline_core::Result;

use super::bits::{BitReader, BitWriter};
use super::simd::{Instructions, Isa, Kernel, prefetch};
use crate::tally::{Counts, Tally};

/// The most classes of a block.
pub(super) const MAX: usize = 16;
/// Magnitudes count as no larger than this, so that a few wild ones do not hide the others.
const MAX_MAGNITUDE: u64 = 1 << 40;
/// Elements are counted by key in stretches of this many, so that about [`SAMPLE`] are counted.
pub(super) const STRETCH: usize = 64;
pub(super) const SAMPLE: usize = 1 << 14;

/// The first key of each class but the first, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Classes {
    bounds: Vec<u8>,
}

impl Classes {
    pub(super) fn count(&self) -> usize {
        self.bounds.len() + 1
    }

    pub(super) fn bounds(&self) -> &[u8] {
        &self.bounds
    }

    /// The first key of each class and how many more it has.
    pub(super) fn ranges(&self) -> [(u8, u8); MAX] {
        let mut ranges = [(0, u8::MAX); MAX];
        for (class, &bound) in self.bounds.iter().enumerate() {
            ranges[class].1 = bound - 1 - ranges[class].0;
            ranges[class + 1] = (bound, u8::MAX - bound);
        }
        ranges
    }

    /// The class of every key.
    pub(super) fn table(&self) -> [u8; 256] {
        let mut table = [0; 256];
        for &bound in &self.bounds {
            table.iter_mut().skip(usize::from(bound)).for_each(|class| *class += 1);
        }
        table
    }

    pub(super) fn write(&self, bits: &mut BitWriter<'_>) {
        bits.put(self.bounds.len() as u64, 4);
        let mut last = 0;
        for (index, &bound) in self.bounds.iter().enumerate() {
            match index {
                0 => bits.put(u64::from(bound), 8),
                _ => bits.exp_golomb(u64::from(bound - last - 1), 0),
            }
            last = bound;
        }
    }

    pub(super) fn read(bits: &mut BitReader<'_>) -> Result<Self> {
        let count = bits.take(4);
        let mut bounds: Vec<u8> = Vec::with_capacity(MAX);
        for _ in 0..count {
            let bound = match bounds.last() {
                None => bits.take(8),
                Some(&last) => bits.exp_golomb(0)?.saturating_add(u64::from(last) + 1),
            };
            let wrong = || towline_core::Error::corrupt(format!("a class begins at key {bound} of 256"));
            bounds.push(u8::try_from(bound).map_err(|_| wrong())?);
        }
        Ok(Self { bounds })
    }
}

/// What is known of the elements of one key, or of several.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stats {
    pub(super) elements: u64,
    pub(super) changed: u64,
    /// The magnitudes of the changes together.
    pub(super) magnitude: u64,
}

impl Stats {
    fn and(self, other: Self) -> Self {
        Self {
            elements: self.elements + other.elements,
            changed: self.changed + other.changed,
            magnitude: self.magnitude + other.magnitude,
        }
    }

    /// About the bits that the class takes: which elements change, and by how much if that is distributed
    /// geometrically.
    fn cost(self) -> f64 {
        bernoulli(self.changed, self.elements) + bernoulli(self.changed, self.magnitude)
    }
}

/// The statistics of each key.
#[derive(Debug)]
pub(super) struct Census([Stats; 256]);

impl Default for Census {
    fn default() -> Self {
        Self([Stats::default(); 256])
    }
}

impl Census {
    /// Counts a sample of `keys`, in place of what was counted before.
    #[inline(never)]
    pub(super) fn count(&mut self, level: Instructions, keys: &[u8]) {
        let stretches = keys.chunks(STRETCH).step_by((keys.len() / SAMPLE).max(1));
        // They lie too far apart for what the processor fetches ahead.
        stretches.clone().for_each(prefetch);
        let seen: usize = stretches.clone().map(<[u8]>::len).sum();
        for (stats, count) in self.0.iter_mut().zip(tally(level, stretches)) {
            stats.elements = u64::from(count) * keys.len() as u64 / seen.max(1) as u64;
        }
    }

    /// Counts a change of `magnitude` that stands for `weight` of them.
    #[inline]
    pub(super) fn change(&mut self, key: u8, magnitude: u64, weight: u64) {
        let stats = &mut self.0[usize::from(key)];
        stats.changed += weight;
        stats.magnitude += magnitude.min(MAX_MAGNITUDE) * weight;
    }

    /// Counts changes: of old values with these keys, each below a sign, by these steps, each a magnitude less 1 above
    /// a sign.
    #[inline(always)]
    pub(super) fn changes(&mut self, olds: &[u16], steps: &[u64]) {
        // Several tables, because equal keys come in a row and one count would wait for the other.
        let mut tables = [[(0u64, 0u64); 256]; 4];
        for (olds, steps) in olds.chunks(4).zip(steps.chunks(4)) {
            for ((&old, &step), table) in olds.iter().zip(steps).zip(&mut tables) {
                let (changed, magnitude) = &mut table[usize::from(old & 0xff)];
                *changed += 1;
                *magnitude += ((step >> 1) + 1).min(MAX_MAGNITUDE);
            }
        }
        for table in tables {
            for (stats, (changed, magnitude)) in self.0.iter_mut().zip(table) {
                stats.changed += changed;
                stats.magnitude += magnitude;
            }
        }
    }

    /// The statistics of each class.
    pub(super) fn by_class(&self, classes: &Classes) -> impl Iterator<Item = Stats> {
        let mut starts: Vec<usize> =
            std::iter::once(0).chain(classes.bounds.iter().map(|&b| usize::from(b))).collect();
        starts.push(256);
        (1..starts.len()).map(move |end| {
            let keys = &self.0[starts[end - 1]..starts[end]];
            keys.iter().fold(Stats::default(), |sum, &stats| sum.and(stats))
        })
    }

    /// Cuts the keys into classes: joins neighbours as long as that saves more than the `header` bits of a class
    /// or there are too many.
    #[inline(never)]
    pub(super) fn classes(&self, header: f64) -> Classes {
        struct Class {
            first: u8,
            stats: Stats,
            cost: f64,
            /// What joining it with the next one adds.
            join: f64,
        }
        fn join(left: &Class, right: &Class) -> f64 {
            left.stats.and(right.stats).cost() - left.cost - right.cost
        }
        let mut classes: Vec<Class> = Vec::new();
        for (first, stats) in (0..=u8::MAX).zip(self.0) {
            // The sample may have missed elements that changed.
            let stats = Stats { elements: stats.elements.max(stats.changed), ..stats };
            if stats.elements > 0 {
                classes.push(Class { first, stats, cost: stats.cost(), join: f64::INFINITY });
            }
        }
        for index in 1..classes.len() {
            classes[index - 1].join = join(&classes[index - 1], &classes[index]);
        }
        while classes.len() > 1 {
            let best = (0..classes.len() - 1).min_by(|&a, &b| classes[a].join.total_cmp(&classes[b].join));
            let Some(best) = best else { break };
            if classes.len() <= MAX && classes[best].join >= header {
                break;
            }
            let right = classes.remove(best + 1);
            let left = &mut classes[best];
            left.stats = left.stats.and(right.stats);
            left.cost = left.stats.cost();
            for index in [best, best + 1] {
                if index > 0 && index <= classes.len() {
                    classes[index - 1].join = match classes.get(index) {
                        Some(right) => join(&classes[index - 1], right),
                        None => f64::INFINITY,
                    };
                }
            }
        }
        Classes { bounds: classes.iter().skip(1).map(|class| class.first).collect() }
    }
}

/// How often each byte comes up.
pub(super) fn tally<'a>(level: Instructions, parts: impl Iterator<Item = &'a [u8]> + Clone) -> Counts {
    level.run(CountParts(parts))
}

struct CountParts<P>(P);

impl<'a, P: Iterator<Item = &'a [u8]> + Clone> Kernel for CountParts<P> {
    type Output = Counts;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Counts {
        let mut tally = Tally::default();
        isa.tally(self.0, &mut tally);
        tally.counts()
    }
}

/// The entropy in bits of `events` among `trials` that all have the same chance.
fn bernoulli(events: u64, trials: u64) -> f64 {
    if events == 0 || events >= trials {
        return 0.0;
    }
    let (events, trials) = (events as f64, trials as f64);
    trials * log2(trials) - events * log2(events) - (trials - events) * log2(trials - events)
}

/// The binary logarithm of a positive number, from basic arithmetic alone: the same bits on every machine, which
/// the one of a system's library does not promise.
pub(super) fn log2(number: f64) -> f64 {
    let bits = number.to_bits();
    let exponent = (bits >> 52) as f64 - 1023.0;
    let fraction = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    // ln f = 2 artanh s, with the fraction brought around 1.
    let (fraction, exponent) =
        if fraction > 1.414 { (fraction / 2.0, exponent + 1.0) } else { (fraction, exponent) };
    let s = (fraction - 1.0) / (fraction + 1.0);
    let t = s * s;
    let series = 1.0 + t * (1.0 / 3.0 + t * (1.0 / 5.0 + t * (1.0 / 7.0 + t * (1.0 / 9.0 + t / 11.0))));
    exponent + 2.0 * s * series * std::f64::consts::LOG2_E
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_close() {
        for number in [1.0, 1.4, 1.5, 2.0, 3.0, 1000.0, 123_456_789.0, 1e15] {
            assert!((log2(number) - f64::log2(number)).abs() < 1e-7, "{number}");
        }
    }

    #[test]
    fn all_instructions_count_the_same() {
        let mut state = 1_u64;
        let mut random = |most: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 33) % most
        };
        for (first, range, length) in
            [(0, 256, 1000), (0, 1, 64), (100, 30, 4096), (190, 66, 777), (0, 70, 6400), (250, 9, 640)]
        {
            let bytes: Vec<u8> = (0..length).map(|_| (first + random(range)) as u8).collect();
            let mut counts = [0; 256];
            bytes.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
            for level in Instructions::ALL {
                assert_eq!(tally(level, bytes.chunks(STRETCH)), counts, "{level:?}, {range} from {first}");
            }
        }
    }

    #[test]
    fn keys_that_change_alike_are_one_class() {
        let mut census = Census([Stats::default(); 256]);
        for key in 100..116u8 {
            census.0[usize::from(key)].elements = 10_000;
            for _ in 0..if key < 108 { 5000 } else { 10 } {
                census.change(key, 1, 1);
            }
        }
        let classes = census.classes(20.0);
        assert_eq!(classes.bounds(), [108]);
        assert_eq!((classes.table()[107], classes.table()[108], classes.table()[255]), (0, 1, 1));
        let mut out = Vec::new();
        let mut bits = BitWriter::new(&mut out);
        classes.write(&mut bits);
        bits.finish();
        assert_eq!(Classes::read(&mut BitReader::new(&out)).unwrap(), classes);
    }

    #[test]
    fn there_are_never_too_many() {
        let mut census = Census([Stats::default(); 256]);
        for key in 0..=255u8 {
            census.0[usize::from(key)].elements = 1 << 30;
            census.change(key, 1, 1 << (key % 29));
        }
        assert_eq!(census.classes(0.0).count(), MAX);
        assert_eq!(Census([Stats::default(); 256]).classes(20.0).count(), 1);
    }
}
