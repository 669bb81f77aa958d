//! `crash-matrix`: processes that save and prune die everywhere, on every kind of store; a server is killed under them.
//! The work is done by programs of `towline-storage`; here they are run, and their figures put into a table.

mod report;
mod server;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::args::Args;
use crate::bench::section;
use crate::real_stores::SeaweedFs;
use crate::run::Job;
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

use report::Row;

pub(crate) const HELP: &str = "\
Lets processes that save and prune die everywhere, and looks at what they left: simulated at every operation with
faults on top (in memory, on a folder, on SeaweedFS), killed by SIGKILL at random instants, and SeaweedFS itself killed
under a client. Then a model of the repo is compared with it. What was acknowledged must be there, nothing partial may
be visible, and pruning must not delete what something live needs; the first breach ends with 1 and names its seed.

Usage: cargo xtask crash-matrix [--quick] [--only PART,…] [--write] [--json]

  --quick   a few seeds, without a server, in a debug build: 2 minutes at most once it is built
  --only    of simulated, local, s3, sigkill, server, model
  --write   put the table into docs/crash-matrix.md; parts that are left out by --only are taken from the last run

Example: cargo xtask crash-matrix --only simulated,local";

const PARTS: [&str; 6] = ["simulated", "local", "s3", "sigkill", "server", "model"];
/// What programs print before their figures.
const MARK: &str = "crash-matrix: ";

/// How much is run.
#[derive(Debug)]
struct Plan {
    quick: bool,
    parts: Vec<&'static str>,
}

impl Plan {
    /// Seeds, and the stride over crash points.
    fn seeds(&self, part: &str) -> (u64, u64) {
        match (part, self.quick) {
            ("simulated", false) => (1000, 1),
            ("simulated", true) => (126, 21),
            ("local", false) => (20, 1),
            ("local", true) => (2, 21),
            _ => (5, 1),
        }
    }

    fn kills(&self) -> u64 {
        if self.quick { 10 } else { 200 }
    }

    fn cases(&self) -> u64 {
        if self.quick { 64 } else { 2000 }
    }
}

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let quick = args.flag("--quick");
    let write = args.flag("--write");
    let only = args.list("--only")?;
    args.finish()?;
    if let Some(unknown) = only.iter().find(|name| !PARTS.contains(&name.as_str())) {
        return Err(Stop::Usage(format!("no part `{unknown}` (see --help)")));
    }
    let mut parts = PARTS.to_vec();
    parts.retain(|part| match only.is_empty() {
        true => !quick || !["s3", "server"].contains(part),
        false => only.iter().any(|name| name == part),
    });
    let plan = Plan { quick, parts };
    if write && quick {
        return Err(Stop::Usage("`--write` wants whole runs: leave out --quick".to_owned()));
    }
    let mut rows = run(context, &plan)?;
    if write {
        let kept = kept(&kept_at(context)?)?;
        rows = PARTS
            .iter()
            .map(|part| {
                let figures = kept.get(*part).ok_or_else(|| {
                    Stop::failed(format!("no run of `{part}` is kept (help: run it, or leave out --only)"))
                })?;
                Ok(Row::new(part, figures.clone()))
            })
            .collect::<Result<_>>()?;
        let path = context.root.join("docs/crash-matrix.md");
        section::write(&path, "crash-matrix", &report::markdown(&rows))?;
    }
    context.say(format!("\n{}", report::markdown(&rows)));
    context.emit(&json!(rows.iter().map(Row::to_json).collect::<Vec<_>>()));
    Ok(())
}

/// Where the figures of whole runs are kept: all parts together take longer than one sitting.
fn kept_at(context: &Context) -> Result<PathBuf> {
    Ok(context.target()?.join("crash-matrix.json"))
}

fn kept(path: &Path) -> Result<Map<String, Value>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| Stop::failed(format!("`{}`: {error} (help: delete it)", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(error) => Err(file_error("read", path)(error)),
    }
}

fn keep(path: &Path, part: &str, figures: &Value) -> Result<()> {
    let mut all = kept(path)?;
    all.insert(part.to_owned(), figures.clone());
    std::fs::write(path, format!("{:#}\n", Value::from(all))).map_err(file_error("write", path))
}

