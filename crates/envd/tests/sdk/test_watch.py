"""Watches: the counts the SDK's users rely on, and following a tree as it grows."""

import pytest
from clients import wait_for
from e2b import FileNotFoundException, FilesystemEventType, FileType, InvalidArgumentException

CREATE, WRITE, REMOVE, RENAME, CHMOD = (
    getattr(FilesystemEventType, name) for name in ("CREATE", "WRITE", "REMOVE", "RENAME", "CHMOD")
)


def kinds(events, name):
    return [event.type for event in events if event.name == name]


def test_a_new_file_is_three_events(sandbox, directory):
    watch = sandbox.watch(directory)
    sandbox.files.write(f"{directory}/file", "content")
    watch.until(WRITE, "file")
    assert kinds(watch.events(), "file") == [CREATE, CHMOD, WRITE]
    watch.stop()


def test_every_kind_of_event(sandbox, directory):
    watch = sandbox.watch(directory)
    sandbox.commands.run("echo x > a; chmod 600 a; mv a b; rm b; mkdir last", cwd=directory)
    watch.until(CREATE, "last")
    assert kinds(watch.events(), "a") == [CREATE, WRITE, CHMOD, RENAME]
    assert kinds(watch.events(), "b") == [CREATE, REMOVE]
    watch.stop()


def test_only_the_directory_itself_unless_told_otherwise(sandbox, directory):
    sandbox.files.make_dir(f"{directory}/sub")
    watch = sandbox.watch(directory)
    sandbox.files.write(f"{directory}/sub/file", "content")
    sandbox.files.write(f"{directory}/last", "content")
    watch.until(WRITE, "last")
    assert not kinds(watch.events(), "sub/file")
    watch.stop()


def test_a_watch_follows_new_directories(sandbox, directory):
    watch = sandbox.watch(directory, recursive=True)
    for path in ("one", "one/two", "one/two/three"):
        sandbox.files.make_dir(f"{directory}/{path}")
        watch.until(CREATE, path)
    sandbox.files.write(f"{directory}/one/two/three/file", "content")
    watch.until(WRITE, "one/two/three/file")
    watch.stop()


def test_a_directory_made_and_filled_at_once_is_not_missed(sandbox, directory):
    watch = sandbox.watch(directory, recursive=True)
    for number in range(20):
        sandbox.commands.run(f"mkdir -p d{number}/e && touch d{number}/e/file", cwd=directory)
        watch.until(CREATE, f"d{number}/e/file")
    watch.stop()


def test_a_directory_moved_in_is_followed(sandbox, directory):
    sandbox.files.write(f"{directory}/outside/file", "content")
    sandbox.files.make_dir(f"{directory}/watched")
    watch = sandbox.watch(f"{directory}/watched", recursive=True)
    sandbox.files.rename(f"{directory}/outside", f"{directory}/watched/inside")
    watch.until(CREATE, "inside")
    sandbox.files.write(f"{directory}/watched/inside/other", "content")
    watch.until(WRITE, "inside/other")
    watch.stop()


def test_an_event_can_carry_its_entry(sandbox, directory):
    watch = sandbox.watch(directory, include_entry=True)
    sandbox.files.write(f"{directory}/file", "content")
    entry = watch.until(WRITE, "file").entry
    assert (entry.name, entry.path, entry.type) == ("file", f"{directory}/file", FileType.FILE)
    assert (entry.owner, entry.size) == ("user", 7)
    sandbox.files.remove(f"{directory}/file")
    assert watch.until(REMOVE, "file").entry is None
    watch.stop()


def test_a_stopped_watch_says_nothing_more(sandbox, directory):
    watch = sandbox.watch(directory)
    sandbox.files.write(f"{directory}/one", "")
    watch.until(CREATE, "one")
    watch.stop()
    other = sandbox.watch(directory)
    sandbox.files.write(f"{directory}/two", "")
    other.until(CREATE, "two")
    other.stop()


def test_many_events_all_arrive(sandbox, directory):
    watch = sandbox.watch(directory)
    sandbox.commands.run("for n in $(seq 1 1500); do : > file$n; done", cwd=directory)
    expected = {f"file{number}" for number in range(1, 1501)}
    wait_for("all files", lambda: expected <= {event.name for event in watch.events() if event.type == CREATE})
    watch.stop()


def test_what_cannot_be_watched(sandbox, directory):
    with pytest.raises(FileNotFoundException):
        sandbox.watch(f"{directory}/missing")
    sandbox.files.write(f"{directory}/file", "")
    with pytest.raises(InvalidArgumentException):
        sandbox.watch(f"{directory}/file")


def test_network_mounts_may_be_allowed(sandbox, directory):
    watch = sandbox.watch(directory, allow_network_mounts=True)
    sandbox.files.write(f"{directory}/file", "")
    watch.until(CREATE, "file")
    watch.stop()
