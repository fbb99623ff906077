// Whole files up and down, and the tree they are in.

import { test } from "node:test";
import assert from "node:assert/strict";
import { directory, e2b, everyByte, open, refused, start } from "./agent.mjs";

const { AuthenticationError, FileNotFoundError, FileType, InvalidArgumentError, NotFoundError, SandboxError } = e2b;
const BYTES = everyByte(180_000);

const sandbox = await open(await start("files"));
const { files } = sandbox;

async function gathered(stream) {
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return Buffer.concat(pieces);
}

const streamed = (bytes) =>
  new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += 10_000) controller.enqueue(bytes.slice(at, at + 10_000));
      controller.close();
    },
  });

/** Asserts that bytes are the same without printing them all. */
const same = (found, expected) => assert.ok(Buffer.from(found).equals(Buffer.from(expected)), "other bytes");

async function readInEveryFormat(options) {
  const path = `${await directory(sandbox)}/new/deep/file`;
  for (const content of [BYTES.buffer, new Blob([BYTES]), streamed(BYTES)]) {
    const info = await files.write(path, content, options);
    assert.deepEqual([info.name, info.path, info.type], ["file", path, FileType.FILE]);
    same(await files.read(path, { format: "bytes" }), BYTES);
    await files.write(path, "");
  }
  await files.write(path, BYTES.buffer, options);
  for (const reading of [{}, { gzip: true }]) {
    same(await files.read(path, { format: "bytes", ...reading }), BYTES);
    same(await (await files.read(path, { format: "blob", ...reading })).arrayBuffer(), BYTES);
    same(await gathered(await files.read(path, { format: "stream", ...reading })), BYTES);
  }
  await files.write(path, "süß 漢字 🦀", options);
  assert.equal(await files.read(path), "süß 漢字 🦀");
  assert.equal(await files.read(path, { format: "text", gzip: true }), "süß 漢字 🦀");
}

test("what is written as a form is read in every format", () => readInEveryFormat({}));
test("what is written raw is read in every format", () => readInEveryFormat({ useOctetStream: true }));
test("what is written compressed is read in every format", () => readInEveryFormat({ gzip: true }));

test("a file without content is read in every format", async () => {
  const path = `${await directory(sandbox)}/empty`;
  await files.write(path, "");
  assert.equal(await files.read(path), "");
  assert.equal((await files.read(path, { format: "bytes" })).length, 0);
  assert.equal((await files.read(path, { format: "blob" })).size, 0);
  assert.equal((await gathered(await files.read(path, { format: "stream" }))).length, 0);
});

test("shorter content leaves no tail", async () => {
  const path = `${await directory(sandbox)}/file`;
  for (const content of ["a long first content", "short", ""]) {
    await files.write(path, content);
    assert.equal(await files.read(path), content);
  }
});

async function manyAtOnce(options) {
  const place = await directory(sandbox);
  const all = Array.from({ length: 30 }, (_, number) => ({
    path: `${place}/sub${number % 3}/ü ${number}.txt`,
    data: `content ${number}`,
  }));
  const infos = await files.writeFiles(all, options);
  assert.deepEqual(infos.map(({ path }) => path), all.map(({ path }) => path));
  const read = await Promise.all(all.map(({ path }) => files.read(path)));
  assert.deepEqual(read, all.map(({ data }) => data));
  const info = await files.write([{ path: `${place}/one`, data: "1" }, { path: `${place}/two`, data: "2" }], options);
  assert.deepEqual(info.map(({ name }) => name), ["one", "two"]);
}

test("many files in one form", () => manyAtOnce({}));
test("many files, each raw", () => manyAtOnce({ useOctetStream: true }));

test("a file belongs to who wrote it", async () => {
  const place = await directory(sandbox);
  await files.write(`${place}/sub/file`, "12345");
  const file = await files.getInfo(`${place}/sub/file`);
  assert.deepEqual([file.owner, file.group, file.mode, file.permissions], ["user", "user", 0o644, "-rw-r--r--"]);
  assert.deepEqual([file.size, file.type, file.symlinkTarget], [5, FileType.FILE, undefined]);
  assert.ok(Math.abs(file.modifiedTime.getTime() - Date.now()) < 600_000);
  const sub = await files.getInfo(`${place}/sub`);
  assert.deepEqual([sub.type, sub.owner, sub.mode, sub.permissions], [FileType.DIR, "user", 0o755, "drwxr-xr-x"]);
  await files.write(`${place}/by-root`, "", { user: "root" });
  assert.equal((await files.getInfo(`${place}/by-root`)).owner, "root");
});

test("relative paths begin at home", async () => {
  const place = await directory(sandbox);
  const name = place.slice("/home/user/".length);
  for (const path of [`${name}/file`, `~/${name}/file`, `./${name}/../${name}/file`]) {
    await files.write(path, path);
    assert.equal(await files.read(`${place}/file`), path);
  }
});

