-- What the agent's job runners call: claim, say how far, finish; and the mirrors that it fills.

-- A runner's session holds this lock for as long as it lives: a job of a session that is gone is claimed again at once,
-- one whose agent is merely silent after a while.
CREATE FUNCTION coffer._agent_jobs_begin() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT pg_advisory_lock(6516585, pg_backend_pid()) $$;

CREATE FUNCTION coffer._agent_claim_job(kinds text[], claim uuid, agent text)
RETURNS TABLE (job bigint, kind text, tenant text, args jsonb, requested_by text, attempt int, goal pg_lsn)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    j  coffer.job_entries;
BEGIN
    LOOP
        SELECT e.* INTO j FROM coffer.job_entries e
        WHERE e.state IN ('queued', 'running') AND e.kind = ANY ($1) AND coalesce(e.not_before <= clock_timestamp(), true)
          AND (e.state = 'queued' OR e.heartbeat_at < clock_timestamp() - interval '60 s' OR NOT EXISTS (
              SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 6516585 AND l.objid = e.backend::oid AND l.objsubid = 2 AND l.granted
                  AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())))
        ORDER BY e.job LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN;
        END IF;
        IF j.cancelled_by IS NOT NULL THEN
            UPDATE coffer.job_entries e SET state = 'cancelled', finished_at = clock_timestamp(), claim = NULL WHERE e.job = j.job;
        ELSIF j.attempts >= 5 THEN
            UPDATE coffer.job_entries e SET state = 'failed', finished_at = clock_timestamp(), claim = NULL,
                error = format('the agent ended %s times while it was at it', j.attempts) || E'\nhint: see the agent''s log' WHERE e.job = j.job;
        ELSE
            EXIT;
        END IF;
    END LOOP;
    UPDATE coffer.job_entries e SET state = 'running', claim = $2, agent = $3, backend = pg_backend_pid(), heartbeat_at = clock_timestamp(),
        started_at = coalesce(e.started_at, clock_timestamp()), attempts = e.attempts + 1, not_before = NULL, progress = 0
    WHERE e.job = j.job;
    job := j.job; kind := j.kind; tenant := j.tenant; args := j.args; requested_by := j.requested_by; attempt := j.attempts + 1;
    -- What the job's transaction committed is before this; the wake-up moves the log of an idle server past it.
    goal := pg_current_wal_insert_lsn();
    PERFORM coffer._wake();
    RETURN NEXT;
END $$;
COMMENT ON FUNCTION coffer._agent_claim_job(text[], uuid, text) IS
'The oldest job of these kinds that nobody is at. goal: once everything up to there is durable, the job''s own commit is.';

