-- Restore points, and waiting for what is durable. Nobody runs an agent here: its part is played by hand.
\set SHOW_CONTEXT never
SELECT coffer.restore_point('before the migration') <= pg_current_wal_insert_lsn() AS written;
SELECT coffer.restore_point('before the migration');
SELECT coffer.restore_point(' ');
SELECT coffer.restore_point(NULL);
BEGIN;
SELECT coffer.restore_point('rolled back') IS NOT NULL AS written;
ROLLBACK;
SELECT name, xid IS NOT NULL AS has_xid, created_by FROM coffer.restore_points WHERE name IN ('before the migration', 'rolled back');

\set VERBOSITY sqlstate
SELECT coffer.wait_durable(timeout => '0.2s');
\set VERBOSITY default
SELECT state, durable_lsn, slot FROM coffer.status;
SELECT coffer._agent_progress(pg_current_wal_insert_lsn(), now(), 'regress');
SELECT pg_current_wal_insert_lsn() AS lsn \gset
SELECT coffer._agent_progress(:'lsn', now(), 'regress');
SELECT coffer.wait_durable(:'lsn') = :'lsn' AS as_far_as_reported;
SELECT coffer.wait_durable('0/1') = :'lsn' AS as_far_as_reported;
\set VERBOSITY sqlstate
SELECT coffer.wait_durable('FFFFFFFF/0', '1s');
SELECT pg_logical_emit_message(false, 'x', repeat('x', 100)) IS NOT NULL AS log_moved;
SELECT coffer.wait_durable(timeout => '0.2s');
\set VERBOSITY default
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT coffer.wait_durable();
ROLLBACK;
-- Whether somebody waits is seen through the lock that a waiter holds until its transaction ends.
SELECT coffer._agent_waiting();
BEGIN;
SELECT pg_advisory_xact_lock_shared(6516583, 0);
SELECT coffer._agent_waiting();
COMMIT;
SELECT state, agent, durable_lsn = :'lsn' AS lsn, rpo >= '0' AS rpo, as_of IS NOT NULL AS as_of FROM coffer.status;

-- Tenants register through the agent.
SELECT coffer._agent_tenant('7', '00000000-0000-0000-0000-000000000007', 'normal');
SELECT coffer._agent_tenant('7', '00000000-0000-0000-0000-000000000007', 'normal');
SELECT coffer._agent_tenant('', '00000000-0000-0000-0000-000000000000', 'unassigned');
SELECT tenant, uid, kind, state, display_name FROM coffer.tenants ORDER BY uid;
SELECT coffer._agent_base_marker('\x00112233445566778899aabbccddeeff');
SELECT coffer._agent_base_marker('\x00');
BEGIN;
SELECT coffer._agent_restore_settings();
SHOW session_replication_role;
COMMIT;
SHOW session_replication_role;

-- The fence of a restore in place: other tenants pass.
CREATE TABLE fenced (t int, id int PRIMARY KEY);
SELECT strategy FROM coffer.add_table('fenced', 't');
SELECT coffer._agent_fence('fenced', 'id', '1');
SELECT coffer._agent_fence('fenced', 't', '1');
SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'fenced'::regclass AND tgname LIKE 'aaa%' ORDER BY tgname;
CREATE FUNCTION fence_locks() RETURNS bigint LANGUAGE sql AS $$
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 6516582 AND pid = pg_backend_pid() $$;
BEGIN;
INSERT INTO fenced VALUES (2, 1), (NULL, 2);
UPDATE fenced SET t = 3;
DELETE FROM fenced;
SELECT fence_locks();
INSERT INTO fenced VALUES (1, 1);
SELECT fence_locks();
COMMIT;
BEGIN;
UPDATE fenced SET t = 2;
SELECT fence_locks();
ROLLBACK;
BEGIN;
DELETE FROM fenced;
SELECT fence_locks();
COMMIT;
SELECT coffer._agent_unfence('fenced');
SELECT coffer._agent_unfence('fenced');
SELECT coffer._agent_fence('fenced', 't', NULL);
BEGIN;
INSERT INTO fenced VALUES (NULL, 1);
SELECT fence_locks();
COMMIT;
SELECT coffer._agent_unfence('fenced');
SELECT tgname FROM pg_trigger WHERE tgrelid = 'fenced'::regclass ORDER BY tgname;
DROP TABLE fenced;
-- A key whose text the writer's settings decide is the same key, and so it is in a snapshot.
CREATE TABLE fenced (t timestamptz, id int PRIMARY KEY);
SELECT strategy FROM coffer.add_table('fenced', 't');
SELECT coffer._agent_fence('fenced', 't', '2024-06-01 12:00:00+00');
SET timezone = 'Asia/Tokyo';
SET datestyle = 'German';
BEGIN;
INSERT INTO fenced VALUES ('2024-06-01 12:00:01+00', 1);
SELECT fence_locks();
INSERT INTO fenced VALUES ('2024-06-01 12:00:00+00', 2);
SELECT fence_locks();
COMMIT;
BEGIN;
UPDATE fenced SET t = t + interval '1 s' WHERE id = 2;
SELECT fence_locks();
ROLLBACK;
SELECT row_data FROM coffer.snapshot('2024-06-01 12:00:00+00');
RESET timezone;
RESET datestyle;
SELECT row_data FROM coffer.snapshot('2024-06-01 12:00:00+00');
SELECT coffer._agent_unfence('fenced');
DROP FUNCTION fence_locks;
DROP TABLE fenced;
