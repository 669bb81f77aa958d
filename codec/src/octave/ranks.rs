//! Where the elements stand that change: their ranks among the elements of a class, as the gaps between them.

use std::ops::Range;

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter};
use super::classes::{Census, Classes, MAX};
use super::digests::Written;
use super::elem::Elem;
use super::golomb::Golomb;
use super::numbers::{Numbers, best, read_numbers, write_numbers};
use super::simd::{Instructions, Isa, Kernel, TILE, WORDS, prefetch_second};
use super::tiles::{Survey, TileCounts, TileMasks};

/// The order of the Exp-Golomb codes for the changes of a class.
const COUNT_ORDER: u32 = 6;
/// What the order of the first class's divisor is compared with.
const FIRST_ORDER: u32 = 3;
/// From octave to octave the chance halves and the gaps double: two orders.
const OCTAVE: i64 = 2;
/// How many bytes of the next tile are fetched with each change.
const AHEAD: usize = 128;

/// The changes of a block, class by class.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// The rank of each change, above its sign bit.
    ranks: Vec<u32>,
    /// The gap before each change, above its sign bit.
    gaps: Vec<u32>,
    /// The end of each class's changes.
    ends: [usize; MAX],
    /// The changes of each class by more than 1: which of its changes, and how much more. They begin where its gaps do.
    large: Vec<(u32, u64)>,
    /// How many those of each class are.
    large_counts: [usize; MAX],
    /// Each change by more than 1, in the order of the block: its index, and where its rank is.
    large_places: Vec<(u32, u32)>,
    // On the heap from the start: the compiler takes minutes over arrays of this size on the stack.
    tile: Box<TileCounts>,
}

/// The changes of one class, in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct List<'a> {
    pub(super) gaps: &'a [u32],
    pub(super) large: &'a [(u32, u64)],
}

impl Lists {
    /// Cuts the keys into classes, each of which takes about `header` bits, and ranks the changes that `survey` found
    /// and `census` counted.
    pub(super) fn fill(
        &mut self,
        level: Instructions,
        survey: &Survey,
        mut census: Census,
        header: f64,
    ) -> Classes {
        census.count(level, survey.keys());
        let classes = census.classes(header);
        let mut sum = 0;
        for (end, stats) in self.ends.iter_mut().zip(census.by_class(&classes)) {
            sum += stats.changed as usize;
            *end = sum;
        }
        self.ranks.resize(sum.max(self.ranks.len()), 0);
        self.gaps.resize(sum.max(self.gaps.len()), 0);
        self.large.resize(sum.max(self.large.len()), (0, 0));
        self.large_places.resize(sum.max(self.large_places.len()), (0, 0));
        level.run(Rank { survey, classes: &classes, lists: self });
        classes
    }

    pub(super) fn of(&self, classes: &Classes) -> Vec<List<'_>> {
        let mut start = 0;
        let lists = self.ends.iter().zip(&self.large_counts).take(classes.count());
        lists
            .map(|(&end, count)| {
                let start = std::mem::replace(&mut start, end);
                List { gaps: &self.gaps[start..end], large: &self.large[start..start + count] }
            })
            .collect()
    }
}

/// Finds the rank of each change within its class.
struct Rank<'a> {
    survey: &'a Survey,
    classes: &'a Classes,
    lists: &'a mut Lists,
}

