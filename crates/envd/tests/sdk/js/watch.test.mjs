// Watches: the counts the SDK's users rely on, and following a tree as it grows.

import { test } from "node:test";
import assert from "node:assert/strict";
import { directory, e2b, open, promised, refused, start, waitFor } from "./agent.mjs";

const { FileNotFoundError, FilesystemEventType, FileType, InvalidArgumentError, TimeoutError } = e2b;
const { CHMOD, CREATE, REMOVE, RENAME, WRITE } = FilesystemEventType;

const sandbox = await open(await start("watch"));
const { files } = sandbox;

async function watch(path, options) {
  const events = [];
  const handle = await files.watchDir(path, (event) => void events.push(event), options);
  return {
    events,
    kinds: (name) => events.filter((event) => event.name === name).map(({ type }) => type),
    until: (type, name) =>
      waitFor(`${type} of ${name}`, () => events.find((event) => event.type === type && event.name === name)),
    stop: () => handle.stop(),
  };
}

test("a new file is three events", async () => {
  const place = await directory(sandbox);
  const seen = await watch(place);
  await files.write(`${place}/file`, "content");
  await files.write(`${place}/last`, "content");
  await seen.until(WRITE, "last");
  const three = (name) => [CREATE, CHMOD, WRITE].map((type) => [name, type]);
  assert.deepEqual(seen.events.map(({ name, type }) => [name, type]), [...three("file"), ...three("last")]);
  await seen.stop();
});

test("every kind of event", async () => {
  const place = await directory(sandbox);
  const seen = await watch(place);
  await sandbox.commands.run("echo x > a; chmod 600 a; mv a b; rm b; mkdir last", { cwd: place });
  await seen.until(CREATE, "last");
  assert.deepEqual(seen.kinds("a"), [CREATE, WRITE, CHMOD, RENAME]);
  assert.deepEqual(seen.kinds("b"), [CREATE, REMOVE]);
  assert.deepEqual(seen.kinds("last"), [CREATE]);
  assert.equal(seen.events.length, 7);
  await seen.stop();
});

test("only the directory itself unless told otherwise", async () => {
  const place = await directory(sandbox);
  await files.makeDir(`${place}/sub`);
  const seen = await watch(place);
  await files.write(`${place}/sub/file`, "content");
  await files.write(`${place}/last`, "content");
  await seen.until(WRITE, "last");
  assert.deepEqual(seen.kinds("sub/file"), []);
  await seen.stop();
});

test("a watch follows new directories", async () => {
  const place = await directory(sandbox);
  const seen = await watch(place, { recursive: true });
  for (const path of ["one", "one/two", "one/two/three"]) {
    await files.makeDir(`${place}/${path}`);
    await seen.until(CREATE, path);
  }
  await files.write(`${place}/one/two/three/file`, "content");
  await seen.until(WRITE, "one/two/three/file");
  await seen.stop();
});

test("a directory made and filled at once is not missed", async () => {
  const place = await directory(sandbox);
  const seen = await watch(place, { recursive: true });
  for (let number = 0; number < 10; number += 1) {
    await sandbox.commands.run(`mkdir -p d${number}/e && touch d${number}/e/file`, { cwd: place });
    await seen.until(CREATE, `d${number}/e/file`);
  }
  await seen.stop();
});

test("a directory moved in is followed", async () => {
  const place = await directory(sandbox);
  await files.write(`${place}/outside/file`, "content");
  await files.makeDir(`${place}/watched`);
  const seen = await watch(`${place}/watched`, { recursive: true });
  await files.rename(`${place}/outside`, `${place}/watched/inside`);
  await seen.until(CREATE, "inside");
  await files.write(`${place}/watched/inside/other`, "content");
  await seen.until(WRITE, "inside/other");
  await seen.stop();
});

test("an event can carry its entry", async () => {
  const place = await directory(sandbox);
  const seen = await watch(place, { includeEntry: true });
  await files.write(`${place}/file`, "content");
  const { entry } = await seen.until(WRITE, "file");
  assert.deepEqual([entry.name, entry.path, entry.type], ["file", `${place}/file`, FileType.FILE]);
  assert.deepEqual([entry.owner, Number(entry.size)], ["user", 7]);
  await files.remove(`${place}/file`);
  assert.equal((await seen.until(REMOVE, "file")).entry, undefined);
  await seen.stop();
});

test("a stopped watch says nothing more, and that it ended", async () => {
  const place = await directory(sandbox);
  const ended = promised();
  const seen = await watch(place, { onExit: ended.fulfil });
  await files.write(`${place}/one`, "1");
  await seen.until(WRITE, "one");
  await seen.stop();
  await ended.promise;
  const before = seen.events.length;
  const other = await watch(place);
  await files.write(`${place}/two`, "2");
  await other.until(WRITE, "two");
  await other.stop();
  assert.equal(seen.events.length, before);
});

test("a watch ends at its time limit", async () => {
  const ended = promised();
  await watch(await directory(sandbox), { timeoutMs: 300, onExit: ended.fulfil });
  assert.ok((await ended.promise) instanceof TimeoutError);
});

test("many events all arrive, in order", async () => {
  const place = await directory(sandbox);
  const seen = await watch(place);
  await sandbox.commands.run("for n in $(seq 1 1500); do : > file$n; done", { cwd: place });
  await seen.until(CREATE, "file1500");
  const names = seen.events.filter(({ type }) => type === CREATE).map(({ name }) => name);
  assert.deepEqual(names, Array.from({ length: 1500 }, (_, number) => `file${number + 1}`));
  await seen.stop();
});

test("what cannot be watched", async () => {
  const place = await directory(sandbox);
  const nothing = () => {};
  await refused(FileNotFoundError, files.watchDir(`${place}/missing`, nothing));
  await files.write(`${place}/file`, "");
  await refused(InvalidArgumentError, files.watchDir(`${place}/file`, nothing));
});

test("network mounts may be allowed", async () => {
  const place = await directory(sandbox);
  const seen = await watch(place, { allowNetworkMounts: true });
  await files.write(`${place}/file`, "");
  await seen.until(CREATE, "file");
  await seen.stop();
});
