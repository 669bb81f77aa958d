//! A second decoder of `octave`, written from `codec/FORMAT.md`: slow and plain, and without a line of the first.

use std::collections::BTreeSet;

use towline_core::Mode;

type Result<T> = std::result::Result<T, String>;

/// Which parts of the format a frame uses.
pub(crate) type Used = BTreeSet<String>;

/// Decodes a frame for elements of `width` bits; `target` holds the parent's bytes for a delta.
pub(crate) fn decode(width: u32, mode: Mode, frame: &[u8], target: &mut [u8]) -> Result<Used> {
    let (form, body) = frame.split_first().ok_or("empty")?;
    let mut used = Used::from([format!("form {form} {mode:?} {width}")]);
    let step = width as usize / 8;
    let mut elements: Vec<u64> = target
        .chunks(step)
        .map(|bytes| bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
        .collect();
    match (form, mode) {
        (0, _) if !body.is_empty() => return Err("a body".into()),
        (0, Mode::Delta) => {}
        (0, Mode::Base) => elements.fill(0),
        (1, _) if body.len() != target.len() => return Err("length".into()),
        (1, Mode::Base) => {
            target.copy_from_slice(body);
            return Ok(used);
        }
        (1, Mode::Delta) => {
            target.iter_mut().zip(body).for_each(|(byte, mask)| *byte ^= mask);
            return Ok(used);
        }
        (2, Mode::Delta) => sparse(width, body, &mut elements, &mut used)?,
        (4, Mode::Delta) => learned(width, body, &mut elements, &mut used)?,
        (3, Mode::Delta) => dense(width, body, &mut elements, &mut used)?,
        (3, Mode::Base) => base(width, body, &mut elements, &mut used)?,
        _ => return Err(format!("form {form} in {mode:?}")),
    }
    for (bytes, element) in target.chunks_mut(step).zip(elements) {
        bytes.copy_from_slice(&element.to_le_bytes()[..step]);
    }
    Ok(used)
}

struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Bits<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn take(&mut self, count: u32) -> Result<u64> {
        let mut number = 0;
        for bit in 0..count {
            let byte = self.bytes.get(self.at / 8).ok_or("the bits end")?;
            number |= u64::from(byte >> (self.at % 8) & 1) << bit;
            self.at += 1;
        }
        Ok(number)
    }

    fn zeros(&mut self) -> Result<u32> {
        let mut zeros = 0;
        while self.take(1)? == 0 {
            zeros += 1;
        }
        Ok(zeros)
    }

    fn exp_golomb(&mut self, order: u32) -> Result<u64> {
        let length = self.zeros()?;
        if length > 64 {
            return Err("too long".into());
        }
        let head = (1u128 << length | u128::from(self.take(length)?)) - 1;
        u64::try_from(head << order | u128::from(self.take(order)?)).map_err(|_| "too large".into())
    }

    fn golomb(&mut self, order: u64) -> Result<u64> {
        let powers = (1..32).flat_map(|power| [1 << power, 3 << (power - 1)]);
        let divisor = std::iter::once(1u64).chain(powers).nth(order as usize).ok_or("a divisor")?;
        let mut head = u128::from(self.zeros()?);
        if head > 24 {
            return Err("a code without end".into());
        }
        if head == 24 {
            head += u128::from(self.exp_golomb(4)?);
        }
        let (mut rest, mut power) = (0, divisor);
        if divisor % 3 == 0 {
            power = divisor / 3;
            rest = if self.take(1)? == 1 { (1 + self.take(1)?) * power } else { 0 };
        }
        rest += self.take(power.ilog2())?;
        u64::try_from(head * u128::from(divisor) + u128::from(rest)).map_err(|_| "too large".into())
    }

    fn rest(&mut self) -> Result<&'a [u8]> {
        let fill = self.at.next_multiple_of(8) - self.at;
        if self.take(fill as u32)? != 0 {
            return Err("bits behind the end".into());
        }
        Ok(&self.bytes[self.at / 8..])
    }

    fn finish(mut self) -> Result<()> {
        if self.rest()?.is_empty() { Ok(()) } else { Err("bytes behind the end".into()) }
    }
}

