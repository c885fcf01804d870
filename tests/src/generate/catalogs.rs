//! What a database's catalogs say of tables and of the types of their columns: the same question at the source and in a
//! database that a restore made.

use super::Model;
use tokio_postgres::Client;

/// One line per thing. Left out is what is the product's own: its triggers, and the replica identity that it chose. Clones
/// in partitions have names that the server chooses. How a column is stored that is inherited is in no dump of the server's.
const LINES: &str = r#"
WITH RECURSIVE rel AS (
    SELECT c.* FROM unnest($1::text[]) n (name) JOIN pg_class c ON c.oid = to_regclass(n.name)
),
types (oid) AS (
    SELECT DISTINCT a.atttypid FROM pg_attribute a JOIN rel r ON r.oid = a.attrelid WHERE a.attnum > 0 AND NOT a.attisdropped
    UNION
    SELECT x.oid FROM types t JOIN pg_type y ON y.oid = t.oid CROSS JOIN LATERAL (
        SELECT y.typelem UNION ALL SELECT y.typbasetype
        UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = nullif(y.typrelid, 0) AND a.attnum > 0 AND NOT a.attisdropped
    ) x (oid) WHERE x.oid >= 16384
),
owned AS (
    SELECT s.*, d.refobjid, d.refobjsubid FROM pg_depend d JOIN rel r ON r.oid = d.refobjid JOIN pg_sequence s ON s.seqrelid = d.objid
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
)
SELECT format('table %s: %s', r.oid::regclass, concat_ws(' ', r.relkind, r.relpersistence, 'rls ' || r.relrowsecurity, 'forced ' || r.relforcerowsecurity,
    r.reloptions::text, pg_get_partkeydef(r.oid), pg_get_expr(r.relpartbound, r.oid))) AS line FROM rel r
UNION ALL
SELECT format('%s is under %s', i.inhrelid::regclass, i.inhparent::regclass) FROM pg_inherits i JOIN rel r ON r.oid = i.inhrelid
UNION ALL
SELECT format('column %s.%I: %s', r.oid::regclass, a.attname, concat_ws(' ', 'the ' || row_number() OVER (PARTITION BY r.oid ORDER BY a.attnum),
    format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN 'NOT NULL' END, 'as ' || pg_get_expr(d.adbin, d.adrelid),
    'identity ' || nullif(a.attidentity::text, ''), 'generated ' || nullif(a.attgenerated::text, ''), CASE WHEN a.attinhcount = 0 THEN 'stored ' || a.attstorage::text END))
FROM rel r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
UNION ALL
SELECT format('constraint %s of %s: %s', CASE WHEN k.conparentid = 0 THEN quote_ident(k.conname) ELSE 'of a parent''s' END, r.oid::regclass,
    pg_get_constraintdef(k.oid))
FROM rel r JOIN pg_constraint k ON k.conrelid = r.oid WHERE k.contype IN ('c', 'u', 'p', 'f', 'x')
UNION ALL
SELECT format('index: %s%s', pg_get_indexdef(i.indexrelid), CASE WHEN NOT i.indisvalid THEN ' (not valid)' END)
FROM rel r JOIN pg_index i ON i.indrelid = r.oid
UNION ALL
SELECT format('trigger: %s, enabled %s', pg_get_triggerdef(t.oid), t.tgenabled) FROM rel r JOIN pg_trigger t ON t.tgrelid = r.oid
WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgname !~* '^(zzz|aaa)_coffer_'
UNION ALL
SELECT format('policy %I of %s: %s', p.polname, r.oid::regclass, concat_ws(' ', p.polcmd, p.polpermissive, p.polroles::text,
    pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)))
FROM rel r JOIN pg_policy p ON p.polrelid = r.oid
UNION ALL
SELECT format('comment on %s: %s', pg_describe_object(d.classoid, d.objoid, d.objsubid), d.description)
FROM pg_description d WHERE (d.classoid, d.objoid) IN (
    SELECT 'pg_class'::regclass, r.oid FROM rel r UNION ALL SELECT 'pg_class'::regclass, i.indexrelid FROM rel r JOIN pg_index i ON i.indrelid = r.oid
    UNION ALL SELECT 'pg_constraint'::regclass, k.oid FROM rel r JOIN pg_constraint k ON k.conrelid = r.oid
    UNION ALL SELECT 'pg_trigger'::regclass, t.oid FROM rel r JOIN pg_trigger t ON t.tgrelid = r.oid
    UNION ALL SELECT 'pg_policy'::regclass, p.oid FROM rel r JOIN pg_policy p ON p.polrelid = r.oid)
UNION ALL
SELECT format('sequence %s of %s.%I: %s', s.seqrelid::regclass, a.attrelid::regclass, a.attname,
    concat_ws(' ', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle))
FROM owned s JOIN pg_attribute a ON a.attrelid = s.refobjid AND a.attnum = s.refobjsubid
UNION ALL
SELECT format('type %s: %s', y.oid::regtype, concat_ws(' ',
    (SELECT string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = y.oid),
    (SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum)
     FROM pg_attribute a WHERE a.attrelid = nullif(y.typrelid, 0) AND a.attnum > 0 AND NOT a.attisdropped),
    CASE WHEN y.typtype = 'd' THEN format_type(y.typbasetype, y.typtypmod) END, 'default ' || y.typdefault,
    (SELECT string_agg(format('%I %s', k.conname, pg_get_constraintdef(k.oid)), ', ' ORDER BY k.conname) FROM pg_constraint k
     WHERE k.contypid = y.oid AND k.contype = 'c')))
FROM types t JOIN pg_type y ON y.oid = t.oid WHERE y.oid >= 16384 AND y.typtype IN ('e', 'c', 'd')
"#;

/// Everything that the catalogs say of these tables (names as SQL wants them), sorted.
pub async fn definitions(db: &Client, tables: &[String]) -> Result<Vec<String>, tokio_postgres::Error> {
    let mut lines: Vec<String> = db.query(LINES, &[&tables]).await?.iter().map(|r| r.get(0)).collect();
    lines.sort_unstable();
    Ok(lines)
}

impl Model {
    /// The tables whose definitions are archived, with their partitions, as SQL wants them.
    pub fn defined(&self) -> Vec<String> {
        let covered = self.tables.values().filter(|t| !t.unlogged);
        covered.flat_map(|t| [t.name()].into_iter().chain(t.leaves.iter().map(super::Leaf::qualified))).collect()
    }
}

/// What differs between two answers; a few lines of it.
pub fn differ(what: &str, have: &[String], want: &[String]) -> Option<String> {
    let beyond = |a: &[String], b: &[String]| {
        let mut only: Vec<_> = a.iter().filter(|l| b.binary_search(l).is_err()).cloned().collect();
        only.truncate(6);
        only
    };
    let (missing, extra) = (beyond(want, have), beyond(have, want));
    (have != want).then(|| format!("definitions at {what}: missing {missing:#?}, extra {extra:#?}"))
}
