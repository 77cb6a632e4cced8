-- What psql can do, once direct and once through the door. Run with --no-psqlrc --echo-all.
\set ON_ERROR_STOP 0
\set VERBOSITY verbose
\set SHOW_CONTEXT never
\pset pager off
SELECT current_user = session_user AS same, current_setting('server_version_num')::int > 100000 AS known;
SELECT current_setting('application_name') AS application, current_setting('client_encoding') AS encoding;
CREATE SCHEMA psql_client;
SET search_path = psql_client;

-- Types, NULLs, wide rows.
SELECT 1::int2, 2::int4, 3::int8, 1.5::float4, 'NaN'::numeric, 12345678901234567890.123::numeric(30, 3),
       true, 'text', E'\\xdeadbeef'::bytea, NULL::text, '2026-11-24 10:00:00+00'::timestamptz AT TIME ZONE 'UTC',
       interval '1 mon 2 days', '{1,NULL,3}'::int[], '{"a": [1, null]}'::jsonb, '10.0.0.0/8'::cidr,
       '5e4f1d5c-1d2b-4b52-9d71-5f9f0e0f7a11'::uuid, int4range(1, 5), '(1,2)'::point;
SELECT 'aé漢😀' AS unicode, length('aé漢😀'), repeat('x', 3) AS repeated;
SELECT 1 AS a, 'b'::text AS b, NULL::jsonb AS c \gdesc
SELECT 7 AS seven, 'eight' AS eight \gset
\echo :seven :eight

-- Transactions, savepoints, errors.
CREATE TABLE t (id int PRIMARY KEY, name text NOT NULL, amount numeric(10, 2));
BEGIN;
INSERT INTO t VALUES (1, 'one', 1), (2, 'two', NULL);
SAVEPOINT a;
INSERT INTO t VALUES (1, 'again', 1);
ROLLBACK TO a;
COMMIT;
SELECT 1/0;
SELEC 1;
SELECT * FROM nothing_of_this_name;
INSERT INTO t VALUES (3, NULL, 0);
BEGIN; SELECT 1/0; SELECT 2; ROLLBACK;
SET statement_timeout = '50ms';
SELECT pg_sleep(10);
RESET statement_timeout;
DO $$ BEGIN RAISE NOTICE 'a notice of %', 42; RAISE WARNING 'a warning' USING HINT = 'a hint'; END $$;
SELECT 'first' \; SELECT 'second' \; SELECT 'third';

-- COPY both ways.
\copy t FROM STDIN WITH (FORMAT csv)
5,five,5.55
6,"six",
\.
\copy (SELECT * FROM t ORDER BY id) TO STDOUT WITH (FORMAT csv, HEADER)
COPY t FROM STDIN;
7	seven	not a number
\.
COPY (SELECT n, md5(n::text) FROM generate_series(1, 5) AS n) TO STDOUT;
\copy (SELECT n, md5(n::text) FROM generate_series(1, 200000) AS n) TO 'big.copy'
\! sha256sum < big.copy
CREATE TABLE big (n int, digest text);
\copy big FROM 'big.copy'
SELECT count(*), sum(n), min(digest), max(digest) FROM big;

-- Cursors.
BEGIN;
DECLARE c CURSOR FOR SELECT n FROM big ORDER BY n;
FETCH 3 FROM c;
MOVE 1000 FROM c;
FETCH 2 FROM c;
CLOSE c;
COMMIT;
\set FETCH_COUNT 1000
\o fetched.out
SELECT * FROM big ORDER BY n;
\o
\unset FETCH_COUNT
\! sha256sum < fetched.out

-- Prepared statements.
PREPARE p(int) AS SELECT $1 * 2 AS twice;
EXECUTE p(21);
DEALLOCATE p;

-- Large objects.
\lo_import big.copy 'of psql'
\set loid :LASTOID
SELECT length(lo_get(:loid)), md5(lo_get(:loid));
\lo_export :loid big.again
\! cmp big.copy big.again && echo the same
\lo_unlink :loid

-- LISTEN and NOTIFY.
LISTEN news;
NOTIFY news, 'hello';
SELECT 1;
UNLISTEN news;

-- Descriptions, and who one is.
\d t
\dt psql_client.*
\conninfo
\encoding
SELECT count(*) FROM pg_stat_activity WHERE pid = pg_backend_pid() AND usename = current_user;

-- The end, by the server.
DROP SCHEMA psql_client CASCADE;
SELECT pg_terminate_backend(pg_backend_pid());
