-- Tenants behind foreign keys, and tenants that only the session knows. An archive is kept from the plugin's output alone,
-- tenant by tenant, and compared with the live rows after every step: each change has to land with its tenant, once.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA pa;
SET search_path = pa;

CREATE UNLOGGED TABLE archive (n bigserial, relation text, tenant text, key jsonb, r jsonb);
CREATE UNLOGGED TABLE complaints (what text);
CREATE FUNCTION take_in(slot name) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    d    jsonb;
    hit  bigint;
    n    int := 0;
BEGIN
    FOR d IN SELECT data::jsonb FROM pg_logical_slot_get_changes(slot, NULL, NULL, 'format', 'json') LOOP
        CONTINUE WHEN d ->> 'op' = 'marker';
        n := n + 1;
        IF d ->> 'op' = 'truncate' THEN
            DELETE FROM archive a WHERE d -> 'relations' ? a.relation;
            CONTINUE;
        END IF;
        IF d ->> 'op' NOT IN ('insert', 'update', 'delete') OR d ->> 'tenant_kind' NOT IN ('normal', 'unassigned') THEN
            INSERT INTO complaints VALUES (format('unresolved: %s', d));
            CONTINUE;
        END IF;
        hit := NULL;
        IF d ->> 'op' <> 'insert' THEN
            SELECT a.n INTO hit FROM archive a
            WHERE a.relation = d ->> 'relation' AND a.tenant IS NOT DISTINCT FROM d ->> 'tenant'
              AND CASE WHEN d ? 'key' THEN a.key = coalesce(d -> 'old', d -> 'key') ELSE a.r = d -> 'old' END LIMIT 1;
            IF hit IS NULL THEN
                INSERT INTO complaints VALUES (format('no such row: %s', d - 'lsn' - 'xid' - 'commit_time'));
                CONTINUE;
            END IF;
        ELSIF d ? 'key' AND EXISTS (SELECT FROM archive a WHERE a.relation = d ->> 'relation' AND a.key = d -> 'key') THEN
            INSERT INTO complaints VALUES (format('twice: %s', d - 'lsn' - 'xid' - 'commit_time'));
        END IF;
        CASE d ->> 'op'
            WHEN 'insert' THEN INSERT INTO archive (relation, tenant, key, r) VALUES (d ->> 'relation', d ->> 'tenant', d -> 'key', d -> 'new');
            WHEN 'update' THEN UPDATE archive a SET key = d -> 'key', r = a.r || (d -> 'new') WHERE a.n = hit;
            WHEN 'delete' THEN DELETE FROM archive a WHERE a.n = hit;
        END CASE;
    END LOOP;
    RETURN n;
END $$;
-- Rows of the archive that are not live, and live rows that are not in the archive.
CREATE FUNCTION differences() RETURNS TABLE (side text, relation text, tenant text, r jsonb) LANGUAGE plpgsql AS $$
DECLARE
    t  record;
    n  int := take_in('regress_path');
BEGIN
    RETURN QUERY SELECT 'complaint', NULL::text, NULL::text, to_jsonb(c.what) FROM complaints c;
    DELETE FROM complaints;
    FOR t IN SELECT c.oid::regclass AS rel, format('%I.%I', 'pa', c.relname) AS name FROM coffer.rules u JOIN pg_class c ON c.oid = u.relid
             WHERE c.relnamespace = 'pa'::regnamespace LOOP
        RETURN QUERY EXECUTE format(
            'WITH live AS (SELECT %s AS tenant, to_jsonb(t.*) AS r FROM %s t), kept AS (SELECT a.tenant, a.r FROM archive a WHERE a.relation = %L)
             SELECT ''live only'', %3$L, l.* FROM (SELECT * FROM live EXCEPT ALL SELECT * FROM kept) l
             UNION ALL SELECT ''archive only'', %3$L, k.* FROM (SELECT * FROM kept EXCEPT ALL SELECT * FROM live) k',
            coffer._tenant_expression(t.rel, 't'), coffer._from(t.rel), t.name);
    END LOOP;
END $$;

