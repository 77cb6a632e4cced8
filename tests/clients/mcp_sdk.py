"""The Python SDK as a client of the worker: `mcp` 2, and 1. What is asked, and in which order, is the same
in mcp-sdk.mjs.

    python mcp_sdk.py stdio|unix|http 2025-11-25|2026-07-28
"""

import contextlib
import importlib.metadata
import json
import os
import signal
import sys

import anyio
import anyio.abc
import jsonschema
import mcp.types
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage

WAY, VERSION = sys.argv[1:]
MODERN = VERSION == "2026-07-28"
NEW = importlib.metadata.version("mcp").startswith("2.")
if NEW:
    import httpx2 as httpx
    from mcp import Client, MCPError

    parse = mcp.types.jsonrpc_message_adapter.validate_json
else:
    import httpx
    from mcp import ClientSession
    from mcp.shared.exceptions import McpError as MCPError

    parse = mcp.types.JSONRPCMessage.model_validate_json


def say(check, value="ok"):
    """One line of the transcript, as JSON.stringify writes it."""
    print(f"{check}: {json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(',', ':'))}", flush=True)


def heard(result):
    """All that the SDK gave, as a model's host would pass it on."""
    plain = result.model_dump(mode="json", by_alias=True, exclude_none=True)
    # What is null in a row is a value.
    if getattr(result, "structured_content", None) or getattr(result, "structuredContent", None):
        plain["structuredContent"] = result.structured_content if NEW else result.structuredContent
    with open(os.environ["MCP_HEARD"], "a", encoding="utf-8") as file:
        print(json.dumps(plain), file=file)
    return plain


@contextlib.asynccontextmanager
async def unix_client(path):
    """The framing of stdio on a Unix socket, which the SDK has no transport for."""
    incoming, read_stream = anyio.create_memory_object_stream(0)
    write_stream, outgoing = anyio.create_memory_object_stream(0)

    async def reader(stream):
        rest = b""
        with contextlib.suppress(anyio.EndOfStream, anyio.ClosedResourceError):
            async with incoming:
                while True:
                    *lines, rest = (rest + await stream.receive()).split(b"\n")
                    for line in lines:
                        await incoming.send(SessionMessage(parse(line)))

    async def writer(stream):
        async with outgoing:
            async for message in outgoing:
                line = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                await stream.send(line.encode() + b"\n")

    async with await anyio.connect_unix(path) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(reader, stream)
        tasks.start_soon(writer, stream)
        yield read_stream, write_stream
        tasks.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def transport():
    if WAY == "stdio":
        program, *arguments = json.loads(os.environ["MCP_COMMAND"])
        server = StdioServerParameters(command=program, args=arguments, env=dict(os.environ))
        async with stdio_client(server) as streams:
            yield streams
    elif WAY == "unix":
        async with unix_client(os.environ["MCP_SOCKET"]) as streams:
            yield streams
    else:
        with open(os.environ["MCP_BEARER"], encoding="ascii") as file:
            headers = {"Authorization": f"Bearer {file.read().strip()}"}
        async with (
            httpx.AsyncClient(headers=headers, timeout=60) as client,
            streamable_http_client(os.environ["MCP_URL"], http_client=client) as streams,
        ):
            yield streams[:2]


@contextlib.asynccontextmanager
async def connected():
    """A session, the version of the protocol, and what the server says of itself."""
    if NEW:
        async with Client(transport(), mode="auto" if MODERN else "legacy", cache=None) as client:
            yield client, client.protocol_version, client.server_info, client.instructions
    else:
        async with transport() as streams, ClientSession(*streams) as session:
            hello = await session.initialize()
            yield session, hello.protocolVersion, hello.serverInfo, hello.instructions


LOSSLESS = r"""SELECT 9007199254740993::int8 AS big, 12345678901234567890.10::numeric AS exact, 'NaN'::float8 AS nan,
  1.5::float4 AS half, '\xdeadbeef'::bytea AS bytes, '2026-01-02 03:04:05.678+02'::timestamptz AS moment,
  ARRAY[1,NULL,3] AS list, '{"a": [1, null]}'::jsonb AS nested, NULL::text AS nothing, true AS yes, 'aé漢😀' AS text, 1 AS twice, 2 AS twice"""
