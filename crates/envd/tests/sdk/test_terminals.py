"""Terminals: size, input, ends, and coming back to one."""

import hashlib

import pytest
from clients import wait_for
from e2b import CommandExitException, NotFoundException
from e2b.sandbox.commands.command_handle import PtySize


def test_a_terminal_is_one(sandbox):
    terminal = sandbox.terminal(columns=97, rows=31, envs={"OURS": "1"}, cwd="/usr")
    sandbox.pty.send_stdin(terminal.pid, b"tty; stty size; echo $TERM-$OURS-$PWD; id -un\n")
    terminal.until("31 97")
    terminal.until("xterm-256color-1-/usr")
    assert "/dev/pts/" in terminal.output()
    sandbox.pty.send_stdin(terminal.pid, b"exit\n")
    assert terminal.wait().exit_code == 0


def test_a_program_notices_a_new_size(sandbox):
    terminal = sandbox.terminal()
    sandbox.pty.send_stdin(terminal.pid, b"trap 'stty size' WINCH; echo rea''dy\n")
    terminal.until("ready")
    sandbox.pty.resize(terminal.pid, PtySize(rows=11, cols=123))
    sandbox.pty.send_stdin(terminal.pid, b"\n")
    terminal.until("11 123")
    assert sandbox.pty.kill(terminal.pid)


def test_a_key_interrupts(sandbox):
    terminal = sandbox.terminal()
    # It says so itself, because only then it is in front.
    sandbox.pty.send_stdin(terminal.pid, b"sh -c \"echo rea''dy; exec sleep 1000\"\n")
    terminal.until("ready")
    sandbox.pty.send_stdin(terminal.pid, b"\x03")
    terminal.until("^C")
    sandbox.pty.send_stdin(terminal.pid, b"echo al''ive\n")
    terminal.until("alive")
    sandbox.pty.kill(terminal.pid)


def test_an_exit_code_comes_from_the_shell(sandbox):
    terminal = sandbox.terminal()
    sandbox.pty.send_stdin(terminal.pid, b"exit 17\n")
    with pytest.raises(CommandExitException) as caught:
        terminal.wait()
    assert caught.value.exit_code == 17


def test_much_input_loses_nothing(sandbox):
    terminal = sandbox.terminal()
    sandbox.pty.send_stdin(terminal.pid, b"stty -echo -icanon; echo rea''dy; head -c 1000000 | sha256sum\n")
    terminal.until("ready")
    pieces = [b"0123456789" * 1000] * 100
    sandbox.feed(sandbox.pty, terminal.pid, pieces)
    terminal.until(hashlib.sha256(b"".join(pieces)).hexdigest())
    sandbox.pty.kill(terminal.pid)


def test_a_terminal_waits_for_its_user_to_come_back(sandbox):
    first = sandbox.terminal()
    sandbox.pty.send_stdin(first.pid, b"VALUE=kept; echo o''ne\n")
    first.until("one")
    first.leave()
    second = sandbox.terminal(attach=first.pid)
    sandbox.pty.send_stdin(first.pid, b"echo again-$VALUE\n")
    second.until("again-kept")
    sandbox.pty.send_stdin(first.pid, b"exit\n")
    assert second.wait().exit_code == 0


def test_a_killed_terminal_is_gone_at_once(sandbox):
    terminal = sandbox.terminal()
    assert sandbox.pty.kill(terminal.pid)
    with pytest.raises(CommandExitException):
        sandbox.commands.run(f"kill -0 {terminal.pid}")
    with pytest.raises(CommandExitException) as caught:
        terminal.wait()
    assert caught.value.exit_code == -1
    assert not sandbox.pty.kill(terminal.pid)


def test_nobody_has_no_terminal(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.pty.resize(4_194_000, PtySize(rows=1, cols=1))
    with pytest.raises(NotFoundException):
        sandbox.pty.send_stdin(4_194_000, b"x")


def test_terminals_do_not_hear_each_other(sandbox):
    terminals = [sandbox.terminal() for _ in range(8)]
    for number, terminal in enumerate(terminals):
        sandbox.pty.send_stdin(terminal.pid, f"echo this-is-$(({number} + 100))\n".encode())
    for number, terminal in enumerate(terminals):
        terminal.until(f"this-is-{number + 100}")
        others = [f"this-is-{other + 100}" for other in range(8) if other != number]
        assert not any(other in terminal.output() for other in others)
        sandbox.pty.kill(terminal.pid)
    wait_for("all to be gone", lambda: not {t.pid for t in terminals} & {p.pid for p in sandbox.commands.list()})
