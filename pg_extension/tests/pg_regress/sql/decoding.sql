-- The rules at work: whose row is each change in the log? Through the plugin's output for people.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA dec;
SET search_path = dec;
CREATE FUNCTION changes() RETURNS TABLE (op text, tenant text, tenant_kind text, relation text, key jsonb, old jsonb, new jsonb)
LANGUAGE sql AS $$
    SELECT d ->> 'op', d ->> 'tenant', d ->> 'tenant_kind', d ->> 'relation', d -> 'key', d -> 'old', d -> 'new'
    FROM (SELECT data::jsonb AS d FROM pg_logical_slot_get_changes('regress_dec', NULL, NULL, 'format', 'json')) c
    WHERE d ->> 'op' <> 'marker'
$$;
CREATE FUNCTION markers() RETURNS TABLE (kind text, payload text)
LANGUAGE sql AS $$
    SELECT d ->> 'kind', regexp_replace(d ->> 'payload', '\m\d+\M', 'N', 'g')
    FROM (SELECT data::jsonb AS d FROM pg_logical_slot_get_changes('regress_dec', NULL, NULL, 'format', 'json')) c
    WHERE d ->> 'op' = 'marker'
$$;
CREATE TABLE by_identity (t int NOT NULL, id int, x text, PRIMARY KEY (t, id));
CREATE TABLE by_index (t int NOT NULL, id int PRIMARY KEY, x text, UNIQUE (t, id));
CREATE TABLE by_tag (t text, id int PRIMARY KEY, x text);
CREATE TABLE by_row (t int, x text);
CREATE TABLE by_tree (t int, id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE leaf_1 PARTITION OF by_tree FOR VALUES FROM (0) TO (10);
CREATE TABLE leaf_2 PARTITION OF by_tree FOR VALUES FROM (10) TO (20);
CREATE TABLE shared (id int PRIMARY KEY, x text);
CREATE TABLE excluded (t int, id int PRIMARY KEY);
CREATE TABLE unknown (t int, id int PRIMARY KEY);
CREATE SCHEMA dec_acme CREATE TABLE own (id int PRIMARY KEY, x text) CREATE TABLE own_keyless (x text);
SELECT relation, strategy FROM (VALUES ('by_identity'), ('by_index'), ('by_tag'), ('by_row'), ('by_tree')) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, 't');
SELECT relation, strategy FROM coffer.add_shared('shared');
SELECT relation, strategy FROM coffer.exclude('excluded', 'for the test');
SELECT relation, strategy FROM coffer.add_schema('dec_acme', 'Acme');
SELECT count(*) FROM pg_create_logical_replication_slot('regress_dec', 'pg_coffer');

