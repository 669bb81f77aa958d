//! What was measured on one pair, and whether our best codec beats the others.

use serde_json::Value;

use super::pairs::Pair;
use crate::stop::{Result, Stop};

/// Whose codec it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum By {
    Towline,
    Peer,
    Python,
}

/// A codec as the tables name it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Codec {
    pub(super) by: By,
    pub(super) id: String,
}

impl Codec {
    pub(super) fn ours(id: &str) -> Self {
        Self { by: By::Towline, id: id.to_owned() }
    }

    pub(super) fn python(id: &str) -> Self {
        Self { by: By::Python, id: id.to_owned() }
    }

    pub(super) fn shown(&self) -> String {
        match self.by {
            By::Towline | By::Peer => self.id.clone(),
            By::Python => format!("{}, Python", self.id),
        }
    }
}

/// One codec on one number of threads. Speeds are GB of plain weights per second.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) codec: Codec,
    pub(super) threads: u64,
    pub(super) encoded: f64,
    pub(super) encode: Speed,
    pub(super) decode: Speed,
    pub(super) extra_mib: Option<f64>,
}

/// How fast it was.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    pub(super) gbps: f64,
    /// With the digests that our codecs take within their time, for a peer, which takes none.
    pub(super) checked: Option<f64>,
    /// Of the scan or the copy that ran beside it.
    pub(super) physics: Option<f64>,
}

/// One pair.
#[derive(Debug, Clone)]
pub(super) struct Report {
    pub(super) name: String,
    pub(super) raw: f64,
    pub(super) changed: Option<f64>,
    pub(super) floor: Option<f64>,
    pub(super) manifest: Option<f64>,
    pub(super) rows: Vec<Row>,
    pub(super) machine: Vec<Machine>,
    /// What could not be measured, and why.
    pub(super) failed: Vec<(String, String)>,
    pub(super) json: Value,
}

/// What the machine did with so many threads.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) threads: u64,
    /// The speed of a scan and of a copy, in GB/s.
    pub(super) scan: f64,
    pub(super) copy: f64,
    /// Of a core, in GHz.
    pub(super) clock: f64,
}

impl Report {
    /// Reads what the measuring program printed, with the rows of Python behind its own.
    pub(super) fn parse(pair: &Pair, mut json: Value) -> Result<Self> {
        let about = &json["pair"];
        let raw = number(about, "raw_bytes")?;
        let mut report = Self {
            name: pair.name.clone(),
            raw,
            changed: about["changed"].as_f64().zip(about["elements"].as_f64()).map(|(some, all)| some / all),
            floor: about["floor_bytes"].as_f64(),
            manifest: about["manifest_bytes"].as_f64(),
            rows: Vec::new(),
            machine: Vec::new(),
            failed: Vec::new(),
            json: Value::Null,
        };
        for row in json["rows"].as_array().into_iter().flatten() {
            let id = row["codec"].as_str().unwrap_or("?");
            let by = match row["by"].as_str() {
                _ if row["error"].is_string() => {
                    report.failed.push((id.to_owned(), row["error"].as_str().unwrap_or("?").to_owned()));
                    continue;
                }
                Some("machine") => {
                    let threads = row["threads"].as_u64().unwrap_or(1);
                    report.machine.push(Machine {
                        threads,
                        scan: number(row, "scan_gbps")?,
                        copy: number(row, "memcpy_gbps")?,
                        clock: number(row, "clock_ghz")?,
                    });
                    continue;
                }
                Some("towline") => By::Towline,
                Some("peer") => By::Peer,
                Some("python") => By::Python,
                other => return Err(Stop::failed(format!("a row is by {other:?}"))),
            };
            let speed = |what: &str, physics: &str| -> Result<Speed> {
                Ok(Speed {
                    gbps: number(row, &format!("{what}_gbps"))?,
                    checked: row[format!("{what}_checked_gbps")].as_f64().filter(|_| by == By::Peer),
                    physics: row[physics].as_f64(),
                })
            };
            report.rows.push(Row {
                codec: Codec { by, id: id.to_owned() },
                threads: row["threads"].as_u64().unwrap_or(1),
                encoded: number(row, "encoded_bytes")?,
                encode: speed("encode", "scan_gbps")?,
                decode: speed("decode", "memcpy_gbps")?,
                extra_mib: row["extra_mib"].as_f64(),
            });
        }
        if report.rows.is_empty() && report.failed.is_empty() {
            return Err(Stop::failed(format!("nothing was measured on {}", report.name)));
        }
        json["name"] = pair.name.clone().into();
        report.json = json;
        Ok(report)
    }