/// All wanted parts, in order. The first breach ends it.
fn run(context: &Context, plan: &Plan) -> Result<Vec<Row>> {
    let wants = |part: &str| plan.parts.contains(&part);
    // First what may be missing here.
    let data = context.target()?.join("crash-matrix");
    let mut server =
        (wants("s3") || wants("server")).then(|| SeaweedFs::start(context, &data)).transpose()?;
    let program = context.example("towline-storage", "crash_matrix", "", !plan.quick)?;
    let mut rows = Vec::new();
    for part in &plan.parts {
        context.say(format!("\n==> {part}"));
        let figures = match (*part, &mut server) {
            ("sigkill", _) => {
                let kills = plan.kills().to_string();
                test(context, "kill", "killed_at_random_instants", "TOWLINE_KILLS", &kills)
            }
            ("model", _) => {
                let cases = plan.cases().to_string();
                test(context, "model", "the_repo_and_its_model_agree", "TOWLINE_MODEL_CASES", &cases)
            }
            ("server", Some(server)) => server::kills(context, &program, server),
            (_, server) => {
                let place = match *part {
                    "simulated" => "memory".to_owned(),
                    "local" => "local".to_owned(),
                    _ => format!("{}/points", SeaweedFs::url()),
                };
                let (seeds, stride) = plan.seeds(part);
                let job = context.job(&program).args(&[
                    &place,
                    "--seeds",
                    &seeds.to_string(),
                    "--stride",
                    &stride.to_string(),
                ]);
                let job = match server {
                    Some(server) if *part == "s3" => server.client(job),
                    _ => job,
                };
                figures(job.deadline(Duration::from_secs(3 * 3600)))
            }
        };
        let figures = figures.map_err(|stop| match &server {
            Some(server) => stop.context(&format!("{part}, while the server said:\n{}\n", server.said())),
            None => stop.context(part),
        })?;
        context.say(format!("{figures}"));
        if !plan.quick {
            keep(&kept_at(context)?, part, &figures)?;
        }
        rows.push(Row::new(part, figures));
    }
    if let Some(server) = &mut server
        && !server.runs()
    {
        return Err(Stop::failed(format!("the server ended by itself; it said:\n{}", server.said())));
    }
    Ok(rows)
}

/// One test, and the figures that it prints.
fn test(context: &Context, file: &str, name: &str, variable: &str, value: &str) -> Result<Value> {
    let arguments = ["test", "-p", "towline-storage", "--test", file, "--", "--exact", name, "--nocapture"];
    figures(context.cargo(&arguments).env(variable, value).deadline(Duration::from_secs(3600)))
}

/// What `job` prints behind the mark, if it ends well.
fn figures(job: Job) -> Result<Value> {
    marked(&job.output()?)
}

fn marked(printed: &str) -> Result<Value> {
    let found = printed.lines().filter_map(|line| line.split_once(MARK)).next_back();
    let parsed = found.and_then(|(_, figures)| serde_json::from_str(figures).ok());
    parsed.ok_or_else(|| Stop::failed(format!("no line with `{MARK}` and figures; printed was:\n{printed}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_parts_are_kept_beside_each_other() {
        let path = std::env::temp_dir().join(format!("towline-crash-matrix-{}", std::process::id()));
        for (part, count) in [("a", 1), ("b", 2), ("a", 3)] {
            keep(&path, part, &json!({"kills": count})).unwrap();
        }
        assert_eq!(Value::from(kept(&path).unwrap()), json!({"a": {"kills": 3}, "b": {"kills": 2}}));
        std::fs::remove_file(&path).unwrap();
        assert!(kept(&path).unwrap().is_empty());
    }

    #[test]
    fn figures_are_found_behind_what_a_test_runner_prints() {
        let printed = "running 1 test\ntest x ... crash-matrix: {\"kills\":3}\nok\n";
        assert_eq!(marked(printed).unwrap()["kills"], 3);
        assert!(marked("test result: ok").is_err());
        assert!(marked("crash-matrix: nothing").is_err());
    }
}