RUNNING = (
    "SELECT count(*)::int FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%' || 'to be ' || 'cancelled%'"
)


def refuses(schema, value):
    return next(jsonschema.Draft202012Validator(schema).iter_errors(value), None) is not None


def code(content):
    return content.get("error", {}).get("code", "no error")


async def fails(action):
    try:
        heard(await action)
    except MCPError as error:
        return error.error.code
    return "no error"


async def recipe(client):
    async def call(tool, arguments=None, progress=None):
        return heard(await client.call_tool(tool, arguments or {}, progress_callback=progress))

    async def ask(tool, arguments=None):
        return (await call(tool, arguments))["structuredContent"]

    async def sql(text, **more):
        return await ask("execute_sql", {"database": "main_db", "sql": text, **more})

    tools = heard(await client.list_tools())["tools"]
    say("tools", [tool["name"] for tool in tools])
    say(
        "each has a title, hints, and strict schemas",
        all(
            tool["title"]
            and tool["annotations"]["openWorldHint"] is False
            and tool["inputSchema"]["additionalProperties"] is False
            and tool["outputSchema"]["type"] == "object"
            for tool in tools
        ),
    )
    # Results are checked against these schemas by the SDK; here, that the schemas would notice.
    schemas = [tool["outputSchema"] for tool in tools]
    noticed = [refuses(schema, wrong) for schema in schemas for wrong in ({"success": "yes"}, {})]
    say("no output schema takes what is no result", all(noticed))

    connections = (await ask("list_connections"))["connections"]
    main = next(connection for connection in connections if connection["name"] == "main_db")
    say("connection", {key: main[key] for key in ("name", "type", "needs_credential")})

    rows = await sql(LOSSLESS)
    say("columns", [[column["name"], column["type"]] for column in rows["columns"]])
    say("row, lossless", rows["rows"][0])
    numbered = await sql("SELECT $1::int8 + 1, $2::text[], $3::bytea", params=["9007199254740993", ["a", "b"], "3q2+7w=="])
    say("parameters by number", numbered["rows"])
    named = await sql("SELECT :big::int8, :word::text AS word", params={"big": "9007199254740993", "word": "it's"})
    say("parameters by name", named["rows"])
    marked = await call("execute_sql", {"database": "main_db", "sql": "SELECT * FROM people ORDER BY id"})
    text = marked["content"][0]["text"]
    inside = text[text.index(">\n") + 2 : text.rindex("\n</")]
    say("text and structured content are the same", json.loads(inside) == marked["structuredContent"])
    say("what the database wrote is marked", "<untrusted-data-" in text and marked["_meta"]["credbroker/untrusted"] is True)
    say("a table", marked["structuredContent"]["rows"])
    say("csv", (await sql("SELECT id, name FROM people ORDER BY id", format="csv"))["csv"])
    say("description", (await ask("describe_schema", {"database": "main_db", "table": "people"}))["table"]["columns"])
    say("plan", (await ask("explain_query", {"database": "main_db", "query": "SELECT 1"}))["plan"])

    made = await ask("create_credential_token", {"database": "main_db", "expiry_minutes": 5})
    token = made["credential_token"]
    say("a token is used", (await sql("SELECT count(*) FROM people", credential_token=token))["rows"])
    say("a token is revoked", (await ask("revoke_credential_token", {"credential_token": token}))["success"])
    say("a revoked token is refused", code(await sql("SELECT 1", credential_token=token)))
    opened = {"connection_id": (await ask("connect_named_storage", {"connection_name": "main_db"}))["connection_id"]}
    used = await ask("execute_query", {**opened, "query": "SELECT $1::int * 2", "params": [21]})
    say("a connection is used", used["rows"])
    say("a connection is ended", (await ask("disconnect", opened))["success"])
    say("an ended connection is refused", code(await ask("execute_query", {**opened, "query": "SELECT 1"})))

    pages, more = [], {}
    while more is not None and len(pages) < 9:
        page = await sql("SELECT n FROM generate_series(1, 25) AS n ORDER BY n", max_rows=10, **more)
        pages.append([len(page["rows"]), page["rows"][0][0], page["truncated"]])
        more = {"cursor": page["next_cursor"]} if page.get("next_cursor") else None
    say("pages", pages)

    resources = heard(await client.list_resources())["resources"]
    say("a resource of the connection", any(resource["uri"] == "schema://connection/main_db" for resource in resources))
    templates = heard(await client.list_resource_templates())["resourceTemplates"]
    say("templates", [template["uriTemplate"] for template in templates])
    read = heard(await client.read_resource("schema://connection/main_db/public/people"))
    described = json.loads(read["contents"][0]["text"])
    say("a resource is read", [column["name"] for column in described["table"]["columns"]])
    absent = await fails(client.read_resource("schema://connection/nowhere"))
    say("an absent resource has the code of its era", absent == (-32602 if MODERN else -32002))
    say("no prompts", heard(await client.list_prompts())["prompts"])

    divided = await call("execute_sql", {"database": "main_db", "sql": "SELECT 1/0"})
    error = divided["structuredContent"]
    say("an error of the database", [divided["isError"], code(error), error["error"]["sqlstate"]])
    say("a write is refused", code(await sql("DELETE FROM people")))
    say("a second statement is refused", code(await sql("SELECT 1; SELECT 2")))
    typed = {"database": "main_db", "username": "me", "password": "made-up"}
    say("a password is refused", code(await ask("create_credential_token", typed)))
    say("an unknown connection is refused", code(await ask("execute_sql", {"database": "nowhere", "sql": "SELECT 1"})))
    say("an unknown argument is refused", code(await sql("SELECT 1", no_such=1)))
    say("an unknown tool is an error of the protocol", await fails(client.call_tool("no_such", {})))

    reports = []

    async def report(progress, _total, _message):
        reports.append(progress)

    await call("execute_sql", {"database": "main_db", "sql": "SELECT pg_sleep(2.3)::text"}, report)
    say("progress is told, and rises", bool(reports) and all(one < two for one, two in zip(reports, reports[1:])))
    sums = {}

    async def add_up(n):
        sums[n] = (await sql("SELECT sum(g) FROM generate_series(1, $1::int) AS g", params=[n]))["rows"][0][0]

    async with anyio.create_task_group() as tasks:
        for n in range(1, 9):
            tasks.start_soon(add_up, n)
    say("eight at once", [sums[n] for n in range(1, 9)])

    async def within(wanted, seconds):
        end = anyio.current_time() + seconds
        while (await sql(RUNNING))["rows"][0][0] != wanted:
            if anyio.current_time() > end:
                return False
            await anyio.sleep(0.02)
        return True

    request = None

    async def sleep_long():
        nonlocal request
        request = getattr(client, "_request_id", None)
        await sql("SELECT pg_sleep(60)::text /* to be cancelled */")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleep_long)
        say("a long statement runs", await within(1, 10))
        if not NEW:
            # This SDK tells nobody that it has stopped waiting.
            params = mcp.types.CancelledNotificationParams(requestId=request, reason="a test")
            notification = mcp.types.CancelledNotification(method="notifications/cancelled", params=params)
            await client.send_notification(mcp.types.ClientNotification(notification))
        tasks.cancel_scope.cancel()
    say("cancelled, it is gone within a second", await within(0, 1))


async def main():
    async with connected() as (client, negotiated, server, instructions):
        say("the version of the protocol is the one that was asked for", negotiated == VERSION)
        say("server", server.name)
        say("it has instructions", len(instructions) > 100)
        await recipe(client)
        if os.environ.get("MCP_STOP"):
            os.kill(os.getpid(), signal.SIGSTOP)


anyio.run(main)
