//! `towline delta`: deltas between checkpoints in files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::json;
use towline_core::pipeline::Limits;
use towline_core::safetensors::{Header, SafetensorsFiles, layout};
use towline_core::{
    Codec, ContentDigest, Error, Framing, Mode, Result, TensorDigest, TensorMeta, TensorSource, position,
};
use towline_storage::{FileSource, ShardReader, first_payload, write_shard};

use super::files::{Counted, Replacement, Subset, byte_len, open_weights, shards, unwritable};
use super::output::{Output, table};

const ENCODED: &[&str] = &["safetensors", "towline"];

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Encode the difference between two checkpoints.
    #[command(
        after_help = "Example:\n  towline delta encode --parent step-1.safetensors --current step-2.safetensors \
        --codec arc_v2 -o delta.safetensors"
    )]
    Encode(Encode),
    /// Apply a delta to its parent.
    #[command(
        after_help = "Example:\n  towline delta apply --parent step-1.safetensors --delta delta.safetensors \
        -o step-2.safetensors"
    )]
    Apply(Apply),
    /// Show what a delta file holds.
    #[command(after_help = "Example:\n  towline delta inspect delta.safetensors")]
    Inspect(Inspect),
}

#[derive(Debug, Args)]
pub(crate) struct Encode {
    /// The older checkpoint: a safetensors file or a directory of shards.
    #[arg(long)]
    parent: PathBuf,
    /// The newer checkpoint, of the same tensors.
    #[arg(long)]
    current: PathBuf,
    /// raw, zstd, lz4, arc_v1, arc_v2 or arc_v3.
    #[arg(long)]
    codec: String,
    /// The delta to write: a file, or a directory if CURRENT is one.
    #[arg(short, long)]
    output: PathBuf,
    /// Threads that encode; 0 for all.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// The checkpoint that the delta was made against.
    #[arg(long)]
    parent: PathBuf,
    /// The delta: a file or a directory.
    #[arg(long)]
    delta: PathBuf,
    /// The checkpoint to write. One that exists is replaced whole, or left as it is.
    #[arg(short, long)]
    output: PathBuf,
    /// The codec, if it is not to be recognised from the file.
    #[arg(long)]
    codec: Option<String>,
    /// Threads that decode; 0 for all.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The delta: a file or a directory.
    delta: PathBuf,
    /// The codec, if it is not to be recognised from the file.
    #[arg(long)]
    codec: Option<String>,
}

pub(crate) fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::Encode(options) => encode(&options, output),
        Command::Apply(options) => apply(&options, output),
        Command::Inspect(options) => inspect(&options, output),
    }
}

/// `0` as the number of cores.
pub(crate) fn limits(threads: usize) -> Limits {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Limits::threads(if threads == 0 { cores } else { threads })
}

fn encode(options: &Encode, output: &Output) -> Result<()> {
    let codec = towline_codec::by_id(&options.codec)?;
    let parent = open_weights(&options.parent)?;
    let current = open_weights(&options.current)?;
    towline_core::same_tensors(parent.tensors(), current.tensors())
        .map_err(|error| error.context("the checkpoints do not hold the same tensors"))?;
    let progress = output.progress("encode", byte_len(&current));
    let limits = limits(options.threads);
    let started = std::time::Instant::now();
    let replacement = Replacement::new(&options.output)?;
    let files = shards(&options.current, &["safetensors"])?;
    let directory = options.current.is_dir();
    if directory {
        create_dir(&replacement.path())?;
    }
    let (mut bytes, mut changed, mut elements) = (0, 0, 0);
    for file in &files {
        let shard = SafetensorsFiles::open(vec![FileSource::open(file)?])?;
        let old = Subset::new(&parent, shard.tensors())?;
        let target = match directory {
            true => replacement.path().join(encoded_name(file, codec.as_ref())),
            false => replacement.path(),
        };
        let mut writer = create(&target)?;
        let summary =
            write_shard(&mut writer, codec.as_ref(), &Counted(&shard, &progress), Some(&old), limits)?;
        finish(writer, &target)?;
        bytes += summary.bytes;
        changed += summary.changed;
        elements += summary.elements;
    }
    replacement.commit()?;
    drop(progress);
    let raw = byte_len(&current);
    let ratio = 100.0 * bytes as f64 / raw.max(1) as f64;
    let share = 100.0 * changed as f64 / elements.max(1) as f64;
    let seconds = started.elapsed().as_secs_f64();
    output.result(
        format_args!(
            "{}: {} of {} bytes ({ratio:.3} %), {share:.3} % of the elements changed, {seconds:.2} s",
            options.output.display(),
            bytes,
            raw
        ),
        &json!({
            "output": options.output, "codec": codec.id().as_str(), "encoded_bytes": bytes, "raw_bytes": raw,
            "ratio": ratio, "changed": changed, "elements": elements, "seconds": seconds,
        }),
    );
    Ok(())
}

