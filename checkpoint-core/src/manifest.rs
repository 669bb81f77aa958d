//! The stored form of a snapshot's description. This file alone knows it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    CodecId, ContentDigest, DType, Error, JobId, ManifestDigest, ObjectKey, Result, SessionId, SnapshotId,
    SnapshotIdentity, SnapshotKind, SnapshotName, TensorDigest, TensorMeta, WriteId,
};

/// The version of the stored form that is written. Readers take this one and refuse newer ones.
pub const MANIFEST_VERSION: u32 = 1;
/// The largest manifest that is read, in bytes.
pub const MAX_MANIFEST: u64 = 256 << 20;

/// What a stored snapshot or train state is, whole: kind, chain, files, tensors with their digests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// What it is.
    pub kind: SnapshotKind,
    /// The caller's name.
    pub name: SnapshotName,
    /// The name with the session behind it.
    pub identity: SnapshotIdentity,
    /// The job that owns it.
    pub job: JobId,
    /// The connection that wrote it.
    pub session: SessionId,
    /// Its number within the job, never used twice.
    pub seq: u64,
    /// The writer's fence number.
    pub epoch: u64,
    /// The attempt that wrote it.
    pub write_id: WriteId,
    /// Optimizer steps done.
    pub step: Option<u64>,
    /// Milliseconds since 1970 when it was written, by the writer's clock.
    pub created_ms: u64,
    /// Milliseconds since 1970 when it expires; `None` for never.
    pub expires_ms: Option<u64>,
    /// The identity of the weights that it stands for; of a delta, of the result.
    pub digest: ContentDigest,
    /// For a delta: what it is applied to.
    pub parent: Option<ParentRef>,
    /// For a delta: where its chain begins.
    pub base: Option<BaseRef>,
    /// How tensors are encoded; `None` for plain safetensors.
    pub codec: Option<CodecId>,
    /// Every file but the manifest.
    pub files: Vec<FileEntry>,
    /// Every tensor of the result, sorted by name.
    pub tensors: Vec<TensorEntry>,
    /// Named sections of a train state: schedule, step, RNG, cursor, and the caller's own.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub sections: serde_json::Map<String, serde_json::Value>,
    /// Notes of the caller.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Elements that differ from the parent, and elements in all.
    pub changed: Option<(u64, u64)>,
    /// For a train state: how many ranks wrote it, each with an index `rank-<number>.json` among the files.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ranks: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A delta's parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ParentRef {
    /// Its number within the job.
    pub seq: u64,
    /// Identity and content digest.
    #[serde(flatten)]
    pub id: SnapshotId,
}

impl ParentRef {
    /// All fields.
    #[must_use]
    pub fn new(seq: u64, id: SnapshotId) -> Self {
        Self { seq, id }
    }
}

/// Where a delta's chain begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BaseRef {
    /// The base's number within the job.
    pub seq: u64,
    /// Identity and content digest.
    #[serde(flatten)]
    pub id: SnapshotId,
    /// How many deltas lie on it, this one included.
    pub depth: u32,
}

impl BaseRef {
    /// All fields.
    #[must_use]
    pub fn new(seq: u64, id: SnapshotId, depth: u32) -> Self {
        Self { seq, id, depth }
    }
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FileEntry {
    /// The path below the snapshot's directory.
    pub path: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// The digest of its bytes, taken by 1 MiB blocks as a tensor's.
    pub digest: TensorDigest,
    /// Whether it holds tensors; the others are passed through (`config.json`, tokenizer files).
    pub weights: bool,
    /// For a file of another train state, which is referred to: that one's folder, below the job's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<ObjectKey>,
}

impl FileEntry {
    /// A file in the snapshot's own folder.
    pub fn new(path: impl Into<String>, bytes: u64, digest: TensorDigest, weights: bool) -> Self {
        Self { path: path.into(), bytes, digest, weights, dir: None }
    }

