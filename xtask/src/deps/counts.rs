//! How many crates each of ours pulls in, and the table of it in ARCHITECTURE.md.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::stop::{Result, Stop, file_error};
use crate::table::Table;
use crate::workspace::Context;

const BEGIN: &str = "<!-- deps:begin -->";
const END: &str = "<!-- deps:end -->";
/// One platform, so that everybody counts the same.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// The counts of each crate: with default features and with none.
#[derive(Debug)]
pub(super) struct Counts {
    rows: Vec<(String, usize, usize)>,
}

impl Counts {
    /// Asks cargo.
    pub(super) fn measure(context: &Context, names: &[String]) -> Result<Self> {
        let mut rows = Vec::new();
        for name in names {
            let count = |bare| closure(context, name, bare).map(|packages| packages.len());
            rows.push((name.clone(), count(false)?, count(true)?));
        }
        Ok(Self { rows })
    }

    /// The table for people and for ARCHITECTURE.md.
    pub(super) fn table(&self) -> Table {
        let mut table = Table::new(&["crate", "crates behind it, default features", "no features"]);
        for (name, default, bare) in &self.rows {
            table.row(vec![format!("`{name}`"), default.to_string(), bare.to_string()]);
        }
        table
    }

    /// The counts for machines.
    pub(super) fn json(&self) -> Value {
        self.rows
            .iter()
            .map(|(name, default, bare)| json!({"crate": name, "default": default, "none": bare}))
            .collect()
    }

    /// Compares the table in the file with the counts, or writes it.
    pub(super) fn check(&self, path: &Path, write: bool) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(file_error("read", path))?;
        let fresh = refreshed(&text, &self.table().markdown()).ok_or_else(|| {
            Stop::failed(format!(
                "ARCHITECTURE.md has no place for the counts (help: put `{BEGIN}` and `{END}` on lines of their own)"
            ))
        })?;
        if cells(&fresh) == cells(&text) {
            return Ok(());
        }
        if write {
            return std::fs::write(path, fresh).map_err(file_error("write", path));
        }
        Err(Stop::failed("the counts in ARCHITECTURE.md are stale (help: run `cargo xtask deps --write`)"))
    }
}

/// Every package behind a crate, itself not counted, normal dependencies only.
pub(super) fn closure(context: &Context, name: &str, bare: bool) -> Result<BTreeSet<String>> {
    let mut arguments = vec!["tree", "-p", name, "-e", "normal", "--prefix", "none", "--target", PLATFORM];
    if bare {
        arguments.push("--no-default-features");
    }
    let text = context.cargo(&arguments).deadline(Duration::from_secs(300)).output()?;
    Ok(packages(&text).filter(|package| package != name).collect())
}

/// The names of the packages that `cargo tree --prefix none` lists; a package in two versions counts twice.
fn packages(tree: &str) -> impl Iterator<Item = String> {
    let lines: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?))
        })
        .collect();
    let mut seen = BTreeSet::new();
    lines.into_iter().map(
        move |(name, version)| {
            if seen.insert(name) { name.to_owned() } else { format!("{name} {version}") }
        },
    )
}

/// The text with the table between the marks replaced; nothing when a mark is missing.
fn refreshed(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{table}{END}{after}"))
}

/// The cells between the marks, without their white space and rules: an aligned table equals one that is not.
fn cells(text: &str) -> Vec<Vec<&str>> {
    let table =
        text.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END)).map_or("", |(table, _)| table);
    table
        .lines()
        .map(|line| line.split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>())
        .filter(|row| row.iter().any(|cell| cell.chars().any(|sign| sign != '-')))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_counted_once_each() {
        let tree = "a v1.0.0 (proc-macro)\nb v1.0.0\nb v1.0.0 (*)\nb v2.0.0\n\n";
        assert_eq!(packages(tree).collect::<Vec<_>>(), ["a", "b", "b v2.0.0"]);
    }

    #[test]
    fn a_stale_table_is_seen_and_written() {
        let counts = Counts { rows: vec![("core".to_owned(), 20, 20)] };
        let path = std::env::temp_dir().join(format!("xtask-counts-{}.md", std::process::id()));
        std::fs::write(&path, format!("# A\n\n{BEGIN}\n{END}\n\nafter\n")).unwrap();
        assert!(counts.check(&path, false).unwrap_err().to_string().contains("stale"));
        counts.check(&path, true).unwrap();
        counts.check(&path, false).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("\n\nafter\n"));
        let other = Counts { rows: vec![("core".to_owned(), 21, 20)] };
        assert!(other.check(&path, false).is_err());
        std::fs::write(&path, "# no marks\n").unwrap();
        assert!(counts.check(&path, true).unwrap_err().to_string().contains("help:"));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn alignment_does_not_make_a_table_stale() {
        let loose = format!("{BEGIN}\n|a|b|\n|-|-|\n|1|2|\n{END}");
        let aligned = format!("{BEGIN}\n| a   | b   |\n| --- | --- |\n| 1   | 2   |\n{END}");
        assert_eq!(cells(&loose), cells(&aligned));
    }
}
