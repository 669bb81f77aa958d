//! `tidy`: what no compiler checks. Every check is a function of a file's path and text, so that it can be tested.

mod code;
mod manifests;
mod text;

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::args::Args;
use crate::stop::{Result, Stop};
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Checks every file that git tracks or would track: length of source files, leftovers, machine paths, merge marks, white
space, unsafe code, ignored tests, large files, and that manifests take their versions from the workspace.

Usage: cargo xtask tidy [--json]

Example: cargo xtask tidy";

/// Larger files do not belong into the repository.
const LARGEST: u64 = 1_500_000;

/// Something wrong, or nearly so.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    /// The line, counted from 1; 0 for the file as a whole.
    line: usize,
    message: String,
    /// Said, but it fails nothing.
    warning: bool,
}

impl Finding {
    fn new(line: usize, message: impl Into<String>) -> Self {
        Self { line, message: message.into(), warning: false }
    }

    fn warning(message: impl Into<String>) -> Self {
        Self { line: 0, message: message.into(), warning: true }
    }
}

/// A check of one text file.
type Check = fn(path: &str, text: &str) -> Vec<Finding>;

const CHECKS: &[Check] = &[
    code::length,
    code::unsafe_blocks,
    code::ignored_tests,
    text::leftovers,
    text::machine_paths,
    text::merge_marks,
    text::white_space,
    text::final_newline,
    text::ci_script,
    manifests::workspace_versions,
];

pub(crate) fn command(context: &Context, args: Args) -> Result<()> {
    args.finish()?;
    run(context)
}

/// Checks all files; fails when there is a finding that is no warning.
pub(crate) fn run(context: &Context) -> Result<()> {
    let files = tracked(context)?;
    let mut findings = manifests::crate_docs(&context.root, &files);
    for path in &files {
        findings.extend(
            check_file(&context.root.join(path), path).into_iter().map(|found| (path.clone(), found)),
        );
    }
    let failed = findings.iter().filter(|(_, finding)| !finding.warning).count();
    for (path, finding) in &findings {
        let level = if finding.warning { "warning" } else { "error" };
        context.say(format!("{level}: {path}:{}: {}", finding.line, finding.message));
    }
    context.say(format!(
        "tidy: {} files, {failed} errors, {} warnings",
        files.len(),
        findings.len() - failed
    ));
    let rows: Vec<_> = findings
        .iter()
        .map(|(path, finding)| {
            json!({"path": path, "line": finding.line, "message": finding.message, "warning": finding.warning})
        })
        .collect();
    context.emit(&json!({"files": files.len(), "findings": rows, "errors": failed}));
    if failed == 0 { Ok(()) } else { Err(Stop::failed(format!("{failed} findings"))) }
}

/// Every file that is tracked, or new and not ignored, and still there.
fn tracked(context: &Context) -> Result<Vec<String>> {
    let listed = context
        .job("git")
        .args(&["ls-files", "-co", "--exclude-standard", "-z"])
        .deadline(Duration::from_secs(60))
        .output()?;
    let files: Vec<String> = listed
        .split('\0')
        .filter(|path| !path.is_empty() && context.root.join(path).is_file())
        .map(str::to_owned)
        .collect();
    if files.is_empty() { Err(Stop::failed("git lists no files")) } else { Ok(files) }
}

fn check_file(file: &Path, path: &str) -> Vec<Finding> {
    let size = file.metadata().map_or(0, |metadata| metadata.len());
    if size > LARGEST {
        return vec![Finding::new(0, format!("{size} bytes, at most {LARGEST} belong into the repository"))];
    }
    match std::fs::read(file).map(String::from_utf8) {
        Err(error) => vec![Finding::new(0, format!("cannot be read: {error}"))],
        // Not a text: nothing but its size is checked.
        Ok(Err(_)) => Vec::new(),
        Ok(Ok(text)) if text.contains('\0') => Vec::new(),
        Ok(Ok(text)) => CHECKS.iter().flat_map(|check| check(path, &text)).collect(),
    }
}

/// Runs a check over `(path, text, how many errors)`.
#[cfg(test)]
fn expect(check: Check, cases: &[(&str, &str, usize)]) {
    for (path, text, wanted) in cases {
        let found = check(path, text);
        let errors = found.iter().filter(|finding| !finding.warning).count();
        assert_eq!(errors, *wanted, "{path}: {text:?}: {found:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_and_binary_files() {
        let folder = std::env::temp_dir();
        let large = folder.join(format!("xtask-tidy-large-{}", std::process::id()));
        std::fs::write(&large, vec![b'\n'; 1_500_001]).unwrap();
        assert_eq!(check_file(&large, "large").len(), 1);
        std::fs::write(&large, b"\0 \n").unwrap();
        assert!(check_file(&large, "binary").is_empty());
        std::fs::write(&large, b"text \n").unwrap();
        assert_eq!(check_file(&large, "text").len(), 1);
        std::fs::remove_file(&large).unwrap();
    }
}
