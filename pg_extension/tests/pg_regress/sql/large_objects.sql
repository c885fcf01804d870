-- Large objects: which columns name some.
\set SHOW_CONTEXT never
SET client_min_messages = error;
CREATE DOMAIN public.regress_lo AS oid; CREATE DOMAIN public.regress_lo2 AS public.regress_lo;
CREATE TABLE public.regress_docs (tenant int, id int, body oid, "The scan" public.regress_lo2, size int, PRIMARY KEY (tenant, id));
CREATE TABLE public.regress_plain (id int PRIMARY KEY, body oid);
SELECT strategy FROM coffer.add_table('public.regress_docs', 'tenant');
-- Without large objects in the database there is nothing to say.
SELECT reason LIKE '%large objects%' FROM coffer.coverage WHERE relation = 'public.regress_docs'::regclass;
SELECT lo_from_bytea(60001, 'abc');
SELECT regexp_replace(reason, '^.*?; (?=large)', '') FROM coffer.coverage WHERE relation = 'public.regress_docs'::regclass;
SELECT check_name, ok, found, fix FROM coffer.doctor() WHERE found LIKE '%large objects%';
SELECT coffer.add_large_objects('public.regress_docs', 'body');
SELECT coffer.add_large_objects('public.regress_docs', 'body');
SELECT coffer.add_large_objects('public.regress_docs', 'The scan');
SELECT relation, column_name FROM coffer.large_objects ORDER BY 2;
SELECT relid::regclass, column_name FROM coffer._agent_large_objects() ORDER BY 2;
SELECT reason LIKE '%; the large objects of column body are kept with fulls; the large objects of column "The scan" are kept with fulls'
FROM coffer.coverage WHERE relation = 'public.regress_docs'::regclass;
SELECT count(*) FROM coffer.doctor() WHERE found LIKE '%large objects%';
-- What does not do.
SELECT coffer.add_large_objects('public.regress_plain', 'body');
SELECT coffer.add_large_objects('public.regress_docs', 'size');
SELECT coffer.add_large_objects('public.regress_docs', 'absent');
SELECT coffer.add_large_objects('public.regress_docs', NULL);
SELECT coffer.add_large_objects(NULL, 'body');
-- The end of it, and of what is dropped.
SELECT coffer.remove_large_objects('public.regress_docs', 'body');
SELECT coffer.remove_large_objects('public.regress_docs', 'body');
ALTER TABLE public.regress_docs DROP COLUMN "The scan";
SELECT count(*) FROM coffer.large_objects;
SELECT coffer.add_large_objects('public.regress_docs', 'body');
SELECT count(*) FROM coffer.remove_table('public.regress_docs');
SELECT count(*) FROM coffer.large_object_entries;
-- As the agent reads and writes them.
CREATE ROLE regress_keeper; ALTER TABLE public.regress_plain OWNER TO regress_keeper;
SELECT coffer._agent_large_object(60001, 1, 10), coffer._agent_large_object(60001, 5, 10), coffer._agent_large_object(60002, 0, 1);
BEGIN;
SELECT coffer._agent_large_object_create(60002, 'public.regress_plain');
SELECT coffer._agent_large_object_write(60002, 0, 'xyz'), coffer._agent_large_object_write(60002, 3, '!');
COMMIT;
SELECT lo_get(60002), lomowner::regrole FROM pg_largeobject_metadata WHERE oid = 60002;
SELECT coffer._agent_large_object_create(60002, 'public.regress_plain');
SELECT coffer._agent_large_object_write(60002, 0, 'never');
SELECT lo_get(60002);
SELECT coffer._agent_large_object_remove(60002), coffer._agent_large_object_remove(60002);
SELECT count(*) FROM pg_largeobject_metadata WHERE oid = 60002;
SELECT action, object, detail FROM coffer.audit_log WHERE action LIKE '%\_large\_objects' ORDER BY entry;
SELECT lo_unlink(60001);
DROP TABLE public.regress_docs, public.regress_plain; DROP DOMAIN public.regress_lo2, public.regress_lo; DROP ROLE regress_keeper;
