-- Jobs: asking for them, waiting, who may, who sees. Nobody runs an agent here: its part is played by hand.
\set SHOW_CONTEXT never
SET client_min_messages = notice;
SELECT coffer._agent_tenant('acme', '00000000-0000-0000-0000-0000000000aa', 'normal');
SELECT coffer._agent_tenant('globex', '00000000-0000-0000-0000-0000000000bb', 'normal');
SELECT coffer._agent_tenant('', '00000000-0000-0000-0000-0000000000cc', 'unresolved');
CREATE ROLE regress_admin IN ROLE coffer_admin;
CREATE ROLE regress_operator IN ROLE coffer_operator;
CREATE ROLE regress_auditor IN ROLE coffer_auditor;
CREATE ROLE regress_acme;
CREATE ROLE regress_nobody;

-- What is asked for is checked at once.
SELECT coffer.backup('nobody');
SELECT coffer.backup('');
SELECT coffer.backup(NULL);
SELECT coffer.backup('acme', kind => 'yearly');
SELECT coffer.backup('acme', kind => NULL);
SELECT coffer.restore('nobody', 'latest');
SELECT coffer.restore(NULL, 'latest');
SELECT coffer.restore('acme', 'yesterday');
SELECT coffer.restore('acme', '2026-11-22T13:00:00');
SELECT coffer.restore('acme', 'backup:7');
SELECT coffer.restore('acme', NULL);
SELECT coffer.restore('acme', 'latest', 'database');
SELECT coffer.restore('acme', 'latest', 'elsewhere');
SELECT coffer.restore('acme', 'latest', NULL);
SELECT coffer.restore('acme', 'latest', dry_run => NULL);
SELECT coffer.verify('nobody');
SELECT coffer.verify(NULL);
SELECT coffer.hold('nobody', 'x');
SELECT coffer.hold('acme', ' ');
SELECT coffer.hold('acme', NULL);
SELECT coffer.hold('acme', 'x', '2026-02-01', '2026-01-01');
SELECT coffer.hold('acme', 'x', 'infinity');
SELECT coffer.hold('acme', 'x', to_time => '-infinity');
SELECT coffer.release(99999);
SELECT coffer.release(NULL);
SELECT coffer.set_policy('nobody', '{}');
SELECT coffer.set_policy('acme', NULL);
SELECT coffer.set_policy('acme', '[1]');
SELECT coffer.set_policy('acme', '{"dayly": 7}');
SELECT coffer.set_policy('acme', '{"daily": -1}');
SELECT coffer.set_policy('acme', '{"pitr": "a while", "daily": 7}');
SELECT coffer.cancel(99999);
SELECT coffer.cancel(NULL);
SELECT coffer.wait(99999);
SELECT coffer.wait(NULL);
SELECT coffer.restore_point('backup-7');
SELECT count(*) FROM coffer.jobs;

-- A job is there with its transaction; its point is that commit, under a name of its own.
BEGIN;
SELECT coffer.backup('acme', 'rolled back') > 0 AS made;
ROLLBACK;
SELECT count(*) FROM coffer.jobs;
BEGIN;
SELECT coffer.backup('acme', 'before migration 42', 'pre-migration') AS job \gset
SELECT coffer.wait(:job);
ROLLBACK;
BEGIN;
SAVEPOINT s;
SELECT coffer.backup('acme', 'before migration 42', 'pre-migration') AS job \gset
RELEASE s;
\set VERBOSITY terse
\set QUIET on
DO $$ DECLARE n bigint := (SELECT max(job) FROM coffer.jobs);
BEGIN PERFORM coffer.wait(n); EXCEPTION WHEN invalid_transaction_state THEN RAISE NOTICE 'not committed yet'; END $$;
\set VERBOSITY default
COMMIT;
SELECT kind, tenant, state, progress, message, requested_by, requested_at <= clock_timestamp() AS requested, started_at, finished_at, result, error
FROM coffer.jobs WHERE job = :job;
SELECT name = 'backup-' || :job AS named, p.lsn = (j.args ->> 'lsn')::pg_lsn AS at, p.xid = j.xid AS with_the_job, args - 'lsn' - 'point' AS args
FROM coffer.restore_points p JOIN coffer.job_entries j ON p.name = j.args ->> 'point' WHERE j.job = :job;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT coffer.wait(1);
ROLLBACK;

