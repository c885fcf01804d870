-- Restore points, and waiting until what is committed is safe.

-- Where all sequences stand, but the extension's own and those that another transaction holds locked: nobody waits for
-- a migration here. The position is computed when the values are there, so it is behind all that they count.
CREATE FUNCTION coffer._agent_sequences(OUT names text[], OUT last_values int8[], OUT called bool[], OUT lsn pg_lsn)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp SET lock_timeout = '200ms'
AS $$
    WITH free AS MATERIALIZED (
        SELECT c.oid, format('%I.%I', n.nspname, c.relname) AS name, q.seqstart
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_sequence q ON q.seqrelid = c.oid
        WHERE c.relpersistence <> 't' AND n.nspname <> 'coffer' AND NOT EXISTS (
            SELECT FROM pg_locks l WHERE l.locktype = 'relation' AND l.relation = c.oid AND l.granted
                AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                AND l.mode IN ('ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') AND l.pid <> pg_backend_pid())
    ), read AS MATERIALIZED (
        SELECT f.name, f.seqstart, pg_sequence_last_value(f.oid) AS last_value FROM free f
    )
    SELECT coalesce(array_agg(r.name), '{}'), coalesce(array_agg(coalesce(r.last_value, r.seqstart)), '{}'),
           coalesce(array_agg(r.last_value IS NOT NULL), '{}'), pg_current_wal_insert_lsn()
    FROM read r
$$;
COMMENT ON FUNCTION coffer._agent_sequences() IS
'Where the sequences stand: name, last value (the first one where none was taken yet), whether it was taken.';

-- The stream says nothing of nextval(), so a restore point says it; without a word when it cannot be read at once.
CREATE FUNCTION coffer._mark_sequences() RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    states  jsonb;
BEGIN
    BEGIN
        SELECT jsonb_agg(jsonb_build_array(u.name, u.last_value, u.called)) INTO states
        FROM coffer._agent_sequences() s, unnest(s.names, s.last_values, s.called) u (name, last_value, called);
    EXCEPTION WHEN OTHERS THEN
        -- One was locked or dropped in this moment.
        RETURN;
    END;
    IF states IS NOT NULL THEN
        PERFORM coffer._marker('sequences', convert_to(states::text, 'UTF8'));
    END IF;
END $$;

CREATE FUNCTION coffer.restore_point(name text) RETURNS pg_lsn
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    at  pg_lsn;
BEGIN
    IF coalesce(btrim(name), '') = '' THEN
        RAISE EXCEPTION 'a restore point needs a name' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF name ~ '^backup-[0-9]+$' THEN
        RAISE EXCEPTION 'restore points like % are those of coffer.backup()', quote_literal(name) USING ERRCODE = 'reserved_name',
            HINT = 'Choose another name.';
    END IF;
    IF EXISTS (SELECT FROM coffer.restore_points r WHERE r.name = $1) THEN
        RAISE EXCEPTION 'restore point % exists already', quote_literal(name) USING ERRCODE = 'duplicate_object',
            HINT = 'A name stands for one point, for ever; choose another.';
    END IF;
    PERFORM coffer._mark_sequences();
    at := coffer._marker('restore_point', convert_to(name, 'UTF8'));
    INSERT INTO coffer.restore_points (name, lsn, xid) VALUES ($1, at, pg_current_xact_id());
    PERFORM coffer._audit('restore_point', name, jsonb_build_object('lsn', at));
    RETURN at;
END $$;
COMMENT ON FUNCTION coffer.restore_point IS
'Names the commit of the transaction that calls it, for every tenant: coffer restore --to name:NAME. The result is where the marker is in the log; the point itself is the end of the commit. A name is used once.';

