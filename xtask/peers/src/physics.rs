//! What the machine allows at best on the same buffers: a bare scan and a copy. And what checking costs.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use towline_core::{DIGEST_BLOCK, Error, Result, TensorMeta, block_digest};

use crate::work;

/// One part of the work of a thread.
const CUT: usize = 1 << 20;
/// The scan looks at this many bytes at a time.
const CHUNK: usize = 4096;

/// Compares the parent with the current tensors and counts the 4 KiB chunks that differ; of a base it counts the chunks
/// that are not zero. Everything is read, whatever differs.
pub(crate) fn scan(metas: &[TensorMeta], data: &[(Option<Bytes>, Bytes)], threads: usize) -> Result<u64> {
    let jobs = work::jobs(metas, |_| CUT);
    let found = AtomicU64::new(0);
    work::run(
        threads,
        jobs.len(),
        || (),
        |(), index| {
            let lost = || Error::internal("a job without a tensor");
            let job = jobs.get(index).ok_or_else(lost)?;
            let (old, new) = data.get(job.tensor).ok_or_else(lost)?;
            let new = new.get(job.range.clone()).ok_or_else(lost)?;
            let count = match old.as_ref().and_then(|old| old.get(job.range.clone())) {
                Some(old) => differing(old, new),
                None => filled(new),
            };
            found.fetch_add(count, Ordering::Relaxed);
            Ok(())
        },
    )?;
    Ok(black_box(found.into_inner()))
}

fn differing(old: &[u8], new: &[u8]) -> u64 {
    let ((old, old_rest), (new, new_rest)) = (old.as_chunks::<CHUNK>(), new.as_chunks::<CHUNK>());
    let whole: u64 = old.iter().zip(new).map(|(old, new)| u64::from(fold(old, new) != 0)).sum();
    whole + u64::from(old_rest != new_rest)
}

/// The OR of the XOR of all words: no branch, so that it becomes vector code.
fn fold(old: &[u8; CHUNK], new: &[u8; CHUNK]) -> u64 {
    let words = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
    words.fold(0, |folded, (old, new)| folded | (u64::from_ne_bytes(*old) ^ u64::from_ne_bytes(*new)))
}

fn filled(new: &[u8]) -> u64 {
    let (chunks, rest) = new.as_chunks::<CHUNK>();
    let any = |chunk: &[u8; CHUNK]| {
        chunk.as_chunks::<8>().0.iter().fold(0, |folded, word| folded | u64::from_ne_bytes(*word))
    };
    let whole: u64 = chunks.iter().map(|chunk| u64::from(any(chunk) != 0)).sum();
    whole + u64::from(rest.iter().any(|byte| *byte != 0))
}

/// Copies the parents, or the current tensors of a base, over `targets`.
pub(crate) fn copy(
    metas: &[TensorMeta],
    data: &[(Option<Bytes>, Bytes)],
    targets: &mut [Vec<u8>],
    threads: usize,
) -> Result<()> {
    let jobs = work::jobs(metas, |_| CUT);
    let parts = work::parts(targets, &jobs);
    work::run(
        threads,
        jobs.len(),
        || (),
        |(), index| {
            let lost = || Error::internal("a job without a tensor");
            let (job, part) = (jobs.get(index).ok_or_else(lost)?, parts.get(index).ok_or_else(lost)?);
            let (old, new) = data.get(job.tensor).ok_or_else(lost)?;
            let source = old.as_ref().unwrap_or(new).get(job.range.clone()).ok_or_else(lost)?;
            part.lock().map_err(work::poisoned)?.copy_from_slice(source);
            Ok(())
        },
    )
}

/// The clock of a core in GHz as a program sees it: a neighbour on the same core takes its share. Counted by a chain of
/// shifts and exclusive ors that wait for one another, a cycle each.
pub(crate) fn clock_ghz() -> f64 {
    const STEPS: u32 = 1_000_000;
    let started = Instant::now();
    let mut number = black_box(1u64);
    for _ in 0..STEPS {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
    }
    black_box(number);
    6.0 * f64::from(STEPS) / 1e9 / started.elapsed().as_secs_f64()
}

/// Takes the digests of tensors as Towline's files hold them, which no peer does. Peers are shown with and without.
pub(crate) fn digest(metas: &[TensorMeta], tensors: &[&[u8]], threads: usize) -> Result<()> {
    let jobs = work::jobs(metas, |_| DIGEST_BLOCK);
    work::run(
        threads,
        jobs.len(),
        || (),
        |(), index| {
            let lost = || Error::internal("a job without a tensor");
            let job = jobs.get(index).ok_or_else(lost)?;
            let part =
                tensors.get(job.tensor).and_then(|tensor| tensor.get(job.range.clone())).ok_or_else(lost)?;
            black_box(block_digest(part));
            Ok(())
        },
    )
}

#[cfg(test)]
mod tests {
    use towline_core::{DType, Weights};

    use super::*;
    use crate::files::Pair;

    #[test]
    fn a_scan_sees_each_chunk_once_and_a_copy_is_one() {
        let meta = TensorMeta::new("t", DType::U8, [3 * CUT + 5]).unwrap();
        let old = vec![0u8; meta.byte_len()];
        let mut new = old.clone();
        for at in [0, 1, CHUNK, CUT + 9, 3 * CUT + 4] {
            new[at] = 1;
        }
        let weights = |data: &Vec<u8>| Weights::new([(meta.clone(), data.clone().into())]).unwrap();
        let delta = Pair { parent: Some(weights(&old)), current: weights(&new) };
        let whole = Pair { parent: None, current: weights(&new) };
        for threads in [1, 2] {
            for pair in [&delta, &whole] {
                assert_eq!(scan(pair.metas(), &pair.all().unwrap(), threads).unwrap(), 4);
            }
            let mut targets = vec![vec![9; new.len()]];
            copy(delta.metas(), &delta.all().unwrap(), &mut targets, threads).unwrap();
            assert!(targets[0] == old);
            copy(whole.metas(), &whole.all().unwrap(), &mut targets, threads).unwrap();
            assert!(targets[0] == new);
            digest(delta.metas(), &[&new], threads).unwrap();
            assert!(digest(delta.metas(), &[&new[1..]], threads).is_err());
        }
    }
}