-- identity
INSERT INTO by_identity VALUES (1, 1, 'a'), (2, 1, 'b');
UPDATE by_identity SET x = 'c';
UPDATE by_identity SET t = 3 WHERE t = 2;
DELETE FROM by_identity;
SELECT * FROM changes();
INSERT INTO by_index VALUES (1, 1, 'a'), (2, 2, 'b');
UPDATE by_index SET x = 'c' WHERE t = 1;
UPDATE by_index SET t = 3 WHERE t = 2;
DELETE FROM by_index;
SELECT * FROM changes();
-- tag
INSERT INTO by_tag VALUES ('a', 1, 'x'), ('b', 2, 'y'), (NULL, 3, 'z');
UPDATE by_tag SET x = 'n' WHERE id = 1;
UPDATE by_tag SET id = 7 WHERE id = 1;
UPDATE by_tag SET t = 'c' WHERE id = 2;
UPDATE by_tag SET t = 'd' WHERE id = 3;
UPDATE by_tag SET t = NULL WHERE id = 7;
DELETE FROM by_tag;
SELECT * FROM changes();
-- An application's trigger that moves the row, or keeps it, after all.
CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.t := NEW.x; RETURN NEW; END';
CREATE TRIGGER meddle BEFORE UPDATE ON by_tag FOR EACH ROW EXECUTE FUNCTION meddle();
INSERT INTO by_tag VALUES ('a', 1, 'a'), ('b', 2, 'b');
UPDATE by_tag SET x = 'q' WHERE id = 1;
UPDATE by_tag SET t = 'q' WHERE id = 2;
DROP TRIGGER meddle ON by_tag;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER refuse BEFORE DELETE ON by_tag FOR EACH ROW WHEN (OLD.id = 1) EXECUTE FUNCTION refuse();
DELETE FROM by_tag;
DROP TRIGGER refuse ON by_tag;
DELETE FROM by_tag;
SELECT * FROM changes();
-- Savepoints, conflicts, MERGE, cascades, a session that replicates.
BEGIN;
INSERT INTO by_tag VALUES ('a', 1, 'x'), ('b', 2, 'y');
SAVEPOINT s;
DELETE FROM by_tag WHERE id = 1;
ROLLBACK TO s;
DELETE FROM by_tag WHERE id = 2;
INSERT INTO by_tag VALUES ('c', 1, 'x') ON CONFLICT (id) DO NOTHING;
INSERT INTO by_tag VALUES ('c', 1, 'x') ON CONFLICT (id) DO UPDATE SET t = excluded.t;
MERGE INTO by_tag USING (VALUES ('m', 1), ('n', 9)) v (t, id) ON by_tag.id = v.id
    WHEN MATCHED THEN UPDATE SET t = v.t WHEN NOT MATCHED THEN INSERT VALUES (v.t, v.id, 'new');
MERGE INTO by_tag USING (VALUES (9)) v (id) ON by_tag.id = v.id WHEN MATCHED THEN DELETE;
COMMIT;
CREATE TABLE child (t text, id int PRIMARY KEY, parent int REFERENCES by_tag ON DELETE CASCADE);
SELECT strategy FROM coffer.add_table('child', 't');
INSERT INTO child VALUES ('other', 1, 1);
SET session_replication_role = replica;
UPDATE by_tag SET t = 'r';
RESET session_replication_role;
DELETE FROM by_tag;
SELECT * FROM changes();
-- full_row: rows are alike
INSERT INTO by_row VALUES (1, 'x'), (1, 'x'), (2, 'y');
UPDATE by_row SET x = 'z' WHERE t = 2;
UPDATE by_row SET t = 3 WHERE t = 2;
DELETE FROM by_row WHERE t = 1;
SELECT * FROM changes();
-- partitions: from leaf to leaf, from tenant to tenant
INSERT INTO by_tree VALUES (1, 1), (2, 2);
UPDATE by_tree SET id = 11 WHERE id = 1;
UPDATE by_tree SET t = 5 WHERE id = 2;
UPDATE by_tree SET t = 6, id = 12 WHERE id = 2;
DELETE FROM by_tree;
SELECT * FROM changes();
-- shared, by schema, excluded, unknown
INSERT INTO shared VALUES (1, 'x');
DELETE FROM shared;
INSERT INTO dec_acme.own VALUES (1, 'x');
UPDATE dec_acme.own SET x = 'y';
DELETE FROM dec_acme.own;
INSERT INTO dec_acme.own_keyless VALUES ('x');
DELETE FROM dec_acme.own_keyless;
INSERT INTO excluded VALUES (1, 1);
DELETE FROM excluded;
INSERT INTO unknown VALUES (1, 1);
DELETE FROM unknown;
SELECT * FROM changes();

-- A rule is in force from where it stands in the log, even inside a transaction.
BEGIN;
INSERT INTO unknown VALUES (1, 1);
SELECT strategy FROM coffer.add_table('unknown', 't');
INSERT INTO unknown VALUES (2, 2);
SELECT strategy FROM coffer.remove_table('unknown');
INSERT INTO unknown VALUES (3, 3);
COMMIT;
SELECT strategy FROM coffer.add_table('unknown', 't');
DELETE FROM unknown WHERE id = 3;
ALTER TABLE unknown RENAME t TO mandant;
DELETE FROM unknown WHERE id = 2;
ALTER TABLE unknown DROP CONSTRAINT unknown_pkey;
DELETE FROM unknown;
SELECT * FROM changes();

