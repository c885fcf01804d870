//! What the stream hands its packets to, and the two answers there are: accepted, and durable.
//!
//! They are types so that they cannot be confused: [`Sink::offer`] can only say [`Accepted`], and the only thing the
//! stream may tell the server is a [`Durable`], which the other side makes when a commit record is in every required
//! store.

use crate::error::Result;
use bytes::Bytes;
use coffer_wire::Lsn;
use std::future::Future;

/// One thing that the server sent.
#[derive(Clone, Debug)]
pub enum Packet {
    /// Bytes of the output plugin: whole frames.
    Data(Bytes),
    /// Everything up to here has been sent before this packet.
    Position {
        upto: Lsn,
        /// The server waits for an answer, as it does when it shuts down: make it durable soon.
        urgent: bool,
    },
}

/// The packet is in memory, and nothing more is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted;

/// Everything up to and including this position is in every required store, with its commit record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Durable(pub Lsn);

/// Where packets go. Neither method blocks the thread.
pub trait Sink: Send {
    /// Takes a packet. `Err` when what is behind has stopped; its own error says why.
    fn offer(&mut self, packet: Packet) -> Result<Accepted>;

    /// Ready when another packet is welcome; until then the stream leaves its socket alone. Safe to cancel.
    fn room(&self) -> impl Future<Output = ()> + Send;

    /// Whether another packet is welcome now.
    fn has_room(&self) -> bool;
}
