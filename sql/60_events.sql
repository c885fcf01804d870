-- Event triggers: the log says what DDL did to covered tables, new tables are covered where that was asked for, and
-- what a rule relies on is put back when a DDL takes it away.
--
-- They do not break a DDL for a fault of their own: what goes wrong here becomes a warning, and the table gets a new base.
-- The exceptions are what would lose data in silence: dropping the tenant column, or a table whose deletes would no longer
-- say which row (SQLSTATE CF001), a rewrite that nothing tells of; and what comes right when the DDL is tried again: a lock
-- that was waited for too long, a deadlock.

CREATE FUNCTION coffer._auto_column() RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT s.value::name FROM coffer.settings s WHERE s.name = 'auto_tenant_column' $$;

-- What a partition had by itself ends when it is attached: a rule of its own or of its schema, exclusion, triggers. The root's
-- are in force.
CREATE FUNCTION coffer._absorb(root oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    gone   oid;
    below  text;
    above  oid[];
    up     oid;
BEGIN
    -- A foreign key that leads to a single partition is no way to a tenant: the rows below would be nobody's.
    SELECT r.parent, string_agg(r.relid::regclass::text, ', ' ORDER BY r.relid) INTO gone, below
    FROM coffer.rules r JOIN coffer._tree(root) t ON t.relid = r.parent AND t.relid <> root GROUP BY r.parent LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'coffer: % cannot become a partition of %: the tenants of % are found through it', gone::regclass, root::regclass, below
            USING ERRCODE = 'CF001', HINT = 'Call coffer.remove_table() for those first, and cover them again by a foreign key to the partitioned table.';
    END IF;
    WITH ended AS (DELETE FROM coffer.rules r USING coffer._tree(root) t WHERE r.relid = t.relid AND t.relid <> root RETURNING r.parent)
    SELECT array_agg(DISTINCT e.parent) INTO above FROM ended e;
    FOR gone IN
        SELECT m.relid FROM coffer.rule_relations m JOIN coffer._tree($1) t ON t.relid = m.relid
        WHERE m.root = m.relid AND m.relid <> $1 ORDER BY m.relid
    LOOP
        -- Or the log would wait for a first base of it for ever, or have its rows twice: by itself and with the root.
        PERFORM coffer._mark('registry', json_build_object('relid', gone::int8, 'action', 'remove', 'rebase', false));
        -- Its own triggers beside the clones would have the root's made anew, and the root locked against its readers.
        PERFORM coffer._drop_triggers(gone);
    END LOOP;
    -- What their parents did for them alone goes if nobody is at those: what stays does nothing, and a wait might be a deadlock.
    FOREACH up IN ARRAY coalesce(above, '{}') LOOP
        BEGIN
            IF EXISTS (SELECT FROM pg_class c WHERE c.oid = up) THEN
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', up::regclass);
                PERFORM coffer._sync_parent(up);
            END IF;
        EXCEPTION WHEN lock_not_available THEN NULL;
        END;
    END LOOP;
    DELETE FROM coffer.exclusions e USING coffer._tree(root) t WHERE e.relid = t.relid AND t.relid <> root;
END $$;

-- What is wrong with what a rule relies on; no row when nothing is. `rebase`: rows came or went, or may have gone,
-- without a trace in the log.
CREATE FUNCTION coffer._findings(root oid) RETURNS TABLE (finding text, rebase bool)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT format('relation %s is no longer one of its partitions', m.relid), true
    FROM coffer.rule_relations m
    WHERE m.root = $1 AND NOT EXISTS (SELECT FROM coffer._tree($1) t WHERE t.relid = m.relid)
    UNION ALL
    SELECT format('%s is a new partition', t.relid::regclass), false
    FROM coffer._tree($1) t
    WHERE t.relkind IN ('r', 'p') AND NOT EXISTS (SELECT FROM coffer.rule_relations m WHERE m.relid = t.relid AND m.root = $1)
    UNION ALL
    SELECT format('the replica identity of %s is not what it relies on', t.relid::regclass), false
    FROM coffer._tree($1) t
    JOIN coffer.rule_relations m ON m.relid = t.relid AND m.root = $1
    LEFT JOIN coffer.rules r ON r.relid = $1
    CROSS JOIN LATERAL (SELECT coffer._effective_key(t.relid) AS index) e
    -- The same columns by another index, as after REINDEX CONCURRENTLY, are the same key.
    WHERE t.relkind = 'r' AND e.index IS DISTINCT FROM m.key_index
      AND NOT coalesce((SELECT k.sorted::text[] = r.key_columns FROM coffer._keys(t.relid) k WHERE k.index_oid = e.index), false)
    UNION ALL
    SELECT 'a trigger of its strategy is missing, disabled or for another column', false
    FROM coffer.rules r JOIN pg_attribute a ON a.attrelid = r.relid AND a.attnum = r.tenant_attnum
    WHERE r.relid = $1 AND NOT coffer._triggers_intact($1, a.attname, r.strategy)
    UNION ALL
    SELECT 'a trigger of its strategy is missing, disabled or for another column', false
    FROM coffer.rules r WHERE r.relid = $1 AND r.strategy IN (2, 3) AND NOT coffer._triggers_intact($1, NULL, r.strategy)
    UNION ALL
    SELECT 'a trigger that the tables below it rely on is missing or disabled', false WHERE NOT coffer._parent_intact($1)
    UNION ALL
    -- As when its foreign key is made deferrable.
    SELECT 'a trigger that the table above it needs is missing', false
    FROM coffer.rules r WHERE r.relid = $1 AND r.parent <> 0 AND NOT coffer._parent_intact(r.parent)
    UNION ALL
    SELECT 'its foreign key is gone', false
    FROM coffer.rules r WHERE r.relid = $1 AND coffer._lost_guard(r)
    UNION ALL
    SELECT 'a type of its columns changed its meaning', true
    FROM coffer.rule_relations m LEFT JOIN coffer.rules r USING (relid)
    WHERE m.relid = $1 AND NOT coffer._types_compatible(m.types, coffer._types($1))
      -- What was rewritten with it has asked for a base already.
      AND coalesce(r.registered_xid, m.registered_xid) IS DISTINCT FROM coalesce(pg_current_xact_id_if_assigned(), '0')
$$;

-- The way of a rule as it is; when its foreign key is gone, the best of those that are left.
CREATE FUNCTION coffer._way_of(root oid) RETURNS coffer._way
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    r  coffer.rules;
BEGIN
    SELECT * INTO r FROM coffer.rules u WHERE u.relid = root;
    IF NOT coffer._lost_guard(r) THEN
        RETURN (r.parent, CASE WHEN r.path_guarded THEN coffer._guard(root, r.parent, r.path_attnums, r.parent_attnums) ELSE 0 END, r.path_attnums, r.parent_attnums, split_part(r.reason, '; ', 1))::coffer._way;
    END IF;
    RETURN coffer._plan_path(root, NULL);
END $$;

-- What is no partition of a table any more is a table of its own. `was_column`: see coffer._consider.
CREATE FUNCTION coffer._let_go(root oid, was_column name) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    gone  oid;
BEGIN
    FOR gone IN
        SELECT m.relid FROM coffer.rule_relations m
        WHERE m.root = $1 AND NOT EXISTS (SELECT FROM coffer._tree($1) t WHERE t.relid = m.relid)
    LOOP
        -- A partition below one that is detached with it is that one's by now.
        CONTINUE WHEN NOT EXISTS (SELECT FROM coffer.rule_relations m WHERE m.root = $1 AND m.relid = gone);
        IF EXISTS (SELECT FROM pg_class c WHERE c.oid = gone) THEN
            PERFORM coffer._restore_identity(gone);
            PERFORM coffer._consider(gone, 'CREATE TABLE', was_column);
        ELSE
            DELETE FROM coffer.rule_relations m WHERE m.relid = gone;
        END IF;
    END LOOP;
END $$;

-- Looks at a covered table after a DDL and repairs what the rule relies on.
CREATE FUNCTION coffer._recheck(root oid, command text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    r         coffer.rules;
    now_r     coffer.rules;
    col       name;
    findings  text[];
    rebase    bool;
    altered   bool;
    way       coffer._way;
BEGIN
    PERFORM coffer._loosen(u.relid) FROM coffer.rules u
    CROSS JOIN LATERAL (SELECT coffer._guard(u.relid, u.parent, u.path_attnums, u.parent_attnums) AS foreign_key) g
    WHERE root IN (u.relid, u.parent) AND u.path_guarded AND NOT u.path_loose AND g.foreign_key IS NOT NULL AND NOT coffer._holds(g.foreign_key);
    SELECT * INTO r FROM coffer.rules u WHERE u.relid = root;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF r.tenant_attnum > 0 THEN
        SELECT a.attname INTO col FROM pg_attribute a WHERE a.attrelid = root AND a.attnum = r.tenant_attnum AND NOT a.attisdropped;
    END IF;
    SELECT array_agg(f.finding), bool_or(f.rebase) INTO findings, rebase FROM coffer._findings(root) f;
    PERFORM coffer._note_types(root);
    -- A partition that is created is empty; one that is attached brings rows that are not in the log.
    rebase := rebase OR (command = 'ALTER TABLE' AND EXISTS (
        SELECT FROM coffer._tree(root) t WHERE t.relkind = 'r' AND t.relid <> root
        AND NOT EXISTS (SELECT FROM coffer.rule_relations m WHERE m.relid = t.relid AND m.root = $1)));
    IF findings IS NULL AND col IS NOT DISTINCT FROM r.tenant_column
       AND NOT (command = 'ALTER TABLE' AND r.identity = 'f' AND (SELECT p.identity FROM coffer._plan(root, col) p) <> 'f')
       AND (r.key_index = 0 OR r.key_columns = (SELECT k.sorted::text[] FROM coffer._keys(root) k WHERE k.index_oid = r.key_index)) THEN
        RETURN;
    END IF;

    SELECT bool_or(c.relreplident <> m.own_identity) INTO altered
    FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid WHERE m.root = $1 AND c.relkind = 'r';
    PERFORM coffer._let_go(root, col);
    -- A renamed column is still the same key.
    UPDATE coffer.rules u SET key_columns = k.sorted FROM coffer._keys(root) k WHERE u.relid = root AND k.index_oid = u.key_index;
    IF r.strategy = 2 THEN
        way := coffer._way_of(root);
        IF 'its foreign key is gone' = ANY (findings) THEN
            IF way.parent IS NULL THEN
                -- The columns still say whose a row is, as long as they hold what they held.
                way := (r.parent, 0, r.path_attnums, r.parent_attnums,
                        format('a row''s tenant is that of its row in %s, by columns that no foreign key guards any more', r.parent::regclass))::coffer._way;
                RAISE WARNING 'coffer: % belongs to tenants by a foreign key that is gone or not enforced; its columns go on saying whose a row is', root::regclass
                    USING HINT = 'Add the foreign key again, or a tenant column, and call coffer.add_table().';
            ELSE
                RAISE NOTICE 'coffer: the rows of % belong to tenants by another foreign key now: %', root::regclass, way.reason;
            END IF;
        END IF;
    END IF;
    PERFORM coffer._cover(root, r.strategy, col, r.class, rebase, way);

    SELECT * INTO now_r FROM coffer.rules u WHERE u.relid = root;
    IF now_r.identity = 'f' AND r.identity <> 'f' THEN
        RAISE WARNING 'coffer: % is now covered by % (%); before: %', root::regclass,
            coffer._strategy_name(now_r.strategy), now_r.reason, coffer._strategy_name(r.strategy);
    ELSIF now_r.strategy <> r.strategy OR now_r.identity <> r.identity THEN
        RAISE NOTICE 'coffer: % is now covered by % (%); before: %', root::regclass,
            coffer._strategy_name(now_r.strategy), now_r.reason, coffer._strategy_name(r.strategy);
    ELSIF altered THEN
        RAISE WARNING 'coffer: the replica identity of % is in force again', root::regclass
            USING HINT = 'Without it the log does not say which row was deleted. To stop covering the table: coffer.remove_table().';
    ELSIF r.strategy = 1 AND 'a trigger of its strategy is missing, disabled or for another column' = ANY (findings)
          AND col = r.tenant_column AND command IN ('ALTER TABLE', 'DROP TRIGGER', 'ALTER TRIGGER') AND NOT coalesce(rebase, false) THEN
        RAISE WARNING 'coffer: the tag triggers of % are in force again', root::regclass
            USING HINT = 'Without them a DELETE does not say whose row it was. To stop covering the table: coffer.remove_table().';
    END IF;
    IF now_r.registered_xid <> r.registered_xid THEN
        RAISE NOTICE 'coffer: % gets a new base; it can be restored to points up to here and from that base on', root::regclass;
    END IF;
END $$;

-- Looks at a table without a rule: covers it by policy, else says that it is not covered. `was_column`: by which column it
-- was covered as a partition, under whatever name that has by now.
CREATE FUNCTION coffer._consider(rel oid, command text, was_column name DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    c       pg_class;
    auto    name := coffer._auto_column();
    had     coffer.rule_relations;
    told    text;
    whose   text;
    rebase  bool;
BEGIN
    SELECT * INTO c FROM pg_class k WHERE k.oid = rel;
    IF c.oid IS NULL OR c.relispartition OR coffer._obstacle(rel) IS NOT NULL
       OR EXISTS (SELECT FROM coffer.exclusions e WHERE e.relid = rel)
       OR EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel) THEN
        RETURN;
    END IF;
    SELECT * INTO had FROM coffer.rule_relations m WHERE m.relid = rel;
    SELECT s.tenant INTO whose FROM coffer._schema_rules s WHERE s.nspid = c.relnamespace;
    IF FOUND THEN
        -- From one tenant's schema into another's its rows change hands without a change of theirs.
        rebase := had.relid IS NULL OR had.tenant IS DISTINCT FROM whose;
        IF rebase OR EXISTS (SELECT FROM coffer._findings(rel)) THEN
            -- A partition that is created is empty; one that is attached brings rows that are not in the log.
            rebase := rebase OR EXISTS (SELECT FROM coffer._findings(rel) f
                                        WHERE f.rebase OR command = 'ALTER TABLE' OR f.finding NOT LIKE '% is a new partition');
            PERFORM coffer._let_go(rel, NULL);
            PERFORM coffer._cover_schema_table(rel);
            rebase := rebase OR EXISTS (SELECT FROM coffer.rule_relations m
                                        WHERE m.relid = rel AND (m.own_identity, m.key_index) <> (had.own_identity, had.key_index));
        END IF;
        IF rebase THEN
            UPDATE coffer.rule_relations m SET registered_xid = pg_current_xact_id() WHERE m.relid = rel;
            PERFORM coffer._changed(rel, 'add', true, had.relid IS NULL AND coffer._is_fresh(rel));
            IF had.tenant = whose THEN
                RAISE NOTICE 'coffer: % gets a new base; it can be restored to points up to here and from that base on', rel::regclass;
            END IF;
        END IF;
        PERFORM coffer._note_types(rel);
        RETURN;
    END IF;
    IF auto IS NOT NULL AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = rel AND a.attname = was_column AND NOT a.attisdropped) THEN
        auto := was_column;
    END IF;
    IF had.relid IS NOT NULL THEN
        -- It was moved out of a tenant's schema.
        PERFORM coffer._restore_identity(m.relid) FROM coffer.rule_relations m WHERE m.root = rel;
        PERFORM coffer._changed(rel, 'remove');
    END IF;
    IF auto IS NOT NULL AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = rel AND a.attname = auto AND a.attnum > 0
                                    AND NOT a.attisdropped AND a.attgenerated <> 'v') THEN
        told := coffer._cover(rel, NULL, auto, 0::int2, false);
        PERFORM coffer._audit('auto_cover', rel::regclass::text, jsonb_build_object('tenant_column', auto));
        RAISE NOTICE 'coffer: % is covered by % (%)', rel::regclass,
            (SELECT coffer._strategy_name(r.strategy) FROM coffer.rules r WHERE r.relid = rel), told;
    ELSIF auto IS NOT NULL AND (coffer._plan_path(rel, NULL)).parent IS NOT NULL THEN
        PERFORM coffer.add_table(rel, parent => (coffer._plan_path(rel, NULL)).parent::regclass);
        RAISE NOTICE 'coffer: % is covered by path (%)', rel::regclass, (SELECT r.reason FROM coffer.rules r WHERE r.relid = rel);
    ELSIF had.relid IS NOT NULL
          OR command <> 'ALTER TABLE' AND (auto IS NOT NULL OR EXISTS (SELECT FROM coffer.rules) OR EXISTS (SELECT FROM coffer.schema_rules)) THEN
        RAISE WARNING 'coffer: % is not covered by the backup', rel::regclass
            USING HINT = format('SELECT * FROM coffer.add_table(%L, ...), coffer.add_shared(%1$L) or coffer.exclude(%1$L, ...).', rel::regclass::text);
    END IF;
