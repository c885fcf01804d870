-- Who sees which tenant: auditors all of them, a tenant's administrators their own.

-- By OID, so that a role keeps its tenants when it is renamed; a role that was dropped is nobody.
CREATE TABLE coffer.tenant_grants (
    tenant      text NOT NULL,
    roleid      oid NOT NULL,
    granted_at  timestamptz NOT NULL DEFAULT now(),
    granted_by  text NOT NULL DEFAULT session_user,
    PRIMARY KEY (tenant, roleid)
);

CREATE FUNCTION coffer._tenant_role(role name) RETURNS oid
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    found_oid  oid := (SELECT r.oid FROM pg_roles r WHERE r.rolname = $1);
BEGIN
    IF found_oid IS NULL THEN
        RAISE EXCEPTION 'role % does not exist', coalesce(quote_ident($1), 'NULL') USING ERRCODE = 'undefined_object',
            HINT = 'CREATE ROLE first.';
    END IF;
    IF found_oid < 16384 OR $1 IN ('coffer_admin', 'coffer_operator', 'coffer_auditor') THEN
        RAISE EXCEPTION 'role % cannot administer a tenant', quote_ident($1) USING ERRCODE = 'wrong_object_type',
            HINT = 'It is there in every cluster.';
    END IF;
    RETURN found_oid;
END $$;

CREATE FUNCTION coffer.grant_tenant(tenant text, role name) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    who  oid := coffer._tenant_role($2);
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'no tenant given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF NOT EXISTS (SELECT FROM coffer.tenant_entries t WHERE t.tenant = $1 AND t.kind = 'normal') THEN
        RAISE WARNING 'no tenant % is known yet', quote_literal($1) USING HINT = 'See coffer.tenants.';
    END IF;
    INSERT INTO coffer.tenant_grants (tenant, roleid) VALUES ($1, who) ON CONFLICT DO NOTHING;
    EXECUTE format('GRANT SELECT ON coffer.tenants, coffer.jobs, coffer.backups, coffer.recovery_window, coffer.policies, coffer.holds, coffer.verifications TO %I', $2);
    EXECUTE format('GRANT EXECUTE ON FUNCTION coffer.wait(bigint, interval), coffer._is_uncommitted(bigint), coffer._silence() TO %I', $2);
    PERFORM coffer._audit('grant_tenant', $1, jsonb_build_object('role', $2));
END $$;
COMMENT ON FUNCTION coffer.grant_tenant IS
'Makes a role an administrator of a tenant: it sees this tenant, its jobs, backups, recovery window, policy, holds and verifications in the views, and no other tenant''s.';

CREATE FUNCTION coffer.revoke_tenant(tenant text, role name) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    who  oid := coffer._tenant_role($2);
BEGIN
    DELETE FROM coffer.tenant_grants g WHERE g.tenant = $1 AND g.roleid = who;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'role % does not administer tenant %', quote_ident($2), coalesce(quote_literal($1), 'NULL')
            USING ERRCODE = 'undefined_object';
    END IF;
    IF NOT EXISTS (SELECT FROM coffer.tenant_grants g WHERE g.roleid = who) THEN
        EXECUTE format('REVOKE SELECT ON coffer.tenants, coffer.jobs, coffer.backups, coffer.recovery_window, coffer.policies, coffer.holds, coffer.verifications FROM %I', $2);
        EXECUTE format('REVOKE EXECUTE ON FUNCTION coffer.wait(bigint, interval), coffer._is_uncommitted(bigint), coffer._silence() FROM %I', $2);
    END IF;
    PERFORM coffer._audit('revoke_tenant', $1, jsonb_build_object('role', $2));
END $$;
COMMENT ON FUNCTION coffer.revoke_tenant IS 'Ends what coffer.grant_tenant() said.';

-- A barrier: no function of the reader's sees a row before the tenant is checked. In a view, current_user is the reader.
CREATE VIEW coffer.tenants WITH (security_barrier) AS
SELECT t.tenant, t.uid, t.kind, t.state, t.display_name, t.registered_at, t.last_seen
FROM coffer.tenant_entries t
WHERE pg_has_role('coffer_auditor', 'USAGE')
   OR t.kind = 'normal' AND t.tenant IN (SELECT g.tenant FROM coffer.tenant_grants g WHERE pg_has_role(g.roleid, 'USAGE'));
COMMENT ON VIEW coffer.tenants IS
'The tenants that the agent has seen, by their key. New keys register themselves. A tenant''s administrator sees its own.';