    /// The codecs in the order of the tables.
    pub(super) fn codecs(&self) -> Vec<Codec> {
        let mut codecs: Vec<Codec> = Vec::new();
        for row in &self.rows {
            if !codecs.contains(&row.codec) {
                codecs.push(row.codec.clone());
            }
        }
        codecs.sort_by_key(|codec| codec.by);
        codecs
    }

    /// The encoded bytes of a codec. They do not depend on threads, except with the Python package, whose smallest counts.
    pub(super) fn encoded(&self, codec: &Codec) -> Option<f64> {
        let rows = self.rows.iter().filter(|row| row.codec == *codec);
        rows.map(|row| row.encoded).min_by(f64::total_cmp)
    }

    pub(super) fn row(&self, codec: &Codec, threads: u64) -> Option<&Row> {
        self.rows.iter().find(|row| row.codec == *codec && row.threads == threads)
    }

    pub(super) fn threads(&self) -> Vec<u64> {
        let mut threads: Vec<u64> = self.rows.iter().map(|row| row.threads).collect();
        threads.sort_unstable();
        threads.dedup();
        threads
    }
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key]
        .as_f64()
        .filter(|number| number.is_finite())
        .ok_or_else(|| Stop::failed(format!("a row of the benchmark has no number `{key}`")))
}

/// Whether the best codec is what it should be.
#[derive(Debug, PartialEq)]
pub(super) struct Verdict {
    pub(super) pass: bool,
    pub(super) lines: Vec<String>,
}

/// How much memory a codec may take beyond the checkpoints, for each thread.
const MEMORY_MIB: f64 = 64.0;

