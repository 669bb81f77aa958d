//! A server that has objects in memory and asks for no keys: it costs its clients little, so that they show how fast they
//! are themselves. It knows whole puts, and gets and heads with or without a range; nothing else.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use bytes::Bytes;
use serde_json::Value;
use towline_core::{Error, Result};

use super::super::failed;

/// The longest object that it takes.
const LONGEST: usize = 8 << 30;

/// The server in a process of its own, which ends with us.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    /// Host and port.
    pub(super) address: String,
}

impl Server {
    pub(super) fn start() -> Result<Self> {
        let wrong = |error| failed("start the server in memory", error);
        let program = std::env::current_exe().map_err(wrong)?;
        let mut child = Command::new(program)
            .arg("s3-memory")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(wrong)?;
        let mut line = String::new();
        if let Some(said) = child.stdout.take() {
            BufReader::new(said).read_line(&mut line).map_err(wrong)?;
        }
        Ok(Self { child, address: line.trim().to_owned() })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has nothing to lose, and may have ended by itself.
        let _ended = self.child.kill();
        let _waited = self.child.wait();
    }
}

type Objects = Arc<Mutex<BTreeMap<String, Bytes>>>;

/// `s3-memory`: says where it listens, and ends when its input does.
pub(crate) fn serve() -> Result<Value> {
    let wrong = |error| failed("listen on the loopback", error);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    let mut out = std::io::stdout();
    writeln!(out, "{address}").and_then(|()| out.flush()).map_err(wrong)?;
    thread::spawn(move || listen(&listener));
    let _end = std::io::stdin().read_to_end(&mut Vec::new()).map_err(wrong)?;
    Ok(Value::Null)
}

fn listen(listener: &TcpListener) {
    let objects = Objects::default();
    for stream in listener.incoming().map_while(std::result::Result::ok) {
        let objects = Arc::clone(&objects);
        // A client that goes away, or says what is not understood, loses its connection.
        thread::spawn(move || answer_all(stream, &objects).ok());
    }
}

fn answer_all(stream: TcpStream, objects: &Objects) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut out = stream.try_clone()?;
    let mut input = BufReader::new(stream);
    while let Some(request) = Request::read(&mut input)? {
        let locked = || objects.lock().map_err(|_| std::io::Error::other("a thread has failed"));
        if request.method == "PUT" {
            let mut body = vec![0; request.length];
            input.read_exact(&mut body)?;
            locked()?.insert(request.path, body.into());
            out.write_all(b"HTTP/1.1 200 OK\r\nETag: \"1\"\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        }
        let found = locked()?.get(&request.path).cloned();
        let (head, body) = request.answer(found.as_ref());
        out.write_all(head.as_bytes())?;
        out.write_all(if request.method == "HEAD" { &[] } else { &body })?;
    }
    Ok(())
}

/// What counts of a request.
#[derive(Debug, Default)]
struct Request {
    method: String,
    path: String,
    /// First and last byte.
    range: Option<(usize, Option<usize>)>,
    length: usize,
}

impl Request {
    /// `None` at the end of the connection.
    fn read(input: &mut BufReader<TcpStream>) -> std::io::Result<Option<Self>> {
        let bad = || std::io::Error::other("no request that is understood");
        let mut line = String::new();
        if input.by_ref().take(64 << 10).read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split(' ');
        let (method, target) = (words.next().ok_or_else(bad)?, words.next().ok_or_else(bad)?);
        let path = target.split('?').next().unwrap_or_default();
        let mut request = Self { method: method.to_owned(), path: path.to_owned(), ..Self::default() };
        loop {
            let mut line = String::new();
            input.by_ref().take(64 << 10).read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { return Ok(Some(request)) };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    request.length =
                        value.parse().ok().filter(|length| *length <= LONGEST).ok_or_else(bad)?;
                }
                "range" => {
                    let (first, last) = value
                        .strip_prefix("bytes=")
                        .and_then(|range| range.split_once('-'))
                        .ok_or_else(bad)?;
                    request.range = Some((first.parse().map_err(|_| bad())?, last.parse().ok()));
                }
                "expect" | "transfer-encoding" => return Err(bad()),
                _ => {}
            }
        }
    }

    fn answer(&self, found: Option<&Bytes>) -> (String, Bytes) {
        let Some(object) = found else {
            return ("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(), Bytes::new());
        };
        let mut status = "200 OK".to_owned();
        let mut body = object.clone();
        if let Some((first, last)) = self.range {
            let end = last.map_or(object.len(), |last| last.saturating_add(1).min(object.len()));
            if first >= end {
                let head = "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n".to_owned();
                return (head, Bytes::new());
            }
            body = object.slice(first..end);
            status =
                format!("206 Partial Content\r\nContent-Range: bytes {first}-{}/{}", end - 1, object.len());
        }
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Type: application/octet-stream\r\n\
             Accept-Ranges: bytes\r\nETag: \"1\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n",
            body.len()
        );
        (head, body)
    }
}

/// Puts an object there.
pub(super) fn put(server: &str, path: &str, body: &Bytes) -> Result<()> {
    let address = super::Address { server: server.to_owned(), target: path.to_owned() };
    super::bare::put(&address, body).map_err(|error: Error| error.context("the server in memory"))
}

#[cfg(test)]
mod tests {
    use super::super::bare;
    use super::*;

    #[test]
    fn objects_are_kept_and_ranges_are_cut() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let server = listener.local_addr().unwrap().to_string();
        thread::spawn(move || listen(&listener));
        let body = Bytes::from(vec![7; 3 << 20]);
        put(&server, "/b/k", &body).unwrap();
        let address =
            |target: &str| super::super::Address { server: server.clone(), target: target.to_owned() };
        bare::get(&address("/b/k?signature=1"), body.len()).unwrap();
        assert!(bare::get(&address("/b/other"), 0).unwrap_err().message().contains("404"));
        let request = |range| Request { range: Some(range), ..Request::default() };
        let (head, part) = request((1, Some(4))).answer(Some(&body));
        assert!(part.len() == 4 && head.contains("206") && head.contains("bytes 1-4/3145728"), "{head}");
        assert_eq!(request((3, None)).answer(Some(&body)).1.len(), body.len() - 3);
        assert!(request((body.len(), None)).answer(Some(&body)).0.contains("416"));
    }
}
