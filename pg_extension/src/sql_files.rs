//! The hand-written SQL, in the order of its needs.
//!
//! The tables come before the library's own functions, grants and event triggers after everything. What lies between
//! refers to the library's functions only from plpgsql bodies, which are read when they run, so it may come before
//! or after them.

use pgrx::extension_sql_file;

extension_sql_file!("../../sql/10_tables.sql", name = "tables", bootstrap);
extension_sql_file!("../../sql/20_names.sql", name = "names", requires = ["tables", "system_id"]);
extension_sql_file!("../../sql/30_strategy.sql", name = "strategy", requires = ["names"]);
extension_sql_file!("../../sql/35_path.sql", name = "path", requires = ["strategy"]);
extension_sql_file!("../../sql/40_registry.sql", name = "registry", requires = ["path"]);
extension_sql_file!("../../sql/45_accounts.sql", name = "accounts", requires = ["registry"]);
extension_sql_file!("../../sql/46_access.sql", name = "access", requires = ["accounts"]);
extension_sql_file!("../../sql/47_large_objects.sql", name = "large_objects", requires = ["access"]);
extension_sql_file!("../../sql/50_coverage.sql", name = "coverage", requires = ["registry", "large_objects"]);
extension_sql_file!("../../sql/55_reading.sql", name = "reading", requires = ["coverage"]);
extension_sql_file!("../../sql/60_events.sql", name = "events", requires = ["coverage"]);
extension_sql_file!("../../sql/70_durability.sql", name = "durability", requires = ["coverage"]);
extension_sql_file!("../../sql/72_jobs.sql", name = "jobs", requires = ["durability"]);
extension_sql_file!("../../sql/74_mirrors.sql", name = "mirrors", requires = ["jobs"]);
extension_sql_file!("../../sql/75_agent.sql", name = "agent", requires = ["mirrors"]);
extension_sql_file!("../../sql/77_agent_jobs.sql", name = "agent_jobs", requires = ["agent"]);
extension_sql_file!("../../sql/80_doctor.sql", name = "doctor", requires = ["agent_jobs"]);
extension_sql_file!("../../sql/90_grants.sql", name = "grants", finalize);
