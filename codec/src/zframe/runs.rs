//! Reads the frames that [`super::Writer`] writes, straight into a target: a run of zeros leaves it as it is.
//!
//! A general decoder first writes out the mask, most of which is zero. This one knows matches at distance one only,
//! which is what a writer of runs makes. Whatever else it meets ends it, and the library takes over from there.

use std::sync::Arc;

use super::codes::{LITERAL_DEFAULT, MATCH_DEFAULT, MIN_MATCH, lengths};
use super::fse::Distribution;
use super::parts::Sequence;
use super::sequences::Sequences;
use super::unpack::{Literals, States};
use super::write::BLOCK;
use crate::octave::{prefetch, xor_and_clear};
use crate::spare::Spare;
use crate::xor::xor_into;

/// Literals are read so many at a time.
const SLACK: usize = 16;
/// Sequences are decoded and XORed so many at a time.
const BATCH: usize = 128;
/// Blocks of so many sequences are decoded two at a time. Fewer take less time than the target does to come.
const MANY: usize = 1024;
/// Sequences of so many bytes together are XORed together; twice as many bytes still fit the nearest cache.
const WINDOW: usize = 8 << 10;
/// How far ahead of a sequence the target is fetched, and how much of it at a time: little enough that the processor
/// need not wait before it can ask for more.
const AHEAD: usize = 4 << 10;
const LINES: usize = 512;

/// The buffers of readers that are done: most frames are so small that making buffers would show.
static SPARE: Spare<Buffers> = Spare::new();

/// XORs the content of `frame`, a whole frame that says that it holds as many bytes as `target`, into `target`. An
/// error says how many bytes are ready, because the rest was not understood. At most 0.9 MiB are held.
/// What is ready is handed to `written` block by block.
pub(super) fn xor(frame: &[u8], target: &mut [u8], written: &mut dyn FnMut(&[u8])) -> Result<(), usize> {
    let mut buffers = SPARE.take();
    // A frame that failed may have left something.
    buffers.mask.fill(0);
    let mut reader = Reader {
        target,
        written,
        done: 0,
        handed: 0,
        huffman: None,
        literal_states: None,
        run_states: None,
        near: false,
        buffers: &mut buffers,
    };
    let read = reader.frame(frame);
    reader.hand_over();
    [reader.literal_states.take(), reader.run_states.take()]
        .into_iter()
        .flatten()
        .for_each(|states| reader.buffers.keep(states));
    let (done, whole) = (reader.done, reader.done == reader.target.len());
    SPARE.put(buffers);
    if read.is_some() && whole { Ok(()) } else { Err(done) }
}

struct Reader<'a> {
    target: &'a mut [u8],
    written: &'a mut dyn FnMut(&[u8]),
    /// How many bytes of the target are ready.
    done: usize,
    /// How many of them were handed over.
    handed: usize,
    huffman: Option<Box<Literals>>,
    literal_states: Option<Arc<States>>,
    run_states: Option<Arc<States>>,
    /// Whether the offsets of the block before were all the one that is used last.
    near: bool,
    buffers: &'a mut Buffers,
}

/// What a reader needs besides its target.
struct Buffers {
    mask: Box<[u8; WINDOW + SLACK]>,
    literals: Vec<Vec<u8>>,
    lists: Vec<Vec<Sequence>>,
    states: Vec<Arc<States>>,
}

impl Buffers {
    /// Keeps states that nobody uses any more for others to come.
    fn keep(&mut self, mut states: Arc<States>) {
        if Arc::get_mut(&mut states).is_some() {
            self.states.push(states);
        }
    }

    /// Makes `states` those that `mode` tells. Returns what is behind their header.
    fn table<'b>(
        &mut self,
        mode: u8,
        rest: &'b [u8],
        default: &[i16],
        meanings: &[(u32, u32)],
        states: &mut Option<Arc<States>>,
    ) -> Option<&'b [u8]> {
        if mode == 3 {
            return states.is_some().then_some(rest);
        }
        let mut fresh = self.states.pop().unwrap_or_default();
        let behind = match mode {
            0 => {
                Arc::get_mut(&mut fresh)?.set(&Distribution::fixed(default), meanings);
                rest
            }
            1 => {
                let (&symbol, behind) = rest.split_first()?;
                Arc::get_mut(&mut fresh)?.set_one(symbol, meanings)?;
                behind
            }
            _ => {
                let (distribution, length) = Distribution::read(rest, default.len(), 9)?;
                Arc::get_mut(&mut fresh)?.set(&distribution, meanings);
                rest.get(length..)?
            }
        };
        if let Some(old) = states.replace(fresh) {
            self.keep(old);
        }
        Some(behind)
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            mask: Box::new([0; WINDOW + SLACK]),
            literals: Vec::new(),
            lists: Vec::new(),
            states: Vec::new(),
        }
    }
}

