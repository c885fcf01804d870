-- What a session says of itself, coffer.tenant, and a row denies: told once per transaction and table.
SET client_min_messages = warning;
CREATE SCHEMA cl;
SET search_path = cl;
CREATE TABLE orgs (id int PRIMARY KEY, tenant text, body text);
CREATE TABLE notes (id int PRIMARY KEY, org int REFERENCES orgs ON DELETE CASCADE, body text);
CREATE TABLE lines (id int PRIMARY KEY, note int REFERENCES notes ON DELETE CASCADE);
CREATE TABLE told (id int PRIMARY KEY, body text);
CREATE TABLE keyed (tenant text, id int, body text, PRIMARY KEY (tenant, id));
SELECT strategy FROM coffer.add_table('orgs', 'tenant');
SELECT strategy FROM coffer.add_table('notes', parent => 'orgs');
SELECT strategy FROM coffer.add_table('lines', parent => 'notes');
SELECT strategy FROM coffer.add_table('told');
SELECT strategy FROM coffer.add_table('keyed', 'tenant');
SELECT count(*) FROM pg_create_logical_replication_slot('regress_claims', 'pg_coffer');
-- The tables of the markers since the last look, one line per transaction.
CREATE FUNCTION said() RETURNS SETOF text LANGUAGE sql AS $$
    SELECT string_agg(((d ->> 'payload')::json ->> 'relid')::oid::regclass::text, ' ' ORDER BY n)
    FROM (SELECT n, xid, data::json AS d FROM pg_logical_slot_get_changes('regress_claims', NULL, NULL, 'format', 'json')
          WITH ORDINALITY l (lsn, xid, data, n)) l
    WHERE d ->> 'op' = 'marker' AND d ->> 'kind' = 'claim' GROUP BY xid::text ORDER BY min(n) $$;

-- Nothing is said, or what is so.
INSERT INTO orgs VALUES (1, 'a'), (2, 'b'), (3, NULL), (4, 'a'), (5, 'a');
INSERT INTO notes SELECT i, 1 + i % 5 FROM generate_series(1, 20) i;
INSERT INTO lines SELECT i, i FROM generate_series(1, 20) i;
SET coffer.tenant = '';
UPDATE notes SET body = 'x';
SET coffer.tenant = 'a';
INSERT INTO told VALUES (1), (2), (3);
UPDATE notes SET body = 'y' WHERE org IN (1, 4);
DELETE FROM orgs WHERE id = 5;
-- Rows of nobody's deny nothing.
UPDATE notes SET body = 'z' WHERE org = 3;
UPDATE orgs SET tenant = 'a' WHERE id = 3;
UPDATE orgs SET tenant = NULL WHERE id = 3;
SELECT * FROM said();

-- Each kind of change, of many rows.
UPDATE notes SET body = 'of b' WHERE org IN (1, 2);
INSERT INTO notes SELECT i, 2 FROM generate_series(101, 103) i;
DELETE FROM notes WHERE id > 100;
UPDATE notes SET org = 2 WHERE org = 4;
UPDATE notes SET org = 4 WHERE org = 2;
DELETE FROM orgs WHERE id = 2;
SET coffer.tenant = 'b';
UPDATE told SET body = 'by b';
DELETE FROM told;
-- Of tables that need no trigger, and of changes that need none, nothing is said.
INSERT INTO keyed VALUES ('a', 1);
UPDATE keyed SET body = 'x';
UPDATE orgs SET body = 'x';
SELECT * FROM said();
-- What moves below is no word of the session's: only the parent is.
UPDATE orgs SET tenant = 'c' WHERE id = 4;
SELECT * FROM said();

-- The setting within a transaction, and savepoints.
SET coffer.tenant = 'a';
BEGIN;
UPDATE notes SET body = '1' WHERE org = 1;
SET LOCAL coffer.tenant = 'b';
UPDATE notes SET body = '2' WHERE org = 1;
UPDATE lines SET id = id + 100;
COMMIT;
UPDATE notes SET body = '3' WHERE org = 1;
BEGIN;
SAVEPOINT s;
SET LOCAL coffer.tenant = 'b';
ROLLBACK TO s;
UPDATE notes SET body = '4' WHERE org = 1;
COMMIT;
SELECT * FROM said();
SET coffer.tenant = 'b';
BEGIN;
SAVEPOINT s;
UPDATE notes SET body = '5' WHERE org = 1;
ROLLBACK TO s;
UPDATE notes SET body = '6' WHERE org = 1;
SAVEPOINT s;
UPDATE notes SET body = '7' WHERE org = 1;
UPDATE lines SET id = id + 100;
RELEASE s;
UPDATE lines SET id = id + 100;
COMMIT;
SELECT * FROM said();
BEGIN;
UPDATE notes SET body = '8' WHERE org = 1;
ROLLBACK;
UPDATE notes SET body = '9' WHERE org = 1;
SELECT * FROM said();
-- In the middle of a statement.
RESET coffer.tenant;
UPDATE notes SET body = set_config('coffer.tenant', 'a', false) WHERE org = 1;
UPDATE notes SET body = set_config('coffer.tenant', 'b', false) WHERE org = 1;
RESET coffer.tenant;
-- A setting that was there before the library.
\c
SET search_path = cl;
SET client_min_messages = warning;
SET coffer.tenant = 'b';
BEGIN;
SET LOCAL coffer.tenant = 'a';
UPDATE notes SET body = '10' WHERE org = 1;
COMMIT;
SHOW coffer.tenant;
UPDATE notes SET body = '11' WHERE org = 1;
RESET coffer.tenant;
UPDATE notes SET body = '12' WHERE org = 1;
SELECT * FROM said();

-- Where nobody sets it, it is not there: neither before the library is loaded nor after, nor in between.
\c
SET search_path = cl;
CREATE TABLE asked (id int PRIMARY KEY, org int REFERENCES orgs, said text DEFAULT current_setting('coffer.tenant', true));
INSERT INTO asked (id, org) VALUES (0, 1);
SELECT strategy FROM coffer.add_table('asked', parent => 'orgs');
\c
SET search_path = cl;
INSERT INTO asked (id, org) VALUES (1, 1), (2, 1), (3, 4);
UPDATE asked SET org = 1, said = 'changed' WHERE current_setting('coffer.tenant', true) IS NULL;
SELECT id, said, current_setting('coffer.tenant', true) IS NULL AS unset FROM asked ORDER BY id;
SELECT count(*) FROM said();

SELECT count(*) FROM pg_drop_replication_slot('regress_claims');
DROP SCHEMA cl CASCADE;
