-- Roles of tenants: which they are, and what brings one back. Roles belong to the cluster, so no trigger tells of them:
-- the agent reads this from time to time.

-- By OID, so that a role keeps its tenant when it is renamed; a role that was dropped is none.
CREATE TABLE coffer.tenant_role_entries (
    roleid    oid PRIMARY KEY,
    tenant    text NOT NULL,
    added_at  timestamptz NOT NULL DEFAULT now(),
    added_by  text NOT NULL DEFAULT session_user
);

CREATE FUNCTION coffer._add_role(of_role name, of_tenant text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    r  record;
BEGIN
    SELECT * INTO r FROM pg_roles a WHERE a.rolname = of_role;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'role % does not exist', coalesce(quote_ident(of_role), 'NULL') USING ERRCODE = 'undefined_object',
            HINT = 'CREATE ROLE first.';
    END IF;
    IF r.oid < 16384 OR of_role IN ('coffer_admin', 'coffer_operator', 'coffer_auditor') THEN
        RAISE EXCEPTION 'role % cannot belong to a tenant', quote_ident(of_role) USING ERRCODE = 'wrong_object_type',
            HINT = 'It is there in every cluster.';
    END IF;
    IF of_tenant IS NULL THEN
        RAISE EXCEPTION 'no tenant given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    INSERT INTO coffer.tenant_role_entries AS e (roleid, tenant) VALUES (r.oid, of_tenant)
    ON CONFLICT (roleid) DO UPDATE SET tenant = excluded.tenant, added_at = excluded.added_at, added_by = excluded.added_by;
    PERFORM coffer._mark('roles', json_build_object('role', of_role));
    PERFORM coffer._audit('add_role', quote_ident(of_role), jsonb_build_object('tenant', of_tenant));
END $$;
CREATE FUNCTION coffer.add_role(role name, tenant text) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._add_role($1, $2) $$;
COMMENT ON FUNCTION coffer.add_role IS
'Says that a role belongs to a tenant: its attributes, memberships, settings and grants are archived with the tenant, without its password unless the agent is told to keep it. A role belongs to one tenant; calling it again moves it.';

CREATE FUNCTION coffer.remove_role(role name) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    DELETE FROM coffer.tenant_role_entries e USING pg_roles a WHERE a.oid = e.roleid AND a.rolname = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'role % belongs to no tenant', coalesce(quote_ident($1), 'NULL') USING ERRCODE = 'undefined_object',
            HINT = 'See coffer.tenant_roles.';
    END IF;
    PERFORM coffer._mark('roles', json_build_object('role', $1));
    PERFORM coffer._audit('remove_role', quote_ident($1));
END $$;
COMMENT ON FUNCTION coffer.remove_role IS
'Ends what coffer.add_role() said. The role itself stays, and what is archived of it stays restorable.';

CREATE VIEW coffer.tenant_roles AS
SELECT a.rolname AS role, e.tenant, a.rolcanlogin AS can_login, e.added_at, e.added_by
FROM coffer.tenant_role_entries e JOIN pg_catalog.pg_roles a ON a.oid = e.roleid;
COMMENT ON VIEW coffer.tenant_roles IS 'The roles that belong to tenants.';

-- ALTER ... SET takes a list as several values, every other value as one.
CREATE FUNCTION coffer._agent_setting(config text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT format('%s TO %s', (SELECT string_agg(quote_ident(p), '.' ORDER BY n) FROM unnest(string_to_array(c.name, '.')) WITH ORDINALITY u (p, n)),
        CASE WHEN lower(c.name) IN ('local_preload_libraries', 'search_path', 'session_preload_libraries', 'shared_preload_libraries',
                                    'temp_tablespaces', 'unix_socket_directories', 'output_plugin_libraries')
             THEN coalesce((SELECT string_agg(quote_literal(coalesce(replace(m.part[1], '""', '"'), m.part[2])), ', ' ORDER BY m.n)
                            FROM regexp_matches(c.value, '"((?:[^"]|"")*)"|([^,"\s]+)', 'g') WITH ORDINALITY m (part, n)), '''''')
             ELSE quote_literal(c.value) END)
    FROM (SELECT split_part(config, '=', 1), substr(config, strpos(config, '=') + 1)) c (name, value)
$$;

-- Every grant to somebody on something of this database (but of the extension) or of the cluster.
CREATE FUNCTION coffer._grants() RETURNS TABLE (grantee oid, privilege text, grantable bool, kind text, object text)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH object (kind, name, acl, attribute) AS (
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, format('%I.%I', n.nspname, c.relname), c.relacl, NULL::name
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname <> 'coffer'
        UNION ALL
        SELECT 'TABLE', format('%I.%I', n.nspname, c.relname), a.attacl, a.attname
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE a.attacl IS NOT NULL AND NOT a.attisdropped AND n.nspname <> 'coffer'
        UNION ALL
        SELECT 'SCHEMA', format('%I', n.nspname), n.nspacl, NULL FROM pg_namespace n WHERE n.nspname <> 'coffer'
        UNION ALL
        SELECT CASE p.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END,
               format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)), p.proacl, NULL
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.proacl IS NOT NULL AND n.nspname <> 'coffer'
        UNION ALL
        SELECT 'TYPE', format('%I.%I', n.nspname, t.typname), t.typacl, NULL
        FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.typacl IS NOT NULL AND n.nspname <> 'coffer'
        UNION ALL
        SELECT 'LANGUAGE', format('%I', l.lanname), l.lanacl, NULL FROM pg_language l
        UNION ALL
        SELECT 'FOREIGN DATA WRAPPER', format('%I', w.fdwname), w.fdwacl, NULL FROM pg_foreign_data_wrapper w
        UNION ALL
        SELECT 'FOREIGN SERVER', format('%I', s.srvname), s.srvacl, NULL FROM pg_foreign_server s
        UNION ALL
        SELECT 'DATABASE', NULL, d.datacl, NULL FROM pg_database d WHERE d.datname = current_database()
        UNION ALL
        SELECT 'TABLESPACE', format('%I', s.spcname), s.spcacl, NULL FROM pg_tablespace s
        UNION ALL
        SELECT 'PARAMETER', (SELECT string_agg(quote_ident(u.p), '.' ORDER BY u.n) FROM unnest(string_to_array(p.parname, '.')) WITH ORDINALITY u (p, n)),
               p.paracl, NULL
        FROM pg_parameter_acl p
    )
    SELECT x.grantee, string_agg(concat(x.privilege_type, format(' (%I)', o.attribute)), ', ' ORDER BY x.privilege_type, o.attribute)
               FILTER (WHERE o.attribute IS NOT NULL), x.is_grantable, o.kind, o.name
    FROM object o CROSS JOIN LATERAL aclexplode(o.acl) x WHERE o.attribute IS NOT NULL GROUP BY 1, 3, 4, 5
    UNION ALL
    SELECT x.grantee, string_agg(x.privilege_type, ', ' ORDER BY x.privilege_type), x.is_grantable, o.kind, o.name
    FROM object o CROSS JOIN LATERAL aclexplode(o.acl) x WHERE o.attribute IS NULL GROUP BY 1, 3, 4, 5
