// The published npm `e2b`, unmodified, against our guest agent: what the files of tests share.
//
//     node ── e2b (debug mode) ── HTTP on a free port of loopback ── envd agent, in namespaces of its own
//
// The agent gets its own view of /etc/passwd, /etc/group and /home, with the user that E2B's templates have, as for the
// Python tests (`../conftest.py`, `../agent.sh`).
//
// Environment: `ENVD` names the program to test, `MODULES` the directory with `node_modules`, `STATE` an empty directory.

import { spawn } from "node:child_process";
import { chownSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { after } from "node:test";
import { fileURLToPath } from "node:url";
import assert from "node:assert/strict";

const USER_ID = 54321;
const PATIENCE = 30_000;
const NAMESPACES = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"];

export const e2b = createRequire(`${process.env.MODULES}/package.json`)("e2b");

/** An agent for the tests of a file, which is told these values in its /init and ends after them: its address. */
export async function start(name, values) {
  const state = `${process.env.STATE}/${name}`;
  mkdirSync(`${state}/home/user`, { recursive: true });
  chownSync(`${state}/home/user`, USER_ID, USER_ID);
  const user = `user:x:${USER_ID}:${USER_ID}::/home/user:/bin/bash\n`;
  writeFileSync(`${state}/passwd`, readFileSync("/etc/passwd", "utf8") + user);
  writeFileSync(`${state}/group`, `${readFileSync("/etc/group", "utf8")}user:x:${USER_ID}:\n`);
  const script = fileURLToPath(new URL("../agent.sh", import.meta.url));
  const child = spawn("unshare", [...NAMESPACES, "sh", script], {
    stdio: ["ignore", "pipe", "inherit"],
    env: { ...process.env, STATE: state },
  });
  const ended = new Promise((resolve) => child.once("exit", resolve));
  after(async () => {
    child.kill("SIGKILL");
    await ended;
  });
  const [line] = await Promise.race([
    new Promise((resolve) => createInterface(child.stdout).once("line", (line) => resolve([line]))),
    ended.then((code) => assert.fail(`the agent ended with ${code}`)),
  ]);
  const url = `http://${JSON.parse(line).address}`;
  const answer = await fetch(`${url}/init`, {
    method: "POST",
    body: JSON.stringify({ defaultUser: "user", ...values }),
    headers: { "content-type": "application/json" },
  });
  assert.equal(answer.status, 204);
  return url;
}

/** A sandbox of the SDK that is the agent behind an address. */
export const open = (sandboxUrl) => e2b.Sandbox.create({ debug: true, sandboxUrl });

/** The same with a token, as the API hands it out with a sandbox. */
export const openWith = (sandboxUrl, envdAccessToken) =>
  new e2b.Sandbox({ sandboxId: "debug_sandbox_id", envdVersion: "0.6.13", envdAccessToken, debug: true, sandboxUrl });

let directories = 0;
/** A new directory of the user. */
export async function directory({ files }) {
  directories += 1;
  const path = `/home/user/directory-${directories}`;
  assert.equal(await files.makeDir(path), true);
  return path;
}

/** Waits until the condition holds and gives what it gave. */
export async function waitFor(what, condition) {
  const end = Date.now() + PATIENCE;
  for (;;) {
    const value = await condition();
    if (value) return value;
    assert.ok(Date.now() < end, `waited in vain for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** A promise, and what fulfils it. */
export function promised() {
  let fulfil;
  const promise = new Promise((resolve) => (fulfil = resolve));
  return { promise, fulfil };
}

/** What a promise was rejected with, which has to be of a class of the SDK. */
export async function refused(kind, promise) {
  const error = await promise.then(() => assert.fail("it was not refused"), (error) => error);
  assert.ok(error instanceof kind, `${kind.name} was expected: ${error?.stack}`);
  return error;
}

/** Bytes of every value. */
export const everyByte = (length) => Uint8Array.from({ length }, (_, index) => (index * 7 + (index >> 8)) & 255);
