//! The tables: sizes, speeds of each pair, and ours against the Python packages.

use super::packages;
use super::report::{By, Codec, Report, Row, Speed, Verdict};
use crate::table::Table;

/// Everything that a run has to say, as Markdown.
pub(super) fn all(caption: &str, best: &str, reports: &[Report], verdict: &Verdict) -> String {
    let mut text = format!("{caption}{}\n\n", packages(reports));
    for line in &verdict.lines {
        text.push_str(&format!("- {line}\n"));
    }
    for report in reports {
        for (codec, why) in &report.failed {
            text.push_str(&format!("- FAIL: {codec} could not be measured on {}: {why}\n", report.name));
        }
    }
    text.push_str(
        "\n**Sizes**, in % of the plain weights. Ours are whole files with names, index and digests; of the others the \
         payload alone counts. The floor is what an ideal coder needs that knows the old weights and, for each of their \
         exponents, how often they change and by which steps; it is far too low where nearly every step is another one \
         (32-bit deltas). The smallest is bold.\n\n",
    );
    text.push_str(&sizes(best, reports).markdown());
    text.push_str(
        "\n**Speeds**, in GB of plain weights a second, of each pair. Ours take the digests of the new \
         weights, and check them when they decode, within that time (a parent's are known from the step before); in \
         parentheses the others with the same digests taken. Decoding applies in place. Scan compares both checkpoints, \
         memcpy copies one, on the same buffers beside each run. The clock is what a chain of dependent instructions gets \
         of a core just before each run: on a shared machine a neighbour takes its part. Memory is the peak beyond the \
         checkpoints.\n",
    );
    for report in reports {
        text.push_str(&format!("\n{}, {:.1} MB", report.name, report.raw / 1e6));
        if let Some(manifest) = report.manifest {
            text.push_str(&format!("; a manifest beside our file has {:.1} kB", manifest / 1e3));
        }
        for machine in &report.machine {
            let (threads, clock) = (machine.threads, machine.clock);
            text.push_str(&format!("; {clock:.2} GHz beside {threads} thread(s)"));
        }
        text.push_str(&format!(":\n\n{}", speeds(report).markdown()));
    }
    let against = against_python(best, reports);
    if let Some(table) = against {
        text.push_str("\n**Against Python**: ours divided by the package's, in the same run.\n\n");
        text.push_str(&table.markdown());
    }
    text
}

/// The sizes of one pair, smallest first, so that a long run tells something before its end.
pub(super) fn line(report: &Report) -> String {
    let mut sizes: Vec<(f64, String)> =
        report.codecs().iter().filter_map(|codec| Some((report.encoded(codec)?, codec.shown()))).collect();
    sizes.extend(report.floor.map(|floor| (floor, "floor".to_owned())));
    sizes.sort_by(|left, right| left.0.total_cmp(&right.0));
    let sizes: Vec<_> =
        sizes.iter().map(|(size, name)| format!("{name} {}", percent(*size, report))).collect();
    sizes.join(", ")
}

/// One row for each pair, one column for each codec.
fn sizes(best: &str, reports: &[Report]) -> Table {
    let ours = Codec::ours(best);
    let mut codecs: Vec<Codec> = Vec::new();
    for codec in reports.iter().flat_map(Report::codecs) {
        if codec != ours && !codecs.contains(&codec) {
            codecs.push(codec);
        }
    }
    codecs.sort_by_key(|codec| codec.by);
    codecs.insert(0, ours.clone());
    let against = format!("{best} / floor");
    let mut header = vec!["pair".to_owned(), "changed %".to_owned(), "floor %".to_owned(), against];
    header.extend(codecs.iter().map(Codec::shown));
    let mut table = Table::new(&header.iter().map(String::as_str).collect::<Vec<_>>());
    for report in reports {
        let floor = report.floor.filter(|floor| *floor > 0.0);
        let above = report.encoded(&ours).zip(floor).map(|(size, floor)| format!("{:.3}", size / floor));
        let mut cells = vec![
            report.name.clone(),
            report.changed.map_or_else(dash, |share| format!("{:.3}", 100.0 * share)),
            report.floor.map_or_else(dash, |floor| percent(floor, report)),
            above.unwrap_or_else(dash),
        ];
        let found: Vec<Option<f64>> = codecs.iter().map(|codec| report.encoded(codec)).collect();
        let least = found.iter().flatten().copied().min_by(f64::total_cmp);
        cells.extend(found.into_iter().map(|size| match size {
            None => dash(),
            Some(size) if Some(size) == least => format!("**{}**", percent(size, report)),
            Some(size) => percent(size, report),
        }));
        table.row(cells);
    }
    table
}

