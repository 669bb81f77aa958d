//! Measures Towline's codecs and those of others on the same buffers in the same run: size, speed, memory, and how
//! far each is from the entropy floor, from a bare scan and from a copy; and its store beside other ways to keep a train
//! state. `cargo xtask bench` builds and runs it.
//!
//! Every codec runs in processes of its own, one that encodes and one that decodes, so that memory which one has
//! freed does not hide what the next one takes. It prints JSON.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool: printing is what it does"
)]

mod args;
mod compare;
mod files;
mod floor;
mod measure;
mod memory;
mod ours;
mod peers;
mod physics;
mod store;
mod system;
#[cfg(test)]
mod testing;
mod work;

use std::process::ExitCode;

use serde_json::Value;
use towline_core::{Error, Result};

use crate::args::Args;

const HELP: &str = "\
Measures the codecs of Towline and of others on one pair of checkpoints, or on one base. Prints JSON.

Usage:
  towline-peers codec (--parent A --current B | --base FILE) [--codecs X,Y] [--threads 1,2] [--runs 5] [--scratch DIR]
  towline-peers memory [--codec octave] [--threads 1,2] [--gib 4] [--scratch DIR]
  towline-peers store [--mib 1024] [--runs 5] [--peak-gib 0] [--python FILE --script FILE] [--scratch DIR]
  towline-peers s3 --url s3://BUCKET [--mib 1024] [--shard-mib 256] [--round 0] [--python FILE --script FILE] [--scratch DIR]
  towline-peers next --parent A --delta D --out B      applies a delta in the safetensors form of the arc formats
  towline-peers list                                   the codecs";

fn main() -> ExitCode {
    match run() {
        Ok(value) => {
            println!("{value}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(help) = error.help() {
                eprintln!("help: {help}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Value> {
    let mut args = Args::new(std::env::args().skip(1));
    if args.flag("--help") {
        eprintln!("{HELP}");
        return Ok(Value::Null);
    }
    match args.word().as_deref() {
        Some("codec") => compare::command(args),
        Some("memory") => memory::command(args),
        Some("store") => store::command(args),
        Some("s3") => store::s3(args),
        Some("next") => files::next(args),
        Some("list") => Ok(compare::list()),
        // The processes that `codec`, `memory`, `store` and `s3` start.
        Some("encode-one") => measure::encode(args),
        Some("decode-one") => measure::decode(args),
        Some("memory-encode") => memory::encode(args),
        Some("memory-decode") => memory::decode(args),
        Some("s3-memory") => store::serve_memory(),
        Some("store-peak-save") => store::peak_save(args),
        Some("store-peak-load") => store::peak_load(args),
        other => Err(Error::invalid(format!("no command {}", other.unwrap_or("was given"))).with_help(HELP)),
    }
}
