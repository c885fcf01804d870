//! The loop that owns a streaming connection.
//!
//! One biased select; the order is the priority:
//! 1. being told to stop;
//! 2. feedback, on a timer of at most a third of `wal_sender_timeout`, at once when the server asks, and when the durable
//!    position has moved;
//! 3. reading, only while the sink has room, and in a calm stream only after messages had a moment to gather.
//!
//! So a sink that stands still (a store is away, the spool is full) stops the reading, which holds the server's sender
//! back by TCP, and never stops the feedback, which would make the server drop the connection and send everything again.

use super::client::ReplicationClient;
use super::sink::{Durable, Packet, Sink};
use crate::error::{Error, Kind, Result};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use coffer_wire::Lsn;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Microseconds from 1970-01-01 to 2000-01-01, where PostgreSQL's timestamps begin.
const PG_EPOCH_US: i64 = 946_684_800_000_000;

/// How long a calm stream's messages gather in the socket. A server under load sends a message for each commit, and waking
/// for each one costs it and us more than the message itself.
const GATHER: Duration = Duration::from_millis(10);

/// A stream that brought less than this in the last [`GATHER`] is calm. Fits into any socket's buffer, so the server's
/// sender never waits for us because of it.
const CALM_BYTES: usize = 64 << 10;

/// How long the end of the copy is waited for.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

/// What the loop is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Read and give feedback.
    Stream,
    /// Give feedback only, while what was read becomes durable.
    Drain,
    /// Tell the server the last durable position and leave.
    Close,
}

/// Limits of the loop.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Longest time between two feedbacks.
    pub feedback: Duration,
    /// The connection is dead when nothing at all came for so long although the server was asked to answer.
    pub silence: Duration,
}

impl Pace {
    /// From the server's `wal_sender_timeout`; zero means that it has none.
    pub fn for_timeout(wal_sender_timeout: Duration) -> Self {
        let third = if wal_sender_timeout.is_zero() { Duration::from_secs(10) } else { wal_sender_timeout / 3 };
        Self {
            feedback: third.clamp(Duration::from_millis(50), Duration::from_secs(10)),
            // Long: a sender that works through a huge transaction of no interest may not look at its socket for minutes,
            // and a connection dropped for that would only begin the same work again.
            silence: Duration::from_secs(300),
        }
    }
}

/// Decides after each read whether to leave the socket alone for a while.
struct Gathering {
    since: Instant,
    bytes: usize,
    /// Not before this is the socket to be read.
    until: Option<Instant>,
}

impl Gathering {
    fn new() -> Self {
        Self { since: Instant::now(), bytes: 0, until: None }
    }

    /// `n` bytes were read.
    fn read(&mut self, n: usize, now: Instant) {
        self.bytes += n;
        if now.duration_since(self.since) < GATHER {
            return;
        }
        self.until = (self.bytes < CALM_BYTES).then(|| now + GATHER);
        (self.since, self.bytes) = (now, 0);
    }
}

/// Streams until told to close or until the connection or the sink fails.
pub async fn run<S: Sink>(
    mut client: ReplicationClient,
    sink: &mut S,
    mut durable: watch::Receiver<Durable>,
    mut phase: watch::Receiver<Phase>,
    pace: Pace,
) -> Result<()> {
    let mut received = Lsn::ZERO;
    let mut timer = tokio::time::interval(pace.feedback);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last_heard = Instant::now();
    let mut gathering = Gathering::new();
    loop {
        let now = *phase.borrow_and_update();
        if now == Phase::Close {
            let flushed = durable.borrow().0;
            return close(client, received, flushed).await;
        }
        let reading = now == Phase::Stream && sink.has_room();
        tokio::select! {
            biased;
            changed = phase.changed() => {
                if changed.is_err() {
                    return Err(Error::other("the stream's owner is gone"));
                }
            }
            changed = durable.changed() => {
                if changed.is_err() {
                    return Err(Error::other("the shipping of changes has stopped"));
                }
                let flushed = durable.borrow_and_update().0;
                feedback(&mut client, received, flushed, false).await?;
            }
            _ = timer.tick() => {
                let flushed = durable.borrow().0;
                // Ask for an answer when it has been quiet: its position is what an idle record carries.
                let ask = last_heard.elapsed() >= pace.feedback;
                if reading && last_heard.elapsed() > pace.silence {
                    return Err(Error::new(Kind::Unreachable, format!(
                        "the server has sent nothing for {} s", last_heard.elapsed().as_secs())));
                }
                feedback(&mut client, received, flushed, ask).await?;
            }
            () = sink.room(), if now == Phase::Stream && !reading => {
                // The silence was ours.
                last_heard = Instant::now();
            }
            () = tokio::time::sleep_until(gathering.until.unwrap_or(last_heard)), if gathering.until.is_some() => {
                gathering.until = None;
            }
            got = client.fill(), if reading && gathering.until.is_none() => {
                gathering.read(got?, Instant::now());
                last_heard = Instant::now();
                let mut asked = false;
                while let Some((tag, body)) = client.next_raw()? {
                    match tag {
                        b'd' => asked |= packet(body, &mut received, sink)?,
                        b'c' => return Err(Error::new(Kind::Unreachable, "the server ended the stream")),
                        _ => return Err(client.streaming_error(tag, &body)),
                    }
                }
                if asked {
                    let flushed = durable.borrow().0;
                    feedback(&mut client, received, flushed, false).await?;
                }
            }
        }
    }
}

