// postgres.js: whatever a proxy could get wrong. Reads PGHOST and its like.
import { readFileSync } from "node:fs";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import postgres from "postgres";
import { digest, fails, note, outlive, say, sleep, token } from "./recipe.mjs";

const told = ({ code, severity, message, position, constraint_name }) => ({ code, severity, message, position, constraint_name });
const packaged = new URL("./node_modules/postgres/package.json", import.meta.url);
note(`version ${JSON.parse(readFileSync(packaged)).version}`);

// [recipe]
// A Unix socket is given as `path`, for which the driver does not read PGHOST.
const path = `${process.env.PGHOST}/.s.PGSQL.${process.env.PGPORT ?? 5432}`;
// [end]
const heard = [];
const sql = postgres({ path, max: 1, onnotice: ({ message }) => heard.push(message) });
const one = async (query) => Object.values((await query)[0])[0];

for (const value of [2 ** 40, 0.1, true, "aé漢😀", new Date(1.7e12), null]) say("value", await one(sql`SELECT ${value} AS v`));
say("bytea", await one(sql`SELECT ${Buffer.from([...Array(256).keys()])}::bytea AS v`));
say("array", await one(sql`SELECT ${[1, 2, 3]}::int[] AS v`));
say("jsonb", await one(sql`SELECT ${sql.json({ a: [1, null] })} AS v`));
say("columns", (await sql`SELECT 1 AS a, 'b'::text AS b`).columns.map(({ name, type }) => [name, type]));
for (let n = 0; n < 8; n += 1) say("prepared", await one(sql`SELECT ${n}::int * 2 AS v`));
say("several statements", (await sql.unsafe("SELECT 1; SELECT 2")).length);

await sql`CREATE TEMP TABLE t (id int PRIMARY KEY, name text)`;
await sql.begin(async (in_transaction) => {
  await in_transaction`INSERT INTO t VALUES (1, 'one')`;
  const error = await fails(() => in_transaction.savepoint((inner) => inner`INSERT INTO t VALUES (1, 'again')`));
  say("unique violation", told(error));
});
say("rolled back", (await fails(() => sql.begin(async (inner) => { await inner`DELETE FROM t`; throw new Error("stop"); }))).message);
say("committed", await sql`SELECT * FROM t`);
for (const statement of ["SELEC 1", "SELECT 1/0", "SELECT * FROM nothing", "SELECT 'x'::int"])
  say(statement, told(await fails(() => sql.unsafe(statement))));
await sql`SET statement_timeout = 50`;
say("statement_timeout", told(await fails(() => sql`SELECT pg_sleep(10)`)));
await sql`RESET statement_timeout`;
heard.length = 0;
await sql.unsafe("DO $$ BEGIN FOR n IN 1..200 LOOP RAISE NOTICE 'number %', n; END LOOP; END $$");
say("notices", [heard.length, heard[0], heard.at(-1)]);

let arrive;
const arrived = new Promise((resolve) => { arrive = resolve; });
const listening = postgres({ path, max: 1 });
const { unlisten } = await listening.listen("news", (payload) => arrive(payload.length));
await sql.notify("news", "n".repeat(7000));
say("notification", await arrived);
await unlisten();
await listening.end({ timeout: 1 });

await sql`CREATE TEMP TABLE c (n int, text text)`;
const rows = Readable.from((function* () { for (let n = 0; n < 100000; n += 1) yield `${n}\trow ${n}\n`; })());
await pipeline(rows, await sql`COPY c FROM STDIN`.writable());
const out = await (await sql`COPY (SELECT * FROM c ORDER BY n) TO STDOUT`.readable()).toArray();
say("copy", digest(Buffer.concat(out)));

const pipelined = await Promise.all([...Array(500).keys()].map((n) => sql`SELECT ${n}::int AS n`));
say("pipelined", pipelined.reduce((all, [{ n }]) => all + n, 0));
const big = await sql`SELECT repeat(md5(n::text), 32) AS t FROM generate_series(1, 50000) AS n`;
say("50 MB at once", digest(big.map(({ t }) => t).join("")));
let sum = 0;
for await (const read of sql`SELECT n FROM generate_series(1, 10000) AS n`.cursor(500)) for (const { n } of read) sum += n;
say("cursor", sum);

const sleeping = sql`SELECT pg_sleep(30)`.execute();
const ended = fails(() => sleeping);
await sleep(300);
sleeping.cancel();
say("cancel", told(await ended));
await sql.end({ timeout: 1 });

const configured = postgres({ path, max: 1, connection: { application_name: "clients", search_path: "pg_catalog", statement_timeout: 4321 } });
say("startup", await configured`SELECT current_setting('application_name') AS a, current_setting('search_path') AS s, current_setting('statement_timeout') AS t`);
say("ended by the server", told(await fails(() => configured`SELECT pg_terminate_backend(pg_backend_pid())`)));
await configured.end({ timeout: 1 });

// [recipe]
const pool = postgres({ path, max: 1, password: token });
// [end]
await outlive(() => one(pool`SELECT pg_backend_pid() AS pid`));
await pool.end({ timeout: 1 });
