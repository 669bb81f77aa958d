//! Weights by the octave of their old values.
//!
//! An optimizer step of about the learning rate flips a weight only where it crosses a rounding boundary, and the
//! distance of these boundaries doubles with each octave. So the exponent of the *old* value, which the decoder
//! has, tells how likely a weight changes, and by how many units in the last place. `codec/FORMAT.md` gives the
//! format.

#![expect(
    clippy::cast_possible_truncation,
    reason = "blocks have at most 2^21 elements; what is narrowed was bounded or is meant to lose its high bits"
)]

mod base;
mod bits;
mod classes;
mod decisions;
mod dense;
mod digests;
mod elem;
mod golomb;
mod learned;
mod numbers;
mod ranks;
mod rans;
mod simd;
mod sparse;
mod tiles;
mod tokens;

pub(crate) use simd::{MOST_LISTED, list_changes, prefetch, xor_and_clear};

use std::num::NonZeroUsize;

use towline_core::{Codec, CodecId, Error, Mode, Modes, Result, Unit, UnitMeta};

use crate::spare::Spare;
use crate::xor::xor_into;
use classes::Census;
use elem::{Elem, width};
use learned::Layout;
pub use simd::Instructions;

/// The bytes of a block. A matrix of a small model is one; its header does not weigh, and it stays in the cache.
const BLOCK: NonZeroUsize = NonZeroUsize::new(2 << 20).unwrap();
/// A block is dense if more than one element in so many changes.
const DENSE: usize = 16;
/// Blocks below this many elements have no room for the tables of the dense form.
const FEW: usize = 4096;
/// Steps are learned if at most one element in so many changes: that saves most where headers weigh. Above, it would save
/// 1 to 2 % and take a fifth of the speed.
const LEARNED: usize = 160;

/// The form of a frame, its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Nothing changes; a base of zeros. No body.
    Same = 0,
    /// The XOR with the old bytes, or a base as it is.
    Stored = 1,
    /// Gaps between changes.
    Sparse = 2,
    /// A token for each element.
    Dense = 3,
    /// Gaps between changes, and steps whose chances are learned.
    Learned = 4,
}

/// Codes weights by the octave of their old values: small and fast for the steps of training, and for bases.
///
/// Deltas of every element type, sparse and dense; bases. By blocks of 2 MiB. The output depends on the input
/// alone, not on the machine. A delta cannot be taken back and two cannot be joined without the weights: where a
/// change lies is told by the old values, and that is where the gain comes from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Octave {
    instructions: Instructions,
}

impl Octave {
    /// Sets the instructions to work with, for tests and measurements. Default: the best that the processor has;
    /// what it does not have is replaced by the best below. The output is the same for all.
    #[must_use]
    pub fn with_instructions(mut self, instructions: Instructions) -> Self {
        self.instructions = instructions;
        self
    }
}

/// What is kept from block to block, some MiB.
#[derive(Debug, Default)]
struct Scratch {
    survey: tiles::Survey,
    sparse: sparse::Scratch,
    dense: dense::Buffers,
}

static SPARE: Spare<Scratch> = Spare::new();

/// Works with memory that others may have used before.
fn with_scratch<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
    let mut scratch = SPARE.take();
    let done = work(&mut scratch);
    SPARE.put(scratch);
    done
}

/// Calls a function that is generic over the elements of `unit`.
macro_rules! by_width {
    ($unit:expr, $length:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match width($unit.dtype) {
            2 if $length % 2 == 0 => $function::<u16>($($argument),*),
            4 if $length % 4 == 0 => $function::<u32>($($argument),*),
            8 if $length % 8 == 0 => $function::<u64>($($argument),*),
            _ => $function::<u8>($($argument),*),
        }
    };
}

impl Codec for Octave {
    fn id(&self) -> CodecId {
        CodecId::of("octave")
    }

    fn unit(&self) -> Unit {
        Unit::Block(BLOCK)
    }

