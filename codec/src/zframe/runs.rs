//! Reads the frames that [`super::Writer`] writes, straight into a target: a run of zeros leaves it as it is.
//!
//! A general decoder first writes out the mask, most of which is zero. This one knows matches at distance one only,
//! which is what a writer of runs makes. Whatever else it meets ends it, and the library takes over from there.

use super::codes::{LITERAL_DEFAULT, MATCH_DEFAULT, MIN_MATCH, lengths};
use super::fse::Distribution;
use super::read_bits::BackwardBits;
use super::unpack::{Literals, States};
use super::write::BLOCK;
use crate::octave::prefetch;
use crate::xor::xor_into;

/// Literals are read so many at a time.
const SLACK: usize = 16;
/// From so many sequences on their lengths are too different to be guessed.
const MANY: usize = 2048;
/// Above so many bytes such a block is XORed; twice as many still fit the nearest cache.
const WINDOW: usize = 8 << 10;
/// How far ahead of a sequence the target is fetched, and how much of it at a time: little enough that the processor
/// need not wait before it can ask for more.
const AHEAD: usize = 4 << 10;
const LINES: usize = 512;

/// XORs the content of `frame`, a whole frame that says that it holds as many bytes as `target`, into `target`. An
/// error says how many bytes are ready, because the rest was not understood. At most 0.2 MiB are held.
/// Each block is handed to `written` when it is done.
pub(super) fn xor(frame: &[u8], target: &mut [u8], written: &mut dyn FnMut(&[u8])) -> Result<(), usize> {
    let mut reader = Reader {
        target,
        written,
        done: 0,
        literals: Vec::new(),
        huffman: None,
        literal_states: None,
        run_states: None,
        near: false,
        mask: Vec::new(),
    };
    match reader.frame(frame) {
        Some(()) if reader.done == reader.target.len() => Ok(()),
        _ => Err(reader.done),
    }
}

