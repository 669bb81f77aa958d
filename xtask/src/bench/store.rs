//! `bench store`: a train state saved, loaded and staged by our store and by others, and the memory that ours takes.

use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Program, load, machine, s3, section};
use crate::args::Args;
use crate::python::Python;
use crate::stop::{Result, Stop};
use crate::table::Table;
use crate::workspace::Context;

/// How many times as long as a raw write a save may take.
const SAVE: f64 = 1.4;
/// How many times as fast as that of torch.distributed.checkpoint a load must be.
const LOAD: f64 = 3.0;
/// How many times as long as a copy training may stop.
const STALL: f64 = 1.2;
/// MiB beyond the window.
const MEMORY: f64 = 64.0;

pub(super) fn command(context: &Context, mut args: Args) -> Result<()> {
    if args.flag("--s3") {
        return s3::command(context, args);
    }
    let (mib, runs) = (args.number("--mib")?.unwrap_or(1024), args.number("--runs")?.unwrap_or(5));
    let gib = args.number("--peak-gib")?.unwrap_or(0);
    let (python, check) = (args.flag("--python"), args.flag("--check"));
    let out = args.value("--out")?.map(PathBuf::from);
    args.finish()?;
    if runs == 0 {
        return Err(Stop::Usage("`--runs` wants a number from 1".to_owned()));
    }
    let python = if python { Some(Python::prepare(context, false)?) } else { None };
    let program = Program::build(context)?;
    let load = load();
    let mut arguments: Vec<OsString> = vec!["store".into(), "--scratch".into(), (&program.scratch).into()];
    for (option, number) in [("--mib", mib), ("--runs", runs), ("--peak-gib", gib)] {
        arguments.extend([option.into(), number.to_string().into()]);
    }
    if let Some(python) = &python {
        arguments.extend(["--python".into(), python.interpreter().into()]);
        arguments.extend(["--script".into(), python.path("bench_store.py").into()]);
    }
    context.say(format!("measuring saves, loads and stalls of {mib} MiB"));
    let measured = program.run(context, &arguments)?;
    let report = Report::parse(&measured)?;
    let verdict = report.verdict();
    let flags = if python.is_some() { " --python" } else { "" };
    let flags = if gib > 0 { format!("{flags} --peak-gib {gib}") } else { flags.to_owned() };
    let text = format!(
        "Measured by `cargo xtask bench store --mib {mib} --runs {runs}{flags}` on {}{load}.{} {}\n\n{}\n\n{}",
        machine(),
        packages(&measured["versions"]),
        ABOUT,
        verdict.iter().map(|(_, line)| format!("- {line}")).collect::<Vec<_>>().join("\n"),
        report.tables()
    );
    let pass = verdict.iter().all(|(pass, _)| *pass);
    let lines: Vec<&str> = verdict.iter().map(|(_, line)| line.as_str()).collect();
    context.say(format!("\n{text}"));
    context.emit(&json!({"machine": machine(), "measured": measured, "pass": pass, "verdict": lines}));
    if let Some(path) = out {
        section::write(&path, "bench-store", &text)?;
    }
    if check && !pass { Err(Stop::failed("the verdict is FAIL")) } else { Ok(()) }
}

const ABOUT: &str = "The state is that of a transformer with two moments of Adam: 291 fp32 tensors of random bits, in \
memory that was touched before. All ways take turns in every round, and who begins changes; seconds are medians, and ratios \
are medians of the ratios within a round (least to most). A save ends when the bytes, and their folder where the package \
allows it, are synced. A load begins with a warm page cache and ends with every byte in memory that the caller owns and has \
touched before. Ours takes digests when it saves and checks every byte when it loads; the others check none. \
torch.distributed.checkpoint (DCP) runs as one process without a process group, with its default writer.";

/// How a way is called in a table.
const NAMES: [(&str, &str, &str, &str); 18] = [
    ("save", "rust", "raw", "raw write of 8 MiB pieces + fsync"),
    ("save", "rust", "safetensors", "safetensors (Rust) + fsync"),
    ("save", "rust", "ours-1", "ours, 1 thread"),
    ("save", "rust", "ours-2", "ours, 2 threads"),
    ("save", "python", "torch", "torch.save + fsync"),
    ("save", "python", "safetensors", "safetensors (Python) + fsync"),
    ("save", "python", "dcp", "DCP save (fsync)"),
    ("load", "rust", "memcpy", "copy in memory, 1 thread"),
    ("load", "rust", "raw", "raw read of 8 MiB pieces, 1 thread"),
    ("load", "rust", "safetensors", "safetensors (Rust): read into kept memory, copy"),
    ("load", "rust", "ours", "ours, verified, 8 tensors at once"),
    ("load", "python", "torch", "torch.load, copy"),
    ("load", "python", "torch-mmap", "torch.load(mmap=True), copy"),
    ("load", "python", "safetensors", "safetensors (Python): mmap, copy"),
    ("load", "python", "dcp", "DCP load"),
    ("stall", "rust", "memcpy", "copy into kept memory, 1 thread"),
    ("stall", "rust", "ours", "ours: `BackgroundSaver::save`, buffers kept"),
    ("stall", "python", "dcp", "DCP async_save, default (a fresh copy)"),
];

