//! Which elements differ, and which rank each has within its class: a tile at a time.

use super::classes::{Census, Classes, MAX};
use super::digests::{Digests, Written};
use super::elem::Elem;
use super::simd::{ClassCounts, Counts, Instructions, Isa, Kernel, TILE, WORDS};

/// The class of each element of a tile, as masks with running counts: for those who look for an element of a rank.
#[derive(Debug)]
pub(super) struct TileMasks {
    keys: [u8; TILE],
    /// By the slots of their words.
    masks: [[u64; WORDS]; MAX],
    before: [Counts; MAX],
    counts: [u32; MAX],
}

impl Default for TileMasks {
    fn default() -> Self {
        Self { keys: [0; TILE], masks: [[0; WORDS]; MAX], before: Default::default(), counts: [0; MAX] }
    }
}

impl TileMasks {
    /// Takes at most [`TILE`] elements. With fewer, what is behind the end has classes and ranks too, after those of the
    /// elements: only a block's last tile may be shorter. Has `ahead`, at most half a tile, come into the cache meanwhile,
    /// and of what is `behind` as much digested.
    #[inline(always)]
    pub(super) fn fill<E: Elem, I: Isa>(
        &mut self,
        isa: I,
        old: &[E::Raw],
        ahead: &[E::Raw],
        (behind, written): (&[u8], &mut Written<'_>),
        classes: &Classes,
        table: &[u8; 256],
    ) {
        let (blocks, lanes) = written.next(isa, behind);
        isa.keys::<E>(old, &mut self.keys, ahead, (blocks, lanes));
        isa.class_masks(&self.keys, classes, table, &mut self.masks);
        let classes = self.masks.iter().zip(&mut self.before).zip(&mut self.counts).take(classes.count());
        // No closure: it would not be compiled for the instructions of `isa`.
        for ((masks, before), count) in classes {
            *count = isa.running_counts(masks, before);
        }
    }

    /// The elements of `class`.
    #[inline(always)]
    pub(super) fn count(&self, class: usize) -> u32 {
        self.counts[class]
    }

    /// The element of `class` that has `rank` of them before it; there is one.
    #[inline(always)]
    pub(super) fn position<I: Isa>(&self, isa: I, class: usize, rank: u32) -> usize {
        let before = &self.before[class];
        let column = isa.last_at_most(&before.columns, rank as u16) % 8;
        let (words, rank) = (&before.words[column], rank as u16 - before.columns[column]);
        let row = isa.last_at_most(words, rank) % 8;
        let word = self.masks[class][row * 8 + column];
        (column * 8 + row) * 64 + isa.select(word, u32::from(rank - words[row])) as usize
    }
}

/// How many elements of each class stand before each word of a tile: for those who look for the rank of an element.
#[derive(Debug)]
pub(super) struct TileCounts {
    /// Of a tile that is too short.
    keys: [u8; TILE],
    counts: ClassCounts,
}

impl Default for TileCounts {
    fn default() -> Self {
        Self { keys: [0; TILE], counts: ClassCounts::default() }
    }
}

impl TileCounts {
    /// Begins with the first tile of a block.
    pub(super) fn begin(&mut self) {
        self.counts.begin();
    }

    /// Counts at most [`TILE`] keys; with fewer it is as for [`TileMasks::fill`]. Returns the keys of a whole tile.
    #[inline(always)]
    pub(super) fn fill<'a, I: Isa>(
        &'a mut self,
        isa: I,
        keys: &'a [u8],
        classes: &Classes,
        table: &[u8; 256],
    ) -> (&'a [u8; TILE], &'a ClassCounts) {
        let Self { keys: whole, counts } = self;
        let keys = keys.as_array().unwrap_or_else(|| {
            whole[..keys.len()].copy_from_slice(keys);
            whole
        });
        isa.class_counts(keys, classes, table, counts);
        (keys, counts)
    }
}

/// What one pass over a block's old and new elements finds.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// The key of each old element, and anything behind them.
    keys: Vec<u8>,
    elements: usize,
    /// The places within their tiles of the elements that differ; one word more is writable.
    places: Vec<u16>,
    /// How the element at each place changes: its magnitude less 1, above its sign.
    steps: Vec<u64>,
    /// The sign of the old element at each place, above its key.
    olds: Vec<u16>,
    /// Where the changes of each tile end.
    ends: Vec<usize>,
}

