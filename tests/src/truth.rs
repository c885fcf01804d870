//! The truth to compare a restore with: rows read while commits are held back around a restore point.
//!
//! `LOCK TABLE … IN EXCLUSIVE MODE` on every table waits for the writers in flight and holds new ones, so the commit of
//! the transaction that holds the locks is an exact cut of the log; a plain read under running writers would not be.

use std::collections::BTreeMap;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// Table -> its rows as text, sorted.
pub type Rows = BTreeMap<String, Vec<String>>;

/// Every tenant's rows at one restore point.
#[derive(Clone, Debug)]
pub struct Truth {
    pub name: String,
    /// Tenant key -> its rows.
    pub tenants: BTreeMap<String, Rows>,
}

/// A table to watch: its name as SQL wants it, and its tenant column.
#[derive(Clone, Debug)]
pub struct Watched {
    pub table: String,
    pub tenant_column: String,
}

impl Watched {
    pub fn new(table: &str, tenant_column: &str) -> Self {
        Self { table: table.into(), tenant_column: tenant_column.into() }
    }
}

/// Rows of `table` for one tenant, each as its record's text, sorted bytewise.
pub async fn rows_of(db: &Client, w: &Watched, tenant: &str) -> Vec<String> {
    let sql = format!("SELECT t::text FROM {} t WHERE {}::text = $1", w.table, w.tenant_column);
    let mut rows: Vec<String> =
        db.query(&sql, &[&tenant]).await.expect("rows").iter().map(|r| r.get::<_, String>(0)).collect();
    rows.sort_unstable();
    rows
}

/// Names a restore point and records what every tenant has there. In a deadlock with writers it begins again.
pub async fn take(db: &mut Client, tables: &[Watched], name: &str) -> Truth {
    let list: Vec<&str> = tables.iter().map(|w| w.table.as_str()).collect();
    let lock = format!("BEGIN; LOCK TABLE {} IN EXCLUSIVE MODE", list.join(", "));
    while let Err(e) = db.batch_execute(&lock).await {
        assert_eq!(e.code(), Some(&SqlState::T_R_DEADLOCK_DETECTED), "the locks: {e:?}");
        db.batch_execute("ROLLBACK").await.expect("rollback");
    }
    db.batch_execute("SET LOCAL timezone = 'UTC'").await.expect("set");
    let mut tenants: BTreeMap<String, Rows> = BTreeMap::new();
    for w in tables {
        let sql = format!("SELECT {}::text, t::text FROM {} t", w.tenant_column, w.table);
        for row in db.query(&sql, &[]).await.expect("rows") {
            let Some(tenant) = row.get::<_, Option<String>>(0) else { continue };
            tenants.entry(tenant).or_default().entry(w.table.clone()).or_default().push(row.get(1));
        }
    }
    for rows in tenants.values_mut().flat_map(BTreeMap::values_mut) {
        rows.sort_unstable();
    }
    db.query_one("SELECT coffer.restore_point($1)", &[&name]).await.expect("restore_point");
    db.batch_execute("COMMIT").await.expect("commit");
    Truth { name: name.into(), tenants }
}

impl Truth {
    /// One tenant's rows of a table; none is an empty list.
    pub fn rows(&self, tenant: &str, table: &str) -> &[String] {
        self.tenants.get(tenant).and_then(|t| t.get(table)).map_or(&[], Vec::as_slice)
    }

    /// Compares a database with what the tenant had; the differences, a few of them.
    pub async fn differences(&self, db: &Client, tables: &[Watched], tenant: &str) -> Vec<String> {
        db.batch_execute("SET timezone = 'UTC'").await.expect("set");
        let mut out = Vec::new();
        for w in tables {
            let have = rows_of(db, w, tenant).await;
            let want = self.rows(tenant, &w.table);
            if have != want {
                let missing: Vec<_> = want.iter().filter(|r| have.binary_search(r).is_err()).take(3).collect();
                let extra: Vec<_> = have.iter().filter(|r| want.binary_search(r).is_err()).take(3).collect();
                out.push(format!(
                    "{} tenant {tenant} at {}: {} rows, should be {}; missing {missing:?}, extra {extra:?}",
                    w.table,
                    self.name,
                    have.len(),
                    want.len()
                ));
            }
        }
        out
    }
}
