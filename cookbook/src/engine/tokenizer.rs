//! The byte-level tokenizer: token id = byte.

/// Ids 0 to 255 are the bytes; ids above are special and stand for no text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ByteTokenizer;

impl ByteTokenizer {
    /// Number of ids that stand for bytes; the vocabulary of [`super::ModelConfig::tiny`].
    pub const VOCAB_SIZE: usize = 256;

    /// The ids of a text: its UTF-8 bytes.
    #[must_use]
    pub fn encode(self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// The bytes of a sequence of ids; special ids are left out.
    #[must_use]
    pub fn decode_bytes(self, tokens: &[u32]) -> Vec<u8> {
        tokens.iter().filter_map(|&token| u8::try_from(token).ok()).collect()
    }

    /// The text of a sequence of ids: special ids are left out, bytes that are not UTF-8 become
    /// U+FFFD.
    #[must_use]
    pub fn decode(self, tokens: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(tokens)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_and_the_rest_is_lossy() {
        let tokenizer = ByteTokenizer;
        let text = "3142>1234\n\u{e9}\u{1f600}";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text)), text);
        assert_eq!(tokenizer.encode("A>"), [65, 62]);
        assert_eq!(tokenizer.decode(&[65, 256, 99_999, 0xff, 66]), "A\u{fffd}B");
        let all: Vec<u32> = (0..256).collect();
        assert_eq!(tokenizer.decode_bytes(&all), (0..=255).collect::<Vec<u8>>());
    }
}
