//! What several tests share: the stated bounds, small weights, and pickles made by hand.
#![allow(dead_code, unreachable_pub, reason = "a module of several tests, each of which uses a part of it")]

use towline_core::{Codec, DType, Mode, Result, TensorMeta, UnitMeta};

/// What the crate states that a decoder allocates at most, from the table in its documentation.
pub fn stated_bound(codec: &str, meta: &TensorMeta) -> usize {
    const MIB: usize = 1 << 20;
    let (length, elements) = (meta.byte_len(), meta.elements());
    match codec {
        // The message of an error.
        "raw" => 4096,
        "octave" => 16 * length + MIB,
        "zstd" | "lz4" => length + MIB,
        "arc_v1" => MIB,
        "arc_v2" => length.min(128 * MIB) + MIB,
        "arc_v3" => {
            let each = match meta.dtype().bits() {
                8 => 20,
                16 => 21,
                _ => 23,
            };
            6 * MIB + 2 * each * elements
        }
        other => panic!("no bound is stated for {other}"),
    }
}

/// A tensor and two versions of its bytes that differ a little.
pub struct Pair {
    pub meta: TensorMeta,
    pub old: Vec<u8>,
    pub new: Vec<u8>,
}

/// Numbers that look random, the same on each run.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A tensor with every `every`-th byte changed in its lowest bit, and one byte changed wholly.
pub fn pair(dtype: DType, shape: &[usize], every: usize) -> Pair {
    let meta = TensorMeta::new("tensor", dtype, shape).unwrap();
    let old = noise(meta.byte_len() as u64 + 7, meta.byte_len());
    let mut new = old.clone();
    new.iter_mut().step_by(every).for_each(|byte| *byte ^= 1);
    if let Some(byte) = new.last_mut() {
        *byte ^= 0x80;
    }
    Pair { meta, old, new }
}

impl Pair {
    /// The unit that is the whole tensor.
    pub fn unit(&self) -> UnitMeta<'_> {
        UnitMeta::new(&self.meta, 0..self.meta.byte_len())
    }

    /// The frame of the tensor as one unit.
    pub fn frame(&self, codec: &dyn Codec, mode: Mode) -> Vec<u8> {
        let mut frame = Vec::new();
        let parent = (mode == Mode::Delta).then_some(&self.old[..]);
        codec.encode(&self.unit(), parent, &self.new, &mut frame).unwrap();
        frame
    }

    /// What `frame` decodes to.
    pub fn decode(&self, codec: &dyn Codec, mode: Mode, frame: &[u8]) -> Result<Vec<u8>> {
        let mut target = self.old.clone();
        codec.decode(&self.unit(), mode, frame, &mut target)?;
        Ok(target)
    }
}

/// Builds pickles by hand.
#[derive(Default)]
pub struct Pickle(pub Vec<u8>);

impl Pickle {
    /// PROTO 5, EMPTY_DICT, MARK.
    pub fn new() -> Self {
        Self(vec![0x80, 5, b'}', b'('])
    }
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    pub fn text(mut self, text: &str) -> Self {
        self.0.extend([0x8c, text.len() as u8]);
        self.0.extend_from_slice(text.as_bytes());
        self
    }
    pub fn int(mut self, number: i64) -> Self {
        self.0.extend([0x8a, 8]);
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.push(b'B');
        self.0.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.0.extend_from_slice(bytes);
        self
    }
    /// SETITEMS, STOP.
    pub fn end(self) -> Vec<u8> {
        self.raw(b"u.").0
    }
}

/// An arc_v3 payload around compressed data.
pub fn envelope(codec: &str, data: &[u8]) -> Vec<u8> {
    let pickle = Pickle::new().text("codec").text(codec).text("data").bytes(data).end();
    [&b"ARC3_ENVELOPE\0"[..], &pickle].concat()
}
