//! Our own messages in the log: tags for the change that follows, markers for the agent.

use super::options::Format;
use super::state::State;
use coffer_wire::tag::{self, Message};
use pgrx::pg_sys;

impl State {
    /// Takes a transactional message with our prefix. Anybody can write such messages; those without our MAC are passed
    /// over. `false` when there is nothing in it for the reader.
    pub fn message(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, message: &[u8]) -> bool {
        let Some(key) = self.secret.key() else { return false };
        match tag::decode(&key, message) {
            Ok(Message::Tag(tag)) => {
                self.tags.put(&tag);
                false
            }
            Ok(Message::Marker { kind, payload }) => self.marker(ctx, kind, payload),
            Err(_) => false,
        }
    }

    fn marker(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, kind: &str, payload: &[u8]) -> bool {
        match self.options.format {
            Format::Frames => self.stream.marker(kind, payload),
            Format::Json => self.write_json_marker(ctx, kind, payload),
        }
        true
    }

    /// The rows of a covered table are being written anew by ALTER TABLE: what the log has of them are the new rows,
    /// without the old ones. Said once per transaction; a base of the table has to follow.
    pub fn rewrite(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, relid: u32) -> bool {
        if self.rewritten.contains(&relid) {
            return false;
        }
        self.rewritten.push(relid);
        self.marker(ctx, "rewrite", format!("{{\"relid\":{relid}}}").as_bytes())
    }
}