impl Kernel for Rank<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { survey, classes, lists } = self;
        let (table, ranges) = (classes.table(), classes.ranges());
        let Lists { ranks, gaps, ends, large, large_counts, large_places, tile } = lists;
        let ranks = &mut ranks[..];
        let mut starts = [0; MAX];
        starts[1..].copy_from_slice(&ends[..MAX - 1]);
        // Where the next change of each class goes.
        let mut at = starts;
        tile.begin();
        let (mut index, mut found) = (0, 0);
        for (keys, changes) in survey.keys().chunks(TILE).zip(survey.tiles()) {
            let (keys, counts) = tile.fill(isa, keys, classes, &table);
            let (words, _) = keys.as_chunks::<64>();
            let large_places = &mut large_places[found..][..changes.places.len()];
            let mut more = 0;
            for ((&place, &old), &step) in changes.places.iter().zip(changes.olds).zip(changes.steps) {
                let class = usize::from(table[usize::from(old & 0xff)]) % MAX;
                let word = usize::from(place) / 64 % WORDS;
                let rank = counts.before(word)[class] + isa.count_within(&words[word], place, ranges[class]);
                let to = at[class];
                at[class] += 1;
                if let Some(to) = ranks.get_mut(to) {
                    *to = rank << 1 | (step & 1) as u32;
                }
                // Written in any case: a branch would be mispredicted.
                large_places[more] = (index, to as u32);
                more += usize::from(step > 1);
                index += 1;
            }
            found += more;
        }
        let mut large_ends = starts;
        for &(change, place) in &large_places[..found] {
            let (old, step) = survey.change(change as usize);
            let class = usize::from(table[usize::from(old & 0xff)]) % MAX;
            large[large_ends[class]] = (place - starts[class] as u32, step >> 1);
            large_ends[class] += 1;
        }
        for (count, (end, start)) in large_counts.iter_mut().zip(large_ends.into_iter().zip(starts)) {
            *count = end - start;
        }
        for (start, &end) in starts.into_iter().zip(&*ends).take(classes.count()) {
            let (ranks, gaps) = (&ranks[start..end], &mut gaps[start..end]);
            if let (Some(first), Some(to)) = (ranks.first(), gaps.first_mut()) {
                *to = *first;
            }
            for (pair, gap) in ranks.windows(2).zip(gaps.iter_mut().skip(1)) {
                // The elements between both, above the sign, which stays.
                *gap = pair[1].wrapping_sub(pair[0] & !1).wrapping_sub(2);
            }
        }
    }
}

impl<'a> List<'a> {
    /// The gap before each change.
    #[inline(always)]
    fn waits(self) -> impl Iterator<Item = u64> + Clone + use<'a> {
        self.gaps.iter().map(|gap| u64::from(gap >> 1))
    }

    /// Those above 0, with their index.
    #[inline(always)]
    fn waits_above(self) -> impl Iterator<Item = (u32, u64)> + Clone + use<'a> {
        (0..).zip(self.waits()).filter(|(_, gap)| *gap > 0)
    }

    /// How the gaps are best written.
    #[inline(always)]
    pub(super) fn best_gaps(self) -> Numbers {
        best(self.gaps.len(), &self.waits(), self.waits_above()).0
    }

    #[inline(always)]
    pub(super) fn write_gaps(self, form: Numbers, bits: &mut BitWriter<'_>) {
        write_numbers(form, self.waits(), self.waits_above(), bits);
    }
}

/// How many elements of each class change and how their gaps are written, class after class: one is compared with the
/// one before it.
#[derive(Debug)]
pub(super) struct GapForms {
    /// The order of the last divisor.
    last: u32,
}

impl GapForms {
    pub(super) fn new() -> Self {
        Self { last: FIRST_ORDER }
    }

    pub(super) fn write(&mut self, count: usize, gaps: Numbers, bits: &mut BitWriter<'_>) {
        bits.exp_golomb(count as u64, COUNT_ORDER);
        match gaps {
            _ if count == 0 => {}
            Numbers::Each(divisor) => {
                bits.put(0, 1);
                bits.exp_golomb(zigzag(i64::from(divisor.order()) - i64::from(self.last) - OCTAVE), 0);
                self.last = divisor.order();
            }
            Numbers::Zero | Numbers::Listed { .. } | Numbers::Fixed { .. } | Numbers::Coded { .. } => {
                bits.put(1, 1);
                gaps.write(bits, false);
            }
        }
    }

    /// Reads what was written for a class; `left` is how many elements may still change.
    pub(super) fn read(&mut self, bits: &mut BitReader<'_>, left: &mut usize) -> Result<(usize, Numbers)> {
        let count = bits.exp_golomb(COUNT_ORDER)?;
        let changes = usize::try_from(count).unwrap_or(usize::MAX);
        let more = || Error::corrupt(format!("{count} elements of a class change, of {left} that are left"));
        *left = left.checked_sub(changes).ok_or_else(more)?;
        if changes == 0 {
            return Ok((0, Numbers::Zero));
        }
        if bits.take(1) == 1 {
            return Ok((changes, Numbers::read(bits, false, count)?));
        }
        let order = i64::from(self.last) + OCTAVE + unzigzag(bits.exp_golomb(0)?.min(1 << 20));
        let divisor = Golomb::new(order.cast_unsigned())?;
        self.last = divisor.order();
        Ok((changes, Numbers::Each(divisor)))
    }
}

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ (number & 1).wrapping_neg().cast_signed()
}

