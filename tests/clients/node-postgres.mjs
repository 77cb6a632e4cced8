// node-postgres (pg): whatever a proxy could get wrong. Reads PGHOST and its like.
import { pipeline } from "node:stream/promises";
import { PassThrough, Readable } from "node:stream";
import { readFileSync } from "node:fs";
import pg from "pg";
import Cursor from "pg-cursor";
import { from as copyFrom, to as copyTo } from "pg-copy-streams";
import { digest, fails, note, outlive, say, sleep, token } from "./recipe.mjs";

const told = ({ code, severity, message, position, constraint }) => ({ code, severity, message, position, constraint });
const packaged = new URL("./node_modules/pg/package.json", import.meta.url);
note(`version ${JSON.parse(readFileSync(packaged)).version}`);

const client = new pg.Client();
await client.connect();
const one = async (...query) => Object.values((await client.query(...query)).rows[0])[0];

const values = [
  ["int8", "4611686018427387904"], ["float8", 0.1], ["numeric", "12345678901234567890.123"], ["bool", true],
  ["text", "aé漢😀"], ["bytea", Buffer.from([...Array(256).keys()])], ["timestamptz", new Date(1.7e12)],
  ["uuid", "00000000-0000-0000-0000-000000000007"], ["int4[]", [1, null, 3]], ["jsonb", { a: [1, null] }], ["text", null],
];
for (const [type, value] of values) say(type, await one(`SELECT $1::${type} AS v`, [value]));
say("binary", (await client.query({ text: "SELECT $1::int4 AS v, 'x'::bytea AS b", values: [7], binary: true })).rows[0].v);
const fields = (await client.query("SELECT 1 AS a, 'b'::text AS b, NULL::jsonb AS c")).fields;
say("fields", fields.map(({ name, dataTypeID }) => [name, dataTypeID]));
for (let n = 0; n < 8; n += 1) say("prepared", await one({ name: "twice", text: "SELECT $1::int * 2 AS v", values: [n] }));
say("several statements", (await client.query("SELECT 1; SELECT 2; SELECT 3")).map(({ rowCount }) => rowCount));

await client.query("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)");
await client.query("BEGIN");
await client.query("INSERT INTO t VALUES (1, 'one')");
await client.query("SAVEPOINT a");
say("unique violation", told(await fails(() => client.query("INSERT INTO t VALUES (1, 'again')"))));
say("in a failed transaction", told(await fails(() => client.query("SELECT 1"))));
await client.query("ROLLBACK TO a");
await client.query("COMMIT");
say("committed", (await client.query("SELECT * FROM t")).rows);
for (const sql of ["SELEC 1", "SELECT 1/0", "SELECT * FROM nothing", "SELECT 'x'::int"])
  say(sql, told(await fails(() => client.query(sql))));
await client.query("SET statement_timeout = 50");
say("statement_timeout", told(await fails(() => client.query("SELECT pg_sleep(10)"))));
await client.query("RESET statement_timeout");

const heard = [];
client.on("notice", ({ message }) => heard.push(message));
await client.query("DO $$ BEGIN FOR n IN 1..200 LOOP RAISE NOTICE 'number %', n; END LOOP; END $$");
say("notices", [heard.length, heard[0], heard.at(-1)]);
await client.query("LISTEN news");
const arrived = new Promise((resolve) => client.once("notification", resolve));
const other = new pg.Client();
await other.connect();
await other.query("SELECT pg_notify('news', repeat('n', 7000))");
const { channel, payload } = await arrived;
say("notification", [channel, payload.length]);

await client.query("CREATE TEMP TABLE c (n int, text text)");
const rows = Readable.from((function* () { for (let n = 0; n < 100000; n += 1) yield `${n}\trow ${n}\n`; })());
await pipeline(rows, client.query(copyFrom("COPY c FROM STDIN")));
const out = new PassThrough();
const collected = out.toArray();
await pipeline(client.query(copyTo("COPY (SELECT * FROM c ORDER BY n) TO STDOUT")), out);
say("copy", digest(Buffer.concat(await collected)));
say("copy in, wrong", (await fails(() => pipeline(Readable.from(["not a number\tx\n"]), client.query(copyFrom("COPY c FROM STDIN"))))).code);
say("after it", await one("SELECT count(*) FROM c"));

const big = await client.query("SELECT repeat(md5(n::text), 32) AS t FROM generate_series(1, 50000) AS n");
say("50 MB at once", digest(big.rows.map(({ t }) => t).join("")));
const blob = Buffer.alloc(16 << 20, "0123456789abcdef");
say("16 MiB both ways", blob.equals(await one("SELECT $1::bytea AS v", [blob])));
const cursor = client.query(new Cursor("SELECT n FROM generate_series(1, 10000) AS n"));
let sum = 0;
for (let read = await cursor.read(500); read.length > 0; read = await cursor.read(500)) sum += read.reduce((all, { n }) => all + n, 0);
await cursor.close();
say("cursor", sum);

// pg has no public cancel; this is how its own Client does it.
const sleeping = fails(() => client.query("SELECT pg_sleep(30)"));
await sleep(300);
const canceller = new pg.Client();
canceller.connection.on("connect", () => canceller.connection.cancel(client.processID, client.secretKey));
canceller.connection.on("error", () => {});
canceller.connection.connect(client.host.startsWith("/") ? `${client.host}/.s.PGSQL.${client.port}` : client.port, client.host);
say("cancel", told(await sleeping));
await client.end();
await other.end();

const configured = new pg.Client({ application_name: "clients", options: "-c search_path=pg_catalog", statement_timeout: 4321 });
await configured.connect();
const shown = await configured.query("SELECT current_setting('application_name') AS a, current_setting('search_path') AS s, current_setting('statement_timeout') AS t");
say("startup", shown.rows[0]);
configured.on("error", () => {});
say("ended by the server", told(await fails(() => configured.query("SELECT pg_terminate_backend(pg_backend_pid())"))));

// [recipe]
const pool = new pg.Pool({ password: token, max: 1 });
// An idle connection whose handle has ended says so here; the pool then opens another one.
pool.on("error", () => {});
// [end]
await outlive(async () => (await pool.query("SELECT pg_backend_pid() AS pid")).rows[0].pid);
await pool.end();