/// One row for each codec, and two for the machine.
fn speeds(report: &Report) -> Table {
    let threads = report.threads();
    let mut header = vec!["codec".to_owned(), "size %".to_owned()];
    for what in ["encode", "decode", "encode / scan", "decode / memcpy", "MiB"] {
        header.extend(threads.iter().map(|threads| format!("{what}, {threads}t")));
    }
    let mut table = Table::new(&header.iter().map(String::as_str).collect::<Vec<_>>());
    let groups = |name: String, size: String, cell: &dyn Fn(usize, u64) -> String| {
        let mut cells = vec![name, size];
        for group in 0..5 {
            cells.extend(threads.iter().map(|threads| cell(group, *threads)));
        }
        cells
    };
    for codec in report.codecs() {
        let size = report.encoded(&codec).map_or_else(dash, |size| percent(size, report));
        let cell = |group: usize, threads: u64| {
            let Some(row) = report.row(&codec, threads) else { return dash() };
            let share = |speed: Speed| {
                let share =
                    speed.physics.filter(|physics| *physics > 0.0).map(|physics| speed.gbps / physics);
                share.map_or_else(dash, |share| format!("{share:.2}"))
            };
            match group {
                0 => gbps(row.encode),
                1 => gbps(row.decode),
                2 => share(row.encode),
                3 => share(row.decode),
                _ => row.extra_mib.map_or_else(dash, |mib| format!("{mib:.0}")),
            }
        };
        table.row(groups(codec.shown(), size, &cell));
    }
    for (name, group) in [("scan", 0), ("memcpy", 1)] {
        let cell = |at: usize, threads: u64| {
            let found = report.machine.iter().find(|machine| machine.threads == threads && at == group);
            found.map_or_else(String::new, |machine| {
                format!("{:.2}", if group == 0 { machine.scan } else { machine.copy })
            })
        };
        table.row(groups(name.to_owned(), String::new(), &cell));
    }
    table
}

/// Our codec of the same name and our best one beside each codec of the Python packages.
fn against_python(best: &str, reports: &[Report]) -> Option<Table> {
    let mut table = Table::new(&["pair", "threads", "ours", "Python", "size", "encode", "decode", "memory"]);
    let mut any = false;
    for report in reports {
        for theirs in report.rows.iter().filter(|row| row.codec.by == By::Python) {
            let mut names = vec![theirs.codec.id.as_str(), best];
            names.dedup();
            for name in names {
                let Some(ours) = report.row(&Codec::ours(name), theirs.threads) else { continue };
                any = true;
                table.row(ratios(report, ours, theirs));
            }
        }
    }
    any.then_some(table)
}

fn ratios(report: &Report, ours: &Row, theirs: &Row) -> Vec<String> {
    let memory = ours.extra_mib.zip(theirs.extra_mib).filter(|(_, theirs)| *theirs > 0.0);
    vec![
        report.name.clone(),
        ours.threads.to_string(),
        ours.codec.id.clone(),
        theirs.codec.id.clone(),
        format!("{:.2}", ours.encoded / theirs.encoded),
        format!("{:.1}x", ours.encode.gbps / theirs.encode.gbps),
        format!("{:.1}x", ours.decode.gbps / theirs.decode.gbps),
        memory.map_or_else(dash, |(ours, theirs)| format!("{:.2}", ours / theirs)),
    ]
}

fn percent(bytes: f64, report: &Report) -> String {
    format!("{:.3}", 100.0 * bytes / report.raw.max(1.0))
}

fn gbps(speed: Speed) -> String {
    match speed.checked {
        Some(checked) => format!("{:.2} ({checked:.2})", speed.gbps),
        None => format!("{:.2}", speed.gbps),
    }
}

fn dash() -> String {
    "–".to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::report::{tests::report, verdict};
    use super::*;

    fn lines(text: &str) -> Vec<Vec<String>> {
        text.lines().map(|line| line.split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
    }

    #[test]
    fn sizes_have_the_floor_and_a_bold_smallest() {
        let reports = [
            report("a", &[("towline", "zstd", 80), ("towline", "octave", 50), ("peer", "pcodec", 60)], true),
            report(
                "b",
                &[("towline", "octave", 660), ("peer", "pcodec", 650), ("python", "zipnn", 661)],
                false,
            ),
        ];
        let found = lines(&sizes("octave", &reports).markdown());
        assert_eq!(line(&reports[0]), "floor 4.000, octave 5.000, pcodec 6.000, zstd 8.000");
        let row = |index: usize| found[index][1..found[index].len() - 1].join(" ");
        assert_eq!(row(0), "pair changed % floor % octave / floor octave zstd pcodec zipnn, Python");
        assert_eq!(row(2), "a 1.000 4.000 1.250 **5.000** 8.000 6.000 –");
        assert_eq!(row(3), "b – – – 66.000 – **65.000** 66.100");
    }

    #[test]
    fn speeds_stand_beside_the_machine() {
        let found = lines(
            &speeds(&report("a", &[("towline", "octave", 50), ("peer", "pcodec", 60)], true)).markdown(),
        );
        assert_eq!(found[2][1..13].join(" "), "octave 5.000 2.00 4.00 4.00 8.00 0.25 0.50 0.25 0.50 10 10");
        assert_eq!(found[3][3..5].join(" "), "2.00 (1.50) 4.00 (1.50)");
        assert_eq!(found[4][1..13].join(" ").trim(), "scan  8.00");
        assert_eq!(found[5][1..6].join(" ").trim(), "memcpy    16.00");
    }

    #[test]
    fn python_is_set_beside_the_same_format_and_the_best() {
        let sizes = [
            ("towline", "octave", 50),
            ("towline", "arc_v3", 90),
            ("peer", "pcodec", 60),
            ("python", "arc_v3", 100),
        ];
        let reports = [report("a", &sizes, true)];
        let found = lines(&against_python("octave", &reports).unwrap().markdown());
        assert_eq!(found.len(), 2 + 4);
        assert_eq!(found[2][1..9].join(" "), "a 1 arc_v3 arc_v3 0.90 1.0x 1.0x 1.00");
        assert_eq!(found[3][1..6].join(" "), "a 1 octave arc_v3 0.50");
        assert!(against_python("octave", &[report("a", &sizes[..3], true)]).is_none());
        let text = all("Caption.", "octave", &reports, &verdict("octave", &reports));
        assert!(text.contains("- PASS: octave") && text.contains("**Against Python**"), "{text}");
    }
}
