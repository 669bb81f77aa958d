//! Running programs under a deadline. On time-out the whole process group is killed, not the child alone.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::stop::{Result, Stop};

/// How long a step may take when nothing else is said: long enough for a cold build on two cores.
const DEADLINE: Duration = Duration::from_secs(30 * 60);

/// How the variables begin in which `cargo run` describes the crate that it runs.
const OF_THIS_CRATE: [&str; 2] = ["CARGO_PKG_", "CARGO_MANIFEST_"];

/// One run of a program.
#[derive(Debug)]
pub(crate) struct Job {
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    deadline: Duration,
    to_stderr: bool,
    input: Option<String>,
}

impl Job {
    /// The program; its default deadline is 30 minutes.
    pub(crate) fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory: None,
            deadline: DEADLINE,
            to_stderr: false,
            input: None,
        }
    }

    /// Adds arguments.
    pub(crate) fn args<S: AsRef<OsStr>>(mut self, arguments: &[S]) -> Self {
        self.arguments.extend(arguments.iter().map(|text| text.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// The working directory.
    pub(crate) fn current_dir(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }

    /// How long it may run.
    pub(crate) fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sends what it prints to our standard error.
    pub(crate) fn stdout_to_stderr(mut self, yes: bool) -> Self {
        self.to_stderr = yes;
        self
    }

    /// What it reads on standard input; nothing by default.
    pub(crate) fn input(mut self, text: String) -> Self {
        self.input = Some(text);
        self
    }

    /// Runs it with its output streamed; an exit code other than 0 fails.
    pub(crate) fn run(self) -> Result<()> {
        let stdout = if self.to_stderr { Stdio::from(std::io::stderr()) } else { Stdio::inherit() };
        let mut child = self.spawn(stdout)?;
        self.wait(&mut child)
    }

    /// Runs it and returns what it printed; standard error is streamed.
    pub(crate) fn output(self) -> Result<String> {
        let mut child = self.spawn(Stdio::piped())?;
        let printed = child.stdout.take().map(read_aside);
        self.wait(&mut child)?;
        let Some(printed) = printed else {
            return Err(Stop::failed(format!("`{}` has no output", self.name())));
        };
        // The program has ended; a grandchild that still holds the pipe must not hold us too.
        let text = printed
            .recv_timeout(Duration::from_secs(10))
            .map_err(|_| Stop::failed(format!("`{}` ended but its output did not", self.name())))?
            .map_err(|error| Stop::failed(format!("cannot read from `{}`: {error}", self.name())))?;
        Ok(text)
    }

    /// Runs it and returns whether it ended with 0, and what it printed. Any other end than 0 or 1 fails: so does a
    /// program that checks something and could not.
    pub(crate) fn verdict(self) -> Result<(bool, String)> {
        let mut child = self.spawn(Stdio::piped())?;
        let printed = child.stdout.take().map(read_aside);
        let ended = self.wait(&mut child);
        let code = child.try_wait().ok().flatten().and_then(|status| status.code());
        match (ended, code) {
            (Ok(()), _) | (Err(_), Some(1)) => {}
            (Err(stop), _) => return Err(stop),
        }
        let text = printed.and_then(|printed| printed.recv_timeout(Duration::from_secs(10)).ok());
        let text = text
            .and_then(std::io::Result::ok)
            .ok_or_else(|| Stop::failed(format!("`{}` ended but its output did not", self.name())))?;
        Ok((code == Some(0), text))
    }

    /// Whether it runs and exits with 0; prints nothing.
    pub(crate) fn succeeds(self) -> bool {
        let mut command = self.command();
        command.stdout(Stdio::null()).stderr(Stdio::null());
        match command.spawn() {
            Ok(mut child) => self.wait(&mut child).is_ok(),
            Err(_) => false,
        }
    }

    /// The command line, for messages.
    fn name(&self) -> String {
        let mut text =
            Path::new(&self.program).file_name().unwrap_or(&self.program).to_string_lossy().into_owned();
        for argument in self.arguments.iter().take(6) {
            text.push(' ');
            text.push_str(&argument.to_string_lossy());
        }
        if self.arguments.len() > 6 {
            text.push_str(" …");
        }
        text
    }

    /// The program as the standard library starts it, for callers that hold it themselves.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(if self.input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        // What cargo says of this crate is not for others: a build script that looks at it (ring's) would run anew.
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| OF_THIS_CRATE.iter().any(|start| name.starts_with(start))) {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        #[cfg(unix)]
        if own_group() {
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
        }
        command
    }

    fn spawn(&self, stdout: Stdio) -> Result<Child> {
        let mut child = self
            .command()
            .stdout(stdout)
            .spawn()
            .map_err(|error| Stop::failed(format!("cannot start `{}`: {error}", self.name())))?;
        if let (Some(text), Some(mut pipe)) = (self.input.clone(), child.stdin.take()) {
            // On a thread of its own: a program that prints before it reads would else wait for us and we for it.
            std::thread::spawn(move || pipe.write_all(text.as_bytes()));
        }
        Ok(child)
    }

    fn wait(&self, child: &mut Child) -> Result<()> {
        let started = Instant::now();
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => {
                    return Err(Stop::failed(format!("`{}` ended with {status}", self.name())));
                }
                Ok(None) => {}
                Err(error) => {
                    kill(child);
                    return Err(Stop::failed(format!("cannot wait for `{}`: {error}", self.name())));
                }
            }
            if started.elapsed() >= self.deadline {
                kill(child);
                return Err(Stop::failed(format!(
                    "`{}` was killed after its deadline of {} s",
                    self.name(),
                    self.deadline.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }
}

/// A group of its own is killed whole. At a terminal the child stays in ours, so that Ctrl-C reaches it.
fn own_group() -> bool {
    cfg!(unix) && !std::io::stdin().is_terminal()
}

/// Ends a child and what it started, and reaps it. Each call may fail because the process is gone already.
fn kill(child: &mut Child) {
    if own_group() {
        kill_group(child.id());
    } else {
        for descendant in descendants(child.id()) {
            let _gone = Command::new("sh")
                .args(["-c", &format!("kill -KILL {descendant}")])
                .stderr(Stdio::null())
                .status();
        }
    }
    let _gone = child.kill();
    let _reaped = child.wait();
}

/// Kills a process group; it may be gone already. Without `--` before the number, which not every shell knows.
pub(crate) fn kill_group(group: u32) {
    let _gone =
        Command::new("sh").args(["-c", &format!("kill -KILL -{group}")]).stderr(Stdio::null()).status();
}

fn descendants(parent: u32) -> Vec<u32> {
    let Ok(output) = Command::new("pgrep").args(["-P", &parent.to_string()]).output() else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Ok(id) = line.trim().parse() {
            found.extend(descendants(id));
            found.push(id);
        }
    }
    found
}

fn read_aside(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let result = pipe.read_to_string(&mut text).map(|_| text);
        // The receiver may have given up; then nobody wants the text.
        let _unwanted = sender.send(result);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Job {
        Job::new("sh").args(&["-c", script])
    }

    #[test]
    fn output_is_captured_and_codes_are_seen() {
        assert_eq!(shell("printf hello").output().unwrap(), "hello");
        assert!(shell("exit 3").run().is_err());
        assert!(!shell("exit 3").succeeds());
        assert!(Job::new("no-such-program-anywhere").run().is_err());
        let echoed = shell("cat").input("in".into()).output().unwrap();
        assert_eq!(echoed, "in");
        assert_eq!(shell("printf found; exit 1").verdict().unwrap(), (false, "found".into()));
        assert_eq!(shell("printf fine").verdict().unwrap(), (true, "fine".into()));
        assert!(shell("printf usage; exit 2").verdict().is_err());
    }

    #[test]
    fn a_deadline_kills_grandchildren_too() {
        let started = Instant::now();
        let error =
            shell("sleep 60 & sleep 60; wait").deadline(Duration::from_millis(200)).output().unwrap_err();
        assert!(error.to_string().contains("deadline"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    #[cfg(unix)]
    fn a_group_is_killed_whole() {
        let mut command = shell("sleep 60 & echo $!; wait").command();
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut id = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut id)
            .unwrap();
        kill_group(child.id());
        let _reaped = child.wait();
        // An orphan may stay a zombie until its new parent asks for it.
        let state = format!("ps -o stat= -p {} | grep -v Z", id.trim());
        assert!(!shell(&state).succeeds(), "{id} still runs");
    }
}
