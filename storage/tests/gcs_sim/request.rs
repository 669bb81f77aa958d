//! Who asks for what.

use axum::http::Method;
use axum::http::request::Parts;

/// A request, as tests match and count it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: Method,
    pub bucket: String,
    /// Empty for a request to the bucket.
    pub key: String,
    /// The generation that must be there: 0 for none.
    pub if_generation: Option<String>,
    pub range: Option<String>,
    query: Vec<(String, String)>,
}

impl Seen {
    pub fn new(parts: &Parts) -> Option<Self> {
        let (bucket, key) = place(parts.uri.path())?;
        let pairs = parts.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(&name.replace('+', " "))?, decode(&value.replace('+', " "))?))
        });
        let header = |name: &str| parts.headers.get(name)?.to_str().ok().map(str::to_owned);
        Some(Self {
            method: parts.method.clone(),
            bucket,
            key,
            if_generation: header("x-goog-if-generation-match"),
            range: header("range"),
            query: pairs.collect::<Option<_>>()?,
        })
    }

    /// The value of `name` in the query.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Whether this puts an object that must not be there.
    pub fn creates(&self) -> bool {
        self.method == Method::PUT && self.if_generation.as_deref() == Some("0")
    }

    /// Whether this replaces an object that must be the known one.
    pub fn updates(&self) -> bool {
        self.method == Method::PUT
            && self.if_generation.as_deref().is_some_and(|generation| generation != "0")
    }

    /// Whether this reads an object.
    pub fn reads(&self) -> bool {
        self.method == Method::GET && !self.key.is_empty()
    }

    /// Whether this makes an object of the parts of an upload.
    pub fn completes(&self) -> bool {
        self.method == Method::POST && self.query("uploadId").is_some()
    }
}

/// Bucket and key of `/bucket/key`, both percent-encoded.
pub fn place(path: &str) -> Option<(String, String)> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
    Some((decode(bucket)?, decode(key)?)).filter(|(bucket, _)| !bucket.is_empty())
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        if let (b'%', [high, low, after @ ..]) = (byte, after) {
            let digits = [*high, *low];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(*byte);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}
