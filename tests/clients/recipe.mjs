// What the Node programs here share: the transcript, and how a pool gets its handles.
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";

// A pool lives for this many lifetimes of a handle, and some more.
const LIFETIMES = 3;
// Where nothing expires, less may do.
const SECONDS = Number(process.env.CLIENTS_POOL_SECONDS ?? 7);

// One line of the transcript: what must be the same direct and through the door.
export const say = (check, value = "ok") => console.log(`${check}: ${JSON.stringify(value)}`);
// What may differ. It is shown beside the verdict.
export const note = (text) => console.error(`note: ${text}`);
export const digest = (text) => createHash("sha256").update(text).digest("hex").slice(0, 16);
export { sleep };

// Rejects with the error that `action` must end in.
export const fails = async (action) => {
  try {
    await action();
  } catch (error) {
    return error;
  }
  throw new Error("that should have failed");
};

// [recipe]
const command = process.env.CLIENTS_TOKEN_COMMAND ?? "credbroker --output json handle issue main_db";

// A new handle. Called for each new connection, so that none is opened with an old one.
export const token = async () => {
  const [program, ...args] = command.split(" ");
  const { stdout } = await promisify(execFile)(program, args);
  return JSON.parse(stdout).token;
};
// [end]

// Asks `query` until more than three lifetimes have passed. It gives the backend's pid. What was cut
// in the middle is asked again once, as an application would.
export const outlive = async (query) => {
  const backends = new Set();
  let answers = 0;
  let cut = 0;
  const end = Date.now() + SECONDS * 1000;
  while (Date.now() < end) {
    try {
      backends.add(await query());
    } catch (error) {
      cut += 1;
      note(`cut in the middle: ${error.code ?? error.message}`);
      backends.add(await query());
    }
    answers += 1;
    await sleep(50);
  }
  const expires = process.env.CLIENTS_EXPIRES === "1";
  const enough = expires ? backends.size > LIFETIMES : backends.size === 1;
  say("pool: outlives three lifetimes", enough && answers > 5 ? "ok" : `${backends.size} backends, ${answers} answers`);
  say("pool: errors that a retry does not mend", 0);
  note(`${backends.size} backends, ${cut} errors seen`);
};
