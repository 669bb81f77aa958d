//! Decodes sequences: how many literals, and how long a run of the last of them (RFC 8878, section 3.1.1.3.2).

use std::sync::Arc;

use super::parts::Sequence;
use super::unpack::States;

/// The sequences of a block that are not decoded yet.
#[derive(Clone)]
pub(super) struct Sequences<'a> {
    literals: Arc<States>,
    runs: Arc<States>,
    /// A frame up to the end of the stream. Its header and the block's are longer than a word.
    frame: &'a [u8],
    /// How many bits of `frame` are not of the stream.
    start: usize,
    next: Next,
    number: usize,
}

/// Where the next sequence begins.
#[derive(Clone, Copy)]
struct Next {
    /// How many bits of the frame are before it.
    left: usize,
    literals: usize,
    run: usize,
}

impl<'a> Sequences<'a> {
    /// `number` sequences, in the last `length` bytes of `frame`.
    pub(super) fn new(
        number: usize,
        frame: &'a [u8],
        length: usize,
        literals: Arc<States>,
        runs: Arc<States>,
    ) -> Option<Self> {
        // The last byte ends in the bit that marks where the stream begins.
        let last = *frame.last().filter(|last| **last > 0 && length > 0)?;
        let mut left = frame.len() * 8 - last.leading_zeros() as usize - 1;
        let mut begin = |log: u32| {
            let bits = Bits::before(left, frame)?.to(log) & ((1 << log) - 1);
            left = left.checked_sub(log as usize)?;
            usize::try_from(bits).ok()
        };
        let (literal, run) = (begin(literals.log())?, begin(runs.log())?);
        let start = frame.len().checked_sub(length)? * 8;
        Some(Self { literals, runs, frame, start, next: Next { left, literals: literal, run }, number })
    }

    /// What they were decoded with.
    pub(super) fn into_states(self) -> [Arc<States>; 2] {
        [self.literals, self.runs]
    }

    /// How many are left.
    pub(super) fn len(&self) -> usize {
        self.number
    }

    /// Decodes as many as are left and `list` has room for. Returns their number. Each has literals: without them the
    /// code would stand for another offset.
    // By itself, its loop has enough registers.
    #[inline(never)]
    pub(super) fn fill(&mut self, list: &mut [Sequence]) -> Option<usize> {
        let count = self.number.min(list.len());
        self.number -= count;
        // No state follows the last one.
        let going_on = if self.number == 0 { count.saturating_sub(1) } else { count };
        let (before, last) = list.get_mut(..count)?.split_at_mut(going_on);
        let Self { frame, literals, runs, .. } = self;
        let (mut next, mut fewest) = (self.next, u32::MAX);
        for sequence in before {
            *sequence = next.follow(frame, literals, runs)?.0;
            fewest = fewest.min(sequence.literals);
        }
        self.next = next;
        if let [sequence] = last {
            let values;
            (*sequence, values) = next.follow(frame, literals, runs)?;
            fewest = fewest.min(sequence.literals);
            if self.next.left.checked_sub(values) != Some(self.start) {
                return None;
            }
        }
        (fewest > 0).then_some(count)
    }

    /// Decodes all but the last of `one` and as many of `other`, or the other way round. They wait for themselves from
    /// one sequence to the next, but not for each other.
    #[inline(never)]
    pub(super) fn fill_both(one: &mut Self, other: &mut Self, lists: [&mut Vec<Sequence>; 2]) -> Option<()> {
        let count = one.number.min(other.number).saturating_sub(1);
        let mut fewest = u32::MAX;
        let (mut next, mut other_next) = (one.next, other.next);
        let [list, other_list] = lists;
        list.resize(count, Sequence::default());
        other_list.resize(count, Sequence::default());
        for (sequence, other_sequence) in list.iter_mut().zip(other_list) {
            *sequence = next.follow(one.frame, &one.literals, &one.runs)?.0;
            *other_sequence = other_next.follow(other.frame, &other.literals, &other.runs)?.0;
            fewest = fewest.min(sequence.literals).min(other_sequence.literals);
        }
        (one.next, other.next) = (next, other_next);
        one.number -= count;
        other.number -= count;
        (fewest > 0).then_some(())
    }
}

impl Next {
    /// The sequence here, and how many bits its values take; goes on to the one behind it.
    #[inline(always)]
    fn follow(&mut self, frame: &[u8], literals: &States, runs: &States) -> Option<(Sequence, usize)> {
        let bits = Bits::before(self.left, frame)?;
        let (run, literal) = (runs.step(self.run)?, literals.step(self.literals)?);
        let extra = u32::from(run.extra);
        let (both, all) = (extra + u32::from(literal.extra), u32::from(run.all) + u32::from(literal.all));
        let sequence = Sequence {
            run: runs.value(self.run)?.of(bits.to(extra)),
            literals: literals.value(self.literals)?.of(bits.to(both)),
        };
        self.literals = literal.of(bits.to(extra + u32::from(literal.all)));
        self.run = run.of(bits.to(all));
        self.left = self.left.wrapping_sub(all as usize);
        Some((sequence, both as usize))
    }
}

/// Bits of a stream that is read from its end.
#[derive(Clone, Copy)]
struct Bits {
    word: u64,
    /// How far the word is to be turned until the next bit is the highest.
    turn: u32,
}

impl Bits {
    /// Those before the first `left` of `bytes`, 56 at least.
    #[inline(always)]
    fn before(left: usize, bytes: &[u8]) -> Option<Self> {
        let at = (left / 8).wrapping_sub(7);
        let word = u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?);
        Some(Self { word, turn: 8 - u32::from((left % 8).to_le_bytes()[0]) })
    }

    /// Those up to the next `count`, the last of which is the lowest bit.
    #[inline(always)]
    fn to(self, count: u32) -> u64 {
        self.word.rotate_left(self.turn + count)
    }
}
