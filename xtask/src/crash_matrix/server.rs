//! A server that is killed and started again under a client that saves and prunes.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::{MARK, marked};
use crate::real_stores::SeaweedFs;
use crate::run::Job;
use crate::stop::{Result, Stop};
use crate::workspace::Context;

const KILLS: u64 = 20;
/// So many things a client does, of which every eighth is pruning.
const THINGS: u64 = 32;
/// How long it may take for all of them, with a restart in the middle.
const PATIENCE: Duration = Duration::from_secs(300);

/// Kills and restarts the server, each time under a client of its own, and has its job checked. Returns sums.
pub(super) fn kills(context: &Context, program: &Path, server: &mut SeaweedFs) -> Result<Value> {
    let started = Instant::now();
    let mut sums = Map::new();
    let mut longest = Duration::ZERO;
    for round in 0..KILLS {
        let job = format!("killed-{round}");
        let arguments = [SeaweedFs::url(), "--job".to_owned(), job];
        let client = |more: &[&str]| server_job(context, program, server, &arguments).args(more);
        let mut saver = Saver::start(&client(&["--save", &THINGS.to_string()]))?;
        let checker = client(&["--check"]);
        // Behind another thing in each round, and anywhere within the next one.
        let behind = 1 + round * 7 % 24;
        let within = Duration::from_millis(round * 53 % 160);
        let until = Instant::now() + PATIENCE;
        let mut lines: Vec<String> = Vec::new();
        let mut done = 0;
        while let Some(line) = saver.line(until)? {
            if line.starts_with("ok ") {
                done += 1;
                if done == behind {
                    std::thread::sleep(within);
                    longest = longest.max(server.kill_and_restart()?);
                }
            }
            lines.push(line);
        }
        saver.end()?;
        let printed = lines.join("\n");
        add(&mut sums, &marked(&printed)?);
        let failed = lines.iter().filter(|line| line.starts_with("failed ")).count();
        add(&mut sums, &json!({ "failed calls": failed }));
        lines.retain(|line| !line.contains(MARK));
        let checked = checker.input(lines.join("\n") + "\n").deadline(PATIENCE).output();
        let checked = checked.map_err(|stop| stop.context(&format!("kill {}", round + 1)))?;
        add(&mut sums, &marked(&checked)?);
        context.say(format!("kill {}: {} ({failed} failed calls)", round + 1, checked.trim()));
    }
    sums.insert("kills".into(), KILLS.into());
    sums.insert("longest restart".into(), longest.as_secs_f64().into());
    sums.insert("seconds".into(), started.elapsed().as_secs_f64().into());
    Ok(sums.into())
}

fn server_job(context: &Context, program: &Path, server: &SeaweedFs, arguments: &[String]) -> Job {
    server.client(context.job(program).args(arguments))
}

/// Adds the numbers of `figures`.
fn add(sums: &mut Map<String, Value>, figures: &Value) {
    for (what, count) in figures.as_object().into_iter().flatten() {
        if let Some(count) = count.as_u64() {
            let before = sums.get(what).and_then(Value::as_u64).unwrap_or(0);
            sums.insert(what.clone(), (before + count).into());
        }
    }
}

/// The client that saves, and what it says.
struct Saver {
    child: Child,
    lines: mpsc::Receiver<std::io::Result<String>>,
}

impl Saver {
    fn start(job: &Job) -> Result<Self> {
        let mut child = job
            .command()
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Stop::failed(format!("cannot start the client: {error}")))?;
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
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(Stop::failed(format!("the client was not done after {} s", PATIENCE.as_secs())))
            }
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

impl Drop for Saver {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