-- Nobody is there to do it. (The state is emptied: an earlier test played an agent that reported.)
CREATE TEMP TABLE reported AS SELECT * FROM coffer.agent_state;
DELETE FROM coffer.agent_state;
CREATE FUNCTION wait_says(job bigint, timeout interval) RETURNS text LANGUAGE plpgsql AS $$
DECLARE s text; m text; d text; h text;
BEGIN
    PERFORM coffer.wait(job, timeout);
    RETURN 'done';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS s = RETURNED_SQLSTATE, m = MESSAGE_TEXT, d = PG_EXCEPTION_DETAIL, h = PG_EXCEPTION_HINT;
    RETURN regexp_replace(regexp_replace(concat_ws(' | ', s, m, d, h), 'job \d+', 'job N'), 'for \d+ s', 'for N s');
END $$;
SET client_min_messages = warning;
SELECT wait_says(:job, '0.2s');
INSERT INTO coffer.agent_state VALUES (true, 'regress', '0/1', now(), now() - interval '90 s');
SELECT wait_says(:job, '0.2s');
UPDATE coffer.agent_state SET reported_at = now();
SELECT wait_says(:job, '0.2s');

-- An agent's session takes it, says how far it is, and finishes.
SELECT coffer._agent_jobs_begin();
SELECT job = :job AS it, kind, tenant, args - 'lsn' - 'point' AS args, attempt, goal <= pg_current_wal_insert_lsn() AS goal
FROM coffer._agent_claim_job(ARRAY['backup'], '00000000-0000-0000-0000-000000000001', 'regress');
SELECT count(*) FROM coffer._agent_claim_job(ARRAY['backup'], '00000000-0000-0000-0000-000000000002', 'another');
SELECT coffer._agent_job_progress(:job, '00000000-0000-0000-0000-000000000002', 0.5, 'not mine');
SELECT coffer._agent_job_progress(:job, '00000000-0000-0000-0000-000000000001', 0.5, 'half of it');
SELECT state, progress, message, started_at IS NOT NULL AS started FROM coffer.jobs WHERE job = :job;
SELECT wait_says(:job, '0.2s');
SELECT coffer._agent_finish_job(:job, '00000000-0000-0000-0000-000000000002', 'done', '{}', NULL);
SELECT coffer._agent_finish_job(:job, '00000000-0000-0000-0000-000000000001', 'done', '{"id": 1}', NULL);
SELECT state, progress, message, result, error FROM coffer.wait(:job);
SELECT coffer.cancel(:job);
-- One that fails, with a hint.
SELECT coffer.verify('acme') AS job \gset
SELECT kind, args FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000003', 'regress');
SELECT coffer._agent_finish_job(:job, '00000000-0000-0000-0000-000000000003', 'failed', NULL, E'the store is gone\nhint: look for it');
SELECT wait_says(:job, '5s');
-- Cancelled while queued, and while running.
SELECT coffer.restore('acme', 'name:x') AS job \gset
SELECT coffer.cancel(:job);
SELECT coffer.cancel(:job);
SELECT wait_says(:job, '5s');
SELECT coffer.restore('acme', '16/B374D848', dry_run => false) AS job \gset
SELECT kind, args FROM coffer._agent_claim_job(ARRAY['restore'], '00000000-0000-0000-0000-000000000004', 'regress');
SELECT coffer.cancel(:job);
SELECT coffer._agent_job_progress(:job, '00000000-0000-0000-0000-000000000004', 0.1, 'on');
SELECT coffer._agent_return_job(:job, '00000000-0000-0000-0000-000000000004', '0', NULL);
SELECT wait_says(:job, '5s');
-- One whose agent is gone is taken again, five times at most.
SELECT coffer.verify('acme') AS job \gset
SELECT attempt FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000005', 'regress');
SELECT pg_advisory_unlock(6516585, pg_backend_pid());
SELECT attempt FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000005', 'regress');
SELECT coffer._agent_return_job(:job, '00000000-0000-0000-0000-000000000005', '0', 'again');
SELECT attempt FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000005', 'regress');
SELECT attempt FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000005', 'regress');
SELECT attempt FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000005', 'regress');
SELECT attempt FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000005', 'regress');
SELECT attempt FROM coffer._agent_claim_job(ARRAY['verify'], '00000000-0000-0000-0000-000000000005', 'regress');
SELECT wait_says(:job, '5s');