impl Survey {
    /// Finds what differs and counts it in `census`. Returns how many elements that is, or nothing as soon as there
    /// are more than `most`. Calls `read` as [`towline_core::Codec::encode_reading`] does.
    pub(super) fn of<E: Elem>(
        &mut self,
        level: Instructions,
        old: &[E::Raw],
        new: &[E::Raw],
        most: usize,
        census: &mut Census,
        read: &mut dyn FnMut(usize, Option<u128>),
    ) -> Option<usize> {
        let keys = old.len().next_multiple_of(64);
        self.keys.resize(keys.max(self.keys.len()), 0);
        self.elements = old.len();
        self.ends.clear();
        // A tile more than may be found: it is noticed behind the tile.
        let room = most.min(old.len()) + TILE + 64;
        self.places.resize(room.max(self.places.len()), 0);
        self.steps.resize(room.max(self.steps.len()), 0);
        self.olds.resize(room.max(self.olds.len()), 0);
        level.run(Find::<E> { old, new, most, survey: self, census, read })
    }

    /// The key of each old element.
    #[inline(always)]
    pub(super) fn keys(&self) -> &[u8] {
        &self.keys[..self.elements]
    }

    /// Each element that changes, in order: its place in the block, its old key and sign, and its step.
    #[inline(always)]
    pub(super) fn changes(&self) -> impl Iterator<Item = (usize, u16, u64)> {
        let mut start = 0;
        (0..).step_by(TILE).zip(&self.ends).flat_map(move |(first, &end)| {
            let range = std::mem::replace(&mut start, end)..end;
            let changes =
                self.places[range.clone()].iter().zip(&self.olds[range.clone()]).zip(&self.steps[range]);
            changes.map(move |((&place, &old), &step)| (first + usize::from(place), old, step))
        })
    }

    /// The old key and sign, and the step, of a change.
    #[inline(always)]
    pub(super) fn change(&self, index: usize) -> (u16, u64) {
        (self.olds[index], self.steps[index])
    }

    /// The changes of each tile.
    #[inline(always)]
    pub(super) fn tiles(&self) -> impl Iterator<Item = Changes<'_>> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let range = std::mem::replace(&mut start, end)..end;
            let (places, steps) = (&self.places[range.clone()], &self.steps[range.clone()]);
            Changes { places, steps, olds: &self.olds[range] }
        })
    }
}

/// The changes of a tile, as in a [`Survey`].
pub(super) struct Changes<'a> {
    pub(super) places: &'a [u16],
    pub(super) steps: &'a [u64],
    pub(super) olds: &'a [u16],
}

/// Finds what differs.
struct Find<'a, E: Elem> {
    old: &'a [E::Raw],
    new: &'a [E::Raw],
    most: usize,
    survey: &'a mut Survey,
    census: &'a mut Census,
    read: &'a mut dyn FnMut(usize, Option<u128>),
}

impl<E: Elem> Kernel for Find<'_, E> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Option<usize> {
        let Survey { keys, places, steps, olds, ends, .. } = self.survey;
        let (places, steps, olds) = (&mut places[..], &mut steps[..], &mut olds[..]);
        let (mut found, mut done) = (0, 0);
        let unit = E::bytes(self.new);
        let mut digests = Digests::new(unit.len());
        let tiles = self.old.chunks(TILE).zip(self.new.chunks(TILE)).zip(keys.chunks_mut(TILE));
        for ((old, new), keys) in tiles {
            let takes = I::DIGESTS && digests.takes(done..done + size_of_val(new));
            let lanes = takes.then_some(&mut digests.lanes);
            let start = found;
            found += isa.compare::<E>((old, new), keys, &mut places[start..], lanes)?;
            if found > self.most {
                return None;
            }
            ends.push(found);
            let tile = start..found;
            describe::<E>((old, new), &places[tile.clone()], &mut steps[tile.clone()], &mut olds[tile]);
            done += size_of_val(old);
            if !I::DIGESTS {
                (self.read)(done, None);
            } else if let Some((block, digest)) = digests.ended_by(isa, unit, done) {
                (self.read)(block.end, digest);
            }
        }
        self.census.changes(&olds[..found], &steps[..found]);
        Some(found)
    }
}

/// Sets the steps and the old keys at the places of a tile.
#[inline(always)]
fn describe<E: Elem>(tile: (&[E::Raw], &[E::Raw]), places: &[u16], steps: &mut [u64], olds: &mut [u16]) {
    let mut pair = [[E::default(); 64]; 2];
    for ((places, steps), olds) in places.chunks(64).zip(steps.chunks_mut(64)).zip(olds.chunks_mut(64)) {
        // First all loads, then arithmetic on many at once.
        let [from, to] = &mut pair;
        for ((&place, from), to) in places.iter().zip(from).zip(to) {
            let place = usize::from(place) % TILE;
            (*from, *to) = (E::load(tile.0[place]), E::load(tile.1[place]));
        }
        let [from, to] = pair;
        for (((step, old), from), to) in steps.iter_mut().zip(olds).zip(from).zip(to) {
            let change = to.minus(from);
            *step = change.magnitude().wide().wrapping_sub(1) << 1 | u64::from(change.is_negative());
            *old = u16::from(from.is_negative()) << 8 | u16::from(from.key());
        }
    }
}