$$;

-- What brings the roles of tenants back. A statement with a tail has the database's name between the two. Those of stage
-- `role` need no object, those of stage `grant` do. A role that exists is altered, none is dropped, no password is said.
CREATE FUNCTION coffer._agent_roles() RETURNS TABLE (tenant text, role name, stage text, statement text, tail text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH ours AS (
        SELECT e.tenant, a.* FROM coffer.tenant_role_entries e JOIN pg_roles a ON a.oid = e.roleid
    ), this (db) AS (
        SELECT d.oid FROM pg_database d WHERE d.datname = current_database()
    ), said (tenant, role, place, statement, tail) AS (
        SELECT o.tenant, o.rolname, 1, format('DO %L', format('BEGIN IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = %L) THEN CREATE ROLE %I; END IF; END',
                   o.rolname, o.rolname)), NULL
        FROM ours o
        UNION ALL
        SELECT o.tenant, o.rolname, 2, format('ALTER ROLE %I WITH %s %s %s %s CONNECTION LIMIT %s%s', o.rolname,
                   CASE WHEN o.rolinherit THEN 'INHERIT' ELSE 'NOINHERIT' END, CASE WHEN o.rolcreaterole THEN 'CREATEROLE' ELSE 'NOCREATEROLE' END,
                   CASE WHEN o.rolcreatedb THEN 'CREATEDB' ELSE 'NOCREATEDB' END, CASE WHEN o.rolcanlogin THEN 'LOGIN' ELSE 'NOLOGIN' END,
                   o.rolconnlimit, ' VALID UNTIL ' || quote_literal(o.rolvaliduntil)), NULL
        FROM ours o
        UNION ALL
        SELECT o.tenant, o.rolname, 3, format('DO %L', format(
                   'BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = %L AND rolvaliduntil < %L) THEN ALTER ROLE %I VALID UNTIL %L; END IF; END',
                   o.rolname, 'infinity', o.rolname, 'infinity')), NULL
        FROM ours o WHERE o.rolvaliduntil IS NULL
        UNION ALL
        -- Who restores may lack the right to say even that nothing is to change.
        SELECT o.tenant, o.rolname, 3, format('DO %L', format(
                   'BEGIN IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = %L AND rolsuper = %L AND rolreplication = %L AND rolbypassrls = %L) THEN ALTER ROLE %I WITH %s %s %s; END IF; END',
                   o.rolname, o.rolsuper, o.rolreplication, o.rolbypassrls, o.rolname, CASE WHEN o.rolsuper THEN 'SUPERUSER' ELSE 'NOSUPERUSER' END,
                   CASE WHEN o.rolreplication THEN 'REPLICATION' ELSE 'NOREPLICATION' END, CASE WHEN o.rolbypassrls THEN 'BYPASSRLS' ELSE 'NOBYPASSRLS' END)), NULL
        FROM ours o
        UNION ALL
        SELECT o.tenant, o.rolname, 4, format('COMMENT ON ROLE %I IS %L', o.rolname, shobj_description(o.oid, 'pg_authid')), NULL
        FROM ours o WHERE shobj_description(o.oid, 'pg_authid') IS NOT NULL
        UNION ALL
        -- Both ways, by name; INHERIT and SET of a membership (16 and later) where they are not what a plain GRANT gives.
        SELECT o.tenant, min(o.rolname), 5, format('GRANT %I TO %I%s', g.rolname, u.rolname, ' WITH ' || nullif(concat_ws(', ',
                   CASE WHEN bool_or(m.admin_option) THEN 'ADMIN OPTION' END,
                   CASE WHEN NOT bool_or(coalesce((to_jsonb(m) ->> 'inherit_option')::bool, u.rolinherit)) AND u.rolinherit THEN 'INHERIT FALSE' END,
                   CASE WHEN NOT bool_or(coalesce((to_jsonb(m) ->> 'set_option')::bool, true)) THEN 'SET FALSE' END), '')), NULL
        FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid JOIN pg_roles u ON u.oid = m.member
        JOIN ours o ON o.oid IN (m.roleid, m.member)
        GROUP BY o.tenant, g.rolname, u.rolname, u.rolinherit
        UNION ALL
        SELECT o.tenant, o.rolname, 6, CASE s.setdatabase WHEN 0 THEN format('ALTER ROLE %I SET %s', o.rolname, coffer._agent_setting(c.config))
                   ELSE format('ALTER ROLE %I IN DATABASE ', o.rolname) END, CASE WHEN s.setdatabase <> 0 THEN ' SET ' || coffer._agent_setting(c.config) END
        FROM ours o JOIN pg_db_role_setting s ON s.setrole = o.oid CROSS JOIN unnest(s.setconfig) c (config)
        WHERE s.setdatabase IN (0, (SELECT db FROM this))
        UNION ALL
        SELECT DISTINCT o.tenant, NULL::name, 7, 'ALTER DATABASE ', ' SET ' || coffer._agent_setting(c.config)
        FROM ours o CROSS JOIN pg_db_role_setting s CROSS JOIN unnest(s.setconfig) c (config)
        WHERE s.setrole = 0 AND s.setdatabase = (SELECT db FROM this)
        UNION ALL
        SELECT o.tenant, o.rolname, 8, format('GRANT %s ON %s %s', g.privilege, g.kind, g.object),
               format('%sTO %I%s', CASE WHEN g.object IS NULL THEN ' ' END, o.rolname, CASE WHEN g.grantable THEN ' WITH GRANT OPTION' END)
        FROM ours o JOIN coffer._grants() g ON g.grantee = o.oid
        UNION ALL
        SELECT o.tenant, o.rolname, 9, format('ALTER DEFAULT PRIVILEGES FOR ROLE %I%s GRANT %s ON %s TO %I%s', b.rolname, ' IN SCHEMA ' || quote_ident(n.nspname),
                   string_agg(x.privilege_type, ', ' ORDER BY x.privilege_type),
                   CASE d.defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS' WHEN 'T' THEN 'TYPES' WHEN 'n' THEN 'SCHEMAS' ELSE 'LARGE OBJECTS' END,
                   o.rolname, CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' END), NULL
        FROM pg_default_acl d JOIN pg_roles b ON b.oid = d.defaclrole LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace
        CROSS JOIN LATERAL aclexplode(d.defaclacl) x JOIN ours o ON o.oid = x.grantee
        GROUP BY o.tenant, o.rolname, b.rolname, n.nspname, d.defaclobjtype, x.is_grantable
    )
    SELECT s.tenant, s.role, CASE WHEN s.place < 8 THEN 'role' ELSE 'grant' END,
           -- Only a grant on the database itself has its name between the two.
           CASE WHEN s.place = 8 AND NOT starts_with(s.tail, ' ') THEN concat(s.statement, ' ', s.tail) ELSE s.statement END,
           CASE WHEN s.place = 8 AND NOT starts_with(s.tail, ' ') THEN NULL ELSE s.tail END
    FROM said s ORDER BY s.tenant COLLATE "C", s.place, s.role COLLATE "C", s.statement COLLATE "C", s.tail COLLATE "C"
$$;
COMMENT ON FUNCTION coffer._agent_roles() IS
'The statements that bring the roles of tenants back, in their order, without passwords.';
