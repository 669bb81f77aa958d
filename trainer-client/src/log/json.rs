//! JSON objects, split into their members without touching the text of the values.
//!
//! Values keep their text because numbers and the order of keys would not survive being read and written again. The
//! grammar is JSON's, with the three words that Python writes for numbers that JSON does not have.

/// How deep values may nest.
const MAX_DEPTH: usize = 128;

/// Where a text is no JSON object, and what was wanted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    /// The byte.
    pub(super) at: usize,
    pub(super) wanted: &'static str,
}

/// The members of the object that `text` is: decoded keys, and values as they are written. A key may come twice.
pub(super) fn members(text: &str) -> Result<Vec<(String, &str)>, Fault> {
    let mut scanner = Scanner { text, at: 0 };
    let mut members = Vec::new();
    scanner.space();
    scanner.object(0, |key, value| {
        let key = serde_json::from_str(key).map_err(|_| "a key of whole characters")?;
        members.push((key, value));
        Ok(())
    })?;
    scanner.space();
    match scanner.peek() {
        None => Ok(members),
        Some(_) => Err(scanner.wanted("the end of the line")),
    }
}

/// A string as JSON, in ASCII.
pub(super) fn push_string(out: &mut String, value: &str) {
    out.push('"');
    for sign in value.chars() {
        match sign {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            sign if sign.is_ascii_control() => push_escape(out, u32::from(sign)),
            sign => push_sign(out, sign),
        }
    }
    out.push('"');
}

/// Text that is JSON already, in ASCII: beyond it a sign can only stand inside a string.
pub(super) fn push_ascii(out: &mut String, json: &str) {
    json.chars().for_each(|sign| push_sign(out, sign));
}

fn push_sign(out: &mut String, sign: char) {
    if sign.is_ascii() {
        out.push(sign);
    } else {
        sign.encode_utf16(&mut [0; 2]).iter().for_each(|unit| push_escape(out, u32::from(*unit)));
    }
}

fn push_escape(out: &mut String, unit: u32) {
    out.push_str("\\u");
    for shift in [12, 8, 4, 0] {
        out.push(char::from_digit((unit >> shift) & 0xf, 16).unwrap_or('0'));
    }
}

