//! How a line is written and read.

use std::collections::BTreeSet;

use super::json::{members, push_ascii, push_string};
use super::line::CheckpointLine;

/// The keys with a field of their own, in the order in which they are written.
pub(super) const KNOWN: [&str; 13] = [
    "name",
    "step",
    "data_consumed",
    "raw_rows_consumed",
    "batch",
    "epoch",
    "final",
    "rolling",
    "source_job_id",
    "state_path",
    "sampler_path",
    "base_model",
    "training_shape",
];
/// How much of a bad text an error shows, in characters.
const SHOWN: usize = 60;

/// The line as it is written, without its newline.
pub(super) fn write(line: &CheckpointLine) -> String {
    let mut out = Members(String::from("{"));
    out.text("name", Some(&line.name));
    out.count("step", line.step);
    out.count("data_consumed", line.data_consumed);
    out.count("raw_rows_consumed", line.raw_rows_consumed);
    out.count("batch", line.batch);
    out.count("epoch", line.epoch);
    out.flag("final", line.is_final);
    out.flag("rolling", line.rolling);
    out.text("source_job_id", line.source_job_id.as_deref());
    out.text("state_path", line.state_path.as_deref());
    out.text("sampler_path", line.sampler_path.as_deref());
    out.text("base_model", line.base_model.as_deref());
    out.text("training_shape", line.training_shape.as_deref());
    for (key, text) in &line.extra {
        out.key(key).push_str(text);
    }
    out.0.push('}');
    out.0
}

/// Reads a line, or says what is wrong with it.
pub(super) fn parse(text: &str) -> Result<CheckpointLine, String> {
    let found = members(text).map_err(|fault| {
        let rest = text.get(fault.at..).filter(|rest| !rest.is_empty());
        let rest = rest.map_or_else(|| "the end".to_owned(), shown);
        format!("wanted {} at byte {}, found {rest}", fault.wanted, fault.at)
    })?;
    let mut keys = BTreeSet::new();
    if let Some((twice, _)) = found.iter().find(|(key, _)| !keys.insert(key.as_str())) {
        return Err(format!("the key {} comes twice: which one counts is unknown", shown(twice)));
    }
    let mut line = CheckpointLine::new("");
    for (key, value) in found {
        match key.as_str() {
            _ if value == "null" && KNOWN.contains(&key.as_str()) => {}
            "name" => line.name = path(&key, value)?,
            "step" => line.step = Some(count(&key, value)?),
            "data_consumed" => line.data_consumed = Some(count(&key, value)?),
            "raw_rows_consumed" => line.raw_rows_consumed = Some(count(&key, value)?),
            "batch" => line.batch = Some(count(&key, value)?),
            "epoch" => line.epoch = Some(count(&key, value)?),
            "final" => line.is_final = Some(flag(&key, value)?),
            "rolling" => line.rolling = Some(flag(&key, value)?),
            "source_job_id" => line.source_job_id = Some(string(&key, value)?),
            "state_path" => line.state_path = Some(path(&key, value)?),
            "sampler_path" => line.sampler_path = Some(path(&key, value)?),
            "base_model" => line.base_model = Some(string(&key, value)?),
            "training_shape" => line.training_shape = Some(string(&key, value)?),
            _ => line.extra.push((key, ascii(value))),
        }
    }
    if line.name.is_empty() {
        return Err("wanted a `name`, found none".to_owned());
    }
    Ok(line)
}

/// JSON with escapes for all beyond ASCII, so that a line is the same before it is written and after.
pub(super) fn ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    push_ascii(&mut out, json);
    out
}

/// A whole number as it is written in JSON.
pub(super) fn count(key: &str, value: &str) -> Result<u64, String> {
    value
        .parse()
        .map_err(|_| format!("wanted a whole number from 0 as {}, found {}", shown(key), shown(value)))
}

fn flag(key: &str, value: &str) -> Result<bool, String> {
    value.parse().map_err(|_| format!("wanted `true` or `false` as `{key}`, found {}", shown(value)))
}

fn string(key: &str, value: &str) -> Result<String, String> {
    serde_json::from_str(value).map_err(|_| format!("wanted a text as `{key}`, found {}", shown(value)))
}

fn path(key: &str, value: &str) -> Result<String, String> {
    match string(key, value)? {
        empty if empty.is_empty() => Err(format!("wanted a text as `{key}`, found an empty one")),
        text => Ok(text),
    }
}

/// The start of a text, in one line and within quotes.
pub(super) fn shown(text: &str) -> String {
    let mut start: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        start.push('…');
    }
    format!("`{start}`")
}

/// A line being written.
struct Members(String);

impl Members {
    fn key(&mut self, key: &str) -> &mut String {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        push_string(&mut self.0, key);
        self.0.push(':');
        &mut self.0
    }

    fn text(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            push_string(self.key(key), value);
        }
    }

    fn count(&mut self, key: &str, value: Option<u64>) {
        if let Some(value) = value {
            self.key(key).push_str(&value.to_string());
        }
    }

    fn flag(&mut self, key: &str, value: Option<bool>) {
        if let Some(value) = value {
            self.key(key).push_str(if value { "true" } else { "false" });
        }
    }
}
