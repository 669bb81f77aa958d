//! Transfers without any library: what the loopback and the server can do at most. Nothing is kept of what comes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use towline_core::{Error, Result, async_trait};

use super::super::failed;

/// What is read or written at once.
const PIECE: usize = 1 << 20;
/// How long the other side may be silent.
const IDLE: Duration = Duration::from_secs(120);

/// A request whose signature is in its address.
#[derive(Debug, Clone)]
pub(super) struct Address {
    /// Host and port.
    pub(super) server: String,
    /// Path and query.
    pub(super) target: String,
}

/// For a client that only signs.
#[derive(Debug)]
pub(super) struct Unconnected;

impl HttpConnector for Unconnected {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Self))
    }
}

#[async_trait]
impl HttpService for Unconnected {
    async fn call(&self, _: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        Err(HttpError::new(HttpErrorKind::Unknown, Error::internal("this client only signs")))
    }
}

/// Sends `body` to `address`.
pub(super) fn put(address: &Address, body: &Bytes) -> Result<()> {
    let mut stream = connect(&address.server)?;
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        address.target,
        address.server,
        body.len()
    );
    stream.write_all(head.as_bytes()).map_err(|error| failed("send a request", error))?;
    body.chunks(PIECE)
        .try_for_each(|piece| stream.write_all(piece))
        .map_err(|error| failed("send a body", error))?;
    answer(&mut stream).map(|_| ())
}

/// Reads what is at `address`, `wanted` bytes.
pub(super) fn get(address: &Address, wanted: usize) -> Result<()> {
    let mut stream = connect(&address.server)?;
    let head =
        format!("GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", address.target, address.server);
    stream.write_all(head.as_bytes()).map_err(|error| failed("send a request", error))?;
    let found = answer(&mut stream)?;
    let found = found + drain(&mut stream, wanted.saturating_sub(found))?;
    if found == wanted {
        Ok(())
    } else {
        Err(Error::corrupt(format!("wanted {wanted} bytes, found {found}")))
    }
}

/// Bytes from one thread to another through the loopback.
pub(super) fn loopback(files: &[Bytes]) -> Result<()> {
    let wrong = |error| failed("use the loopback", error);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    let wanted: usize = files.iter().map(Bytes::len).sum();
    let found = thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let (mut stream, _) = listener.accept()?;
            files.iter().flat_map(|file| file.chunks(PIECE)).try_for_each(|piece| stream.write_all(piece))
        });
        let mut stream = TcpStream::connect(address).map_err(wrong)?;
        let found = drain(&mut stream, wanted);
        let sent = sender.join().map_err(|_| Error::internal("the sending thread ended early"))?;
        sent.map_err(wrong).and(found)
    })?;
    if found == wanted {
        Ok(())
    } else {
        Err(Error::corrupt(format!("wanted {wanted} bytes, found {found}")))
    }
}

fn connect(server: &str) -> Result<TcpStream> {
    let wrong = |error| failed("reach the server", error);
    let stream = TcpStream::connect(server).map_err(wrong)?;
    stream.set_read_timeout(Some(IDLE)).map_err(wrong)?;
    stream.set_write_timeout(Some(IDLE)).map_err(wrong)?;
    Ok(stream)
}

/// Reads the head of an answer, which must be 200, and returns how many bytes of the body came with it.
fn answer(stream: &mut TcpStream) -> Result<usize> {
    let mut head = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let count = stream.read(&mut piece).map_err(|error| failed("read an answer", error))?;
        head.extend_from_slice(piece.get(..count).unwrap_or_default());
        if let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") {
            let status = String::from_utf8_lossy(head.get(..12).unwrap_or_default()).into_owned();
            return if status == "HTTP/1.1 200" {
                Ok(head.len() - end - 4)
            } else {
                Err(Error::unavailable(format!("the server answered: {}", String::from_utf8_lossy(&head))))
            };
        }
        if count == 0 || head.len() > 64 << 10 {
            return Err(Error::unavailable("the server's answer has no end of its head"));
        }
    }
}

/// Reads `wanted` bytes, or to the end, and counts.
fn drain(stream: &mut TcpStream, wanted: usize) -> Result<usize> {
    let mut piece = vec![0; PIECE];
    let mut found = 0;
    while found < wanted {
        match stream.read(&mut piece).map_err(|error| failed("read a body", error))? {
            0 => return Ok(found),
            count => found += count,
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_carries_everything() {
        loopback(&[Bytes::from(vec![1; 3 << 20]), Bytes::from(vec![2; 100])]).unwrap();
        loopback(&[]).unwrap();
    }

    #[test]
    fn a_short_body_and_a_refusal_are_found() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let server = listener.local_addr().unwrap().to_string();
        let server_thread = thread::spawn(move || {
            for answer in ["HTTP/1.1 200 OK\r\n\r\nabc", "HTTP/1.1 403 Forbidden\r\n\r\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let _request = stream.read(&mut [0; 4096]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let address = Address { server, target: "/".to_owned() };
        assert!(get(&address, 4).unwrap_err().message().contains("wanted 4 bytes, found 3"));
        assert!(get(&address, 4).unwrap_err().message().contains("403"));
        server_thread.join().unwrap();
    }
}
