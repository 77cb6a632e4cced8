// The TypeScript SDKs as a client of the worker: `@modelcontextprotocol/client`, and the older
// `@modelcontextprotocol/sdk`. What is asked, and in which order, is the same in mcp_sdk.py.
//
//   node mcp-sdk.mjs client|sdk stdio|unix|http 2025-11-25|2026-07-28
import { appendFileSync, readFileSync } from "node:fs";
import { createConnection } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";

const [sdk, way, version] = process.argv.slice(2);
const { MCP_HEARD: heardFile, MCP_SOCKET: socket, MCP_URL: url, MCP_BEARER: bearer } = process.env;
const command = JSON.parse(process.env.MCP_COMMAND);

const packages = {
  client: ["@modelcontextprotocol/client", "@modelcontextprotocol/client/stdio", "@modelcontextprotocol/client", "@modelcontextprotocol/client/validators/ajv"],
  sdk: ["client/index.js", "client/stdio.js", "client/streamableHttp.js", "validation/ajv"].map((path) => `@modelcontextprotocol/sdk/${path}`),
}[sdk];
const [{ Client }, { StdioClientTransport }, { StreamableHTTPClientTransport }, { AjvJsonSchemaValidator }] =
  await Promise.all(packages.map((name) => import(name)));

// The framing of stdio on a Unix socket, which the SDKs have no transport for.
class UnixTransport {
  async start() {
    this.stream = createConnection(socket);
    await new Promise((connected, failed) => this.stream.once("connect", connected).once("error", failed));
    let rest = "";
    this.stream.setEncoding("utf8").on("data", (text) => {
      const lines = (rest + text).split("\n");
      rest = lines.pop();
      for (const line of lines) this.onmessage?.(JSON.parse(line));
    });
    this.stream.on("error", (error) => this.onerror?.(error)).on("close", () => this.onclose?.());
  }
  async send(message) {
    this.stream.write(`${JSON.stringify(message)}\n`);
  }
  async close() {
    this.stream.end();
  }
}

const transport = {
  stdio: () => new StdioClientTransport({ command: command[0], args: command.slice(1), env: { ...process.env }, stderr: "inherit" }),
  unix: () => new UnixTransport(),
  http: () => {
    const Authorization = `Bearer ${readFileSync(bearer, "utf8").trim()}`;
    return new StreamableHTTPClientTransport(new URL(url), { requestInit: { headers: { Authorization } } });
  },
}[way]();

const modern = version === "2026-07-28";
const client = new Client(
  { name: "mcp-clients", version: "1" },
  sdk === "client" ? { versionNegotiation: { mode: modern ? { pin: version } : "legacy" } } : {},
);

