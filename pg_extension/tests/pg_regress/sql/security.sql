-- Who may what.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE ROLE regress_admin IN ROLE coffer_admin;
CREATE ROLE regress_operator IN ROLE coffer_operator;
CREATE ROLE regress_auditor IN ROLE coffer_auditor;
CREATE ROLE regress_nobody;
CREATE ROLE regress_agent LOGIN;
SELECT coffer.setup_agent('regress_agent');

-- Functions: every one, by role. Only the trigger functions and the names are anybody's.
SELECT p.oid::regprocedure AS function,
       has_function_privilege('regress_nobody', p.oid, 'EXECUTE') AS nobody, has_function_privilege('regress_auditor', p.oid, 'EXECUTE') AS auditor,
       has_function_privilege('regress_operator', p.oid, 'EXECUTE') AS operator, has_function_privilege('regress_admin', p.oid, 'EXECUTE') AS admin,
       has_function_privilege('regress_agent', p.oid, 'EXECUTE') AS agent
FROM pg_proc p WHERE p.pronamespace = 'coffer'::regnamespace
  AND (has_function_privilege('regress_nobody', p.oid, 'EXECUTE') OR has_function_privilege('regress_auditor', p.oid, 'EXECUTE')
       OR has_function_privilege('regress_operator', p.oid, 'EXECUTE') OR has_function_privilege('regress_admin', p.oid, 'EXECUTE')
       OR has_function_privilege('regress_agent', p.oid, 'EXECUTE'))
ORDER BY p.proname COLLATE "C";
-- Tables and views that anybody but the owner can read; none can be written.
SELECT c.relname, has_table_privilege('regress_nobody', c.oid, 'SELECT') AS nobody, has_table_privilege('regress_auditor', c.oid, 'SELECT') AS auditor,
       has_table_privilege('regress_admin', c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE') AS admin_writes
FROM pg_class c WHERE c.relnamespace = 'coffer'::regnamespace AND c.relkind IN ('r', 'v')
  AND (has_table_privilege('regress_nobody', c.oid, 'SELECT') OR has_table_privilege('regress_admin', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE'))
ORDER BY c.relname COLLATE "C";
-- Every function that runs with its owner's rights pins the search path, its temporary schema last.
SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'coffer'::regnamespace AND p.prosecdef
  AND NOT coalesce(p.proconfig @> ARRAY['search_path=pg_catalog, coffer, pg_temp'], false);
SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
WHERE p.pronamespace = 'coffer'::regnamespace AND l.lanname = 'plpgsql' AND p.proconfig IS NULL;
SELECT has_schema_privilege('regress_admin', 'coffer', 'CREATE');

-- The registry is the admin's, whoever owns the table.
CREATE TABLE mine (t int, id int PRIMARY KEY);
SET ROLE regress_operator;
SELECT * FROM coffer.add_table('mine', 't');
SELECT * FROM coffer.discover('t');
SELECT coffer.restore_point('by the operator') IS NOT NULL AS named;
SET ROLE regress_auditor;
SELECT coffer.restore_point('by the auditor');
SELECT count(*) FROM coffer.coverage WHERE relation = 'mine'::regclass;
SELECT count(*) > 0 AS some FROM coffer.doctor();
SELECT mac_key FROM coffer.secret;
SELECT coffer._marker('restore_point', 'x');
SELECT coffer._agent_tenant('1', '00000000-0000-0000-0000-000000000001', 'normal');
SET ROLE regress_admin;
SELECT strategy FROM coffer.add_table('mine', 't');
SELECT coffer._agent_progress('0/1', now(), 'not me');
INSERT INTO coffer.exclusions (relid, reason) VALUES ('mine'::regclass, 'x');
DELETE FROM coffer.audit_entries;
SET ROLE regress_nobody;
SELECT count(*) FROM coffer.coverage;
SELECT coffer._strategy_name(1::int2);
RESET ROLE;

-- A table of one's own in front does not get into a function that runs with its owner's rights.
SET ROLE regress_admin;
CREATE TEMP TABLE pg_class (oid oid, relname name, relkind "char");
CREATE TEMP TABLE rules (relid oid);
SELECT strategy FROM coffer.add_table('mine', 't');
DROP TABLE pg_temp.pg_class, pg_temp.rules;
RESET ROLE;

-- The trigger runs for whoever deletes.
GRANT ALL ON mine TO regress_nobody;
SET ROLE regress_nobody;
INSERT INTO mine VALUES (1, 1);
UPDATE mine SET t = 2;
DELETE FROM mine;
RESET ROLE;
-- What pg_dump leaves to the extension.
SELECT count(*) FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e' AND classid = 'pg_event_trigger'::regclass;

SELECT strategy FROM coffer.remove_table('mine');
DROP TABLE mine;
DROP OWNED BY regress_agent;
DROP ROLE regress_admin, regress_operator, regress_auditor, regress_nobody, regress_agent;
-- The extension goes and comes again; the cluster's roles were there already.
DROP EXTENSION pg_coffer;
CREATE EXTENSION pg_coffer;
DROP EXTENSION pg_coffer;