    /// Says in which other train state's folder it lies.
    #[must_use]
    pub fn with_dir(mut self, dir: ObjectKey) -> Self {
        self.dir = Some(dir);
        self
    }
}

/// A tensor of a snapshot's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The digest of its bytes.
    pub digest: TensorDigest,
    /// The file that holds it, as an index into the files.
    pub file: usize,
}

impl TensorEntry {
    /// All fields.
    #[must_use]
    pub fn new(meta: &TensorMeta, digest: TensorDigest, file: usize) -> Self {
        Self { name: meta.name().to_owned(), dtype: meta.dtype(), shape: meta.shape().to_vec(), digest, file }
    }

    /// Name, type and shape, checked.
    ///
    /// # Errors
    /// `Invalid` as [`TensorMeta::new`].
    pub fn meta(&self) -> Result<TensorMeta> {
        TensorMeta::new(&self.name, self.dtype, self.shape.clone())
    }
}

/// What a manifest cannot be without; the rest is set on the result.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "the mandatory fields of a manifest, named at the call")]
#[expect(missing_docs, reason = "each is documented on Manifest")]
pub struct ManifestHead {
    pub kind: SnapshotKind,
    pub name: SnapshotName,
    pub job: JobId,
    pub session: SessionId,
    pub seq: u64,
    pub epoch: u64,
    pub write_id: WriteId,
    pub created_ms: u64,
}

impl Manifest {
    /// A manifest whose content digest is taken from `tensors`, which are put in order by name.
    #[must_use]
    pub fn new(head: ManifestHead, files: Vec<FileEntry>, mut tensors: Vec<TensorEntry>) -> Self {
        tensors.sort_by(|left, right| left.name.cmp(&right.name));
        let ManifestHead { kind, name, job, session, seq, epoch, write_id, created_ms } = head;
        Self {
            version: MANIFEST_VERSION,
            kind,
            identity: SnapshotIdentity::of(&name, &session),
            name,
            job,
            session,
            seq,
            epoch,
            write_id,
            step: None,
            created_ms,
            expires_ms: None,
            digest: content_digest(&tensors),
            parent: None,
            base: None,
            codec: None,
            files,
            tensors,
            sections: serde_json::Map::new(),
            metadata: BTreeMap::new(),
            changed: None,
            ranks: 0,
        }
    }

    /// Identity and content digest.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        SnapshotId { identity: self.identity.clone(), digest: self.digest }
    }

    /// The tensors' names, types and shapes, checked.
    ///
    /// # Errors
    /// `Corrupt` if one is not well formed.
    pub fn tensor_metas(&self) -> Result<Vec<TensorMeta>> {
        self.tensors
            .iter()
            .map(|entry| {
                entry.meta().map_err(|error| {
                    Error::corrupt(format!("manifest of {}: {}", self.identity, error.message()))
                })
            })
            .collect()
    }

    /// The bytes to store, and their digest. Equal manifests give equal bytes.
    ///
    /// # Errors
    /// `Internal` if JSON cannot be written.
    pub fn to_bytes(&self) -> Result<(Vec<u8>, ManifestDigest)> {
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::internal("a manifest could not be written").with_source(error))?;
        let digest = ManifestDigest::of(&bytes);
        Ok((bytes, digest))
    }

    /// Parses stored bytes and checks what they say of themselves: version, digest of the tensors, parent of a
    /// delta, file indexes. `expected` is the digest that the head records.
    ///
    /// # Errors
    /// `Corrupt` if anything disagrees; `Unsupported` for a newer version.
    pub fn parse(bytes: &[u8], expected: Option<&ManifestDigest>) -> Result<Self> {
        let bad =
            |why: String| Error::corrupt(format!("manifest: {why}")).with_help("restore another snapshot");
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(bad(format!("{} bytes, at most {MAX_MANIFEST} are read", bytes.len())));
        }
        if let Some(expected) = expected
            && ManifestDigest::of(bytes) != *expected
        {
            return Err(bad(format!("its digest is not {expected}")));
        }
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(bytes)
            .map_err(|error| bad("no JSON with a version".into()).with_source(error))?;
        if version != MANIFEST_VERSION {
            return Err(Error::unsupported(format!(
                "manifest: version {version} is stored, version {MANIFEST_VERSION} is known"
            ))
            .with_help("upgrade Towline"));
        }
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| bad("not of this form".into()).with_source(error))?;
        manifest.check().map_err(bad)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let Self { kind, name, identity, session, digest, parent, base, files, tensors, .. } = self;
        if *identity != SnapshotIdentity::of(name, session) {
            return Err(format!("identity {identity} is not {name} of session {session}"));
        }
        if tensors.windows(2).any(|pair| matches!(pair, [left, right] if left.name >= right.name)) {
            return Err("the tensors are not sorted by name".into());
        }
        if content_digest(tensors) != *digest {
            return Err(format!("the tensors do not have the content digest {digest}"));
        }
        if let Some(tensor) = tensors.iter().find(|tensor| tensor.file >= files.len()) {
            return Err(format!("tensor `{}` lies in file {} of {}", tensor.name, tensor.file, files.len()));
        }
        for file in files {
            if ObjectKey::new(file.path.as_str()).is_err() {
                return Err(format!("{} is no path of a file", crate::id::shown(&file.path)));
            }
        }
        if (*kind == SnapshotKind::Delta) != (parent.is_some() && base.is_some()) {
            return Err(format!(
                "a {kind} with{} a parent and a base",
                if parent.is_some() { "" } else { "out" }
            ));
        }
        Ok(())
    }
}

