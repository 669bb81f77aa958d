//! `promoted`: a model of the registry in the packages that people load models with.

use std::time::Duration;

use serde_json::Value;

use crate::args::Args;
use crate::python::Python;
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Trains and promotes a small model and a LoRA adapter, serves them, and loads their directories with the Python packages
safetensors, transformers and peft: every tensor must be there, and the log-probs must be those of the server. Makes
.venv-interop, which brings torch (some 5 GB); exits with 3 where it cannot.

Usage: cargo xtask promoted [--json]";

const PACKAGES: [&str; 2] = ["transformers==5.23.0", "peft==0.21.2"];
/// The largest distance of two log-probs that is no difference: both are sums of 32 bits in another order.
const ALLOWED: f64 = 1e-5;

pub(crate) fn command(context: &Context, args: Args) -> Result<()> {
    args.finish()?;
    let python = Python::prepare(context, false)?;
    for package in PACKAGES {
        python.add(context, package)?;
    }
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
    if number("logprob_gap").max(number("adapter_logprob_gap")) <= ALLOWED {
        return Ok(());
    }
    Err(Stop::failed(format!("the log-probs are not those of the server: at most {ALLOWED:e} is allowed")))
}
