//! Blocks of which few elements change: for each class of old values, the gaps between the changes, counted in
//! elements of that class.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter};
use super::classes::{Census, Classes, MAX};
use super::elem::Elem;
use super::golomb::{Golomb, MAX_SHIFT};
use super::numbers::{MAGNITUDE_TOKENS, Numbers, best, read_numbers, write_numbers};
use super::rans::{self, Chances, DecodeTable, EncodeTable, Words};
use super::simd::{Instructions, Isa, Kernel, TILE, prefetch};
use super::tiles::{Survey, TileMasks};

/// About the bits of a class in the header.
const CLASS_BITS: f64 = 24.0;
/// The order of the Exp-Golomb codes for the changes of a class.
const COUNT_ORDER: u32 = 6;
/// The order of the Exp-Golomb code for the words of the magnitudes.
const WORDS_ORDER: u32 = 6;
/// A class's shift leaves this many bits or more of the mean of its coded magnitudes: it is 8 to 15 tokens.
const MEAN_BITS: u32 = 4;
/// The least bits that tables must save: those of the coder's states and the number of its words.
const CODER_BITS: f64 = 56.0;
/// A table takes more than this.
const LEAST_CODED: u64 = 16;
/// What the order of the first class's divisor is compared with.
const FIRST_ORDER: u32 = 3;
/// From octave to octave the chance halves and the gaps double: two orders.
const OCTAVE: i64 = 2;

/// The changes of a block, class by class.
#[derive(Debug, Default)]
struct Lists {
    /// The gap before each change, above its sign bit.
    gaps: Vec<u32>,
    /// The end of each class's changes.
    ends: [usize; MAX],
    /// The changes of each class by more than 1: which of its changes, and how much more.
    large: [Vec<(u32, u64)>; MAX],
}

/// The changes of one class, in order.
#[derive(Debug, Clone, Copy)]
struct List<'a> {
    gaps: &'a [u32],
    large: &'a [(u32, u64)],
}

impl Lists {
    fn of(&self, classes: &Classes) -> Vec<List<'_>> {
        let mut start = 0;
        let lists = self.ends.iter().zip(&self.large).take(classes.count());
        lists
            .map(|(&end, large)| List { gaps: &self.gaps[std::mem::replace(&mut start, end)..end], large })
            .collect()
    }
}

/// Kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    lists: Lists,
    changes: Changes,
    buffers: Buffers,
    // On the heap from the start: the compiler takes minutes over arrays of this size on the stack.
    tile: Box<TileMasks>,
}

/// Appends the body of a block with the changes that `survey` found and `census` counted.
#[inline(never)]
pub(super) fn encode(
    level: Instructions,
    survey: &Survey,
    mut census: Census,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) {
    let Scratch { lists, tile, buffers, .. } = scratch;
    census.count(&survey.keys[..survey.elements]);
    let classes = census.classes(CLASS_BITS);
    lists.large.iter_mut().for_each(Vec::clear);
    let mut sum = 0;
    for (end, stats) in lists.ends.iter_mut().zip(census.by_class(&classes)) {
        sum += stats.changed as usize;
        *end = sum;
    }
    lists.gaps.resize(sum.max(lists.gaps.len()), 0);
    level.run(Rank { survey, classes: &classes, lists, tile });
    let lists = lists.of(&classes);
    level.run(Write { level, classes: &classes, lists: &lists, buffers, out });
}

/// Finds the rank of each change within its class.
struct Rank<'a> {
    survey: &'a Survey,
    classes: &'a Classes,
    lists: &'a mut Lists,
    tile: &'a mut TileMasks,
}

