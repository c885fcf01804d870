//! A client of the streaming replication protocol that throws everything away: the same one for every plugin, so that
//! what is measured is the server's decoding.
//!
//! It never confirms a position, so a slot stays where it is and every repetition decodes the same WAL
//! (PostgreSQL manual, "Streaming Replication Protocol" and "Message Formats").

use crate::figure::Took;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

/// What one pass saw.
pub struct Pass {
    pub took: Took,
    pub messages: u64,
    pub bytes: u64,
}

/// Decodes from the slot's position until the server is past `end`.
pub fn decode(port: u16, db: &str, slot: &str, options: &str, end: u64) -> Pass {
    let mut link = Link::open(port, db);
    let begun = Instant::now();
    link.send(b'Q', format!("START_REPLICATION SLOT {slot} LOGICAL 0/0 ({options})\0").as_bytes());
    let (mut messages, mut bytes, mut seen) = (0, 0, 0);
    loop {
        let (kind, len) = link.head();
        match kind {
            b'W' => link.skip(len),
            b'd' if link.byte() == b'w' => {
                let start = link.u64();
                link.skip(len - 9);
                // The first bytes after `end` belong to the sentinel that follows the workload.
                if start >= end {
                    break;
                }
                seen = seen.max(start);
                messages += 1;
                bytes += (len - 25) as u64;
            }
            b'd' => {
                let reached = link.u64();
                link.skip(8);
                let wants_reply = link.byte() == 1;
                link.skip(len - 18);
                if reached >= end {
                    break;
                }
                if wants_reply {
                    link.alive(seen);
                }
            }
            b'E' => panic!("slot {slot}: {}", link.text(len)),
            _ => link.skip(len),
        }
    }
    let took = Took { seconds: begun.elapsed().as_secs_f64(), cpu: cpu_seconds(link.pid) };
    link.send(b'c', b"");
    link.send(b'X', b"");
    Pass { took, messages, bytes }
}

/// Processor time of a process so far, user and system.
pub fn cpu_seconds(pid: u32) -> f64 {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return f64::NAN };
    // The name may hold spaces; the fields after it do not.
    let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = |n: usize| after.split_whitespace().nth(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or(f64::NAN);
    // SAFETY: sysconf has no preconditions.
    let tick = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    (field(11) + field(12)) / tick
}

struct Link {
    stream: BufReader<TcpStream>,
    /// The server process behind this connection.
    pid: u32,
}

impl Link {
    fn open(port: u16, db: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the cluster listens");
        stream.set_nodelay(true).expect("a TCP socket");
        let mut this = Self { stream: BufReader::with_capacity(1 << 20, stream), pid: 0 };
        let mut hello = vec![0, 3, 0, 0];
        for (k, v) in [("user", "postgres"), ("database", db), ("replication", "database")] {
            hello.extend_from_slice(format!("{k}\0{v}\0").as_bytes());
        }
        hello.push(0);
        let mut packet = ((hello.len() + 4) as u32).to_be_bytes().to_vec();
        packet.append(&mut hello);
        this.stream.get_mut().write_all(&packet).expect("the server reads");
        loop {
            let (kind, len) = this.head();
            match kind {
                b'K' => {
                    let mut pid = [0; 4];
                    this.stream.read_exact(&mut pid).expect("a whole message");
                    this.pid = u32::from_be_bytes(pid);
                    this.skip(len - 4);
                }
                b'Z' => {
                    this.skip(len);
                    return this;
                }
                b'E' => panic!("the server refuses: {}", this.text(len)),
                _ => this.skip(len),
            }
        }
    }

    fn send(&mut self, kind: u8, body: &[u8]) {
        let mut packet = vec![kind];
        packet.extend_from_slice(&((body.len() + 4) as u32).to_be_bytes());
        packet.extend_from_slice(body);
        self.stream.get_mut().write_all(&packet).expect("the server reads");
    }

    /// A standby status update that keeps the session alive and confirms nothing.
    fn alive(&mut self, written: u64) {
        let mut body = vec![b'r'];
        body.extend_from_slice(&written.to_be_bytes());
        body.extend_from_slice(&[0; 8 + 8 + 8 + 1]);
        self.send(b'd', &body);
    }

    fn head(&mut self) -> (u8, usize) {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head).expect("the server stays");
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        (head[0], len - 4)
    }

    fn byte(&mut self) -> u8 {
        let mut b = [0];
        self.stream.read_exact(&mut b).expect("a whole message");
        b[0]
    }

    fn u64(&mut self) -> u64 {
        let mut b = [0; 8];
        self.stream.read_exact(&mut b).expect("a whole message");
        u64::from_be_bytes(b)
    }

    fn text(&mut self, len: usize) -> String {
        let mut b = vec![0; len];
        self.stream.read_exact(&mut b).expect("a whole message");
        String::from_utf8_lossy(&b).replace('\0', " ")
    }

    fn skip(&mut self, mut n: usize) {
        while n > 0 {
            let have = self.stream.fill_buf().expect("the server stays").len();
            assert!(have > 0, "the server closed the connection");
            let take = have.min(n);
            self.stream.consume(take);
            n -= take;
        }
    }
}

/// Processor time of all children that have ended.
pub fn children_cpu() -> f64 {
    // SAFETY: an all-zero rusage is a valid one, and the call only writes it.
    let usage = unsafe {
        let mut u: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut u);
        u
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
