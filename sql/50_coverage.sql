-- How every table of the database is covered, and covering a whole database at once.

CREATE VIEW coffer.coverage AS
SELECT c.oid::regclass AS relation,
       (r.relid IS NOT NULL OR s.nspid IS NOT NULL) AND c.relpersistence = 'p' AND c.relkind NOT IN ('f', 'm') AS covered,
       coffer._class_name(coalesce(r.class, s.class)) AS class,
       CASE WHEN c.relkind = 'm' THEN 'excluded'
            WHEN r.relid IS NOT NULL THEN coffer._strategy_name(r.strategy)
            WHEN s.nspid IS NOT NULL THEN 'schema'
            WHEN e.relid IS NOT NULL THEN 'excluded' END AS strategy,
       r.tenant_column,
       nullif(r.parent, 0)::regclass AS parent,
       CASE WHEN r.relid IS NULL AND s.nspid IS NULL OR c.relkind = 'm' THEN NULL
            WHEN coalesce(r.identity, m.own_identity) = 'f' THEN 'the whole old row is logged by UPDATE and DELETE'
            WHEN r.strategy IN (2, 3) THEN 'one message is logged by every INSERT, UPDATE and DELETE'
            WHEN r.strategy = 1 THEN 'one message is logged by a DELETE or a change of tenant'
            ELSE 'none' END
            -- Each of the two has its own price.
            || CASE WHEN r.strategy IN (1, 2, 3) AND r.identity = 'f' THEN ', and one message' ELSE '' END AS cost,
       CASE WHEN e.relid IS NOT NULL THEN e.reason
            WHEN c.relkind = 'm' THEN 'a materialized view: left out, since its rows come from other tables; a new database fills it from those'
            WHEN c.relpersistence = 'u' THEN 'unlogged: its changes are not in the log'
            WHEN c.relkind = 'f' THEN 'a foreign table: its rows are kept elsewhere'
            WHEN r.relid IS NOT NULL THEN r.reason || CASE WHEN r.path_loose THEN '; rows may be there without a parent, so one that comes looks for such' ELSE '' END
            WHEN s.nspid IS NOT NULL THEN format('every table of schema %I belongs to tenant %s', n.nspname, s.tenant)
            WHEN x.extname IS NOT NULL THEN format('belongs to extension %I; no rule', x.extname)
            ELSE 'no rule' END
            || CASE WHEN r.relid IS NOT NULL OR s.nspid IS NOT NULL THEN
                   (SELECT coalesce(string_agg('; ' || CASE WHEN l.kept THEN format('the large objects of column %I are kept with fulls', l.name)
                        ELSE format('large objects that column %I refers to are not kept: SELECT coffer.add_large_objects(%L, %L)', l.name,
                                    format('%I.%I', n.nspname, c.relname), l.name) END, '' ORDER BY l.attnum), '')
                    FROM coffer._large_object_columns l WHERE l.relid = c.oid)
               ELSE '' END AS reason
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN coffer.rules r ON r.relid = c.oid
LEFT JOIN coffer._schema_rules s ON s.nspid = c.relnamespace AND r.relid IS NULL
LEFT JOIN coffer.rule_relations m ON m.relid = c.oid
LEFT JOIN coffer.exclusions e ON e.relid = c.oid
LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
     AND d.deptype = 'e' AND d.refclassid = 'pg_catalog.pg_extension'::regclass
LEFT JOIN pg_catalog.pg_extension x ON x.oid = d.refobjid
WHERE c.relkind IN ('r', 'p', 'f', 'm') AND NOT c.relispartition AND c.relpersistence <> 't' AND c.oid >= 16384
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'coffer');
COMMENT ON VIEW coffer.coverage IS
'Every table and materialized view of the database and how it is covered. Partitions are covered with their root, which stands for them.';

CREATE VIEW coffer.audit_log AS
SELECT entry, at, actor, client_addr, application_name, action, object, detail FROM coffer.audit_entries;
COMMENT ON VIEW coffer.audit_log IS 'Who changed what in the registry, from where. Append-only.';

-- The shortest ways along foreign keys from a table without the tenant column to one that has it.
CREATE FUNCTION coffer._ways(rel oid, tenant name) RETURNS SETOF oid[]
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE up (rel, path) AS (
        SELECT rel, ARRAY[rel]
        UNION ALL
        SELECT k.confrelid, up.path || k.confrelid FROM up
        JOIN pg_constraint k ON k.conrelid = up.rel AND k.contype = 'f' AND k.confrelid <> ALL (up.path)
        WHERE cardinality(up.path) < 16
    )
    SELECT up.path
    FROM up JOIN pg_attribute a ON a.attrelid = up.rel AND a.attname = tenant AND a.attnum > 0 AND NOT a.attisdropped
    WHERE cardinality(up.path) > 1
    ORDER BY cardinality(up.path), up.path
