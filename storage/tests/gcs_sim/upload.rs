//! Objects that come in parts.

use std::collections::BTreeMap;

use axum::body::Bytes;
use axum::http::header::ETAG;
use axum::http::{HeaderMap, HeaderName, StatusCode};
use bytes::BytesMut;

use super::answer::{Outcome, Refusal, Reply, escape, unescape};
use super::bucket::{Bucket, Object, Upload, e_tag, said};
use super::request::Seen;

/// All parts but the last are at least so long, in bytes.
const SMALLEST: usize = 5 << 20;
/// The highest number of a part.
const MOST: u32 = 10_000;

pub fn start(bucket: &mut Bucket, seen: &Seen, headers: &HeaderMap, fresh: u64) -> Outcome {
    // Signs that must be encoded in an address.
    let id = format!("{fresh}/+=");
    let upload = Upload { key: seen.key.clone(), said: said(headers), parts: BTreeMap::new() };
    bucket.uploads.insert(id.clone(), upload);
    Ok(Reply::xml(format!(
        "<InitiateMultipartUploadResult><Bucket>{}</Bucket><Key>{}</Key><UploadId>{id}</UploadId>\
         </InitiateMultipartUploadResult>",
        escape(&seen.bucket),
        escape(&seen.key)
    )))
}

pub fn part(bucket: &mut Bucket, seen: &Seen, id: &str, body: Bytes) -> Outcome {
    let number = seen.query("partNumber").and_then(|number| number.parse().ok());
    let number =
        number.filter(|number| (1..=MOST).contains(number)).ok_or_else(|| Refusal::invalid("partNumber"))?;
    let reply = Reply::new(StatusCode::OK).header(ETAG, e_tag(&body));
    open(bucket, seen, id)?.parts.insert(number, body);
    Ok(reply)
}

pub fn abort(bucket: &mut Bucket, seen: &Seen, id: &str) -> Outcome {
    open(bucket, seen, id)?;
    bucket.uploads.remove(id);
    Ok(Reply::new(StatusCode::NO_CONTENT))
}

/// Whatever is wrong leaves the upload open.
pub fn complete(
    bucket: &mut Bucket,
    seen: &Seen,
    id: &str,
    headers: &HeaderMap,
    body: &[u8],
    fresh: u64,
) -> Outcome {
    let upload = open(bucket, seen, id)?;
    let listed = listed(std::str::from_utf8(body).unwrap_or_default());
    let listed = listed
        .filter(|listed| !listed.is_empty())
        .ok_or_else(|| refused("MalformedXML", "no list of parts"))?;
    if !listed.is_sorted_by(|(left, _), (right, _)| left < right) {
        return Err(refused("InvalidPartOrder", "the parts are not in order"));
    }
    let mut whole = BytesMut::new();
    for (index, (number, tag)) in listed.iter().enumerate() {
        let part = upload.parts.get(number).filter(|part| e_tag(part) == *tag);
        let part =
            part.ok_or_else(|| refused("InvalidPart", format!("part {number} is missing or another")))?;
        if part.len() < SMALLEST && index + 1 < listed.len() {
            return Err(refused("EntityTooSmall", format!("part {number} is below 5 MiB")));
        }
        whole.extend_from_slice(part);
    }
    let object = Object::new(whole.freeze(), upload.said.clone(), fresh);
    bucket.check(&seen.key, headers)?;
    let reply = Reply::xml(format!(
        "<CompleteMultipartUploadResult><Bucket>{}</Bucket><Key>{}</Key><ETag>{}</ETag>\
         </CompleteMultipartUploadResult>",
        escape(&seen.bucket),
        escape(&seen.key),
        escape(&object.e_tag)
    ));
    let reply = reply.header(ETAG, &object.e_tag).header(HeaderName::from_static("x-goog-generation"), fresh);
    bucket.uploads.remove(id);
    bucket.put(&seen.key, object);
    Ok(reply)
}

fn open<'a>(bucket: &'a mut Bucket, seen: &Seen, id: &str) -> Result<&'a mut Upload, Refusal> {
    let upload = bucket.uploads.get_mut(id).filter(|upload| upload.key == seen.key);
    upload.ok_or_else(|| Refusal::no_upload(id))
}

fn refused(code: &'static str, message: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, code, message)
}

/// Number and ETag of each `<Part>`.
fn listed(xml: &str) -> Option<Vec<(u32, String)>> {
    fn inside<'a>(xml: &'a str, open: &str, close: &str) -> Option<&'a str> {
        let (_, rest) = xml.split_once(open)?;
        rest.split_once(close).map(|(text, _)| text)
    }
    let parts = inside(xml, "<CompleteMultipartUpload>", "</CompleteMultipartUpload>")?;
    let parts = parts.split("</Part>").filter(|part| !part.trim().is_empty());
    parts
        .map(|part| {
            let number = inside(part, "<PartNumber>", "</PartNumber>")?.trim().parse().ok()?;
            Some((number, unescape(inside(part, "<ETag>", "</ETag>")?)))
        })
        .collect()
}