impl Kernel for Rank<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { survey, classes, lists, tile } = self;
        let table = classes.table();
        // The rank behind the last change of each class, counted from the tile's first element of it; wraps.
        let mut next = [0u32; MAX];
        let mut starts = [0; MAX];
        starts[1..].copy_from_slice(&lists.ends[..MAX - 1]);
        let mut at = starts;
        let keys = survey.keys[..survey.elements].chunks(TILE);
        for (keys, (places, steps)) in keys.zip(survey.tiles()) {
            tile.fill_keys(isa, keys, classes, &table);
            for (&place, &step) in places.iter().zip(steps) {
                let place = usize::from(place) % TILE;
                let Some(&key) = keys.get(place) else { continue };
                let class = usize::from(table[usize::from(key)]) % MAX;
                let rank = tile.rank_of(class, place);
                if let Some(gap) = lists.gaps.get_mut(at[class]) {
                    *gap = rank.wrapping_sub(next[class]) << 1 | (step & 1) as u32;
                }
                if step > 1 {
                    lists.large[class].push(((at[class] - starts[class]) as u32, step >> 1));
                }
                at[class] += 1;
                next[class] = rank + 1;
            }
            for (class, next) in next.iter_mut().enumerate().take(classes.count()) {
                *next = next.wrapping_sub(tile.count(class));
            }
        }
    }
}

/// What the coder of magnitudes works on.
#[derive(Debug, Default)]
struct Buffers {
    tokens: Vec<u8>,
    classes: Vec<u8>,
    encode: EncodeTable,
    decode: DecodeTable,
    words: Words,
}

/// How the changes of a class are written.
#[derive(Debug, Default)]
struct Plan {
    gaps: Numbers,
    magnitudes: Numbers,
    /// The chances of the tokens if the magnitudes are coded.
    table: Option<Chances>,
}

/// Appends a body.
struct Write<'a> {
    level: Instructions,
    classes: &'a Classes,
    lists: &'a [List<'a>],
    buffers: &'a mut Buffers,
    out: &'a mut Vec<u8>,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { level, classes, lists, buffers, out } = self;
        let plans = plans(lists);
        let tables: Vec<&Chances> = plans.iter().filter_map(|plan| plan.table.as_ref()).collect();
        let coded = !tables.is_empty();
        let mut bits = BitWriter::new(out);
        classes.write(&mut bits);
        bits.put(u64::from(coded), 1);
        let mut last = FIRST_ORDER;
        for (list, plan) in lists.iter().zip(&plans) {
            bits.exp_golomb(list.gaps.len() as u64, COUNT_ORDER);
            if list.gaps.is_empty() {
                continue;
            }
            match plan.gaps {
                Numbers::Each(divisor) => {
                    bits.put(0, 1);
                    bits.exp_golomb(zigzag(i64::from(divisor.order()) - i64::from(last) - OCTAVE), 0);
                    last = divisor.order();
                }
                Numbers::Zero | Numbers::Listed { .. } | Numbers::Fixed { .. } | Numbers::Coded { .. } => {
                    bits.put(1, 1);
                    plan.gaps.write(&mut bits, false);
                }
            }
            plan.magnitudes.write(&mut bits, coded);
            if let Some(table) = &plan.table {
                table.write(&mut bits);
            }
        }
        if coded {
            let stream = buffers.encode(level, lists, &plans, &tables);
            bits.exp_golomb(stream.words() as u64, WORDS_ORDER);
            bits.finish();
            stream.write(out);
            bits = BitWriter::new(out);
        }
        for (list, plan) in lists.iter().zip(&plans) {
            write_numbers(plan.gaps, list.waits(), list.waits_above(), &mut bits);
            for signs in list.gaps.chunks(32) {
                let word = (0..).zip(signs).fold(0, |word, (at, sign)| word | u64::from(sign & 1) << at);
                bits.put(word, signs.len() as u32);
            }
            write_numbers(plan.magnitudes, list.each(), list.large.iter().copied(), &mut bits);
        }
        bits.finish();
    }
}

