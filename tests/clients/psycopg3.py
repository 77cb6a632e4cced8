"""psycopg 3 and psycopg_pool: whatever a proxy could get wrong. Reads PGHOST and its like."""

import datetime
import decimal
import threading
import uuid

import psycopg
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool
from recipe import digest, note, outlive, say, token

VALUES = [
    ("int8", 2**62),
    ("float8", 0.1),
    ("numeric", decimal.Decimal("12345678901234567890.123")),
    ("bool", True),
    ("text", "aé漢😀"),
    ("bytea", bytes(range(256))),
    ("timestamptz", datetime.datetime(2026, 11, 24, 10, tzinfo=datetime.timezone.utc)),
    ("interval", datetime.timedelta(days=3, seconds=5)),
    ("uuid", uuid.UUID(int=7)),
    ("int4[]", [1, None, 3]),
    ("jsonb", Jsonb({"a": [1, None]})),
    ("text", None),
]


def values(connection):
    for binary in (False, True):
        cursor = connection.cursor(binary=binary)
        kind = "binary" if binary else "text"
        for name, value in VALUES:
            row = cursor.execute(f"SELECT %s::{name}", [value]).fetchone()
            say(f"{kind} {name}", repr(row[0]))
        say(f"{kind} columns", [(c.name, c.type_code) for c in cursor.description])


def prepared(connection):
    for number in range(8):
        row = connection.execute("SELECT %s::int * 2", [number], prepare=True).fetchone()
        say("prepared", row[0])
    count = connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()[0]
    say("prepared statements", count)


def transactions(connection):
    connection.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)")
    with connection.transaction():
        connection.execute("INSERT INTO t VALUES (1, 'one')")
        try:
            with connection.transaction("inner"):
                connection.execute("INSERT INTO t VALUES (1, 'again')")
        except psycopg.errors.UniqueViolation as error:
            say("unique violation", (error.sqlstate, error.diag.constraint_name, error.diag.message_primary))
    try:
        with connection.transaction():
            connection.execute("INSERT INTO t VALUES (2, 'two')")
            raise psycopg.Rollback
    except psycopg.Rollback:
        pass
    say("after rollback", connection.execute("SELECT * FROM t").fetchall())
    connection.cursor().executemany("INSERT INTO t VALUES (%s, %s)", [(n, str(n)) for n in range(10, 500)])
    say("executemany", connection.execute("SELECT count(*), sum(id) FROM t").fetchone())


def errors(connection):
    for statement in ("SELEC 1", "SELECT 1/0", "SELECT * FROM nothing", "SELECT 'x'::int"):
        try:
            connection.execute(statement)
        except psycopg.Error as error:
            diag = error.diag
            say(statement, (type(error).__name__, error.sqlstate, diag.severity, diag.message_primary, diag.statement_position))
    connection.execute("SET statement_timeout = 50")
    try:
        connection.execute("SELECT pg_sleep(10)")
    except psycopg.errors.QueryCanceled as error:
        say("statement_timeout", (error.sqlstate, error.diag.message_primary))
    connection.execute("RESET statement_timeout")


def notices(connection):
    heard = []
    connection.add_notice_handler(lambda diag: heard.append((diag.severity, diag.message_primary)))
    connection.execute("DO $$ BEGIN FOR n IN 1..200 LOOP RAISE NOTICE 'number %', n; END LOOP; END $$")
    say("notices", (len(heard), heard[0], heard[-1]))
    connection.execute("LISTEN news")
    with psycopg.connect(autocommit=True) as other:
        other.execute("SELECT pg_notify('news', repeat('n', 7000))")
    for notification in connection.notifies(timeout=10, stop_after=1):
        say("notification", (notification.channel, len(notification.payload)))
    connection.execute("UNLISTEN *")


