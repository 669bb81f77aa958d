//! Every byte of a snapshot, read and checked.

use towline_core::{DIGEST_BLOCK, Error, FileEntry, Manifest, Result, TensorDigest, block_digest};

use super::SnapshotRepo;
use super::info::SnapshotInfo;
use super::lost;
use crate::io::blocking;

/// How much of a file is read at once, in bytes.
const READ: u64 = 8 * DIGEST_BLOCK as u64;

/// What [`SnapshotRepo::verify`] has read and found good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// Tensors of the snapshot, each restored through the whole chain.
    pub tensors: u64,
    /// Bytes of all files of the chain.
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
        let mut found = Verified { tensors: 0, bytes: 0, files: 0 };
        let manifest = self.manifest(info).await?;
        if manifest.ranks > 1 {
            self.verify_files(info, &manifest).await?;
            found.files = manifest.files.len() as u64;
            found.bytes = manifest.files.iter().map(|file| file.bytes).sum();
            found.tensors = self.open_state(info).await?.read_all().await?.tensors().len() as u64;
            return Ok(found);
        }
        let chain = self.open_chain(info).await?;
        for link in &chain {
            self.verify_files(&link.info, &link.manifest).await?;
            found.files += link.manifest.files.len() as u64;
            found.bytes += link.manifest.files.iter().map(|file| file.bytes).sum::<u64>();
        }
        for batch in self.batches(&chain) {
            found.tensors += self.restore_batch(&chain, batch).await?.len() as u64;
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

    async fn verify_file(&self, info: &SnapshotInfo, entry: &FileEntry) -> Result<()> {
        let key = self.key(info, &entry.path)?;
        let size = self.ops.head(&key).await?.size;
        if size != entry.bytes {
            return Err(Error::corrupt(format!("wanted {} bytes, found {size}", entry.bytes)));
        }
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
