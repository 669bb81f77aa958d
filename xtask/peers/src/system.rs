//! What the system says of this process, and processes like this one.

use std::ffi::OsString;
use std::process::{Command, Stdio};

use serde_json::Value;
use towline_core::{Error, Result};

/// Resident memory above a starting point, where the system tells it (Linux).
#[derive(Debug)]
pub(crate) struct Memory {
    before: Option<u64>,
}

impl Memory {
    /// Call it when everything is loaded.
    pub(crate) fn start() -> Self {
        Self { before: resident("VmRSS:") }
    }

    /// Forgets the highest mark so far.
    pub(crate) fn reset(&self) {
        // Where it cannot be reset there is no mark to read either.
        let _absent = std::fs::write("/proc/self/clear_refs", "5");
    }

    /// The highest mark since the last reset, above the start, in MiB.
    pub(crate) fn peak_mib(&self) -> Option<f64> {
        Some(resident("VmHWM:")?.saturating_sub(self.before?) as f64 / 1024.0)
    }
}

fn resident(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Seconds that all threads of this process have had of the processor, where the system tells them (Linux).
pub(crate) fn processor_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything; the times are the 12th and 13th words behind it, in hundredths.
    let (_, behind) = text.rsplit_once(')')?;
    let mut words = behind.split_whitespace().skip(11);
    let mut ticks = || words.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / 100.0)
}

/// Runs this program again with other arguments and returns the JSON that it prints.
pub(crate) fn again(arguments: &[OsString]) -> Result<Value> {
    let failed =
        |error: std::io::Error| Error::internal("the measuring process did not run").with_source(error);
    let output = Command::new(std::env::current_exe().map_err(failed)?)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(failed)?;
    let what = arguments.first().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
    if !output.status.success() {
        return Err(Error::internal(format!("`{what}` ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| Error::internal(format!("`{what}` printed no JSON")).with_source(error))
}

/// The value in the middle, and the smallest.
pub(crate) fn median_and_least(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    (at(values.len() / 2), at(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_time_of_the_processor() {
        let Some(before) = processor_seconds() else { return };
        let started = std::time::Instant::now();
        while processor_seconds() < Some(before + 0.05) {
            assert!(started.elapsed().as_secs() < 60, "nothing was counted");
        }
    }

    #[test]
    fn medians_and_memory() {
        assert_eq!(median_and_least(vec![3.0, 1.0, 2.0]), (2.0, 1.0));
        assert!(median_and_least(Vec::new()).0.is_nan());
        let memory = Memory::start();
        memory.reset();
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        if let Some(mib) = memory.peak_mib() {
            assert!((60.0..200.0).contains(&mib), "{mib} MiB for {} bytes", block.len());
        }
    }
}