/// The plan of each class.
#[inline(always)]
fn plans(lists: &[List<'_>]) -> Vec<Plan> {
    let (mut plans, mut coded) = (Vec::with_capacity(MAX), Vec::with_capacity(MAX));
    let mut saved = 0.0;
    for list in lists {
        let count = list.gaps.len();
        let gaps = best(count, &list.waits(), list.waits_above()).0;
        let more = list.large.iter().map(|large| large.1);
        let (magnitudes, bits) = best(count, &more, list.large.iter().copied());
        let (saves, with_table) = list.coded(bits);
        if saves > 0.0 {
            saved += saves;
            coded.push(with_table);
        } else {
            coded.push((magnitudes, None));
        }
        plans.push(Plan { gaps, magnitudes, table: None });
    }
    if saved > CODER_BITS {
        for (plan, (magnitudes, table)) in plans.iter_mut().zip(coded) {
            (plan.magnitudes, plan.table) = (magnitudes, table);
        }
    }
    plans
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

    /// The magnitude of each change, less 1.
    #[inline(always)]
    fn each(self) -> impl Iterator<Item = u64> + Clone + use<'a> {
        let mut large = self.large.iter().peekable();
        (0..self.gaps.len())
            .map(move |index| large.next_if(|large| large.0 as usize == index).map_or(0, |large| large.1))
    }

    /// The magnitudes with a table, and what that saves of the `bits` that they take without.
    #[inline(never)]
    fn coded(self, bits: u64) -> (f64, (Numbers, Option<Chances>)) {
        if bits < LEAST_CODED {
            return (0.0, (Numbers::Zero, None));
        }
        let shift = self.shift();
        let (chances, counts) = self.chances(shift);
        let saves = bits as f64 - chances.cost(&counts) - self.low_bits(shift, &counts);
        (saves, (Numbers::Coded { shift }, Some(chances)))
    }

    /// The bits of magnitudes below their tokens.
    fn shift(&self) -> u32 {
        let sum: u64 = self.large.iter().map(|large| large.1.min(1 << 40)).sum();
        (sum / self.gaps.len().max(1) as u64).max(1).ilog2().saturating_sub(MEAN_BITS - 1).min(MAX_SHIFT)
    }

    /// The chances of the tokens, and how often each comes up.
    fn chances(&self, shift: u32) -> (Chances, [u32; 256]) {
        let mut counts = [0; 256];
        for &(_, more) in self.large {
            counts[usize::from(MAGNITUDE_TOKENS.of(more >> shift))] += 1;
        }
        counts[0] += (self.gaps.len() - self.large.len()) as u32;
        (Chances::of(&counts), counts)
    }

    /// The bits that stand at the changes if the tokens are coded.
    fn low_bits(&self, shift: u32, counts: &[u32; 256]) -> f64 {
        let extra = (0..=u8::MAX).zip(counts);
        let extra: u32 = extra.map(|(token, &count)| MAGNITUDE_TOKENS.extra_bits(token) * count).sum();
        (self.gaps.len() * shift as usize) as f64 + f64::from(extra)
    }
}

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ (number & 1).wrapping_neg().cast_signed()
}

/// The header of a body.
struct Header {
    classes: Classes,
    /// Changes, the form of the gaps, and the form of the magnitudes, of each class.
    plans: Vec<(usize, Numbers, Numbers)>,
    /// The tables of the classes whose magnitudes are coded.
    tables: Vec<Chances>,
    /// The words of the coder, if there are tables.
    words: u64,
}

impl Header {
    fn read(bits: &mut BitReader<'_>, elements: usize) -> Result<Self> {
        let classes = Classes::read(bits)?;
        let coded = bits.take(1) == 1;
        let (mut plans, mut tables) = (Vec::with_capacity(MAX), Vec::with_capacity(MAX));
        let mut left = elements as u64;
        let mut last = FIRST_ORDER;
        for _ in 0..classes.count() {
            let count = bits.exp_golomb(COUNT_ORDER)?;
            left = left
                .checked_sub(count)
                .ok_or_else(|| Error::corrupt(format!("more than {elements} elements change")))?;
            if count == 0 {
                plans.push((0, Numbers::Zero, Numbers::Zero));
                continue;
            }
            let gaps = if bits.take(1) == 0 {
                let order = i64::from(last) + OCTAVE + unzigzag(bits.exp_golomb(0)?.min(1 << 20));
                let divisor = Golomb::new(order.cast_unsigned())?;
                last = divisor.order();
                Numbers::Each(divisor)
            } else {
                Numbers::read(bits, false, count)?
            };
            let magnitudes = Numbers::read(bits, coded, count)?;
            if let Numbers::Coded { .. } = magnitudes {
                tables.push(Chances::read(bits)?);
            }
            plans.push((count as usize, gaps, magnitudes));
        }
        let words = if coded { bits.exp_golomb(WORDS_ORDER)? } else { 0 };
        if coded && tables.is_empty() {
            return Err(Error::corrupt("it has a coder but nothing coded"));
        }
        Ok(Self { classes, plans, tables, words })
    }