/// A block of a frame.
#[derive(Clone, Copy)]
struct Block<'b> {
    /// 0: stored, 1: one byte many times, 2: packed.
    kind: u32,
    /// What its header says.
    size: usize,
    last: bool,
    bytes: &'b [u8],
    /// The frame up to its end.
    frame: &'b [u8],
}

impl<'b> Block<'b> {
    /// The block at `at`.
    fn read(frame: &'b [u8], at: usize) -> Option<Self> {
        let &[low, middle, high] = frame.get(at..)?.first_chunk()?;
        let head = u32::from_le_bytes([low, middle, high, 0]);
        let (kind, size) = (head >> 1 & 3, (head >> 3) as usize);
        let stored = if kind == 1 { 1 } else { size };
        let frame = frame.get(..at + 3 + stored)?;
        Some(Self { kind, size, last: head & 1 == 1, bytes: frame.get(at + 3..)?, frame })
    }
}

/// A packed block whose literals are decoded.
struct Packed<'b> {
    /// The first `count` are the block's, of at least [`SLACK`] more.
    literals: Vec<u8>,
    count: usize,
    /// Its first sequences.
    list: Vec<Sequence>,
    /// Those behind them.
    rest: Option<Sequences<'b>>,
}

impl Packed<'_> {
    fn has_many(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| rest.len() >= MANY)
    }

    /// Decodes the sequences of two blocks side by side. If either is damaged, none of them.
    fn decode_both(one: &mut Self, other: &mut Self) {
        if let (Some(rest), Some(other_rest)) = (&mut one.rest, &mut other.rest) {
            let before = (rest.clone(), other_rest.clone());
            if Sequences::fill_both(rest, other_rest, [&mut one.list, &mut other.list]).is_none() {
                (*rest, *other_rest) = before;
                one.list.clear();
                other.list.clear();
            }
        }
    }
}

