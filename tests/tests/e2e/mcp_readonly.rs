//! Read-only connections of the SQL worker: what is known to get past "read-only", tried
//! through the real worker, and the whole database compared before and after.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Cluster, Database, Server};
use credbroker_e2e::wait::PATIENCE;
use credbroker_e2e::worker::Worker;
use postgres::fallible_iterator::FallibleIterator as _;
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
    CREATE TABLE wide (n int);
    CREATE INDEX wide_n ON wide USING brin (n) WITH (pages_per_range = 1);
    INSERT INTO wide SELECT generate_series(1, 1000);
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

/// How it shows what a statement does where nothing forbids it: to a superuser, past the worker, by
/// the simple protocol. Each has a fresh database, in which it is run after the first text here.
#[derive(Debug, Clone, Copy)]
enum Effect {
    /// The digest changes.
    Digest(&'static str),
    /// The answer to a question changes, in the same session.
    Session(&'static str, &'static str),
    /// The same, and everybody would see it.
    Shared(&'static str, &'static str),
    /// The digest changes when a row is sent as well.
    CopyIn,
    /// The file [`NEVER`] is there.
    File,
    /// Who listens to `news` hears of it.
    Notice,
    /// It answers with this.
    Gives(&'static str),
}
use Effect::{CopyIn, Digest, File, Gives, Notice, Session, Shared};

/// Stands for a path that the server could write to.
const NEVER: &str = "/tmp/never";
const IN_READ_ONLY: &str = "BEGIN READ ONLY";
const IS_READ_ONLY: &str = "SHOW transaction_read_only";
const BY_DEFAULT: &str = "SET default_transaction_read_only = on";
const IS_BY_DEFAULT: &str = "SHOW default_transaction_read_only";

/// Statements that end, widen or outlive a transaction, or work beside it, and what they do where
/// they may.
const ESCAPES: &[(&str, Effect)] = &[
    ("COMMIT; INSERT INTO t VALUES (50, 'x')", Digest(IN_READ_ONLY)),
    ("COMMIT; DROP TABLE t CASCADE", Digest(IN_READ_ONLY)),
    ("SELECT 1; INSERT INTO t VALUES (51, 'x')", Digest("")),
    ("ROLLBACK; BEGIN READ WRITE; INSERT INTO t VALUES (52, 'x'); COMMIT", Digest(IN_READ_ONLY)),
    ("COMMIT", Session(IN_READ_ONLY, IS_READ_ONLY)),
    ("COMMIT AND CHAIN", Session(IN_READ_ONLY, "SELECT now()")),
    ("ROLLBACK AND CHAIN", Session(IN_READ_ONLY, "SELECT now()")),
    ("END", Session(IN_READ_ONLY, IS_READ_ONLY)),
    ("ABORT", Session(IN_READ_ONLY, IS_READ_ONLY)),
    ("BEGIN READ WRITE", Session(BY_DEFAULT, IS_READ_ONLY)),
    ("START TRANSACTION READ WRITE", Session(BY_DEFAULT, IS_READ_ONLY)),
    // The row is of the savepoint's transaction.
    (
        "SAVEPOINT a",
        Session(
            "BEGIN; INSERT INTO t VALUES (49, 'x')",
            "INSERT INTO t VALUES (50, 'x') ON CONFLICT (id) DO UPDATE SET note = 'y' \
             RETURNING xmin = pg_current_xact_id()::xid",
        ),
    ),
    ("PREPARE TRANSACTION 'left_behind'", Digest("BEGIN; INSERT INTO t VALUES (49, 'x')")),
    (
        "/**/ PREPARE /**/ TRANSACTION 'left_behind'",
        Digest("BEGIN; INSERT INTO t VALUES (49, 'x')"),
    ),
    ("SET TRANSACTION READ WRITE", Session(IN_READ_ONLY, IS_READ_ONLY)),
    ("SET LOCAL transaction_read_only = off", Session(IN_READ_ONLY, IS_READ_ONLY)),
    ("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE", Session(BY_DEFAULT, IS_BY_DEFAULT)),
    ("SET default_transaction_read_only = off", Session(BY_DEFAULT, IS_BY_DEFAULT)),
    ("RESET ALL", Session(BY_DEFAULT, IS_BY_DEFAULT)),
    ("SET ROLE NONE", Session("SET ROLE heir", "SELECT current_user")),
    (
        "RESET SESSION AUTHORIZATION",
        Session("SET SESSION AUTHORIZATION heir", "SELECT session_user"),
    ),
    ("DISCARD ALL", Session(BY_DEFAULT, IS_BY_DEFAULT)),
    ("SELECT set_config('transaction_read_only', 'off', true), write(53)", Digest("")),
    ("SELECT set_config('default_transaction_read_only', 'off', false), write(54)", Digest("")),
    (
        "WITH c AS MATERIALIZED (SELECT set_config('transaction_read_only', 'off', true)) \
         SELECT write(55) FROM c",
        Digest(""),
    ),
    ("SELECT unlocked(56)", Digest("")),
    ("SELECT * FROM t FOR UPDATE", Shared("", "SELECT string_agg(xmax::text, ',') FROM t")),
    (
        "LOCK TABLE t IN ACCESS EXCLUSIVE MODE",
        Session(
            "BEGIN",
            "SELECT count(*) FROM pg_locks \
             WHERE relation = 't'::regclass AND mode = 'AccessExclusiveLock'",
        ),
    ),
    ("COPY t (id) FROM PROGRAM 'echo 57'", Digest("")),
    ("COPY t TO PROGRAM 'cat > /tmp/never'", File),
    ("COPY t TO '/tmp/never'", File),
    ("COPY t FROM STDIN", CopyIn),
    ("SELECT pg_read_file('/etc/passwd')", Gives("root:")),
    ("SELECT lo_import('/etc/passwd')", Digest("")),
    ("SELECT lo_export(4242, '/tmp/never')", File),
    ("SELECT pg_advisory_lock(4242)", Digest("")),
    ("SELECT pg_notify('news', 'x')", Notice),
    ("LISTEN news", Session("", "SELECT count(*) FROM pg_listening_channels()")),
    ("NOTIFY news", Notice),
    (
        "PREPARE kept AS INSERT INTO t VALUES (58, 'x')",
        Session("", "SELECT count(*) FROM pg_prepared_statements"),
    ),
    ("EXECUTE kept", Digest("PREPARE kept AS INSERT INTO t VALUES (58, 'x')")),
    (
        "DECLARE kept CURSOR WITH HOLD FOR SELECT 1",
        Session("", "SELECT count(*) FROM pg_cursors WHERE name = 'kept'"),
    ),
    ("CREATE TEMP TABLE kept (n int)", Session("", "SELECT to_regclass('pg_temp.kept')")),
    ("SELECT pg_create_physical_replication_slot('kept', true)", Digest("")),
    ("SELECT pg_create_logical_replication_slot('kept', 'pgoutput')", Digest("")),
    ("SELECT pg_reload_conf()", Shared("", "SELECT pg_conf_load_time()")),
    // The log goes to files here.
    ("SELECT pg_rotate_logfile() AS rotated", Gives("t")),
    (
        "SELECT pg_switch_wal()",
        Shared("CREATE TABLE filler ()", "SELECT pg_walfile_name(pg_current_wal_lsn() + 1)"),
    ),
    (
        "SELECT pg_stat_reset()",
        Shared("", "SELECT stats_reset FROM pg_stat_database WHERE datname = current_database()"),
    ),
    ("SELECT pg_import_system_collations('public')", Digest("")),
    ("ALTER SYSTEM SET work_mem = '7MB'", Digest("")),
    ("CREATE DATABASE made_database", Digest("")),
    ("VACUUM FULL t", Digest("")),
    ("REINDEX TABLE t", Digest("")),
    ("ANALYZE t", Digest("")),
    (
        "CHECKPOINT",
        Shared("CREATE TABLE filler ()", "SELECT checkpoint_lsn FROM pg_control_checkpoint()"),
    ),
    (
        "LOAD 'auto_explain'",
        Session("", "SELECT count(*) FROM pg_settings WHERE name ^@ 'auto_explain.'"),
    ),
    ("IMPORT FOREIGN SCHEMA far FROM SERVER here INTO public", Digest("")),
    ("SELECT dblink_exec('here', 'CREATE TABLE near.by_dblink ()')", Digest("")),
    ("SELECT dblink_connect('kept', 'here')", Session("", "SELECT dblink_get_connections()")),
    ("SELECT txid_current()", Session("BEGIN", "SELECT txid_current_if_assigned()")),
    ("SELECT ts_stat('SELECT write(59)::text::tsvector')", Digest("")),
    ("REASSIGN OWNED BY CURRENT_USER TO heir", Digest("SET SESSION AUTHORIZATION owner")),
];

/// Statements that the server refuses whoever sends them, so that there is nothing to show: they
/// take a transaction's protection away, or end it, from within a statement that has a snapshot;
/// or need a label provider, and none is installed. They are here for servers that might not.
const REFUSED_BY_ANY_SERVER: &[&str] = &[
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SELECT dynamic('SET TRANSACTION READ WRITE')",
    "SELECT dynamic('COMMIT')",
    "SECURITY LABEL ON TABLE t IS 'x'",
];

/// What works beside every transaction, read-only or rolled back, for any role that may call it. It
/// changes no row, and a role can be kept from it by REVOKE alone.
const BESIDE: &[(&str, Effect)] = &[
    (
        "SELECT pg_logical_emit_message(false, 'a', 'b')",
        Shared(
            "SELECT pg_create_logical_replication_slot('heard', 'test_decoding')",
            "SELECT count(*) FROM pg_logical_slot_peek_changes('heard', NULL, NULL) \
             WHERE data ^@ 'message:'",
        ),
    ),
    (
        "SELECT brin_summarize_new_values('wide_n')",
        Shared("CREATE EXTENSION pageinspect", "SELECT md5(get_raw_page('wide_n', 1))"),
    ),
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
        "pg_statistic",
        "pg_foreign_table",
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
        ("logging_collector", "on"),
    ];
    let hba = "local all all scram-sha-256\nhostssl all all all scram-sha-256\n";
    let cluster = Cluster::start_with(&home.path(""), hba, &more);
    let roles = "CREATE ROLE heir; CREATE ROLE far LOGIN PASSWORD 'far'";
    cluster.server().admin("postgres").batch_execute(roles).expect("roles can be made");
    (home, cluster)
}

fn prepare(server: &Server) -> Database {
    let database = server.database();
    let name = database.name();
    let mut admin = database.admin();
    let script = format!(
        "CREATE EXTENSION dblink; GRANT pg_signal_backend, heir TO {name}; \
         GRANT ALL ON SCHEMA public TO {name}; ALTER ROLE {name} CREATEDB; \
         SET ROLE {name}; {OBJECTS} RESET ROLE; \
         CREATE EXTENSION postgres_fdw; CREATE SCHEMA far; CREATE TABLE far.away (n int); \
         CREATE SCHEMA near; GRANT ALL ON SCHEMA near TO far; \
         CREATE SERVER here FOREIGN DATA WRAPPER postgres_fdw \
         OPTIONS (host '{}', port '{}', dbname '{name}'); \
         CREATE USER MAPPING FOR CURRENT_USER SERVER here OPTIONS (user 'far', password 'far')",
        server.socket_dir.display(),
        server.port,
    );
    admin.batch_execute(&script).expect("the objects can be made");
    database
}

/// Who listens to `news`, and hears the end at the end.
struct Listener(Client);

impl Listener {
    fn of(database: &Database) -> Self {
        let mut client = database.admin();
        client.batch_execute("LISTEN news").expect("anybody may listen");
        Self(client)
    }

