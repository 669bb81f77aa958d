//! A server that is killed while a client writes to it: what it acknowledged must be there.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::kinds::{Kind, START};
use super::server::{Launch, Server};
use crate::stop::{Result, Stop};
use crate::workspace::Context;

const OBJECTS: u64 = 100;
/// How long the client may take for all objects, with a restart in the middle.
const WRITING: Duration = Duration::from_secs(300);

/// What came of all kills.
#[derive(Debug, Default)]
pub(super) struct Kills {
    /// Objects by what became of them.
    pub(super) counts: BTreeMap<String, u64>,
    pub(super) broken: Vec<String>,
    /// The longest time from a restart to an answer.
    pub(super) slowest_restart: Duration,
    pub(super) seconds: f64,
}

/// Kills and restarts the server `rounds` times, each time under a client that writes 100 objects, and checks them.
pub(super) fn run(
    context: &Context,
    program: &Path,
    launch: &Launch,
    mut server: Server,
    rounds: u64,
) -> Result<(Kills, Server)> {
    let started = Instant::now();
    let mut kills = Kills::default();
    for round in 0..rounds {
        // Anywhere between the first and the last objects, elsewhere in each round.
        let kill_at = 5 + round * 37 % 88;
        let mut writer = Writer::start(program, launch.port, round)?;
        let until = Instant::now() + WRITING;
        let mut lines = Vec::new();
        while let Some(line) = writer.line(until)? {
            lines.push(line);
            if lines.len() as u64 == kill_at {
                server.kill();
                let began = Instant::now();
                server = launch.start(START)?;
                kills.slowest_restart = kills.slowest_restart.max(began.elapsed());
            }
        }
        writer.end()?;
        if lines.len() as u64 != OBJECTS {
            return Err(Stop::failed(format!(
                "the client told of {} objects, wanted {OBJECTS}",
                lines.len()
            )));
        }
        let checked = client(context, program, launch.port)
            .args(&["--check", "--seed", &round.to_string()])
            .input(lines.join("\n") + "\n")
            .deadline(WRITING)
            .verdict()?;
        kills.add(round, &checked.1)?;
    }
    kills.seconds = started.elapsed().as_secs_f64();
    Ok((kills, server))
}

impl Kills {
    /// Takes in what the check of one round printed.
    fn add(&mut self, round: u64, printed: &str) -> Result<()> {
        let wrong = || Stop::failed(format!("store_laws --check printed `{}`", printed.trim()));
        let value: Value = serde_json::from_str(printed).map_err(|_| wrong())?;
        for (what, count) in value.get("counts").and_then(Value::as_object).ok_or_else(wrong)? {
            *self.counts.entry(what.clone()).or_default() += count.as_u64().ok_or_else(wrong)?;
        }
        for broken in crate::workspace::strings(value.get("broken").ok_or_else(wrong)?) {
            self.broken.push(format!("kill {}: {broken}", round + 1));
        }
        Ok(())
    }
}

fn client(context: &Context, program: &Path, port: u16) -> crate::run::Job {
    Kind::SeaweedFs.client(context.job(program).args(&[Kind::SeaweedFs.url()]), port, true)
}

/// The client that writes, and what it says of each object.
struct Writer {
    child: Child,
    lines: mpsc::Receiver<std::io::Result<String>>,
}

impl Writer {
    fn start(program: &Path, port: u16, seed: u64) -> Result<Self> {
        let job = Kind::SeaweedFs.client(crate::run::Job::new(program), port, true).args(&[
            &Kind::SeaweedFs.url(),
            "--write",
            &OBJECTS.to_string(),
            "--seed",
            &seed.to_string(),
        ]);
        let mut command: Command = job.command();
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Stop::failed(format!("cannot start `{}`: {error}", program.display())))?;
        let (sender, lines) = mpsc::channel();
        if let Some(pipe) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(pipe).lines() {
                    // Nobody listens any more once the round has failed.
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { child, lines })
    }

    /// The next line; `None` at the end.
    fn line(&mut self, until: Instant) -> Result<Option<String>> {
        match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                line.map(Some).map_err(|error| Stop::failed(format!("cannot read the client: {error}")))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => Ok(None),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Stop::failed(format!(
                "the client had not written all objects after {} s",
                WRITING.as_secs()
            ))),
        }
    }

    fn end(mut self) -> Result<()> {
        match self.child.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Stop::failed(format!("the client ended with {status}"))),
            Err(error) => Err(Stop::failed(format!("cannot wait for the client: {error}"))),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
