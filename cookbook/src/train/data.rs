//! A data set with an order and a fingerprint.

use towline_core::TensorDigest;

use crate::engine::Rng;
use crate::engine::task::Problem;

/// Rows of the sorting task.
#[derive(Debug)]
pub(super) struct DataSet {
    rows: Vec<Problem>,
    /// Changes with any row.
    pub(super) fingerprint: String,
}

impl DataSet {
    /// `rows` problems from `seed`.
    pub(super) fn new(seed: u64, rows: usize) -> Self {
        let mut rng = Rng::named(seed, "data");
        let rows: Vec<Problem> = (0..rows).map(|_| Problem::random(&mut rng)).collect();
        let text: String = rows.iter().map(Problem::prompt).collect();
        let fingerprint = format!("sorting:{}:{}", rows.len(), TensorDigest::of(text.as_bytes()));
        Self { rows, fingerprint }
    }

    /// `count` rows from row `from` on; behind the last comes the first again.
    pub(super) fn batch(&self, from: u64, count: usize) -> Vec<Problem> {
        let start = usize::try_from(from % self.rows.len().max(1) as u64).unwrap_or(0);
        self.rows.iter().cycle().skip(start).take(count).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_each_other_over_the_end_and_the_fingerprint_changes_with_them() {
        let data = DataSet::new(1, 10);
        let all = data.batch(0, 10);
        assert_eq!(data.batch(8, 4), [all[8], all[9], all[0], all[1]]);
        assert_eq!(data.batch(28, 1), [all[8]]);
        assert_eq!(data.fingerprint, DataSet::new(1, 10).fingerprint);
        assert_ne!(data.fingerprint, DataSet::new(2, 10).fingerprint);
        assert_ne!(data.fingerprint, DataSet::new(1, 11).fingerprint);
    }
}
