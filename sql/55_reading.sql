-- One tenant's data for people and for scripts: what is not archived yet, and what is there now.

-- Not from the agent's slot but from a copy of it that lasts for this call: reading takes nothing away from the agent.
CREATE FUNCTION coffer.changes(tenant text, upto_lsn pg_lsn DEFAULT NULL, upto_nchanges int DEFAULT NULL)
RETURNS TABLE (lsn pg_lsn, xid xid8, commit_time timestamptz, op text, relation text, key jsonb, old jsonb, new jsonb)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    slot  name;
    copy  name := format('coffer_changes_%s', pg_backend_pid());
    libs  text := current_setting('output_plugin_libraries', true);
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'no tenant given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    SELECT s.slot_name INTO slot FROM pg_replication_slots s
    WHERE s.plugin = 'pg_coffer' AND s.database = current_database() AND NOT s.temporary AND s.wal_status <> 'lost'
    ORDER BY s.confirmed_flush_lsn DESC LIMIT 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no replication slot to read from' USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = 'The agent makes it at its first start; see coffer.doctor().';
    END IF;
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'coffer.changes() cannot run in a transaction that has written' USING ERRCODE = 'active_sql_transaction';
    END IF;
    -- Newer minors load only listed plugins, whoever asks.
    IF EXISTS (SELECT FROM pg_settings s WHERE s.name = 'output_plugin_libraries') THEN
        PERFORM set_config('output_plugin_libraries', 'pg_coffer', true);
    ELSE
        libs := NULL;
    END IF;
    PERFORM pg_copy_logical_replication_slot(slot, copy, true);
    BEGIN
        RETURN QUERY
            SELECT (c.d ->> 'lsn')::pg_lsn, (c.d ->> 'xid')::xid8, (c.d ->> 'commit_time')::timestamptz, c.d ->> 'op',
                   r.relation, c.d -> 'key', c.d -> 'old', c.d -> 'new'
            FROM (SELECT p.data::jsonb AS d
                  FROM pg_logical_slot_peek_changes(copy, $2, $3, 'format', 'json', 'tenant', $1) p) c
            -- A TRUNCATE names all its tables at once.
            CROSS JOIN LATERAL (SELECT c.d ->> 'relation' WHERE c.d ? 'relation'
                                UNION SELECT t FROM jsonb_array_elements_text(c.d -> 'relations') t) r (relation)
            WHERE c.d ->> 'op' IN ('insert', 'update', 'delete', 'truncate')
              AND ($2 IS NULL OR (c.d ->> 'lsn')::pg_lsn <= $2);
    EXCEPTION WHEN OTHERS THEN
        PERFORM pg_drop_replication_slot(copy);
        RAISE;
    END;
    PERFORM pg_drop_replication_slot(copy);
    IF libs IS NOT NULL THEN
        PERFORM set_config('output_plugin_libraries', libs, true);
    END IF;
    PERFORM coffer._audit('changes', $1);
END $$;
COMMENT ON FUNCTION coffer.changes IS
'The changes of one tenant that are committed but not archived yet, in commit order: whole transactions up to upto_lsn, or until there are upto_nchanges. Nothing is consumed. A TRUNCATE appears for every tenant. Needs a free replication slot while it runs, and a transaction that has not written.';

-- One statement for all tables, so that all of them are seen by one snapshot, and answered without being copied once more.
CREATE FUNCTION coffer._snapshot_query(of_tenant text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    RETURN (
        SELECT 'WITH here AS MATERIALIZED (SELECT pg_current_snapshot() AS seen, pg_current_wal_insert_lsn() AS lsn) '
               'SELECT x.relation, x.row_data, (SELECT seen FROM here), (SELECT lsn FROM here) FROM ('
            -- Inheritance children are tables of their own, partitions are not.
            || string_agg(format('SELECT %L::text, coffer._row_jsonb("the row".*) FROM %s "the row"%s', t.relid::regclass, coffer._from(t.relid), t.condition),
                          ' UNION ALL ' ORDER BY t.relid) || ') x (relation, row_data)'
        FROM (SELECT c.relid, ' WHERE ' || c.condition
              FROM coffer._tenant_conditions(ARRAY(SELECT u.relid FROM coffer.rules u WHERE u.strategy IN (0, 1, 2, 3, 4)), '"the row"', of_tenant) c
              UNION ALL
              SELECT x.oid, '' FROM coffer._schema_rules s CROSS JOIN LATERAL coffer._schema_tables(s.nspid) x (oid) WHERE s.tenant = of_tenant) t (relid, condition));
END $$;

CREATE FUNCTION coffer.snapshot(tenant text)
RETURNS TABLE (relation text, row_data jsonb, snapshot pg_snapshot, lsn pg_lsn)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET row_security = off SET search_path = pg_catalog, coffer, pg_temp
-- A tenant is its text: not the caller's, but the one that is archived.
SET datestyle = 'ISO, MDY' SET timezone = 'UTC' SET intervalstyle = postgres SET extra_float_digits = 3 SET bytea_output = hex SET lc_monetary = 'C'
AS $$
DECLARE
    query  text;
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'no tenant given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    PERFORM coffer._audit('snapshot', $1);
    query := coffer._snapshot_query($1);
    IF query IS NOT NULL THEN
        RETURN QUERY EXECUTE query;
    END IF;
END $$;
COMMENT ON FUNCTION coffer.snapshot IS
'All rows of one tenant as they are now, all as of one snapshot, from every covered table; shared tables are not the tenant''s. Values look the same whatever the caller''s settings are; times are in UTC.';
