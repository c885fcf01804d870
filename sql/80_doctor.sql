-- Every precondition of the backup, and what to paste where one is not met.

-- The roles that setup_agent was called for.
CREATE FUNCTION coffer._roles_of_agents() RETURNS SETOF name
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT r.rolname
    FROM pg_proc p
    CROSS JOIN LATERAL aclexplode(p.proacl) a
    JOIN pg_roles r ON r.oid = a.grantee
    WHERE p.oid = 'coffer._agent_progress(pg_lsn, timestamptz, text)'::regprocedure AND a.grantee <> p.proowner
    ORDER BY 1
$$;

CREATE FUNCTION coffer._doctor_server() RETURNS TABLE (check_name text, ok bool, found text, fix text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    slots    int := (SELECT count(*) FROM pg_replication_slots);
    senders  int := (SELECT count(*) FROM pg_stat_replication);
    have     bool := EXISTS (SELECT FROM pg_replication_slots s WHERE s.plugin = 'pg_coffer' AND s.database = current_database());
BEGIN
    RETURN QUERY SELECT 'wal_level', s.setting = 'logical', s.setting,
        CASE WHEN s.setting <> 'logical' THEN 'ALTER SYSTEM SET wal_level = logical; -- and restart' END
        FROM pg_settings s WHERE s.name = 'wal_level';
    RETURN QUERY SELECT 'max_replication_slots', have OR s.setting::int > slots, format('%s of %s in use', slots, s.setting),
        CASE WHEN NOT have AND s.setting::int <= slots
             THEN format('ALTER SYSTEM SET max_replication_slots = %s; -- and restart', slots + 4) END
        FROM pg_settings s WHERE s.name = 'max_replication_slots';
    RETURN QUERY SELECT 'max_wal_senders', s.setting::int > senders OR have AND s.setting::int > 0, format('%s of %s in use', senders, s.setting),
        CASE WHEN NOT (s.setting::int > senders OR have AND s.setting::int > 0)
             THEN format('ALTER SYSTEM SET max_wal_senders = %s; -- and restart', senders + 4) END
        FROM pg_settings s WHERE s.name = 'max_wal_senders';
    RETURN QUERY SELECT 'max_slot_wal_keep_size', true,
        CASE WHEN s.setting = '-1' THEN 'no limit: while the agent is away, the log grows until the disk is full'
             ELSE format('%s MB: an agent that is further behind needs new bases of everything', s.setting) END, NULL
        FROM pg_settings s WHERE s.name = 'max_slot_wal_keep_size';
    RETURN QUERY SELECT 'idle_replication_slot_timeout', s.setting = '0', s.setting || coalesce(s.unit, ''),
        CASE WHEN s.setting <> '0' THEN 'ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();' END
        FROM pg_settings s WHERE s.name = 'idle_replication_slot_timeout';
    RETURN QUERY SELECT format('event trigger %s', w.name), coalesce(e.evtenabled = 'A', false),
        CASE e.evtenabled WHEN 'A' THEN 'always' WHEN 'D' THEN 'disabled' WHEN 'O' THEN 'not in sessions that replicate'
                          WHEN 'R' THEN 'only in sessions that replicate' ELSE 'missing' END,
        CASE WHEN e.evtenabled IS NULL THEN 'DROP EXTENSION pg_coffer CASCADE; CREATE EXTENSION pg_coffer; -- and cover the tables again'
             WHEN e.evtenabled <> 'A' THEN format('ALTER EVENT TRIGGER %I ENABLE ALWAYS', w.name) END
        FROM (VALUES ('coffer_ddl'), ('coffer_drop'), ('coffer_rewrite'), ('coffer_schema')) w (name)
        LEFT JOIN pg_event_trigger e ON e.evtname = w.name
        ORDER BY w.name;
END $$;

CREATE FUNCTION coffer._doctor_agent() RETURNS TABLE (check_name text, ok bool, found text, fix text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    agent    name;
    allowed  text;
    n        int := 0;
BEGIN
    FOR agent IN SELECT a FROM coffer._roles_of_agents() a LOOP
        n := n + 1;
        RETURN QUERY SELECT format('role %I', agent),
            r.rolsuper OR missing.words IS NULL,
            coalesce('lacks ' || missing.words, 'may all it needs'),
            CASE WHEN NOT r.rolsuper AND missing.words IS NOT NULL THEN format('SELECT coffer.setup_agent(%L); -- as a superuser', agent) END
        FROM pg_roles r
        CROSS JOIN LATERAL (
            SELECT string_agg(w.word, ', ') AS words FROM (VALUES
                (r.rolcanlogin, 'LOGIN'), (r.rolreplication, 'REPLICATION'), (r.rolbypassrls, 'BYPASSRLS'),
                (pg_has_role(r.oid, 'pg_read_all_data', 'USAGE'), 'pg_read_all_data'),
                (pg_has_role(r.oid, 'pg_write_all_data', 'USAGE'), 'pg_write_all_data'),
                (has_database_privilege(r.oid, current_database(), 'CREATE'), 'CREATE on the database'),
                (has_parameter_privilege(r.oid, 'session_replication_role', 'SET'), 'SET on session_replication_role')
            ) w (has, word) WHERE NOT w.has
        ) missing
        WHERE r.rolname = agent;

        -- The role's own setting, in this database or in any; else the server's.
        SELECT split_part(c, '=', 2) INTO allowed
        FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole CROSS JOIN LATERAL unnest(s.setconfig) c
        WHERE r.rolname = agent AND s.setdatabase IN (0, (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))
          AND starts_with(c, 'output_plugin_libraries=')
        ORDER BY s.setdatabase DESC LIMIT 1;
        RETURN QUERY SELECT format('output_plugin_libraries of %I', agent), l.listed, coalesce(allowed, s.reset_val),
            CASE WHEN NOT l.listed THEN format('ALTER ROLE %I SET output_plugin_libraries = pgoutput, test_decoding, pg_coffer', agent) END
        FROM pg_settings s
        CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM regexp_split_to_table(coalesce(allowed, s.reset_val), '\s*,\s*') p
                                           WHERE btrim(p, ' "') IN ('pg_coffer', '$libdir/pg_coffer', '*')) AS listed) l
        WHERE s.name = 'output_plugin_libraries';
    END LOOP;
    IF n = 0 THEN
        RETURN QUERY SELECT 'role', false, 'coffer.setup_agent() was never called',
            'CREATE ROLE coffer_agent LOGIN; SELECT coffer.setup_agent(''coffer_agent'');';
    END IF;

    IF NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.plugin = 'pg_coffer' AND s.database = current_database() AND NOT s.temporary) THEN
        RETURN QUERY SELECT 'slot', false, 'there is none: the agent makes it at its first start', NULL;
    END IF;
    RETURN QUERY SELECT format('slot %I', s.slot_name), s.active AND s.wal_status IN ('reserved', 'extended'),
        format('%s, log %s, %s behind', CASE WHEN s.active THEN 'active' ELSE 'not active' END, s.wal_status,
               pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), s.confirmed_flush_lsn))),
        CASE WHEN s.wal_status = 'lost' THEN format('SELECT pg_drop_replication_slot(%L); -- the agent makes a new one and takes new bases', s.slot_name)
             WHEN s.wal_status = 'unreserved' THEN 'ALTER SYSTEM SET max_slot_wal_keep_size = -1; SELECT pg_reload_conf(); -- at once'
             WHEN NOT s.active THEN NULL END
        FROM pg_replication_slots s
        WHERE s.plugin = 'pg_coffer' AND s.database = current_database() AND NOT s.temporary;
    RETURN QUERY SELECT 'agent', coalesce(a.reported_at > clock_timestamp() - interval '30 s', false),
        CASE WHEN a.reported_at IS NULL THEN 'never reported'
             ELSE format('reported %s s ago: durable up to %s', extract(epoch FROM clock_timestamp() - a.reported_at)::int, a.durable_lsn) END,
        NULL
        FROM (VALUES (1)) one LEFT JOIN coffer.agent_state a ON true;
