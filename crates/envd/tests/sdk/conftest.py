"""The published E2B SDK, unmodified, against our guest agent.

    pytest ── e2b (debug mode) ── HTTP on a free port of loopback ── envd agent
                                                                     in namespaces of its own

The SDK's debug mode takes a guest agent without a control plane: `E2B_DEBUG=true`, and `E2B_SANDBOX_URL` for where it is.
The agent needs the user that E2B's templates have, `user` with the home /home/user. The machine that runs the tests has no
such user, so the agent gets its own view of /etc/passwd, /etc/group and /home; nothing outside of that view changes.
It has its own processes too, so that none outlives the tests (`agent.sh`).

Every test that takes `sandbox` runs twice: with the SDK's synchronous half and with its asynchronous one (see `clients.py`).

Environment: `ENVD` names the program to test.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.dont_write_bytecode = True

from clients import Async, Sync  # noqa: E402

USER_ID = 54321
TOKEN = "a-token-for-the-tests-of-the-sdk"

NAMESPACES = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]


class Agent:
    """A running agent, its address, and its users' homes as the host sees them."""

    def __init__(self, state: Path):
        self.home = state / "home" / "user"
        self.home.mkdir(parents=True)
        os.chown(self.home, USER_ID, USER_ID)
        user = f"user:x:{USER_ID}:{USER_ID}::/home/user:/bin/bash\n"
        (state / "passwd").write_text(Path("/etc/passwd").read_text() + user)
        (state / "group").write_text(Path("/etc/group").read_text() + f"user:x:{USER_ID}:\n")
        self._process = subprocess.Popen(
            ["unshare", *NAMESPACES, "sh", Path(__file__).with_name("agent.sh")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "STATE": str(state), "ENVD": os.environ["ENVD"]},
        )
        ready = json.loads(self._process.stdout.readline())
        self.url = f"http://{ready['address']}"

    def init(self, **values) -> None:
        request = urllib.request.Request(
            f"{self.url}/init",
            data=json.dumps(values).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 204

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def agent(tmp_path_factory):
    # The agent's users must be able to walk to their home.
    state = tmp_path_factory.mktemp("agent")
    agent = Agent(state)
    agent.init(defaultUser="user", envVars={"FROM_THE_TEMPLATE": "yes"})
    os.environ.update(E2B_DEBUG="true", E2B_SANDBOX_URL=agent.url)
    yield agent
    agent.stop()


@pytest.fixture(scope="session")
def locked_agent(tmp_path_factory):
    """An agent that wants a token, as every sandbox of today's SDKs does."""
    agent = Agent(tmp_path_factory.mktemp("locked"))
    agent.init(defaultUser="user", accessToken=TOKEN)
    yield agent
    agent.stop()


@pytest.fixture(params=[Sync, Async], ids=["sync", "async"])
def sandbox(request, agent):
    client = request.param.create()
    yield client
    client.close()


@pytest.fixture(params=[Sync, Async], ids=["sync", "async"])
def locked(request, locked_agent):
    client = request.param.connect(locked_agent.url, TOKEN)
    yield client
    client.close()


@pytest.fixture
def directory(agent, request):
    """A new directory of the user, by its path inside the agent's view."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    path = agent.home / name
    path.mkdir()
    os.chown(path, USER_ID, USER_ID)
    return f"/home/user/{name}"
