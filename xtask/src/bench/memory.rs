//! `bench memory`: what a codec takes beyond the checkpoints on a made-up model of which half is one tensor.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Program, best, machine, section, threads};
use crate::args::Args;
use crate::stop::{Result, Stop};
use crate::table::Table;
use crate::workspace::Context;

/// MiB that are allowed for each thread.
const ALLOWED: f64 = 64.0;

pub(super) fn command(context: &Context, mut args: Args) -> Result<()> {
    let codec = args.value("--codec")?;
    let threads = threads(&mut args)?;
    let gib = args.value("--gib")?.unwrap_or_else(|| "4".to_owned());
    let (out, check) = (args.value("--out")?.map(PathBuf::from), args.flag("--check"));
    args.finish()?;
    let program = Program::build(context)?;
    let codec = match codec {
        Some(codec) => codec,
        None => best(&program.run(context, &["list"])?)?,
    };
    context.say(format!("measuring {codec} on a model of {gib} GiB"));
    let scratch = program.scratch.as_os_str();
    let words = ["memory", "--codec", &codec, "--threads", &threads, "--gib", &gib, "--scratch"];
    let arguments: Vec<&std::ffi::OsStr> = words.iter().map(AsRef::as_ref).chain([scratch]).collect();
    let measured = program.run(context, &arguments)?;
    let (table, most) = shown(&measured)?;
    let pass = most <= ALLOWED;
    let word = if pass { "PASS" } else { "FAIL" };
    let verdict = format!(
        "{word}: {codec} takes at most {most:.1} MiB a thread beyond the checkpoints ({ALLOWED:.0} allowed)"
    );
    let text = format!(
        "Measured by `cargo xtask bench memory --codec {codec} --gib {gib}` on {}. The model is made up: bf16, half of it \
         one tensor, the rest in tensors of 64 MiB; 1 % of the weights move by one unit in the last place. Memory is the \
         peak of the process above what it held when the checkpoints were loaded.\n\n- {verdict}\n\n{}",
        machine(),
        table.markdown()
    );
    context.say(format!("\n{text}"));
    context.emit(&json!({"machine": machine(), "measured": measured, "pass": pass, "verdict": verdict}));
    if let Some(path) = out {
        section::write(&path, "bench-memory", &text)?;
    }
    if check && !pass { Err(Stop::failed("the verdict is FAIL")) } else { Ok(()) }
}

/// The table, and the most that a thread takes.
fn shown(measured: &Value) -> Result<(Table, f64)> {
    let mut table =
        Table::new(&["direction", "threads", "extra MiB", "MiB a thread", "GB/s", "encoded MB", "model MB"]);
    let mut most = None::<f64>;
    for row in measured["rows"].as_array().into_iter().flatten() {
        let number = |key: &str| {
            row[key].as_f64().ok_or_else(|| {
                Stop::Skipped(format!(
                    "the measuring program does not tell `{key}`: this system may not show memory"
                ))
            })
        };
        let each = number("extra_mib_per_thread")?;
        most = Some(most.map_or(each, |most| most.max(each)));
        table.row(vec![
            row["direction"].as_str().unwrap_or("?").to_owned(),
            row["threads"].to_string(),
            format!("{:.1}", number("extra_mib")?),
            format!("{each:.1}"),
            format!("{:.2}", number("gbps")?),
            format!("{:.1}", number("encoded_bytes")? / 1e6),
            format!("{:.1}", number("raw_bytes")? / 1e6),
        ]);
    }
    most.map(|most| (table, most)).ok_or_else(|| Stop::failed("the measuring program printed no rows"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_direction_counts() {
        let row = |direction: &str, each: Value| {
            json!({"direction": direction, "threads": 2, "gbps": 3.0, "extra_mib": 50.0, "extra_mib_per_thread": each,
                   "encoded_bytes": 5_000_000, "raw_bytes": 1e9})
        };
        let (table, most) =
            shown(&json!({"rows": [row("encode", json!(25.0)), row("decode", json!(70.5))]})).unwrap();
        assert!((most - 70.5).abs() < 1e-9);
        assert!(
            table.markdown().contains(
                "| decode    | 2       | 50.0      | 70.5         | 3.00 | 5.0        | 1000.0   |"
            ),
            "{}",
            table.markdown()
        );
        assert!(matches!(shown(&json!({"rows": [row("encode", Value::Null)]})), Err(Stop::Skipped(_))));
        assert!(shown(&json!({"rows": []})).is_err());
    }
}
