-- What the doctor finds, and that what it prescribes helps.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA doc;
SELECT check_name, ok, found, fix FROM coffer.doctor() WHERE check_name !~ '^(slot|agent|max_|idle_)';
CREATE ROLE regress_agent;
CREATE TABLE doc.a (t int, id int, PRIMARY KEY (t, id));
CREATE TABLE doc.b (t int, id int PRIMARY KEY);
CREATE TABLE doc.c (t int, id int PRIMARY KEY);
CREATE TABLE doc.p (t int, id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE doc.p1 PARTITION OF doc.p FOR VALUES FROM (0) TO (10);
CREATE TABLE doc.q (id int PRIMARY KEY, c int NOT NULL REFERENCES doc.c);
CREATE TABLE doc.r (id int PRIMARY KEY);
CREATE TABLE doc.open (x int);
CREATE TABLE doc.out (x int);
CREATE UNLOGGED TABLE doc.unl (t int);
SELECT relation, strategy FROM (VALUES ('doc.a'), ('doc.b'), ('doc.c'), ('doc.p')) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, 't');
SELECT strategy FROM coffer.add_table('doc.q', parent => 'doc.c', class => 'config');
SELECT strategy FROM coffer.add_table('doc.r');
SELECT strategy FROM coffer.exclude('doc.out', 'not needed');
-- While the guards are off, much can go wrong.
ALTER EVENT TRIGGER coffer_ddl DISABLE;
ALTER EVENT TRIGGER coffer_drop ENABLE;
SET session_replication_role = replica;
ALTER TABLE doc.a DROP CONSTRAINT a_pkey;
ALTER TABLE doc.b DISABLE TRIGGER zzz_coffer_tag_delete;
ALTER TABLE doc.p1 REPLICA IDENTITY NOTHING;
ALTER TABLE doc.q REPLICA IDENTITY NOTHING;
ALTER TABLE doc.r REPLICA IDENTITY NOTHING;
RESET session_replication_role;
CREATE FUNCTION doc.late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';
CREATE TRIGGER zzzz_late BEFORE UPDATE ON doc.c FOR EACH ROW EXECUTE FUNCTION doc.late();
CREATE TRIGGER zzzz_after AFTER UPDATE ON doc.c FOR EACH ROW EXECUTE FUNCTION doc.late();
CREATE TRIGGER zzz_coffer_tag_delete BEFORE DELETE ON doc.open FOR EACH ROW EXECUTE FUNCTION coffer._tag('x');
SELECT check_name, ok, found, fix FROM coffer.doctor() WHERE check_name !~ '^(slot|agent|max_|idle_)';
SELECT fix FROM coffer.doctor() WHERE NOT ok AND check_name ~ 'doc\.[abcpqr]|event trigger|doc\.open|doc\.unl' \gexec
SELECT check_name, ok, found, fix FROM coffer.doctor() WHERE check_name ~ '^table|event trigger|covered';
-- The agent's role.
SELECT coffer.setup_agent('regress_agent');
SELECT check_name, ok, found, fix FROM coffer.doctor() WHERE check_name ~ '^role';
ALTER ROLE regress_agent LOGIN NOBYPASSRLS;
REVOKE pg_read_all_data FROM regress_agent;
SELECT check_name, ok, found, fix FROM coffer.doctor() WHERE check_name ~ '^role';
SELECT coffer.setup_agent('regress_agent');
SELECT check_name, ok, found, fix FROM coffer.doctor() WHERE check_name ~ '^role';
SELECT coffer.setup_agent('regress_nobody');
SELECT rolreplication, rolbypassrls, rolsuper FROM pg_roles WHERE rolname = 'regress_agent';
-- A server that knows the setting lists the plugin for the role; one that does not has no such row.
SELECT count(*) FROM coffer.doctor() WHERE check_name ~ '^output_plugin_libraries' AND NOT ok;
SELECT (SELECT count(*) FROM coffer.doctor() WHERE check_name ~ '^output_plugin_libraries')
     = (SELECT count(*) FROM pg_settings WHERE name = 'output_plugin_libraries') AS row_where_known;
-- The slot, lost agent included.
SELECT check_name, ok, found FROM coffer.doctor() WHERE check_name ~ '^slot';
SELECT pg_create_logical_replication_slot('regress_slot', 'pg_coffer') IS NOT NULL AS made;
SELECT check_name, ok, regexp_replace(found, '\d+ \w+ behind', 'N behind') FROM coffer.doctor() WHERE check_name ~ '^slot';
SELECT slot, slot_active, slot_wal_status FROM coffer.status;
SELECT pg_drop_replication_slot('regress_slot');
DROP OWNED BY regress_agent;
DROP ROLE regress_agent;
DROP SCHEMA doc CASCADE;
