-- One tenant per schema.
\set SHOW_CONTEXT never
CREATE SCHEMA acme;
CREATE TABLE acme.keyed (id int PRIMARY KEY);
CREATE TABLE acme.unkeyed (x text);
CREATE TABLE acme.own_rule (t int, id int, PRIMARY KEY (t, id));
CREATE TABLE acme.parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE acme.leaf PARTITION OF acme.parted FOR VALUES FROM (0) TO (10);
CREATE UNLOGGED TABLE acme.cache (x int);
SELECT strategy FROM coffer.add_table('acme.own_rule', 't');
SELECT * FROM coffer.add_schema('acme', 'Acme & Co', class => 'customization');
SELECT relation, covered, class, strategy, cost, reason FROM coffer.coverage ORDER BY relation::text COLLATE "C";
SELECT schema, name, strategy, class, tenant_column, key_columns, tenant, is_partitioned FROM coffer._agent_rules() ORDER BY name COLLATE "C";

-- New tables belong to the tenant; a table that is moved in or out changes sides.
CREATE TABLE acme.later (x text);
CREATE TABLE public.moved (x text);
ALTER TABLE public.moved SET SCHEMA acme;
SELECT relation, covered, strategy FROM coffer.coverage WHERE relation::text ~ 'later|moved' ORDER BY relation::text COLLATE "C";
SELECT relname, relreplident FROM pg_class WHERE relname IN ('later', 'moved', 'unkeyed', 'keyed') ORDER BY relname COLLATE "C";
ALTER TABLE acme.moved SET SCHEMA public;
SELECT relation, covered, strategy FROM coffer.coverage WHERE relation::text ~ 'later|moved' ORDER BY relation::text COLLATE "C";
SELECT relname, relreplident FROM pg_class WHERE relname = 'moved';
DROP TABLE public.moved;
-- Losing the key is noticed.
ALTER TABLE acme.keyed DROP CONSTRAINT keyed_pkey;
SELECT relname, relreplident FROM pg_class WHERE relname = 'keyed';
SELECT * FROM coffer.exclude('acme.keyed', 'no');
SELECT * FROM coffer.remove_table('acme.keyed');
SELECT * FROM coffer.add_schema('pg_catalog', 'x');
SELECT * FROM coffer.add_schema('nowhere', 'x');
SELECT * FROM coffer.add_schema('acme', NULL);
SELECT * FROM coffer.remove_schema('nowhere');

-- A pattern: the schema's name is the tenant, now and later.
CREATE SCHEMA cust_1;
CREATE TABLE cust_1.t (id int PRIMARY KEY);
SELECT * FROM coffer.add_schema_pattern('cust\_%');
CREATE SCHEMA cust_2 CREATE TABLE t (x int);
CREATE SCHEMA other CREATE TABLE t (x int);
SELECT schema, name, tenant, key_columns FROM coffer._agent_rules() ORDER BY schema COLLATE "C", name COLLATE "C";
SELECT * FROM coffer.add_schema_pattern('');

-- A rule of its own ends: the schema's is in force.
SELECT strategy FROM coffer.remove_table('acme.own_rule');
SELECT name, strategy, tenant FROM coffer._agent_rules() WHERE name = 'own_rule';
SELECT * FROM coffer.remove_schema('acme');
SELECT relname, relreplident FROM pg_class WHERE relnamespace = 'acme'::regnamespace AND relkind IN ('r', 'p') AND relpersistence = 'p' ORDER BY relname COLLATE "C";
SET client_min_messages = warning;
DROP SCHEMA acme, cust_1, cust_2, other CASCADE;
DELETE FROM coffer.schema_patterns;
SELECT count(*) FROM coffer.schema_rules;
SELECT count(*) FROM coffer.rule_relations;

-- Partitions in a tenant's schema: what the log says of them, and how it names their rows.
CREATE SCHEMA acme;
CREATE SCHEMA plain;
CREATE FUNCTION plain.heard() RETURNS TABLE (relation regclass, said jsonb)
LANGUAGE sql AS $$
    SELECT (m.said ->> 'relid')::oid::regclass, m.said - 'relid'
    FROM (SELECT (c.data::jsonb ->> 'payload')::jsonb AS said FROM pg_logical_slot_get_changes('regress_schemas', NULL, NULL, 'format', 'json') c
          WHERE c.data::jsonb ->> 'kind' = 'registry') m
