//! Blocks of which few elements change: for each class of old values, the gaps between the changes, counted in
//! elements of that class.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter, MAX_RICE};
use super::classes::{Census, Classes, MAX};
use super::elem::Elem;
use super::numbers::{MAGNITUDE_TOKENS, Numbers, best, read_numbers, rice_parameter, write_numbers};
use super::rans::{self, Chances, DecodeTable, EncodeTable, Words};
use super::simd::{Instructions, Isa, Kernel, TILE};
use super::tiles::TileMasks;

/// About the bits of a class in the header.
const CLASS_BITS: f64 = 28.0;
/// The order of the Exp-Golomb codes for the changes of a class.
const COUNT_ORDER: u32 = 6;
/// The order of the Exp-Golomb code for the words of the magnitudes.
const WORDS_ORDER: u32 = 6;
/// A class's shift leaves this many bits or more of the mean of its coded magnitudes: it is 8 to 15 tokens.
const MEAN_BITS: u32 = 4;
/// The least bits that tables must save: those of the coder's states and the number of its words.
const CODER_BITS: f64 = 56.0;
/// What the first class's Rice parameter is compared with.
const FIRST_RICE: u32 = 2;

/// The changes of one class, in order.
#[derive(Debug, Default)]
struct List {
    /// The gap before the change, above its sign bit.
    gaps: Vec<u32>,
    /// The changes by more than 1: which one, and how much more.
    large: Vec<(u32, u64)>,
}

/// The lists of a block.
#[derive(Debug, Default)]
struct Lists([List; MAX]);

/// Kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    lists: Lists,
    changes: Changes,
    buffers: Buffers,
    // On the heap from the start: the compiler takes minutes over arrays of this size on the stack.
    tile: Box<TileMasks>,
}

/// Appends the body of a block of which the elements set in `masks` change.
#[inline(never)]
pub(super) fn encode<E: Elem>(
    level: Instructions,
    old: &[E::Raw],
    new: &[E::Raw],
    masks: &[u64],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) {
    let Scratch { lists, tile, buffers, .. } = scratch;
    let mut census = Census::of::<E>(old);
    for position in positions(masks) {
        let (from, to) = (E::load(old[position]), E::load(new[position]));
        census.change(from.key(), to.minus(from).magnitude().wide(), 1);
    }
    let classes = census.classes(CLASS_BITS);
    lists.0.iter_mut().for_each(|list| {
        list.gaps.clear();
        list.large.clear();
    });
    level.run(Rank::<E> { old, new, masks, classes: &classes, lists, tile });
    write(level, &classes, lists, buffers, out);
}

/// The positions of the set bits.
fn positions(masks: &[u64]) -> impl Iterator<Item = usize> {
    masks.iter().enumerate().flat_map(|(word, &mask)| Bits(mask).map(move |bit| word * 64 + bit))
}

/// The positions of the set bits of a word.
struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit as usize)
    }
}

/// Finds the rank of each change within its class.
struct Rank<'a, E: Elem> {
    old: &'a [E::Raw],
    new: &'a [E::Raw],
    masks: &'a [u64],
    classes: &'a Classes,
    lists: &'a mut Lists,
    tile: &'a mut TileMasks,
}