/// The class of each key.
fn classes(bits: &mut Bits<'_>) -> Result<(usize, [usize; 256])> {
    let count = bits.take(4)? as usize;
    let (mut table, mut last) = ([0; 256], 0);
    for index in 0..count {
        let bound = if index == 0 { bits.take(8)? } else { last + 1 + bits.exp_golomb(0)? };
        if bound > 255 {
            return Err("a bound".into());
        }
        table[bound as usize..].iter_mut().for_each(|class| *class += 1);
        last = bound;
    }
    Ok((count + 1, table))
}

fn key(width: u32, element: u64) -> usize {
    (element << 1 >> (width - 8)) as usize & 0xff
}

fn mask(width: u32) -> u64 {
    u64::MAX >> (64 - width)
}

fn table(bits: &mut Bits<'_>) -> Result<Vec<u32>> {
    let count = bits.exp_golomb(4)?;
    let chances: Vec<u64> = (0..count.min(257)).map(|_| bits.exp_golomb(5)).collect::<Result<_>>()?;
    if count > 256 || count > 0 && chances.iter().try_fold(0u64, |sum, &c| sum.checked_add(c)) != Some(4096) {
        return Err("a table".into());
    }
    Ok(chances.into_iter().map(|chance| chance as u32).collect())
}

/// Returns the tokens and what is behind the stream.
fn rans<'a>(
    bytes: &'a [u8],
    words: u64,
    tables: &[Vec<u32>],
    classes: &[usize],
    used: &mut Used,
) -> Result<(Vec<u8>, &'a [u8])> {
    let lanes = match classes.len() {
        0..512 => 1,
        512..4096 => 4,
        _ => 32,
    };
    used.insert(format!("{lanes} states"));
    let (stream, rest) = bytes.split_at_checked(4 * lanes + 2 * words as usize).ok_or("a short stream")?;
    let mut states: Vec<u32> =
        stream[..4 * lanes].as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    if states.iter().any(|state| !(1 << 15..1 << 31).contains(state)) {
        return Err("a state".into());
    }
    let mut words = stream[4 * lanes..].as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
    let mut tokens = Vec::new();
    for (at, &class) in classes.iter().enumerate() {
        let state = &mut states[at % lanes];
        let slot = *state & 0xfff;
        let (mut token, mut before) = (0, 0);
        while *tables[class].get(token).ok_or("a class without tokens")? + before <= slot {
            before += tables[class][token];
            token += 1;
        }
        tokens.push(token as u8);
        *state = tables[class][token] * (*state >> 12) + slot - before;
        if *state < 1 << 15 {
            *state = *state << 16 | u32::from(words.next().ok_or("no word")?);
        }
    }
    if words.next().is_some() || states.iter().any(|&state| state != 1 << 15) {
        return Err("the end of a stream".into());
    }
    Ok((tokens, rest))
}

