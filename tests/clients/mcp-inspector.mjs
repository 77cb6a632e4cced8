// The MCP Inspector's command line as a client of the worker: one process, one request.
//
//   node mcp-inspector.mjs INSPECTOR stdio|unix|http 2025-11-25|2026-07-28
import { spawnSync } from "node:child_process";
import { appendFileSync, readFileSync } from "node:fs";

const [inspector, way, version] = process.argv.slice(2);
const { MCP_HEARD: heardFile, MCP_SOCKET: socket, MCP_URL: url, MCP_BEARER: bearer, CREDBROKER_SERVER_UID: uid } = process.env;
const target = {
  stdio: () => [...JSON.parse(process.env.MCP_COMMAND), "-e", `CREDBROKER_SERVER_UID=${uid}`],
  unix: () => ["socat", "-", `UNIX-CONNECT:${socket}`],
  http: () => ["--transport", "http", "--server-url", url, "--header", `Authorization: Bearer ${readFileSync(bearer, "utf8").trim()}`],
}[way]();
const era = version === "2026-07-28" ? "modern" : "legacy";

const say = (check, value = "ok") => console.log(`${check}: ${JSON.stringify(value)}`);
const ask = (method, ...more) => {
  const args = [inspector, "--cli", ...target, "--protocol-era", era, "--format", "json", "--method", method, ...more];
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8", timeout: 60_000 });
  appendFileSync(heardFile, `${stdout}${stderr}\n`);
  process.stderr.write(stderr);
  // A failure is an object on standard error, after what the worker logs there; a result may stand beside it.
  const last = (text) => JSON.parse(text.trim().split("\n").findLast((line) => line.startsWith("{")) ?? "{}");
  return { status, stderr, ...(status === 0 ? {} : last(stderr)), ...last(stdout) };
};
const call = (name, args) => ask("tools/call", "--tool-name", name, "--tool-args-json", JSON.stringify(args));

const listed = ask("tools/list", "--strict");
say("strict: no schema is without portability", listed.status === 0 && !/schema/i.test(listed.stderr));
say("tools", listed.result.tools.map((tool) => tool.name));
const rows = call("execute_sql", { database: "main_db", sql: "SELECT $1::int8 + 1 AS big, 'aé漢😀' AS text", params: ["9007199254740992"] });
say("a call", rows.result.structuredContent.rows);
const table = call("describe_schema", { database: "main_db", table: "people" });
say("description", table.result.structuredContent.table.columns.map((column) => column.name));
const failed = call("execute_sql", { database: "main_db", sql: "SELECT 1/0" });
say("an error is told as one", [failed.status, failed.error.code, failed.result.structuredContent.error.sqlstate]);
say("resources", ask("resources/list").result.resources.map(({ uri }) => uri).filter((uri) => uri.endsWith("/main_db")));
say("templates", ask("resources/templates/list").result.resourceTemplates.map(({ uriTemplate }) => uriTemplate));
const read = ask("resources/read", "--uri", "schema://connection/main_db/public/people");
say("a resource is read", JSON.parse(read.result.contents[0].text).table.name);
say("no prompts", ask("prompts/list").result.prompts);