    fn modes(&self) -> Modes {
        Modes::Both
    }

    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.encode_reading(unit, parent, current, out, &mut |_, _| {})
    }

    fn encode_reading(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
        read: &mut dyn FnMut(usize, Option<u128>),
    ) -> Result<()> {
        if let Some(parent) = parent {
            crate::block::check_parent(unit, parent, current)?;
        }
        check_length(unit, current.len())?;
        let start = out.len();
        with_scratch(|scratch| {
            by_width!(
                unit,
                current.len(),
                encode(self.instructions, unit, parent, current, scratch, out, read)
            );
        });
        if out.len() - start > current.len() {
            out.truncate(start);
            out.push(Form::Stored as u8);
            out.extend_from_slice(current);
            if let Some(parent) = parent {
                xor_into(&mut out[start + 1..], parent);
            }
        }
        Ok(())
    }

    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        self.decode_writing(unit, mode, encoded, target, &mut |_, _| {})
    }

    fn decode_writing(
        &self,
        unit: &UnitMeta<'_>,
        mode: Mode,
        encoded: &[u8],
        target: &mut [u8],
        written: &mut dyn FnMut(&[u8], Option<u128>),
    ) -> Result<()> {
        check_length(unit, target.len())?;
        let (form, body) = form(encoded).map_err(|error| error.with_help("copy the file again"))?;
        let decoded = match (form, mode) {
            (Form::Same | Form::Stored, _) => decode_plain(form, mode, body, target),
            (Form::Sparse | Form::Learned, Mode::Base) => {
                Err(Error::corrupt("a base has no parent to change"))
            }
            (Form::Sparse | Form::Learned | Form::Dense, _) => with_scratch(|scratch| {
                by_width!(
                    unit,
                    target.len(),
                    decode(self.instructions, form, mode, body, target, scratch, written)
                )
            }),
        };
        decoded.map_err(|error| error.context("frame").with_help("copy the file again"))
    }

    fn revert(&self, _: &UnitMeta<'_>, _: &[u8], _: &mut [u8]) -> Result<()> {
        Err(Error::unsupported("codec octave cannot take a delta back").with_help(
            "restore the parent: where a change lies is told by the old values, which a delta does not hold",
        ))
    }

    fn compose(&self, _: &UnitMeta<'_>, _: &[u8], _: &[u8], _: &mut Vec<u8>) -> Result<()> {
        Err(Error::unsupported("codec octave cannot join two deltas").with_help(
            "apply them one after the other: where a change lies is told by the old values, which a delta does not hold",
        ))
    }

    fn changed(&self, unit: &UnitMeta<'_>, encoded: &[u8]) -> Option<u64> {
        let (form, body) = form(encoded).ok()?;
        match form {
            Form::Same => Some(0),
            Form::Stored => None,
            Form::Sparse => sparse::changed(body, unit.len).ok().map(|changed| changed as u64),
            Form::Dense => dense::changed(body).ok(),
            Form::Learned => learned::changed(body, unit.len).ok().map(|changed| changed as u64),
        }
    }
}

fn check_length(unit: &UnitMeta<'_>, length: usize) -> Result<()> {
    if length <= BLOCK.get() {
        return Ok(());
    }
    Err(Error::invalid(format!("tensor `{}`: wanted at most {BLOCK} bytes, found {length}", unit.name))
        .with_help("cut the tensor as the codec's `unit` says"))
}

fn form(encoded: &[u8]) -> Result<(Form, &[u8])> {
    let (&tag, body) = encoded.split_first().ok_or_else(|| Error::corrupt("frame: it is empty"))?;
    let form = match tag {
        0 => Form::Same,
        1 => Form::Stored,
        2 => Form::Sparse,
        3 => Form::Dense,
        4 => Form::Learned,
        other => return Err(Error::corrupt(format!("frame: form {other} is unknown"))),
    };
    Ok((form, body))
}

// Widths and forms stay functions of their own: inlined into one, they take the compiler minutes.
#[inline(never)]
fn encode<E: Elem>(
    level: Instructions,
    unit: &UnitMeta<'_>,
    parent: Option<&[u8]>,
    current: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
    read: &mut dyn FnMut(usize, Option<u128>),
) {
    let new = E::split(current);
    let Some(parent) = parent else {
        if current.iter().all(|&byte| byte == 0) {
            out.push(Form::Same as u8);
        } else {
            out.push(Form::Dense as u8);
            base::encode::<E>(level, new, &mut scratch.dense, out);
        }
        return;
    };
    let old = E::split(parent);
    let most = if new.len() < FEW { new.len() } else { new.len() / DENSE };
    let mut census = Census::default();
    match scratch.survey.of::<E>(level, old, new, most, &mut census, read) {
        Some(0) => out.push(Form::Same as u8),
        Some(changed) if changed * LEARNED <= new.len() => {
            out.push(Form::Learned as u8);
            let (layout, survey) = (Layout::of::<E>(unit), &scratch.survey);
            learned::encode(level, E::BITS, layout, survey, census, &mut scratch.sparse, out);
        }
        Some(_) => {
            out.push(Form::Sparse as u8);
            sparse::encode(level, &scratch.survey, census, &mut scratch.sparse, out);
        }
        None => {
            out.push(Form::Dense as u8);
            dense::encode::<E>(level, old, new, &mut scratch.dense, out);
        }
    }
}

#[inline(never)]
fn decode<E: Elem>(
    level: Instructions,
    form: Form,
    mode: Mode,
    body: &[u8],
    target: &mut [u8],
    scratch: &mut Scratch,
    written: &mut dyn FnMut(&[u8], Option<u128>),
) -> Result<()> {
    let target = E::split_mut(target);
    match (form, mode) {
        (Form::Sparse, _) => sparse::decode::<E>(level, body, target, &mut scratch.sparse, written),
        (Form::Learned, _) => learned::decode::<E>(level, body, target, &mut scratch.sparse, written),
        (_, Mode::Delta) => dense::decode::<E>(level, body, target, &mut scratch.dense),
        (_, Mode::Base) => base::decode::<E>(level, body, target, &mut scratch.dense),
    }
}

fn decode_plain(form: Form, mode: Mode, body: &[u8], target: &mut [u8]) -> Result<()> {
    if form == Form::Same && !body.is_empty() {
        return Err(Error::corrupt(format!("{} bytes behind its end", body.len())));
    }
    if form == Form::Stored && body.len() != target.len() {
        return Err(Error::corrupt(format!("wanted {} stored bytes, found {}", target.len(), body.len())));
    }
    match (form, mode) {
        (Form::Stored, Mode::Delta) => xor_into(target, body),
        (Form::Stored, Mode::Base) => target.copy_from_slice(body),
        (_, Mode::Base) => target.fill(0),
        (_, Mode::Delta) => {}
    }
    Ok(())
}
