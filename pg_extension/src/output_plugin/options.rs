//! The options of START_REPLICATION and of the SQL functions. They are typed by people: a wrong one is an error.

use coffer_wire::Class;
use pgrx::pg_sys;
use std::ffi::CStr;

/// What the plugin writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Frames, for the agent.
    Frames,
    /// One JSON object per change, for people.
    Json,
}

/// The options of one decoding session.
#[derive(Clone, Debug)]
pub struct Options {
    pub format: Format,
    /// Only this tenant's changes. In the database's encoding.
    pub tenant: Option<Vec<u8>>,
    /// Only tables of these classes; empty: all.
    pub classes: Vec<Class>,
}

impl Options {
    /// Reads a list of `DefElem`; `Err` with what is wrong and what would be right.
    ///
    /// # Safety
    /// `list` is null or a list of `DefElem`.
    pub unsafe fn read(list: *mut pg_sys::List) -> Result<Self, String> {
        let mut options = Self { format: Format::Frames, tenant: None, classes: Vec::new() };
        // SAFETY: by the caller; names and values end with NUL.
        unsafe {
            let count = if list.is_null() { 0 } else { (*list).length };
            for i in 0..count {
                let element = (*(*list).elements.add(i as usize)).ptr_value.cast::<pg_sys::DefElem>();
                let name = CStr::from_ptr((*element).defname).to_string_lossy();
                if (*element).arg.is_null() {
                    return Err(format!("option \"{name}\" needs a value"));
                }
                let value = CStr::from_ptr(pg_sys::defGetString(element)).to_bytes();
                options.set(&name, value)?;
            }
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &[u8]) -> Result<(), String> {
        let text = String::from_utf8_lossy(value);
        match name {
            "format" => {
                self.format = match &*text {
                    "frames" => Format::Frames,
                    "json" => Format::Json,
                    other => return Err(format!("option \"format\" is frames or json, not \"{other}\"")),
                }
            }
            "tenant" => self.tenant = Some(value.to_vec()),
            "classes" => {
                for name in text.split(',').map(str::trim) {
                    let class = Class::from_name(name).ok_or_else(|| {
                        let known: Vec<_> = Class::ALL.iter().map(|c| c.name()).collect();
                        format!("option \"classes\" knows {}, not \"{name}\"", known.join(", "))
                    })?;
                    self.classes.push(class);
                }
            }
            other => return Err(format!("unknown option \"{other}\"; there are format, tenant and classes")),
        }
        Ok(())
    }

    /// Whether tables of this class are asked for.
    pub fn wants_class(&self, class: Class) -> bool {
        self.classes.is_empty() || self.classes.contains(&class)
    }
}
