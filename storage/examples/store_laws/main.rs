//! Checks a store against everything that Towline asks of one, and says what broke.
//!
//! ```text
//! cargo run --release -p towline-storage --features s3,gcs,azure --example store_laws -- URL [options]
//!
//!   --only LAW,…          these laws alone            --skip LAW,…   all but these
//!   --seconds-per-law N   a law that takes longer has failed (180)
//!   --list                print the names of the laws
//!   --json                one object at the end, in the place of lines
//!
//!   --expect KIND         run no law: every operation must fail with this kind (`denied` with a wrong key)
//!   --write N --seed S    run no law: write N objects and print `ok I` behind each that the store acknowledged
//!   --check --seed S      run no law: read such lines, and check that those objects are there, whole
//! ```
//! URL is what [`towline_storage::open`] takes, with the usual environment variables for endpoint and keys. Every law
//! works below a prefix of its own with a random name, on a client of its own, and removes what it wrote. The exit
//! code is 1 if something broke and 2 for wrong use.
//!
//! The laws are those of `towline_core::testing::laws::store`, which `store_conformance!` makes tests of, and the
//! bigger ones of [`bigger`], which are for services: races whose lost answers are settled as a repo settles them,
//! listings of several pages, uploads in parts, and a whole [`SnapshotRepo`](towline_storage::SnapshotRepo).
//!
//! To check a store of your own, copy this folder into the examples of your crate and return your store from
//! [`opened`]. It needs `towline-core` with the feature `testing`, `towline-storage`, `tokio`, `bytes`,
//! `futures-util` and `serde_json`.

mod acks;
mod bigger;
mod cycle;
mod probe;
mod under;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use towline_core::testing::laws::store::ALL;
use towline_core::{ObjectKey, SnapshotStore};
use towline_storage::{StoreOptions, open};

use bigger::Checking;
use under::Under;

const USAGE: &str =
    "usage: store_laws URL [--only LAW,…] [--skip LAW,…] [--seconds-per-law N] [--list] [--json]
       store_laws URL --expect KIND [--json] | --write N --seed S | --check --seed S";

/// The store to check. Called once for each law, so that none inherits what another did to its client.
fn opened(url: &str) -> Result<Arc<dyn SnapshotStore>, String> {
    let options = StoreOptions::from_env().map_err(|error| error.report())?;
    open(url, &options).map_err(|error| error.report())
}

fn main() -> ExitCode {
    let outcome = Options::parse(std::env::args().skip(1)).and_then(|options| match &options.work {
        Work::Laws => laws(&options),
        Work::Expect(kind) => probe(&options, kind),
        Work::Write(count, seed) => run(&options, |store| acks::write(store, *count, *seed)),
        Work::Check(seed) => run(&options, |store| acks::check(store, *seed, std::io::stdin().lines())),
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::from(2)
        }
    }
}

/// What to do.
enum Work {
    Laws,
    Expect(String),
    Write(u64, u64),
    Check(u64),
}

struct Options {
    url: String,
    work: Work,
    only: Vec<String>,
    skip: Vec<String>,
    limit: Duration,
    json: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut url, mut expect, mut count, mut seed) = (None, None, None, None);
        let (mut only, mut skip) = (Vec::new(), Vec::new());
        let (mut limit, mut json, mut check) = (180, false, false);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("`{argument}` wants a value\n{USAGE}"));
            let number = |text: String| {
                text.parse::<u64>().map_err(|_| format!("`{argument}` wants a number, not `{text}`"))
            };
            match argument.as_str() {
                "--only" => only.extend(value()?.split(',').map(str::to_owned)),
                "--skip" => skip.extend(value()?.split(',').map(str::to_owned)),
                "--seconds-per-law" => limit = number(value()?)?,
                "--expect" => expect = Some(value()?),
                "--write" => count = Some(number(value()?)?),
                "--seed" => seed = Some(number(value()?)?),
                "--check" => check = true,
                "--json" => json = true,
                "--list" => {
                    names().for_each(|name| println!("{name}"));
                    std::process::exit(0);
                }
                option if option.starts_with("--") => {
                    return Err(format!("unknown option `{option}`\n{USAGE}"));
                }
                _ if url.is_none() => url = Some(argument),
                _ => return Err(format!("a second URL `{argument}`\n{USAGE}")),
            }
        }
        if let Some(unknown) = only.iter().chain(&skip).find(|wanted| !names().any(|name| name == **wanted)) {
            return Err(format!("no law is called `{unknown}` (see --list)"));
        }
        let work = match (expect, count, check, seed) {
            (Some(kind), None, false, None) => Work::Expect(kind),
            (None, Some(count), false, Some(seed)) => Work::Write(count, seed),
            (None, None, true, Some(seed)) => Work::Check(seed),
            (None, None, false, None) => Work::Laws,
            _ => return Err(USAGE.to_owned()),
        };
        let limit = Duration::from_secs(limit);
        Ok(Self { url: url.ok_or(USAGE)?, work, only, skip, limit, json })
    }

    fn chosen(&self, name: &str) -> bool {
        let among = |names: &[String]| names.iter().any(|wanted| wanted == name);
        (self.only.is_empty() || among(&self.only)) && !among(&self.skip)
    }
}