impl Reader<'_> {
    fn frame(&mut self, frame: &[u8]) -> Option<()> {
        let descriptor = *frame.get(4)?;
        let single = descriptor >> 5 & 1;
        let size = match descriptor >> 6 {
            0 => usize::from(single),
            1 => 2,
            2 => 4,
            _ => 8,
        };
        // Dictionaries and checksums are not for this reader.
        if descriptor & 0x1f != 0 {
            return None;
        }
        let mut at = 5 + usize::from(1 - single) + size;
        loop {
            let mut block = Block::read(frame, at)?;
            match block.kind {
                0 => self.literal(block.bytes)?,
                1 if block.size <= BLOCK => self.run(block.size, *block.bytes.first()?)?,
                2 => block = self.packed(frame, block)?,
                _ => return None,
            }
            if block.last {
                return Some(());
            }
            at = block.frame.len();
        }
    }

    /// Carries out a packed block, and the one behind it if both have many sequences. Returns the last one.
    fn packed<'b>(&mut self, frame: &'b [u8], block: Block<'b>) -> Option<Block<'b>> {
        let mut first = self.open(block)?;
        let next = if block.last || !first.has_many() { None } else { Block::read(frame, block.frame.len()) };
        // What cannot be opened is met again when its turn comes.
        let mut second = next.filter(|next| next.kind == 2).and_then(|next| Some((next, self.open(next)?)));
        if let Some((_, second)) = second.as_mut().filter(|(_, second)| second.has_many()) {
            Packed::decode_both(&mut first, second);
        }
        self.carry_out(first)?;
        let Some((next, second)) = second else { return Some(block) };
        self.carry_out(second)?;
        Some(next)
    }

    /// Hands over what became ready since the last time.
    fn hand_over(&mut self) {
        if let Some(ready) = self.target.get(self.handed..self.done).filter(|ready| !ready.is_empty()) {
            (self.written)(ready);
        }
        self.handed = self.done;
    }

    /// XORs bytes.
    fn literal(&mut self, bytes: &[u8]) -> Option<()> {
        let place = self.target.get_mut(self.done..self.done + bytes.len())?;
        xor_into(place, bytes);
        self.done += bytes.len();
        self.hand_over();
        Some(())
    }

    /// XORs one byte `length` times.
    fn run(&mut self, length: usize, byte: u8) -> Option<()> {
        let place = self.target.get_mut(self.done..self.done + length)?;
        if byte != 0 {
            xor_all(place, byte);
        }
        self.done += length;
        self.hand_over();
        Some(())
    }

    /// Decodes the literals of a packed block, and what comes before its sequences.
    fn open<'b>(&mut self, block: Block<'b>) -> Option<Packed<'b>> {
        let mut literals = self.buffers.literals.pop().unwrap_or_default();
        let mut list = self.buffers.lists.pop().unwrap_or_default();
        list.clear();
        let (count, section) = self.read_literals(block.bytes, &mut literals)?;
        let rest = self.sequences(block.frame, section)?;
        Some(Packed { literals, count, list, rest })
    }

    /// Carries out a packed block.
    fn carry_out(&mut self, block: Packed<'_>) -> Option<()> {
        let Packed { literals, count, list, mut rest } = block;
        let mut place = Place {
            target: self.target,
            ahead: Ahead(self.done),
            done: &mut self.done,
            mask: &mut self.buffers.mask,
            at: 0,
            literals: literals.get(..count + SLACK)?,
            room: BLOCK,
        };
        list.chunks(BATCH).try_for_each(|batch| place.put(batch))?;
        let mut batch = [Sequence::default(); BATCH];
        while let Some(rest) = rest.as_mut().filter(|rest| rest.len() > 0) {
            let count = rest.fill(&mut batch)?;
            place.put(batch.get(..count)?)?;
        }
        place.end()?;
        self.hand_over();
        self.buffers.literals.push(literals);
        self.buffers.lists.push(list);
        rest.into_iter().flat_map(Sequences::into_states).for_each(|states| self.buffers.keep(states));
        Some(())
    }

    /// Reads literals to the start of `literals`, where at least [`SLACK`] bytes more follow. Returns their number and what
    /// is behind them.
    fn read_literals<'b>(&mut self, block: &'b [u8], literals: &mut Vec<u8>) -> Option<(usize, &'b [u8])> {
        let head = block.iter().take(5).rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let (kind, format) = (head & 3, head >> 2 & 3);
        let field = |from: u32, bits: u32| usize::try_from(head >> from & ((1 << bits) - 1)).ok();
        if kind < 2 {
            let (length, at) = match format {
                0 | 2 => (field(3, 5)?, 1),
                1 => (field(4, 12)?, 2),
                _ => (field(4, 20)?, 3),
            };
            let stored = if kind == 0 { length } else { 1 };
            let (now, rest) = block.get(at..)?.split_at_checked(stored)?;
            if length > BLOCK {
                return None;
            }
            let places = room(literals, length);
            if kind == 0 {
                places.copy_from_slice(now);
            } else {
                places.fill(*now.first()?);
            }
            return Some((length, rest));
        }
        let (bits, mut at) = match format {
            0 | 1 => (10, 3),
            2 => (14, 4),
            _ => (18, 5),
        };
        let (length, packed) = (field(4, bits)?, field(4 + bits, bits)?);
        // The library reads more literals a second; here the zeros between them are what is fast.
        if length > BLOCK / 2 {
            return None;
        }
        let (streams, rest) = block.split_at_checked(at + packed)?;
        if kind == 2 {
            let (huffman, described) = Literals::read(streams.get(at..)?)?;
            self.huffman = Some(huffman);
            at += described;
        }
        let huffman = self.huffman.as_ref()?;
        let places = room(literals, length);
        if format == 0 {
            huffman.decode(streams.get(at..)?, places)?
        } else {
            huffman.decode_four(streams, at, places)?
        }
        Some((length, rest))
    }

    /// Reads what comes before the sequences, at the end of `frame`.
    fn sequences<'b>(&mut self, frame: &'b [u8], section: &'b [u8]) -> Option<Option<Sequences<'b>>> {
        let (&first, rest) = section.split_first()?;
        let (number, rest) = match first {
            0 => return rest.is_empty().then_some(None),
            1..128 => (usize::from(first), rest),
            128..255 => {
                let (&second, rest) = rest.split_first()?;
                ((usize::from(first) - 128) << 8 | usize::from(second), rest)
            }
            255 => return None,
        };
        let (&modes, rest) = rest.split_first()?;
        let rest =
            self.buffers.table(modes >> 6, rest, &LITERAL_DEFAULT, &LITERALS, &mut self.literal_states)?;
        // The offset code 0 stands for the offset that was used last, which is one at the start of a frame.
        let rest = match modes >> 4 & 3 {
            1 => rest.strip_prefix(&[0])?,
            3 if self.near => rest,
            _ => return None,
        };
        self.near = true;
        let rest = self.buffers.table(modes >> 2 & 3, rest, &MATCH_DEFAULT, &RUNS, &mut self.run_states)?;
        if modes & 3 != 0 {
            return None;
        }
        let (literals, runs) = (self.literal_states.clone()?, self.run_states.clone()?);
        Sequences::new(number, frame, rest.len(), literals, runs).map(Some)
    }
}

/// Has the target come into the cache bit by bit, before the sequences that change it.
struct Ahead(usize);

impl Ahead {
    #[inline]
    fn follow(&mut self, target: &[u8], done: usize) {
        while self.0 < done + AHEAD {
            if let Some(lines) = target.get(self.0..self.0 + LINES) {
                prefetch(lines);
            }
            self.0 += LINES;
        }
    }
}

