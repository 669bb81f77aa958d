//! A strict reader of the pickles of arc_v3. It builds dictionaries, text, integers, bytes and tuples of integers,
//! and runs nothing: every opcode that could name, call or build anything else is refused.
//!
//! It borrows all text and bytes from its input. What else it allocates is bounded by [`MAX_STEPS`], however long
//! the input is. Values are small and copied; dictionaries and tuples lie in lists of their own and are named by
//! index, and a dictionary cannot be fetched from the memo, so nothing is shared, nested without bound or circular.

use towline_core::{Error, Result};

use super::opcodes;

/// The most opcodes that are read. A payload has about 100, and one for each dimension of the tensor.
const MAX_STEPS: usize = 4096;
/// The deepest nesting of open marks. Payloads nest three deep.
const MAX_DEPTH: usize = 8;
/// The most keys of a dictionary. Payloads have 15.
const MAX_KEYS: usize = 64;
/// The highest protocol that is read.
const MAX_PROTOCOL: u8 = 5;

/// A value. Text and bytes lie in the input, dictionaries and tuples in the [`Document`].
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Int(i64),
    Text(&'a str),
    Bytes(&'a [u8]),
    Tuple(usize),
    Dict(usize),
}

/// A parsed pickle whose top is a dictionary.
#[derive(Debug)]
pub(super) struct Document<'a> {
    dicts: Vec<Vec<(&'a str, Value<'a>)>>,
    tuples: Vec<Vec<i64>>,
    root: usize,
}

/// A dictionary of a [`Document`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Dict<'d, 'a> {
    document: &'d Document<'a>,
    index: usize,
}

impl<'a> Document<'a> {
    /// Parses one pickle that fills `bytes`.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut machine = Machine {
            bytes,
            position: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
            dicts: Vec::new(),
            tuples: Vec::new(),
        };
        let root = machine.run()?;
        Ok(Self { dicts: machine.dicts, tuples: machine.tuples, root })
    }

    /// The dictionary at the top.
    pub(super) fn root(&self) -> Dict<'_, 'a> {
        Dict { document: self, index: self.root }
    }
}

