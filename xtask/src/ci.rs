//! `ci`: every check of the project, in order. It goes on after a failure, so that one run shows all of them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::args::Args;
use crate::stop::{Result, Stop, file_error};
use crate::table::Table;
use crate::workspace::{COOKBOOK, Context};
use crate::{deps, disks, features, golden, interop, real_stores, tidy};

pub(crate) const HELP: &str = "\
Runs every check, goes on after a failure, prints a table at the end and exits with 1 if a step failed. It needs Rust
and cargo alone: cargo-nextest is used when present; interop and real-stores are skipped where Python or the network is
missing, and disks where no user may mount a disk in memory.

Usage: cargo xtask ci [--only STEP,…] [--skip STEP,…] [--list] [--json]

Example: cargo xtask ci --only fmt,clippy,test";

/// A step: its name, what it checks, and the check, which says something beside \"ok\" if it wants to.
struct Step {
    name: &'static str,
    about: &'static str,
    run: fn(&Context) -> Result<String>,
}

const STEPS: &[Step] = &[
    Step { name: "fmt", about: "rustfmt changes nothing", run: fmt },
    Step { name: "tidy", about: "our own checks", run: |context| tidy::run(context).map(|()| String::new()) },
    Step {
        name: "deps",
        about: "the rules of the dependency graph",
        run: |context| deps::run(context, false).map(|()| String::new()),
    },
    Step { name: "clippy", about: "lints of libraries and binaries", run: clippy },
    Step { name: "clippy-tests", about: "lints of tests and examples", run: clippy_tests },
    Step {
        name: "features",
        about: "each published crate with each set of features",
        run: |context| features::run(context).map(|()| String::new()),
    },
    Step { name: "test", about: "unit and integration tests", run: test },
    Step { name: "doctest", about: "examples in the documentation", run: doctest },
    Step {
        name: "golden",
        about: "the frozen formats",
        run: |context| golden::run(context, false).map(|()| String::new()),
    },
    Step { name: "docs", about: "the documentation builds without a warning", run: docs },
    Step { name: "outside", about: "a crate of a third party passes the kits", run: outside },
    Step { name: "examples", about: "every example of the cookbook runs", run: examples },
    Step { name: "quickstart", about: "the main job runs and checks itself", run: quickstart },
    Step { name: "interop", about: "deltas are exchanged with the public Python package", run: python },
    Step { name: "disks", about: "a full disk and a read-only one lose nothing", run: disks::run },
    Step {
        name: "real-stores",
        about: "the laws of stores on servers that real programs are",
        run: |context| real_stores::run(context, &real_stores::Wanted::short()),
    },
];

/// What tests and examples may do although the lints of the workspace warn of it.
const ALLOWED_IN_TESTS: [&str; 15] = [
    "clippy::unwrap_used",
    "clippy::expect_used",
    "clippy::panic",
    "clippy::print_stdout",
    "clippy::print_stderr",
    "clippy::cast_possible_truncation",
    "clippy::missing_panics_doc",
    "clippy::missing_errors_doc",
    "clippy::needless_pass_by_value",
    "clippy::wildcard_enum_match_arm",
    "clippy::clone_on_ref_ptr",
    "clippy::large_futures",
    "clippy::future_not_send",
    "unreachable_pub",
    "missing_docs",
];

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let list = args.flag("--list");
    let (only, skip) = (args.list("--only")?, args.list("--skip")?);
    args.finish()?;
    if let Some(unknown) =
        only.iter().chain(&skip).find(|name| STEPS.iter().all(|step| step.name != name.as_str()))
    {
        return Err(Stop::Usage(format!("no step `{unknown}` (see `cargo xtask ci --list`)")));
    }
    let chosen: Vec<&Step> = STEPS
        .iter()
        .filter(|step| only.is_empty() || only.iter().any(|name| name == step.name))
        .filter(|step| !skip.iter().any(|name| name == step.name))
        .collect();
    if list {
        for step in &chosen {
            context.say(format!("{:<13} {}", step.name, step.about));
        }
        context.emit(&json!(chosen.iter().map(|step| step.name).collect::<Vec<_>>()));
        return Ok(());
    }
    let whole = Context { root: context.root.clone(), json: context.json, whole: true };
    let done: Vec<Done> = chosen
        .iter()
        .enumerate()
        .map(|(index, step)| {
            context.say(format!("\n==> {} ({}/{}): {}", step.name, index + 1, chosen.len(), step.about));
            let started = Instant::now();
            let result = (step.run)(&whole);
            let done = Done { name: step.name, result, seconds: started.elapsed().as_secs_f64() };
            context.say(format!("<== {} {} ({:.1} s)", done.name, done.shown(), done.seconds));
            done
        })
        .collect();
    summary(context, &done)
}

