//! From a URL to a store.

use std::sync::Arc;

use towline_core::{Error, Result, SnapshotStore};

use crate::{Memory, StoreOptions};

/// Opens the store that `url` names:
///
/// * `memory:` (new and empty);
/// * `file:///an/absolute/folder`, or the path of a folder, which is made if it is missing;
/// * `s3://bucket/prefix` with the feature `s3`, `gs://bucket/prefix` with `gcs`, `az://container/prefix` with
///   `azure`. Nothing is asked of the server yet. `options` say where it is and who asks.
///
/// # Errors
/// `Unsupported` for another scheme; `Invalid` for a `file:` URL with a host or without an absolute path, for a bucket
/// or prefix that is none, and for settings that are missing or wrong; what the operating system answers.
pub fn open(url: &str, options: &StoreOptions) -> Result<Arc<dyn SnapshotStore>> {
    if url == "memory:" {
        return Ok(Arc::new(Memory::new()));
    }
    let Some((scheme, rest)) = url.split_once("://") else { return open_folder(url) };
    if scheme != "file" {
        return open_cloud(scheme, rest, options);
    }
    if !rest.starts_with('/') {
        return Err(Error::invalid(format!("`{url}` names a host: wanted an absolute path"))
            .with_help("write three slashes: `file:///an/absolute/folder`"));
    }
    open_folder(&percent_decoded(rest)?)
}

#[cfg(any(feature = "s3", feature = "gcs", feature = "azure"))]
fn open_cloud(scheme: &str, rest: &str, options: &StoreOptions) -> Result<Arc<dyn SnapshotStore>> {
    match crate::cloud::open(scheme, rest, options) {
        Some(store) => Ok(Arc::new(store?)),
        None => Err(unknown(scheme, crate::cloud::SCHEMES)),
    }
}

#[cfg(not(any(feature = "s3", feature = "gcs", feature = "azure")))]
fn open_cloud(scheme: &str, _: &str, _: &StoreOptions) -> Result<Arc<dyn SnapshotStore>> {
    Err(unknown(scheme, &[]))
}

fn unknown(scheme: &str, known: &[&str]) -> Error {
    let feature = match scheme {
        "s3" => Some("s3"),
        "gs" => Some("gcs"),
        "az" => Some("azure"),
        _ => None,
    };
    let known: String = known.iter().map(|scheme| format!(", `{scheme}://bucket/prefix`")).collect();
    let error = Error::unsupported(format!("`{scheme}://` is no store that this build can open"));
    error.with_help(match feature {
        Some(feature) => format!("build with the feature `{feature}` of towline-storage"),
        None => format!("use `memory:`, `file:///an/absolute/folder`, the path of a folder{known}"),
    })
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
        assert!(open("memory:", &StoreOptions::new()).is_ok());
        for (url, kind) in [
            ("ftp://host/x", ErrorKind::Unsupported),
            ("file://host/x", ErrorKind::Invalid),
            ("file:///a%2", ErrorKind::Invalid),
        ] {
            assert_eq!(open(url, &StoreOptions::new()).unwrap_err().kind(), kind, "{url}");
        }
    }

    #[cfg(feature = "local")]
    #[test]
    fn folders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a b");
        assert!(open(&format!("file://{}/a%20b", dir.path().display()), &StoreOptions::new()).is_ok());
        assert!(path.is_dir());
        assert!(open(path.to_str().unwrap(), &StoreOptions::new()).is_ok());
        assert_eq!(open("", &StoreOptions::new()).unwrap_err().kind(), ErrorKind::Invalid);
    }
}
