-- What is rare: values that the log does not carry, identities that got lost, rules that change on the way, messages
-- that are not ours.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA edge;
SET search_path = edge;
CREATE FUNCTION seen(VARIADIC options text[] DEFAULT '{}') RETURNS TABLE (op text, tenant text, kind text, relation text, key json, old json, new text, more text)
LANGUAGE sql AS $$
    SELECT d ->> 'op', d ->> 'tenant', d ->> 'tenant_kind', d ->> 'relation', d -> 'key', d -> 'old', regexp_replace(d ->> 'new', '(.)\1{50,}', '\1...', 'g'),
           coalesce(d ->> 'reason', 'unchanged ' || (d ->> 'unchanged'), (d ->> 'kind') || ' ' || regexp_replace(d ->> 'payload', '\d{4,}', 'N', 'g'), d ->> 'relations')
    FROM (SELECT data::json AS d FROM pg_logical_slot_get_changes('regress_edge', NULL, NULL, VARIADIC ARRAY['format', 'json'] || options)) c
$$;
CREATE TABLE by_identity (t int, id int, big text, x text, PRIMARY KEY (t, id));
CREATE TABLE by_tag (id int PRIMARY KEY, t text, big text, x text);
CREATE TABLE by_row (t int, big text, x text);
ALTER TABLE by_identity ALTER big SET STORAGE EXTERNAL;
ALTER TABLE by_tag ALTER big SET STORAGE EXTERNAL;
ALTER TABLE by_row ALTER big SET STORAGE EXTERNAL;
CREATE TABLE by_setting (f float8, n numeric, at timestamptz, long interval, t text, x text, PRIMARY KEY (f, n, at, long));
CREATE TABLE settled (id int PRIMARY KEY, t text);
SELECT relation, strategy FROM unnest(ARRAY['by_identity', 'by_tag', 'by_row', 'by_setting']) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, 't');
SELECT count(*) FROM pg_create_logical_replication_slot('regress_edge', 'pg_coffer');

-- TOASTed values that did not change are told apart from NULL; a row that moves takes them along.
INSERT INTO by_identity VALUES (1, 1, repeat('b', 10000), 'a');
UPDATE by_identity SET x = 'b';
UPDATE by_identity SET id = 2;
INSERT INTO by_tag VALUES (1, 'a', repeat('b', 10000), 'a');
UPDATE by_tag SET x = 'b';
UPDATE by_tag SET t = 'b';
INSERT INTO by_row VALUES (1, repeat('b', 10000), 'a');
UPDATE by_row SET x = 'b';
UPDATE by_row SET t = 2;
DELETE FROM by_row;
SELECT op, tenant, relation, key, regexp_replace(old::text, '(.)\1{50,}', '\1...', 'g') AS old, new, more FROM seen();

-- In a table whose key tells the tenant they follow in messages, the newest version's.
CREATE TRIGGER aaa_fill AFTER UPDATE ON by_identity FOR EACH ROW WHEN (OLD.t IS DISTINCT FROM NEW.t) EXECUTE FUNCTION coffer._fill('t');
CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE by_identity SET x = 'again', big = CASE id WHEN 4 THEN 'new' ELSE big END WHERE t = NEW.t AND id > 2 AND x <> 'again';
    RETURN NULL;
END $$;
UPDATE by_identity SET t = 2;
INSERT INTO by_identity SELECT 2, id, repeat('c', 10000), 'c' FROM generate_series(3, 4) id;
CREATE TRIGGER again AFTER UPDATE ON by_identity FOR EACH ROW WHEN (OLD.x = NEW.x) EXECUTE FUNCTION again();
UPDATE by_identity SET t = 5;
DROP TRIGGER again ON by_identity;
SELECT op, tenant, key, new, more FROM seen() WHERE op <> 'marker';

-- Keys whose text depends on the session's settings.
SET extra_float_digits = -3;
SET timezone = 'Asia/Tokyo';
SET intervalstyle = 'iso_8601';
INSERT INTO by_setting VALUES (1 / 3.0, 1.10, '2024-01-01 00:00:00+00', '1 day 2 hours', 'a', 'x');
UPDATE by_setting SET t = 'b';
UPDATE by_setting SET f = f + 1;
DELETE FROM by_setting;
RESET ALL;
SET client_min_messages = warning;
SET search_path = edge;
SELECT op, tenant, key, old FROM seen();

-- A value that its type's output function refuses does not stop the others.
CREATE TYPE broken AS ENUM ('a', 'b');
CREATE TABLE by_type (t int, id int, e broken, x text, PRIMARY KEY (t, id));
SELECT strategy FROM coffer.add_table('by_type', 't');
INSERT INTO by_type VALUES (1, 1, 'a'), (1, 2, 'b');
DELETE FROM pg_enum WHERE enumtypid = 'broken'::regtype AND enumlabel = 'b';
UPDATE by_type SET x = 'c';
SELECT op, tenant, kind, key, new, regexp_replace(more, '\d{4,}', 'N') AS more FROM seen() WHERE op <> 'marker';
DROP TABLE by_type;

-- Messages of others, and messages that pretend to be ours.
SELECT count(pg_logical_emit_message(true, 'other', 'x'));
SELECT count(pg_logical_emit_message(true, 'pg_coffer', 'garbage'));
SELECT count(pg_logical_emit_message(false, 'pg_coffer', 'garbage'));
INSERT INTO by_tag VALUES (5, 'mine', NULL, 'x');
BEGIN;
SELECT count(pg_logical_emit_message(true, 'pg_coffer', '\x0100000000030100000035000400000065766c6cff00000000000000000000000000000000'::bytea));
DELETE FROM by_tag WHERE id = 5;
COMMIT;
SELECT op, tenant, kind, key, more FROM seen() WHERE op <> 'marker';

