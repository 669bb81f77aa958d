//! What the stand-in keeps to and no client of the other tests asks: requests by hand.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use super::{GcsSim, TOKEN};

/// Status, headers in lower case, and body of the answer.
fn ask(
    sim: &GcsSim,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> (u16, String, String) {
    let address = sim.url().strip_prefix("http://").unwrap();
    let mut head = format!("{method} {target} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    for (name, value) in [("authorization", &*format!("Bearer {TOKEN}"))].iter().chain(headers) {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("content-length: {}\r\n\r\n", body.len());
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

fn inside<'a>(text: &'a str, open: &str, close: &str) -> &'a str {
    text.split_once(open).unwrap().1.split_once(close).unwrap().0
}

fn header<'a>(head: &'a str, name: &str) -> &'a str {
    head.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap()
}

fn completion(parts: &[(u32, &str)]) -> String {
    let parts: String = parts
        .iter()
        .map(|(number, tag)| format!("<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>"))
        .collect();
    format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_is_checked_and_refused_whole() {
    let sim = GcsSim::with_bucket("b").await;
    let (_, _, started) = ask(&sim, "POST", "/b/k%2F1?uploads=", &[], b"");
    let id = inside(&started, "<UploadId>", "</UploadId>").replace('/', "%2F").replace('+', "%2B");
    let target = format!("/b/k%2F1?uploadId={id}");
    let part = |number: u32, body: &[u8]| {
        let (status, head, _) = ask(&sim, "PUT", &format!("{target}&partNumber={number}"), &[], body);
        assert_eq!(status, 200);
        header(&head, "etag").to_owned()
    };
    let (large, small) = (part(1, &vec![7; 5 << 20]), part(2, b"small"));
    let third = part(3, b"third");
    let complete =
        |headers: &[(&str, &str)], body: &str| ask(&sim, "POST", &target, headers, body.as_bytes());
    let wrong = [
        ("<CompleteMultipartUpload></CompleteMultipartUpload>".to_owned(), "MalformedXML"),
        (completion(&[(2, &small), (1, &large)]), "InvalidPartOrder"),
        (completion(&[(1, &large), (1, &large)]), "InvalidPartOrder"),
        (completion(&[(1, &small), (2, &small)]), "InvalidPart"),
        (completion(&[(1, &large), (4, &small)]), "InvalidPart"),
        (completion(&[(1, &large), (2, &small), (3, &third)]), "EntityTooSmall"),
    ];
    for (body, code) in wrong {
        let (status, _, answer) = complete(&[], &body);
        assert_eq!((status, inside(&answer, "<Code>", "</Code>")), (400, code));
    }
    // The condition: nothing may be there, but something is, and the other way round.
    let good = completion(&[(1, &large), (2, &small.replace('"', "&quot;"))]);
    assert_eq!(ask(&sim, "PUT", "/b/k%2F1", &[], b"old").0, 200);
    assert_eq!(complete(&[("x-goog-if-generation-match", "0")], &good).0, 412);
    assert_eq!(sim.object("b", "k/1").unwrap(), "old");
    assert_eq!(ask(&sim, "DELETE", "/b/k%2F1", &[], b"").0, 204);
    assert_eq!(complete(&[("x-goog-if-generation-match", "17")], &good).0, 412);
    assert_eq!(sim.open_uploads(), ["b/k/1"]);
    let (status, head, _) = complete(&[("x-goog-if-generation-match", "0")], &good);
    assert!(status == 200 && header(&head, "x-goog-generation").parse::<u64>().unwrap() > 0);
    assert_eq!(sim.object("b", "k/1").unwrap().len(), (5 << 20) + 5);
    // Done is done.
    assert_eq!(complete(&[], &good).0, 404);
    assert_eq!(ask(&sim, "DELETE", &target, &[], b"").0, 404);
    assert!(sim.open_uploads().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_hold_for_all_that_writes() {
    let sim = GcsSim::with_bucket("b").await;
    let generation =
        |target: &str| header(&ask(&sim, "HEAD", target, &[], b"").1, "x-goog-generation").to_owned();
    let when = |generation: &str, method: &str, target: &str, more: &[(&str, &str)]| {
        let headers: Vec<_> =
            [("x-goog-if-generation-match", generation)].iter().chain(more).copied().collect();
        ask(&sim, method, target, &headers, b"").0
    };
    let from = [("x-goog-copy-source", "b/source")];
    ask(&sim, "PUT", "/b/source", &[("x-goog-meta-of", "mine")], b"body");
    assert_eq!(when("5", "PUT", "/b/copy", &from), 412);
    assert_eq!(when("0", "PUT", "/b/copy", &from), 200);
    assert_eq!(when("0", "PUT", "/b/copy", &from), 412);
    let first = generation("/b/copy");
    assert_eq!(when(&first, "PUT", "/b/copy", &from), 200);
    // The same bytes again: only the generation tells.
    let (_, head, body) = ask(&sim, "GET", "/b/copy", &[], b"");
    assert_eq!((header(&head, "x-goog-meta-of"), &*body), ("mine", "body"));
    assert_eq!(header(&head, "etag"), header(&ask(&sim, "HEAD", "/b/source", &[], b"").1, "etag"));
    assert_ne!(generation("/b/copy"), first);
    assert_eq!(when(&first, "GET", "/b/copy", &[]), 412);
    assert_eq!(when(&first, "DELETE", "/b/copy", &[]), 412);
    assert_eq!(when("old", "PUT", "/b/copy", &[]), 400);
    assert_eq!(when(&generation("/b/copy"), "DELETE", "/b/copy", &[]), 204);
    assert_eq!(when("0", "DELETE", "/b/copy", &[]), 404);
    let missing = [("x-goog-copy-source", "b/copy")];
    assert_eq!(ask(&sim, "PUT", "/b/other", &missing, b"").0, 404);
    // A bucket that keeps nothing has no old generation, and a range beyond the end is none.
    assert_eq!(ask(&sim, "GET", &format!("/b/source?generation={first}"), &[], b"").0, 404);
    let (status, head, _) = ask(&sim, "GET", "/b/source", &[("range", "bytes=4-9")], b"");
    assert_eq!((status, header(&head, "content-range")), (416, "bytes */4"));
    assert_eq!(ask(&sim, "PATCH", "/b/source", &[], b"").0, 405);
    assert_eq!(ask(&sim, "GET", "/b?list-type=2&continuation-token=zz", &[], b"").0, 400);
}
