//! A snapshot as a plain Hugging Face folder.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use towline_core::safetensors::{Header, layout};
use towline_core::{Error, Result, SnapshotKind, TensorMeta};

use super::SnapshotRepo;
use super::files::{INDEX, index_json, plain_files, plain_metadata};
use super::info::SnapshotInfo;
use crate::folder::{NewFolder, unwritten};
use crate::io::blocking;

impl SnapshotRepo {
    /// Writes the whole weights of a snapshot, and the files that were passed through, to the new folder `dir`: a model's
    /// of Hugging Face, or an adapter's of PEFT. It is
    /// written beside and renamed into its place, so that it is there whole or not at all. The passed-through files
    /// of a delta are those of its nearest parent that has any.
    ///
    /// # Errors
    /// `AlreadyExists` if `dir` is there and not an empty folder; else as [`SnapshotRepo::restore`], and what the
    /// disk answers.
    pub async fn export(&self, info: &SnapshotInfo, dir: &Path) -> Result<()> {
        let target = dir.to_owned();
        let folder = blocking(move || NewFolder::beside(target)).await?;
        let chain = self.open_chain(info).await?;
        let metas = chain.last().map(|link| link.metas.clone()).unwrap_or_default();
        let shards = plain_files(info.kind, &metas, self.shard_bytes);
        let mut open: Option<Shard> = None;
        let mut rest = shards.iter();
        for batch in self.batches(&chain) {
            for (number, (_, data)) in batch.clone().zip(self.restore_batch(&chain, batch).await?) {
                let mut shard = match open.take() {
                    Some(shard) if shard.run.contains(&number) => shard,
                    full => {
                        close(full).await?;
                        let (name, run) =
                            rest.next().ok_or_else(|| Error::internal("more tensors than files"))?;
                        let (path, run, metas) = (folder.path.join(name), run.clone(), metas.clone());
                        blocking(move || Shard::create(path, run, &metas)).await?
                    }
                };
                open = Some(
                    blocking(move || {
                        shard.write(number, &data)?;
                        Ok(shard)
                    })
                    .await?,
                );
            }
        }
        close(open).await?;
        for (name, run) in rest {
            // A model without tensors still has a file.
            let (path, run) = (folder.path.join(name), run.clone());
            close(Some(blocking(move || Shard::create(path, run, &[])).await?)).await?;
        }

        let mut files = self.passed_through(&chain).await?;
        if info.kind != SnapshotKind::Adapter {
            let total = metas.iter().map(|meta| meta.byte_len() as u64).sum();
            let places = shards.iter().flat_map(|(name, run)| {
                metas.get(run.clone()).unwrap_or_default().iter().map(|meta| (meta.name(), name.as_str()))
            });
            files.push((INDEX.to_owned(), index_json(total, places)?));
        }
        blocking(move || {
            for (path, body) in files {
                folder.write(&path, &body)?;
            }
            folder.keep()
        })
        .await
    }
}

async fn close(shard: Option<Shard>) -> Result<()> {
    match shard {
        Some(shard) => {
            blocking(move || shard.file.sync_all().map_err(|error| unwritten(error, &shard.path))).await
        }
        None => Ok(()),
    }
}

/// A plain file whose tensors come in the order of their names, not of the file.
struct Shard {
    file: File,
    path: PathBuf,
    run: Range<usize>,
    /// Where each tensor of the run begins.
    places: Vec<u64>,
}

impl Shard {
    fn create(path: PathBuf, run: Range<usize>, metas: &[TensorMeta]) -> Result<Self> {
        let metas = metas.get(run.clone()).unwrap_or_default();
        let order = layout(metas);
        let sorted: Vec<_> = order.iter().filter_map(|&index| metas.get(index).cloned()).collect();
        let header = Header::encode(&sorted, &plain_metadata())?;
        let mut places = vec![0; metas.len()];
        let mut start = header.len() as u64;
        for (index, meta) in order.into_iter().zip(&sorted) {
            if let Some(place) = places.get_mut(index) {
                *place = start;
            }
            start += meta.byte_len() as u64;
        }
        let mut file = File::create_new(&path).map_err(|error| unwritten(error, &path))?;
        file.write_all(&header).map_err(|error| unwritten(error, &path))?;
        Ok(Self { file, path, run, places })
    }

    fn write(&mut self, number: usize, data: &[u8]) -> Result<()> {
        let place = self.places.get(number - self.run.start).copied().unwrap_or_default();
        let seek = io::Seek::seek(&mut self.file, io::SeekFrom::Start(place));
        seek.and_then(|_| self.file.write_all(data)).map_err(|error| unwritten(error, &self.path))
    }
}