-- Without the trigger (and past the guard that puts it back) a deletion cannot be attributed. The next one can.
INSERT INTO by_tag VALUES (6, 'a', NULL, 'x'), (7, 'b', NULL, 'x');
UPDATE pg_trigger SET tgenabled = 'D' WHERE tgrelid = 'by_tag'::regclass AND tgname = 'zzz_coffer_tag_delete';
SELECT coffer._invalidate('by_tag'::regclass);
DELETE FROM by_tag WHERE id = 6;
UPDATE pg_trigger SET tgenabled = 'A' WHERE tgrelid = 'by_tag'::regclass AND tgname = 'zzz_coffer_tag_delete';
SELECT coffer._invalidate('by_tag'::regclass);
DELETE FROM by_tag WHERE id = 7;
SELECT op, tenant, kind, key, more FROM seen() WHERE op <> 'marker';

-- A rule is in force from its place in the transaction on.
INSERT INTO settled VALUES (1, 'a');
BEGIN;
INSERT INTO settled VALUES (2, 'a');
SELECT strategy FROM coffer.add_table('settled', 't');
INSERT INTO settled VALUES (3, 'a');
SELECT coffer.remove_table('settled');
INSERT INTO settled VALUES (4, 'a');
COMMIT;
SELECT op, tenant, key FROM seen() WHERE op <> 'marker';

-- Columns that come and go.
INSERT INTO by_tag VALUES (8, 'a', 'b', 'x');
BEGIN;
ALTER TABLE by_tag ADD COLUMN later int DEFAULT 42;
UPDATE by_tag SET x = 'y' WHERE id = 8;
ALTER TABLE by_tag DROP COLUMN x;
ALTER TABLE by_tag RENAME COLUMN big TO large;
UPDATE by_tag SET large = 'c' WHERE id = 8;
COMMIT;
SELECT op, tenant, key, new FROM seen() WHERE op <> 'marker';

-- Rewriting a table says so; what only moves it does not; TRUNCATE is one for all.
ALTER TABLE by_identity ADD COLUMN u uuid DEFAULT gen_random_uuid();
SELECT DISTINCT op, more FROM seen() WHERE op <> 'marker' OR more LIKE 'rewrite%';
VACUUM FULL by_identity;
CLUSTER by_identity USING by_identity_pkey;
CREATE TABLE copied AS SELECT * FROM by_identity;
CREATE MATERIALIZED VIEW viewed AS SELECT * FROM by_identity;
SELECT op, more FROM seen() WHERE op <> 'marker';
TRUNCATE by_identity, by_row, copied;
SELECT op, tenant, more FROM seen() WHERE op <> 'marker';

-- Options: one tenant, some classes, and clear errors.
SELECT strategy FROM coffer.add_table('settled', 't', class => 'audit');
INSERT INTO by_row VALUES (1, NULL, 'x'), (2, NULL, 'y');
INSERT INTO settled VALUES (5, '1'), (6, '2');
SELECT d ->> 'relation' AS relation, d -> 'new' AS new FROM (SELECT data::json AS d FROM pg_logical_slot_peek_changes('regress_edge', NULL, NULL, 'format', 'json', 'tenant', '2')) c;
SELECT d ->> 'relation' AS relation, d -> 'new' AS new FROM (SELECT data::json AS d FROM pg_logical_slot_peek_changes('regress_edge', NULL, NULL, 'format', 'json', 'classes', 'audit,config')) c
WHERE d ->> 'op' <> 'marker';
SELECT relation, new FROM seen() WHERE op <> 'marker';
SELECT * FROM pg_logical_slot_peek_changes('regress_edge', NULL, NULL, 'format', 'xml');
SELECT * FROM pg_logical_slot_peek_changes('regress_edge', NULL, NULL, 'format', 'json', 'classes', 'data,secrets');
SELECT * FROM pg_logical_slot_peek_changes('regress_edge', NULL, NULL, 'format', 'json', 'tenants', '2');
SELECT * FROM pg_logical_slot_peek_changes('regress_edge', NULL, NULL);
-- Without anything of interest there is not even a beginning; frames begin with HELLO (1) and BEGIN (2).
CREATE TABLE uncovered (id int);
INSERT INTO uncovered VALUES (1);
SELECT count(*) FROM pg_logical_slot_peek_binary_changes('regress_edge', NULL, NULL) WHERE get_byte(data, 0) NOT IN (1, 2);
INSERT INTO by_row VALUES (3, NULL, 'z');
SELECT get_byte(data, 0) FROM pg_logical_slot_get_binary_changes('regress_edge', NULL, NULL) ORDER BY lsn DESC LIMIT 1;
-- An inheritance child is a table of its own: its changes are not its parent's.
CREATE TABLE heir () INHERITS (by_tag);
SELECT strategy FROM coffer.add_table('heir', 't');
INSERT INTO heir (id, t) VALUES (9, 'h');
UPDATE by_tag SET t = 'i' WHERE id = 9;
DELETE FROM by_tag WHERE id = 9;
SELECT op, tenant, relation FROM seen() WHERE op <> 'marker' AND relation LIKE '%heir';
SELECT coffer._tag();
SELECT pg_drop_replication_slot('regress_edge');
DROP SCHEMA edge CASCADE;
