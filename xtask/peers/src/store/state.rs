//! The train state: the weights of a transformer and two moments of Adam, fp32, with bytes that anybody can make again.

use std::ops::Range;

use bytes::Bytes;
use towline_core::{DType, Error, Result, TensorMeta, TensorSource};

use crate::memory::random;

/// Layers of the transformer.
const LAYERS: usize = 12;
/// An embedding, and of each layer four matrices of attention, three of the rest and a norm; all three times.
pub(super) const TENSORS: usize = 3 * (1 + 8 * LAYERS);
/// What [`random`] adds to its state for each word.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Names and shapes of about `mib` MiB.
pub(super) fn metas(mib: usize) -> Result<Vec<TensorMeta>> {
    let wanted = mib.checked_mul(1 << 20).map(|bytes| bytes / 4 / 3).filter(|elements| *elements >= 1 << 18);
    let elements =
        wanted.ok_or_else(|| Error::invalid(format!("a state of {mib} MiB: wanted 4 MiB or more")))?;
    // A layer has 14 width² elements; the embedding has what remains, about a tenth.
    let layer = |width: usize| 14 * width * width + width;
    let width =
        (1..).map(|eighth| 8 * eighth).take_while(|width| LAYERS * layer(*width) <= elements * 9 / 10);
    let width = width.last().unwrap_or(8);
    let mut model =
        vec![("embed_tokens".to_owned(), vec![(elements - LAYERS * layer(width)) / width, width])];
    for number in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            model.push((format!("layers.{number:02}.{name}"), shape.to_vec()));
        };
        for name in ["attn.k", "attn.o", "attn.q", "attn.v"] {
            add(name, &[width, width]);
        }
        add("mlp.down", &[width, 4 * width]);
        add("mlp.gate", &[2 * width, width]);
        add("mlp.up", &[4 * width, width]);
        add("norm", &[width]);
    }
    let kinds = ["model", "optimizer.exp_avg", "optimizer.exp_avg_sq"];
    let named = kinds.iter().flat_map(|kind| {
        model
            .iter()
            .map(move |(name, shape)| TensorMeta::new(format!("{kind}.{name}"), DType::F32, shape.clone()))
    });
    let mut metas = named.collect::<Result<Vec<_>>>()?;
    metas.sort_by(|left, right| left.name().cmp(right.name()));
    Ok(metas)
}

/// Fills `target` with what tensor `index` has from byte `start`, a multiple of 8.
pub(super) fn fill(index: usize, start: usize, target: &mut [u8]) {
    let mut state = ((index as u64) << 40).wrapping_add(((start / 8) as u64).wrapping_mul(STEP));
    for word in target.chunks_mut(8) {
        let bytes = random(&mut state).to_le_bytes();
        word.copy_from_slice(bytes.get(..word.len()).unwrap_or_default());
    }
}

/// A state in memory. It does not keep digests: the states of a training are new each time.
#[derive(Debug)]
pub(super) struct State {
    metas: Vec<TensorMeta>,
    data: Vec<Bytes>,
}

impl State {
    pub(super) fn new(mib: usize) -> Result<Self> {
        let metas = metas(mib)?;
        let made = metas.iter().enumerate().map(|(index, meta)| {
            let mut data = vec![0; meta.byte_len()];
            fill(index, 0, &mut data);
            Bytes::from(data)
        });
        let data = made.collect();
        Ok(Self { metas, data })
    }

    pub(super) fn bytes(&self) -> usize {
        self.metas.iter().map(TensorMeta::byte_len).sum()
    }

    pub(super) fn data(&self) -> &[Bytes] {
        &self.data
    }
}

impl TensorSource for State {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        self.data.get(index).cloned().ok_or_else(|| Error::invalid(format!("no tensor {index}")))
    }
}

/// A state that is made while it is read, for sizes beyond memory.
#[derive(Debug)]
pub(super) struct Made(pub(super) Vec<TensorMeta>);

impl TensorSource for Made {
    fn tensors(&self) -> &[TensorMeta] {
        &self.0
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        self.read_range(index, 0..self.0.get(index).map_or(0, TensorMeta::byte_len))
    }

    fn read_range(&self, index: usize, range: Range<usize>) -> Result<Bytes> {
        let length = self.0.get(index).map_or(0, TensorMeta::byte_len);
        if range.start > range.end || range.end > length || !range.start.is_multiple_of(8) {
            return Err(Error::invalid(format!("tensor {index} has no bytes {range:?}")));
        }
        let mut data = vec![0; range.len()];
        fill(index, range.start, &mut data);
        Ok(data.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_has_its_size_and_any_part_of_it_can_be_made() {
        for mib in [4, 64, 1024, 8192] {
            let metas = metas(mib).unwrap();
            assert_eq!(metas.len(), TENSORS);
            assert!(metas.is_sorted_by(|left, right| left.name() < right.name()));
            let bytes: usize = metas.iter().map(TensorMeta::byte_len).sum();
            assert!((mib << 20) - bytes < (mib << 20) / 100, "{bytes} of {mib} MiB");
            let largest = metas.iter().map(TensorMeta::byte_len).max().unwrap();
            assert!(largest < bytes / 8, "{largest}");
        }
        assert!(metas(0).is_err());
        let state = State::new(4).unwrap();
        let made = Made(state.metas.clone());
        for (index, data) in state.data.iter().enumerate() {
            assert_eq!(made.read(index).unwrap(), data);
            let range = 64..data.len() - 4;
            assert_eq!(made.read_range(index, range.clone()).unwrap(), data.slice(range));
        }
        assert_ne!(state.data[0][..64], state.data[1][..64]);
        assert!(made.read_range(0, 4..8).is_err() && made.read_range(TENSORS, 0..8).is_err());
    }
}
