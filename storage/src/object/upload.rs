//! Objects that go up in parts.

use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt as _, PutPayloadMut};
use tokio::task::JoinSet;
use towline_core::{Error, ObjectKey, ObjectWriter, Result, Version, async_trait};

use super::journal::Journal;
use super::{failed, put_version};

/// The length of an uploaded part, in bytes: object stores want all parts but the last alike.
const PART: usize = 8 << 20;
/// Parts on their way at once. Memory of a writer: these and one more, unless others hold the pieces anyway.
const PARTS_AT_ONCE: usize = 8;
/// Shorter pieces are copied together: each piece costs a call of its own when it is sent.
const PIECE: usize = 64 << 10;

/// Collects parts, and puts the object at once if it stays below one part.
#[derive(Debug)]
pub(super) struct PartWriter {
    store: Arc<dyn ObjectStore>,
    path: Path,
    key: ObjectKey,
    part: PutPayloadMut,
    upload: Option<Box<dyn MultipartUpload>>,
    parts: JoinSet<object_store::Result<()>>,
    journal: Option<Arc<Journal>>,
}

impl PartWriter {
    pub(super) fn new(store: Arc<dyn ObjectStore>, path: Path, key: ObjectKey) -> Self {
        Self { store, path, key, part: empty(), upload: None, parts: JoinSet::new(), journal: None }
    }

    pub(super) fn with_journal(mut self, journal: Option<Arc<Journal>>) -> Self {
        self.journal = journal;
        self
    }

    async fn begin(&mut self) -> object_store::Result<Box<dyn MultipartUpload>> {
        if let Some(journal) = &self.journal {
            return journal.begin(&self.path).await;
        }
        self.store.put_multipart(&self.path).await
    }

    async fn send(&mut self) -> Result<()> {
        while self.parts.len() >= PARTS_AT_ONCE {
            self.join_one().await?;
        }
        let upload = match &mut self.upload {
            Some(upload) => upload,
            None => {
                let upload = self.begin().await;
                self.upload.insert(upload.map_err(|error| failed(error, &self.key, "written"))?)
            }
        };
        let part = std::mem::replace(&mut self.part, empty());
        self.parts.spawn(upload.put_part(part.freeze()));
        Ok(())
    }

    async fn join_one(&mut self) -> Result<()> {
        match self.parts.join_next().await {
            None | Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(error))) => Err(failed(error, &self.key, "written")),
            Some(Err(error)) => {
                Err(Error::internal(format!("`{}`: the upload of a part ended early", self.key))
                    .with_source(error))
            }
        }
    }
}

#[async_trait]
impl ObjectWriter for PartWriter {
    async fn write(&mut self, mut piece: Bytes) -> Result<()> {
        while !piece.is_empty() {
            // Not before more is there: the last part has something in it.
            if self.part.content_length() == PART {
                self.send().await?;
            }
            let fits = piece.split_to(piece.len().min(PART - self.part.content_length()));
            if fits.len() < PIECE {
                self.part.extend_from_slice(&fits);
            } else {
                self.part.push(fits);
            }
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<Version> {
        if self.upload.is_none() {
            let whole = std::mem::take(&mut self.part).freeze();
            let put = self.store.put(&self.path, whole).await;
            return put.map(|put| put_version(&put)).map_err(|error| failed(error, &self.key, "written"));
        }
        self.send().await?;
        while !self.parts.is_empty() {
            self.join_one().await?;
        }
        let Some(upload) = &mut self.upload else {
            return Err(Error::internal(format!("`{}`: the upload is gone", self.key)));
        };
        let put = upload.complete().await.map_err(|error| failed(error, &self.key, "finished"))?;
        self.upload = None;
        Ok(put_version(&put))
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        self.parts.shutdown().await;
        match self.upload.take() {
            Some(mut upload) => upload.abort().await.map_err(|error| failed(error, &self.key, "given up")),
            None => Ok(()),
        }
    }
}

impl Drop for PartWriter {
    fn drop(&mut self) {
        if let (Some(mut upload), Ok(runtime)) = (self.upload.take(), tokio::runtime::Handle::try_current()) {
            self.parts.abort_all();
            runtime.spawn(async move { upload.abort().await });
        }
    }
}

fn empty() -> PutPayloadMut {
    PutPayloadMut::new().with_block_size(PIECE)
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    #[test]
    fn pieces_of_any_length_go_up_in_equal_parts() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let all: Vec<u8> = (0..2 * PART + 77).map(|at| (at / 3) as u8).collect();
            for total in [0, 1, PART, PART + 1, 2 * PART, 2 * PART + 77] {
                for piece in [1 << 10, PIECE - 1, PIECE, 3 << 20, 3 * PART] {
                    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
                    let key = ObjectKey::new("a").unwrap();
                    let mut writer =
                        Box::new(PartWriter::new(Arc::clone(&store), Path::from("a"), key.clone()));
                    for piece in all[..total].chunks(piece) {
                        writer.write(Bytes::copy_from_slice(piece)).await.unwrap();
                        assert!(writer.part.content_length() <= PART);
                    }
                    assert_eq!(writer.upload.is_some(), total > PART, "{total}");
                    writer.finish().await.unwrap();
                    let found = store.get(&Path::from("a")).await.unwrap().bytes().await.unwrap();
                    assert!(found[..] == all[..total], "{total} in pieces of {piece}");
                }
            }
        });
    }
}