$$;
CREATE VIEW plain.tree AS
SELECT m.relid::regclass AS relation, m.root::regclass, c.relreplident AS ri
FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid ORDER BY m.relid::regclass::text COLLATE "C";
CREATE TABLE acme.heap (d int, x text) PARTITION BY RANGE (d);
CREATE TABLE acme.heap_1 PARTITION OF acme.heap FOR VALUES FROM (0) TO (10);
CREATE TABLE acme.old (d int, x text);
INSERT INTO acme.heap VALUES (1, 'a');
SELECT relation FROM coffer.add_schema('acme', 'Acme');
SELECT count(*) FROM pg_create_logical_replication_slot('regress_schemas', 'pg_coffer');
-- One that is made names its rows as the others do, and asks for no base; one that is attached is no table any more.
CREATE TABLE acme.heap_2 PARTITION OF acme.heap FOR VALUES FROM (10) TO (20);
SELECT relreplident FROM pg_class WHERE oid = 'acme.heap_2'::regclass;
SELECT * FROM plain.heard();
ALTER TABLE acme.heap ATTACH PARTITION acme.old FOR VALUES FROM (20) TO (30);
SELECT * FROM plain.heard();
SELECT * FROM plain.tree;
ALTER TABLE acme.heap_2 REPLICA IDENTITY NOTHING;
SELECT * FROM plain.heard();
-- One that is detached is a table from there on, and no other DDL is about it.
ALTER TABLE acme.heap DETACH PARTITION acme.heap_1;
SELECT * FROM plain.heard();
ALTER TABLE acme.heap ADD COLUMN y int;
SELECT * FROM plain.heard();
SELECT * FROM plain.tree;
-- Below a partition.
CREATE TABLE acme.heap_3 PARTITION OF acme.heap FOR VALUES FROM (30) TO (40) PARTITION BY RANGE (d);
CREATE TABLE acme.heap_31 (y int, x text, d int);
INSERT INTO acme.heap_31 VALUES (1, 'x', 30);
SELECT * FROM plain.heard();
ALTER TABLE acme.heap_3 ATTACH PARTITION acme.heap_31 FOR VALUES FROM (30) TO (35);
SELECT * FROM plain.heard();
ALTER TABLE acme.heap DETACH PARTITION acme.heap_3;
SELECT * FROM plain.heard();
SELECT * FROM plain.tree;
-- From a tenant's schema to a table with a rule, and the other way.
CREATE TABLE plain.shop (t int NOT NULL, id int NOT NULL, PRIMARY KEY (t, id)) PARTITION BY RANGE (id);
SELECT strategy FROM coffer.add_table('plain.shop', 't');
CREATE TABLE acme.shop_1 (t int NOT NULL, id int NOT NULL, PRIMARY KEY (t, id));
CREATE TABLE plain.own (x text, d int, y int);
SELECT strategy FROM coffer.add_table('plain.own', 'd');
SELECT count(*) FROM plain.heard();
ALTER TABLE plain.shop ATTACH PARTITION acme.shop_1 FOR VALUES FROM (0) TO (10);
ALTER TABLE acme.heap ATTACH PARTITION plain.own FOR VALUES FROM (50) TO (60);
SELECT * FROM plain.heard();
SELECT relid::regclass FROM coffer.rules;
ALTER TABLE plain.shop DETACH PARTITION acme.shop_1;
ALTER TABLE acme.heap SET SCHEMA plain;
SELECT * FROM plain.heard();
SELECT * FROM plain.tree;
SELECT relname, relreplident FROM pg_class WHERE relname ~ '^heap|^old|^own' AND relkind IN ('r', 'p') ORDER BY relname COLLATE "C";
SELECT count(*) FROM (SELECT pg_drop_replication_slot('regress_schemas')) d;
DROP SCHEMA acme, plain CASCADE;
SELECT count(*) FROM coffer.rule_relations;