END $$;

-- A table whose deletes no longer say which row, and which could not be repaired: the DDL must not stand.
CREATE FUNCTION coffer._refuse_if_lost(root oid, why text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid
               WHERE m.root = $1 AND c.relkind = 'r' AND coalesce(coffer._effective_key(m.relid), 0)
                   -- The whole row will do where its tenant is not kept by its key.
                   = CASE WHEN coffer._effective_key(m.relid) IS NULL OR EXISTS (SELECT FROM coffer.rules r WHERE r.relid = $1 AND r.strategy = 3)
                     THEN 0 END) THEN
        RAISE EXCEPTION 'coffer: a DELETE on % would no longer be backed up', root::regclass
            USING ERRCODE = 'CF001', DETAIL = why, HINT = 'End its coverage first: coffer.remove_table() or coffer.exclude().';
    END IF;
END $$;

-- A covered table of which nobody knows what a DDL made of it: what was archived may not be all of it, so it is read anew.
CREATE FUNCTION coffer._doubt(root oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM coffer.rules r WHERE r.relid = $1)
       OR EXISTS (SELECT FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid JOIN coffer._schema_rules s ON s.nspid = c.relnamespace
                  WHERE m.relid = $1 AND m.root = $1) THEN
        PERFORM coffer._absorb(root);
        UPDATE coffer.rules r SET registered_xid = pg_current_xact_id(), registered_at = now() WHERE r.relid = $1;
        UPDATE coffer.rule_relations m SET registered_xid = pg_current_xact_id() WHERE m.relid = $1;
        PERFORM coffer._changed(root, 'add', true);
    END IF;
