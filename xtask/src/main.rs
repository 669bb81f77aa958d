//! Automation of the Towline workspace: `cargo xtask <command>`. Everything that CI does is a local command.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool: printing is what it does"
)]

mod args;
mod bench;
mod ci;
mod corpus;
mod crash_matrix;
mod deps;
mod disks;
mod features;
mod fuzz;
mod golden;
mod interop;
mod kill_oracle;
mod promoted;
mod python;
mod real_stores;
mod run;
mod stop;
mod table;
mod tensors;
mod tidy;
mod workspace;

use std::process::ExitCode;

use args::Args;
use stop::{Result, Stop};
use workspace::Context;

/// A command: its name, one line of help, its full help and what it does.
struct Command {
    name: &'static str,
    about: &'static str,
    help: &'static str,
    run: fn(&Context, Args) -> Result<()>,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "ci",
        about: "run every check, in order, and print a table",
        help: ci::HELP,
        run: ci::command,
    },
    Command {
        name: "deps",
        about: "check the dependency rules and the counts in ARCHITECTURE.md",
        help: deps::HELP,
        run: deps::command,
    },
    Command {
        name: "tidy",
        about: "check what no compiler checks: sizes, leftovers, paths, white space",
        help: tidy::HELP,
        run: tidy::command,
    },
    Command {
        name: "features",
        about: "check every published crate with each set of features",
        help: features::HELP,
        run: features::command,
    },
    Command {
        name: "golden",
        about: "run the golden tests, or bless what they find",
        help: golden::HELP,
        run: golden::command,
    },
    Command {
        name: "bench",
        about: "measure the codecs on real weights",
        help: bench::HELP,
        run: bench::command,
    },
    Command {
        name: "corpus",
        about: "make real pairs of checkpoints by training a pretrained model",
        help: corpus::HELP,
        run: corpus::command,
    },
    Command {
        name: "fuzz",
        about: "run the fuzz targets for some seconds each",
        help: fuzz::HELP,
        run: fuzz::command,
    },
    Command {
        name: "interop",
        about: "exchange deltas with the public Python package",
        help: interop::HELP,
        run: interop::command,
    },
    Command {
        name: "crash-matrix",
        about: "let savers and a server die everywhere, and look at what is left",
        help: crash_matrix::HELP,
        run: crash_matrix::command,
    },
    Command {
        name: "kill-oracle",
        about: "kill a training process at random instants, and compare what it goes on to",
        help: kill_oracle::HELP,
        run: kill_oracle::command,
    },
    Command {
        name: "promoted",
        about: "load a promoted model with safetensors and transformers",
        help: promoted::HELP,
        run: promoted::command,
    },
    Command {
        name: "disks",
        about: "save and prune on a full disk and on a read-only one",
        help: disks::HELP,
        run: disks::command,
    },
    Command {
        name: "real-stores",
        about: "check the store laws on real object-store servers",
        help: real_stores::HELP,
        run: real_stores::command,
    },
];

fn main() -> ExitCode {
    let mut args = Args::new(std::env::args().skip(1));
    let json = args.flag("--json");
    let help = args.flag("--help") || args.flag("-h");
    let name = args.positional();
    let found = COMMANDS.iter().find(|command| Some(command.name) == name.as_deref());
    match (found, name) {
        (Some(command), _) if help => {
            println!("{}", command.help);
            ExitCode::SUCCESS
        }
        (Some(command), _) => finish(Context::load(json).and_then(|context| (command.run)(&context, args))),
        (None, None) => {
            println!("{}", usage());
            ExitCode::from(if help { 0 } else { 2 })
        }
        (None, Some(name)) => {
            eprintln!("error: no command `{name}`\n\n{}", usage());
            ExitCode::from(2)
        }
    }
}

fn usage() -> String {
    let mut text = String::from("Usage: cargo xtask <COMMAND> [--json] [--help]\n\nCommands:\n");
    for command in COMMANDS {
        text.push_str(&format!("  {:<12} {}\n", command.name, command.about));
    }
    text.push_str("\nExit: 0 done, 1 failed, 2 wrong use, 3 not possible on this machine");
    text
}

fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => {
            match &stop {
                Stop::Skipped(why) => eprintln!("skipped: {why}"),
                Stop::Told => {}
                Stop::Usage(_) | Stop::Failed(_) => eprintln!("error: {stop}"),
            }
            ExitCode::from(stop.exit_code())
        }
    }
}
