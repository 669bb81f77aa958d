//! Checks of Rust sources.

use super::Finding;

/// A file of one idea is rarely longer than the first; none may be longer than the second. Tests do not count.
const LONG: usize = 400;
const TOO_LONG: usize = 600;

/// Where `unsafe` may stand, and why: an audited module whose number needs it, with a Miri or sanitizer test, or a trait
/// that cannot be had without.
const UNSAFE: [(&str, &str); 5] = [
    (
        "checkpoint-core/src/testing/alloc.rs",
        "the counting allocator of the kits: `GlobalAlloc` is an unsafe trait",
    ),
    ("codec/src/octave/simd/mod.rs", "calls of kernels that are compiled for what the processor has"),
    ("codec/src/octave/simd/x86.rs", "AVX2 and AVX-512, behind tokens of what the processor has"),
    ("codec/src/octave/simd/x86/masks.rs", "AVX-512, behind a token of what the processor has"),
    ("codec/src/octave/simd/x86/find.rs", "AVX-512, behind a token of what the processor has"),
];

/// Source files stay short.
pub(super) fn length(path: &str, text: &str) -> Vec<Finding> {
    if !path.ends_with(".rs") || is_test(path) {
        return Vec::new();
    }
    let lines = text.lines().count() - test_module_lines(text);
    if lines > TOO_LONG {
        vec![Finding::new(0, format!("{lines} lines without tests, at most {TOO_LONG}: split it"))]
    } else if lines > LONG {
        vec![Finding::warning(format!("{lines} lines without tests, {LONG} are plenty"))]
    } else {
        Vec::new()
    }
}

/// `unsafe` stands in the listed files alone, and nobody else lifts the lint.
pub(super) fn unsafe_blocks(path: &str, text: &str) -> Vec<Finding> {
    if !path.ends_with(".rs") || UNSAFE.iter().any(|(allowed, _)| *allowed == path) {
        return Vec::new();
    }
    code_lines(text)
        .into_iter()
        .filter(|(_, code)| {
            let mut words = code.split(|sign: char| !sign.is_alphanumeric() && sign != '_');
            words.any(|word| word == "unsafe" || word == "unsafe_code")
                && !code.contains("deny(unsafe_code)")
                && !code.contains("forbid(unsafe_code)")
        })
        .map(|(line, _)| Finding::new(line, "`unsafe` outside the list in xtask/src/tidy/code.rs"))
        .collect()
}

/// A test that is skipped must say so when it runs.
pub(super) fn ignored_tests(path: &str, text: &str) -> Vec<Finding> {
    if !path.ends_with(".rs") {
        return Vec::new();
    }
    let mark = concat!("#[", "ignore");
    code_lines(text)
        .into_iter()
        .filter(|(_, code)| {
            let rest = code.split_once(mark).map(|(_, rest)| rest);
            rest.is_some_and(|rest| !rest.starts_with(|sign: char| sign.is_alphanumeric() || sign == '_'))
        })
        .map(|(line, _)| Finding::new(line, "an ignored test: make it run, or remove it"))
        .collect()
}

fn is_test(path: &str) -> bool {
    path.contains("/tests/")
        || path.ends_with("/tests.rs")
        || path.ends_with("_tests.rs")
        || path.contains("/benches/")
}

/// The lines of the test module that closes a file.
fn test_module_lines(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let start = lines
        .windows(2)
        .position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod ") && pair[1].ends_with('{'));
    start.map_or(0, |start| lines.len() - start)
}

/// The lines with comments and the insides of strings taken out, and their numbers. Good enough to look for words: it
/// knows line and block comments, strings with escapes, raw strings and characters.
fn code_lines(text: &str) -> Vec<(usize, String)> {
    let mut lines = Vec::new();
    let mut state = State::Code;
    for (index, line) in text.lines().enumerate() {
        let mut code = String::new();
        let mut rest = line;
        while let Some(sign) = rest.chars().next() {
            let skip = state.step(rest, sign, &mut code);
            rest = rest.get(skip.max(sign.len_utf8())..).unwrap_or("");
        }
        if state == State::LineComment {
            state = State::Code;
        }
        lines.push((index + 1, code));
    }
    lines
}

