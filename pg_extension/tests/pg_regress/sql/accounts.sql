-- Roles of tenants.
\set SHOW_CONTEXT never
CREATE ROLE regress_clerk LOGIN; CREATE ROLE "regress boss" NOLOGIN CREATEDB CONNECTION LIMIT 2 VALID UNTIL '2031-02-03 UTC';
SELECT coffer.add_role('regress_clerk', '7');
SELECT coffer.add_role('regress boss', '8');
SELECT coffer.add_role('regress boss', '7');
SELECT role, tenant, can_login FROM coffer.tenant_roles ORDER BY role;
SELECT coffer.add_role('regress_absent', '7');
SELECT coffer.add_role(NULL, '7');
SELECT coffer.add_role('pg_monitor', '7');
SELECT coffer.add_role('coffer_admin', '7');
SELECT coffer.add_role('regress_clerk', NULL);
-- What brings them back.
SET timezone = 'UTC'; SET datestyle = 'ISO';
CREATE TABLE public.regress_t (id int PRIMARY KEY, "a b" text);
GRANT SELECT, INSERT ON public.regress_t TO regress_clerk;
GRANT UPDATE (id, "a b") ON public.regress_t TO regress_clerk WITH GRANT OPTION;
CREATE FUNCTION public.regress_f(int, text[]) RETURNS int LANGUAGE sql AS 'SELECT 1';
GRANT EXECUTE ON FUNCTION public.regress_f TO "regress boss";
GRANT "regress boss" TO regress_clerk WITH ADMIN OPTION;
ALTER ROLE regress_clerk SET search_path = "$user", "a,b", "c""d", public;
ALTER ROLE regress_clerk SET "regress.own" = 'it''s a \ value';
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO "regress boss";
SELECT role, stage, statement, tail FROM coffer._agent_roles() WHERE tenant = '7' AND statement <> 'ALTER DATABASE ';
-- They stay their tenant's under another name, and are gone when they are dropped.
ALTER ROLE "regress boss" RENAME TO regress_boss;
SELECT role, tenant FROM coffer.tenant_roles ORDER BY role;
SELECT coffer.remove_role('regress_clerk');
SELECT coffer.remove_role('regress_clerk');
DROP TABLE public.regress_t; DROP FUNCTION public.regress_f;
DROP OWNED BY regress_boss; DROP OWNED BY regress_clerk; DROP ROLE regress_boss, regress_clerk;
SELECT role, tenant FROM coffer.tenant_roles;
SELECT count(*) FROM coffer._agent_roles();
SELECT action, object, detail FROM coffer.audit_log WHERE action LIKE '%\_role' ORDER BY entry;
