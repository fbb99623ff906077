// A locked agent: its token, and links that are signed with it.

import { test } from "node:test";
import assert from "node:assert/strict";
import { e2b, openWith, refused, start } from "./agent.mjs";

const { AuthenticationError } = e2b;
const TOKEN = "a-token-for-the-tests-of-the-sdk";

const agent = await start("access", { accessToken: TOKEN });
const sandbox = openWith(agent, TOKEN);

/** What somebody gets who has only the link. */
async function followed(url, body) {
  const headers = body === undefined ? {} : { "content-type": "application/octet-stream" };
  const answer = await fetch(url, { method: body === undefined ? "GET" : "POST", body, headers });
  return [answer.status, await answer.text()];
}

test("the token opens everything", async () => {
  assert.equal(await sandbox.isRunning(), true);
  assert.equal((await sandbox.commands.run("id -un")).stdout, "user\n");
  await sandbox.files.write("file", "content");
  assert.equal(await sandbox.files.read("file"), "content");
  await (await sandbox.files.watchDir(".", () => {})).stop();
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData: () => {} });
  assert.equal(await terminal.kill(), true);
});

test("another token opens nothing", async () => {
  const stranger = openWith(agent, "another");
  await refused(AuthenticationError, stranger.commands.run("id"));
  await refused(AuthenticationError, stranger.commands.list());
  await refused(AuthenticationError, stranger.files.read("file"));
  await refused(AuthenticationError, stranger.files.write("file", "x"));
  await refused(AuthenticationError, stranger.files.list("."));
  await refused(AuthenticationError, stranger.files.watchDir(".", () => {}));
  await refused(AuthenticationError, stranger.pty.create({ cols: 80, rows: 24, onData: () => {} }));
  assert.equal(await stranger.isRunning(), true);
});

test("a signed link needs no token", async () => {
  for (const user of [undefined, "user"]) {
    for (const useSignatureExpiration of [undefined, 60_000]) {
      const options = { user, useSignatureExpiration };
      const [status] = await followed(await sandbox.uploadUrl("linked ü+.txt", options), "by link");
      assert.equal(status, 200);
      assert.deepEqual(await followed(await sandbox.downloadUrl("linked ü+.txt", options)), [200, "by link"]);
    }
  }
});

test("a link is good for one thing", async () => {
  await sandbox.files.write("public", "x");
  await sandbox.files.write("secret", "x");
  const url = await sandbox.downloadUrl("public");
  assert.equal((await followed(url))[0], 200);
  assert.equal((await followed(url.replace("public", "secret")))[0], 401);
  assert.equal((await followed(url, "overwritten"))[0], 401);
  assert.equal((await followed(url.split("&signature")[0]))[0], 401);
});
