-- What the agent's job runners call: claim, say how far, finish; and the mirrors that it fills.

-- A runner's session holds this lock for as long as it lives: a job of a session that is gone is claimed again at once,
-- one whose agent is merely silent after a while. Anybody can take it first; the agent's next session has another number.
CREATE FUNCTION coffer._agent_jobs_begin() RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    IF NOT pg_try_advisory_lock(6516585, pg_backend_pid()) THEN
        RAISE EXCEPTION 'another session holds the advisory lock (6516585, %)', pg_backend_pid() USING ERRCODE = 'lock_not_available',
            HINT = 'pg_locks says who; nobody but the agent takes locks of this class.';
    END IF;
END $$;

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
          -- What was said of a tenant's retention is carried out in the order in which it was said.
          AND NOT (e.kind IN ('hold', 'release', 'policy') AND EXISTS (
              SELECT FROM coffer.job_entries o WHERE o.tenant = e.tenant AND o.kind IN ('hold', 'release', 'policy')
                  AND o.state IN ('queued', 'running') AND o.job < e.job))
        ORDER BY e.job LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN;
        END IF;
        IF EXISTS (SELECT FROM coffer.job_commits c WHERE c.job = j.job) THEN
            -- It is done, and only has to say so.
            EXIT;
        ELSIF j.cancelled_by IS NOT NULL THEN
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

