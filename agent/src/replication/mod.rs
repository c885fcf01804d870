//! The replication protocol: one connection to one slot, and the loop that reads it.
//!
//! Source: PostgreSQL documentation, "Streaming Replication Protocol" and "Message Flow". [`client`] speaks commands,
//! [`stream`] is the loop that owns the connection once streaming has begun. Nothing here knows what the bytes mean or
//! where they go: the loop hands packets to a [`sink`], whose answer is [`sink::Accepted`], never "durable"; what is
//! durable comes back on a watch, and is all that the server is ever told.

pub mod client;
pub mod sink;
pub mod stream;
