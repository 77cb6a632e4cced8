"""asyncpg: whatever a proxy could get wrong. Reads PGHOST and its like."""

import asyncio
import datetime
import decimal
import io
import time
import uuid

import asyncpg
from recipe import SECONDS, digest, finish, note, say, token

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
    ("jsonb", '{"a": [1, null]}'),
    ("text", None),
]


# What a statement raises whose connection the server ends, direct as well: the last one comes when the
# pool resets a connection that has just heard of its end.
LOST = (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError, asyncpg.InternalClientError)


async def values(connection):
    for name, value in VALUES:
        say(name, repr(await connection.fetchval(f"SELECT $1::{name}", value)))
    say("record", dict(await connection.fetchrow("SELECT 1 AS a, 'b' AS b, NULL AS c")))


async def prepared(connection):
    statement = await connection.prepare("SELECT $1::int * 2 AS twice")
    say("prepared", [await statement.fetchval(number) for number in range(8)])
    say("attributes", [(a.name, a.type.name) for a in statement.get_attributes()])


async def transactions(connection):
    await connection.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)")
    async with connection.transaction():
        await connection.execute("INSERT INTO t VALUES (1, 'one')")
        try:
            async with connection.transaction():
                await connection.execute("INSERT INTO t VALUES (1, 'again')")
        except asyncpg.UniqueViolationError as error:
            say("unique violation", (error.sqlstate, error.constraint_name, error.message))
    await connection.executemany("INSERT INTO t VALUES ($1, $2)", [(n, str(n)) for n in range(10, 5000)])
    say("executemany", tuple(await connection.fetchrow("SELECT count(*), sum(id) FROM t")))


async def errors(connection):
    for statement in ("SELEC 1", "SELECT 1/0", "SELECT * FROM nothing", "SELECT 'x'::int"):
        try:
            await connection.fetch(statement)
        except asyncpg.PostgresError as error:
            say(statement, (type(error).__name__, error.sqlstate, error.severity, error.message))
    await connection.execute("SET statement_timeout = 50")
    try:
        await connection.fetch("SELECT pg_sleep(10)")
    except asyncpg.QueryCanceledError as error:
        say("statement_timeout", (error.sqlstate, error.message))
    await connection.execute("RESET statement_timeout")


async def notices(connection):
    heard = []
    connection.add_log_listener(lambda _connection, message: heard.append(message.message))
    await connection.execute("DO $$ BEGIN FOR n IN 1..200 LOOP RAISE NOTICE 'number %', n; END LOOP; END $$")
    await asyncio.sleep(0)
    say("notices", (len(heard), heard[0], heard[-1]))
    arrived = asyncio.get_running_loop().create_future()
    await connection.add_listener("news", lambda _c, _pid, channel, payload: arrived.set_result((channel, len(payload))))
    other = await asyncpg.connect()
    await other.execute("SELECT pg_notify('news', repeat('n', 7000))")
    await other.close()
    say("notification", await asyncio.wait_for(arrived, 10))


async def copies(connection):
    await connection.execute("CREATE TEMP TABLE c (n int, text text)")
    rows = [(number, f"row {number}") for number in range(100_000)]
    say("copy in", await connection.copy_records_to_table("c", records=rows))
    for kind in ("text", "binary"):
        out = io.BytesIO()
        await connection.copy_from_query("SELECT * FROM c ORDER BY n", output=out, format=kind)
        say(f"copy out, {kind}", digest([out.getvalue()]))
    try:
        await connection.copy_to_table("c", source=io.BytesIO(b"not a number\tx\n"))
    except asyncpg.PostgresError as error:
        say("copy in, wrong", error.sqlstate)


async def large(connection):
    rows = await connection.fetch("SELECT n, repeat(md5(n::text), 32) AS t FROM generate_series(1, 50000) AS n")
    say("50 MB at once", digest(row["t"].encode() for row in rows))
    del rows
    blob = bytes(range(256)) * 65536
    say("16 MiB both ways", await connection.fetchval("SELECT $1::bytea", blob) == blob)
    total = 0
    async with connection.transaction():
        async for row in connection.cursor("SELECT n FROM generate_series(1, 10000) AS n", prefetch=500):
            total += row["n"]
    say("cursor", total)


async def cancels(connection):
    # asyncpg cancels by the protocol's CancelRequest when its own time-out is over.
    try:
        await connection.fetch("SELECT pg_sleep(30)", timeout=0.3)
    except asyncio.TimeoutError as error:
        say("cancel", type(error).__name__)
    say("after cancel", await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(30%' AND state = 'active'"))


async def startup():
    settings = {"application_name": "clients", "search_path": "pg_catalog", "statement_timeout": "4321"}
    connection = await asyncpg.connect(server_settings=settings)
    shown = [await connection.fetchval("SELECT current_setting($1)", name) for name in settings]
    say("startup", shown)
    await connection.close()


async def ended():
    connection = await asyncpg.connect()
    try:
        await connection.fetch("SELECT pg_terminate_backend(pg_backend_pid())")
    except asyncpg.PostgresError as error:
        say("ended by the server", (type(error).__name__, error.sqlstate))
    await asyncio.sleep(0.1)
    say("closed", connection.is_closed())


# [recipe]
async def new_token():
    return await asyncio.to_thread(token)


def pool():
    return asyncpg.create_pool(password=new_token, min_size=1, max_size=1)


# [end]


async def pools():
    backends, answers, cut = set(), 0, 0
    end = time.monotonic() + SECONDS
    async with pool() as one:
        while time.monotonic() < end:
            try:
                backends.add(await one.fetchval("SELECT pg_backend_pid()"))
            except LOST as error:
                cut += 1
                note(f"cut in the middle: {type(error).__name__}")
                backends.add(await one.fetchval("SELECT pg_backend_pid()"))
            answers += 1
            await asyncio.sleep(0.05)
    finish(len(backends), answers, cut)


async def main():
    note(f"version {asyncpg.__version__}")
    connection = await asyncpg.connect()
    for part in (values, prepared, transactions, errors, notices, copies, large, cancels):
        await part(connection)
    await connection.close()
    await startup()
    await ended()
    await pools()


asyncio.run(main())
