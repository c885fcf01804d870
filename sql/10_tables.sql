-- The extension's tables.
--
-- `rules`, `schema_rules` and `secret` are read by the output plugin with the historic snapshot, by attribute number:
-- their first columns never move. They are user catalog tables, so that rows that a decoding session may still need are
-- not vacuumed away. Every change of them goes through a function that also invalidates the relation cache of the
-- tables concerned in the same transaction; without it a decoding session would go on with the rule it has cached.

CREATE TABLE coffer.rules (
    relid           oid PRIMARY KEY,                 -- the table, or the root of a partition tree
    strategy        int2 NOT NULL,                   -- see coffer._strategy_name
    class           int2 NOT NULL,                   -- see coffer._class_name
    tenant_attnum   int2 NOT NULL,                   -- 0: the strategy has no tenant column
    parent          oid NOT NULL DEFAULT 0,          -- 0: none
    registered_xid  xid8 NOT NULL,                   -- the table needs a base that sees everything up to here
    registered_at   timestamptz NOT NULL,
    path_loose      bool,                            -- of a rule with a parent: rows may be there without one
    -- from here on for SQL only
    tenant_column   name,
    identity        "char" NOT NULL,                 -- the replica identity the strategy relies on: d, i or f
    key_index       oid NOT NULL DEFAULT 0,          -- the root's index behind it; 0: full row
    key_columns     text[],                          -- in the order of their attribute numbers; NULL: full row
    reason          text NOT NULL,
    path_attnums    int2[],                          -- of a rule with a parent: the columns that lead to it,
    parent_attnums  int2[],                          -- the parent's columns that they lead to,
    path_guarded    bool                             -- and whether a foreign key says so, see coffer._guard
) WITH (user_catalog_table = true);

CREATE TABLE coffer.schema_rules (
    nspid           oid PRIMARY KEY,
    class           int2 NOT NULL,
    tenant          text NOT NULL,
    registered_xid  xid8 NOT NULL,
    registered_at   timestamptz NOT NULL,
    -- pg_upgrade gives schemas other OIDs: a rule is followed as coffer._schema_rules says.
    schema          name NOT NULL,
    system_id       int8 NOT NULL                    -- of the cluster that the OID was noted in
) WITH (user_catalog_table = true);
CREATE INDEX schema_rules_schema ON coffer.schema_rules (schema);

-- The key that authenticates the extension's messages in the log. Nobody but the owner may read it.
CREATE TABLE coffer.secret (
    one      bool PRIMARY KEY DEFAULT true CHECK (one),
    mac_key  bytea NOT NULL CHECK (octet_length(mac_key) = 16)
) WITH (user_catalog_table = true);

-- Every relation whose replica identity a rule relies on (a table, or each relation of a partition tree; the tables of
-- a tenant's schema), with the replica identity that was there before, which remove_table puts back.
CREATE TABLE coffer.rule_relations (
    relid           oid PRIMARY KEY,
    root            oid NOT NULL,
    prior_identity  "char" NOT NULL,
    prior_index     oid NOT NULL DEFAULT 0,
    own_identity    "char" NOT NULL,
    key_index       oid NOT NULL DEFAULT 0,
    types           jsonb NOT NULL,                  -- see coffer._types
    registered_xid  xid8,                            -- of a table under a schema rule, when later than the rule's
    tenant          text                             -- of a table under a schema rule: whose it is by that rule
);
CREATE INDEX rule_relations_root ON coffer.rule_relations (root);

-- Whose the rows of tables under the strategy `session` are.
CREATE TABLE coffer.session_rows (
    relid   oid NOT NULL,                            -- the table, or the root of a partition tree
    key     text NOT NULL,                           -- see coffer._session_key
    tenant  text NOT NULL,
    PRIMARY KEY (relid, key)
);

-- Columns of covered tables that name large objects.
CREATE TABLE coffer.large_object_entries (
    relid     oid NOT NULL,                          -- the table, or the root of a partition tree
    attnum    int2 NOT NULL,
    added_at  timestamptz NOT NULL DEFAULT now(),
    added_by  text NOT NULL DEFAULT session_user,
    PRIMARY KEY (relid, attnum)
);

CREATE TABLE coffer.exclusions (
    relid        oid PRIMARY KEY,
    reason       text NOT NULL,
    excluded_at  timestamptz NOT NULL DEFAULT now(),
    excluded_by  text NOT NULL DEFAULT session_user
);

CREATE TABLE coffer.schema_patterns (
    pattern   text PRIMARY KEY,                      -- LIKE; the tenant is the schema's name
    class     int2 NOT NULL DEFAULT 0,
    added_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE coffer.settings (
    name   text PRIMARY KEY,
    value  text NOT NULL
);

-- Filled by the agent; the truth is the keyring.
CREATE TABLE coffer.tenant_entries (
    uid            uuid PRIMARY KEY,
    tenant         text NOT NULL,
    kind           text NOT NULL,
    state          text NOT NULL DEFAULT 'active',
    display_name   text,
    registered_at  timestamptz NOT NULL DEFAULT now(),
    last_seen      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX tenant_entries_tenant ON coffer.tenant_entries (tenant);

CREATE TABLE coffer.restore_points (
    name        text PRIMARY KEY,
    lsn         pg_lsn NOT NULL,                     -- of the marker; the point itself is the end of its commit
    xid         xid8 NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by  text NOT NULL DEFAULT session_user
);

-- One row, rewritten in place while somebody waits. Unlogged: it may be lost (the agent writes it again), and what
-- tells how far the log is safe must not itself make more log.
CREATE UNLOGGED TABLE coffer.agent_state (
    one           bool PRIMARY KEY DEFAULT true CHECK (one),
    agent         text NOT NULL,
    durable_lsn   pg_lsn NOT NULL,
    durable_time  timestamptz,
    reported_at   timestamptz NOT NULL
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

CREATE TABLE coffer.audit_entries (
    entry             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at                timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor             text NOT NULL,
    client_addr       inet,
    application_name  text,
    action            text NOT NULL,
    object            text,
    detail            jsonb NOT NULL DEFAULT '{}'
);
