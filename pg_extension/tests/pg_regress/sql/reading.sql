-- One tenant's data, live.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SELECT * FROM coffer.changes('1');
CREATE SCHEMA rd;
CREATE TABLE rd.orders (t int NOT NULL, id int, note text, PRIMARY KEY (t, id));
CREATE TABLE rd.items (t text, id int PRIMARY KEY);
CREATE TABLE rd.items_more () INHERITS (rd.items);
CREATE TABLE rd.parted (t int, id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE rd.leaf PARTITION OF rd.parted FOR VALUES FROM (0) TO (100);
CREATE TABLE rd.shared (t int, id int PRIMARY KEY);
CREATE TABLE rd.uncovered (t int, id int PRIMARY KEY);
CREATE SCHEMA "rd One" CREATE TABLE own (id int PRIMARY KEY);
SELECT relation, strategy FROM (VALUES ('rd.orders'), ('rd.items'), ('rd.items_more'), ('rd.parted')) v (n) CROSS JOIN LATERAL coffer.add_table(v.n::regclass, 't');
SELECT relation, strategy FROM coffer.add_shared('rd.shared');
SELECT relation, strategy FROM coffer.add_schema('rd One', '1');
SELECT count(*) FROM pg_create_logical_replication_slot('regress_rd', 'pg_coffer');
INSERT INTO rd.orders VALUES (1, 1, 'a'), (2, 1, 'b'), (1, 2, NULL);
BEGIN;
UPDATE rd.orders SET note = 'x' WHERE id = 1;
INSERT INTO rd.items VALUES ('1', 1), ('2', 2), (NULL, 3);
INSERT INTO rd.items_more VALUES ('1', 4);
COMMIT;
SELECT pg_current_wal_insert_lsn() AS here \gset
INSERT INTO rd.parted VALUES (1, 1), (2, 2);
UPDATE rd.parted SET t = 1, id = 3 WHERE t = 2;
DELETE FROM rd.orders WHERE id = 2;
INSERT INTO rd.shared VALUES (1, 1);
INSERT INTO rd.uncovered VALUES (1, 1);
INSERT INTO "rd One".own VALUES (7);

SELECT op, relation, key, old, new FROM coffer.changes('1');
SELECT op, relation, key, new FROM coffer.changes('2');
SELECT op, relation, key, new FROM coffer.changes('nobody');
-- Nothing was consumed, nothing is left.
SELECT count(*) FROM coffer.changes('1');
SELECT slot_name FROM pg_replication_slots;
-- Bounds: whole transactions.
SELECT count(*) FROM coffer.changes('1', upto_lsn => :'here');
SELECT count(*) FROM coffer.changes('1', upto_nchanges => 3);
SELECT count(DISTINCT xid) AS xids, count(DISTINCT lsn) AS lsns, bool_and(commit_time <= now()) AS times FROM coffer.changes('1');
TRUNCATE rd.shared, rd.orders;
SELECT op, relation FROM coffer.changes('nobody') ORDER BY relation;
SELECT * FROM coffer.changes(NULL);
BEGIN;
INSERT INTO rd.uncovered VALUES (9, 9);
SELECT * FROM coffer.changes('1');
ROLLBACK;
SELECT pg_drop_replication_slot('regress_rd');

SELECT relation, row_data FROM coffer.snapshot('1') ORDER BY relation COLLATE "C", row_data;
SELECT relation, row_data FROM coffer.snapshot('2') ORDER BY relation COLLATE "C", row_data;
SELECT count(DISTINCT snapshot::text) AS snapshots, bool_and(lsn <= pg_current_wal_insert_lsn()) AS lsns FROM coffer.snapshot('1');
SELECT * FROM coffer.snapshot(NULL);
-- Row security hides nothing from it; who may not call it sees nothing.
ALTER TABLE rd.items ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE ROLE regress_reader IN ROLE coffer_auditor;
CREATE ROLE regress_nobody;
SET ROLE regress_reader;
SELECT count(*) FROM coffer.snapshot('1') WHERE relation = 'rd.items';
SET ROLE regress_nobody;
SELECT * FROM coffer.snapshot('1');
SELECT * FROM coffer.changes('1');
RESET ROLE;
SELECT actor, action, object FROM coffer.audit_log WHERE action IN ('snapshot', 'changes') GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;
DROP ROLE regress_reader, regress_nobody;
DROP SCHEMA rd, "rd One" CASCADE;
SELECT count(*) FROM coffer.rules;