/// A step that has run.
#[derive(Debug)]
struct Done {
    name: &'static str,
    result: Result<String>,
    seconds: f64,
}

impl Done {
    fn shown(&self) -> String {
        match &self.result {
            Ok(detail) if detail.is_empty() => "ok".to_owned(),
            Ok(detail) => format!("ok: {detail}"),
            Err(Stop::Skipped(why)) => format!("skipped: {why}"),
            Err(stop) => format!("FAILED: {stop}"),
        }
    }
}

fn summary(context: &Context, done: &[Done]) -> Result<()> {
    let mut table = Table::new(&["step", "result", "seconds"]);
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for step in done {
        match &step.result {
            Ok(_) => passed += 1,
            Err(Stop::Skipped(_)) => skipped += 1,
            Err(_) => failed += 1,
        }
        table.row(vec![
            step.name.to_owned(),
            step.shown().replace('\n', " "),
            format!("{:.1}", step.seconds),
        ]);
    }
    let seconds: f64 = done.iter().map(|step| step.seconds).sum();
    table.row(vec!["all".to_owned(), String::new(), format!("{seconds:.1}")]);
    let steps: Vec<_> = done
        .iter()
        .map(|step| json!({"step": step.name, "result": step.shown(), "seconds": step.seconds}))
        .collect();
    context.say(format!("\n{}", table.markdown()));
    context.emit(&json!({"steps": steps, "passed": passed, "failed": failed, "skipped": skipped}));
    context.say(format!("{passed} passed, {failed} failed, {skipped} skipped"));
    if failed == 0 { Ok(()) } else { Err(Stop::Told) }
}

fn fmt(context: &Context) -> Result<String> {
    context.cargo(&["fmt", "--all", "--check"]).run().map(|()| String::new())
}

fn clippy(context: &Context) -> Result<String> {
    let arguments = ["clippy", "--workspace", "--lib", "--bins", "--", "-D", "warnings"];
    context.cargo(&arguments).run().map(|()| String::new())
}

fn clippy_tests(context: &Context) -> Result<String> {
    let mut arguments = vec!["clippy", "--workspace", "--tests", "--examples", "--", "-D", "warnings"];
    arguments.extend(ALLOWED_IN_TESTS.iter().flat_map(|lint| ["-A", lint]));
    context.cargo(&arguments).run().map(|()| String::new())
}

fn test(context: &Context) -> Result<String> {
    if context.cargo(&["nextest", "--version"]).succeeds() {
        context
            .cargo(&["nextest", "run", "--workspace", "--no-fail-fast"])
            .run()
            .map(|()| "nextest".to_owned())
    } else {
        let arguments = ["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"];
        context.cargo(&arguments).run().map(|()| "cargo test".to_owned())
    }
}

fn doctest(context: &Context) -> Result<String> {
    context.cargo(&["test", "--doc", "--workspace"]).run().map(|()| String::new())
}

fn docs(context: &Context) -> Result<String> {
    let arguments = ["doc", "--workspace", "--no-deps"];
    context.cargo(&arguments).env("RUSTDOCFLAGS", "-D warnings").run().map(|()| String::new())
}

