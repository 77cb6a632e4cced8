//! Read-only connections of the SQL worker: what is known to get past "read-only", tried
//! through the real worker, and the whole database compared before and after.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Cluster, Database, Server};
use credbroker_e2e::worker::Worker;
use postgres::{Client, SimpleQueryMessage};
use serde_json::json;

/// What the role owns when it begins: everything that the statements below try to change.
const OBJECTS: &str = "
    CREATE TABLE t (id int PRIMARY KEY, note text);
    INSERT INTO t VALUES (1, 'one'), (2, 'two');
    CREATE TABLE parts (n int) PARTITION BY RANGE (n);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (9);
    INSERT INTO parts VALUES (1);
    CREATE VIEW v AS SELECT * FROM t;
    CREATE MATERIALIZED VIEW m AS SELECT count(*) AS n FROM t;
    CREATE SEQUENCE s;
    CREATE TYPE mood AS ENUM ('good');
    CREATE INDEX t_note ON t (note);
    SELECT lo_from_bytea(4242, 'large');
    CREATE FUNCTION write(int) RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO t VALUES ($1, 'f'); RETURN 1; END $$;
    CREATE FUNCTION definer(int) RETURNS int LANGUAGE plpgsql SECURITY DEFINER AS
        $$ BEGIN INSERT INTO public.t VALUES ($1, 'd'); RETURN 1; END $$;
    CREATE FUNCTION lies(int) RETURNS int LANGUAGE sql STABLE AS
        $$ SELECT public.write($1) $$;
    CREATE FUNCTION dynamic(text) RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN EXECUTE $1; RETURN 1; END $$;
    CREATE FUNCTION unlocked(int) RETURNS int LANGUAGE plpgsql
        SET default_transaction_read_only = off AS
        $$ BEGIN SET TRANSACTION READ WRITE; RETURN write($1); END $$;
    CREATE FUNCTION nested(int) RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN BEGIN SET LOCAL transaction_read_only = off;
           EXCEPTION WHEN OTHERS THEN NULL; END; RETURN write($1); END $$;
    CREATE PROCEDURE commits(int) LANGUAGE plpgsql AS
        $$ BEGIN COMMIT; INSERT INTO t VALUES ($1, 'p'); COMMIT; END $$;
    CREATE FUNCTION on_t() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RETURN NEW; END $$;
    CREATE OPERATOR <!> (LEFTARG = int, RIGHTARG = int, FUNCTION = int4pl);
";

