//! Blocks of which few elements change: for each class of old values, the gaps between the changes, counted in
//! elements of that class.

use towline_core::{Error, Result};

use super::bits::{BitReader, BitWriter};
use super::classes::{Census, Classes, MAX};
use super::digests::Written;
use super::elem::Elem;
use super::golomb::MAX_SHIFT;
use super::numbers::{MAGNITUDE_TOKENS, Numbers, best, read_numbers, write_numbers};
use super::ranks::{GapForms, List, Lists, Search, behind_the_last, read_ranks};
use super::rans::{self, Chances, DecodeTable, EncodeTable, Words};
use super::simd::{Instructions, Isa, Kernel};
use super::tiles::{Survey, TileMasks};

/// About the bits of a class in the header.
const CLASS_BITS: f64 = 24.0;
/// The order of the Exp-Golomb code for the words of the magnitudes.
const WORDS_ORDER: u32 = 6;
/// A class's shift leaves this many bits or more of the mean of its coded magnitudes: it is 8 to 15 tokens.
const MEAN_BITS: u32 = 4;
/// The least bits that tables must save: those of the coder's states and the number of its words.
const CODER_BITS: f64 = 56.0;
/// A table takes more than this.
const LEAST_CODED: u64 = 16;

/// Kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) lists: Lists,
    pub(super) changes: Changes,
    buffers: Buffers,
    // On the heap, as that of the lists.
    pub(super) tile: Box<TileMasks>,
}

/// Appends the body of a block with the changes that `survey` found and `census` counted.
#[inline(never)]
pub(super) fn encode(
    level: Instructions,
    survey: &Survey,
    census: Census,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) {
    let Scratch { lists, buffers, .. } = scratch;
    let classes = lists.fill(level, survey, census, CLASS_BITS);
    let lists = lists.of(&classes);
    level.run(Write { level, classes: &classes, lists: &lists, buffers, out });
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
        let mut forms = GapForms::new();
        for (list, plan) in lists.iter().zip(&plans) {
            forms.write(list.gaps.len(), plan.gaps, &mut bits);
            if list.gaps.is_empty() {
                continue;
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
            list.write_gaps(plan.gaps, &mut bits);
            // Of a known length: many at once.
            let (words, rest) = list.gaps.as_chunks::<32>();
            words.iter().for_each(|signs| bits.put(word_of(signs).into(), 32));
            bits.put(word_of(rest).into(), rest.len() as u32);
            write_numbers(plan.magnitudes, list.each(), list.large.iter().copied(), &mut bits);
        }
        bits.finish();
    }
}

/// The signs of up to 32 gaps.
#[inline(always)]
fn word_of(gaps: &[u32]) -> u32 {
    (0..32).zip(gaps).fold(0, |word, (at, gap)| word | (gap & 1) << at)
}

/// The plan of each class.
#[inline(always)]
fn plans(lists: &[List<'_>]) -> Vec<Plan> {
    let (mut plans, mut coded) = (Vec::with_capacity(MAX), Vec::with_capacity(MAX));
    let mut saved = 0.0;
    for list in lists {
        let count = list.gaps.len();
        let gaps = list.best_gaps();
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
        let mut left = elements;
        let mut forms = GapForms::new();
        for _ in 0..classes.count() {
            let (count, gaps) = forms.read(bits, &mut left)?;
            if count == 0 {
                plans.push((0, Numbers::Zero, Numbers::Zero));
                continue;
            }
            let magnitudes = Numbers::read(bits, coded, count as u64)?;
            if let Numbers::Coded { .. } = magnitudes {
                tables.push(Chances::read(bits)?);
            }
            plans.push((count, gaps, magnitudes));
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
pub(super) struct Changes {
    pub(super) ranks: Vec<u32>,
    steps: Vec<u64>,
}

/// Applies a body to `target`.
#[inline(never)]
pub(super) fn decode<E: Elem>(
    level: Instructions,
    body: &[u8],
    target: &mut [E::Raw],
    scratch: &mut Scratch,
    written: &mut dyn FnMut(&[u8], Option<u128>),
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
    let search = Search { classes: &header.classes, ranks: &changes.ranks, ends, tile };
    let written = Written::new(size_of_val(target), written);
    level.run(Patch::<E> { target, search, steps: &changes.steps, written })
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
        read_ranks(gaps, bits, count, elements, &mut self.ranks)?;
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

/// Adds the steps to the elements of their ranks.
struct Patch<'a, E: Elem> {
    target: &'a mut [E::Raw],
    search: Search<'a>,
    steps: &'a [u64],
    written: Written<'a>,
}

impl<E: Elem> Kernel for Patch<'_, E> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Result<()> {
        let Self { target, search, steps, written } = self;
        search.each_tile::<E, I>(isa, target, written, |target, tile, places| {
            // In a loop of its own: the searches would wait for stores whose places are not known yet.
            for &(place, index) in places {
                // Behind the end of a block's last tile there is nothing to change.
                let Some(raw) = target.get_mut(tile.start + usize::from(place)) else {
                    return Err(behind_the_last());
                };
                let step = steps.get(index as usize).map_or_else(E::default, |&step| E::narrow(step));
                *raw = E::load(*raw).plus(step).store();
            }
            Ok(())
        })
    }
}
