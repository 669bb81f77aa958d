//! How often each byte comes up.

/// The number of each byte.
pub(crate) type Counts = [u32; 256];

/// Counts bytes in several tables, because equal ones come in a row and one count would wait for the other.
#[derive(Debug)]
pub(crate) struct Tally([Counts; 8]);

impl Default for Tally {
    fn default() -> Self {
        Self([[0; 256]; 8])
    }
}

impl Tally {
    /// Counts bytes.
    #[inline(always)]
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let (eights, rest) = bytes.as_chunks::<8>();
        for eight in eights {
            let mut eight = u64::from_le_bytes(*eight);
            for table in &mut self.0 {
                table[(eight & 0xff) as usize] += 1;
                eight >>= 8;
            }
        }
        rest.iter().for_each(|&byte| self.0[0][usize::from(byte)] += 1);
    }

    /// Adds how often `first` and the bytes above it came up. There are no bytes for what is behind the last one.
    #[inline(always)]
    pub(crate) fn add_counts(&mut self, first: u8, counts: impl IntoIterator<Item = u32>) {
        self.0[0][usize::from(first)..].iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }

    /// The counts of all.
    #[inline(always)]
    pub(crate) fn counts(self) -> Counts {
        let Self([mut sums, more @ ..]) = self;
        for table in more {
            sums.iter_mut().zip(table).for_each(|(sum, count)| *sum += count);
        }
        sums
    }
}