CREATE FUNCTION coffer.wait_durable(lsn pg_lsn DEFAULT NULL, timeout interval DEFAULT '5min') RETURNS pg_lsn
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    -- The insert position may lie just behind a page header that no record reaches; the wake-up below does.
    goal      pg_lsn := coalesce(lsn, pg_current_wal_insert_lsn());
    started   timestamptz := clock_timestamp();
    told      timestamptz := started;
    state     coffer.agent_state;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'coffer.wait_durable() needs READ COMMITTED: another isolation level never sees the progress'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    IF goal > pg_current_wal_insert_lsn() THEN
        RAISE EXCEPTION '% is not written yet: the log ends at %', goal, pg_current_wal_insert_lsn()
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT * INTO state FROM coffer.agent_state;
    IF state.durable_lsn >= goal THEN
        RETURN state.durable_lsn;
    END IF;
    -- Tells the agent, through pg_locks, that somebody waits, and moves the log of an idle server past the goal.
    PERFORM pg_advisory_xact_lock_shared(6516583, 0);
    PERFORM coffer._wake();
    LOOP
        SELECT * INTO state FROM coffer.agent_state;
        IF state.durable_lsn >= goal THEN
            RETURN state.durable_lsn;
        END IF;
        IF clock_timestamp() - started > timeout THEN
            RAISE EXCEPTION '% is not durable after %', goal, timeout
                USING ERRCODE = 'lock_not_available',
                      DETAIL = CASE WHEN state.durable_lsn IS NULL THEN 'No agent has ever reported.'
                               ELSE format('Durable up to %s, reported at %s.', state.durable_lsn, state.reported_at) END,
                      HINT = 'See coffer.doctor().';
        END IF;
        IF clock_timestamp() - told > interval '5 s' THEN
            told := clock_timestamp();
            IF state.reported_at IS NULL THEN
                RAISE NOTICE 'waiting for %: no agent has ever reported', goal;
            ELSIF clock_timestamp() - state.reported_at > interval '30 s' THEN
                RAISE NOTICE 'waiting for %: durable up to %, and no agent has reported for % s', goal, state.durable_lsn,
                    extract(epoch FROM clock_timestamp() - state.reported_at)::int;
            ELSE
                RAISE NOTICE 'waiting for %: durable up to %, % bytes to go', goal, state.durable_lsn, goal - state.durable_lsn;
            END IF;
        END IF;
        PERFORM pg_sleep(0.1);
    END LOOP;
END $$;
COMMENT ON FUNCTION coffer.wait_durable IS
'Returns once everything committed up to lsn (default: up to now) is in every required store, and up to where; raises after timeout. Call it in a transaction of its own: what the calling transaction wrote is not committed and so is not waited for. Says how far it is every five seconds.';

CREATE VIEW coffer.status AS
SELECT CASE WHEN a.one IS NULL THEN 'never reported'
            WHEN a.reported_at < clock_timestamp() - interval '30 s' THEN 'silent'
            ELSE 'reporting' END AS state,
       a.agent, a.durable_lsn, a.durable_time, clock_timestamp() - a.durable_time AS rpo,
       s.slot_name AS slot, s.active AS slot_active, s.wal_status AS slot_wal_status,
       pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_insert_lsn(), s.confirmed_flush_lsn) AS slot_lag_bytes,
       (SELECT count(*) FROM coffer.tenant_entries WHERE state = 'active') AS tenants,
       (SELECT count(*) FROM coffer.coverage WHERE covered) AS covered_tables,
       (SELECT count(*) FROM coffer.coverage WHERE NOT covered AND strategy IS DISTINCT FROM 'excluded') AS uncovered_tables,
       a.reported_at AS as_of
FROM (VALUES (1)) one
LEFT JOIN coffer.agent_state a ON true
LEFT JOIN pg_catalog.pg_replication_slots s ON s.plugin = 'pg_coffer' AND s.database = pg_catalog.current_database() AND NOT s.temporary;
COMMENT ON VIEW coffer.status IS
'How far the backup is, as the agent last reported (as_of), and the replication slot. One row for each slot.';
