-- Cover, share, exclude, forget.
\set SHOW_CONTEXT never
CREATE SCHEMA reg;
SET search_path = reg;
CREATE TABLE orders (tenant_id int NOT NULL, id int NOT NULL, note text, PRIMARY KEY (tenant_id, id));
CREATE TABLE items (id int PRIMARY KEY, tenant_id int, order_id int);
CREATE TABLE hits (tenant_id int, at timestamptz);
CREATE TABLE currencies (code text PRIMARY KEY);
CREATE TABLE lines (id int PRIMARY KEY, item int REFERENCES items);

SELECT * FROM coffer.add_table('orders', 'tenant_id');
SELECT * FROM coffer.add_table('items', 'tenant_id', class => 'config');
SELECT * FROM coffer.add_table('hits', 'tenant_id', class => 'audit');
SELECT * FROM coffer.add_shared('currencies');
SELECT * FROM coffer.exclude('lines', 'made again every night');
SELECT relation, covered, class, strategy, tenant_column, cost, reason FROM coffer.coverage
WHERE relation::text !~ '\.' ORDER BY relation::text COLLATE "C";
SELECT schema, name, strategy, class, tenant_column, key_columns, tenant, kind, is_partitioned FROM coffer._agent_rules() ORDER BY name COLLATE "C";

-- Again: the same answer, no new base; with another class neither; with another column one.
CREATE TEMP TABLE then_ AS SELECT relid, registered_xid FROM coffer.rules;
SELECT strategy, class FROM coffer.add_table('orders', 'tenant_id');
SELECT strategy, class FROM coffer.add_table('items', 'tenant_id', class => 'accounts');
SELECT strategy, reason FROM coffer.add_table('items', 'order_id', class => 'accounts');
SELECT r.relid::regclass, r.registered_xid = t.registered_xid AS same_base FROM coffer.rules r JOIN then_ t USING (relid) ORDER BY r.relid::regclass::text COLLATE "C";
SELECT tgname, tgenabled, encode(tgargs, 'escape') FROM pg_trigger WHERE tgrelid = 'items'::regclass AND NOT tgisinternal ORDER BY tgname;
SELECT strategy FROM coffer.add_table('items', 'tenant_id');

-- What cannot be covered.
CREATE VIEW v AS SELECT 1 AS tenant_id;
CREATE MATERIALIZED VIEW mv AS SELECT 1 AS tenant_id;
CREATE TEMP TABLE tmp (tenant_id int);
CREATE UNLOGGED TABLE unlogged (tenant_id int);
CREATE SEQUENCE seq;
CREATE FOREIGN DATA WRAPPER nothing;
CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
CREATE FOREIGN TABLE away (tenant_id int) SERVER nowhere;
CREATE TABLE parted (tenant_id int, id int) PARTITION BY RANGE (id);
CREATE TABLE leaf PARTITION OF parted FOR VALUES FROM (0) TO (10);
SELECT * FROM coffer.add_table('v', 'tenant_id');
SELECT * FROM coffer.add_table('mv', 'tenant_id');
SELECT * FROM coffer.add_table('tmp', 'tenant_id');
SELECT * FROM coffer.add_table('unlogged', 'tenant_id');
SELECT * FROM coffer.add_table('seq', 'tenant_id');
SELECT * FROM coffer.add_table('away', 'tenant_id');
SELECT * FROM coffer.add_table('leaf', 'tenant_id');
SELECT * FROM coffer.add_table('pg_class', 'oid');
SELECT * FROM coffer.add_table('coffer.settings', 'name');
SELECT * FROM coffer.add_table(NULL, 'tenant_id');
SELECT * FROM coffer.add_table('orders', 'nothing');
SELECT * FROM coffer.add_table('orders', 'ctid');
SELECT * FROM coffer.add_table('orders', 'tenant_id', class => 'other');
SELECT * FROM coffer.add_table('orders');
SELECT * FROM coffer.add_table('lines', parent => 'orders');
SELECT * FROM coffer.add_shared('v');
SELECT * FROM coffer.exclude('lines', '  ');
SELECT * FROM coffer.exclude('v', 'why not');
SELECT * FROM coffer.exclude('leaf', 'why not');
SELECT * FROM coffer.remove_table('leaf');
SELECT * FROM coffer.remove_table('pg_class');

-- What cannot be covered can be excluded.
SELECT * FROM coffer.exclude('unlogged', 'a cache');
SELECT * FROM coffer.exclude('away', 'belongs to somebody else');

-- Discovery: proposes, does, and does nothing twice.
CREATE TABLE later (tenant_id int NOT NULL, id int PRIMARY KEY);
SELECT relation, action, strategy, reason, statement, applied FROM coffer.discover('tenant_id') WHERE relation::text !~ '\.';
SELECT relation, action, strategy, applied FROM coffer.discover('tenant_id', apply => true) WHERE relation::text !~ '\.';
SELECT relation, action, strategy, applied FROM coffer.discover('tenant_id', apply => true) WHERE relation::text !~ '\.';
SELECT * FROM coffer.discover(NULL);

-- Forgetting leaves nothing behind.
SELECT * FROM coffer.remove_table('hits');
SELECT * FROM coffer.remove_table('items');
SELECT * FROM coffer.remove_table('currencies');
SELECT * FROM coffer.remove_table('lines');
SELECT * FROM coffer.remove_table('hits');
SELECT c.relname, c.relreplident FROM pg_class c WHERE c.oid IN ('hits'::regclass, 'items'::regclass) ORDER BY c.relname COLLATE "C";
SELECT tgname FROM pg_trigger WHERE tgrelid = 'items'::regclass AND NOT tgisinternal;
SELECT actor, action, object, detail FROM coffer.audit_log WHERE object ~ 'hits|lines' ORDER BY entry;
DELETE FROM coffer.audit_entries;
TRUNCATE coffer.audit_entries;

SET client_min_messages = warning;
DELETE FROM coffer.settings;
DROP SCHEMA reg CASCADE;
DROP FOREIGN DATA WRAPPER nothing CASCADE;
SELECT count(*) FROM coffer.rules;
SELECT count(*) FROM coffer.rule_relations;
SELECT count(*) FROM coffer.exclusions;