/// Tells the server the last durable position and ends the copy. What it still sends is read and thrown away: closing a
/// socket with unread bytes resets the connection, and the server would never see the position.
async fn close(mut client: ReplicationClient, received: Lsn, flushed: Lsn) -> Result<()> {
    feedback(&mut client, received, flushed, false).await?;
    let mut out = BytesMut::new();
    postgres_protocol::message::frontend::copy_done(&mut out);
    client.send(&out).await?;
    let to_the_end = async {
        loop {
            while let Some((tag, _)) = client.next_raw()? {
                // ReadyForQuery, or an error: either way nothing of the copy follows.
                if matches!(tag, b'Z' | b'E') {
                    return Ok::<_, Error>(());
                }
            }
            client.fill().await?;
        }
    };
    // Not waiting any longer is no loss: the commit log says where to go on, the slot only lags behind it.
    if let Ok(end) = tokio::time::timeout(CLOSE_WAIT, to_the_end).await {
        end?;
        out.clear();
        postgres_protocol::message::frontend::terminate(&mut out);
        client.send(&out).await?;
    }
    Ok(())
}

/// Hands one CopyData message on; whether the server asked for an answer.
fn packet<S: Sink>(mut body: Bytes, received: &mut Lsn, sink: &mut S) -> Result<bool> {
    let short = || Error::other("a message of the stream is cut");
    match body.first() {
        Some(b'w') if body.len() >= 25 => {
            body.advance(1);
            let start = Lsn(body.get_u64());
            body.advance(16);
            *received = (*received).max(start);
            sink.offer(Packet::Data(body))?;
            Ok(false)
        }
        Some(b'k') if body.len() >= 18 => {
            body.advance(1);
            let upto = Lsn(body.get_u64());
            body.advance(8);
            let urgent = body.get_u8() != 0;
            *received = (*received).max(upto);
            sink.offer(Packet::Position { upto, urgent })?;
            Ok(urgent)
        }
        _ => Err(short()),
    }
}

/// Standby status update. Only what is durable is called flushed, and applied.
async fn feedback(client: &mut ReplicationClient, received: Lsn, durable: Lsn, ask: bool) -> Result<()> {
    let mut out = BytesMut::with_capacity(40);
    out.put_u8(b'd');
    out.put_u32(4 + 34);
    out.put_u8(b'r');
    out.put_u64(received.max(durable).0);
    out.put_u64(durable.0);
    out.put_u64(durable.0);
    out.put_i64(jiff::Timestamp::now().as_microsecond() - PG_EPOCH_US);
    out.put_u8(u8::from(ask));
    // A server that does not read for this long is gone; without the limit a full send buffer would hold the loop.
    match tokio::time::timeout(Duration::from_secs(60), client.send(&out)).await {
        Ok(r) => r,
        Err(_) => Err(Error::new(Kind::Unreachable, "the server does not take the feedback")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sink::Accepted;
    use super::*;

    #[derive(Default)]
    struct Seen(Vec<Packet>);

    impl Sink for Seen {
        fn offer(&mut self, packet: Packet) -> Result<Accepted> {
            self.0.push(packet);
            Ok(Accepted)
        }
        async fn room(&self) {}
        fn has_room(&self) -> bool {
            true
        }
    }

    #[test]
    fn messages_become_packets_and_cut_ones_an_error() {
        let mut seen = Seen::default();
        let mut at = Lsn::ZERO;
        let mut w = vec![b'w'];
        for n in [0x10u64, 0x20, 0] {
            w.extend_from_slice(&n.to_be_bytes());
        }
        w.extend_from_slice(b"frames");
        assert!(!packet(Bytes::from(w.clone()), &mut at, &mut seen).unwrap());
        let mut k = vec![b'k'];
        k.extend_from_slice(&0x30u64.to_be_bytes());
        k.extend_from_slice(&[0; 8]);
        k.push(1);
        assert!(packet(Bytes::from(k.clone()), &mut at, &mut seen).unwrap());
        assert_eq!(at, Lsn(0x30));
        assert!(matches!(&seen.0[0], Packet::Data(b) if &b[..] == b"frames"));
        assert!(matches!(seen.0[1], Packet::Position { upto: Lsn(0x30), urgent: true }));
        for cut in [&w[..24], &k[..17], &[][..], b"x"] {
            assert!(packet(Bytes::copy_from_slice(cut), &mut at, &mut seen).is_err());
        }
    }

    #[test]
    fn a_calm_stream_gathers_and_a_busy_one_is_read_at_once() {
        let mut g = Gathering::new();
        let mut now = g.since;
        g.read(100, now);
        assert_eq!(g.until, None);
        for (bytes, calm) in [(0, true), (CALM_BYTES, false), (CALM_BYTES, false), (CALM_BYTES - 1, true)] {
            now += GATHER;
            g.read(bytes, now);
            assert_eq!(g.until, calm.then(|| now + GATHER));
        }
    }

    #[test]
    fn feedback_comes_three_times_in_a_timeout() {
        assert_eq!(Pace::for_timeout(Duration::from_secs(6)).feedback, Duration::from_secs(2));
        assert_eq!(Pace::for_timeout(Duration::ZERO).feedback, Duration::from_secs(10));
        assert_eq!(Pace::for_timeout(Duration::from_secs(60)).feedback, Duration::from_secs(10));
    }
}
