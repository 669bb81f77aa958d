//! Real pairs of checkpoints: trains a pretrained model from a GGUF file and writes its weights before and after a
//! step, in several element types. One call is one trajectory.
//!
//! `cargo xtask corpus` fetches the model, calls this for every trajectory and keeps the list of what there is:
//!
//! cargo run --release -p towline-cookbook --example corpus -- --help

mod casts;
mod rounds;
mod source;
mod words;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use clap::Parser;
use serde_json::{Value, json};
use towline_cookbook::engine::{AdamParams, LocalTrainer, TensorBytes, WeightDtype};

use casts::{Cast, Caster};
use rounds::{Kind, Rounds};
use source::Source;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Trains a model of a GGUF file and writes its weights before and after a step.
///
/// Gradients are the engine's, AdamW keeps 32-bit weights, and every file is a cast of those. Progress goes to standard
/// error, the list of pairs to standard output, as JSON.
#[derive(Debug, Parser)]
#[command(
    after_help = "`cargo xtask corpus` fetches the model and calls this with everything it needs.\n\nExample: corpus --gguf model.gguf --text README.md --out target/corpus --kind rl --rate 1e-06 --save 1:bf16,fp8"
)]
struct Options {
    /// The model: a Llama with the rotary layout and the vocabulary of llama.cpp's conversion
    #[arg(long)]
    gguf: PathBuf,
    /// The folder for the files
    #[arg(long)]
    out: PathBuf,
    /// Text to train on, for supervised steps; may be given several times
    #[arg(long, required = true)]
    text: Vec<PathBuf>,
    /// Policy gradient on sampled answers, or supervised steps on text
    #[arg(long, value_enum)]
    kind: Kind,
    /// The learning rate; file names carry it as it is written here
    #[arg(long)]
    rate: String,
    /// Steps before the first file is written, so that the optimizer's moments are warm
    #[arg(long, default_value_t = 4)]
    warm: u64,
    /// What to write after how many further steps: `STEPS:TYPE,TYPE`, of bf16, f16, f32 and fp8; may be given several times
    #[arg(long, required = true)]
    save: Vec<Save>,
}

/// A point of the trajectory at which files are written.
#[derive(Debug, Clone)]
struct Save {
    steps: u64,
    casts: Vec<Cast>,
}

impl FromStr for Save {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wanted = || format!("`{text}` is no `STEPS:TYPE,TYPE` with at least one step");
        let (steps, casts) = text.split_once(':').ok_or_else(wanted)?;
        let steps = steps.parse().ok().filter(|&steps| steps > 0).ok_or_else(wanted)?;
        Ok(Self { steps, casts: casts.split(',').map(str::parse).collect::<std::result::Result<_, _>>()? })
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let rate: f64 = options.rate.parse().map_err(|_| format!("`{}` is no learning rate", options.rate))?;
    std::fs::create_dir_all(&options.out)?;
    let started = Instant::now();
    let source = Source::read(&options.gguf)?;
    let mut text = String::new();
    for path in &options.text {
        text.push_str(
            &std::fs::read_to_string(path).map_err(|error| format!("`{}`: {error}", path.display()))?,
        );
    }
    std::fs::write(options.out.join("config.json"), source.config.to_json())?;
    let mut rounds = Rounds::new(options.kind, source.words, &text)?;
    let views = source.tensors.iter().map(|entry| TensorBytes::of(entry, WeightDtype::F32));
    let mut trainer = LocalTrainer::from_bytes(&source.config, views)?;
    drop(source.tensors);
    eprintln!(
        "  loaded {} parameters in {:.1} s",
        source.config.parameters(),
        started.elapsed().as_secs_f64()
    );

    let stem = format!("smollm2-{}-lr{}", options.kind.name(), options.rate);
    let last = options.save.iter().map(|save| save.steps).max().unwrap_or(0);
    let params = AdamParams::new(rate).with_grad_clip_norm(1.0);
    let mut bases: Option<Caster> = None;
    let mut pairs = Vec::new();
    for step in 1..=options.warm + last {
        let started = Instant::now();
        let told = rounds.gradients(&mut trainer, step)?;
        let taken = trainer.optim_step(&params)?;
        eprintln!(
            "  {stem}: step {step} of {}, {told}, gradient {:.3}, {:.1} s",
            options.warm + last,
            taken.grad_norm,
            started.elapsed().as_secs_f64()
        );
        if step == options.warm {
            let mut casts: Vec<Cast> = options.save.iter().flat_map(|save| save.casts.clone()).collect();
            casts.sort_unstable();
            casts.dedup();
            bases = Some(Caster::write_bases(&options.out, &stem, &casts, &trainer.params()?)?);
        }
        let steps = step.saturating_sub(options.warm);
        let (Some(bases), Some(save)) = (&bases, options.save.iter().find(|save| save.steps == steps)) else {
            continue;
        };
        let masters = trainer.params()?;
        for &cast in &save.casts {
            let pair = bases.write_next(cast, steps, &masters)?;
            eprintln!("  {}: {:.4} % of the elements changed", pair.name, 100.0 * pair.share());
            pairs.push(json!({
                "name": pair.name, "kind": options.kind.name(), "dtype": cast.name(), "learning_rate": rate,
                "warm_steps": options.warm, "steps": steps, "base": pair.base, "next": pair.next,
                "base_bytes": pair.base_bytes, "bytes": pair.bytes, "elements": pair.elements,
                "changed": pair.changed, "changed_share": pair.share(),
            }));
        }
    }
    println!(
        "{}",
        json!({"pairs": pairs, "peak_mib": peak_mib(), "seconds": started.elapsed().as_secs_f64()})
    );
    Ok(())
}

/// The most memory that this process held, where the system tells.
fn peak_mib() -> Value {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    json!(kib.map(|kib| kib / 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_save_is_parsed() {
        let save: Save = "10:bf16,fp8".parse().unwrap();
        assert_eq!((save.steps, save.casts), (10, vec![Cast::Bf16, Cast::Fp8]));
        for wrong in ["", "1", "0:bf16", "x:bf16", "1:", "1:int8"] {
            assert!(wrong.parse::<Save>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Options::command().debug_assert();
        let error = Options::try_parse_from(["corpus", "--out", "x"]).unwrap_err().to_string();
        assert!(error.contains("--gguf"), "{error}");
    }
}