impl<'d, 'a> Dict<'d, 'a> {
    fn find(&self, key: &str) -> Option<Value<'a>> {
        let entries = self.document.dicts.get(self.index)?;
        entries.iter().find(|(known, _)| *known == key).map(|(_, value)| *value)
    }

    fn get(&self, key: &str) -> Result<Value<'a>> {
        self.find(key).ok_or_else(|| bad(format!("`{key}` is missing")))
    }

    /// Whether there is a `key`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// The text at `key`.
    pub(super) fn text(&self, key: &str) -> Result<&'a str> {
        let value = self.get(key)?;
        let Value::Text(text) = value else { return Err(wrong(key, "text", value)) };
        Ok(text)
    }

    /// The integer at `key`, which is not negative.
    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let value = self.get(key)?;
        let Value::Int(number) = value else { return Err(wrong(key, "an integer", value)) };
        usize::try_from(number).map_err(|_| bad(format!("`{key}`: {number} is no length on this machine")))
    }

    /// The bytes at `key`.
    pub(super) fn bytes(&self, key: &str) -> Result<&'a [u8]> {
        let value = self.get(key)?;
        let Value::Bytes(bytes) = value else { return Err(wrong(key, "bytes", value)) };
        Ok(bytes)
    }

    /// The dictionary at `key`.
    pub(super) fn dict(&self, key: &str) -> Result<Self> {
        let value = self.get(key)?;
        let Value::Dict(index) = value else { return Err(wrong(key, "a dictionary", value)) };
        Ok(Self { document: self.document, index })
    }

    /// The tuple of integers at `key`.
    pub(super) fn tuple(&self, key: &str) -> Result<&'d [i64]> {
        let value = self.get(key)?;
        let Value::Tuple(index) = value else { return Err(wrong(key, "a tuple", value)) };
        Ok(self.document.tuples.get(index).map_or(&[], Vec::as_slice))
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    position: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: Vec<Option<Value<'a>>>,
    dicts: Vec<Vec<(&'a str, Value<'a>)>>,
    tuples: Vec<Vec<i64>>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<usize> {
        for step in 0..MAX_STEPS {
            let at = self.position;
            let opcode = self.byte()?;
            if step == 0 && opcode != 0x80 {
                return Err(bad("it does not begin with PROTO"));
            }
            let done = self.step(opcode).map_err(|error| error.context(format_args!("byte {at}")))?;
            if let Some(root) = done {
                return Ok(root);
            }
        }
        Err(bad(format!("more than {MAX_STEPS} opcodes")))
    }

    /// Executes one opcode. Returns the root after STOP.
    fn step(&mut self, opcode: u8) -> Result<Option<usize>> {
        match opcode {
            // PROTO
            0x80 => {
                let protocol = self.byte()?;
                if self.position != 2 || !(2..=MAX_PROTOCOL).contains(&protocol) {
                    return Err(bad(format!("protocol {protocol} is not read, 2 to {MAX_PROTOCOL} are")));
                }
            }
            // FRAME: a hint for readers of streams.
            0x95 => {
                let length = self.length::<8>()?;
                if length > self.bytes.len() - self.position {
                    return Err(bad(format!("a frame of {length} bytes passes the end")));
                }
            }
            // EMPTY_DICT
            b'}' => {
                self.dicts.push(Vec::new());
                self.stack.push(Value::Dict(self.dicts.len() - 1));
            }
            // MARK
            b'(' => {
                if self.marks.len() >= MAX_DEPTH {
                    return Err(bad(format!("nested deeper than {MAX_DEPTH}")));
                }
                self.marks.push(self.stack.len());
            }
            // MEMOIZE, BINPUT, LONG_BINPUT
            0x94 => self.put(self.memo.len())?,
            b'q' => {
                let index = self.length::<1>()?;
                self.put(index)?;
            }
            b'r' => {
                let index = self.length::<4>()?;
                self.put(index)?;
            }
            // BINGET, LONG_BINGET
            b'h' => {
                let index = self.length::<1>()?;
                self.get(index)?;
            }
            b'j' => {
                let index = self.length::<4>()?;
                self.get(index)?;
            }
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
            0x8c => self.text::<1>()?,
            b'X' => self.text::<4>()?,
            0x8d => self.text::<8>()?,
            // SHORT_BINBYTES, BINBYTES, BINBYTES8
            b'C' => self.binary::<1>()?,
            b'B' => self.binary::<4>()?,
            0x8e => self.binary::<8>()?,
            // BININT1, BININT2, BININT, LONG1
            b'K' => {
                let number = self.array::<1>()?;
                self.stack.push(Value::Int(i64::from(number[0])));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(i64::from(number)));
            }
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(i64::from(number)));
            }
            0x8a => self.long()?,
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.tuple(self.stack.len())?,
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let from = self.stack.len().checked_sub(count).ok_or_else(underflow)?;
                self.tuple(from)?;
            }
            b't' => {
                let from = self.mark()?;
                self.tuple(from)?;
            }
            // SETITEM, SETITEMS
            b's' => {
                let from = self.stack.len().checked_sub(2).ok_or_else(underflow)?;
                self.set_items(from)?;
            }
            b'u' => {
                let from = self.mark()?;
                self.set_items(from)?;
            }
            // STOP
            b'.' => return self.stop().map(Some),
            other => {
                return Err(bad(format!(
                    "opcode {} ({other:#04x}) is refused: a payload holds dict, str, int, bytes and tuple only",
                    opcodes::name(other)
                ))
                .with_help("do not load this file with a general pickle reader: it may run code"));
            }
        }
        Ok(None)
    }

    fn stop(&self) -> Result<usize> {
        if self.position != self.bytes.len() {
            return Err(bad(format!("{} bytes behind STOP", self.bytes.len() - self.position)));
        }
        match (self.stack.as_slice(), self.marks.is_empty()) {
            ([Value::Dict(root)], true) => Ok(*root),
            _ => Err(bad("it does not end with one dictionary")),
        }
    }

    fn set_items(&mut self, from: usize) -> Result<()> {
        self.above_mark(from)?;
        let items = self.stack.split_off(from);
        let Some(&Value::Dict(index)) = self.stack.last() else {
            return Err(bad("items are set on no dictionary"));
        };
        self.above_mark(self.stack.len() - 1)?;
        let dict = self.dicts.get_mut(index).ok_or_else(underflow)?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(bad("a key has no value"));
        }
        for &[key, value] in pairs {
            let Value::Text(key) = key else { return Err(bad("a key is no text")) };
            if dict.iter().any(|(known, _)| *known == key) {
                return Err(bad(format!("key `{}` stands twice", key.escape_debug())));
            }
            if dict.len() >= MAX_KEYS {
                return Err(bad(format!("a dictionary of more than {MAX_KEYS} keys")));
            }
            dict.push((key, value));
        }
        Ok(())
    }

    fn tuple(&mut self, from: usize) -> Result<()> {
        self.above_mark(from)?;
        let mut numbers = Vec::with_capacity(self.stack.len().saturating_sub(from));
        for value in self.stack.split_off(from) {
            let Value::Int(number) = value else { return Err(bad("a tuple holds more than integers")) };
            numbers.push(number);
        }
        self.tuples.push(numbers);
        self.stack.push(Value::Tuple(self.tuples.len() - 1));
        Ok(())
    }

    fn put(&mut self, index: usize) -> Result<()> {
        self.above_mark(self.stack.len().checked_sub(1).ok_or_else(underflow)?)?;
        let value = *self.stack.last().ok_or_else(underflow)?;
        if index >= MAX_STEPS {
            return Err(bad(format!("memo entry {index} is above {MAX_STEPS}")));
        }
        if index >= self.memo.len() {
            self.memo.resize(index + 1, None);
        }
        if let Some(slot) = self.memo.get_mut(index) {
            *slot = Some(value);
        }
        Ok(())
    }

    fn get(&mut self, index: usize) -> Result<()> {
        match self.memo.get(index).copied().flatten() {
            None => Err(bad(format!("memo entry {index} was never put"))),
            Some(Value::Dict(_)) => Err(bad("a dictionary is fetched from the memo")),
            Some(value) => {
                self.stack.push(value);
                Ok(())
            }
        }
    }

    fn long(&mut self) -> Result<()> {
        let count = self.length::<1>()?;
        if count > 8 {
            return Err(bad(format!("an integer of {count} bytes")));
        }
        let bytes = self.take(count)?;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        number.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        self.stack.push(Value::Int(i64::from_le_bytes(number)));
        Ok(())
    }

    fn text<const N: usize>(&mut self) -> Result<()> {
        let length = self.length::<N>()?;
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| bad("a text is not UTF-8"))?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn binary<const N: usize>(&mut self) -> Result<()> {
        let length = self.length::<N>()?;
        let bytes = self.take(length)?;
        self.stack.push(Value::Bytes(bytes));
        Ok(())
    }

    fn mark(&mut self) -> Result<usize> {
        self.marks.pop().ok_or_else(|| bad("no mark is open"))
    }

    /// What lies below the last open mark may not be taken.
    fn above_mark(&self, from: usize) -> Result<()> {
        if from < self.marks.last().copied().unwrap_or_default() { Err(underflow()) } else { Ok(()) }
    }

    fn length<const N: usize>(&mut self) -> Result<usize> {
        let mut number = [0; 8];
        number.iter_mut().zip(self.array::<N>()?).for_each(|(to, from)| *to = from);
        usize::try_from(u64::from_le_bytes(number)).map_err(|_| bad("a length does not fit this machine"))
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| Error::internal("a slice of N bytes is an array of N"))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let end = self.position.checked_add(length);
        let taken = end.and_then(|end| self.bytes.get(self.position..end)).ok_or_else(|| {
            bad(format!("wanted {length} bytes more, found {}", self.bytes.len() - self.position))
        })?;
        self.position += length;
        Ok(taken)
    }
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("arc_v3 pickle: {why}"))
}

fn underflow() -> Error {
    bad("a value is wanted where none is")
}

fn wrong(key: &str, wanted: &str, found: Value<'_>) -> Error {
    let found = match found {
        Value::Int(_) => "an integer",
        Value::Text(_) => "text",
        Value::Bytes(_) => "bytes",
        Value::Tuple(_) => "a tuple",
        Value::Dict(_) => "a dictionary",
    };
    bad(format!("`{key}`: wanted {wanted}, found {found}"))
}