/// The value of a token whose direct values end at `direct`, and its extra bits.
fn value(token: u8, direct: u64, bits: &mut Bits<'_>) -> Result<u64> {
    match u64::from(token).checked_sub(direct) {
        None => Ok(token.into()),
        Some(count) => {
            let extra = bits.take(count as u32)?;
            Ok(direct + ((1 << count) | extra) - 1)
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Numbers {
    Zero,
    Listed(u64, u64, u64),
    Each(u64),
    Fixed(u32),
    Coded(u32),
}

impl Numbers {
    fn read(bits: &mut Bits<'_>, coded: bool) -> Result<Self> {
        if bits.take(1)? == 0 {
            return Ok(Self::Zero);
        }
        if bits.take(1)? == 0 {
            let count = bits.exp_golomb(3)?;
            return Ok(Self::Listed(count, bits.exp_golomb(2)?, bits.exp_golomb(1)?));
        }
        let form = bits.take(if coded { 2 } else { 1 })?;
        if form == 0 {
            return Ok(Self::Each(bits.exp_golomb(2)?));
        }
        let order = bits.exp_golomb(1)? as u32;
        match form {
            1 => Ok(Self::Fixed(order)),
            2 => Ok(Self::Coded(order)),
            _ => Err("a form of numbers".into()),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Listed(..) => "listed",
            Self::Each(_) => "each",
            Self::Fixed(_) => "fixed",
            Self::Coded(_) => "coded",
        }
    }

    fn values(
        self,
        bits: &mut Bits<'_>,
        count: usize,
        tokens: &mut impl Iterator<Item = u8>,
    ) -> Result<Vec<u64>> {
        let mut numbers = vec![0; count];
        match self {
            Self::Zero => {}
            Self::Each(order) => {
                for number in &mut numbers {
                    *number = bits.golomb(order)?;
                }
            }
            Self::Fixed(length) => {
                for number in &mut numbers {
                    *number = bits.take(length)?;
                }
            }
            Self::Listed(listed, zeros, order) => {
                let mut at = 0;
                for _ in 0..listed {
                    at += bits.golomb(zeros)? as usize;
                    *numbers.get_mut(at).ok_or("a place in a list")? = bits.golomb(order)? + 1;
                    at += 1;
                }
            }
            Self::Coded(shift) => {
                for (number, token) in numbers.iter_mut().zip(tokens) {
                    let low = bits.take(shift)?;
                    *number = value(token, 24, bits)? << shift | low;
                }
            }
        }
        Ok(numbers)
    }
}

/// The changes of a class and the form of their gaps; `last` is the order of the last divisor.
fn gap_plan(bits: &mut Bits<'_>, last: &mut i64, used: &mut Used) -> Result<(usize, Numbers)> {
    let changes = bits.exp_golomb(6)? as usize;
    if changes == 0 {
        return Ok((0, Numbers::Zero));
    }
    let gaps = if bits.take(1)? == 0 {
        let number = bits.exp_golomb(0)?.cast_signed();
        *last += 2 + if number % 2 == 0 { number / 2 } else { -(number + 1) / 2 };
        Numbers::Each(u64::try_from(*last).map_err(|_| "an order")?)
    } else {
        Numbers::read(bits, false)?
    };
    used.insert(format!("gaps {}", gaps.name()));
    Ok((changes, gaps))
}

fn sparse(width: u32, body: &[u8], elements: &mut [u64], used: &mut Used) -> Result<()> {
    let mut bits = Bits::new(body);
    let (count, of_key) = classes(&mut bits)?;
    let coded = bits.take(1)? == 1;
    let mut last = 3i64;
    let (mut plans, mut tables, mut lanes) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..count {
        let (changes, gaps) = gap_plan(&mut bits, &mut last, used)?;
        if changes == 0 {
            plans.push((0, Numbers::Zero, Numbers::Zero));
            continue;
        }
        let more = Numbers::read(&mut bits, coded)?;
        used.insert(format!("magnitudes {}", more.name()));
        if let Numbers::Coded(_) = more {
            lanes.extend(std::iter::repeat_n(tables.len(), changes));
            tables.push(table(&mut bits)?);
        }
        plans.push((changes, gaps, more));
    }
    let mut tokens = Vec::new();
    if coded {
        let words = bits.exp_golomb(6)?;
        let (decoded, rest) = rans(bits.rest()?, words, &tables, &lanes, used)?;
        tokens = decoded;
        bits = Bits::new(rest);
    }
    let mut tokens = tokens.into_iter();
    let of_element: Vec<usize> = elements.iter().map(|&element| of_key[key(width, element)]).collect();
    for (class, (changes, gaps, more)) in plans.into_iter().enumerate() {
        let mut members = (0..elements.len()).filter(|&at| of_element[at] == class);
        let gaps = gaps.values(&mut bits, changes, &mut std::iter::empty())?;
        let signs = (0..changes).map(|_| bits.take(1)).collect::<Result<Vec<_>>>()?;
        let more = more.values(&mut bits, changes, &mut tokens)?;
        for ((gap, sign), more) in gaps.into_iter().zip(signs).zip(more) {
            let at = members.nth(gap as usize).ok_or("a rank")?;
            let step = more.wrapping_add(1);
            let step = if sign == 1 { step.wrapping_neg() } else { step };
            elements[at] = elements[at].wrapping_add(step) & mask(width);
        }
    }
    bits.finish()
}

/// A chance and how often it has been learned.
type Chance = (u32, u32);

struct Decisions<'a> {
    bytes: &'a [u8],
    at: usize,
    code: u64,
    range: u64,
}

impl<'a> Decisions<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let mut decisions = Self { bytes, at: 0, code: 0, range: u64::MAX };
        decisions.code = decisions.four() << 32;
        decisions.code |= decisions.four();
        decisions
    }

    fn four(&mut self) -> u64 {
        self.at += 4;
        (self.at - 4..self.at).fold(0, |four, at| four << 8 | u64::from(*self.bytes.get(at).unwrap_or(&0)))
    }

    fn with(&mut self, chance: u32) -> bool {
        let bound = (self.range >> 16) * u64::from(chance);
        let yes = self.code < bound;
        self.range = if yes { bound } else { self.range - bound };
        self.code -= if yes { 0 } else { bound };
        if self.range < 1 << 32 {
            self.range <<= 32;
            self.code = self.code << 32 | self.four();
        }
        yes
    }

    fn decide(&mut self, chance: &mut Chance) -> bool {
        let yes = self.with(chance.0);
        let rate = 131_072 / (2 * chance.1.min(128) + 3);
        let to = if yes {
            chance.0 + (((65536 - chance.0) * rate) >> 16)
        } else {
            chance.0 - ((chance.0 * rate) >> 16)
        };
        *chance = (to.clamp(32, 65504), chance.1 + 1);
        yes
    }

    /// Decides with a chance of a row of neighbours.
    fn decide_near(&mut self, chances: &mut [Chance], at: usize) -> bool {
        if chances[at].1 == 0 {
            let before = at.checked_sub(1).map(|at| chances[at]).filter(|chance| chance.1 > 0);
            let behind = chances.get(at + 1).copied().filter(|chance| chance.1 > 0);
            if let Some((chance, _)) = before.or(behind) {
                chances[at] = (chance, 1);
            }
        }
        self.decide(&mut chances[at])
    }
}

