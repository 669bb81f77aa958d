//! From a URL to a store.

use std::sync::Arc;

use towline_core::{Error, Result, SnapshotStore};

use crate::Memory;

/// Opens the store that `url` names: `memory:` (new and empty), `file:///an/absolute/folder`, or the path of a
/// folder, which is made if it is missing.
///
/// # Errors
/// `Unsupported` for another scheme; `Invalid` for a `file:` URL with a host or without an absolute path; what
/// the operating system answers.
pub fn open(url: &str) -> Result<Arc<dyn SnapshotStore>> {
    if url == "memory:" {
        return Ok(Arc::new(Memory::new()));
    }
    let Some((scheme, rest)) = url.split_once("://") else { return open_folder(url) };
    if scheme != "file" {
        return Err(Error::unsupported(format!("`{scheme}://` is no store that this build can open"))
            .with_help("use `memory:`, `file:///an/absolute/folder` or the path of a folder"));
    }
    if !rest.starts_with('/') {
        return Err(Error::invalid(format!("`{url}` names a host: wanted an absolute path"))
            .with_help("write three slashes: `file:///an/absolute/folder`"));
    }
    open_folder(&percent_decoded(rest)?)
}

#[cfg(feature = "local")]
fn open_folder(path: &str) -> Result<Arc<dyn SnapshotStore>> {
    if path.is_empty() {
        return Err(Error::invalid("an empty text names no store").with_help("give the path of a folder"));
    }
    Ok(Arc::new(crate::Local::open(path)?))
}

#[cfg(not(feature = "local"))]
fn open_folder(path: &str) -> Result<Arc<dyn SnapshotStore>> {
    Err(Error::unsupported(format!("`{path}`: this build has no local store"))
        .with_help("build with the feature `local`"))
}

fn percent_decoded(text: &str) -> Result<String> {
    let bad = || Error::invalid(format!("`{text}` has a `%` that is not followed by two hexadecimal digits"));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16)).ok_or_else(bad);
        let (high, low) = (digit()?, digit()?);
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| bad())?);
    }
    String::from_utf8(bytes).map_err(|_| Error::invalid(format!("`{text}` is no UTF-8 once it is decoded")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_core::ErrorKind;

    #[test]
    fn schemes() {
        assert!(open("memory:").is_ok());
        for (url, kind) in [
            ("s3://bucket/x", ErrorKind::Unsupported),
            ("file://host/x", ErrorKind::Invalid),
            ("file:///a%2", ErrorKind::Invalid),
        ] {
            assert_eq!(open(url).unwrap_err().kind(), kind, "{url}");
        }
    }

    #[cfg(feature = "local")]
    #[test]
    fn folders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a b");
        assert!(open(&format!("file://{}/a%20b", dir.path().display())).is_ok());
        assert!(path.is_dir());
        assert!(open(path.to_str().unwrap()).is_ok());
        assert_eq!(open("").unwrap_err().kind(), ErrorKind::Invalid);
    }
}
