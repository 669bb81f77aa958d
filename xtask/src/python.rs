//! The virtual environments that hold the public Python packages.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::run::Job;
use crate::stop::{Result, Stop};
use crate::workspace::Context;

/// The package whose files we read and write.
pub(crate) const PACKAGE: &str = "fireworks-delta-compression==0.1.0";
/// What the package needs besides torch, within the bounds that it names.
const LIGHT: [&str; 5] = [PACKAGE, "numpy>=1.20,<3", "safetensors>=0.4,<1", "zstd>=1.5,<2", "packaging>=21"];

/// The public clients of S3 that ours is compared with. The second is what s3torchconnector is built on.
const S3: [&str; 2] = ["boto3==1.44.5", "s3torchconnectorclient==1.5.0"];
/// Whether the packages are there as they are named.
const S3_VERSIONS: &str = "import boto3, sys; from importlib.metadata import version
import s3torchconnectorclient._mountpoint_s3_client
sys.exit(any(version(word.split('==')[0]) != word.split('==')[1] for word in sys.argv[1:]))";

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
        let python = Self::at(context, &home, light);
        if python.works(context) {
            context.say(format!("using {}", shown(context, &home)));
            return Ok(python);
        }
        let started = Instant::now();
        python.make(context, &home, PACKAGE)?;
        let mut install = python.pip(context);
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

    /// Installs one more package, if it is not there.
    pub(crate) fn add(&self, context: &Context, package: &str) -> Result<()> {
        self.pip(context).args(&[package]).deadline(Duration::from_secs(15 * 60)).run().map_err(|stop| {
            Stop::Skipped(format!(
                "pip could not install {package}, the network or a wheel is missing: {stop}"
            ))
        })
    }

    /// An environment of its own for the public clients of S3, none of which needs torch.
    pub(crate) fn of_s3(context: &Context) -> Result<Self> {
        let home = context.root.join(".venv-s3");
        let python = Self::at(context, &home, false);
        let works = || {
            python.interpreter.is_file()
                && python
                    .run(context, "-Bc", &[])
                    .args(&[S3_VERSIONS])
                    .args(&S3)
                    .deadline(Duration::from_secs(180))
                    .succeeds()
        };
        if works() {
            context.say(format!("using {}", shown(context, &home)));
            return Ok(python);
        }
        python.make(context, &home, &S3.join(", "))?;
        python.pip(context).args(&S3).deadline(Duration::from_secs(15 * 60)).run().map_err(|stop| {
            Stop::Skipped(format!(
                "pip could not install {}, the network or a wheel for this Python is missing: {stop}",
                S3.join(", ")
            ))
        })?;
        if works() { Ok(python) } else { Err(Stop::failed("the clients of S3 cannot be imported")) }
    }

    fn at(context: &Context, home: &Path, light: bool) -> Self {
        Self {
            interpreter: home.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" }),
            scripts: context.root.join("xtask/python"),
            light,
        }
    }

    /// A new environment, still empty.
    fn make(&self, context: &Context, home: &Path, what_for: &str) -> Result<()> {
        if !context.job("python3").args(&["--version"]).deadline(Duration::from_secs(60)).succeeds() {
            return Err(Stop::Skipped("python3 is not on this machine".to_owned()));
        }
        context.say(format!("making {} with {what_for}", shown(context, home)));
        context
            .job("python3")
            .args(&["-m", "venv", "--clear"])
            .args(&[home])
            .deadline(Duration::from_secs(180))
            .run()
            .map_err(|stop| {
                Stop::Skipped(format!("python3 cannot make a virtual environment with pip (its venv or ensurepip module may be missing): {stop}"))
            })
    }

    fn pip(&self, context: &Context) -> Job {
        context.job(&self.interpreter).args(&[
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
        ])
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
