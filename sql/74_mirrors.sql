-- Holds, policies, and what the agent tells of the repository: recovery windows, backups, verifications.
--
-- The truth is in the repository. What stands here is a mirror of it, whole as of mirror_state.as_of; holds and policies
-- are written here first and carried into the repository by a job.

CREATE TABLE coffer.mirror_state (
    one    bool PRIMARY KEY DEFAULT true CHECK (one),
    as_of  timestamptz NOT NULL
);

CREATE TABLE coffer.hold_entries (
    hold          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id            uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),     -- its name in the repository
    tenant        text NOT NULL,
    reason        text NOT NULL,
    from_time     timestamptz,
    to_time       timestamptz,
    held_by       text NOT NULL DEFAULT session_user,
    held_at       timestamptz NOT NULL DEFAULT now(),
    released_by   text,
    released_at   timestamptz,
    ends_at       timestamptz,                       -- by itself
    is_recorded   bool NOT NULL DEFAULT false,       -- the repository has it
    is_dropped    bool NOT NULL DEFAULT false,       -- the repository has its release
    job           bigint                             -- that carries the last word on it into the repository
);
CREATE INDEX hold_entries_tenant ON coffer.hold_entries (tenant);

CREATE TABLE coffer.policy_entries (
    tenant        text PRIMARY KEY,
    policy        jsonb NOT NULL,
    set_by        text NOT NULL DEFAULT session_user,
    set_at        timestamptz NOT NULL DEFAULT now(),
    is_recorded   bool NOT NULL DEFAULT false,
    in_force      jsonb,                             -- what the repository has
    job           bigint                             -- that carries it there
);

CREATE TABLE coffer.backup_entries (
    tenant_uid    uuid NOT NULL,
    backup        uuid NOT NULL,
    kind          text NOT NULL,                     -- full, incremental, archive
    trigger       text,                              -- why it was taken
    reason        text,
    point_lsn     pg_lsn NOT NULL,
    point_time    timestamptz NOT NULL,
    rows          int8 NOT NULL,
    bytes         int8 NOT NULL,
    verified_at   timestamptz,
    PRIMARY KEY (tenant_uid, backup)
);

-- Spans that can be restored to, and gaps, which cannot. One without an end goes on with what is durable.
CREATE TABLE coffer.window_entries (
    tenant_uid    uuid NOT NULL,
    from_lsn      pg_lsn NOT NULL,
    to_lsn        pg_lsn,
    from_time     timestamptz,
    to_time       timestamptz,
    gap           text NOT NULL DEFAULT '',          -- why it is one; empty: it is none
    PRIMARY KEY (tenant_uid, from_lsn, gap)
);

CREATE TABLE coffer.verification_entries (
    tenant_uid    uuid NOT NULL,
    backup        uuid NOT NULL,
    what          text NOT NULL,                     -- read_back, live, drill
    verified_at   timestamptz NOT NULL,
    ok            bool NOT NULL,
    message       text,
    PRIMARY KEY (tenant_uid, backup, what, verified_at)
);

CREATE VIEW coffer.backups WITH (security_barrier) AS
SELECT t.tenant, b.backup, b.kind, b.trigger, b.reason, b.point_lsn, b.point_time, b.rows, b.bytes, b.verified_at,
       ARRAY(SELECT h.hold FROM coffer.hold_entries h
             WHERE h.tenant = t.tenant AND h.is_recorded AND NOT h.is_dropped AND b.point_time >= coalesce(h.from_time, '-infinity')
               AND b.point_time <= coalesce(h.to_time, 'infinity') ORDER BY h.hold) AS holds,
       (SELECT m.as_of FROM coffer.mirror_state m) AS as_of
FROM coffer.backup_entries b JOIN coffer.tenant_entries t ON t.uid = b.tenant_uid
WHERE t.kind = 'normal' AND (pg_has_role('coffer_auditor', 'USAGE')
   OR t.tenant IN (SELECT g.tenant FROM coffer.tenant_grants g WHERE pg_has_role(g.roleid, 'USAGE')));
COMMENT ON VIEW coffer.backups IS
'The backups of each tenant, as the agent read them from the repository at as_of; holds: the numbers of those that keep it.';

CREATE VIEW coffer.recovery_window WITH (security_barrier) AS
SELECT t.tenant, w.gap = '' AS restorable, w.from_lsn, coalesce(w.to_lsn, a.durable_lsn) AS to_lsn, w.from_time,
       coalesce(w.to_time, a.durable_time) AS to_time, nullif(w.gap, '') AS reason,
       (SELECT m.as_of FROM coffer.mirror_state m) AS as_of
