//! `features`: every published crate builds with no features, by default, with each feature alone and with all.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::args::Args;
use crate::stop::{Result, Stop};
use crate::table::Table;
use crate::workspace::{Context, published, strings};

pub(crate) const HELP: &str = "\
Checks every published crate with no features, with the default ones, with each feature alone and with all.
Sets that turn out equal are checked once.

Usage: cargo xtask features [--json]

Example: cargo xtask features";

/// The features of a crate and what each switches on.
type Features = BTreeMap<String, Vec<String>>;

pub(crate) fn command(context: &Context, args: Args) -> Result<()> {
    args.finish()?;
    run(context)
}

/// Checks all sets; goes on after a failure and fails at the end.
pub(crate) fn run(context: &Context) -> Result<()> {
    let metadata = context.metadata(false)?;
    let mut table = Table::new(&["crate", "features", "result"]);
    let mut rows = Vec::new();
    let mut failed = 0;
    for name in published() {
        for (label, flags) in sets(&features_of(&metadata, name)?) {
            let mut arguments = vec!["check", "--quiet", "-p", name];
            arguments.extend(flags.iter().map(String::as_str));
            context.say(format!("cargo {}", arguments.join(" ")));
            let result = match context.cargo(&arguments).run() {
                Ok(()) => "ok".to_owned(),
                Err(stop) => {
                    failed += 1;
                    format!("failed: {stop}")
                }
            };
            rows.push(json!({"crate": name, "features": label, "result": result}));
            table.row(vec![name.to_owned(), label, result]);
        }
    }
    context.say(format!("\n{}", table.markdown()));
    context.emit(&json!({"checks": rows, "failed": failed}));
    if failed == 0 { Ok(()) } else { Err(Stop::failed(format!("{failed} sets of features do not build"))) }
}

fn features_of(metadata: &Value, name: &str) -> Result<Features> {
    metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == name)
        .and_then(|package| package["features"].as_object())
        .map(|features| {
            features
                .iter()
                .map(|(feature, on)| (feature.clone(), strings(on).map(str::to_owned).collect()))
                .collect()
        })
        .ok_or_else(|| Stop::failed(format!("the workspace has no crate `{name}`")))
}

/// The different sets to check: how each is called and its flags for cargo.
fn sets(features: &Features) -> Vec<(String, Vec<String>)> {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut wanted = vec![
        ("none".to_owned(), words("--no-default-features"), BTreeSet::new()),
        ("default".to_owned(), Vec::new(), closure(features, &["default"])),
    ];
    for feature in features.keys().filter(|feature| *feature != "default") {
        let flags = words(&format!("--no-default-features --features {feature}"));
        wanted.push((feature.clone(), flags, closure(features, &[feature])));
    }
    let all: Vec<&str> = features.keys().map(String::as_str).collect();
    wanted.push(("all".to_owned(), words("--all-features"), closure(features, &all)));

    let mut found: Vec<(String, Vec<String>, BTreeSet<String>)> = Vec::new();
    for (label, flags, set) in wanted {
        match found.iter_mut().find(|(.., seen)| *seen == set) {
            Some((known, ..)) => {
                known.push_str(" = ");
                known.push_str(&label);
            }
            None => found.push((label, flags, set)),
        }
    }
    found.into_iter().map(|(label, flags, _)| (label, flags)).collect()
}

/// The features that these switch on, themselves included; `default` itself switches nothing.
fn closure(features: &Features, start: &[&str]) -> BTreeSet<String> {
    let mut open: Vec<String> = start.iter().map(|feature| (*feature).to_owned()).collect();
    let mut found = BTreeSet::new();
    while let Some(feature) = open.pop() {
        if found.insert(feature.clone()) {
            open.extend(features.get(&feature).into_iter().flatten().cloned());
        }
    }
    found.remove("default");
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(table: &[(&str, &[&str])]) -> Features {
        table
            .iter()
            .map(|(name, on)| ((*name).to_owned(), on.iter().map(|feature| (*feature).to_owned()).collect()))
            .collect()
    }

    #[test]
    fn equal_sets_are_checked_once() {
        let labels = |table: &[(&str, &[&str])]| -> Vec<String> {
            sets(&features(table)).into_iter().map(|(label, _)| label).collect()
        };
        assert_eq!(labels(&[]), ["none = default = all"]);
        assert_eq!(labels(&[("testing", &["dep:tokio"])]), ["none = default", "testing = all"]);
        assert_eq!(
            labels(&[("default", &["lz4", "zstd"]), ("lz4", &[]), ("zstd", &[])]),
            ["none", "default = all", "lz4", "zstd"]
        );
    }
}
