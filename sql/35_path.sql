-- Tables without a tenant column: their rows belong to the tenant of the row that a foreign key leads to (`path`), or to
-- the one that the session named when they were inserted (`session`).

CREATE FUNCTION coffer._base_type(type oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE b (oid) AS (
        SELECT type UNION ALL SELECT t.typbasetype FROM b JOIN pg_type t ON t.oid = b.oid WHERE t.typtype = 'd')
    SELECT b.oid FROM b JOIN pg_type t ON t.oid = b.oid WHERE t.typtype <> 'd'
$$;

-- A type, at the bottom of its domains, by a name that means the same under every search_path.
CREATE FUNCTION coffer._type_name(type oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT format('%I.%I', n.nspname, t.typname) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = coffer._base_type(type)
$$;

-- The text of an expression of a type as its output function writes it, or NULL: so the stream and the bases write it, and
-- so tenants are called. The cast to text does the same, but for types that have one of their own: bool, char(n), inet.
CREATE FUNCTION coffer._text_of(expression text, type oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM pg_cast c WHERE c.castsource = coffer._base_type(type) AND c.casttarget = 'text'::regtype AND c.castmethod = 'f')
                THEN format('CASE WHEN %1$s IS NOT NULL THEN pg_catalog.format(''%%s'', %1$s) END', expression)
                ELSE format('%s::pg_catalog.text', expression) END
$$;

-- Whether that text is the same under whatever settings.
CREATE FUNCTION coffer._is_fixed(type oid) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT t.typtype = 'e' OR t.oid = ANY (ARRAY['int2', 'int4', 'int8', 'numeric', 'oid', 'text', 'varchar', 'bpchar', 'name', '"char"', 'uuid', 'bool',
                                                 'inet', 'cidr', 'macaddr', 'macaddr8']::regtype[])
    FROM pg_type t WHERE t.oid = coffer._base_type(type)
$$;

-- The same for a column, by name.
CREATE FUNCTION coffer._column_text(row_name text, rel oid, col name) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coffer._text_of(format('%s.%I', row_name, a.attname), a.atttypid) FROM pg_attribute a WHERE a.attrelid = rel AND a.attname = col $$;

-- What a type's values are compared as: two keys are equal exactly when their texts are. NULL: for other types that does
-- not hold (1.0 and 1.00), so a parent cannot be looked up by them.
CREATE FUNCTION coffer._key_family(type oid, coll oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT CASE
        WHEN t.oid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) THEN 'integer'
        WHEN t.oid IN ('text'::regtype, 'varchar'::regtype)
             AND NOT EXISTS (SELECT FROM pg_collation c WHERE c.oid = coll AND NOT c.collisdeterministic) THEN 'text'
        WHEN t.typtype = 'e' OR t.oid IN ('oid'::regtype, 'uuid'::regtype, 'bool'::regtype, 'date'::regtype, 'timestamp'::regtype,
                                          'timestamptz'::regtype, 'bytea'::regtype, '"char"'::regtype, 'name'::regtype)
        THEN t.oid::text
    END
    FROM pg_type t WHERE t.oid = coffer._base_type(type)
$$;

-- A table's names for its columns, in the order of the numbers; a partition's numbers differ, its names do not.
CREATE FUNCTION coffer._column_names(rel oid, attnums int2[]) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT array_agg(a.attname::text ORDER BY u.place)
    FROM unnest(attnums) WITH ORDINALITY u (attnum, place)
    JOIN pg_attribute a ON a.attrelid = rel AND a.attnum = u.attnum AND NOT a.attisdropped
$$;

-- Inheritance children are tables of their own, partitions are not.
CREATE FUNCTION coffer._from(rel oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT format('%s%I.%I', CASE c.relkind WHEN 'p' THEN '' ELSE 'ONLY ' END, n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = rel
$$;

-- A table's parents, nearest first, itself not among them.
CREATE FUNCTION coffer._ancestors(rel oid) RETURNS TABLE (relid oid, depth int)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE up (relid, depth) AS (
        SELECT r.parent, 1 FROM coffer.rules r WHERE r.relid = rel AND r.parent <> 0
        UNION ALL
        SELECT r.parent, up.depth + 1 FROM up JOIN coffer.rules r ON r.relid = up.relid WHERE r.parent <> 0 AND up.depth < 64
    )
    SELECT * FROM up
$$;

CREATE FUNCTION coffer._path_descendants(root oid) RETURNS TABLE (relid oid, depth int)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE down (relid, depth) AS (
        SELECT r.relid, 1 FROM coffer.rules r WHERE r.parent = root
        UNION ALL
        SELECT r.relid, d.depth + 1 FROM down d JOIN coffer.rules r ON r.parent = d.relid WHERE d.depth < 64
    )
    SELECT d.relid, d.depth FROM down d
$$;

-- From PostgreSQL 18 on a foreign key may be there for its name only.
CREATE FUNCTION coffer._is_enforced(k pg_constraint) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coalesce((to_jsonb(k) ->> 'conenforced')::bool, true) $$;

-- The foreign keys of a table and, for each, why the tenant cannot be found by it.
CREATE FUNCTION coffer._paths(rel oid)
RETURNS TABLE (parent oid, constraint_oid oid, constraint_name name, attnums int2[], parent_attnums int2[], depth int,
               is_nullable bool, is_validated bool, obstacle text)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT k.confrelid, k.oid, k.conname, k.conkey, k.confkey,
           1 + (SELECT count(*)::int FROM coffer._ancestors(k.confrelid)),
           e.is_nullable, k.convalidated,
           CASE WHEN k.confrelid = rel THEN 'refers to the table itself'
                WHEN p.relispartition THEN 'refers to a single partition'
                WHEN r.relid IS NULL THEN format('refers to %s, which is not covered', p.oid::regclass)
                WHEN r.strategy NOT IN (0, 1, 2, 4) THEN format('refers to %s, whose rows are not each of a tenant', p.oid::regclass)
                WHEN EXISTS (SELECT FROM coffer._ancestors(k.confrelid) a WHERE a.relid = rel) THEN 'leads back to the table itself'
                WHEN e.is_computed THEN 'has a generated column'
                WHEN e.is_inexact THEN 'compares a type whose equal values can be written differently'
                WHEN NOT coffer._is_enforced(k) THEN 'is not enforced'
           END
    FROM pg_constraint k
    JOIN pg_class p ON p.oid = k.confrelid
    LEFT JOIN coffer.rules r ON r.relid = k.confrelid
    CROSS JOIN LATERAL (
        SELECT bool_or(NOT a.attnotnull) AS is_nullable,
               bool_or(a.attgenerated <> '' OR a.attidentity = 'a') AS is_computed,
               bool_or(coffer._key_family(a.atttypid, a.attcollation) IS NULL
                       OR coffer._key_family(a.atttypid, a.attcollation) IS DISTINCT FROM coffer._key_family(b.atttypid, b.attcollation)) AS is_inexact
        FROM unnest(k.conkey, k.confkey) u (child, parent)
        JOIN pg_attribute a ON a.attrelid = rel AND a.attnum = u.child
        JOIN pg_attribute b ON b.attrelid = k.confrelid AND b.attnum = u.parent
    ) e
    WHERE k.conrelid = rel AND k.contype = 'f'
      -- On a partitioned parent the server keeps a copy of the constraint for each partition.
      AND NOT EXISTS (SELECT FROM pg_constraint q WHERE q.oid = k.conparentid AND q.conrelid = rel)
$$;

-- A way to the tenant: by which columns to which of the parent's. constraint_oid 0: by no foreign key any more.
CREATE TYPE coffer._way AS (parent oid, constraint_oid oid, attnums int2[], parent_attnums int2[], reason text);

-- The foreign key that guards a way, if there is one; among several, one that is checked late. Found by what it says, since
-- its OID is another one behind pg_upgrade.
CREATE FUNCTION coffer._guard(rel oid, parent oid, attnums int2[], parent_attnums int2[]) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT k.oid FROM pg_constraint k
    WHERE k.conrelid = $1 AND k.confrelid = $2 AND k.contype = 'f' AND k.conkey = $3 AND k.confkey = $4 AND coffer._is_enforced(k)
    ORDER BY k.condeferrable DESC, k.oid LIMIT 1
$$;

-- Whether a foreign key sees to it that every row has its parent: for those that it never looked at, and while its triggers
-- are off, it does not.
CREATE FUNCTION coffer._holds(foreign_key oid) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE tree (oid) AS (SELECT $1 UNION ALL SELECT k.oid FROM tree t JOIN pg_constraint k ON k.conparentid = t.oid)
    SELECT coalesce((SELECT k.convalidated FROM pg_constraint k WHERE k.oid = $1), false)
       AND NOT EXISTS (SELECT FROM tree t JOIN pg_trigger g ON g.tgconstraint = t.oid WHERE g.tgenabled NOT IN ('O', 'A'))
$$;

-- Whether a rule relies on a foreign key that is gone.
CREATE FUNCTION coffer._lost_guard(r coffer.rules) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT coalesce($1.path_guarded AND coffer._guard($1.relid, $1.parent, $1.path_attnums, $1.parent_attnums) IS NULL, false) $$;

-- The best of them: NOT NULL before nullable, short before long. NULL when there is none.
CREATE FUNCTION coffer._plan_path(rel oid, only_parent oid) RETURNS coffer._way
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    p       record;
    others  text;
BEGIN
    SELECT * INTO p FROM coffer._paths(rel) f
    WHERE f.obstacle IS NULL AND (only_parent IS NULL OR f.parent = only_parent)
    ORDER BY f.is_nullable, f.depth, f.is_validated DESC, f.constraint_oid LIMIT 1;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT string_agg(format('%I to %s', f.constraint_name, f.parent::regclass), ', ' ORDER BY f.constraint_oid) INTO others
    FROM coffer._paths(rel) f WHERE f.obstacle IS NULL AND f.constraint_oid <> p.constraint_oid;
    RETURN (p.parent, p.constraint_oid, p.attnums, p.parent_attnums,
        format('a row''s tenant is that of its row in %s, by foreign key %I (%s)%s, so every INSERT, UPDATE and DELETE writes a tag',
            (SELECT string_agg(x.relid::regclass::text, ' -> ' ORDER BY x.depth)
             FROM (SELECT p.parent AS relid, 0 AS depth UNION ALL SELECT a.relid, a.depth FROM coffer._ancestors(p.parent) a) x),
            p.constraint_name, (SELECT string_agg(quote_ident(c), ', ') FROM unnest(coffer._column_names(rel, p.attnums)) c),
            ', not ' || others))::coffer._way;
END $$;

-- Why there is none, for an error's hint.
CREATE FUNCTION coffer._path_obstacles(rel oid, only_parent oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT string_agg(format('%I %s', f.constraint_name, f.obstacle), '; ' ORDER BY f.constraint_oid)
    FROM coffer._paths(rel) f WHERE f.obstacle IS NOT NULL AND (only_parent IS NULL OR f.parent = only_parent)
$$;

-- The text by which a row of a table under `session` is remembered: each key column's length and text.
CREATE FUNCTION coffer._session_key(rel oid, columns text[], row_name text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT string_agg(format('pg_catalog.concat(pg_catalog.char_length(%1$s), '':'', %1$s)', coffer._column_text(row_name, rel, c::name)), ' || ' ORDER BY ord)
    FROM unnest(columns) WITH ORDINALITY u (c, ord)
$$;

-- An expression for the tenant, as text, of a row of a covered table that the statement calls `row_name`; NULL for a row of
-- nobody. What it reads beside the row is in coffer._ancestors().
CREATE FUNCTION coffer._tenant_expression(rel oid, row_name text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    r      coffer.rules;
    up     text;
BEGIN
    SELECT * INTO r FROM coffer.rules u WHERE u.relid = rel;
    IF r.tenant_attnum > 0 THEN
        RETURN (SELECT coffer._text_of(format('%s.%I', row_name, a.attname), a.atttypid)
                FROM pg_attribute a WHERE a.attrelid = rel AND a.attnum = r.tenant_attnum);
    END IF;
    IF r.strategy = 3 THEN
        RETURN format('(SELECT coffer_s.tenant FROM coffer.session_rows coffer_s WHERE coffer_s.relid = %s AND coffer_s.key = %s)',
                      rel, coffer._session_key(rel, r.key_columns, row_name));
    END IF;
    IF r.strategy IS DISTINCT FROM 2 THEN
        RETURN NULL;
    END IF;
    up := format('coffer_%s', r.parent);
    RETURN format('(SELECT %s FROM %s %s WHERE %s)', coffer._tenant_expression(r.parent, up), coffer._from(r.parent), up,
        (SELECT string_agg(format('%s.%I OPERATOR(pg_catalog.=) %s.%I', up, p, row_name, c), ' AND ' ORDER BY ord)
         FROM unnest(coffer._column_names(r.parent, r.parent_attnums), coffer._column_names(rel, r.path_attnums)) WITH ORDINALITY u (p, c, ord)));
END $$;

-- Whether a text is what the server writes for a value of a type. A tenant is its text: '007' is none of integer, though
-- there is a number that is equal to it.
CREATE FUNCTION coffer._fits(value text, type oid) RETURNS bool
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp SET datestyle = 'ISO, MDY' SET timezone = 'UTC'
SET intervalstyle = postgres SET extra_float_digits = 3 SET bytea_output = hex SET lc_monetary = 'C'
AS $$
DECLARE
    written  text;
BEGIN
    EXECUTE format('SELECT %s', coffer._text_of(format('%L::%s', value, coffer._type_name(type)), type)) INTO written;
    RETURN written COLLATE "C" = value;
EXCEPTION WHEN data_exception THEN
    RETURN false;
END $$;

-- For each of several tables a condition for the rows of one tenant that an index can answer, where
-- coffer._tenant_expression() would have to be computed for each row. A table of which no row can be the tenant's is not
-- in the answer. In plpgsql, because its plans are kept: this is asked at every reading, of all tables at once.
CREATE FUNCTION coffer._tenant_conditions(rels oid[], row_name text, tenant text) RETURNS TABLE (relid oid, condition text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    -- Up to the table that says the tenant; the control character stands for the condition on it.
    WITH RECURSIVE up (relid, here, name, condition) AS (
        SELECT r.oid, r.oid, $2, E'\x01' FROM unnest($1) r (oid)
        UNION ALL
        SELECT u.relid, r.parent, x.name,
               replace(u.condition, E'\x01', format(E'(%s) IN (SELECT %s FROM %s %s WHERE \x01)',
                   (SELECT string_agg(format('%s.%I', u.name, c), ', ' ORDER BY ord) FROM unnest(coffer._column_names(r.relid, r.path_attnums)) WITH ORDINALITY n (c, ord)),
                   (SELECT string_agg(format('%s.%I', x.name, c), ', ' ORDER BY ord) FROM unnest(coffer._column_names(r.parent, r.parent_attnums)) WITH ORDINALITY n (c, ord)),
                   coffer._from(r.parent), x.name))
        FROM up u
        JOIN coffer.rules r ON r.relid = u.here AND r.strategy = 2 AND r.tenant_attnum = 0
        CROSS JOIN LATERAL (SELECT format('coffer_%s', r.parent)) x (name)
    ),
    ends AS MATERIALIZED (
        SELECT u.*, r.key_columns, a.attname, a.atttypid, a.attcollation
        FROM up u
        JOIN coffer.rules r ON r.relid = u.here AND (r.tenant_attnum > 0 OR r.strategy = 3)
        LEFT JOIN pg_attribute a ON a.attrelid = r.relid AND a.attnum = r.tenant_attnum AND r.tenant_attnum > 0
    ),
    types AS MATERIALIZED (
        SELECT t.*, coffer._fits($3, t.type) AS fits, coffer._key_family(t.type, t.coll) IS NOT NULL AS is_exact,
               coffer._type_name(t.type) AS name
        FROM (SELECT DISTINCT e.atttypid, e.attcollation FROM ends e WHERE e.attname IS NOT NULL) t (type, coll)
    )
    SELECT e.relid, replace(e.condition, E'\x01',
               -- For most types = is as narrow as the text is; for others (1.0 = 1.00) it is only what an index can answer.
               CASE WHEN t.is_exact THEN format('%s.%I = %L::%s', e.name, e.attname, $3, t.name)
                    WHEN e.attname IS NOT NULL THEN format('(%s.%I = %L::%s AND %s COLLATE "C" = %3$L)', e.name, e.attname, $3, t.name,
                                                         coffer._text_of(format('%s.%I', e.name, e.attname), e.atttypid))
                    ELSE format('%s IN (SELECT coffer_s.key FROM coffer.session_rows coffer_s WHERE coffer_s.relid = %s AND coffer_s.tenant = %L)',
                                coffer._session_key(e.here, e.key_columns, e.name), e.here, $3) END)
    FROM ends e LEFT JOIN types t ON t.type = e.atttypid AND t.coll = e.attcollation
    WHERE e.attname IS NULL OR t.fits;
END $$;

CREATE FUNCTION coffer._tenant_condition(rel oid, row_name text, tenant text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT c.condition FROM coffer._tenant_conditions(ARRAY[rel], row_name, tenant) c $$;

-- How a trigger finds a parent: the columns that lead to it, the query (key as text in, tenant or next key as text out),
-- and the indexes in which a version that is deleted already can be found.
CREATE FUNCTION coffer._edge(rel oid)
RETURNS TABLE (parent oid, owner oid, columns text[], parent_columns text[], attnums int2[], results text[], leads_on bool,
               needs_settings bool, lookup text, leaves oid[], indexes oid[])
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT r.parent, c.relowner, coffer._column_names(rel, r.path_attnums), k.names, r.parent_attnums, o.names, p.strategy = 2,
           EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = r.parent AND a.attname = ANY (o.names)
                   AND coffer._base_type(a.atttypid) <> ALL (ARRAY['int2', 'int4', 'int8', 'text', 'varchar', 'uuid', 'bool']::regtype[])),
           format('SELECT %s FROM %s p WHERE %s',
                  (SELECT string_agg(coffer._column_text('p', r.parent, x::name), ', ' ORDER BY ord) FROM unnest(o.names) WITH ORDINALITY u (x, ord)),
                  coffer._from(r.parent),
                  (SELECT string_agg(format('p.%I OPERATOR(pg_catalog.=) $%s::%s', a.attname, u.ord, coffer._type_name(a.atttypid)), ' AND ' ORDER BY ord)
                   FROM unnest(r.parent_attnums) WITH ORDINALITY u (n, ord) JOIN pg_attribute a ON a.attrelid = r.parent AND a.attnum = u.n)),
           i.leaves, i.indexes
    FROM coffer.rules r
    JOIN coffer.rules p ON p.relid = r.parent
    JOIN pg_class c ON c.oid = r.parent
    CROSS JOIN LATERAL (SELECT coffer._column_names(r.parent, r.parent_attnums) AS names) k
    CROSS JOIN LATERAL (SELECT CASE WHEN p.strategy = 2 THEN coffer._column_names(r.parent, p.path_attnums)
                                    ELSE coffer._column_names(r.parent, ARRAY[p.tenant_attnum]) END AS names) o
    CROSS JOIN LATERAL (
        SELECT array_agg(t.relid) AS leaves, array_agg(x.index_oid) AS indexes
        FROM coffer._tree(r.parent) t
        CROSS JOIN LATERAL (
            SELECT y.indexrelid AS index_oid FROM pg_index y
            WHERE y.indrelid = t.relid AND y.indisunique AND y.indisvalid AND y.indisready AND y.indpred IS NULL AND y.indexprs IS NULL
              AND (SELECT array_agg(a.attname::text ORDER BY a.attname) FROM unnest(y.indkey::int2[]) WITH ORDINALITY u (n, ord)
                   JOIN pg_attribute a ON a.attrelid = t.relid AND a.attnum = u.n WHERE u.ord <= y.indnkeyatts)
                  = (SELECT array_agg(n ORDER BY n COLLATE "C") FROM unnest(k.names) n)
            ORDER BY y.indexrelid LIMIT 1) x
        WHERE t.relkind = 'r'
    ) i
    WHERE r.relid = rel AND r.strategy = 2
$$;

-- The keys by which other tables' rows find their tenant in this one.
CREATE FUNCTION coffer._parent_keys(root oid) RETURNS TABLE (attnums int2[], columns text[], tenant_column text, is_loose bool)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT c.parent_attnums, coffer._column_names(root, c.parent_attnums),
           (SELECT a.attname::text FROM coffer.rules r JOIN pg_attribute a ON a.attrelid = root AND a.attnum = r.tenant_attnum
            WHERE r.relid = root AND r.tenant_attnum > 0),
           bool_or(c.path_loose)
    FROM coffer.rules c WHERE c.parent = root AND EXISTS (SELECT FROM coffer.rules r WHERE r.relid = root)
    GROUP BY c.parent_attnums
$$;

-- For a parent's row that moves to another tenant, by one of its keys: every table with rows below it, nearest first, with
-- the statement that writes those rows into the log anew, and the one that keeps others from adding to them. For those that
-- refer to the key itself also the one that says which keys of several have rows, by their places in arrays of texts, and whether
-- an index finds the rows of one.
CREATE FUNCTION coffer._moves(root oid, key_attnums int2[])
RETURNS TABLE (relid oid, owner oid, move text, hold text, refer text, is_indexed bool)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE down (relid, depth, condition) AS (
        -- The control character stands for the row's name.
        SELECT r.relid, 1,
               (SELECT string_agg(format(E'\x01.%I OPERATOR(pg_catalog.=) $%s::%s', c, u.ord, coffer._type_name(a.atttypid)), ' AND ' ORDER BY u.ord)
                FROM unnest(r.parent_attnums, coffer._column_names(r.relid, r.path_attnums)) WITH ORDINALITY u (n, c, ord)
                JOIN pg_attribute a ON a.attrelid = root AND a.attnum = u.n)
        FROM coffer.rules r WHERE r.parent = root AND r.parent_attnums = key_attnums
        UNION ALL
        SELECT r.relid, d.depth + 1,
               format('EXISTS (SELECT FROM %s coffer_%s WHERE %s AND %s)', coffer._from(d.relid), d.depth,
                      (SELECT string_agg(format(E'coffer_%s.%I OPERATOR(pg_catalog.=) \x01.%I', d.depth, p, c), ' AND ' ORDER BY u.ord)
                       FROM unnest(coffer._column_names(d.relid, r.parent_attnums), coffer._column_names(r.relid, r.path_attnums))
                            WITH ORDINALITY u (p, c, ord)),
                      replace(d.condition, E'\x01', format('coffer_%s', d.depth)))
        FROM down d JOIN coffer.rules r ON r.parent = d.relid
    )
    SELECT d.relid, c.relowner,
           format('UPDATE %s t SET %I = t.%2$I WHERE %s', coffer._from(d.relid), (coffer._column_names(d.relid, r.path_attnums))[1],
                  replace(d.condition, E'\x01', 't')),
           CASE WHEN EXISTS (SELECT FROM coffer.rules b WHERE b.parent = d.relid)
                THEN format('SELECT pg_catalog.count(*)::pg_catalog.text FROM (SELECT FROM %s t WHERE %s FOR UPDATE OF t) x', coffer._from(d.relid),
                            replace(d.condition, E'\x01', 't')) END,
           CASE WHEN d.depth = 1
                THEN (SELECT format('SELECT DISTINCT k.n::pg_catalog.text FROM ROWS FROM (%s) WITH ORDINALITY k (%s, n) JOIN %s t ON %s',
                                    string_agg(format('pg_catalog.unnest($%s::pg_catalog.text[])', u.ord), ', ' ORDER BY u.ord),
                                    string_agg(format('v%s', u.ord), ', ' ORDER BY u.ord), coffer._from(d.relid),
                                    string_agg(format('t.%I OPERATOR(pg_catalog.=) k.v%s::%s', u.c, u.ord, coffer._type_name(a.atttypid)), ' AND ' ORDER BY u.ord))
                      FROM unnest(r.parent_attnums, coffer._column_names(d.relid, r.path_attnums)) WITH ORDINALITY u (n, c, ord)
                      JOIN pg_attribute a ON a.attrelid = root AND a.attnum = u.n) END,
           EXISTS (SELECT FROM pg_index y WHERE y.indrelid = d.relid AND y.indisvalid AND y.indpred IS NULL AND y.indkey[0] = ANY (r.path_attnums))
    FROM down d JOIN coffer.rules r ON r.relid = d.relid JOIN pg_class c ON c.oid = d.relid
    ORDER BY d.depth, d.relid
$$;

-- True when an UPDATE of the parent may concern rows below it: its tenant, or a key that they refer to.
CREATE FUNCTION coffer._parent_condition(root oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT string_agg(format('%s IS DISTINCT FROM %s', coffer._key_expression('OLD', root, a.attname), coffer._key_expression('NEW', root, a.attname)),
                      ' OR ' ORDER BY a.attnum)
    FROM pg_attribute a
    WHERE a.attrelid = root AND a.attnum > 0
      AND (a.attnum = (SELECT r.tenant_attnum FROM coffer.rules r WHERE r.relid = root)
           OR a.attnum = ANY ((SELECT r.path_attnums FROM coffer.rules r WHERE r.relid = root)::int2[])
           OR EXISTS (SELECT FROM coffer.rules c WHERE c.parent = root AND a.attnum = ANY (c.parent_attnums)))
$$;

-- The triggers that a parent needs. Names in capitals come before the server's own triggers for referential actions, those
-- with z after them.
CREATE FUNCTION coffer._parent_triggers(root oid) RETURNS TABLE (name name, what text, event text, condition text)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT (v.name || coffer._trigger_suffix(root))::name, v.what, v.event,
           CASE WHEN v.event LIKE '%UPDATE' THEN coffer._parent_condition(root) END
    FROM pg_class c
    CROSS JOIN (VALUES ('zzz_coffer_parent_begin', 'begin', 'BEFORE UPDATE'), ('zzz_coffer_parent_leaves', 'leaves', 'BEFORE DELETE'),
                       ('AAA_coffer_parent', 'moved', 'AFTER UPDATE'),
                       ('zzz_coffer_parent_end', 'end', 'AFTER UPDATE'), ('AAA_coffer_parent_new', 'new', 'AFTER INSERT'),
                       ('AAA_coffer_parent_gone', 'gone', 'AFTER DELETE'), ('AAA_coffer_parent_gone', 'replaced', 'AFTER DELETE'),
                       ('AAA_coffer_parent_truncate', 'truncated', 'AFTER TRUNCATE'))
                      v (name, what, event)
    WHERE c.oid = root AND EXISTS (SELECT FROM coffer.rules r WHERE r.parent = root)
      -- Behind a constraint that is checked late a row can outlive its parent, and find another; behind others only when
      -- the statement that deletes the parent puts another in its place.
      AND (v.what NOT IN ('gone', 'replaced') OR (v.what = 'gone') = EXISTS (
            SELECT FROM coffer.rules r LEFT JOIN pg_constraint k
                ON r.path_guarded AND k.oid = coffer._guard(r.relid, r.parent, r.path_attnums, r.parent_attnums)
            WHERE r.parent = root AND coalesce(k.condeferrable, true)))
      -- Where there is a foreign key, the server empties the tables below, too, or refuses.
      AND (v.what <> 'truncated' OR EXISTS (SELECT FROM coffer.rules r WHERE r.parent = root AND NOT r.path_guarded))
$$;

-- Every trigger of a parent's in a tree.
CREATE FUNCTION coffer._triggers_of_parent(root oid) RETURNS TABLE (relid oid, name name, is_clone bool, enabled "char", args bytea)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT g.tgrelid, g.tgname, g.tgparentid <> 0, g.tgenabled, g.tgargs
    FROM coffer._tree(root) m
    CROSS JOIN LATERAL (SELECT * FROM pg_trigger t WHERE t.tgrelid = m.relid OFFSET 0) g
    WHERE g.tgfoid IN (to_regprocedure('coffer._parent()'), to_regprocedure('coffer._parent_truncated()'))
$$;

CREATE FUNCTION coffer._parent_arguments(what text, condition text) RETURNS bytea
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT convert_to(what, 'UTF8') || '\x00' || convert_to(md5(coalesce(condition, '')), 'UTF8') || '\x00' $$;

CREATE FUNCTION coffer._parent_intact(root oid) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT NOT EXISTS (
        SELECT FROM coffer._tree(root) m
        LEFT JOIN (
            SELECT g.relid, count(*) AS n, count(*) FILTER (WHERE g.enabled = 'A' AND g.args = coffer._parent_arguments(w.what, w.condition)) AS good
            FROM coffer._triggers_of_parent(root) g
            LEFT JOIN coffer._parent_triggers(root) w ON w.name = g.name
            GROUP BY g.relid
        ) t ON t.relid = m.relid
        WHERE m.relkind IN ('r', 'p') AND (t.n <> t.good OR coalesce(t.n, 0) <> (SELECT count(*) FROM coffer._parent_triggers(root))))
$$;

-- Gives a table the triggers of a parent, or takes them away.
CREATE FUNCTION coffer._sync_parent(root oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    t  record;
BEGIN
    IF root = 0 OR NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = root) OR coffer._parent_intact(root) THEN
        RETURN;
    END IF;
    FOR t IN SELECT * FROM coffer._triggers_of_parent(root) WHERE NOT is_clone LOOP
        PERFORM coffer._ddl(format('DROP TRIGGER %I ON %s', t.name, t.relid::regclass));
    END LOOP;
    -- The server clones those for rows to partitions.
    FOR t IN
        SELECT p.*, m.relid FROM coffer._parent_triggers(root) p
        JOIN coffer._tree(root) m ON m.relid = root OR p.what = 'truncated' AND m.relkind IN ('r', 'p')
    LOOP
        PERFORM coffer._ddl(format('CREATE TRIGGER %I %s ON %s %s EXECUTE FUNCTION coffer.%I(%L, %L)', t.name, t.event, t.relid::regclass,
            CASE t.what WHEN 'truncated' THEN 'FOR EACH STATEMENT' ELSE concat_ws(' ', 'FOR EACH ROW', 'WHEN (' || t.condition || ')') END,
            CASE t.what WHEN 'truncated' THEN '_parent_truncated' ELSE '_parent' END, t.what, md5(coalesce(t.condition, ''))));
    END LOOP;
    FOR t IN SELECT * FROM coffer._triggers_of_parent(root) WHERE enabled <> 'A' LOOP
        PERFORM coffer._ddl(format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %I', t.relid::regclass, t.name));
    END LOOP;
    PERFORM coffer._invalidate(m.relid) FROM coffer._tree(root) m;
END $$;

-- The rows below a table belong to other tenants than was archived, without a change of theirs: they need new bases.
CREATE FUNCTION coffer._rebase_descendants(root oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    d  oid;
BEGIN
    FOR d IN SELECT DISTINCT x.relid FROM coffer._path_descendants(root) x LOOP
        UPDATE coffer.rules r SET registered_xid = pg_current_xact_id(), registered_at = now() WHERE r.relid = d;
        PERFORM coffer._changed(d, 'add', true);
    END LOOP;
END $$;

-- Parents that are gone at once leave rows behind where no foreign key takes those along.
CREATE FUNCTION coffer._parent_truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    PERFORM coffer._rebase_descendants(coffer._root(TG_RELID));
    RETURN NULL;
END $$;

-- Notes that the foreign key of a rule lets rows without a parent pass: from here on parents that come look for rows that wait
-- for them. One that came at the same time did not, so the table gets a new base, which waits for all who write now.
CREATE FUNCTION coffer._loosen(rel oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    UPDATE coffer.rules r SET path_loose = true, registered_xid = pg_current_xact_id(), registered_at = now()
    WHERE r.relid = rel AND NOT r.path_loose;
    IF FOUND THEN
        PERFORM coffer._changed(rel, 'add', true);
        PERFORM coffer._rebase_descendants(rel);
        RAISE WARNING 'coffer: the foreign key of % lets rows without a parent pass; the table gets a new base', rel::regclass
            USING HINT = 'Such rows are nobody''s until their parent comes. When there are none any more: coffer.add_table().';
    END IF;
END $$;

-- Whether a table has rows whose parent is not there.
CREATE FUNCTION coffer._has_strays(rel oid) RETURNS bool
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    r      coffer.rules;
    found  bool;
BEGIN
    SELECT * INTO r FROM coffer.rules u WHERE u.relid = rel;
    EXECUTE (
        SELECT format('SELECT EXISTS (SELECT FROM %s t WHERE %s AND NOT EXISTS (SELECT FROM %s p WHERE %s))', coffer._from(rel),
                      string_agg(format('t.%I IS NOT NULL', c), ' AND '), coffer._from(r.parent),
                      string_agg(format('p.%I OPERATOR(pg_catalog.=) t.%I', n, c), ' AND '))
        FROM unnest(coffer._column_names(r.parent, r.parent_attnums), coffer._column_names(rel, r.path_attnums)) u (n, c)) INTO found;
    RETURN found;
END $$;

-- Refuses what would leave the rows below a table without a tenant.
CREATE FUNCTION coffer._refuse_with_children(rel oid, what text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    below  text := (SELECT string_agg(r.relid::regclass::text, ', ' ORDER BY r.relid) FROM coffer.rules r WHERE r.parent = rel);
BEGIN
    IF below IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be %: the tenants of % are found through it', rel::regclass, what, below
            USING ERRCODE = 'dependent_objects_still_exist', HINT = 'Call coffer.remove_table() for those first.';
    END IF;
END $$;

-- Whose a row of a table under `session` is, kept by its key beside the table: after the session has ended nothing else
-- tells. Kept here and not in the row, since the table is the application's.
CREATE FUNCTION coffer._session_truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, coffer, pg_temp
AS $$
BEGIN
    DELETE FROM coffer.session_rows s WHERE s.relid = coffer._root(TG_RELID);
    RETURN NULL;
END $$;

-- Keeps others from adding rows below a parent that moves.
CREATE FUNCTION coffer._hold_parent(root oid, key_attnums int2[]) RETURNS TABLE (owner oid, hold text)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT c.relowner, format('SELECT ''''::pg_catalog.text FROM %s t WHERE %s FOR UPDATE OF t', coffer._from(root),
        (SELECT string_agg(format('t.%I OPERATOR(pg_catalog.=) $%s::%s', a.attname, u.ord, coffer._type_name(a.atttypid)), ' AND ' ORDER BY u.ord)
         FROM unnest(key_attnums) WITH ORDINALITY u (n, ord) JOIN pg_attribute a ON a.attrelid = root AND a.attnum = u.n))
    FROM pg_class c WHERE c.oid = root
$$;