/// Smaller than every codec of others in every row, and within its memory.
pub(super) fn verdict(best: &str, reports: &[Report]) -> Verdict {
    let ours = Codec::ours(best);
    let (mut lost, mut closest) = (Vec::new(), None::<(f64, String)>);
    for report in reports {
        let rivals = report.codecs().into_iter().filter(|codec| codec.by != By::Towline);
        let rival = rivals
            .filter_map(|codec| Some((report.encoded(&codec)?, codec.shown())))
            .min_by(|left, right| left.0.total_cmp(&right.0));
        match (report.encoded(&ours), rival) {
            (None, _) => lost.push(format!("{} was not measured", report.name)),
            (Some(_), None) => lost.push(format!("{} has nobody to beat", report.name)),
            (Some(size), Some((other, codec))) => {
                let share = size / other;
                let words = format!("{:.3} of {codec} on {}", share, report.name);
                if size >= other {
                    lost.push(words.clone());
                }
                if closest.as_ref().is_none_or(|(most, _)| share > *most) {
                    closest = Some((share, words));
                }
            }
        }
    }
    let count = reports.len();
    let sizes = match (lost.as_slice(), closest) {
        ([], Some((_, words))) => {
            format!(
                "PASS: {best} is smaller than every peer in every row ({count} of {count}; closest: {words})"
            )
        }
        (lost, _) => format!(
            "FAIL: {best} is not smaller than every peer in {} of {count} rows: {}",
            lost.len(),
            lost.join("; ")
        ),
    };
    let pass = lost.is_empty() && count > 0;
    let rows = reports.iter().flat_map(|report| &report.rows).filter(|row| row.codec == ours);
    let most = rows.filter_map(|row| Some(row.extra_mib? / row.threads.max(1) as f64)).max_by(f64::total_cmp);
    let memory = most.map(|most| {
        let word = if most <= MEMORY_MIB { "PASS" } else { "FAIL" };
        (most <= MEMORY_MIB, format!("{word}: {best} takes at most {most:.1} MiB a thread beyond the checkpoints ({MEMORY_MIB:.0} allowed)"))
    });
    let (fits, memory) = memory.map_or((true, None), |(fits, line)| (fits, Some(line)));
    Verdict { pass: pass && fits, lines: std::iter::once(sizes).chain(memory).collect() }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    pub(in super::super) fn report(name: &str, sizes: &[(&str, &str, u64)], delta: bool) -> Report {
        let row = |by: &str, id: &str, bytes: u64, threads: u64| {
            json!({"codec": id, "by": by, "threads": threads, "encoded_bytes": bytes, "raw_bytes": 1000,
                   "encode_gbps": 2.0 * threads as f64, "encode_checked_gbps": 1.5, "scan_gbps": 8.0,
                   "decode_gbps": 4.0 * threads as f64, "memcpy_gbps": 16.0, "extra_mib": 10.0})
        };
        let mut rows: Vec<Value> = sizes
            .iter()
            .flat_map(|(by, id, bytes)| [row(by, id, *bytes, 1), row(by, id, *bytes, 2)])
            .collect();
        rows.push(
            json!({"codec": "machine", "by": "machine", "threads": 1, "scan_gbps": 8.0, "memcpy_gbps": 16.0, "clock_ghz": 2.5}),
        );
        let about = if delta {
            json!({"raw_bytes": 1000, "floor_bytes": 40.0, "changed": 5, "elements": 500})
        } else {
            json!({"raw_bytes": 1000})
        };
        let parent = delta.then(|| PathBuf::from("a"));
        let pair = Pair { name: name.to_owned(), parent, current: PathBuf::from("b"), delta: None };
        Report::parse(&pair, json!({"pair": about, "rows": rows})).unwrap()
    }

    #[test]
    fn the_best_must_win_everywhere() {
        let won = report(
            "won",
            &[("towline", "octave", 50), ("peer", "pcodec", 60), ("python", "arc_v3", 70)],
            true,
        );
        let verdict = |reports: &[Report]| verdict("octave", reports);
        let passed = verdict(std::slice::from_ref(&won));
        assert!(passed.pass, "{passed:?}");
        assert_eq!(
            passed.lines,
            [
                "PASS: octave is smaller than every peer in every row (1 of 1; closest: 0.833 of pcodec on won)",
                "PASS: octave takes at most 10.0 MiB a thread beyond the checkpoints (64 allowed)"
            ]
        );
        // An equal size is no win, a codec of ours is no rival, a missing one is no win either.
        let even = report("even", &[("towline", "octave", 60), ("peer", "pcodec", 60)], true);
        let python = report("python", &[("towline", "octave", 71), ("python", "arc_v3", 70)], true);
        let missing = report("missing", &[("towline", "zstd", 1), ("peer", "pcodec", 60)], true);
        let failed = verdict(&[won.clone(), even, python, missing]);
        assert!(!failed.pass);
        assert!(failed.lines[0].starts_with("FAIL: octave is not smaller than every peer in 3 of 4 rows: 1.000 of pcodec on even; 1.014 of arc_v3, Python on python; missing was not measured"), "{failed:?}");
        let own = report(
            "own",
            &[("towline", "octave", 60), ("towline", "zstd", 50), ("peer", "pcodec", 61)],
            true,
        );
        assert!(verdict(&[own]).pass);
        assert!(!verdict(&[report("alone", &[("towline", "octave", 60)], true)]).pass);
        assert!(!verdict(&[]).pass);
        let mut greedy = won;
        greedy.rows[0].extra_mib = Some(65.0);
        assert!(!verdict(&[greedy]).pass);
    }

    #[test]
    fn rows_that_failed_are_kept_and_broken_ones_refused() {
        let pair = Pair { name: "p".into(), parent: None, current: PathBuf::new(), delta: None };
        let parse = |rows: Value| Report::parse(&pair, json!({"pair": {"raw_bytes": 9}, "rows": rows}));
        let report = parse(json!([{"codec": "a", "by": "peer", "error": "why"}])).unwrap();
        assert_eq!(report.failed, [("a".to_owned(), "why".to_owned())]);
        assert!(parse(json!([])).is_err());
        assert!(parse(json!([{"codec": "a", "by": "peer", "threads": 1}])).is_err());
        assert!(parse(json!([{"codec": "a", "by": "nobody"}])).is_err());
    }
}