    fn changed(&self) -> usize {
        self.plans.iter().map(|plan| plan.0).sum()
    }
}

/// How many of `elements` a body changes.
pub(super) fn changed(body: &[u8], elements: usize) -> Result<usize> {
    Header::read(&mut BitReader::new(body), elements).map(|header| header.changed())
}

/// The changes of a block, class by class: the rank within the class, and what is added.
#[derive(Debug, Default)]
struct Changes {
    ranks: Vec<u32>,
    steps: Vec<u64>,
}

/// Applies a body to `target`.
#[inline(never)]
pub(super) fn decode<E: Elem>(
    level: Instructions,
    body: &[u8],
    target: &mut [E::Raw],
    scratch: &mut Scratch,
    written: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    let Scratch { changes, tile, buffers, .. } = scratch;
    let mut bits = BitReader::new(body);
    let header = Header::read(&mut bits, target.len())?;
    let changed = header.changed();
    // A change has a sign bit, so that this is bounded by what is there.
    if changed > body.len() * 8 {
        return Err(Error::corrupt(format!("{changed} changes in {} bytes", body.len())));
    }
    changes.ranks.clear();
    changes.steps.clear();
    changes.ranks.reserve_exact(changed);
    changes.steps.reserve_exact(changed);
    buffers.tokens.clear();
    if !header.tables.is_empty() {
        let rest = bits.rest()?;
        bits = BitReader::new(buffers.decode(level, &header, rest)?);
    }
    let tokens = buffers.tokens.iter();
    let read = ReadChanges { bits, plans: &header.plans, tokens, changes, elements: target.len() };
    let ends = level.run(read)?;
    let patch = Patch::<E> { target, classes: &header.classes, changes, ends, tile, written };
    if level.run(patch) {
        return Ok(());
    }
    Err(Error::corrupt("a change lies behind the last element of its class")
        .with_help("check that the parent is the one that the delta was made from"))
}

impl Buffers {
    /// Encodes the tokens of the magnitudes that have tables.
    #[inline(never)]
    fn encode(
        &mut self,
        level: Instructions,
        lists: &[List<'_>],
        plans: &[Plan],
        tables: &[&Chances],
    ) -> rans::Stream<'_> {
        self.tokens.clear();
        self.classes.clear();
        let mut class = 0;
        for (list, plan) in lists.iter().zip(plans) {
            if let Numbers::Coded { shift } = plan.magnitudes {
                let start = self.tokens.len();
                self.tokens.resize(start + list.gaps.len(), 0);
                for &(index, more) in list.large {
                    self.tokens[start + index as usize] = MAGNITUDE_TOKENS.of(more >> shift);
                }
                self.classes.resize(self.tokens.len(), class);
                class += 1;
            }
        }
        self.encode.fill(tables.iter().copied());
        rans::encode(level, &self.encode, &self.classes, &self.tokens, &mut self.words)
    }

    /// Decodes the tokens of the magnitudes from the start of `bytes` and returns what is behind.
    fn decode<'a>(&mut self, level: Instructions, header: &Header, bytes: &'a [u8]) -> Result<&'a [u8]> {
        self.classes.clear();
        let coded = header.plans.iter().filter(|plan| matches!(plan.2, Numbers::Coded { .. }));
        for (class, &(count, ..)) in (0..).zip(coded) {
            self.classes.resize(self.classes.len() + count, class);
        }
        self.tokens.resize(self.classes.len(), 0);
        let (stream, rest) = rans::stream_len(self.tokens.len(), header.words)
            .and_then(|length| bytes.split_at_checked(length))
            .ok_or_else(|| Error::corrupt("it is cut short"))?;
        self.decode.fill(&header.tables);
        rans::decode(level, &self.decode, &self.classes, &mut self.tokens, stream)?;
        Ok(rest)
    }
}

/// Reads the changes of all classes; returns where those of each end.
struct ReadChanges<'a> {
    bits: BitReader<'a>,
    plans: &'a [(usize, Numbers, Numbers)],
    tokens: std::slice::Iter<'a, u8>,
    changes: &'a mut Changes,
    elements: usize,
}

