// Stands before the worker's HTTP for programs that can send no Authorization header: adds the bearer,
// and names the worker as the host wherever they named this proxy. Everything else passes as it is, so
// that what they try with other hosts and origins is the worker's to refuse.
//
//   node bearer-proxy.mjs WORKER_ADDRESS:PORT BEARER_FILE     prints its own ADDRESS:PORT
import { readFileSync } from "node:fs";
import { createServer, request } from "node:http";

const [worker, file] = process.argv.slice(2);
const [hostname, port] = worker.split(":");
const bearer = readFileSync(file, "utf8").trim();
const server = createServer((asked, answer) => {
    const { port: own } = server.address();
    const headers = { ...asked.headers, authorization: `Bearer ${bearer}` };
    headers.host = headers.host?.replace(new RegExp(`^(localhost|127\\.0\\.0\\.1):${own}$`), `$1:${port}`);
    const passed = request({ hostname, port, method: asked.method, path: asked.url, headers }, (got) => {
        answer.writeHead(got.statusCode, got.headers);
        // An event stream begins before its first event.
        answer.flushHeaders();
        got.pipe(answer);
        got.on("error", () => answer.destroy());
    });
    passed.on("error", () => answer.destroy());
    // Whoever leaves here has left the worker too.
    answer.on("close", () => passed.destroy());
    asked.pipe(passed);
});
server.listen(0, "127.0.0.1", () => console.log(`127.0.0.1:${server.address().port}`));
