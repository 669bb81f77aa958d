//! The model that goes up and comes down: a few files of random bytes, and the tensors that lie in them.

use bytes::{Bytes, BytesMut};
use towline_core::{Error, Result, TensorMeta, TensorSource};

use super::super::state::{fill, metas};

/// Files and tensors share their memory.
#[derive(Debug)]
pub(super) struct Model {
    metas: Vec<TensorMeta>,
    data: Vec<Bytes>,
    pub(super) files: Vec<Bytes>,
}

impl Model {
    /// About `mib` MiB in files of at most `shard` bytes, cut as our repo cuts: no tensor in two, unless one is larger.
    pub(super) fn new(mib: usize, shard: usize) -> Result<Self> {
        let metas = metas(mib)?;
        let (mut data, mut files) = (Vec::new(), Vec::new());
        let mut start = 0;
        while start < metas.len() {
            let rest = metas.get(start..).unwrap_or_default();
            let mut length = 0;
            let fits = rest.iter().take_while(|meta| {
                length += meta.byte_len();
                length <= shard
            });
            let count = fits.count().max(1);
            let run = rest.get(..count).unwrap_or_default();
            let mut file = BytesMut::zeroed(run.iter().map(TensorMeta::byte_len).sum());
            let mut at = 0;
            for (index, meta) in run.iter().enumerate() {
                let tensor = file.get_mut(at..at + meta.byte_len()).unwrap_or_default();
                fill(start + index, 0, tensor);
                at += meta.byte_len();
            }
            let mut left = file.freeze();
            files.push(left.clone());
            data.extend(run.iter().map(|meta| left.split_to(meta.byte_len())));
            start += count;
        }
        Ok(Self { metas, data, files })
    }

    pub(super) fn bytes(&self) -> usize {
        self.files.iter().map(Bytes::len).sum()
    }
}

impl TensorSource for Model {
    fn tensors(&self) -> &[TensorMeta] {
        &self.metas
    }

    fn read(&self, index: usize) -> Result<Bytes> {
        self.data.get(index).cloned().ok_or_else(|| Error::invalid(format!("no tensor {index}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_hold_the_tensors_one_behind_the_other() {
        let model = Model::new(16, 4 << 20).unwrap();
        assert!(model.files.len() >= 4, "{}", model.files.len());
        assert!(model.files.iter().all(|file| file.len() <= 4 << 20 && !file.is_empty()));
        let tensors: Vec<u8> = model.data.iter().flatten().copied().collect();
        let files: Vec<u8> = model.files.iter().flatten().copied().collect();
        assert!(tensors == files);
        assert_eq!(model.bytes(), files.len());
        for (index, meta) in model.tensors().iter().enumerate() {
            assert_eq!(model.read(index).unwrap().len(), meta.byte_len());
        }
        assert!(model.read(model.metas.len()).is_err());
    }
}
