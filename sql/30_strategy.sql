-- Which strategy fits a table, and what it asks of the table: the replica identity and the tag triggers.
--
-- The order is DBA's arithmetic: `identity` costs nothing, `tag` a message per DELETE, `full_row` the whole old row in
-- the log. No index is ever created here: one that exists is used, else the reason names one that would be cheaper.

-- The unique indexes of a table and, for each, what keeps it from naming rows in the log.
CREATE FUNCTION coffer._keys(rel oid)
RETURNS TABLE (index_oid oid, index_name name, is_primary bool, is_identity bool, columns name[], sorted name[], obstacle text)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT i.indexrelid, c.relname, i.indisprimary, i.indisreplident, k.columns, k.sorted,
           CASE WHEN NOT i.indisvalid OR NOT i.indisready THEN 'is not valid'
                WHEN i.indisexclusion THEN 'is an exclusion constraint'
                WHEN NOT i.indimmediate THEN 'is deferrable'
                WHEN i.indpred IS NOT NULL THEN 'is partial'
                WHEN i.indexprs IS NOT NULL THEN 'has an expression'
                WHEN k.nullable IS NOT NULL THEN format('allows NULL in %s', k.nullable)
           END
    FROM pg_index i
    JOIN pg_class c ON c.oid = i.indexrelid
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname ORDER BY u.place) AS columns,
               array_agg(a.attname ORDER BY a.attnum) AS sorted,
               string_agg(quote_ident(a.attname), ', ' ORDER BY u.place) FILTER (WHERE NOT a.attnotnull) AS nullable
        FROM unnest(i.indkey::int2[]) WITH ORDINALITY u (attnum, place)
        LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
        WHERE u.place <= i.indnkeyatts
    ) k
    WHERE i.indrelid = rel AND i.indisunique AND i.indislive
$$;

