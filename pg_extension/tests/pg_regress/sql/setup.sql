-- The extension and what it offers.
CREATE EXTENSION pg_coffer;
\set SHOW_CONTEXT never
SET client_min_messages = warning;
-- Public functions, their arguments and results.
SELECT p.proname AS function, pg_get_function_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result
FROM pg_proc p WHERE p.pronamespace = 'coffer'::regnamespace AND p.proname !~ '^_' ORDER BY p.proname COLLATE "C";
-- Public views and their columns.
SELECT c.relname AS view, string_agg(a.attname, ', ' ORDER BY a.attnum) AS columns
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
WHERE c.relnamespace = 'coffer'::regnamespace AND c.relkind = 'v' GROUP BY c.oid, c.relname ORDER BY c.relname COLLATE "C";
-- Every public object has a comment.
SELECT p.oid::regprocedure FROM pg_proc p
WHERE p.pronamespace = 'coffer'::regnamespace AND p.proname !~ '^_' AND obj_description(p.oid, 'pg_proc') IS NULL;
SELECT c.oid::regclass FROM pg_class c
WHERE c.relnamespace = 'coffer'::regnamespace AND c.relkind = 'v' AND obj_description(c.oid, 'pg_class') IS NULL;
-- The columns that the output plugin reads by number.
SELECT c.relname, string_agg(format('%s %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum) FILTER (WHERE a.attnum < 8) AS first_columns,
       c.reloptions
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
WHERE c.oid IN ('coffer.rules'::regclass, 'coffer.schema_rules'::regclass, 'coffer.secret'::regclass)
GROUP BY c.oid, c.relname, c.reloptions ORDER BY c.relname COLLATE "C";
SELECT octet_length(mac_key) AS key_bytes FROM coffer.secret;
SELECT evtname, evtevent, evtenabled FROM pg_event_trigger ORDER BY evtname;
