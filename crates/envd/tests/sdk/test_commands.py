"""Programs: output, input, ends, and what is around them."""

import base64
import hashlib
import threading

import pytest
from clients import wait_for
from e2b import CommandExitException, InvalidArgumentException, NotFoundException, TimeoutException
from e2b.exceptions import AuthenticationException


def test_the_agent_is_running(sandbox):
    assert sandbox.is_running()


def test_output_and_errors_are_apart(sandbox):
    result = sandbox.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code, result.error) == ("out\n", "err\n", 0, None)


def test_an_exit_code_becomes_an_exception(sandbox):
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.run("echo before; exit 42")
    assert caught.value.exit_code == 42
    assert caught.value.stdout == "before\n"
    assert caught.value.error == "exit status 42"


def test_a_signal_is_no_exit_code(sandbox):
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.run("kill -KILL $$")
    assert caught.value.exit_code == -1
    assert caught.value.error == "signal: killed"


def test_much_output_arrives_whole(sandbox):
    result = sandbox.commands.run("seq 1 200000")
    expected = "".join(f"{number}\n" for number in range(1, 200_001))
    assert hashlib.sha256(result.stdout.encode()).digest() == hashlib.sha256(expected.encode()).digest()


def test_output_comes_while_the_program_runs(sandbox):
    came = threading.Event()
    handle = sandbox.commands.run("echo first; read line; echo got $line", background=True, stdin=True)
    seen = []

    def answer(text):
        seen.append(text)
        came.set()

    def reply():
        came.wait(30)
        sandbox.commands.send_stdin(handle.pid, "hello\n")

    if hasattr(handle, "_inner"):
        wait_for("the first line", lambda: handle.stdout == "first\n")
        sandbox.commands.send_stdin(handle.pid, "hello\n")
        assert handle.wait().stdout == "first\ngot hello\n"
    else:
        thread = threading.Thread(target=reply)
        thread.start()
        assert handle.wait(on_stdout=answer).stdout == "first\ngot hello\n"
        thread.join()
        assert seen[0] == "first\n"


def test_text_split_in_the_middle_of_a_letter_is_joined(sandbox):
    result = sandbox.commands.run(r"printf '\xe2\x82'; sleep 0.2; printf '\xac'")
    assert result.stdout == "€"


def test_a_grandchild_that_holds_the_output_does_not_delay_the_end(sandbox):
    result = sandbox.commands.run("sleep 100 & echo done", timeout=20)
    assert result.stdout == "done\n"


@pytest.mark.parametrize("text", ["'quoted' \"twice\" $HOME `x` \\ * ~", "süß 漢字 🦀", "line\nline\n\ttab"])
def test_any_text_goes_through(sandbox, text):
    assert sandbox.commands.run('printf %s "$TEXT"', envs={"TEXT": text}).stdout == text


def test_environment_is_layered_and_does_not_leak(sandbox):
    shown = "echo $FROM_THE_TEMPLATE $OURS $USER $HOME"
    assert sandbox.commands.run(shown, envs={"OURS": "1"}).stdout == "yes 1 user /home/user\n"
    assert sandbox.commands.run(shown).stdout == "yes user /home/user\n"


def test_a_program_starts_at_home_or_where_it_is_told(sandbox):
    assert sandbox.commands.run("pwd").stdout == "/home/user\n"
    assert sandbox.commands.run("pwd", cwd="/usr").stdout == "/usr\n"
    with pytest.raises(InvalidArgumentException, match="does not exist"):
        sandbox.commands.run("pwd", cwd="/not/there")


def test_another_user(sandbox):
    assert sandbox.commands.run("id -un").stdout == "user\n"
    assert sandbox.commands.run("id -un; id -G; pwd", user="root").stdout.split() == ["root", "0", "/root"]
    with pytest.raises(AuthenticationException, match="invalid username: 'nobody-we-know'"):
        sandbox.commands.run("id", user="nobody-we-know")


