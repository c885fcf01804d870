-- Small shared functions: names of strategies and classes, partition trees, the log's markers, the audit trail.

CREATE FUNCTION coffer._strategy_name(strategy int2) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (ARRAY['identity', 'tag', 'path', 'session', 'full_row', 'schema', 'shared'])[strategy + 1];

CREATE FUNCTION coffer._class_name(class int2) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (ARRAY['data', 'config', 'accounts', 'customization', 'audit'])[class + 1];

CREATE FUNCTION coffer._class_number(class text) RETURNS int2
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    n int := array_position(ARRAY['data', 'config', 'accounts', 'customization', 'audit'], class);
BEGIN
    IF n IS NULL THEN
        RAISE EXCEPTION 'unknown class %', coalesce(quote_literal(class), 'NULL')
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'The classes are data, config, accounts, customization and audit.';
    END IF;
    RETURN n - 1;
END $$;

-- The rules of schemas that are followed, by the OIDs that the schemas have. In the cluster where a rule was written its schema is
-- the one with the OID and the name that were noted; behind pg_upgrade, the one of the name. In a schema that has only the one or
-- only the other, nobody knows whose the rows are: the output plugin, which follows the rules in the same way, calls them unresolved.
CREATE VIEW coffer._schema_rules AS
SELECT n.oid AS nspid, s.class, s.tenant, s.registered_xid, s.registered_at, s.nspid AS noted
FROM coffer.schema_rules s JOIN pg_catalog.pg_namespace n ON n.nspname = s.schema
WHERE n.oid = s.nspid OR s.system_id <> coffer._system_id();
COMMENT ON VIEW coffer._schema_rules IS 'The rules of schemas that are in force, for the extension itself.';

-- Behind pg_upgrade: notes the OIDs that the schemas have by now, so that they can be renamed and dropped.
CREATE FUNCTION coffer._adopt_schemas() RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    before  coffer.schema_rules[];
BEGIN
    IF NOT EXISTS (SELECT FROM coffer.schema_rules s WHERE s.system_id <> coffer._system_id()) THEN
        RETURN;
    END IF;
    LOCK TABLE coffer.schema_rules IN SHARE ROW EXCLUSIVE MODE;
    -- All go before the first comes back: two schemas may have changed their OIDs with each other.
    before := ARRAY(SELECT s FROM coffer.schema_rules s WHERE s.system_id <> coffer._system_id());
    DELETE FROM coffer.schema_rules s WHERE s.system_id <> coffer._system_id();
    INSERT INTO coffer.schema_rules (nspid, class, tenant, registered_xid, registered_at, schema, system_id)
    SELECT n.oid, b.class, b.tenant, b.registered_xid, b.registered_at, b.schema, coffer._system_id()
    FROM unnest(before) b JOIN pg_namespace n ON n.nspname = b.schema;
    PERFORM coffer._invalidate(c.oid) FROM coffer.schema_rules s JOIN pg_class c ON c.relnamespace = s.nspid WHERE c.relkind IN ('r', 'p');
    PERFORM coffer._audit('adopt_schemas', NULL, (SELECT jsonb_agg(b.schema) FROM unnest(before) b));
END $$;

-- The table whose rule governs a relation: the root of its partition tree, or itself.
CREATE FUNCTION coffer._root(rel oid) RETURNS oid
LANGUAGE sql STABLE
RETURN coalesce(pg_catalog.pg_partition_root(rel::regclass)::oid, rel);

-- A table with all its partitions, the root first.
CREATE FUNCTION coffer._tree(root oid) RETURNS TABLE (relid oid, relkind "char")
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = root
    UNION ALL
    SELECT c.oid, c.relkind FROM pg_partition_tree(root::regclass) t JOIN pg_class c ON c.oid = t.relid
    WHERE t.level > 0
$$;

-- Puts a marker for the agent into the log, in the caller's transaction.
CREATE FUNCTION coffer._mark(kind text, payload json) RETURNS pg_lsn
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$ BEGIN RETURN coffer._marker(kind, convert_to(payload::text, 'UTF8')); END $$;