/// Reads the gaps of `count` changes of a class and appends their ranks to `ranks`.
#[inline(always)]
pub(super) fn read_ranks(
    form: Numbers,
    bits: &mut BitReader<'_>,
    count: usize,
    elements: usize,
    ranks: &mut Vec<u32>,
) -> Result<()> {
    let mut next = 0;
    read_numbers(form, bits, count, &mut [].iter(), |_, gap| {
        // Neither wraps: what is not below the number of elements ends the loop.
        let rank = u64::saturating_add(next, gap);
        if rank >= elements as u64 {
            return Err(Error::corrupt(format!("a change has rank {rank} of {elements} elements")));
        }
        next = rank + 1;
        ranks.push(rank as u32);
        Ok(())
    })
}

/// Finds the elements of the ranks again, tile by tile.
pub(super) struct Search<'a> {
    pub(super) classes: &'a Classes,
    pub(super) ranks: &'a [u32],
    /// The end of each class's ranks.
    pub(super) ends: [usize; MAX],
    pub(super) tile: &'a mut TileMasks,
}

impl Search<'_> {
    /// Calls `found` with `target`, each tile of it, and its places within the tile: each with the index of its rank,
    /// class by class.
    ///
    /// # Errors
    /// `Corrupt` if a class has fewer elements than a rank says; what `found` answers.
    #[inline(always)]
    pub(super) fn each_tile<E: Elem, I: Isa>(
        self,
        isa: I,
        target: &mut [E::Raw],
        mut written: Written<'_>,
        mut found: impl FnMut(&mut [E::Raw], Range<usize>, &[(u16, u32)]) -> Result<()>,
    ) -> Result<()> {
        let table = self.classes.table();
        let classes = self.classes.count();
        let mut at = [0; MAX];
        at[1..].copy_from_slice(&self.ends[..MAX - 1]);
        let mut seen = [0u32; MAX];
        let mut places = [(0, 0); TILE];
        for start in (0..target.len()).step_by(TILE) {
            let (before, rest) = target.split_at(start);
            let (tile, rest) = rest.split_at(rest.len().min(TILE));
            // The next tile comes from memory meanwhile: half of it with the words of this one, half with its changes. All
            // at once the processor would have to wait before it can ask for more.
            let (half, other) = rest[..rest.len().min(TILE)].split_at(rest.len().min(TILE / 2));
            let behind = (E::bytes(before), &mut written);
            self.tile.fill::<E, I>(isa, tile, half, behind, self.classes, &table);
            written.up_to(isa, E::bytes(target), start * size_of::<E::Raw>());
            let mut ahead = other.chunks(AHEAD / size_of::<E::Raw>());
            let mut count = 0;
            for class in 0..classes {
                let (first, members) = (seen[class], self.tile.count(class));
                seen[class] += members;
                let rest = at[class]..self.ends[class];
                let before = count;
                for (index, rank) in (at[class] as u32..).zip(&self.ranks[rest]) {
                    let rank = rank - first;
                    if rank >= members {
                        break;
                    }
                    if let Some(ahead) = ahead.next() {
                        prefetch_second(E::bytes(ahead));
                    }
                    let Some(place) = places.get_mut(count) else { return Err(behind_the_last()) };
                    *place = (self.tile.position(isa, class, rank) as u16, index);
                    count += 1;
                }
                at[class] += count - before;
            }
            ahead.for_each(|ahead| prefetch_second(E::bytes(ahead)));
            let end = start + tile.len();
            found(target, start..end, &places[..count])?;
        }
        written.up_to(isa, E::bytes(target), size_of_val(target));
        if at[..classes] == self.ends[..classes] { Ok(()) } else { Err(behind_the_last()) }
    }
}

#[cold]
pub(super) fn behind_the_last() -> Error {
    Error::corrupt("a change lies behind the last element of its class")
        .with_help("check that the parent is the one that the delta was made from")
}