END $$;

-- Whether a DDL made or changed something in a tenant's schema that is no covered table: a view, a function, a policy.
CREATE FUNCTION coffer._in_tenants_schema(class oid, object oid, schema text) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM coffer._schema_rules s WHERE s.nspid = coalesce(
            (SELECT n.oid FROM pg_namespace n WHERE n.nspname = schema),
            (SELECT c.relnamespace FROM pg_class c WHERE c.oid = CASE class
                WHEN 'pg_policy'::regclass THEN (SELECT p.polrelid FROM pg_policy p WHERE p.oid = object)
                WHEN 'pg_rewrite'::regclass THEN (SELECT r.ev_class FROM pg_rewrite r WHERE r.oid = object)
                WHEN 'pg_trigger'::regclass THEN (SELECT g.tgrelid FROM pg_trigger g WHERE g.oid = object) END)))
$$;

-- Before ALTER SCHEMA: afterwards the names that were noted of schemas are those from before. A rule that does not fit its schema
-- already is not made to fit by whatever comes now.
CREATE FUNCTION coffer._before_schema_altered() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM coffer.schema_rules) THEN
        PERFORM coffer._adopt_schemas();
        PERFORM set_config('coffer.unfit_schemas', ARRAY(SELECT s.nspid FROM coffer.schema_rules s
            WHERE NOT EXISTS (SELECT FROM coffer._schema_rules r WHERE r.noted = s.nspid))::text, true);
    END IF;