/// Goes through a text once, from its start.
struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn object(
        &mut self,
        depth: usize,
        mut member: impl FnMut(&'a str, &'a str) -> Result<(), &'static str>,
    ) -> Result<(), Fault> {
        self.expect(b'{', "an object")?;
        self.space();
        if self.take(b'}') {
            return Ok(());
        }
        loop {
            self.space();
            let start = self.at;
            self.string("a key in quotes")?;
            let key = self.since(start);
            self.space();
            self.expect(b':', "`:`")?;
            self.space();
            let value = self.at;
            self.value(depth)?;
            let value = self.since(value);
            member(key, value).map_err(|wanted| Fault { at: start, wanted })?;
            self.space();
            if self.take(b'}') {
                return Ok(());
            }
            self.expect(b',', "`,` or `}`")?;
        }
    }

    fn array(&mut self, depth: usize) -> Result<(), Fault> {
        self.expect(b'[', "a list")?;
        self.space();
        if self.take(b']') {
            return Ok(());
        }
        loop {
            self.space();
            self.value(depth)?;
            self.space();
            if self.take(b']') {
                return Ok(());
            }
            self.expect(b',', "`,` or `]`")?;
        }
    }

    fn value(&mut self, depth: usize) -> Result<(), Fault> {
        if depth >= MAX_DEPTH {
            return Err(self.wanted("values that nest less deep"));
        }
        match self.peek() {
            Some(b'{') => self.object(depth + 1, |_, _| Ok(())),
            Some(b'[') => self.array(depth + 1),
            Some(b'"') => self.string("a text"),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => {
                match ["true", "false", "null", "NaN", "Infinity"].into_iter().find(|word| self.word(word)) {
                    Some(_) => Ok(()),
                    None => Err(self.wanted("a value")),
                }
            }
        }
    }

    fn number(&mut self) -> Result<(), Fault> {
        if self.take(b'-') && self.word("Infinity") {
            return Ok(());
        }
        if !self.take(b'0') {
            self.digits()?;
        }
        if self.take(b'.') {
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            let _ = self.take(b'+') || self.take(b'-');
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Fault> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == start { Err(self.wanted("a digit")) } else { Ok(()) }
    }

    fn string(&mut self, wanted: &'static str) -> Result<(), Fault> {
        self.expect(b'"', wanted)?;
        loop {
            match self.peek() {
                None => return Err(self.wanted("the end of a text")),
                Some(..0x20) => return Err(self.wanted("a text without control signs")),
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.at += self.escape()?,
                Some(_) => self.at += 1,
            }
        }
    }

    /// The length of the escape here.
    fn escape(&self) -> Result<usize, Fault> {
        let rest = self.text.as_bytes().get(self.at + 1..).unwrap_or_default();
        match rest {
            [b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => Ok(2),
            [b'u', digits @ ..]
                if digits.iter().take(4).filter(|byte| byte.is_ascii_hexdigit()).count() == 4 =>
            {
                Ok(6)
            }
            _ => Err(self.wanted("an escape that JSON knows")),
        }
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn word(&mut self, word: &str) -> bool {
        let found = self.text.get(self.at..).is_some_and(|rest| rest.starts_with(word));
        self.at += if found { word.len() } else { 0 };
        found
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8, wanted: &'static str) -> Result<(), Fault> {
        if self.take(byte) { Ok(()) } else { Err(self.wanted(wanted)) }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn since(&self, start: usize) -> &'a str {
        self.text.get(start..self.at).unwrap_or_default()
    }

    fn wanted(&self, wanted: &'static str) -> Fault {
        Fault { at: self.at, wanted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Result<Vec<(String, &str)>, Fault> {
        members(text)
    }

    #[test]
    fn values_keep_their_text() {
        let text = r#" {"a" : 1.50e+3 ,"b":[1, {"c":"\u00e9]}"}],"d":"é","é\n":null,"":-Infinity,"n":NaN} "#;
        let wanted = [
            ("a", "1.50e+3"),
            ("b", r#"[1, {"c":"\u00e9]}"}]"#),
            ("d", "\"é\""),
            ("é\n", "null"),
            ("", "-Infinity"),
            ("n", "NaN"),
        ];
        let found = split(text).unwrap();
        assert_eq!(found.iter().map(|(key, value)| (key.as_str(), *value)).collect::<Vec<_>>(), wanted);
        assert_eq!(split("{}").unwrap(), []);
    }

    #[test]
    fn what_is_no_object_is_named() {
        let deep = format!("{{\"a\":{}", "[".repeat(1000));
        for (text, at, wanted) in [
            ("", 0, "an object"),
            ("[]", 0, "an object"),
            ("\0\0", 0, "an object"),
            ("{\"a\":1", 6, "`,` or `}`"),
            ("{\"a\":1,}", 7, "a key in quotes"),
            ("{\"a\" 1}", 5, "`:`"),
            ("{\"a\":01}", 6, "`,` or `}`"),
            ("{\"a\":+1}", 5, "a value"),
            ("{\"a\":-}", 6, "a digit"),
            ("{\"a\":1.}", 7, "a digit"),
            ("{\"a\":tru}", 5, "a value"),
            ("{\"a\":\"x\ty\"}", 7, "a text without control signs"),
            ("{\"a\":\"\\x\"}", 6, "an escape that JSON knows"),
            ("{\"a\":\"\\u12\"}", 6, "an escape that JSON knows"),
            ("{\"a\":\"x", 7, "the end of a text"),
            ("{\"a\":[1 2]}", 8, "`,` or `]`"),
            ("{\"\\ud800\":1}", 1, "a key of whole characters"),
            ("{}{}", 2, "the end of the line"),
            (&deep, 133, "values that nest less deep"),
        ] {
            assert_eq!(split(text), Err(Fault { at, wanted }), "{text}");
        }
    }

    #[test]
    fn agrees_with_another_parser() {
        for text in
            ["{\"a\":[{},[],0,-0,1e5,1.0E-9,\"\\\\\\\"\",true,false,null]}", "{\"a\":{\"b\":{\"c\":[[]]}}}"]
        {
            let found = split(text).unwrap();
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::from_str::<serde_json::Value>(found[0].1).unwrap(), value["a"]);
        }
    }

    #[test]
    fn what_is_written_is_ascii_and_reads_back() {
        let value = "a\"\\\u{0}\n\u{1f}\u{7f}é\u{2028}\u{85}😀";
        let mut text = String::new();
        push_string(&mut text, value);
        assert!(text.is_ascii() && !text.contains(|sign: char| sign.is_ascii_control()), "{text}");
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), value);
        let mut again = String::new();
        push_ascii(&mut again, "{\"é\":\"😀\"}");
        assert_eq!(again, "{\"\\u00e9\":\"\\ud83d\\ude00\"}");
    }
}
