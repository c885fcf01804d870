-- Rows as jsonb are what to_jsonb() gives, of every type, to the byte: equal values of equal size whose every key is found.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA rj;
CREATE TYPE rj.mood AS ENUM ('sad', 'so "so"');
CREATE TYPE rj.pair AS (a int, b text);
CREATE TYPE rj.cast_one AS ENUM ('x');
CREATE FUNCTION rj.to_json(rj.cast_one) RETURNS json LANGUAGE sql IMMUTABLE AS $$ SELECT '{"cast": [1]}'::json $$;
CREATE CAST (rj.cast_one AS json) WITH FUNCTION rj.to_json(rj.cast_one);
CREATE DOMAIN rj.amount AS numeric(12, 3);
CREATE DOMAIN rj.word AS text;
CREATE DOMAIN rj.document AS jsonb;
CREATE FUNCTION rj.same(ours jsonb, theirs jsonb) RETURNS bool LANGUAGE sql AS $$
    SELECT ours = theirs AND ours::text = theirs::text AND pg_column_size(ours) = pg_column_size(theirs)
           AND coalesce((SELECT bool_and(ours -> k = theirs -> k AND ours ->> k IS NOT DISTINCT FROM theirs ->> k) FROM jsonb_object_keys(theirs) k), true)
$$;
CREATE TABLE rj.numbers (i2 int2, i4 int4, i8 int8, f4 float4, f8 float8, gone int, n numeric, a rj.amount, o oid, b bool, "Odd ""key" int DEFAULT 7, ä int);
ALTER TABLE rj.numbers DROP COLUMN gone;
INSERT INTO rj.numbers
SELECT v % 32768, v, v::int8 * 1000003, v / 7.0::float4, v * 1e-3, v / 13.0, v / 3.0, abs(v), v % 2 = 0
FROM unnest(ARRAY[0, 1, -1, 9, 10, 9999, 10000, -10000, 10001, 99999999, 100000000, 2147483647, -2147483647]) v;
INSERT INTO rj.numbers (i8, f4, f8, n) VALUES
    (9223372036854775807, 'NaN', 'Infinity', 'NaN'), (-9223372036854775808, '-Infinity', '-0', '-Infinity'), (NULL, NULL, NULL, NULL),
    (1000000000000, 1e-45, 5e-324, 'Infinity'), (4, 3.4e38, 1.7976931348623157e308, '0.000'), (5, 1e20, 1e15, '-123.4500'),
    (6, 0.1, 123456789.125, '1e-70'), (7, 1e-5, 1.5e-7, ('1' || repeat('0', 400))::numeric), (8, 100, 1e16, '1000000000000.00001'), (9, 12345.678, 0.001, '10000');
INSERT INTO rj.numbers (f8) SELECT float8 '3.14159' * 10.0 ^ e * s FROM generate_series(-40, 40) e, unnest(ARRAY[1, -1]) s;
ALTER TABLE rj.numbers ADD COLUMN later text DEFAULT 'was there', ADD COLUMN last int;
SELECT count(*), bool_and(rj.same(coffer._row_jsonb(r), to_jsonb(r))) FROM rj.numbers r;
SET extra_float_digits = -10;
SELECT bool_and(rj.same(coffer._row_jsonb(r), to_jsonb(r))) FROM rj.numbers r;
RESET extra_float_digits;
CREATE TABLE rj.others (t text, v varchar(9), c char(5), ch "char", nm name, w rj.word, u uuid, by bytea, d date, ts timestamp, tz timestamptz, ti time, tt timetz, iv interval,
    bi bit(3), mo rj.mood, ca rj.cast_one, ia int[], ta text[][], pa rj.pair, pas rj.pair[], js json, jb jsonb, doc rj.document, ra int4range, i inet, cl regclass,
    k1 int, k2 int, k3 int, k4 int, k5 int, k6 int, k7 text, k8 text DEFAULT 'eight');
INSERT INTO rj.others DEFAULT VALUES;
INSERT INTO rj.others VALUES
    (E'a "b" \\ \n ä €', 'v', 'c', 'q', 'n', 'w', '00112233-4455-6677-8899-aabbccddeeff', '\x00ff', '2024-02-29', '2024-02-29 12:34:56.789', '2024-02-29 12:34:56+03', '01:02:03.5', '01:02:03+04',
     '1 day 2 hours', B'101', 'so "so"', 'x', '{1,NULL,3}', '{{a,b},{c,NULL}}', '(1,"x y")', '{"(1,a)",NULL}', '{"z": 1,  "a": [1.50]}', '{"a": [1, 2.50, {"b": null}], "b": true}', '[]', '[1,5)', '10.0.0.1/8', 'pg_class',
     1, 2, 3, 4, 5, 6, '', 'x'),
    ('', '', '', '', '', '', '00000000-0000-0000-0000-000000000000', '', '0044-03-15 BC', '0044-03-15 01:00 BC', 'infinity', '24:00', NULL, '-1 mon', NULL, 'sad', NULL, '{}', '{}', '(,)', '{}', '1', '1.50', '"x"', 'empty', NULL, NULL,
     NULL, NULL, NULL, NULL, NULL, NULL, NULL, repeat('long ', 10000)),
    (repeat('x', 3000), NULL, NULL, NULL, NULL, NULL, NULL, NULL, '-infinity', '-infinity', '0001-01-01 00:00 BC', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'null', 'null', 'true', NULL, NULL, NULL,
     -1, 0, 0, 0, 0, 0, 'k', NULL),
    (NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'infinity', '10000-01-01 00:00:00.000001', '294276-12-31 23:59:59.999999+00', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '[{}]', '{}', 'false', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
SELECT count(*), bool_and(rj.same(coffer._row_jsonb(r), to_jsonb(r))) FROM rj.others r;
SET bytea_output = escape; SET datestyle = 'German, DMY'; SET timezone = 'Asia/Kolkata'; SET intervalstyle = iso_8601;
SELECT bool_and(rj.same(coffer._row_jsonb(r), to_jsonb(r))) FROM rj.others r;
RESET bytea_output; RESET datestyle; RESET timezone; RESET intervalstyle;
DO $$BEGIN EXECUTE 'CREATE TABLE rj.wide (' || (SELECT string_agg(format('%s%s %s', repeat('c', 1 + n % 40), n, (ARRAY['int', 'text', 'bool', 'jsonb'])[1 + n % 4]), ', ') FROM generate_series(1, 700) n) || ')'; END$$;
INSERT INTO rj.wide DEFAULT VALUES;
INSERT INTO rj.wide (cc1, ccc2, cccc3, ccccc4, cccccc5, c40, c80) VALUES ('x', true, '{"a": 1}', 12345, '', 7, 8);
SELECT bool_and(rj.same(coffer._row_jsonb(r), to_jsonb(r))) FROM rj.wide r;
CREATE TABLE rj.none ();
INSERT INTO rj.none DEFAULT VALUES;
SELECT rj.same(coffer._row_jsonb(r), to_jsonb(r)), coffer._row_jsonb(r) FROM rj.none r;
SELECT coffer._row_jsonb(ROW(1, 'a', NULL)), coffer._row_jsonb(ROW()), coffer._row_jsonb(NULL);
SELECT bool_and(rj.same(coffer._row_jsonb(r), to_jsonb(r))) FROM (SELECT n, md5(n::text) AS m, ARRAY[n] AS a FROM generate_series(1, 3) n) r;
SET client_min_messages = warning;
DROP SCHEMA rj CASCADE;