END $$;

-- After ALTER SCHEMA: a schema without a rule that has a name now which a pattern fits belongs to the tenant of that name,
-- like a new one; one that has a rule keeps it, whatever its name. Returns the covered tables in it, whose names changed.
CREATE FUNCTION coffer._schema_altered(nsp oid) RETURNS oid[]
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    found_by  record;
BEGIN
    UPDATE coffer.schema_rules s SET schema = n.nspname FROM pg_namespace n
    WHERE n.oid = nsp AND s.nspid = nsp AND s.schema <> n.nspname AND nsp <> ALL (coalesce(nullif(current_setting('coffer.unfit_schemas', true), ''), '{}')::oid[]);
    IF FOUND THEN
        PERFORM coffer._invalidate(c.oid) FROM pg_class c WHERE c.relnamespace = nsp AND c.relkind IN ('r', 'p');
    END IF;
    SELECT n.nspname AS name, coffer._class_name(p.class) AS class INTO found_by
    FROM pg_namespace n JOIN coffer.schema_patterns p ON n.nspname LIKE p.pattern
    WHERE n.oid = nsp AND NOT EXISTS (SELECT FROM coffer.schema_rules s WHERE s.nspid = nsp)
    ORDER BY length(p.pattern) DESC LIMIT 1;
    IF FOUND THEN
        PERFORM coffer._add_schema(found_by.name, found_by.name::text, found_by.class);
        RAISE NOTICE 'coffer: schema % belongs to the tenant of its name', nsp::regnamespace;
    END IF;
    RETURN ARRAY(SELECT DISTINCT m.root FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.root WHERE c.relnamespace = nsp);
