//! pg_coffer: the extension's library, which is its output plugin too.

mod api;
mod catalog;
mod claim;
mod compat;
mod encoding;
mod fill_trigger;
mod invalidation;
mod layout;
mod output_plugin;
mod path;
mod render;
mod row_json;
mod row_trigger;
mod session;
mod settings;
mod spi;
mod sql_files;
mod tag_trigger;
mod tuple;
mod wal_message;

pgrx::pg_module_magic!();
