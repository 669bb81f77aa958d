//! Listings in pages.

use std::fmt::Write as _;

use super::answer::{Outcome, Refusal, Reply, escape};
use super::bucket::Bucket;
use super::date;
use super::request::Seen;

/// One page: keys and common prefixes count alike, and the token says after which of them the next page begins.
pub fn page(bucket: &Bucket, seen: &Seen, page: usize) -> Outcome {
    let prefix = seen.query("prefix").unwrap_or_default();
    let delimiter = seen.query("delimiter").filter(|delimiter| !delimiter.is_empty());
    let limit = match seen.query("max-keys").map(str::parse::<usize>) {
        None => page,
        Some(Ok(wanted)) => wanted.min(page),
        Some(Err(_)) => return Err(Refusal::invalid("max-keys")),
    };
    // A token goes before `start-after`, which the client says again with every page.
    let after = match seen.query("continuation-token") {
        Some(token) => Some(Entry::from_token(token).ok_or_else(|| Refusal::invalid("continuation-token"))?),
        None => seen.query("start-after").map(|key| Entry::Key(key.to_owned())),
    };
    let mut entries: Vec<Entry> = Vec::new();
    let mut is_truncated = false;
    let keys = bucket.objects.range(prefix.to_owned()..).map(|(key, _)| key);
    for key in keys.take_while(|key| key.starts_with(prefix)) {
        if after.as_ref().is_some_and(|after| after.covers(key)) {
            continue;
        }
        let rest = &key[prefix.len()..];
        let folder = delimiter.and_then(|delimiter| Some(rest.find(delimiter)? + delimiter.len()));
        let entry = match folder {
            Some(end) => Entry::Prefix(key[..prefix.len() + end].to_owned()),
            None => Entry::Key(key.clone()),
        };
        if entries.last() == Some(&entry) {
            continue;
        }
        if entries.len() >= limit {
            is_truncated = limit > 0;
            break;
        }
        entries.push(entry);
    }
    let token = entries.last().filter(|_| is_truncated).map(Entry::token);
    Ok(Reply::xml(xml(bucket, seen, &entries, token)))
}

fn xml(bucket: &Bucket, seen: &Seen, entries: &[Entry], token: Option<String>) -> String {
    let mut xml = "<ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'>".to_owned();
    let prefix = seen.query("prefix").unwrap_or_default();
    let _ = write!(
        xml,
        "<Name>{}</Name><Prefix>{}</Prefix><KeyCount>{}</KeyCount><IsTruncated>{}</IsTruncated>",
        escape(&seen.bucket),
        escape(prefix),
        entries.len(),
        token.is_some()
    );
    if let Some(token) = token {
        let _ = write!(xml, "<NextContinuationToken>{token}</NextContinuationToken>");
    }
    for entry in entries {
        let _ = match entry {
            Entry::Key(key) => {
                let object = &bucket.objects[key];
                write!(
                    xml,
                    "<Contents><Key>{}</Key><Generation>{}</Generation><MetaGeneration>1</MetaGeneration>\
                     <LastModified>{}</LastModified><ETag>{}</ETag><Size>{}</Size></Contents>",
                    escape(key),
                    object.generation,
                    date::iso(object.modified),
                    escape(&object.e_tag),
                    object.body.len()
                )
            }
            Entry::Prefix(prefix) => {
                write!(xml, "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>", escape(prefix))
            }
        };
    }
    xml + "</ListBucketResult>"
}

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Key(String),
    Prefix(String),
}

impl Entry {
    /// Whether `key` was listed with this entry or before it.
    fn covers(&self, key: &str) -> bool {
        match self {
            Self::Key(last) => key <= last.as_str(),
            Self::Prefix(last) => key <= last.as_str() || key.starts_with(last.as_str()),
        }
    }

    /// Nothing that a client could make up by itself.
    fn token(&self) -> String {
        let (kind, text) = match self {
            Self::Key(text) => ('k', text),
            Self::Prefix(text) => ('p', text),
        };
        text.bytes().fold(kind.to_string(), |mut token, byte| {
            let _ = write!(token, "{byte:02x}");
            token
        })
    }

    fn from_token(token: &str) -> Option<Self> {
        let (kind, hex) = token.split_at_checked(1)?;
        let pairs = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok());
        let text = String::from_utf8(pairs.collect::<Option<Vec<u8>>>()?).ok()?;
        match kind {
            "k" => Some(Self::Key(text)),
            "p" => Some(Self::Prefix(text)),
            _ => None,
        }
    }
}
