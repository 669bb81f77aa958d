//! `real-stores`: the laws of stores, a repo's whole cycle and crashes, on servers that real programs are.

mod kills;
mod kinds;
mod report;
mod running;
mod server;
mod tools;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::args::Args;
use crate::bench::section;
use crate::run::Job;
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

use kinds::{Kind, START};
use report::{Check, Checked};
pub(crate) use running::SeaweedFs;
use server::Launch;

pub(crate) const HELP: &str = "\
Starts real object-store servers on the loopback, checks the laws of stores on them with the example `store_laws`, and
kills them at the end: SeaweedFS (a whole S3 server), moto (S3, strict on conditions) and Azurite (Azure's blobs). Each
must also refuse a wrong key and tell a missing bucket. SeaweedFS is killed under writes, and must still have what it
acknowledged. Installs them into .venv-stores and target/azurite. A server that cannot be installed is skipped; exits
with 3, and says what is missing, where that leaves none.

Usage: cargo xtask real-stores [--short] [--only STORE,…] [--laws LAW,…] [--kills N] [--debug] [--write] [--json]

  --short   SeaweedFS and moto, without the object of 256 MiB and without kills, in a debug build: 2 minutes
  --only    of seaweedfs, moto, azurite
  --laws    these laws alone
  --kills N how often SeaweedFS is killed; 3 by default
  --debug   a debug build of the example; --short has it already
  --write   put the table into docs/real-stores.md

Example: cargo xtask real-stores --only seaweedfs --kills 20";

/// Laws that only a store keeps which checks a condition and writes in one step.
const RACES: [&str; 4] =
    ["exclusive_create", "compare_and_swap_counter", "create_race_of_64", "counter_of_8"];

/// What is to be checked.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    short: bool,
    debug: bool,
    only: Vec<String>,
    laws: Vec<String>,
    kills: Option<u64>,
    write: bool,
}

impl Wanted {
    /// What a step of `ci` has time for.
    pub(crate) fn short() -> Self {
        Self { short: true, ..Self::default() }
    }

    fn kinds(&self) -> Result<Vec<Kind>> {
        let known = |name: &String| Kind::ALL.iter().any(|kind| kind.name() == name);
        if let Some(unknown) = self.only.iter().find(|name| !known(name)) {
            return Err(Stop::Usage(format!("no store `{unknown}` (see --help)")));
        }
        let mut kinds = Kind::ALL.to_vec();
        kinds.retain(|kind| match self.only.is_empty() {
            true => !self.short || *kind != Kind::Azurite,
            false => self.only.iter().any(|name| name == kind.name()),
        });
        Ok(kinds)
    }

    fn rounds(&self) -> u64 {
        self.kills.unwrap_or(if self.short { 0 } else { 3 })
    }
}

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let mut wanted = if args.flag("--short") { Wanted::short() } else { Wanted::default() };
    wanted.debug = args.flag("--debug");
    wanted.write = args.flag("--write");
    wanted.only = args.list("--only")?;
    wanted.laws = args.list("--laws")?;
    wanted.kills = args.number("--kills")?;
    args.finish()?;
    run(context, &wanted).map(|_| ())
}