    /// What came until now.
    fn heard(&mut self) -> Vec<String> {
        self.0.batch_execute("NOTIFY news, 'the end'").expect("anybody may speak");
        let mut heard = Vec::new();
        let mut notices = self.0.notifications();
        let mut notices = notices.timeout_iter(PATIENCE);
        while let Some(notice) = notices.next().expect("the server is there") {
            if notice.payload() == "the end" {
                return heard;
            }
            heard.push(notice.payload().to_owned());
        }
        panic!("the end does not come");
    }
}

#[test]
fn forty_read_only_bypasses_change_nothing() {
    let (home, cluster) = cluster();
    let database = prepare(cluster.server());
    let broker = Broker::usual_setup(&database, Via::Tls).start();
    let never = writable(&home);
    let mut listener = Listener::of(&database);
    let mut admin = database.admin();
    let before = digest(&database);

    let mut reader = worker(&broker, "");
    let (mut tried, mut refused) = (0, 0);
    let escapes = ESCAPES.iter().map(|(sql, effect)| (*sql, Some(*effect)));
    let others = WRITES.iter().chain(REFUSED_BY_ANY_SERVER).map(|sql| (*sql, None));
    for (sql, effect) in others.chain(escapes) {
        let seen = |admin: &mut Client| match effect {
            Some(Shared(_, question)) => texts(admin, question),
            _ => Vec::new(),
        };
        let shared = seen(&mut admin);
        let result = run(&mut reader, &sql.replace(NEVER, &never.display().to_string()));
        tried += 1;
        refused += usize::from(result.is_error);
        let changed = changes(&before, &digest(&database));
        assert!(changed.is_empty(), "{sql}\nchanged {changed:?}\n{}", result.raw);
        assert_eq!(seen(&mut admin), shared, "{sql}: {}", result.raw);
        assert!(!never.exists(), "{sql}: {}", result.raw);
        assert!(result.is_error || !matches!(effect, Some(Gives(_))), "{sql}: {}", result.raw);

        // PostgreSQL 15 takes these in a read-only transaction; the rollback is what undoes them.
        let taken = sql.contains("lo") || sql.starts_with("EXPLAIN ANALYZE CREATE TABLE");
        assert!(result.is_error || !WRITES.contains(&sql) || taken, "{sql}: {}", result.raw);
        let by_any = REFUSED_BY_ANY_SERVER.contains(&sql);
        assert!(result.is_error || !by_any, "{sql}: {}", result.raw);
    }
    assert_eq!(listener.heard(), Vec::<String>::new());
    println!("{tried} bypasses tried, {refused} refused, {} ran without effect", tried - refused);
    assert!(tried >= 40);
    for (sql, _) in BESIDE {
        run(&mut reader, sql);
        let changed = changes(&before, &digest(&database));
        assert!(changed.is_empty(), "{sql}\nchanged {changed:?}");
    }

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

/// A path that the server's user could write to.
fn writable(home: &Setup) -> PathBuf {
    let directory = home.path("writable");
    fs::create_dir(&directory).expect("a directory");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).expect("chmod");
    directory.join("never")
}

/// The control of those that a worker never lets do anything: past it, each does what it says.
#[test]
fn each_read_only_bypass_would_have_an_effect() {
    let (home, cluster) = cluster();
    let never = writable(&home);
    for (sql, effect) in ESCAPES.iter().chain(BESIDE) {
        let database = prepare(cluster.server());
        let mut session = database.admin();
        let begin = |session: &mut Client, first: &str| {
            let first = first.replace("owner", database.name());
            session.batch_execute(&first).unwrap_or_else(|error| panic!("{first}: {error}"));
        };
        let written = sql.replace(NEVER, &never.display().to_string());
        let run = |session: &mut Client| {
            session.batch_execute(&written).unwrap_or_else(|error| panic!("{sql}: {error}"));
        };
        match effect {
            Digest(first) => {
                begin(&mut session, first);
                let before = digest(&database);
                run(&mut session);
                let changed = changes(&before, &digest(&database));
                assert!(!changed.is_empty(), "{sql} changes nothing");
            }
            CopyIn => {
                let before = digest(&database);
                let mut rows = session.copy_in(*sql).expect("it takes rows");
                rows.write_all(b"60\tx\n").expect("it takes a row");
                rows.finish().expect("a row");
                assert!(!changes(&before, &digest(&database)).is_empty(), "{sql} changes nothing");
            }
            Session(first, question) | Shared(first, question) => {
                begin(&mut session, first);
                let before = texts(&mut session, question);
                assert_eq!(texts(&mut session, question), before, "{sql}: it changes by itself");
                run(&mut session);
                // Of what it only asks for, others see to it.
                assert_eventually!(
                    texts(&mut session, question) != before,
                    "{sql} changes nothing: {before:?}"
                );
            }
            File => {
                run(&mut session);
                assert!(never.exists(), "{sql} writes nothing");
                fs::remove_file(&never).expect("it was written");
            }
            Notice => {
                let mut listener = Listener::of(&database);
                run(&mut session);
                assert_eq!(listener.heard().len(), 1, "{sql}");
            }
            Gives(text) => {
                let answer = texts(&mut session, sql).concat();
                assert!(answer.contains(text), "{sql}: {answer}");
            }
        }
        drop(session);
        clean_up(&database);
    }
    let database = prepare(cluster.server());
    for sql in REFUSED_BY_ANY_SERVER {
        let mut session = database.admin();
        session.batch_execute("BEGIN READ ONLY").expect("a transaction");
        session.batch_execute(sql).expect_err(sql);
    }
}

/// What is of the whole server, or keeps a database from being dropped.
fn clean_up(database: &Database) {
    let mut admin = database.admin();
    for prepared in texts(&mut admin, "SELECT gid FROM pg_prepared_xacts") {
        admin.batch_execute(&format!("ROLLBACK PREPARED '{prepared}'")).expect("it is there");
    }
    let slots = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots";
    assert_eventually!(admin.batch_execute(slots).is_ok(), "a slot is in use");
    admin.batch_execute("DROP DATABASE IF EXISTS made_database").expect("nobody is in it");
    admin.batch_execute("ALTER SYSTEM RESET ALL").expect("a superuser may");
}

/// What no transaction confines, and is open to a superuser whom `allow_roles` lets in: README.md
/// says so.
const OPEN_TO_SUPERUSERS: &[&str] = &[
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT lo_export(4242, '/tmp/never')",
    "SELECT pg_create_physical_replication_slot('kept', true)",
    "SELECT pg_create_logical_replication_slot('kept', 'pgoutput')",
    "SELECT pg_reload_conf()",
    "SELECT pg_rotate_logfile() AS rotated",
    "SELECT pg_switch_wal()",
    "SELECT pg_stat_reset()",
];

#[test]
fn a_superuser_is_let_in_by_name_alone_and_changes_no_row() {
    let (home, cluster) = cluster();
    let database = prepare(cluster.server());
    let never = writable(&home);
    let promote = format!("ALTER ROLE {} SUPERUSER", database.name());
    database.admin().batch_execute(&promote).expect("a superuser may");
    let broker = Broker::usual_setup(&database, Via::Tls).start();
    let allowing = |role: &str, access: &str| {
        let section = "[connections.main_db]";
        let config = format!("{section}\naccess = \"{access}\"\nallow_roles = [\"{role}\"]\n");
        worker(&broker, &config)
    };

    let strangers = [
        worker(&broker, ""),
        worker(&broker, "[connections.main_db]\naccess = \"read-write\"\n"),
        allowing("pg_read_server_files", "read-only"),
        allowing("createrole", "read-write"),
    ];
    for mut stranger in strangers {
        let named = json!({ "connection_name": "main_db" });
        for refused in [
            run(&mut stranger, "SELECT 1"),
            stranger.call("connect_named_storage", &named),
            stranger.call("create_credential_token", &json!({ "database": "main_db" })),
        ] {
            if refused.is_error {
                assert_eq!(refused.text("/error/code"), "ACCESS_DENIED", "{}", refused.raw);
                let hint = refused.text("/error/hint");
                assert!(hint.contains("allow_roles = [\"superuser\"]"), "{}", refused.raw);
                continue;
            }
            // A token opens nothing by itself, and is no way round.
            let with_token = json!({ "database": "main_db", "sql": "SELECT 1",
                "credential_token": refused.text("/credential_token") });
            let refused = stranger.call("execute_sql", &with_token);
            assert_eq!(refused.text("/error/code"), "ACCESS_DENIED", "{}", refused.raw);
        }
    }

    let mut reader = allowing("superuser", "read-only");
    let who = run(&mut reader, "SELECT rolsuper FROM pg_roles WHERE rolname = session_user");
    assert_eq!(who.content["rows"], json!([[true]]), "{}", who.raw);
    let before = digest(&database);
    let escapes = ESCAPES.iter().map(|(sql, _)| sql);
    let held = WRITES.iter().chain(REFUSED_BY_ANY_SERVER).chain(escapes);
    let held: Vec<&str> = held.copied().filter(|sql| !OPEN_TO_SUPERUSERS.contains(sql)).collect();
    for some in held.chunks(8) {
        for sql in some {
            let _refused_or_undone =
                run(&mut reader, &sql.replace(NEVER, &never.display().to_string()));
        }
        let changed = changes(&before, &digest(&database));
        assert!(changed.is_empty() && !never.exists(), "one of {some:#?}\nchanged {changed:?}");
    }
    println!("{} statements of a superuser changed nothing", held.len());

    for sql in OPEN_TO_SUPERUSERS {
        assert!(ESCAPES.iter().any(|(escape, _)| escape == sql), "{sql} is tried elsewhere too");
        let opened = run(&mut reader, &sql.replace(NEVER, &never.display().to_string()));
        assert!(!opened.is_error, "{sql}: {}", opened.raw);
        clean_up(&database);
    }
    assert!(never.exists(), "lo_export is open");

    let mut writer = allowing("superuser", "read-write");
    let made = run(&mut writer, "CREATE TABLE made_by_a_superuser ()");
    assert!(!made.is_error, "{}", made.raw);
    assert!(!changes(&before, &digest(&database)).is_empty());
}