fn packages(versions: &Value) -> String {
    match (versions["torch"].as_str(), versions["safetensors"].as_str()) {
        (Some(torch), Some(safetensors)) => format!(
            " Python: torch {torch}, which copies fastest here with {} thread(s), safetensors {safetensors}.",
            versions["threads"]
        ),
        _ => String::new(),
    }
}

/// One way of one group.
struct Row {
    group: String,
    by: String,
    way: String,
    seconds: Vec<f64>,
}

impl Row {
    fn name(&self) -> String {
        let found = NAMES.iter().find(|(group, by, way, _)| {
            (*group, *by, *way) == (self.group.as_str(), self.by.as_str(), self.way.as_str())
        });
        match (found, self.way.as_str()) {
            (Some((.., name)), _) => (*name).to_owned(),
            (None, "dcp-cached") => "DCP async_save, cached un-pinned stager".to_owned(),
            (None, way) => format!("{way} ({})", self.by),
        }
    }
}

/// What a save or a load of ours takes beyond a state that is not in memory.
struct Peak {
    direction: String,
    gib: f64,
    largest_mib: f64,
    window: f64,
    extra: f64,
    speed: f64,
}

struct Report {
    bytes: f64,
    rows: Vec<Row>,
    peak: Vec<Peak>,
}

impl Report {
    fn parse(measured: &Value) -> Result<Self> {
        let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let rows = measured["rows"].as_array().into_iter().flatten().map(|row| {
            let seconds: Vec<f64> =
                row["seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
            if seconds.is_empty() || seconds.iter().any(|seconds| *seconds <= 0.0) {
                return Err(Stop::failed(format!("a way was not timed: {row}")));
            }
            Ok(Row { group: text(row, "group"), by: text(row, "by"), way: text(row, "way"), seconds })
        });
        let peak = measured["peak"].as_array().into_iter().flatten().map(|row| {
            let number = |key: &str| {
                row[key].as_f64().ok_or_else(|| {
                    Stop::Skipped(format!("`{key}` is not told: this system may not show memory"))
                })
            };
            Ok(Peak {
                direction: text(row, "direction"),
                gib: number("bytes")? / f64::from(1 << 30),
                largest_mib: number("largest")? / f64::from(1 << 20),
                window: number("window_mib")?,
                extra: number("extra_mib")?,
                speed: number("gbps")?,
            })
        });
        let bytes = measured["bytes"].as_f64().ok_or_else(|| Stop::failed("the state's size is not told"))?;
        Ok(Self { bytes, rows: rows.collect::<Result<_>>()?, peak: peak.collect::<Result<_>>()? })
    }

    fn row(&self, group: &str, by: &str, way: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.group == group && row.by == by && row.way == way)
    }

    /// A line of the verdict for one or more ways of ours and one of another: whether the best of ours takes at most
    /// `most` times as long. Nothing if the other was not measured.
    fn bar(&self, group: &str, ours: &[&str], by: &str, way: &str, most: f64) -> Option<(bool, String)> {
        let other = self.row(group, by, way)?;
        let ours = ours.iter().filter_map(|way| self.row(group, "rust", way));
        let (ratio, name) = ours
            .map(|ours| (ratios(&ours.seconds, &other.seconds)[1], ours.name()))
            .min_by(|left, right| left.0.total_cmp(&right.0))?;
        let pass = ratio <= most;
        let word = if pass { "PASS" } else { "FAIL" };
        let line = format!("{word}: {group}: {name} takes {ratio:.2} × {} (at most {most:.2})", other.name());
        Some((pass, line))
    }

    fn verdict(&self) -> Vec<(bool, String)> {
        let saves = ["ours-1", "ours-2"];
        let bars = [
            self.bar("save", &saves, "rust", "raw", SAVE),
            self.bar("save", &saves, "rust", "safetensors", 1.0),
            self.bar("save", &saves, "python", "safetensors", 1.0),
            self.bar("load", &["ours"], "rust", "safetensors", 1.0),
            self.bar("load", &["ours"], "python", "safetensors", 1.0),
            self.bar("load", &["ours"], "python", "dcp", 1.0 / LOAD),
            self.bar("stall", &["ours"], "rust", "memcpy", STALL),
            self.bar("stall", &["ours"], "python", "dcp-cached", 1.0),
        ];
        let peaks = self.peak.iter().map(|peak| {
            let (allowed, pass) = (peak.window + MEMORY, peak.extra <= peak.window + MEMORY);
            let word = if pass { "PASS" } else { "FAIL" };
            let Peak { direction, gib, extra, .. } = peak;
            (pass, format!("{word}: memory: a {direction} of {gib:.1} GiB takes {extra:.1} MiB (at most {allowed:.0})"))
        });
        bars.into_iter().flatten().chain(peaks).collect()
    }

