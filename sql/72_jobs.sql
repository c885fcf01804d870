-- What the agent is asked to do from SQL: the jobs, what asks for them, waiting for them.
--
-- A job is a row that becomes visible with the caller's commit; NOTIFY coffer_jobs wakes the agent, which also looks by
-- itself. What the agent calls is in 77_agent_jobs.sql.

CREATE TABLE coffer.job_entries (
    job           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind          text NOT NULL CHECK (kind IN ('backup', 'restore', 'verify', 'hold', 'release', 'policy')),
    tenant        text NOT NULL,
    state         text NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    args          jsonb NOT NULL DEFAULT '{}',
    xid           xid8 NOT NULL DEFAULT pg_current_xact_id(),
    progress      float8,
    message       text,
    requested_by  text NOT NULL DEFAULT session_user,
    requested_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at    timestamptz,
    finished_at   timestamptz,
    result        jsonb,
    error         text,
    cancelled_by  text,                              -- asked for; a running job ends at its next step
    -- Whose it is while it runs: one claim of one agent's session.
    claim         uuid,
    agent         text,
    backend       int,
    heartbeat_at  timestamptz,
    attempts      int NOT NULL DEFAULT 0,
    not_before    timestamptz                        -- tried again, but not at once
);
CREATE INDEX job_entries_open ON coffer.job_entries (job) WHERE state IN ('queued', 'running');
CREATE INDEX job_entries_tenant ON coffer.job_entries (tenant);

