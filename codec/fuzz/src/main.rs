//! A mutation fuzzer in one process, on stable Rust.
//!
//! ```text
//! cargo run --release -- --list
//! cargo run --release -- --target arc_v3 --seconds 60 --seed 1 --max-len 65536
//! cargo run --release -- --target arc_v3 --input artifacts/arc_v3-….bin
//! ```
//! Without `--target` it runs all, one after the other. An input that makes a target panic, hold more memory than is
//! stated or run above 10 seconds is saved to `artifacts/`, and the exit code is 1.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use towline_core::testing::CountingAllocator;
use towline_fuzz::mutate::{Random, mutate};
use towline_fuzz::{TARGETS, Target, highest};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

static MESSAGE: Mutex<String> = Mutex::new(String::new());
const SLOW: Duration = Duration::from_secs(10);
const MAX_FINDINGS: usize = 10;

struct Options {
    target: Option<String>,
    input: Option<PathBuf>,
    seconds: u64,
    seed: u64,
    max_len: usize,
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    std::panic::set_hook(Box::new(|info| {
        if let Ok(mut message) = MESSAGE.lock() {
            *message = info.to_string();
        }
    }));
    let wanted = |target: &&Target| options.target.as_deref().is_none_or(|name| name == target.name);
    let mut findings = 0;
    for target in TARGETS.iter().filter(wanted) {
        findings += match &options.input {
            Some(path) => replay(target, path),
            None => fuzz(target, &options),
        };
    }
    if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn options() -> Result<Option<Options>, String> {
    let mut options = Options { target: None, input: None, seconds: 60, seed: 1, max_len: 64 << 10 };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--list" {
            TARGETS.iter().for_each(|target| println!("{}", target.name));
            return Ok(None);
        }
        let value = arguments.next().ok_or_else(|| format!("{argument} wants a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{argument}: `{value}` is no number"));
        match argument.as_str() {
            "--target" => options.target = Some(value),
            "--input" => options.input = Some(value.into()),
            "--seconds" => options.seconds = number()?,
            "--seed" => options.seed = number()?,
            "--max-len" => options.max_len = number()? as usize,
            _ => {
                return Err(format!(
                    "{argument} is unknown: use --list, --target, --input, --seconds, --seed, --max-len"
                ));
            }
        }
    }
    match &options.target {
        Some(name) if !TARGETS.iter().any(|target| target.name == name) => {
            Err(format!("no target is called {name}: see --list"))
        }
        _ => Ok(Some(options)),
    }
}

fn fuzz(target: &Target, options: &Options) -> usize {
    let seeds: Vec<Vec<u8>> =
        (target.seeds)().into_iter().filter(|seed| seed.len() <= options.max_len).collect();
    let mut random = Random::new(options.seed);
    let start = Instant::now();
    let deadline = start + Duration::from_secs(options.seconds);
    let (mut runs, mut accepted, mut findings) = (0u64, 0u64, 0);
    let mut untouched = seeds.iter();
    let mut input = Vec::new();
    while findings < MAX_FINDINGS && Instant::now() < deadline {
        input.clear();
        // First every seed as it is.
        match untouched.next() {
            Some(seed) => input.extend_from_slice(seed),
            None => {
                input.extend_from_slice(&seeds[random.below(seeds.len())]);
                let other = &seeds[random.below(seeds.len())];
                mutate(&mut random, &mut input, other, options.max_len);
            }
        }
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        runs += 1;
        let finding = match outcome {
            Ok(yes) => {
                accepted += u64::from(yes);
                (began.elapsed() > SLOW).then(|| format!("it ran for {:?}", began.elapsed()))
            }
            Err(_) => Some(MESSAGE.lock().map(|message| message.clone()).unwrap_or_default()),
        };
        if let Some(finding) = finding {
            findings += 1;
            let path = save(target, runs, &input);
            println!("{}: {finding}\n  {} bytes saved to {}", target.name, input.len(), path.display());
        }
    }
    let (seconds, (peak, share)) = (start.elapsed().as_secs_f64(), highest());
    println!(
        "{}: {runs} executions in {seconds:.0} s ({:.0}/s) from {} seeds, {accepted} accepted, most memory {peak} bytes ({}.{} % of the bound), {findings} findings",
        target.name,
        runs as f64 / seconds,
        seeds.len(),
        share / 10,
        share % 10
    );
    findings
}

fn replay(target: &Target, path: &Path) -> usize {
    let Ok(input) = std::fs::read(path) else {
        println!("{} cannot be read", path.display());
        return 1;
    };
    match catch_unwind(AssertUnwindSafe(|| (target.run)(&input))) {
        Ok(accepted) => {
            println!("{}: {}", target.name, if accepted { "accepted" } else { "refused" });
            0
        }
        Err(_) => {
            println!(
                "{}: {}",
                target.name,
                MESSAGE.lock().map(|message| message.clone()).unwrap_or_default()
            );
            1
        }
    }
}

fn save(target: &Target, run: u64, input: &[u8]) -> PathBuf {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("artifacts");
    let path = directory.join(format!("{}-{run}.bin", target.name));
    if std::fs::create_dir_all(&directory).and_then(|()| std::fs::write(&path, input)).is_err() {
        println!("{} could not be written", path.display());
    }
    path
}
