//! A server that runs beside us and never longer than we.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::run::kill_group;
use crate::stop::{Result, Stop, file_error};

/// How a server is started, each time in the same way.
#[derive(Debug)]
pub(super) struct Launch {
    /// Its name, for messages.
    pub(super) name: &'static str,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    /// Where it answers HTTP.
    pub(super) port: u16,
    /// Where it says what it does. Later starts write behind earlier ones.
    pub(super) log: PathBuf,
    /// What it leaves behind outside of its folder, to be removed at its end.
    pub(super) leftovers: Vec<PathBuf>,
}

/// A server under way. Dropped, it is killed with all that it started.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    keeper: Option<Child>,
    leftovers: Vec<PathBuf>,
}

impl Launch {
    /// Starts it and waits until it answers.
    pub(super) fn start(&self, deadline: Duration) -> Result<Server> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.map_err(file_error("open", &self.log))?;
        let errors = log.try_clone().map_err(file_error("open", &self.log))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log).stderr(errors);
        // A group of its own, to be killed whole. Ctrl-C does not reach it: the keeper does.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(|error| {
            Stop::failed(format!("cannot start {} (`{}`): {error}", self.name, self.program.display()))
        })?;
        let mut server = Server { keeper: keeper(child.id()), child, leftovers: self.leftovers.clone() };
        if server.keeper.is_none() {
            return Err(Stop::Skipped(
                "`sh`, which ends the servers should we be killed, cannot be started".to_owned(),
            ));
        }
        let until = Instant::now() + deadline;
        loop {
            if let Ok(Some(status)) = server.child.try_wait() {
                return Err(Stop::failed(format!(
                    "{} ended at once with {status}; it said:\n{}",
                    self.name,
                    self.said()
                )));
            }
            if request(self.port, "GET / HTTP/1.0", &[]).is_ok() {
                return Ok(server);
            }
            if Instant::now() >= until {
                return Err(Stop::failed(format!(
                    "{} does not answer after {} s; it said:\n{}",
                    self.name,
                    deadline.as_secs(),
                    self.said()
                )));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The end of its log.
    pub(super) fn said(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
    }
}

impl Server {
    /// Whether it still runs.
    pub(super) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// `kill -9`, as if the machine's power had gone, and waits until its ports are free again.
    pub(super) fn kill(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        kill_group(self.child.id());
        if let Some(mut keeper) = self.keeper.take() {
            let _gone = keeper.kill();
            let _reaped = keeper.wait();
        }
        // Reaped last: until then nobody else can get its number.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        for path in &self.leftovers {
            let _absent = std::fs::remove_file(path);
        }
    }
}

/// A shell in a group of its own that waits for the end of its standard input, which comes when we end in whatever way,
/// and then kills the group.
fn keeper(group: u32) -> Option<Child> {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("trap '' INT TERM HUP; read _; kill -KILL -{group}")]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.spawn().ok()
}

/// `count` ports of the loopback that are free, with those that lie 10,000 above them: SeaweedFS takes both. All lie
/// below the range from which systems draw ports for outgoing connections.
pub(super) fn free_ports(count: usize) -> Result<Vec<u16>> {
    let free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let id = std::process::id() % 8000;
    let first = 12_000 + u16::try_from(id).unwrap_or(0);
    let ports: Vec<u16> = (first..22_000)
        .chain(12_000..first)
        .filter(|port| free(*port) && free(port + 10_000))
        .take(count)
        .collect();
    if ports.len() == count { Ok(ports) } else { Err(Stop::failed("no free ports on the loopback")) }
}

/// One request to the loopback; returns the status, whatever it is.
pub(super) fn request(port: u16, line: &str, headers: &[&str]) -> std::io::Result<u16> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut text = format!("{line}\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n");
    for header in headers {
        text.push_str(header);
        text.push_str("\r\n");
    }
    text.push_str("\r\n");
    stream.write_all(text.as_bytes())?;
    // `HTTP/1.1 200`
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let status = String::from_utf8_lossy(&head);
    let status = status.strip_prefix("HTTP/").and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    status.ok_or_else(|| std::io::Error::other("no answer in HTTP"))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn launch(dir: &std::path::Path, script: &str) -> Launch {
        Launch {
            name: "test",
            program: "sh".into(),
            arguments: vec!["-c".into(), script.into()],
            port: free_ports(1).unwrap()[0],
            log: dir.join("log"),
            leftovers: Vec::new(),
        }
    }

    #[test]
    fn a_server_that_ends_or_never_answers_is_told_with_its_words() {
        let dir = std::env::temp_dir().join(format!("towline-server-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let ended = launch(&dir, "echo broken wheel; exit 4").start(Duration::from_secs(30)).unwrap_err();
        assert!(ended.to_string().contains("broken wheel"), "{ended}");
        let mut silent = launch(&dir, "sleep 60 & echo $! >pid; sleep 60");
        let script = format!("cd {}; sleep 60 & echo $! >pid; sleep 60", dir.display());
        silent.arguments = vec!["-c".into(), script.into()];
        let late = silent.start(Duration::from_millis(500)).unwrap_err();
        assert!(late.to_string().contains("does not answer"), "{late}");
        // Its grandchild went with it, but for what its new parent has not asked for yet.
        let id = std::fs::read_to_string(dir.join("pid")).unwrap();
        let alive =
            Command::new("sh").args(["-c", &format!("ps -o stat= -p {} | grep -v Z", id.trim())]).status();
        assert!(!alive.unwrap().success(), "{id} still runs");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_keeper_kills_when_its_input_ends() {
        let mut command = Command::new("sleep");
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut orphan = command.arg("60").spawn().unwrap();
        let mut keeper = keeper(orphan.id()).unwrap();
        assert!(orphan.try_wait().unwrap().is_none());
        drop(keeper.stdin.take());
        let started = Instant::now();
        assert!(!orphan.wait().unwrap().success());
        assert!(started.elapsed() < Duration::from_secs(30));
        keeper.wait().unwrap();
    }

    #[test]
    fn ports_are_distinct() {
        let ports = free_ports(4).unwrap();
        assert!(ports.windows(2).all(|pair| pair[0] < pair[1]), "{ports:?}");
    }
}
