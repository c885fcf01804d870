-- What DDL does to covered tables.
\set SHOW_CONTEXT never
CREATE SCHEMA ev;
SET search_path = ev, public;
CREATE VIEW rule AS
SELECT r.relid::regclass AS relation, coffer._strategy_name(r.strategy) AS strategy, r.tenant_column, r.key_columns, c.relreplident AS ri,
       (SELECT string_agg(format('%s/%s', tgname, tgenabled), ' ' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = r.relid AND tgname LIKE '%coffer%') AS triggers
FROM coffer.rules r JOIN pg_class c ON c.oid = r.relid;

-- Without rules nobody is bothered.
CREATE TABLE quiet (id int);
CREATE TABLE a (t int NOT NULL, id int NOT NULL, x text, PRIMARY KEY (t, id));
CREATE TABLE b (t int NOT NULL, id int PRIMARY KEY, x text);
CREATE UNIQUE INDEX b_t ON b (t, id);
CREATE TABLE c (t int, id int PRIMARY KEY, x text);
CREATE TABLE e (t int, x text);
SELECT relation, strategy FROM (VALUES ('a'), ('b'), ('c'), ('e')) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, 't');
-- With rules but without a policy: a warning; not for what cannot be covered.
CREATE TABLE unknown (t int);
CREATE TEMP TABLE tmp (t int);
CREATE UNLOGGED TABLE unl (t int);
SELECT 1 AS t INTO selected;
DROP TABLE unknown, selected, quiet;

-- The index behind the replica identity goes.
DROP INDEX b_t;
SELECT * FROM rule WHERE relation = 'b'::regclass;
ALTER TABLE a DROP CONSTRAINT a_pkey;
SELECT * FROM rule WHERE relation = 'a'::regclass;
-- A better key comes: the table's own, at once; another index when asked.
ALTER TABLE a ADD PRIMARY KEY (id, t);
CREATE UNIQUE INDEX b_t2 ON b (id, t);
SELECT * FROM rule WHERE relation IN ('a'::regclass, 'b'::regclass) ORDER BY relation::text COLLATE "C";
SELECT strategy, reason FROM coffer.add_table('b', 't');
-- The same key under another index is no new base.
CREATE TEMP TABLE then_ AS SELECT relid, registered_xid FROM coffer.rules;
ALTER TABLE a DROP CONSTRAINT a_pkey, ADD CONSTRAINT a_pkey2 PRIMARY KEY (t, id);
ALTER TABLE a RENAME id TO ident;
ALTER TABLE a RENAME CONSTRAINT a_pkey2 TO a_pkey3;
REINDEX TABLE CONCURRENTLY b;
ALTER TABLE b ALTER COLUMN x SET NOT NULL;
SELECT r.relid::regclass, r.registered_xid = t.registered_xid AS same_base, r.key_columns FROM coffer.rules r JOIN then_ t USING (relid) ORDER BY r.relid::regclass::text COLLATE "C";
-- After REINDEX CONCURRENTLY the index has another OID; its end is noticed nevertheless.
DROP INDEX CONCURRENTLY b_t2;
SELECT * FROM rule WHERE relation = 'b'::regclass;

-- Somebody else changes the replica identity.
ALTER TABLE a REPLICA IDENTITY NOTHING;
ALTER TABLE e REPLICA IDENTITY DEFAULT;
SELECT * FROM rule ORDER BY relation::text COLLATE "C";

-- Tag triggers: off, less than always, gone, on a renamed column.
ALTER TABLE c DISABLE TRIGGER USER;
ALTER TABLE c ENABLE TRIGGER zzz_coffer_tag_move;
DROP TRIGGER zzz_coffer_tag_delete ON c;
ALTER TRIGGER zzz_coffer_tag_move ON c RENAME TO something_else;
SELECT * FROM rule WHERE relation = 'c'::regclass;
ALTER TABLE c RENAME t TO tenant;
SELECT relation, tenant_column, triggers FROM rule WHERE relation = 'c'::regclass;
SELECT DISTINCT encode(tgargs, 'escape') FROM pg_trigger WHERE tgrelid = 'c'::regclass AND tgname LIKE 'zzz%';