fn names() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|(name, _)| *name).chain(bigger::ALL.iter().map(|(name, _)| *name))
}

/// A law of the kit or of ours, in one form.
type Law = Box<dyn Fn(Arc<dyn SnapshotStore>) -> Checking>;

/// A law that was checked: what it found, or what broke.
struct Checked {
    name: &'static str,
    outcome: Result<String, String>,
    seconds: f64,
}

/// Checks the chosen laws one after the other.
fn laws(options: &Options) -> Result<bool, String> {
    let root = format!("store-laws-{:016x}", random());
    let kit = ALL.iter().map(|&(name, law)| {
        let law: Law = Box::new(move |store| {
            let checked = law(store);
            Box::pin(async move { checked.await.map(|()| String::new()) })
        });
        (name, law)
    });
    let ours = bigger::ALL.iter().map(|&(name, law)| (name, Box::new(law) as Law));
    let mut done = Vec::new();
    for (name, law) in kit.chain(ours).filter(|(name, _)| options.chosen(name)) {
        let checked = one(options, &root, name, law)?;
        let line = match &checked.outcome {
            Ok(note) if note.is_empty() => format!("ok    {name} ({:.1} s)", checked.seconds),
            Ok(note) => format!("ok    {name} ({:.1} s): {note}", checked.seconds),
            Err(broke) => format!("BROKE {name} ({:.1} s): {broke}", checked.seconds),
        };
        if options.json {
            eprintln!("{line}")
        } else {
            println!("{line}")
        }
        done.push(checked);
    }
    let broken = done.iter().filter(|checked| checked.outcome.is_err()).count();
    if options.json {
        let laws: Vec<Value> = done
            .iter()
            .map(|checked| {
                json!({
                    "name": checked.name,
                    "ok": checked.outcome.is_ok(),
                    "seconds": checked.seconds,
                    "note": checked.outcome.as_ref().ok(),
                    "broke": checked.outcome.as_ref().err(),
                })
            })
            .collect();
        println!("{}", json!({"ok": broken == 0, "laws": laws}));
    } else {
        println!("{} laws, {broken} broken", done.len());
    }
    Ok(broken == 0)
}

/// One law on a fresh client, in a runtime that takes what the law left running with it.
fn one(options: &Options, root: &str, name: &'static str, law: Law) -> Result<Checked, String> {
    let runtime = runtime()?;
    let (outcome, seconds) = runtime.block_on(async {
        let prefix = ObjectKey::new(format!("{root}/{name}")).map_err(|error| error.report())?;
        let store = Arc::new(Under::new(opened(&options.url)?, prefix));
        let started = Instant::now();
        let shared: Arc<dyn SnapshotStore> = Arc::<Under>::clone(&store);
        let outcome = tokio::time::timeout(options.limit, law(shared)).await;
        let outcome =
            outcome.unwrap_or_else(|_| Err(format!("not done after {} s", options.limit.as_secs())));
        let seconds = started.elapsed().as_secs_f64();
        if let Err(error) = store.clear(options.limit).await {
            eprintln!("warning: {name} left objects behind: {error}");
        }
        Ok::<_, String>((outcome, seconds))
    })?;
    runtime.shutdown_background();
    Ok(Checked { name, outcome, seconds })
}

fn probe(options: &Options, kind: &str) -> Result<bool, String> {
    run(options, async |store| {
        let found = probe::operations(store).await;
        let good = found.iter().filter(|operation| operation.kind == kind).count();
        for operation in &found {
            let line = format!("{:<14} {}: {}", operation.name, operation.kind, operation.report);
            // Services answer with whole documents: with --json they stand in the object alone.
            if !options.json {
                println!("{line}");
            }
        }
        if options.json {
            let operations: Vec<Value> = found
                .iter()
                .map(|found| json!({"name": found.name, "kind": found.kind, "report": found.report}))
                .collect();
            let ok = good == found.len();
            println!("{}", json!({"expected": kind, "ok": ok, "operations": operations}));
        }
        Ok(good == found.len())
    })
}

/// Work on the store itself, without a prefix.
fn run<F: Future<Output = Result<bool, String>>>(
    options: &Options,
    work: impl FnOnce(Arc<dyn SnapshotStore>) -> F,
) -> Result<bool, String> {
    runtime()?.block_on(async { work(opened(&options.url)?).await })
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    let built = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    built.map_err(|error| format!("no runtime: {error}"))
}

/// 64 bits that no other run is likely to draw: keys of the operating system.
fn random() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}