fn learned(width: u32, body: &[u8], elements: &mut [u64], used: &mut Used) -> Result<()> {
    let mut bits = Bits::new(body);
    let (count, of_key) = classes(&mut bits)?;
    let shift = bits.take(3)?;
    let (mut columns, mut first) = (0, 0);
    if bits.take(1)? == 1 {
        columns = bits.exp_golomb(8)? as usize;
        first = bits.exp_golomb(8)? as usize;
        if columns > 16384 || first >= columns {
            return Err("a column".into());
        }
        used.insert("columns".into());
    }
    let length = bits.exp_golomb(7)?;
    let mut last = 3;
    let plans: Vec<_> = (0..count).map(|_| gap_plan(&mut bits, &mut last, used)).collect::<Result<_>>()?;
    let mut changes = BTreeSet::new();
    for (class, (count, gaps)) in plans.into_iter().enumerate() {
        let mut members = (0..elements.len()).filter(|&at| of_key[key(width, elements[at])] == class);
        for gap in gaps.values(&mut bits, count, &mut std::iter::empty())? {
            changes.insert(members.nth(gap as usize).ok_or("a rank")?);
        }
    }
    let steps = bits.rest()?;
    if steps.len() as u64 != length {
        return Err("the length of the steps".into());
    }
    let mut steps = Decisions::new(steps);
    let (mut more, mut far) = (vec![(8192, 0); 256], (2048, 0));
    let mut higher = vec![(32768, 0); 320];
    let (mut second, mut third) = (vec![(32768, 1); 320], vec![[(32768, 1); 2]; 320]);
    let mut ups = vec![(32768, 1); columns];
    for at in changes {
        let octave = key(width, elements[at]) >> shift;
        let up = match columns {
            0 => steps.with(32768),
            _ => steps.decide(&mut ups[(first + at) % columns]),
        };
        let mut magnitude = 1u64;
        if steps.decide_near(&mut more, octave) {
            let crosses = steps.decide(&mut far);
            let mut length = if crosses { 0 } else { 1 };
            while length < width as usize - 2 && steps.decide_near(&mut higher, octave + length) {
                length += 1;
            }
            for bit in 1..=length {
                let set = match bit {
                    1 => steps.decide(&mut second[octave + length]),
                    2 => steps.decide(&mut third[octave + length][magnitude as usize & 1]),
                    _ => steps.with(32768),
                };
                magnitude = magnitude << 1 | u64::from(set);
            }
            if crosses {
                used.insert("across zero".into());
                magnitude = (1 << (width - 1)) + 1 - magnitude;
            }
        }
        let negative = elements[at] >> (width - 1) == 1;
        let step = if up == negative { magnitude.wrapping_neg() } else { magnitude };
        elements[at] = elements[at].wrapping_add(step) & mask(width);
    }
    if steps.at < steps.bytes.len() { Err("bytes behind the steps".into()) } else { Ok(()) }
}

