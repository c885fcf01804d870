-- A rule sits on the root of a partition tree; what it relies on must be in every leaf.
\set SHOW_CONTEXT never
CREATE SCHEMA part;
SET search_path = part;
CREATE VIEW tree AS
SELECT m.relid::regclass AS relation, c.relreplident AS ri, x.relname AS ri_index,
       (SELECT string_agg(format('%s/%s', regexp_replace(g.tgname, '_[0-9]+$', ''), g.tgenabled), ' ' ORDER BY g.tgname) FROM pg_trigger g WHERE g.tgrelid = m.relid) AS triggers
FROM coffer.rule_relations m JOIN pg_class c ON c.oid = m.relid
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident LEFT JOIN pg_class x ON x.oid = i.indexrelid;

-- identity by the primary key
CREATE TABLE a (t int, id int, d int, PRIMARY KEY (t, id, d)) PARTITION BY RANGE (d);
CREATE TABLE a1 PARTITION OF a FOR VALUES FROM (0) TO (10);
SELECT * FROM coffer.add_table('a', 't');
-- identity by another index, two levels
CREATE TABLE b (t int NOT NULL, id int NOT NULL, d int NOT NULL, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
CREATE UNIQUE INDEX b_t ON b (t, id, d);
CREATE TABLE b1 PARTITION OF b FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (d);
CREATE TABLE b11 PARTITION OF b1 FOR VALUES FROM (0) TO (5);
SELECT * FROM coffer.add_table('b', 't');
-- tag
CREATE TABLE c (t int, id int, d int, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
CREATE TABLE c1 PARTITION OF c FOR VALUES FROM (0) TO (10);
SELECT * FROM coffer.add_table('c', 't');
-- full_row; one leaf has a key of its own, which does not help
CREATE TABLE e (t int, id int, d int) PARTITION BY LIST (d);
CREATE TABLE e1 PARTITION OF e (PRIMARY KEY (t, id)) FOR VALUES IN (1);
CREATE TABLE e2 PARTITION OF e DEFAULT;
SELECT * FROM coffer.add_table('e', 't');
-- no leaf yet
CREATE TABLE f (t int, id int, d int, PRIMARY KEY (id, d)) PARTITION BY HASH (d);
SELECT * FROM coffer.add_table('f', 't');
SELECT * FROM tree ORDER BY relation::text COLLATE "C";

-- New leaves get what their root's rule needs, without a new base.
CREATE TEMP TABLE then_ AS SELECT relid, registered_xid FROM coffer.rules;
CREATE TABLE a2 PARTITION OF a FOR VALUES FROM (10) TO (20);
CREATE TABLE b12 PARTITION OF b1 FOR VALUES FROM (5) TO (10);
CREATE TABLE b2 PARTITION OF b FOR VALUES FROM (10) TO (20);
CREATE TABLE c2 PARTITION OF c FOR VALUES FROM (10) TO (20);
CREATE TABLE e3 PARTITION OF e FOR VALUES IN (3);
CREATE TABLE f0 PARTITION OF f FOR VALUES WITH (MODULUS 1, REMAINDER 0);
SELECT * FROM tree ORDER BY relation::text COLLATE "C";
SELECT r.relid::regclass, r.registered_xid = t.registered_xid AS same_base FROM coffer.rules r JOIN then_ t USING (relid) ORDER BY r.relid::regclass::text COLLATE "C";

-- Rows that come or go with a partition are not in the log: a new base, unless it is dropped. The attached table was
-- covered by itself.
CREATE TABLE c3 (t int, id int NOT NULL, d int NOT NULL, PRIMARY KEY (id, d));
SELECT strategy FROM coffer.add_table('c3', 't');
ALTER TABLE c ATTACH PARTITION c3 FOR VALUES FROM (20) TO (30);
CREATE TABLE b3 (t int NOT NULL, id int NOT NULL, d int NOT NULL);
ALTER TABLE b ATTACH PARTITION b3 FOR VALUES FROM (20) TO (30);
ALTER TABLE a DETACH PARTITION a2;
ALTER TABLE f DETACH PARTITION f0 CONCURRENTLY;
DROP TABLE e3;
SELECT r.relid::regclass, r.registered_xid = t.registered_xid AS same_base FROM coffer.rules r LEFT JOIN then_ t USING (relid) ORDER BY r.relid::regclass::text COLLATE "C";
SELECT * FROM tree ORDER BY relation::text COLLATE "C";
SELECT relation, covered, strategy, reason FROM coffer.coverage WHERE relation::text !~ '\.' ORDER BY relation::text COLLATE "C";

-- A leaf's triggers and replica identity are watched as well.
ALTER TABLE c1 DISABLE TRIGGER ALL;
ALTER TABLE b11 REPLICA IDENTITY NOTHING;
ALTER TABLE e2 REPLICA IDENTITY DEFAULT;
SELECT * FROM tree WHERE relation IN ('c1'::regclass, 'b11'::regclass, 'e2'::regclass) ORDER BY relation::text COLLATE "C";

-- Rows that move from leaf to leaf, and what is left after remove_table.
INSERT INTO c SELECT i % 3, i, i FROM generate_series(0, 19) i;
UPDATE c SET d = d + 10, t = t + 1 WHERE d < 10;
DELETE FROM c WHERE id % 2 = 0;
SELECT t, count(*) FROM c GROUP BY t ORDER BY t;
SELECT count(*) FROM (SELECT relid FROM coffer.rules OFFSET 0) r CROSS JOIN LATERAL coffer.remove_table(r.relid) a;
SELECT * FROM tree;
SELECT c.relname, c.relreplident FROM pg_class c WHERE c.relnamespace = 'part'::regnamespace AND c.relkind IN ('r', 'p') AND c.relreplident <> 'd' ORDER BY c.relname COLLATE "C";
SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%coffer%';
SET client_min_messages = warning;
DROP SCHEMA part CASCADE;
SELECT count(*) FROM coffer.rule_relations;

-- A table that others find their tenants in does not become a partition.
SET client_min_messages = error;
CREATE SCHEMA fork;
SET search_path = fork;
CREATE TABLE tree (tenant int, id int, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE twig (tenant int, id int PRIMARY KEY);
CREATE TABLE leaves (id int PRIMARY KEY, twig int NOT NULL REFERENCES twig);
SELECT strategy FROM coffer.add_table('tree', 'tenant');
SELECT strategy FROM coffer.add_table('twig', 'tenant');
SELECT strategy FROM coffer.add_table('leaves', parent => 'twig');
ALTER TABLE tree ATTACH PARTITION twig FOR VALUES FROM (0) TO (10);
SELECT relation, strategy, parent FROM coffer.coverage WHERE relation::text IN ('tree', 'twig', 'leaves') ORDER BY relation::text COLLATE "C";
SELECT strategy FROM coffer.remove_table('leaves');
ALTER TABLE tree ATTACH PARTITION twig FOR VALUES FROM (0) TO (10);
ALTER TABLE leaves DROP CONSTRAINT leaves_twig_fkey, ADD FOREIGN KEY (twig) REFERENCES tree;
SELECT strategy, parent FROM coffer.add_table('leaves', parent => 'tree');
-- A table whose tenants were found elsewhere leaves nothing behind there.
CREATE TABLE owners (tenant int NOT NULL, id int PRIMARY KEY);
CREATE TABLE branch (tenant int, id int PRIMARY KEY, owner int NOT NULL REFERENCES owners);
ALTER TABLE tree ADD owner int;
SELECT strategy FROM coffer.add_table('owners', 'tenant');
SELECT strategy, parent FROM coffer.add_table('branch', parent => 'owners');
SELECT count(*) > 0 AS watched FROM pg_trigger WHERE tgrelid = 'owners'::regclass AND tgname ~ 'coffer_parent';
ALTER TABLE tree ATTACH PARTITION branch FOR VALUES FROM (10) TO (20);
SELECT count(*) > 0 AS watched FROM pg_trigger WHERE tgrelid = 'owners'::regclass AND tgname ~ 'coffer_parent';
-- Under a root that is not covered, nothing is.
SET client_min_messages = warning;
CREATE TABLE bare (tenant int NOT NULL, id int NOT NULL) PARTITION BY RANGE (id);
CREATE TABLE bare_1 (tenant int NOT NULL, id int NOT NULL);
SELECT strategy FROM coffer.add_table('bare_1', 'tenant');
ALTER TABLE bare ATTACH PARTITION bare_1 FOR VALUES FROM (0) TO (10);
SELECT count(*) FROM coffer.rules WHERE relid = 'bare_1'::regclass;
SELECT relreplident FROM pg_class WHERE oid = 'bare_1'::regclass;
SELECT strategy FROM coffer.add_table('bare', 'tenant');
SELECT relreplident FROM pg_class WHERE oid = 'bare_1'::regclass;
SET client_min_messages = error;
DROP SCHEMA fork CASCADE;
