"""Work directories: taken once, resumed, begun anew, never somebody else's."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from mlx_flash.common import work_directory
from mlx_flash.common.work_directory import WorkDirectory
from mlx_flash.errors import ConvertError


@pytest.fixture
def work(tmp_path):
    return WorkDirectory(tmp_path / "deep" / "out.partial", "work.key", "work", ConvertError)


def leave(work, key="a key"):
    """An interrupted run."""
    with pytest.raises(KeyboardInterrupt), work.claim(key) as path:
        (path / "done").write_text("half of it")
        raise KeyboardInterrupt


def test_the_same_key_goes_on(work):
    leave(work)
    with work.claim("a key") as path:
        assert path == work.path
        assert sorted(file.name for file in path.iterdir()) == ["done", "work.key"]


def test_another_key_begins_anew(work):
    leave(work)
    (work.path / "folder").mkdir()
    (work.path / "folder" / "file").write_text("")
    (work.path / "link").symlink_to(work.path.parent)
    with work.claim("another") as path:
        assert [file.name for file in path.iterdir()] == ["work.key"]
        assert (path / "work.key").read_text() == "another"
    assert work.path.parent.is_dir()


@pytest.mark.parametrize("fails", [False, True])
def test_where_nothing_was_done_nothing_stays(work, fails):
    try:
        with work.claim("a key"):
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert not work.path.exists()


def test_renamed_or_removed_inside(work):
    with work.claim("a key") as path:
        (path / "result").write_text("whole")
        path.rename(path.with_name("out"))
    assert (work.path.with_name("out") / "result").read_text() == "whole"
    with work.claim("a key") as path:
        (path / "state").write_text("")
        work.remove()
    assert not work.path.exists()


def test_one_process_at_a_time(work):
    code = (
        "import sys; from pathlib import Path\n"
        "from mlx_flash.common.work_directory import WorkDirectory\n"
        "from mlx_flash.errors import ConvertError\n"
        "work = WorkDirectory(Path(sys.argv[1]), 'work.key', 'work', ConvertError)\n"
        "try:\n"
        "    work.claim('a key').__enter__()\n"
        "except ConvertError as error:\n"
        "    print(error)\n"
    )
    with work.claim("a key") as path:
        (path / "done").write_text("mine")
        found = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        assert found.stdout == f"another work is writing {path}; wait for it\n"
        assert (path / "done").read_text() == "mine"
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert found.stdout == ""


def test_finished_by_another_process_meanwhile(work, monkeypatch):
    def flock(*_):
        work.path.rename(work.path.with_name("out"))

    monkeypatch.setattr(work_directory.fcntl, "flock", flock)
    with pytest.raises(ConvertError, match="another work has just finished"):
        work.claim("a key").__enter__()
    assert not work.path.exists()


def test_a_file_system_without_locks(work, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(work_directory.fcntl, "flock", flock)
    leave(work)
    with work.claim("a key") as path:
        assert (path / "done").is_file()


@pytest.mark.parametrize("what", ["file", "link", "directory of others"])
def test_what_is_not_ours_stays(work, what):
    work.path.parent.mkdir()
    if what == "file":
        work.path.write_text("mine")
    elif what == "link":
        work.path.symlink_to(work.path.parent)
    else:
        work.path.mkdir()
        (work.path / "mine.txt").write_text("mine")
    before = sorted(work.path.parent.rglob("*"))
    with pytest.raises(ConvertError, match="in the way and not made by mlx_flash; move it"):
        work.claim("a key").__enter__()
    assert sorted(work.path.parent.rglob("*")) == before


def test_errors_of_the_disk_are_told(work):
    """With what to do; errors of other kinds pass as they are."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    with (
        pytest.raises(ConvertError, match=r"writing some/file failed: No space.*make room and run"),
        work.claim("a key"),
    ):
        raise error
    with (
        pytest.raises(ConvertError, match=r"writing .*out.partial failed: Input/output error; run"),
        work.claim("a key"),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(ConvertError, match="an error of ours"), work.claim("a key"):
        raise ConvertError("an error of ours")


def test_no_permission(work, monkeypatch):
    def mkdir(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(work.path), "mkdir", mkdir)
    with pytest.raises(ConvertError, match=r"cannot write .*out.partial: Permission denied"):
        work.claim("a key").__enter__()


def test_the_lock_comes_before_anything_changes(work):
    leave(work)
    seen = []

    def before():
        seen.append(sorted(file.name for file in work.path.iterdir()))
        with pytest.raises(ConvertError, match="another work is writing"):
            work.claim("a key").__enter__()

    with work.claim("another", before):
        pass
    assert seen == [["done", "work.key"]]


def test_room_on_the_disk(work, monkeypatch):
    usage = shutil.disk_usage(work.path.parent.parent)
    free = work_directory.MARGIN_BYTES + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    work.check_disk(1000, "choose another disk")
    with pytest.raises(ConvertError, match=r"disk for out: 67.1 MB needed, 67.1 MB free"):
        work.check_disk(1001, "choose another disk", target="out")
    with pytest.raises(ConvertError, match=r"out.partial: .*make room or choose another disk"):
        work.check_disk(1001, "choose another disk")
    with pytest.raises(KeyboardInterrupt), work.claim("a key") as path:
        (path / "done").write_bytes(b"x" * 5000)
        raise KeyboardInterrupt
    work.check_disk(5000, "choose another disk")  # as much is there