-- What a hand that bypasses the guards does is seen, and not lost in silence.
ALTER EVENT TRIGGER coffer_ddl DISABLE;
ALTER TABLE by_tag DISABLE TRIGGER USER;
INSERT INTO by_tag VALUES ('a', 1, 'x');
DELETE FROM by_tag;
ALTER EVENT TRIGGER coffer_ddl ENABLE ALWAYS;
SELECT strategy FROM coffer.add_table('by_tag', 't');
SELECT * FROM changes();

-- Markers.
SELECT coffer.restore_point('a point') IS NOT NULL AS named;
SELECT strategy FROM coffer.add_table('by_identity', 't', class => 'config');
SELECT strategy FROM coffer.remove_table('by_identity');
SELECT strategy FROM coffer.exclude('by_identity', 'x');
SELECT coffer._agent_base_marker('\x00112233445566778899aabbccddeeff');
ALTER TABLE by_index ADD COLUMN y float8 DEFAULT random();
CREATE INDEX ON by_index (x);
SELECT coffer._agent_fence('by_index', 't', '1'), coffer._agent_unfence('by_index');
DROP TABLE leaf_2;
DROP TABLE by_tree;
BEGIN;
SELECT coffer.restore_point('rolled back') IS NOT NULL AS named;
ROLLBACK;
SELECT * FROM markers();
-- Nobody else's message passes for one of ours.
SELECT pg_logical_emit_message(true, 'pg_coffer', '\x02'::bytea || repeat('x', 40)::bytea) IS NOT NULL AS sent;
SELECT * FROM markers();

-- What of a covered table goes, or is called otherwise, without a word of it makes its archived definition old; what goes elsewhere does not.
SET client_min_messages = error;
CREATE SCHEMA dec_other;
CREATE SCHEMA dec_near;
CREATE TABLE dec_other.t (id int PRIMARY KEY, v text);
CREATE DOMAIN dec_near.positive AS int CONSTRAINT above CHECK (VALUE > 0);
CREATE TABLE dec_near.t (tenant int, id int, v text, n dec_near.positive, PRIMARY KEY (tenant, id));
SELECT strategy FROM coffer.add_table('dec_near.t', 'tenant');
CREATE FUNCTION dec_other.f(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT $1';
CREATE INDEX on_f ON dec_near.t (dec_other.f(v));
CREATE INDEX on_v ON dec_near.t (v);
CREATE INDEX on_v ON dec_other.t (v);
CREATE STATISTICS dec_other.stats ON tenant, v FROM dec_near.t;
SELECT count(*) > 0 AS heard FROM markers();
DROP INDEX dec_other.on_v;
SELECT kind, substring(payload FROM '"tag" : "([^"]*)"') AS tag FROM markers() WHERE kind IN ('ddl', 'definitions');
DROP INDEX dec_near.on_v;
SELECT kind, substring(payload FROM '"tag" : "([^"]*)"') AS tag FROM markers() WHERE kind IN ('ddl', 'definitions');
DROP FUNCTION dec_other.f CASCADE;
SELECT kind, substring(payload FROM '"tag" : "([^"]*)"') AS tag FROM markers() WHERE kind IN ('ddl', 'definitions');
DROP STATISTICS dec_other.stats;
SELECT kind, substring(payload FROM '"tag" : "([^"]*)"') AS tag FROM markers() WHERE kind IN ('ddl', 'definitions');
ALTER DOMAIN dec_near.positive RENAME CONSTRAINT above TO over;
SELECT kind, substring(payload FROM '"tag" : "([^"]*)"') AS tag FROM markers() WHERE kind IN ('ddl', 'definitions');
DROP SCHEMA dec_other, dec_near CASCADE;
SELECT pg_drop_replication_slot('regress_dec');
DROP SCHEMA dec, dec_acme CASCADE;
SELECT count(*) FROM coffer.rules;
