"""A locked agent: its token, and links that are signed with it."""

import json
import urllib.error
import urllib.request

import pytest
from clients import Async, Sync
from e2b.exceptions import AuthenticationException


def fetch(url, data=None):
    """Fetches as somebody who has only the link."""
    headers = {"Content-Type": "application/octet-stream"} if data is not None else {}
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["message"]


def test_the_token_opens_everything(locked):
    assert locked.is_running()
    assert locked.commands.run("id -un").stdout == "user\n"
    locked.files.write("file", "content")
    assert locked.files.read("file") == "content"
    locked.watch(".").stop()
    terminal = locked.terminal()
    assert locked.pty.kill(terminal.pid)


@pytest.mark.parametrize("half", [Sync, Async], ids=["sync", "async"])
def test_another_token_opens_nothing(locked_agent, half):
    stranger = half.connect(locked_agent.url, "another")
    attempts = (
        lambda: stranger.commands.run("id"),
        lambda: stranger.commands.list(),
        lambda: stranger.files.read("file"),
        lambda: stranger.files.write("file", "x"),
        lambda: stranger.files.list("."),
        lambda: stranger.watch("."),
    )
    for attempt in attempts:
        with pytest.raises(AuthenticationException):
            attempt()
    assert stranger.is_running()
    stranger.close()


@pytest.mark.parametrize("user", [None, "user"])
@pytest.mark.parametrize("life", [None, 60])
def test_a_signed_link_needs_no_token(locked, user, life):
    options = {"user": user, "use_signature_expiration": life}
    status, _ = fetch(locked.upload_url("linked ü+.txt", **options), b"by link")
    assert status == 200
    assert fetch(locked.download_url("linked ü+.txt", **options)) == (200, b"by link")


def test_a_link_dies(locked):
    locked.files.write("mortal", "x")
    url = locked.download_url("mortal", use_signature_expiration=-60)
    assert fetch(url) == (401, "signature is already expired")


def test_a_link_is_good_for_one_thing(locked):
    locked.files.write("public", "x")
    locked.files.write("secret", "x")
    url = locked.download_url("public")
    assert fetch(url)[0] == 200
    assert fetch(url.replace("public", "secret")) == (401, "invalid signature")
    assert fetch(url, b"overwritten") == (401, "invalid signature")
    assert fetch(url.split("&signature")[0])[0] == 401
