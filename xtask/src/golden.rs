//! `golden`: the frozen formats. `--bless` is the only way to change a golden file; the diff is the review.

use serde_json::{Value, json};

use crate::args::Args;
use crate::stop::{Result, Stop};
use crate::workspace::{CORE, Context, strings};

pub(crate) const HELP: &str = "\
Runs the golden tests of towline-core and towline-codec. With --bless they write what they find instead of
comparing; review the diff before you commit it.

Usage: cargo xtask golden [--bless] [--json]

Example: cargo xtask golden --bless && git diff";

const TARGET: &str = "golden";
const CRATES: [&str; 2] = [CORE, "towline-codec"];

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let bless = args.flag("--bless");
    args.finish()?;
    run(context, bless)?;
    context.emit(&json!({"crates": CRATES, "blessed": bless}));
    Ok(())
}

/// Runs them; fails when a crate has lost its golden tests.
pub(crate) fn run(context: &Context, bless: bool) -> Result<()> {
    let metadata = context.metadata(false)?;
    for name in CRATES {
        if !has_target(&metadata, name) {
            return Err(Stop::failed(format!(
                "`{name}` has no test target `{TARGET}` (help: restore its tests/{TARGET}.rs)"
            )));
        }
    }
    let mut arguments = vec!["test"];
    if context.whole {
        arguments.push("--workspace");
    } else {
        arguments.extend(CRATES.iter().flat_map(|name| ["-p", name]));
    }
    arguments.extend(["--test", TARGET]);
    let mut job = context.cargo(&arguments);
    if bless {
        job = job.env("TOWLINE_BLESS", "1");
    }
    job.run()
}

fn has_target(metadata: &Value, name: &str) -> bool {
    metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|package| package["name"] == name)
        .flat_map(|package| package["targets"].as_array().into_iter().flatten())
        .any(|target| target["name"] == TARGET && strings(&target["kind"]).any(|kind| kind == "test"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_target_is_seen() {
        let metadata = json!({"packages": [
            {"name": "a", "targets": [{"name": "golden", "kind": ["test"]}]},
            {"name": "b", "targets": [{"name": "golden", "kind": ["lib"]}]},
        ]});
        assert!(has_target(&metadata, "a"));
        assert!(!has_target(&metadata, "b"));
        assert!(!has_target(&metadata, "c"));
    }
}
