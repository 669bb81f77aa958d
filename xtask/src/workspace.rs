//! Where the workspace is and what cargo knows about it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::run::Job;
use crate::stop::{Result, Stop};

/// The crate that leaves import.
pub(crate) const CORE: &str = "towline-core";
/// The crates that import core and never each other.
pub(crate) const LEAVES: [&str; 4] =
    ["towline-codec", "towline-storage", "towline-deploy", "towline-trainer-client"];
/// The crate that composes them; it holds the binary `towline`.
pub(crate) const COOKBOOK: &str = "towline-cookbook";
/// This crate.
pub(crate) const XTASK: &str = "xtask";

/// The crates that are published: core and the leaves.
pub(crate) fn published() -> impl Iterator<Item = &'static str> {
    std::iter::once(CORE).chain(LEAVES)
}

/// How long a cold build may take.
const BUILD: Duration = Duration::from_secs(40 * 60);

/// What every command needs to know.
#[derive(Debug)]
pub(crate) struct Context {
    /// The root of the workspace.
    pub(crate) root: PathBuf,
    /// Standard output carries JSON alone; all else goes to standard error.
    pub(crate) json: bool,
    /// Set while `ci` runs: builds then take the features of the whole workspace, so that its steps share them.
    pub(crate) whole: bool,
}

impl Context {
    /// Finds the workspace from the place of this crate, or from the working directory where that has moved.
    pub(crate) fn load(json: bool) -> Result<Self> {
        let home = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root =
            home.parent().map(Path::to_owned).filter(|root| root.join("Cargo.toml").is_file()).ok_or_else(
                || Stop::failed("the workspace was not found (help: run `cargo xtask` inside it)"),
            )?;
        Ok(Self { root, json, whole: false })
    }

    /// A line for people.
    pub(crate) fn say(&self, text: impl AsRef<str>) {
        if self.json {
            eprintln!("{}", text.as_ref());
        } else {
            println!("{}", text.as_ref());
        }
    }

    /// The result for machines; nothing without `--json`, and nothing from a step of `ci`, which prints its own.
    pub(crate) fn emit(&self, value: &Value) {
        if self.json && !self.whole {
            println!("{value}");
        }
    }

    /// `cargo` with these arguments, in the root of the workspace.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Job {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let job = self.job(program).args(arguments);
        let set = |name: &str| std::env::var_os(name).is_some();
        // A machine that builds once gains nothing from incremental state, and pays for it in time and disk.
        if self.whole && set("CI") && !set("CARGO_INCREMENTAL") {
            job.env("CARGO_INCREMENTAL", "0")
        } else {
            job
        }
    }

    /// A program, in the root of the workspace.
    pub(crate) fn job(&self, program: impl Into<std::ffi::OsString>) -> Job {
        Job::new(program).current_dir(&self.root).stdout_to_stderr(self.json)
    }

    /// `cargo metadata`; without dependencies of others where `all` is false.
    pub(crate) fn metadata(&self, all: bool) -> Result<Value> {
        let mut job = self.cargo(&["metadata", "--format-version", "1"]);
        if !all {
            job = job.args(&["--no-deps"]);
        }
        let text = job.deadline(Duration::from_secs(300)).output()?;
        serde_json::from_str(&text)
            .map_err(|error| Stop::failed(format!("`cargo metadata` printed no JSON: {error}")))
    }

    /// The target directory.
    pub(crate) fn target(&self) -> Result<PathBuf> {
        self.metadata(false)?
            .get("target_directory")
            .and_then(Value::as_str)
            .map(PathBuf::from)
            .ok_or_else(|| Stop::failed("`cargo metadata` names no target directory"))
    }

    /// Builds the `towline` binary and returns its path.
    pub(crate) fn towline(&self, release: bool) -> Result<PathBuf> {
        let mut arguments = vec!["build"];
        if self.whole {
            arguments.extend(["--workspace", "--bins", "--examples"]);
        } else {
            arguments.extend(["-p", COOKBOOK, "--bin", "towline"]);
        }
        if release {
            arguments.push("--release");
        }
        self.cargo(&arguments).deadline(BUILD).run()?;
        let profile = if release { "release" } else { "debug" };
        let name = format!("towline{}", std::env::consts::EXE_SUFFIX);
        Ok(self.target()?.join(profile).join(name))
    }

    /// Builds the example `name` of the crate `package`, with `features` or more, and returns its path.
    pub(crate) fn example(
        &self,
        package: &str,
        name: &str,
        features: &str,
        release: bool,
    ) -> Result<PathBuf> {
        self.say(format!("building the example {name}"));
        if self.whole && !release {
            // All examples at once, with the features of the whole workspace.
            self.towline(false)?;
        } else {
            let mut arguments = vec!["build", "-p", package, "--example", name, "--features", features];
            if release {
                arguments.push("--release");
            }
            self.cargo(&arguments).deadline(BUILD).run()?;
        }
        let profile = if release { "release" } else { "debug" };
        let file = format!("{profile}/examples/{name}{}", std::env::consts::EXE_SUFFIX);
        Ok(self.target()?.join(file))
    }
}

/// The strings of an array in JSON.
pub(crate) fn strings(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}