-- 'go', 'cancel' when somebody asked for that, 'lost' when another claim has taken the job. Who has the row locked, as an
-- open transaction that called coffer.cancel(), holds no job up.
CREATE FUNCTION coffer._agent_job_progress(job bigint, claim uuid, progress float8, message text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp SET lock_timeout = '1s'
AS $$
DECLARE
    canceller  text;
BEGIN
    UPDATE coffer.job_entries e SET progress = $3, message = $4, heartbeat_at = clock_timestamp(), backend = pg_backend_pid()
    WHERE e.job = $1 AND e.claim = $2 AND e.state = 'running' RETURNING coalesce(e.cancelled_by, '') INTO canceller;
    RETURN CASE WHEN canceller IS NULL THEN 'lost' WHEN canceller = '' THEN 'go' ELSE 'cancel' END;
EXCEPTION WHEN lock_not_available THEN
    RETURN 'go';
END $$;

-- Part of a restore's own transaction: with it, the job is done. False when it is not this claim's any more, was cancelled,
-- or is done. Waits for another transaction that is about to say the same.
CREATE FUNCTION coffer._agent_job_commits(job bigint, claim uuid, result jsonb) RETURNS bool
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    INSERT INTO coffer.job_commits (job, result)
    SELECT e.job, $3 FROM coffer.job_entries e WHERE e.job = $1 AND e.claim = $2 AND e.state = 'running' AND e.cancelled_by IS NULL
    ON CONFLICT DO NOTHING;
    RETURN FOUND;
END $$;

-- What an earlier attempt committed; no row: none did.
CREATE FUNCTION coffer._agent_job_committed(job bigint) RETURNS TABLE (result jsonb, committed_at timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT c.result, c.committed_at FROM coffer.job_commits c WHERE c.job = $1 $$;

-- False when another claim has taken the job: what was done counts, but who has it says so.
CREATE FUNCTION coffer._agent_finish_job(job bigint, claim uuid, state text, result jsonb, error text) RETURNS bool
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    -- A hold that is released before the mirror saw it is over all the same.
    IF $3 = 'done' THEN
        UPDATE coffer.hold_entries h SET is_recorded = true, is_dropped = true FROM coffer.job_entries e
        WHERE e.job = $1 AND e.claim = $2 AND e.state = 'running' AND e.kind = 'release' AND h.id = (e.args ->> 'id')::uuid;
    END IF;
    UPDATE coffer.job_entries e SET state = $3, result = $4, error = $5, finished_at = clock_timestamp(), claim = NULL, message = NULL,
        progress = CASE $3 WHEN 'done' THEN 1 ELSE e.progress END
    WHERE e.job = $1 AND e.claim = $2 AND e.state = 'running';
    RETURN FOUND;
END $$;

-- Gives a job back: to be tried again after a while, or by the next agent.
CREATE FUNCTION coffer._agent_return_job(job bigint, claim uuid, after interval, message text) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    UPDATE coffer.job_entries e SET state = CASE WHEN c.ends THEN 'cancelled' ELSE 'queued' END, claim = NULL, message = $4,
        finished_at = CASE WHEN c.ends THEN clock_timestamp() END,
        not_before = clock_timestamp() + $3, attempts = e.attempts - 1
    FROM (SELECT j.job, j.cancelled_by IS NOT NULL AND NOT EXISTS (SELECT FROM coffer.job_commits d WHERE d.job = j.job) AS ends
          FROM coffer.job_entries j WHERE j.job = $1 FOR UPDATE) c
    WHERE c.job = e.job AND e.job = $1 AND e.claim = $2 AND e.state = 'running'
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
-- Of a reserved tenant the verifications alone: an application's tenant may have a key like its name. Only rows that differ are
-- written.
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
    INSERT INTO coffer.hold_entries AS h (id, tenant, reason, from_time, to_time, held_by, held_at, ends_at, is_recorded)
    SELECT x.id, d.tenant, x.reason, x.from_time, x.to_time, x.held_by, x.held_at, x.ends_at, true
    FROM coffer._mirrored($1) d CROSS JOIN LATERAL jsonb_populate_recordset(NULL::coffer.hold_entries, d.doc -> 'holds') x
    ON CONFLICT (id) DO UPDATE SET is_recorded = true WHERE NOT h.is_recorded;
    UPDATE coffer.hold_entries h SET is_dropped = true, (released_at, released_by) = (
        -- Whose release failed released nothing. The time that the agent went by is that of the mirror.
        SELECT coalesce(r.released_at, now()), coalesce(r.released_by,
            CASE WHEN h.ends_at <= greatest(now(), (SELECT m.as_of FROM coffer.mirror_state m)) THEN 'its end' ELSE 'the command line' END)
        FROM (SELECT) one LEFT JOIN LATERAL (SELECT h.released_at, h.released_by
            WHERE NOT EXISTS (SELECT FROM coffer.job_entries j WHERE j.job = h.job AND j.state = 'failed')) r ON true)
    FROM coffer._mirrored($1) d WHERE d.tenant = h.tenant AND d.doc ? 'holds' AND h.is_recorded AND NOT h.is_dropped
        AND NOT EXISTS (SELECT FROM jsonb_array_elements(d.doc -> 'holds') x WHERE (x ->> 'id')::uuid = h.id);

    INSERT INTO coffer.policy_entries AS p (tenant, policy, set_by, set_at, is_recorded, in_force)
    SELECT d.tenant, d.doc -> 'policy', 'the command line', now(), true, d.doc -> 'policy' FROM coffer._mirrored($1) d
    WHERE jsonb_typeof(d.doc -> 'policy') = 'object'
    -- One that was asked for here is newer until its job is done.
    ON CONFLICT (tenant) DO UPDATE SET policy = CASE WHEN p.is_recorded THEN excluded.policy ELSE p.policy END,
        is_recorded = p.is_recorded OR p.policy = excluded.policy, in_force = excluded.in_force
    WHERE p.in_force IS DISTINCT FROM excluded.in_force OR p.policy = excluded.policy AND NOT p.is_recorded;
END $$;

CREATE FUNCTION coffer._agent_mirrored(as_of timestamptz) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    INSERT INTO coffer.mirror_state AS m (as_of) VALUES ($1) ON CONFLICT (one) DO UPDATE SET as_of = excluded.as_of;
    -- What became of a job is in the audit log's and the catalog's care after a year; what failed of a tenant's retention stands.
    DELETE FROM coffer.job_entries j WHERE j.finished_at < clock_timestamp() - interval '400 days'
        AND NOT (j.kind IN ('hold', 'release', 'policy') AND j.state = 'failed');
    DELETE FROM coffer.job_commits c WHERE NOT EXISTS (SELECT FROM coffer.job_entries j WHERE j.job = c.job)
$$;
COMMENT ON FUNCTION coffer._agent_mirrored(timestamptz) IS 'The mirrors are whole as of now.';
