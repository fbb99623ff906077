"""One way to use both halves of the SDK, so that one test holds both to the same behaviour.

The asynchronous half runs on an event loop of a thread of its own; each of its calls is awaited from the test's thread.
Terminals and watches, where the halves differ in more than `await`, have a common form here.
"""

import asyncio
import inspect
import threading
import time

from e2b import AsyncSandbox, Sandbox
from e2b.connection_config import ConnectionConfig
from e2b.sandbox.commands.command_handle import PtySize
from packaging.version import Version

PATIENCE = 30


def wait_for(what, condition):
    """Waits until the condition holds and gives what it gave."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)
    return value


def _parts(url, token):
    headers = {"X-Access-Token": token}
    return {
        "sandbox_id": "debug_sandbox_id",
        "envd_version": Version("0.6.13"),
        "envd_access_token": token,
        "sandbox_domain": None,
        "connection_config": ConnectionConfig(debug=True, sandbox_url=url, extra_sandbox_headers=headers),
    }


class Terminal:
    """A terminal of either half: what it printed so far, and its end."""

    def __init__(self):
        self._output = bytearray()
        self.handle = None
        self.wait = None
        self.leave = None

    @property
    def pid(self):
        return self.handle.pid

    def took(self, data):
        self._output += data

    def output(self):
        return bytes(self._output).decode(errors="replace")

    def until(self, text):
        wait_for(f"{text!r} on the terminal", lambda: text in self.output())


class Left(Exception):
    """Whoever read a terminal has gone."""


class Sync:
    """The synchronous half as it is."""

    def __init__(self, sandbox):
        self._sandbox = sandbox
        self.commands, self.files, self.pty = sandbox.commands, sandbox.files, sandbox.pty
        self.is_running = sandbox.is_running
        self.download_url, self.upload_url = sandbox.download_url, sandbox.upload_url

    @classmethod
    def create(cls):
        return cls(Sandbox.create())

    @classmethod
    def connect(cls, url, token):
        return cls(Sandbox(**_parts(url, token)))

    def close(self):
        pass

    def stream(self, path, **options):
        return list(self.files.read(path, format="stream", **options))

    def feed(self, module, pid, pieces):
        """Sends pieces of input over one stream."""
        module.stream_input(pid, pieces)

    def terminal(self, columns=80, rows=24, attach=None, **options):
        terminal = Terminal()
        if attach is None:
            terminal.handle = self.pty.create(PtySize(rows=rows, cols=columns), **options)
        else:
            terminal.handle = self.pty.connect(attach)
        result = {}
        left = threading.Event()

        def took(data):
            if left.is_set():
                raise Left
            terminal.took(data)

        def read():
            try:
                result["value"] = terminal.handle.wait(on_pty=took)
            except Exception as error:
                result["error"] = error

        thread = threading.Thread(target=read, daemon=True)
        thread.start()

        def wait():
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the terminal does not end"
            if "error" in result:
                raise result["error"]
            return result["value"]

        def leave():
            # A generator can be closed only where it stands still, so more output has to come.
            left.set()
            self.pty.send_stdin(terminal.pid, b"\n")
            thread.join(PATIENCE)
            terminal.handle.disconnect()

        terminal.wait, terminal.leave = wait, leave
        return terminal

    def watch(self, path, **options):
        handle = self.files.watch_dir(path, **options)
        seen = []

        def events():
            seen.extend(handle.get_new_events())
            return list(seen)

        return Watch(events, handle.stop)


class Watch:
    """A watch of either half."""

    def __init__(self, events, stop):
        self.events, self.stop = events, stop

    def until(self, kind, name):
        def find():
            return next((event for event in self.events() if (event.type, event.name) == (kind, name)), None)

        return wait_for(f"{kind} of {name}", find)


class Blocking:
    """Something of the asynchronous half, each call of it awaited."""

    def __init__(self, loop, inner):
        self._loop, self._inner = loop, inner

    def __getattr__(self, name):
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *arguments, **options: self._await(value, *arguments, **options)

    def _await(self, function, *arguments, **options):
        async def call():
            value = function(*arguments, **options)
            return await value if inspect.isawaitable(value) else value

        value = asyncio.run_coroutine_threadsafe(call(), self._loop).result(PATIENCE)
        module = type(value).__module__
        return Blocking(self._loop, value) if module.startswith("e2b.sandbox_async") else value


class Async:
    """The asynchronous half behind calls that block."""

    def __init__(self, loop, make):
        self._loop = loop
        self._sandbox = self._run(make)
        self.commands, self.files, self.pty = (
            Blocking(loop, part) for part in (self._sandbox.commands, self._sandbox.files, self._sandbox.pty)
        )
        self.is_running = lambda: self._run(self._sandbox.is_running)
        self.download_url, self.upload_url = self._sandbox.download_url, self._sandbox.upload_url

    @staticmethod
    def _start():
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop

    @classmethod
    def create(cls):
        return cls(cls._start(), AsyncSandbox.create)

    @classmethod
    def connect(cls, url, token):
        async def make():
            return AsyncSandbox(**_parts(url, token))

        return cls(cls._start(), make)

    def _run(self, function, *arguments, **options):
        return asyncio.run_coroutine_threadsafe(function(*arguments, **options), self._loop).result(PATIENCE)

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)

    def stream(self, path, **options):
        async def read():
            return [piece async for piece in await self._sandbox.files.read(path, format="stream", **options)]

        return self._run(read)

    def feed(self, module, pid, pieces):
        async def send():
            async with module._inner.stream_input(pid) as stream:
                for piece in pieces:
                    await stream.send(piece)

        self._run(send)

    def terminal(self, columns=80, rows=24, attach=None, **options):
        terminal = Terminal()
        if attach is None:
            size = PtySize(rows=rows, cols=columns)
            terminal.handle = self.pty.create(size, on_data=terminal.took, **options)
        else:
            terminal.handle = self.pty.connect(attach, on_data=terminal.took)
        terminal.wait, terminal.leave = terminal.handle.wait, terminal.handle.disconnect
        return terminal

    def watch(self, path, **options):
        seen = []
        handle = self.files.watch_dir(path, on_event=seen.append, **options)
        return Watch(lambda: list(seen), handle.stop)