/// Where in the source we are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    /// How deep.
    BlockComment(usize),
    Text,
    /// What ends it: a quote and its hashes.
    RawText(String),
}

impl State {
    /// Reads one token of `rest`, which starts with `sign`; keeps code; returns how many bytes it took.
    fn step(&mut self, rest: &str, sign: char, code: &mut String) -> usize {
        match self {
            Self::LineComment => rest.len(),
            Self::BlockComment(depth) => {
                if rest.starts_with("*/") {
                    *depth -= 1;
                    if *depth == 0 {
                        *self = Self::Code;
                    }
                    2
                } else if rest.starts_with("/*") {
                    *depth += 1;
                    2
                } else {
                    1
                }
            }
            Self::Text => match sign {
                '\\' => 2,
                '"' => {
                    *self = Self::Code;
                    1
                }
                _ => 1,
            },
            Self::RawText(end) => {
                if rest.starts_with(end.as_str()) {
                    let length = end.len();
                    *self = Self::Code;
                    length
                } else {
                    1
                }
            }
            Self::Code => self.step_in_code(rest, sign, code),
        }
    }

    fn step_in_code(&mut self, rest: &str, sign: char, code: &mut String) -> usize {
        if rest.starts_with("//") {
            *self = Self::LineComment;
            return rest.len();
        }
        if rest.starts_with("/*") {
            *self = Self::BlockComment(1);
            return 2;
        }
        let inside_word = code.chars().next_back().is_some_and(|last| last.is_alphanumeric() || last == '_');
        if sign == 'r' && (!inside_word || code.ends_with('b')) {
            let hashes = rest[1..].chars().take_while(|sign| *sign == '#').count();
            if rest[1 + hashes..].starts_with('"') {
                *self = Self::RawText(format!("\"{}", "#".repeat(hashes)));
                return hashes + 2;
            }
        }
        if sign == '"' {
            *self = Self::Text;
            return 1;
        }
        // A character that would else look like the start of a string.
        for quoted in ["'\"'", "'\\\"'", "'\\\\'"] {
            if rest.starts_with(quoted) {
                return quoted.len();
            }
        }
        code.push(sign);
        sign.len_utf8()
    }
}

#[cfg(test)]
mod tests {
    use super::super::expect;
    use super::*;

    #[test]
    fn long_files_without_their_tests() {
        let code = "x\n".repeat(600);
        let tested = format!("{code}#[cfg(test)]\nmod tests {{\n{code}}}\n");
        let too_long = format!("{code}x\n");
        expect(
            length,
            &[
                ("a/src/b.rs", &code, 0),
                ("a/src/b.rs", &tested, 0),
                ("a/src/b.rs", &too_long, 1),
                ("a/tests/b.rs", &too_long, 0),
                ("a/src/b.md", &too_long, 0),
            ],
        );
        assert!(length("a/src/b.rs", &code)[0].warning);
        assert!(length("a/src/b.rs", "x\n").is_empty());
    }

    #[test]
    fn unsafe_is_seen_in_code_alone() {
        let block = concat!("uns", "afe { x() }");
        expect(
            unsafe_blocks,
            &[
                ("a.rs", block, 1),
                ("a.rs", &format!("// {block}"), 0),
                ("a.rs", &format!("/* {block} */ fn f() {{}}"), 0),
                ("a.rs", &format!("let x = \"{block}\";"), 0),
                ("a.rs", &format!("let x = r#\"a\" {block}\"#;"), 0),
                ("a.rs", &format!("let x = '\"'; {block}"), 1),
                ("a.rs", &format!("let x = \"a\\\\\"; {block}"), 1),
                ("a.rs", concat!("#![allow(uns", "afe_code)]"), 1),
                ("a.rs", concat!("#![deny(uns", "afe_code)]"), 0),
                ("a.md", block, 0),
            ],
        );
    }

    #[test]
    fn ignored_tests_are_refused() {
        let mark = concat!("#[", "ignore]");
        let reason = concat!("#[", "ignore = \"slow\"]");
        expect(
            ignored_tests,
            &[
                ("a.rs", mark, 1),
                ("a.rs", reason, 1),
                ("a.rs", &format!("// {mark}"), 0),
                ("a.rs", "#[test]", 0),
            ],
        );
    }
}
