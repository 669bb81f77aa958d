//! Checkpoints in memory, and the next checkpoint made of a delta.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use towline_core::safetensors::{SafetensorsFiles, serialize};
use towline_core::{Error, Mode, Result, TensorMeta, TensorSource, Weights};
use towline_storage::{FileSource, ShardReader, first_payload};

use crate::args::Args;

/// What is encoded: a checkpoint and, for a delta, the one before it.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) parent: Option<Weights>,
    pub(crate) current: Weights,
}

impl Pair {
    pub(crate) fn load(parent: Option<&Path>, current: &Path) -> Result<Self> {
        let read = |path: &Path| Weights::read_all(&open(path)?);
        Ok(Self { parent: parent.map(read).transpose()?, current: read(current)? })
    }

    pub(crate) fn mode(&self) -> Mode {
        if self.parent.is_some() { Mode::Delta } else { Mode::Base }
    }

    pub(crate) fn metas(&self) -> &[TensorMeta] {
        self.current.tensors()
    }

    /// The bytes of tensor `index`: of the parent, if there is one, and of the current checkpoint.
    pub(crate) fn tensor(&self, index: usize) -> Result<(Option<bytes::Bytes>, bytes::Bytes)> {
        let old = self.parent.as_ref().map(|parent| parent.read(index)).transpose()?;
        Ok((old, self.current.read(index)?))
    }

    /// The whole of it: the parent's tensors (empty for a base) and the current ones.
    pub(crate) fn all(&self) -> Result<Vec<(Option<bytes::Bytes>, bytes::Bytes)>> {
        (0..self.metas().len()).map(|index| self.tensor(index)).collect()
    }
}

/// Opens a safetensors file.
pub(crate) fn open(path: &Path) -> Result<SafetensorsFiles<FileSource>> {
    SafetensorsFiles::open(vec![FileSource::open(path)?]).map_err(|error| error.context(path.display()))
}

/// `next`: applies a delta and writes the result.
pub(crate) fn next(mut args: Args) -> Result<Value> {
    let (parent, delta, out) = (args.wanted("--parent")?, args.wanted("--delta")?, args.wanted("--out")?);
    args.finish()?;
    let parent = Weights::read_all(&open(Path::new(&parent))?)?;
    let reader = ShardReader::open(FileSource::open(Path::new(&delta))?)?;
    let id = match &reader.index().codec {
        Some(id) => id.clone(),
        None => towline_codec::recognise(&first_payload(&reader)?)
            .ok_or_else(|| Error::corrupt(format!("`{delta}` has none of the known formats")))?,
    };
    let codec = towline_codec::by_id(id.as_str())?;
    let mut tensors = Vec::new();
    for (meta, data) in parent.iter() {
        let mut target = data.to_vec();
        reader.decode_tensor(codec.as_ref(), meta.name(), meta, &mut target, std::num::NonZeroUsize::MIN)?;
        tensors.push((meta.clone(), target.into()));
    }
    let bytes = serialize(&Weights::new(tensors)?, &BTreeMap::new())?;
    // Under another name first: a run that was cut short must not leave half a file behind.
    let unfinished = format!("{out}.part");
    std::fs::write(&unfinished, &bytes)
        .and_then(|()| std::fs::rename(&unfinished, &out))
        .map_err(|error| Error::unavailable(format!("`{out}` could not be written")).with_source(error))?;
    Ok(json!({"codec": id.as_str(), "bytes": bytes.len()}))
}
