//! Jobs on scoped threads, and how tensors are cut into them.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use towline_core::{Error, Result, TensorMeta};

/// A part of a tensor that is encoded alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) tensor: usize,
    pub(crate) range: Range<usize>,
}

/// Cuts `tensors` into parts of at most `cut` bytes, largest first, so that threads end at about the same time.
pub(crate) fn jobs(tensors: &[TensorMeta], cut: impl Fn(&TensorMeta) -> usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (tensor, meta) in tensors.iter().enumerate() {
        let (length, cut) = (meta.byte_len(), cut(meta).max(1));
        let starts = (0..length).step_by(cut);
        jobs.extend(starts.map(|start| Job { tensor, range: start..length.min(start.saturating_add(cut)) }));
    }
    jobs.sort_by_key(|job| std::cmp::Reverse(job.range.len()));
    jobs
}

/// Runs `job(state, 0..count)` on `threads` threads, each with a state of its own, and returns the first error.
pub(crate) fn run<S>(
    threads: usize,
    count: usize,
    state: impl Fn() -> S + Sync,
    job: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        let mut state = state();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            if let Err(error) = job(&mut state, index) {
                next.store(count, Ordering::Relaxed);
                if let Ok(mut failed) = failed.lock() {
                    failed.get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(work);
        }
        work();
    });
    match failed.into_inner().map_err(poisoned)? {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The parts of `targets` that `jobs` name, each behind a lock, in the order of the jobs.
pub(crate) fn parts<'a>(targets: &'a mut [Vec<u8>], jobs: &[Job]) -> Vec<Mutex<&'a mut [u8]>> {
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|&index| jobs.get(index).map(|job| (job.tensor, job.range.start)));
    let mut found: Vec<(usize, &mut [u8])> = Vec::with_capacity(jobs.len());
    let mut order = order.into_iter().peekable();
    for (tensor, target) in targets.iter_mut().enumerate() {
        let mut rest = target.as_mut_slice();
        while let Some((index, job)) = order
            .peek()
            .and_then(|&index| Some((index, jobs.get(index)?)))
            .filter(|(_, job)| job.tensor == tensor)
        {
            let (part, behind) = rest.split_at_mut(job.range.len().min(rest.len()));
            found.push((index, part));
            rest = behind;
            order.next();
        }
    }
    found.sort_by_key(|(index, _)| *index);
    found.into_iter().map(|(_, part)| Mutex::new(part)).collect()
}

pub(crate) fn poisoned<T>(_: std::sync::PoisonError<T>) -> Error {
    Error::internal("a codec panicked on another thread")
}

#[cfg(test)]
mod tests {
    use towline_core::DType;

    use super::*;

    #[test]
    fn jobs_tile_the_tensors_and_parts_follow_them() {
        let metas: Vec<_> = [3usize, 0, 10]
            .iter()
            .map(|&n| TensorMeta::new(format!("t{n}"), DType::U8, [n]).unwrap())
            .collect();
        let jobs = jobs(&metas, |_| 4);
        let lengths: Vec<_> = jobs.iter().map(|job| job.range.len()).collect();
        assert_eq!(lengths, [4, 4, 3, 2]);
        let mut targets = vec![vec![1; 3], vec![], vec![2; 10]];
        for (part, job) in parts(&mut targets, &jobs).iter().zip(&jobs) {
            let mut part = part.lock().unwrap();
            assert_eq!(part.len(), job.range.len());
            part.fill(u8::try_from(job.range.start).unwrap());
        }
        assert_eq!(targets, [vec![0; 3], vec![], vec![0, 0, 0, 0, 4, 4, 4, 4, 8, 8]]);
    }

    #[test]
    fn every_job_runs_once_and_an_error_comes_back() {
        for threads in [1, 3] {
            let seen: Vec<AtomicUsize> = (0..50).map(|_| AtomicUsize::new(0)).collect();
            run(
                threads,
                50,
                || (),
                |(), index| {
                    seen[index].fetch_add(1, Ordering::Relaxed);
                    Ok(())
                },
            )
            .unwrap();
            assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            assert!(run(threads, 9, || (), |(), _| Err(Error::internal("no"))).is_err());
        }
    }
}