-- 'go', 'cancel' when somebody asked for that, 'lost' when another claim has taken the job.
CREATE FUNCTION coffer._agent_job_progress(job bigint, claim uuid, progress float8, message text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    canceller  text;
BEGIN
    UPDATE coffer.job_entries e SET progress = $3, message = $4, heartbeat_at = clock_timestamp(), backend = pg_backend_pid()
    WHERE e.job = $1 AND e.claim = $2 AND e.state = 'running' RETURNING coalesce(e.cancelled_by, '') INTO canceller;
    RETURN CASE WHEN canceller IS NULL THEN 'lost' WHEN canceller = '' THEN 'go' ELSE 'cancel' END;
END $$;

-- False when another claim has taken the job: what was done counts, but who has it says so.
CREATE FUNCTION coffer._agent_finish_job(job bigint, claim uuid, state text, result jsonb, error text) RETURNS bool
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    UPDATE coffer.job_entries e SET state = $3, result = $4, error = $5, finished_at = clock_timestamp(), claim = NULL, message = NULL,
        progress = CASE $3 WHEN 'done' THEN 1 ELSE e.progress END
    WHERE e.job = $1 AND e.claim = $2 AND e.state = 'running';
    RETURN FOUND;
END $$;

-- Gives a job back: to be tried again after a while, or by the next agent.
CREATE FUNCTION coffer._agent_return_job(job bigint, claim uuid, after interval, message text) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    UPDATE coffer.job_entries e SET state = CASE WHEN e.cancelled_by IS NULL THEN 'queued' ELSE 'cancelled' END, claim = NULL, message = $4,
        finished_at = CASE WHEN e.cancelled_by IS NOT NULL THEN clock_timestamp() END,
        not_before = clock_timestamp() + $3, attempts = e.attempts - 1
    WHERE e.job = $1 AND e.claim = $2 AND e.state = 'running'
$$;

-- The command line's coffer.backup(): who asked is somebody on another machine.
CREATE FUNCTION coffer._agent_backup(tenant text, reason text, kind text, by text) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._backup($1, $2, $3, $4) $$;

CREATE FUNCTION coffer._mirrored(docs jsonb) RETURNS TABLE (uid uuid, tenant text, doc jsonb)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT (d ->> 'uid')::uuid, d ->> 'tenant', d FROM jsonb_array_elements(docs) d $$;

-- What the repository has of some tenants, each whole:
-- [{"uid", "tenant", "backups": [...], "windows": [...], "verifications": [...], "holds": [...], "policy": {...}}].
-- Only rows that differ are written.
CREATE FUNCTION coffer._agent_mirror(docs jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    DELETE FROM coffer.backup_entries b USING coffer._mirrored($1) d WHERE d.uid = b.tenant_uid
        AND NOT EXISTS (SELECT FROM jsonb_array_elements(d.doc -> 'backups') x WHERE (x ->> 'backup')::uuid = b.backup);
    INSERT INTO coffer.backup_entries AS b
    SELECT d.uid, x.backup, x.kind, x.trigger, x.reason, x.point_lsn, x.point_time, x.rows, x.bytes, x.verified_at
    FROM coffer._mirrored($1) d CROSS JOIN LATERAL jsonb_populate_recordset(NULL::coffer.backup_entries, d.doc -> 'backups') x
    ON CONFLICT (tenant_uid, backup) DO UPDATE SET kind = excluded.kind, trigger = excluded.trigger, reason = excluded.reason,
        point_lsn = excluded.point_lsn, point_time = excluded.point_time, rows = excluded.rows, bytes = excluded.bytes, verified_at = excluded.verified_at
    WHERE b IS DISTINCT FROM excluded;

    DELETE FROM coffer.window_entries w USING coffer._mirrored($1) d WHERE d.uid = w.tenant_uid
        AND NOT EXISTS (SELECT FROM jsonb_populate_recordset(NULL::coffer.window_entries, d.doc -> 'windows') x
                        WHERE x.from_lsn = w.from_lsn AND x.gap = w.gap);
    INSERT INTO coffer.window_entries AS w
    SELECT d.uid, x.from_lsn, x.to_lsn, x.from_time, x.to_time, x.gap
    FROM coffer._mirrored($1) d CROSS JOIN LATERAL jsonb_populate_recordset(NULL::coffer.window_entries, d.doc -> 'windows') x
    ON CONFLICT (tenant_uid, from_lsn, gap) DO UPDATE SET to_lsn = excluded.to_lsn, from_time = excluded.from_time, to_time = excluded.to_time
    WHERE w IS DISTINCT FROM excluded;

    INSERT INTO coffer.verification_entries
    SELECT d.uid, x.backup, x.what, x.verified_at, x.ok, x.message
    FROM coffer._mirrored($1) d CROSS JOIN LATERAL jsonb_populate_recordset(NULL::coffer.verification_entries, d.doc -> 'verifications') x
    ON CONFLICT DO NOTHING;

    -- A hold of the command line's gets its number here.
    INSERT INTO coffer.hold_entries AS h (id, tenant, reason, from_time, to_time, held_by, held_at, is_recorded)
    SELECT x.id, d.tenant, x.reason, x.from_time, x.to_time, x.held_by, x.held_at, true
    FROM coffer._mirrored($1) d CROSS JOIN LATERAL jsonb_populate_recordset(NULL::coffer.hold_entries, d.doc -> 'holds') x
    ON CONFLICT (id) DO UPDATE SET is_recorded = true WHERE NOT h.is_recorded;
    UPDATE coffer.hold_entries h SET is_dropped = true, released_at = coalesce(h.released_at, now()), released_by = coalesce(h.released_by, 'the command line')
    FROM coffer._mirrored($1) d WHERE d.tenant = h.tenant AND d.doc ? 'holds' AND h.is_recorded AND NOT h.is_dropped
        AND NOT EXISTS (SELECT FROM jsonb_array_elements(d.doc -> 'holds') x WHERE (x ->> 'id')::uuid = h.id);

    INSERT INTO coffer.policy_entries AS p (tenant, policy, set_by, set_at, is_recorded)
    SELECT d.tenant, d.doc -> 'policy', 'the command line', now(), true FROM coffer._mirrored($1) d WHERE jsonb_typeof(d.doc -> 'policy') = 'object'
    -- One that was asked for here is newer until its job is done.
    ON CONFLICT (tenant) DO UPDATE SET policy = excluded.policy, is_recorded = true
    WHERE p.is_recorded AND p.policy <> excluded.policy OR NOT p.is_recorded AND p.policy = excluded.policy;
END $$;

CREATE FUNCTION coffer._agent_mirrored(as_of timestamptz) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    INSERT INTO coffer.mirror_state AS m (as_of) VALUES ($1) ON CONFLICT (one) DO UPDATE SET as_of = excluded.as_of;
    -- What became of a job is in the audit log's and the catalog's care after a year.
    DELETE FROM coffer.job_entries j WHERE j.finished_at < clock_timestamp() - interval '400 days'
$$;
COMMENT ON FUNCTION coffer._agent_mirrored(timestamptz) IS 'The mirrors are whole as of now.';
