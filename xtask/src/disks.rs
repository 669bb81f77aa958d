//! `disks`: a store in a folder whose disk is full, or read-only.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::args::Args;
use crate::run::Job;
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Makes a disk of 48 MiB in memory, which only this command sees, and lets the example `disk_faults` save and prune on it
while it is full, and again while it is read-only: each failure must say what it is and what to do, soon, and leave
nothing. Linux alone, without the rights of root; exits with 3 where users may not mount.

Usage: cargo xtask disks [--json]";

/// The disk belongs to a name space of mounts that ends with the shell.
const SCRIPT: &str = "mount -t tmpfs -o size=48m none \"$1\" && \"$2\" full \"$1\" && \
                      mount -o remount,ro \"$1\" && \"$2\" read-only \"$1\"";

pub(crate) fn command(context: &Context, args: Args) -> Result<()> {
    args.finish()?;
    let said = run(context)?;
    context.say(&said);
    context.emit(&json!({"said": said}));
    Ok(())
}

/// Runs it; returns what it found.
pub(crate) fn run(context: &Context) -> Result<String> {
    let folder = context.target()?.join(format!("disks-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(file_error("create", &folder))?;
    let outcome = on_disk(context, &folder);
    // It is empty again once its disk is gone.
    let _kept = std::fs::remove_dir(&folder);
    outcome
}

fn on_disk(context: &Context, folder: &Path) -> Result<String> {
    if !cfg!(target_os = "linux") || !shell(context, "mount -t tmpfs none \"$1\"", folder).succeeds() {
        return Err(Stop::Skipped("a user may not mount a disk in memory here (`unshare`)".to_owned()));
    }
    let program = context.example("towline-storage", "disk_faults", "local", false)?;
    let said = shell(context, SCRIPT, folder).args(&[program]).deadline(Duration::from_secs(300)).output()?;
    Ok(said.trim().replace('\n', "; "))
}

/// A shell that may mount, with `folder` as its first argument.
fn shell(context: &Context, script: &str, folder: &Path) -> Job {
    let job =
        context.job("unshare").args(&["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]);
    job.args(&[folder])
}
