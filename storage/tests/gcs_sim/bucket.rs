//! What is stored.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher as _};
use std::time::SystemTime;

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName};

use super::answer::Refusal;

/// Objects in the order of the bytes of their keys, as they are listed.
#[derive(Debug, Default)]
pub struct Bucket {
    pub objects: BTreeMap<String, Object>,
    pub uploads: BTreeMap<String, Upload>,
    versioned: bool,
    /// By key and generation; nothing if the bucket is not versioned.
    replaced: BTreeMap<(String, u64), Object>,
}

impl Bucket {
    pub fn new(versioned: bool) -> Self {
        Self { versioned, ..Self::default() }
    }

    pub fn put(&mut self, key: &str, object: Object) {
        let old = self.objects.insert(key.to_owned(), object);
        self.keep(key, old);
    }

    pub fn remove(&mut self, key: &str) {
        let old = self.objects.remove(key);
        self.keep(key, old);
    }

    fn keep(&mut self, key: &str, old: Option<Object>) {
        if let (true, Some(old)) = (self.versioned, old) {
            self.replaced.insert((key.to_owned(), old.generation), old);
        }
    }

    pub fn find(&self, key: &str, generation: Option<u64>) -> Result<&Object, Refusal> {
        let current = self.objects.get(key);
        let found = match generation {
            Some(wanted) => current
                .filter(|object| object.generation == wanted)
                .or_else(|| self.replaced.get(&(key.to_owned(), wanted))),
            None => current,
        };
        found.ok_or_else(|| Refusal::no_key(key))
    }

    /// Holds `x-goog-if-generation-match` against what is there; 0 means that nothing may be there.
    pub fn check(&self, key: &str, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some(wanted) = headers.get("x-goog-if-generation-match") else { return Ok(()) };
        let wanted = wanted.to_str().ok().and_then(|text| text.parse::<u64>().ok());
        let wanted = wanted.ok_or_else(|| Refusal::invalid("x-goog-if-generation-match"))?;
        let found = self.objects.get(key).map_or(0, |object| object.generation);
        if wanted == found { Ok(()) } else { Err(Refusal::precondition()) }
    }
}

#[derive(Debug, Clone)]
pub struct Object {
    pub body: Bytes,
    pub generation: u64,
    pub e_tag: String,
    pub modified: SystemTime,
    /// What the writer said of it: its type, its language, its `x-goog-meta-…`.
    pub said: HeaderMap,
}

impl Object {
    pub fn new(body: Bytes, said: HeaderMap, generation: u64) -> Self {
        Self { e_tag: e_tag(&body), body, generation, modified: SystemTime::now(), said }
    }
}

/// A digest of the body alone: two writes of the same bytes have the same ETag, and only the generation tells them
/// apart.
pub fn e_tag(body: &[u8]) -> String {
    let digest = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        hasher.write_u8(salt);
        hasher.write(body);
        hasher.finish()
    };
    format!("\"{:016x}{:016x}\"", digest(0), digest(1))
}

/// The headers of a write that come back with the object.
pub fn said(headers: &HeaderMap) -> HeaderMap {
    let kept =
        ["cache-control", "content-disposition", "content-encoding", "content-language", "content-type"];
    let is_kept =
        |name: &HeaderName| kept.contains(&name.as_str()) || name.as_str().starts_with("x-goog-meta-");
    headers
        .iter()
        .filter(|(name, _)| is_kept(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// An object on its way.
#[derive(Debug)]
pub struct Upload {
    pub key: String,
    pub said: HeaderMap,
    /// By number, from 1.
    pub parts: BTreeMap<u32, Bytes>,
}
