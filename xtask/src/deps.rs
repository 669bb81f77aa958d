//! `deps`: the star of crates stays a star, and ARCHITECTURE.md says how many dependencies each crate costs.

mod counts;
mod rules;

use serde_json::json;

use crate::args::Args;
use crate::stop::{Result, Stop};
use crate::table::Table;
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Checks the dependency graph: no leaf depends on a leaf, core on none of ours nor on I/O, xtask on none of ours, no
ready-made models; every package of the card is used. Then compares the dependency counts with the table in
ARCHITECTURE.md, between `<!-- deps:begin -->` and `<!-- deps:end -->`.

Usage: cargo xtask deps [--write] [--json]

  --write  refresh the table

Example: cargo xtask deps --write";

/// Packages that the project is meant to be built with.
const CARD: [&str; 8] =
    ["async-trait", "tokio", "object_store", "serde", "reqwest", "zstd", "lz4_flex", "proptest"];

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let write = args.flag("--write");
    args.finish()?;
    run(context, write)
}

/// Checks all; `write` refreshes the table instead of comparing it.
pub(crate) fn run(context: &Context, write: bool) -> Result<()> {
    let graph = rules::Graph::load(context)?;
    let mut problems = graph.broken_rules();

    let mut places = Table::new(&["package", "used by"]);
    let mut card = Vec::new();
    for package in CARD {
        let users = graph.users(package);
        if users.is_empty() {
            problems.push(format!("no crate depends on `{package}`"));
        }
        card.push(json!({"package": package, "used_by": users}));
        places.row(vec![package.to_owned(), users.join(", ")]);
    }
    context.say(places.markdown());

    let counts = counts::Counts::measure(context, &graph.names())?;
    context.say(counts.table().markdown());
    if let Err(stop) = counts.check(&context.root.join("ARCHITECTURE.md"), write) {
        problems.push(stop.to_string());
    }

    context.emit(&json!({"card": card, "counts": counts.json(), "problems": problems}));
    match problems.as_slice() {
        [] => Ok(()),
        [only] => Err(Stop::failed(only.as_str())),
        [.., last] => {
            problems.iter().for_each(|problem| context.say(format!("deps: {problem}")));
            Err(Stop::failed(format!("{} problems, of which the last is: {last}", problems.len())))
        }
    }
}