/// Statements that change something where writing is allowed: the control shows it.
const WRITES: &[&str] = &[
    "INSERT INTO t VALUES (10, 'x')",
    "UPDATE t SET note = note || '!'",
    "DELETE FROM t WHERE id = 2",
    "MERGE INTO t USING (VALUES (11)) AS n (id) ON t.id = n.id \
     WHEN NOT MATCHED THEN INSERT VALUES (n.id, 'm')",
    "INSERT INTO t VALUES (12, 'r') RETURNING *",
    "WITH w AS (INSERT INTO t VALUES (13, 'w') RETURNING id) SELECT * FROM w",
    "WITH w AS (UPDATE t SET note = note || '?' RETURNING id) SELECT count(*) FROM w",
    "EXPLAIN ANALYZE INSERT INTO t VALUES (14, 'e')",
    "EXPLAIN (ANALYZE, FORMAT JSON) WITH w AS (INSERT INTO t VALUES (15, 'e') RETURNING 1) TABLE w",
    "/* SELECT */ INSERT INTO t VALUES (16, 'c')",
    "-- SELECT\nINSERT INTO t VALUES (17, 'c')",
    "INSERT INTO v VALUES (18, 'view')",
    "SELECT write(20)",
    "SELECT definer(21)",
    "SELECT lies(22)",
    "SELECT dynamic('INSERT INTO t VALUES (23, ''x'')')",
    "SELECT dynamic('CREATE TABLE made_dynamically (n int)')",
    "SELECT * FROM generate_series(24, 25) g, LATERAL write(g)",
    "VALUES (write(26))",
    "SELECT 1 ORDER BY write(27)",
    "SELECT 1 LIMIT write(28)",
    "EXPLAIN ANALYZE SELECT write(29)",
    "SELECT nested(30)",
    "SELECT query_to_xml('SELECT 1', true, false, ''), write(31)",
    "DO $$ BEGIN INSERT INTO t VALUES (32, 'do'); END $$",
    "DO $$ BEGIN COMMIT; INSERT INTO t VALUES (33, 'do'); COMMIT; END $$",
    "CALL commits(34)",
    "SELECT * INTO copied FROM t",
    "CREATE TABLE made AS SELECT * FROM t",
    "EXPLAIN ANALYZE CREATE TABLE explained AS SELECT 1",
    "CREATE TABLE plain (n int)",
    "CREATE VIEW plain_view AS SELECT 1",
    "CREATE FUNCTION made_function() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE SCHEMA made_schema",
    "CREATE TRIGGER made_trigger BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION on_t()",
    "CREATE INDEX CONCURRENTLY made_index ON t (note)",
    "CREATE STATISTICS made_statistics ON id, note FROM t",
    "ALTER TABLE t ADD COLUMN made_column int DEFAULT 7",
    "ALTER TYPE mood ADD VALUE 'bad'",
    "COMMENT ON TABLE t IS 'changed'",
    "GRANT SELECT ON t TO PUBLIC",
    "SELECT nextval('s')",
    "SELECT setval('s', 99)",
    "SELECT lo_create(4243)",
    "SELECT lo_put(4242, 0, 'LARGE')",
    "SELECT lowrite(lo_open(4242, 131072), 'huge')",
    "SELECT lo_unlink(4242)",
    "ALTER ROLE CURRENT_USER SET work_mem = '7MB'",
    "ALTER TABLE t SET (fillfactor = 50)",
    "ALTER TABLE parts DETACH PARTITION parts_1",
    "CLUSTER t USING t_pkey",
    "REFRESH MATERIALIZED VIEW m",
    "TRUNCATE parts_1",
    "DROP OPERATOR <!> (int, int)",
    "DROP VIEW v",
];

/// Statements that end, widen or outlive a transaction, or work beside it. Over a connection
/// that may write, most are refused as well, or change nothing that lasts.
const ESCAPES: &[&str] = &[
    "COMMIT; INSERT INTO t VALUES (50, 'x')",
    "COMMIT; DROP TABLE t CASCADE",
    "SELECT 1; INSERT INTO t VALUES (51, 'x')",
    "ROLLBACK; BEGIN READ WRITE; INSERT INTO t VALUES (52, 'x'); COMMIT",
    "COMMIT",
    "COMMIT AND CHAIN",
    "ROLLBACK AND CHAIN",
    "END",
    "ABORT",
    "BEGIN READ WRITE",
    "START TRANSACTION READ WRITE",
    "SAVEPOINT a",
    "PREPARE TRANSACTION 'left_behind'",
    "/**/ PREPARE /**/ TRANSACTION 'left_behind'",
    "SET TRANSACTION READ WRITE",
    "SET LOCAL transaction_read_only = off",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "SET default_transaction_read_only = off",
    "RESET ALL",
    "SET ROLE NONE",
    "RESET SESSION AUTHORIZATION",
    "DISCARD ALL",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SELECT set_config('transaction_read_only', 'off', true), write(53)",
    "SELECT set_config('default_transaction_read_only', 'off', false), write(54)",
    "WITH c AS MATERIALIZED (SELECT set_config('transaction_read_only', 'off', true)) \
     SELECT write(55) FROM c",
    "SELECT unlocked(56)",
    "SELECT dynamic('SET TRANSACTION READ WRITE')",
    "SELECT dynamic('COMMIT')",
    "SELECT * FROM t FOR UPDATE",
    "LOCK TABLE t IN ACCESS EXCLUSIVE MODE",
    "COPY t FROM PROGRAM 'echo 57'",
    "COPY t TO PROGRAM 'cat > /tmp/never'",
    "COPY t TO '/tmp/never'",
    "COPY t FROM STDIN",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_export(4242, '/tmp/never')",
    "SELECT pg_advisory_lock(4242)",
    "SELECT pg_notify('news', 'x')",
    "LISTEN news",
    "NOTIFY news",
    "PREPARE kept AS INSERT INTO t VALUES (58, 'x')",
    "EXECUTE kept",
    "DECLARE kept CURSOR WITH HOLD FOR SELECT 1",
    "CREATE TEMP TABLE kept (n int)",
    "SELECT pg_logical_emit_message(false, 'a', 'b')",
    "SELECT pg_create_physical_replication_slot('kept', true)",
    "SELECT pg_create_logical_replication_slot('kept', 'pgoutput')",
    "SELECT pg_reload_conf()",
    "SELECT pg_rotate_logfile()",
    "SELECT pg_switch_wal()",
    "SELECT pg_stat_reset()",
    "SELECT pg_import_system_collations('public')",
    "ALTER SYSTEM SET work_mem = '7MB'",
    "CREATE DATABASE made_database",
    "VACUUM FULL t",
    "REINDEX TABLE t",
    "ANALYZE t",
    "CHECKPOINT",
    "LOAD 'auto_explain'",
    "IMPORT FOREIGN SCHEMA public FROM SERVER nowhere INTO public",
    "SELECT dblink_exec('dbname=postgres', 'CREATE TABLE by_dblink ()')",
    "SELECT dblink_connect('kept', 'dbname=postgres')",
    "SELECT txid_current()",
    "SELECT ts_stat('SELECT write(59)::text::tsvector')",
    "SELECT brin_summarize_new_values('t_pkey')",
    "SECURITY LABEL ON TABLE t IS 'x'",
    "REASSIGN OWNED BY CURRENT_USER TO CURRENT_USER",
];