fn apply(options: &Apply, output: &Output) -> Result<()> {
    let parent = open_weights(&options.parent)?;
    let limits = limits(options.threads);
    let progress = output.progress("apply", byte_len(&parent));
    let started = std::time::Instant::now();
    let replacement = Replacement::new(&options.output)?;
    let directory = options.delta.is_dir();
    if directory {
        create_dir(&replacement.path())?;
    }
    let mut seen = 0;
    let mut codec_id = String::new();
    for file in shards(&options.delta, ENCODED)? {
        let (reader, codec) = open_delta(&file, options.codec.as_deref())?;
        codec.id().as_str().clone_into(&mut codec_id);
        let metas = target_metas(&reader, &parent)?;
        seen += metas.len();
        let old = match reader.index().mode {
            Mode::Base => None,
            Mode::Delta => Some(Subset::new(&parent, &metas)?),
        };
        if let (Some(wanted), Some(old)) = (&reader.index().parent, &old) {
            check_parent(&file, wanted, old)?;
        }
        let target = match directory {
            true => {
                replacement.path().join(file.with_extension("safetensors").file_name().unwrap_or_default())
            }
            false => replacement.path(),
        };
        let mut writer = create(&target)?;
        let order = layout(&metas);
        let ordered: Vec<(usize, &TensorMeta)> =
            order.into_iter().filter_map(|index| Some((index, metas.get(index)?))).collect();
        let plain: Vec<TensorMeta> = ordered.iter().map(|(_, meta)| (*meta).clone()).collect();
        let mut digests = Vec::with_capacity(ordered.len());
        let header = Header::encode(&plain, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
        let failed = |error| unwritable(&options.output, error);
        writer.write_all(&header).map_err(failed)?;
        for (index, meta) in ordered {
            let mut bytes = match &old {
                None => vec![0; meta.byte_len()],
                Some(old) => old.read(position(old.tensors(), meta.name()).unwrap_or(usize::MAX))?.to_vec(),
            };
            let digest =
                reader.decode_tensor(codec.as_ref(), meta.name(), meta, &mut bytes, limits.threads)?;
            digests.extend(digest.map(|digest| (index, digest)));
            writer.write_all(&bytes).map_err(failed)?;
            progress.add(bytes.len() as u64);
        }
        digests.sort_unstable_by_key(|(index, _)| *index);
        let digests: Vec<_> = digests.into_iter().map(|(_, digest)| digest).collect();
        reader.index().check_content(&digests).map_err(|error| error.context(file.display()))?;
        finish(writer, &target)?;
    }
    if seen != parent.tensors().len() {
        return Err(Error::chain_mismatch(format!(
            "the delta holds {seen} tensors, the parent {}",
            parent.tensors().len()
        ))
        .with_help("give all shards of the delta, and its own parent"));
    }
    replacement.commit()?;
    drop(progress);
    let seconds = started.elapsed().as_secs_f64();
    output.result(
        format_args!("{}: {seen} tensors, {codec_id}, {seconds:.2} s", options.output.display()),
        &json!({"output": options.output, "codec": codec_id, "tensors": seen, "seconds": seconds}),
    );
    Ok(())
}

fn inspect(options: &Inspect, output: &Output) -> Result<()> {
    let mut rows = Vec::new();
    let mut files = Vec::new();
    for file in shards(&options.delta, ENCODED)? {
        let (reader, codec) = open_delta(&file, options.codec.as_deref())?;
        let index = reader.index();
        let tensors: Vec<_> = index
            .tensors
            .iter()
            .map(|tensor| {
                let bytes: u64 = tensor.frames.iter().map(|range| range.end - range.start).sum();
                json!({
                    "name": tensor.name,
                    "dtype": tensor.meta.as_ref().map(|meta| meta.dtype().as_str()),
                    "shape": tensor.meta.as_ref().map(TensorMeta::shape),
                    "bytes": bytes, "frames": tensor.frames.len(),
                    "checksum": tensor.checksum,
                })
            })
            .collect();
        for tensor in &tensors {
            let text = |key: &str| match tensor.get(key) {
                None | Some(serde_json::Value::Null) => "–".to_owned(),
                Some(serde_json::Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            };
            rows.push(["name", "dtype", "shape", "bytes"].map(text).to_vec());
        }
        files.push(json!({
            "file": file, "codec": codec.id().as_str(), "mode": index.mode, "payload_bytes": index.payload_len(),
            "content": index.content.map(|digest| digest.to_string()),
            "parent": index.parent.map(|digest| digest.to_string()), "tensors": tensors,
        }));
    }
    let heads: Vec<String> = files
        .iter()
        .map(|file| {
            format!(
                "{}: {} {}, {} bytes of payload",
                file["file"], file["codec"], file["mode"], file["payload_bytes"]
            )
        })
        .collect();
    output.result(
        format_args!("{}\n{}", heads.join("\n"), table(&["tensor", "dtype", "shape", "bytes"], &rows)),
        &json!({"files": files}),
    );
    Ok(())
}

fn open_delta(file: &Path, codec: Option<&str>) -> Result<(ShardReader<FileSource>, Arc<dyn Codec>)> {
    let context = |error: Error| error.context(format_args!("`{}`", file.display()));
    let reader = ShardReader::open(FileSource::open(file)?).map_err(context)?;
    let codec = match (codec, &reader.index().codec) {
        (Some(id), _) => towline_codec::by_id(id)?,
        (None, Some(id)) => towline_codec::by_id(id.as_str()).map_err(context)?,
        (None, None) => {
            let payload = first_payload(&reader)?;
            let id = towline_codec::recognise(&payload).ok_or_else(|| {
                Error::corrupt(format!("`{}`: no known codec's payload", file.display()))
                    .with_help("name the codec with --codec")
            })?;
            towline_codec::by_id(id.as_str())?
        }
    };
    Ok((reader, codec))
}

/// Name, type and shape of each tensor: from the container, or from the parent for the arc formats.
fn target_metas(reader: &ShardReader<FileSource>, parent: &dyn TensorSource) -> Result<Vec<TensorMeta>> {
    let found = reader.index().tensors.iter().map(|tensor| match &tensor.meta {
        Some(meta) => Ok(meta.clone()),
        None => position(parent.tensors(), &tensor.name)
            .and_then(|index| parent.tensors().get(index).cloned())
            .ok_or_else(|| Error::chain_mismatch(format!("the parent has no tensor `{}`", tensor.name))),
    });
    found.collect()
}

fn check_parent(file: &Path, wanted: &ContentDigest, parent: &dyn TensorSource) -> Result<()> {
    let digests = (0..parent.tensors().len())
        .map(|index| Ok(TensorDigest::of(&parent.read(index)?)))
        .collect::<Result<Vec<_>>>()?;
    let found = ContentDigest::of_tensors(
        parent
            .tensors()
            .iter()
            .zip(&digests)
            .map(|(meta, digest)| (meta.name(), meta.dtype(), meta.shape(), digest)),
    );
    if found == *wanted {
        return Ok(());
    }
    Err(Error::chain_mismatch(format!(
        "`{}` was made against weights {wanted}, found {found}",
        file.display()
    ))
    .with_help("give the checkpoint that the delta was encoded with"))
}

fn encoded_name(file: &Path, codec: &dyn Codec) -> PathBuf {
    let extension = match codec.framing() {
        Framing::Safetensors => "safetensors",
        Framing::Container | _ => "towline",
    };
    PathBuf::from(file.with_extension(extension).file_name().unwrap_or_default())
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    File::create(path)
        .map(|file| BufWriter::with_capacity(1 << 20, file))
        .map_err(|error| unwritable(path, error))
}

fn create_dir(path: &Path) -> Result<()> {
    std::fs::create_dir(path).map_err(|error| unwritable(path, error))
}

fn finish(writer: BufWriter<File>, path: &Path) -> Result<()> {
    let file = writer.into_inner().map_err(|error| unwritable(path, error.into_error()))?;
    file.sync_all().map_err(|error| unwritable(path, error))
}
