// A person in a headless Chromium, before the page of `credbroker entry`: over the DevTools protocol on
// two pipes. Reads the address, the code, a user name and a password from standard input, a line each;
// leaves a picture of the page in $HOME/page.png. Fails at the first thing that is not as it should be.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";

const [url, code, username, password] = readFileSync(0, "utf8").split("\n");
const origin = new URL(url).origin;
const home = process.env.HOME;

// The sandbox of Chromium needs namespaces that a container may not give.
const chromium = spawn("chromium", [
  "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars",
  "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage",
  `--user-data-dir=${home}/profile`, "about:blank",
], { stdio: ["ignore", "ignore", "pipe", "pipe", "pipe"] });
process.on("exit", () => chromium.kill("SIGKILL"));
let complaints = "";
chromium.stderr.on("data", (data) => (complaints += data));
chromium.on("exit", (status) => assert.fail(`Chromium ended (${status}): ${complaints}`));

// Commands are answered by their number; events are kept, and waited for.
let last = 0;
const answers = new Map();
const events = [];
const waiting = new Set();
let unread = Buffer.alloc(0);
chromium.stdio[4].on("data", (data) => {
  unread = Buffer.concat([unread, data]);
  for (let end = unread.indexOf(0); end >= 0; end = unread.indexOf(0)) {
    const message = JSON.parse(unread.subarray(0, end));
    unread = unread.subarray(end + 1);
    if (message.id) {
      const { resolve, reject } = answers.get(message.id);
      message.error ? reject(new Error(message.error.message)) : resolve(message.result);
    } else {
      events.push(message);
      waiting.forEach((look) => look());
    }
  }
});
let sessionId;
function send(method, params = {}) {
  const id = ++last;
  chromium.stdio[3].write(JSON.stringify({ id, method, params, sessionId }) + "\0");
  return new Promise((resolve, reject) => answers.set(id, { resolve, reject }));
}
function event(method, from = 0) {
  return new Promise((resolve) => {
    const look = () => {
      const found = events.slice(from).find((message) => message.method === method);
      if (found) waiting.delete(look), resolve(found.params);
    };
    waiting.add(look);
    look();
  });
}
const all = (method) => events.filter((message) => message.method === method).map(({ params }) => params);
async function evaluate(expression) {
  const { result } = await send("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
  return result.value;
}
async function node(selector) {
  const { root } = await send("DOM.getDocument");
  const { nodeId } = await send("DOM.querySelector", { nodeId: root.nodeId, selector });
  assert.ok(nodeId, `no ${selector}`);
  return nodeId;
}
async function type(selector, text) {
  await send("DOM.focus", { nodeId: await node(selector) });
  await send("Input.insertText", { text });
}
async function submit() {
  const { model } = await send("DOM.getBoxModel", { nodeId: await node("button") });
  const [left, top, , , right, bottom] = model.content;
  const place = { x: (left + right) / 2, y: (top + bottom) / 2, button: "left", clickCount: 1 };
  const from = events.length;
  await send("Input.dispatchMouseEvent", { type: "mousePressed", ...place });
  await send("Input.dispatchMouseEvent", { type: "mouseReleased", ...place });
  await event("Page.loadEventFired", from);
}
async function text() {
  return (await send("DOM.getOuterHTML", { nodeId: await node("main") })).outerHTML;
}

const { targetId } = await send("Target.createTarget", { url: "about:blank" });
({ sessionId } = await send("Target.attachToTarget", { targetId, flatten: true }));
for (const domain of ["Page", "Network", "Runtime", "DOM", "Log", "Accessibility"]) await send(`${domain}.enable`);
const screen = { width: 680, height: 900, deviceScaleFactor: 1, mobile: false };
await send("Emulation.setDeviceMetricsOverride", screen);
const media = [{ name: "prefers-color-scheme", value: "light" }];
await send("Emulation.setEmulatedMedia", { features: media });
let from = events.length;
await send("Page.navigate", { url });
await event("Page.loadEventFired", from);

// What came, and how.
const { response } = await event("Network.responseReceived");
const header = (name) => Object.entries(response.headers).find(([own]) => own.toLowerCase() === name)?.[1];
assert.equal(response.status, 200);
const policy = header("content-security-policy");
assert.match(policy, /^default-src 'none'; style-src 'sha256-[\w+/]{43}='; form-action 'self';/);
assert.match(policy, /frame-ancestors 'none'; base-uri 'none'$/);
assert.equal(header("cache-control"), "no-store");
assert.equal(header("x-content-type-options"), "nosniff");
assert.equal(header("set-cookie"), undefined);
assert.equal(await evaluate("document.scripts.length"), 0);

// The browser keeps the policy: our style is used, and no script and no request gets out of the page.
assert.notEqual(await evaluate("getComputedStyle(document.querySelector('main')).maxWidth"), "none");
await evaluate(`{const script = document.createElement("script"); script.textContent = "window.ran = 1";
  document.body.append(script)}`);
assert.equal(await evaluate("typeof window.ran"), "undefined");
assert.equal(await evaluate(`fetch("${url}").then(() => "fetched", () => "refused")`), "refused");
assert.equal(await evaluate(`new Promise((resolve) => {const image = new Image();
  image.onload = () => resolve("loaded"); image.onerror = () => resolve("refused");
  image.src = "${origin}/favicon.ico"})`), "refused");
// Seen again as it came.
from = events.length;
await send("Page.reload");
await event("Page.loadEventFired", from);

// Who cannot see it is told what each field is.
const { nodes } = await send("Accessibility.getFullAXTree");
const named = (role) => nodes.filter((node) => node.role?.value === role).map((node) => node.name?.value);
assert.deepEqual(named("textbox"),
  ["Code that the terminal shows", "User name", "Password for stored_db", "The same again"]);
assert.deepEqual(named("button"), ["Store it"]);

// From here on no script runs at all.
await send("Emulation.setScriptExecutionDisabled", { value: true });
const fill = async (typed) => {
  await type("#code", typed);
  await type("#username", username);
  await type("#secret", password);
  await type("#again", password);
};
await fill("222-222");
await submit();
assert.match(await text(), /role="alert">That is not the code\. 4 more tries\./);
assert.ok(!(await text()).includes(password), "nothing comes back");

from = events.length;
await send("Page.navigate", { url });
await event("Page.loadEventFired", from);
await fill(code);
await send("Page.bringToFront");
const { cssContentSize } = await send("Page.getLayoutMetrics");
const clip = { x: 0, y: 0, width: screen.width, height: Math.ceil(cssContentSize.height), scale: 1 };
const { data } = await send("Page.captureScreenshot", { format: "png", clip, captureBeyondViewport: true });
writeFileSync(`${home}/page.png`, Buffer.from(data, "base64"));
await submit();
assert.match(await text(), /Stored.*version 1 for stored_db/s);

// All that was asked of anybody was asked of the page's own host.
for (const { request } of all("Network.requestWillBeSent")) {
  assert.ok(request.url.startsWith(`${origin}/`) || request.url === "about:blank", request.url);
}
process.exit(0);