$$;

CREATE FUNCTION coffer._distance(rel oid, tenant name) RETURNS int
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT min(cardinality(w)) FROM coffer._ways(rel, tenant) w $$;

CREATE FUNCTION coffer._next_behind(rel oid, tenant name) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT w[2] FROM coffer._ways(rel, tenant) w LIMIT 1 $$;

CREATE FUNCTION coffer._behind(rel oid, tenant name) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT format('a row''s tenant is behind a foreign key (%s)',
                  (SELECT string_agg(p::regclass::text, ' -> ' ORDER BY ord) FROM unnest(w) WITH ORDINALITY u (p, ord)))
    FROM coffer._ways(rel, tenant) w LIMIT 1
$$;

CREATE FUNCTION coffer.discover(tenant_column name, apply bool DEFAULT false)
RETURNS TABLE (relation regclass, action text, strategy text, reason text, statement text, applied bool)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    t       record;
    p       record;
    behind  text;
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'no tenant column given' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF $2 THEN
        INSERT INTO coffer.settings (name, value) VALUES ('auto_tenant_column', $1)
        ON CONFLICT (name) DO UPDATE SET value = excluded.value;
        PERFORM coffer._audit('discover', NULL, jsonb_build_object('tenant_column', $1));
    END IF;
    FOR t IN
        SELECT c.relation, c.relation::oid AS oid, c.covered, c.strategy, c.reason, a.attnum IS NOT NULL AS has_column,
               a.attgenerated = 'v' AS is_virtual, coffer._obstacle(c.relation) AS obstacle
        FROM coffer.coverage c
        LEFT JOIN pg_attribute a ON a.attrelid = c.relation AND a.attname = $1 AND a.attnum > 0 AND NOT a.attisdropped
        -- Parents before the tables below them: the shorter the way to the column, the earlier.
        ORDER BY a.attnum IS NULL, coffer._distance(c.relation, $1), c.relation::text COLLATE "C"
    LOOP
        relation := t.relation; strategy := t.strategy; reason := t.reason; statement := NULL; applied := false;
        IF t.covered OR t.strategy = 'excluded' THEN
            action := 'keep';
        ELSIF t.obstacle IS NOT NULL THEN
            action := 'uncovered'; strategy := NULL; reason := t.obstacle;
        ELSIF t.is_virtual THEN
            action := 'uncovered';
            reason := format('%I is a virtual generated column: its values are not in the log', $1);
        ELSIF t.has_column THEN
            action := 'add';
            statement := format('SELECT * FROM coffer.add_table(%L, %L)', t.relation::text, $1);
            IF $2 THEN
                SELECT a.strategy, a.reason INTO strategy, reason FROM coffer.add_table(t.relation, $1) a;
                applied := true;
            ELSE
                SELECT * INTO p FROM coffer._plan(t.oid, $1);
                strategy := coffer._strategy_name(p.strategy); reason := p.reason;
            END IF;
        ELSE
            behind := coffer._behind(t.oid, $1);
            SELECT * INTO p FROM coffer._plan_path(t.oid, NULL);
            IF p.parent IS NOT NULL OR behind IS NOT NULL AND NOT $2 THEN
                action := 'add'; strategy := 'path'; reason := coalesce(p.reason, behind);
                statement := format('SELECT * FROM coffer.add_table(%L, parent => %L)', t.relation::text,
                                    coalesce(p.parent::regclass::text, coffer._next_behind(t.oid, $1)::regclass::text));
                IF $2 THEN
                    SELECT a.strategy, a.reason INTO strategy, reason FROM coffer.add_table(t.relation, parent => p.parent::regclass) a;
                    applied := true;
                END IF;
            ELSE
                action := 'uncovered'; strategy := NULL;
                reason := coalesce(behind || ', which does not serve: ' || coffer._path_obstacles(t.oid, NULL), format('it has no column %I', $1));
                statement := format('SELECT * FROM coffer.add_shared(%L)', t.relation::text);
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;
COMMENT ON FUNCTION coffer.discover IS
'Proposes, table by table, how to cover the whole database by one tenant column; with apply => true does it, and covers new tables by the same rule from then on. Tables without the column are covered through a foreign key that leads to one that has it; the others stay uncovered: share, exclude or extend them. With apply, every table is locked until the transaction ends.';