-- A restore that is committed is done, whatever becomes of its agent and whatever is said since.
SELECT coffer.restore('acme', 'latest', dry_run => false) AS job \gset
SELECT attempt FROM coffer._agent_claim_job(ARRAY['restore'], '00000000-0000-0000-0000-00000000000a', 'regress');
SELECT coffer._agent_job_commits(:job, '00000000-0000-0000-0000-00000000000b', '{}');
BEGIN;
SELECT coffer._agent_job_commits(:job, '00000000-0000-0000-0000-00000000000a', '{}');
ROLLBACK;
SELECT count(*) FROM coffer._agent_job_committed(:job);
SELECT coffer._agent_job_commits(:job, '00000000-0000-0000-0000-00000000000a', '{"undo": "it"}');
SELECT coffer._agent_job_commits(:job, '00000000-0000-0000-0000-00000000000a', '{"undo": "another"}');
SELECT result, committed_at <= clock_timestamp() AS before FROM coffer._agent_job_committed(:job);
SELECT coffer.cancel(:job);
SELECT coffer._agent_return_job(:job, '00000000-0000-0000-0000-00000000000a', '0', 'stopped');
SELECT state, message, finished_at FROM coffer.jobs WHERE job = :job;
UPDATE coffer.job_entries SET attempts = 5 WHERE job = :job;
SELECT attempt FROM coffer._agent_claim_job(ARRAY['restore'], '00000000-0000-0000-0000-00000000000c', 'regress');
SELECT coffer._agent_finish_job(:job, '00000000-0000-0000-0000-00000000000c', 'done', '{}', NULL);
-- One that is cancelled commits nothing any more.
SELECT coffer.restore('acme', 'latest', dry_run => false) AS job \gset
SELECT attempt FROM coffer._agent_claim_job(ARRAY['restore'], '00000000-0000-0000-0000-00000000000a', 'regress');
SELECT coffer.cancel(:job);
SELECT coffer._agent_job_commits(:job, '00000000-0000-0000-0000-00000000000a', '{}');
SELECT coffer._agent_finish_job(:job, '00000000-0000-0000-0000-00000000000a', 'cancelled', NULL, NULL);