-- The index by which the log names a row's old version now; 0 for the full row, NULL for not at all.
CREATE FUNCTION coffer._effective_key(rel oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT CASE c.relreplident
        WHEN 'f' THEN 0::oid
        WHEN 'd' THEN (SELECT k.index_oid FROM coffer._keys(rel) k WHERE k.is_primary AND k.obstacle IS NULL)
        WHEN 'i' THEN (SELECT k.index_oid FROM coffer._keys(rel) k WHERE k.is_identity AND k.obstacle IS NULL)
    END
    FROM pg_class c WHERE c.oid = rel
$$;

-- The index of one relation of a partition tree that stands for the root's.
CREATE FUNCTION coffer._index_in(rel oid, root_index oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT k.index_oid FROM coffer._keys(rel) k
    WHERE k.obstacle IS NULL
      AND (k.index_oid = root_index OR pg_partition_root(k.index_oid::regclass) = root_index)
$$;

-- Whether somebody else decodes the table's updates and deletes: its replica identity is then theirs as well, and is
-- widened when need be but not pointed at another key.
CREATE FUNCTION coffer._is_published(rel oid) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM pg_publication p
        WHERE (p.pubupdate OR p.pubdelete)
          AND (p.puballtables
               OR EXISTS (SELECT FROM pg_publication_rel r JOIN coffer._tree(rel) t ON t.relid = r.prrelid WHERE r.prpubid = p.oid)
               OR EXISTS (SELECT FROM pg_publication_namespace n JOIN pg_class c ON c.relnamespace = n.pnnspid
                          JOIN coffer._tree(rel) t ON t.relid = c.oid WHERE n.pnpubid = p.oid))
    )
$$;

-- The best plan for a table. Without a tenant column (a shared table, a tenant's schema) only the replica identity is
-- planned and `strategy` stays NULL.
CREATE FUNCTION coffer._plan(
    root oid, tenant name,
    OUT strategy int2, OUT identity "char", OUT key_index oid, OUT key_columns text[], OUT reason text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    now_identity  "char";
    now_index     oid;
    now_key       record;
    own           record;     -- the best index that contains the tenant column
    other         record;     -- the best index that does not matter whether
    pinned        bool;
    hint          text;
    computed      bool;
BEGIN
    -- What is there; where an earlier plan changed it, what was there before. A partitioned table's own replica identity
    -- is never used by the server; that of its leaves is.
    SELECT CASE WHEN count(DISTINCT w.identity) = 1 THEN min(w.identity::text) ELSE 'd' END,
           CASE WHEN count(DISTINCT w.identity) = 1 AND min(w.identity::text) = 'i'
                THEN min(coalesce(pg_partition_root(w.index::regclass)::oid, w.index)) END
    INTO now_identity, now_index
    FROM coffer._tree(root) t
    JOIN pg_class c ON c.oid = t.relid
    LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident
    LEFT JOIN coffer.rule_relations m ON m.relid = c.oid AND m.own_identity = c.relreplident
              AND (m.own_identity <> 'i' OR m.key_index = i.indexrelid)
    CROSS JOIN LATERAL (SELECT coalesce(m.prior_identity, c.relreplident) AS identity,
                               CASE WHEN m.relid IS NULL THEN i.indexrelid ELSE m.prior_index END AS index) w
    WHERE t.relkind = 'r';
    IF now_identity IS NULL THEN
        now_identity := 'd';
    END IF;

    SELECT k.* INTO now_key FROM coffer._keys(root) k
    WHERE k.obstacle IS NULL
      AND CASE now_identity WHEN 'd' THEN k.is_primary WHEN 'i' THEN k.index_oid = now_index ELSE false END;
    SELECT k.* INTO own FROM coffer._keys(root) k
    WHERE k.obstacle IS NULL AND tenant = ANY (k.columns)
    ORDER BY k.is_primary DESC, cardinality(k.columns), k.index_oid LIMIT 1;
    SELECT k.* INTO other FROM coffer._keys(root) k
    WHERE k.obstacle IS NULL
    ORDER BY k.is_primary DESC, cardinality(k.columns), k.index_oid LIMIT 1;
    pinned := (now_identity = 'i' OR coffer._is_published(root)) AND now_key.index_oid IS NOT NULL;

    -- The nearest index that would have been better, for the reason.
    SELECT format('%s %I %s', CASE WHEN k.is_primary THEN 'primary key' ELSE 'unique index' END, k.index_name, k.obstacle)
    INTO hint FROM coffer._keys(root) k WHERE k.obstacle IS NOT NULL
    ORDER BY (tenant = ANY (k.columns)) DESC NULLS LAST, k.is_primary DESC, k.index_oid LIMIT 1;

    IF tenant IS NULL THEN
        IF now_key.index_oid IS NOT NULL THEN
            identity := now_identity; key_index := now_key.index_oid; key_columns := now_key.sorted;
            reason := format('rows are named by %I', now_key.index_name);
        ELSIF now_identity = 'f' THEN
            identity := 'f'; key_index := 0;
            reason := 'REPLICA IDENTITY FULL was set and is kept';
        ELSIF other.index_oid IS NOT NULL THEN
            identity := CASE WHEN other.is_primary THEN 'd' ELSE 'i' END;
            key_index := other.index_oid; key_columns := other.sorted;
            reason := format('rows are named by %I', other.index_name);
        ELSE
            identity := 'f'; key_index := 0;
            reason := concat_ws('; ', 'no usable key, so the whole old row is logged', hint, 'a primary key would be cheaper');
        END IF;
        RETURN;
    END IF;

    IF tenant = ANY (now_key.columns) THEN
        strategy := 0; identity := now_identity; key_index := now_key.index_oid; key_columns := now_key.sorted;
        reason := format('%s %I contains %I', CASE WHEN now_key.is_primary THEN 'primary key' ELSE 'replica identity index' END,
                         now_key.index_name, tenant);
        RETURN;
    END IF;
    IF now_identity = 'f' THEN
        strategy := 4; identity := 'f'; key_index := 0;
        reason := 'REPLICA IDENTITY FULL was set and is kept';
        IF own.index_oid IS NOT NULL THEN
            reason := reason || format('; REPLICA IDENTITY %s would be cheaper',
                CASE WHEN own.is_primary THEN 'DEFAULT' ELSE 'USING INDEX ' || quote_ident(own.index_name) END);
        ELSIF other.index_oid IS NOT NULL THEN
            reason := reason || format('; a unique index on (%s) as replica identity would be cheaper',
                (SELECT string_agg(quote_ident(c), ', ') FROM unnest(ARRAY[tenant] || other.columns) c));
        END IF;
        RETURN;
    END IF;
    IF own.index_oid IS NOT NULL AND NOT pinned THEN
        strategy := 0; key_index := own.index_oid; key_columns := own.sorted;
        identity := CASE WHEN own.is_primary THEN 'd' ELSE 'i' END;
        reason := format('%s %I contains %I%s', CASE WHEN own.is_primary THEN 'primary key' ELSE 'unique index' END,
                         own.index_name, tenant,
                         CASE WHEN own.is_primary THEN '' ELSE ' and is made the replica identity' END);
        RETURN;
    END IF;

    SELECT a.attgenerated <> '' INTO computed FROM pg_attribute a WHERE a.attrelid = root AND a.attname = tenant;
    IF NOT computed AND coalesce(now_key.index_oid, other.index_oid) IS NOT NULL THEN
        strategy := 1;
        IF now_key.index_oid IS NOT NULL THEN
            identity := now_identity; key_index := now_key.index_oid; key_columns := now_key.sorted;
        ELSE
            now_key := other;
            identity := CASE WHEN other.is_primary THEN 'd' ELSE 'i' END;
            key_index := other.index_oid; key_columns := other.sorted;
        END IF;
        reason := format('key %I lacks %I, so a DELETE and a change of %2$I write a tag', now_key.index_name, tenant);
        IF own.index_oid IS NOT NULL THEN
            reason := reason || format('; REPLICA IDENTITY USING INDEX %I would be cheaper, but the replica identity in place %s',
                own.index_name, CASE WHEN now_identity = 'i' THEN 'was chosen by hand' ELSE 'serves a publication' END);
        ELSE
            reason := reason || coalesce('; ' || hint, '') || format('; a unique index on (%s)%s would be cheaper',
                (SELECT string_agg(quote_ident(c), ', ') FROM unnest(ARRAY[tenant] || now_key.columns) c),
                (SELECT format(', with %I NOT NULL,', tenant) FROM pg_attribute a
                 WHERE a.attrelid = root AND a.attname = tenant AND NOT a.attnotnull));
        END IF;
        RETURN;
    END IF;

    strategy := 4; identity := 'f'; key_index := 0;
    reason := concat_ws('; ',
        CASE WHEN computed AND other.index_oid IS NOT NULL
             THEN format('%I is a generated column, which a tag cannot carry, so the whole old row is logged', tenant)
             ELSE 'no usable key, so the whole old row is logged' END,
        hint,
        format('a primary key or a unique index on NOT NULL columns with %I would be cheaper', tenant));
END $$;

-- An expression that is equal for two values of a column exactly when their texts are: the tenant key is the text. For
-- most types = says the same and is cheaper; for numeric, citext and others it does not (1.0 = 1.00).
CREATE FUNCTION coffer._key_expression(row_name text, rel oid, col name) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT CASE
        WHEN t.typtype = 'e' OR t.oid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'oid'::regtype,
                                          'uuid'::regtype, 'bool'::regtype, 'date'::regtype)
        THEN format('%s.%I', row_name, col)
        ELSE format('%s.%I::text COLLATE "C"', row_name, col)
    END
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = rel AND a.attname = col
$$;

-- Gives every relation of the tree the planned replica identity and remembers what was there before.
CREATE FUNCTION coffer._apply_identity(root oid, want "char", root_index oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    m    record;
    idx  oid;
BEGIN
    FOR m IN
        SELECT t.relid, c.relreplident AS identity, coalesce(i.indexrelid, 0) AS index
        FROM coffer._tree(root) t
        JOIN pg_class c ON c.oid = t.relid
        LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident
        WHERE t.relkind IN ('r', 'p')
    LOOP
        idx := CASE WHEN want = 'f' THEN 0 ELSE coffer._index_in(m.relid, root_index) END;
        IF idx IS NULL THEN
            RAISE EXCEPTION 'partition % has no index of its own for %', m.relid::regclass, root_index::regclass
                USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
        INSERT INTO coffer.rule_relations AS r (relid, root, prior_identity, prior_index, own_identity, key_index, types)
        VALUES (m.relid, root, m.identity, m.index, want, idx, coffer._types(m.relid))
        ON CONFLICT (relid) DO UPDATE SET root = excluded.root, own_identity = excluded.own_identity, key_index = excluded.key_index;
        IF m.identity <> want OR (want = 'i' AND m.index <> idx) THEN
            PERFORM coffer._ddl(format('ALTER TABLE ONLY %s REPLICA IDENTITY %s', m.relid::regclass,
                CASE want WHEN 'd' THEN 'DEFAULT' WHEN 'f' THEN 'FULL'
                          ELSE (SELECT format('USING INDEX %I', relname) FROM pg_class WHERE oid = idx) END));
        END IF;
    END LOOP;
END $$;

-- Puts back the replica identity of one relation, unless somebody has changed it since.
CREATE FUNCTION coffer._restore_identity(rel oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    m  record;
BEGIN
    DELETE FROM coffer.rule_relations WHERE relid = rel RETURNING * INTO m;
    IF NOT FOUND OR m.own_identity IS DISTINCT FROM (SELECT relreplident FROM pg_class WHERE oid = rel)
       OR (m.own_identity, m.key_index) = (m.prior_identity, m.prior_index)
       OR (m.own_identity = m.prior_identity AND m.own_identity <> 'i') THEN
        RETURN;
    END IF;
    IF m.own_identity = 'i' AND NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = m.key_index AND indisreplident) THEN
        RETURN;
    END IF;
    PERFORM coffer._ddl(format('ALTER TABLE ONLY %s REPLICA IDENTITY %s', rel::regclass,
        CASE m.prior_identity WHEN 'f' THEN 'FULL' WHEN 'n' THEN 'NOTHING'
             WHEN 'i' THEN coalesce((SELECT format('USING INDEX %I', c.relname) FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
                                     WHERE c.oid = m.prior_index AND i.indrelid = rel), 'DEFAULT')
             ELSE 'DEFAULT' END));
END $$;

-- Whether rows that move to another tenant may leave large values behind: unchanged values that are stored outside the
-- row are not in the log, and the new tenant has never seen them. A tag takes them along by itself.
CREATE FUNCTION coffer._wants_fill(root oid, strategy int2) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT strategy = 0
       AND CASE c.relkind WHEN 'p' THEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = root AND a.attnum > 0 AND NOT a.attisdropped
                                                AND a.attlen = -1 AND a.attstorage <> 'p')
                ELSE c.reltoastrelid <> 0 END
    FROM pg_class c WHERE c.oid = root
$$;

-- What the triggers' names end with on a partitioned table. A table that is attached as a partition, partitioned itself or
-- not, may have triggers of its own, and gets clones of these before its own go: no two tables' are called alike.
CREATE FUNCTION coffer._trigger_suffix(root oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$ SELECT CASE c.relkind WHEN 'p' THEN format('_tree_%s', root) ELSE '' END FROM pg_class c WHERE c.oid = root $$;

-- The triggers of a strategy, on the root: the server clones them to partitions, present and to come. ALWAYS: they also
-- fire in sessions that replicate or restore. A tag's name sorts last, so that what the application's triggers do is in
-- the row; fill's sorts first.
CREATE FUNCTION coffer._create_triggers(root oid, tenant name, strategy int2) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    suffix  text := coffer._trigger_suffix(root);
    moved   text := format('%s IS DISTINCT FROM %s', coffer._key_expression('OLD', root, tenant), coffer._key_expression('NEW', root, tenant));
    t       record;
BEGIN
    IF strategy = 2 THEN
        PERFORM coffer._ddl(format('CREATE TRIGGER zzz_coffer_path%s BEFORE INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION coffer._path()',
                                   suffix, root::regclass));
    ELSIF strategy = 3 THEN
        PERFORM coffer._ddl(format('CREATE TRIGGER zzz_coffer_session%s BEFORE INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION coffer._session()',
                                   suffix, root::regclass));
        PERFORM coffer._ddl(format('CREATE TRIGGER aaa_coffer_session%s AFTER INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION coffer._session()',
                                   suffix, root::regclass));
        PERFORM coffer._ddl(format('CREATE TRIGGER aaa_coffer_session_truncate AFTER TRUNCATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION coffer._session_truncated()',
                                   root::regclass));
        PERFORM coffer._ddl(format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER aaa_coffer_session_truncate', root::regclass));
    ELSIF strategy = 1 THEN
        PERFORM coffer._ddl(format('CREATE TRIGGER zzz_coffer_tag_delete%s BEFORE DELETE ON %s FOR EACH ROW EXECUTE FUNCTION coffer._tag(%L)',
                                   suffix, root::regclass, tenant));
        PERFORM coffer._ddl(format('CREATE TRIGGER zzz_coffer_tag_move%s BEFORE UPDATE ON %s FOR EACH ROW WHEN (%s) EXECUTE FUNCTION coffer._tag(%L)',
                                   suffix, root::regclass, moved, tenant));
    ELSIF coffer._wants_fill(root, strategy) THEN
        PERFORM coffer._ddl(format('CREATE TRIGGER aaa_coffer_fill%s AFTER UPDATE ON %s FOR EACH ROW WHEN (%s) EXECUTE FUNCTION coffer._fill(%L)',
                                   suffix, root::regclass, moved, tenant));
    END IF;
    FOR t IN SELECT * FROM coffer._triggers(root) WHERE enabled <> 'A' LOOP
        PERFORM coffer._ddl(format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %I', t.relid::regclass, t.name));
    END LOOP;
END $$;

-- Every trigger of a strategy's in a tree, under whatever name.
CREATE FUNCTION coffer._triggers(root oid) RETURNS TABLE (relid oid, name name, is_clone bool, enabled "char", args bytea)
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT g.tgrelid, g.tgname, g.tgparentid <> 0, g.tgenabled, g.tgargs
    FROM coffer._tree(root) m
    -- OFFSET 0: look them up by table; the other way round reads every tag trigger of the database.
    CROSS JOIN LATERAL (SELECT * FROM pg_trigger t WHERE t.tgrelid = m.relid OFFSET 0) g
    WHERE g.tgfoid IN (to_regprocedure('coffer._tag()'), to_regprocedure('coffer._fill()'), to_regprocedure('coffer._path()'),
                       to_regprocedure('coffer._session()'))
$$;

-- Clones go with the trigger they were made from.
CREATE FUNCTION coffer._drop_triggers(root oid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
DECLARE
    t  record;
BEGIN
    FOR t IN SELECT * FROM coffer._triggers(root) WHERE NOT is_clone LOOP
        PERFORM coffer._ddl(format('DROP TRIGGER %I ON %s', t.name, t.relid::regclass));
    END LOOP;
    IF EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = root AND g.tgname = 'aaa_coffer_session_truncate') THEN
        PERFORM coffer._ddl(format('DROP TRIGGER aaa_coffer_session_truncate ON %s', root::regclass));
    END IF;
END $$;

-- Whether every relation of the tree has what the strategy asks for, for this column, firing always, and nothing left over.
CREATE FUNCTION coffer._triggers_intact(root oid, tenant name, strategy int2) RETURNS bool
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT bool_and((SELECT count(*) = w.number AND coalesce(bool_and(t.enabled = 'A' AND t.name ~ w.names
                                                             AND t.args = CASE WHEN strategy IN (2, 3) THEN ''
                                                                 ELSE convert_to(tenant, getdatabaseencoding()) || '\x00'::bytea END), true)
                     FROM coffer._triggers(root) t WHERE t.relid = m.relid))
    FROM coffer._tree(root) m
    CROSS JOIN (SELECT CASE WHEN strategy IN (1, 3) THEN 2 WHEN strategy = 2 OR coffer._wants_fill(root, strategy) THEN 1 ELSE 0 END AS number,
                       CASE strategy WHEN 1 THEN '^zzz_coffer_tag_(delete|move)(_tree_[0-9]+)?$' WHEN 2 THEN '^zzz_coffer_path(_tree_[0-9]+)?$'
                                     WHEN 3 THEN '^(zzz|aaa)_coffer_session(_tree_[0-9]+)?$' ELSE '^aaa_coffer_fill(_tree_[0-9]+)?$' END AS names) w
    WHERE m.relkind IN ('r', 'p')
$$;

-- What the enums and composite types of a table's columns look like: old images are read with it. A domain is named with
-- them, since its constraints say which rows there can be, and looks like the type under it, for good. And how the values of
-- each column are written, by its number, and whether they are written at all: not every ALTER COLUMN TYPE that changes their
-- text rewrites the table (timestamp to timestamptz in UTC, cidr to inet), and DROP EXPRESSION never does.
CREATE FUNCTION coffer._types(rel oid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    WITH RECURSIVE t (oid) AS (
        SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = rel AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= 16384
        UNION
        SELECT n.oid FROM t JOIN pg_type y ON y.oid = t.oid
        LEFT JOIN pg_range r ON r.rngtypid = y.oid
        CROSS JOIN LATERAL (
            SELECT y.typelem UNION SELECT y.typbasetype UNION SELECT r.rngsubtype
            UNION SELECT m.rngtypid FROM pg_range m WHERE m.rngmultitypid = y.oid
            UNION SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = y.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        ) n (oid)
        WHERE n.oid >= 16384
    ), w (attnum, generated, prefix, typ) AS (
        SELECT a.attnum, a.attgenerated, '', a.atttypid FROM pg_attribute a WHERE a.attrelid = rel AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL
        SELECT w.attnum, w.generated, w.prefix || CASE y.typtype WHEN 'd' THEN '' ELSE '[]' END,
               CASE y.typtype WHEN 'd' THEN y.typbasetype ELSE y.typelem END
        FROM w JOIN pg_type y ON y.oid = w.typ AND (y.typtype = 'd' OR y.typcategory = 'A' AND y.typelem <> 0)
    )
    SELECT coalesce(jsonb_object_agg(y.oid::text, CASE y.typtype
        WHEN 'e' THEN (SELECT jsonb_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = y.oid)
        WHEN 'd' THEN jsonb_build_array(y.typbasetype::text)
        ELSE (SELECT jsonb_agg(jsonb_build_array(a.attname, format_type(a.atttypid, a.atttypmod)) ORDER BY a.attnum)
              FROM pg_attribute a WHERE a.attrelid = y.typrelid AND a.attnum > 0 AND NOT a.attisdropped)
    END), '{}') || (
        SELECT coalesce(jsonb_object_agg('c' || w.attnum, jsonb_build_array(jsonb_build_array(
                   w.prefix || CASE y.typcategory WHEN 'S' THEN 'text' ELSE p.proname::text END, w.generated::text))), '{}')
        FROM w JOIN pg_type y ON y.oid = w.typ AND NOT (y.typtype = 'd' OR y.typcategory = 'A' AND y.typelem <> 0)
        JOIN pg_proc p ON p.oid = y.typoutput)
    FROM t JOIN pg_type y ON y.oid = t.oid WHERE y.typtype IN ('e', 'c', 'd')
$$;

-- Notes what the types of a root's columns look like from here on.
CREATE FUNCTION coffer._note_types(root oid) RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    UPDATE coffer.rule_relations m SET types = t.types FROM coffer._types($1) t (types) WHERE m.relid = $1 AND m.types <> t.types
$$;

-- Whether rows written under the old shape still mean the same: enums may have gained labels, columns may have come and gone,
-- nothing else.
CREATE FUNCTION coffer._types_compatible(old jsonb, new jsonb) RETURNS bool
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, coffer, pg_temp
AS $$
    SELECT coalesce(bool_and(CASE jsonb_typeof(o.value -> 0)
        WHEN 'string' THEN n.value @> o.value
        ELSE n.value = o.value END), true)
    FROM jsonb_each(old) o JOIN jsonb_each(new) n ON n.key = o.key
$$;
