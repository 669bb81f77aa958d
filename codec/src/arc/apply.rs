//! Applies an arc_v3 payload to a tensor.

use towline_core::{Error, Result, UnitMeta};

use super::adler;
use super::layout::{Layout, load, rows};
use super::pickle::{Dict, Document};
use super::streams::{Deltas, Mantissas, Numbers, Positions};

/// How many changes are read at a time.
const BATCH: usize = 256;

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
        let (mut positions, mut mantissas) = ([0; BATCH], [0; BATCH]);
        loop {
            let mut positions = self.positions.fill(&mut positions)?;
            if positions.is_empty() {
                break;
            }
            let mut mantissas = self.mantissas.fill(&mut mantissas, positions.len())?;
            if mantissas.len() < positions.len() {
                let found = done + mantissas.len() as u64;
                return Err(bad(format!("only {found} mantissas, though more elements changed")));
            }
            while !positions.is_empty() {
                let regular = exception
                    .and_then(|exception| usize::try_from(exception - done).ok())
                    .map_or(positions.len(), |regular| regular.min(positions.len()));
                let ((now, later), (values, rest)) =
                    (positions.split_at(regular), mantissas.split_at(regular));
                self.change(elements, now, values)?;
                (positions, mantissas) = (later, rest);
                done += regular as u64;
                if let ([position, later @ ..], [_, rest @ ..]) = (positions, mantissas) {
                    // A whole value, whatever its mantissa is said to be.
                    exception = self.exceptions.next()?;
                    let value = self.values.next().and_then(|value| u32::try_from(value).ok());
                    let value = value.filter(|&value| N == 4 || value >> (8 * N) == 0);
                    store(place(elements, *position)?, value.ok_or_else(too_wide)?);
                    (positions, mantissas) = (later, rest);
                    done += 1;
                }
            }
        }
        match self.mantissas.len() {
            0 => Ok(()),
            left => Err(bad(format!("{left} mantissas belong to no element"))),
        }
    }

    /// Changes the mantissas of elements.
    fn change<const N: usize>(
        &self,
        elements: &mut [[u8; N]],
        positions: &[u64],
        stored: &[u64],
    ) -> Result<()> {
        let mask = self.layout.mask();
        match self.transform {
            Transform::Raw => change(mask, elements, positions, stored, |_, stored| stored),
            Transform::Xor => change(mask, elements, positions, stored, |old, stored| old ^ stored),
            // 0, 1, 2, 3 … as 0, −1, 1, −2 …. Below zero is above every mask.
            Transform::Zigzag => change(mask, elements, positions, stored, |old, stored| {
                old.wrapping_add(stored >> 1 ^ (stored & 1).wrapping_neg())
            }),
        }
    }
}

#[inline]
fn change<const N: usize>(
    mask: u32,
    elements: &mut [[u8; N]],
    positions: &[u64],
    stored: &[u64],
    mantissa: impl Fn(u64, u64) -> u64,
) -> Result<()> {
    let mut wide = 0;
    for (&position, &stored) in positions.iter().zip(stored) {
        let element = place(elements, position)?;
        let old = load(*element);
        let new = mantissa((old & mask).into(), stored);
        wide |= new & !u64::from(mask);
        let [a, b, c, d, ..] = new.to_le_bytes();
        store(element, old & !mask | u32::from_le_bytes([a, b, c, d]) & mask);
    }
    if wide == 0 { Ok(()) } else { Err(too_wide()) }
}

fn place<const N: usize>(elements: &mut [[u8; N]], position: u64) -> Result<&mut [u8; N]> {
    usize::try_from(position)
        .ok()
        .and_then(|position| elements.get_mut(position))
        .ok_or_else(|| bad(format!("element {position} is not in the tensor")))
}

fn too_wide() -> Error {
    bad("the value of an element has too many bits")
}

fn store<const N: usize>(element: &mut [u8; N], bits: u32) {
    element.iter_mut().zip(bits.to_le_bytes()).for_each(|(to, from)| *to = from);
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("arc_v3 payload: {why}"))
}
