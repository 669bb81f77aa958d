//! The proxy that fails, between small servers and clients.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use towline_storage::testing::{Direction, Proxy};

const SOON: Duration = Duration::from_secs(20);

/// Sends back what comes, and counts it.
async fn echo() -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
    let received = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let received = Arc::clone(&received);
            tokio::spawn(async move {
                let mut buffer = vec![0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    received.fetch_add(read as u64, Ordering::SeqCst);
                    if stream.write_all(&buffer[..read]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    (address, count)
}

/// Answers requests without a body, several on one connection, and keeps their first lines.
async fn http() -> (SocketAddr, Arc<std::sync::Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let lines = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&lines);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut request = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    request.push(byte);
                    if request.ends_with(b"\r\n\r\n") {
                        let line = String::from_utf8_lossy(&request).lines().next().unwrap().to_owned();
                        seen.lock().unwrap().push(line);
                        request.clear();
                        let answer =
                            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                        // The interim answer by itself, as it comes on a network.
                        for part in [&answer[..25], &answer[25..]] {
                            stream.write_all(part).await.unwrap();
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    }
                }
            });
        }
    });
    (address, lines)
}

/// Sends `sent` and reads until `wanted` bytes came or the connection ended.
async fn talk(stream: &mut TcpStream, sent: &[u8], wanted: usize) -> (Vec<u8>, Option<ErrorKind>) {
    let mut found = Vec::new();
    if let Err(error) = stream.write_all(sent).await {
        return (found, Some(error.kind()));
    }
    let mut buffer = vec![0; 4096];
    while found.len() < wanted {
        match timeout(SOON, stream.read(&mut buffer)).await.unwrap() {
            Ok(0) => return (found, Some(ErrorKind::UnexpectedEof)),
            Ok(read) => found.extend_from_slice(&buffer[..read]),
            Err(error) => return (found, Some(error.kind())),
        }
    }
    (found, None)
}

async fn connect(proxy: &Proxy) -> TcpStream {
    timeout(SOON, TcpStream::connect(proxy.address())).await.unwrap().unwrap()
}

#[tokio::test]
async fn passes_everything_and_both_ends() {
    let (upstream, _) = echo().await;
    let proxy = Proxy::start(upstream).await.unwrap();
    let body: Vec<u8> = (0..1_000_000u32).map(|number| (number % 251) as u8).collect();
    let (mut read, mut write) = connect(&proxy).await.into_split();
    let sent = body.clone();
    let writing = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut found = Vec::new();
    timeout(SOON, read.read_to_end(&mut found)).await.unwrap().unwrap();
    writing.await.unwrap();
    assert!(found == body, "{} bytes came back", found.len());
    assert_eq!((proxy.connections(), proxy.cuts(), proxy.swallowed()), (1, 0, 0));
}

