//! Applies an arc_v3 payload to a tensor.

use towline_core::{Error, Result, UnitMeta};

use super::adler;
use super::layout::{Layout, rows};
use super::pickle::{Dict, Document};
use super::streams::{Deltas, Mantissas, Numbers, Positions};

/// Applies the payload in `pickle` to `target`, which holds the parent's bytes. Allocates nothing for the tensor.
pub(super) fn apply(unit: &UnitMeta<'_>, layout: Layout, pickle: &[u8], target: &mut [u8]) -> Result<()> {
    let document = Document::parse(pickle)?;
    let payload = document.root();
    check_tensor(unit, layout, &payload)?;
    match payload.text("strategy")? {
        "none" => {}
        "mantissa_xor" => {
            let update = Update::of(unit, layout, &payload)?;
            match layout.bytes {
                1 => update.apply::<1>(target)?,
                2 => update.apply::<2>(target)?,
                _ => update.apply::<4>(target)?,
            }
        }
        other => return Err(bad(format!("strategy `{}` is unknown", other.escape_debug()))),
    }
    let checksum = payload.text("checksum")?;
    let found = adler(target).to_string();
    if checksum != found {
        return Err(bad(format!("wanted checksum {}, found {found}", checksum.escape_debug()))
            .with_help("check that the delta's parent is the right one, then copy the file again"));
    }
    Ok(())
}

fn check_tensor(unit: &UnitMeta<'_>, layout: Layout, payload: &Dict<'_, '_>) -> Result<()> {
    let version = payload.size("version")?;
    if version != 1 {
        return Err(Error::unsupported(format!("arc_v3 payload: version {version} is stored, 1 is known"))
            .with_help("upgrade Towline"));
    }
    let dtype = payload.text("dtype")?;
    if !layout.names.contains(&dtype) {
        return Err(bad(format!("wanted {}, found {}", layout.names.join(" or "), dtype.escape_debug())));
    }
    let shape = payload.tuple("shape")?;
    let same = |(&found, &wanted): (&i64, &usize)| usize::try_from(found) == Ok(wanted);
    if shape.len() != unit.shape.len() || !shape.iter().zip(unit.shape).all(same) {
        return Err(bad(format!("wanted shape {:?}, found {shape:?}", unit.shape)));
    }
    Ok(())
}

/// How a mantissa value is stored.
#[derive(Debug, Clone, Copy)]
enum Transform {
    Raw,
    Xor,
    Zigzag,
}

struct Update<'a> {
    layout: Layout,
    positions: Positions<'a>,
    transform: Transform,
    mantissas: Mantissas<'a>,
    exceptions: Deltas<'a>,
    values: Numbers<'a>,
}

impl<'a> Update<'a> {
    fn of(unit: &UnitMeta<'_>, layout: Layout, payload: &Dict<'_, 'a>) -> Result<Self> {
        let (total, mantissa) = (payload.size("total_bits")?, payload.size("mantissa_bits")?);
        let uint = payload.text("uint_dtype")?;
        if total != layout.total_bits() as usize
            || mantissa != layout.mantissa_bits as usize
            || uint != layout.uint()
        {
            return Err(bad(format!(
                "wanted {} bits with {} of mantissa in {}, found {total} with {mantissa} in {}",
                layout.total_bits(),
                layout.mantissa_bits,
                layout.uint(),
                uint.escape_debug()
            )));
        }
        let transform = match payload.text("transform")? {
            "raw" => Transform::Raw,
            "xor" => Transform::Xor,
            "zigzag" => Transform::Zigzag,
            other => return Err(bad(format!("transform `{}` is unknown", other.escape_debug()))),
        };
        let (rows, width) = rows(unit);
        let positions = Positions::of(&payload.dict("indices")?, rows, width)?;
        let mantissas = Mantissas::of(&payload.dict("mantissa_stream")?, payload.text("mantissa_dtype")?)?;
        let exceptions = Deltas::of(&payload.dict("exception_positions")?, mantissas.len())?;
        let values = Numbers::new(payload.text("exception_dtype")?, payload.bytes("exception_values")?)?;
        if exceptions.len() != values.len() {
            return Err(bad(format!("{} exceptions have {} values", exceptions.len(), values.len())));
        }
        Ok(Self { layout, positions, transform, mantissas, exceptions, values })
    }

    fn apply<const N: usize>(mut self, target: &mut [u8]) -> Result<()> {
        let elements = target.as_chunks_mut::<N>().0;
        let mut exception = self.exceptions.next()?;
        let mut done = 0u64;
        while let Some(position) = self.positions.next()? {
            let stored = self
                .mantissas
                .next()?
                .ok_or_else(|| bad(format!("only {done} mantissas, though more elements changed")))?;
            let element = usize::try_from(position)
                .ok()
                .and_then(|position| elements.get_mut(position))
                .ok_or_else(|| bad(format!("element {position} is not in the tensor")))?;
            let old = load(*element);
            let new = if exception == Some(done) {
                exception = self.exceptions.next()?;
                let value = self.values.next().and_then(|value| u32::try_from(value).ok());
                value
                    .filter(|&value| N == 4 || value >> (8 * N) == 0)
                    .ok_or_else(|| bad(format!("the value of element {position} has too many bits")))?
            } else {
                let mantissa = self
                    .mantissa(old, stored)
                    .ok_or_else(|| bad(format!("the mantissa of element {position} has too many bits")))?;
                old & !self.layout.mask() | mantissa
            };
            store(element, new);
            done += 1;
        }
        match self.mantissas.len() {
            0 => Ok(()),
            left => Err(bad(format!("{left} mantissas belong to no element"))),
        }
    }

    /// The new mantissa from the old element's bits and the stored value; `None` if it has too many bits.
    fn mantissa(&self, old: u32, stored: u64) -> Option<u32> {
        let mask = self.layout.mask();
        let old = old & mask;
        let stored = u32::try_from(stored).ok()?;
        let new = match self.transform {
            Transform::Raw => stored,
            Transform::Xor => old ^ stored,
            Transform::Zigzag => {
                let magnitude = stored >> 1;
                if stored & 1 == 0 { old.checked_add(magnitude)? } else { old.checked_sub(magnitude + 1)? }
            }
        };
        (new & !mask == 0).then_some(new)
    }
}

/// An element's bits.
pub(super) fn load<const N: usize>(element: [u8; N]) -> u32 {
    let mut bytes = [0; 4];
    bytes.iter_mut().zip(element).for_each(|(to, from)| *to = from);
    u32::from_le_bytes(bytes)
}

fn store<const N: usize>(element: &mut [u8; N], bits: u32) {
    element.iter_mut().zip(bits.to_le_bytes()).for_each(|(to, from)| *to = from);
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("arc_v3 payload: {why}"))
}
