//! Checks of any text file.

use super::Finding;

/// Words that say that something is left to do. Put together here, so that this file does not hold them.
const LEFT: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
/// Macros that say the same in Rust.
const LEFT_MACROS: [&str; 2] = [concat!("to", "do!("), concat!("unimplement", "ed!(")];
/// Folders of one machine.
const FOLDERS: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];
const HOME: &str = concat!("/ho", "me/");
/// Hosts of package registries: which one is used is a matter of the machine.
const HOSTS: [&str; 6] = [
    concat!("crates", ".io"),
    concat!("pypi", ".org"),
    concat!("python", "hosted.org"),
    concat!("npm", "js."),
    concat!("deb.", "debian.org"),
    concat!("proxy.", "golang.org"),
];

/// Nothing is left to do.
pub(super) fn leftovers(path: &str, text: &str) -> Vec<Finding> {
    lines(text, |line| {
        if path.ends_with(".rs") && LEFT_MACROS.iter().any(|left| line.contains(left)) {
            return Some("unfinished code".to_owned());
        }
        let word = LEFT.iter().find(|left| words(line).any(|word| word == **left))?;
        Some(format!("`{word}`: do it, or file an issue"))
    })
}

/// No path of one machine and no registry's host. The lock file is cargo's own.
pub(super) fn machine_paths(path: &str, text: &str) -> Vec<Finding> {
    if path.ends_with("Cargo.lock") {
        return Vec::new();
    }
    lines(text, |line| {
        let folder = FOLDERS.iter().find(|folder| starts_a_path(line, folder));
        if let Some(folder) = folder {
            return Some(format!("`{folder}…` is a path of one machine"));
        }
        let home = line.match_indices(HOME).any(|(at, _)| {
            let rest = line.get(at + HOME.len()..).unwrap_or("");
            rest.split_once('/').is_some_and(|(name, _)| !name.is_empty() && name.chars().all(in_a_word))
        });
        if home {
            return Some("the home of somebody".to_owned());
        }
        let host = HOSTS.iter().find(|host| line.contains(**host))?;
        Some(format!("`{host}` is the host of a registry"))
    })
}

/// No conflict was committed.
pub(super) fn merge_marks(_: &str, text: &str) -> Vec<Finding> {
    lines(text, |line| {
        let mark =
            |sign: &str| line.starts_with(&sign.repeat(7)) && line.get(7..8).is_none_or(|next| next == " ");
        (mark("<") || mark(">")).then(|| "a merge mark".to_owned())
    })
}

/// No white space at the end of a line, no carriage return, no tab in Rust.
pub(super) fn white_space(path: &str, text: &str) -> Vec<Finding> {
    lines(text, |line| {
        if line.ends_with([' ', '\t', '\r']) {
            Some("white space at the end of the line".to_owned())
        } else if path.ends_with(".rs") && line.contains('\t') {
            Some("a tab".to_owned())
        } else {
            None
        }
    })
}

/// A file ends with one newline.
pub(super) fn final_newline(_: &str, text: &str) -> Vec<Finding> {
    if text.is_empty() || (text.ends_with('\n') && !text.ends_with("\n\n")) {
        Vec::new()
    } else {
        vec![Finding::new(text.lines().count(), "the file must end with one newline")]
    }
}

/// CI is one local command: nothing is done there that cannot be done here.
pub(super) fn ci_script(path: &str, text: &str) -> Vec<Finding> {
    if path != ".ci/run" {
        return Vec::new();
    }
    let commands =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).count();
    if commands == 1 {
        Vec::new()
    } else {
        vec![Finding::new(0, format!("{commands} command lines, wanted 1"))]
    }
}

fn lines(text: &str, check: impl Fn(&str) -> Option<String>) -> Vec<Finding> {
    text.split('\n')
        .enumerate()
        .filter_map(|(index, line)| Some(Finding::new(index + 1, check(line)?)))
        .collect()
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|sign: char| !in_a_word(sign)).filter(|word| !word.is_empty())
}

fn in_a_word(sign: char) -> bool {
    sign.is_ascii_alphanumeric() || sign == '_' || sign == '-'
}

/// Whether the folder stands at the start of a path: not inside `../folder/` or `https://host/folder/`.
fn starts_a_path(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line.get(..at).and_then(|text| text.chars().next_back());
        before.is_none_or(|sign| !in_a_word(sign) && !matches!(sign, '.' | '/' | '}'))
    })
}

#[cfg(test)]
mod tests {
    use super::super::expect;
    use super::*;

    #[test]
    fn leftovers_are_words() {
        let (one, macro_call) = (format!("// {}: later", LEFT[0]), format!("    {})", LEFT_MACROS[0]));
        expect(
            leftovers,
            &[
                ("a.rs", &one, 1),
                ("a.md", &one, 1),
                ("a.rs", &macro_call, 1),
                ("a.md", &macro_call, 0),
                ("a.sh", "mktemp /tmp/aXXXXXX", 0),
                ("a.rs", "fine", 0),
            ],
        );
    }

    #[test]
    fn paths_of_a_machine() {
        let cases = [
            (format!("cd {}main", FOLDERS[0]), 1),
            (format!("\"{}x\"", FOLDERS[1]), 1),
            (format!("see ..{}x", FOLDERS[0]), 0),
            (format!("https://host{}x", FOLDERS[0]), 0),
            (format!("{HOME}somebody/x"), 1),
            (format!("{HOME}$USER/x"), 0),
            (format!("from {}", HOSTS[1]), 1),
        ];
        for (text, wanted) in &cases {
            expect(machine_paths, &[("a.md", text, *wanted), ("Cargo.lock", text, 0)]);
        }
    }

    #[test]
    fn marks_and_white_space() {
        let mark = "<".repeat(7);
        expect(
            merge_marks,
            &[
                ("a", &format!("{mark} HEAD"), 1),
                ("a", &mark, 1),
                ("a", "=======", 0),
                ("a", &format!("{mark}<"), 0),
            ],
        );
        expect(
            white_space,
            &[
                ("a.md", "x \ny", 1),
                ("a.md", "x\r\n", 1),
                ("a.rs", "\tx", 1),
                ("a.py", "\tx", 0),
                ("a.rs", "x\n", 0),
            ],
        );
        expect(final_newline, &[("a", "x", 1), ("a", "x\n\n", 1), ("a", "x\n", 0), ("a", "", 0)]);
    }

    #[test]
    fn one_command_is_ci() {
        expect(
            ci_script,
            &[
                (".ci/run", "#!/bin/sh\n# all of it\ncargo xtask ci\n", 0),
                (".ci/run", "cargo build\ncargo test\n", 1),
                (".ci/run", "\n", 1),
                ("other", "a\nb\n", 0),
            ],
        );
    }
}
