//! The virtual environments that hold the public Python package.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::run::Job;
use crate::stop::{Result, Stop};
use crate::workspace::Context;

/// The package whose files we read and write.
pub(crate) const PACKAGE: &str = "fireworks-delta-compression==0.1.0";
/// What the package needs besides torch, within the bounds that it names.
const LIGHT: [&str; 5] = [PACKAGE, "numpy>=1.20,<3", "safetensors>=0.4,<1", "zstd>=1.5,<2", "packaging>=21"];

/// A Python that has the public package.
#[derive(Debug)]
pub(crate) struct Python {
    interpreter: PathBuf,
    scripts: PathBuf,
    light: bool,
}

impl Python {
    /// Makes the environment, or uses the one that is there. `light` puts a small stand-in over numpy in the place of
    /// torch, which alone brings some 5 GB. Where Python, pip or the network is missing: skipped, with what it was.
    pub(crate) fn prepare(context: &Context, light: bool) -> Result<Self> {
        let home = context.root.join(if light { ".venv-interop-light" } else { ".venv-interop" });
        let python = Self {
            interpreter: home.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" }),
            scripts: context.root.join("xtask/python"),
            light,
        };
        if python.works(context) {
            context.say(format!("using {}", shown(context, &home)));
            return Ok(python);
        }
        let started = Instant::now();
        if !context.job("python3").args(&["--version"]).deadline(Duration::from_secs(60)).succeeds() {
            return Err(Stop::Skipped("python3 is not on this machine".to_owned()));
        }
        context.say(format!("making {} with {PACKAGE}", shown(context, &home)));
        context
            .job("python3")
            .args(&["-m", "venv", "--clear"])
            .args(&[&home])
            .deadline(Duration::from_secs(180))
            .run()
            .map_err(|stop| {
                Stop::Skipped(format!("python3 cannot make a virtual environment with pip (its venv or ensurepip module may be missing): {stop}"))
            })?;
        let mut install = context.job(&python.interpreter).args(&[
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
        ]);
        if light {
            install = install.args(&["--no-deps"]).args(&LIGHT);
        } else {
            context.say("this brings torch, some 3 GB to load and 5 GB on disk (`--light` does without)");
            install = install.args(&[PACKAGE]);
        }
        install.deadline(Duration::from_secs(30 * 60)).run().map_err(|stop| {
            Stop::Skipped(format!(
                "pip could not install {PACKAGE}, the network or a wheel for this Python is missing: {stop}"
            ))
        })?;
        if !python.works(context) {
            // Installed and yet not importable: that is a fault to see, not a machine that lacks something.
            python.run(context, "-c", &[]).args(&["import fireworks_delta_compression"]).run()?;
            return Err(Stop::failed("the public package cannot be imported"));
        }
        context.say(format!("made in {} s", started.elapsed().as_secs()));
        Ok(python)
    }

    /// What stands in for torch, for a table.
    pub(crate) fn flavour(&self) -> &'static str {
        if self.light { "torch stand-in over numpy" } else { "torch" }
    }

    /// A script of ours with arguments.
    pub(crate) fn script(&self, context: &Context, name: &str) -> Job {
        self.run(context, "-B", &[self.path(name).as_path()])
    }

    /// Where a script of ours is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scripts.join(name)
    }

    /// The program that runs scripts, for a process of ours that starts them itself.
    pub(crate) fn interpreter(&self) -> &Path {
        &self.interpreter
    }

    fn run(&self, context: &Context, flag: &str, arguments: &[&Path]) -> Job {
        let job = context.job(&self.interpreter).args(&[flag]).args(arguments);
        if self.light { job.env("PYTHONPATH", self.scripts.join("torch_light")) } else { job }
    }

    fn works(&self, context: &Context) -> bool {
        self.interpreter.is_file()
            && self
                .run(context, "-Bc", &[])
                .args(&["import fireworks_delta_compression"])
                .deadline(Duration::from_secs(180))
                .succeeds()
    }
}

fn shown(context: &Context, path: &Path) -> String {
    path.strip_prefix(&context.root).unwrap_or(path).display().to_string()
}