    fn tables(&self) -> String {
        let mut text = String::new();
        for (group, ours, base, title) in [
            ("save", "ours-1", "raw", "Save, durable"),
            ("load", "ours", "raw", "Load into memory of the caller"),
            ("stall", "ours", "memcpy", "How long training stops for a save in the background"),
        ] {
            let against = |way: &str| self.row(group, "rust", way);
            let (against_ours, against_base) = (against(ours), against(base));
            let base = against_base.map_or_else(|| base.to_owned(), Row::name);
            let mut table = Table::new(&["way", "s", "least s", "GB/s", &format!("× {base}"), "× ours"]);
            for row in self.rows.iter().filter(|row| row.group == group) {
                let [least, middle, _] = spread(&row.seconds);
                let shown = |other: Option<&Row>| match other {
                    Some(other) if !std::ptr::eq(other, row) => {
                        let [least, middle, most] = ratios(&row.seconds, &other.seconds);
                        format!("{middle:.2} ({least:.2}–{most:.2})")
                    }
                    Some(_) | None => "1".to_owned(),
                };
                table.row(vec![
                    row.name(),
                    format!("{middle:.3}"),
                    format!("{least:.3}"),
                    format!("{:.2}", self.bytes / 1e9 / middle),
                    shown(against_base),
                    shown(against_ours),
                ]);
            }
            text.push_str(&format!("{title}:\n\n{}\n", table.markdown()));
        }
        if !self.peak.is_empty() {
            let mut table = Table::new(&[
                "direction",
                "state GiB",
                "largest tensor MiB",
                "window MiB",
                "extra MiB",
                "GB/s",
            ]);
            for peak in &self.peak {
                let numbers = [peak.gib, peak.largest_mib, peak.window, peak.extra];
                let cells = numbers.iter().map(|number| format!("{number:.1}"));
                let cells = std::iter::once(peak.direction.clone()).chain(cells);
                table.row(cells.chain([format!("{:.2}", peak.speed)]).collect());
            }
            text.push_str(&format!(
                "Memory beyond the state, which is made while it is saved and read box by box into one buffer that \
                 counts:\n\n{}",
                table.markdown()
            ));
        }
        text
    }
}

/// How many times as long one way takes as the other, round by round: least, median, most.
pub(super) fn ratios(row: &[f64], other: &[f64]) -> [f64; 3] {
    let each: Vec<f64> = row.iter().zip(other).map(|(row, other)| row / other).collect();
    spread(&each)
}

/// Least, median, most.
pub(super) fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
    let middle = f64::midpoint(at(sorted.len().saturating_sub(1) / 2), at(sorted.len() / 2));
    [at(0), middle, at(sorted.len().saturating_sub(1))]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(ours: &[f64], python: bool) -> Value {
        let row = |group: &str, by: &str, way: &str, seconds: &[f64]| json!({"group": group, "by": by, "way": way, "seconds": seconds});
        let mut rows = vec![
            row("save", "rust", "raw", &[1.0, 2.0, 1.0]),
            row("save", "rust", "ours-1", &[9.0, 9.0, 9.0]),
            row("save", "rust", "ours-2", ours),
            row("load", "rust", "memcpy", &[0.1, 0.1, 0.1]),
            row("load", "rust", "ours", &[0.2, 0.2, 0.2]),
        ];
        if python {
            rows.push(row("load", "python", "dcp", &[0.5, 0.9, 0.7]));
        }
        let peak = json!([{"direction": "save", "bytes": 8u64 << 30, "largest": 300 << 20, "window_mib": 64,
                           "gbps": 1.0, "extra_mib": 129.0}]);
        json!({"bytes": 1e9, "rows": rows, "peak": peak})
    }

    #[test]
    fn rounds_are_compared_and_the_bars_hold() {
        let verdict = |ours: &[f64], python| {
            let lines = Report::parse(&measured(ours, python)).unwrap().verdict();
            lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>()
        };
        // By the medians it would be 1.5; round by round it is 1.4, 0.8 and 1.5.
        assert_eq!(
            verdict(&[1.4, 1.6, 1.5], true),
            [
                "PASS: save: ours, 2 threads takes 1.40 × raw write of 8 MiB pieces + fsync (at most 1.40)",
                "PASS: load: ours, verified, 8 tensors at once takes 0.29 × DCP load (at most 0.33)",
                "FAIL: memory: a save of 8.0 GiB takes 129.0 MiB (at most 128)",
            ]
        );
        assert!(verdict(&[1.5, 3.2, 1.5], false)[0].starts_with("FAIL: save: ours, 2 threads takes 1.50"));
        assert_eq!(verdict(&[1.0, 1.0, 1.0], false).len(), 2, "nothing is said of what was not measured");
        let text = Report::parse(&measured(&[1.0, 1.0, 1.0], true)).unwrap().tables();
        assert!(text.contains("| ours, 2 threads"), "{text}");
        assert!(text.contains("0.11 (0.11–0.11)"), "{text}");
        assert!(Report::parse(&measured(&[], true)).is_err());
        assert!(Report::parse(&measured(&[0.0], true)).is_err());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(spread(&[4.0, 1.0, 3.0, 2.0]), [1.0, 2.5, 4.0]);
        assert_eq!(spread(&[7.0]), [7.0, 7.0, 7.0]);
        assert!(spread(&[])[1].is_nan());
    }
}
