// Programs: output, input, ends, and what is around them.

import { createHash } from "node:crypto";
import { test } from "node:test";
import assert from "node:assert/strict";
import { e2b, open, promised, refused, start, waitFor } from "./agent.mjs";

const { AuthenticationError, CommandExitError, InvalidArgumentError, NotFoundError, TimeoutError } = e2b;
const NOBODY = 4_194_000;
const numbers = (last) => Array.from({ length: last }, (_, index) => `${index + 1}\n`).join("");

const sandbox = await open(await start("commands", { envVars: { FROM_THE_TEMPLATE: "yes" } }));
const { commands } = sandbox;

const background = (command, options) => commands.run(command, { background: true, ...options });

test("the agent is running", async () => {
  assert.equal(await sandbox.isRunning(), true);
});

test("output and errors are apart", async () => {
  const { stdout, stderr, exitCode, error } = await commands.run("echo out; echo err >&2");
  assert.deepEqual([stdout, stderr, exitCode, error], ["out\n", "err\n", 0, undefined]);
});

test("an exit code becomes an error", async () => {
  const error = await refused(CommandExitError, commands.run("echo before; echo bad >&2; exit 42"));
  assert.deepEqual([error.exitCode, error.stdout, error.stderr], [42, "before\n", "bad\n"]);
  assert.equal(error.error, "exit status 42");
});

test("a signal is no exit code", async () => {
  const error = await refused(CommandExitError, commands.run("kill -KILL $$"));
  assert.deepEqual([error.exitCode, error.error], [-1, "signal: killed"]);
});

test("much output arrives whole and in order", async () => {
  const pieces = [];
  const result = await commands.run("seq 1 200000", { onStdout: (text) => pieces.push(text) });
  assert.ok(pieces.length > 1, "it came as one piece");
  assert.ok(pieces.join("") === numbers(200_000), "the pieces are not what was printed");
  assert.ok(result.stdout === pieces.join(""), "the result is not what the pieces are");
});

test("output comes while the program runs", async () => {
  const first = promised();
  const handle = await background("echo first; read line; echo got $line >&2", { stdin: true, onStdout: first.fulfil });
  assert.equal(await first.promise, "first\n");
  await handle.sendStdin("hello\n");
  const result = await handle.wait();
  assert.deepEqual([result.stdout, result.stderr], ["first\n", "got hello\n"]);
});

test("text split in the middle of a letter is joined", async () => {
  assert.equal((await commands.run("printf '\\xe2\\x82'; sleep 0.2; printf '\\xac'")).stdout, "€");
});

test("bytes that are no text are replaced and not lost", async () => {
  const { stdout } = await commands.run("printf 'a\\xffb'; printf '\\x00\\xff' | base64");
  assert.equal(stdout, "a\u{fffd}bAP8=\n");
});

test("a grandchild that holds the output does not delay the end", async () => {
  assert.equal((await commands.run("sleep 100 & echo done", { timeoutMs: 20_000 })).stdout, "done\n");
});

test("any text goes through", async () => {
  for (const TEXT of ["'quoted' \"twice\" $HOME `x` \\ * ~", "süß 漢字 🦀", "line\nline\n\ttab"]) {
    assert.equal((await commands.run('printf %s "$TEXT"', { envs: { TEXT } })).stdout, TEXT);
  }
});

test("environment is layered and does not leak", async () => {
  const shown = "echo $FROM_THE_TEMPLATE $OURS $USER $HOME";
  assert.equal((await commands.run(shown, { envs: { OURS: "1" } })).stdout, "yes 1 user /home/user\n");
  assert.equal((await commands.run(shown)).stdout, "yes user /home/user\n");
  const over = await commands.run(shown, { envs: { FROM_THE_TEMPLATE: "no" } });
  assert.equal(over.stdout, "no user /home/user\n");
});

test("a program starts at home or where it is told", async () => {
  assert.equal((await commands.run("pwd")).stdout, "/home/user\n");
  assert.equal((await commands.run("pwd", { cwd: "/usr" })).stdout, "/usr\n");
  const error = await refused(InvalidArgumentError, commands.run("pwd", { cwd: "/not/there" }));
  assert.match(error.message, /does not exist/);
});

test("another user", async () => {
  assert.equal((await commands.run("id -un")).stdout, "user\n");
  assert.equal((await commands.run("id -un; id -G; pwd", { user: "root" })).stdout, "root\n0\n/root\n");
  const error = await refused(AuthenticationError, commands.run("id", { user: "nobody-we-know" }));
  assert.match(error.message, /invalid username: 'nobody-we-know'/);
});

test("input until it is closed", async () => {
  const handle = await background("sort", { stdin: true });
  await handle.sendStdin("b\n");
  await handle.sendStdin(new TextEncoder().encode("a\n"));
  await handle.closeStdin();
  assert.equal((await handle.wait()).stdout, "a\nb\n");
});