-- Holds and policies.
SELECT coffer.hold('acme', 'lawsuit', '2026-01-01 00:00+00', 'infinity') AS hold \gset
SELECT state, held_by, reason, released_at FROM coffer.holds WHERE hold = :hold;
SELECT args - 'id' - 'hold' AS args FROM coffer._agent_claim_job(ARRAY['hold'], '00000000-0000-0000-0000-000000000006', 'regress');
SELECT coffer.cancel(max(job)) FROM coffer.jobs;
SELECT id FROM coffer.hold_entries WHERE hold = :hold \gset
SELECT coffer._agent_mirror(jsonb_build_array(jsonb_build_object('uid', '00000000-0000-0000-0000-0000000000aa', 'tenant', 'acme',
    'backups', '[{"backup": "00000000-0000-0000-0000-000000000b01", "kind": "full", "trigger": "manual", "point_lsn": "0/10", "point_time": "2026-02-01T00:00:00Z", "rows": 5, "bytes": 50},
                 {"backup": "00000000-0000-0000-0000-000000000b02", "kind": "full", "trigger": "schedule", "point_lsn": "0/20", "point_time": "2025-02-01T00:00:00Z", "rows": 6, "bytes": 60}]'::jsonb,
    'windows', '[{"from_lsn": "0/5", "to_lsn": "0/8", "from_time": "2025-01-01T00:00:00Z", "to_time": "2025-01-02T00:00:00Z", "gap": ""}, {"from_lsn": "0/8", "to_lsn": "0/9", "gap": "slot_lost"},
                 {"from_lsn": "0/9", "from_time": "2025-01-03T00:00:00Z", "gap": ""}]'::jsonb,
    'verifications', '[{"backup": "00000000-0000-0000-0000-000000000b01", "ok": true, "what": "read_back", "verified_at": "2026-02-01T00:01:00Z"}]'::jsonb,
    'holds', jsonb_build_array(jsonb_build_object('id', :'id', 'reason', 'lawsuit', 'held_by', 'x', 'held_at', now()),
        '{"id": "00000000-0000-0000-0000-000000000d01", "reason": "by hand", "held_by": "root@host", "held_at": "2026-01-01T00:00:00Z"}'::jsonb), 'policy', NULL)));
SELECT coffer._agent_mirrored('2026-03-01 00:00+00');
SET timezone = 'UTC';
SELECT tenant, backup, kind, trigger, reason, point_lsn, point_time, rows, bytes, verified_at, cardinality(holds) AS holds, as_of FROM coffer.backups ORDER BY point_lsn;
-- A hold is none before the repository has it; and beyond what a time there can say, it is without an end.
BEGIN;
SELECT coffer.hold('acme', 'not yet', '0044-03-15 BC', '9999-12-31') AS hold \gset early_
SELECT from_time, to_time, state FROM coffer.holds WHERE hold = :early_hold;
SELECT args - 'id' - 'hold' AS args FROM coffer.job_entries WHERE kind = 'hold' AND (args ->> 'hold')::int8 = :early_hold;
SELECT backup, cardinality(holds) AS holds FROM coffer.backups ORDER BY point_lsn;
ROLLBACK;
SELECT tenant, restorable, from_lsn, to_lsn, from_time, to_time IS NOT NULL AS to_time, reason FROM coffer.recovery_window ORDER BY from_lsn;
-- What was found of the reference data is nobody's, and auditors see it.
SELECT coffer._agent_tenant('(shared)', '00000000-0000-0000-0000-0000000000dd', 'shared');
SELECT coffer._agent_mirror('[{"uid": "00000000-0000-0000-0000-0000000000dd", "tenant": "(shared)",
    "verifications": [{"backup": "00000000-0000-0000-0000-000000000b09", "ok": false, "what": "live", "message": "public.kinds: 1 rows", "verified_at": "2026-02-01T00:02:00Z"}]}]');
SELECT tenant, kind, backup, ok, what, message, verified_at FROM coffer.verifications ORDER BY verified_at;
SELECT tenant, reason, state, held_by FROM coffer.holds ORDER BY hold;
SELECT coffer.release(:hold);
SELECT coffer.release(:hold);
SELECT state FROM coffer.holds WHERE hold = :hold;
-- Not before the hold, with which somebody is still busy.
SELECT args - 'id' - 'hold' AS args FROM coffer._agent_claim_job(ARRAY['release'], '00000000-0000-0000-0000-000000000007', 'regress');
SELECT coffer._agent_finish_job(max(job), '00000000-0000-0000-0000-000000000006', 'done', NULL, NULL) FROM coffer.jobs WHERE kind = 'hold';
SELECT args - 'id' - 'hold' AS args FROM coffer._agent_claim_job(ARRAY['release'], '00000000-0000-0000-0000-000000000007', 'regress');
-- Written only where something differs.
CREATE TEMP TABLE before AS SELECT backup, xmin::text AS version FROM coffer.backup_entries;
SELECT coffer._agent_mirror('[{"uid": "00000000-0000-0000-0000-0000000000aa", "tenant": "acme", "windows": [], "verifications": [], "holds": [], "policy": {"daily": 7},
    "backups": [{"backup": "00000000-0000-0000-0000-000000000b01", "kind": "full", "trigger": "manual", "point_lsn": "0/10", "point_time": "2026-02-01T00:00:00Z", "rows": 5, "bytes": 50}]}]');
