//! Whole objects: put, copy, get, head, delete.

use std::ops::Range;

use axum::body::Bytes;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    IF_UNMODIFIED_SINCE, LAST_MODIFIED, RANGE,
};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode};

use super::answer::{Outcome, Refusal, Reply};
use super::bucket::{Bucket, Object, said};
use super::date;
use super::request::Seen;

const GENERATION: HeaderName = HeaderName::from_static("x-goog-generation");

pub fn put(bucket: &mut Bucket, seen: &Seen, headers: &HeaderMap, body: Bytes, fresh: u64) -> Outcome {
    bucket.check(&seen.key, headers)?;
    let object = Object::new(body, said(headers), fresh);
    let reply = described(StatusCode::OK, &object);
    bucket.put(&seen.key, object);
    Ok(reply)
}

/// The condition is one on the place that is copied to.
pub fn copy(bucket: &mut Bucket, seen: &Seen, source: Object, headers: &HeaderMap, fresh: u64) -> Outcome {
    bucket.check(&seen.key, headers)?;
    let object = Object::new(source.body, source.said, fresh);
    let xml = format!(
        "<CopyObjectResult><LastModified>{}</LastModified><ETag>{}</ETag></CopyObjectResult>",
        date::iso(object.modified),
        object.e_tag
    );
    let reply = Reply::xml(xml).header(ETAG, &object.e_tag).header(GENERATION, fresh);
    bucket.put(&seen.key, object);
    Ok(reply)
}

pub fn delete(bucket: &mut Bucket, seen: &Seen, headers: &HeaderMap) -> Outcome {
    bucket.find(&seen.key, None)?;
    bucket.check(&seen.key, headers)?;
    bucket.remove(&seen.key);
    Ok(Reply::new(StatusCode::NO_CONTENT))
}

pub fn get(bucket: &Bucket, seen: &Seen, headers: &HeaderMap) -> Outcome {
    let generation = match seen.query("generation").map(str::parse) {
        None => None,
        Some(Ok(generation)) => Some(generation),
        Some(Err(_)) => return Err(Refusal::invalid("generation")),
    };
    let object = bucket.find(&seen.key, generation)?;
    bucket.check(&seen.key, headers)?;
    if let Some(reply) = condition(object, headers)? {
        return Ok(reply);
    }
    let size = object.body.len();
    if seen.method == Method::HEAD {
        return Ok(described(StatusCode::OK, object).headers(&object.said).header(CONTENT_LENGTH, size));
    }
    let range = headers.get(RANGE).and_then(|range| range.to_str().ok());
    let Some(range) = range.and_then(|range| parse_range(range, size)) else {
        return Ok(described(StatusCode::OK, object).headers(&object.said).body(object.body.clone()));
    };
    if range.is_empty() {
        let refusal =
            Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange", "nothing lies in that range");
        return Ok(Reply::from(refusal).header(CONTENT_RANGE, format_args!("bytes */{size}")));
    }
    let content_range = format!("bytes {}-{}/{size}", range.start, range.end - 1);
    let reply = described(StatusCode::PARTIAL_CONTENT, object).headers(&object.said);
    Ok(reply.header(CONTENT_RANGE, content_range).body(object.body.slice(range)))
}

/// A reply without a body that says which object it is about.
fn described(status: StatusCode, object: &Object) -> Reply {
    Reply::new(status)
        .header(ETAG, &object.e_tag)
        .header(GENERATION, object.generation)
        .header(HeaderName::from_static("x-goog-metageneration"), 1)
        .header(LAST_MODIFIED, date::http(object.modified))
        .header(ACCEPT_RANGES, "bytes")
}

/// The conditions of HTTP on a read: ETags go before dates.
fn condition(object: &Object, headers: &HeaderMap) -> Result<Option<Reply>, Refusal> {
    let tagged = |name| headers.get(name).map(|tags| tags == "*" || *tags == *object.e_tag);
    let newer = |name: HeaderName| {
        let date = headers.get(name).and_then(|date| date::parse(date.to_str().ok()?))?;
        Some(date::seconds(object.modified) > date)
    };
    let unchanged = match tagged(IF_MATCH) {
        Some(same) => same,
        None => newer(IF_UNMODIFIED_SINCE) != Some(true),
    };
    if !unchanged {
        return Err(Refusal::precondition());
    }
    let is_known = match tagged(IF_NONE_MATCH) {
        Some(same) => same,
        None => newer(IF_MODIFIED_SINCE) == Some(false),
    };
    Ok(is_known.then(|| described(StatusCode::NOT_MODIFIED, object)))
}

/// The bytes of `size` that `bytes=…` asks for, empty if there are none; `None` if it is no single range, which then
/// does not count.
fn parse_range(text: &str, size: usize) -> Option<Range<usize>> {
    let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
    // A number above all sizes is one that no size reaches.
    let number =
        |text: &str| text.parse::<u64>().ok().map(|number| usize::try_from(number).unwrap_or(usize::MAX));
    let range = match (start, end) {
        ("", length) => size.saturating_sub(number(length)?)..size,
        (start, "") => number(start)?..size,
        (start, end) => number(start)?..number(end)?.saturating_add(1).min(size),
    };
    Some(range)
}
