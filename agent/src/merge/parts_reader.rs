//! Parts of a full, one after another, as one plaintext. Each begins with the descriptors that its rows need.

use crate::catalog::PartAt;
use crate::crypto::{SectionRead, SectionReader};
use crate::error::{Error, Kind, Result};
use crate::repository::{ObjectRanges, Repository};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;
use tokio::runtime::Handle;
use uuid::Uuid;

type Reader = SectionReader<ObjectRanges>;

/// See the module. Blocking.
pub(super) struct PartsReader {
    pub repo: Arc<Repository>,
    pub rt: Handle,
    pub from: Option<String>,
    pub parts: VecDeque<PartAt>,
    /// The object that was read from last.
    pub open: Option<(Uuid, Reader)>,
    pub current: Option<(PartAt, SectionRead<Reader, ObjectRanges>)>,
}

impl PartsReader {
    fn next(&mut self) -> Result<bool> {
        let Some(part) = self.parts.pop_front() else { return Ok(false) };
        let during = |e: Error| e.during(format_args!("object {}", part.object.path));
        let reader = match self.open.take() {
            Some((uid, r)) if uid == part.object.object => r,
            _ => {
                let ranges = self.repo.ranges(self.rt.clone(), &part.object, self.from.as_deref())?;
                SectionReader::new(ranges, &**self.repo.keyring(), &part.object.expect()).map_err(during)?
            }
        };
        let n = reader.sections().iter().position(|s| s.label == part.section).ok_or_else(|| {
            let what = format!("object {} has no section {}", part.object.path, part.section);
            Error::new(Kind::Verification, what).code("malformed")
        })?;
        self.current = Some((part.clone(), reader.into_section(n).map_err(during)?));
        Ok(true)
    }
}

impl Read for PartsReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some((part, section)) = &mut self.current {
                let n = section.read(out).map_err(|e| {
                    io::Error::other(super::from_io(e).during(format_args!("object {}", part.object.path)))
                })?;
                if n > 0 || out.is_empty() {
                    return Ok(n);
                }
            }
            if let Some((part, section)) = self.current.take() {
                self.open = Some((part.object.object, section.into_reader()));
            }
            if !self.next().map_err(io::Error::other)? {
                return Ok(0);
            }
        }
    }
}
