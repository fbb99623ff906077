"""Whole files up and down, and the tree they are in."""

import io
import os

import pytest
from e2b import FileNotFoundException, FileType, InvalidArgumentException, SandboxException
from e2b.exceptions import AuthenticationException

EVERY_BYTE = bytes(range(256)) * 700


@pytest.mark.parametrize("options", [{}, {"use_octet_stream": True}, {"gzip": True}], ids=["form", "raw", "gzip"])
def test_what_is_written_is_read(sandbox, directory, options):
    info = sandbox.files.write(f"{directory}/new/deep/file", EVERY_BYTE, **options)
    assert (info.name, info.path, info.type) == ("file", f"{directory}/new/deep/file", FileType.FILE)
    assert bytes(sandbox.files.read(info.path, format="bytes")) == EVERY_BYTE
    assert bytes(sandbox.files.read(info.path, format="bytes", gzip=True)) == EVERY_BYTE
    assert b"".join(sandbox.stream(info.path)) == EVERY_BYTE


def test_shorter_content_leaves_no_tail(sandbox, directory):
    for content in ("a long first content", "short", ""):
        sandbox.files.write(f"{directory}/file", content)
        assert sandbox.files.read(f"{directory}/file") == content


def test_a_stream_of_unknown_length(sandbox, directory):
    content = io.BytesIO(EVERY_BYTE * 20)
    sandbox.files.write(f"{directory}/file", content)
    assert b"".join(sandbox.stream(f"{directory}/file", gzip=True)) == EVERY_BYTE * 20


def test_many_files_in_one_upload(sandbox, directory):
    files = [{"path": f"{directory}/sub{number % 3}/ü {number}.txt", "data": f"content {number}"} for number in range(30)]
    infos = sandbox.files.write_files(files)
    assert [info.path for info in infos] == [file["path"] for file in files]
    assert [sandbox.files.read(file["path"]) for file in files] == [file["data"] for file in files]


def test_a_file_belongs_to_who_wrote_it(sandbox, directory):
    sandbox.files.write(f"{directory}/sub/file", "12345")
    info = sandbox.files.get_info(f"{directory}/sub/file")
    assert (info.owner, info.group, info.mode, info.permissions, info.size) == ("user", "user", 0o644, "-rw-r--r--", 5)
    info = sandbox.files.get_info(f"{directory}/sub")
    assert (info.type, info.owner, info.mode, info.permissions) == (FileType.DIR, "user", 0o755, "drwxr-xr-x")
    sandbox.files.write(f"{directory}/by-root", "", user="root")
    assert sandbox.files.get_info(f"{directory}/by-root").owner == "root"


def test_relative_paths_begin_at_home(sandbox, directory):
    name = directory.rsplit("/", 1)[1]
    for number, path in enumerate((f"{name}/file", f"~/{name}/file", f"./{name}/../{name}/file")):
        sandbox.files.write(path, str(number))
        assert sandbox.files.read(f"{directory}/file") == str(number)


def test_what_is_missing_is_said_to_be(sandbox, directory):
    missing = f"{directory}/missing"
    for act in (sandbox.files.read, sandbox.files.get_info, sandbox.files.list, sandbox.stream):
        with pytest.raises(FileNotFoundException):
            act(missing)
    with pytest.raises(FileNotFoundException):
        sandbox.files.rename(missing, f"{directory}/other")
    assert not sandbox.files.exists(missing)
    sandbox.files.remove(missing)


def test_a_directory_is_no_file(sandbox, directory):
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read(directory)
    with pytest.raises(InvalidArgumentException):
        sandbox.files.write(directory, "x")
    sandbox.files.write(f"{directory}/file", "x")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.list(f"{directory}/file")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.make_dir(f"{directory}/file")


def test_unknown_users_have_no_files(sandbox):
    with pytest.raises(AuthenticationException):
        sandbox.files.read("x", user="nobody-we-know")
    with pytest.raises(AuthenticationException):
        sandbox.files.write("x", "x", user="nobody-we-know")
    with pytest.raises(AuthenticationException):
        sandbox.files.list(".", user="nobody-we-know")


