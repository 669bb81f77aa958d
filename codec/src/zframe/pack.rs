//! The two sections of a compressed block: literals and sequences (RFC 8878, section 3.1.1.3).

use super::bits::BitWriter;
use super::codes::{LITERAL_DEFAULT, MATCH_DEFAULT, MIN_MATCH, literal_code, match_code};
use super::fse::{BIT, Distribution, Encoder, State};
use super::huffman::{Code, count};
use super::parts::{Parts, Sequence};
use crate::tally::{Counts, Tally};

/// Below this many literals one stream is smaller than four.
const FOUR_STREAMS: usize = 256;
/// From so many literals on one in [`COUNTED`] is counted.
const MANY: usize = 64 << 10;
const COUNTED: u32 = 4;
/// How many bytes a new table must save to be worth its time.
const WORTH: u64 = 4;

/// What the blocks before have told the decoder.
#[derive(Default)]
pub(super) struct Tables {
    huffman: Option<Box<Code>>,
    literals: Option<Lengths>,
    runs: Option<Lengths>,
}

/// How the lengths of literals or of runs are coded.
enum Lengths {
    One(u8),
    Many(Box<(Distribution, Encoder)>),
}

impl Tables {
    /// Takes over those that a block brought.
    pub(super) fn keep(&mut self, new: Self) {
        self.huffman = new.huffman.or(self.huffman.take());
        self.literals = new.literals.or(self.literals.take());
        self.runs = new.runs.or(self.runs.take());
    }
}

impl Parts {
    /// The content of a compressed block: its length in `buffer`, or `None` if it is not worth it.
    pub(super) fn pack(&self, tables: &Tables, new: &mut Tables, buffer: &mut [u8]) -> Option<usize> {
        let literals = self.pack_literals(tables, new, buffer)?;
        let sequences = self.pack_sequences(tables, new, buffer.get_mut(literals..)?)?;
        Some(literals + sequences)
    }

    fn pack_literals(&self, tables: &Tables, new: &mut Tables, buffer: &mut [u8]) -> Option<usize> {
        let literals = self.literals.get(..self.count as usize)?;
        let counts = count_some(literals);
        if let Some(first) = literals.first()
            && literals.len() > 1
            && counts[usize::from(*first)] as usize == literals.len()
        {
            let head = plain_head(1, literals.len(), buffer)?;
            *buffer.get_mut(head)? = *first;
            return Some(head + 1);
        }
        let packed =
            pack_huffman(literals, &counts, tables, new, buffer).filter(|&length| length < literals.len());
        if packed.is_some() {
            return packed;
        }
        new.huffman = None;
        let head = plain_head(0, literals.len(), buffer)?;
        buffer.get_mut(head..head + literals.len())?.copy_from_slice(literals);
        Some(head + literals.len())
    }

    fn pack_sequences(&self, tables: &Tables, new: &mut Tables, buffer: &mut [u8]) -> Option<usize> {
        let number = u32::try_from(self.sequences().len()).ok()?;
        let [low, high, ..] = number.to_le_bytes();
        let mut at = match number {
            0 => {
                *buffer.first_mut()? = 0;
                return Some(1);
            }
            1..0x80 => {
                *buffer.first_mut()? = low;
                1
            }
            0x80..0x7f00 => {
                buffer.get_mut(..2)?.copy_from_slice(&[high + 0x80, low]);
                2
            }
            _ => return None,
        };
        let sequences: Vec<Coded> = self.sequences().iter().copied().map(Coded::of).collect();
        let [literal_counts, run_counts] = count_codes(&sequences);
        let modes = at;
        at += 1;
        let (literal_mode, length) = choose(
            &literal_counts,
            number,
            &LITERAL_DEFAULT,
            &tables.literals,
            &mut new.literals,
            buffer.get_mut(at..)?,
        )?;
        at += length;
        // Every match is at the distance of the one before: first code of all, always the same.
        *buffer.get_mut(at)? = 0;
        at += 1;
        let (run_mode, length) =
            choose(&run_counts, number, &MATCH_DEFAULT, &tables.runs, &mut new.runs, buffer.get_mut(at..)?)?;
        at += length;
        *buffer.get_mut(modes)? = literal_mode << 6 | 1 << 4 | run_mode << 2;
        let literals = new.literals.as_ref().or(tables.literals.as_ref())?;
        let runs = new.runs.as_ref().or(tables.runs.as_ref())?;
        let mut out = BitWriter::new(buffer.get_mut(at..)?);
        match (literals, runs) {
            (Lengths::Many(literals), Lengths::Many(runs)) => {
                encode(&sequences, Some(&literals.1), Some(&runs.1), &mut out);
            }
            (Lengths::Many(literals), Lengths::One(_)) => {
                encode(&sequences, Some(&literals.1), None, &mut out);
            }
            (Lengths::One(_), Lengths::Many(runs)) => encode(&sequences, None, Some(&runs.1), &mut out),
            (Lengths::One(_), Lengths::One(_)) => encode(&sequences, None, None, &mut out),
        }
        Some(at + out.end_marked()?)
    }
}