FROM coffer.window_entries w JOIN coffer.tenant_entries t ON t.uid = w.tenant_uid LEFT JOIN coffer.agent_state a ON w.to_lsn IS NULL
WHERE t.kind = 'normal' AND (pg_has_role('coffer_auditor', 'USAGE')
   OR t.tenant IN (SELECT g.tenant FROM coffer.tenant_grants g WHERE pg_has_role(g.roleid, 'USAGE')));
COMMENT ON VIEW coffer.recovery_window IS
'The spans that each tenant can be restored to, and the gaps between them with their reason (restorable false), as the agent read them from the repository at as_of.';

CREATE VIEW coffer.verifications WITH (security_barrier) AS
SELECT t.tenant, v.backup, v.ok, v.what, v.message, v.verified_at, (SELECT m.as_of FROM coffer.mirror_state m) AS as_of, t.kind
FROM coffer.verification_entries v JOIN coffer.tenant_entries t ON t.uid = v.tenant_uid
WHERE pg_has_role('coffer_auditor', 'USAGE')
   OR t.kind = 'normal' AND t.tenant IN (SELECT g.tenant FROM coffer.tenant_grants g WHERE pg_has_role(g.roleid, 'USAGE'));
COMMENT ON VIEW coffer.verifications IS
'What verifications found: of which backup, in which way (read_back, live, drill), and when; of the reference data, too (kind shared).';

CREATE VIEW coffer.holds WITH (security_barrier) AS
SELECT h.hold, h.tenant, h.reason, h.from_time, h.to_time,
       CASE WHEN h.is_dropped THEN 'released' WHEN h.released_at IS NOT NULL AND NOT f.failed THEN 'being released'
            WHEN h.is_recorded THEN 'held' WHEN f.failed THEN 'failed' ELSE 'requested' END AS state,
       h.held_by, h.held_at, CASE WHEN NOT f.failed THEN h.released_by END AS released_by,
       CASE WHEN NOT f.failed THEN h.released_at END AS released_at, (SELECT m.as_of FROM coffer.mirror_state m) AS as_of,
       CASE WHEN f.failed THEN j.error END AS error
FROM coffer.hold_entries h LEFT JOIN coffer.job_entries j ON j.job = h.job
CROSS JOIN LATERAL (SELECT coalesce(j.state = 'failed', false) AND NOT h.is_dropped AND (NOT h.is_recorded OR h.released_at IS NOT NULL) AS failed) f
WHERE pg_has_role('coffer_auditor', 'USAGE')
   OR h.tenant IN (SELECT g.tenant FROM coffer.tenant_grants g WHERE pg_has_role(g.roleid, 'USAGE'));
COMMENT ON VIEW coffer.holds IS
'Legal holds: nothing of a tenant between the two times (empty: without an end) is removed. One is in force from the state held to the state released. error: why a hold has failed, or why one that is held is not released; both can be asked for again.';

CREATE VIEW coffer.policies WITH (security_barrier) AS
SELECT p.tenant, p.policy, p.set_by, p.set_at, s.state, (SELECT m.as_of FROM coffer.mirror_state m) AS as_of, p.in_force,
       CASE WHEN s.state = 'failed' THEN j.error END AS error
FROM coffer.policy_entries p LEFT JOIN coffer.job_entries j ON j.job = p.job
CROSS JOIN LATERAL (SELECT CASE WHEN p.is_recorded OR p.policy = p.in_force AND j.state IN ('done', 'failed') THEN 'in force'
                                WHEN j.state = 'failed' THEN 'failed' ELSE 'requested' END AS state) s
WHERE pg_has_role('coffer_auditor', 'USAGE')
   OR p.tenant IN (SELECT g.tenant FROM coffer.tenant_grants g WHERE pg_has_role(g.roleid, 'USAGE'));
COMMENT ON VIEW coffer.policies IS
'Retention policies that single tenants have; all others have that of the agent''s configuration. in_force: the one that holds meanwhile, where another is requested or has failed (empty: the configuration''s); error: why it failed.';