def test_input_until_it_is_closed(sandbox):
    handle = sandbox.commands.run("sort", background=True, stdin=True)
    handle.send_stdin("b\n")
    handle.send_stdin(b"a\n")
    handle.close_stdin()
    assert handle.wait().stdout == "a\nb\n"


def test_without_input_a_program_reads_nothing(sandbox):
    assert sandbox.commands.run("cat; echo end").stdout == "end\n"


def test_a_stream_of_input_keeps_its_order(sandbox):
    handle = sandbox.commands.run("sha256sum", background=True, stdin=True)
    pieces = [f"{number}\n".encode() * 50 for number in range(400)]
    sandbox.feed(sandbox.commands, handle.pid, pieces)
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout.split()[0] == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_input_for_nobody(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.commands.send_stdin(4_194_000, "x")
    with pytest.raises(NotFoundException):
        sandbox.feed(sandbox.commands, 4_194_000, [b"x"])


def test_a_list_says_what_runs(sandbox):
    handle = sandbox.commands.run("sleep 77", background=True, envs={"MARK": "here"}, cwd="/tmp")
    entry = next(entry for entry in sandbox.commands.list() if entry.pid == handle.pid)
    assert (entry.cmd, entry.args, entry.cwd) == ("/bin/bash", ["-l", "-c", "sleep 77"], "/tmp")
    assert entry.envs["MARK"] == "here"
    assert handle.kill()
    with pytest.raises(CommandExitException):
        handle.wait()
    assert handle.pid not in [entry.pid for entry in sandbox.commands.list()]


def test_whoever_is_killed_is_gone_at_once(sandbox):
    for _ in range(20):
        handle = sandbox.commands.run("sleep 77", background=True)
        assert sandbox.commands.kill(handle.pid)
        with pytest.raises(CommandExitException):
            sandbox.commands.run(f"kill -0 {handle.pid}")
    assert not sandbox.commands.kill(handle.pid)


def test_a_time_limit_ends_the_whole_group(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 7654 & sleep 7654", timeout=0.5)
    gone = "while pgrep -f '^sleep 7654$'; do sleep 0.05; done >/dev/null"
    assert sandbox.commands.run(gone, timeout=20).exit_code == 0


def test_a_program_outlives_its_listener(sandbox):
    first = sandbox.commands.run("read line; echo $line; exit 3", background=True, stdin=True)
    pid = first.pid
    first.disconnect()
    second = sandbox.commands.connect(pid)
    assert second.pid == pid
    sandbox.commands.send_stdin(pid, "still here\n")
    with pytest.raises(CommandExitException) as caught:
        second.wait()
    assert (caught.value.exit_code, caught.value.stdout) == (3, "still here\n")


def test_an_end_can_be_asked_for_afterwards(sandbox):
    handle = sandbox.commands.run("exit 9", background=True)
    with pytest.raises(CommandExitException):
        handle.wait()
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.connect(handle.pid).wait()
    assert caught.value.exit_code == 9


def test_connecting_to_nobody(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(4_194_000)


def test_two_listeners_get_the_same(sandbox):
    first = sandbox.commands.run("read line; seq 1 1000", background=True, stdin=True)
    second = sandbox.commands.connect(first.pid)
    sandbox.commands.send_stdin(first.pid, "go\n")
    expected = "".join(f"{number}\n" for number in range(1, 1001))
    assert first.wait().stdout == expected
    assert second.wait().stdout == expected


def test_many_at_once(sandbox):
    handles = [sandbox.commands.run(f"sleep 0.2; echo {number}", background=True) for number in range(40)]
    assert [handle.wait().stdout for handle in handles] == [f"{number}\n" for number in range(40)]


def test_bytes_that_are_no_text_are_replaced_not_lost(sandbox):
    result = sandbox.commands.run(r"printf 'a\xffb'; printf '\x00\xff' | base64")
    assert result.stdout.startswith("a\N{REPLACEMENT CHARACTER}b")
    assert base64.b64decode(result.stdout[3:]) == b"\0\xff"