impl<E: Elem> Kernel for Rank<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let table = self.classes.table();
        // The rank behind the last change, and the elements before the tile, of each class.
        let (mut next, mut seen) = ([0u32; MAX], [0u32; MAX]);
        let tile = self.tile;
        let tiles = self.old.chunks(TILE).zip(self.new.chunks(TILE)).zip(self.masks.chunks(TILE / 64));
        for ((old, new), masks) in tiles {
            tile.fill::<E, I>(isa, old, self.classes, &table);
            for (word, &mask) in masks.iter().enumerate() {
                for bit in Bits(mask) {
                    let at = word * 64 + bit;
                    let (from, to) = (E::load(old[at]), E::load(new[at]));
                    let class = usize::from(table[usize::from(from.key())]) % MAX;
                    let rank = seen[class] + tile.rank(class, word, bit);
                    let step = to.minus(from);
                    let list = &mut self.lists.0[class];
                    let magnitude = step.magnitude().wide();
                    if magnitude != 1 {
                        list.large.push((list.gaps.len() as u32, magnitude.wrapping_sub(1)));
                    }
                    list.gaps.push((rank - next[class]) << 1 | u32::from(step.is_negative()));
                    next[class] = rank + 1;
                }
            }
            for (class, seen) in seen.iter_mut().enumerate().take(self.classes.count()) {
                *seen += tile.count(class);
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

#[inline(never)]
fn write(level: Instructions, classes: &Classes, lists: &Lists, buffers: &mut Buffers, out: &mut Vec<u8>) {
    let lists = &lists.0[..classes.count()];
    let plans = plans(lists);
    let coded = plans.iter().any(|plan| matches!(plan.1, Numbers::Coded { .. }));
    let mut tables = Vec::new();
    buffers.tokens.clear();
    buffers.classes.clear();
    for (list, &(_, magnitudes)) in lists.iter().zip(&plans) {
        if let Numbers::Coded { shift } = magnitudes {
            let class = tables.len() as u8;
            buffers.tokens.extend(list.each().map(|value| MAGNITUDE_TOKENS.of(value >> shift)));
            buffers.classes.resize(buffers.tokens.len(), class);
            tables.push(list.chances(shift).0);
        }
    }
    buffers.encode.fill(&tables);
    let mut bits = BitWriter::new(out);
    classes.write(&mut bits);
    bits.put(u64::from(coded), 1);
    let mut tables = tables.iter();
    let mut last = FIRST_RICE;
    for (list, &(gaps, magnitudes)) in lists.iter().zip(&plans) {
        bits.exp_golomb(list.gaps.len() as u64, COUNT_ORDER);
        if list.gaps.is_empty() {
            continue;
        }
        match gaps {
            Numbers::Each { order } => {
                bits.put(0, 1);
                // From octave to octave the chance halves and the gaps double.
                bits.exp_golomb(zigzag(i64::from(order) - i64::from(last) - 1), 0);
                last = order;
            }
            Numbers::Zero | Numbers::Listed { .. } | Numbers::Fixed { .. } | Numbers::Coded { .. } => {
                bits.put(1, 1);
                gaps.write(&mut bits, false);
            }
        }
        magnitudes.write(&mut bits, coded);
        if let Numbers::Coded { .. } = magnitudes {
            tables.by_ref().take(1).for_each(|table| table.write(&mut bits));
        }
    }
    if coded {
        let stream =
            rans::encode(level, &buffers.encode, &buffers.classes, &buffers.tokens, &mut buffers.words);
        bits.exp_golomb(stream.words() as u64, WORDS_ORDER);
        bits.finish();
        stream.write(out);
        bits = BitWriter::new(out);
    }
    for (list, &(gaps, magnitudes)) in lists.iter().zip(&plans) {
        write_numbers(gaps, list.gaps.iter().map(|gap| u64::from(gap >> 1)), &mut bits);
        for signs in list.gaps.chunks(32) {
            let word = (0..).zip(signs).fold(0, |word, (at, sign)| word | u64::from(sign & 1) << at);
            bits.put(word, signs.len() as u32);
        }
        if magnitudes != Numbers::Zero {
            write_numbers(magnitudes, list.each(), &mut bits);
        }
    }
    bits.finish();
}

/// The forms of the gaps and of the magnitudes of each class.
fn plans(lists: &[List]) -> [(Numbers, Numbers); MAX] {
    let mut plans = [(Numbers::Zero, Numbers::Zero); MAX];
    let mut coded = plans;
    let mut saved = 0.0;
    for ((list, plan), coded) in lists.iter().zip(&mut plans).zip(&mut coded) {
        let gaps = list.gaps.iter().map(|gap| u64::from(gap >> 1));
        let gaps = best(list.gaps.len(), gaps.clone(), (0..).zip(gaps).filter(|(_, gap)| *gap > 0)).0;
        let (magnitudes, bits) = match list.large.is_empty() {
            true => (Numbers::Zero, 0),
            false => best(list.gaps.len(), list.each(), list.large.iter().copied()),
        };
        *plan = (gaps, magnitudes);
        *coded = *plan;
        if !list.large.is_empty() {
            let shift = list.shift();
            let (chances, counts) = list.chances(shift);
            let saves = bits as f64 - chances.cost(&counts) - list.low_bits(shift, &counts);
            if saves > 0.0 {
                saved += saves;
                *coded = (gaps, Numbers::Coded { shift });
            }
        }
    }
    if saved > CODER_BITS { coded } else { plans }
}

impl List {
    /// The magnitude of each change, less 1.
    fn each(&self) -> impl Iterator<Item = u64> + Clone {
        let mut large = self.large.iter().peekable();
        (0..self.gaps.len())
            .map(move |index| large.next_if(|large| large.0 as usize == index).map_or(0, |large| large.1))
    }

    /// The bits of magnitudes below their tokens.
    fn shift(&self) -> u32 {
        let sum: u64 = self.large.iter().map(|large| large.1.min(1 << 40)).sum();
        (sum / self.gaps.len().max(1) as u64).max(1).ilog2().saturating_sub(MEAN_BITS - 1).min(MAX_RICE)
    }

    /// The chances of the tokens, and how often each comes up.
    fn chances(&self, shift: u32) -> (Chances, [u32; 256]) {
        let mut counts = [0; 256];
        for &(_, more) in &self.large {
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
        let mut last = FIRST_RICE;
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
                let order = i64::from(last) + 1 + unzigzag(bits.exp_golomb(0)?.min(1 << 20));
                last = rice_parameter(order.cast_unsigned())?;
                Numbers::Each { order: last }
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
    let mut tokens = buffers.tokens.iter();
    let mut ends = [0; MAX];
    for (&(count, gaps, magnitudes), end) in header.plans.iter().zip(&mut ends) {
        changes.read(&mut bits, count, gaps, magnitudes, &mut tokens, target.len())?;
        *end = changes.ranks.len();
    }
    bits.finish()?;
    let patch = Patch::<E> { target, classes: &header.classes, changes, ends, tile };
    if level.run(patch) {
        return Ok(());
    }
    Err(Error::corrupt("a change lies behind the last element of its class")
        .with_help("check that the parent is the one that the delta was made from"))
}

impl Buffers {
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

impl Changes {
    /// Reads the `count` changes of a class.
    #[inline(never)]
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
        for target in self.target.chunks_mut(TILE) {
            tile.fill::<E, I>(isa, target, self.classes, &table);
            for class in 0..classes {
                let (first, count) = (seen[class], tile.count(class));
                seen[class] += count;
                let rest = at[class]..ends[class];
                let changes = self.changes.ranks[rest.clone()].iter().zip(&self.changes.steps[rest]);
                let mut done = 0;
                for (rank, step) in changes {
                    let rank = rank - first;
                    if rank >= count {
                        break;
                    }
                    let raw = &mut target[tile.position(isa, class, rank)];
                    *raw = E::load(*raw).plus(E::narrow(*step)).store();
                    done += 1;
                }
                at[class] += done;
            }
        }
        at[..classes] == ends[..classes]
    }
}
