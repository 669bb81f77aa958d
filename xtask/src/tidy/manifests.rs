//! Checks of manifests and of what a crate must bring.

use std::collections::BTreeSet;
use std::path::Path;

use super::Finding;

/// Workspaces of their own: they stand for users, so they name versions and paths themselves.
const OUTSIDE: [&str; 3] = ["codec/fuzz/", "xtask/outside/", "xtask/peers/"];

/// Every dependency of a member takes its version from the workspace; only the crate itself may be a path.
pub(super) fn workspace_versions(path: &str, text: &str) -> Vec<Finding> {
    if !path.ends_with("/Cargo.toml") || OUTSIDE.iter().any(|folder| path.starts_with(folder)) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let mut section = Section::Other;
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or("").trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section.end(&mut findings);
            section = Section::named(name, index + 1);
            continue;
        }
        match &mut section {
            Section::Other => {}
            Section::One { inherited, .. } => *inherited |= line.replace(' ', "") == "workspace=true",
            Section::Many => {
                let Some((name, value)) = line.split_once('=') else { continue };
                let inherited =
                    name.trim().ends_with(".workspace") || value.replace(' ', "").contains("workspace=true");
                let itself = value.replace(' ', "").contains("path=\".\"");
                if !inherited && !itself {
                    findings.push(Finding::new(
                        index + 1,
                        format!("`{}` must say `workspace = true`", name.trim()),
                    ));
                }
            }
        }
    }
    section.end(&mut findings);
    findings
}

/// What the lines under a header are.
enum Section {
    /// One dependency a line.
    Many,
    /// The keys of one dependency.
    One { name: String, line: usize, inherited: bool },
    /// No dependencies.
    Other,
}

impl Section {
    fn named(header: &str, line: usize) -> Self {
        let dependencies = ["dependencies", "dev-dependencies", "build-dependencies"];
        let mut words = header.rsplit('.');
        let last = words.next().unwrap_or("");
        if dependencies.contains(&last) {
            Self::Many
        } else if words.next().is_some_and(|word| dependencies.contains(&word)) {
            Self::One { name: last.to_owned(), line, inherited: false }
        } else {
            Self::Other
        }
    }

    fn end(&self, findings: &mut Vec<Finding>) {
        if let Self::One { name, line, inherited: false } = self {
            findings.push(Finding::new(*line, format!("`{name}` must say `workspace = true`")));
        }
    }
}

/// Every crate says what it is: a README beside its manifest, or a doc comment at the top of its root.
pub(super) fn crate_docs(root: &Path, files: &[String]) -> Vec<(String, Finding)> {
    let all: BTreeSet<&str> = files.iter().map(String::as_str).collect();
    let mut findings = Vec::new();
    for manifest in files.iter().filter(|path| path.ends_with("/Cargo.toml")) {
        let folder = manifest.trim_end_matches("Cargo.toml");
        let roots = ["src/lib.rs", "src/main.rs"].map(|file| format!("{folder}{file}"));
        let documented = all.contains(format!("{folder}README.md").as_str())
            || roots.iter().filter(|path| all.contains(path.as_str())).any(|path| has_doc(&root.join(path)));
        if !documented {
            let message = "the crate has neither a README nor a doc comment at the top of its root";
            findings.push((manifest.clone(), Finding::new(0, message)));
        }
    }
    findings
}

fn has_doc(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.starts_with("//!") || text.starts_with("#![doc"))
}

#[cfg(test)]
mod tests {
    use super::super::expect;
    use super::*;

    #[test]
    fn versions_come_from_the_workspace() {
        let path = "codec/Cargo.toml";
        expect(
            workspace_versions,
            &[
                (path, "[dependencies]\na.workspace = true\nb = { workspace = true, optional = true }\n", 0),
                (path, "[dependencies]\n# a comment\na = \"1\"\nb = { version = \"1\" }\n", 2),
                (path, "[dev-dependencies]\ntowline-core = { path = \".\", features = [\"testing\"] }\n", 0),
                (path, "[dev-dependencies]\nother = { path = \"../other\" }\n", 1),
                (path, "[dependencies.a]\nversion = \"1\"\n\n[package]\n", 1),
                (path, "[dependencies.a]\nworkspace = true\n", 0),
                (path, "[target.'cfg(unix)'.dependencies]\na = \"1\"\n", 1),
                (path, "[package]\nname = \"x\"\n", 0),
                ("codec/fuzz/Cargo.toml", "[dependencies]\na = \"1\"\n", 0),
                ("Cargo.toml", "[workspace.dependencies]\na = \"1\"\n", 0),
            ],
        );
    }

    #[test]
    fn a_crate_says_what_it_is() {
        let root = std::env::temp_dir().join(format!("xtask-docs-{}", std::process::id()));
        std::fs::create_dir_all(root.join("a/src")).unwrap();
        std::fs::write(root.join("a/src/lib.rs"), "fn x() {}\n").unwrap();
        let files = ["a/Cargo.toml".to_owned(), "a/src/lib.rs".to_owned()];
        assert_eq!(crate_docs(&root, &files).len(), 1);
        std::fs::write(root.join("a/src/lib.rs"), "//! What it is.\n").unwrap();
        assert!(crate_docs(&root, &files).is_empty());
        let with_readme = ["a/Cargo.toml".to_owned(), "a/README.md".to_owned()];
        assert!(crate_docs(&root, &with_readme).is_empty());
        std::fs::remove_dir_all(&root).unwrap();
    }
}
