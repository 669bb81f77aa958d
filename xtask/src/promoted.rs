//! `promoted`: a model of the registry in the packages that people load models with.

use std::time::Duration;

use serde_json::Value;

use crate::args::Args;
use crate::python::Python;
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Trains and promotes a small model, serves it, and loads its directory with the Python packages safetensors and
transformers: every tensor must be there, and the log-probs must be those of the server. Makes .venv-interop, which
brings torch (some 5 GB); exits with 3 where it cannot.

Usage: cargo xtask promoted [--json]";

const TRANSFORMERS: &str = "transformers==5.23.0";

pub(crate) fn command(context: &Context, args: Args) -> Result<()> {
    args.finish()?;
    let python = Python::prepare(context, false)?;
    python.add(context, TRANSFORMERS)?;
    let towline = context.towline(false)?;
    let folder = context.target()?.join(format!("promoted-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(file_error("create", &folder))?;
    let job = python.script(context, "promoted_model.py").args(&[&towline, &folder]);
    let said = job.deadline(Duration::from_secs(600)).output();
    let _kept = std::fs::remove_dir_all(&folder);
    let said = said?;
    let found: Value = serde_json::from_str(said.trim())
        .map_err(|error| Stop::failed(format!("the script said `{said}`: {error}")))?;
    let number = |key: &str| found.get(key).and_then(Value::as_f64).unwrap_or(f64::INFINITY);
    context.say(format!("{found:#}"));
    context.emit(&found);
    if number("logprob_gap") <= number("allowed").min(1e-5) {
        return Ok(());
    }
    Err(Stop::failed("the log-probs of transformers are not those of the server"))
}