fn content_digest(tensors: &[TensorEntry]) -> ContentDigest {
    ContentDigest::of_tensors(
        tensors.iter().map(|entry| (entry.name.as_str(), entry.dtype, entry.shape.as_slice(), &entry.digest)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn example() -> Manifest {
        let meta = |name| TensorMeta::new(name, DType::U8, [1]).unwrap();
        let head = ManifestHead {
            kind: SnapshotKind::Base,
            name: SnapshotName::new("step-1").unwrap(),
            job: JobId::new("job").unwrap(),
            session: SessionId::from_random([1; 4]),
            seq: 1,
            epoch: 1,
            write_id: WriteId::from_random([2; 8]),
            created_ms: 1,
        };
        let file = FileEntry::new("model-00001-of-00001.safetensors", 2, TensorDigest::of(b"12"), true);
        let tensors = ["b", "a"].map(|name| TensorEntry::new(&meta(name), TensorDigest::of(b"1"), 0));
        Manifest::new(head, vec![file], tensors.to_vec())
    }

    #[test]
    fn round_trips_and_pins_its_bytes() {
        let (bytes, digest) = example().to_bytes().unwrap();
        assert_eq!(Manifest::parse(&bytes, Some(&digest)).unwrap(), example());
        let other = ManifestDigest::of(b"other");
        assert!(Manifest::parse(&bytes, Some(&other)).is_err());
    }

    #[test]
    fn what_disagrees_with_itself_is_refused() {
        type Change = fn(&mut Manifest);
        let change: &[(&str, Change)] = &[
            ("version", |manifest| manifest.version = 2),
            ("identity", |manifest| manifest.identity = SnapshotIdentity::new("other").unwrap()),
            ("digest", |manifest| manifest.digest = ContentDigest::from_bytes([0; 32])),
            ("sorted", |manifest| manifest.tensors.reverse()),
            ("file", |manifest| manifest.files.clear()),
            ("path", |manifest| manifest.files[0].path = "../x".into()),
            ("parent", |manifest| manifest.kind = SnapshotKind::Delta),
        ];
        for (what, change) in change {
            let mut manifest = example();
            change(&mut manifest);
            let (bytes, _) = manifest.to_bytes().unwrap();
            assert!(Manifest::parse(&bytes, None).is_err(), "{what}");
        }
    }

    #[test]
    fn truncations_are_errors() {
        let (bytes, _) = example().to_bytes().unwrap();
        for length in 0..bytes.len() {
            assert!(Manifest::parse(&bytes[..length], None).is_err(), "{length}");
        }
    }
}