/// The first `length` bytes of a buffer, which has at least [`SLACK`] more.
fn room(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length + SLACK {
        buffer.resize(length + SLACK, 0);
    }
    &mut buffer[..length]
}

/// XORs one byte into all.
fn xor_all(target: &mut [u8], byte: u8) {
    target.iter_mut().for_each(|place| *place ^= byte);
}

/// What a block is XORed into.
struct Place<'a> {
    target: &'a mut [u8],
    /// How much of the target is ready, whatever fails.
    done: &'a mut usize,
    ahead: Ahead,
    /// `at` bytes that come next, and zeros.
    mask: &'a mut [u8; WINDOW + SLACK],
    at: usize,
    /// Those that are left, and [`SLACK`] bytes more.
    literals: &'a [u8],
    /// How many bytes the block may still have.
    room: usize,
}

impl Place<'_> {
    /// XORs sequences, each with one literal at least.
    fn put(&mut self, batch: &[Sequence]) -> Option<()> {
        let lengths = batch.iter().map(|sequence| sequence.literals as usize).sum::<usize>();
        let runs = batch.iter().map(|sequence| sequence.run as usize).sum::<usize>();
        self.room = self.room.checked_sub(lengths + runs)?;
        let (now, later) = (self.literals, self.literals.get(lengths..)?);
        self.literals = later;
        if lengths + runs > WINDOW {
            self.put_far(batch, now)
        } else {
            self.put_near(batch, now, lengths + runs)
        }
    }

    /// XORs what is left of the literals.
    fn end(&mut self) -> Option<()> {
        self.flush()?;
        let rest = self.literals.len().checked_sub(SLACK).filter(|rest| *rest <= self.room)?;
        xor_into(self.target.get_mut(*self.done..*self.done + rest)?, self.literals.get(..rest)?);
        *self.done += rest;
        Some(())
    }

    /// XORs sequences that lie so far from each other that each is XORed where it belongs.
    fn put_far(&mut self, batch: &[Sequence], mut literals: &[u8]) -> Option<()> {
        self.flush()?;
        for sequence in batch {
            let (length, run) = (sequence.literals as usize, sequence.run as usize);
            self.ahead.follow(self.target, *self.done);
            let place = self.target.get_mut(*self.done..)?;
            let last = match (place.first_chunk_mut::<8>(), literals.first_chunk::<8>()) {
                (Some(place), Some(eight)) if length <= 8 => {
                    let above = 64 - 8 * length;
                    let mask = u64::from_le_bytes(*eight) << above;
                    *place = (u64::from_le_bytes(*place) ^ mask >> above).to_le_bytes();
                    mask.to_le_bytes()[7]
                }
                _ => {
                    let literals = literals.get(..length)?;
                    xor_into(place.get_mut(..length)?, literals);
                    *literals.last()?
                }
            };
            *self.done += length;
            if last != 0 {
                xor_all(self.target.get_mut(*self.done..*self.done + run)?, last);
            }
            *self.done += run;
            literals = literals.get(length..)?;
        }
        Some(())
    }

    /// XORs sequences of `total` bytes. Where there are many, the processor cannot guess how many literals stand between
    /// two runs, and need not here: they are written side by side, and XORed many at once.
    fn put_near(&mut self, batch: &[Sequence], mut literals: &[u8], total: usize) -> Option<()> {
        if self.at + total > WINDOW {
            self.flush()?;
        }
        self.ahead.follow(self.target, *self.done + self.at + total);
        let mut at = self.at;
        for sequence in batch {
            let (length, run) = (sequence.literals as usize, sequence.run as usize);
            if length <= SLACK {
                *self.mask[at % WINDOW..].first_chunk_mut::<SLACK>()? = *literals.first_chunk()?;
                *self.mask[(at + length) % WINDOW..].first_chunk_mut::<SLACK>()? = [0; SLACK];
            } else {
                self.mask.get_mut(at..at + length)?.copy_from_slice(literals.get(..length)?);
            }
            at += length;
            let last = *literals.get(length - 1)?;
            literals = literals.get(length..)?;
            if last != 0 {
                self.mask.get_mut(at..at + run)?.fill(last);
            }
            at += run;
        }
        self.at = at;
        Some(())
    }

    fn flush(&mut self) -> Option<()> {
        let place = self.target.get_mut(*self.done..*self.done + self.at)?;
        xor_and_clear(place, self.mask.get_mut(..self.at)?);
        *self.done += self.at;
        self.at = 0;
        Some(())
    }
}

static LITERALS: [(u32, u32); 36] = lengths(0);
static RUNS: [(u32, u32); 53] = lengths(MIN_MATCH);
