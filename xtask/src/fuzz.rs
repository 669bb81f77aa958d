//! `fuzz`: runs the in-process fuzzer of `codec/fuzz`, a workspace of its own that builds on stable Rust.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::args::Args;
use crate::stop::{Result, Stop};
use crate::table::Table;
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Builds codec/fuzz in release and runs each of its targets for some seconds, from a fixed seed.

Usage: cargo xtask fuzz [TARGET] [--seconds N] [--seed S] [--json]

  TARGET       one target; all of them by default
  --seconds N  how long each runs; 10 by default
  --seed S     where the mutations start; 1 by default

Example: cargo xtask fuzz arc_v3 --seconds 60";

const MANIFEST: &str = "codec/fuzz/Cargo.toml";

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let seconds = args.number("--seconds")?.unwrap_or(10);
    let seed = args.number("--seed")?.unwrap_or(1).to_string();
    let only = args.positional();
    args.finish()?;

    if !context.root.join(MANIFEST).is_file() {
        return Err(Stop::failed(format!("`{MANIFEST}` is missing: there are no fuzz targets to run")));
    }
    let target = context.target()?.join("fuzz");
    context
        .cargo(&["build", "--release", "--manifest-path", MANIFEST, "--target-dir"])
        .args(&[&target])
        .run()?;
    let fuzzer = target.join("release").join(format!("towline-fuzz{}", std::env::consts::EXE_SUFFIX));
    let listed = context.job(&fuzzer).args(&["--list"]).deadline(Duration::from_secs(60)).output()?;
    let targets = chosen(&listed, only.as_deref())?;

    let mut table = Table::new(&["target", "executions", "seconds", "result"]);
    let mut rows = Vec::new();
    let mut failed = 0;
    for name in targets {
        context.say(format!("fuzz {name} for {seconds} s"));
        let started = Instant::now();
        let outcome = context
            .job(&fuzzer)
            .args(&["--target", name, "--seconds", &seconds.to_string(), "--seed", &seed])
            .deadline(Duration::from_secs(seconds + 120))
            .output();
        let spent = started.elapsed().as_secs_f64();
        let (count, result) = match outcome {
            Ok(text) => {
                context.say(text.trim_end());
                match executions(&text) {
                    Some(0) => (Some(0), "failed: it executed nothing".to_owned()),
                    Some(count) => (Some(count), "ok".to_owned()),
                    None => (None, "failed: it does not say how many executions it made".to_owned()),
                }
            }
            Err(stop) => (None, format!("failed: {stop}")),
        };
        failed += usize::from(result != "ok");
        let shown = count.map_or_else(|| "?".to_owned(), |count| count.to_string());
        table.row(vec![name.to_owned(), shown, format!("{spent:.1}"), result.clone()]);
        rows.push(json!({"target": name, "executions": count, "seconds": spent, "result": result}));
    }
    context.say(format!("\n{}", table.markdown()));
    context.emit(&json!({"targets": rows, "failed": failed}));
    if failed == 0 { Ok(()) } else { Err(Stop::failed(format!("{failed} fuzz targets failed"))) }
}

/// The targets to run: one a line in the list, the one that was asked for alone if there is one.
fn chosen<'a>(listed: &'a str, only: Option<&str>) -> Result<Vec<&'a str>> {
    let all: Vec<&str> = listed.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let chosen: Vec<&str> =
        all.iter().copied().filter(|name| only.is_none_or(|wanted| *name == wanted)).collect();
    if chosen.is_empty() {
        let wanted = only.unwrap_or("any target");
        return Err(Stop::failed(format!(
            "no fuzz target is `{wanted}` (help: choose of {})",
            all.join(", ")
        )));
    }
    Ok(chosen)
}

/// How many executions the fuzzer reports: `{"executions": 5}`, `executions: 5` or `5 executions`, in its last lines.
fn executions(text: &str) -> Option<u64> {
    text.lines().rev().find_map(|line| {
        if let Ok(value) = serde_json::from_str::<Value>(line)
            && let Some(count) = value["executions"].as_u64()
        {
            return Some(count);
        }
        let words: Vec<&str> = line
            .split(|sign: char| !sign.is_alphanumeric() && sign != '_')
            .filter(|word| !word.is_empty())
            .collect();
        let at = words.iter().position(|word| *word == "executions")?;
        let near = |index: Option<usize>| words.get(index?)?.replace('_', "").parse().ok();
        near(at.checked_sub(1)).or_else(|| near(Some(at + 1)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_found_in_each_form() {
        assert_eq!(executions("start\narc_v1: 1_200 executions, 10.0 s\n"), Some(1200));
        assert_eq!(executions("target=arc executions=7 seconds=1"), Some(7));
        assert_eq!(executions(r#"{"target":"a","executions":9}"#), Some(9));
        assert_eq!(executions("nothing"), None);
    }

    #[test]
    fn a_target_is_chosen_by_its_name() {
        assert_eq!(chosen("a\nb\n", None).unwrap(), ["a", "b"]);
        assert_eq!(chosen("a\nb\n", Some("b")).unwrap(), ["b"]);
        assert!(chosen("a\nb\n", Some("c")).is_err());
        assert!(chosen("", None).is_err());
    }
}