/// The two lengths of a sequence as codes.
#[derive(Clone, Copy)]
struct Coded {
    literals: u8,
    run: u8,
    /// How many bits follow the codes.
    bits: u8,
    /// The lowest bits of both lengths, those of the literals lower.
    extra: u32,
}

impl Coded {
    #[inline]
    fn of(sequence: Sequence) -> Self {
        let run = sequence.run - MIN_MATCH;
        let (literals, runs) = (literal_code(sequence.literals), match_code(run));
        Self {
            literals: literals.code,
            run: runs.code,
            bits: literals.extra + runs.extra,
            extra: u32::from(literals.low) | u32::from(runs.low) << literals.extra,
        }
    }
}

/// How often each code of literal lengths and of runs occurs.
fn count_codes(sequences: &[Coded]) -> [[u32; 64]; 2] {
    // Two of each: one sequence after another in one table would wait for the increment of its like.
    let mut counts = [[[0; 64]; 2]; 2];
    for pair in sequences.chunks(2) {
        for (sequence, [literals, runs]) in pair.iter().zip(&mut counts) {
            literals[usize::from(sequence.literals) % 64] += 1;
            runs[usize::from(sequence.run) % 64] += 1;
        }
    }
    let [mut sums, others] = counts;
    sums.as_flattened_mut().iter_mut().zip(others.as_flattened()).for_each(|(sum, count)| *sum += count);
    sums
}

/// The head of literals that are stored (0) or are one byte many times (1).
fn plain_head(kind: u32, length: usize, buffer: &mut [u8]) -> Option<usize> {
    let length = u32::try_from(length).ok()?;
    let (head, bytes) = match length {
        0..32 => (kind | length << 3, 1),
        32..4096 => (kind | 1 << 2 | length << 4, 2),
        _ => (kind | 3 << 2 | length << 4, 3),
    };
    buffer.get_mut(..bytes)?.copy_from_slice(head.to_le_bytes().get(..bytes)?);
    Some(bytes)
}

/// How often each byte occurs; of many bytes about, from a part of them, as if each occurred, unless that shows one alone.
fn count_some(literals: &[u8]) -> Counts {
    if literals.len() < MANY {
        return count(literals);
    }
    let mut tally = Tally::default();
    let stretches = literals.as_chunks::<64>().0;
    stretches.iter().step_by(COUNTED as usize).for_each(|stretch| tally.add(stretch));
    let counts = tally.counts();
    if counts.iter().filter(|count| **count > 0).count() == 1 {
        return count(literals);
    }
    counts.map(|count| (count * COUNTED).max(1))
}