-- The tenant column stays.
ALTER TABLE c DROP COLUMN tenant;
ALTER TABLE c DROP COLUMN tenant CASCADE;
ALTER TABLE e DROP COLUMN t;
ALTER TABLE e DROP COLUMN x;
SELECT strategy FROM coffer.remove_table('e');
ALTER TABLE e DROP COLUMN t;

-- Rewrites and unlogged tables.
ALTER TABLE a ADD COLUMN r float8 DEFAULT random();
ALTER TABLE a SET UNLOGGED;
SELECT relation, covered, reason FROM coffer.coverage WHERE relation = 'a'::regclass;
SELECT count(*) FROM coffer._agent_rules() WHERE name = 'a';
ALTER TABLE a SET LOGGED;
SELECT relation, covered FROM coffer.coverage WHERE relation = 'a'::regclass;

-- Types: a label more is the same type, a renamed label is not.
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TYPE spot AS (x int, m mood[]);
CREATE DOMAIN spots AS spot[];
CREATE TABLE d (t int, id int, s spots, PRIMARY KEY (t, id));
SELECT strategy FROM coffer.add_table('d', 't');
ALTER TYPE mood ADD VALUE 'glad' BEFORE 'happy';
ALTER TYPE mood RENAME VALUE 'sad' TO 'blue';
ALTER TYPE spot ADD ATTRIBUTE y int;
-- Columns whose values are written in other words, though no row is: in the session's UTC a timestamp is one with a zone.
CREATE TABLE w (t int, id varchar(10), at timestamp, net cidr, twice int GENERATED ALWAYS AS (t * 2) STORED, PRIMARY KEY (t, id));
SELECT strategy FROM coffer.add_table('w', 't');
ALTER TABLE w ALTER id TYPE text, ALTER net TYPE cidr, ADD z timestamp;
SET timezone = 'UTC';
ALTER TABLE w ALTER at TYPE timestamptz;
RESET timezone;
BEGIN;
ALTER TABLE w ALTER net TYPE inet;
ROLLBACK;
ALTER TABLE w ALTER net TYPE inet;
ALTER TABLE w ALTER net TYPE text;
ALTER TABLE w ALTER net TYPE varchar(50);
ALTER TABLE w ALTER twice DROP EXPRESSION;
ALTER TABLE w DROP twice, DROP z, ADD z int;

-- Policy: discover with apply covers what comes.
SELECT count(*) FROM coffer.discover('t', apply => true);
CREATE TABLE n1 (t int NOT NULL, id int PRIMARY KEY);
CREATE TABLE n2 AS SELECT 1 AS t, 'x' AS x;
SELECT 1 AS t INTO n3;
CREATE TABLE n4 (id int PRIMARY KEY);
ALTER TABLE n4 ADD COLUMN t int;
CREATE TABLE n5 (LIKE n1 INCLUDING ALL);
CREATE TABLE n6 () INHERITS (n1);
CREATE TABLE IF NOT EXISTS n1 (t int);
SELECT relation, strategy, triggers FROM rule WHERE relation::text ~ '^n' ORDER BY relation::text COLLATE "C";
SELECT strategy FROM coffer.remove_table('n5');
SELECT strategy FROM coffer.exclude('n5', 'as we please');
ALTER TABLE n5 ADD COLUMN x int;

-- The setting by which the extension knows its own DDL cannot be had by guessing.
SET coffer.at_work = 'x';
ALTER TABLE n1 DISABLE TRIGGER USER;
RESET coffer.at_work;

-- What DDL rolls back, its rules do too.
BEGIN;
CREATE TABLE n7 (t int);
DROP TABLE n1 CASCADE;
SELECT count(*) FROM rule WHERE relation::text IN ('n1', 'n7');
ROLLBACK;
SELECT count(*) FROM rule WHERE relation::text IN ('n1', 'n7');