SELECT b.backup, a.xmin::text = b.version AS as_it_was FROM before b LEFT JOIN coffer.backup_entries a USING (backup) ORDER BY b.backup;
SELECT tenant, reason, state, released_by FROM coffer.holds ORDER BY hold;
SELECT count(*) FROM coffer.recovery_window;
SELECT tenant, policy, set_by, state FROM coffer.policies;
SELECT coffer.set_policy('acme', '{"daily": 14, "pitr": "3d 12h"}');
SELECT tenant, policy, set_by, state FROM coffer.policies;
-- Nor a policy before the release; another tenant's goes ahead.
SELECT coffer.set_policy('globex', '{"daily": 3}');
SELECT tenant FROM coffer._agent_claim_job(ARRAY['policy'], '00000000-0000-0000-0000-000000000008', 'regress');
SELECT coffer._agent_finish_job(max(job), '00000000-0000-0000-0000-000000000007', 'done', NULL, NULL) FROM coffer.jobs WHERE kind = 'release';
SELECT args FROM coffer._agent_claim_job(ARRAY['policy'], '00000000-0000-0000-0000-000000000008', 'regress');
-- What failed says so, and what holds meanwhile; the very policy that is in force is in force as soon as its job is done.
SELECT coffer._agent_finish_job(job, '00000000-0000-0000-0000-000000000008', 'failed', NULL, 'no such policy') FROM coffer.jobs WHERE kind = 'policy' AND state = 'running' ORDER BY job;
SELECT tenant, policy, state, in_force, error FROM coffer.policies ORDER BY tenant;
SELECT coffer.set_policy('acme', '{"daily": 7}');
SELECT policy, state, in_force, error FROM coffer.policies WHERE tenant = 'acme';
SELECT args FROM coffer._agent_claim_job(ARRAY['policy'], '00000000-0000-0000-0000-000000000008', 'regress');
SELECT coffer._agent_finish_job(max(job), '00000000-0000-0000-0000-000000000008', 'done', NULL, NULL) FROM coffer.jobs WHERE kind = 'policy';
SELECT policy, state, in_force, error FROM coffer.policies WHERE tenant = 'acme';
SELECT coffer.hold('acme', 'in vain') AS hold \gset
SELECT args ->> 'reason' AS reason FROM coffer._agent_claim_job(ARRAY['hold'], '00000000-0000-0000-0000-000000000009', 'regress');
SELECT coffer._agent_finish_job(max(job), '00000000-0000-0000-0000-000000000009', 'failed', NULL, 'no room') FROM coffer.jobs WHERE kind = 'hold';
-- One whose release failed is held, and can be released again. One that is over was released by nobody, whoever tried before.
SELECT coffer._agent_mirror('[{"uid": "00000000-0000-0000-0000-0000000000aa", "tenant": "acme", "windows": [], "verifications": [], "policy": {"daily": 7},
    "backups": [{"backup": "00000000-0000-0000-0000-000000000b01", "kind": "full", "trigger": "manual", "point_lsn": "0/10", "point_time": "2026-02-01T00:00:00Z", "rows": 5, "bytes": 50}],
    "holds": [{"id": "00000000-0000-0000-0000-000000000d04", "reason": "an undo", "held_by": "x", "held_at": "2020-01-01T00:00:00Z", "ends_at": "2020-02-01T00:00:00Z"},
              {"id": "00000000-0000-0000-0000-000000000d05", "reason": "another undo", "held_by": "x", "held_at": "2020-01-01T00:00:00Z", "ends_at": "9999-02-01T00:00:00Z"},
              {"id": "00000000-0000-0000-0000-000000000d06", "reason": "kept", "held_by": "x", "held_at": "2026-01-01T00:00:00Z", "ends_at": null}]}]');
