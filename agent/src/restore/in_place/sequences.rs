//! Sequences that columns own move past the values that a restore in place brings back; none moves back.
//!
//! They move inside the restore's transaction, before its commit, and for good whether it commits or not: one that is ahead
//! of rows that did not come does no harm; one that is behind rows that did would give their values out again, and a
//! process that died in between would not come back to move it. The rows are safe without it, so what goes wrong here is
//! a warning.

use super::compare::Comparison;
use super::live::{LiveTable, literal};
use crate::sql::{self, SqlClient};
use coffer_wire::quote_ident;
use std::collections::BTreeMap;

/// How long a sequence that a migration holds is waited for: the tenant's writers wait, too.
const LOCK_TIMEOUT_MS: u32 = 200;

/// The sequences that columns of a table own: column, sequence, whether it counts down.
const OWNED: &str = "SELECT a.attname::text, pg_catalog.format('%I.%I', n.nspname, c.relname), s.seqincrement < 0 \
    FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_sequence s ON s.seqrelid = d.objid \
      JOIN pg_catalog.pg_class c ON c.oid = d.objid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
      JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid \
    WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refclassid = d.classid \
      AND d.refobjid = $1 AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')";

/// Moves them, in the transaction that is open; what could not be moved is among the comparison's warnings.
pub(super) async fn move_forward(
    client: &SqlClient,
    tables: &BTreeMap<u32, LiveTable>,
    comparison: &mut Comparison,
) -> Result<(), tokio_postgres::Error> {
    let mut warnings = Vec::new();
    for t in comparison.tables.iter().filter(|t| t.counts.inserted + t.counts.updated > 0) {
        let live = &tables[&t.relid];
        for row in client.query(OWNED, &[&t.relid]).await? {
            let (column, sequence, down) = (row.get::<_, String>(0), row.get::<_, String>(1), row.get::<_, bool>(2));
            if !t.mapping.columns.iter().any(|c| c.name == column) {
                continue;
            }
            client
                .batch_execute(&format!("SAVEPOINT coffer_sequence; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}"))
                .await?;
            match client.batch_execute(&forward(live, &column, &sequence, down)).await {
                Ok(()) => {}
                Err(e) if e.as_db_error().is_none() => return Err(e),
                Err(e) => {
                    let e = sql::sql_error(e, format!("{}: cannot move the sequence {sequence} on", live.name()));
                    warnings.push(e.to_string());
                }
            }
            // The lock_timeout of before; where the sequence stands is of no transaction.
            client.batch_execute("ROLLBACK TO SAVEPOINT coffer_sequence; RELEASE SAVEPOINT coffer_sequence").await?;
        }
    }
    comparison.warnings.extend(warnings);
    Ok(())
}

/// Moves a sequence to the furthest value that the tenant's rows have, unless it is there.
fn forward(live: &LiveTable, column: &str, sequence: &str, down: bool) -> String {
    let (furthest, beyond) = if down { ("min", "<") } else { ("max", ">") };
    format!(
        "SELECT pg_catalog.setval({}::pg_catalog.regclass, m.furthest) FROM \
         (SELECT pg_catalog.{furthest}(t.{})::int8 AS furthest FROM {} t WHERE {}) m, {sequence} s \
         WHERE m.furthest {beyond} s.last_value OR m.furthest = s.last_value AND NOT s.is_called",
        literal(sequence),
        quote_ident(column),
        live.rule.from_clause(),
        live.is_tenants
    )
}
