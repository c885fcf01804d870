//! A proxy in front of a PostgreSQL server that loses the answer to one COMMIT, as a network that breaks does, or a server
//! that is told to end its sessions.

use crate::free_port;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// `COMMIT` as a simple query.
const COMMIT: &[u8] = b"Q\0\0\0\x0bCOMMIT\0";

struct State {
    to: u16,
    /// What a session has said before the COMMIT that is meant.
    after: &'static str,
    /// What its client gets for the answer.
    instead: Vec<u8>,
    hits: AtomicU64,
    stop: AtomicBool,
}

pub struct SqlProxy {
    pub port: u16,
    state: Arc<State>,
}

/// What a server says that ends a session.
pub fn fatal() -> Vec<u8> {
    let fields = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0";
    let length = u32::try_from(fields.len() + 4).expect("short");
    [&b"E"[..], &length.to_be_bytes(), fields].concat()
}

impl SqlProxy {
    /// Listens in front of the server on `to`. A session that has said `after` gets `instead` for the answer to its next
    /// COMMIT, which the server has carried out by then, and is cut off.
    pub fn start(to: u16, after: &'static str, instead: Vec<u8>) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        let state = Arc::new(State { to, after, instead, hits: AtomicU64::new(0), stop: AtomicBool::new(false) });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let state = shared.clone();
                std::thread::spawn(move || {
                    // An error is a connection that ended.
                    let _ = serve(client, state);
                });
            }
        });
        Self { port, state }
    }

    /// How many answers were lost.
    pub fn hits(&self) -> u64 {
        self.state.hits.load(Ordering::SeqCst)
    }
}

impl Drop for SqlProxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(mut client: TcpStream, state: Arc<State>) -> io::Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", state.to))?;
    let armed = Arc::new(AtomicBool::new(false));
    let answers = {
        let (mut from, mut to) = (server.try_clone()?, client.try_clone()?);
        let (state, armed) = (state.clone(), armed.clone());
        std::thread::spawn(move || -> io::Result<()> {
            let mut chunk = [0; 16384];
            loop {
                let n = from.read(&mut chunk)?;
                if n > 0 && armed.load(Ordering::SeqCst) {
                    state.hits.fetch_add(1, Ordering::SeqCst);
                    to.write_all(&state.instead)?;
                } else if n > 0 {
                    to.write_all(&chunk[..n])?;
                    continue;
                }
                from.shutdown(Shutdown::Both)?;
                return to.shutdown(Shutdown::Both);
            }
        })
    };
    let (mut said, mut meant) = (Vec::new(), false);
    let mut chunk = [0; 16384];
    loop {
        let n = client.read(&mut chunk)?;
        if n == 0 {
            break;
        }
        said.extend_from_slice(&chunk[..n]);
        meant |= said.windows(state.after.len()).any(|w| w == state.after.as_bytes());
        if meant && said.ends_with(COMMIT) {
            armed.store(true, Ordering::SeqCst);
        }
        // What may be cut in two.
        let keep = state.after.len().max(COMMIT.len());
        said.drain(..said.len().saturating_sub(keep));
        server.write_all(&chunk[..n])?;
    }
    let _ = server.shutdown(Shutdown::Write);
    let _ = answers.join();
    Ok(())
}
