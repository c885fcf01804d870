-- What the agent calls. Granted to its role by setup_agent, to nobody else.

CREATE FUNCTION coffer._agent_rules()
RETURNS TABLE (relid oid, schema text, name text, strategy int2, class int2, tenant_column text, registered_xid xid8,
               key_columns text[], tenant text, kind "char", is_partitioned bool, tenant_expression text, parents text[])
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT c.oid, n.nspname::text, c.relname::text, r.strategy, r.class, r.tenant_column::text, r.registered_xid,
           r.key_columns, NULL::text, c.relkind, c.relkind = 'p',
           CASE WHEN r.strategy IN (2, 3) THEN coffer._tenant_expression(r.relid, 't') END,
           ARRAY(SELECT coffer._from(a.relid) FROM coffer._ancestors(r.relid) a ORDER BY a.depth DESC)
    FROM coffer.rules r JOIN pg_class c ON c.oid = r.relid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relpersistence = 'p'
    UNION ALL
    SELECT c.oid, n.nspname::text, c.relname::text, 5::int2, s.class, NULL, greatest(s.registered_xid, m.registered_xid),
           (SELECT k.sorted::text[] FROM coffer._keys(c.oid) k
            WHERE k.index_oid = CASE WHEN m.own_identity = 'f' THEN 0 ELSE m.key_index END),
           s.tenant, c.relkind, c.relkind = 'p', NULL, '{}'
    FROM coffer._schema_rules s
    JOIN pg_namespace n ON n.oid = s.nspid
    CROSS JOIN LATERAL coffer._schema_tables(s.nspid) t (oid)
    JOIN pg_class c ON c.oid = t.oid
    LEFT JOIN coffer.rule_relations m ON m.relid = c.oid
    ORDER BY 1
$$;
COMMENT ON FUNCTION coffer._agent_rules() IS
'Every covered table (roots of partition trees). key_columns are in the order of their attribute numbers, as in the stream; NULL: the row as a whole. tenant_expression: whose a row t is, where no column of it says so; it reads parents, which are to be locked with the table, the topmost first.';

CREATE FUNCTION coffer._agent_condition(rel regclass, tenant text) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._tenant_condition(rel, 't', tenant) $$;
COMMENT ON FUNCTION coffer._agent_condition(regclass, text) IS
'A condition for the tenant''s rows t of a table whose tenant stands elsewhere; NULL: it can have none.';

CREATE FUNCTION coffer._agent_base_marker(id bytea) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    IF octet_length(id) IS DISTINCT FROM 16 THEN
        RAISE EXCEPTION 'the id of a base has 16 bytes' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM coffer._marker('base', id);
END $$;

CREATE FUNCTION coffer._agent_progress(durable_lsn pg_lsn, durable_time timestamptz, agent text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    INSERT INTO coffer.agent_state AS s (agent, durable_lsn, durable_time, reported_at) VALUES ($3, $1, $2, clock_timestamp())
    ON CONFLICT (one) DO UPDATE SET agent = excluded.agent, durable_lsn = excluded.durable_lsn,
        durable_time = excluded.durable_time, reported_at = excluded.reported_at;
    PERFORM pg_notify('coffer_durable', $1::text);
END $$;

CREATE FUNCTION coffer._agent_waiting() RETURNS bool
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 6516583 AND l.objid = 0 AND l.objsubid = 2
                   AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))
$$;
COMMENT ON FUNCTION coffer._agent_waiting() IS 'Whether somebody is in coffer.wait_durable() now.';

CREATE FUNCTION coffer._agent_tenant(key text, uid uuid, kind text) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    INSERT INTO coffer.tenant_entries AS t (tenant, uid, kind) VALUES ($1, $2, $3)
    ON CONFLICT (uid) DO UPDATE SET tenant = excluded.tenant, kind = excluded.kind, last_seen = now()
$$;