CREATE FUNCTION coffer.hold(tenant text, reason text, from_time timestamptz DEFAULT NULL, to_time timestamptz DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    n     bigint;
    name  uuid;
BEGIN
    PERFORM coffer._require_tenant($1);
    IF coalesce(btrim($2), '') = '' THEN
        RAISE EXCEPTION 'a hold needs a reason' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF $3 > $4 THEN
        RAISE EXCEPTION 'the hold ends before it begins: % is before %', $4, $3 USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF $3 >= '9999-12-30 00:00+00' OR $4 < '0001-01-01 00:00+00' THEN
        RAISE EXCEPTION 'nothing is between % and %', coalesce($3::text, 'the beginning'), coalesce($4::text, 'the end') USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- Beyond what a time in the repository can say is without an end.
    IF $3 < '0001-01-01 00:00+00' THEN
        $3 := NULL;
    END IF;
    IF $4 >= '9999-12-30 00:00+00' THEN
        $4 := NULL;
    END IF;
    INSERT INTO coffer.hold_entries AS h (tenant, reason, from_time, to_time) VALUES ($1, $2, $3, $4)
    RETURNING h.hold, h.id INTO n, name;
    UPDATE coffer.hold_entries h SET job = coffer._new_job('hold', $1, jsonb_strip_nulls(jsonb_build_object('hold', n, 'id', name,
        'reason', $2, 'from_us', (extract(epoch FROM $3) * 1000000)::int8, 'to_us', (extract(epoch FROM $4) * 1000000)::int8)))
    WHERE h.hold = n;
    PERFORM coffer._audit('hold', $1, jsonb_build_object('hold', n, 'reason', $2, 'from', $3, 'to', $4));
    RETURN n;
END $$;
COMMENT ON FUNCTION coffer.hold IS
'Holds everything of a tenant between two times (NULL: without an end), what is still to come included: nothing of it is removed until coffer.release(hold). The result is the hold''s number; coffer.holds says when the repository has it.';

CREATE FUNCTION coffer.release(hold bigint) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    h  coffer.hold_entries;
BEGIN
    SELECT * INTO h FROM coffer.hold_entries e WHERE e.hold = $1 FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no hold %', coalesce($1::text, 'NULL') USING ERRCODE = 'undefined_object', HINT = 'See coffer.holds.';
    END IF;
    IF h.is_dropped OR h.released_at IS NOT NULL AND NOT EXISTS (SELECT FROM coffer.job_entries j WHERE j.job = h.job AND j.state = 'failed') THEN
        RAISE EXCEPTION 'hold % is released already, by %', $1, h.released_by USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    UPDATE coffer.hold_entries e SET released_at = now(), released_by = session_user,
        job = coffer._new_job('release', h.tenant, jsonb_build_object('hold', $1, 'id', h.id))
    WHERE e.hold = $1;
    PERFORM coffer._audit('release', h.tenant, jsonb_build_object('hold', $1, 'reason', h.reason));
END $$;
COMMENT ON FUNCTION coffer.release IS
'Ends a hold. What it kept is removed by the tenant''s retention policy from then on.';

CREATE FUNCTION coffer.set_policy(tenant text, policy jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    wrong  text;
BEGIN
    PERFORM coffer._require_tenant($1);
    IF jsonb_typeof($2) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION 'a policy is a JSON object' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Like the [retention] section of the agent''s configuration; {} is the configuration''s.';
    END IF;
    -- The agent looks closer; what it would refuse for its form is refused here.
    SELECT format('%I: %s', e.key, e.value) INTO wrong FROM jsonb_each($2) e
    WHERE NOT CASE WHEN e.key IN ('pitr', 'on_demand') THEN jsonb_typeof(e.value) = 'string' AND e.value #>> '{}' ~ '^\s*([0-9]{1,9}\s*(ms|s|sec|m|min|h|d|w)\s*)+$'
                   WHEN e.key IN ('daily', 'weekly', 'monthly', 'annual', 'compliance_years') THEN e.value::text ~ '^[0-9]{1,5}$'
                   ELSE false END
    ORDER BY e.key COLLATE "C" LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the policy has %', wrong USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Keys: pitr and on_demand (like "14d"), daily, weekly, monthly, annual and compliance_years (numbers).';
    END IF;
    INSERT INTO coffer.policy_entries AS p (tenant, policy) VALUES ($1, $2)
    ON CONFLICT ON CONSTRAINT policy_entries_pkey DO UPDATE SET policy = excluded.policy, set_by = excluded.set_by, set_at = excluded.set_at, is_recorded = false;
    UPDATE coffer.policy_entries p SET job = coffer._new_job('policy', $1, jsonb_build_object('policy', $2)) WHERE p.tenant = $1;
    PERFORM coffer._audit('set_policy', $1, $2);
END $$;
COMMENT ON FUNCTION coffer.set_policy IS
'Gives a tenant a retention policy of its own, in the words of the [retention] section of the agent''s configuration; {} gives it the configuration''s again.';