fn worker(broker: &Broker, config: &str) -> Worker {
    let file = broker.setup().path("logs").with_file_name(format!("worker-{}.toml", config.len()));
    fs::write(&file, config).expect("a configuration");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
    let file = file.to_str().expect("ASCII");
    Worker::start_with(broker, &Identity::worker(), &["--config", file])
}

fn run(worker: &mut Worker, sql: &str) -> credbroker_e2e::worker::ToolResult {
    worker.call("execute_sql", &json!({ "database": "main_db", "sql": sql, "max_rows": 5 }))
}

/// Everything that can be seen of a database and of the role that owns it.
fn digest(database: &Database) -> BTreeMap<String, String> {
    let mut admin = database.admin();
    let name = database.name();
    let mut digest = BTreeMap::new();
    let relations = "SELECT c.oid::regclass::text FROM pg_class c \
                     WHERE relkind IN ('r', 'm', 'p') AND relnamespace NOT IN \
                     ('pg_catalog'::regnamespace, 'information_schema'::regnamespace, \
                      'pg_toast'::regnamespace)";
    for relation in texts(&mut admin, relations) {
        let sql = format!(
            "SELECT coalesce(string_agg(r::text, ';' ORDER BY r::text), '') FROM {relation} r"
        );
        digest.insert(format!("rows of {relation}"), texts(&mut admin, &sql).concat());
    }
    let catalogues = [
        "pg_class",
        "pg_attribute",
        "pg_proc",
        "pg_type",
        "pg_enum",
        "pg_namespace",
        "pg_operator",
        "pg_trigger",
        "pg_constraint",
        "pg_rewrite",
        "pg_extension",
        "pg_statistic_ext",
        "pg_cast",
        "pg_description",
        "pg_default_acl",
        "pg_inherits",
        "pg_collation",
        "pg_largeobject",
        "pg_largeobject_metadata",
        "pg_foreign_server",
        "pg_event_trigger",
        "pg_publication",
        "pg_sequences",
        "pg_seclabel",
        "pg_index",
    ];
    for catalogue in catalogues {
        // What the server counts by itself is no change of anybody's.
        let row = match catalogue {
            "pg_class" => {
                "(to_jsonb(r) - '{relpages,reltuples,relallvisible,relfrozenxid,relminmxid}'::text[])::text"
            }
            _ => "r::text",
        };
        let sql = format!(
            "SELECT md5(coalesce(string_agg({row}, ';' ORDER BY {row}), '')) FROM {catalogue} r"
        );
        digest.insert(catalogue.to_owned(), texts(&mut admin, &sql).concat());
    }
    let settings = format!(
        "SELECT s::text FROM pg_db_role_setting s WHERE setrole IN (0, '{name}'::regrole) \
         UNION ALL SELECT r::text FROM pg_roles r WHERE rolname = '{name}' \
         UNION ALL SELECT datname || coalesce(datacl::text, '') FROM pg_database \
         UNION ALL SELECT m::text FROM pg_auth_members m \
         UNION ALL SELECT gid FROM pg_prepared_xacts \
         UNION ALL SELECT slot_name FROM pg_replication_slots \
         UNION ALL SELECT l::text FROM pg_locks l WHERE locktype = 'advisory' \
         UNION ALL SELECT name || setting FROM pg_file_settings \
         UNION ALL SELECT r::text FROM pg_subscription r ORDER BY 1"
    );
    digest.insert("of the cluster".to_owned(), texts(&mut admin, &settings).join(";"));
    digest
}

