//! A proxy in front of a PostgreSQL server whose network stalls for sessions that get much, or that leads elsewhere.

use crate::free_port;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A session that has got more than this gets nothing while the network stalls.
const MUCH: usize = 4 << 20;

#[derive(Default)]
struct State {
    to: AtomicU16,
    /// Clients of before.
    clients: Mutex<Vec<TcpStream>>,
    hold: AtomicBool,
    stop: AtomicBool,
}

pub struct Stall {
    pub port: u16,
    state: Arc<State>,
}

impl Stall {
    /// Listens in front of the server on `to`.
    pub fn start(to: u16) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        let state = Arc::new(State { to: to.into(), ..State::default() });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let state = shared.clone();
                std::thread::spawn(move || {
                    // An error is a connection that ended.
                    let _ = serve(client, &state);
                });
            }
        });
        Self { port, state }
    }

    /// Ends every session; new ones reach another server, as when an address is moved.
    pub fn lead_to(&self, port: u16) {
        self.state.to.store(port, Ordering::SeqCst);
        for c in self.state.clients.lock().expect("no panic").drain(..) {
            let _ = c.shutdown(Shutdown::Both);
        }
    }

    /// Lets the network stall, or go on.
    pub fn hold(&self, yes: bool) {
        self.state.hold.store(yes, Ordering::SeqCst);
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.hold(false);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(mut client: TcpStream, state: &Arc<State>) -> io::Result<()> {
    state.clients.lock().expect("no panic").push(client.try_clone()?);
    let mut server = TcpStream::connect(("127.0.0.1", state.to.load(Ordering::SeqCst)))?;
    let gone = Arc::new(AtomicBool::new(false));
    let answers = {
        let (mut from, mut to) = (server.try_clone()?, client.try_clone()?);
        let (state, gone) = (state.clone(), gone.clone());
        std::thread::spawn(move || -> io::Result<()> {
            let (mut chunk, mut got) = ([0; 16384], 0);
            loop {
                while got > MUCH && state.hold.load(Ordering::SeqCst) && !gone.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                let n = from.read(&mut chunk)?;
                if n == 0 {
                    return to.shutdown(Shutdown::Both);
                }
                got += n;
                to.write_all(&chunk[..n])?;
            }
        })
    };
    let mut chunk = [0; 16384];
    // A client that is gone with a reset is as gone.
    while let Ok(n) = client.read(&mut chunk) {
        if n == 0 || server.write_all(&chunk[..n]).is_err() {
            break;
        }
    }
    gone.store(true, Ordering::SeqCst);
    let _ = server.shutdown(Shutdown::Both);
    let _ = answers.join();
    Ok(())
}
