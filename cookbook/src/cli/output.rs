//! What the command line prints: text or JSON on standard output, progress and errors on standard error.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use towline_core::Error;

/// Where a command's words go.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// The result: `text` for people, `value` for programs.
    pub(crate) fn result(&self, text: impl Display, value: &Value) {
        let line = if self.json { value.to_string() } else { text.to_string() };
        // A closed pipe is the reader's choice.
        let _ = writeln!(std::io::stdout().lock(), "{}", line.trim_end());
    }

    /// A line about work that goes on, for people.
    pub(crate) fn note(&self, text: impl Display) {
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }

    /// The error, its causes and the next step.
    pub(crate) fn error(&self, error: &Error) {
        if self.json {
            let value = serde_json::json!({"error": {
                "code": error.kind().as_str(), "message": error.message(), "help": error.help(),
            }});
            let _ = writeln!(std::io::stdout().lock(), "{value}");
            return;
        }
        let mut stderr = std::io::stderr().lock();
        let _ = writeln!(stderr, "error: {}", error.message());
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            let _ = writeln!(stderr, "  because: {cause}");
            source = cause.source();
        }
        if let Some(help) = error.help() {
            let _ = writeln!(stderr, "  help: {help}");
        }
    }

    /// Progress over `total` units: a bar on a terminal, else a line every few seconds.
    pub(crate) fn progress(&self, what: &str, total: u64) -> Progress {
        if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(total).with_style(style).with_message(what.to_owned());
            return Progress {
                bar: Some(bar),
                what: what.to_owned(),
                total,
                done: Mutex::new((0, Instant::now())),
            };
        }
        Progress { bar: None, what: what.to_owned(), total, done: Mutex::new((0, Instant::now())) }
    }
}

/// Progress of long work.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    total: u64,
    done: Mutex<(u64, Instant)>,
}

impl Progress {
    /// Adds `units`.
    pub(crate) fn add(&self, units: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(units);
            return;
        }
        let Ok(mut state) = self.done.lock() else { return };
        state.0 += units;
        if state.1.elapsed() > Duration::from_secs(5) {
            state.1 = Instant::now();
            let _ = writeln!(
                std::io::stderr().lock(),
                "{}: {} of {} MB",
                self.what,
                state.0 >> 20,
                self.total >> 20
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Rows under a heading, the columns padded; numbers to the right.
pub(crate) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(heading.get(column).map(|text| text.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let numeric: Vec<bool> = (0..heading.len())
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).all(|cell| {
                cell.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '–')) || cell.is_empty()
            })
        })
        .collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells
            .iter()
            .enumerate()
            .map(|(column, cell)| {
                let width = widths.get(column).copied().unwrap_or(0);
                if numeric.get(column) == Some(&true) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            })
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let head: Vec<String> = heading.iter().map(|text| (*text).to_owned()).collect();
    let mut text = line(&head);
    for row in rows {
        text.push('\n');
        text.push_str(&line(row));
    }
    text
}
