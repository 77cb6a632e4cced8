// Counts what a run of the conformance suite saved, and tells whether each failure is one that needs a
// fixture: those named in LIST, by their check.
//
//   node conformance-verdict.mjs FOLDER [LIST]     prints PASSED FIXTURES OTHERS
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

const [folder, list] = process.argv.slice(2);
const needed = new Set(list ? readFileSync(list, "utf8").split("\n").filter((line) => line && !line.startsWith("#")) : []);
const files = readdirSync(folder, { recursive: true }).filter((file) => file.endsWith("checks.json"));
const checks = files.flatMap((file) => JSON.parse(readFileSync(join(folder, file), "utf8")).map((check) => ({ file, ...check })));
const passed = checks.filter(({ status }) => status === "SUCCESS");
const failed = checks.filter(({ status }) => status === "FAILURE");
const others = failed.filter(({ id }) => !needed.has(id));
for (const { file, id, errorMessage } of others) console.error(`${file}: ${id}: ${errorMessage}`);
// With fixtures, what is only recommended is looked at too, and the one check that says no more than INFO
// when it was not made.
const unmade = ({ id, status }) => status === "INFO" && id === "server-sse-disconnect-resume";
const weak = (check) => check.status === "WARNING" || check.status === "SKIPPED" || unmade(check);
const warned = list ? [] : checks.filter(weak);
for (const { id, status, errorMessage, details } of warned) console.error(`${id}: ${status}: ${errorMessage ?? details?.message}`);
console.log(passed.length, failed.length - others.length, others.length + warned.length);
