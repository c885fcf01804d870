-- Roles, grants, the key and the event triggers: last, when everything exists.

-- Roles are the cluster's: another database's pg_coffer may have made them.
DO $$
DECLARE
    r  text;
BEGIN
    FOREACH r IN ARRAY ARRAY['coffer_admin', 'coffer_operator', 'coffer_auditor'] LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', r);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
    END LOOP;
END $$;
GRANT coffer_auditor TO coffer_operator;
GRANT coffer_operator TO coffer_admin;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA coffer FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA coffer FROM PUBLIC;
GRANT USAGE ON SCHEMA coffer TO PUBLIC;

-- The server asks for these when it clones a trigger to a new partition, of whoever creates the partition.
GRANT EXECUTE ON FUNCTION coffer._tag(), coffer._fill(), coffer._path(), coffer._session(), coffer._parent(), coffer._fence(),
    coffer._fence_path() TO PUBLIC;
-- Views call these with the rights of whoever reads them.
GRANT EXECUTE ON FUNCTION coffer._strategy_name(int2), coffer._class_name(int2), coffer._system_id() TO PUBLIC;

GRANT SELECT ON coffer.coverage, coffer.tenants, coffer.jobs, coffer.audit_log, coffer.status, coffer.restore_points,
    coffer.tenant_roles, coffer.backups, coffer.recovery_window, coffer.policies, coffer.holds, coffer.verifications,
    coffer.large_objects
    TO coffer_auditor;
GRANT EXECUTE ON FUNCTION coffer.doctor(), coffer.changes(text, pg_lsn, int), coffer.snapshot(text),
    coffer.wait(bigint, interval), coffer._is_uncommitted(bigint), coffer._silence() TO coffer_auditor;
GRANT EXECUTE ON FUNCTION coffer.wait_durable(pg_lsn, interval), coffer.restore_point(text),
    coffer.backup(text, text, text), coffer.restore(text, text, text, bool), coffer._restore_beside(text, text, bool),
    coffer.verify(text), coffer.cancel(bigint) TO coffer_operator;
GRANT EXECUTE ON FUNCTION
    coffer.add_table(regclass, name, regclass, text), coffer.add_shared(regclass), coffer.exclude(regclass, text),
    coffer.remove_table(regclass), coffer.add_schema(name, text, text), coffer.add_schema_pattern(text), coffer.remove_schema(name),
    coffer.add_role(name, text), coffer.remove_role(name), coffer.discover(name, bool), coffer.setup_agent(name), coffer._try(text), coffer._setup_agent(name),
    coffer._restore_in_place(text, text, bool), coffer.hold(text, text, timestamptz, timestamptz), coffer.release(bigint),
    coffer.set_policy(text, jsonb), coffer.grant_tenant(text, name), coffer.revoke_tenant(text, name),
    coffer.add_large_objects(regclass, name), coffer.remove_large_objects(regclass, name)
    TO coffer_admin;

INSERT INTO coffer.secret (mac_key) VALUES (coffer._random(16));

-- From here on DDL is watched: in every session, those that replicate or restore included.
CREATE EVENT TRIGGER coffer_ddl ON ddl_command_end EXECUTE FUNCTION coffer._on_ddl();
CREATE EVENT TRIGGER coffer_drop ON sql_drop EXECUTE FUNCTION coffer._on_drop();
CREATE EVENT TRIGGER coffer_rewrite ON table_rewrite EXECUTE FUNCTION coffer._on_rewrite();
CREATE EVENT TRIGGER coffer_schema ON ddl_command_start WHEN TAG IN ('ALTER SCHEMA') EXECUTE FUNCTION coffer._before_schema_altered();
ALTER EVENT TRIGGER coffer_ddl ENABLE ALWAYS;
ALTER EVENT TRIGGER coffer_drop ENABLE ALWAYS;
ALTER EVENT TRIGGER coffer_rewrite ENABLE ALWAYS;
ALTER EVENT TRIGGER coffer_schema ENABLE ALWAYS;