test("what is missing is said to be", async () => {
  const missing = `${await directory(sandbox)}/missing`;
  for (const format of ["text", "bytes", "blob", "stream"]) {
    await refused(FileNotFoundError, files.read(missing, { format }));
  }
  await refused(FileNotFoundError, files.getInfo(missing));
  await refused(FileNotFoundError, files.list(missing));
  await refused(FileNotFoundError, files.rename(missing, `${missing}-too`));
  assert.equal(await files.exists(missing), false);
});

test("what is no file is not read, and what is no directory not listed", async () => {
  const place = await directory(sandbox);
  await files.write(`${place}/file`, "");
  await refused(InvalidArgumentError, files.read(place));
  await refused(InvalidArgumentError, files.list(`${place}/file`));
  await refused(InvalidArgumentError, files.makeDir(`${place}/file`));
  await refused(InvalidArgumentError, files.write(place, "x"));
});

test("an unknown user is refused", async () => {
  const user = "nobody-we-know";
  await refused(AuthenticationError, files.read("x", { user }));
  await refused(AuthenticationError, files.write("x", "x", { user }));
  await refused(AuthenticationError, files.list(".", { user }));
});

test("directories are made once", async () => {
  const place = await directory(sandbox);
  assert.equal(await files.makeDir(`${place}/a/b/c`), true);
  assert.equal(await files.makeDir(`${place}/a/b/c`), false);
  assert.equal((await files.getInfo(`${place}/a`)).owner, "user");
  assert.equal(await files.exists(`${place}/a/b`), true);
});

test("a list goes as deep as asked", async () => {
  const place = await directory(sandbox);
  await files.writeFiles(["b/c/d/e", "b/a", "a"].map((path) => ({ path: `${place}/${path}`, data: "" })));
  const listed = async (depth) => {
    const entries = await files.list(place, depth === undefined ? {} : { depth });
    return entries.map(({ path, type }) => `${path.slice(place.length + 1)}${type === FileType.DIR ? "/" : ""}`);
  };
  assert.deepEqual(await listed(), ["a", "b/"]);
  assert.deepEqual(await listed(1), ["a", "b/"]);
  assert.deepEqual(await listed(2), ["a", "b/", "b/a", "b/c/"]);
  assert.deepEqual(await listed(9), ["a", "b/", "b/a", "b/c/", "b/c/d/", "b/c/d/e"]);
  await refused(InvalidArgumentError, files.list(place, { depth: 0 }));
});

test("a link shows where it leads", async () => {
  const place = await directory(sandbox);
  await files.write(`${place}/file`, "content");
  await sandbox.commands.run("ln -s file link; ln -s link again; ln -s / root; ln -s nowhere broken", { cwd: place });
  const again = await files.getInfo(`${place}/again`);
  assert.deepEqual([again.path, again.type, again.symlinkTarget], [`${place}/again`, FileType.FILE, `${place}/file`]);
  const root = await files.getInfo(`${place}/root`);
  assert.deepEqual([root.type, root.symlinkTarget], [FileType.DIR, "/"]);
  assert.equal(await files.exists(`${place}/broken`), true);
  assert.equal(await files.read(`${place}/again`), "content");
  await files.remove(`${place}/root`);
  assert.equal(await files.exists("/etc/passwd"), true);
});

test("a move takes everything along", async () => {
  const place = await directory(sandbox);
  await files.write(`${place}/from/sub/file`, "content");
  const info = await files.rename(`${place}/from`, `${place}/new/to`);
  assert.deepEqual([info.name, info.path, info.type], ["to", `${place}/new/to`, FileType.DIR]);
  assert.equal(await files.read(`${place}/new/to/sub/file`), "content");
  assert.equal(await files.exists(`${place}/from`), false);
});

test("remove takes a whole tree", async () => {
  const place = await directory(sandbox);
  const all = Array.from({ length: 20 }, (_, number) => ({ path: `${place}/tree/${number}/${number}`, data: "" }));
  await files.writeFiles(all);
  await files.remove(`${place}/tree`);
  assert.deepEqual(await files.list(place), []);
});

test("files of proc have no size but a content", async () => {
  for (const gzip of [false, true]) {
    assert.equal((await files.read("/proc/sys/kernel/random/boot_id", { gzip })).trim().length, 36);
  }
});

test("metadata stays with a file", async (context) => {
  const place = await directory(sandbox);
  const path = `${place}/file`;
  const kept = { author: "Ann", kind: "a b; c=d" };
  for (const useOctetStream of [false, true]) {
    const options = { useOctetStream, metadata: { author: "Ann", Kind: "a b; c=d" } };
    const info = await files.write(path, "x", options);
    if (info.metadata === undefined) {
      context.skip("no extended attributes here");
      return;
    }
    assert.deepEqual(info.metadata, kept);
    assert.deepEqual((await files.getInfo(path)).metadata, kept);
    assert.deepEqual((await files.list(place))[0].metadata, kept);
    assert.deepEqual((await files.rename(path, `${path}2`)).metadata, kept);
    await files.write(`${path}2`, "y", { useOctetStream });
    assert.equal((await files.getInfo(`${path}2`)).metadata, undefined);
    await files.remove(`${path}2`);
  }
  await refused(SandboxError, files.write(path, "x", { metadata: { k: "v".repeat(5000) } }));
  assert.equal(await files.exists(path), false);
});
