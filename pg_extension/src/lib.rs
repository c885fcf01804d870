//! pg_coffer: the extension's library, which is its output plugin too.

mod sql_files;

pgrx::pg_module_magic!();