struct Reader<'a> {
    target: &'a mut [u8],
    written: &'a mut dyn FnMut(&[u8]),
    /// How many bytes of the target are ready.
    done: usize,
    literals: Vec<u8>,
    huffman: Option<Box<Literals>>,
    literal_states: Option<Box<States>>,
    run_states: Option<Box<States>>,
    /// Whether the offsets of the block before were all the one that is used last.
    near: bool,
    /// For blocks of many sequences.
    mask: Vec<u8>,
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
        let mut rest = frame.get(5 + usize::from(1 - single) + size..)?;
        loop {
            let (&[low, middle, high], behind) = rest.split_first_chunk::<3>()?;
            let head = u32::from_le_bytes([low, middle, high, 0]);
            let size = (head >> 3) as usize;
            let stored = if head >> 1 & 3 == 1 { 1 } else { size };
            let (block, behind) = behind.split_at_checked(stored)?;
            rest = behind;
            let start = self.done;
            match head >> 1 & 3 {
                0 => self.literal(block)?,
                1 if size <= BLOCK => self.run(size, *block.first()?)?,
                2 => self.block(block)?,
                _ => return None,
            }
            (self.written)(self.target.get(start..self.done)?);
            if head & 1 == 1 {
                return Some(());
            }
        }
    }

    /// XORs bytes.
    fn literal(&mut self, bytes: &[u8]) -> Option<()> {
        xor_into(self.target.get_mut(self.done..self.done + bytes.len())?, bytes);
        self.done += bytes.len();
        Some(())
    }

    /// XORs one byte `length` times.
    fn run(&mut self, length: usize, byte: u8) -> Option<()> {
        let place = self.target.get_mut(self.done..self.done + length)?;
        if byte != 0 {
            xor_all(place, byte);
        }
        self.done += length;
        Some(())
    }

    fn block(&mut self, block: &[u8]) -> Option<()> {
        let mut literals = std::mem::take(&mut self.literals);
        let rest = self.read_literals(block, &mut literals)?;
        let left = self.sequences(rest, &literals)?;
        self.literal(literals.get(left..literals.len() - SLACK)?)?;
        self.literals = literals;
        Some(())
    }

    /// Reads the literals, and [`SLACK`] bytes more. Returns what is behind them.
    fn read_literals<'b>(&mut self, block: &'b [u8], literals: &mut Vec<u8>) -> Option<&'b [u8]> {
        let head = block.iter().take(5).rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let (kind, format) = (head & 3, head >> 2 & 3);
        let field = |from: u32, bits: u32| usize::try_from(head >> from & ((1 << bits) - 1)).ok();
        literals.clear();
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
            if kind == 0 {
                literals.extend_from_slice(now);
            } else {
                literals.resize(length, *now.first()?);
            }
            literals.resize(length + SLACK, 0);
            return Some(rest);
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
        literals.resize(length + SLACK, 0);
        let places = literals.get_mut(..length)?;
        let huffman = self.huffman.as_ref()?;
        if format == 0 {
            huffman.decode(streams.get(at..)?, places)?
        } else {
            huffman.decode_four(streams, at, places)?
        }
        Some(rest)
    }

    /// Carries out the sequences. Returns how many literals they took.
    fn sequences(&mut self, section: &[u8], literals: &[u8]) -> Option<usize> {
        let (&first, rest) = section.split_first()?;
        let (number, rest) = match first {
            0 => return rest.is_empty().then_some(0),
            1..128 => (usize::from(first), rest),
            128..255 => {
                let (&second, rest) = rest.split_first()?;
                ((usize::from(first) - 128) << 8 | usize::from(second), rest)
            }
            255 => return None,
        };
        let (&modes, rest) = rest.split_first()?;
        let rest = table(modes >> 6, rest, &LITERAL_DEFAULT, &LITERALS, &mut self.literal_states)?;
        // The offset code 0 stands for the offset that was used last, which is one at the start of a frame.
        let rest = match modes >> 4 & 3 {
            1 => rest.strip_prefix(&[0])?,
            3 if self.near => rest,
            _ => return None,
        };
        self.near = true;
        let rest = table(modes >> 2 & 3, rest, &MATCH_DEFAULT, &RUNS, &mut self.run_states)?;
        if modes & 3 != 0 {
            return None;
        }
        let (Some(literal_states), Some(run_states)) = (self.literal_states.take(), self.run_states.take())
        else {
            return None;
        };
        let used = self.carry_out(number, rest, literals, &literal_states, &run_states)?;
        (self.literal_states, self.run_states) = (Some(literal_states), Some(run_states));
        Some(used)
    }

    fn carry_out(
        &mut self,
        number: usize,
        stream: &[u8],
        literals: &[u8],
        literal_states: &States,
        run_states: &States,
    ) -> Option<usize> {
        let bits = BackwardBits::new(stream)?;
        let states = (literal_states, run_states);
        let (target, done, ahead) = (&mut *self.target, self.done, Ahead(self.done));
        let used;
        (used, self.done) = if number < MANY {
            let mut place = Sparse { target, done, ahead };
            (carry_out(number, bits, literals, states, &mut place), place.done)
        } else {
            self.mask.resize(2 * WINDOW, 0);
            let mut place = Dense { target, done, ahead, mask: &mut self.mask, at: 0 };
            (carry_out(number, bits, literals, states, &mut place), place.done)
        };
        used
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

/// XORs one byte into all.
fn xor_all(target: &mut [u8], byte: u8) {
    target.iter_mut().for_each(|place| *place ^= byte);
}

/// Carries out sequences. Returns how many literals they took.
#[inline]
fn carry_out(
    number: usize,
    mut bits: BackwardBits<'_>,
    literals: &[u8],
    (literal_states, run_states): (&States, &States),
    place: &mut impl Place,
) -> Option<usize> {
    let mut literal_state = literal_states.begin(&mut bits);
    let mut run_state = run_states.begin(&mut bits);
    let (mut used, mut room) = (0, BLOCK);
    for left in (0..number).rev() {
        bits.refill()?;
        let (run_step, literal_step) = (run_states.step(run_state), literal_states.step(literal_state));
        let run = run_step.value(&mut bits);
        let length = literal_step.value(&mut bits);
        if left > 0 {
            literal_state = literal_step.next(&mut bits);
            run_state = run_step.next(&mut bits);
        }
        room = room.checked_sub(length + run)?;
        // Without literals the code would stand for another offset.
        if length == 0 {
            return None;
        }
        place.put(literals.get(used..)?, length, run)?;
        used += length;
    }
    place.end()?;
    bits.refill()?;
    let rest = (literals.len() - SLACK).checked_sub(used)?;
    (bits.is_done() && rest <= room).then_some(used)
}

/// What sequences are XORed into. How much of it is ready is right also after a `None`, which means that something is
/// missing or does not fit.
trait Place {
    /// XORs the first `length` bytes of `literals`, one at least, then the last of them `run` times. More literals may be
    /// read than that.
    fn put(&mut self, literals: &[u8], length: usize, run: usize) -> Option<()>;

    /// Makes ready what was put.
    fn end(&mut self) -> Option<()>;
}

/// XORs bytes into the target where they belong.
struct Sparse<'a> {
    target: &'a mut [u8],
    done: usize,
    ahead: Ahead,
}