END $$;

-- The table that something is part of: a column or a sequence that one owns, an index, a constraint, a trigger, a policy, a
-- rule, statistics.
CREATE FUNCTION coffer._table_of(class oid, object oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT c.oid FROM pg_class c
    WHERE c.relkind IN ('r', 'p') AND c.oid = CASE class
        WHEN 'pg_class'::regclass THEN coalesce(
            (SELECT i.indrelid FROM pg_index i WHERE i.indexrelid = object),
            (SELECT d.refobjid FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
             WHERE d.classid = 'pg_class'::regclass AND d.objid = object AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') LIMIT 1),
            object)
        WHEN 'pg_trigger'::regclass THEN (SELECT g.tgrelid FROM pg_trigger g WHERE g.oid = object)
        WHEN 'pg_constraint'::regclass THEN (SELECT k.conrelid FROM pg_constraint k WHERE k.oid = object)
        WHEN 'pg_policy'::regclass THEN (SELECT p.polrelid FROM pg_policy p WHERE p.oid = object)
        WHEN 'pg_rewrite'::regclass THEN (SELECT r.ev_class FROM pg_rewrite r WHERE r.oid = object)
        WHEN 'pg_statistic_ext'::regclass THEN (SELECT s.stxrelid FROM pg_statistic_ext s WHERE s.oid = object)
    END
$$;

-- A table and the tables that inherit from it: a change of its columns is one of theirs, too, and no event names them.
CREATE FUNCTION coffer._heirs(rel oid) RETURNS SETOF oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE h (oid) AS (
        SELECT rel WHERE rel IS NOT NULL
        UNION
        SELECT c.oid FROM h JOIN pg_inherits i ON i.inhparent = h.oid JOIN pg_class c ON c.oid = i.inhrelid
        WHERE c.relkind = 'r' AND NOT c.relispartition
    )
    SELECT h.oid FROM h
$$;

CREATE FUNCTION coffer._on_ddl() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    cmd      record;
    top      oid;
    rel      oid;
    touched  oid[] := '{}';
BEGIN
    IF coffer._at_work() THEN
        RETURN;
    END IF;
    PERFORM coffer._adopt_schemas();
    FOR cmd IN
        SELECT DISTINCT d.classid = 'pg_namespace'::regclass AS is_schema, d.object_type LIKE 'table%' AS is_table,
               d.classid, d.objid, d.command_tag, d.object_type, d.in_extension,
               d.object_type IN ('table', 'table column', 'index', 'trigger', 'table constraint', 'policy', 'rule', 'statistics object', 'sequence') AS relevant,
               CASE d.classid WHEN 'pg_type'::regclass THEN d.objid
                    WHEN 'pg_constraint'::regclass THEN (SELECT nullif(k.contypid, 0) FROM pg_constraint k WHERE k.oid = d.objid)
                    WHEN 'pg_class'::regclass THEN (SELECT c.reltype FROM pg_class c WHERE c.oid = d.objid AND c.relkind = 'c') END AS type
        FROM pg_event_trigger_ddl_commands() d
        WHERE d.objid IS NOT NULL AND coalesce(d.schema_name, '') !~ '^pg_temp' AND d.schema_name IS DISTINCT FROM 'coffer'
        ORDER BY is_schema DESC, is_table DESC
    LOOP
        BEGIN
            IF cmd.object_type = 'schema' AND cmd.command_tag = 'CREATE SCHEMA' THEN
                PERFORM coffer._write_schema_rule(n.oid, n.nspname, p.class, n.nspname::text)
                FROM pg_namespace n JOIN coffer.schema_patterns p ON n.nspname LIKE p.pattern
                WHERE n.oid = cmd.objid ORDER BY length(p.pattern) DESC LIMIT 1;
                IF FOUND THEN
                    RAISE NOTICE 'coffer: schema % belongs to the tenant of its name', cmd.objid::regnamespace;
                END IF;
            ELSIF cmd.object_type = 'schema' AND cmd.command_tag = 'ALTER SCHEMA' THEN
                touched := touched || coffer._schema_altered(cmd.objid);
            ELSIF cmd.type IS NOT NULL THEN
                FOR rel IN SELECT m.relid FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid
                           WHERE m.relid = m.root AND (m.types ? cmd.type::text OR c.reloftype = cmd.type) LOOP
                    IF EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel) THEN
                        PERFORM coffer._recheck(rel, TG_TAG);
                    ELSE
                        PERFORM coffer._consider(rel, TG_TAG);
                    END IF;
                    touched := touched || rel;
                END LOOP;
            ELSIF cmd.relevant THEN
                top := coffer._root(coffer._table_of(cmd.classid, cmd.objid));
                FOR rel IN SELECT h FROM coffer._heirs(top) h WHERE h = top OR cmd.is_table LOOP
                    CONTINUE WHEN rel = ANY (touched);
                    IF EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel) THEN
                        PERFORM coffer._recheck(rel, TG_TAG);
                        touched := touched || rel;
                        CONTINUE;
                    END IF;
                    IF cmd.is_table AND (cmd.objid = top AND NOT cmd.in_extension OR EXISTS (SELECT FROM coffer.rule_relations m WHERE m.relid = rel)) THEN
                        PERFORM coffer._consider(rel, cmd.command_tag);
                    END IF;
                    IF EXISTS (SELECT FROM coffer.rule_relations m WHERE m.relid = rel) THEN
                        touched := touched || rel;
                    ELSIF cmd.is_table AND EXISTS (SELECT FROM coffer.rule_relations m JOIN coffer._tree(rel) t ON t.relid = m.relid) THEN
                        -- Under a root that is not covered no partition is.
                        PERFORM coffer._absorb(rel);
                        PERFORM coffer._restore_identity(m.relid) FROM coffer.rule_relations m JOIN coffer._tree(rel) t ON t.relid = m.relid;
                        RAISE WARNING 'coffer: % is not covered by the backup, and what became a partition of it is not any more', rel::regclass
                            USING HINT = format('SELECT * FROM coffer.add_table(%L, ...), coffer.add_shared(%1$L) or coffer.exclude(%1$L, ...).', rel::regclass::text);
                    END IF;
                END LOOP;
            END IF;
        EXCEPTION
            WHEN SQLSTATE 'CF001' OR transaction_rollback OR lock_not_available OR insufficient_resources THEN
                RAISE;
            WHEN OTHERS THEN
                -- What was looked at before it is undone with it.
                PERFORM coffer._refuse_if_lost(t, SQLERRM), coffer._doubt(t) FROM unnest(touched || rel) t;
                RAISE WARNING 'coffer: after %: %', TG_TAG, SQLERRM USING HINT = 'See coffer.doctor().';
        END;
    END LOOP;
    IF touched <> '{}' THEN
        -- The plugin describes the relations that the list at the end names.
        PERFORM coffer._mark('ddl', json_build_object('tag', TG_TAG, 'objects', touched::int8[], 'relations', (
            SELECT array_agg(DISTINCT t.relid::int8) FROM unnest(touched) u (root) CROSS JOIN LATERAL coffer._tree(u.root) t)));
    ELSIF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() d
                  WHERE d.objid IS NOT NULL AND coffer._in_tenants_schema(d.classid, d.objid, d.schema_name)) THEN
        -- No row changes its meaning; the definitions that are archived are older than it, that is all.
        PERFORM coffer._mark('definitions', json_build_object('tag', TG_TAG));
    END IF;
