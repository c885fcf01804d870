-- Names that need quotes, names of the greatest length, tenants of any type.
\set SHOW_CONTEXT never
CREATE SCHEMA "Größe ""x"" $1";
SET search_path = "Größe ""x"" $1";
CREATE TABLE "Bestellung; DROP" ("Mandant 'm'" text NOT NULL, "Schlüssel ""s""" int PRIMARY KEY);
CREATE TABLE "顧客" ("テナント" text NOT NULL, id int, PRIMARY KEY (id));
CREATE UNIQUE INDEX "index %s %I" ON "顧客" (id, "テナント");
CREATE TABLE a23456789012345678901234567890123456789012345678901234567890123 (
    t23456789012345678901234567890123456789012345678901234567890123 int,
    k23456789012345678901234567890123456789012345678901234567890123 int PRIMARY KEY);
CREATE TABLE "select" ("table" int, "from" int PRIMARY KEY);
SELECT * FROM coffer.add_table('"Bestellung; DROP"', 'Mandant ''m''');
SELECT * FROM coffer.add_table('"顧客"', 'テナント');
SELECT * FROM coffer.add_table('a23456789012345678901234567890123456789012345678901234567890123', 't23456789012345678901234567890123456789012345678901234567890123');
SELECT * FROM coffer.add_table('"select"', 'table');
SELECT tgname, encode(tgargs, 'escape'), pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname LIKE 'zzz_coffer%' ORDER BY tgrelid::regclass::text COLLATE "C", tgname;
SELECT relation, strategy, tenant_column FROM coffer.coverage ORDER BY relation::text COLLATE "C";
SELECT schema, name, tenant_column, key_columns FROM coffer._agent_rules() ORDER BY name COLLATE "C";
SELECT statement FROM coffer.discover('Mandant ''m''') WHERE statement IS NOT NULL;
-- Writing works through the triggers.
INSERT INTO "Bestellung; DROP" VALUES ('o''hara', 1), ('x', 2);
UPDATE "Bestellung; DROP" SET "Mandant 'm'" = 'y' WHERE "Schlüssel ""s""" = 2;
DELETE FROM "Bestellung; DROP";
-- Renaming is followed.
ALTER TABLE "Bestellung; DROP" RENAME "Mandant 'm'" TO "T \ T";
ALTER TABLE "Bestellung; DROP" RENAME TO "neuer Name";
ALTER SCHEMA "Größe ""x"" $1" RENAME TO names;
SET search_path = names;
INSERT INTO "neuer Name" VALUES ('a', 1);
UPDATE "neuer Name" SET "T \ T" = 'b';
DELETE FROM "neuer Name";
SELECT relation, strategy, tenant_column FROM coffer.coverage ORDER BY relation::text COLLATE "C";
SELECT encode(tgargs, 'escape') FROM pg_trigger WHERE tgrelid = '"neuer Name"'::regclass AND tgname LIKE 'zzz%';
SELECT count(*) FROM (SELECT relid FROM coffer.rules OFFSET 0) r CROSS JOIN LATERAL coffer.remove_table(r.relid) a;

-- Tenants of any type: what counts is the text.
SET client_min_messages = warning;
DELETE FROM coffer.settings;
SET client_min_messages = error;
CREATE TYPE colour AS ENUM ('red', 'green');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN short AS varchar(10);
CREATE COLLATION any_case (provider = libc, locale = 'C');
CREATE TABLE types (id int PRIMARY KEY, i2 int2, i8 int8, n numeric, tx text, vc varchar(20), bp char(5), u uuid, b bool, d date, ts timestamptz,
                    by bytea, j jsonb, js json, e colour, c pair, dm short, ar int[], nm name, p point);
CREATE FUNCTION cover(col name) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    r text;
BEGIN
    EXECUTE format('CREATE TABLE of_%s (LIKE types INCLUDING ALL)', col);
    PERFORM coffer.add_table(('of_' || col)::regclass, col);
    SELECT regexp_replace(pg_get_triggerdef(oid), '^.*WHEN \((.*)\) EXECUTE.*$', '\1') INTO r FROM pg_trigger
    WHERE tgrelid = ('of_' || col)::regclass AND tgname = 'zzz_coffer_tag_move';
    RETURN r;
END $$;
SELECT attname, format_type(atttypid, atttypmod), cover(attname) AS moves_when FROM pg_attribute
WHERE attrelid = 'types'::regclass AND attnum > 1 ORDER BY attnum;
INSERT INTO of_n (id, n) VALUES (1, 1.0), (2, 2);
UPDATE of_n SET n = 1.00 WHERE id = 1;
UPDATE of_n SET n = n + 1;
DELETE FROM of_n;
INSERT INTO of_p (id, p) VALUES (1, '(1,2)');
UPDATE of_p SET p = '(2,1)';
DELETE FROM of_p;
SET client_min_messages = warning;
DROP SCHEMA names CASCADE;
SELECT count(*) FROM coffer.rules;
