"""dbhub and postgres-mcp, as an MCP host starts them: over the standard streams."""

import json
import os
import subprocess
import sys

from recipe import note, say

NAME, CACHE = sys.argv[1:]
if NAME == "dbhub":
    # [recipe]
    # Its URL has no room for the directory of a socket. What the URL leaves out, the driver takes from
    # PGHOST, PGUSER and PGPASSWORD.
    url = "postgres://:{port}/{database}"
    # [end]
    url = url.format(port=os.environ["PGPORT"], database=os.environ["PGDATABASE"])
    package = f"{CACHE}/dbhub/node_modules/@bytebase/dbhub"
    command = ["node", f"{package}/dist/index.js", "--transport", "stdio", "--dsn", url]
    with open(f"{package}/package.json", encoding="utf-8") as file:
        note(f"version {json.load(file)['version']}")
    tool, argument = "execute_sql", "sql"
else:
    ask_version = "import importlib.metadata as m; print(m.version('postgres-mcp'))"
    asked = subprocess.run([f"{CACHE}/mcp/bin/python", "-c", ask_version], capture_output=True, text=True, check=True)
    note(f"version {asked.stdout.strip()}")
    url = os.environ["DATABASE_URL"]
    command = [f"{CACHE}/mcp/bin/postgres-mcp", "--access-mode=unrestricted", "--transport=stdio"]
    tool, argument = "execute_sql", "sql"

server = subprocess.Popen(
    command,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, "DATABASE_URI": url},
    text=True,
)
number = 0


def ask(method, params):
    global number
    number += 1
    tell({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
    for line in server.stdout:
        message = json.loads(line)
        if message.get("id") == number and "method" not in message:
            return message
    raise EOFError(f"{NAME} ended")


def tell(message):
    server.stdin.write(json.dumps(message) + "\n")
    server.stdin.flush()


client = {"name": "clients", "version": "1"}
ask("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client})
tell({"jsonrpc": "2.0", "method": "notifications/initialized"})
say("tools", sorted(tool["name"] for tool in ask("tools/list", {})["result"]["tools"]))
for sql in (
    "SELECT 1 AS one, 'aé漢😀' AS text, NULL AS nothing, 12345678901234567890.123::numeric AS number",
    "SELECT count(*), sum(n) FROM generate_series(1, 10000) AS n",
    "SELECT 1/0",
    "SELEC 1",
):
    answer = ask("tools/call", {"name": tool, "arguments": {argument: sql}})["result"]
    say(sql, [part.get("text") for part in answer["content"]])
server.stdin.close()
try:
    server.wait(10)
except subprocess.TimeoutExpired:
    server.kill()