fn texts(client: &mut Client, sql: &str) -> Vec<String> {
    let rows = client.simple_query(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    let text = |message| {
        let SimpleQueryMessage::Row(row) = message else { return None };
        row.get(0).map(str::to_owned)
    };
    rows.into_iter().filter_map(text).collect()
}

fn changes(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Vec<String> {
    let keys = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
    keys.filter(|key| before.get(*key) != after.get(*key)).cloned().collect()
}

/// A server of its own, with everything that would let a bypass succeed.
fn cluster() -> (Setup, Cluster) {
    let home = Setup::new();
    let more = [
        ("max_prepared_transactions", "5"),
        ("wal_level", "logical"),
        ("max_replication_slots", "5"),
    ];
    let hba = "local all all scram-sha-256\nhostssl all all all scram-sha-256\n";
    let cluster = Cluster::start_with(&home.path(""), hba, &more);
    (home, cluster)
}

fn prepare(server: &Server) -> Database {
    let database = server.database();
    let name = database.name();
    let mut admin = database.admin();
    let script = format!(
        "CREATE EXTENSION dblink; GRANT pg_signal_backend TO {name}; \
         GRANT ALL ON SCHEMA public TO {name}; ALTER ROLE {name} CREATEDB; \
         SET ROLE {name}; {OBJECTS}"
    );
    admin.batch_execute(&script).expect("the objects can be made");
    database
}

#[test]
fn forty_read_only_bypasses_change_nothing() {
    let (_home, cluster) = cluster();
    let database = prepare(cluster.server());
    let broker = Broker::usual_setup(&database, Via::Tls).start();
    let before = digest(&database);

    let mut reader = worker(&broker, "");
    let mut refused = 0;
    for sql in WRITES.iter().chain(ESCAPES) {
        let result = run(&mut reader, sql);
        refused += usize::from(result.is_error);
        let changed = changes(&before, &digest(&database));
        assert!(changed.is_empty(), "{sql}\nchanged {changed:?}\n{}", result.raw);

        // PostgreSQL 15 takes these in a read-only transaction; the rollback is what undoes them.
        let taken = sql.contains("lo") || sql.starts_with("EXPLAIN ANALYZE CREATE TABLE");
        assert!(result.is_error || !WRITES.contains(sql) || taken, "{sql}: {}", result.raw);
    }
    let tried = WRITES.len() + ESCAPES.len();
    println!("{tried} bypasses tried, {refused} refused, {} ran without effect", tried - refused);
    assert!(tried >= 40);

    // The same over a connection that may write: each of the first kind does change something,
    // so that the digest would have shown it.
    let mut writer = worker(&broker, "[connections.main_db]\naccess = \"read-write\"\n");
    for sql in WRITES {
        let before = digest(&database);
        let result = run(&mut writer, sql);
        assert!(!result.is_error, "{sql}: {}", result.raw);
        let changed = changes(&before, &digest(&database));
        assert!(!changed.is_empty(), "{sql} changes nothing over a connection that may write");
    }
}