test("without input a program reads nothing", async () => {
  assert.equal((await commands.run("cat; echo end")).stdout, "end\n");
});

test("input keeps its order", async () => {
  const handle = await background("sha256sum", { stdin: true });
  const pieces = Array.from({ length: 100 }, (_, number) => `${number}\n`.repeat(500));
  for (const piece of pieces) await commands.sendStdin(handle.pid, piece);
  await commands.closeStdin(handle.pid);
  const expected = createHash("sha256").update(pieces.join("")).digest("hex");
  assert.equal((await handle.wait()).stdout.split(" ")[0], expected);
});

test("a megabyte of input in one message", async () => {
  const handle = await background("sha256sum", { stdin: true });
  const input = "0123456789abcde\n".repeat(65_536);
  await handle.sendStdin(input);
  await handle.closeStdin();
  assert.equal((await handle.wait()).stdout.split(" ")[0], createHash("sha256").update(input).digest("hex"));
});

test("nobody takes no input, signal or listener", async () => {
  await refused(NotFoundError, commands.sendStdin(NOBODY, "x"));
  await refused(NotFoundError, commands.closeStdin(NOBODY));
  await refused(NotFoundError, commands.connect(NOBODY));
  assert.equal(await commands.kill(NOBODY), false);
});

test("a list says what runs", async () => {
  const handle = await background("sleep 77", { envs: { MARK: "here" }, cwd: "/tmp" });
  const entry = (await commands.list()).find(({ pid }) => pid === handle.pid);
  assert.deepEqual([entry.cmd, entry.args, entry.cwd], ["/bin/bash", ["-l", "-c", "sleep 77"], "/tmp"]);
  assert.equal(entry.envs.MARK, "here");
  assert.equal(await handle.kill(), true);
  await refused(CommandExitError, handle.wait());
  assert.ok((await commands.list()).every(({ pid }) => pid !== handle.pid));
});

test("whoever is killed is gone at once", async () => {
  for (let round = 0; round < 5; round += 1) {
    const handle = await background("sleep 77");
    assert.equal(await commands.kill(handle.pid), true);
    await refused(CommandExitError, commands.run(`kill -0 ${handle.pid}`));
    assert.equal((await refused(CommandExitError, handle.wait())).error, "signal: killed");
    assert.equal(await handle.kill(), false);
  }
});

test("a time limit ends the whole group", async () => {
  await refused(TimeoutError, commands.run("sleep 7655 & sleep 7655", { timeoutMs: 500 }));
  const gone = "while pgrep -f '^sleep 7655$'; do sleep 0.05; done >/dev/null";
  assert.equal((await commands.run(gone, { timeoutMs: 20_000 })).exitCode, 0);
});

test("a program outlives its listener", async () => {
  const first = await background("read line; echo $line; exit 3", { stdin: true });
  await first.disconnect();
  const second = await commands.connect(first.pid);
  assert.equal(second.pid, first.pid);
  await second.sendStdin("still here\n");
  const error = await refused(CommandExitError, second.wait());
  assert.deepEqual([error.exitCode, error.stdout], [3, "still here\n"]);
});

test("an end can be asked for afterwards", async () => {
  const handle = await background("exit 9");
  await refused(CommandExitError, handle.wait());
  const again = await commands.connect(handle.pid);
  assert.equal((await refused(CommandExitError, again.wait())).exitCode, 9);
});

test("two listeners get the same", async () => {
  const first = await background("read line; seq 1 1000", { stdin: true });
  const second = await commands.connect(first.pid);
  await commands.sendStdin(first.pid, "go\n");
  assert.equal((await first.wait()).stdout, numbers(1000));
  assert.equal((await second.wait()).stdout, numbers(1000));
});

test("a slow reader loses nothing", async () => {
  let pieces = 0;
  const result = await commands.run("seq 1 100000", {
    onStdout: async () => {
      pieces += 1;
      if (pieces < 5) await new Promise((resolve) => setTimeout(resolve, 50));
    },
  });
  assert.ok(result.stdout === numbers(100_000), "something is missing");
});

test("many at once", async () => {
  const all = Array.from({ length: 40 }, (_, number) => number);
  const handles = await Promise.all(all.map((number) => background(`sleep 0.2; echo ${number}`)));
  const results = await Promise.all(handles.map((handle) => handle.wait()));
  assert.deepEqual(results.map(({ stdout }) => stdout), all.map((number) => `${number}\n`));
  const pids = new Set(handles.map(({ pid }) => pid));
  await waitFor("all to be gone", async () => (await commands.list()).every(({ pid }) => !pids.has(pid)));
});