impl Kernel for ReadChanges<'_> {
    type Output = Result<[usize; MAX]>;

    #[inline(always)]
    fn run<I: Isa>(mut self, _: I) -> Self::Output {
        let mut ends = [0; MAX];
        for (&(count, gaps, magnitudes), end) in self.plans.iter().zip(&mut ends) {
            let Self { bits, tokens, changes, elements, .. } = &mut self;
            changes.read(bits, count, gaps, magnitudes, tokens, *elements)?;
            *end = changes.ranks.len();
        }
        self.bits.finish()?;
        Ok(ends)
    }
}

impl Changes {
    /// Reads the `count` changes of a class.
    #[inline(always)]
    fn read(
        &mut self,
        bits: &mut BitReader<'_>,
        count: usize,
        gaps: Numbers,
        magnitudes: Numbers,
        tokens: &mut std::slice::Iter<'_, u8>,
        elements: usize,
    ) -> Result<()> {
        let mut next = 0;
        read_numbers(gaps, bits, count, &mut [].iter(), |_, gap| {
            // Neither wraps: what is not below the number of elements ends the loop.
            let rank = u64::saturating_add(next, gap);
            if rank >= elements as u64 {
                return Err(Error::corrupt(format!("a change has rank {rank} of {elements} elements")));
            }
            next = rank + 1;
            self.ranks.push(rank as u32);
            Ok(())
        })?;
        let first = self.steps.len();
        for left in (1..=count).rev().step_by(32) {
            let length = left.min(32);
            let signs = bits.take(length as u32);
            // 1, or −1 where the sign bit is set.
            self.steps.extend((0..length).map(|at| ((signs >> at & 1) << 1).wrapping_neg() | 1));
        }
        let steps = self.steps.get_mut(first..).unwrap_or_default();
        if magnitudes == Numbers::Zero {
            return Ok(());
        }
        read_numbers(magnitudes, bits, count, tokens, |index, more| {
            if let Some(step) = steps.get_mut(index).filter(|_| more > 0) {
                *step = step.wrapping_mul(more.wrapping_add(1));
            }
            Ok(())
        })
    }
}

/// Adds the steps to the elements of their ranks; `false` if there is no such element.
struct Patch<'a, E: Elem> {
    target: &'a mut [E::Raw],
    classes: &'a Classes,
    changes: &'a Changes,
    /// The end of each class's changes.
    ends: [usize; MAX],
    tile: &'a mut TileMasks,
    /// Takes each tile when it is done.
    written: &'a mut dyn FnMut(&[u8]),
}

impl<E: Elem> Kernel for Patch<'_, E> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        let table = self.classes.table();
        let classes = self.classes.count();
        let mut at = [0; MAX];
        at[1..].copy_from_slice(&self.ends[..MAX - 1]);
        let ends = self.ends;
        let mut seen = [0u32; MAX];
        let tile = self.tile;
        let mut moves = [(0, E::default()); TILE];
        let mut rest = self.target;
        while !rest.is_empty() {
            let (target, behind) = rest.split_at_mut(rest.len().min(TILE));
            rest = behind;
            tile.fill::<E, I>(isa, target, self.classes, &table);
            let mut found = 0;
            // A part of the next tile comes from memory with each class.
            let mut ahead = rest[..rest.len().min(TILE)].chunks(TILE / 8);
            for class in 0..classes {
                if let Some(ahead) = ahead.next() {
                    prefetch(E::bytes(ahead));
                }
                let (first, count) = (seen[class], tile.count(class));
                seen[class] += count;
                let rest = at[class]..ends[class];
                let changes = self.changes.ranks[rest.clone()].iter().zip(&self.changes.steps[rest]);
                let before = found;
                for (rank, step) in changes {
                    let rank = rank - first;
                    if rank >= count {
                        break;
                    }
                    let Some(slot) = moves.get_mut(found) else { return false };
                    *slot = (tile.position(isa, class, rank) as u16, E::narrow(*step));
                    found += 1;
                }
                at[class] += found - before;
            }
            // In a loop of its own: the searches above would wait for stores whose places are not known yet.
            for &(place, step) in &moves[..found] {
                // Behind the end of a block's last tile there is nothing to change.
                let Some(raw) = target.get_mut(usize::from(place)) else { return false };
                *raw = E::load(*raw).plus(step).store();
            }
            (self.written)(E::bytes(target));
        }
        at[..classes] == ends[..classes]
    }
}