fn outside(context: &Context) -> Result<String> {
    const MANIFEST: &str = "xtask/outside/Cargo.toml";
    if !context.root.join(MANIFEST).is_file() {
        return Err(Stop::failed(format!("`{MANIFEST}` is missing: no crate of a third party to build")));
    }
    let target = context.target()?.join("outside");
    context
        .cargo(&["test", "--manifest-path", MANIFEST, "--target-dir"])
        .args(&[&target])
        .run()
        .map(|()| String::new())
}

fn examples(context: &Context) -> Result<String> {
    let names = example_names(context)?;
    if names.is_empty() {
        return Err(Stop::failed("`cookbook/examples` holds no example"));
    }
    context.towline(false)?;
    let folder = context.target()?.join("debug/examples");
    let mut failures = Vec::new();
    for name in &names {
        context.say(format!("--> example {name}"));
        let started = Instant::now();
        let program = folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
        match context.job(program).deadline(Duration::from_secs(180)).run() {
            Ok(()) => context.say(format!("<-- example {name}: {:.1} s", started.elapsed().as_secs_f64())),
            Err(stop) => failures.push(stop.context(name).to_string()),
        }
    }
    if failures.is_empty() {
        Ok(format!("{} of {COOKBOOK}", names.len()))
    } else {
        Err(Stop::failed(failures.join("; ")))
    }
}

/// Examples that need what no fresh clone has; `cargo xtask corpus` runs this one on a model that it loads.
const NOT_RUN: [&str; 1] = ["corpus"];

/// The examples that run: `NAME.rs` and `NAME/main.rs`, in the order of their names.
fn example_names(context: &Context) -> Result<Vec<String>> {
    let folder = context.root.join("cookbook/examples");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(file_error("list", &folder))? {
        let path = entry.map_err(file_error("list", &folder))?.path();
        let is_example =
            path.extension().is_some_and(|ending| ending == "rs") || path.join("main.rs").is_file();
        if let (true, Some(name)) = (is_example, path.file_stem()) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.retain(|name| !NOT_RUN.contains(&name.as_str()));
    names.sort();
    Ok(names)
}

fn quickstart(context: &Context) -> Result<String> {
    let towline = context.towline(false)?;
    let folder: PathBuf = context.target()?.join(format!("xtask/quickstart-{}", std::process::id()));
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent).map_err(file_error("create", parent))?;
    }
    let printed = context
        .job(towline)
        .args(&["quickstart", "--json", "--dir"])
        .args(&[&folder])
        .deadline(Duration::from_secs(300))
        .output()
        .map_err(|stop| stop.context(&format!("its files are in `{}`", folder.display())))?;
    serde_json::from_str::<serde_json::Value>(&printed)
        .map_err(|error| Stop::failed(format!("`--json` must print JSON alone: {error}")))?;
    context.say(printed.trim_end());
    // It may have been given files elsewhere; nothing to clear is no failure.
    let _absent = std::fs::remove_dir_all(&folder);
    Ok(String::new())
}

/// On the stand-in for torch: the real one would add 2 minutes and 5 GB to every fresh clone.
fn python(context: &Context) -> Result<String> {
    interop::run(context, true, &context.root.join("codec/tests/golden"), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_a_skip_is_no_ok() {
        let names: std::collections::BTreeSet<_> = STEPS.iter().map(|step| step.name).collect();
        assert_eq!(names.len(), STEPS.len());
        let done = |result| Done { name: "x", result, seconds: 0.0 };
        assert_eq!(done(Ok(String::new())).shown(), "ok");
        assert_eq!(done(Err(Stop::Skipped("no python3".into()))).shown(), "skipped: no python3");
        assert!(done(Err(Stop::failed("x"))).shown().starts_with("FAILED"));
    }

    #[test]
    fn a_failed_step_fails_the_run() {
        let context = Context { root: PathBuf::new(), json: false, whole: false };
        let done = |result| Done { name: "x", result, seconds: 0.0 };
        assert!(
            summary(&context, &[done(Ok(String::new())), done(Err(Stop::Skipped("why".into())))]).is_ok()
        );
        assert!(summary(&context, &[done(Ok(String::new())), done(Err(Stop::failed("x")))]).is_err());
    }
}