EXCEPTION
    WHEN SQLSTATE 'CF001' OR transaction_rollback OR lock_not_available OR insufficient_resources THEN
        RAISE;
    WHEN OTHERS THEN
        RAISE WARNING 'coffer: after %: %', TG_TAG, SQLERRM USING HINT = 'See coffer.doctor().';
END $$;

CREATE FUNCTION coffer._on_drop() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    lost     record;
    rel      oid;
    dropped  oid[];
    roots    oid[];
    parts    oid[];
BEGIN
    IF coffer._at_work() THEN
        RETURN;
    END IF;
    SELECT r.relid::regclass AS rel, quote_ident(d.address_names[cardinality(d.address_names)]) AS name INTO lost
    FROM pg_event_trigger_dropped_objects() d
    JOIN coffer.rules r ON r.relid = d.objid AND (r.tenant_attnum = d.objsubid OR d.objsubid = ANY (r.path_attnums))
         OR r.parent = d.objid AND d.objsubid = ANY (r.parent_attnums)
    WHERE d.object_type = 'table column' AND d.objsubid > 0;
    IF FOUND THEN
        RAISE EXCEPTION 'coffer: column % is how the rows of % belong to tenants', lost.name, lost.rel
            USING ERRCODE = 'CF001', HINT = 'End the table''s coverage first: coffer.remove_table() or coffer.exclude().';
    END IF;

    -- Tables, and partitions of covered tables.
    SELECT array_agg(DISTINCT m.relid), array_agg(DISTINCT m.root) FILTER (WHERE m.root <> m.relid) INTO dropped, roots
    FROM pg_event_trigger_dropped_objects() d
    JOIN coffer.rule_relations m ON m.relid = d.objid
    WHERE d.classid = 'pg_class'::regclass AND d.objsubid = 0 AND d.object_type = 'table';
    IF dropped IS NOT NULL THEN
        DELETE FROM coffer.rules r WHERE r.relid = ANY (dropped) AND r.parent <> 0;
        -- What lies below a table that is dropped has no tenant any more, or another way to one.
        FOR rel IN SELECT r.relid FROM coffer.rules r WHERE r.parent = ANY (dropped) LOOP
            UPDATE coffer.rules r SET parent = 0 WHERE r.relid = rel;
            PERFORM coffer._forget(rel);
            PERFORM coffer._changed(rel, 'remove');
            RAISE WARNING 'coffer: % is no longer covered by the backup: the table that its tenants were found in is dropped', rel::regclass;
            PERFORM coffer._consider(rel, 'ALTER TABLE');
        END LOOP;
        DELETE FROM coffer.rules r WHERE r.relid = ANY (dropped);
        -- Of a partition, too: that its rows are gone is in the log, no base has to say it.
        DELETE FROM coffer.rule_relations m WHERE m.root = ANY (dropped) OR m.relid = ANY (dropped);
        PERFORM coffer._rebase_descendants(u) FROM unnest(roots) u WHERE EXISTS (SELECT FROM coffer.rules r WHERE r.parent = u AND r.path_loose);
        DELETE FROM coffer.session_rows s WHERE s.relid = ANY (dropped);
        DELETE FROM coffer.large_object_entries e WHERE e.relid = ANY (dropped);
        PERFORM coffer._sync_parent(c.oid) FROM pg_class c
        WHERE EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = c.oid AND g.tgfoid = to_regprocedure('coffer._parent()') AND g.tgparentid = 0)
          AND NOT EXISTS (SELECT FROM coffer.rules r WHERE r.parent = c.oid);
        PERFORM coffer._mark('drop', json_build_object('relids', dropped::int8[]));
    END IF;

    -- Parts of covered tables that go without a word of the table: a policy, a trigger, what went with a type or a function. An
    -- index lies in its table's schema and does not say more of it; statistics lie anywhere. ALTER TABLE is heard of by itself.
    SELECT array_agg(DISTINCT m.root) INTO parts
    FROM pg_event_trigger_dropped_objects() d
    JOIN pg_namespace n ON n.nspname = d.address_names[1]
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = d.address_names[2]
    JOIN coffer.rule_relations m ON m.relid = c.oid
    WHERE TG_TAG LIKE 'DROP %' AND d.object_type IN ('table column', 'table constraint', 'default value', 'trigger', 'policy', 'rule');
    IF parts IS NOT NULL OR TG_TAG LIKE 'DROP %' AND TG_TAG <> 'DROP TABLE' AND EXISTS (
        SELECT FROM pg_event_trigger_dropped_objects() d
        WHERE NOT d.is_temporary AND d.object_type IN ('index', 'statistics object') AND EXISTS (
            SELECT FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE d.object_type <> 'index' OR n.nspname = d.schema_name)) THEN
        PERFORM coffer._mark('ddl', json_build_object('tag', TG_TAG, 'objects', coalesce(parts, '{}')::int8[], 'relations',
            ARRAY(SELECT DISTINCT t.relid::int8 FROM unnest(parts) u (root) CROSS JOIN LATERAL coffer._tree(u.root) t)));
    ELSIF dropped IS NULL AND EXISTS (SELECT FROM pg_event_trigger_dropped_objects() d WHERE d.original AND coffer._in_tenants_schema(0, 0, d.schema_name)) THEN
        PERFORM coffer._mark('definitions', json_build_object('tag', TG_TAG));
    END IF;
    DELETE FROM coffer.exclusions e USING pg_event_trigger_dropped_objects() d
    WHERE d.classid = 'pg_class'::regclass AND d.objsubid = 0 AND e.relid = d.objid;
    DELETE FROM coffer.schema_rules s USING pg_event_trigger_dropped_objects() d
    WHERE d.classid = 'pg_namespace'::regclass AND s.schema = d.object_name AND (s.nspid = d.objid OR s.system_id <> coffer._system_id());

    -- A table that lost a partition; one that lost the index behind its replica identity, which the server lets go
    -- without a word; one that lost a tag trigger.
    FOR rel IN
        SELECT unnest(roots)
        UNION
        SELECT m.root FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid
        WHERE EXISTS (SELECT FROM pg_event_trigger_dropped_objects() d WHERE d.object_type IN ('index', 'table constraint', 'table column'))
          AND (c.relreplident = 'i' AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)
               OR c.relreplident = 'd' AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary))
        UNION
        SELECT r.relid FROM coffer.rules r
        WHERE coffer._lost_guard(r)
        UNION
        SELECT coffer._root(c.oid)
        FROM pg_event_trigger_dropped_objects() d
        JOIN pg_namespace n ON n.nspname = d.address_names[1]
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = d.address_names[2]
        WHERE d.object_type = 'trigger' AND d.address_names[3] ~* '^(zzz|aaa)_coffer_(tag|fill|path|session|parent)'
    LOOP
        BEGIN
            IF EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel) THEN
                PERFORM coffer._recheck(rel, TG_TAG);
            ELSE
                PERFORM coffer._consider(rel, TG_TAG);
            END IF;
        EXCEPTION
            WHEN SQLSTATE 'CF001' OR transaction_rollback OR lock_not_available OR insufficient_resources THEN
                RAISE;
            WHEN OTHERS THEN
                PERFORM coffer._refuse_if_lost(rel, SQLERRM);
                PERFORM coffer._doubt(rel);
                RAISE WARNING 'coffer: after %: %', TG_TAG, SQLERRM USING HINT = 'See coffer.doctor().';
        END;
    END LOOP;