-- In-place restore holds off the writers of one tenant: each of their rows waits here while the restore holds the lock
-- exclusively. The lock's number is the hash of the tenant's key (the reserved tenant without a key: of the empty text).
CREATE FUNCTION coffer._fence() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(6516582, hashtext(TG_ARGV[0]));
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

-- The same for a table whose rows do not say whose they are, or say it in a text that the writer's settings decide: asked for
-- each row, under settings of our own.
CREATE FUNCTION coffer._fence_path() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp SET datestyle = 'ISO, MDY' SET timezone = 'UTC'
SET intervalstyle = postgres SET extra_float_digits = 3 SET bytea_output = hex SET lc_monetary = 'C'
AS $$
DECLARE
    root   oid := coffer._root(TG_RELID);
    asks   text := format('SELECT %s IS NOT DISTINCT FROM $2 FROM (SELECT ($1::%s).*) t', coffer._tenant_expression(root, 't'), TG_RELID::regclass);
    ours   bool := false;
    other  bool;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        EXECUTE asks INTO ours USING OLD, nullif(TG_ARGV[0], '');
    END IF;
    IF TG_OP <> 'DELETE' AND NOT ours THEN
        IF (SELECT r.strategy = 3 FROM coffer.rules r WHERE r.relid = root) THEN
            ours := nullif(current_setting('coffer.tenant', true), '') IS NOT DISTINCT FROM nullif(TG_ARGV[0], '');
        ELSE
            EXECUTE asks INTO ours USING NEW, nullif(TG_ARGV[0], '');
        END IF;
    END IF;
    IF ours THEN
        PERFORM pg_advisory_xact_lock_shared(6516582, hashtext(TG_ARGV[0]));
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

-- event: ins, upd or del; NULL: all of them.
CREATE FUNCTION coffer._agent_fence(rel regclass, tenant_column name, tenant text, event text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    in_old  text := format('%s IS NOT DISTINCT FROM %L', coffer._column_text('OLD', rel, tenant_column), tenant);
    in_new  text := format('%s IS NOT DISTINCT FROM %L', coffer._column_text('NEW', rel, tenant_column), tenant);
    is_old  text := format('WHEN (%s)', in_old);
    is_new  text := format('WHEN (%s)', in_new);
    either  text := format('WHEN (%s OR %s)', in_old, in_new);
    calls   text := '_fence';
    f       record;
BEGIN
    IF tenant_column IS NULL AND EXISTS (SELECT FROM coffer._schema_rules s JOIN pg_class c ON c.relnamespace = s.nspid
                                         WHERE c.oid = rel AND s.tenant = $3) THEN
        -- Every row of a tenant's schema is the tenant's.
        is_old := ''; is_new := ''; either := '';
    ELSIF tenant_column IS NULL AND EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel AND r.strategy IN (2, 3)) THEN
        is_old := ''; is_new := ''; either := ''; calls := '_fence_path';
    ELSIF NOT EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel AND r.tenant_column = $2) THEN
        RAISE EXCEPTION '% is not covered by column %', rel, quote_ident(tenant_column) USING ERRCODE = 'undefined_object';
    ELSIF NOT (SELECT coffer._is_fixed(a.atttypid) FROM pg_attribute a WHERE a.attrelid = rel AND a.attname = $2) THEN
        is_old := ''; is_new := ''; either := ''; calls := '_fence_path';
    END IF;
    FOR f IN
        SELECT * FROM (VALUES ('ins', 'INSERT', is_new), ('upd', 'UPDATE', either), ('del', 'DELETE', is_old)) v (suffix, command, condition)
        WHERE v.suffix = coalesce($4, v.suffix)
    LOOP
        PERFORM coffer._ddl(format('CREATE TRIGGER aaa_coffer_fence_%s BEFORE %s ON %s FOR EACH ROW %s EXECUTE FUNCTION coffer.%s(%L)',
                       f.suffix, f.command, rel, f.condition, calls, coalesce(tenant, '')));
    END LOOP;
END $$;

