-- Large objects: which columns name some. They are not in the replication stream, so the agent reads them with fulls.

-- Columns of tables that can name large objects: those that are registered and, where the database has large objects,
-- those of the type oid or a domain over it.
CREATE VIEW coffer._large_object_columns AS
WITH RECURSIVE oids (oid) AS (
    SELECT 'pg_catalog.oid'::pg_catalog.regtype::oid
    UNION ALL
    SELECT t.oid FROM oids o JOIN pg_catalog.pg_type t ON t.typbasetype = o.oid AND t.typtype = 'd'
)
SELECT a.attrelid AS relid, a.attnum, a.attname AS name, e.relid IS NOT NULL AS kept
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.oid >= 16384
LEFT JOIN coffer.large_object_entries e ON e.relid = a.attrelid AND e.attnum = a.attnum
WHERE a.attnum > 0 AND NOT a.attisdropped AND a.atttypid IN (SELECT o.oid FROM oids o)
  AND (e.relid IS NOT NULL OR EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata));
COMMENT ON VIEW coffer._large_object_columns IS 'Columns that name large objects, or may.';

CREATE FUNCTION coffer._add_large_objects(rel regclass, column_name name) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    att   record;
    base  oid;
BEGIN
    PERFORM coffer._require_table(rel);
    IF NOT EXISTS (SELECT FROM coffer.coverage c WHERE c.relation = rel AND c.covered) THEN
        RAISE EXCEPTION '% is not covered', rel USING ERRCODE = 'undefined_object',
            HINT = 'Large objects are kept with the rows that refer to them: coffer.add_table() first.';
    END IF;
    SELECT a.attnum, a.atttypid, a.attgenerated INTO att FROM pg_attribute a
    WHERE a.attrelid = rel AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'table % has no column %', rel, coalesce(quote_ident(column_name), 'NULL') USING ERRCODE = 'undefined_column';
    END IF;
    WITH RECURSIVE up (oid) AS (
        SELECT att.atttypid
        UNION ALL
        SELECT t.typbasetype FROM up JOIN pg_type t ON t.oid = up.oid AND t.typtype = 'd'
    )
    SELECT up.oid INTO base FROM up WHERE up.oid = 'oid'::regtype;
    IF base IS NULL OR att.attgenerated <> '' THEN
        RAISE EXCEPTION 'column % of % holds no large objects: it is %', quote_ident(column_name), rel,
            CASE WHEN att.attgenerated <> '' THEN 'generated' ELSE 'of the type ' || format_type(att.atttypid, NULL) END
            USING ERRCODE = 'wrong_object_type', HINT = 'Columns of the type oid, or of a domain over it such as lo, do.';
    END IF;
    INSERT INTO coffer.large_object_entries AS e (relid, attnum) VALUES (rel, att.attnum) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        PERFORM coffer._mark('large_objects', json_build_object('relid', rel::oid::int8, 'column', column_name));
        PERFORM coffer._audit('add_large_objects', rel::text, jsonb_build_object('column', column_name));
    END IF;
END $$;
CREATE FUNCTION coffer.add_large_objects(rel regclass, column_name name) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._add_large_objects($1, $2) $$;
COMMENT ON FUNCTION coffer.add_large_objects IS
'Says that a column (of the type oid, or of a domain over it such as lo) of a covered table names large objects: those that a tenant''s rows refer to are archived with the tenant, with its fulls and once a day, and come back with its rows. What changes in them in between is not in the log.';

CREATE FUNCTION coffer.remove_large_objects(rel regclass, column_name name) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    DELETE FROM coffer.large_object_entries e USING pg_attribute a
    WHERE e.relid = rel AND a.attrelid = e.relid AND a.attnum = e.attnum AND a.attname = column_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the large objects of column % of % are not kept', coalesce(quote_ident(column_name), 'NULL'), coalesce(rel::text, 'NULL')
            USING ERRCODE = 'undefined_object', HINT = 'See coffer.large_objects.';
    END IF;
    PERFORM coffer._mark('large_objects', json_build_object('relid', rel::oid::int8, 'column', column_name));
    PERFORM coffer._audit('remove_large_objects', rel::text, jsonb_build_object('column', column_name));
END $$;
COMMENT ON FUNCTION coffer.remove_large_objects IS
'Ends what coffer.add_large_objects() said. The large objects stay, and what is archived of them stays restorable.';

CREATE VIEW coffer.large_objects AS
SELECT e.relid::regclass AS relation, a.attname AS column_name, e.added_at, e.added_by
FROM coffer.large_object_entries e
JOIN pg_catalog.pg_attribute a ON a.attrelid = e.relid AND a.attnum = e.attnum AND NOT a.attisdropped;
COMMENT ON VIEW coffer.large_objects IS 'The columns whose large objects are kept with the rows that refer to them.';

CREATE FUNCTION coffer._agent_large_objects() RETURNS TABLE (relid oid, column_name text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT e.relid, a.attname::text
    FROM coffer.large_object_entries e
    JOIN pg_attribute a ON a.attrelid = e.relid AND a.attnum = e.attnum AND NOT a.attisdropped
    ORDER BY e.relid, e.attnum
$$;
COMMENT ON FUNCTION coffer._agent_large_objects() IS 'The columns that name large objects.';

-- Reading every large object is no right that can be granted, so the agent reads and writes them through these.
CREATE FUNCTION coffer._agent_large_object(object oid, place int8, length int4) RETURNS bytea
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_largeobject_metadata m WHERE m.oid = object) THEN
        RETURN NULL;
    END IF;
    RETURN lo_get(object, place, length);
END $$;
COMMENT ON FUNCTION coffer._agent_large_object(oid, int8, int4) IS 'A piece of a large object; NULL: there is no such object.';

CREATE FUNCTION coffer._agent_large_object_create(object oid, rel regclass) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    keeper  oid := (SELECT c.relowner FROM pg_class c WHERE c.oid = rel);
BEGIN
    PERFORM lo_create(object);
    IF keeper IS NOT NULL THEN
        PERFORM coffer._ddl(format('ALTER LARGE OBJECT %s OWNER TO %s', object, keeper::regrole));
    END IF;
END $$;
COMMENT ON FUNCTION coffer._agent_large_object_create(oid, regclass) IS
'A large object of this number, empty, owned by the owner of the table; an error when there is one.';

CREATE FUNCTION coffer._agent_large_object_write(object oid, place int8, data bytea) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    -- What was there before this transaction is never written to.
    IF NOT EXISTS (SELECT FROM pg_largeobject_metadata m WHERE m.oid = object AND m.xmin = pg_current_xact_id()::xid) THEN
        RAISE EXCEPTION 'large object % was not made by this transaction', object USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    PERFORM lo_put(object, place, data);
END $$;

CREATE FUNCTION coffer._agent_large_object_remove(object oid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM lo_unlink(m.oid) FROM pg_largeobject_metadata m WHERE m.oid = object;
END $$;
COMMENT ON FUNCTION coffer._agent_large_object_remove(oid) IS 'For a restore that failed: takes back one that it made.';