EXCEPTION
    WHEN SQLSTATE 'CF001' OR transaction_rollback OR lock_not_available OR insufficient_resources THEN
        RAISE;
    WHEN OTHERS THEN
        RAISE WARNING 'coffer: after %: %', TG_TAG, SQLERRM USING HINT = 'See coffer.doctor().';
END $$;

CREATE FUNCTION coffer._on_rewrite() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    rel     oid := coffer._root(pg_event_trigger_table_rewrite_oid());
    unlogs  bool;
BEGIN
    IF coffer._at_work()
       OR NOT EXISTS (SELECT FROM coffer.rules r WHERE r.relid = rel)
          AND NOT EXISTS (SELECT FROM coffer.rule_relations m WHERE m.relid = rel) THEN
        RETURN;
    END IF;
    PERFORM coffer._mark('rewrite', json_build_object('relid', rel::int8));
    -- What a rewrite computes anew, and what was written while a table was unlogged, is in no change that was archived.
    UPDATE coffer.rules r SET registered_xid = pg_current_xact_id(), registered_at = now() WHERE r.relid = rel;
    UPDATE coffer.rule_relations m SET registered_xid = pg_current_xact_id() WHERE m.relid = rel;
    -- Reason 1: to or from UNLOGGED. No base follows while the table is unlogged.
    unlogs := pg_event_trigger_table_rewrite_reason() & 1 <> 0
              AND (SELECT c.relpersistence FROM pg_class c WHERE c.oid = pg_event_trigger_table_rewrite_oid()) = 'p';
    IF unlogs AND rel = pg_event_trigger_table_rewrite_oid() THEN
        PERFORM coffer._changed(rel, 'remove');
    ELSE
        -- A table that comes back into the log is unlogged still.
        PERFORM coffer._changed(rel, 'add', true, comes_back => pg_event_trigger_table_rewrite_reason() & 1 <> 0);
    END IF;
    -- What a rewrite computes may be the tenant of what lies below.
    PERFORM coffer._rebase_descendants(rel);
    IF unlogs THEN
        RAISE WARNING 'coffer: % becomes unlogged, and is not backed up while it is', pg_event_trigger_table_rewrite_oid()::regclass;
    ELSE
        RAISE NOTICE 'coffer: % is rewritten and gets a new base; it can be restored to points up to here and from that base on',
            pg_event_trigger_table_rewrite_oid()::regclass;
    END IF;
END $$;
