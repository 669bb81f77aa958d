//! What was found, as a table for people and as JSON.

use serde_json::{Value, json};

use super::kills::Kills;
use super::kinds::Kind;
use crate::table::Table;

/// Characters of a failure in the table; services answer with whole documents.
const LONGEST: usize = 600;

/// A check and what came of it.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) name: String,
    pub(super) seconds: Option<f64>,
    /// A note, or what broke.
    pub(super) outcome: Result<String, String>,
    /// Known beforehand and said in the table: neither good nor a failure.
    pub(super) known: bool,
}

impl Check {
    pub(super) fn new(name: impl Into<String>, outcome: Result<String, String>) -> Self {
        Self { name: name.into(), seconds: None, outcome, known: false }
    }

    fn failed(&self) -> bool {
        self.outcome.is_err() && !self.known
    }

    fn cell(&self) -> String {
        match (&self.outcome, self.seconds) {
            (Ok(_), Some(seconds)) => format!("ok, {seconds:.1} s"),
            (Ok(note), None) if note.is_empty() => "ok".to_owned(),
            (Ok(note), None) => format!("ok: {note}"),
            (Err(why), _) if self.known => why.clone(),
            (Err(_), Some(seconds)) => format!("**BROKE**, {seconds:.1} s"),
            (Err(_), None) => "**BROKE**".to_owned(),
        }
    }
}

/// A server and all its checks, or why there are none.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) kind: Kind,
    pub(super) checks: Vec<Check>,
    pub(super) skipped: Option<String>,
    pub(super) seconds: f64,
}

impl Checked {
    /// Takes in what `store_laws --json` printed.
    pub(super) fn laws(printed: &str) -> Option<Vec<Check>> {
        let value: Value = serde_json::from_str(printed).ok()?;
        let text = |law: &Value, name: &str| law.get(name).and_then(Value::as_str).map(str::to_owned);
        let check = |law: &Value| {
            let outcome = match text(law, "broke") {
                Some(broke) => Err(broke),
                None => Ok(text(law, "note")?),
            };
            let seconds = law.get("seconds").and_then(Value::as_f64);
            Some(Check { name: text(law, "name")?, seconds, outcome, known: false })
        };
        value.get("laws")?.as_array()?.iter().map(check).collect()
    }

    /// What the kills came to, as a check.
    pub(super) fn kills(rounds: u64, kills: &Kills) -> Check {
        let counts: Vec<_> = kills.counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        let note = format!(
            "{}; up again after {:.1} s at most",
            counts.join(", "),
            kills.slowest_restart.as_secs_f64()
        );
        let outcome = if kills.broken.is_empty() {
            Ok(note)
        } else {
            Err(format!("{}: {note}", kills.broken.join("; ")))
        };
        Check {
            name: format!("kill -9 under writes, {rounds} times"),
            seconds: Some(kills.seconds),
            outcome,
            known: false,
        }
    }

    /// The failures, one line each.
    pub(super) fn failures(&self) -> Vec<String> {
        let failed = self.checks.iter().filter(|check| check.failed());
        failed
            .filter_map(|check| {
                Some(format!("{}: {}: {}", self.kind.name(), check.name, check.outcome.as_ref().err()?))
            })
            .collect()
    }

    fn json(&self) -> Value {
        let checks: Vec<_> = self
            .checks
            .iter()
            .map(|check| {
                json!({"name": check.name, "ok": check.outcome.is_ok(), "known": check.known, "seconds": check.seconds,
                       "note": check.outcome.as_ref().ok(), "broke": check.outcome.as_ref().err()})
            })
            .collect();
        json!({"store": self.kind.name(), "package": self.kind.package(), "skipped": self.skipped,
               "seconds": self.seconds, "checks": checks})
    }
}

/// Everything as JSON.
pub(super) fn to_json(all: &[Checked]) -> Value {
    json!(all.iter().map(Checked::json).collect::<Vec<_>>())
}

/// Everything as Markdown: one row a check, one column a server; then the notes, and what broke.
pub(super) fn markdown(all: &[Checked]) -> String {
    let ran: Vec<&Checked> = all.iter().filter(|checked| checked.skipped.is_none()).collect();
    let mut header = vec!["check"];
    header.extend(ran.iter().map(|checked| checked.kind.package()));
    let mut table = Table::new(&header);
    let mut names = Vec::<&str>::new();
    for check in ran.iter().flat_map(|checked| &checked.checks) {
        if !names.contains(&check.name.as_str()) {
            names.push(&check.name);
        }
    }
    for name in names {
        let cell = |checked: &&Checked| {
            let check = checked.checks.iter().find(|check| check.name == name);
            check.map_or_else(|| "–".to_owned(), Check::cell)
        };
        let shown = if name.contains(' ') { name.to_owned() } else { format!("`{name}`") };
        table.row(std::iter::once(shown).chain(ran.iter().map(cell)).collect());
    }
    let total = ran.iter().map(|checked| format!("{:.0} s", checked.seconds));
    table.row(std::iter::once("all".to_owned()).chain(total).collect());
    let mut text = table.markdown();
    let noted =
        |check: &&Check| check.seconds.is_some() && check.outcome.as_ref().is_ok_and(|note| !note.is_empty());
    for checked in &ran {
        let notes: Vec<String> = checked
            .checks
            .iter()
            .filter(noted)
            .filter_map(|check| Some(format!("`{}` {}", check.name, check.outcome.as_ref().ok()?)))
            .collect();
        if !notes.is_empty() {
            text.push_str(&format!("\n{}: {}.\n", checked.kind.name(), notes.join("; ")));
        }
    }
    for (kind, why) in all.iter().filter_map(|checked| Some((checked.kind, checked.skipped.as_ref()?))) {
        text.push_str(&format!("\n{} was skipped: {why}\n", kind.name()));
    }
    let failures: Vec<_> = all.iter().flat_map(Checked::failures).collect();
    if !failures.is_empty() {
        text.push_str("\nWhat broke:\n\n");
    }
    for failure in failures {
        let mut line = failure.replace('\n', " ");
        if let Some((cut, _)) = line.char_indices().nth(LONGEST) {
            line.truncate(cut);
            line.push('…');
        }
        text.push_str(&format!("- {line}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_fails_nothing_and_is_said() {
        let printed = r#"{"ok": false, "laws": [
            {"name": "ranges", "ok": true, "seconds": 0.25, "note": "", "broke": null},
            {"name": "race", "ok": false, "seconds": 2.0, "note": null, "broke": "two winners"}]}"#;
        let mut checks = Checked::laws(printed).unwrap();
        let mut known = Check::new("a wrong key", Err("takes any key".into()));
        known.known = true;
        checks.push(known);
        let all = [
            Checked { kind: Kind::Moto, checks, skipped: None, seconds: 3.0 },
            Checked {
                kind: Kind::Azurite,
                checks: Vec::new(),
                skipped: Some("no node".into()),
                seconds: 0.0,
            },
        ];
        assert_eq!(all[0].failures(), ["moto: race: two winners"]);
        let text = markdown(&all);
        for part in
            ["ok, 0.2 s", "**BROKE**, 2.0 s", "takes any key", "azurite was skipped: no node", "- moto: race"]
        {
            assert!(text.contains(part), "no `{part}` in {text}");
        }
        assert!(Checked::laws("{}").is_none());
    }
}