-- In a session that replicates as well.
SET session_replication_role = replica;
CREATE TABLE n8 (t int);
DROP TABLE n8;
RESET session_replication_role;

-- DDL of somebody who may do nothing with the registry.
CREATE ROLE regress_developer;
GRANT ALL ON SCHEMA ev TO regress_developer;
SET ROLE regress_developer;
CREATE TABLE n9 (t int, id int PRIMARY KEY);
ALTER TABLE n9 DROP CONSTRAINT n9_pkey;
INSERT INTO n9 VALUES (1, 1);
DELETE FROM n9;
SELECT count(*) FROM coffer.rules;
DROP TABLE n9;
CREATE TABLE n10 (t int, id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE n10_1 PARTITION OF n10 FOR VALUES FROM (0) TO (10);
DROP TABLE n10;
RESET ROLE;
DROP OWNED BY regress_developer;
DROP ROLE regress_developer;

-- The tenants of a table under `session` are kept by its key: the whole row is no replica identity for it.
CREATE TABLE n11 (id int PRIMARY KEY, v text);
SELECT strategy FROM coffer.add_table('n11');
ALTER TABLE n11 REPLICA IDENTITY FULL;
SELECT relreplident FROM pg_class WHERE oid = 'n11'::regclass;
CREATE PUBLICATION regress_n11 FOR TABLE n11;
ALTER TABLE n11 REPLICA IDENTITY FULL;
DROP PUBLICATION regress_n11;
SELECT relreplident FROM pg_class WHERE oid = 'n11'::regclass;
DROP TABLE n11;

-- The type of a tenant's column that a trigger looks at: the server refuses, and this is how it is done.
CREATE TABLE n12 (t int NOT NULL, id int, x text, PRIMARY KEY (t, id));
SELECT strategy FROM coffer.add_table('n12', 't');
ALTER TABLE n12 ALTER t TYPE bigint;
SELECT strategy FROM coffer.remove_table('n12');
ALTER TABLE n12 ALTER t TYPE bigint;
SELECT strategy FROM coffer.add_table('n12', 't');
-- Without columns for large values there is no trigger.
CREATE TABLE n13 (t int NOT NULL, id int, PRIMARY KEY (t, id));
SELECT strategy FROM coffer.add_table('n13', 't');
ALTER TABLE n13 ALTER t TYPE bigint;
-- What a table's columns are called, they are called in those that inherit from it.
CREATE TABLE n14 (t int NOT NULL, id int PRIMARY KEY, x text);
CREATE TABLE n15 (PRIMARY KEY (id)) INHERITS (n14);
CREATE TABLE n16 (PRIMARY KEY (t, id)) INHERITS (n15);
ALTER TABLE n14 RENAME t TO tenant;
ALTER TABLE n14 RENAME id TO number;
SELECT relation, strategy, tenant_column, key_columns FROM rule WHERE relation::text ~ '^n1[456]$' ORDER BY relation::text COLLATE "C";
INSERT INTO n15 VALUES (1, 1, 'x'), (1, 2, 'x');
INSERT INTO n16 VALUES (1, 3, 'x');
UPDATE n14 SET tenant = 2 WHERE number > 1;
DELETE FROM n14;
-- What a type's attributes are called, the columns of tables of that type are.
CREATE TYPE shape AS (t int, id int);
CREATE TABLE n17 OF shape (PRIMARY KEY (id));
ALTER TYPE shape RENAME ATTRIBUTE t TO tenant CASCADE;
SELECT relation, strategy, tenant_column, key_columns FROM rule WHERE relation = 'n17'::regclass;
INSERT INTO n17 VALUES (1, 1);
DELETE FROM n17;
-- Nothing is left.
SET client_min_messages = warning;
DELETE FROM coffer.settings;
DROP SCHEMA ev CASCADE;
SELECT count(*) FROM coffer.rules;
SELECT count(*) FROM coffer.rule_relations;
SELECT count(*) FROM coffer.exclusions;
