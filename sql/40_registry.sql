-- What a database administrator says about tables: cover, share, exclude, forget.

-- Refuses what cannot be covered, with the reason. NULL relations are refused here as well.
CREATE FUNCTION coffer._obstacle(rel oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT CASE
        WHEN c.relkind = 'v' THEN 'is a view'
        WHEN c.relkind = 'm' THEN 'is a materialized view: its rows come from other tables'
        WHEN c.relkind = 'f' THEN 'is a foreign table: its rows are kept elsewhere'
        WHEN c.relkind NOT IN ('r', 'p') THEN 'is not a table'
        WHEN c.oid < 16384 OR n.nspname IN ('pg_catalog', 'information_schema', 'pg_toast') THEN 'is a system table'
        WHEN n.nspname = 'coffer' THEN 'belongs to pg_coffer'
        WHEN c.relpersistence = 't' THEN 'is a temporary table'
        WHEN c.relpersistence = 'u' THEN 'is unlogged: its changes are not in the log'
    END
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = rel
$$;

CREATE FUNCTION coffer._require_table(rel regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    obstacle  text := coffer._obstacle(rel);
BEGIN
    IF rel IS NULL THEN
        RAISE EXCEPTION 'no table given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF obstacle IS NOT NULL THEN
        RAISE EXCEPTION '% %', rel, obstacle USING ERRCODE = 'wrong_object_type';
    END IF;
    IF coffer._root(rel) <> rel THEN
        RAISE EXCEPTION '% is a partition', rel USING ERRCODE = 'wrong_object_type',
            HINT = format('Name the partitioned table: %s.', coffer._root(rel)::regclass);
    END IF;
END $$;

CREATE FUNCTION coffer._lock(root oid, mode text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    -- Without ONLY a partitioned table's partitions are locked too; inheritance children are tables of their own.
    EXECUTE format('LOCK TABLE %s%s IN %s MODE',
        CASE (SELECT relkind FROM pg_class WHERE oid = root) WHEN 'p' THEN '' ELSE 'ONLY ' END, root::regclass, mode);
END $$;

-- Writes a rule and makes the table fit it. Locks nothing: the caller holds what it needs. `rebase` says that rows as
-- they were archived so far no longer continue into what follows, so the table needs a new base. `way`: the rule's parent
-- and how it is found.
CREATE FUNCTION coffer._cover(root oid, plan_strategy int2, tenant name, class int2, rebase bool, way coffer._way DEFAULT NULL) RETURNS text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    p       record;
    before  coffer.rules;
    now_r   coffer.rules;
BEGIN
    PERFORM coffer._absorb(root);
    SELECT * INTO p FROM coffer._plan(root, tenant);
    IF plan_strategy = 3 AND p.key_index = 0 AND NOT coffer._is_published(root) THEN
        -- The log has to name a row by the key that its tenant is kept by: the whole old row will not do.
        SELECT CASE WHEN k.is_primary THEN 'd' ELSE 'i' END, k.index_oid, k.sorted, format('rows are named by %I', k.index_name)
        INTO p.identity, p.key_index, p.key_columns, p.reason
        FROM coffer._keys(root) k WHERE k.obstacle IS NULL
        ORDER BY k.is_primary DESC, cardinality(k.columns), k.index_oid LIMIT 1;
        p.key_index := coalesce(p.key_index, 0);
    END IF;
    IF plan_strategy = 3 AND p.key_index = 0 THEN
        RAISE EXCEPTION '% has no usable key: nothing tells later whose a row of it is', root::regclass
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'A primary key will do, or a tenant column.';
    END IF;
    IF coalesce(p.strategy, plan_strategy) NOT IN (0, 1, 2, 4) THEN
        PERFORM coffer._refuse_with_children(root, 'covered so');
    END IF;
    -- The rule goes first and comes back last: what the event triggers see in between is a table without a rule.
    DELETE FROM coffer.rules WHERE relid = root RETURNING * INTO before;
    PERFORM coffer._apply_identity(root, p.identity, p.key_index);
    now_r := before;
    now_r.relid := root;
    now_r.strategy := coalesce(p.strategy, plan_strategy);
    now_r.class := class;
    now_r.tenant_attnum := coalesce((SELECT attnum FROM pg_attribute WHERE attrelid = root AND attname = tenant), 0);
    now_r.tenant_column := tenant;
    now_r.identity := p.identity;
    now_r.key_index := p.key_index;
    now_r.key_columns := p.key_columns;
    now_r.reason := p.reason;
    PERFORM coffer._note_types(root);
    IF now_r.strategy = 2 THEN
        now_r.parent := way.parent; now_r.path_attnums := way.attnums; now_r.parent_attnums := way.parent_attnums;
        now_r.path_guarded := way.constraint_oid <> 0; now_r.reason := concat_ws('; ', way.reason, p.reason);
        -- Rows that were let pass stay, even when the foreign key holds again.
        now_r.path_loose := NOT coffer._holds(way.constraint_oid)
            OR (before.path_loose AND (before.parent, before.path_attnums, before.parent_attnums) = (way.parent, way.attnums, way.parent_attnums)) IS TRUE;
    ELSE
        now_r.parent := 0; now_r.path_attnums := NULL; now_r.parent_attnums := NULL;
        now_r.path_guarded := NULL; now_r.path_loose := NULL;
        IF now_r.strategy = 3 THEN
            now_r.reason := concat_ws('; ', 'a row''s tenant is what the session''s setting coffer.tenant said when it was inserted; every change writes a tag', p.reason);
        END IF;
    END IF;
    rebase := coalesce(rebase, false) OR before.relid IS NULL
        OR (before.strategy, before.tenant_attnum, before.key_columns, before.parent, before.path_attnums, before.parent_attnums)
           IS DISTINCT FROM (now_r.strategy, now_r.tenant_attnum, now_r.key_columns, now_r.parent, now_r.path_attnums, now_r.parent_attnums);
    IF rebase THEN
        now_r.registered_xid := pg_current_xact_id(); now_r.registered_at := now();
    END IF;
    IF now_r.strategy <> 3 OR before.strategy IS DISTINCT FROM 3 THEN
        DELETE FROM coffer.session_rows s WHERE s.relid = root;
    END IF;
    IF NOT coffer._triggers_intact(root, tenant, now_r.strategy) THEN
        PERFORM coffer._drop_triggers(root);
        PERFORM coffer._create_triggers(root, tenant, now_r.strategy);
    END IF;
    DELETE FROM coffer.exclusions WHERE relid = root;
    INSERT INTO coffer.rules SELECT (now_r).*;
    PERFORM coffer._changed(root, 'add', rebase, before.relid IS NULL AND coffer._is_fresh(root));
    IF before.parent <> now_r.parent THEN
        PERFORM coffer._sync_parent(before.parent);
    END IF;
    PERFORM coffer._sync_parent(now_r.parent);
    PERFORM coffer._sync_parent(root);
    -- Where no foreign key keeps parents from coming and going with a partition, rows below change hands with it.
    IF before.relid IS NOT NULL AND rebase AND ((before.strategy, before.tenant_attnum, before.parent, before.path_attnums)
           IS DISTINCT FROM (now_r.strategy, now_r.tenant_attnum, now_r.parent, now_r.path_attnums)
           OR EXISTS (SELECT FROM coffer.rules r WHERE r.parent = root AND r.path_loose)) THEN
        PERFORM coffer._rebase_descendants(root);
    END IF;
    RETURN now_r.reason;
END $$;

-- The lock that covering a table needs, taken at once: a weaker one first would invite deadlocks with its readers.
CREATE FUNCTION coffer._lock_to_cover(root oid, tenant name) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    p       record;
    alters  bool;
BEGIN
    SELECT * INTO p FROM coffer._plan(root, tenant);
    SELECT bool_or(c.relreplident <> p.identity OR (p.identity = 'i' AND NOT i.indisreplident)) INTO alters
    FROM coffer._tree(root) t JOIN pg_class c ON c.oid = t.relid
    LEFT JOIN pg_index i ON i.indexrelid = coffer._index_in(t.relid, p.key_index)
    WHERE t.relkind IN ('r', 'p');
    PERFORM coffer._lock(root, CASE WHEN alters THEN 'ACCESS EXCLUSIVE' ELSE 'SHARE ROW EXCLUSIVE' END);
END $$;

-- Covers a table whose tenant is behind a foreign key or, without a parent, is named by the session.
CREATE FUNCTION coffer._add_without_column(rel regclass, by_parent regclass, class_no int2, of_class text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    way  coffer._way;
    up   oid;
BEGIN
    PERFORM coffer._require_table(rel);
    IF by_parent IS NOT NULL THEN
        PERFORM coffer._require_table(by_parent);
        way := coffer._plan_path(rel, by_parent);
        IF way.parent IS NULL THEN
            RAISE EXCEPTION '% has no foreign key to % by which its tenant can be found', rel, by_parent
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = coalesce(coffer._path_obstacles(rel, by_parent), 'Add one, or cover the table by a tenant column.');
        END IF;
        -- Writers of every table above stay out until the triggers are there: from the top down, as they go.
        FOR up IN SELECT a.relid FROM coffer._ancestors(by_parent) a ORDER BY a.depth DESC LOOP
            PERFORM coffer._lock(up, 'SHARE ROW EXCLUSIVE');
        END LOOP;
        PERFORM coffer._lock(by_parent, 'SHARE ROW EXCLUSIVE');
    END IF;
    PERFORM coffer._lock_to_cover(rel, NULL);
    PERFORM coffer._require_table(rel);
    IF by_parent IS NULL THEN
        IF EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel AND r.strategy <> 3) THEN
            RAISE EXCEPTION '% has a rule that says more than the session: %', rel,
                (SELECT coffer._strategy_name(r.strategy) FROM coffer.rules r WHERE r.relid = rel)
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'Say which column holds the tenant, or which parent; or call coffer.remove_table() first.';
        END IF;
        PERFORM coffer._cover(rel, 3::int2, NULL, class_no, true);
        PERFORM coffer._audit('add_table', rel::text, jsonb_build_object('strategy', 'session', 'class', of_class));
        RETURN;
    END IF;
    way := coffer._plan_path(rel, by_parent);
    IF coffer._holds(way.constraint_oid) AND EXISTS (
        SELECT FROM coffer.rules r WHERE r.relid = rel AND r.path_loose
        AND (r.parent, r.path_attnums, r.parent_attnums) = (way.parent, way.attnums, way.parent_attnums)) THEN
        UPDATE coffer.rules r SET path_loose = coffer._has_strays(rel) WHERE r.relid = rel;
    END IF;
    PERFORM coffer._cover(rel, 2::int2, NULL, class_no, EXISTS (SELECT FROM coffer._findings(rel)), way);
    PERFORM coffer._audit('add_table', rel::text, jsonb_build_object('parent', by_parent::text, 'class', of_class));
END $$;

-- Arguments and result columns of the public functions share names, which SQL allows and plpgsql does not: hence a body
-- under a name of its own.
CREATE FUNCTION coffer._add_table(rel regclass, by_column name, by_parent regclass, of_class text)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    class_no  int2 := coffer._class_number(of_class);
    att       record;
BEGIN
    IF by_column IS NOT NULL AND by_parent IS NOT NULL THEN
        RAISE EXCEPTION 'a table has a tenant column or a parent, not both' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF by_column IS NULL THEN
        PERFORM coffer._add_without_column(rel, by_parent, class_no, of_class);
        RETURN QUERY
            SELECT r.relid::regclass, coffer._strategy_name(r.strategy), r.tenant_column, nullif(r.parent, 0)::regclass,
                   coffer._class_name(r.class), r.reason
            FROM coffer.rules r WHERE r.relid = rel;
        RETURN;
    END IF;
    PERFORM coffer._require_table(rel);
    PERFORM coffer._lock_to_cover(rel, by_column);
    PERFORM coffer._require_table(rel);
    SELECT a.attnum, a.attgenerated INTO att FROM pg_attribute a
    WHERE a.attrelid = rel AND a.attname = by_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'table % has no column %', rel, quote_ident(by_column) USING ERRCODE = 'undefined_column';
    END IF;
    IF att.attgenerated = 'v' THEN
        RAISE EXCEPTION 'column % of % is a virtual generated column: its values are not in the log', quote_ident(by_column), rel
            USING ERRCODE = 'feature_not_supported', HINT = 'A stored generated column will do.';
    END IF;
    -- Where what the rule relies on is broken, who knows what was written in the meantime.
    PERFORM coffer._cover(rel, NULL, by_column, class_no, EXISTS (SELECT FROM coffer._findings(rel)));
    PERFORM coffer._audit('add_table', rel::text, jsonb_build_object('tenant_column', by_column, 'class', of_class));
    RETURN QUERY
        SELECT r.relid::regclass, coffer._strategy_name(r.strategy), r.tenant_column, nullif(r.parent, 0)::regclass,
               coffer._class_name(r.class), r.reason
        FROM coffer.rules r WHERE r.relid = rel;
END $$;
CREATE FUNCTION coffer.add_table(
    rel regclass, tenant_column name DEFAULT NULL, parent regclass DEFAULT NULL, class text DEFAULT 'data')
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT * FROM coffer._add_table($1, $2, $3, $4) $$;
COMMENT ON FUNCTION coffer.add_table IS
'Covers a table whose rows belong to tenants: tenant_column holds the tenant, whose key is the column''s text. The cheapest strategy that is right is chosen and said: identity (the tenant is in the key: no cost), tag (a message in the log for a DELETE or a change of tenant), full_row (the whole old row in the log). Without a column: parent names a covered table that a foreign key leads to, whose row says the tenant (path); with neither, a row belongs to the tenant that the session''s setting coffer.tenant named when it was inserted (session: the last resort). Where a session has set it, a row of another tenant is an alarm: every change of a path or session table, a DELETE or move of a tag table; others are not looked at. No index is created; the reason names one that would be cheaper. Give the root of a partitioned table; its partitions follow. Calling it again re-plans. class (data, config, accounts, customization, audit) lets a restore be restricted.';

CREATE FUNCTION coffer.add_shared(rel regclass)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM coffer._require_table(rel);
    PERFORM coffer._lock_to_cover(rel, NULL);
    PERFORM coffer._require_table(rel);
    PERFORM coffer._cover(rel, 6::int2, NULL, 0::int2, EXISTS (SELECT FROM coffer._findings(rel)));
    PERFORM coffer._audit('add_shared', rel::text);
    RETURN QUERY
        SELECT r.relid::regclass, coffer._strategy_name(r.strategy), NULL::name, NULL::regclass, coffer._class_name(r.class), r.reason
        FROM coffer.rules r WHERE r.relid = rel;
END $$;
COMMENT ON FUNCTION coffer.add_shared IS
'Covers reference data that belongs to no tenant: it is kept once, under a reserved tenant of its own.';

CREATE FUNCTION coffer._exclude(rel regclass, because text)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    kind  "char" := (SELECT relkind FROM pg_class WHERE oid = rel);
BEGIN
    IF coalesce(btrim(because), '') = '' THEN
        RAISE EXCEPTION 'an exclusion needs a reason' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'It is shown in coffer.coverage to whoever asks why the table is not backed up.';
    END IF;
    -- What cannot be covered may well be excluded, so that coverage has nothing left to ask about.
    IF rel IS NULL OR kind NOT IN ('r', 'p', 'f') THEN
        PERFORM coffer._require_table(rel);
    END IF;
    IF coffer._root(rel) <> rel THEN
        PERFORM coffer._require_table(rel);
    END IF;
    IF EXISTS (SELECT FROM coffer._schema_rules s JOIN pg_class c ON c.relnamespace = s.nspid WHERE c.oid = rel) THEN
        RAISE EXCEPTION '% lies in a schema that belongs to one tenant', rel USING ERRCODE = 'feature_not_supported',
            HINT = 'Every table of such a schema is covered in this version; move the table to another schema.';
    END IF;
    PERFORM coffer._forget(rel);
    INSERT INTO coffer.exclusions AS e (relid, reason) VALUES (rel, because)
    ON CONFLICT (relid) DO UPDATE SET reason = excluded.reason, excluded_at = excluded.excluded_at, excluded_by = excluded.excluded_by;
    PERFORM coffer._changed(rel, 'exclude');
    PERFORM coffer._audit('exclude', rel::text, jsonb_build_object('reason', because));
    RETURN QUERY SELECT rel, 'excluded', NULL::name, NULL::regclass, NULL::text, because;
END $$;
CREATE FUNCTION coffer.exclude(rel regclass, reason text)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT * FROM coffer._exclude($1, $2) $$;
COMMENT ON FUNCTION coffer.exclude IS
'Leaves a table out of the backup on purpose, and says why in coffer.coverage.';

-- Ends a table's rule and takes back what was done to the table; says whether there was one.
CREATE FUNCTION coffer._forget(rel oid) RETURNS bool
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    m   oid;
    up  oid;
BEGIN
    IF NOT EXISTS (SELECT FROM coffer.rules WHERE relid = rel) THEN
        RETURN false;
    END IF;
    PERFORM coffer._refuse_with_children(rel, 'left out');
    PERFORM coffer._lock(rel, 'ACCESS EXCLUSIVE');
    DELETE FROM coffer.rules WHERE relid = rel RETURNING parent INTO up;
    DELETE FROM coffer.session_rows s WHERE s.relid = rel;
    DELETE FROM coffer.large_object_entries e WHERE e.relid = rel;
    PERFORM coffer._drop_triggers(rel);
    PERFORM coffer._sync_parent(up);
    PERFORM coffer._sync_parent(rel);
    FOR m IN SELECT relid FROM coffer.rule_relations WHERE root = rel LOOP
        PERFORM coffer._restore_identity(m);
    END LOOP;
    RETURN true;
END $$;

CREATE FUNCTION coffer.remove_table(rel regclass)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    before  coffer.rules;
BEGIN
    SELECT * INTO before FROM coffer.rules r WHERE r.relid = rel;
    IF coffer._forget(rel) THEN
        PERFORM coffer._changed(rel, 'remove');
        PERFORM coffer._audit('remove_table', rel::text);
        IF EXISTS (SELECT FROM coffer._schema_rules s JOIN pg_class c ON c.relnamespace = s.nspid WHERE c.oid = rel) THEN
            PERFORM coffer._consider(rel, 'ALTER TABLE');
        END IF;
        RETURN QUERY SELECT rel, coffer._strategy_name(before.strategy), before.tenant_column, nullif(before.parent, 0)::regclass,
                            coffer._class_name(before.class), 'no longer covered; replica identity and triggers are as they were before';
        RETURN;
    END IF;
    DELETE FROM coffer.exclusions e WHERE e.relid = rel;
    IF FOUND THEN
        PERFORM coffer._changed(rel, 'remove');
        PERFORM coffer._audit('remove_table', rel::text);
        RETURN QUERY SELECT rel, 'excluded', NULL::name, NULL::regclass, NULL::text, 'no longer excluded';
        RETURN;
    END IF;
    RAISE EXCEPTION '% is neither covered nor excluded by a rule of its own', rel USING ERRCODE = 'undefined_object',
        HINT = CASE WHEN coffer._root(rel) <> rel THEN format('Name the partitioned table: %s.', coffer._root(rel)::regclass)
                    WHEN EXISTS (SELECT FROM coffer._schema_rules s JOIN pg_class c ON c.relnamespace = s.nspid WHERE c.oid = rel)
                    THEN 'It is covered with its schema; see coffer.remove_schema().'
                    ELSE 'See coffer.coverage.' END;
END $$;
COMMENT ON FUNCTION coffer.remove_table IS
'Ends the coverage (or the exclusion) of a table. The triggers go, and the replica identity becomes what it was before. What is archived stays restorable by its retention.';

-- The tables of a schema that its rule covers: those without a rule of their own.
CREATE FUNCTION coffer._schema_tables(nsp oid) RETURNS SETOF oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT c.oid FROM pg_class c
    WHERE c.relnamespace = nsp AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT c.relispartition
      AND NOT EXISTS (SELECT FROM coffer.rules r WHERE r.relid = c.oid)
    ORDER BY c.relname
$$;

CREATE FUNCTION coffer._cover_schema_table(rel oid) RETURNS text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    p  record;
BEGIN
    PERFORM coffer._absorb(rel);
    SELECT * INTO p FROM coffer._plan(rel, NULL);
    PERFORM coffer._apply_identity(rel, p.identity, p.key_index);
    UPDATE coffer.rule_relations m SET tenant = s.tenant FROM pg_class c JOIN coffer._schema_rules s ON s.nspid = c.relnamespace
    WHERE m.relid = rel AND c.oid = rel;
    PERFORM coffer._invalidate(t.relid) FROM coffer._tree(rel) t;
    RETURN p.reason;
END $$;

-- Says whose a schema is, in the place of whatever was said of its OID or of its name.
CREATE FUNCTION coffer._write_schema_rule(nsp oid, of_schema name, class int2, tenant text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM coffer._adopt_schemas();
    -- User catalog tables know no ON CONFLICT.
    DELETE FROM coffer.schema_rules s WHERE s.nspid = nsp OR s.schema = of_schema;
    INSERT INTO coffer.schema_rules (nspid, class, tenant, registered_xid, registered_at, schema, system_id)
    VALUES (nsp, $3, $4, pg_current_xact_id(), now(), of_schema, coffer._system_id());
END $$;

CREATE FUNCTION coffer._add_schema(of_schema name, of_tenant text, of_class text)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    class_no  int2 := coffer._class_number(of_class);
    nsp       oid;
    rel       oid;
BEGIN
    SELECT n.oid INTO nsp FROM pg_namespace n WHERE n.nspname = of_schema;
    IF nsp IS NULL THEN
        RAISE EXCEPTION 'schema % does not exist', coalesce(quote_ident(of_schema), 'NULL') USING ERRCODE = 'invalid_schema_name';
    END IF;
    IF nsp < 16384 AND of_schema <> 'public' OR of_schema = 'coffer' OR starts_with(of_schema, 'pg_') THEN
        RAISE EXCEPTION 'schema % cannot belong to a tenant', quote_ident(of_schema) USING ERRCODE = 'wrong_object_type';
    END IF;
    IF of_tenant IS NULL THEN
        RAISE EXCEPTION 'no tenant given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    FOR rel IN SELECT t FROM coffer._schema_tables(nsp) t LOOP
        PERFORM coffer._lock_to_cover(rel, NULL);
    END LOOP;
    PERFORM coffer._write_schema_rule(nsp, of_schema, class_no, of_tenant);
    DELETE FROM coffer.exclusions e USING pg_class c WHERE c.oid = e.relid AND c.relnamespace = nsp;
    FOR rel IN SELECT t FROM coffer._schema_tables(nsp) t LOOP
        relation := rel; strategy := 'schema'; tenant_column := NULL; parent := NULL; class := of_class;
        reason := coffer._cover_schema_table(rel);
        PERFORM coffer._changed(rel, 'add', true, coffer._is_fresh(rel));
        RETURN NEXT;
    END LOOP;
    PERFORM coffer._audit('add_schema', quote_ident(of_schema), jsonb_build_object('tenant', of_tenant, 'class', of_class));
END $$;
CREATE FUNCTION coffer.add_schema(schema name, tenant text, class text DEFAULT 'data')
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT * FROM coffer._add_schema($1, $2, $3) $$;
COMMENT ON FUNCTION coffer.add_schema IS
'Says that every table of a schema, present and to come, belongs to one tenant. A table with a rule of its own keeps it.';

CREATE FUNCTION coffer.add_schema_pattern(pattern text)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    nsp  name;
BEGIN
    IF coalesce(pattern, '') = '' THEN
        RAISE EXCEPTION 'no pattern given' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO coffer.schema_patterns AS p (pattern) VALUES ($1) ON CONFLICT DO NOTHING;
    FOR nsp IN
        SELECT n.nspname FROM pg_namespace n
        WHERE n.nspname LIKE $1 AND n.oid >= 16384 AND n.nspname <> 'coffer' AND NOT starts_with(n.nspname, 'pg_')
          AND NOT EXISTS (SELECT FROM coffer._schema_rules s WHERE s.nspid = n.oid)
        ORDER BY n.nspname
    LOOP
        RETURN QUERY SELECT * FROM coffer.add_schema(nsp, nsp::text);
    END LOOP;
    PERFORM coffer._audit('add_schema_pattern', $1);
END $$;
COMMENT ON FUNCTION coffer.add_schema_pattern IS
'One tenant per schema: every schema whose name is LIKE the pattern, present and to come, belongs to the tenant of that name. A schema that has a rule already keeps it.';

CREATE FUNCTION coffer.remove_schema(schema name)
RETURNS TABLE (relation regclass, strategy text, tenant_column name, parent regclass, class text, reason text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    nsp   oid := (SELECT n.oid FROM pg_namespace n WHERE n.nspname = $1);
    rule  coffer.schema_rules;
    rel   oid;
    m     oid;
BEGIN
    PERFORM coffer._adopt_schemas();
    -- One that is not followed ends by either of the names.
    SELECT * INTO rule FROM coffer.schema_rules s WHERE s.nspid = nsp OR s.schema = $1 ORDER BY s.schema = $1 DESC LIMIT 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'schema % has no rule', coalesce(quote_ident($1), 'NULL') USING ERRCODE = 'undefined_object';
    END IF;
    FOR rel IN SELECT t FROM coffer._schema_tables(nsp) t LOOP
        PERFORM coffer._lock(rel, 'ACCESS EXCLUSIVE');
    END LOOP;
    DELETE FROM coffer.schema_rules s WHERE s.nspid = rule.nspid;
    FOR rel IN SELECT t FROM coffer._schema_tables(nsp) t LOOP
        FOR m IN SELECT relid FROM coffer.rule_relations WHERE root = rel LOOP
            PERFORM coffer._restore_identity(m);
        END LOOP;
        DELETE FROM coffer.large_object_entries e WHERE e.relid = rel;
        PERFORM coffer._changed(rel, 'remove');
        relation := rel; strategy := 'schema'; tenant_column := NULL; parent := NULL; class := coffer._class_name(rule.class);
        reason := 'no longer covered';
        RETURN NEXT;
    END LOOP;
    PERFORM coffer._audit('remove_schema', quote_ident($1));
END $$;
COMMENT ON FUNCTION coffer.remove_schema IS
'Ends a rule made by coffer.add_schema() or found by coffer.add_schema_pattern().';
