//! Every byte of a snapshot, read and checked.

use towline_core::{DIGEST_BLOCK, Error, FileEntry, Manifest, ObjectKey, Result, TensorDigest, block_digest};

use super::SnapshotRepo;
use super::info::SnapshotInfo;
use super::lost;
use crate::io::blocking;
use crate::random::random;

/// How much of a file is read at once, in bytes.
const READ: u64 = 8 * DIGEST_BLOCK as u64;

/// How much of a snapshot is verified.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Depth {
    /// The manifests, and that every file is there and as long as it should be.
    Quick,
    /// That, and as great a share of the tensors, from 0 to 1, drawn anew each time and restored through the chain.
    Sample(f64),
    /// Every byte of every file, and every tensor.
    Full,
}

/// What [`SnapshotRepo::verify`] has read and found good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// Tensors of the snapshot that were restored, each through the whole chain.
    pub tensors: u64,
    /// Bytes of all files of the chain if every byte was verified, else of the tensors that were.
    pub bytes: u64,
    /// Files of the chain.
    pub files: u64,
}

impl SnapshotRepo {
    /// Reads every byte of every file of a snapshot and of what it rests on, and restores every tensor.
    ///
    /// # Errors
    /// `Corrupt` naming what is damaged; else as [`SnapshotRepo::restore`].
    pub async fn verify(&self, info: &SnapshotInfo) -> Result<Verified> {
        self.verify_to(info, Depth::Full).await
    }

    /// As [`SnapshotRepo::verify`], to some depth.
    ///
    /// # Errors
    /// As [`SnapshotRepo::verify`]; `Invalid` for a share that is not from 0 to 1.
    pub async fn verify_to(&self, info: &SnapshotInfo, depth: Depth) -> Result<Verified> {
        let share = match depth {
            Depth::Full => 1.0,
            Depth::Quick => 0.0,
            Depth::Sample(share) if (0.0..=1.0).contains(&share) => share,
            Depth::Sample(share) => {
                return Err(Error::invalid(format!("a share of {share}: wanted 0 to 1"))
                    .with_help("give 0.1 for a tenth of the tensors"));
            }
        };
        let full = depth == Depth::Full;
        let mut found = Verified { tensors: 0, bytes: 0, files: 0 };
        let manifest = self.manifest(info).await?;
        // A state is no chain, and the files of many ranks hold boxes.
        let is_state = manifest.ranks > 0;
        let chain = if is_state { Vec::new() } else { self.open_chain(info).await? };
        let links = chain.iter().map(|link| (&link.info, &link.manifest));
        for (info, manifest) in links.chain(is_state.then_some((info, &manifest))) {
            found.files += manifest.files.len() as u64;
            if full {
                self.verify_files(info, manifest).await?;
                found.bytes += manifest.files.iter().map(|file| file.bytes).sum::<u64>();
                continue;
            }
            for entry in &manifest.files {
                self.verify_size(info, entry).await.map_err(|error| lost(error, info))?;
            }
        }
        let drawn = |_: &usize| full || (random() as f64) < share * (u64::MAX as f64);
        let tensors = (0..manifest.tensors.len()).filter(drawn);
        let mut read = 0;
        if is_state {
            let reader = self.open_state(info).await?;
            for entry in tensors.filter_map(|number| manifest.tensors.get(number)) {
                let offset = vec![0; entry.shape.len()];
                read += reader.read(&entry.name, &offset, &entry.shape).await?.len() as u64;
                found.tensors += 1;
            }
        } else {
            let batches =
                if full { self.batches(&chain) } else { tensors.map(|number| number..number + 1).collect() };
            for batch in batches {
                let batch = self.restore_batch(&chain, batch).await?;
                read += batch.iter().map(|(_, data)| data.len() as u64).sum::<u64>();
                found.tensors += batch.len() as u64;
            }
        }
        if !full {
            found.bytes = read;
        }
        Ok(found)
    }

    async fn verify_files(&self, info: &SnapshotInfo, manifest: &Manifest) -> Result<()> {
        for entry in &manifest.files {
            self.verify_file(info, entry)
                .await
                .map_err(|error| lost(error.context(format_args!("`{}`", entry.path)), info))?;
        }
        Ok(())
    }

    async fn verify_size(&self, info: &SnapshotInfo, entry: &FileEntry) -> Result<ObjectKey> {
        let key = self.file_key(info, entry)?;
        let size = self.ops.head(&key).await?.size;
        if size == entry.bytes {
            return Ok(key);
        }
        Err(Error::corrupt(format!("`{key}`: wanted {} bytes, found {size}", entry.bytes)))
    }

    async fn verify_file(&self, info: &SnapshotInfo, entry: &FileEntry) -> Result<()> {
        let key = self.verify_size(info, entry).await?;
        let mut blocks = Vec::new();
        let mut start = 0;
        while start < entry.bytes {
            let end = entry.bytes.min(start + READ);
            let part = self.ops.get(&key, Some(start..end)).await?;
            if part.len() as u64 != end - start {
                return Err(Error::corrupt(format!(
                    "wanted {} bytes at {start}, found {}",
                    end - start,
                    part.len()
                )));
            }
            let digests = move || Ok(part.chunks(DIGEST_BLOCK).map(block_digest).collect::<Vec<_>>());
            blocks.extend(blocking(digests).await?);
            start = end;
        }
        if TensorDigest::of_blocks(blocks) == entry.digest {
            return Ok(());
        }
        Err(Error::corrupt("the file does not match its digest").with_help("restore another snapshot"))
    }
}
