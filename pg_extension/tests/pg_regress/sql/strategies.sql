-- Which strategy for which table. The last word of a name says what is expected.
\set SHOW_CONTEXT never
CREATE SCHEMA strat;
SET search_path = strat;
SET client_min_messages = warning;
CREATE TABLE pk_with_tenant_identity (t int, id int, PRIMARY KEY (id, t));
CREATE TABLE pk_is_tenant_identity (t int PRIMARY KEY);
CREATE TABLE unique_with_tenant_identity (t int NOT NULL, id int PRIMARY KEY, UNIQUE (t, id));
CREATE TABLE narrowest_unique_identity (t int NOT NULL, id int PRIMARY KEY, x int NOT NULL, UNIQUE (t, id, x), UNIQUE (t, id));
CREATE TABLE included_is_not_key_tag (t int NOT NULL, id int PRIMARY KEY, UNIQUE (id) INCLUDE (t));
CREATE TABLE pk_without_tenant_tag (t int, id int PRIMARY KEY);
CREATE TABLE unique_nullable_tag (t int, id int PRIMARY KEY, UNIQUE (t, id));
CREATE TABLE unique_partial_tag (t int NOT NULL, id int PRIMARY KEY);
CREATE UNIQUE INDEX ON unique_partial_tag (t, id) WHERE id > 0;
CREATE TABLE unique_expression_tag (t int NOT NULL, id int PRIMARY KEY);
CREATE UNIQUE INDEX ON unique_expression_tag (t, abs(id));
CREATE TABLE unique_deferrable_tag (t int NOT NULL, id int PRIMARY KEY, UNIQUE (t, id) DEFERRABLE);
CREATE TABLE plain_index_tag (t int NOT NULL, id int PRIMARY KEY);
CREATE INDEX ON plain_index_tag (t, id);
CREATE TABLE no_pk_unique_tag (t int, id int NOT NULL UNIQUE);
CREATE TABLE pk_deferrable_other_unique_tag (t int, id int PRIMARY KEY DEFERRABLE, code text NOT NULL UNIQUE);
CREATE TABLE pk_deferrable_full_row (t int, id int PRIMARY KEY DEFERRABLE);
CREATE TABLE pk_deferrable_with_tenant_full_row (t int, id int, PRIMARY KEY (t, id) DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE exclusion_full_row (t int NOT NULL, EXCLUDE (t WITH =));
CREATE TABLE no_key_full_row (t int, x text);
CREATE TABLE only_column_full_row (t int);
CREATE TABLE was_full_full_row (t int, id int, PRIMARY KEY (t, id));
ALTER TABLE was_full_full_row REPLICA IDENTITY FULL;
CREATE TABLE was_nothing_tag (t int, id int PRIMARY KEY);
ALTER TABLE was_nothing_tag REPLICA IDENTITY NOTHING;
CREATE TABLE chosen_by_hand_tag (t int NOT NULL, id int NOT NULL UNIQUE, UNIQUE (t, id));
ALTER TABLE chosen_by_hand_tag REPLICA IDENTITY USING INDEX chosen_by_hand_tag_id_key;
CREATE TABLE chosen_with_tenant_identity (t int NOT NULL, id int PRIMARY KEY, UNIQUE (id, t));
ALTER TABLE chosen_with_tenant_identity REPLICA IDENTITY USING INDEX chosen_with_tenant_identity_id_t_key;
CREATE TABLE generated_identity (a int, t int GENERATED ALWAYS AS (a / 10) STORED NOT NULL, id int, PRIMARY KEY (t, id));
CREATE TABLE generated_full_row (a int, t int GENERATED ALWAYS AS (a / 10) STORED, id int PRIMARY KEY);
CREATE TABLE dropped_column_tag (gone int, t int, id int PRIMARY KEY);
ALTER TABLE dropped_column_tag DROP COLUMN gone;
CREATE TABLE published_tag (t int NOT NULL, id int PRIMARY KEY, UNIQUE (t, id));
CREATE PUBLICATION pub FOR TABLE published_tag;
CREATE TABLE published_no_key_full_row (t int);
ALTER PUBLICATION pub ADD TABLE published_no_key_full_row;

CREATE TABLE identities AS SELECT c.oid AS relid, c.relreplident, i.indexrelid FROM pg_class c LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident
WHERE c.relnamespace = 'strat'::regnamespace AND c.relkind = 'r';

SELECT count(*) FROM (SELECT oid FROM pg_class WHERE relnamespace = 'strat'::regnamespace AND relkind = 'r' AND relname <> 'identities' OFFSET 0) c
CROSS JOIN LATERAL coffer.add_table(c.oid, 't') a;
SELECT c.relname AS "table", coffer._strategy_name(r.strategy) AS strategy, c.relreplident AS ri, x.relname AS ri_index, r.key_columns, r.reason
FROM coffer.rules r JOIN pg_class c ON c.oid = r.relid
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident LEFT JOIN pg_class x ON x.oid = i.indexrelid
ORDER BY c.relname COLLATE "C";
-- Expected and chosen agree.
SELECT c.relname, coffer._strategy_name(r.strategy) FROM coffer.rules r JOIN pg_class c ON c.oid = r.relid
WHERE c.relname NOT LIKE '%\_' || replace(coffer._strategy_name(r.strategy), '_', '\_');
-- Triggers stand where the strategy is tag, and only there.
SELECT c.relname FROM coffer.rules r JOIN pg_class c ON c.oid = r.relid
WHERE (r.strategy = 1) <> (SELECT count(*) = 2 FROM pg_trigger g WHERE g.tgrelid = c.oid AND g.tgname LIKE 'zzz\_coffer\_tag\_%' AND g.tgenabled = 'A');
SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'pk_without_tenant_tag'::regclass ORDER BY tgname;

-- Planning again changes nothing.
CREATE TEMP TABLE was AS SELECT * FROM coffer.rules;
SELECT count(*) FROM coffer.rules r CROSS JOIN LATERAL coffer.add_table(r.relid, r.tenant_column) a;
SELECT r.relid::regclass FROM coffer.rules r JOIN was w USING (relid) WHERE to_jsonb(r) - 'registered_at' <> to_jsonb(w) - 'registered_at';

-- Nothing is left behind, and the replica identity is as it was.
SELECT count(*) FROM (SELECT relid FROM coffer.rules OFFSET 0) r CROSS JOIN LATERAL coffer.remove_table(r.relid) a;
SELECT c.relname, c.relreplident, o.relreplident FROM pg_class c JOIN identities o ON o.relid = c.oid
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident
WHERE (c.relreplident, i.indexrelid) IS DISTINCT FROM (o.relreplident, o.indexrelid);
SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%coffer%';
SELECT count(*) FROM coffer.rule_relations;
DROP PUBLICATION pub;
DROP SCHEMA strat CASCADE;