#[tokio::test]
async fn cuts_all_that_is_open_and_nothing_that_comes() {
    let (upstream, _) = echo().await;
    let proxy = Proxy::start(upstream).await.unwrap();
    let (mut first, mut second) = (connect(&proxy).await, connect(&proxy).await);
    for stream in [&mut first, &mut second] {
        assert_eq!(talk(stream, b"hello", 5).await, (b"hello".to_vec(), None));
    }
    proxy.cut_all();
    for stream in [&mut first, &mut second] {
        let end = timeout(SOON, stream.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(proxy.cuts(), 2);
    assert_eq!(talk(&mut connect(&proxy).await, b"again", 5).await, (b"again".to_vec(), None));
    // With the last handle everything ends.
    let mut third = connect(&proxy).await;
    assert_eq!(talk(&mut third, b"more", 4).await.1, None);
    let address = proxy.address();
    drop(proxy);
    assert!(timeout(SOON, third.read_u8()).await.unwrap().is_err());
    while TcpStream::connect(address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn refuses_while_it_is_told_to() {
    let (upstream, received) = echo().await;
    let proxy = Proxy::start(upstream).await.unwrap();
    let mut open = connect(&proxy).await;
    assert_eq!(talk(&mut open, b"x", 1).await.1, None);
    proxy.refuse(true);
    for _ in 0..3 {
        // The reset may come before the connection is known to be there.
        if let Ok(mut stream) = TcpStream::connect(proxy.address()).await {
            assert!(talk(&mut stream, b"hello", 5).await.1.is_some());
        }
    }
    assert_eq!(talk(&mut open, b"y", 1).await, (b"y".to_vec(), None));
    proxy.refuse(false);
    assert_eq!(talk(&mut connect(&proxy).await, b"z", 1).await.1, None);
    assert_eq!(received.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn cuts_right_behind_a_byte() {
    let (upstream, received) = echo().await;
    let proxy = Proxy::start(upstream).await.unwrap();
    proxy.cut_after(Direction::Up, 1000, 2);
    for round in 1..=2 {
        let (_, end) = talk(&mut connect(&proxy).await, &[7; 3000], 3000).await;
        assert!(end.is_some());
        // What passed before the cut has arrived; nothing behind it.
        timeout(SOON, async {
            while received.load(Ordering::SeqCst) < round * 1000 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!((received.load(Ordering::SeqCst), proxy.cuts()), (round * 1000, round));
    }
    let (found, end) = talk(&mut connect(&proxy).await, &[7; 3000], 3000).await;
    assert_eq!((found.len(), end), (3000, None), "two times were asked for");

    proxy.cut_after(Direction::Down, 10, 1);
    let (found, end) = talk(&mut connect(&proxy).await, b"0123456789abcdef", 16).await;
    assert_eq!((&found[..], end), (&b"0123456789"[..], Some(ErrorKind::ConnectionReset)));
    proxy.cut_after(Direction::Down, 10, 1);
    proxy.cut_after(Direction::Down, 0, 0);
    assert_eq!(talk(&mut connect(&proxy).await, &[7; 100], 100).await.1, None);
}

#[tokio::test]
async fn slows_down() {
    let (upstream, _) = echo().await;
    let proxy = Proxy::start(upstream).await.unwrap();
    let mut stream = connect(&proxy).await;
    let timed = async |stream: &mut TcpStream| {
        let started = Instant::now();
        let (found, end) = talk(stream, &[7; 2000], 2000).await;
        assert_eq!((found.len(), end), (2000, None));
        started.elapsed()
    };
    proxy.throttle(Some(10_000));
    let slow = timed(&mut stream).await;
    assert!(slow >= Duration::from_millis(200), "2,000 bytes at 10,000 a second took {slow:?}");
    proxy.throttle(None);
    proxy.delay(Duration::from_millis(150));
    let late = timed(&mut stream).await;
    assert!(late >= Duration::from_millis(300), "150 ms each way took {late:?}");
    proxy.delay(Duration::ZERO);
    assert!(timed(&mut stream).await < slow.max(late));
    // A cut does not wait for what is slow.
    proxy.throttle(Some(1));
    stream.write_all(&[7; 100]).await.unwrap();
    proxy.cut_all();
    assert!(timeout(Duration::from_secs(5), stream.read_u8()).await.unwrap().is_err());
}

#[tokio::test]
async fn swallows_the_answer_of_one_request() {
    let (upstream, seen) = http().await;
    let proxy = Proxy::start(upstream).await.unwrap();
    let request = |path: &str| format!("PUT {path} HTTP/1.1\r\nhost: x\r\n\r\n").into_bytes();
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n";
    let length = interim.len() + 40;
    let mut stream = connect(&proxy).await;
    let (answer, _) = talk(&mut stream, &request("/job/head.json"), length).await;
    assert!(answer.ends_with(b"ok"), "{}", String::from_utf8_lossy(&answer));
    // What passed before the order does not count, and neither do other requests.
    proxy.swallow_reply("PUT /job/head.json");
    assert!(talk(&mut stream, &request("/other"), length).await.0.ends_with(b"ok"));
    assert_eq!(proxy.swallowed(), 0);
    // It comes in two pieces on a connection that is open already.
    let wanted = request("/job/head.json");
    stream.write_all(&wanted[..9]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (answer, end) = talk(&mut stream, &wanted[9..], length).await;
    assert_eq!((&answer[..], end), (&interim[..], Some(ErrorKind::UnexpectedEof)));
    assert_eq!((proxy.swallowed(), proxy.cuts()), (1, 0));
    let lines: Vec<_> = seen.lock().unwrap().iter().map(|line| line[4..].to_owned()).collect();
    assert_eq!(lines, ["/job/head.json HTTP/1.1", "/other HTTP/1.1", "/job/head.json HTTP/1.1"]);
    // Once only.
    let mut stream = connect(&proxy).await;
    assert!(talk(&mut stream, &request("/job/head.json"), length).await.0.ends_with(b"ok"));
}

#[tokio::test]
async fn a_server_that_is_gone_is_a_reset() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let proxy = Proxy::start(gone).await.unwrap();
    if let Ok(mut stream) = TcpStream::connect(proxy.address()).await {
        assert!(talk(&mut stream, b"hello", 5).await.1.is_some());
    }
    assert_eq!(proxy.connections(), 1);
}