// All that the SDK gave, as a model's host would pass it on.
const heard = (thing) => {
  appendFileSync(heardFile, `${JSON.stringify(thing)}\n`);
  return thing;
};
const sorted = (value) => {
  if (Array.isArray(value)) return value.map(sorted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
};
const say = (check, value = "ok") => console.log(`${check}: ${JSON.stringify(sorted(value))}`);
const call = async (name, args = {}, options = {}) => {
  const params = { name, arguments: args };
  return heard(await (sdk === "sdk" ? client.callTool(params, undefined, options) : client.callTool(params, options)));
};
const ask = async (name, args) => (await call(name, args)).structuredContent;
const sql = (text, more = {}) => ask("execute_sql", { database: "main_db", sql: text, ...more });
const code = (content) => content.error?.code ?? "no error";
const fails = async (action) => {
  try {
    heard(await action());
    return "no error";
  } catch (error) {
    heard(error.message);
    return error.code;
  }
};

await client.connect(transport);
const negotiated = sdk === "client" ? client.getNegotiatedProtocolVersion() : version;
say("the version of the protocol is the one that was asked for", negotiated === version);
say("server", client.getServerVersion().name);
say("it has instructions", client.getInstructions().length > 100);

const { tools } = heard(await client.listTools());
say("tools", tools.map((tool) => tool.name));
say("each has a title, hints, and strict schemas", tools.every(({ title, annotations, inputSchema, outputSchema }) =>
  title && annotations.openWorldHint === false && inputSchema.additionalProperties === false && outputSchema.type === "object"));
// Results are checked against these schemas by the SDK; here, that the schemas would notice.
const validators = tools.map((tool) => new AjvJsonSchemaValidator().getValidator(tool.outputSchema));
say("no output schema takes what is no result", validators.every((check) => !check({ success: "yes" }).valid && !check({}).valid));

const { connections } = await ask("list_connections");
const { name, type, needs_credential } = connections.find((connection) => connection.name === "main_db");
say("connection", { name, type, needs_credential });

const lossless = `SELECT 9007199254740993::int8 AS big, 12345678901234567890.10::numeric AS exact, 'NaN'::float8 AS nan,
  1.5::float4 AS half, '\\xdeadbeef'::bytea AS bytes, '2026-01-02 03:04:05.678+02'::timestamptz AS moment,
  ARRAY[1,NULL,3] AS list, '{"a": [1, null]}'::jsonb AS nested, NULL::text AS nothing, true AS yes, 'aé漢😀' AS text, 1 AS twice, 2 AS twice`;
const rows = await sql(lossless);
say("columns", rows.columns.map((column) => [column.name, column.type]));
say("row, lossless", rows.rows[0]);
say("parameters by number", (await sql("SELECT $1::int8 + 1, $2::text[], $3::bytea", { params: ["9007199254740993", ["a", "b"], "3q2+7w=="] })).rows);
say("parameters by name", (await sql("SELECT :big::int8, :word::text AS word", { params: { big: "9007199254740993", word: "it's" } })).rows);
const marked = await call("execute_sql", { database: "main_db", sql: "SELECT * FROM people ORDER BY id" });
const text = marked.content[0].text;
const json = text.slice(text.indexOf(">\n") + 2, text.lastIndexOf("\n</"));
say("text and structured content are the same", JSON.stringify(sorted(JSON.parse(json))) === JSON.stringify(sorted(marked.structuredContent)));
say("what the database wrote is marked", text.includes("<untrusted-data-") && marked._meta["credbroker/untrusted"] === true);
say("a table", marked.structuredContent.rows);
say("csv", (await sql("SELECT id, name FROM people ORDER BY id", { format: "csv" })).csv);
const { table } = await ask("describe_schema", { database: "main_db", table: "people" });
say("description", table.columns);
say("plan", (await ask("explain_query", { database: "main_db", query: "SELECT 1" })).plan);

const token = (await ask("create_credential_token", { database: "main_db", expiry_minutes: 5 })).credential_token;
say("a token is used", (await sql("SELECT count(*) FROM people", { credential_token: token })).rows);
say("a token is revoked", (await ask("revoke_credential_token", { credential_token: token })).success);
say("a revoked token is refused", code(await sql("SELECT 1", { credential_token: token })));
const { connection_id } = await ask("connect_named_storage", { connection_name: "main_db" });
say("a connection is used", (await ask("execute_query", { connection_id, query: "SELECT $1::int * 2", params: [21] })).rows);
say("a connection is ended", (await ask("disconnect", { connection_id })).success);
say("an ended connection is refused", code(await ask("execute_query", { connection_id, query: "SELECT 1" })));

const pages = [];
let cursor;
do {
  const page = await sql("SELECT n FROM generate_series(1, 25) AS n ORDER BY n", { max_rows: 10, ...(cursor ? { cursor } : {}) });
  pages.push([page.rows.length, page.rows[0][0], page.truncated]);
  cursor = page.next_cursor;
} while (cursor && pages.length < 9);
say("pages", pages);

const { resources } = heard(await client.listResources());
say("a resource of the connection", resources.some((resource) => resource.uri === "schema://connection/main_db"));
say("templates", heard(await client.listResourceTemplates()).resourceTemplates.map((template) => template.uriTemplate));
const read = heard(await client.readResource({ uri: "schema://connection/main_db/public/people" }));
say("a resource is read", JSON.parse(read.contents[0].text).table.columns.map((column) => column.name));
const absent = await fails(() => client.readResource({ uri: "schema://connection/nowhere" }));
// The newer SDK makes one code of both.
say("an absent resource has the code of its era", absent === (modern || sdk === "client" ? -32602 : -32002));
say("no prompts", heard(await client.listPrompts()).prompts);

const divided = await call("execute_sql", { database: "main_db", sql: "SELECT 1/0" });
say("an error of the database", [divided.isError, code(divided.structuredContent), divided.structuredContent.error.sqlstate]);
say("a write is refused", code(await sql("DELETE FROM people")));
say("a second statement is refused", code(await sql("SELECT 1; SELECT 2")));
say("a password is refused", code(await ask("create_credential_token", { database: "main_db", username: "me", password: "made-up" })));
say("an unknown connection is refused", code(await sql("SELECT 1", { database: "nowhere" })));
say("an unknown argument is refused", code(await sql("SELECT 1", { no_such: 1 })));
say("an unknown tool is an error of the protocol", await fails(() => client.callTool({ name: "no_such", arguments: {} })));

const reports = [];
await call("execute_sql", { database: "main_db", sql: "SELECT pg_sleep(2.3)::text" }, { onprogress: ({ progress }) => reports.push(progress) });
say("progress is told, and rises", reports.length > 0 && reports.every((report, at) => at === 0 || report > reports[at - 1]));
const sums = await Promise.all([...Array(8).keys()].map((n) => sql("SELECT sum(g) FROM generate_series(1, $1::int) AS g", { params: [n + 1] })));
say("eight at once", sums.map((sum) => sum.rows[0][0]));

const running = async () => {
  const found = await sql("SELECT count(*)::int FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%' || 'to be ' || 'cancelled%'");
  return found.rows[0][0];
};
const within = async (wanted, seconds) => {
  const end = Date.now() + seconds * 1000;
  while ((await running()) !== wanted) {
    if (Date.now() > end) return false;
    await sleep(20);
  }
  return true;
};
const stop = new AbortController();
const cancelled = fails(() => call("execute_sql", { database: "main_db", sql: "SELECT pg_sleep(60)::text /* to be cancelled */" }, { signal: stop.signal }));
say("a long statement runs", await within(1, 10));
stop.abort();
await cancelled;
say("cancelled, it is gone within a second", await within(0, 1));

if (process.env.MCP_STOP) process.kill(process.pid, "SIGSTOP");
await client.close();
