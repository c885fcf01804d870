//! A proxy in front of an S3 server that loses answers, refuses, hangs or pretends to be full: faults as the network and
//! the server make them, without a line in the agent.
//!
//! Every request gets a connection of its own to the server; heads pass unchanged but for `Connection`, which no
//! signature covers.

use crate::free_port;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What happens to requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// This share of the writes is done by the server, and the client never hears of it.
    LoseAnswers(f64),
    /// This share of the requests is answered with 503 SlowDown and not done.
    Unavailable(f64),
    /// Writes are answered with 507, reads are served.
    Full,
    /// Connections are taken and nothing is answered.
    Hang,
}

struct State {
    to: u16,
    fault: Mutex<Fault>,
    hits: AtomicU64,
    stop: AtomicBool,
}

pub struct Proxy {
    pub port: u16,
    state: Arc<State>,
}

impl Proxy {
    /// Listens on a port of its own in front of the server on `to`.
    pub fn start(to: u16) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        let state = Arc::new(State {
            to,
            fault: Mutex::new(Fault::None),
            hits: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let state = shared.clone();
                std::thread::spawn(move || {
                    // An error is a connection that ended, which is what a proxy of faults is for.
                    let _ = serve(client, &state);
                });
            }
        });
        Self { port, state }
    }

    /// From now on.
    pub fn set(&self, fault: Fault) {
        *self.state.fault.lock().expect("no panic holds it") = fault;
    }

    /// How many requests a fault has hit so far.
    pub fn hits(&self) -> u64 {
        self.state.hits.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(mut client: TcpStream, state: &State) -> io::Result<()> {
    let Some((head, mut rest)) = read_head(&mut client)? else { return Ok(()) };
    let method = head.split(' ').next().unwrap_or_default().to_owned();
    let length = header(&head, "content-length").and_then(|v| v.parse().ok()).unwrap_or(0usize);
    if header(&head, "expect").is_some() {
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let have = rest.len();
    rest.resize(length.max(have), 0);
    client.read_exact(&mut rest[have..])?;
    let write = matches!(method.as_str(), "PUT" | "POST");
    let fault = *state.fault.lock().expect("no panic holds it");
    let hit = match fault {
        Fault::None => false,
        Fault::LoseAnswers(share) => write && rand::random::<f64>() < share,
        Fault::Unavailable(share) => rand::random::<f64>() < share,
        Fault::Full => write,
        Fault::Hang => true,
    };
    if hit {
        state.hits.fetch_add(1, Ordering::SeqCst);
        match fault {
            Fault::Unavailable(_) => return refuse(&mut client, "503 Service Unavailable", "SlowDown"),
            Fault::Full => return refuse(&mut client, "507 Insufficient Storage", "InsufficientStorage"),
            Fault::Hang => {
                // Until the client gives up, or the fault is over.
                client.set_read_timeout(Some(Duration::from_millis(200)))?;
                let mut byte = [0];
                while *state.fault.lock().expect("no panic holds it") == Fault::Hang {
                    match client.read(&mut byte) {
                        Ok(0) => return Ok(()),
                        Ok(_) => {}
                        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                        Err(e) => return Err(e),
                    }
                }
                return client.shutdown(Shutdown::Both);
            }
            Fault::LoseAnswers(_) | Fault::None => {}
        }
    }
    let mut server = TcpStream::connect(("127.0.0.1", state.to))?;
    server.write_all(closing(&head).as_bytes())?;
    server.write_all(&rest)?;
    let mut answer = Vec::new();
    if hit {
        server.read_to_end(&mut answer)?;
        return client.shutdown(Shutdown::Both);
    }
    let Some((head, rest)) = read_head(&mut server)? else { return client.shutdown(Shutdown::Both) };
    client.write_all(closing(&head).as_bytes())?;
    client.write_all(&rest)?;
    io::copy(&mut server, &mut client)?;
    client.shutdown(Shutdown::Both)
}

fn refuse(client: &mut TcpStream, status: &str, code: &str) -> io::Result<()> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>fault</Message></Error>");
    write!(client, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())?;
    client.shutdown(Shutdown::Both)
}

/// A head with its closing empty line, and what came behind it; `None` when the peer closed before.
fn read_head(from: &mut TcpStream) -> io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 16384];
    loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok(Some((String::from_utf8_lossy(&bytes).into_owned(), rest)));
        }
        match from.read(&mut chunk)? {
            0 => return Ok(None),
            n => bytes.extend_from_slice(&chunk[..n]),
        }
    }
}

fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().find_map(|l| l.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim()))
}

/// The head with `Connection: close`.
fn closing(head: &str) -> String {
    let mut out = String::new();
    for line in head.lines().filter(|l| !l.is_empty()) {
        if !line.split(':').next().is_some_and(|n| n.eq_ignore_ascii_case("connection")) {
            out.push_str(line);
            out.push_str("\r\n");
        }
    }
    out.push_str("Connection: close\r\n\r\n");
    out
}