END $$;

CREATE FUNCTION coffer._doctor_tables() RETURNS TABLE (check_name text, ok bool, found text, fix text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT format('table %s', r.relid::regclass), false, string_agg(f.finding, '; '),
        CASE WHEN r.strategy = 6 THEN format('SELECT * FROM coffer.add_shared(%L);', r.relid::regclass::text)
             ELSE format('SELECT * FROM coffer.add_table(%L%s, class => %L);', r.relid::regclass::text,
                         CASE WHEN r.tenant_column IS NOT NULL THEN format(', %L', r.tenant_column)
                              WHEN r.parent <> 0 THEN format(', parent => %L', r.parent::regclass::text) END,
                         coffer._class_name(r.class)) END
        FROM coffer.rules r CROSS JOIN LATERAL coffer._findings(r.relid) f
        WHERE EXISTS (SELECT FROM pg_class c WHERE c.oid = r.relid)
        GROUP BY r.relid ORDER BY r.relid::regclass::text COLLATE "C";
    RETURN QUERY SELECT format('table %s', t::regclass), false, string_agg(f.finding, '; '),
        format('SELECT * FROM coffer.add_schema(%L, %L, %L);', n.nspname, s.tenant, coffer._class_name(s.class))
        FROM coffer._schema_rules s JOIN pg_namespace n ON n.oid = s.nspid
        CROSS JOIN LATERAL coffer._schema_tables(s.nspid) t CROSS JOIN LATERAL coffer._findings(t) f
        GROUP BY t, n.nspname, s.tenant, s.class ORDER BY t::regclass::text COLLATE "C";
    RETURN QUERY SELECT format('schema %I', s.schema), false,
        format('belongs to tenant %s, but %s: no row is taken for the tenant''s by this rule', s.tenant,
               CASE WHEN n.oid IS NULL THEN 'there is none of this name any more'
                    ELSE 'is not the schema that this was said of: that one was renamed or dropped while event triggers were off' END),
        format('SELECT * FROM coffer.%s;', CASE WHEN n.oid IS NULL THEN format('remove_schema(%L)', s.schema)
               ELSE format('add_schema(%L, %L, %L)', s.schema, s.tenant, coffer._class_name(s.class)) END)
            || coalesce((SELECT format(' -- or, if it was renamed: SELECT * FROM coffer.add_schema(%L, %L, %L);', o.nspname, s.tenant, coffer._class_name(s.class))
                         FROM pg_namespace o WHERE o.oid = s.nspid AND s.system_id = coffer._system_id()), '')
        FROM coffer.schema_rules s LEFT JOIN pg_namespace n ON n.nspname = s.schema
        WHERE NOT EXISTS (SELECT FROM coffer._schema_rules r WHERE r.noted = s.nspid)
        ORDER BY s.schema COLLATE "C";
    -- What an application's trigger does after ours is not in the tag.
    RETURN QUERY SELECT format('table %s', g.tgrelid::regclass), false,
        format('trigger %I fires after the tag triggers and may change the tenant unseen', g.tgname),
        format('ALTER TRIGGER %I ON %s RENAME TO %I', g.tgname, g.tgrelid::regclass, 'a_' || g.tgname)
        FROM coffer.rules r CROSS JOIN LATERAL coffer._tree(r.relid) m JOIN pg_trigger g ON g.tgrelid = m.relid
        WHERE r.strategy = 1 AND g.tgparentid = 0 AND NOT g.tgisinternal AND g.tgfoid <> to_regprocedure('coffer._tag()') AND g.tgname > 'zzz_coffer_tag_move_tree' COLLATE "C"
          AND g.tgtype & 3 = 3 AND g.tgtype & 24 <> 0
        ORDER BY 1;
    RETURN QUERY SELECT format('table %s', g.tgrelid::regclass), false, 'has a trigger of the extension''s but no rule, as after a restore from a dump',
        format('DROP TRIGGER %I ON %s; -- or cover the table again', g.tgname, g.tgrelid::regclass)
        FROM pg_trigger g
        WHERE g.tgfoid IN (to_regprocedure('coffer._tag()'), to_regprocedure('coffer._fill()')) AND g.tgparentid = 0
          AND NOT EXISTS (SELECT FROM coffer.rules r WHERE r.relid = coffer._root(g.tgrelid))
        ORDER BY g.tgrelid::regclass::text COLLATE "C", g.tgname;
    RETURN QUERY SELECT format('table %s', c.relation), false, 'not covered: ' || c.reason,
        CASE WHEN coffer._obstacle(c.relation) IS NOT NULL
             THEN format('SELECT * FROM coffer.exclude(%L, %L);', c.relation::text, coffer._obstacle(c.relation))
             WHEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.relation AND a.attname = coffer._auto_column() AND NOT a.attisdropped)
             THEN format('SELECT * FROM coffer.add_table(%L, %L);', c.relation::text, coffer._auto_column())
             ELSE format('SELECT * FROM coffer.add_shared(%L); -- or add_table(%1$L, COLUMN), or exclude(%1$L, REASON)', c.relation::text) END
        FROM coffer.coverage c WHERE NOT c.covered AND c.strategy IS DISTINCT FROM 'excluded'
        ORDER BY c.relation::text COLLATE "C";
    RETURN QUERY SELECT format('table %s', l.relid::regclass), false, format('large objects that column %I refers to are not kept', l.name),
        format('SELECT coffer.add_large_objects(%L, %L);', l.relid::regclass::text, l.name)
        FROM coffer._large_object_columns l JOIN coffer.coverage c ON c.relation = l.relid AND c.covered
        WHERE NOT l.kept ORDER BY l.relid::regclass::text COLLATE "C", l.attnum;
    RETURN QUERY SELECT 'covered tables', count(*) FILTER (WHERE c.covered) > 0,
        format('%s covered, %s excluded, %s not covered', count(*) FILTER (WHERE c.covered),
               count(*) FILTER (WHERE c.strategy = 'excluded'), count(*) FILTER (WHERE NOT c.covered AND c.strategy IS DISTINCT FROM 'excluded')),
        CASE WHEN count(*) FILTER (WHERE c.covered) = 0 THEN 'SELECT * FROM coffer.discover(''tenant_id''); -- or whatever the column is called' END
        FROM coffer.coverage c;
END $$;

CREATE FUNCTION coffer.doctor() RETURNS TABLE (check_name text, ok bool, found text, fix text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT * FROM coffer._doctor_server()
    UNION ALL SELECT * FROM coffer._doctor_agent()
    UNION ALL SELECT * FROM coffer._doctor_tables()
$$;
COMMENT ON FUNCTION coffer.doctor IS
'Every precondition of the backup: what was found, and, where it is not right, the statement to paste. A table appears when something is wrong with it.';
