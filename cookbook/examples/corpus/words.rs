//! Text to token ids by greedy longest match in the vocabulary of a GGUF file.
//!
//! Not the model's own segmentation, which merges pairs in a learnt order; but every id is one of the model's, and
//! longest matches agree with it on most words.

use std::collections::HashMap;

use crate::Result;

/// The type of an ordinary token in `tokenizer.ggml.token_type`; all others are control tokens and the like.
const NORMAL: i32 = 1;

/// A vocabulary.
pub(crate) struct Words {
    ids: HashMap<Vec<u8>, u32>,
    bytes: Vec<Vec<u8>>,
    longest: usize,
}

impl Words {
    /// A vocabulary from the tokens, spelled byte by byte in GPT-2's alphabet, and their types.
    pub(crate) fn new(tokens: &[String], kinds: &[i32]) -> Result<Self> {
        if tokens.len() != kinds.len() {
            return Err(format!("{} tokens have {} types", tokens.len(), kinds.len()).into());
        }
        let alphabet: HashMap<char, u8> = alphabet().collect();
        let mut words = Self { ids: HashMap::new(), bytes: Vec::new(), longest: 0 };
        for (id, (token, kind)) in (0..).zip(tokens.iter().zip(kinds)) {
            if *kind != NORMAL {
                words.bytes.push(Vec::new());
                continue;
            }
            let bytes: Option<Vec<u8>> = token.chars().map(|sign| alphabet.get(&sign).copied()).collect();
            let bytes = bytes.ok_or_else(|| format!("token {token:?} is not spelled in bytes"))?;
            words.longest = words.longest.max(bytes.len());
            words.ids.insert(bytes.clone(), id);
            words.bytes.push(bytes);
        }
        Ok(words)
    }

    /// The ids of a text: at each place the longest token that fits. A byte that is no token is left out.
    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        let mut rest = text.as_bytes();
        let mut ids = Vec::new();
        while !rest.is_empty() {
            let found = (1..=self.longest.min(rest.len()))
                .rev()
                .find_map(|length| Some((length, *self.ids.get(&rest[..length])?)));
            ids.extend(found.map(|(_, id)| id));
            rest = &rest[found.map_or(1, |(length, _)| length)..];
        }
        ids
    }

    /// The text of ids; control tokens stand for none.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> =
            ids.iter().filter_map(|&id| self.bytes.get(id as usize)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// GPT-2's letter for every byte: itself if it can be printed, else the next one from U+0100 on.
fn alphabet() -> impl Iterator<Item = (char, u8)> {
    let mut next = 256;
    (0..=255u8).filter_map(move |byte| {
        let code = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
            _ => {
                next += 1;
                next - 1
            }
        };
        Some((char::from_u32(code)?, byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Words {
        let tokens = ["<|end|>", "t", "h", "e", "th", "the", "Ġ", "Ġthe", "Ċ", "Ã", "©"];
        let kinds: Vec<i32> =
            tokens.iter().map(|token| if token.starts_with('<') { 3 } else { NORMAL }).collect();
        Words::new(&tokens.map(str::to_owned), &kinds).unwrap()
    }

    #[test]
    fn the_longest_token_wins() {
        let words = words();
        assert_eq!(words.encode("the the\nhet"), [5, 7, 8, 2, 3, 1]);
        assert_eq!(words.encode("é"), [9, 10]);
        assert_eq!(words.decode(&[5, 7, 8, 0, 9, 10]), "the the\né");
    }

    #[test]
    fn control_tokens_do_not_come_from_text() {
        assert_eq!(words().encode("<|end|>the"), [3, 5]);
    }

    #[test]
    fn the_alphabet_has_a_letter_for_every_byte() {
        let letters: HashMap<char, u8> = alphabet().collect();
        assert_eq!(letters.len(), 256);
        for (letter, byte) in
            [('A', b'A'), ('Ā', 0), ('Ġ', b' '), ('Ċ', b'\n'), ('ġ', 0x7f), ('Ń', 0xad), ('ÿ', 0xff)]
        {
            assert_eq!(letters.get(&letter), Some(&byte), "{letter}");
        }
        assert!(Words::new(&["\u{4e00}".to_owned()], &[NORMAL]).is_err());
    }
}
