//! Lives that end at a crash point, on any store: what the tests in `crash.rs` do, more often and elsewhere.
//!
//! ```text
//! crash_matrix PLACE [--seeds N] [--first N] [--stride N]   every seed dies at every Nth operation
//! crash_matrix URL --save N --job NAME                      saves, and says what was acknowledged
//! crash_matrix URL --check --job NAME                       reads on standard input what was acknowledged
//! ```
//!
//! PLACE is `memory`, `local` (a new folder for each life), or the URL of a store, which must be there: settings come
//! from the environment. It panics if anything breaks, naming the seed. Figures are a line `crash-matrix: {json}`.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/life/mod.rs"]
mod life;
mod server;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use life::among_faults;
use life::place::Place;
use serde_json::{Map, Value, json};

const USAGE: &str = "crash_matrix PLACE [--seeds N] [--first N] [--stride N] | URL --save N --job NAME | URL --check --job NAME";

#[derive(Debug)]
struct Wanted {
    place: String,
    seeds: u64,
    first: u64,
    stride: u64,
    save: Option<u64>,
    check: bool,
    job: String,
}

fn main() -> ExitCode {
    let Some(wanted) = parse(std::env::args().skip(1)) else {
        eprintln!("usage: {USAGE}");
        return ExitCode::from(2);
    };
    let figures = match wanted.save {
        Some(count) => server::save(&wanted.place, &wanted.job, count),
        None if wanted.check => server::check(&wanted.place, &wanted.job),
        None => matrix(&wanted),
    };
    println!("crash-matrix: {figures}");
    ExitCode::SUCCESS
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Wanted> {
    let place = arguments.next().filter(|place| !place.starts_with('-'))?;
    let job = "job".to_owned();
    let mut wanted = Wanted { place, seeds: 1, first: 0, stride: 1, save: None, check: false, job };
    while let Some(option) = arguments.next() {
        if option == "--check" {
            wanted.check = true;
            continue;
        }
        let value = arguments.next()?;
        match option.as_str() {
            "--seeds" => wanted.seeds = value.parse().ok()?,
            "--first" => wanted.first = value.parse().ok()?,
            "--stride" => wanted.stride = value.parse().ok().filter(|stride| *stride > 0)?,
            "--save" => wanted.save = Some(value.parse().ok()?),
            "--job" => wanted.job = value,
            _ => return None,
        }
    }
    Some(wanted)
}

/// Every seed at its crash points.
fn matrix(wanted: &Wanted) -> Value {
    let started = Instant::now();
    let place = Place::new(&wanted.place);
    let pace = place.pace();
    let points = 2 * Place::count_operations();
    // Which points a seed has depends on it, so that all seeds together have each as often.
    let cases: Vec<(u64, u64)> = (wanted.first..wanted.first + wanted.seeds)
        .flat_map(|seed| {
            let own = move |point: &u64| (point + seed).is_multiple_of(wanted.stride);
            (0..points).filter(own).map(move |point| (seed, point))
        })
        .collect();
    let deaths = Mutex::new(BTreeMap::<u64, u64>::new());
    let (begun, tenth) = (AtomicUsize::new(0), cases.len().div_ceil(10));
    let totals = place.on_threads(cases.len() as u64, async |number| {
        let (seed, point) = cases[number as usize];
        let begun = begun.fetch_add(1, Ordering::Relaxed);
        if begun > 0 && begun.is_multiple_of(tenth) {
            eprintln!("{begun} of {} lives, {:.0} s", cases.len(), started.elapsed().as_secs_f64());
        }
        let (store, _folder) = place.open(number);
        let totals = among_faults(store, seed, point, &pace).await;
        *deaths.lock().unwrap().entry(point).or_default() += totals["died"];
        totals
    });
    let deaths = deaths.into_inner().unwrap();
    let least = (0..points).map(|point| deaths.get(&point).copied().unwrap_or(0)).min().unwrap_or(0);
    let mut figures: Map<String, Value> =
        totals.into_iter().map(|(what, count)| (what.to_owned(), count.into())).collect();
    figures.insert("seeds".into(), wanted.seeds.into());
    figures.insert("points".into(), points.into());
    figures.insert("least deaths at a point".into(), least.into());
    figures.insert("seconds".into(), json!(started.elapsed().as_secs_f64()));
    figures.into()
}