-- Restores that are committed: written in their own transactions, so that a job whose agent died before it could say so is
-- not carried out a second time. Apart from job_entries, whose row the agent updates from another session meanwhile.
CREATE TABLE coffer.job_commits (
    job           bigint PRIMARY KEY,
    result        jsonb NOT NULL,                    -- of the job, when it is done
    committed_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE VIEW coffer.jobs WITH (security_barrier) AS
SELECT j.job, j.kind, j.tenant, j.state, j.progress, j.message, j.requested_by, j.requested_at, j.started_at, j.finished_at, j.result, j.error
FROM coffer.job_entries j
WHERE pg_has_role('coffer_auditor', 'USAGE')
   OR j.tenant IN (SELECT g.tenant FROM coffer.tenant_grants g WHERE pg_has_role(g.roleid, 'USAGE'));
COMMENT ON VIEW coffer.jobs IS
'What the agent was asked to do, how far it is, and what became of it. A tenant''s administrator sees its own tenant''s.';

-- The reserved tenants have no key, so no job is theirs.
CREATE FUNCTION coffer._require_tenant(tenant text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'no tenant given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF NOT EXISTS (SELECT FROM coffer.tenant_entries t WHERE t.tenant = $1 AND t.kind = 'normal') THEN
        RAISE EXCEPTION 'there is no tenant %', quote_literal($1) USING ERRCODE = 'undefined_object',
            HINT = 'See coffer.tenants. A tenant registers itself once its first rows are durable; coffer.wait_durable() waits for that.';
    END IF;
END $$;

CREATE FUNCTION coffer._new_job(kind text, tenant text, args jsonb, by text DEFAULT session_user) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    n  bigint;
BEGIN
    INSERT INTO coffer.job_entries AS j (kind, tenant, args, requested_by) VALUES ($1, $2, $3, $4)
    RETURNING j.job INTO n;
    PERFORM pg_notify('coffer_jobs', n::text);
    RETURN n;
END $$;

-- The marker makes this transaction's commit a restore point that only this job names.
CREATE FUNCTION coffer._backup(tenant text, reason text, kind text, by text) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    n      bigint;
    point  text;
    at     pg_lsn;
BEGIN
    IF $3 IS NULL OR $3 NOT IN ('manual', 'pre-migration', 'pre-maintenance', 'incident', 'compliance', 'archive') THEN
        RAISE EXCEPTION 'unknown kind of backup %', coalesce(quote_literal($3), 'NULL') USING ERRCODE = 'invalid_parameter_value',
            HINT = 'The kinds are manual, pre-migration, pre-maintenance, incident, compliance and archive.';
    END IF;
    PERFORM coffer._require_tenant($1);
    n := coffer._new_job('backup', $1, '{}', $4);
    point := format('backup-%s', n);
    PERFORM coffer._mark_sequences();
    at := coffer._marker('restore_point', convert_to(point, 'UTF8'));
    INSERT INTO coffer.restore_points (name, lsn, xid) VALUES (point, at, pg_current_xact_id());
    UPDATE coffer.job_entries j SET args = jsonb_strip_nulls(jsonb_build_object('kind', $3, 'reason', nullif(btrim($2), ''),
        'point', point, 'lsn', at, 'hold', CASE WHEN $3 = 'incident' THEN gen_random_uuid() END)) WHERE j.job = n;
    PERFORM coffer._audit('backup', $1, jsonb_strip_nulls(jsonb_build_object('job', n, 'kind', $3, 'reason', $2, 'by', nullif($4, session_user))));
    RETURN n;
END $$;
CREATE FUNCTION coffer.backup(tenant text, reason text DEFAULT NULL, kind text DEFAULT 'manual') RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._backup($1, $2, $3, session_user) $$;
COMMENT ON FUNCTION coffer.backup IS
'Asks the agent for a full backup of one tenant, as of the commit of the transaction that calls it; the result is the job. Kinds: manual, pre-migration, pre-maintenance, incident (held until released), compliance, archive (complete by itself, as the monthly one is). After the commit, coffer.wait(job) waits for it; coffer restore --to backup:ID goes back to it.';

CREATE FUNCTION coffer._restore(tenant text, target text, mode text, dry_run bool) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    n  bigint;
BEGIN
    PERFORM coffer._require_tenant($1);
    IF $2 IS NULL OR $2 !~ '^(latest|name:.+|backup:[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}|[0-9a-fA-F]{1,8}/[0-9a-fA-F]{1,8}|[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]+)?)?([Zz]|[+-][0-9]{2}(:?[0-9]{2})?))$' THEN
        RAISE EXCEPTION '% is no point in time', coalesce(quote_literal($2), 'NULL') USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Write an RFC 3339 time with its offset (2026-11-22T13:00:00Z), an LSN (16/B374D848), name:RESTORE_POINT, backup:ID or latest.';
    END IF;
    IF $4 IS NULL THEN
        RAISE EXCEPTION 'dry_run is true or false' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    n := coffer._new_job('restore', $1, jsonb_build_object('target', $2, 'mode', $3, 'dry_run', $4));
    PERFORM coffer._audit('restore', $1, jsonb_build_object('job', n, 'target', $2, 'mode', $3, 'dry_run', $4));
    RETURN n;
END $$;
-- Two, because they are granted to different roles.
CREATE FUNCTION coffer._restore_in_place(tenant text, target text, dry_run bool) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._restore($1, $2, 'in-place', $3) $$;
CREATE FUNCTION coffer._restore_beside(tenant text, target text, dry_run bool) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._restore($1, $2, 'schema', $3) $$;

CREATE FUNCTION coffer.restore(tenant text, target text, mode text DEFAULT 'in-place', dry_run bool DEFAULT true) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    CASE $3
        WHEN 'in-place' THEN
            IF NOT pg_has_role('coffer_admin', 'USAGE') THEN
                RAISE EXCEPTION 'permission denied to restore in place' USING ERRCODE = 'insufficient_privilege',
                    HINT = 'Only members of coffer_admin may; mode schema restores beside the live rows.';
            END IF;
            RETURN coffer._restore_in_place($1, $2, $4);
        WHEN 'schema' THEN
            RETURN coffer._restore_beside($1, $2, $4);
        WHEN 'database', 'files' THEN
            RAISE EXCEPTION 'mode % has a target outside of this database', $3 USING ERRCODE = 'feature_not_supported',
                HINT = format('On the agent''s machine: coffer restore --mode %s --target ...', $3);
        ELSE
            RAISE EXCEPTION 'unknown mode %', coalesce(quote_literal($3), 'NULL') USING ERRCODE = 'invalid_parameter_value',
                HINT = 'The modes are in-place and schema.';
    END CASE;
END $$;
COMMENT ON FUNCTION coffer.restore IS
'Asks the agent to restore one tenant to a point (a time, an LSN, name:RESTORE_POINT, backup:ID, latest); the result is the job. Mode in-place (members of coffer_admin) changes what differs in the live rows, in one transaction; schema restores side by side into a new schema. With dry_run, which is the default, nothing is changed: the job''s result counts, per table, what would be.';

CREATE FUNCTION coffer.verify(tenant text) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    n  bigint;
BEGIN
    PERFORM coffer._require_tenant($1);
    n := coffer._new_job('verify', $1, '{}');
    PERFORM coffer._audit('verify', $1, jsonb_build_object('job', n));
    RETURN n;
END $$;
COMMENT ON FUNCTION coffer.verify IS
'Asks the agent to read back and authenticate everything that the repository has of one tenant, and to compare its rows with the live ones, exactly, while everybody goes on writing; the result is the job, which fails when something is not as it was written, or differs. What was found stays in coffer.verifications.';

CREATE FUNCTION coffer.cancel(job bigint) RETURNS bool
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    j  coffer.job_entries;
BEGIN
    SELECT * INTO j FROM coffer.job_entries e WHERE e.job = $1 FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no job %', coalesce($1::text, 'NULL') USING ERRCODE = 'undefined_object', HINT = 'See coffer.jobs.';
    END IF;
    IF j.state NOT IN ('queued', 'running') THEN
        RETURN false;
    END IF;
    IF j.kind IN ('hold', 'release', 'policy') THEN
        RAISE EXCEPTION 'job % (%) cannot be cancelled', $1, j.kind USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = 'Say the opposite: coffer.release(), coffer.hold() or another coffer.set_policy().';
    END IF;
    UPDATE coffer.job_entries e SET cancelled_by = session_user,
        state = CASE WHEN j.state = 'queued' THEN 'cancelled' ELSE j.state END,
        finished_at = CASE WHEN j.state = 'queued' THEN clock_timestamp() END
    WHERE e.job = $1;
    PERFORM pg_notify('coffer_jobs', $1::text);
    PERFORM coffer._audit('cancel', j.tenant, jsonb_build_object('job', $1));
    RETURN true;
END $$;
COMMENT ON FUNCTION coffer.cancel IS
'Cancels a job: one that is queued at once, a running one at its next step (a restore in place that has begun to write is finished). False when it had ended already.';

CREATE FUNCTION coffer._is_uncommitted(job bigint) RETURNS bool
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT e.xid = pg_current_xact_id_if_assigned() FROM coffer.job_entries e WHERE e.job = $1 $$;

-- For how long no agent has reported; NULL: none ever has.
CREATE FUNCTION coffer._silence() RETURNS interval
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT clock_timestamp() - s.reported_at FROM coffer.agent_state s $$;

-- With the caller's rights: who cannot see the job in coffer.jobs cannot wait for it.
CREATE FUNCTION coffer.wait(job bigint, timeout interval DEFAULT '1h') RETURNS coffer.jobs
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    j        coffer.jobs;
    started  timestamptz := clock_timestamp();
    told_at  timestamptz := started;
    told     text := '';
    says     text;
    what     text;
    silence  interval;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'coffer.wait() needs READ COMMITTED: another isolation level never sees the progress'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    IF coffer._is_uncommitted($1) THEN
        RAISE EXCEPTION 'job % is not committed yet: the agent cannot see it', $1 USING ERRCODE = 'invalid_transaction_state',
            HINT = 'COMMIT first, then wait in a transaction of its own.';
    END IF;
    LOOP
        SELECT * INTO j FROM coffer.jobs v WHERE v.job = $1;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'there is no job %', coalesce($1::text, 'NULL') USING ERRCODE = 'undefined_object', HINT = 'See coffer.jobs.';
        END IF;
        what := format('job %s (%s of tenant %s)', j.job, j.kind, j.tenant);
        CASE j.state
            WHEN 'done' THEN
                RETURN j;
            WHEN 'failed' THEN
                RAISE EXCEPTION '% failed: %', what, split_part(coalesce(j.error, 'it does not say why'), E'\nhint: ', 1)
                    USING ERRCODE = 'external_routine_exception',
                          HINT = coalesce(nullif(split_part(j.error, E'\nhint: ', 2), ''), 'See the agent''s log.');
            WHEN 'cancelled' THEN
                RAISE EXCEPTION '% was cancelled', what USING ERRCODE = 'operator_intervention';
            ELSE NULL;
        END CASE;
        silence := coffer._silence();
        IF clock_timestamp() - started > $2 THEN
            RAISE EXCEPTION '% is not done after %', what, $2 USING ERRCODE = 'lock_not_available',
                DETAIL = concat(format('It is %s', j.state), ': ' || j.message, '.',
                    CASE WHEN silence IS NULL THEN ' No agent has ever reported.'
                         WHEN silence > interval '30 s' THEN format(' No agent has reported for %s s.', extract(epoch FROM silence)::int) END),
                HINT = 'The job goes on; coffer.cancel(job) ends it.';
        END IF;
        -- What is new at once, but not more than once a second; that there is no agent, every five seconds.
        says := concat(CASE WHEN j.state = 'running' THEN coalesce(round(100 * j.progress)::text || ' %', j.state) ELSE j.state END, ': ' || j.message);
        IF silence IS NULL OR silence > interval '30 s' THEN
            IF clock_timestamp() - told_at > interval '5 s' OR told = '' THEN
                told_at := clock_timestamp(); told := says;
                RAISE NOTICE '%: %, and no agent has %', what, j.state,
                    coalesce(format('reported for %s s', extract(epoch FROM silence)::int), 'ever reported');
            END IF;
        ELSIF says <> told AND (clock_timestamp() - told_at > interval '1 s' OR told = '') THEN
            told_at := clock_timestamp(); told := says;
            RAISE NOTICE '%: %', what, says;
        END IF;
        PERFORM pg_sleep(0.1);
    END LOOP;
END $$;
COMMENT ON FUNCTION coffer.wait IS
'Waits until a job is done and returns its row, as in coffer.jobs; says in NOTICEs how far it is, and when no agent is running. Raises when the job fails or is cancelled, after timeout, and at once when the job was made by the calling transaction: commit first.';
