//! Child processes whose lines are read with a deadline, and which never outlive their parent's interest.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use towline_core::{Error, Result};

/// How long a child may be silent.
const SILENCE: Duration = Duration::from_secs(120);

/// This program, run again with other arguments. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    what: &'static str,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub(crate) fn start(what: &'static str, arguments: &[&str]) -> Result<Self> {
        let failed =
            |error| Error::internal(format!("the {what} process cannot be started")).with_source(error);
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().ok_or_else(|| Error::internal("a child without standard output"))?;
        Ok(Self { what, child, lines: BufReader::new(stdout).lines() })
    }

    /// A server, and the URL that it listens on.
    pub(crate) async fn serve(arguments: &[&str]) -> Result<(Self, String)> {
        #[derive(serde::Deserialize)]
        struct Listening {
            url: String,
        }
        let mut server = Self::start("server", arguments)?;
        let listening = server.next::<Listening>().await?;
        let Listening { url } =
            listening.ok_or_else(|| Error::internal("the server ended before it listened"))?;
        Ok((server, url))
    }

    /// The next line as JSON; `None` when the child has closed its output.
    pub(crate) async fn next<T: serde::de::DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let line = tokio::time::timeout(SILENCE, self.lines.next_line())
            .await
            .map_err(|_| {
                Error::timed_out(format!("the {} was silent for {} s", self.what, SILENCE.as_secs()))
            })?
            .map_err(|error| {
                Error::unavailable(format!("the {} cannot be read", self.what)).with_source(error)
            })?;
        let Some(line) = line else { return Ok(None) };
        serde_json::from_str(&line)
            .map(Some)
            .map_err(|error| Error::internal(format!("the {} said `{line}`", self.what)).with_source(error))
    }

    /// Kills it at once (SIGKILL on Unix) and waits for its end.
    pub(crate) async fn kill(mut self) -> Result<()> {
        self.child.kill().await.map_err(|error| {
            Error::internal(format!("the {} cannot be killed", self.what)).with_source(error)
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// `Internal` if it failed.
    pub(crate) async fn finish(mut self) -> Result<()> {
        let ended = tokio::time::timeout(SILENCE, self.child.wait()).await;
        let status = ended.map_err(|_| Error::timed_out(format!("the {} did not end", self.what)))?.map_err(
            |error| Error::internal(format!("the {} cannot be waited for", self.what)).with_source(error),
        )?;
        if status.success() {
            return Ok(());
        }
        Err(Error::internal(format!("the {} failed ({status})", self.what))
            .with_help("see its message above"))
    }
}