impl Place for Sparse<'_> {
    #[inline]
    fn put(&mut self, literals: &[u8], length: usize, run: usize) -> Option<()> {
        self.ahead.follow(self.target, self.done);
        let place = self.target.get_mut(self.done..)?;
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
        self.done += length;
        if last != 0 {
            xor_all(self.target.get_mut(self.done..self.done + run)?, last);
        }
        self.done += run;
        Some(())
    }

    fn end(&mut self) -> Option<()> {
        (self.done <= self.target.len()).then_some(())
    }
}

/// Writes the bytes side by side and XORs many of them at once: the processor cannot guess how many stand between two
/// runs where there are many, and need not here.
struct Dense<'a> {
    target: &'a mut [u8],
    done: usize,
    ahead: Ahead,
    /// `at` bytes that come next, and zeros.
    mask: &'a mut [u8],
    at: usize,
}

impl Dense<'_> {
    fn flush(&mut self) -> Option<()> {
        let place = self.target.get_mut(self.done..self.done + self.at)?;
        // The rest is zero.
        let mask = self.mask.get_mut(..self.at.min(2 * WINDOW))?;
        xor_into(place, mask);
        mask.fill(0);
        self.done += self.at;
        self.at = 0;
        Some(())
    }
}

impl Place for Dense<'_> {
    #[inline]
    fn put(&mut self, literals: &[u8], length: usize, run: usize) -> Option<()> {
        self.ahead.follow(self.target, self.done + self.at);
        if length <= SLACK {
            *self.mask.get_mut(self.at..)?.first_chunk_mut::<SLACK>()? = *literals.first_chunk()?;
            self.at += length;
            *self.mask.get_mut(self.at..)?.first_chunk_mut()? = [0; SLACK];
        } else {
            for piece in literals.get(..length)?.chunks(WINDOW / 2) {
                self.mask.get_mut(self.at..self.at + piece.len())?.copy_from_slice(piece);
                self.at += piece.len();
                if self.at > WINDOW {
                    self.flush()?;
                }
            }
        }
        let last = *literals.get(length - 1)?;
        if last != 0 {
            self.flush()?;
            xor_all(self.target.get_mut(self.done..self.done + run)?, last);
            self.done += run;
            return Some(());
        }
        self.at += run;
        if self.at > WINDOW { self.flush() } else { Some(()) }
    }

    fn end(&mut self) -> Option<()> {
        self.flush()
    }
}

static LITERALS: [(u32, u32); 36] = lengths(0);
static RUNS: [(u32, u32); 53] = lengths(MIN_MATCH);

/// The states that `mode` tells, and what is behind its header.
fn table<'b>(
    mode: u8,
    rest: &'b [u8],
    default: &[i16],
    meanings: &[(u32, u32)],
    states: &mut Option<Box<States>>,
) -> Option<&'b [u8]> {
    match mode {
        0 => {
            *states = Some(Box::new(States::of(&Distribution::fixed(default), meanings)));
            Some(rest)
        }
        1 => {
            let (&symbol, rest) = rest.split_first()?;
            *states = Some(Box::new(States::one(symbol, meanings)?));
            Some(rest)
        }
        2 => {
            let (distribution, length) = Distribution::read(rest, default.len(), 9)?;
            *states = Some(Box::new(States::of(&distribution, meanings)));
            rest.get(length..)
        }
        _ => states.is_some().then_some(rest),
    }
}