/// Literals by their frequency.
fn pack_huffman(
    literals: &[u8],
    counts: &Counts,
    tables: &Tables,
    new: &mut Tables,
    buffer: &mut [u8],
) -> Option<usize> {
    let old = tables.huffman.as_ref().and_then(|code| Some((code, code.cost(counts)? / 8)));
    let mut described = [0; 136];
    // Below this many literals even a perfect code does not pay for its description.
    let fresh = if literals.len() < 32 { None } else { Code::of(counts) };
    let fresh = fresh.and_then(|code| {
        let head = code.write(&mut described)?;
        let cost = code.cost(counts)? / 8 + head as u64 + WORTH;
        Some((Box::new(code), head, cost))
    });
    let fresh = fresh.filter(|(_, _, cost)| old.is_none_or(|(_, old)| *cost < old));
    let (kind, code, description) = match (&fresh, old) {
        (Some((code, head, _)), _) => (2, code, described.get(..*head)?),
        (None, Some((code, _))) => (3, code, &[][..]),
        (None, None) => return None,
    };
    let (four, head) = match literals.len() {
        ..FOUR_STREAMS => (false, 3),
        FOUR_STREAMS..0x400 => (true, 3),
        0x400..0x4000 => (true, 4),
        _ => (true, 5),
    };
    let start = head + description.len();
    buffer.get_mut(head..start)?.copy_from_slice(description);
    let body = buffer.get_mut(start..)?;
    let length = if four { code.encode_four(literals, body)? } else { code.encode(literals, body)? };
    let packed = (description.len() + length) as u64;
    if packed >= literals.len() as u64 {
        return None;
    }
    let (format, bits) = match head {
        3 => (u64::from(four), 10),
        4 => (2, 14),
        _ => (3, 18),
    };
    let fields = kind | format << 2 | (literals.len() as u64) << 4 | packed << (4 + bits);
    buffer.get_mut(..head)?.copy_from_slice(fields.to_le_bytes().get(..head)?);
    if let Some((code, ..)) = fresh {
        new.huffman = Some(code);
    }
    Some(start + length)
}

/// The smallest way to code lengths: its mode, and the bytes of its header in `buffer`.
fn choose(
    counts: &[u32],
    total: u32,
    default: &[i16],
    old: &Option<Lengths>,
    new: &mut Option<Lengths>,
    buffer: &mut [u8],
) -> Option<(u8, usize)> {
    let mut present = (0u8..).zip(counts).filter(|(_, count)| **count > 0).map(|(code, _)| code);
    if let (Some(only), None) = (present.next(), present.next()) {
        if matches!(old, Some(Lengths::One(code)) if *code == only) {
            return Some((3, 0));
        }
        *buffer.first_mut()? = only;
        *new = Some(Lengths::One(only));
        return Some((1, 1));
    }
    let bytes = |cost: u64| cost / (8 * BIT);
    let default = Distribution::fixed(default);
    let at_hand = match old {
        Some(Lengths::Many(many)) => many.0.cost(counts).map(bytes),
        Some(Lengths::One(_)) | None => None,
    };
    let by_default = default.cost(counts).map(bytes);
    let best = at_hand.into_iter().chain(by_default).min();
    let fresh = Distribution::of(counts, total, 9).and_then(|fresh| {
        let head = fresh.write(buffer)?;
        let cost = bytes(fresh.cost(counts)?) + head as u64 + WORTH;
        best.is_none_or(|best| cost < best).then_some((fresh, head))
    });
    match fresh {
        Some((fresh, head)) => {
            *new = Some(Lengths::Many(Box::new((fresh, Encoder::new(&fresh)))));
            Some((2, head))
        }
        None if at_hand.is_some() && at_hand == best => Some((3, 0)),
        None => {
            *new = Some(Lengths::Many(Box::new((default, Encoder::new(&default)))));
            Some((0, 0))
        }
    }
}

/// Writes the sequences, the last one first.
#[inline]
fn encode(sequences: &[Coded], literals: Option<&Encoder>, runs: Option<&Encoder>, out: &mut BitWriter<'_>) {
    let Some((last, before)) = sequences.split_last() else { return };
    let mut run_state = runs.map(|encoder| (encoder, encoder.begin(last.run)));
    let mut literal_state = literals.map(|encoder| (encoder, encoder.begin(last.literals)));
    out.add(last.extra.into(), last.bits.into());
    out.flush();
    for sequence in before.iter().rev() {
        let moved = |state: &mut Option<(&Encoder, State)>, code: u8| {
            state.as_mut().map_or((0, 0), |(encoder, state)| encoder.encode(state, code))
        };
        let (run, run_bits) = moved(&mut run_state, sequence.run);
        let (literals, literal_bits) = moved(&mut literal_state, sequence.literals);
        // Joined before they enter the stream, which every sequence waits for.
        let states = run_bits + literal_bits;
        let value = run | literals << run_bits | u64::from(sequence.extra) << states;
        out.add(value, states + u32::from(sequence.bits));
        out.flush();
    }
    if let Some((encoder, state)) = run_state {
        encoder.end(state, out);
    }
    if let Some((encoder, state)) = literal_state {
        encoder.end(state, out);
    }
}