SELECT coffer.release(hold) FROM coffer.holds WHERE reason = 'an undo';
SELECT kind FROM coffer._agent_claim_job(ARRAY['release'], '00000000-0000-0000-0000-000000000009', 'regress');
SELECT coffer._agent_finish_job(max(job), '00000000-0000-0000-0000-000000000009', 'failed', NULL, 'no room') FROM coffer.jobs WHERE kind = 'release';
SELECT coffer.release(hold) FROM coffer.holds WHERE reason = 'kept';
SELECT reason, state, released_by, error FROM coffer.holds WHERE tenant = 'acme' ORDER BY hold;
SELECT kind FROM coffer._agent_claim_job(ARRAY['release'], '00000000-0000-0000-0000-000000000009', 'regress');
SELECT coffer._agent_finish_job(max(job), '00000000-0000-0000-0000-000000000009', 'failed', NULL, 'no room') FROM coffer.jobs WHERE kind = 'release';
SELECT reason, state, released_by, error FROM coffer.holds WHERE tenant = 'acme' ORDER BY hold;
SELECT coffer.release(hold) FROM coffer.holds WHERE reason = 'kept';
SELECT coffer.release(hold) FROM coffer.holds WHERE reason = 'kept';
SELECT kind FROM coffer._agent_claim_job(ARRAY['release'], '00000000-0000-0000-0000-000000000009', 'regress');
SELECT coffer._agent_finish_job(max(job), '00000000-0000-0000-0000-000000000009', 'done', NULL, NULL) FROM coffer.jobs WHERE kind = 'release';
SELECT coffer._agent_mirror('[{"uid": "00000000-0000-0000-0000-0000000000aa", "tenant": "acme", "windows": [], "verifications": [], "holds": [], "policy": {"daily": 7},
    "backups": [{"backup": "00000000-0000-0000-0000-000000000b01", "kind": "full", "trigger": "manual", "point_lsn": "0/10", "point_time": "2026-02-01T00:00:00Z", "rows": 5, "bytes": 50}]}]');
SELECT reason, state, released_by, error FROM coffer.holds WHERE tenant = 'acme' ORDER BY hold;
-- What failed is not forgotten with the other jobs.
UPDATE coffer.job_entries SET finished_at = '2020-01-01' WHERE kind IN ('hold', 'policy') AND state IN ('done', 'failed');
SELECT coffer._agent_mirrored('2026-03-01 00:00+00');
SELECT tenant, policy, state, in_force, error FROM coffer.policies ORDER BY tenant;
SELECT kind, state FROM coffer.jobs WHERE kind IN ('hold', 'policy') ORDER BY job;

-- A tenant's administrator sees its own tenant and no other, in every view.
SELECT coffer.verify('globex') AS other \gset
SELECT coffer._agent_mirror('[{"uid": "00000000-0000-0000-0000-0000000000bb", "tenant": "globex", "windows": [{"from_lsn": "0/9", "gap": ""}],
    "backups": [{"backup": "00000000-0000-0000-0000-000000000b03", "kind": "full", "point_lsn": "0/10", "point_time": "2026-02-01T00:00:00Z", "rows": 5, "bytes": 50}],
    "verifications": [{"backup": "00000000-0000-0000-0000-000000000b03", "ok": false, "what": "live", "message": "row 1", "verified_at": "2026-02-01T00:01:00Z"}],
    "holds": [{"id": "00000000-0000-0000-0000-000000000d03", "reason": "theirs", "held_by": "x", "held_at": "2026-01-01T00:00:00Z"}], "policy": {"daily": 1}}]');