def copies(connection):
    connection.execute("CREATE TEMP TABLE c (n int, text text)")
    with connection.cursor().copy("COPY c FROM STDIN") as copy:
        for number in range(100_000):
            copy.write_row((number, f"row {number}"))
    with connection.cursor().copy("COPY (SELECT * FROM c ORDER BY n) TO STDOUT") as copy:
        say("copy out", digest(copy))
    with connection.cursor().copy("COPY c TO STDOUT (FORMAT binary)") as copy:
        say("copy out, binary", digest(copy))
    try:
        with connection.cursor().copy("COPY c FROM STDIN") as copy:
            copy.write("not a number\tx\n")
    except psycopg.Error as error:
        say("copy in, wrong", error.sqlstate)
    try:
        with connection.cursor().copy("COPY c FROM STDIN") as copy:
            copy.write("7\tseven\n")
            raise KeyError("stop")
    except KeyError:
        pass
    say("copy in, given up", connection.execute("SELECT count(*) FROM c").fetchone())


def large(connection):
    rows = connection.cursor(binary=True).stream(
        "SELECT n, repeat(md5(n::text), 32) FROM generate_series(1, 50000) AS n"
    )
    say("50 MB, row by row", digest(row[1].encode() for row in rows))
    blob = bytes(range(256)) * 65536
    echoed = connection.execute("SELECT %b::bytea", [blob]).fetchone()[0]
    say("16 MiB both ways", echoed == blob)
    with connection.transaction():
        oid = connection.execute("SELECT lo_from_bytea(0, %b)", [blob]).fetchone()[0]
        part = connection.execute("SELECT lo_get(%s, 1000000, 10)", [oid]).fetchone()[0]
        say("large object", part)
        connection.execute("SELECT lo_unlink(%s)", [oid])
    with connection.transaction(), connection.cursor("server_side") as cursor:
        cursor.itersize = 1000
        cursor.execute("SELECT n FROM generate_series(1, 10000) AS n")
        say("server-side cursor", sum(row[0] for row in cursor))


def pipelines(connection):
    with connection.pipeline():
        cursors = [connection.execute("SELECT %s::int", [number]) for number in range(500)]
    say("pipeline", sum(cursor.fetchone()[0] for cursor in cursors))
    try:
        with connection.pipeline(), connection.transaction():
            connection.execute("SELECT 1")
            connection.execute("SELECT 1/0")
            connection.execute("SELECT 2")
    except psycopg.errors.DivisionByZero as error:
        say("pipeline with an error", error.sqlstate)
    say("after it", connection.execute("SELECT 3").fetchone())


def cancels(connection):
    for safe in (False, True):
        cancel = connection.cancel_safe if safe else connection.cancel
        timer = threading.Timer(0.3, cancel)
        timer.start()
        try:
            connection.execute("SELECT pg_sleep(30)")
        except psycopg.errors.QueryCanceled as error:
            say("cancel", (error.sqlstate, error.diag.message_primary))
        timer.join()
    say("after cancel", connection.execute("SELECT 1").fetchone())


def startup():
    options = "-c search_path=pg_catalog -c statement_timeout=4321ms"
    with psycopg.connect(application_name="clients", options=options) as connection:
        shown = connection.execute(
            "SELECT current_setting('application_name'), current_setting('search_path'),"
            " current_setting('statement_timeout')"
        )
        say("startup", shown.fetchone())
        say("parameters", [connection.info.parameter_status(name) for name in ("application_name", "server_encoding", "integer_datetimes", "standard_conforming_strings")])


def ended():
    with psycopg.connect(autocommit=True) as connection:
        try:
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        except psycopg.OperationalError as error:
            say("ended by the server", (type(error).__name__, error.sqlstate, connection.broken))


# [recipe]
class Brokered(psycopg.Connection):
    """Asks for a handle each time that the pool opens a connection."""

    @classmethod
    def connect(cls, conninfo="", **kwargs):
        return super().connect(conninfo, password=token(), **kwargs)


def pool():
    return ConnectionPool(
        connection_class=Brokered,
        kwargs={"autocommit": True},
        check=ConnectionPool.check_connection,
        min_size=1,
        max_size=1,
    )


# [end]


def pools():
    import logging

    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    with pool() as one:

        def query():
            with one.connection() as connection:
                return connection.execute("SELECT pg_backend_pid()").fetchone()[0]

        outlive(query, psycopg.OperationalError)


note(f"version {psycopg.__version__} libpq {psycopg.pq.version()}")
with psycopg.connect(autocommit=True) as connection:
    for part in (values, prepared, transactions, errors, notices, copies, large, pipelines, cancels):
        part(connection)
startup()
ended()
pools()
