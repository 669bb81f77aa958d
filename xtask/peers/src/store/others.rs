//! The ways of Python's packages, in a process of its own that takes its turns.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use towline_core::{Error, Result};

use super::failed;

/// A process that is told a line and answers with one.
pub(super) struct Others {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    versions: Value,
}

impl Others {
    /// Starts `script`, and gives it its first order.
    pub(super) fn start(python: &Path, script: &Path, order: &Value) -> Result<Self> {
        let mut child = Command::new(python)
            .arg("-B")
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed("start Python", error))?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::internal("Python was started without pipes"));
        };
        let mut others = Self { child, orders, answers: BufReader::new(answers), versions: Value::Null };
        others.versions = others.ask(order)?;
        Ok(others)
    }

    /// What the packages say they are.
    pub(super) fn versions(&self) -> &Value {
        &self.versions
    }

    /// Seconds of one run.
    pub(super) fn run(&mut self, group: &str, way: &str) -> Result<f64> {
        let answer = self.ask(&json!({"group": group, "way": way}))?;
        answer["seconds"]
            .as_f64()
            .ok_or_else(|| Error::internal(format!("Python's `{group}` by `{way}` told no time")))
    }

    /// One line there, one line back.
    pub(super) fn ask(&mut self, order: &Value) -> Result<Value> {
        let ended = |error| failed("talk to Python: it has ended, and said why", error);
        writeln!(self.orders, "{order}").and_then(|()| self.orders.flush()).map_err(ended)?;
        let mut line = String::new();
        self.answers.read_line(&mut line).map_err(ended)?;
        serde_json::from_str(&line).map_err(|error| failed("read Python's answer", error))
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        // It has nothing to lose, and may have ended by itself.
        let _ended = self.child.kill();
        let _waited = self.child.wait();
    }
}