SELECT coffer.grant_tenant('acme', 'regress_missing');
SELECT coffer.grant_tenant('acme', 'coffer_auditor');
SELECT coffer.grant_tenant(NULL, 'regress_acme');
SELECT coffer.grant_tenant('unheard of', 'regress_acme');
SELECT coffer.revoke_tenant('unheard of', 'regress_acme');
SELECT coffer.revoke_tenant('unheard of', 'regress_acme');
SELECT coffer.grant_tenant('acme', 'regress_acme');
SET ROLE regress_acme;
SELECT 'tenants' AS view, array_agg(DISTINCT tenant) AS tenants FROM coffer.tenants
UNION ALL SELECT 'jobs', array_agg(DISTINCT tenant) FROM coffer.jobs
UNION ALL SELECT 'backups', array_agg(DISTINCT tenant) FROM coffer.backups
UNION ALL SELECT 'recovery_window', array_agg(DISTINCT tenant) FROM coffer.recovery_window
UNION ALL SELECT 'policies', array_agg(DISTINCT tenant) FROM coffer.policies
UNION ALL SELECT 'holds', array_agg(DISTINCT tenant) FROM coffer.holds
UNION ALL SELECT 'verifications', array_agg(DISTINCT tenant) FROM coffer.verifications;
-- No function of its own sees more, whatever it costs.
CREATE FUNCTION pg_temp.look(t text) RETURNS bool LANGUAGE plpgsql COST 0.0001 AS $$ BEGIN RAISE NOTICE 'sees %', t; RETURN true; END $$;
SET client_min_messages = notice;
SELECT count(*) FROM (SELECT DISTINCT tenant FROM coffer.jobs WHERE pg_temp.look(tenant)) s;
SET client_min_messages = warning;
SELECT state FROM coffer.wait(:other);
SELECT coffer.backup('acme');
SELECT coffer.cancel(1);
SELECT coffer.hold('acme', 'x');
SELECT * FROM coffer.job_entries;
SELECT * FROM coffer.coverage;
SELECT * FROM coffer.audit_log;
RESET ROLE;
SELECT coffer.revoke_tenant('acme', 'regress_acme');
SET ROLE regress_acme;
SELECT * FROM coffer.jobs;
RESET ROLE;

-- Who may ask for what.
SET ROLE regress_operator;
SELECT coffer.backup('acme', 'by the operator') > 0 AS made;
SELECT coffer.verify('acme') > 0 AS made;
SELECT coffer.restore('acme', 'latest', 'schema') AS job \gset
SELECT coffer.cancel(:job);
SELECT coffer.restore('acme', 'latest', 'in-place', true);
SELECT coffer.restore('acme', 'latest', dry_run => false);
SELECT coffer._restore_in_place('acme', 'latest', false);
SELECT coffer.hold('acme', 'x');
SELECT coffer.set_policy('acme', '{}');
SELECT coffer.grant_tenant('acme', 'regress_acme');
SET ROLE regress_auditor;
SELECT coffer.backup('acme');
SELECT coffer.restore('acme', 'latest', 'schema');
SELECT coffer.cancel(:job);
SELECT count(*) > 0 AS sees FROM coffer.jobs;
SELECT coffer._agent_claim_job(ARRAY['backup'], '00000000-0000-0000-0000-000000000009', 'me');
SET ROLE regress_admin;
SELECT coffer.restore('acme', 'latest', dry_run => false) AS job \gset
SELECT coffer.cancel(:job);
SELECT coffer.hold('globex', 'audit') > 0 AS held;
SET ROLE regress_nobody;
SELECT * FROM coffer.jobs;
SELECT coffer.wait(1);
RESET ROLE;

-- Every call is in the audit log.
SELECT action, object, count(*) FROM coffer.audit_log WHERE action IN ('backup', 'restore', 'verify', 'cancel', 'hold', 'release', 'set_policy', 'grant_tenant', 'revoke_tenant')
GROUP BY 1, 2 ORDER BY 1, 2;
DELETE FROM coffer.agent_state;
INSERT INTO coffer.agent_state SELECT * FROM reported;
DROP FUNCTION wait_says, pg_temp.look;
DELETE FROM coffer.job_entries;
DELETE FROM coffer.tenant_entries WHERE tenant IN ('acme', 'globex', '');
DROP ROLE regress_admin, regress_operator, regress_auditor, regress_acme, regress_nobody;