-- Whether a table has no row and nobody else can be writing one: then everything that it will ever hold is in the log.
CREATE FUNCTION coffer._is_fresh(root oid) RETURNS bool
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    empty  bool;
BEGIN
    -- An older snapshot could miss rows; a weaker lock lets others write.
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted')
       OR EXISTS (SELECT FROM coffer._tree(root) t WHERE t.relkind = 'r' AND NOT EXISTS (
              SELECT FROM pg_locks l WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.relation = t.relid AND l.granted
              AND l.mode IN ('ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))) THEN
        RETURN false;
    END IF;
    EXECUTE format('SELECT NOT EXISTS (SELECT FROM %s%s)', CASE (SELECT relkind FROM pg_class WHERE oid = root) WHEN 'p' THEN '' ELSE 'ONLY ' END,
                   root::regclass) INTO empty;
    RETURN empty;
END $$;

-- A table's rule changed: decoding sessions forget what they cached, the agent hears of it. `rebase`: what is archived of
-- the table so far does not continue into what follows; `fresh`: there is nothing to be continued, the table is empty.
CREATE FUNCTION coffer._changed(root oid, action text, rebase bool DEFAULT false, fresh bool DEFAULT false, comes_back bool DEFAULT false) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM coffer._invalidate(t.relid) FROM coffer._tree(root) t;
    -- What sessions know of a parent says which tables are below it.
    PERFORM coffer._invalidate(c.oid) FROM coffer.rules r JOIN pg_class c ON c.oid = r.parent WHERE r.relid = root;
    IF NOT comes_back AND (SELECT c.relpersistence = 'u' FROM pg_class c WHERE c.oid = root) THEN
        -- Its rule waits for it to come back into the log; a base would be waited for in vain.
        action := 'remove'; rebase := false; fresh := false;
    END IF;
    PERFORM coffer._mark('registry', json_strip_nulls(json_build_object('relid', root::int8, 'action', action, 'rebase', rebase,
        'fresh', nullif(fresh, false),
        'name', CASE WHEN fresh THEN (SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                                      WHERE c.oid = root) END,
        -- Only this tenant is concerned by what happens to the table.
        'tenant', (SELECT s.tenant FROM pg_class c JOIN coffer._schema_rules s ON s.nspid = c.relnamespace
                   WHERE c.oid = root AND NOT EXISTS (SELECT FROM coffer.rules r WHERE r.relid = root)))));
    IF fresh THEN
        -- No base follows, which would bring its definitions.
        PERFORM coffer._mark('ddl', json_build_object('tag', action, 'objects', ARRAY[root::int8], 'relations', (
            SELECT array_agg(t.relid::int8) FROM coffer._tree(root) t)));
    END IF;
END $$;

-- While the extension itself runs DDL, the setting coffer.at_work holds this word and its event triggers look away. Nobody
-- who cannot read the key can make it up, and it is gone before anybody else's code runs.
CREATE FUNCTION coffer._password() RETURNS text
LANGUAGE sql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT encode(sha256(s.mac_key || convert_to(concat_ws(':', pg_backend_pid(), pg_current_xact_id()), 'UTF8')), 'hex')
    FROM coffer.secret s
$$;

CREATE FUNCTION coffer._at_work() RETURNS bool
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    RETURN coalesce(current_setting('coffer.at_work', true), '') <> '' AND current_setting('coffer.at_work') = coffer._password();
END $$;

-- Runs a DDL of the extension's own.
CREATE FUNCTION coffer._ddl(statement text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM set_config('coffer.at_work', coffer._password(), true);
    EXECUTE statement;
    PERFORM set_config('coffer.at_work', '', true);
END $$;

CREATE FUNCTION coffer._audit(action text, object text, detail jsonb DEFAULT '{}') RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    INSERT INTO coffer.audit_entries (actor, client_addr, application_name, action, object, detail)
    VALUES (session_user, inet_client_addr(), current_setting('application_name'), action, object, detail)
$$;

CREATE FUNCTION coffer._audit_is_append_only() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only' USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON coffer.audit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION coffer._audit_is_append_only();
ALTER TABLE coffer.audit_entries ENABLE ALWAYS TRIGGER append_only;