/// Checks all wanted servers, one after the other; returns what to say beside "ok".
pub(crate) fn run(context: &Context, wanted: &Wanted) -> Result<String> {
    if !cfg!(unix) {
        return Err(Stop::Skipped("servers are started and killed by the means of Unix".to_owned()));
    }
    let kinds = wanted.kinds()?;
    let scratch = context.target()?.join("real-stores");
    if scratch.exists() {
        std::fs::remove_dir_all(&scratch).map_err(file_error("clear", &scratch))?;
    }
    // First what may be missing here, then what takes minutes.
    let mut launches = Vec::new();
    for kind in kinds {
        let data = scratch.join(kind.name());
        std::fs::create_dir_all(&data).map_err(file_error("create", &data))?;
        match kind.launch(context, &data) {
            Err(Stop::Skipped(why)) => {
                context.say(format!("{} is skipped: {why}", kind.name()));
                launches.push((kind, Err(why)));
            }
            launch => launches.push((kind, Ok(launch?))),
        }
    }
    let skipped: Vec<_> = launches.iter().filter_map(|(_, launch)| launch.as_ref().err()).collect();
    if skipped.len() == launches.len() {
        return Err(Stop::Skipped(skipped.first().map_or_else(String::new, |why| (*why).clone())));
    }
    let program = tools::store_laws(context, !wanted.short && !wanted.debug)?;
    let mut all = Vec::new();
    for (kind, launch) in launches {
        let started = Instant::now();
        let (checks, skipped) = match launch {
            Ok(launch) => (check(context, kind, &launch, &program, wanted)?, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        all.push(Checked { kind, checks, skipped, seconds: started.elapsed().as_secs_f64() });
    }
    finish(context, wanted, &all)
}

fn finish(context: &Context, wanted: &Wanted, all: &[Checked]) -> Result<String> {
    let text = report::markdown(all);
    context.say(format!("\n{text}"));
    context.emit(&report::to_json(all));
    if wanted.write {
        let path = context.root.join("docs/real-stores.md");
        let how = "Written by `cargo xtask real-stores --write`. Each server ran alone beside its client, on the loopback.";
        section::write(&path, "real-stores", &format!("{how}\n\n{text}"))?;
    }
    let failures: usize = all.iter().map(|checked| checked.failures().len()).sum();
    if failures > 0 {
        return Err(Stop::failed(format!("{failures} checks broke on real stores")));
    }
    let count = |checked: &Checked| {
        checked
            .skipped
            .is_none()
            .then(|| format!("{} checks on {}", checked.checks.len(), checked.kind.name()))
    };
    Ok(all.iter().filter_map(count).collect::<Vec<_>>().join(", "))
}

/// All checks of one server, which lives as long as they take.
fn check(
    context: &Context,
    kind: Kind,
    launch: &Launch,
    program: &Path,
    wanted: &Wanted,
) -> Result<Vec<Check>> {
    context.say(format!("\n{} on port {}", kind.package(), launch.port));
    let mut server = launch.start(START)?;
    kind.make_bucket(context, launch).map_err(|stop| stop.context(&launch.said()))?;
    let client =
        |url: String, right_key| kind.client(context.job(program).args(&[url]), launch.port, right_key);
    let mut checks = laws(client(kind.url(), true), wanted)?;
    for check in checks.iter_mut().filter(|check| !kind.is_atomic() && RACES.contains(&check.name.as_str())) {
        if let Err(broke) = &mut check.outcome {
            *broke = format!("not atomic: {broke}");
            check.known = true;
        }
    }
    if !server.runs() {
        return Err(Stop::failed(format!(
            "{} ended in the middle; it said:\n{}",
            kind.name(),
            launch.said()
        )));
    }
    let mut key = probe(client(kind.url(), false), "a wrong key is `Denied`", "denied", |_| "")?;
    if !kind.checks_keys() && key.outcome.is_err() {
        key.outcome = Err("it takes any key".to_owned());
        key.known = true;
    }
    checks.push(key);
    let missing = |operation: &str| match operation {
        // The answer has no body that could tell a missing bucket from a missing object.
        "head" => "not_found",
        // A write would make the bucket, which this client may not.
        "put" | "create" | "write parts" if kind == Kind::SeaweedFs => "denied",
        _ => "",
    };
    let client = client(kind.missing_url(), true);
    checks.push(probe(client, "a missing bucket is `Invalid`", "invalid", missing)?);
    if kind == Kind::SeaweedFs && wanted.rounds() > 0 {
        let (kills, again) = kills::run(context, program, launch, server, wanted.rounds())
            .map_err(|stop| stop.context(&format!("{} said:\n{}\n", kind.name(), launch.said())))?;
        server = again;
        checks.push(Checked::kills(wanted.rounds(), &kills));
    }
    server.kill();
    Ok(checks)
}

fn laws(client: Job, wanted: &Wanted) -> Result<Vec<Check>> {
    // A law has its own deadline; the sum of all is far below this one.
    let mut job = client.args(&["--json"]).deadline(Duration::from_secs(45 * 60));
    if wanted.short {
        // The longer race has the shorter one in it, and settles what a slow server leaves open.
        job = job.args(&["--skip", "object_of_256_mib,exclusive_create"]);
    }
    if !wanted.laws.is_empty() {
        job = job.args(&["--only", &wanted.laws.join(",")]);
    }
    let (_, printed) = job.verdict()?;
    Checked::laws(&printed).ok_or_else(|| Stop::failed(format!("store_laws printed `{}`", printed.trim())))
}

/// Every operation must fail with `kind`, or with what `or` says of it.
fn probe(client: Job, name: &str, kind: &str, or: impl Fn(&str) -> &'static str) -> Result<Check> {
    let job = client.args(&["--expect", kind, "--json"]).deadline(Duration::from_secs(600));
    let (_, printed) = job.verdict()?;
    let wrong = || Stop::failed(format!("store_laws --expect printed `{}`", printed.trim()));
    let value: Value = serde_json::from_str(&printed).map_err(|_| wrong())?;
    let operations = value.get("operations").and_then(Value::as_array).ok_or_else(wrong)?;
    let mut others = Vec::new();
    for operation in operations {
        let text = |name: &str| operation.get(name).and_then(Value::as_str).ok_or_else(wrong);
        let (name, found) = (text("name")?, text("kind")?);
        if found != kind && found != or(name) {
            others.push(format!("{name} was {found} ({})", text("report")?));
        }
    }
    let outcome = if others.is_empty() { Ok(String::new()) } else { Err(others.join("; ")) };
    Ok(Check::new(name, outcome))
}