fn dense(width: u32, body: &[u8], elements: &mut [u64], used: &mut Used) -> Result<()> {
    let mut bits = Bits::new(body);
    let mut changes = bits.exp_golomb(12)?;
    let (count, of_key) = classes(&mut bits)?;
    used.insert(format!("dense {width} classes {}", if count > 1 { "several" } else { "one" }));
    let (mut shifts, mut tables) = (Vec::new(), Vec::new());
    for _ in 0..count {
        shifts.push(bits.take(6)? as u32);
        tables.push(table(&mut bits)?);
    }
    used.insert(format!(
        "dense shift {}",
        if shifts.iter().any(|&shift| shift > 0) { "some" } else { "none" }
    ));
    let words = bits.exp_golomb(12)?;
    let of_element: Vec<usize> = elements.iter().map(|&element| of_key[key(width, element)]).collect();
    let (tokens, rest) = rans(bits.rest()?, words, &tables, &of_element, used)?;
    let mut low = Bits::new(rest);
    for ((element, token), class) in elements.iter_mut().zip(tokens).zip(of_element) {
        let Some(token) = token.checked_sub(1) else { continue };
        let bottom = low.take(shifts[class])?;
        let zigzag = (value(token, 40, &mut low)? << shifts[class] | bottom) + 1;
        let step = if zigzag % 2 == 0 { zigzag / 2 } else { (zigzag / 2 + 1).wrapping_neg() };
        *element = element.wrapping_add(step) & mask(width);
        changes = changes.checked_sub(1).ok_or("more changes than told")?;
    }
    if changes > 0 {
        return Err("fewer changes than told".into());
    }
    low.finish()
}

fn base(width: u32, body: &[u8], elements: &mut [u64], used: &mut Used) -> Result<()> {
    let (shift, direct) = match width {
        8 => (0, 256),
        16 => (7, 192),
        _ => (width - 10, 192),
    };
    let mut bits = Bits::new(body);
    let start = bits.take(16)?;
    let tables = [table(&mut bits)?];
    let words = bits.exp_golomb(12)?;
    let (tokens, rest) = rans(bits.rest()?, words, &tables, &vec![0; elements.len()], used)?;
    let packed = (elements.len() * shift as usize).div_ceil(8);
    let (low, far) = rest.split_at_checked(packed).ok_or("short low bits")?;
    let (mut low, mut far) = (Bits::new(low), Bits::new(far));
    for (element, token) in elements.iter_mut().zip(tokens) {
        if u64::from(token) >= direct {
            used.insert("base far".into());
        }
        let high = value(token, direct, &mut far)?;
        let rotated = ((high + start) << shift | low.take(shift)?) & mask(width);
        *element = (rotated >> 1 | rotated << (width - 1)) & mask(width);
    }
    used.insert(format!("base {width} window {}", if start > 0 { "up" } else { "at zero" }));
    low.finish()?;
    far.finish()
}
