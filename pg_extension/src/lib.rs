//! pg_coffer: the extension's library, which is its output plugin too.

pgrx::pg_module_magic!();