CREATE FUNCTION coffer._agent_unfence(rel regclass, event text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    suffix  text;
BEGIN
    FOREACH suffix IN ARRAY ARRAY['ins', 'upd', 'del'] LOOP
        CONTINUE WHEN suffix <> event;
        PERFORM coffer._ddl(format('DROP TRIGGER IF EXISTS aaa_coffer_fence_%s ON %s', suffix, rel));
    END LOOP;
END $$;

-- A restore in place writes without firing the application's triggers, and gives way to clients at once; both last
-- until the caller's transaction ends.
CREATE FUNCTION coffer._agent_restore_settings(tenant text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    -- What comes back to a table under the strategy `session` is this tenant's.
    PERFORM set_config('coffer.tenant', coalesce($1, ''), true);
    PERFORM set_config('session_replication_role', 'replica', true), set_config('deadlock_timeout', '5ms', true);
    RETURN true;
END $$;

-- Part of a restore's own transaction: its position in the log is what an undo goes back before. The tenant is named by
-- its uid alone; relids are the tables that the restore changed, rows says that it was of single rows.
CREATE FUNCTION coffer._agent_restore_marker(id uuid, tenant uuid, relids oid[], rows bool) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM coffer._mark('restore', json_build_object('id', $1, 'tenant', $2, 'relids', $3::int8[], 'rows', $4));
END $$;

-- Runs a statement with the caller's rights; where they do not suffice, says what to run.
CREATE FUNCTION coffer._try(statement text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    EXECUTE statement;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'you may not run: %', statement USING HINT = 'Have a superuser run it.', DETAIL = SQLERRM;
END $$;

-- What only the extension's owner can give.
CREATE FUNCTION coffer._setup_agent(role name) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    f  regprocedure;
BEGIN
    EXECUTE format('GRANT coffer_auditor TO %I', $1);
    FOR f IN
        SELECT p.oid::regprocedure FROM pg_proc p
        WHERE p.pronamespace = 'coffer'::regnamespace AND starts_with(p.proname, '_agent_') ORDER BY 1
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', f, $1);
    END LOOP;
    PERFORM coffer._audit('setup_agent', quote_ident($1));
END $$;

CREATE FUNCTION coffer.setup_agent(role name) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    r  record;
BEGIN
    SELECT * INTO r FROM pg_roles a WHERE a.rolname = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'role % does not exist', coalesce(quote_ident($1), 'NULL') USING ERRCODE = 'undefined_object',
            HINT = 'CREATE ROLE ... LOGIN first.';
    END IF;
    IF NOT r.rolcanlogin THEN
        RAISE WARNING 'role % cannot log in', quote_ident($1) USING HINT = format('ALTER ROLE %I LOGIN', $1);
    END IF;
    PERFORM coffer._setup_agent($1);

    -- To replicate; to read, for bases and checks; to write, for restores in place; no row security in the way of either.
    IF NOT r.rolsuper AND NOT (r.rolreplication AND r.rolbypassrls) THEN
        PERFORM coffer._try(format('ALTER ROLE %I REPLICATION BYPASSRLS', $1));
    END IF;
    PERFORM coffer._try(format('GRANT pg_read_all_data, pg_write_all_data TO %I', $1));
    PERFORM coffer._try(format('GRANT CREATE ON DATABASE %I TO %I', current_database(), $1));
    PERFORM coffer._try(format('GRANT SET ON PARAMETER session_replication_role TO %I', $1));
    -- Minors from August 2026 on load only output plugins that are listed; older ones do not know the setting.
    IF EXISTS (SELECT FROM pg_settings s WHERE s.name = 'output_plugin_libraries') THEN
        PERFORM coffer._try(format('ALTER ROLE %I SET output_plugin_libraries = pgoutput, test_decoding, pg_coffer', $1));
    END IF;
END $$;
COMMENT ON FUNCTION coffer.setup_agent IS
'Gives an existing role what the agent needs: to read and write every table, to replicate, to bypass row security, to load the output plugin, to create schemas for restores, and the agent''s own functions. Call it as a superuser; what you may not give is said in warnings, with the statement.';