CREATE TABLE orgs (tenant text, id int PRIMARY KEY, code text UNIQUE NOT NULL);
CREATE TABLE projects (id bigint PRIMARY KEY, org int NOT NULL REFERENCES orgs ON DELETE CASCADE ON UPDATE CASCADE, body text, at date DEFAULT '2026-01-01');
CREATE TABLE tasks (project bigint REFERENCES projects ON DELETE CASCADE ON UPDATE CASCADE, n int, body text, PRIMARY KEY (project, n));
CREATE TABLE notes (id int PRIMARY KEY, project bigint, n int, body text, FOREIGN KEY (project, n) REFERENCES tasks ON DELETE SET NULL ON UPDATE CASCADE);
CREATE TABLE tags (code text REFERENCES orgs (code) ON UPDATE CASCADE ON DELETE CASCADE, word text);
CREATE TABLE late (id int PRIMARY KEY, org int REFERENCES orgs DEFERRABLE INITIALLY DEFERRED, body text);
CREATE TABLE below_late (id int PRIMARY KEY, late int REFERENCES late DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE regions (tenant text, id int, PRIMARY KEY (tenant, id)) PARTITION BY LIST (tenant);
CREATE TABLE regions_a PARTITION OF regions FOR VALUES IN ('a');
CREATE TABLE regions_rest PARTITION OF regions DEFAULT;
CREATE TABLE shops (tenant text, id int NOT NULL, UNIQUE (tenant, id)) PARTITION BY LIST (tenant);
CREATE TABLE trees (id int PRIMARY KEY, up int REFERENCES trees, org int NOT NULL REFERENCES orgs ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE parted (id int, org int NOT NULL REFERENCES orgs ON DELETE CASCADE ON UPDATE CASCADE, body text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (100);
CREATE TABLE parted_2 (body text, org int NOT NULL, id int NOT NULL);
ALTER TABLE parted ATTACH PARTITION parted_2 FOR VALUES FROM (100) TO (200);
CREATE TABLE two_ways (id int PRIMARY KEY, project bigint REFERENCES projects, org int NOT NULL REFERENCES orgs);
CREATE TABLE wallets (owner numeric PRIMARY KEY, tenant text);
CREATE TABLE coins (id int PRIMARY KEY, owner numeric REFERENCES wallets);
CREATE TABLE seen (id int PRIMARY KEY, body text);

-- What is proposed, what is done, what cannot be.
SELECT relation, action, strategy, reason FROM coffer.discover('tenant') WHERE relation::text !~ '\.' AND relation::text NOT IN ('archive', 'complaints');
SELECT relation, action, strategy, reason, applied FROM coffer.discover('tenant', apply => true) WHERE relation::text !~ '\.' AND strategy = 'path';
DELETE FROM coffer.settings WHERE name = 'auto_tenant_column';
SELECT * FROM coffer.add_table('coins', parent => 'wallets');
SELECT * FROM coffer.add_table('coins', parent => 'orgs');
SELECT * FROM coffer.add_table('coins', 'owner', parent => 'wallets');
SELECT * FROM coffer.add_table('trees', parent => 'trees');
SELECT * FROM coffer.remove_table('orgs');
SELECT relation, strategy, reason FROM coffer.add_table('seen');
SELECT regexp_replace(coffer._tenant_expression('notes'::regclass, 't'), '_[0-9]+', '_N', 'g');
SELECT tgrelid::regclass, regexp_replace(tgname, '_[0-9]+$', '') AS tgname, tgenabled FROM pg_trigger WHERE tgname ~* 'coffer' AND tgrelid::regclass::text !~ '\.' ORDER BY tgrelid::regclass::text COLLATE "C", 2;
SELECT count(*) FROM pg_create_logical_replication_slot('regress_path', 'pg_coffer');

-- Rows at every depth.
INSERT INTO orgs SELECT v.t, v.i, 'code' || v.i FROM (VALUES ('a', 1), ('b', 2), ('c', 3), (NULL, 4)) v (t, i);
INSERT INTO projects SELECT 10 * o.id + i, o.id, repeat(md5(random()::text), 200) FROM orgs o, generate_series(1, 2) i;
INSERT INTO tasks SELECT p.id, i, 'task' FROM projects p, generate_series(1, 2) i;
INSERT INTO notes SELECT row_number() OVER (), t.project, t.n, 'note' FROM tasks t;
INSERT INTO notes VALUES (1000, NULL, 1), (1001, 11, NULL);
INSERT INTO tags SELECT o.code, w FROM orgs o, unnest(ARRAY['x', 'x', 'y']) w;
INSERT INTO trees VALUES (1, NULL, 1), (2, 1, 1), (3, 1, 2);
INSERT INTO parted SELECT i * 30, 1 + i % 3, 'p' FROM generate_series(0, 6) i;
SELECT * FROM differences();
SELECT relation, coalesce(tenant, '-') AS tenant, count(*) FROM archive GROUP BY 1, 2 ORDER BY 1, 2;
UPDATE projects SET body = 'short' WHERE id = 11;
UPDATE tasks SET body = body || '!' WHERE n = 1;
UPDATE notes SET body = NULL WHERE id % 2 = 0;
UPDATE tags SET word = 'z' WHERE word = 'x';
UPDATE parted SET body = 'q';
UPDATE parted SET id = 155 WHERE id = 30;
DELETE FROM notes WHERE id = 1;
SELECT * FROM differences();
-- Two ways, which name two tenants: the one that was chosen counts, wherever the other leads.
SELECT reason FROM coffer.coverage WHERE relation = 'two_ways'::regclass;
INSERT INTO two_ways VALUES (1, 11, 2), (2, 21, 1), (3, NULL, 3), (4, 41, 1);
SELECT * FROM differences();
SELECT r ->> 'id' AS id, tenant FROM archive WHERE relation = 'pa.two_ways' ORDER BY 1;
UPDATE two_ways SET org = 3 WHERE id = 1;
UPDATE two_ways SET project = 31 WHERE id = 2;
UPDATE two_ways SET project = NULL WHERE id = 4;
UPDATE orgs SET tenant = 'two' WHERE id = 3;
UPDATE orgs SET tenant = 'c' WHERE id = 3;
UPDATE projects SET org = 4 WHERE id = 31;
UPDATE projects SET org = 3 WHERE id = 31;
SELECT * FROM differences();
SELECT r ->> 'id' AS id, tenant FROM archive WHERE relation = 'pa.two_ways' ORDER BY 1;
DELETE FROM two_ways;
SELECT * FROM differences();
-- A subtree moves, with what is stored outside of its rows; from a tenant to nobody and back.
UPDATE orgs SET tenant = 'b' WHERE id = 1;
SELECT * FROM differences();
UPDATE orgs SET tenant = NULL WHERE id = 1;
UPDATE orgs SET tenant = 'z' WHERE id = 1;
SELECT * FROM differences();
UPDATE projects SET org = 3 WHERE org = 1 AND id = 11;
UPDATE tasks SET project = 21 WHERE project = 11 AND n = 1 AND false;
UPDATE notes SET project = 31, n = 1 WHERE id = 3;
UPDATE parted SET org = 2 WHERE org = 1;
SELECT * FROM differences();
-- Keys change, alone and with the tenant; two parents trade places.
UPDATE orgs SET id = 5 WHERE id = 1;
UPDATE orgs SET id = 6, tenant = 'y', code = 'other' WHERE id = 5;
SELECT * FROM differences();
BEGIN;
UPDATE orgs SET id = 16 WHERE id = 6;
UPDATE orgs SET id = 6 WHERE id = 2;
UPDATE orgs SET id = 2 WHERE id = 16;
UPDATE orgs SET tenant = 'm' WHERE id IN (2, 6);
COMMIT;
SELECT * FROM differences();
-- A shift in one statement, in an order in which the server never sees two at one place.
CREATE TABLE seats (tenant text, id int PRIMARY KEY);
CREATE TABLE guests (id int PRIMARY KEY, seat int NOT NULL REFERENCES seats ON UPDATE CASCADE);
SELECT strategy FROM coffer.add_table('seats', 'tenant');
SELECT strategy FROM coffer.add_table('guests', parent => 'seats');
INSERT INTO seats VALUES ('c', 11), ('a', 1);
INSERT INTO guests VALUES (1, 1), (2, 11);
UPDATE seats SET id = id + 10;
SELECT * FROM differences();
-- The same where the foreign key does nothing: whoever has the key then has the rows; and one that comes later, too.
CREATE TABLE haunts (tenant text, id int PRIMARY KEY);
CREATE TABLE ghosts (id int PRIMARY KEY, haunt int NOT NULL REFERENCES haunts DEFERRABLE);
SELECT strategy FROM coffer.add_table('haunts', 'tenant');
SELECT strategy FROM coffer.add_table('ghosts', parent => 'haunts');
INSERT INTO haunts VALUES ('c', 11), ('a', 1);
INSERT INTO ghosts VALUES (2, 11);
UPDATE haunts SET id = id + 10;
SELECT * FROM differences();
BEGIN;
SET CONSTRAINTS ALL DEFERRED;
UPDATE haunts SET id = 31 WHERE id = 11;
INSERT INTO haunts VALUES ('b', 11);
COMMIT;
SELECT * FROM differences();
-- A parent that goes by TRUNCATE is forgotten, for whoever comes in its place in the same transaction.
BEGIN;
DELETE FROM ghosts WHERE id = 2;
TRUNCATE haunts CASCADE;
INSERT INTO haunts VALUES ('x', 11);
INSERT INTO ghosts VALUES (3, 11);
INSERT INTO ghosts VALUES (4, 11);
COMMIT;
SELECT * FROM differences();
-- Another parent in the place of a deleted one, by the same statement: whatever the foreign key does about it.
CREATE TABLE posts (tenant text, id int PRIMARY KEY);
CREATE TABLE vacated (id int PRIMARY KEY, post int REFERENCES posts ON DELETE SET NULL);
CREATE TABLE gone (id int PRIMARY KEY, post int REFERENCES posts ON DELETE CASCADE);
CREATE TABLE below_gone (id int PRIMARY KEY, gone int REFERENCES gone ON DELETE CASCADE);
SELECT strategy FROM coffer.add_table('posts', 'tenant');
SELECT strategy FROM unnest(ARRAY['vacated', 'gone']) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, parent => 'posts');
SELECT strategy FROM coffer.add_table('below_gone', parent => 'gone');
INSERT INTO posts SELECT 'a', i FROM generate_series(1, 3) i;
INSERT INTO vacated SELECT i, i FROM generate_series(1, 3) i;
INSERT INTO gone SELECT i, i FROM generate_series(1, 3) i;
INSERT INTO below_gone SELECT i, i FROM generate_series(1, 3) i;
WITH d AS (DELETE FROM posts WHERE id = 1 RETURNING id) INSERT INTO posts SELECT 'b', id FROM d;
SELECT * FROM differences();
CREATE TABLE late_gone (id int PRIMARY KEY, gone int REFERENCES gone ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED);
SELECT strategy FROM coffer.add_table('late_gone', parent => 'gone');
INSERT INTO late_gone SELECT i, i FROM generate_series(2, 3) i;
CREATE TABLE stays (post int REFERENCES posts, x text);
SELECT strategy FROM coffer.add_table('stays', parent => 'posts');
INSERT INTO stays VALUES (2, 'x'), (2, 'x'), (3, 'y');
WITH d AS (DELETE FROM posts WHERE id = 2 RETURNING id) INSERT INTO posts SELECT 'b', id FROM d;
SELECT * FROM differences();
ALTER TABLE stays ALTER CONSTRAINT stays_post_fkey DEFERRABLE INITIALLY DEFERRED;
WITH d AS (DELETE FROM posts WHERE id = 3 RETURNING id) INSERT INTO posts SELECT 'b', id FROM d;
BEGIN;
DELETE FROM posts WHERE id = 2;
UPDATE stays SET x = 'later' WHERE post = 2;
INSERT INTO posts VALUES ('c', 2);
COMMIT;
SELECT * FROM differences();
-- One statement that puts another parent in the place of one, and rows below it: before, between and after.
CREATE TABLE pinned (post int REFERENCES posts, x text);
SELECT strategy FROM coffer.add_table('pinned', parent => 'posts');
INSERT INTO posts SELECT 'a', i FROM generate_series(10, 17) i;
INSERT INTO pinned SELECT i, 'old' FROM generate_series(10, 16) i;
WITH d AS (DELETE FROM posts WHERE id = 10 RETURNING id), i AS (INSERT INTO posts SELECT 'b', id FROM d RETURNING id)
INSERT INTO pinned SELECT id, 'after' FROM i;
WITH d AS (DELETE FROM posts WHERE id = 11 RETURNING id), c AS (INSERT INTO pinned SELECT id, 'between' FROM d RETURNING post)
INSERT INTO posts SELECT 'b', post FROM c;
WITH c AS (INSERT INTO pinned VALUES (12, 'before') RETURNING post), d AS (DELETE FROM posts USING c WHERE id = c.post RETURNING id)
INSERT INTO posts SELECT 'b', id FROM d;
WITH d AS (DELETE FROM posts WHERE id = 13 RETURNING id), i AS (INSERT INTO posts SELECT 'b', id FROM d RETURNING id)
UPDATE pinned SET x = 'changed' FROM i WHERE post = i.id;
WITH d AS (DELETE FROM posts WHERE id = 14 RETURNING id), i AS (INSERT INTO posts SELECT 'b', id FROM d RETURNING id)
DELETE FROM pinned USING i WHERE post = i.id;
WITH d AS (DELETE FROM posts WHERE id = 15 RETURNING id), i AS (INSERT INTO posts SELECT 'a', id FROM d RETURNING id)
INSERT INTO pinned SELECT id, 'of the same' FROM i;
WITH d AS (DELETE FROM posts WHERE id IN (16, 17) RETURNING id), i AS (INSERT INTO posts SELECT 'b', id FROM d RETURNING id)
INSERT INTO stays SELECT id, 'checked late' FROM i;
SELECT * FROM differences();
BEGIN;
WITH d AS (DELETE FROM posts WHERE id = 10 RETURNING id), i AS (INSERT INTO posts SELECT 'c', id FROM d RETURNING id)
INSERT INTO pinned SELECT id, 'then' FROM i;
SAVEPOINT s;
DELETE FROM posts WHERE id = 10;
ROLLBACK TO s;
INSERT INTO pinned VALUES (10, 'last');
COMMIT;
SELECT * FROM differences();
-- A table that comes below a parent whose rows this session has moved already.
CREATE TABLE memos (id int PRIMARY KEY, post int REFERENCES posts);
UPDATE posts SET tenant = 'known' WHERE id = 13;
SELECT strategy FROM coffer.add_table('memos', parent => 'posts');
INSERT INTO memos VALUES (1, 13);
UPDATE posts SET tenant = 'moved' WHERE id = 13;
SELECT * FROM differences();
-- Deleted parents: in cascade at every depth, by hand first, set to NULL.
DELETE FROM orgs WHERE id = 3;
DELETE FROM tasks WHERE project = 41;
WITH p AS (DELETE FROM projects WHERE id = 42 RETURNING id) DELETE FROM tasks USING p WHERE project = p.id;
SELECT * FROM differences();
-- Keys that change, and parents that go, behind SET NULL and SET DEFAULT: rows become nobody's, or another's.
CREATE TABLE homes (tenant text, id int PRIMARY KEY);
CREATE TABLE unset (id int PRIMARY KEY, home int REFERENCES homes ON UPDATE SET NULL ON DELETE SET DEFAULT);
CREATE TABLE fallen (id int PRIMARY KEY, home int DEFAULT 1 REFERENCES homes ON UPDATE SET DEFAULT ON DELETE SET DEFAULT, body text);
CREATE TABLE below_fallen (id int PRIMARY KEY, fallen int REFERENCES fallen ON UPDATE SET NULL);
SELECT strategy FROM coffer.add_table('homes', 'tenant');
SELECT strategy FROM unnest(ARRAY['unset', 'fallen']) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, parent => 'homes');
SELECT strategy FROM coffer.add_table('below_fallen', parent => 'fallen');
INSERT INTO homes VALUES ('fallback', 1), ('a', 2), ('b', 3), ('c', 4), ('d', 5), ('e', 6);
INSERT INTO unset SELECT i, i FROM generate_series(2, 6) i;
INSERT INTO fallen SELECT i, i, repeat(md5(random()::text), 200) FROM generate_series(2, 6) i;
INSERT INTO below_fallen SELECT i, i FROM generate_series(2, 6) i;
UPDATE homes SET id = 20 WHERE id = 2;
SELECT * FROM differences();
UPDATE homes SET id = 30, tenant = 'moved' WHERE id = 3;
DELETE FROM homes WHERE id = 4;
SELECT * FROM differences();
BEGIN;
UPDATE homes SET tenant = 'twice' WHERE id = 5;
UPDATE homes SET id = 50 WHERE id = 5;
UPDATE homes SET tenant = 'back' WHERE id = 1;
COMMIT;
WITH d AS (DELETE FROM homes WHERE id = 6 RETURNING id) INSERT INTO homes SELECT 'again', id FROM d;
SELECT * FROM differences();
SELECT relation, string_agg(concat(r ->> 'id', coalesce(tenant, '-')), ' ' ORDER BY r ->> 'id') FROM archive
WHERE relation IN ('pa.unset', 'pa.fallen', 'pa.below_fallen') GROUP BY relation ORDER BY relation;
UPDATE fallen SET id = id + 100;
SELECT * FROM differences();
-- Parent and child in one statement, either first.
WITH o AS (INSERT INTO orgs VALUES ('cte', 50, 'fifty') RETURNING id), p AS (INSERT INTO projects SELECT 500, id FROM o RETURNING id)
INSERT INTO tasks SELECT id, 1 FROM p;
WITH o AS (INSERT INTO orgs VALUES ('cte', 51, 'fiftyone')) INSERT INTO projects VALUES (510, 51);
WITH u AS (UPDATE orgs SET tenant = 'moved' WHERE id = 50) INSERT INTO projects VALUES (501, 50);
WITH u AS (UPDATE orgs SET tenant = 'again' WHERE id = 50) UPDATE projects SET body = 'b' WHERE org = 50;
WITH d AS (DELETE FROM orgs WHERE id = 51) DELETE FROM projects WHERE org = 51;
-- A parent that is nobody's, replaced in one statement by somebody's: what goes in cascade was nobody's.
INSERT INTO orgs VALUES (NULL, 52, 'fiftytwo');
INSERT INTO projects VALUES (520, 52);
WITH d AS (DELETE FROM orgs WHERE id = 52 RETURNING id) INSERT INTO orgs SELECT 'somebody', id, 'fiftytwo' FROM d;
SELECT * FROM differences();
-- Constraints that are checked late: the child first, at two depths; a parent deleted and another tenant's in its place.
BEGIN;
INSERT INTO below_late VALUES (1, 1), (2, 2);
INSERT INTO late VALUES (1, 60), (2, 61);
INSERT INTO orgs VALUES ('l', 60, 'sixty'), ('m', 61, 'sixtyone');
COMMIT;
SELECT * FROM differences();
BEGIN;
DELETE FROM orgs WHERE id = 60;
UPDATE late SET body = 'x' WHERE id = 1;
INSERT INTO orgs VALUES ('n', 60, 'sixty');
UPDATE late SET body = 'y' WHERE id = 1;
COMMIT;
SELECT * FROM differences();
BEGIN;
DELETE FROM late WHERE id = 2;
DELETE FROM below_late WHERE id = 2;
INSERT INTO below_late VALUES (3, 3);
SAVEPOINT s;
INSERT INTO late VALUES (3, 60);
UPDATE orgs SET tenant = 'gone' WHERE id = 60;
ROLLBACK TO s;
UPDATE below_late SET late = 1 WHERE id = 3;
SAVEPOINT s;
UPDATE orgs SET tenant = 'kept' WHERE id = 60;
RELEASE s;
INSERT INTO below_late VALUES (4, 1);
COMMIT;
SELECT * FROM differences();
-- Isolation, two phases, replication's role, conflicts, COPY, MERGE.
BEGIN ISOLATION LEVEL SERIALIZABLE;
UPDATE orgs SET tenant = 's' WHERE id = 50;
INSERT INTO projects VALUES (502, 50);
COMMIT;
BEGIN;
UPDATE orgs SET tenant = 'prepared' WHERE id = 50;
INSERT INTO tasks VALUES (502, 1);
PREPARE TRANSACTION 'pa';
COMMIT PREPARED 'pa';
SET session_replication_role = replica;
INSERT INTO tasks VALUES (502, 2), (99999, 1);
DELETE FROM tasks WHERE project = 99999;
RESET session_replication_role;
INSERT INTO tasks VALUES (502, 2, 'dup') ON CONFLICT DO NOTHING;
INSERT INTO tasks VALUES (502, 2, 'dup'), (502, 3, 'new') ON CONFLICT (project, n) DO UPDATE SET body = 'conflict';
MERGE INTO tasks t USING (VALUES (502, 3), (502, 4)) v (p, n) ON t.project = v.p AND t.n = v.n
    WHEN MATCHED THEN UPDATE SET body = 'merged' WHEN NOT MATCHED THEN INSERT VALUES (v.p, v.n, 'new');
COPY tasks FROM stdin;
502	5	copied
502	6	copied
\.
SELECT * FROM differences();
-- Under another role, with row security in the way.
CREATE ROLE regress_path_user;
GRANT USAGE ON SCHEMA pa TO regress_path_user;
GRANT ALL ON ALL TABLES IN SCHEMA pa TO regress_path_user;
ALTER TABLE orgs ENABLE ROW LEVEL SECURITY;
ALTER TABLE projects ENABLE ROW LEVEL SECURITY;
ALTER TABLE projects FORCE ROW LEVEL SECURITY;
CREATE POLICY only_ten ON projects USING (id = 10);
SET ROLE regress_path_user;
INSERT INTO tasks VALUES (502, 7);
DELETE FROM tasks WHERE n = 6;
RESET ROLE;
SELECT * FROM differences();
ALTER TABLE orgs DISABLE ROW LEVEL SECURITY;
ALTER TABLE projects NO FORCE ROW LEVEL SECURITY;
ALTER TABLE projects DISABLE ROW LEVEL SECURITY;
-- A parent that moves between partitions.
CREATE TABLE places (tenant text, id int PRIMARY KEY) ;
CREATE TABLE zones (tenant text NOT NULL, id int NOT NULL, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE zones_1 PARTITION OF zones FOR VALUES FROM (0) TO (10);
CREATE TABLE zones_2 PARTITION OF zones FOR VALUES FROM (10) TO (20);
CREATE TABLE beds (id int PRIMARY KEY, zone int NOT NULL REFERENCES zones ON UPDATE CASCADE ON DELETE CASCADE);
SELECT strategy FROM coffer.add_table('zones', 'tenant');
SELECT strategy FROM coffer.add_table('beds', parent => 'zones');
INSERT INTO zones VALUES ('a', 1), ('b', 2), ('c', 12);
INSERT INTO beds SELECT 10 * z.id + i, z.id FROM zones z, generate_series(1, 2) i;
UPDATE zones SET tenant = 'q' WHERE id = 1;
UPDATE zones SET id = 13 WHERE id = 2;
UPDATE zones SET id = 3, tenant = 'r' WHERE id = 12;
UPDATE beds SET zone = 13 WHERE id = 11;
SELECT * FROM differences();
DELETE FROM zones WHERE id = 13;
SELECT * FROM differences();
-- A tenant's name that the column above does not take is nobody's there.
CREATE TABLE numbered (tenant int, id int PRIMARY KEY);
CREATE TABLE below_numbered (id int PRIMARY KEY, up int REFERENCES numbered);
SELECT strategy FROM coffer.add_table('numbered', 'tenant');
SELECT strategy FROM coffer.add_table('below_numbered', parent => 'numbered');
INSERT INTO numbered VALUES (7, 1);
INSERT INTO below_numbered VALUES (1, 1);
SELECT count(*) FROM coffer.snapshot('7') WHERE relation ~ 'numbered';
SELECT count(*) FROM coffer.snapshot('seven') WHERE relation ~ 'numbered';
-- TRUNCATE reaches below.
TRUNCATE projects CASCADE;
SELECT * FROM differences();
-- Only the session knows.
INSERT INTO seen VALUES (1, 'nobody''s');
SET coffer.tenant = 'a';
INSERT INTO seen VALUES (2, 'a'), (3, 'a');
SET coffer.tenant = 'b';
INSERT INTO seen VALUES (4, 'b'), (2, 'taken') ON CONFLICT DO NOTHING;
UPDATE seen SET body = 'by b' WHERE id IN (2, 4);
UPDATE seen SET id = 20 WHERE id = 3;
DELETE FROM seen WHERE id = 1;
RESET coffer.tenant;
UPDATE seen SET body = 'by nobody' WHERE id = 20;
SELECT * FROM differences();
SELECT tenant, r FROM archive WHERE relation = 'pa.seen' ORDER BY r ->> 'id';
TRUNCATE seen;
SELECT * FROM differences();
SELECT count(*) FROM coffer.session_rows;
-- A partition that is emptied takes along whose its rows were: a row that comes in the place of one is nobody's.
CREATE TABLE seen_parts (id int PRIMARY KEY, body text) PARTITION BY RANGE (id);
CREATE TABLE seen_parts_1 PARTITION OF seen_parts FOR VALUES FROM (0) TO (10);
SELECT strategy FROM coffer.add_table('seen_parts');
SET coffer.tenant = 'a';
INSERT INTO seen_parts VALUES (1, 'a'), (2, 'a');
RESET coffer.tenant;
TRUNCATE seen_parts_1;
INSERT INTO seen_parts VALUES (1, 'nobody''s');
UPDATE seen_parts SET body = 'nobody''s still';
SELECT * FROM differences();
SELECT tenant, r FROM archive WHERE relation = 'pa.seen_parts';
DROP TABLE seen_parts;

-- DDL. Renamed columns; a foreign key that is replaced, one that goes; columns and tables that carry a tenant.
SET client_min_messages = notice;
ALTER TABLE guests RENAME seat TO chair;
ALTER TABLE seats RENAME id TO number;
SELECT count(take_in('regress_path'));
UPDATE archive SET key = replace(key::text, '"id"', '"number"')::jsonb, r = replace(r::text, '"id"', '"number"')::jsonb WHERE relation = 'pa.seats';
UPDATE archive SET r = replace(r::text, '"seat"', '"chair"')::jsonb WHERE relation = 'pa.guests';
INSERT INTO guests VALUES (3, 11);
UPDATE seats SET tenant = 'renamed' WHERE number = 11;
SELECT * FROM differences();
ALTER TABLE guests DROP COLUMN chair;
ALTER TABLE seats DROP COLUMN number CASCADE;
DROP TRIGGER zzz_coffer_path ON guests;
ALTER TABLE seats DISABLE TRIGGER "AAA_coffer_parent";
UPDATE seats SET tenant = 'enabled' WHERE number = 11;
SELECT * FROM differences();
ALTER TABLE guests DROP CONSTRAINT guests_seat_fkey;
INSERT INTO guests VALUES (4, 999);
UPDATE seats SET tenant = 'unguarded' WHERE number = 11;
SELECT * FROM differences();
SELECT reason FROM coffer.coverage WHERE relation = 'guests'::regclass;
-- Without it rows wait for a parent that comes in another transaction, and stay when one goes.
INSERT INTO seats VALUES ('came', 999);
SELECT * FROM differences();
SELECT r ->> 'id' AS id, tenant FROM archive WHERE relation = 'pa.guests' ORDER BY 1;
DELETE FROM seats WHERE number = 11;
SELECT * FROM differences();
SELECT r ->> 'id' AS id, tenant FROM archive WHERE relation = 'pa.guests' ORDER BY 1;
BEGIN;
DELETE FROM seats WHERE number = 999;
INSERT INTO guests VALUES (5, 999), (6, 998);
DELETE FROM guests WHERE id = 4;
SAVEPOINT s;
INSERT INTO seats VALUES ('undone', 998);
ROLLBACK TO s;
COMMIT;
SELECT * FROM differences();
BEGIN;
DELETE FROM seats WHERE number = 21;
INSERT INTO seats VALUES ('other', 21), ('both', 998);
DELETE FROM guests WHERE id = 6;
INSERT INTO guests VALUES (7, 998);
COMMIT;
SELECT * FROM differences();
UPDATE seats SET number = 11 WHERE number = 21;
SELECT * FROM differences();
WITH d AS (DELETE FROM seats WHERE number = 11 RETURNING number) INSERT INTO seats SELECT 'at once', number FROM d;
INSERT INTO seats VALUES (NULL, 21);
SELECT * FROM differences();
SELECT r ->> 'id' AS id, tenant FROM archive WHERE relation = 'pa.guests' ORDER BY 1;
-- Many parents that come at once, and no index to find rows by; parents that are gone without a word: new bases.
INSERT INTO guests VALUES (8, 1150);
SELECT r.registered_xid AS before FROM coffer.rules r WHERE r.relid = 'guests'::regclass \gset
INSERT INTO seats SELECT 'few', i FROM generate_series(1200, 1290) i;
SELECT r.registered_xid = :'before' AS same_base FROM coffer.rules r WHERE r.relid = 'guests'::regclass;
INSERT INTO seats SELECT 'bulk', i FROM generate_series(1000, 1199) i;
SELECT r.registered_xid = :'before' AS same_base FROM coffer.rules r WHERE r.relid = 'guests'::regclass;
SELECT r.registered_xid AS before FROM coffer.rules r WHERE r.relid = 'guests'::regclass \gset
TRUNCATE seats;
SELECT r.registered_xid = :'before' AS same_base FROM coffer.rules r WHERE r.relid = 'guests'::regclass;
TRUNCATE guests;
-- The key again: as long as a row has no parent, those that come look for it.
INSERT INTO guests VALUES (9, 9);
ALTER TABLE guests ADD CONSTRAINT again FOREIGN KEY (chair) REFERENCES seats NOT VALID;
SELECT strategy FROM coffer.add_table('guests', parent => 'seats');
SELECT path_guarded, path_loose FROM coffer.rules WHERE relid = 'guests'::regclass;
INSERT INTO seats VALUES ('nine', 9);
ALTER TABLE guests VALIDATE CONSTRAINT again;
SELECT * FROM differences();
SELECT strategy FROM coffer.add_table('guests', parent => 'seats');
SELECT path_guarded, path_loose FROM coffer.rules WHERE relid = 'guests'::regclass;
ALTER TABLE guests DROP CONSTRAINT again;
-- A key that is there and does not act: for replication's role, with its triggers off, for the rows that were there before it.
CREATE TABLE desks (tenant text, id int PRIMARY KEY);
CREATE TABLE papers (id int PRIMARY KEY, desk int REFERENCES desks ON UPDATE CASCADE ON DELETE CASCADE, body text);
CREATE TABLE words (paper int REFERENCES papers ON UPDATE CASCADE ON DELETE CASCADE, word text);
CREATE INDEX ON papers (desk);
SELECT strategy FROM coffer.add_table('desks', 'tenant');
SELECT strategy FROM coffer.add_table('papers', parent => 'desks');
SELECT strategy FROM coffer.add_table('words', parent => 'papers');
INSERT INTO desks VALUES ('a', 1), ('b', 2);
INSERT INTO papers VALUES (1, 1), (2, 2);
INSERT INTO words VALUES (1, 'one'), (2, 'two');
SET session_replication_role = replica;
INSERT INTO papers VALUES (3, 3);
INSERT INTO words VALUES (3, 'three');
RESET session_replication_role;
SELECT * FROM differences();
INSERT INTO desks VALUES ('c', 3);
SELECT * FROM differences();
SET session_replication_role = replica;
DELETE FROM desks WHERE id = 1;
SELECT * FROM differences();
UPDATE desks SET id = 1 WHERE id = 2;
SELECT * FROM differences();
DELETE FROM papers WHERE id = 3;
SELECT * FROM differences();
RESET session_replication_role;
INSERT INTO papers VALUES (3, 3);
INSERT INTO desks VALUES ('d', 2);
SELECT * FROM differences();
SELECT relation, string_agg(concat(r ->> 'id', r ->> 'word', ' ', coalesce(tenant, '-')), ', ' ORDER BY r::text) FROM archive
WHERE relation IN ('pa.papers', 'pa.words') GROUP BY relation ORDER BY relation;
CREATE TABLE halls (tenant text, a int, b int, PRIMARY KEY (a, b));
CREATE TABLE half_null (id int PRIMARY KEY, a int, b int, FOREIGN KEY (a, b) REFERENCES halls ON DELETE SET NULL (b));
CREATE TABLE half_default (id int PRIMARY KEY, a int, b int DEFAULT 1, FOREIGN KEY (a, b) REFERENCES halls ON DELETE SET DEFAULT (b));
CREATE TABLE full_match (id int PRIMARY KEY, a int, b int, FOREIGN KEY (a, b) REFERENCES halls MATCH FULL ON DELETE SET NULL ON UPDATE CASCADE);
SELECT strategy FROM coffer.add_table('halls', 'tenant');
SELECT strategy FROM unnest(ARRAY['half_null', 'half_default', 'full_match']) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, parent => 'halls');
INSERT INTO halls VALUES ('one', 1, 1), ('two', 1, 2), ('three', 1, 3), ('four', 1, 4);
INSERT INTO half_null VALUES (1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, NULL);
INSERT INTO half_default SELECT * FROM half_null;
INSERT INTO full_match VALUES (1, 1, 1), (2, 1, 2), (3, 1, 3), (4, NULL, NULL);
SELECT * FROM differences();
DELETE FROM halls WHERE b = 2;
UPDATE full_match SET (a, b) = (1, 4) WHERE id = 4;
UPDATE halls SET a = 2, tenant = 'moved' WHERE b = 4;
SELECT * FROM differences();
SELECT relation, string_agg(concat(r ->> 'id', ' ', coalesce(tenant, '-')), ', ' ORDER BY r ->> 'id') FROM archive
WHERE relation ~ '^pa.(half|full)_' GROUP BY relation ORDER BY relation;
ALTER TABLE full_match DISABLE TRIGGER ALL;
INSERT INTO full_match VALUES (5, 5, 5);
ALTER TABLE full_match ENABLE TRIGGER ALL;
INSERT INTO halls VALUES ('five', 5, 5);
SELECT * FROM differences();
ALTER TABLE half_default DROP CONSTRAINT half_default_a_b_fkey;
INSERT INTO half_default VALUES (6, 6, 6), (7, 7, 7);
SELECT strategy FROM coffer.remove_table('half_default');
ALTER TABLE half_default ADD FOREIGN KEY (a, b) REFERENCES halls ON DELETE SET DEFAULT (b) NOT VALID;
SELECT strategy FROM coffer.add_table('half_default', parent => 'halls');
INSERT INTO halls VALUES ('six', 6, 6);
UPDATE halls SET a = 7, b = 7 WHERE a = 5;
SELECT * FROM differences();
-- Not enforced is as good as gone.
DO $$ BEGIN
    EXECUTE 'ALTER TABLE half_null ' || CASE WHEN current_setting('server_version_num')::int >= 180000
        THEN 'ALTER CONSTRAINT half_null_a_b_fkey NOT ENFORCED' ELSE 'DROP CONSTRAINT half_null_a_b_fkey' END;
END $$;
SELECT count(*) FROM coffer._paths('half_null'::regclass) WHERE obstacle IS NULL;
INSERT INTO half_null VALUES (8, 8, 8);
DELETE FROM halls WHERE (a, b) = (1, 3);
INSERT INTO halls VALUES ('eight', 8, 8);
SELECT * FROM differences();
ALTER TABLE seats ALTER tenant TYPE varchar(20) USING tenant || '!';
DROP TABLE seats CASCADE;
SELECT relation, covered, strategy FROM coffer.coverage WHERE relation = 'guests'::regclass;
-- Parents that come and go with a partition, where no key has a say: new bases.
ALTER TABLE beds DROP CONSTRAINT beds_zone_fkey;
SELECT r.registered_xid AS before FROM coffer.rules r WHERE r.relid = 'beds'::regclass \gset
TRUNCATE zones_2;
SELECT r.registered_xid = :'before' AS same_base FROM coffer.rules r WHERE r.relid = 'beds'::regclass;
SELECT r.registered_xid AS before FROM coffer.rules r WHERE r.relid = 'beds'::regclass \gset
ALTER TABLE zones DETACH PARTITION zones_2;
SELECT r.registered_xid = :'before' AS same_base FROM coffer.rules r WHERE r.relid = 'beds'::regclass;
SELECT r.registered_xid AS before FROM coffer.rules r WHERE r.relid = 'beds'::regclass \gset
DROP TABLE zones_1;
SELECT r.registered_xid = :'before' AS same_base FROM coffer.rules r WHERE r.relid = 'beds'::regclass;
SELECT relation, strategy FROM coffer.remove_table('beds');
SELECT regexp_replace(tgname, '_[0-9]+$', '') AS tgname FROM pg_trigger WHERE tgrelid = 'zones'::regclass AND tgname ~* 'coffer' ORDER BY 1;
SELECT count(*) FROM pg_drop_replication_slot('regress_path');
SET client_min_messages = warning;
DROP SCHEMA pa CASCADE;
DROP OWNED BY regress_path_user;
DROP ROLE regress_path_user;
SELECT count(*) FROM coffer.rules WHERE strategy IN (2, 3);
