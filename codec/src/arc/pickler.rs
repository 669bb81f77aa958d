//! Writes the few opcodes that arc_v3's pickles need. Long byte strings are left out as streams, to be filled in
//! when the pickle is written.

/// SETITEMS and STOP: the end of a pickle whose top is a dictionary.
pub(super) const END: &[u8] = b"u.";

/// A part of a pickle.
#[derive(Debug)]
pub(super) enum Piece<S> {
    Bytes(Vec<u8>),
    Stream(S),
}

/// A pickle of protocol 5 whose top is a dictionary that is still open.
pub(super) struct Pickle<S> {
    pieces: Vec<Piece<S>>,
    streams: u64,
    bytes: Vec<u8>,
}

impl<S> Pickle<S> {
    pub(super) fn new() -> Self {
        // PROTO 5, EMPTY_DICT, MARK.
        Self { pieces: Vec::new(), streams: 0, bytes: vec![0x80, 5, b'}', b'('] }
    }

    /// What was written since the last stream.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Closes the dictionary. Returns the parts and their length together.
    pub(super) fn finish(mut self) -> (Vec<Piece<S>>, u64) {
        self.bytes.extend_from_slice(END);
        let length = self.length();
        self.pieces.push(Piece::Bytes(self.bytes));
        (self.pieces, length)
    }

    fn length(&self) -> u64 {
        let plain = |piece: &Piece<S>| match piece {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::Stream(_) => 0,
        };
        self.pieces.iter().map(plain).sum::<u64>() + self.streams + self.bytes.len() as u64
    }

    /// SHORT_BINUNICODE. Keys and names are short.
    pub(super) fn text(&mut self, text: &str) {
        self.bytes.push(0x8c);
        self.bytes.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn int(&mut self, number: u64) {
        if let Ok(byte) = u8::try_from(number) {
            // BININT1
            self.bytes.extend_from_slice(&[b'K', byte]);
        } else {
            // LONG1 of 8 bytes, signed. Counts and lengths in memory are below 2^63.
            self.bytes.extend_from_slice(&[0x8a, 8]);
            self.bytes.extend_from_slice(&number.min(i64::MAX as u64).to_le_bytes());
        }
    }

    pub(super) fn tuple(&mut self, numbers: &[usize]) {
        self.bytes.push(b'(');
        numbers.iter().for_each(|&number| self.int(number as u64));
        self.bytes.push(b't');
    }

    pub(super) fn entry_int(&mut self, key: &str, number: u64) {
        self.text(key);
        self.int(number);
    }

    pub(super) fn entry_text(&mut self, key: &str, text: &str) {
        self.text(key);
        self.text(text);
    }

    pub(super) fn dict(&mut self, fill: impl FnOnce(&mut Self)) {
        self.bytes.extend_from_slice(b"}(");
        fill(self);
        self.bytes.push(b'u');
    }

    /// BINBYTES or BINBYTES8 of `length` bytes that `stream` yields later.
    pub(super) fn stream(&mut self, key: &str, stream: S, length: u64) {
        self.text(key);
        match u32::try_from(length) {
            Ok(length) => {
                self.bytes.push(b'B');
                self.bytes.extend_from_slice(&length.to_le_bytes());
            }
            Err(_) => {
                self.bytes.push(0x8e);
                self.bytes.extend_from_slice(&length.to_le_bytes());
            }
        }
        self.pieces.push(Piece::Bytes(std::mem::take(&mut self.bytes)));
        self.pieces.push(Piece::Stream(stream));
        self.streams += length;
    }
}