def test_directories_are_made_once(sandbox, directory):
    assert sandbox.files.make_dir(f"{directory}/a/b/c") is True
    assert sandbox.files.make_dir(f"{directory}/a/b/c") is False
    assert sandbox.files.get_info(f"{directory}/a").owner == "user"


def test_a_list_goes_as_deep_as_asked(sandbox, directory):
    sandbox.files.write_files([{"path": f"{directory}/{path}", "data": ""} for path in ("b/c/d/e", "b/a", "a")])

    def listed(depth):
        return [entry.path[len(directory) + 1 :] for entry in sandbox.files.list(directory, depth=depth)]

    assert listed(1) == ["a", "b"]
    assert listed(2) == ["a", "b", "b/a", "b/c"]
    assert listed(9) == ["a", "b", "b/a", "b/c", "b/c/d", "b/c/d/e"]
    with pytest.raises(InvalidArgumentException):
        sandbox.files.list(directory, depth=0)


def test_a_link_shows_where_it_leads(sandbox, directory):
    sandbox.files.write(f"{directory}/file", "content")
    sandbox.commands.run("ln -s file link; ln -s link again; ln -s / root; ln -s nowhere broken", cwd=directory)
    info = sandbox.files.get_info(f"{directory}/again")
    assert (info.path, info.type, info.symlink_target) == (f"{directory}/again", FileType.FILE, f"{directory}/file")
    info = sandbox.files.get_info(f"{directory}/root")
    assert (info.type, info.symlink_target) == (FileType.DIR, "/")
    assert sandbox.files.exists(f"{directory}/broken")
    assert sandbox.files.read(f"{directory}/again") == "content"
    sandbox.files.remove(f"{directory}/root")
    assert sandbox.files.exists("/etc/passwd")


def test_a_move_takes_everything_along(sandbox, directory):
    sandbox.files.write(f"{directory}/from/sub/file", "content")
    info = sandbox.files.rename(f"{directory}/from", f"{directory}/new/to")
    assert (info.name, info.path, info.type) == ("to", f"{directory}/new/to", FileType.DIR)
    assert sandbox.files.read(f"{directory}/new/to/sub/file") == "content"
    assert not sandbox.files.exists(f"{directory}/from")


def test_remove_takes_a_whole_tree(sandbox, directory):
    sandbox.files.write_files([{"path": f"{directory}/tree/{n}/{n}", "data": ""} for n in range(20)])
    sandbox.files.remove(f"{directory}/tree")
    assert sandbox.files.list(directory) == []


def test_files_of_proc_have_no_size_but_a_content(sandbox):
    assert len(sandbox.files.read("/proc/sys/kernel/random/boot_id").strip()) == 36
    assert len(sandbox.files.read("/proc/sys/kernel/random/boot_id", gzip=True).strip()) == 36


@pytest.fixture
def attributes(agent):
    try:
        os.setxattr(agent.home, "user.wrenn.probe", b"")
    except OSError as error:
        pytest.skip(f"no extended attributes here: {error}")


@pytest.mark.parametrize("raw", [False, True], ids=["form", "raw"])
def test_metadata_stays_with_a_file(sandbox, directory, attributes, raw):
    path, metadata = f"{directory}/file", {"author": "Ann", "Kind": "a b; c=d"}
    kept = {"author": "Ann", "kind": "a b; c=d"}
    assert sandbox.files.write(path, "x", metadata=metadata, use_octet_stream=raw).metadata == kept
    assert sandbox.files.get_info(path).metadata == kept
    assert sandbox.files.list(directory)[0].metadata == kept
    assert sandbox.files.rename(path, f"{path}2").metadata == kept
    assert not sandbox.files.write(f"{path}2", "y", use_octet_stream=raw).metadata
    assert not sandbox.files.get_info(f"{path}2").metadata


def test_bad_metadata_is_refused(sandbox, directory, attributes):
    for metadata in ({"k" * 300: "v"}, {"k": "v" * 5000}):
        with pytest.raises(SandboxException):
            sandbox.files.write(f"{directory}/file", "x", metadata=metadata)
    assert not sandbox.files.exists(f"{directory}/file")
