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
