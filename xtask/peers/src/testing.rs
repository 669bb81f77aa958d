//! Made-up pairs for tests.

use towline_core::{DType, TensorMeta, Weights};

use crate::files::Pair;
use crate::memory::random;

fn weights(dtype: DType, seed: u64, change: f64) -> Weights {
    let sizes = [0usize, 1, 7, 64, 4099, 70_000];
    Weights::new(sizes.into_iter().enumerate().map(|(index, size)| {
        let meta = TensorMeta::new(format!("t{index}"), dtype, [size * 2]).unwrap();
        let mut state = 1 + index as u64;
        let mut data: Vec<u8> = (0..meta.byte_len()).map(|_| (random(&mut state) >> 59) as u8 + 60).collect();
        let mut state = seed;
        for byte in &mut data {
            let draw = random(&mut state);
            if (draw >> 11) as f64 / (1u64 << 53) as f64 <= change && change > 0.0 {
                *byte = byte.wrapping_add((draw % 5) as u8);
            }
        }
        (meta, data.into())
    }))
    .unwrap()
}

/// Two checkpoints of which about this share of the bytes differs.
pub(crate) fn pair(dtype: DType, change: f64) -> Pair {
    Pair { parent: Some(weights(dtype, 1, 0.0)), current: weights(dtype, 77, change) }
}

/// One checkpoint.
pub(crate) fn base(dtype: DType) -> Pair {
    Pair { parent: None, current: weights(dtype, 77, 1.0) }
}
