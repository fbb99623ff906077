// Terminals: size, input, ends, and coming back to one.

import { createHash } from "node:crypto";
import { test } from "node:test";
import assert from "node:assert/strict";
import { e2b, open, refused, start, waitFor } from "./agent.mjs";

const { CommandExitError, NotFoundError } = e2b;
const NOBODY = 4_194_000;
const bytes = (text) => new TextEncoder().encode(text);

const sandbox = await open(await start("pty"));
const { pty } = sandbox;

/** A terminal, or another look at one that is there, and what it printed since. */
async function terminal(options = {}, attach) {
  const pieces = [];
  const onData = (data) => void pieces.push(data);
  const handle =
    attach === undefined
      ? await pty.create({ cols: 80, rows: 24, timeoutMs: 60_000, onData, ...options })
      : await pty.connect(attach, { onData });
  const output = () => Buffer.concat(pieces).toString();
  return {
    handle,
    pid: handle.pid,
    output,
    type: (text) => pty.sendInput(handle.pid, bytes(text)),
    until: (text) => waitFor(`${text} on the terminal`, () => output().includes(text)),
  };
}

test("a terminal is one", async () => {
  const it = await terminal({ cols: 97, rows: 31, envs: { OURS: "1" }, cwd: "/usr" });
  await it.type("tty; stty size; echo $TERM-$OURS-$PWD; id -un\n");
  await it.until("31 97");
  await it.until("xterm-256color-1-/usr");
  await it.until("\nuser");
  assert.match(it.output(), /\/dev\/pts\//);
  await it.type("exit\n");
  assert.equal((await it.handle.wait()).exitCode, 0);
});

test("another user has a terminal too", async () => {
  const it = await terminal({ user: "root" });
  await it.type("echo I-am-$(id -un)\n");
  await it.until("I-am-root");
  assert.equal(await it.handle.kill(), true);
});

test("a program notices a new size", async () => {
  const it = await terminal();
  await it.type("trap 'stty size' WINCH; echo rea''dy\n");
  await it.until("ready");
  await pty.resize(it.pid, { cols: 123, rows: 11 });
  await it.type("\n");
  await it.until("11 123");
  assert.equal(await pty.kill(it.pid), true);
});

test("a key interrupts", async () => {
  const it = await terminal();
  // It says so itself, because only then it is in front.
  await it.type("sh -c \"echo rea''dy; exec sleep 1000\"\n");
  await it.until("ready");
  await it.type("\x03");
  await it.until("^C");
  await it.type("echo al''ive\n");
  await it.until("alive");
  assert.equal(await pty.kill(it.pid), true);
});

test("an exit code comes from the shell", async () => {
  const it = await terminal();
  await it.type("exit 17\n");
  assert.equal((await refused(CommandExitError, it.handle.wait())).exitCode, 17);
});

test("every byte goes both ways", async () => {
  const it = await terminal();
  await it.type("stty raw -echo; echo rea''dy; head -c 256 | od -An -v -tu1 | tr -s ' \\n' ' '; stty sane\n");
  await it.until("ready");
  await pty.sendInput(it.pid, Uint8Array.from({ length: 256 }, (_, value) => value));
  await it.until(Array.from({ length: 256 }, (_, value) => ` ${value}`).join(""));
  assert.equal(await pty.kill(it.pid), true);
});

test("a megabyte of input loses nothing", async () => {
  const it = await terminal();
  const pieces = Array.from({ length: 16 }, (_, number) => `${number % 10}`.repeat(65_536));
  await it.type(`stty -echo -icanon; echo rea''dy; head -c ${16 * 65_536} | sha256sum\n`);
  await it.until("ready");
  for (const piece of pieces) await it.type(piece);
  await it.until(createHash("sha256").update(pieces.join("")).digest("hex"));
  assert.equal(await pty.kill(it.pid), true);
});

test("a terminal waits for its user to come back", async () => {
  const first = await terminal();
  await first.type("VALUE=kept; echo o''ne\n");
  await first.until("one");
  await first.handle.disconnect();
  const second = await terminal({}, first.pid);
  assert.equal(second.pid, first.pid);
  await second.type("echo again-$VALUE\n");
  await second.until("again-kept");
  await second.type("exit\n");
  assert.equal((await second.handle.wait()).exitCode, 0);
});

test("a killed terminal is gone at once", async () => {
  const it = await terminal();
  assert.equal(await pty.kill(it.pid), true);
  await refused(CommandExitError, sandbox.commands.run(`kill -0 ${it.pid}`));
  assert.equal((await refused(CommandExitError, it.handle.wait())).exitCode, -1);
  assert.equal(await pty.kill(it.pid), false);
});

test("nobody has no terminal", async () => {
  await refused(NotFoundError, pty.resize(NOBODY, { cols: 1, rows: 1 }));
  await refused(NotFoundError, pty.sendInput(NOBODY, bytes("x")));
  await refused(NotFoundError, pty.connect(NOBODY));
});

test("terminals do not hear each other", async () => {
  const all = await Promise.all(Array.from({ length: 8 }, () => terminal()));
  await Promise.all(all.map((it, number) => it.type(`echo this-is-$((${number} + 100))\n`)));
  for (const [number, it] of all.entries()) {
    await it.until(`this-is-${number + 100}`);
    assert.ok(all.every((_, other) => other === number || !it.output().includes(`this-is-${other + 100}`)));
    assert.equal(await pty.kill(it.pid), true);
  }
  const pids = new Set(all.map(({ pid }) => pid));
  await waitFor("all to be gone", async () => (await sandbox.commands.list()).every(({ pid }) => !pids.has(pid)));
});
