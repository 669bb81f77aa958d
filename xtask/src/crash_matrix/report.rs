//! Figures as a table.

use serde_json::{Value, json};

use crate::real_stores::SeaweedFs;
use crate::table::Table;

/// What came of one part. It held: a breach would have ended it.
#[derive(Debug)]
pub(super) struct Row {
    part: String,
    figures: Value,
}

impl Row {
    pub(super) fn new(part: &str, figures: Value) -> Self {
        Self { part: part.to_owned(), figures }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({"part": self.part, "figures": self.figures})
    }

    /// A figure, wherever it stands.
    fn number(&self, what: &str) -> u64 {
        let found = self.figures.get(what).or_else(|| self.figures.get("totals")?.get(what));
        found.and_then(Value::as_u64).unwrap_or(0)
    }

    fn seconds(&self) -> f64 {
        self.figures.get("seconds").and_then(Value::as_f64).unwrap_or(0.0)
    }

    fn what(&self) -> String {
        match self.part.as_str() {
            "simulated" => "simulated crash, faults and damage; in memory".to_owned(),
            "local" => "the same on a folder".to_owned(),
            "s3" => format!("the same on {}", SeaweedFs::package()),
            "sigkill" => "SIGKILL of the process; on a folder".to_owned(),
            _ => format!("`kill -9` of {}", SeaweedFs::package()),
        }
    }

    fn how_often(&self) -> String {
        match self.part.as_str() {
            "sigkill" => format!("{} random instants", self.number("kills")),
            "server" => format!("{} restarts", self.number("kills")),
            _ => {
                let (lives, points) = (self.number("lives"), self.number("points"));
                let seeds = self.number("seeds");
                if lives == seeds * points {
                    format!("{seeds} seeds × {points} points")
                } else {
                    format!("{seeds} seeds, {} points each", lives / seeds.max(1))
                }
            }
        }
    }

    fn deaths(&self) -> String {
        match self.part.as_str() {
            "sigkill" | "server" => grouped(self.number("kills")),
            _ => format!(
                "{} of {}, {} or more at each point",
                grouped(self.number("died")),
                grouped(self.number("lives")),
                self.number("least deaths at a point")
            ),
        }
    }
}

/// All rows, and what the model says.
pub(super) fn markdown(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "what",
        "how often",
        "deaths",
        "died pruning",
        "faults",
        "acknowledged",
        "lost",
        "partial and visible",
        "needed and deleted",
        "seconds",
    ]);
    for row in rows.iter().filter(|row| row.part != "model") {
        let figure = |what: &str| grouped(row.number(what));
        let faults = if row.part == "server" { figure("failed calls") } else { figure("faults") };
        let pruning = if row.part == "server" { "–".to_owned() } else { figure("died pruning") };
        table.row(vec![
            row.what(),
            row.how_often(),
            row.deaths(),
            pruning,
            if row.part == "sigkill" { "–".to_owned() } else { faults },
            figure("acknowledged"),
            "0".to_owned(),
            "0".to_owned(),
            "0".to_owned(),
            format!("{:.0}", row.seconds()),
        ]);
    }
    let mut text = table.markdown();
    for row in rows {
        let figure = |what: &str| grouped(row.number(what));
        let note = match row.part.as_str() {
            "model" => format!(
                "The model agreed in {} runs of 30 to 60 operations: {} snapshots given up, {} deleted, {} calls of fenced writers, {} restores by readers.",
                figure("cases"),
                figure("given up"),
                figure("deleted"),
                figure("fenced"),
                grouped(row.number("read") + row.number("read when given up"))
            ),
            "server" => format!(
                "SeaweedFS was away for {:.1} s at most. {} calls failed and were tried again; {} saves had landed although their answer was lost. In the end {} snapshots were live and {} given up.",
                row.figures.get("longest restart").and_then(Value::as_f64).unwrap_or(0.0),
                figure("failed calls"),
                figure("found after an error"),
                figure("live"),
                figure("given up")
            ),
            "simulated" | "local" | "s3" => format!(
                "{}: {} commits landed without an acknowledgement and were whole; {} snapshots were given up by the dead and deleted by the living, with {} folders that never became a snapshot; reads with damage alone gave {} errors `corrupt`, {} times the right bytes, and never others.",
                row.what(),
                figure("committed, not acknowledged"),
                figure("given up before, deleted after"),
                figure("orphans"),
                grouped(row.number("corrupt") + row.number("corrupt heads")),
                grouped(row.number("right") + row.number("right in spite of damage"))
            ),
            _ => continue,
        };
        let mut signs = note.chars();
        let first = signs.next().map(|sign| sign.to_uppercase().collect::<String>()).unwrap_or_default();
        text.push_str(&format!("\n{first}{}\n", signs.as_str()));
    }
    text
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_from_where_they_stand() {
        let points = json!({"seeds": 5, "points": 338, "lives": 1690, "died": 1234, "least deaths at a point": 3,
            "acknowledged": 1_234_567, "seconds": 3.4, "corrupt": 1, "corrupt heads": 2});
        let killed = json!({"seconds": 1.0, "totals": {"kills": 7, "died pruning": 2}});
        let rows = [Row::new("local", points), Row::new("sigkill", killed)];
        let text = markdown(&rows);
        for part in [
            "5 seeds × 338 points",
            "1,234 of 1,690, 3 or more",
            "1,234,567",
            "7 random instants",
            "3 errors",
        ] {
            assert!(text.contains(part), "no `{part}` in {text}");
        }
        assert_eq!(rows[1].number("died pruning"), 2);
        assert_eq!(grouped(999), "999");
    }
}
