//! Reads the frames that [`super::Writer`] writes, straight into a target: a run of zeros leaves it as it is.
//!
//! A general decoder first writes out the mask, most of which is zero. This one knows matches at distance one only,
//! which is what a writer of runs makes. Whatever else it meets ends it, and the library takes over from there.

use super::codes::{LITERAL_DEFAULT, MATCH_DEFAULT, MIN_MATCH, lengths};
use super::fse::Distribution;
use super::read_bits::BackwardBits;
use super::unpack::{Literals, States};
use crate::xor::xor_into;

/// The longest block that the format allows.
const BLOCK: usize = 128 << 10;
/// Literals are read 8 at a time.
const SLACK: usize = 8;

/// XORs the content of `frame`, a whole frame that says that it holds as many bytes as `target`, into `target`. An
/// error says how many bytes are ready, because the rest was not understood. At most 0.2 MiB are held.
/// Each block is handed to `written` when it is done.
pub(super) fn xor(frame: &[u8], target: &mut [u8], written: &mut dyn FnMut(&[u8])) -> Result<(), usize> {
    let mut reader = Reader {
        target,
        written,
        done: 0,
        last: 0,
        literals: Vec::new(),
        huffman: None,
        literal_states: None,
        run_states: None,
        near: false,
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
    /// The byte of the content before.
    last: u8,
    literals: Vec<u8>,
    huffman: Option<Box<Literals>>,
    literal_states: Option<Box<States>>,
    run_states: Option<Box<States>>,
    /// Whether the offsets of the block before were all the one that is used last.
    near: bool,
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
                1 if size <= BLOCK => {
                    self.last = *block.first()?;
                    self.run(size)?;
                }
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
        self.last = *bytes.last().unwrap_or(&self.last);
        self.done += bytes.len();
        Some(())
    }

    /// XORs the last byte `length` times.
    fn run(&mut self, length: usize) -> Option<()> {
        let place = self.target.get_mut(self.done..self.done + length)?;
        if self.last != 0 {
            place.iter_mut().for_each(|byte| *byte ^= self.last);
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
        let (bits, at) = match format {
            0 | 1 => (10, 3),
            2 => (14, 4),
            _ => (18, 5),
        };
        let (length, packed) = (field(4, bits)?, field(4 + bits, bits)?);
        // The library reads more literals a second; here the zeros between them are what is fast.
        if length > BLOCK / 2 {
            return None;
        }
        let (mut streams, rest) = block.get(at..)?.split_at_checked(packed)?;
        if kind == 2 {
            let (huffman, described) = Literals::read(streams)?;
            self.huffman = Some(huffman);
            streams = streams.get(described..)?;
        }
        literals.resize(length + SLACK, 0);
        let places = literals.get_mut(..length)?;
        let huffman = self.huffman.as_ref()?;
        if format == 0 {
            huffman.decode(streams, places)?
        } else {
            huffman.decode_four(streams, places)?
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
        let rest = table(modes >> 6, rest, &LITERAL_DEFAULT, &mut self.literal_states)?;
        // The offset code 0 stands for the offset that was used last, which is one at the start of a frame.
        let rest = match modes >> 4 & 3 {
            1 => rest.strip_prefix(&[0])?,
            3 if self.near => rest,
            _ => return None,
        };
        self.near = true;
        let rest = table(modes >> 2 & 3, rest, &MATCH_DEFAULT, &mut self.run_states)?;
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
        static LITERALS: [(u32, u32); 36] = lengths(0);
        static RUNS: [(u32, u32); 53] = lengths(MIN_MATCH);
        let mut bits = BackwardBits::new(stream)?;
        let mut literal_state = literal_states.begin(&mut bits);
        let mut run_state = run_states.begin(&mut bits);
        let (mut used, end, limit) = (0, literals.len() - SLACK, self.done + BLOCK);
        for left in (0..number).rev() {
            bits.refill()?;
            let &(run, extra) = RUNS.get(usize::from(run_states.symbol(run_state)))?;
            let run = (run + bits.take(extra)) as usize;
            let &(length, extra) = LITERALS.get(usize::from(literal_states.symbol(literal_state)))?;
            let length = (length + bits.take(extra)) as usize;
            if left > 0 {
                literal_state = literal_states.next(literal_state, &mut bits);
                run_state = run_states.next(run_state, &mut bits);
            }
            // Without literals the code would stand for another offset.
            if length == 0 || length > end - used || self.done + length + run > limit {
                return None;
            }
            let now = literals.get(used..used + length)?;
            let place = self.target.get_mut(self.done..self.done + length.max(8));
            match (place, literals.get(used..used + 8)) {
                (Some(place), Some(eight)) if length <= 8 => {
                    let (place, eight) = (place.first_chunk_mut::<8>()?, eight.first_chunk::<8>()?);
                    let mask = u64::from_le_bytes(*eight) & u64::MAX >> (64 - 8 * length);
                    *place = (u64::from_le_bytes(*place) ^ mask).to_le_bytes();
                    self.done += length;
                    self.last = *now.last()?;
                }
                _ => self.literal(now)?,
            }
            used += length;
            self.run(run)?;
        }
        bits.refill()?;
        (bits.is_done() && self.done + (end - used) <= limit).then_some(used)
    }
}

/// The states that `mode` tells, and what is behind its header.
fn table<'b>(
    mode: u8,
    rest: &'b [u8],
    default: &[i16],
    states: &mut Option<Box<States>>,
) -> Option<&'b [u8]> {
    match mode {
        0 => {
            *states = Some(Box::new(States::of(&Distribution::fixed(default))));
            Some(rest)
        }
        1 => {
            let (&symbol, rest) = rest.split_first()?;
            *states = Some(Box::new(States::one(symbol)));
            Some(rest)
        }
        2 => {
            let (distribution, length) = Distribution::read(rest, default.len(), 9)?;
            *states = Some(Box::new(States::of(&distribution)));
            rest.get(length..)
        }
        _ => states.is_some().then_some(rest),
    }
}
